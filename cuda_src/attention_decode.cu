// Decode attention: one query token per sample, every KV head with its own run of visible tokens. Memory-bound, so the
// tokens of all heads form one list of units that the CTAs share equally; a head cut by a CTA's end is put together by
// the last CTA that finishes it. The query heads of a group are the rows of one mma tile, so K and V are read once.
// Compile-time: ELASTIC_HEAD_DIM (64, 128), ELASTIC_BF16 (1, else fp16), ELASTIC_WARPS, ELASTIC_STAGES; ELASTIC_PAGED
// (1: the tokens lie in pages, pages.cuh).
#include "elastic/decode_merge.cuh"
#include "elastic/paged_list.cuh"

namespace elastic {

#if ELASTIC_PAGED
using Launch = PagedDecodeParams;
ELASTIC_FN const void* first_read(const Launch& p, int head) { return p.pages.row_of(head / p.kv_heads); }
ELASTIC_FN float answer_of_none(const Launch& p, int head) {
  return is_unknown(p.mode[head]) ? __int_as_float(0x7fc00000) : 0.0f;
}
#else
using Launch = DecodeParams;
ELASTIC_FN const void* first_read(const Launch& p, int head) { return p.base + head; }
ELASTIC_FN float answer_of_none(const Launch&, int) { return 0.0f; }
#endif

constexpr int kStages = ELASTIC_STAGES;
constexpr int kTokens = 16;              // of a warp's tile: its keys and values are one stage of its own ring
constexpr int kStep = kWarps * kTokens;  // the warps take turns
constexpr int kRowBytes = 2 * kD, kChunks = kD / 8, kTileBytes = kTokens * kRowBytes;

struct Tokens {  // that a head sees
  const Launch& p;

  ELASTIC_FN int operator()(int head) const {
    asm volatile("prefetch.global.L1 [%0];" ::"l"(first_read(p, head)));
    return span_of(p, head).count;
  }
};

// Runs ahead of the computation through the same items and tiles.
struct Loader {
  Span span;
  Item item;
  int pos;
#if ELASTIC_PAGED
  const int* table;  // the request's row
  u32 of_head;       // offset of the KV head
  int page;          // of the lane's token of the tile at `pos`: fetched a tile ahead, so that its latency is hidden
#else
  i64 base;
#endif

  ELASTIC_FN void open(const Launch& p, const Share& share, const int* offset, int head, int warp, int lane) {
    span = span_of(p, head);
    item = item_of(share, offset, head, span.count);
    pos = item.begin + warp * kTokens;
#if ELASTIC_PAGED
    table = p.pages.row_of(head / p.kv_heads);
    of_head = u32(head % p.kv_heads) * p.head_stride;
    look_up(p, lane);
#else
    base = p.base[head];
#endif
  }

  ELASTIC_FN void load(const Launch& p, const Share& share, const int* offset, u32 stage, int warp, int lane) {
    while (pos >= item.end && share.last > offset[item.head + 1]) open(p, share, offset, item.head + 1, warp, lane);
    if (pos < item.end) {
      copy_tile(p, stage, lane);
      pos += kStep;
#if ELASTIC_PAGED
      look_up(p, lane);
#endif
    }
    copy_commit();
  }

#if ELASTIC_PAGED
  ELASTIC_FN int own(int lane) const { return pos + lane % kTokens; }  // which visible token a lane answers for

  ELASTIC_FN void look_up(const Launch& p, int lane) {
    page = own(lane) < item.end ? table[p.pages.entry(token_of(span, own(lane)))] : 0;
  }

  ELASTIC_FN void copy_tile(const Launch& p, u32 stage, int lane) const {
    constexpr int kCopies = kTokens * kChunks / 32, kRowsApart = 32 / kChunks;  // of a lane: rows of one chunk
    const int row = lane / kChunks, chunk = lane % kChunks;
    const u32 where = own(lane) < item.end ? of_head + offset_of(p, page, token_of(span, own(lane))) : 0;
    const i64 to_value = p.values - p.keys;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int r = row + i * kRowsApart;
      const char* key = p.keys + u64(__shfl_sync(~0u, where, r)) * 16 + chunk * 16;
      const u32 place = swizzled<kRowBytes>(stage, r, chunk);
      copy_async(place, key, pos + r < item.end);
      copy_async(place + kTileBytes, key + to_value, pos + r < item.end);
    }
  }
#else
  ELASTIC_FN void copy_tile(const Launch& p, u32 stage, int lane) const {
    constexpr int kCopies = kTokens * kChunks / 32, kRowsApart = 32 / kChunks;  // of a lane: rows of one chunk
    const int row = lane / kChunks, chunk = lane % kChunks, at = pos + row;
    const bool in_sink = at < span.sink;
    const i64 apart = kRowsApart * p.token_stride * kRowBytes;
    const char* key = p.keys + (base + (at + (in_sink ? 0 : span.skip)) * p.token_stride) * kRowBytes + chunk * 16;
    const i64 to_value = p.values - p.keys;
    if (pos + kTokens <= item.end && (pos >= span.sink || pos + kTokens <= span.sink)) {
#pragma unroll
      for (int i = 0; i < kCopies; ++i, key += apart) {
        const u32 place = swizzled<kRowBytes>(stage, row + i * kRowsApart, chunk);
        copy_async(place, key, true);
        copy_async(place + kTileBytes, key + to_value, true);
      }
    } else {  // the end of the sink or of the item lies in this tile
#pragma unroll
      for (int i = 0; i < kCopies; ++i, key += apart) {
        const int token = at + i * kRowsApart;
        const i64 jump = in_sink && token >= span.sink ? span.skip * p.token_stride * kRowBytes : 0;
        const u32 place = swizzled<kRowBytes>(stage, row + i * kRowsApart, chunk);
        copy_async(place, key + jump, token < item.end);
        copy_async(place + kTileBytes, key + jump + to_value, token < item.end);
      }
    }
  }
#endif
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
    load_matrix(b, swizzled<kRowBytes>(stage, (lane & 7) + ((lane >> 4) << 3), 2 * kk + ((lane >> 3) & 1)));
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
    load_matrix_transposed(b, swizzled<kRowBytes>(stage + kTileBytes, lane & 15, 2 * j + (lane >> 4)));
    mma(o + 8 * j, a, b[0], b[1]);
    mma(o + 8 * j + 4, a, b[2], b[3]);
  }
}

}  // namespace elastic

extern "C" __global__ void __launch_bounds__(elastic::kThreads, 1)
    attention_decode(const __grid_constant__ elastic::Launch p) {
  using namespace elastic;
  extern __shared__ __align__(128) char memory[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = p.heads / p.kv_heads;
  const u32 ring = shared_address(memory) + warp * kStages * 2 * kTileBytes;
  float* rows = (float*)(memory + kWarps * kStages * 2 * kTileBytes);
  Shared& shared = *(Shared*)(rows + kWarps * group * kPitch);
  int* offset = (int*)(&shared + 1);
  const Share share = build_list<kThreads>(p.samples * p.kv_heads, offset, shared.units, Tokens{p});
  if (share.first >= share.last) return;
  int head = head_at(offset, p.samples * p.kv_heads, share.first);
  const int first_head = head;

  Loader loader;
  loader.open(p, share, offset, head, warp, lane);
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
    store_item(p, rows, shared, item, slot_of(blockIdx.x, head != first_head), answer_of_none(p, head));
    __syncthreads();  // everyone is done with the rows
  }
  finish_shared(p, share, offset, first_head, head - 1, shared, (float*)memory, kWarps * kStages * 2 * kTileBytes, rows);
}
