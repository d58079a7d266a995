// The route of one layer in one launch: boundary pooling of the pre-RoPE keys, standardised features, two MLPs, the
// decision and the head plan's modes. A cluster of kParts CTAs shares the work of kRows (sample, KV head) pairs: every
// CTA pools some of the rows and computes its slice of the outputs of each layer for all of them, and activations
// travel through distributed shared memory. Where there are no clusters (below compute capability 9.0) one CTA does it.
// Compile-time: ELASTIC_HEAD_DIM (64, 128), ELASTIC_BF16 (1, else fp16), ELASTIC_PARTS (8, else 1).
#include "elastic/params.cuh"

namespace elastic {

constexpr int kD = ELASTIC_HEAD_DIM, kParts = ELASTIC_PARTS, kWide = 4 * kD;
constexpr int kThreads = 256, kRows = 8, kGroups = 16, kPasses = 8 / kParts;
constexpr float kEpsilon = 1e-5f, kLimit = 10.0f;  // elastic/router.py
constexpr double kLeastSamples = 8.0;

struct RouteParams {
  const char* keys;               // [N, slots, K, D], the first half of the slots from the prompt's start
  const float *weight, *count;    // [N, slots], [N]
  const float* earlier;           // [N, K, D]: sums of the first half from an earlier turn, or null
  const float *w1, *b1, *w2, *b2, *w3, *b3, *w4, *b4, *w5, *b5;
  const float *mean, *var;        // [K, D], or null: features are the pooled keys
  const double* seen;             // samples behind the statistics
  float *pooled, *first, *logits, *route;  // [N, K, D], [N, K, D], [N, K, 2], [N, K]
  char* record;                   // [N, K], the route as int8
  int* mode;                      // [N, K]
  int samples, kv_heads, slots, mode0, mode1;
  float bias;
};
static_assert(sizeof(RouteParams) == 208, "elastic/kernels/route_prompt.py packs 208 bytes");

struct Activations {  // of all rows; every CTA has all of them
  float features[kRows][kD], task_wide[kRows][kWide], task[kRows][kD], wide[kRows][kWide], out[kRows][kD];
};

ELASTIC_FN int part_of() {
#if ELASTIC_PARTS > 1
  u32 rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return int(rank);
#else
  return 0;
#endif
}

ELASTIC_FN void meet() {  // all threads of all parts
#if ELASTIC_PARTS > 1
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
}

// Writes to the same place in the shared memory of one part.
ELASTIC_FN void put(float* local, int part, float value) {
#if ELASTIC_PARTS > 1
  u32 remote;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(u32(__cvta_generic_to_shared(local))), "r"(part));
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(remote), "f"(value) : "memory");
#else
  *local = value;
#endif
}

ELASTIC_FN float silu(float x) { return x / (1.0f + expf(-x)); }

ELASTIC_FN float2 widen(u32 word) {
#if ELASTIC_BF16
  return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
#else
  float2 pair;
  asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %2;\ncvt.f32.f16 %0, low;\ncvt.f32.f16 %1, high;\n}"
      : "=f"(pair.x), "=f"(pair.y)
      : "r"(word));
  return pair;
#endif
}

// One linear layer: a pass computes an eighth of the outputs for all rows, kSplit lanes to an output.
template <int kIn, int kOut, bool kSilu>
struct Linear {
  static constexpr int kOutputs = kOut / 8, kSplit = kThreads / kOutputs, kLoads = kIn / (4 * kSplit);
  float4 w[kLoads];
  float b;

  ELASTIC_FN void load(const float* weight, const float* bias, int eighth) {
    const int split = threadIdx.x % kSplit, output = eighth * kOutputs + threadIdx.x / kSplit;
#pragma unroll
    for (int j = 0; j < kLoads; ++j) w[j] = __ldg((const float4*)(weight + output * kIn) + j * kSplit + split);
    b = __ldg(bias + output);
  }

  ELASTIC_FN void apply(const float (&in)[kRows][kIn], float (&out)[kRows][kOut], int eighth) const {
    const int split = threadIdx.x % kSplit, output = eighth * kOutputs + threadIdx.x / kSplit;
    float sum[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      sum[r] = 0.0f;
#pragma unroll
      for (int j = 0; j < kLoads; ++j) {
        const float4 x = *(const float4*)(&in[r][4 * (j * kSplit + split)]);
        sum[r] = fmaf(w[j].x, x.x, fmaf(w[j].y, x.y, fmaf(w[j].z, x.z, fmaf(w[j].w, x.w, sum[r]))));
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int step = 1; step < kSplit; step *= 2) sum[r] += __shfl_xor_sync(~0u, sum[r], step);
      const float y = kSilu ? silu(sum[r] + b) : sum[r] + b;
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        if ((r * kParts + part) % kSplit == split) put(&out[r][output], part, y);
      }
    }
  }
};

// Sums of the slots of one row, first and last half: partial[half][group][d] of the CTA's threads.
ELASTIC_FN void sum_slots(const RouteParams& p, float (*partial)[kGroups][kD], int sample, int head) {
  constexpr int kChunks = kD / 8;
  const int chunk = threadIdx.x % kChunks, group = threadIdx.x / kChunks, half = p.slots / 2;
  if (group >= kGroups) return;
  float sum[2][8] = {};
#pragma unroll
  for (int side = 0; side < 2; ++side) {
#pragma unroll 8
    for (int slot = side * half + group; slot < (side + 1) * half; slot += kGroups) {
      const i64 element = ((i64(sample) * p.slots + slot) * p.kv_heads + head) * kD + 8 * chunk;
      const uint4 words = __ldg((const uint4*)(p.keys + 2 * element));
      const float weight = p.weight[sample * p.slots + slot];
      if (weight == 0.0f) continue;  // whatever stands there must not count, not even a NaN
      const u32 word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 pair = widen(word[i]);
        sum[side][2 * i] = fmaf(weight, pair.x, sum[side][2 * i]);
        sum[side][2 * i + 1] = fmaf(weight, pair.y, sum[side][2 * i + 1]);
      }
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) partial[side][group][8 * chunk + i] = sum[side][i];
  }
}

// Pooled keys and features of one row, d by thread; the features go to all parts.
ELASTIC_FN void pool_row(const RouteParams& p, Activations& all, float (*partial)[kGroups][kD], int row, int index) {
  const bool used = index < p.samples * p.kv_heads;
  const int sample = index / p.kv_heads, head = index % p.kv_heads, d = threadIdx.x;
  if (used) sum_slots(p, partial, sample, head);
  __syncthreads();
  if (d < kD) {
    float feature = 0.0f;
    if (used) {
      float first = p.earlier ? p.earlier[index * kD + d] : 0.0f, last = 0.0f;
#pragma unroll
      for (int g = 0; g < kGroups; ++g) first += partial[0][g][d], last += partial[1][g][d];
      feature = (first + last) / p.count[sample];
      p.first[index * kD + d] = first;
      p.pooled[index * kD + d] = feature;
      if (p.mean && *p.seen >= kLeastSamples) {
        feature = (feature - p.mean[head * kD + d]) * rsqrtf(p.var[head * kD + d] + kEpsilon);
        feature = feature > kLimit ? kLimit : feature < -kLimit ? -kLimit : feature;  // a NaN stays one
      }
    }
#pragma unroll
    for (int part = 0; part < kParts; ++part) put(&all.features[row][d], part, feature);
  }
  __syncthreads();
}

// Logits, route and mode of one row, by one warp.
ELASTIC_FN void decide(const RouteParams& p, const float (&x)[kD], int index, int lane) {
  float sum[2] = {0.0f, 0.0f};
#pragma unroll
  for (int i = lane; i < kD; i += 32) {
    sum[0] = fmaf(p.w5[i], x[i], sum[0]);
    sum[1] = fmaf(p.w5[kD + i], x[i], sum[1]);
  }
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    sum[0] += __shfl_xor_sync(~0u, sum[0], step);
    sum[1] += __shfl_xor_sync(~0u, sum[1], step);
  }
  if (lane != 0) return;
  const float full = sum[0] + p.b5[0], sparse = sum[1] + p.b5[1];
  const bool routed = sparse + p.bias > full;  // ties go to full attention
  p.logits[2 * index] = full;
  p.logits[2 * index + 1] = sparse;
  p.route[index] = routed ? 1.0f : 0.0f;
  p.record[index] = routed;
  p.mode[index] = routed ? p.mode1 : p.mode0;
}

}  // namespace elastic

#if ELASTIC_PARTS > 1
#define ELASTIC_CLUSTER __cluster_dims__(ELASTIC_PARTS, 1, 1)
#else
#define ELASTIC_CLUSTER
#endif

extern "C" __global__ void ELASTIC_CLUSTER __launch_bounds__(elastic::kThreads)
    route_prompt(const __grid_constant__ elastic::RouteParams p) {
  using namespace elastic;
  extern __shared__ __align__(16) char memory[];
  Activations& all = *(Activations*)memory;
  auto* partial = (float (*)[kGroups][kD]) & all.wide;  // free until the third layer
  static_assert(sizeof(all.wide) >= 2 * kGroups * kD * 4, "the sums of the slots fit");
  const int part = part_of(), base = int(blockIdx.x) / kParts * kRows, warp = threadIdx.x / 32;
  Linear<kD, kWide, true> first;
  Linear<kWide, kD, false> second;
  Linear<kD, kWide, true> third;
  Linear<kWide, kD, true> fourth;
  if (kParts > 1) {  // all weights are on their way while the keys are pooled
    first.load(p.w1, p.b1, part);
    second.load(p.w2, p.b2, part);
    third.load(p.w3, p.b3, part);
    fourth.load(p.w4, p.b4, part);
  }
  meet();  // every part has started
  for (int row = part; row < kRows; row += kParts) pool_row(p, all, partial, row, base + row);
  meet();
#pragma unroll 1
  for (int pass = 0; pass < kPasses; ++pass) {
    if (kParts == 1) first.load(p.w1, p.b1, pass);
    first.apply(all.features, all.task_wide, kParts == 1 ? pass : part);
  }
  meet();
#pragma unroll 1
  for (int pass = 0; pass < kPasses; ++pass) {
    if (kParts == 1) second.load(p.w2, p.b2, pass);
    second.apply(all.task_wide, all.task, kParts == 1 ? pass : part);
  }
  meet();
#pragma unroll 1
  for (int pass = 0; pass < kPasses; ++pass) {
    if (kParts == 1) third.load(p.w3, p.b3, pass);
    third.apply(all.task, all.wide, kParts == 1 ? pass : part);
  }
  meet();
#pragma unroll 1
  for (int pass = 0; pass < kPasses; ++pass) {
    if (kParts == 1) fourth.load(p.w4, p.b4, pass);
    fourth.apply(all.wide, all.out, kParts == 1 ? pass : part);
  }
  meet();
  if (part == 0 && base + warp < p.samples * p.kv_heads) decide(p, all.out[warp], base + warp, threadIdx.x % 32);
}
