// Two CTAs of a cluster: addresses in the other's shared memory, arrivals at its barriers, multicast loads, a mailbox.
#pragma once
#include "elastic/ptx_sm90.cuh"

namespace elastic {

ELASTIC_FN u32 cluster_rank() {
  u32 rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// Every thread of every CTA of the cluster; what they wrote before is visible behind it.
ELASTIC_FN void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\n barrier.cluster.wait.acquire;" ::: "memory");
}
ELASTIC_FN u32 in_cta(const void* pointer, u32 rank) {
  u32 address;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(pointer)), "r"(rank));
  return address;
}
ELASTIC_FN void arrive_in(u64* bar, u32 rank) {
  stress(5);
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(in_cta(bar, rank)) : "memory");
}

// One int at a time from CTA 0 to CTA 1.
struct Mailbox {
  u64 full, free;  // full: 1 arrival + 4 bytes, in CTA 1; free: 1 arrival, in CTA 0
  int letter;

  ELASTIC_FN void init() {
    barrier_init(&full, 1);
    barrier_init(&free, 1);
  }
  ELASTIC_FN void send(int x, u32 phase) {
    wait(&free, phase ^ 1);
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];" ::"r"(in_cta(&letter, 1)),
                 "r"(x), "r"(in_cta(&full, 1))
                 : "memory");
  }
  ELASTIC_FN int receive(u32 phase) {
    arrive_expect(&full, 4);
    wait(&full, phase);
    asm volatile("fence.acq_rel.cluster;" ::: "memory");
    const int x = *(volatile int*)&letter;
    arrive_in(&free, 0);
    return x;
  }
};

}  // namespace elastic
