// Decode attention: one query token per sample, every KV head with its own run of visible tokens. Memory-bound, so the
// tokens of all heads form one list of units that the CTAs share equally; a head cut by a CTA's end is put together by
// the last CTA that finishes it. The query heads of a group are the rows of one mma tile, so K and V are read once.
// Compile-time: ELASTIC_HEAD_DIM (64, 128), ELASTIC_BF16 (1, else fp16), ELASTIC_WARPS, ELASTIC_STAGES.
#include "elastic/decode_list.cuh"
#include "elastic/ptx_sm80.cuh"
#include "elastic/softmax.cuh"

namespace elastic {

constexpr int kD = ELASTIC_HEAD_DIM, kWarps = ELASTIC_WARPS, kStages = ELASTIC_STAGES;
constexpr int kThreads = 32 * kWarps;
constexpr int kTokens = 16;                  // of a warp's tile: its keys and values are one stage of its own ring
constexpr int kStep = kWarps * kTokens;      // the warps take turns
constexpr int kRows = 16;                    // query heads of an mma tile
constexpr int kRowBytes = 2 * kD, kChunks = kD / 8, kTileBytes = kTokens * kRowBytes;
constexpr int kPitch = kD + 8;               // floats from one output row to the next in shared memory

// offset[h] = units before head h, for all heads and the end; a head that sees nothing has one empty unit.
ELASTIC_FN Share build_list(const DecodeParams& p, int* offset, int* totals) {
  const int heads = p.samples * p.kv_heads, each = (heads + kThreads - 1) / kThreads;
  const int from = min(int(threadIdx.x) * each, heads), to = min(from + each, heads), lane = threadIdx.x % 32;
  int sum = 0;
  for (int h = from; h < to; ++h) {
    offset[h] = sum;
    asm volatile("prefetch.global.L1 [%0];" ::"l"(p.base + h));
    sum += units_of(span_of(p, h).count);
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
  return share_of(units, gridDim.x, blockIdx.x);
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
    constexpr int kCopies = kTokens * kChunks / 32, kRowsApart = 32 / kChunks;  // of a lane: rows of one chunk
    while (pos >= item.end && share.last > offset[item.head + 1]) open(p, share, offset, item.head + 1, warp);
    if (pos < item.end) {
      const int row = lane / kChunks, chunk = lane % kChunks, at = pos + row;
      const bool in_sink = at < span.sink;
      const i64 apart = kRowsApart * p.token_stride * kRowBytes;
      const char* key = p.keys + (base + (at + (in_sink ? 0 : span.skip)) * p.token_stride) * kRowBytes + chunk * 16;
      const i64 to_value = p.values - p.keys;
      if (pos + kTokens <= item.end && (pos >= span.sink || pos + kTokens <= span.sink)) {
#pragma unroll
        for (int i = 0; i < kCopies; ++i, key += apart) {
          const u32 place = swizzled(stage, row + i * kRowsApart, chunk);
          copy_async(place, key, true);
          copy_async(place + kTileBytes, key + to_value, true);
        }
      } else {  // the end of the sink or of the item lies in this tile
#pragma unroll
        for (int i = 0; i < kCopies; ++i, key += apart) {
          const int token = at + i * kRowsApart;
          const i64 jump = in_sink && token >= span.sink ? span.skip * p.token_stride * kRowBytes : 0;
          const u32 place = swizzled(stage, row + i * kRowsApart, chunk);
          copy_async(place, key + jump, token < item.end);
          copy_async(place + kTileBytes, key + jump + to_value, token < item.end);
        }
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
  float s[8], odd[8];  // two sums, because every step of one waits for the step before
#pragma unroll
  for (int i = 0; i < 8; ++i) s[i] = odd[i] = 0.0f;
#pragma unroll
  for (int kk = 0; kk < kD / 16; ++kk) {
    u32 b[4];
    load_matrix(b, swizzled(stage, (lane & 7) + ((lane >> 4) << 3), 2 * kk + ((lane >> 3) & 1)));
    mma(kk % 2 ? odd : s, q[kk], b[0], b[1]);
    mma((kk % 2 ? odd : s) + 4, q[kk], b[2], b[3]);
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) s[i] += odd[i];
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

// The last CTA of a head adds up its parts, always in the order of the list. Every thread adds some of the parts of one
// output column; `rows` holds first the parts' weights [parts, G], then the threads' sums.
ELASTIC_FN void merge(const DecodeParams& p, const Parts& parts, int head, float* rows) {
  const int group = p.heads / p.kv_heads, columns = group * kD / 4;
  const float2* peaks = (const float2*)peaks_of(p, group);
  float2* weights = (float2*)rows;
  for (int i = threadIdx.x; i < parts.count * group; i += kThreads) {
    weights[i] = __ldcg(peaks + parts.slot(i / group) * group + i % group);
  }
  __syncthreads();
  int each = min_i(16, max_i(1, kThreads / columns));  // threads to a column, in one warp: a power of two
  while (each & (each - 1)) each &= each - 1;
  const int turn = threadIdx.x / 2 % each, mine = threadIdx.x / (2 * each) * 2 + threadIdx.x % 2;  // pairs: 32 bytes
  for (int first = 0; first < columns; first += kThreads / each) {
    const int index = first + mine, row = index / (kD / 4);
    float top = minus_infinity(), sum = 0.0f;
    float4 all = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (index < columns) {
      for (int part = 0; part < parts.count; ++part) top = fmaxf(top, weights[part * group + row].x);
#pragma unroll 16
      for (int part = turn; part < parts.count; part += each) {
        const float2 one = weights[part * group + row];
        const float4 o = __ldcg((const float4*)(p.partial + (i64(parts.slot(part)) * group) * kD) + index);
        const float weight = weight_of(one.x, top, p.scale_log2);
        sum = fmaf(weight, one.y, sum);
        all.x = fmaf(weight, o.x, all.x), all.y = fmaf(weight, o.y, all.y);
        all.z = fmaf(weight, o.z, all.z), all.w = fmaf(weight, o.w, all.w);
      }
    }
    for (int step = 2; step < 2 * each; step *= 2) {
      sum += __shfl_xor_sync(~0u, sum, step);
      all.x += __shfl_xor_sync(~0u, all.x, step), all.y += __shfl_xor_sync(~0u, all.y, step);
      all.z += __shfl_xor_sync(~0u, all.z, step), all.w += __shfl_xor_sync(~0u, all.w, step);
    }
    if (index >= columns || turn != 0) continue;
    const float factor = sum == 0.0f ? 0.0f : 1.0f / sum;
    store_pair(p, head, row, 4 * index % kD, all.x * factor, all.y * factor);
    store_pair(p, head, row, 4 * index % kD + 2, all.z * factor, all.w * factor);
  }
}

// Says that this CTA's part of a head is stored; the CTA that finds all parts stored merges them.
ELASTIC_FN void arrive(const DecodeParams& p, const Share& share, const int* offset, int head, Shared& shared,
                       float* rows) {
  const Parts parts = parts_of(share, offset, head);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    shared.last = atomicAdd(p.arrived + head, 1) == parts.count - 1;
    if (shared.last) p.arrived[head] = 0;
    __threadfence();
  }
  __syncthreads();
  if (shared.last) merge(p, parts, head, rows);
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
    store_item(p, rows, shared, item, slot_of(blockIdx.x, head != first_head));
    __syncthreads();  // everyone is done with the rows
    if (item.whole) continue;
    arrive(p, share, offset, head, shared, rows);
    __syncthreads();
  }
}
