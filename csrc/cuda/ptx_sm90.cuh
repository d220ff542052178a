// Instructions of sm_90 and sm_90a, one function each; see ptx.cuh.
#pragma once

#include "ptx.cuh"

#ifndef PERP_EMULATOR

#include "wgmma_sp.cuh"

namespace perp {

// --- mbarriers: a phase completes when as many arrivals as `count`, and as many bytes as were announced, have come

PERP_DEVICE void mbarrier_init(u32 barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

// Makes the initialisation visible to the copy engine; a barrier of the block has to follow for the other threads.
PERP_DEVICE void mbarrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

PERP_DEVICE void mbarrier_arrive(u32 barrier) {
  asm volatile("{ .reg .b64 state; mbarrier.arrive.shared::cta.b64 state, [%0]; }" ::"r"(barrier) : "memory");
}

// Arrives and announces `bytes`.
PERP_DEVICE void mbarrier_arrive_expect(u32 barrier, u32 bytes) {
  asm volatile("{ .reg .b64 state; mbarrier.arrive.expect_tx.shared::cta.b64 state, [%0], %1; }" ::"r"(barrier), "r"(bytes) : "memory");
}

// Arrives at the barrier at this address in block `rank` of the cluster, this one's own included.
PERP_DEVICE void mbarrier_arrive_at(u32 barrier, int rank) {
  asm volatile(
      "{ .reg .b32 there; mapa.shared::cluster.u32 there, %0, %1;\n\t"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there]; }" ::"r"(barrier), "r"(rank)
      : "memory");
}

// Returns once the phase of this parity has completed, with all that came before its arrivals, from whichever block of
// the cluster. try_wait sleeps in hardware for a while before it says no.
PERP_DEVICE void mbarrier_wait(u32 barrier, u32 parity) {
  u32 done;
  do {
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(done)
                 : "r"(barrier), "r"(parity)
                 : "memory");
  } while (!done);
}

// --- the copy engine: `bytes` (a multiple of 16, like both addresses) on their way, counted by `barrier` as they land

PERP_DEVICE void bulk_copy(u32 to, const void* from, u32 bytes, u32 barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}

// The same to these addresses of every block of the cluster whose bit is set in `blocks`, read once.
PERP_DEVICE void bulk_copy_to_all(u32 to, const void* from, u32 bytes, u32 barrier, u16 blocks) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], %4;" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier), "h"(blocks)
      : "memory");
}

// What this thread wrote (cp.async included, once waited for) becomes visible to the tensor cores and the copy engine,
// which reach shared memory by a proxy of their own.
PERP_DEVICE void async_proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// --- warp-group products

PERP_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
PERP_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
PERP_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Sums as they are after a wait: keeps the compiler from moving a use of them before it, which only the wait orders.
template <int N>
PERP_DEVICE void settled(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// --- clusters

PERP_DEVICE void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
}

// Four floats at `address` of this block's shared memory, but in block `rank` of the cluster.
PERP_DEVICE float4 load_cluster4(u32 address, int rank) {
  u32 there;
  float4 v;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(there) : "memory");
  return v;
}

}  // namespace perp

#endif
