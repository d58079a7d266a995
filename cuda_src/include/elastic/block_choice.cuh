// One warp chooses the key blocks of one query block: the forced ones, then the heaviest others until the chosen hold
// the threshold's share of the mass: the fewest that do, of equal ones the first. Masses are whole numbers of 2^-24, so
// sums have no order. The cut is found by bisection: it is the largest mass such that the blocks of at least that mass
// are enough.
#pragma once
#include "elastic/block_range.cuh"

namespace elastic {

constexpr float kUnits = 16777216.0f;

ELASTIC_FN u32 warp_sum(u32 x) { return __reduce_add_sync(~0u, x); }

// Mass of the blocks [0, count) that hold at least `least` units.
ELASTIC_FN u32 mass_from(const u32* units, int count, u32 least, int lane) {
  u32 sum = 0;
#pragma unroll 8
  for (int j = lane; j < count; j += 32) {
    const u32 u = units[j];
    sum += u >= least ? u : 0;
  }
  return warp_sum(sum);
}

struct Cut {
  u32 mass;   // heavier blocks are chosen; ~0 if the forced ones are enough
  int equal;  // how many of exactly that mass are chosen
};

// `units` holds 0 for the forced blocks, so they never count.
ELASTIC_FN Cut find_cut(const u32* units, int count, u32 total, u32 forced, u32 heaviest, double threshold, int lane) {
  const i64 missing = i64(ceil(threshold * double(total))) - i64(forced);
  if (missing <= 0) return Cut{~0u, 0};
  const u32 need = u32(missing);
  u32 low = 1, high = heaviest + 1;  // enough with low, not with high
  while (high - low > 1) {
    const u32 middle = low + (high - low) / 2;
    if (mass_from(units, count, middle, lane) >= need) low = middle; else high = middle;
  }
  const u32 rest = need - mass_from(units, count, low + 1, lane);
  return Cut{low, int((rest + low - 1) / low)};
}

struct Forced {  // block 0 and the blocks from `own` on
  int own;
  ELASTIC_FN bool has(int block) const { return block == 0 || block >= own; }
};

// Writes `words` words of 32 blocks; blocks from count on are never chosen.
ELASTIC_FN void write_choice(u32* bits, int words, const u32* units, int count, Forced forced, Cut cut, int lane) {
  int before = 0;
  for (int w = 0; w < words; ++w) {
    const int j = w * 32 + lane;
    const u32 u = j < count ? units[j] : 0;
    const bool is_equal = j < count && u == cut.mass;
    const u32 equals = __ballot_sync(~0u, is_equal);
    const bool in_order = is_equal && before + __popc(equals & ((1u << lane) - 1)) < cut.equal;
    const u32 word = __ballot_sync(~0u, j < count && (forced.has(j) || u > cut.mass || in_order));
    if (lane == 0) bits[w] = word;
    before += __popc(equals);
  }
}

}  // namespace elastic
