#define PERP_TYPE Bf16
#define PERP_NAME(suffix) sm90_bf16_semi24_gemm_##suffix
#include "sm90_entries.cuh"
