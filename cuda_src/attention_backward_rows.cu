// What surrounds the main backward kernels on any GPU: per-row sums before it, dQ in its final type after it, and the
// gap that the route's gradient needs. Compile-time: ELASTIC_HEAD_DIM (64, 128), ELASTIC_BF16 (1, else fp16).
#include "elastic/backward.cuh"
#include "elastic/softmax.cuh"

namespace elastic {

constexpr int kD = ELASTIC_HEAD_DIM;
constexpr int kRows = kBackwardRows<kD>;
constexpr int kThreads = 256, kLanes = kD / 8;  // lanes that share a row, 16 bytes each

ELASTIC_FN float low_half(u32 x) {
#if ELASTIC_BF16
  return __int_as_float(x << 16);
#else
  float y;
  asm("{\n .reg .b16 a, b;\n mov.b32 {a, b}, %1;\n cvt.f32.f16 %0, a;\n}" : "=f"(y) : "r"(x));
  return y;
#endif
}
ELASTIC_FN float high_half(u32 x) {
#if ELASTIC_BF16
  return __int_as_float(x & 0xffff0000u);
#else
  return low_half(x >> 16);
#endif
}

ELASTIC_FN float dot(uint4 a, uint4 b) {
  const u32 x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) sum += low_half(x[i]) * low_half(y[i]) + high_half(x[i]) * high_half(y[i]);
  return sum;
}

ELASTIC_FN const uint4* row_of(const void* tensor, const Strides& stride, int row, i64 token, int head) {
  return (const uint4*)((const char*)tensor + 2 * (row * stride.row + token * stride.token + head * stride.head));
}

// Sample and first row of this CTA's row tile, shared by all threads; sample -1 beyond the last tile.
ELASTIC_FN int2 own_tile(const Params& p) {
  __shared__ int2 shared;
  if (threadIdx.x < 32) {
    const int2 tile = find_row_tile<kRows>(p, blockIdx.x, threadIdx.x);
    if (threadIdx.x == 0) shared = tile;
  }
  __syncthreads();
  return shared;
}

}  // namespace elastic

using namespace elastic;

// Grid (row tiles, H). Writes lse2 and delta = <dO, O> of every row, +inf and 0 where a row shows nothing or is none, so
// that its P is 0; clears the tile's dQ.
extern "C" __global__ void __launch_bounds__(256)
    attention_backward_prepare(const __grid_constant__ BackwardParams p) {
  const int2 tile = own_tile(p.f);
  if (tile.x < 0) return;
  const Sample s = read_sample(p.f, tile.x);
  const int head = blockIdx.y, lane = threadIdx.x % kLanes;
  const i64 at = i64(head) * p.row_tiles + blockIdx.x, all = i64(p.f.heads) * p.row_tiles * kRows;
  float4* sum = (float4*)(p.dq_sum + at * kTileElements);
  for (int i = threadIdx.x; i < kTileElements / 4; i += kThreads) sum[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  if (p.turns && threadIdx.x < 2) p.turns[2 * at + threadIdx.x] = 0;
  for (int r = threadIdx.x / kLanes; r < kRows; r += kThreads / kLanes) {
    const bool valid = tile.y + r < s.len_q;
    const int token = s.begin_q + tile.y + r;
    float delta = 0.0f, lse2 = -minus_infinity();
    if (valid) {
      delta = dot(row_of(p.grad_out, p.f.stride_o, s.row, token, head)[lane],
                  row_of(p.f.out, p.stride_out, s.row, token, head)[lane]);
    }
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) delta += __shfl_xor_sync(~0u, delta, step);
    const float lse = valid ? p.f.lse[(i64(s.row) * p.f.heads + head) * p.f.seq_q + token] : minus_infinity();
    if (lse == minus_infinity()) delta = 0.0f; else lse2 = lse * kLog2e;
    if (lane == 0) {
      p.rows[at * kRows + r] = lse2;
      p.rows[all + at * kRows + r] = -delta;
    }
  }
}

// Grid (row tiles, H). dq = scale * dq_sum, from accumulator order to rows.
extern "C" __global__ void __launch_bounds__(256)
    attention_backward_finish(const __grid_constant__ BackwardParams p) {
  const int2 tile = own_tile(p.f);
  if (tile.x < 0) return;
  const Sample s = read_sample(p.f, tile.x);
  const int head = blockIdx.y, warpgroup = threadIdx.x / 128, thread = threadIdx.x % 128;
  const float4* sum = (const float4*)(p.dq_sum + (i64(head) * p.row_tiles + blockIdx.x) * kTileElements) +
                      warpgroup * (kTileElements / 8) + thread;
  const int row = thread / 32 * 16 + thread % 32 / 4 + (kD == 64 ? warpgroup * 64 : 0);
  const int column = 2 * (thread % 4) + (kD == 64 ? 0 : warpgroup * 64);
  char* out = (char*)p.dq +
              2 * (s.row * p.stride_dq.row + (s.begin_q + tile.y + row) * p.stride_dq.token + head * p.stride_dq.head);
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const float4 x = sum[j * 128];
    u32* to = (u32*)(out + 2 * (8 * j + column));
    if (tile.y + row < s.len_q) *to = pack(x.x * p.f.scale, x.y * p.f.scale);
    if (tile.y + row + 8 < s.len_q) *(u32*)((char*)to + 16 * p.stride_dq.token) = pack(x.z * p.f.scale, x.w * p.f.scale);
  }
}

// Grid (N, K). dq_sum[n, k] = sum over the sample's rows and the group's heads of <dO, O - O'>, with O' in `dq`.
extern "C" __global__ void __launch_bounds__(256)
    attention_route_gap(const __grid_constant__ BackwardParams p) {
  __shared__ float partial[kThreads / 32];
  const Sample s = read_sample(p.f, blockIdx.x);
  const int group = p.f.heads / p.f.kv_heads, lane = threadIdx.x % kLanes;
  float sum = 0.0f;
  for (int r = threadIdx.x / kLanes; r < s.len_q * group; r += kThreads / kLanes) {
    const int token = s.begin_q + r / group, head = blockIdx.y * group + r % group;
    const uint4 grad = row_of(p.grad_out, p.f.stride_o, s.row, token, head)[lane];
    sum += dot(grad, row_of(p.f.out, p.stride_out, s.row, token, head)[lane]) -
           dot(grad, row_of(p.dq, p.stride_dq, s.row, token, head)[lane]);
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < kThreads / 32; ++w) sum += partial[w];
    p.dq_sum[blockIdx.x * gridDim.y + blockIdx.y] = sum;
  }
}
