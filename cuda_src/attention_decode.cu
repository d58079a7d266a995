// Decode attention: one query token per sample, every KV head with its own run of visible tokens. Memory-bound, so the
// tokens of all heads form one list of units that the CTAs share equally; a head cut by a CTA's end is put together by
// the last CTA that finishes it. The query heads of a group are the rows of one mma tile, so K and V are read once.
// Compile-time: ELASTIC_HEAD_DIM (64, 128), ELASTIC_BF16 (1, else fp16), ELASTIC_WARPS, ELASTIC_STAGES.
#include "elastic/ptx_sm80.cuh"
#include "elastic/softmax.cuh"

namespace elastic {

constexpr int kD = ELASTIC_HEAD_DIM, kWarps = ELASTIC_WARPS, kStages = ELASTIC_STAGES;
constexpr int kThreads = 32 * kWarps;
constexpr int kTokens = 16;                  // of a warp's tile: its keys and values are one stage of its own ring
constexpr int kStep = kWarps * kTokens;      // the warps take turns
constexpr int kUnit = 64;                    // tokens, the grain of the shares
constexpr int kLeastUnits = 2;               // a share below this is not worth a CTA
constexpr int kRows = 16;                    // query heads of an mma tile
constexpr int kRowBytes = 2 * kD, kChunks = kD / 8, kTileBytes = kTokens * kRowBytes;
constexpr int kPitch = kD + 8;               // floats from one output row to the next in shared memory

struct DecodeParams {
  const char *q, *keys, *values;
  char* out;
  const i64* base;                   // [B, K], row of token 0
  const int *sink, *begin, *end;     // [B, K], tokens
  float* partial;                    // [2 * CTAs, G, D], then [2 * CTAs, G, 2]: maximum and sum
  int* arrived;                      // [B, K], zero before and after every launch
  i64 q_sample, q_head, token_stride;  // elements, elements, rows
  int samples, heads, kv_heads;
  float scale_log2;
};
static_assert(sizeof(DecodeParams) == 120, "elastic/kernels/decode.py packs 120 bytes");

struct Span {  // the visible tokens of a head, numbered 0..count: the sink, then the rest
  int sink, skip, count;
};

ELASTIC_FN Span span_of(const DecodeParams& p, int head) {
  const int end = max(p.end[head], 0), sink = min(max(p.sink[head], 0), end);
  const int begin = min(max(p.begin[head], sink), end);
  return {sink, begin - sink, sink + end - begin};
}

struct Share {  // of one CTA: units [first, last) of the list
  i64 units;
  int workers, first, last;
};

ELASTIC_FN int share_begin(i64 units, int workers, int worker) { return int(units * worker / workers); }
ELASTIC_FN int worker_of(i64 units, int workers, int unit) { return int(((unit + 1ll) * workers - 1) / units); }

// offset[h] = units before head h, for all heads and the end; a head that sees nothing has one empty unit.
ELASTIC_FN Share build_list(const DecodeParams& p, int* offset, int* totals) {
  const int heads = p.samples * p.kv_heads, each = (heads + kThreads - 1) / kThreads;
  const int from = min(int(threadIdx.x) * each, heads), to = min(from + each, heads), lane = threadIdx.x % 32;
  int sum = 0;
  for (int h = from; h < to; ++h) {
    offset[h] = sum;
    sum += max(1, (span_of(p, h).count + kUnit - 1) / kUnit);
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
  for (int w = 0; w < kWarps; ++w) {
    if (w < int(threadIdx.x) / 32) before += totals[w];
    units += totals[w];
  }
  for (int h = from; h < to; ++h) offset[h] += before;
  if (threadIdx.x == 0) offset[heads] = units;
  __syncthreads();
  const int workers = min(int(gridDim.x), max(1, units / kLeastUnits)), mine = min(int(blockIdx.x), workers);
  return {units, workers, share_begin(units, workers, mine), share_begin(units, workers, min(mine + 1, workers))};
}

struct Item {  // a CTA's part of one head: visible tokens [begin, end)
  int head, begin, end;
  bool whole;
};

ELASTIC_FN Item item_of(const Share& share, const int* offset, int head, int count) {
  const int first = max(share.first - offset[head], 0), last = min(share.last, offset[head + 1]) - offset[head];
  const bool whole = share.first <= offset[head] && offset[head + 1] <= share.last;
  return {head, first * kUnit, min(last * kUnit, count), whole};
}

ELASTIC_FN int head_at(const int* offset, int heads, int unit) {  // the last head that begins at or before the unit
  int low = 0, high = heads - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (offset[middle] <= unit) low = middle; else high = middle - 1;
  }
  return low;
}

ELASTIC_FN u32 swizzled(u32 tile, int row, int chunk) { return tile + row * kRowBytes + ((chunk ^ (row & 7)) << 4); }

// Runs ahead of the computation through the same items and tiles.
struct Loader {
  Span span;
  Item item;
  i64 base;
  int pos;

  ELASTIC_FN void open(const DecodeParams& p, const Share& share, const int* offset, int head, int warp) {
    span = span_of(p, head);
    base = p.base[head];
    item = item_of(share, offset, head, span.count);
    pos = item.begin + warp * kTokens;
  }

  ELASTIC_FN void load(const DecodeParams& p, const Share& share, const int* offset, u32 stage, int warp, int lane) {
    while (pos >= item.end && share.last > offset[item.head + 1]) open(p, share, offset, item.head + 1, warp);
    if (pos < item.end) {
#pragma unroll
      for (int i = 0; i < kTokens * kChunks / 32; ++i) {
        const int row = (i * 32 + lane) / kChunks, chunk = (i * 32 + lane) % kChunks, at = pos + row;
        const bool valid = at < item.end;
        const i64 token = valid ? at + (at >= span.sink ? span.skip : 0) : 0;
        const i64 byte = (base + token * p.token_stride) * kRowBytes + chunk * 16;
        copy_async(swizzled(stage, row, chunk), p.keys + byte, valid);
        copy_async(swizzled(stage + kTileBytes, row, chunk), p.values + byte, valid);
      }
      pos += kStep;
    }
    copy_commit();
  }
};

ELASTIC_FN void load_queries(u32 (&q)[kD / 16][4], const DecodeParams& p, int head, int lane) {
  const int group = p.heads / p.kv_heads, sample = head / p.kv_heads, first = head % p.kv_heads * group;
#pragma unroll
  for (int kk = 0; kk < kD / 16; ++kk) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int row = lane / 4 + 8 * (j & 1), column = 16 * kk + 2 * (lane & 3) + 8 * (j >> 1);
      const i64 element = sample * p.q_sample + (first + row) * p.q_head + column;
      q[kk][j] = row < group ? *(const u32*)(p.q + 2 * element) : 0u;
    }
  }
}

// One tile of 16 tokens: scores of all query heads, online softmax, output.
ELASTIC_FN void attend(float (&o)[kD / 2], Softmax& softmax, const u32 (&q)[kD / 16][4], u32 stage, int valid,
                       float scale_log2, int lane) {
  float s[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) s[i] = 0.0f;
#pragma unroll
  for (int kk = 0; kk < kD / 16; ++kk) {
    u32 b[4];
    load_matrix(b, swizzled(stage, (lane & 7) + ((lane >> 4) << 3), 2 * kk + ((lane >> 3) & 1)));
    mma(s, q[kk], b[0], b[1]);
    mma(s + 4, q[kk], b[2], b[3]);
  }
  if (valid < kTokens) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (8 * (i / 4) + 2 * (lane & 3) + (i & 1) >= valid) s[i] = minus_infinity();
    }
  }
  float alpha[2];
  softmax.update(s, alpha, scale_log2);
  rescale(o, alpha);
  const u32 a[4] = {pack(s[0], s[1]), pack(s[2], s[3]), pack(s[4], s[5]), pack(s[6], s[7])};
#pragma unroll
  for (int j = 0; j < kD / 16; ++j) {
    u32 b[4];
    load_matrix_transposed(b, swizzled(stage + kTileBytes, lane & 15, 2 * j + (lane >> 4)));
    mma(o + 8 * j, a, b[0], b[1]);
    mma(o + 8 * j + 4, a, b[2], b[3]);
  }
}

struct Shared {          // dynamic shared memory behind the rings
  float peak[kWarps][kRows], sum[kWarps][kRows];
  int totals[kWarps];
  int last;
};

ELASTIC_FN float weight_of(float peak, float top, float scale_log2) {
  return peak == minus_infinity() ? 0.0f : exp2_approx((peak - top) * scale_log2);
}

ELASTIC_FN void store_pair(const DecodeParams& p, int head, int row, int column, float x, float y) {
  const int group = p.heads / p.kv_heads;
  const i64 element = (i64(head) * group + row) * kD + column;  // [B, K, G, D] is [B, H, D]
  *(u32*)(p.out + 2 * element) = pack(x, y);
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

// Maximum and sum of a row over the warps.
ELASTIC_FN float2 total_of(const Shared& shared, int row, float scale_log2) {
  float top = minus_infinity(), sum = 0.0f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) top = fmaxf(top, shared.peak[w][row]);
#pragma unroll
  for (int w = 0; w < kWarps; ++w) sum += shared.sum[w][row] * weight_of(shared.peak[w][row], top, scale_log2);
  return make_float2(top, sum);
}

ELASTIC_FN float* peaks_of(const DecodeParams& p, int group) { return p.partial + i64(2) * gridDim.x * group * kD; }

// The CTA's part of a head: to the output if it is the whole head, else to slot `slot` of the partial results.
ELASTIC_FN void store_item(const DecodeParams& p, const float* rows, const Shared& shared, const Item& item, int slot) {
  const int group = p.heads / p.kv_heads;
  for (int i = threadIdx.x; i < group * kD / 2; i += kThreads) {
    const int row = i / (kD / 2), column = 2 * (i % (kD / 2));
    const float2 total = total_of(shared, row, p.scale_log2);
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

// The last CTA of a head adds up its parts, always in the order of the list. `weights` [parts, G] is shared memory.
ELASTIC_FN void merge(const DecodeParams& p, const Share& share, const int* offset, int head, int first, int parts,
                      float* weights) {
  const int group = p.heads / p.kv_heads;
  const bool second = share_begin(share.units, share.workers, first) < offset[head];  // of the first CTA's two slots
  const float2* peaks = (const float2*)peaks_of(p, group);
  for (int i = threadIdx.x; i < parts * group; i += kThreads) {
    const int part = i / group, slot = 2 * (first + part) + (part == 0 && second);
    const float2 one = __ldcg(peaks + slot * group + i % group);
    weights[2 * i] = one.x, weights[2 * i + 1] = one.y;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < group * kD / 4; i += kThreads) {
    const int row = i / (kD / 4), column = 4 * (i % (kD / 4));
    float top = minus_infinity(), sum = 0.0f;
    for (int part = 0; part < parts; ++part) top = fmaxf(top, weights[2 * (part * group + row)]);
    float4 all = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 8
    for (int part = 0; part < parts; ++part) {
      const int slot = 2 * (first + part) + (part == 0 && second);
      const float weight = weight_of(weights[2 * (part * group + row)], top, p.scale_log2);
      const float4 one = __ldcg((const float4*)(p.partial + (i64(slot) * group + row) * kD + column));
      sum += weight * weights[2 * (part * group + row) + 1];
      all.x += weight * one.x, all.y += weight * one.y, all.z += weight * one.z, all.w += weight * one.w;
    }
    const float factor = sum == 0.0f ? 0.0f : 1.0f / sum;
    store_pair(p, head, row, column, all.x * factor, all.y * factor);
    store_pair(p, head, row, column + 2, all.z * factor, all.w * factor);
  }
}

// Says that this CTA's part of a head is stored; the CTA that finds all parts stored merges them.
ELASTIC_FN void arrive(const DecodeParams& p, const Share& share, const int* offset, int head, Shared& shared,
                       float* rows) {
  const int first = worker_of(share.units, share.workers, offset[head]);
  const int parts = worker_of(share.units, share.workers, offset[head + 1] - 1) - first + 1;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    shared.last = atomicAdd(p.arrived + head, 1) == parts - 1;
    if (shared.last) p.arrived[head] = 0;
    __threadfence();
  }
  __syncthreads();
  if (shared.last) merge(p, share, offset, head, first, parts, rows);
}

}  // namespace elastic

extern "C" __global__ void __launch_bounds__(elastic::kThreads)
    attention_decode(const __grid_constant__ elastic::DecodeParams p) {
  using namespace elastic;
  extern __shared__ __align__(128) char memory[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = p.heads / p.kv_heads;
  const u32 ring = shared_address(memory) + warp * kStages * 2 * kTileBytes;
  float* rows = (float*)(memory + kWarps * kStages * 2 * kTileBytes);
  Shared& shared = *(Shared*)(rows + kWarps * group * kPitch);
  int* offset = (int*)(&shared + 1);
  const Share share = build_list(p, offset, shared.totals);
  if (share.first >= share.last) return;
  int head = head_at(offset, p.samples * p.kv_heads, share.first);
  const int first_head = head;

  Loader loader;
  loader.open(p, share, offset, head, warp);
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) loader.load(p, share, offset, ring + i * 2 * kTileBytes, warp, lane);
  int stage = 0;
#pragma unroll 1
  for (; offset[head] < share.last; ++head) {
    const Item item = item_of(share, offset, head, span_of(p, head).count);
    u32 q[kD / 16][4];
    load_queries(q, p, head, lane);
    Softmax softmax;
    softmax.init();
    float o[kD / 2];
#pragma unroll
    for (int i = 0; i < kD / 2; ++i) o[i] = 0.0f;
#pragma unroll 1
    for (int pos = item.begin + warp * kTokens; pos < item.end; pos += kStep) {
      copy_wait_all_but<kStages - 2>();
      __syncwarp();  // every lane's copies are here, and every lane is done with the tile before
      const int free = stage == 0 ? kStages - 1 : stage - 1;
      loader.load(p, share, offset, ring + free * 2 * kTileBytes, warp, lane);
      attend(o, softmax, q, ring + stage * 2 * kTileBytes, item.end - pos, p.scale_log2, lane);
      stage = stage + 1 == kStages ? 0 : stage + 1;
    }
    gather_warps(rows, shared, o, softmax, group, p.scale_log2, warp, lane);
    store_item(p, rows, shared, item, 2 * blockIdx.x + (head != first_head));
    __syncthreads();  // everyone is done with the rows
    if (item.whole) continue;
    arrive(p, share, offset, head, shared, rows);
    __syncthreads();
  }
}
