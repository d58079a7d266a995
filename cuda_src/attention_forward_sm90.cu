// Fused causal GQA attention for compute capability 9.0: every KV head full, streaming or block-sparse in one persistent
// launch. Warpgroup 0 produces (TMA, one lane; it alone knows the modes), warpgroups 1 and 2 consume 64 query rows each
// with wgmma, each at its own pace: taking turns on the tensor cores was slower. Inside a warpgroup the scores of block i
// run beside the output of block i - 1. The protocol is in protocol_sm90.cuh.
// Compile-time: ELASTIC_HEAD_DIM (64, 128), ELASTIC_BF16 (1, else fp16); ELASTIC_PAGED (16, 32, 64: keys and values lie
// in pages of a multiple of so many tokens, pages.cuh).
#include "elastic/params.cuh"
#include "elastic/pipeline_sm90.cuh"
#include "elastic/softmax.cuh"
#include "elastic/wgmma.cuh"

namespace elastic {

constexpr int kGroupBarrier = 4;  // named barriers: + warpgroup

struct Consumer {
  const Params& p;
  Control& c;
  u32 base;
  int group, warp, lane;  // warpgroup 0 or 1, warp of the warpgroup

  ELASTIC_FN void release(u64* bar) const {
    if (lane == 0) arrive(bar);
  }

  ELASTIC_FN void scores(float (&s)[64], u64 desc_q, int k_slot) const {
    const u64 desc_k = descriptor(kDescK, base + SharedLayout::k + k_slot * kTileBytesKV);
    wgmma_ss<0, 0, 0>(s, desc_q, desc_k);
#pragma unroll
    for (int kk = 1; kk < kD / 16; ++kk) {
      // 16 columns are 32 bytes of a 128-byte row; the next 64 columns lie 128 rows further.
      wgmma_ss<1, 0, 0>(s, desc_q + (kk / 4) * (kTileM * 8) + (kk % 4) * 2,
                        desc_k + (kk / 4) * (kBlockN * 8) + (kk % 4) * 2);
    }
    wgmma_commit();
  }

  ELASTIC_FN void output(float (&o)[kD / 2], const u32 (&prob)[32], int v_slot) const {
    const u64 desc_v = descriptor(kD == 64 ? kDescV : kDescVWide, base + SharedLayout::v + v_slot * kTileBytesKV);
#pragma unroll
    for (int kk = 0; kk < kBlockN / 16; ++kk) {
      wgmma_rs(o, prob[4 * kk], prob[4 * kk + 1], prob[4 * kk + 2], prob[4 * kk + 3], desc_v + kk * 128);
    }
    wgmma_commit();
  }

  // V rows past the sample's end may hold anything, and 0 * NaN is NaN. Both warpgroups write the same zeros.
  ELASTIC_FN void clear_tail(const Entry& e, int len_k, int v_slot) const {
    const u32 tile = base + SharedLayout::v + v_slot * kTileBytesKV;
    for (int index = warp * 32 + lane; index < kBlockN * kD / 8; index += 128) {
      const int row = index / 8 % kBlockN, id = (e.ids >> (row / kHalf * 16)) & 0xffff;
      if (id * kHalf + row % kHalf < len_k) continue;
      asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(tile + index * 16), "r"(0) : "memory");
    }
    fence_async();
    named_sync(kGroupBarrier + group, 128);
  }

  ELASTIC_FN void mask(float (&s)[64], const Entry& e, const Header& h) const {
    if (!(e.flags & (kMask0 << group))) return;
    const int a = h.position + group * 64 + warp * 16 + lane / 4;
    const Rule rule = h.rule;
    mask_half(s, e.ids & 0xffff, a, rule, lane);
    mask_half(s + 32, e.ids >> 16, a, rule, lane);
  }

  ELASTIC_FN void pack_all(u32 (&prob)[32], const float (&s)[64]) const {
#pragma unroll
    for (int j = 0; j < 32; ++j) prob[j] = pack(s[2 * j], s[2 * j + 1]);
  }

  // ptxas would hoist the wait for the output GEMM above the softmax and so undo their overlap. A store that depends on
  // the finished sums (and never happens: they are not negative) keeps its place, and the wait keeps its own after it.
  ELASTIC_FN void keep_order(const Softmax& softmax) const {
    asm volatile(
        "{\n .reg .pred p;\n setp.lt.f32 p, %0, 0f00000000;\n @p st.shared.f32 [%1], %0;\n}" ::"f"(
            softmax.row_sum[0] + softmax.row_sum[1]),
        "r"(base)
        : "memory");
  }

  // Stages 16 rows per warp where their Q was, then one TMA store, or plain stores at the sample's end.
  ELASTIC_FN void store(float (&o)[kD / 2], const Header& h, int q_slot) const {
    const u32 tile = base + SharedLayout::q + q_slot * kTileBytesQ;
    const int first = group * 64 + warp * 16, row = first + (lane & 15);
    named_sync(kGroupBarrier + group, 128);  // the whole warpgroup has read its Q
#pragma unroll
    for (int j = 0; j < kD / 16; ++j) {
      const int chunk = (2 * j + (lane >> 4)) % 8;
      store_matrix(tile + (j / 4) * (kTileM * 128) + row * 128 + ((chunk ^ (row & 7)) << 4), pack(o[8 * j], o[8 * j + 1]),
                   pack(o[8 * j + 2], o[8 * j + 3]), pack(o[8 * j + 4], o[8 * j + 5]), pack(o[8 * j + 6], o[8 * j + 7]));
    }
    if (first + 16 <= h.rows) {
      fence_async();
      __syncwarp();
      if (lane == 0) {
#pragma unroll
        for (int d = 0; d < kD / 64; ++d) {
          tma_store(p.map_o, tile + d * (kTileM * 128) + first * 128, d * 64, h.q_row + first, h.head, h.row);
        }
        store_commit();
        store_wait_read();
      }
    } else {
      __syncwarp();
      char* out = (char*)p.out + 2 * (h.row * p.stride_o.row + h.q_row * p.stride_o.token + h.head * p.stride_o.head);
      for (int index = lane; index < 16 * kD / 8; index += 32) {
        const int r = first + index / (kD / 8), chunk = index % (kD / 8);
        if (r >= h.rows) break;
        const u32 source = tile + (chunk / 8) * (kTileM * 128) + r * 128 + ((chunk % 8 ^ (r & 7)) << 4);
        u32 x[4];
        asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                     : "r"(source)
                     : "memory");
        *(uint4*)(out + 2 * r * p.stride_o.token + chunk * 16) = make_uint4(x[0], x[1], x[2], x[3]);
      }
      __syncwarp();
      fence_async();  // the next Q tile is written by TMA over what was staged here
    }
  }

  ELASTIC_FN void store_lse(float lse, int y, const Header& h) const {
    const int row = group * 64 + warp * 16 + lane / 4 + 8 * y;
    if (lane % 4 == 0 && row < h.rows) p.lse[(i64(h.row) * p.heads + h.head) * p.seq_q + h.q_row + row] = lse;
  }

  ELASTIC_FN void run() const {
    Ring<2> q{0, 0};
    Ring<kStages> kv{0, 0};
    float o[kD / 2], s[64];
    u32 prob[32];
    Softmax softmax;
    while (true) {
      wait(&c.full_q[q.slot], q.phase);
      const Header& h = c.header[q.slot];
      const int state = h.state;
      if (state == kDone) break;
      softmax.init();
#pragma unroll
      for (int i = 0; i < kD / 2; ++i) o[i] = 0.0f;
      if (state == kWork) {
        const u64 desc_q = descriptor(kDescK, base + SharedLayout::q + q.slot * kTileBytesQ + group * (64 * 128));
        float alpha[2];
        wait(&c.full_k[kv.slot], kv.phase);
        Entry e = c.ring[kv.slot];
        wgmma_fence();
        scores(s, desc_q, kv.slot);
        wgmma_wait<0>();
        pin(s);
        release(&c.empty_k[kv.slot]);
        mask(s, e, h);
        softmax.update(s, alpha, p.scale_log2);
        pack_all(prob, s);
        Ring<kStages> v = kv;
        kv.advance();
#pragma unroll 1
        while (!(e.flags & kLast)) {
          wait(&c.full_k[kv.slot], kv.phase);
          const Entry next = c.ring[kv.slot];
          wgmma_fence();
          scores(s, desc_q, kv.slot);
          wait(&c.full_v[v.slot], v.phase);
          if (e.flags & kTail) clear_tail(e, h.len_k, v.slot);
          wgmma_fence();  // the branch above ends the reach of the first fence
          output(o, prob, v.slot);
          wgmma_wait<1>();
          pin(s);
          release(&c.empty_k[kv.slot]);
          mask(s, next, h);
          softmax.update(s, alpha, p.scale_log2);
          pin(s);
          keep_order(softmax);
          wgmma_wait<0>();
          pin(o);
          release(&c.empty_v[v.slot]);
          pack_all(prob, s);
          rescale(o, alpha);
          pin(o);
          e = next;
          v = kv;
          kv.advance();
        }
        wait(&c.full_v[v.slot], v.phase);
        if (e.flags & kTail) clear_tail(e, h.len_k, v.slot);
        wgmma_fence();
        output(o, prob, v.slot);
        wgmma_wait<0>();
        pin(o);
        release(&c.empty_v[v.slot]);
      }
#pragma unroll
      for (int y = 0; y < 2; ++y) {
        float factor, lse;
        softmax.finish(y, p.scale, &factor, &lse);
        if (state == kPoison) factor = lse = __int_as_float(0x7fc00000);
        store_lse(lse, y, h);
#pragma unroll
        for (int i = 0; i < kD / 8; ++i) {
          o[4 * i + 2 * y] *= factor;
          o[4 * i + 2 * y + 1] *= factor;
        }
      }
      store(o, h, q.slot);
      release(&c.empty_q[q.slot]);
      q.advance();
    }
    if (lane == 0) store_wait();
  }
};

}  // namespace elastic

extern "C" __global__ void __launch_bounds__(384, 1)
    attention_forward_sm90(const __grid_constant__ elastic::ForwardParams p) {
  using namespace elastic;
  extern __shared__ char shared_raw[];
  const u32 base = (shared_address(shared_raw) + 1023) & ~1023u;
  char* shared = shared_raw + (base - shared_address(shared_raw));
  Control& control = *(Control*)(shared + SharedLayout::control);
  Segment* segments = (Segment*)(shared + SharedLayout::segments);
  const int warpgroup = threadIdx.x / 128;
  if (threadIdx.x < 32) build_schedule<QueryBlocks>(p, segments, &control.size, threadIdx.x);
  if (threadIdx.x == 32) {
    for (int i = 0; i < 2; ++i) {
      barrier_init(&control.full_q[i], 1);
      barrier_init(&control.empty_q[i], kReaders);
    }
    for (int i = 0; i < kStages; ++i) {
      barrier_init(&control.full_k[i], 1);
      barrier_init(&control.empty_k[i], kReaders);
      barrier_init(&control.full_v[i], 1);
      barrier_init(&control.empty_v[i], kConsumerWarps);
    }
    fence_barrier_init();
  }
  __syncthreads();
  if (warpgroup == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
#if ELASTIC_PAGED
    const int warp = __shfl_sync(~0u, int(threadIdx.x / 32), 0), lane = threadIdx.x % 32;
    if (warp == 0) Producer{p, control, base, lane}.run(segments);
    if (warp >= 1 && warp <= kLoaders) ValueLoader{p, control, base, warp - 1, lane}.run();
#else
    if (threadIdx.x == 0) Producer{p, control, base}.run(segments);
#endif
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 224;");
    const int group = __shfl_sync(~0u, warpgroup - 1, 0), warp = __shfl_sync(~0u, int(threadIdx.x / 32 % 4), 0);
    Consumer{p, control, base, group, warp, int(threadIdx.x % 32)}.run();
  }
}
