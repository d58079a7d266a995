// The list of shares.cuh in a launch: every CTA builds it from device memory, and CTAs tell each other at the end which
// parts of heads they have stored.
#pragma once
#include "elastic/shares.cuh"

namespace elastic {

// offset[h] = units before head h, for all heads and the end; `tokens_of(h)` are its tokens, `totals` one int per warp.
// All threads of the CTA call it.
template <int kThreads, class Tokens>
ELASTIC_FN Share build_list(int heads, int* offset, int* totals, const Tokens& tokens_of) {
  const int each = (heads + kThreads - 1) / kThreads;
  const int from = min(int(threadIdx.x) * each, heads), to = min(from + each, heads), lane = threadIdx.x % 32;
  int sum = 0;
  for (int h = from; h < to; ++h) {
    offset[h] = sum;
    sum += units_of(tokens_of(h));
  }
  int scan = sum;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(~0u, scan, step);
    if (lane >= step) scan += other;
  }
  if (lane == 31) totals[threadIdx.x / 32] = scan;
  __syncthreads();
  int before = scan - sum, units = 0;
#pragma unroll
  for (int w = 0; w < kThreads / 32; ++w) {
    if (w < int(threadIdx.x) / 32) before += totals[w];
    units += totals[w];
  }
  for (int h = from; h < to; ++h) offset[h] += before;
  if (threadIdx.x == 0) offset[heads] = units;
  __syncthreads();
  return share_of(units, gridDim.x, blockIdx.x);
}

struct Arrivals {  // of a CTA's first and last head: their parts, and whether this CTA was the last one of them
  Parts parts[2];
  int merges[2];
};

// Says that this CTA's parts are stored; a CTA that finds all parts of a head stored has to merge them. Only the first
// and the last head of a share can be shared, and both are reported at its end, so that no head waits for another.
// `arrived` [heads] is zero before and after every launch. `thread` is 0 or 1 in two of the threads that stored parts,
// which all fence before and meet before and after.
ELASTIC_FN void report_parts(int* arrived, const Share& share, const int* offset, int first, int last, Arrivals& found,
                             int thread) {
  if (thread >= 2) return;
  const int head = thread == 0 ? first : last;
  const Parts parts = parts_of(share, offset, head);
  const bool counts = parts.count > 1 && (thread == 0 || first != last);
  const bool merges = counts && atomicAdd(arrived + head, 1) == parts.count - 1;
  if (merges) arrived[head] = 0;
  found.parts[thread] = parts;
  found.merges[thread] = merges;
  __threadfence();
}

}  // namespace elastic
