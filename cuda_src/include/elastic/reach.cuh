// Reach: how much of a query's attention lies outside what a streaming head sees. What a launch reads, which queries it
// looks at, and where their keys are seen, hidden or both. Row 32 g + i is the query at the i-th of a sample's last 32
// positions and query head g of the group; rows before the sample's first query are computed and not used.
#pragma once
#include "elastic/schedule.cuh"
#include "elastic/shares.cuh"

namespace elastic {

constexpr int kQueries = 32, kRecent = 8;  // of a sample: that are looked at, and of these the last
constexpr int kTile = 128;                 // keys

struct ReachParams {
  Params f;  // map_q and map_k: boxes of 32 queries and of 128 keys; `lse`: parts of rows; `counter`: arrivals [N * K]
  float *largest, *recent;  // [N, K]
  int pad[12];
};
static_assert(sizeof(ReachParams) == 832, "elastic/kernels/params.py packs 832 bytes");

struct Asked {  // of one sample; positions and keys count from its first key
  Sample at;
  int queries;      // rows of a query head that count: the last ones
  int first, last;  // their positions

  ELASTIC_FN Asked(const Params& p, int sample) {
    at = read_sample(p, sample);
    queries = at.len_k > 0 ? min_i(kQueries, at.len_q) : 0;
    first = at.len_k - queries, last = at.len_k - 1;
  }
  ELASTIC_FN int keys() const { return queries > 0 ? at.len_k : 0; }
  ELASTIC_FN int row_position(int i) const { return at.len_k - kQueries + i; }
  // Of the row in its batch row; negative, or another sample's, where the sample has fewer queries.
  ELASTIC_FN int row_token(int i) const { return at.begin_q + at.len_q - kQueries + i; }
};

ELASTIC_FN Rule rule_of(const Params& p) { return rule_of(kStreaming, p.sink, p.window, p.by_block, p.block); }

// What keys [from, to) are to all rows that count; kMixed also where some are not to be counted: those from `end` on
// and those after a row's own position.
enum Kind { kSeen, kHidden, kMixed };

ELASTIC_FN Kind kind_of(int from, int to, int end, const Asked& asked, const Rule& rule) {
  if (to > end || to - 1 > asked.first) return kMixed;
  if (from >= rule.sink && to <= lower_bound(asked.first, rule)) return kHidden;
  return to <= rule.sink || from >= lower_bound(asked.last, rule) ? kSeen : kMixed;
}

// Whether position a has the key at all, and then whether a streaming head shows it.
ELASTIC_FN bool counts(int key, int a, int end) { return key <= a && key < end; }
ELASTIC_FN bool sees(int key, int a, const Rule& rule) { return key < rule.sink || key >= lower_bound(a, rule); }

}  // namespace elastic
