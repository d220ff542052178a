#define PERP_TYPE Fp16
#define PERP_NAME(suffix) sm80_fp16_bitmap_linear_##suffix
#include "bitmap_entries.cuh"
