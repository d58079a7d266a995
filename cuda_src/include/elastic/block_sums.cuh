// Online softmax of 256 scores a row that keeps, per key block, the log2 of the block's sum of exponentials instead of
// the exponentials. Accumulator layout as in softmax.cuh: a lane holds two rows, a quad of lanes a row's 256 cells.
#pragma once
#include "elastic/softmax.cuh"
#include "elastic/xattention.cuh"

namespace elastic {

ELASTIC_FN float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Hides the cells after `last` (the warp's first row's; a lane's own are lane / 4 and lane / 4 + 8 further) and those
// from `cells` on.
ELASTIC_FN void mask_cells(float (&s)[128], int last, int cells, int lane) {
  if (last >= kCells - 1 && cells >= kCells) return;
#pragma unroll
  for (int y = 0; y < 2; ++y) {
    const int seen = min_i(last + lane / 4 + 8 * y, cells - 1) - 2 * (lane & 3);
#pragma unroll
    for (int i = 0; i < 32; ++i) {
#pragma unroll
      for (int x = 0; x < 2; ++x) {
        if (8 * i + x > seen) s[4 * i + 2 * y + x] = minus_infinity();
      }
    }
  }
}

// Sums over the lanes of a pair (lane ^ kMask): the lower lane keeps the first half of the entries, the upper the rest.
template <int kCount, int kMask>
ELASTIC_FN void halve(float (&part)[kCount / 2], const float* all, int lane) {
  const bool upper = lane & kMask;
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) {
    const float kept = upper ? all[i + kCount / 2] : all[i], given = upper ? all[i] : all[i + kCount / 2];
    part[i] = kept + __shfl_xor_sync(~0u, given, kMask);
  }
}

struct RowSums {
  float row_max[2], row_sum[2];  // the sums are per lane until norm()

  ELASTIC_FN void init() {
    row_max[0] = row_max[1] = minus_infinity();
    row_sum[0] = row_sum[1] = 0.0f;
  }

  // out: where the warp's first row keeps this key tile's blocks; its rows are `columns` apart.
  ELASTIC_FN void add(float (&s)[128], float scale_log2, float* out, int columns, int lane) {
#pragma unroll
    for (int y = 0; y < 2; ++y) {
      float top = row_max[y];
#pragma unroll
      for (int i = 0; i < 32; ++i) top = fmaxf(top, fmaxf(s[4 * i + 2 * y], s[4 * i + 2 * y + 1]));
      top = quad_max(top);
      const float shift = top == minus_infinity() ? 0.0f : top * scale_log2;
      const float alpha = top == row_max[y] ? 1.0f : exp2_approx(row_max[y] * scale_log2 - shift);
      row_max[y] = top;
      float part[32], sum = 0.0f;
#pragma unroll
      for (int i = 0; i < 32; ++i) {
        part[i] = exp2_approx(fmaf(s[4 * i + 2 * y], scale_log2, -shift)) +
                  exp2_approx(fmaf(s[4 * i + 2 * y + 1], scale_log2, -shift));
        sum += part[i];
      }
      row_sum[y] = row_sum[y] * alpha + sum;
      store(part, shift, out + i64(lane / 4 + 8 * y) * columns, lane);
    }
  }

  // part[i]: the lane's share of the 8 cells from 8 i on.
  ELASTIC_FN static void store(float (&part)[32], float shift, float* out, int lane) {
    if constexpr (kBlockCells == 4) {  // lanes 0, 1 of a quad hold one block of the eight cells, lanes 2, 3 the other
      float half[16];
      halve<32, 1>(half, part, lane);
#pragma unroll
      for (int i = 0; i < 16; ++i) out[2 * ((lane & 1) * 16 + i) + (lane >> 1 & 1)] = shift + log2_approx(half[i]);
    } else {
      constexpr int kCount = kTileBlocks, kOwn = kCount / 4;
      if constexpr (kBlockCells == 16) {
#pragma unroll
        for (int i = 0; i < 16; ++i) part[i] = part[2 * i] + part[2 * i + 1];
      }
      float half[kCount / 2], own[kOwn];
      halve<kCount, 2>(half, part, lane);
      halve<kCount / 2, 1>(own, half, lane);
#pragma unroll
      for (int i = 0; i < kOwn; i += 4) {
        *(float4*)(out + (lane & 3) * kOwn + i) =
            make_float4(shift + log2_approx(own[i]), shift + log2_approx(own[i + 1]), shift + log2_approx(own[i + 2]),
                        shift + log2_approx(own[i + 3]));
      }
    }
  }

  // log2 of the softmax's denominator of row y; meaningless for a row that sees nothing.
  ELASTIC_FN float norm(int y, float scale_log2) const {
    return row_max[y] * scale_log2 + log2_approx(quad_sum(row_sum[y]));
  }
};

}  // namespace elastic
