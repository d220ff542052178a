// The kernels of sm90_semi24_gemm.cuh for PERP_TYPE under their names, PERP_NAME(suffix). Their shapes are in
// perp_kernels/cuda/plans.py too, which launches them. Included once for each type.

#include "sm90_semi24_gemm.cuh"

#define PERP_SEMI24_GEMM(NAME, TOKENS, TILES, STAGES, PARTS, SHARERS, BLOCKS, CLUSTER)                                  \
  extern "C" __global__ void CLUSTER __launch_bounds__(384, BLOCKS)                                                     \
      NAME(const unsigned char* values, const unsigned char* index, const unsigned short* x, long long x_stride,        \
           unsigned short* y, const void* bias, int bias_kind, int tokens, int outputs, int inputs) {                   \
    const perp::Product p{values, index, x, x_stride, y, bias, bias_kind, tokens, outputs, inputs};                     \
    perp::Semi24Gemm90<perp::PERP_TYPE, TOKENS, TILES, STAGES, PARTS, SHARERS>::launched(p);                            \
  }

// Few tokens, bound by the bytes of the weight: 128 outputs a block, since 64 would read the tokens twice as often from
// L2. Two blocks a processor, so that one's start and end hide behind the other; their rings hold 147 KB (16 tokens) or
// 110 KB (64) of weight, many times what must be under way to keep memory busy (3 TB/s x 1 us / 132 = 23 KB).
PERP_SEMI24_GEMM(PERP_NAME(t16_p2), 16, 1, 8, 2, 1, 2, __cluster_dims__(2))
PERP_SEMI24_GEMM(PERP_NAME(t16_p4), 16, 1, 8, 4, 1, 2, __cluster_dims__(4))
PERP_SEMI24_GEMM(PERP_NAME(t64_p2), 64, 1, 6, 2, 1, 2, __cluster_dims__(2))
PERP_SEMI24_GEMM(PERP_NAME(t64_p4), 64, 1, 6, 4, 1, 2, __cluster_dims__(4))

// 65 to some hundreds of tokens: blocks of 128 x 128, over four parts of the inputs while they are too few.
PERP_SEMI24_GEMM(PERP_NAME(t128_p4), 128, 1, 6, 4, 1, 1, __cluster_dims__(4))
PERP_SEMI24_GEMM(PERP_NAME(t128_p1), 128, 1, 6, 1, 1, 1, )

// Many: 256 outputs x 128 tokens. Each input costs 256 * 1.125 + 128 * 2 = 544 bytes from L2, against 656 for 128 x 256,
// since a 2:4 weight is the cheaper side. 128 sums a thread and six stages (204 KB) fill the processor.
PERP_SEMI24_GEMM(PERP_NAME(t128_wide), 128, 2, 6, 1, 1, 1, )

// The same in pairs that share the weight: 256 * 1.125 / 2 + 128 * 2 = 400 bytes.
PERP_SEMI24_GEMM(PERP_NAME(t128_pair), 128, 2, 6, 1, 2, 1, __cluster_dims__(2))

#undef PERP_SEMI24_GEMM
#undef PERP_NAME
#undef PERP_TYPE
