// Shared memory of a CTA and the protocol between its producer lane and its two consumer warpgroups.
//
// full_q[i]  1 arrival + bytes   header i and the Q tile are in place (a tile without blocks brings no bytes)
// empty_q[i] 8 arrivals          every consumer warp is done with header i, with Q, and with O staged in its place
// full_k/v   1 arrival + bytes   stage and its ring entry are in place; K runs one block ahead of V
// empty_k/v  8 arrivals          every consumer warp is done with the stage (K: also with the ring entry)
// The producer starts on phase 1 (everything is empty), the consumers on phase 0.
// Keys and values lie in a tensor's rows, or with ELASTIC_PAGED in pages: then a half block comes as several boxes, each
// inside one page. The stages, their bytes and all that the consumers see are the same.
#pragma once
#include "elastic/pages.cuh"
#include "elastic/ptx_sm90.cuh"
#include "elastic/schedule.cuh"

namespace elastic {

constexpr int kD = ELASTIC_HEAD_DIM;
constexpr int kConsumerWarps = 8;
constexpr int kStages = kD == 64 ? 4 : 2;
constexpr int kBlockN = 2 * kHalf;
constexpr int kTileBytesQ = kTileM * kD * 2, kTileBytesKV = kBlockN * kD * 2;
constexpr int kNone = 0xffff;  // id of a missing half block: beyond every sequence, so TMA fills it with zeros

constexpr int kWork = 0, kEmpty = 1, kPoison = 2, kDone = 3;

struct Header {  // of one tile
  int state, row, head, q_row;     // q_row: first query row in the batch row
  int rows, position, len_k, pad;  // query rows of the sample from the tile's first on; its position
  Rule rule;
};

// ids: low 16 bits the first half block, high 16 the second. flags: what the consumers must do with them.
constexpr u32 kLast = 1, kMask0 = 2, kMask1 = 4, kTail = 8;
struct Entry {
  u32 ids, flags;
};

struct Control {
  u64 full_q[2], empty_q[2];
  u64 full_k[kStages], empty_k[kStages], full_v[kStages], empty_v[kStages];
  Entry ring[kStages];
  Header header[2];
  ScheduleSize size;
};

struct SharedLayout {  // offsets from a base that is a multiple of 1024
  static constexpr int q = 0;
  static constexpr int k = q + 2 * kTileBytesQ;
  static constexpr int v = k + kStages * kTileBytesKV;
  static constexpr int control = v + kStages * kTileBytesKV;
  static constexpr int segments = control + 1024;
};
static_assert(sizeof(Control) <= 1024, "the schedule starts 1024 bytes after the barriers");

#if ELASTIC_PAGED
// A block's boxes: 64 / kBox of each half, each inside one page. One without tokens of the request has page -1, outside
// of the pool, so TMA fills it with zeros, as it does for a number that is no page's. The first page is read before the
// wait for the stage, every other one beside the box before it.
struct Places {
  static constexpr int kBox = ELASTIC_PAGED, kCount = kBlockN / kBox, kOfHalf = kHalf / kBox;
  const int* row;
  int len_k, first;

  ELASTIC_FN Places(const ForwardParams& p, u32 ids, int sample, const Sample& s)
      : row(p.pages.row_of(sample)), len_k(s.len_k), first(page(p, token(ids, 0))) {
    const int other = token(ids, kOfHalf);
    if (other < len_k) asm volatile("prefetch.global.L1 [%0];" ::"l"(row + p.pages.entry(other)));
  }

  ELASTIC_FN static int token(u32 ids, int box) { return box_token(ids, box, kOfHalf); }

  ELASTIC_FN int page(const ForwardParams& p, int token) const {
    return token < len_k ? row[p.pages.entry(token)] : -1;
  }

  ELASTIC_FN void load(const ForwardParams& p, u64* bar, const TensorMap& map, u32 shared, u32 ids, int head) const {
    arrive_expect(bar, kTileBytesKV);
    int at = first;
#pragma unroll 1  // the lane has 56 registers
    for (int i = 0; i < kCount; ++i) {
      const int next = page(p, token(ids, (i + 1) % kCount)), place = p.pages.place(token(ids, i));
      const u32 target = shared + i * (kBox * 128);
      tma_load(map, bar, target, 0, place, head, at, kEvictLast);
      if (kD == 128) tma_load(map, bar, target + kBlockN * 128, 64, place, head, at, kEvictLast);
      at = next;
    }
  }
};
#else
struct Places {  // the block's first rows follow from its ids
  int begin, row;

  ELASTIC_FN Places(const ForwardParams&, u32, int, const Sample& s) : begin(s.begin_k), row(s.row) {}

  ELASTIC_FN void load(const ForwardParams&, u64* bar, const TensorMap& map, u32 shared, u32 ids, int head) const {
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
};
#endif

// One elected lane: walks the tiles, their visited blocks, and feeds the rings.
struct Producer {
  const ForwardParams& p;
  Control& c;
  u32 base;

  ELASTIC_FN void load_values(const Ring<kStages>& v, u32 ids, int head, int sample, const Sample& s) const {
    const Places values(p, ids, sample, s);
    wait(&c.empty_v[v.slot], v.phase);
    values.load(p, &c.full_v[v.slot], p.map_v, base + SharedLayout::v + v.slot * kTileBytesKV, ids, head);
  }

  ELASTIC_FN int next_tile() const { return atomicAdd(p.counter, 1) + gridDim.x; }

  ELASTIC_FN void run(const Segment* segments) const {
    const ScheduleSize size = c.size;
    Ring<2> q{0, 1};
    Ring<kStages> kv{0, 1};
    int t = blockIdx.x;
    while (true) {
      wait(&c.empty_q[q.slot], q.phase);
      Header& h = c.header[q.slot];
      if (t >= size.tiles) {
        h.state = kDone;
        arrive(&c.full_q[q.slot]);
        break;
      }
      const Tile tile = decode_tile<QueryBlocks, kD>(p, segments, size.segments, t);
      const Sample sample = read_sample(p, tile.sample);
      const int kv_head = tile.head / (p.heads / p.kv_heads), mode = p.mode[tile.sample * p.kv_heads + kv_head];
      const int delta = sample.len_k - sample.len_q, m0 = tile.block * kTileM;
      const Rule rule = rule_of(mode, p.sink, p.window, p.by_block, p.block);
      h.row = sample.row;
      h.head = tile.head;
      h.q_row = sample.begin_q + m0;
      h.rows = sample.len_q - m0;
      h.position = m0 + delta;
      h.len_k = sample.len_k;
      h.rule = rule;
      const bool poisoned = is_poisoned(p, mode);
      BlockIterator blocks;
      blocks.init(rule, m0, min_i(m0 + kTileM, sample.len_q), delta,
                  mode != kBlockSparse || poisoned ? nullptr
                      : p.bits + ((i64(tile.sample) * p.heads + tile.head) * p.bits_rows + tile.block) * p.bits_words);
      int id = poisoned ? -1 : blocks.next();
      if (id < 0) {
        h.state = poisoned ? kPoison : kEmpty;
        arrive(&c.full_q[q.slot]);
        t = next_tile();
        q.advance();
        continue;
      }
      h.state = kWork;
      arrive_expect(&c.full_q[q.slot], kTileBytesQ);
#pragma unroll
      for (int d = 0; d < kD / 64; ++d) {
        tma_load(p.map_q, &c.full_q[q.slot], base + SharedLayout::q + q.slot * kTileBytesQ + d * (kTileM * 128), d * 64,
                 sample.begin_q + m0, tile.head, sample.row, kEvictFirst);
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
        const Places keys(p, ids, tile.sample, sample);
        wait(&c.empty_k[kv.slot], kv.phase);
        c.ring[kv.slot] = Entry{ids, flags};
        keys.load(p, &c.full_k[kv.slot], p.map_k, base + SharedLayout::k + kv.slot * kTileBytesKV, ids, kv_head);
        if (!first) load_values(v, v_ids, kv_head, tile.sample, sample);
        if (after < 0) t = next_tile();
        v = kv;
        v_ids = ids;
        kv.advance();
        id = after;
      }
      load_values(v, v_ids, kv_head, tile.sample, sample);
    }
    release_counter(p.counter);
  }
};

}  // namespace elastic
