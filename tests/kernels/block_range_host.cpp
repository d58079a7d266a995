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
