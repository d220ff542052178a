#define PERP_TYPE Bf16
#define PERP_NAME(suffix) sm80_bf16_bitmap_linear_##suffix
#include "bitmap_entries.cuh"
