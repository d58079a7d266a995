// Loading keys and values from pages on 9.0. A page of 16 tokens is 4 KB of a head, so a tile of 128 keys needs up to 16
// small boxes, and each costs a look-up and a dozen instructions to issue: a single lane would need as long for that as
// the tile's products take (estimated from the machine code). So every box has a lane that looks up its page, before
// the wait for the stage; the producer's warp issues those of K, and kLoaders warps share those of V.
#pragma once
#include "elastic/protocol_sm90.cuh"

namespace elastic {

#if ELASTIC_PAGED
// One lane's box of a tile [D / 64][128 rows][64]. Boxes are numbered column by column; part `part` of `parts` has an
// equal share. A box without tokens of the request has page -1, outside of the pool, so TMA fills it with zeros, as it
// does for a number outside of the pool.
struct Box {
  static constexpr int kRows = ELASTIC_PAGED, kCount = kBlockN / kRows, kOfHalf = kHalf / kRows;
  static constexpr int kBoxes = kCount * (kD / 64);
  static_assert(kBoxes <= 32 && kBoxes % kLoaders == 0, "every box has a lane of its own");
  int page, place, number;
  bool exists;

  ELASTIC_FN Box(const ForwardParams& p, u32 ids, int sample, int len_k, int lane, int part, int parts) {
    number = part * (kBoxes / parts) + lane;
    exists = lane < kBoxes / parts;
    const int token = box_token(ids, number % kCount, kOfHalf);
    place = p.pages.place(token);
    page = exists && token < len_k ? p.pages.row_of(sample)[p.pages.entry(token)] : -1;
  }

  ELASTIC_FN void load(u64* bar, const TensorMap& map, u32 tile, int head) const {
    const int column = number / kCount, box = number % kCount;
    const u32 target = tile + column * (kBlockN * 128) + box * (kRows * 128);
    if (exists) tma_load(map, bar, target, column * 64, place, head, page, kEvictLast);
  }
};

// A warp that loads its part of V. It follows the entries of the ring of K, which arrive a block ahead. Only part 0 says
// how many bytes a stage gets. Boxes of another part may be counted before: the stage is full once all are, and that is
// said.
struct ValueLoader {
  const ForwardParams& p;
  Control& c;
  u32 base;
  int part, lane;

  ELASTIC_FN void release(u64* bar) const {
    __syncwarp();  // every lane has read
    if (lane == 0) arrive(bar);
  }

  ELASTIC_FN void run() const {
    Ring<2> q{0, 0};
    Ring<kStages> k{0, 0}, v{0, 1};
    while (true) {
      wait(&c.full_q[q.slot], q.phase);
      const Header& h = c.header[q.slot];
      const int state = h.state, sample = h.sample, len_k = h.len_k, head = h.head / (p.heads / p.kv_heads);
      if (state == kDone) break;
      for (bool more = state == kWork; more;) {
        wait(&c.full_k[k.slot], k.phase);
        const Entry e = c.ring[k.slot];
        release(&c.empty_k[k.slot]);
        const Box box(p, e.ids, sample, len_k, lane, part, kLoaders);
        wait(&c.empty_v[v.slot], v.phase);
        if (part == 0 && lane == 0) arrive_expect(&c.full_v[v.slot], kTileBytesKV);
        __syncwarp();
        box.load(&c.full_v[v.slot], p.map_v, base + SharedLayout::v + v.slot * kTileBytesKV, head);
        more = !(e.flags & kLast);
        k.advance();
        v.advance();
      }
      release(&c.empty_q[q.slot]);
      q.advance();
    }
  }
};
#endif

}  // namespace elastic
