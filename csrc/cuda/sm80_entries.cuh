// The kernels of sm80_semi24_gemm.cuh for PERP_TYPE under their names, PERP_NAME(suffix). Their shapes are in
// perp_kernels/cuda/plans.py too, which launches them. Included once for each type.

#include "sm80_semi24_gemm.cuh"

// The second number of __launch_bounds__ is the blocks that shall share a processor: it caps the registers.
#define PERP_SEMI24_GEMM(NAME, ROWS, TOKENS, WARPS_M, WARPS_N, STAGES, BLOCKS)                                          \
  extern "C" __global__ void __launch_bounds__(32 * WARPS_M * WARPS_N, BLOCKS)                                          \
      NAME(const unsigned char* values, const unsigned char* index, const unsigned short* x, long long x_stride,        \
           unsigned short* y, const void* bias, int bias_kind, int tokens, int outputs, int inputs, float* part_sums,   \
           int parts) {                                                                                                 \
    const perp::Product p{values, index, x, x_stride, y, bias, bias_kind, tokens, outputs, inputs};                     \
    perp::Semi24Gemm80<perp::PERP_TYPE, ROWS, TOKENS, WARPS_M, WARPS_N, STAGES>::launched(p, part_sums, parts);         \
  }

// Few tokens: 64 outputs a block, so that there are many; four warps of one strip each. Five stages of 7 KB, of which four
// are on their way: four such blocks, which fit an A100's 164 KB, keep over 100 KB of its reads under way.
PERP_SEMI24_GEMM(PERP_NAME(t16), 64, 16, 4, 1, 5, 4)
PERP_SEMI24_GEMM(PERP_NAME(t64), 64, 64, 4, 1, 4, 3)

// Many: 128 x 128, each of eight warps 32 x 64, which reads 24 operands from shared memory for 32 products. Three stages
// (75 KB) fit Ada's 99 KB, and twice an A100's 164.
PERP_SEMI24_GEMM(PERP_NAME(t128), 128, 128, 4, 2, 3, 2)

extern "C" __global__ void __launch_bounds__(256)
    PERP_NAME(sum)(unsigned short* y, const void* bias, int bias_kind, int tokens, int outputs, const float* part_sums, int parts) {
  const perp::Product p{nullptr, nullptr, nullptr, 0, y, bias, bias_kind, tokens, outputs, 0};
  perp::sum_parts<perp::PERP_TYPE>(p, part_sums, parts);
}

#undef PERP_SEMI24_GEMM
#undef PERP_NAME
#undef PERP_TYPE
