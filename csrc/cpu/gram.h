// H += X^T X, for the AVX-512 path alone: elsewhere torch's product is faster than portable code would be.
#pragma once

#include <cstdint>

#include "view.h"

namespace perp {

// Tokens x [tokens, columns] of bf16, f16 or f32, rows `stride` elements apart.
struct Tokens {
  const void* data;
  DType dtype;
  std::int64_t count;
  std::int64_t stride;
  std::int64_t columns;
};

// H [columns, columns] without gaps. Each product is formed once and added to both of its places, so that an H that was
// symmetric stays so to the bit. Sums are formed in fp32, by 128 products at a time. Requires use_avx512().
void gram(float* H, const Tokens& x);

}  // namespace perp
