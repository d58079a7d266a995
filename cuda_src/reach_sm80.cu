// Reach on compute capability 8.0 and newer: the plain twin of reach_sm90.cu, with the same parameters, list of shares
// and row sums. A warp has the 32 rows of one query head in registers and meets the keys 32 at a time; where the group
// is small several warps of a head take turns ("ways"). mma.sync, and a ring of key tiles filled by cp.async.
// Compile-time: ELASTIC_HEAD_DIM (64, 128), ELASTIC_BF16 (1, else fp16), ELASTIC_WARPS (a multiple of the query heads
// per KV head, 4 to 8), ELASTIC_STAGES (key tiles in shared memory).
#include "elastic/ptx_sm80.cuh"
#include "elastic/reach_rows.cuh"

namespace elastic {

constexpr int kD = ELASTIC_HEAD_DIM, kWarps = ELASTIC_WARPS, kStages = ELASTIC_STAGES;
constexpr int kThreads = 32 * kWarps, kStep = 32;  // keys that a warp meets at a time
constexpr int kRowBytes = 2 * kD, kChunks = kD / 8, kTileBytes = kTile * kRowBytes;

struct Tokens {
  const Params& p;

  ELASTIC_FN int operator()(int head) const { return Asked(p, head / p.kv_heads).keys(); }
};

struct Meet {
  ELASTIC_FN void operator()() const { __syncthreads(); }
};

struct Loader {  // runs ahead of the computation through the same items and tiles
  Item item;
  const char* source;  // the item's first key
  int head, pos;

  ELASTIC_FN void open(const ReachParams& p, const Share& share, const int* offset, int next) {
    const Asked asked(p.f, next / p.f.kv_heads);
    const Strides stride = p.f.stride_k;
    head = next;
    item = item_of(share, offset, head, asked.keys());
    pos = item.begin;
    source = (const char*)p.f.k + 2 * (asked.at.row * stride.row + (asked.at.begin_k + i64(pos)) * stride.token +
                                       head % p.f.kv_heads * stride.head);
  }

  ELASTIC_FN void load(const ReachParams& p, const Share& share, const int* offset, u32 stage) {
    while (pos >= item.end && share.last > offset[head + 1]) open(p, share, offset, head + 1);
    if (pos < item.end) {
      const i64 token_bytes = 2 * p.f.stride_k.token;
#pragma unroll 4
      for (int index = threadIdx.x; index < kTile * kChunks; index += kThreads) {
        const int row = index / kChunks, chunk = index % kChunks;
        const bool valid = pos + row < item.end;
        const char* key = source + (pos - item.begin + row) * token_bytes + chunk * 16;
        copy_async(swizzled<kRowBytes>(stage, row, chunk), valid ? key : source, valid);
      }
      pos += kTile;
    }
    copy_commit();
  }
};

// The rows of one query head, as the first operands of its products; zeros before the sample's first query.
ELASTIC_FN void load_queries(u32 (&q)[2][kD / 16][4], const ReachParams& p, const Asked& asked, int query_head,
                             int lane) {
  const Strides stride = p.f.stride_q;
  const i64 first = asked.at.row * stride.row + query_head * stride.head;
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int y = 0; y < 2; ++y) {
      const int i = 16 * m + 8 * y + lane / 4;
      const bool valid = i >= kQueries - asked.queries;
      const i64 element = first + i64(asked.row_token(i)) * stride.token + 2 * (lane & 3);
#pragma unroll
      for (int kk = 0; kk < kD / 16; ++kk) {
#pragma unroll
        for (int x = 0; x < 2; ++x) {
          q[m][kk][y + 2 * x] = valid ? *(const u32*)((const char*)p.f.q + 2 * (element + 16 * kk + 8 * x)) : 0u;
        }
      }
    }
  }
}

ELASTIC_FN void scores(float (&s)[2][kStep / 2], const u32 (&q)[2][kD / 16][4], u32 stage, int first, int lane) {
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int i = 0; i < kStep / 2; ++i) s[m][i] = 0.0f;
  }
#pragma unroll
  for (int kk = 0; kk < kD / 16; ++kk) {
#pragma unroll
    for (int j = 0; j < kStep / 16; ++j) {
      u32 b[4];
      const int row = first + 16 * j + (lane & 7) + ((lane >> 4) << 3);
      load_matrix(b, swizzled<kRowBytes>(stage, row, 2 * kk + ((lane >> 3) & 1)));
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        mma(s[m] + 8 * j, q[m][kk], b[0], b[1]);
        mma(s[m] + 8 * j + 4, q[m][kk], b[2], b[3]);
      }
    }
  }
}

ELASTIC_FN void store_parts(RowPart* parts, const RowSums (&sums)[2], int lane) {
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int y = 0; y < 2; ++y) {
      const RowPart part = sums[m].part(y);
      if (lane % 4 == 0) parts[16 * m + 8 * y + lane / 4] = part;
    }
  }
}

}  // namespace elastic

extern "C" __global__ void __launch_bounds__(elastic::kThreads, 1)
    reach_sm80(const __grid_constant__ elastic::ReachParams p) {
  using namespace elastic;
  extern __shared__ __align__(128) char memory[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, thread = threadIdx.x, kv_heads = p.f.kv_heads;
  const int group = p.f.heads / kv_heads, rows = group * kQueries, ways = kWarps / group, way = warp / group;
  const u32 ring = shared_address(memory);
  RowPart* parts = (RowPart*)(memory + kStages * kTileBytes);  // [ways][rows]
  ReachShared& shared = *(ReachShared*)(parts + kThreads);
  int* offset = (int*)((char*)&shared + kSharedBytes);
  const Rule rule = rule_of(p.f);
  const Meet meet;
  const Share share = build_list<kThreads>(p.f.samples * kv_heads, offset, shared.totals, Tokens{p.f});
  if (share.first >= share.last) return;
  int head = head_at(offset, p.f.samples * kv_heads, share.first), stage = 0;
  const int first = head;

  Loader loader;
  loader.open(p, share, offset, head);
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) loader.load(p, share, offset, ring + i * kTileBytes);
#pragma unroll 1
  for (; offset[head] < share.last; ++head) {
    const Asked asked(p.f, head / kv_heads);
    const Item item = item_of(share, offset, head, asked.keys());
    u32 q[2][kD / 16][4];
    load_queries(q, p, asked, head % kv_heads * group + warp % group, lane);
    RowSums sums[2];
    sums[0].init();
    sums[1].init();
#pragma unroll 1
    for (int pos = item.begin; pos < item.end; pos += kTile) {
      copy_wait_all_but<kStages - 2>();
      __syncthreads();  // everyone's copies are here, and everyone is done with the tile before
      loader.load(p, share, offset, ring + (stage == 0 ? kStages - 1 : stage - 1) * kTileBytes);
#pragma unroll 1
      for (int step = way * kStep; step < min_i(kTile, item.end - pos); step += ways * kStep) {
        const int key = pos + step;
        const Kind kind = kind_of(key, key + kStep, item.end, asked, rule);
        float s[2][kStep / 2];
        scores(s, q, ring + stage * kTileBytes, step, lane);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          const int a = asked.row_position(16 * m + lane / 4);
          sums[m].add(s[m], kind, key, item.end, a, rule, p.f.scale_log2, lane);
        }
      }
      stage = stage + 1 == kStages ? 0 : stage + 1;
    }
    store_parts(parts + way * rows + warp % group * kQueries, sums, lane);
    __syncthreads();
    finish_item(p, shared, item, parts, ways, rows, slot_of(blockIdx.x, head != first), thread, meet);
    __syncthreads();  // everyone is done with the parts
  }
  finish_shared(p, shared, share, offset, first, head - 1, rows, thread, meet);
}
