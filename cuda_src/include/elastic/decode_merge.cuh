// Decode attention after its loop: the warps' outputs become the CTA's part of a head, and the parts of a head that
// several CTAs share become its output. Every sum has one fixed order.
// Compile-time: ELASTIC_HEAD_DIM, ELASTIC_WARPS.
#pragma once
#include "elastic/decode_list.cuh"
#include "elastic/softmax.cuh"

namespace elastic {

constexpr int kD = ELASTIC_HEAD_DIM, kWarps = ELASTIC_WARPS, kThreads = 32 * kWarps;
constexpr int kRows = 16;       // query heads of an mma tile
constexpr int kPitch = kD + 8;  // floats from one output row to the next in shared memory

struct Shared {  // dynamic shared memory behind the rings
  float peak[kWarps][kRows], sum[kWarps][kRows];
  float2 total[kRows];  // maximum and sum over the warps
  int units[kWarps];
  int merges[2];  // whether this CTA was the last one of its first and of its last head
};

ELASTIC_FN float weight_of(float peak, float top, float scale_log2) {
  return peak == minus_infinity() ? 0.0f : exp2_approx((peak - top) * scale_log2);
}

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

ELASTIC_FN float* peaks_of(const DecodeParams& p, int group) { return p.partial + i64(2) * gridDim.x * group * kD; }

// The CTA's part of a head: to the output if it is the whole head, else to slot `slot` of the partial results.
ELASTIC_FN void store_item(const DecodeParams& p, const float* rows, const Shared& shared, const Item& item, int slot) {
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
      const float factor = total.y == 0.0f ? 0.0f : 1.0f / total.y;
      store_pair(p, item.head, row, column, x * factor, y * factor);
    } else {
      *(float2*)(p.partial + (i64(slot) * group + row) * kD + column) = make_float2(x, y);
      if (column == 0) *(float2*)(peaks_of(p, group) + (i64(slot) * group + row) * 2) = total;
    }
  }
}

// Weights of the parts of a head, [parts, G] in shared memory: what each counts in the whole, already over its sum.
ELASTIC_FN void weigh_parts(const DecodeParams& p, const Parts& parts, float2* peaks, float* weights) {
  const int group = p.heads / p.kv_heads, lane = threadIdx.x % 32;
  for (int row = threadIdx.x / 32; row < group; row += kWarps) {
    float top = minus_infinity(), sum = 0.0f;
    for (int part = lane; part < parts.count; part += 32) {
      const float2 one = __ldcg((const float2*)peaks_of(p, group) + parts.slot(part) * group + row);
      peaks[part * group + row] = one;
      top = fmaxf(top, one.x);
    }
#pragma unroll
    for (int step = 1; step < 32; step *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
    for (int part = lane; part < parts.count; part += 32) {
      const float2 one = peaks[part * group + row];
      const float weight = weight_of(one.x, top, p.scale_log2);
      weights[part * group + row] = weight;
      sum = fmaf(weight, one.y, sum);
    }
#pragma unroll
    for (int step = 1; step < 32; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
    const float factor = sum == 0.0f ? 0.0f : 1.0f / sum;
    for (int part = lane; part < parts.count; part += 32) weights[part * group + row] *= factor;
  }
  __syncthreads();
}

// The last CTA of a head adds up its parts, always in the order of the list. Several threads share an output column;
// each has many loads under way, because all of this is waiting for the L2 cache.
ELASTIC_FN void merge(const DecodeParams& p, const Parts& parts, int head, float* rows) {
  constexpr int kBatch = 8;
  const int group = p.heads / p.kv_heads, columns = group * kD / 4;
  float* weights = rows + 2 * parts.count * group;
  weigh_parts(p, parts, (float2*)rows, weights);
  int each = min_i(16, max_i(1, kThreads / columns));  // threads to a column, in one warp: a power of two
  while (each & (each - 1)) each &= each - 1;
  const int turn = threadIdx.x / 2 % each, mine = threadIdx.x / (2 * each) * 2 + threadIdx.x % 2;  // pairs: 32 bytes
  for (int first = 0; first < columns; first += kThreads / each) {
    const int index = first + mine, row = index / (kD / 4);
    float4 all = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    for (int part = turn; part < parts.count && index < columns; part += kBatch * each) {
      float4 o[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int slot = parts.slot(min_i(part + i * each, parts.count - 1));
        o[i] = __ldcg((const float4*)(p.partial + i64(slot) * group * kD) + index);
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (part + i * each >= parts.count) break;
        const float weight = weights[(part + i * each) * group + row];
        all.x = fmaf(weight, o[i].x, all.x), all.y = fmaf(weight, o[i].y, all.y);
        all.z = fmaf(weight, o[i].z, all.z), all.w = fmaf(weight, o[i].w, all.w);
      }
    }
    for (int step = 2; step < 2 * each; step *= 2) {
      all.x += __shfl_xor_sync(~0u, all.x, step), all.y += __shfl_xor_sync(~0u, all.y, step);
      all.z += __shfl_xor_sync(~0u, all.z, step), all.w += __shfl_xor_sync(~0u, all.w, step);
    }
    if (index >= columns || turn != 0) continue;
    store_pair(p, head, row, 4 * index % kD, all.x, all.y);
    store_pair(p, head, row, 4 * index % kD + 2, all.z, all.w);
  }
  __syncthreads();
}

// Says that this CTA's parts are stored; a CTA that finds all parts of a head stored merges them. Only the first and
// the last head of a share can be shared, and both are reported at its end, so that no head waits for another.
ELASTIC_FN void finish_shared(const DecodeParams& p, const Share& share, const int* offset, int first, int last,
                              Shared& shared, float* rows) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x < 2) {
    const int head = threadIdx.x == 0 ? first : last;
    const Parts parts = parts_of(share, offset, head);
    const bool counts = parts.count > 1 && (threadIdx.x == 0 || first != last);
    const bool merges = counts && atomicAdd(p.arrived + head, 1) == parts.count - 1;
    if (merges) p.arrived[head] = 0;
    shared.merges[threadIdx.x] = merges;
    __threadfence();
  }
  __syncthreads();
  if (shared.merges[0]) merge(p, parts_of(share, offset, first), first, rows);
  if (shared.merges[1]) merge(p, parts_of(share, offset, last), last, rows);
}

}  // namespace elastic
