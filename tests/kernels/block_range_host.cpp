// The kernels' own block arithmetic, compiled for the host so that the tests can call it.
#include "elastic/block_range.cuh"

using namespace elastic;

// Half blocks that the tile visits, in order, each with its mask flag; returns their number.
extern "C" int visited(int mode, int sink, int window, int by_block, int block, int m0, int m1, int delta,
                       const u32* bits, int* ids, int* flags) {
  const Rule rule = rule_of(mode, sink, window, by_block, block);
  BlockIterator blocks;
  blocks.init(rule, m0, m1, delta, bits);
  int n = 0;
  for (int id = blocks.next(); id >= 0; id = blocks.next(), ++n) {
    ids[n] = id;
    flags[n] = needs_mask(id, m0 + delta, lower_bound(m1 - 1 + delta, rule), rule.sink);
  }
  return n;
}

// Query tiles of `tile` rows that the backward pass walks for keys [k0, k1) of a full or streaming head: first and end,
// then per tile whether the element mask runs for these keys, and how many 128-key blocks before this one visit it.
extern "C" void met(int mode, int sink, int window, int by_block, int block, int k0, int k1, int len_q, int delta,
                    int tile, int* range, int* flags, int* before) {
  const Rule rule = rule_of(mode, sink, window, by_block, block);
  const QueryRange found = query_range(k0, k1, len_q, delta, tile, rule);
  range[0] = found.first;
  range[1] = found.end;
  for (int m = found.first; m < found.end; ++m) {
    const int a0 = m * tile + delta;
    flags[m] = needs_mask_keys(k0, k1 - 1, a0, a0 + tile - 1, rule);
    before[m] = blocks_before(k0 / (2 * kHalf), a0, rule);
  }
}
