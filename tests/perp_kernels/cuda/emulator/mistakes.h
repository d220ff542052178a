// Small kernels, each of which makes one mistake that a GPU would not report.

#pragma once

#include "fragments.h"
#include "ptx_sm90.cuh"

namespace mistakes {

using namespace perp;

constexpr u32 kShared = 8192;
alignas(16) inline unsigned char device_memory[64];

inline void fill(u32 from, u32 bytes) {
  for (u32 at = from + thread_index() * 4; at < from + bytes; at += block_threads() * 4) store_shared(at, 0.0f);
}

// 128 threads: the operands of one product, written and (or not) fenced.
inline void product(bool fenced, u32 metadata) {
  const u32 base = shared_memory();
  fill(base, 4096 + 16 * 128);
  if (fenced) async_proxy_fence();
  block_sync();
  float sums[8] = {};
  wgmma_fence();
  wgmma_sp<Bf16, 16, 0>(sums, weight_descriptor(base, 0), token_descriptor(base + 4096, 0), metadata);
  wgmma_commit();
  wgmma_wait<0>();
}

inline void overwritten() {
  const u32 base = shared_memory();
  fill(base, 4096 + 16 * 128);
  async_proxy_fence();
  block_sync();
  float sums[8] = {};
  wgmma_fence();
  wgmma_sp<Bf16, 16, 0>(sums, weight_descriptor(base, 0), token_descriptor(base + 4096, 0), 0x44444444);
  wgmma_commit();
  cp_async16(base + thread_index() * 16, device_memory, true);  // before the product has been waited for
  wgmma_wait<0>();
}

inline void barriers(const char* what) {
  const u32 barrier = shared_memory();
  if (thread_index() == 0) mbarrier_init(barrier, 1);
  block_sync();
  if (*what == 'a') {
    mbarrier_arrive(barrier);  // every thread, where one was announced with bytes that never come
    mbarrier_arrive_expect(barrier, 16);
  } else if (thread_index() == 0) {
    mbarrier_arrive(barrier);
  }
  block_sync();
  if (*what == 'p' && thread_index() < 32) mbarrier_wait(barrier, 1);  // the phase after the one that completed
}

inline const std::map<std::string, std::function<void()>> kernels = {
    {"none", [] { product(true, 0x44444444); }},
    {"unfenced", [] { product(false, 0x44444444); }},
    {"metadata", [] { product(true, 0x44444454); }},
    {"overwritten", overwritten},
    {"unwaited",
     [] {
       cp_async16(shared_memory() + thread_index() * 16, device_memory, true);
       cp_async_commit();
       block_sync();
       load_shared(shared_memory());
     }},
    {"unwritten", [] { load_shared(shared_memory() + 64); }},
    {"stray", [] { cp_async16(shared_memory() + thread_index() * 16, device_memory + 64, true); }},
    {"misaligned", [] { cp_async16(shared_memory() + thread_index() * 16, device_memory + 8, true); }},
    {"beyond", [] { store_shared(shared_memory() + kShared, 0.0f); }},
    {"arrivals", [] { barriers("arrivals"); }},
    {"phase", [] { barriers("phase"); }},
    {"half_the_block", [] { if (thread_index() < 32) block_sync(); }},
    {"in_flight",
     [] {
       const u32 base = shared_memory();
       if (thread_index() == 0) {
         mbarrier_init(base, 1);
         mbarrier_arrive_expect(base, 200 * 16);
         for (int i = 1; i <= 200; ++i) bulk_copy(base + i * 16, device_memory, 16, base);
       }
     }},
};

}  // namespace mistakes
