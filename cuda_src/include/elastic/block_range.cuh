// Which KV blocks a query tile visits: the only place with sink, window, causal and bitmask arithmetic.
// Rule of every mode: position a sees key j iff j <= a and (j < sink or j >= lower_bound(a)); positions are relative to
// the sample, and a = i + delta with delta = len_k - len_q for query row i. Blocks here are half blocks of 64 keys.
#pragma once
#include "elastic/params.cuh"

namespace elastic {

struct Rule {
  int sink, reach, align, block;  // the window starts `reach` keys before the position rounded down by `align`
};

ELASTIC_FN int max_i(int a, int b) { return a > b ? a : b; }
ELASTIC_FN int min_i(int a, int b) { return a < b ? a : b; }
ELASTIC_FN int ceil_div(int a, int b) { return (a + b - 1) / b; }

// First key of the local window, before clipping at 0.
ELASTIC_FN int lower_bound(int a, const Rule& r) { return (a & r.align) - r.reach; }

// Last position whose local window holds the key: the inverse of lower_bound.
ELASTIC_FN int last_position(int key, const Rule& r) { return ((key + r.reach) & r.align) + ~r.align; }

// Full and block-sparse heads hide nothing below the diagonal: their window is longer than any sequence. By block, the
// window is a multiple of the block and the block a power of two (checked on the host).
ELASTIC_FN Rule rule_of(int mode, int sink, int window, int by_block, int block) {
  if (mode != kStreaming) return Rule{0, 1 << 30, -1, block};
  return by_block ? Rule{sink, window - block, -block, block} : Rule{sink, window - 1, -1, block};
}

ELASTIC_FN int highest_bit(u32 x) {
#ifdef __CUDA_ARCH__
  return 31 - __clz(x);
#else
  return 31 - __builtin_clz(x);
#endif
}

// Walks the visited half blocks from the diagonal down to the sinks. next() returns an id, or -1 for ever at the end.
struct BlockIterator {
  int current, low, sinks;  // interval walk: [low, current], then [0, sinks)
  const u32* words;         // bitmask walk, null otherwise
  u32 pending, ahead;       // bits left of word `word`; the next lower word, loaded early
  int word, lower_half, high;
  int wide;                 // a bit covers 128 keys

  // m0, m1: first and past-the-end query row of the tile; `bits_row` is null unless the head is block-sparse.
  ELASTIC_FN void init(const Rule& rule, int m0, int m1, int delta, const u32* bits_row) {
    high = m1 + delta > 0 ? ceil_div(m1 + delta, kHalf) : 0;
    words = bits_row;
    if (words) {
      wide = rule.block == 2 * kHalf;
      const int blocks = wide ? (high + 1) / 2 : high;
      lower_half = -1;
      word = blocks > 0 ? (blocks - 1) >> 5 : 0;
      pending = blocks > 0 ? words[word] & (0xffffffffu >> (31 - ((blocks - 1) & 31))) : 0;
      ahead = word > 0 ? words[word - 1] : 0;
    } else {
      low = max_i(0, lower_bound(max_i(0, m0 + delta), rule)) / kHalf;
      low = min_i(low, high);
      sinks = min_i(ceil_div(rule.sink, kHalf), low);
      current = high - 1;
    }
  }

  ELASTIC_FN int next() { return words ? next_bit() : next_in_range(); }

  ELASTIC_FN int next_in_range() {
    if (current < low) {
      current = sinks - 1;
      low = sinks = 0;
    }
    return current < low ? -1 : current--;
  }

  ELASTIC_FN int next_bit() {
    if (lower_half >= 0) {
      const int id = lower_half;
      lower_half = -1;
      return id;
    }
    while (pending == 0) {
      if (word <= 0) return -1;
      --word;
      pending = ahead;
      ahead = word > 0 ? words[word - 1] : 0;
    }
    const int bit = highest_bit(pending);
    pending ^= 1u << bit;
    const int id = word * 32 + bit;
    if (!wide) return id;
    if (2 * id + 1 >= high) return 2 * id;  // the upper half lies above the diagonal
    lower_half = 2 * id;
    return 2 * id + 1;
  }
};

// Query tiles [first, end) of `tile` rows that see a key of [k0, k1): the backward pass walks them. Bitmasks are apart.
struct QueryRange {
  int first, end;
};
ELASTIC_FN QueryRange query_range(int k0, int k1, int len_q, int delta, int tile, const Rule& r) {
  const int last = k0 < r.sink ? len_q - 1 : min_i(last_position(k1 - 1, r) - delta, len_q - 1);
  return QueryRange{max_i(0, k0 - delta) / tile, last < 0 ? 0 : last / tile + 1};
}

// The same question from the keys' side: positions [a0, a1] against keys [k0, k1].
ELASTIC_FN bool needs_mask_keys(int k0, int k1, int a0, int a1, const Rule& r) {
  return k1 > a0 || (k1 >= r.sink && last_position(max_i(k0, r.sink), r) < a1);
}

// Number of 128-key blocks before block n that a query tile from position a0 on visits.
ELASTIC_FN int blocks_before(int n, int a0, const Rule& r) {
  const int low = max_i(0, lower_bound(max_i(0, a0), r)) / (2 * kHalf), sinks = min_i(ceil_div(r.sink, 2 * kHalf), low);
  return n < sinks ? n : sinks + max_i(0, n - low);
}

// Whether some row must not see some key of half block `id`: a0 is the position of the first row, low1 the last row's
// lower bound.
ELASTIC_FN bool needs_mask(int id, int a0, int low1, int sink) {
  const int first = id * kHalf, last = first + kHalf - 1;
  return last > a0 || (first < low1 && last >= sink);
}

}  // namespace elastic
