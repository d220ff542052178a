#define PERP_TYPE Fp16
#define PERP_NAME(suffix) sm90_fp16_semi24_gemm_##suffix
#include "sm90_entries.cuh"
