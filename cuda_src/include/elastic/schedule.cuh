// Order of the tiles of one launch: class, sample, section of KV heads whose rows fit L2 together, block (the one with
// the most work first), KV head, query head of its group. A forward tile is a query block of one query head, and classes
// go by length: full, block-sparse, streaming. A backward tile is a key block of one KV head; streaming heads go first
// there, because every query sees their sinks: those tiles are as long as the longest full ones. Every CTA builds the
// same small table from the modes in device memory, so the host never needs to know them.
#pragma once
#include "elastic/block_range.cuh"

namespace elastic {

struct Segment {  // the heads of one class of one sample
  int first_tile;
  int sample_class;  // sample * 4 + class
  u64 kv_heads;      // bit set
};

struct ScheduleSize {
  int segments, tiles;
};

struct Sample {
  int row, begin_q, begin_k, len_q, len_k;
};

struct Tile {
  int sample, head, block;  // head: query head of a forward tile, KV head of a backward tile
};

// Offsets come from device memory that the host never reads, so they are clipped to the tensors here.
ELASTIC_FN Sample read_sample(const Params& p, int n) {
  Sample s;
  s.row = p.row ? p.row[n] : n;
  s.begin_q = p.begin_q ? max_i(0, p.begin_q[n]) : 0;
  s.begin_k = p.begin_k ? max_i(0, p.begin_k[n]) : 0;
  s.len_q = max_i(0, (p.end_q ? min_i(p.end_q[n], p.seq_q) : p.seq_q) - s.begin_q);
  s.len_k = max_i(0, (p.end_k ? min_i(p.end_k[n], p.seq_k) : p.seq_k) - s.begin_k);
  if (s.row < 0 || s.row >= p.batch) s.len_q = s.len_k = 0;
  return s;
}

// Unknown modes count as full here and are answered with NaN by `is_poisoned`.
struct QueryBlocks {  // tiles of a forward launch
  static constexpr bool kLastFirst = true;
  ELASTIC_FN static int class_of(int mode) { return mode == kStreaming ? 2 : mode == kBlockSparse ? 1 : 0; }
  ELASTIC_FN static int count(const Sample& s) { return ceil_div(s.len_q, kTileM); }
  ELASTIC_FN static int heads_per_kv(const Params& p) { return p.heads / p.kv_heads; }
  ELASTIC_FN static i64 row_bytes(const Sample& s, int head_dim, int) { return i64(s.len_k) * head_dim * 4; }
};

struct KeyBlocks {  // tiles of a backward launch: all query heads of a group share one
  static constexpr bool kLastFirst = false;
  ELASTIC_FN static int class_of(int mode) { return mode == kStreaming ? 0 : mode == kBlockSparse ? 2 : 1; }
  ELASTIC_FN static int count(const Sample& s) { return ceil_div(s.len_k, 2 * kHalf); }
  ELASTIC_FN static int heads_per_kv(const Params&) { return 1; }
  // Q, dO and the fp32 dQ of one query head; streaming tiles touch a window of them only.
  ELASTIC_FN static i64 row_bytes(const Sample& s, int head_dim, int of_class) {
    return of_class == 0 ? 0 : i64(s.len_q) * head_dim * 8;
  }
};

ELASTIC_FN bool is_poisoned(const Params& p, int mode) {
  return mode < kFull || mode > kBlockSparse || (mode == kBlockSparse && p.bits == nullptr);
}

#ifdef __CUDACC__
// Called by one full warp. `segments` holds 3 N entries.
template <class Blocks>
ELASTIC_FN void build_schedule(const Params& p, Segment* segments, ScheduleSize* size, int lane) {
  const int group = Blocks::heads_per_kv(p);
  int tiles = 0, count = 0;
  for (int c = 0; c < 3; ++c) {
    for (int n0 = 0; n0 < p.samples; n0 += 32) {
      const int n = n0 + lane;
      u64 heads = 0;
      int own = 0;
      if (n < p.samples) {
        for (int k = 0; k < p.kv_heads; ++k) heads |= u64(Blocks::class_of(p.mode[n * p.kv_heads + k]) == c) << k;
        own = Blocks::count(read_sample(p, n)) * __popcll(heads) * group;
      }
      int before = own;  // inclusive prefix sum over the warp
      for (int step = 1; step < 32; step *= 2) {
        const int left = __shfl_up_sync(~0u, before, step);
        if (lane >= step) before += left;
      }
      const u32 used = __ballot_sync(~0u, own > 0);
      if (own > 0) {
        segments[count + __popc(used & ((1u << lane) - 1))] = Segment{tiles + before - own, n * 4 + c, heads};
      }
      tiles += __shfl_sync(~0u, before, 31);
      count += __popc(used);
    }
  }
  if (lane == 0) *size = ScheduleSize{count, tiles};
}

ELASTIC_FN int nth_bit(u64 set, int n) {
  for (; n > 0; --n) set &= set - 1;
  return __ffsll(set) - 1;
}

template <class Blocks, int kHeadDim>
ELASTIC_FN Tile decode_tile(const Params& p, const Segment* segments, int count, int t) {
  int low = 0;
  for (int high = count; high - low > 1;) {
    const int mid = (low + high) / 2;
    if (segments[mid].first_tile <= t) low = mid; else high = mid;
  }
  const Segment s = segments[low];
  const int n = s.sample_class / 4, group = Blocks::heads_per_kv(p), heads = __popcll(s.kv_heads);
  const Sample sample = read_sample(p, n);
  const int blocks = Blocks::count(sample);
  // Heads whose rows share 32 MB of L2 run side by side.
  int section = 1;
  while (section < heads && 2 * section * Blocks::row_bytes(sample, kHeadDim, s.sample_class % 4) <= (32 << 20)) section *= 2;
  const int u = t - s.first_tile;
  const int index = u / (blocks * group * section);
  const int rest = u - index * blocks * group * section;
  const int width = min_i(section, heads - index * section) * group;
  const int b = rest / width, within = rest - b * width;
  const int kv_head = nth_bit(s.kv_heads, index * section + within / group);
  return Tile{n, kv_head * group + within % group, Blocks::kLastFirst ? blocks - 1 - b : b};
}

// The last CTA to leave hands the counter back as it found it, so launches and graph replays need no reset.
ELASTIC_FN void release_counter(int* counter) {
  __threadfence();
  if (atomicAdd(counter + 1, 1) == int(gridDim.x) - 1) {
    counter[0] = 0;
    counter[1] = 0;
    __threadfence();
  }
}
#endif

}  // namespace elastic
