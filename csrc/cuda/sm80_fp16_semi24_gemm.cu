#define PERP_TYPE Fp16
#define PERP_NAME(suffix) sm80_fp16_semi24_gemm_##suffix
#include "sm80_entries.cuh"
