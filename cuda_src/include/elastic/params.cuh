// What one launch reads. Mirrored field by field by elastic/kernels/params.py; the size is asserted on both sides.
// Legend: N samples, H query heads, K KV heads, G = H / K, D head dim; lengths and positions in tokens.
#pragma once

#ifdef __CUDACC__
#define ELASTIC_FN __device__ __forceinline__
#else
#define ELASTIC_FN inline  // the block arithmetic also compiles for the host, where the tests call it
#endif

namespace elastic {

using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;

constexpr int kTileM = 128;  // query rows of a tile
constexpr int kHalf = 64;    // keys of a half block: every visited block is one or two of these
constexpr int kFull = 0, kStreaming = 1, kBlockSparse = 2;

struct alignas(64) TensorMap {
  u64 word[16];
};

struct Strides {
  i64 row, token, head;  // in elements; the head dim is contiguous
};

struct Params {
  TensorMap map_q, map_k, map_v, map_o;  // sm_90a only
  const void *q, *k, *v;
  void* out;
  float* lse;                               // [B, H, Sq], natural logarithm
  const int* mode;                          // [N, K]
  const u32* bits;                          // [N, H, bits_rows, bits_words] or null
  const int *begin_q, *end_q, *begin_k, *end_k, *row;  // [N] or null: the sample is the whole batch row n
  int* counter;                             // {next tile, CTAs that left}: zero before and after every launch
  Strides stride_q, stride_k, stride_v, stride_o;
  int samples, heads, kv_heads, seq_q, seq_k;
  int sink, window, by_block, block;
  int bits_rows, bits_words;
  int batch;
  float scale_log2, scale;                  // softmax scale times log2(e); softmax scale
};
static_assert(sizeof(Params) == 768, "elastic/kernels/params.py packs 768 bytes");

}  // namespace elastic
