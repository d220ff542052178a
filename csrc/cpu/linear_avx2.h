// sparse_linear for AVX2: few tokens straight from the packed form, more from a panel of rows decoded into L1.
#pragma once

#include "cpu/sparse_linear.h"

namespace perp {

constexpr std::int64_t kFusedTokensAvx2 = 8;
constexpr std::int64_t kBlockTokensAvx2 = 3;

// x is given widened, in blocks of this many tokens, eight columns of each in turn.
inline std::int64_t block_tokens_avx2(std::int64_t tokens) {
  return tokens <= kFusedTokensAvx2 ? tokens : kBlockTokensAvx2;
}

// The kernel that multiplies the rows [begin, end) of a call by all its tokens. T: bf16, f16 or float.
using RowsAvx2 = void (*)(const Weight& weight, const LinearCall& call, const float* x, std::int64_t begin, std::int64_t end);
template <class T>
RowsAvx2 rows_avx2(Layout layout);

}  // namespace perp
