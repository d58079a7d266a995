// wgmma: shared-memory descriptors and the three instruction shapes that attention needs. Operands are 16-bit, tiles
// lie in shared memory as [D / 64][rows][64] under the 128-byte swizzle, accumulators are fp32.
#pragma once
#include "elastic/params.cuh"

#if ELASTIC_BF16
#define ELASTIC_WGMMA_TYPES "f32.bf16.bf16"
#else
#define ELASTIC_WGMMA_TYPES "f32.f16.f16"
#endif

// The accumulator's registers by number in the instruction's text, and as its operands.
#define ELASTIC_NAMES_32 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
  "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define ELASTIC_NAMES_64 \
  ELASTIC_NAMES_32 ", " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, " \
  "%52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define ELASTIC_NAMES_128 \
  ELASTIC_NAMES_64 ", " \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, " \
  "%84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, " \
  "%103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, " \
  "%119, %120, %121, %122, %123, %124, %125, %126, %127"
#define ELASTIC_SUMS_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define ELASTIC_SUMS_16(i) ELASTIC_SUMS_4(i), ELASTIC_SUMS_4(i + 4), ELASTIC_SUMS_4(i + 8), ELASTIC_SUMS_4(i + 12)
#define ELASTIC_SUMS_32(i) ELASTIC_SUMS_16(i), ELASTIC_SUMS_16(i + 16)

namespace elastic {

// Descriptor fields: address / 16 in bits 0-13, leading offset / 16 in 16-29, stride offset / 16 in 32-45 (1024 bytes:
// eight rows), 128-byte swizzle in 62-63.
constexpr u64 kDescK = 0x4000004000010000ull;                       // K-major: Q and K
constexpr u64 kDescV = 0x4000004000000000ull;                       // MN-major, 64 columns
constexpr u64 kDescVWide = kDescV | (u64(16384 / 16) << 16);        // MN-major, next 64 columns after 128 rows
constexpr u64 kDescVNarrow = kDescV | (u64(8192 / 16) << 16);       // MN-major, next 64 columns after 64 rows
ELASTIC_FN u64 descriptor(u64 kind, u32 shared) { return kind | ((shared & 0x3ffff) >> 4); }

ELASTIC_FN void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
ELASTIC_FN void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
ELASTIC_FN void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Pins values in place: no arithmetic on them moves across.
template <int kCount>
ELASTIC_FN void pin(float (&x)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(x[i])::"memory");
}

// d[64 x columns] = (kAdd ? d : 0) + A[64 x 16] B[16 x columns], both from shared memory, each K-major or (1) MN-major.
// `names` are the accumulator's registers; a, b, add and the majors are the operands after them, by number.
#define ELASTIC_WGMMA_SS(columns, names, a, b, add, major_a, major_b) \
  "{\n .reg .pred p;\n setp.ne.b32 p, " add ", 0;\n" \
  "wgmma.mma_async.sync.aligned.m64n" columns "k16." ELASTIC_WGMMA_TYPES \
  " {" names "}, " a ", " b ", p, 1, 1, " major_a ", " major_b ";\n}"

template <int kAdd, int kMajorA, int kMajorB>
ELASTIC_FN void wgmma_ss(float (&d)[64], u64 a, u64 b) {
  asm volatile(ELASTIC_WGMMA_SS("128", ELASTIC_NAMES_64, "%64", "%65", "%66", "%67", "%68")
               : ELASTIC_SUMS_32(0), ELASTIC_SUMS_32(32)
               : "l"(a), "l"(b), "n"(kAdd), "n"(kMajorA), "n"(kMajorB));
}
template <int kAdd, int kMajorA, int kMajorB>
ELASTIC_FN void wgmma_ss(float (&d)[32], u64 a, u64 b) {
  asm volatile(ELASTIC_WGMMA_SS("64", ELASTIC_NAMES_32, "%32", "%33", "%34", "%35", "%36")
               : ELASTIC_SUMS_32(0)
               : "l"(a), "l"(b), "n"(kAdd), "n"(kMajorA), "n"(kMajorB));
}

// d[64 x 64] += A[64 x 16] B[16 x 64], A from registers, B MN-major in shared memory.
ELASTIC_FN void wgmma_rs(float (&d)[32], u32 a0, u32 a1, u32 a2, u32 a3, u64 b) {
  asm volatile(
      "{\n .reg .pred p;\n setp.ne.b32 p, %37, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16." ELASTIC_WGMMA_TYPES
      " {" ELASTIC_NAMES_32 "}, {%32, %33, %34, %35}, %36, p, 1, 1, 1;\n}"
      : ELASTIC_SUMS_32(0)
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "n"(1));
}

// d[64 x 128] += A[64 x 16] B[16 x 128], A from registers, B MN-major in shared memory.
ELASTIC_FN void wgmma_rs(float (&d)[64], u32 a0, u32 a1, u32 a2, u32 a3, u64 b) {
  asm volatile(
      "{\n .reg .pred p;\n setp.ne.b32 p, %69, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16." ELASTIC_WGMMA_TYPES
      " {" ELASTIC_NAMES_64 "}, {%64, %65, %66, %67}, %68, p, 1, 1, 1;\n}"
      : ELASTIC_SUMS_32(0), ELASTIC_SUMS_32(32)
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "n"(1));
}

}  // namespace elastic
