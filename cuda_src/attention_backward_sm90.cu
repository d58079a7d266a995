// Backward of attention_forward for compute capability 9.0: dK and dV of one key block stay in registers while the query
// tiles that see it stream by, for all query heads of the group; dQ is added up in global memory (fp32), as the writers
// come, or in a fixed order where `turns` is given. Scores are computed transposed (keys are rows), so that P and dS feed
// dV and dK from registers and only dS goes through shared memory, for dQ. The protocol is in backward_pipeline_sm90.cuh;
// attention_backward_rows.cu prepares lse2 and delta and converts dQ.
// Compile-time: ELASTIC_HEAD_DIM (64, 128), ELASTIC_BF16 (1, else fp16).
#include "elastic/backward_pipeline_sm90.cuh"
#include "elastic/softmax.cuh"
#include "elastic/wgmma.cuh"

namespace elastic {

constexpr int kS = kRows / 2, kAcc = kD / 2;  // accumulator registers of 64 keys by kRows queries, and by kD columns
// Whether dP starts from -delta, lse2 is fetched while the scores are computed and the exponentials run beside dP. At
// D 64 there are not enough registers for it, and it was slower.
constexpr bool kAhead = kD == 128;

struct Consumer {
  const BackwardParams& p;
  BackwardControl& c;
  u32 base;
  int group, warp, lane;  // warpgroup 0 or 1, warp of the warpgroup

  // Hands back what the barrier guards: every lane is done with it when lane 0 says so.
  ELASTIC_FN void release(u64* bar) const {
    __syncwarp();
    if (kArrivals == 32 || lane == 0) arrive(bar);
  }

  // s[64 keys x kRows queries] = A B^T, or += it: K Q^T or V dO^T.
  template <int kAdd>
  ELASTIC_FN void scores(float (&s)[kS], int a_tile, int b_tile) const {
    const u64 a = descriptor(kDescK, base + a_tile + group * (64 * 128)), b = descriptor(kDescK, base + b_tile);
#pragma unroll
    for (int kk = 0; kk < kD / 16; ++kk) {
      const u64 da = a + (kk / 4) * (kKeys * 8) + (kk % 4) * 2, db = b + (kk / 4) * (kRows * 8) + (kk % 4) * 2;
      if (kk == 0) wgmma_ss<kAdd, 0, 0>(s, da, db); else wgmma_ss<1, 0, 0>(s, da, db);
    }
    wgmma_commit();
  }

  // acc[64 keys x kD] += P^T dO or dS^T Q.
  ELASTIC_FN void accumulate(float (&acc)[kAcc], const u32 (&a)[kS / 2], int b_tile) const {
    const u64 b = descriptor(kD == 64 ? kDescV : kDescVNarrow, base + b_tile);
#pragma unroll
    for (int kk = 0; kk < kRows / 16; ++kk) {
      wgmma_rs(acc, a[4 * kk], a[4 * kk + 1], a[4 * kk + 2], a[4 * kk + 3], b + kk * 128);
    }
    wgmma_commit();
  }

  // Half of dS K: at D 128 all 64 queries by 64 columns, at D 64 64 queries by all columns.
  ELASTIC_FN void query_gradient(float (&dq)[32], int ds_tile) const {
    const int half = group * (kKeys * 128);
    const u64 a = descriptor(kDescV, base + ds_tile + (kD == 64 ? half : 0));
    const u64 b = descriptor(kDescV, base + BackwardLayout::k + (kD == 64 ? 0 : half));
    wgmma_ss<0, 1, 1>(dq, a, b);
#pragma unroll
    for (int kk = 1; kk < kKeys / 16; ++kk) wgmma_ss<1, 1, 1>(dq, a + kk * 128, b + kk * 128);
    wgmma_commit();
  }

  // Rows past the sample's end may hold anything, and 0 * NaN is NaN. The two warpgroups share the rows: `settle` next.
  template <int kTileRows>
  ELASTIC_FN void clear_tail(int tile_at, int rows) const {
    const u32 tile = base + tile_at;
    for (int index = group * 128 + warp * 32 + lane; index < kTileRows * kD / 8; index += 256) {
      if (index / 8 % kTileRows < rows) continue;
      asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(tile + index * 16), "r"(0) : "memory");
    }
  }

  ELASTIC_FN void settle() const {
    fence_async();
    named_sync(kClear, 256);
  }

  // Per-query values of the lane's columns: lse2 or -delta of column 8 i + 2 (lane % 4) + {0, 1}.
  ELASTIC_FN float2 column(u32 values, int i) const {
    float2 x;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
                 : "=f"(x.x), "=f"(x.y)
                 : "r"(values + (8 * i + 2 * (lane & 3)) * 4)
                 : "memory");
    return x;
  }

  // Where dP starts from.
  ELASTIC_FN void minus_delta(float (&dp)[kS], u32 delta) const {
#pragma unroll
    for (int i = 0; i < kS / 4; ++i) {
      const float2 d = column(delta, i);
      dp[4 * i] = dp[4 * i + 2] = d.x;
      dp[4 * i + 1] = dp[4 * i + 3] = d.y;
    }
    pin(dp);
  }

  ELASTIC_FN void hide(float (&s)[kS], const Step& step, int key) const {
    const u32 masked = kMask << group, hidden = kHidden << group;
    // One rare branch for both. At D 64 ptxas makes better code of the second alone.
    if (kD == 128 && !(step.flags & (masked | hidden))) return;
    if (step.flags & masked) mask_transposed(s, key, step.m0 + c.header.delta, c.header.rule, lane);
    if (step.flags & hidden) {
#pragma unroll
      for (int i = 0; i < kS; ++i) s[i] = minus_infinity();
    }
  }

  ELASTIC_FN void probabilities(float (&s)[kS], const float2 (&fetched)[kS / 4], u32 lse2) const {
#pragma unroll
    for (int i = 0; i < kS / 4; ++i) {
      const float2 l = kAhead ? fetched[i] : column(lse2, i);
#pragma unroll
      for (int y = 0; y < 2; ++y) {
        s[4 * i + 2 * y] = exp2_approx(fmaf(s[4 * i + 2 * y], p.f.scale_log2, -l.x));
        s[4 * i + 2 * y + 1] = exp2_approx(fmaf(s[4 * i + 2 * y + 1], p.f.scale_log2, -l.y));
      }
    }
  }

  // dp <- P (dp - delta)
  ELASTIC_FN void score_gradient(float (&dp)[kS], const float (&prob)[kS], u32 delta) const {
#pragma unroll
    for (int i = 0; i < kS / 4; ++i) {
      const float2 d = kAhead ? make_float2(0.0f, 0.0f) : column(delta, i);
#pragma unroll
      for (int y = 0; y < 2; ++y) {
        float* at = dp + 4 * i + 2 * y;
        if (!kAhead) at[0] += d.x, at[1] += d.y;
        at[0] *= prob[4 * i + 2 * y];
        at[1] *= prob[4 * i + 2 * y + 1];
      }
    }
  }

  // ptxas would hoist the wait for dP above most exponentials and so undo their overlap. A store that depends on all of
  // them (and never happens: probabilities have no sign) keeps its place, and the wait keeps its own after it.
  ELASTIC_FN void keep_order(const u32 (&prob)[kS / 2]) const {
    u32 any = 0;
#pragma unroll
    for (int j = 0; j < kS / 2; j += 2) any = any | prob[j] | prob[j + 1];
    asm volatile("{\n .reg .pred p;\n setp.lt.s32 p, %0, 0;\n @p st.shared.u32 [%1], %0;\n}" ::"r"(any), "r"(base)
                 : "memory");
  }

  ELASTIC_FN void pack_all(u32 (&a)[kS / 2], const float (&s)[kS]) const {
#pragma unroll
    for (int j = 0; j < kS / 2; ++j) a[j] = pack(s[2 * j], s[2 * j + 1]);
  }

  // dS^T as [query chunk of 64][128 keys][64 queries].
  ELASTIC_FN void stage(const u32 (&ds)[kS / 2], int ds_tile) const {
    const int row = group * 64 + warp * 16 + (lane & 15);
#pragma unroll
    for (int j = 0; j < kRows / 16; ++j) {
      const int chunk = (2 * j + (lane >> 4)) % 8;
      store_matrix(base + ds_tile + (j / 4) * (kKeys * 128) + row * 128 + ((chunk ^ (row & 7)) << 4), ds[4 * j],
                   ds[4 * j + 1], ds[4 * j + 2], ds[4 * j + 3]);
    }
  }

  ELASTIC_FN void hand_over(const float (&dq)[32], const Step& step, u32& sum_phase) const {
    const int thread = warp * 32 + lane;
    const u32 target = base + BackwardLayout::sum + group * kBytesSum + thread * 16;
    wait(&c.sum_empty[group], sum_phase);
    sum_phase ^= 1;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(target + j * 2048), "f"(dq[4 * j]),
                   "f"(dq[4 * j + 1]), "f"(dq[4 * j + 2]), "f"(dq[4 * j + 3])
                   : "memory");
    }
    if (thread == 0) {
      const i64 at = i64(step.head) * p.row_tiles + step.tile;
      c.job[group] = SumJob{p.dq_sum + at * kTileElements + group * (kTileElements / 2), p.turns + 2 * at + group, step.turn};
    }
    fence_async();
    release(&c.sum_full[group]);
  }

  ELASTIC_FN void store(const float (&acc)[kAcc], void* out, const Strides& stride, float factor) const {
    const BackwardHeader& h = c.header;
    char* target = (char*)out + 2 * (h.row * stride.row + i64(h.k_row) * stride.token + h.kv_head * stride.head);
#pragma unroll
    for (int y = 0; y < 2; ++y) {
      const int row = group * 64 + warp * 16 + lane / 4 + 8 * y;
      if (row >= h.rows) continue;
      u32* to = (u32*)(target + 2 * row * stride.token) + lane % 4;
#pragma unroll
      for (int j = 0; j < kD / 8; ++j) to[4 * j] = pack(acc[4 * j + 2 * y] * factor, acc[4 * j + 2 * y + 1] * factor);
    }
  }

  ELASTIC_FN void run() const {
    Ring<kStages> st{0, 0};
    int buffer = 0;
    u32 sum_phase = 1;
    for (u32 kv_phase = 0;; kv_phase ^= 1) {
      wait(&c.full_kv, kv_phase);
      const int state = c.header.state;
      if (state == kDone) break;
      float dk[kAcc], dv[kAcc];
#pragma unroll
      for (int i = 0; i < kAcc; ++i) dk[i] = dv[i] = 0.0f;
      if (state == kWork) {
        const int valid = c.header.rows, key = c.header.key0 + group * 64 + warp * 16 + lane / 4;
        if (valid < kKeys) {
          clear_tail<kKeys>(BackwardLayout::k, valid);
          clear_tail<kKeys>(BackwardLayout::v, valid);
          settle();
        }
        bool last = false;
#pragma unroll 1
        while (!last) {
          const int q = BackwardLayout::q + st.slot * kBytesQ, grad = BackwardLayout::grad + st.slot * kBytesQ;
          const int ds_tile = BackwardLayout::ds + buffer * kBytesDS;
          const u32 rows = base + BackwardLayout::rows + st.slot * 2 * kRows * 4;
          wait(&c.full[st.slot], st.phase);
          const Step step = c.step[st.slot];
          last = step.flags & kLast;
          if (step.flags & kTail) {
            clear_tail<kRows>(q, step.rows);
            clear_tail<kRows>(grad, step.rows);
            settle();
          }
          float s[kS], dp[kS], dq[32];
          u32 prob[kS / 2], ds[kS / 2];
          float2 lse2[kS / 4];
          if (kAhead) minus_delta(dp, rows + kRows * 4);
          wgmma_fence();
          scores<0>(s, BackwardLayout::k, q);
          scores<kAhead>(dp, BackwardLayout::v, grad);
          if (kAhead) {
#pragma unroll
            for (int i = 0; i < kS / 4; ++i) lse2[i] = column(rows, i);
          }
          wgmma_wait<1>();
          pin(s);
          hide(s, step, key);
          probabilities(s, lse2, rows);
          pin(s);
          if (kAhead) {
            pack_all(prob, s);
            keep_order(prob);
          }
          wgmma_wait<0>();
          pin(dp);
          score_gradient(dp, s, rows + kRows * 4);
          if (!kAhead) pack_all(prob, s);
          pack_all(ds, dp);
          stage(ds, ds_tile);
          fence_async();
          wgmma_fence();
          accumulate(dv, prob, grad);
          named_sync(kScores, 256);  // both warpgroups' dS; and both are done with the dQ that read the other buffer
          wgmma_fence();
          query_gradient(dq, ds_tile);
          accumulate(dk, ds, q);
          wgmma_wait<1>();
          pin(dq);
          pin(dv);
          hand_over(dq, step, sum_phase);
          wgmma_wait<0>();
          pin(dk);
          release(&c.empty[st.slot]);
          st.advance();
          buffer ^= 1;
        }
      }
      store(dv, p.dv, p.stride_dv, 1.0f);
      store(dk, p.dk, p.stride_dk, p.f.scale);
      release(&c.empty_kv);
    }
    wait(&c.sum_empty[group], sum_phase);
    if (warp == 0 && lane == 0) c.job[group].target = nullptr;
    release(&c.sum_full[group]);
  }
};

}  // namespace elastic

extern "C" __global__ void __launch_bounds__(384, 1)
    attention_backward_sm90(const __grid_constant__ elastic::BackwardParams p) {
  using namespace elastic;
  extern __shared__ char shared_raw[];
  const u32 base = (shared_address(shared_raw) + 1023) & ~1023u;
  char* shared = shared_raw + (base - shared_address(shared_raw));
  BackwardControl& control = *(BackwardControl*)(shared + BackwardLayout::control);
  int* first_tile = (int*)(shared + BackwardLayout::first);
  Segment* segments = (Segment*)(shared + BackwardLayout::first + (p.f.samples + 3) / 4 * 16);
  const int warpgroup = threadIdx.x / 128, lane = threadIdx.x % 32;
  if (threadIdx.x < 32) {
    build_schedule<KeyBlocks>(p.f, segments, &control.size, lane);
    number_row_tiles<kRows>(p.f, first_tile, lane);
  }
  if (threadIdx.x == 32) {
    barrier_init(&control.full_kv, 1);
    barrier_init(&control.empty_kv, kConsumerWarps * kArrivals);
    for (int i = 0; i < kStages; ++i) {
      barrier_init(&control.full[i], 1);
      barrier_init(&control.empty[i], kConsumerWarps * kArrivals);
    }
    for (int w = 0; w < 2; ++w) {
      barrier_init(&control.sum_full[w], 4 * kArrivals);
      barrier_init(&control.sum_empty[w], kArrivals);
    }
    fence_barrier_init();
  }
  __syncthreads();
  const int warp = __shfl_sync(~0u, int(threadIdx.x / 32 % 4), 0);
  if (warpgroup == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    if (warp == 0) Producer{p, control, base, lane}.run(first_tile, segments);
    else if (warp < 3) Adder{p, control, base, warp - 1, lane}.run();
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
    const int group = __shfl_sync(~0u, warpgroup - 1, 0);
    Consumer{p, control, base, group, warp, lane}.run();
  }
}
