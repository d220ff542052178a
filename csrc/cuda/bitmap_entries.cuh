// The kernels of bitmap_linear.cuh for PERP_TYPE under their names, PERP_NAME(suffix). Their shapes are in
// perp_kernels/cuda/bitmap_plans.py too, which launches them. Included once for each type.

#include "bitmap_linear.cuh"

#define PERP_BITMAP_LINEAR(NAME, TOKENS, ROWS, COLUMNS, STAGES)                                                         \
  extern "C" __global__ void __launch_bounds__(256, 2)                                                                  \
      NAME(const unsigned short* values, const unsigned int* index, const long long* row_ptr, long long values_in_row, \
           long long values_in_all, const unsigned short* x, long long x_stride, unsigned short* y, const void* bias,   \
           int bias_kind, int tokens, int outputs, int inputs, float* part_sums, int parts) {                           \
    const perp::Bitmap w{values, index, row_ptr, values_in_row, values_in_all, outputs, inputs};                        \
    const perp::Product p{nullptr, nullptr, x, x_stride, y, bias, bias_kind, tokens, outputs, inputs};                  \
    perp::BitmapLinear<perp::PERP_TYPE, TOKENS, ROWS, COLUMNS, STAGES>::launched(w, p, part_sums, parts);               \
  }

// Eight warps, and steps that keep 8 KB of a weight pruned by half. A block of 32 outputs reads the tokens half as often
// as one of 16, from L2 and from shared memory; that of 16, the fewest that mma takes, is for layers of too few outputs
// to fill a GPU otherwise, and 16 tokens would be 2 bytes a weight there. Four stages fit Hopper twice (2 x 109 KB) and
// keep 48 KB of values under way on a processor; three fit an A100 twice, and Ada's 99 KB once.
PERP_BITMAP_LINEAR(PERP_NAME(t8_r16_s3), 8, 16, 512, 3)
PERP_BITMAP_LINEAR(PERP_NAME(t8_r16_s4), 8, 16, 512, 4)
PERP_BITMAP_LINEAR(PERP_NAME(t8_r32_s3), 8, 32, 256, 3)
PERP_BITMAP_LINEAR(PERP_NAME(t8_r32_s4), 8, 32, 256, 4)
PERP_BITMAP_LINEAR(PERP_NAME(t16_r32_s3), 16, 32, 256, 3)
PERP_BITMAP_LINEAR(PERP_NAME(t16_r32_s4), 16, 32, 256, 4)

extern "C" __global__ void __launch_bounds__(256)
    PERP_NAME(sum)(unsigned short* y, const void* bias, int bias_kind, int tokens, int outputs, const float* part_sums, int parts) {
  const perp::Product p{nullptr, nullptr, nullptr, 0, y, bias, bias_kind, tokens, outputs, 0};
  perp::sum_parts<perp::PERP_TYPE>(p, part_sums, parts);
}

#undef PERP_BITMAP_LINEAR
#undef PERP_NAME
#undef PERP_TYPE
