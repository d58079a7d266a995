// Shared memory of a selecting CTA and the protocol between its producer lane and its two consumer warpgroups.
//
// full[i]   1 arrival + bytes   64 columns of 128 rows and of 256 cells are in place
// empty[i]  8 arrivals          every consumer warp is done with the stage
// told[i]   1 arrival           header i names a tile, or the end
// free[i]   8 arrivals          every consumer warp has read header i
// The producer starts on phase 1 (everything is empty), the consumers on phase 0.
#pragma once
#include "elastic/ptx_sm90.cuh"
#include "elastic/xattention.cuh"

namespace elastic {

constexpr int kConsumerWarps = 8, kStages = 4;
constexpr int kRowBytes = kRows * 128, kCellBytes = kCells * 128, kStageBytes = kRowBytes + kCellBytes;

struct SelectHeader {
  Tile tile;
  int done;
};

struct SelectControl {
  u64 full[kStages], empty[kStages], told[2], free[2];
  SelectHeader header[2];
  ScheduleSize size;

  ELASTIC_FN void init() {
    for (int i = 0; i < 2; ++i) {
      barrier_init(&told[i], 1);
      barrier_init(&free[i], kConsumerWarps);
    }
    for (int i = 0; i < kStages; ++i) {
      barrier_init(&full[i], 1);
      barrier_init(&empty[i], kConsumerWarps);
    }
    fence_barrier_init();
  }
};
static_assert(sizeof(SelectControl) <= 1024, "the units start 1024 bytes after the barriers");

struct SelectLayout {  // offsets from a base that is a multiple of 1024
  static constexpr int control = kStages * kStageBytes;
  static constexpr int units = control + 1024;  // then one segment per sample
};

// Box of a rank-5 map (head dim, phase, cell, head, batch row).
ELASTIC_FN void tma_load_phase(const TensorMap& map, u64* bar, u32 shared, int d, int phase, int cell, int head,
                               int row) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8;" ::"r"(shared),
      "l"(&map), "r"(shared_address(bar)), "r"(d), "r"(phase), "r"(cell), "r"(head), "r"(row), "l"(kEvictLast)
      : "memory");
}

// One elected lane: walks the tiles and feeds the stages. Along the contraction, phase r of the cells meets phase
// kStride - 1 - r of the rows: the antidiagonals.
struct SelectProducer {
  const SelectParams& p;
  SelectControl& c;
  u32 base;

  // Phases count from the tensor's first token, so a sample's offset turns them round.
  ELASTIC_FN static void load(const TensorMap& main, const TensorMap& tail, int tail_tokens, u64* bar, u32 shared,
                              int d, int token, int cell, int head, int row) {
    const int phase = token & (kStride - 1), at = (token >> kLogStride) + cell;
    if (phase < tail_tokens) {
      tma_load_phase(tail, bar, shared, d, phase, at, head, row);
    } else {
      tma_load_phase(main, bar, shared, d, phase - tail_tokens, at, head, row);
    }
  }

  ELASTIC_FN void run(const Segment* segments) const {
    const ScheduleSize size = c.size;
    Ring<2> h{0, 1};
    Ring<kStages> stage{0, 1};
    for (int t = blockIdx.x;;) {
      wait(&c.free[h.slot], h.phase);
      if (t >= size.tiles) {
        c.header[h.slot].done = 1;
        arrive(&c.told[h.slot]);
        break;
      }
      const Tile tile = decode_tile<RowTiles, kD>(p.f, segments, size.segments, t);
      c.header[h.slot] = SelectHeader{tile, 0};
      arrive(&c.told[h.slot]);
      h.advance();
      t = atomicAdd(p.f.counter, 1) + gridDim.x;
      const Sample sample = read_sample(p.f, tile.sample);
      const Extent extent(sample, tile.block);
      const int kv_head = tile.head / (p.f.heads / p.f.kv_heads), key_tiles = extent.key_tiles();
      for (int kt = 0; kt < key_tiles; ++kt) {
#pragma unroll 1
        for (int step = 0; step < kSteps; ++step) {
          const int phase = step / (kD / 64), d = step % (kD / 64) * 64;
          const u32 rows = base + stage.slot * kStageBytes;
          u64* bar = &c.full[stage.slot];
          wait(&c.empty[stage.slot], stage.phase);
          arrive_expect(bar, kStageBytes);
          load(p.f.map_k, p.f.map_o, p.tail_k, bar, rows + kRowBytes, d, sample.begin_k + phase, kt * kCells, kv_head,
               sample.row);
          load(p.f.map_q, p.f.map_v, p.tail_q, bar, rows, d, sample.begin_q + kStride - 1 - phase, extent.first_row,
               tile.head, sample.row);
          stage.advance();
        }
      }
    }
    release_counter(p.f.counter);
  }
};

}  // namespace elastic
