// Fused causal GQA attention for compute capability 8.0 and newer: every KV head full, streaming or block-sparse in one
// launch. mma.sync, cp.async, one K/V stage, eight warps of 16 query rows. The plain twin of attention_forward_sm90.cu:
// the same parameters, tile order, block order and mask.
// Compile-time: ELASTIC_HEAD_DIM (64, 128), ELASTIC_BF16 (1, else fp16); ELASTIC_PAGED (1: keys and values lie in pages,
// pages.cuh).
#include "elastic/pages.cuh"
#include "elastic/ptx_sm80.cuh"
#include "elastic/schedule.cuh"
#include "elastic/softmax.cuh"

namespace elastic {

constexpr int kD = ELASTIC_HEAD_DIM;
constexpr int kThreads = 256;
constexpr int kRowBytes = kD * 2;
constexpr int kChunks = kD / 8;  // 16-byte chunks of a row

template <int kRows>
ELASTIC_FN void load_rows(u32 shared, const char* source, i64 token_bytes, int valid_rows) {
#pragma unroll
  for (int i = 0; i < kRows * kChunks / kThreads; ++i) {
    const int index = i * kThreads + threadIdx.x, row = index / kChunks, chunk = index % kChunks;
    const bool valid = row < valid_rows;
    copy_async(swizzled<kRowBytes>(shared, row, chunk), valid ? source + row * token_bytes + chunk * 16 : source, valid);
  }
}

#if ELASTIC_PAGED
// 64 keys or values of a half block; each lies in the page that the request's row of the table names.
ELASTIC_FN void load_half(const ForwardParams& p, u32 shared, const char* pool, const Strides& stride, int sample, int id,
                          int len_k) {
  const int* table = p.pages.row_of(sample);
#pragma unroll
  for (int i = 0; i < kHalf * kChunks / kThreads; ++i) {
    const int index = i * kThreads + threadIdx.x, row = index / kChunks, chunk = index % kChunks;
    const int token = id * kHalf + row;
    const bool valid = token < len_k;
    const i64 page = valid ? table[p.pages.entry(token)] : 0;
    const char* source = pool + 2 * (page * stride.row + p.pages.place(token) * stride.token);
    copy_async(swizzled<kRowBytes>(shared, row, chunk), valid ? source + chunk * 16 : pool, valid);
  }
}
#else
ELASTIC_FN void load_half(const ForwardParams&, u32 shared, const char* rows, const Strides& stride, int, int id,
                          int len_k) {
  load_rows<kHalf>(shared, rows + id * i64(kHalf) * 2 * stride.token, 2 * stride.token, len_k - id * kHalf);
}
#endif

struct Head {  // where one tile's operands lie, in bytes; in pages: where the pools' KV head lies
  const char *q, *k, *v;
  char* out;
  float* lse;
};

ELASTIC_FN Head locate(const ForwardParams& p, const Tile& t, const Sample& s) {
  const int m0 = t.block * kTileM, kv_head = t.head / (p.heads / p.kv_heads);
  Head h;
  h.q = (const char*)p.q + 2 * (s.row * p.stride_q.row + (s.begin_q + m0) * p.stride_q.token + t.head * p.stride_q.head);
  h.k = (const char*)p.k + 2 * kv_head * p.stride_k.head;
  h.v = (const char*)p.v + 2 * kv_head * p.stride_v.head;
  if (!ELASTIC_PAGED) {
    h.k += 2 * (s.row * p.stride_k.row + s.begin_k * p.stride_k.token);
    h.v += 2 * (s.row * p.stride_v.row + s.begin_k * p.stride_v.token);
  }
  h.out = (char*)p.out + 2 * (s.row * p.stride_o.row + (s.begin_q + m0) * p.stride_o.token + t.head * p.stride_o.head);
  h.lse = p.lse + (i64(s.row) * p.heads + t.head) * p.seq_q + s.begin_q + m0;
  return h;
}

ELASTIC_FN void score(float (&s)[32], u32 shared_q, u32 shared_k, int warp, int lane) {
#pragma unroll
  for (int i = 0; i < 32; ++i) s[i] = 0.0f;
#pragma unroll
  for (int kk = 0; kk < kD / 16; ++kk) {
    u32 a[4];
    load_matrix(a, swizzled<kRowBytes>(shared_q, warp * 16 + (lane & 15), 2 * kk + (lane >> 4)));
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      u32 b[4];
      load_matrix(b, swizzled<kRowBytes>(shared_k, j * 16 + (lane & 7) + ((lane >> 4) << 3), 2 * kk + ((lane >> 3) & 1)));
      mma(s + 8 * j, a, b[0], b[1]);
      mma(s + 8 * j + 4, a, b[2], b[3]);
    }
  }
}

ELASTIC_FN void accumulate(float (&o)[kD / 2], const float (&s)[32], u32 shared_v, int lane) {
#pragma unroll
  for (int kk = 0; kk < 4; ++kk) {
    u32 a[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) a[j] = pack(s[8 * kk + 2 * j], s[8 * kk + 2 * j + 1]);
#pragma unroll
    for (int j = 0; j < kD / 16; ++j) {
      u32 b[4];
      load_matrix_transposed(b, swizzled<kRowBytes>(shared_v, kk * 16 + (lane & 15), 2 * j + (lane >> 4)));
      mma(o + 8 * j, a, b[0], b[1]);
      mma(o + 8 * j + 4, a, b[2], b[3]);
    }
  }
}

ELASTIC_FN void run_tile(const ForwardParams& p, const Tile& tile, u32 shared_q, u32 shared_k, u32 shared_v) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Sample sample = read_sample(p, tile.sample);
  const int kv_head = tile.head / (p.heads / p.kv_heads), mode = p.mode[tile.sample * p.kv_heads + kv_head];
  const bool poisoned = is_poisoned(p, mode);
  const Rule rule = rule_of(mode, p.sink, p.window, p.by_block, p.block);
  const Head head = locate(p, tile, sample);
  const int delta = sample.len_k - sample.len_q, m0 = tile.block * kTileM, rows = min_i(kTileM, sample.len_q - m0);
  const int a0 = m0 + delta + warp * 16, a = a0 + lane / 4;
  BlockIterator blocks;
  const u32* bits = mode != kBlockSparse || poisoned ? nullptr
      : p.bits + ((i64(tile.sample) * p.heads + tile.head) * p.bits_rows + tile.block) * p.bits_words;
  blocks.init(rule, m0, m0 + rows, delta, bits);

  Softmax softmax;
  softmax.init();
  float o[kD / 2];
#pragma unroll
  for (int i = 0; i < kD / 2; ++i) o[i] = 0.0f;

  int id = poisoned ? -1 : blocks.next();
  if (id >= 0) {
    load_rows<kTileM>(shared_q, head.q, 2 * p.stride_q.token, rows);
    load_half(p, shared_k, head.k, p.stride_k, tile.sample, id, sample.len_k);
    copy_commit();
  }
#pragma unroll 1
  while (id >= 0) {
    copy_wait();
    __syncthreads();  // K is here, and everyone is done with the former V
    load_half(p, shared_v, head.v, p.stride_v, tile.sample, id, sample.len_k);
    copy_commit();
    float s[32];
    score(s, shared_q, shared_k, warp, lane);
    if (needs_mask(id, a0, lower_bound(a0 + 15, rule), rule.sink)) mask_half(s, id, a, rule, lane);
    copy_wait();
    __syncthreads();  // V is here, and everyone is done with K
    const int next = blocks.next();
    if (next >= 0) {
      load_half(p, shared_k, head.k, p.stride_k, tile.sample, next, sample.len_k);
      copy_commit();
    }
    float alpha[2];
    softmax.update(s, alpha, p.scale_log2);
    rescale(o, alpha);
    accumulate(o, s, shared_v, lane);
    id = next;
  }

#pragma unroll
  for (int y = 0; y < 2; ++y) {
    float factor, lse;
    softmax.finish(y, p.scale, &factor, &lse);
    if (poisoned) factor = lse = __int_as_float(0x7fc00000);
    const int row = warp * 16 + lane / 4 + 8 * y;
    if (row >= rows) continue;
    if (lane % 4 == 0) head.lse[row] = lse;
    u32* out = (u32*)(head.out + row * 2 * p.stride_o.token) + lane % 4;
#pragma unroll
    for (int j = 0; j < kD / 8; ++j) out[4 * j] = pack(o[4 * j + 2 * y] * factor, o[4 * j + 2 * y + 1] * factor);
  }
}

}  // namespace elastic

extern "C" __global__ void __launch_bounds__(elastic::kThreads, 2)
    attention_forward_sm80(const __grid_constant__ elastic::ForwardParams p) {
  using namespace elastic;
  extern __shared__ __align__(128) char shared[];
  const u32 shared_q = shared_address(shared);
  const u32 shared_k = shared_q + kTileM * kRowBytes, shared_v = shared_k + kHalf * kRowBytes;
  Segment* segments = (Segment*)(shared + (kTileM + 2 * kHalf) * kRowBytes + 16);
  ScheduleSize* size = (ScheduleSize*)(shared + (kTileM + 2 * kHalf) * kRowBytes);
  int* next_tile = (int*)(size + 1);
  if (threadIdx.x < 32) build_schedule<QueryBlocks>(p, segments, size, threadIdx.x);
  __syncthreads();
  const ScheduleSize total = *size;
  for (int t = blockIdx.x; t < total.tiles; t = *next_tile) {
    run_tile(p, decode_tile<QueryBlocks, kD>(p, segments, total.segments, t), shared_q, shared_k, shared_v);
    __syncthreads();  // everyone is done with the tile's memory and has read the former *next_tile
    if (threadIdx.x == 0) *next_tile = atomicAdd(p.counter, 1) + gridDim.x;
    __syncthreads();
  }
  if (threadIdx.x == 0) release_counter(p.counter);
}
