// Decode attention after its loop: the warps' outputs become the CTA's part of a head, and the parts of a head that
// several CTAs share become its output. Every sum has one fixed order.
// Compile-time: ELASTIC_HEAD_DIM, ELASTIC_WARPS.
#pragma once
#include "elastic/decode_list.cuh"
#include "elastic/ptx_sm80.cuh"
#include "elastic/share_list.cuh"
#include "elastic/softmax.cuh"

namespace elastic {

constexpr int kD = ELASTIC_HEAD_DIM, kWarps = ELASTIC_WARPS, kThreads = 32 * kWarps;
constexpr int kRows = 16;       // query heads of an mma tile
constexpr int kPitch = kD + 8;  // floats from one output row to the next in shared memory

struct Shared {  // dynamic shared memory after the rings
  float peak[kWarps][kRows], sum[kWarps][kRows];
  float2 total[kRows];  // maximum and sum over the warps
  int units[kWarps];
  Arrivals arrivals;
};

ELASTIC_FN void store_pair(const DecodeParams& p, int head, int row, int column, float x, float y) {
  const int group = p.heads / p.kv_heads;
  const i64 element = (i64(head) * group + row) * kD + column;  // [B, K, G, D] is [B, H, D]
  *(u32*)(p.out + 2 * element) = pack(x, y);
}

// Maximum and sum of a row over the warps.
ELASTIC_FN float2 total_of(const Shared& shared, int row, float scale_log2) {
  float top = minus_infinity(), sum = 0.0f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) top = fmaxf(top, shared.peak[w][row]);
#pragma unroll
  for (int w = 0; w < kWarps; ++w) sum += shared.sum[w][row] * weight_of(shared.peak[w][row], top, scale_log2);
  return make_float2(top, sum);
}

// Outputs of the warps, each scaled to the CTA's maximum, in `rows` [warp][G][kPitch].
ELASTIC_FN void gather_warps(float* rows, Shared& shared, float (&o)[kD / 2], Softmax& softmax, int group,
                             float scale_log2, int warp, int lane) {
#pragma unroll
  for (int y = 0; y < 2; ++y) {
    const float sum = quad_sum(softmax.row_sum[y]);
    const int row = lane / 4 + 8 * y;
    if (lane % 4 == 0) shared.peak[warp][row] = softmax.row_max[y], shared.sum[warp][row] = sum;
  }
  __syncthreads();
  if (threadIdx.x < kRows) shared.total[threadIdx.x] = total_of(shared, threadIdx.x, scale_log2);
#pragma unroll
  for (int y = 0; y < 2; ++y) {
    const int row = lane / 4 + 8 * y;
    float top = minus_infinity();
#pragma unroll
    for (int w = 0; w < kWarps; ++w) top = fmaxf(top, shared.peak[w][row]);
    const float weight = weight_of(softmax.row_max[y], top, scale_log2);
    if (row >= group) continue;
    float2* out = (float2*)(rows + (warp * group + row) * kPitch) + lane % 4;
#pragma unroll
    for (int j = 0; j < kD / 8; ++j) out[4 * j] = make_float2(o[4 * j + 2 * y] * weight, o[4 * j + 2 * y + 1] * weight);
  }
  __syncthreads();
}

// What the attention sink of a row adds to its sum under the maximum `top`.
ELASTIC_FN float sink_share(const DecodeParams& p, int head, int row, float top) {
  if (!p.sinks) return 0.0f;
  const float logit = p.sinks[head % p.kv_heads * (p.heads / p.kv_heads) + row];
  return exp2_approx(fmaf(logit, kLog2e, -top * p.scale_log2));
}

ELASTIC_FN float* peaks_of(const DecodeParams& p, int group) { return p.partial + i64(2) * gridDim.x * group * kD; }

// The CTA's part of a head: to the output if it is the whole head, else to slot `slot` of the partial results. A head
// without visible tokens is whole, and answers `none`.
ELASTIC_FN void store_item(const DecodeParams& p, const float* rows, const Shared& shared, const Item& item, int slot,
                           float none) {
  const int group = p.heads / p.kv_heads;
  for (int i = threadIdx.x; i < group * kD / 2; i += kThreads) {
    const int row = i / (kD / 2), column = 2 * (i % (kD / 2));
    const float2 total = shared.total[row];
    float x = 0.0f, y = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float2 part = *(const float2*)(rows + (w * group + row) * kPitch + column);
      x += part.x, y += part.y;
    }
    if (item.whole) {
      const float factor = 1.0f / (total.y + sink_share(p, item.head, row, total.x));
      store_pair(p, item.head, row, column, total.y == 0.0f ? none : x * factor, total.y == 0.0f ? none : y * factor);
    } else {
      *(float2*)(p.partial + (i64(slot) * group + row) * kD + column) = make_float2(x, y);
      if (column == 0) *(float2*)(peaks_of(p, group) + (i64(slot) * group + row) * 2) = total;
    }
  }
}

// What follows runs in the CTA that finishes last, and its code comes from memory then: loops stay rolled.

// Weights of the parts of a head, [parts, G] in shared memory: what each counts in the whole, already over its sum.
ELASTIC_FN void weigh_parts(const DecodeParams& p, const Parts& parts, int head, float2* peaks, float* weights) {
  const int group = p.heads / p.kv_heads, lane = threadIdx.x % 32;
#pragma unroll 1
  for (int row = threadIdx.x / 32; row < group; row += kWarps) {
    float top = minus_infinity(), sum = 0.0f;
#pragma unroll 1
    for (int part = lane; part < parts.count; part += 32) {
      const float2 one = __ldcg((const float2*)peaks_of(p, group) + parts.slot(part) * group + row);
      peaks[part * group + row] = one;
      top = fmaxf(top, one.x);
    }
#pragma unroll
    for (int step = 1; step < 32; step *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
#pragma unroll 1
    for (int part = lane; part < parts.count; part += 32) {
      const float2 one = peaks[part * group + row];
      const float weight = weight_of(one.x, top, p.scale_log2);
      weights[part * group + row] = weight;
      sum = fmaf(weight, one.y, sum);
    }
#pragma unroll
    for (int step = 1; step < 32; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
    const float factor = sum == 0.0f ? 0.0f : 1.0f / (sum + sink_share(p, head, row, top));
#pragma unroll 1
    for (int part = lane; part < parts.count; part += 32) weights[part * group + row] *= factor;
  }
}

// Adds up the parts of a head, always in the order of the list. They are copied to shared memory first, as many query
// heads at a time as fit, because all of this is waiting for the L2 cache.
ELASTIC_FN void merge(const DecodeParams& p, const Parts& parts, int head, float* ring, int ring_bytes, float* rows) {
  const int group = p.heads / p.kv_heads, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int most = min_i(group, max_i(1, ring_bytes / (4 * kD * parts.count)));
  float* weights = rows + 2 * parts.count * group;
#pragma unroll 1
  for (int first = 0; first < group; first += most) {
    const int floats = min_i(most, group - first) * kD;  // of one part
#pragma unroll 1
    for (int part = warp; part < parts.count; part += kWarps) {
      const float* source = p.partial + (i64(parts.slot(part)) * group + first) * kD;
      const u32 target = shared_address(ring + part * floats);
#pragma unroll 1
      for (int i = 4 * lane; i < floats; i += 128) copy_async(target + 4 * i, source + i, true);
    }
    copy_commit();
    if (first == 0) weigh_parts(p, parts, head, (float2*)rows, weights);
    copy_wait();
    __syncthreads();
#pragma unroll 1
    for (int i = 2 * threadIdx.x; i < floats; i += 2 * kThreads) {
      const int row = first + i / kD;
      float x = 0.0f, y = 0.0f;
#pragma unroll 4
      for (int part = 0; part < parts.count; ++part) {
        const float weight = weights[part * group + row];
        const float2 one = *(const float2*)(ring + part * floats + i);
        x = fmaf(weight, one.x, x), y = fmaf(weight, one.y, y);
      }
      store_pair(p, head, row, i % kD, x, y);
    }
    __syncthreads();
  }
}

// Merges the heads of which this CTA was the last to store a part.
ELASTIC_FN void finish_shared(const DecodeParams& p, const Share& share, const int* offset, int first, int last,
                              Shared& shared, float* ring, int ring_bytes, float* rows) {
  __threadfence();
  __syncthreads();
  report_parts(p.arrived, share, offset, first, last, shared.arrivals, threadIdx.x);
  __syncthreads();
#pragma unroll 1
  for (int i = 0; i < 2; ++i) {
    const int head = i == 0 ? first : last;
    if (shared.arrivals.merges[i]) merge(p, shared.arrivals.parts[i], head, ring, ring_bytes, rows);
  }
}

}  // namespace elastic
