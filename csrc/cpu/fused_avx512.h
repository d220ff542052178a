// Few tokens: rows multiplied straight from their packed form, as fast as memory gives it.
#pragma once

#include "cpu/decode_avx512.h"
#include "cpu/linear.h"

#if PERP_X86
namespace perp {

// kRows rows with kTokens tokens. Up to 4 / kTokens sums per product, added at the end, keep one row and token from
// waiting on the latency of its own multiply-add.
template <class T, Layout kLayout, int kRows, int kTokens>
PERP_AVX512 void fused(const Weight& weight, const LinearCall& call, const typename Codec<T>::X* x, std::int64_t row) {
  using C = Codec<T>;
  constexpr int kSums = kTokens >= 4 ? 1 : 4 / kTokens;
  Prefetcher<T, kLayout> ahead(weight, call.first_row + row, kRows);
  RowCursor<T, kLayout> cursors[kRows];
  __m512 sums[kRows][kTokens][kSums];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    cursors[r] = RowCursor<T, kLayout>(weight, call.first_row + row + r);
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 8
      for (int s = 0; s < kSums; ++s) sums[r][t][s] = _mm512_setzero_ps();
    }
  }
  for (std::int64_t j = 0; j < weight.columns; j += kBlock) {
    ahead.block(kRows);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) cursors[r].block();
#pragma GCC unroll 8
    for (int v = 0; v < kBlock / C::kLanes; ++v) {
      __m512i w[kRows];
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) w[r] = cursors[r].vector(v);
#pragma GCC unroll 8
      for (int t = 0; t < kTokens; ++t) {
        const __m512i xv = _mm512_load_si512(x + (v * kTokens + t) * C::kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) sums[r][t][v % kSums] = C::fma(w[r], xv, sums[r][t][v % kSums]);
      }
    }
    x += kBlock * kTokens;
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) {
      __m512 sum = sums[r][t][0];
#pragma GCC unroll 8
      for (int s = 1; s < kSums; ++s) sum = _mm512_add_ps(sum, sums[r][t][s]);
      store<T>(call, row + r, t, _mm512_reduce_add_ps(sum));
    }
  }
}

// Rows [begin, end) of the call with its kTokens tokens.
template <class T, Layout kLayout, int kTokens>
void fused_rows(const Weight& weight, const LinearCall& call, const typename Codec<T>::X* x, std::int64_t begin,
                std::int64_t end) {
  // Up to three tokens the time is the memory's, which serves one row at a time best. More tokens share each load of x
  // among rows, as many as leave a register for each sum (measured at 4096 x 4096).
  constexpr int kRows = kTokens <= 3 ? 1 : kTokens <= 6 ? 4 : 3;
  std::int64_t r = begin;
  for (; r + kRows <= end; r += kRows) fused<T, kLayout, kRows, kTokens>(weight, call, x, r);
  for (; r < end; ++r) fused<T, kLayout, 1, kTokens>(weight, call, x, r);
}

}  // namespace perp
#endif
