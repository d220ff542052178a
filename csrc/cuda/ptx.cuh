// The instructions that CUDA C++ has no name for, one function each. Tests replace this header by a model of a block on
// the CPU (PERP_EMULATOR names it), so the kernels reach the hardware through these functions and nothing else.
#pragma once

#include "host_device.h"

#ifdef PERP_EMULATOR
#include PERP_EMULATOR
#else

#define PERP_DEVICE __device__ __forceinline__

namespace perp {

struct Bf16 {
  static constexpr bool kBrain = true;
};
struct Fp16 {
  static constexpr bool kBrain = false;
};

// --- where we are

PERP_DEVICE int thread_index() { return threadIdx.x; }
PERP_DEVICE int block_index() { return blockIdx.x; }
PERP_DEVICE int part_index() { return blockIdx.y; }
PERP_DEVICE int block_threads() { return blockDim.x; }

// The block's dynamic shared memory as a 32-bit shared address, aligned by hand where more than the 16 bytes that the
// language promises are needed, to the widest swizzle pattern unless told otherwise: launch with as many bytes more.
constexpr int kAlignment = 1024;
template <int ALIGNMENT = kAlignment>
PERP_DEVICE u32 shared_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return (static_cast<u32>(__cvta_generic_to_shared(memory)) + ALIGNMENT - 1) & ~static_cast<u32>(ALIGNMENT - 1);
}

// --- 16-bit floats, by instructions of sm_80 so that no header of the toolkit is needed

template <class Type>
PERP_DEVICE u32 round_pair(float low, float high) {
  u32 pair;
  if constexpr (Type::kBrain) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  }
  return pair;
}

template <class Type>
PERP_DEVICE float widen(u16 bits) {
  float wide;
  if constexpr (Type::kBrain) {
    wide = __uint_as_float(static_cast<u32>(bits) << 16);
  } else {
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(bits));
  }
  return wide;
}

// Stays in its register: the compiler would otherwise compute it anew wherever a predicate asks for it.
PERP_DEVICE void hold(u32& value) { asm volatile("" : "+r"(value)); }
template <class T>
PERP_DEVICE void hold(T*& pointer) {
  asm volatile("" : "+l"(pointer));
}

// --- device memory that no kernel writes while it is read, through the cache for it

template <class T>
PERP_DEVICE T load_constant(const T* from) {
  return __ldg(from);
}

// --- shared memory

PERP_DEVICE u32 load_shared(u32 address) {
  u32 word;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(address) : "memory");
  return word;
}

PERP_DEVICE uint2 load_shared2(u32 address) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address) : "memory");
  return v;
}

// 16 bits, or 0 where `wanted` is 0: those lanes make no request and wait for no bank.
PERP_DEVICE u32 load_shared16(u32 address, u32 wanted) {
  u32 half;
  asm volatile("{ .reg .pred p; setp.ne.u32 p, %2, 0; mov.b32 %0, 0; @p ld.shared.u16 %0, [%1]; }" : "=&r"(half) : "r"(address), "r"(wanted) : "memory");
  return half;
}

PERP_DEVICE float4 load_shared4(u32 address) {
  float4 v;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(address) : "memory");
  return v;
}

PERP_DEVICE void store_shared(u32 address, float value) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
}

PERP_DEVICE void store_shared2(u32 address, uint2 value) {
  asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(address), "r"(value.x), "r"(value.y) : "memory");
}

PERP_DEVICE void store_shared16(u32 address, u16 value) {
  asm volatile("st.shared.u16 [%0], %1;" ::"r"(address), "h"(value) : "memory");
}

PERP_DEVICE void ldmatrix4(u32 (&r)[4], u32 row_address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row_address)
               : "memory");
}

// --- asynchronous copies by each thread (sm_80)

// 16 bytes to shared memory past the L1 cache; where not `inside`, nothing is read and zeros are written.
PERP_DEVICE void cp_async16(u32 to, const void* from, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(inside ? 16 : 0) : "memory");
}
PERP_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
PERP_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// --- barriers

PERP_DEVICE void block_sync() { __syncthreads(); }
PERP_DEVICE void warp_sync() { __syncwarp(); }
// Barrier `id` 1..15 among the `threads` that call it.
PERP_DEVICE void named_sync(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

// --- within a warp

PERP_DEVICE int count_bits(u32 word) { return __popc(word); }

// Two 16-bit halves, each alone in its word, as one: by the multiplier, which has less to do here than the adders.
PERP_DEVICE u32 join_halves(u32 low, u32 high) {
  u32 pair;
  asm("mad.lo.u32 %0, %1, 65536, %2;" : "=r"(pair) : "r"(high), "r"(low));
  return pair;
}

// `value` and that of the lane `by` below in each WIDTH lanes, where there is one.
template <int WIDTH>
PERP_DEVICE int add_from_below(int value, int by) {
  int sum;
  asm volatile(
      "{ .reg .pred there; .reg .s32 below; shfl.sync.up.b32 below|there, %1, %2, %3, 0xFFFFFFFF;\n\t"
      "mov.s32 %0, %1; @there add.s32 %0, %1, below; }"
      : "=&r"(sum)
      : "r"(value), "r"(by), "n"((32 - WIDTH) << 8));
  return sum;
}

// From lane `from` of each WIDTH lanes.
template <int WIDTH>
PERP_DEVICE int shuffle(int value, int from) {
  return __shfl_sync(0xFFFFFFFF, value, from, WIDTH);
}

// --- products (sm_80)

// d [16, 8] += W [16, 16] x^T [16, 8].
template <class Type>
PERP_DEVICE void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  if constexpr (Type::kBrain) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// d [16, 8] += W [16, 32] x^T [32, 8]. Ordered metadata says p0 < p1, which semi24 keeps; newer GPUs run it faster.
template <class Type, int SELECTOR>
PERP_DEVICE void mma_sp(float (&d)[4], const u32 (&a)[4], const u32 (&b)[4], u32 index) {
  if constexpr (Type::kBrain) {
    asm volatile(
        "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(index), "n"(SELECTOR));
  } else {
    asm volatile(
        "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(index), "n"(SELECTOR));
  }
}

}  // namespace perp

#endif
