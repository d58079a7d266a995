// Shared memory of a backward CTA and the protocol between its warps. Warpgroup 0: warp 0 produces (TMA), warps 1 and 2
// add the dQ tiles of warpgroups 1 and 2 to global memory. Warpgroups 1 and 2 consume, 64 keys each.
//
// full_kv / empty_kv  header, K and V of a tile; 1 arrival + bytes / 8 consumer warps
// full[i] / empty[i]  stage i: entry, Q, dO, their lse2 and delta; 1 arrival + bytes / 8 consumer warps
// sum_full / _empty   dQ tile of a warpgroup and where it belongs; 4 warps / 1 arrival of the adding warp
// kScores             named barrier: both warpgroups have written their dS
// kClear              named barrier: rows beyond the sample's end are zeros
#pragma once
#include "elastic/backward.cuh"
#include "elastic/ptx_sm90.cuh"

namespace elastic {

constexpr int kD = ELASTIC_HEAD_DIM;
constexpr int kRows = kBackwardRows<kD>;  // query rows of a step: 64 at D 128, 128 at D 64
constexpr int kKeys = 2 * kHalf;          // keys of a tile
constexpr int kConsumerWarps = 8, kStages = 2;
// A warp hands back by one lane after __syncwarp. ELASTIC_EVERY_LANE lets all lanes arrive: compute-sanitizer's
// racecheck does not follow other lanes' accesses through the __syncwarp.
#if ELASTIC_EVERY_LANE
constexpr int kArrivals = 32;
#else
constexpr int kArrivals = 1;
#endif
constexpr int kBytesKV = kKeys * kD * 2, kBytesQ = kRows * kD * 2, kBytesDS = kRows * kKeys * 2;
constexpr int kBytesSum = kTileElements / 2 * 4;  // dQ of one warpgroup, fp32
constexpr int kScores = 1, kClear = 2;  // named barriers of both warpgroups

constexpr int kWork = 0, kEmpty = 1, kDone = 2;
struct BackwardHeader {
  int state, row, kv_head, k_row;  // k_row: first key in the batch row
  int rows, key0, delta, pad;      // keys of the sample from the tile's first on; the tile's first key
  Rule rule;
};

// flags: kMask + w: element mask for warpgroup w; kHidden + w: it sees nothing; kTail: rows beyond the sample.
constexpr u32 kLast = 1, kMask = 2, kHidden = 8, kTail = 32;
struct Step {
  int head, m0;  // query head; first query row in the sample
  int tile;      // row tile
  u32 flags;
  int rows, turn;  // query rows of the sample from m0 on; key blocks that add to this row tile earlier
};

struct SumJob {
  float* target;  // null: no more
  int* turn_at;
  int turn;
};

struct BackwardControl {
  u64 full_kv, empty_kv, full[kStages], empty[kStages], sum_full[2], sum_empty[2];
  Step step[kStages];
  BackwardHeader header;
  SumJob job[2];
  ScheduleSize size;
};

struct BackwardLayout {  // offsets from a base that is a multiple of 1024
  static constexpr int k = 0;
  static constexpr int v = k + kBytesKV;
  static constexpr int q = v + kBytesKV;
  static constexpr int grad = q + kStages * kBytesQ;
  static constexpr int ds = grad + kStages * kBytesQ;
  static constexpr int sum = ds + 2 * kBytesDS;
  static constexpr int rows = sum + 2 * kBytesSum;  // per stage: lse2, delta
  static constexpr int control = rows + kStages * 2 * kRows * 4;
  static constexpr int first = control + 1024;  // first row tile of every sample, then the segments
};
static_assert(sizeof(BackwardControl) <= 1024, "the tables start 1024 bytes after the barriers");

// Query tiles that a key block meets, head after head of the group, ascending. All lanes of a warp call together.
struct StepIterator {
  const u32* bits;  // word of this key block in row 0 of the group's first head, or null
  i64 head_words;
  int row_words, rows, shift;
  u32 field;  // bits of the block: 3 where it is two 64-key blocks
  QueryRange range;
  int group, g, m, chunk;
  u32 lower, upper;

  ELASTIC_FN u32 halves() const { return bits ? (lower >> (m * kRows / kTileM & 31) & 1) | (upper >> (m * kRows / kTileM & 31) & 1) << 1 : 3; }

  ELASTIC_FN void load(int lane) {
    const int row = m * kRows / kTileM;
    if (chunk == row / 32) return;
    chunk = row / 32;
    const int mine = chunk * 32 + lane;
    const u32 word = mine < rows ? bits[g * head_words + i64(mine) * row_words] >> shift & field : 0;
    lower = __ballot_sync(~0u, word & 1);
    upper = field == 1 ? lower : __ballot_sync(~0u, word & 2);
  }

  ELASTIC_FN bool next(int lane) {
    while (g < group) {
      if (++m < range.end) {
        if (!bits) return true;
        load(lane);
        if (halves()) return true;
      } else {
        ++g;
        m = range.first - 1;
        chunk = -1;
      }
    }
    return false;
  }
};

struct Producer {  // one full warp; its lane 0 issues
  const BackwardParams& p;
  BackwardControl& c;
  u32 base;
  int lane;

  ELASTIC_FN void load_rows(const TensorMap& map, u64* bar, u32 shared, int rows, int token, int head, int row) const {
#pragma unroll
    for (int d = 0; d < kD / 64; ++d) tma_load(map, bar, shared + d * (rows * 128), d * 64, token, head, row, kEvictLast);
  }

  ELASTIC_FN int turn_of(const StepIterator& it, const Rule& rule, int n, int delta) const {
    if (!p.turns) return 0;
    if (!it.bits) return blocks_before(n, it.m * kRows + delta, rule);
    // The row of bits up to this block's word, one bit a key block.
    const int width = it.field == 1 ? 1 : 2, first = n * width;
    const u32* row = it.bits - first / 32 + it.g * it.head_words + i64(it.m * kRows / kTileM) * it.row_words;
    int count = 0;
    for (int b = 0; b < n; ++b) count += (row[b * width / 32] >> (b * width % 32) & it.field) != 0;
    return count;
  }

  ELASTIC_FN void issue(const Ring<kStages>& st, const Step& step, const Sample& sample) const {
    u64* bar = &c.full[st.slot];
    c.step[st.slot] = step;
    arrive_expect(bar, 2 * kBytesQ + 2 * kRows * 4);
    const int token = sample.begin_q + step.m0;
    load_rows(p.f.map_q, bar, base + BackwardLayout::q + st.slot * kBytesQ, kRows, token, step.head, sample.row);
    load_rows(p.f.map_o, bar, base + BackwardLayout::grad + st.slot * kBytesQ, kRows, token, step.head, sample.row);
    const i64 at = (i64(step.head) * p.row_tiles + step.tile) * kRows;
    const u32 rows = base + BackwardLayout::rows + st.slot * 2 * kRows * 4;
    bulk_load(bar, rows, p.rows + at, kRows * 4);
    bulk_load(bar, rows + kRows * 4, p.rows + i64(p.f.heads) * p.row_tiles * kRows + at, kRows * 4);
  }

  ELASTIC_FN u32 flags_of(u32 halves, int key0, int a0, const Rule& rule) const {
    u32 flags = 0;
#pragma unroll
    for (int w = 0; w < 2; ++w) {
      const int k0 = key0 + w * kHalf;
      if (!(halves >> w & 1)) flags |= kHidden << w;
      if (needs_mask_keys(k0, k0 + kHalf - 1, a0, a0 + kRows - 1, rule)) flags |= kMask << w;
    }
    return flags;
  }

  ELASTIC_FN StepIterator iterator(const Tile& tile, const Sample& sample, const Rule& rule, int mode) const {
    const int key0 = tile.block * kKeys, delta = sample.len_k - sample.len_q, group = p.f.heads / p.f.kv_heads;
    StepIterator it;
    it.range = query_range(key0, min_i(key0 + kKeys, sample.len_k), sample.len_q, delta, kRows, rule);
    it.bits = nullptr;
    if (mode == kBlockSparse && p.f.bits) {
      const int width = p.f.block == kHalf ? 2 : 1, first = tile.block * width;
      it.rows = p.f.bits_rows;
      it.row_words = p.f.bits_words;
      it.head_words = i64(p.f.bits_rows) * p.f.bits_words;
      it.shift = first % 32;
      it.field = width == 2 ? 3 : 1;
      it.bits = p.f.bits + (i64(tile.sample) * p.f.heads + tile.head * group) * it.head_words + first / 32;
    }
    it.group = group;
    it.g = 0;
    it.m = it.range.first - 1;
    it.chunk = -1;
    return it;
  }

  ELASTIC_FN void run(const int* first_tile, const Segment* segments) const {
    const ScheduleSize size = c.size;
    Ring<kStages> st{0, 1};
    u32 kv_phase = 1;
    for (int t = blockIdx.x;; kv_phase ^= 1) {
      wait(&c.empty_kv, kv_phase);
      BackwardHeader& h = c.header;
      if (t >= size.tiles) {
        if (lane == 0) {
          h.state = kDone;
          arrive(&c.full_kv);
        }
        break;
      }
      const Tile tile = decode_tile<KeyBlocks, kD>(p.f, segments, size.segments, t);
      const Sample sample = read_sample(p.f, tile.sample);
      const int mode = p.f.mode[tile.sample * p.f.kv_heads + tile.head];
      const Rule rule = rule_of(mode, p.f.sink, p.f.window, p.f.by_block, p.f.block);
      const int delta = sample.len_k - sample.len_q, key0 = tile.block * kKeys, group = p.f.heads / p.f.kv_heads;
      StepIterator it = iterator(tile, sample, rule, mode);
      bool more = it.next(lane);
      if (lane == 0) {
        h = BackwardHeader{more ? kWork : kEmpty, sample.row, tile.head, sample.begin_k + key0,
                           sample.len_k - key0, key0, delta, 0, rule};
        if (more) {
          arrive_expect(&c.full_kv, 2 * kBytesKV);
          load_rows(p.f.map_k, &c.full_kv, base + BackwardLayout::k, kKeys, sample.begin_k + key0, tile.head, sample.row);
          load_rows(p.f.map_v, &c.full_kv, base + BackwardLayout::v, kKeys, sample.begin_k + key0, tile.head, sample.row);
        } else {
          arrive(&c.full_kv);
        }
      }
      while (more) {
        const int m0 = it.m * kRows;
        Step step{tile.head * group + it.g, m0, first_tile[tile.sample] + it.m,
                  flags_of(it.halves(), key0, m0 + delta, rule), sample.len_q - m0, turn_of(it, rule, tile.block, delta)};
        more = it.next(lane);
        step.flags |= (more ? 0 : kLast) | (step.rows < kRows ? kTail : 0);
        wait(&c.empty[st.slot], st.phase);
        if (lane == 0) issue(st, step, sample);
        st.advance();
      }
      if (lane == 0) t = atomicAdd(p.f.counter, 1) + gridDim.x;
      t = __shfl_sync(~0u, t, 0);
    }
    if (lane == 0) release_counter(p.f.counter);
  }
};

// One warp for each consumer warpgroup: adds its dQ tiles to global memory.
struct Adder {
  const BackwardParams& p;
  BackwardControl& c;
  u32 base;
  int group, lane;

  ELASTIC_FN void run() const {
    const u32 source = base + BackwardLayout::sum + group * kBytesSum;
    for (u32 phase = 0;; phase ^= 1) {
      wait(&c.sum_full[group], phase);
      const SumJob job = c.job[group];
      if (!job.target) break;
      if (lane == 0) {
        if (p.turns) await_turn(job.turn_at, job.turn);
        bulk_add(job.target, source, kBytesSum);
        store_commit();
        if (p.turns) {
          store_wait();
          pass_turn(job.turn_at, job.turn + 1);
        } else {
          store_wait_read();
        }
      }
      __syncwarp();
      if (kArrivals == 32 || lane == 0) arrive(&c.sum_empty[group]);
    }
    if (lane == 0) store_wait();
  }
};

}  // namespace elastic
