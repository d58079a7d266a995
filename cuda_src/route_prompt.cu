// The route of one layer in one launch: boundary pooling of the pre-RoPE keys, standardised features, two MLPs, the
// decision and the head plan's modes. A cluster of kParts CTAs shares the work of kRows (sample, KV head) pairs: every
// CTA pools some of the rows and computes its slice of the outputs of each layer for all of them, and activations
// travel through distributed shared memory. Where there are no clusters (below compute capability 9.0) one CTA does it.
// A launch runs each instruction a few times only, so loops stay rolled: fetching code would take longer than running it.
// Compile-time: ELASTIC_HEAD_DIM (64, 128), ELASTIC_BF16 (1, else fp16), ELASTIC_PARTS (8, else 1).
#include "elastic/cluster.cuh"

namespace elastic {

constexpr int kD = ELASTIC_HEAD_DIM, kParts = ELASTIC_PARTS, kWide = 4 * kD;
constexpr int kThreads = 256, kRows = 8;
constexpr int kLayers = 4, kSlice = kD * kWide / 8;  // layers before the logits; weights of an eighth of a layer
constexpr int kGroups = 16, kBatch = 13;             // threads that share a row's channels; their loads under way
constexpr float kEpsilon = 1e-5f, kLimit = 10.0f;    // elastic/routing/router.py
constexpr double kLeastSamples = 8.0;

struct Linear {
  const float *weight, *bias;
};

struct RouteParams {
  const char* keys;               // [N, slots, K, D], the first half of the slots from the prompt's start
  const float *weight, *count;    // [N, slots], [N]
  const float* earlier;           // [N, K, D]: sums of the first half from an earlier turn, or null
  Linear linear[kLayers + 1];     // D -> 4D -> D -> 4D -> D -> 2
  const float* offset;            // [K, 2], logits of the KV heads themselves, or null
  const float *mean, *var;        // [K, D], or null: features are the pooled keys
  const double* seen;             // samples that the statistics come from
  float *pooled, *first, *logits, *route;  // [N, K, D], [N, K, D], [N, K, 2], [N, K]
  int* mode;                      // [N, K]
  int samples, kv_heads, slots, mode0, mode1;
  float bias;
};
static_assert(sizeof(RouteParams) == 208, "elastic/kernels/route_prompt.py packs 208 bytes");

// Values of all rows in the layers' order, column by column: the eight rows of a column side by side, so that a column
// travels in two stores; a gap after every fourth column keeps lanes that read neighbouring fours out of each other's
// banks.
constexpr int kFour = 4 * kRows + 4;  // floats
constexpr int kColumns = 3 * kD + 2 * kWide;

struct Memory {
  float values[kColumns / 4 * kFour];
#if ELASTIC_PARTS > 1
  float weight[kLayers][kSlice], bias[kLayers][kWide / 8];  // this part's, on their way while the keys are pooled
#endif
};

ELASTIC_FN float* column(float* values, int c) { return values + c / 4 * kFour + c % 4 * kRows; }

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

ELASTIC_FN void prefetch(const void* address) { asm volatile("prefetch.global.L2 [%0];" ::"l"(address)); }

ELASTIC_FN uint4 load_now(const void* from) {  // where the program says, so that loads wait together
  uint4 words;
  asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
               : "l"(from));
  return words;
}

#if ELASTIC_PARTS > 1
ELASTIC_FN void fetch_weights(const RouteParams& p, Memory& memory, int part) {
#pragma unroll 1
  for (int layer = 0; layer < kLayers; ++layer) {
    const int outputs = (layer % 2 ? kD : kWide) / 8;
    const float* source = p.linear[layer].weight + part * kSlice;
    const u32 target = shared_address(memory.weight[layer]);
#pragma unroll 1
    for (int i = 4 * threadIdx.x; i < kSlice; i += 4 * kThreads) copy_async(target + 4 * i, source + i, true);
    if (threadIdx.x < outputs) {
      memory.bias[layer][threadIdx.x] = __ldg(p.linear[layer].bias + part * outputs + threadIdx.x);
    }
  }
  copy_commit();
}
#endif

// An eighth of a layer's outputs for all rows; `lanes` threads share an output. in -> out, of all parts.
ELASTIC_FN void apply(float* in, float* out, const float* weight, const float* bias, int lanes, int width, int eighth,
                      bool silu) {
  constexpr int kLoads = kD * kD / 2048;  // of a thread, in every layer: width / (4 lanes)
  const int split = threadIdx.x & (lanes - 1), mine = threadIdx.x / lanes;
  const float4* row = (const float4*)(weight + mine * width) + split;
  const float* values = in + split * kFour;
  float sum[kRows] = {};
#pragma unroll 1
  for (int j = 0; j < kLoads; ++j, row += lanes, values += lanes * kFour) {
    const float4 four = *row;
    const float w[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int c = 0; c < 4; ++c) {
#pragma unroll
      for (int r = 0; r < kRows; r += 4) {
        const float4 x = *(const float4*)(values + c * kRows + r);
        sum[r] = fmaf(w[c], x.x, sum[r]), sum[r + 1] = fmaf(w[c], x.y, sum[r + 1]);
        sum[r + 2] = fmaf(w[c], x.z, sum[r + 2]), sum[r + 3] = fmaf(w[c], x.w, sum[r + 3]);
      }
    }
  }
#pragma unroll 1
  for (int step = 1; step < lanes; step *= 2) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) sum[r] += __shfl_xor_sync(~0u, sum[r], step);
  }
  const float offset = bias[mine];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    sum[r] += offset;
    if (silu) sum[r] = sum[r] / (1.0f + __expf(-sum[r]));
  }
  const float* target = column(out, eighth * (kThreads / lanes) + mine);
#pragma unroll 1
  for (int part = split; part < kParts; part += lanes) {
    const u32 place = place_in(target, part);
    put_four(place, sum[0], sum[1], sum[2], sum[3]);
    put_four(place + 16, sum[4], sum[5], sum[6], sum[7]);
  }
}

// Sums of the slots of one row by the CTA's threads, [group][d]: the first groups take the first half of the slots.
ELASTIC_FN void sum_slots(const RouteParams& p, float (*partial)[kD], int sample, int head) {
  constexpr int kChunks = kD / 8, kHalf = kGroups / 2;
  const int chunk = threadIdx.x % kChunks, group = threadIdx.x / kChunks, half = p.slots / 2;
  if (group >= kGroups) return;
  float sum[8] = {};
  const int begin = group / kHalf * half;
#pragma unroll 1
  for (int start = group % kHalf; start < half; start += kBatch * kHalf) {
    uint4 words[kBatch];
    float weight[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {  // all on their way before the first is used
      const int slot = begin + min(start + j * kHalf, half - 1);
      const i64 element = ((i64(sample) * p.slots + slot) * p.kv_heads + head) * kD + 8 * chunk;
      words[j] = load_now(p.keys + 2 * element);
      weight[j] = __ldg(p.weight + sample * p.slots + slot);
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      if (start + j * kHalf >= half) weight[j] = 0.0f;
      const u32 word[4] = {words[j].x, words[j].y, words[j].z, words[j].w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // what counts 0 must not count, not even as a NaN
        const float2 pair = widen(weight[j] == 0.0f ? 0u : word[i]);
        sum[2 * i] = fmaf(weight[j], pair.x, sum[2 * i]);
        sum[2 * i + 1] = fmaf(weight[j], pair.y, sum[2 * i + 1]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) partial[group][8 * chunk + i] = sum[i];
}

// Pooled keys and features of one row, d by thread; the features go to all parts.
ELASTIC_FN void pool_row(const RouteParams& p, float* features, float (*partial)[kD], int row, int index) {
  const bool used = index < p.samples * p.kv_heads, mine = used && threadIdx.x < kD;
  const int sample = index / p.kv_heads, head = index % p.kv_heads, d = threadIdx.x;
  const bool standardised = mine && p.mean && *p.seen >= kLeastSamples;
  const float mean = standardised ? p.mean[head * kD + d] : 0.0f, var = standardised ? p.var[head * kD + d] : 1.0f;
  const float earlier = mine && p.earlier ? p.earlier[index * kD + d] : 0.0f, count = used ? p.count[sample] : 1.0f;
  if (used) sum_slots(p, partial, sample, head);
  __syncthreads();
  if (d < kD) {
    float first = earlier, last = 0.0f;
    if (used) {
#pragma unroll
      for (int g = 0; g < kGroups / 2; ++g) first += partial[g][d], last += partial[kGroups / 2 + g][d];
    }
    float feature = (first + last) / count;
    if (used) p.first[index * kD + d] = first, p.pooled[index * kD + d] = feature;
    if (standardised) {
      feature = (feature - mean) * rsqrtf(var + kEpsilon);
      feature = feature > kLimit ? kLimit : feature < -kLimit ? -kLimit : feature;  // a NaN stays one
    }
#pragma unroll 1
    for (int part = 0; part < kParts; ++part) put(place_in(column(features, d) + row, part), feature);
  }
  __syncthreads();
}

// Logits, route and mode of one row, by one warp.
ELASTIC_FN void decide(const RouteParams& p, float* out, int row, int index, int lane) {
  const Linear last = p.linear[kLayers];
  float sum[2] = {0.0f, 0.0f};
#pragma unroll
  for (int i = lane; i < kD; i += 32) {
    const float x = column(out, i)[row];
    sum[0] = fmaf(__ldg(last.weight + i), x, sum[0]);
    sum[1] = fmaf(__ldg(last.weight + kD + i), x, sum[1]);
  }
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    sum[0] += __shfl_xor_sync(~0u, sum[0], step);
    sum[1] += __shfl_xor_sync(~0u, sum[1], step);
  }
  if (lane != 0) return;
  float full = sum[0] + last.bias[0], sparse = sum[1] + last.bias[1];
  if (p.offset) full += p.offset[2 * (index % p.kv_heads)], sparse += p.offset[2 * (index % p.kv_heads) + 1];
  const bool routed = sparse + p.bias > full;  // ties go to full attention
  p.logits[2 * index] = full;
  p.logits[2 * index + 1] = sparse;
  p.route[index] = routed ? 1.0f : 0.0f;
  p.mode[index] = routed ? p.mode1 : p.mode0;
}

}  // namespace elastic

extern "C" __global__ void ELASTIC_CLUSTER __launch_bounds__(elastic::kThreads, 1)
    route_prompt(const __grid_constant__ elastic::RouteParams p) {
  using namespace elastic;
  extern __shared__ __align__(16) char shared[];
  Memory& memory = *(Memory*)shared;
  float* in = memory.values;
  auto* partial = (float (*)[kD])column(in, 2 * kD + kWide);  // where the third layer's outputs will lie
  static_assert(kWide / 4 * kFour >= kGroups * kD, "the sums of the slots fit there");
  const int part = part_of(), base = int(blockIdx.x) / kParts * kRows, warp = threadIdx.x / 32;
#if ELASTIC_PARTS > 1
  fetch_weights(p, memory, part);
#endif
  if (threadIdx.x < kD / 16) prefetch(p.linear[kLayers].weight + 32 * threadIdx.x);
  meet();  // every part has started
#pragma unroll 1
  for (int row = part; row < kRows; row += kParts) pool_row(p, in, partial, row, base + row);
  copy_wait();
  meet();
#pragma unroll 1
  for (int layer = 0; layer < kLayers; ++layer) {
    const int width = layer % 2 ? kWide : kD, outputs = (layer % 2 ? kD : kWide) / 8, lanes = kThreads / outputs;
    float* out = column(in, width);
#if ELASTIC_PARTS > 1
    apply(in, out, memory.weight[layer], memory.bias[layer], lanes, width, part, layer != 1);
#else
#pragma unroll 1
    for (int eighth = 0; eighth < 8; ++eighth) {
      const Linear linear = p.linear[layer];
      apply(in, out, linear.weight + eighth * kSlice, linear.bias + eighth * outputs, lanes, width, eighth, layer != 1);
    }
#endif
    meet();
    in = out;
  }
  if (part == 0 && base + warp < p.samples * p.kv_heads) decide(p, in, warp, base + warp, threadIdx.x % 32);
}
