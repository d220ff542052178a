// wgmma.mma_async.sp with float32 sums, for each number of tokens. Inline assembly wants its operands spelled out one by
// one, which is all that is long here.
#pragma once

#include "host_device.h"

namespace perp {

#define PERP_SUMS_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define PERP_SUMS_32                                                                   \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "             \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define PERP_SUMS_64                                                                   \
  PERP_SUMS_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, "   \
  "%45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

#define PERP_OPERANDS_8(d, i)                                                                         \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define PERP_OPERANDS_32(d, i) \
  PERP_OPERANDS_8(d, i), PERP_OPERANDS_8(d, i + 8), PERP_OPERANDS_8(d, i + 16), PERP_OPERANDS_8(d, i + 24)
#define PERP_OPERANDS_64(d, i) PERP_OPERANDS_32(d, i), PERP_OPERANDS_32(d, i + 32)

// %A .. %M are the numbers of the inputs, which follow the sums. scale-d is true: the sums are added to, never replaced;
// 1, 1, 0, 0: neither factor negated, both K-major. The selector has to be known to the assembler.
#define PERP_WGMMA_SP(TOKENS, TYPE, SUMS, A, B, M, S, OPERANDS)                                                      \
  asm volatile("{ .reg .pred p; setp.ne.b32 p, 1, 0; wgmma.mma_async.sp.sync.aligned.m64n" #TOKENS "k32.f32." TYPE   \
               "." TYPE " {" SUMS "}, " A ", " B ", " M ", " S ", p, 1, 1, 0, 0; }"                                  \
               : OPERANDS                                                                                            \
               : "l"(weight), "l"(tokens), "r"(index), "n"(SELECTOR))

// d [64, TOKENS] += W [64, 32] x^T [32, TOKENS], for a whole warp group. Asynchronous: between wgmma_fence and
// wgmma_wait, nothing may touch d or index.
template <class Type, int TOKENS, int SELECTOR>
__device__ __forceinline__ void wgmma_sp(float (&d)[TOKENS / 2], u64 weight, u64 tokens, u32 index) {
  static_assert(TOKENS == 16 || TOKENS == 64 || TOKENS == 128, "no wrapper for this number of tokens");
  if constexpr (TOKENS == 16 && Type::kBrain) {
    PERP_WGMMA_SP(16, "bf16", PERP_SUMS_8, "%8", "%9", "%10", "%11", PERP_OPERANDS_8(d, 0));
  } else if constexpr (TOKENS == 16) {
    PERP_WGMMA_SP(16, "f16", PERP_SUMS_8, "%8", "%9", "%10", "%11", PERP_OPERANDS_8(d, 0));
  } else if constexpr (TOKENS == 64 && Type::kBrain) {
    PERP_WGMMA_SP(64, "bf16", PERP_SUMS_32, "%32", "%33", "%34", "%35", PERP_OPERANDS_32(d, 0));
  } else if constexpr (TOKENS == 64) {
    PERP_WGMMA_SP(64, "f16", PERP_SUMS_32, "%32", "%33", "%34", "%35", PERP_OPERANDS_32(d, 0));
  } else if constexpr (Type::kBrain) {
    PERP_WGMMA_SP(128, "bf16", PERP_SUMS_64, "%64", "%65", "%66", "%67", PERP_OPERANDS_64(d, 0));
  } else {
    PERP_WGMMA_SP(128, "f16", PERP_SUMS_64, "%64", "%65", "%66", "%67", PERP_OPERANDS_64(d, 0));
  }
}

}  // namespace perp
