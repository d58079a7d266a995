// Softmax sums of a reach row, over the keys it sees and over those hidden from it, and what they come to: parts of a
// row that warps, warpgroups and CTAs have stored are joined in a fixed order.
#pragma once
#include "elastic/reach.cuh"
#include "elastic/share_list.cuh"
#include "elastic/softmax.cuh"

namespace elastic {

struct RowPart {  // of a row and some of its keys: the largest score, and what the exponentials under it sum up to
  float top, hidden, seen, pad;
};

struct RowSums {  // of the two rows of a lane in the accumulator layout of softmax.cuh; the sums are per lane
  Softmax softmax;
  float hidden[2], seen[2];

  ELASTIC_FN void init() {
    softmax.init();
    hidden[0] = hidden[1] = seen[0] = seen[1] = 0.0f;
  }

  // Scores of the keys from `key` on, which are of one kind; a is the position of the lane's first row.
  template <int kCount>
  ELASTIC_FN void add(float (&s)[kCount], Kind kind, int key, int end, int a, const Rule& rule, float scale_log2,
                      int lane) {
    const int base = key + 2 * (lane & 3);
    if (kind == kMixed) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (!counts(base + column(i), a + row(i), end)) s[i] = minus_infinity();
      }
    }
    float alpha[2], out[2], in[2];
    softmax.row_sum[0] = softmax.row_sum[1] = 0.0f;
    softmax.update(s, alpha, scale_log2);
#pragma unroll
    for (int y = 0; y < 2; ++y) {
      out[y] = kind == kHidden ? softmax.row_sum[y] : 0.0f;
      in[y] = kind == kSeen ? softmax.row_sum[y] : 0.0f;
    }
    if (kind == kMixed) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const bool shown = sees(base + column(i), a + row(i), rule);
        in[i / 2 % 2] += shown ? s[i] : 0.0f;
        out[i / 2 % 2] += shown ? 0.0f : s[i];
      }
    }
#pragma unroll
    for (int y = 0; y < 2; ++y) {
      hidden[y] = hidden[y] * alpha[y] + out[y];
      seen[y] = seen[y] * alpha[y] + in[y];
    }
  }

  ELASTIC_FN RowPart part(int y) const {
    return {softmax.row_max[y], quad_sum(hidden[y]), quad_sum(seen[y]), 0.0f};
  }

 private:
  ELASTIC_FN static int row(int i) { return 8 * (i / 2 % 2); }
  ELASTIC_FN static int column(int i) { return 8 * (i / 4) + i % 2; }
};

ELASTIC_FN RowPart joined(const RowPart& a, const RowPart& b, float scale_log2) {
  const float top = fmaxf(a.top, b.top);
  const float of_a = weight_of(a.top, top, scale_log2), of_b = weight_of(b.top, top, scale_log2);
  return {top, a.hidden * of_a + b.hidden * of_b, a.seen * of_a + b.seen * of_b, 0.0f};
}

// Share of the row's attention that is hidden; a NaN among its scores stays one.
ELASTIC_FN float hidden_share(const RowPart& row) {
  const float all = row.hidden + row.seen;
  return all == 0.0f ? 0.0f : row.hidden / all;
}

ELASTIC_FN float larger(float a, float b) { return a >= b || a != a ? a : b; }  // of a number and a NaN, the NaN

struct ReachShared {  // beside the parts and the tiles
  Share share;
  Arrivals arrivals;
  float largest[kQueries], recent[kQueries];  // by query head of the group
  int totals[32];
};
constexpr int kSharedBytes = 512, kPartBytes = 16;
static_assert(sizeof(ReachShared) <= kSharedBytes && sizeof(RowPart) == kPartBytes, "elastic/kernels/devices.py");

ELASTIC_FN RowPart* slot_rows(const ReachParams& p, int slot, int rows) {
  return (RowPart*)p.f.lse + i64(slot) * rows;
}

// Largest and recent of one head: thread t < `rows` has the share of row t. `sync` is a barrier of the calling threads.
template <class Sync>
ELASTIC_FN void answer(const ReachParams& p, ReachShared& shared, int head, int rows, float share, int thread,
                       const Sync& sync) {
  const int group = rows / kQueries, i = thread % kQueries;
  const int queries = Asked(p.f, head / p.f.kv_heads).queries, recent = min_i(queries, kRecent);
  if (thread < rows) {
    float top = i >= kQueries - queries ? share : 0.0f, sum = i >= kQueries - recent ? share : 0.0f;
#pragma unroll
    for (int step = 1; step < kQueries; step *= 2) {
      top = larger(top, __shfl_xor_sync(~0u, top, step));
      sum += __shfl_xor_sync(~0u, sum, step);
    }
    if (i == 0) shared.largest[thread / kQueries] = top, shared.recent[thread / kQueries] = sum;
  }
  sync();
  if (thread == 0) {
    float top = 0.0f, sum = 0.0f;
    for (int g = 0; g < group; ++g) top += shared.largest[g], sum += shared.recent[g];
    p.largest[head] = top / float(group);
    p.recent[head] = sum / float(group * max_i(recent, 1));
  }
}

// The end of an item: `parts` [ways][rows] in shared memory are the row sums of those who shared its keys.
template <class Sync>
ELASTIC_FN void finish_item(const ReachParams& p, ReachShared& shared, const Item& item, const RowPart* parts, int ways,
                            int rows, int slot, int thread, const Sync& sync) {
  float share = 0.0f;
  if (thread < rows) {
    RowPart row = parts[thread];
#pragma unroll 1
    for (int way = 1; way < ways; ++way) row = joined(row, parts[way * rows + thread], p.f.scale_log2);
    if (item.whole) {
      share = hidden_share(row);
    } else {
      slot_rows(p, slot, rows)[thread] = row;
    }
  }
  if (item.whole) answer(p, shared, item.head, rows, share, thread, sync);
}

// After the last item: this CTA answers the heads of which it was the last to store a part.
template <class Sync>
ELASTIC_FN void finish_shared(const ReachParams& p, ReachShared& shared, const Share& share, const int* offset,
                              int first, int last, int rows, int thread, const Sync& sync) {
  __threadfence();
  sync();
  report_parts(p.f.counter, share, offset, first, last, shared.arrivals, thread);
  sync();
#pragma unroll 1
  for (int i = 0; i < 2; ++i) {
    if (!shared.arrivals.merges[i]) continue;
    const Parts parts = shared.arrivals.parts[i];
    float hidden = 0.0f;
    if (thread < rows) {
      RowPart row = {minus_infinity(), 0.0f, 0.0f, 0.0f};
#pragma unroll 4
      for (int part = 0; part < parts.count; ++part) {
        const float4 one = __ldcg((const float4*)(slot_rows(p, parts.slot(part), rows) + thread));
        row = joined(row, RowPart{one.x, one.y, one.z, one.w}, p.f.scale_log2);
      }
      hidden = hidden_share(row);
    }
    answer(p, shared, i == 0 ? first : last, rows, hidden, thread, sync);
    sync();  // the two heads share the memory
  }
}

}  // namespace elastic
