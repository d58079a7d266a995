// The widest product of wgmma, 64 x 256: fewest reads of the first operand per operation. Operands as in wgmma.cuh.
#pragma once
#include "elastic/wgmma.cuh"

namespace elastic {

// d[64 x 256] = (add ? d : 0) + A[64 x 16] B[16 x 256], both K-major in shared memory.
ELASTIC_FN void wgmma_wide(float (&d)[128], u64 a, u64 b, int add) {
  asm volatile(
      "{\n .reg .pred p;\n setp.ne.b32 p, %130, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k16." ELASTIC_WGMMA_TYPES
      " {" ELASTIC_NAMES_128 "}, %128, %129, p, 1, 1, 0, 0;\n}"
      : ELASTIC_SUMS_32(0), ELASTIC_SUMS_32(32), ELASTIC_SUMS_32(64), ELASTIC_SUMS_32(96)
      : "l"(a), "l"(b), "r"(add));
}

}  // namespace elastic
