// Which keys reach counts, compiled for the host so that the tests can call it.
#include "elastic/reach.cuh"

using namespace elastic;

// Of one sample of len_k keys whose last len_q positions are queries: how many count, their first position, and the
// position of row i; then, for keys [from, to) of an item that ends at `end`, their kind, and per row and key whether
// it counts (1) and is hidden (2).
extern "C" int kind(int sink, int window, int by_block, int block, int len_q, int len_k, int from, int to, int end,
                    int* asked_of, int* marks) {
  Params p{};
  p.samples = p.batch = 1, p.seq_q = len_q, p.seq_k = len_k;
  p.sink = sink, p.window = window, p.by_block = by_block, p.block = block;
  const Asked asked(p, 0);
  const Rule rule = rule_of(p);
  asked_of[0] = asked.queries, asked_of[1] = asked.first, asked_of[2] = asked.keys();
  for (int i = 0; i < kQueries; ++i) {
    for (int key = from; key < to; ++key, ++marks) {
      const int a = asked.row_position(i);
      *marks = counts(key, a, end) ? (sees(key, a, rule) ? 1 : 2) : 0;
    }
  }
  return kind_of(from, to, end, asked, rule);
}
