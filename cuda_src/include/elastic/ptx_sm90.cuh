// mbarriers, named barriers, TMA and proxy fences. Every wait goes through `wait`, which the debug builds instrument:
// ELASTIC_WATCHDOG traps with the barrier's address after two seconds; ELASTIC_STRESS sleeps a pseudo-random time.
#pragma once
#include "elastic/params.cuh"

namespace elastic {

constexpr u64 kEvictFirst = 0x12F0000000000000ull, kEvictLast = 0x14F0000000000000ull;

ELASTIC_FN u32 shared_address(const void* pointer) { return u32(__cvta_generic_to_shared(pointer)); }

ELASTIC_FN void stress(u32 salt) {
#if ELASTIC_STRESS
  u32 x = u32(clock64()) ^ (salt * 2654435761u) ^ (blockIdx.x << 7);
  x ^= x >> 13;
  x *= 0x5bd1e995u;
  x ^= x >> 15;
  if ((x & 7) == 0) __nanosleep((x >> 8) & 2047);
#endif
}

template <int kCount>
struct Ring {  // position in a ring of kCount slots, with its mbarrier phase
  int slot;
  u32 phase;
  ELASTIC_FN void advance() {
    if (++slot == kCount) {
      slot = 0;
      phase ^= 1;
    }
  }
};

ELASTIC_FN void barrier_init(u64* bar, u32 count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(bar)), "r"(count) : "memory");
}
ELASTIC_FN void arrive(u64* bar) {
  stress(2);
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(bar)) : "memory");
}
ELASTIC_FN void arrive_expect(u64* bar, u32 bytes) {
  stress(3);
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(bar)), "r"(bytes)
               : "memory");
}
ELASTIC_FN bool try_wait(u32 bar, u32 phase) {
  u32 done;
  asm volatile(
      "{\n .reg .pred p;\n mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n selp.u32 %0, 1, 0, p;\n}"
      : "=r"(done)
      : "r"(bar), "r"(phase)
      : "memory");
  return done;
}
ELASTIC_FN void wait(u64* bar, u32 phase) {
  const u32 address = shared_address(bar);
  stress(1);
#if ELASTIC_WATCHDOG
  u64 start, now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(start));
  while (!try_wait(address, phase)) {
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    if (now - start > 2000000000ull) {
      printf("block %d thread %d stuck at barrier 0x%x phase %u\n", blockIdx.x, threadIdx.x, address, phase);
      __trap();
    }
  }
#else
  while (!try_wait(address, phase)) {
  }
#endif
}
ELASTIC_FN void fence_barrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// Makes ordinary shared-memory writes visible to TMA and wgmma.
ELASTIC_FN void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

ELASTIC_FN void named_sync(int id, int threads) {
  stress(4);
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Box of a rank-4 map (head dim, token, head, batch row) into shared memory; bytes are counted on `bar`.
ELASTIC_FN void tma_load(const TensorMap& map, u64* bar, u32 shared, int d, int token, int head, int row, u64 hint) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(shared),
      "l"(&map), "r"(shared_address(bar)), "r"(d), "r"(token), "r"(head), "r"(row), "l"(hint)
      : "memory");
}
ELASTIC_FN void tma_store(const TensorMap& map, u32 shared, int d, int token, int head, int row) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(&map),
               "r"(shared), "r"(d), "r"(token), "r"(head), "r"(row)
               : "memory");
}
ELASTIC_FN void store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
ELASTIC_FN void store_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
ELASTIC_FN void store_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// Contiguous bytes (a multiple of 16) to shared memory, and fp32 sums from there into global memory.
ELASTIC_FN void bulk_load(u64* bar, u32 shared, const void* global, u32 bytes) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared),
               "l"(global), "r"(bytes), "r"(shared_address(bar))
               : "memory");
}
ELASTIC_FN void bulk_add(float* global, u32 shared, u32 bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(global), "r"(shared),
               "r"(bytes)
               : "memory");
}

// A counter in global memory that CTAs pass on in a fixed order.
ELASTIC_FN void await_turn(const int* at, int turn) {
  int now;
  do {
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(now) : "l"(at) : "memory");
  } while (now != turn);
}
ELASTIC_FN void pass_turn(int* at, int next) {
  asm volatile("fence.proxy.async;\n st.release.gpu.global.s32 [%0], %1;" ::"l"(at), "r"(next) : "memory");
}

ELASTIC_FN void store_matrix(u32 shared, u32 a, u32 b, u32 c, u32 d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(a), "r"(b),
               "r"(c), "r"(d)
               : "memory");
}

}  // namespace elastic
