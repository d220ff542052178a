#define PERP_TYPE Bf16
#define PERP_NAME(suffix) sm80_bf16_semi24_gemm_##suffix
#include "sm80_entries.cuh"
