// The CTAs of a cluster as parts of one: their barrier, and stores into each other's shared memory. With one part, where
// there are no clusters (below compute capability 9.0), all of it is the CTA's own.
// Compile-time: ELASTIC_PARTS (8, else 1).
#pragma once
#include "elastic/ptx_sm80.cuh"

#if ELASTIC_PARTS > 1
#define ELASTIC_CLUSTER __cluster_dims__(ELASTIC_PARTS, 1, 1)
#else
#define ELASTIC_CLUSTER
#endif

namespace elastic {

ELASTIC_FN int part_of() {
#if ELASTIC_PARTS > 1
  u32 rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return int(rank);
#else
  return 0;
#endif
}

ELASTIC_FN void meet() {  // all threads of all parts
#if ELASTIC_PARTS > 1
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
}

#if ELASTIC_PARTS > 1
#define ELASTIC_SHARED ".shared::cluster"
#else
#define ELASTIC_SHARED ".shared"
#endif

// Where the same place lies in the shared memory of one part.
ELASTIC_FN u32 place_in(const float* local, int part) {
  u32 place = shared_address(local);
#if ELASTIC_PARTS > 1
  asm("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(place) : "r"(part));
#endif
  return place;
}

ELASTIC_FN void put(u32 place, float value) {
  asm volatile("st" ELASTIC_SHARED ".f32 [%0], %1;" ::"r"(place), "f"(value) : "memory");
}

ELASTIC_FN void put_four(u32 place, float a, float b, float c, float d) {
  asm volatile("st" ELASTIC_SHARED ".v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(place), "f"(a), "f"(b), "f"(c), "f"(d)
               : "memory");
}

}  // namespace elastic
