// cp.async, ldmatrix and mma.sync for 16-bit operands.
#pragma once
#include "elastic/params.cuh"

namespace elastic {

ELASTIC_FN u32 shared_address(const void* pointer) { return u32(__cvta_generic_to_shared(pointer)); }

// 16 bytes, or zeros where `valid` is false.
ELASTIC_FN void copy_async(u32 shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(valid ? 16 : 0)
               : "memory");
}
ELASTIC_FN void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
ELASTIC_FN void copy_wait_all_but() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}
ELASTIC_FN void copy_wait() { copy_wait_all_but<0>(); }

// Where 16 bytes of a row lie: they are permuted inside each group of eight rows, so that ldmatrix meets no bank twice.
template <int kRowBytes>
ELASTIC_FN u32 swizzled(u32 tile, int row, int chunk) {
  return tile + row * kRowBytes + ((chunk ^ (row & 7)) << 4);
}

ELASTIC_FN void load_matrix(u32 (&r)[4], u32 shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared)
               : "memory");
}
ELASTIC_FN void load_matrix_transposed(u32 (&r)[4], u32 shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared)
               : "memory");
}

#if ELASTIC_BF16
#define ELASTIC_MMA "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
#else
#define ELASTIC_MMA "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
#endif

// c[0..3] += a * b, 16 x 8 x 16.
ELASTIC_FN void mma(float* c, const u32* a, u32 b0, u32 b1) {
  asm volatile(ELASTIC_MMA "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace elastic
