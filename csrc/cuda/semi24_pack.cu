// The kernels of semi24_pack.cuh under their names; each runs a block of 128 threads for every tile.

#include "semi24_pack.cuh"

extern "C" __global__ void __launch_bounds__(128)
    semi24_compress(unsigned char* values, unsigned char* index, const unsigned short* dense, long long row_stride,
                    const unsigned char* bits, int outputs, int inputs) {
  perp::compress({values, index, outputs, inputs}, dense, row_stride, bits);
}

extern "C" __global__ void __launch_bounds__(128)
    semi24_repack(unsigned char* values, unsigned char* index, const unsigned short* dense, long long row_stride, int outputs,
                  int inputs) {
  perp::repack({values, index, outputs, inputs}, dense, row_stride);
}

#define PERP_ADD_LOWRANK(NAME, TYPE)                                                                                    \
  extern "C" __global__ void __launch_bounds__(128)                                                                     \
      NAME(unsigned char* values, unsigned char* index, const float* A, const float* B, int rank, float scale,          \
           unsigned char* to, int outputs, int inputs) {                                                                \
    perp::add_lowrank<perp::TYPE>({values, index, outputs, inputs}, A, B, rank, scale, to);                             \
  }

PERP_ADD_LOWRANK(semi24_add_lowrank_bf16, Bf16)
PERP_ADD_LOWRANK(semi24_add_lowrank_fp16, Fp16)
