// XAttention on compute capability 9.0: scores of rows and cells, their softmax summed by blocks, and the choice of key
// blocks, in one persistent launch. Warpgroup 0 produces (TMA, one lane), warpgroups 1 and 2 consume 64 rows each: a
// product of 64 x 256 over the phases and the head dim, then, per row and key block, the running log2 of the sum of
// exponentials into scratch. After a tile's last key tile the softmax's denominators are known; each warp then turns
// its own 16 rows of scratch into block masses and chooses. No warp reads another warp's scratch.
// Compile-time: ELASTIC_HEAD_DIM (64, 128), ELASTIC_BF16 (1, else fp16), ELASTIC_STRIDE (8, 16), ELASTIC_BLOCK (64,
// 128).
#include "elastic/block_choice.cuh"
#include "elastic/block_sums.cuh"
#include "elastic/select_pipeline_sm90.cuh"
#include "elastic/wgmma_wide.cuh"

namespace elastic {

constexpr int kConsumers = 1;  // named barrier of both warpgroups

struct SelectConsumer {
  const SelectParams& p;
  SelectControl& c;
  u32 base;
  u32* units;  // this warp's share of shared memory
  int group, warp, lane;

  ELASTIC_FN void release(u64* bar) const {
    if (lane == 0) arrive(bar);
  }

  // A row or cell that the sample's end cuts is filled with zeros; what lies after it belongs to others.
  ELASTIC_FN void clear_tails(int phase, const Tail& rows, const Tail& cells, u32 stage) const {
    const bool of_row = rows.misses(kStride - 1 - phase, kRows), of_cell = cells.misses(phase, kCells);
    if (!of_row && !of_cell) return;
    if (group == 0 && lane < 8 && ((warp == 0 && of_row) || (warp == 1 && of_cell))) {
      const u32 at = stage + (warp == 0 ? rows.row * 128 : kRowBytes + cells.row * 128) + lane * 16;
      asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(at), "r"(0) : "memory");
    }
    fence_async();
    named_sync(kConsumers, 256);
  }

  ELASTIC_FN void scores(float (&s)[128], const Tail& rows, const Tail& cells, Ring<kStages>& stage) const {
    int before = 0;
#pragma unroll 1
    for (int step = 0; step < kSteps; ++step) {
      const u32 at = base + stage.slot * kStageBytes;
      wait(&c.full[stage.slot], stage.phase);
      clear_tails(step / (kD / 64), rows, cells, at);
      const u64 desc_rows = descriptor(kDescK, at + group * (64 * 128));
      const u64 desc_cells = descriptor(kDescK, at + kRowBytes);
      wgmma_fence();
#pragma unroll
      for (int kk = 0; kk < 4; ++kk) wgmma_wide(s, desc_rows + 2 * kk, desc_cells + 2 * kk, step + kk);
      wgmma_commit();
      wgmma_wait<1>();
      if (step > 0) release(&c.empty[before]);
      before = stage.slot;
      stage.advance();
    }
    wgmma_wait<0>();
    pin(s);
    release(&c.empty[before]);
  }

  // Mass of the key blocks of one query block, as units; the forced ones count apart and leave a zero.
  ELASTIC_FN void choose(const float* u, const float (&norm)[kQueryRows], int first, int end, u32* own_units,
                         int blocks, Forced forced, u32* bits, float* mass_out) const {
    u32 total = 0, certain = 0, heaviest = 0;
    for (int j = lane; j < blocks; j += 32) {
      float mass = 0.0f;
#pragma unroll
      for (int r = 0; r < kQueryRows; ++r) {
        if (r >= first && r < end) mass += exp2_approx(u[i64(r) * p.columns + j] - norm[r]);
      }
      if (mass_out) mass_out[j] = mass;
      const u32 x = u32(mass * kUnits), free = forced.has(j) ? 0 : x;
      total += x;
      certain += x - free;
      heaviest = heaviest > free ? heaviest : free;
      own_units[j] = free;
    }
    __syncwarp();
    heaviest = __reduce_max_sync(~0u, heaviest);
    const Cut cut = find_cut(own_units, blocks, warp_sum(total), warp_sum(certain), heaviest, p.threshold, lane);
    write_choice(bits, p.f.bits_words, own_units, blocks, forced, cut, lane);
    __syncwarp();  // the next query block writes the same units
  }

  ELASTIC_FN void choose_all(const Tile& tile, const Sample& sample, const Extent& extent, RowSums& sums,
                             float* scratch) const {
    float norm[2];
#pragma unroll
    for (int y = 0; y < 2; ++y) norm[y] = sums.norm(y, p.f.scale_log2 / kStride);
    __syncwarp();  // the lanes' sums are in the scratch
#pragma unroll 1
    for (int i = 0; i < 16 / kQueryRows; ++i) {
      const int row = group * 64 + warp * 16 + i * kQueryRows;  // of the tile
      const int m = (extent.first_row + row) / kQueryRows;
      if (row >= extent.rows) break;
      float norms[kQueryRows];
#pragma unroll
      for (int r = 0; r < kQueryRows; ++r) {
        norms[r] = __shfl_sync(~0u, kQueryRows == 16 ? norm[r / 8] : i == 0 ? norm[0] : norm[1], r % 8 * 4);
      }
      const int begin = m * kTileM + extent.past, last = min_i(m * kTileM + kTileM, sample.len_q) - 1 + extent.past;
      const int blocks = last < 0 ? 0 : last / kBlock + 1;
      float* u = scratch + i64(row) * p.columns;
      const i64 line = (i64(tile.sample) * p.f.heads + tile.head) * p.f.bits_rows + m;
      // A long row's units replace its first row in the scratch: each lane has read what it overwrites.
      u32* own_units = blocks <= p.shared_units ? units : (u32*)u;
      choose(u, norms, -(extent.first_row + row + extent.shift), extent.rows - row, own_units, blocks,
             Forced{max_i(0, begin) / kBlock}, (u32*)p.f.bits + line * p.f.bits_words,
             p.mass ? p.mass + line * p.columns : nullptr);
    }
  }

  ELASTIC_FN void run() const {
    Ring<2> h{0, 0};
    Ring<kStages> stage{0, 0};
    float s[128];
    float* scratch = p.f.lse + i64(blockIdx.x) * kRows * p.columns;
    while (true) {
      wait(&c.told[h.slot], h.phase);
      const SelectHeader header = c.header[h.slot];
      __syncwarp();
      if (header.done) break;
      release(&c.free[h.slot]);
      h.advance();
      const Sample sample = read_sample(p.f, header.tile.sample);
      const Extent extent(sample, header.tile.block);
      const int key_tiles = extent.key_tiles(), row = group * 64 + warp * 16;
      RowSums sums;
      sums.init();
#pragma unroll 1
      for (int kt = 0; kt < key_tiles; ++kt) {
        scores(s, Tail(sample.len_q, extent.first_row), Tail(sample.len_k, kt * kCells), stage);
        const int last = extent.first_row + row + extent.shift - kt * kCells;  // what the warp's first row sees
        mask_cells(s, last, extent.cells - kt * kCells, lane);
        sums.add(s, p.f.scale_log2 / kStride, scratch + i64(row) * p.columns + kt * kTileBlocks, p.columns, lane);
      }
      choose_all(header.tile, sample, extent, sums, scratch);
    }
  }
};

}  // namespace elastic

extern "C" __global__ void __launch_bounds__(384, 1)
    xattention_select_sm90(const __grid_constant__ elastic::SelectParams p) {
  using namespace elastic;
  extern __shared__ char shared_raw[];
  const u32 base = (shared_address(shared_raw) + 1023) & ~1023u;
  char* shared = shared_raw + (base - shared_address(shared_raw));
  SelectControl& control = *(SelectControl*)(shared + SelectLayout::control);
  u32* units = (u32*)(shared + SelectLayout::units);
  Segment* segments = (Segment*)(units + kConsumerWarps * p.shared_units);
  const int warpgroup = threadIdx.x / 128;
  if (threadIdx.x < 32) build_schedule<RowTiles>(p.f, segments, &control.size, threadIdx.x);
  if (threadIdx.x == 32) control.init();
  __syncthreads();
  if (warpgroup == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x == 0) SelectProducer{p, control, base}.run(segments);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    const int group = __shfl_sync(~0u, warpgroup - 1, 0), warp = __shfl_sync(~0u, int(threadIdx.x / 32 % 4), 0);
    u32* own = units + (group * 4 + warp) * p.shared_units;
    SelectConsumer{p, control, base, own, group, warp, int(threadIdx.x % 32)}.run();
  }
}
