// Element mask and online softmax on the accumulator layout that mma.m16n8 and wgmma share: register 4 * i + 2 * y + x
// of a lane is row lane / 4 + 8 * y, column 8 * i + 2 * (lane % 4) + x. A row is spread over the four lanes of a quad.
#pragma once
#include "elastic/block_range.cuh"

namespace elastic {

constexpr float kLog2e = 1.4426950408889634f;

ELASTIC_FN float minus_infinity() { return __int_as_float(0xff800000); }

ELASTIC_FN float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

ELASTIC_FN float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

ELASTIC_FN float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// Masks the 64 columns of one half block: s points at its 32 registers, a is the position of the lane's first row.
ELASTIC_FN void mask_half(float* s, int id, int a, const Rule& rule, int lane) {
  const int base = id * kHalf + 2 * (lane & 3), sink = rule.sink - base;
#pragma unroll
  for (int y = 0; y < 2; ++y) {
    const int last = a + 8 * y - base, first = lower_bound(a + 8 * y, rule) - base;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
#pragma unroll
      for (int x = 0; x < 2; ++x) {
        const int column = 8 * i + x;
        if (column > last || (column < first && column >= sink)) s[4 * i + 2 * y + x] = minus_infinity();
      }
    }
  }
}

// The same for transposed scores: rows are keys from `key` (the lane's first) on, columns are positions from a0 on.
template <int kCount>
ELASTIC_FN void mask_transposed(float (&s)[kCount], int key, int a0, const Rule& rule, int lane) {
  const int base = a0 + 2 * (lane & 3);
#pragma unroll
  for (int y = 0; y < 2; ++y) {
    const int j = key + 8 * y, first = j - base;
    const int last = j < rule.sink ? 1 << 30 : last_position(j, rule) - base;
#pragma unroll
    for (int i = 0; i < kCount / 4; ++i) {
#pragma unroll
      for (int x = 0; x < 2; ++x) {
        const int column = 8 * i + x;
        if (column < first || column > last) s[4 * i + 2 * y + x] = minus_infinity();
      }
    }
  }
}

struct Softmax {
  static constexpr float kSlack = 8.0f;
  float row_max[2], row_sum[2];  // the sums are per lane until finish()

  ELASTIC_FN void init() {
    row_max[0] = row_max[1] = minus_infinity();
    row_sum[0] = row_sum[1] = 0.0f;
  }

  // s <- exp2((s - max) * scale_log2); alpha rescales what was accumulated under the old maximum. A maximum that grew
  // by less than 2^kSlack stays: the result is the same, because sum and output share it, and alpha is exactly 1.
  template <int kCount>
  ELASTIC_FN void update(float (&s)[kCount], float (&alpha)[2], float scale_log2) {
#pragma unroll
    for (int y = 0; y < 2; ++y) {
      float top = row_max[y];
#pragma unroll
      for (int i = 0; i < kCount / 4; ++i) top = fmaxf(top, fmaxf(s[4 * i + 2 * y], s[4 * i + 2 * y + 1]));
      top = quad_max(top);
      if (!((top - row_max[y]) * scale_log2 > kSlack)) top = row_max[y];
      // A row that has seen nothing keeps -inf; 0 in its place makes both exponentials exact zeros.
      const float shift = top == minus_infinity() ? 0.0f : top * scale_log2;
      alpha[y] = top == row_max[y] ? 1.0f : exp2_approx(row_max[y] * scale_log2 - shift);
      row_max[y] = top;
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < kCount / 4; ++i) {
#pragma unroll
        for (int x = 0; x < 2; ++x) {
          const float e = exp2_approx(fmaf(s[4 * i + 2 * y + x], scale_log2, -shift));
          s[4 * i + 2 * y + x] = e;
          sum += e;
        }
      }
      row_sum[y] = row_sum[y] * alpha[y] + sum;
    }
  }

  // Factor of the accumulated output and the log-sum-exp of row y; an empty row gives 0 and -inf.
  ELASTIC_FN void finish(int y, float scale, float* factor, float* lse) {
    const float sum = quad_sum(row_sum[y]);
    *factor = sum == 0.0f ? 0.0f : 1.0f / sum;
    *lse = sum == 0.0f ? minus_infinity() : row_max[y] * scale + __logf(sum);
  }
};

// What a sum under the maximum `peak` counts under the maximum `top`.
ELASTIC_FN float weight_of(float peak, float top, float scale_log2) {
  return peak == minus_infinity() ? 0.0f : exp2_approx((peak - top) * scale_log2);
}

// Most blocks change no maximum of a warp's rows, so most calls multiply nothing.
template <int kCount>
ELASTIC_FN void rescale(float (&o)[kCount], const float (&alpha)[2]) {
  if (!__any_sync(~0u, alpha[0] != 1.0f || alpha[1] != 1.0f)) return;
#pragma unroll
  for (int i = 0; i < kCount; ++i) o[i] *= alpha[(i >> 1) & 1];
}

ELASTIC_FN u32 pack(float low, float high) {
  u32 word;
#if ELASTIC_BF16
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
#else
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
#endif
  return word;
}

}  // namespace elastic
