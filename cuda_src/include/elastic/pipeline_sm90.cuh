// The producer of the forward pass on 9.0: where its tiles and blocks come from and how they are loaded. The protocol is
// in protocol_sm90.cuh.
#pragma once
#include "elastic/paged_loader_sm90.cuh"

namespace elastic {

// One elected lane: walks the tiles, their visited blocks, and feeds the rings. Over pages it is a warp whose lanes all
// walk, of which lane 0 alone writes and arrives, and which loads K.
struct Producer {
  const ForwardParams& p;
  Control& c;
  u32 base;
#if ELASTIC_PAGED
  int lane;
#else
  static constexpr int lane = 0;
#endif

  ELASTIC_FN void load_block(u64* bar, const TensorMap& map, u32 shared, u32 ids, int begin, int head, int row) const {
    arrive_expect(bar, kTileBytesKV);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int token = begin + int((ids >> (16 * half)) & 0xffff) * kHalf;
#pragma unroll
      for (int d = 0; d < kD / 64; ++d) {
        tma_load(map, bar, shared + d * (kBlockN * 128) + half * (kHalf * 128), d * 64, token, head, row, kEvictLast);
      }
    }
  }

  ELASTIC_FN void load_values(const Ring<kStages>& v, u32 ids, int head, const Sample& s) const {
    if (ELASTIC_PAGED) return;  // the loaders'
    wait(&c.empty_v[v.slot], v.phase);
    load_block(&c.full_v[v.slot], p.map_v, base + SharedLayout::v + v.slot * kTileBytesKV, ids, s.begin_k, head, s.row);
  }

  // Waits for the stage of K, announces the block, loads it.
  ELASTIC_FN void load_keys(const Ring<kStages>& kv, const Entry& entry, int head, int sample, const Sample& s) const {
    u64* full = &c.full_k[kv.slot];
    const u32 tile = base + SharedLayout::k + kv.slot * kTileBytesKV;
#if ELASTIC_PAGED
    const Box box(p, entry.ids, sample, s.len_k, lane, 0, 1);
    wait(&c.empty_k[kv.slot], kv.phase);
    if (lane == 0) {
      c.ring[kv.slot] = entry;
      arrive_expect(full, kTileBytesKV);
    }
    __syncwarp();
    box.load(full, p.map_k, tile, head);
#else
    wait(&c.empty_k[kv.slot], kv.phase);
    c.ring[kv.slot] = entry;
    load_block(full, p.map_k, tile, entry.ids, s.begin_k, head, s.row);
#endif
  }

  ELASTIC_FN int next_tile() const { return lane == 0 ? atomicAdd(p.counter, 1) + gridDim.x : 0; }

  ELASTIC_FN int of_lane_0(int value) const { return ELASTIC_PAGED ? __shfl_sync(~0u, value, 0) : value; }

  ELASTIC_FN void run(const Segment* segments) const {
    const ScheduleSize size = c.size;
    Ring<2> q{0, 1};
    Ring<kStages> kv{0, 1};
    int t = blockIdx.x;
    while (true) {
      t = of_lane_0(t);
      wait(&c.empty_q[q.slot], q.phase);
      Header& h = c.header[q.slot];
      if (t >= size.tiles) {
        if (lane == 0) {
          h.state = kDone;
          arrive(&c.full_q[q.slot]);
        }
        break;
      }
      const Tile tile = decode_tile<QueryBlocks, kD>(p, segments, size.segments, t);
      const Sample sample = read_sample(p, tile.sample);
      const int kv_head = tile.head / (p.heads / p.kv_heads), mode = p.mode[tile.sample * p.kv_heads + kv_head];
      const int delta = sample.len_k - sample.len_q, m0 = tile.block * kTileM;
      const Rule rule = rule_of(mode, p.sink, p.window, p.by_block, p.block);
      if (lane == 0) {
        h.row = sample.row;
        h.head = tile.head;
        h.q_row = sample.begin_q + m0;
        h.rows = sample.len_q - m0;
        h.position = m0 + delta;
        h.len_k = sample.len_k;
        h.rule = rule;
        if (ELASTIC_PAGED) h.sample = tile.sample;
      }
      const bool poisoned = is_poisoned(p, mode);
      BlockIterator blocks;
      blocks.init(rule, m0, min_i(m0 + kTileM, sample.len_q), delta,
                  mode != kBlockSparse || poisoned ? nullptr
                      : p.bits + ((i64(tile.sample) * p.heads + tile.head) * p.bits_rows + tile.block) * p.bits_words);
      int id = poisoned ? -1 : blocks.next();
      if (id < 0) {
        if (lane == 0) {
          h.state = poisoned ? kPoison : kEmpty;
          arrive(&c.full_q[q.slot]);
        }
        t = next_tile();
        q.advance();
        continue;
      }
      if (lane == 0) {
        h.state = kWork;
        arrive_expect(&c.full_q[q.slot], kTileBytesQ);
#pragma unroll
        for (int d = 0; d < kD / 64; ++d) {
          tma_load(p.map_q, &c.full_q[q.slot], base + SharedLayout::q + q.slot * kTileBytesQ + d * (kTileM * 128),
                   d * 64, sample.begin_q + m0, tile.head, sample.row, kEvictFirst);
        }
      }
      q.advance();
      Ring<kStages> v = kv;
      u32 v_ids = 0;
      for (bool first = true; id >= 0; first = false) {
        const int second = blocks.next(), after = second >= 0 ? blocks.next() : -1;
        const u32 ids = u32(id) | u32(second >= 0 ? second : kNone) << 16;
        u32 flags = after < 0 ? kLast : 0;
#pragma unroll
        for (int w = 0; w < 2; ++w) {
          const int a0 = m0 + delta + w * 64, low = lower_bound(a0 + 63, rule);
          if (second < 0 || needs_mask(id, a0, low, rule.sink) || needs_mask(second, a0, low, rule.sink)) {
            flags |= kMask0 << w;
          }
        }
        if (max_i(id, second) * kHalf + kHalf > sample.len_k) flags |= kTail;
        load_keys(kv, Entry{ids, flags}, kv_head, tile.sample, sample);
        if (!first) load_values(v, v_ids, kv_head, sample);
        if (after < 0) t = next_tile();
        v = kv;
        v_ids = ids;
        kv.advance();
        id = after;
      }
      load_values(v, v_ids, kv_head, sample);
    }
    if (lane == 0) release_counter(p.counter);
  }
};

}  // namespace elastic
