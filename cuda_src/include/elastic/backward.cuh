// What the kernels of one backward launch read, and where its row tiles lie. Mirrored by elastic/kernels/params.py.
// dP = dO V^T, dS = P (dP - delta), dV = P^T dO, dK = scale dS^T Q, dQ = scale dS K, with P = exp2(S scale_log2 - lse2).
#pragma once
#include "elastic/schedule.cuh"

namespace elastic {

struct BackwardParams {
  Params f;  // map_o and stride_o describe dO; `out` is the forward output, `lse` its log-sum-exp
  const void* grad_out;
  float* rows;    // lse2 then -delta, each [H, row_tiles, tile rows]
  float* dq_sum;  // fp32 [H, row_tiles, 8192] in the order of the accumulators
  int* turns;     // [H, row_tiles, 2] zeros, or null: dQ adds up in the order of the key blocks (deterministic)
  void *dq, *dk, *dv;
  Strides stride_out, stride_dq, stride_dk, stride_dv;
  int row_tiles, pad[9];
};
static_assert(sizeof(BackwardParams) == 960, "elastic/kernels/params.py packs 960 bytes");

constexpr int kTileElements = 8192;  // query rows of a backward tile times head dim
template <int kHeadDim>
constexpr int kBackwardRows = kTileElements / kHeadDim;

#ifdef __CUDACC__
// Inclusive prefix sum over a full warp, in place.
ELASTIC_FN void add_lanes_before(int& sum, int lane) {
  for (int step = 1; step < 32; step *= 2) {
    const int left = __shfl_up_sync(~0u, sum, step);
    if (lane >= step) sum += left;
  }
}

// Row tiles of sample n; none beyond the last sample.
template <int kRows>
ELASTIC_FN int row_tiles_of(const Params& p, int n) {
  return n < p.samples ? ceil_div(read_sample(p, n).len_q, kRows) : 0;
}

// Row tiles are numbered through all samples. first[n]: number of sample n's first one. Called by one full warp.
template <int kRows>
ELASTIC_FN void number_row_tiles(const Params& p, int* first, int lane) {
  int total = 0;
  for (int n0 = 0; n0 < p.samples; n0 += 32) {
    const int n = n0 + lane, own = row_tiles_of<kRows>(p, n);
    int before = own;
    add_lanes_before(before, lane);
    if (n < p.samples) first[n] = total + before - own;
    total += __shfl_sync(~0u, before, 31);
  }
}

// Sample of a row tile and its first row in the sample; sample -1 beyond the last tile. Called by one full warp.
template <int kRows>
ELASTIC_FN int2 find_row_tile(const Params& p, int tile, int lane) {
  int total = 0;
  for (int n0 = 0; n0 < p.samples; n0 += 32) {
    const int own = row_tiles_of<kRows>(p, n0 + lane);
    int before = own;
    add_lanes_before(before, lane);
    const int start = total + before - own;
    const u32 here = __ballot_sync(~0u, tile >= start && tile < start + own);
    if (here) {
      const int owner = __ffs(here) - 1;
      return make_int2(n0 + owner, (tile - __shfl_sync(~0u, start, owner)) * kRows);
    }
    total += __shfl_sync(~0u, before, 31);
  }
  return make_int2(-1, 0);
}
#endif

}  // namespace elastic
