// Reach on compute capability 9.0, in one persistent launch bound by reading the keys once. The keys of all heads form
// one list that the CTAs share equally (shares.cuh). Warpgroup 0 produces (TMA, one lane); warpgroups 1 and 2 take key
// tiles in turn, each for all rows of the group's query heads, 64 at a time: wgmma, then the sums of reach_rows.cuh. A
// head that one CTA has whole is answered there, one that several share by the last of them to finish.
// Compile-time: ELASTIC_HEAD_DIM (64, 128), ELASTIC_BF16 (1, else fp16), ELASTIC_BLOCKS (1 to 4: blocks of 64 rows),
// ELASTIC_STAGES (key tiles in shared memory; even, so that a warpgroup meets every phase of the slots it waits for).
#include "elastic/ptx_sm90.cuh"
#include "elastic/reach_rows.cuh"
#include "elastic/wgmma.cuh"

namespace elastic {

constexpr int kD = ELASTIC_HEAD_DIM, kBlocks = ELASTIC_BLOCKS, kStages = ELASTIC_STAGES;
constexpr int kBlockRows = 64, kGroupWarps = 4, kConsumers = 256;
constexpr int kTileBytes = kTile * kD * 2, kBlockBytes = kBlockRows * kD * 2;
constexpr int kMeeting = 1;  // named barrier of both consumer warpgroups
static_assert(kStages % 2 == 0, "a slot belongs to one warpgroup");

struct ReachControl {
  u64 full[kStages];   // 1 arrival + bytes: a key tile is in place, and its kind
  u64 empty[kStages];  // 4 arrivals: every warp of the warpgroup whose turn it was is done with the tile
  u64 queries;         // 1 arrival + bytes: the rows of a head are in place
  Kind kind[kStages];
  ReachShared shared;

  ELASTIC_FN void init() {
    for (int i = 0; i < kStages; ++i) {
      barrier_init(&full[i], 1);
      barrier_init(&empty[i], kGroupWarps);
    }
    barrier_init(&queries, 1);
    fence_barrier_init();
  }
};
static_assert(sizeof(ReachControl) <= 1024, "the parts of rows start 1024 bytes after the barriers");

struct ReachLayout {  // offsets from a base that is a multiple of 1024
  static constexpr int rows = kStages * kTileBytes;
  static constexpr int control = rows + kBlocks * kBlockBytes;
  static constexpr int parts = control + 1024;
  static constexpr int list = parts + 2 * kBlocks * kBlockRows * kPartBytes;  // then units before every head
};

struct Tokens {
  const Params& p;

  ELASTIC_FN int operator()(int head) const { return Asked(p, head / p.kv_heads).keys(); }
};

struct Meet {  // of the consumers
  ELASTIC_FN void operator()() const { named_sync(kMeeting, kConsumers); }
};

struct ReachProducer {  // one elected lane: feeds the ring with the key tiles of its share
  const ReachParams& p;
  ReachControl& c;
  const Share& share;
  const int* offset;
  u32 base;

  ELASTIC_FN void run() const {
    const int kv_heads = p.f.kv_heads;
    const Rule rule = rule_of(p.f);
    Ring<kStages> ring{0, 1};
    int head = head_at(offset, p.f.samples * kv_heads, share.first);
    for (; offset[head] < share.last; ++head) {
      const Asked asked(p.f, head / kv_heads);
      const Item item = item_of(share, offset, head, asked.keys());
      for (int pos = item.begin; pos < item.end; pos += kTile, ring.advance()) {
        wait(&c.empty[ring.slot], ring.phase);
        c.kind[ring.slot] = kind_of(pos, pos + kTile, item.end, asked, rule);
        arrive_expect(&c.full[ring.slot], kTileBytes);
#pragma unroll
        for (int d = 0; d < kD / 64; ++d) {
          tma_load(p.f.map_k, &c.full[ring.slot], base + ring.slot * kTileBytes + d * (kTile * 128), d * 64,
                   asked.at.begin_k + pos, head % kv_heads, asked.at.row, kEvictFirst);
        }
      }
    }
  }
};

struct ReachConsumer {
  const ReachParams& p;
  ReachControl& c;
  const Share& share;
  const int* offset;
  RowPart* parts;
  u32 base;
  int group, warp, lane;  // warpgroup 0 or 1, warp of the warpgroup

  // The last queries of every query head of the group, 32 rows each.
  ELASTIC_FN void load_queries(const Asked& asked, int head) const {
    const int heads = p.f.heads / p.f.kv_heads, first = head % p.f.kv_heads * heads;
    arrive_expect(&c.queries, heads * kQueries * kD * 2);
    for (int g = 0; g < heads; ++g) {
      const u32 target = base + ReachLayout::rows + g / 2 * kBlockBytes + g % 2 * (kQueries * 128);
#pragma unroll
      for (int d = 0; d < kD / 64; ++d) {
        tma_load(p.f.map_q, &c.queries, target + d * (kBlockRows * 128), d * 64, asked.row_token(0), first + g,
                 asked.at.row, kEvictFirst);
      }
    }
  }

  ELASTIC_FN void scores(float (&s)[64], int block, int slot) const {
    const u64 desc_q = descriptor(kDescK, base + ReachLayout::rows + block * kBlockBytes);
    const u64 desc_k = descriptor(kDescK, base + slot * kTileBytes);
    wgmma_fence();
    wgmma_ss<0, 0, 0>(s, desc_q, desc_k);
#pragma unroll
    for (int kk = 1; kk < kD / 16; ++kk) {
      // 16 columns are 32 bytes of a 128-byte row; the next 64 columns lie a block or tile of rows further.
      wgmma_ss<1, 0, 0>(s, desc_q + (kk / 4) * (kBlockRows * 8) + (kk % 4) * 2,
                        desc_k + (kk / 4) * (kTile * 8) + (kk % 4) * 2);
    }
    wgmma_commit();
  }

  // All rows against one key tile. The scores of a block run beside the sums of the block before.
  ELASTIC_FN void tile(RowSums (&sums)[kBlocks], const Asked& asked, int pos, int end,
                       const Ring<kStages>& at) const {
    const int rows = p.f.heads / p.f.kv_heads * kQueries;
    float s[2][64];
    wait(&c.full[at.slot], at.phase);
    // One lane reads for its warp, the one that hands the slot back: its arrival orders no other lane's read.
    const int noted = lane == 0 ? c.kind[at.slot] : 0;
    const Kind kind = Kind(__shfl_sync(~0u, noted, 0));
    scores(s[0], 0, at.slot);
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      if (b + 1 < kBlocks) {
        scores(s[(b + 1) & 1], b + 1, at.slot);
        wgmma_wait<1>();
      } else {
        wgmma_wait<0>();
      }
      pin(s[b & 1]);
      if (b + 1 == kBlocks && lane == 0) arrive(&c.empty[at.slot]);
      const int row = b * kBlockRows + warp * 16;  // an odd group's last block is half empty
      if (row < rows) {
        const int a = asked.row_position(row % kQueries + lane / 4);
        sums[b].add(s[b & 1], kind, pos, end, a, rule_of(p.f), p.f.scale_log2, lane);
      }
    }
  }

  ELASTIC_FN void store_parts(const RowSums (&sums)[kBlocks], int rows) const {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
      for (int y = 0; y < 2; ++y) {
        const RowPart part = sums[b].part(y);
        const int row = b * kBlockRows + warp * 16 + lane / 4 + 8 * y;
        if (lane % 4 == 0 && row < rows) parts[group * rows + row] = part;
      }
    }
  }

  ELASTIC_FN void run() const {
    const int kv_heads = p.f.kv_heads, rows = p.f.heads / kv_heads * kQueries, thread = threadIdx.x - 128;
    const Meet meet;
    Ring<kStages> ring{group, 0};  // of all tiles, this warpgroup takes every other one
    u32 queries_phase = 0;
    int turn = group, head = head_at(offset, p.f.samples * kv_heads, share.first);
    const int first = head;
#pragma unroll 1
    for (; offset[head] < share.last; ++head) {
      const Asked asked(p.f, head / kv_heads);
      const Item item = item_of(share, offset, head, asked.keys());
      meet();  // everyone is done with the rows and the parts of the head before
      if (thread == 0 && item.begin < item.end) load_queries(asked, head);
      RowSums sums[kBlocks];
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) sums[b].init();
      if (item.begin < item.end) {
        wait(&c.queries, queries_phase);
        queries_phase ^= 1;
      }
#pragma unroll 1
      for (int pos = item.begin + turn * kTile; pos < item.end; pos += 2 * kTile) {
        tile(sums, asked, pos, item.end, ring);
        ring.advance();
        ring.advance();
      }
      turn ^= ceil_div(item.end - item.begin, kTile) & 1;
      store_parts(sums, rows);
      meet();
      finish_item(p, c.shared, item, parts, 2, rows, slot_of(blockIdx.x, head != first), thread, meet);
    }
    finish_shared(p, c.shared, share, offset, first, head - 1, rows, thread, meet);
  }
};

}  // namespace elastic

extern "C" __global__ void __launch_bounds__(384, 1) reach_sm90(const __grid_constant__ elastic::ReachParams p) {
  using namespace elastic;
  extern __shared__ char shared_raw[];
  const u32 base = (shared_address(shared_raw) + 1023) & ~1023u;
  char* shared = shared_raw + (base - shared_address(shared_raw));
  ReachControl& control = *(ReachControl*)(shared + ReachLayout::control);
  RowPart* parts = (RowPart*)(shared + ReachLayout::parts);
  int* offset = (int*)(shared + ReachLayout::list);
  if (threadIdx.x == 0) control.init();
  const Share own = build_list<384>(p.f.samples * p.f.kv_heads, offset, control.shared.totals, Tokens{p.f});
  if (own.first >= own.last) return;
  Share& share = control.shared.share;  // registers are scarce
  if (threadIdx.x == 0) share = own;
  __syncthreads();
  const int warpgroup = threadIdx.x / 128;
  if (warpgroup == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x == 0) ReachProducer{p, control, share, offset, base}.run();
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    const int group = __shfl_sync(~0u, warpgroup - 1, 0), warp = __shfl_sync(~0u, int(threadIdx.x / 32 % 4), 0);
    ReachConsumer{p, control, share, offset, parts, base, group, warp, int(threadIdx.x % 32)}.run();
  }
}
