#include "cpu/linear_avx2.h"

#include <algorithm>

#include "cpu/decode_avx2.h"
#include "cpu/linear.h"
#include "cpu/scratch.h"

#if PERP_X86
namespace perp {
namespace {

// 4 rows x 3 tokens: 12 sums, 3 operands of x and 1 of the weight are the 16 registers.
constexpr int kTileRows = 4;
static_assert(kBlockTokensAvx2 == 3);

// A panel of 8 rows x 512 columns is 16 KB, half of L1; its two tiles share each part of x.
constexpr int kPanelRows = 8;
constexpr std::int64_t kDepth = 512;

// The sums of four registers' lanes.
PERP_AVX2 inline __m128 reduce4(__m256 a, __m256 b, __m256 c, __m256 d) {
  const __m256 abcd = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  return _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1));
}

// Eight columns of kRows rows with kTokens tokens.
template <class T, Layout kLayout, int kRows, int kTokens>
PERP_AVX2 inline __attribute__((always_inline)) void fused_step(Cursor<T, kLayout> (&cursors)[kRows], const float* x,
                                                                 __m256 (&sums)[kRows][kTokens]) {
  __m256 w[kRows];
#pragma GCC unroll 2
  for (int r = 0; r < kRows; ++r) w[r] = cursors[r].next();
#pragma GCC unroll 8
  for (int t = 0; t < kTokens; ++t) {
    const __m256 xv = _mm256_load_ps(x + 8 * t);
#pragma GCC unroll 2
    for (int r = 0; r < kRows; ++r) sums[r][t] = _mm256_fmadd_ps(w[r], xv, sums[r][t]);
  }
}

// kRows rows with kTokens tokens. As many sums per product as keep it from waiting on its own multiply-add; their number
// depends on kTokens alone, so that a row gives the same whichever rows go with it.
template <class T, Layout kLayout, int kRows, int kTokens>
PERP_AVX2 void fused(const Weight& weight, const LinearCall& call, const float* x, std::int64_t row, T* room) {
  constexpr int kSums = kTokens == 1 ? 4 : kTokens == 2 ? 2 : 1;
  constexpr int kUnroll = 4;
  Cursor<T, kLayout> cursors[kRows];
  __m256 sums[kSums][kRows][kTokens];
#pragma GCC unroll 2
  for (int r = 0; r < kRows; ++r) {
    cursors[r] = Cursor<T, kLayout>(weight, call.first_row + row + r, room + r * (weight.columns + kReadAhead));
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 4
      for (int s = 0; s < kSums; ++s) sums[s][r][t] = _mm256_setzero_ps();
    }
  }
  const std::int64_t steps = weight.index_stride();
  std::int64_t i = 0;
  for (; i + kUnroll <= steps; i += kUnroll, x += 8 * kUnroll * kTokens) {
#pragma GCC unroll 2
    for (int r = 0; r < kRows; ++r) cursors[r].prefetch();
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) fused_step(cursors, x + 8 * u * kTokens, sums[u % kSums]);
  }
  for (; i < steps; ++i, x += 8 * kTokens) fused_step(cursors, x, sums[0]);
#pragma GCC unroll 2
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) {
      __m256 sum = sums[0][r][t];
#pragma GCC unroll 4
      for (int s = 1; s < kSums; ++s) sum = _mm256_add_ps(sum, sums[s][r][t]);
      store<T>(call, row + r, t, _mm_cvtss_f32(reduce4(sum, sum, sum, sum)));
    }
  }
}

// Rows [begin, end) of the call with its kTokens tokens.
template <class T, Layout kLayout, int kTokens>
void fused_rows(const Weight& weight, const LinearCall& call, const float* x, std::int64_t begin, std::int64_t end) {
  // One token is bound by memory, which serves one row at a time best; more share each load of x between two rows, as
  // long as there is a register for each sum.
  constexpr int kRows = kTokens == 1 || kTokens > 6 ? 1 : 2;
  thread_local Scratch scratch;
  T* room = scratch.get<T>(kRows * (weight.columns + kReadAhead));
  std::int64_t r = begin;
  for (; r + kRows <= end; r += kRows) fused<T, kLayout, kRows, kTokens>(weight, call, x, r, room);
  for (; r < end; ++r) fused<T, kLayout, 1, kTokens>(weight, call, x, r, room);
}

// Adds to sums [kTokens, kPanelRows] the products over `steps` vectors of columns of four rows, `first` sets them.
template <int kTokens>
PERP_AVX2 void tile(const float* w, const float* x, std::int64_t steps, bool first, float* sums) {
  __m256 sum[kTileRows][kTokens];
#pragma GCC unroll 4
  for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 3
    for (int t = 0; t < kTokens; ++t) sum[r][t] = _mm256_setzero_ps();
  }
  for (std::int64_t s = 0; s < steps; ++s, w += 8 * kTileRows, x += 8 * kTokens) {
    __m256 xv[kTokens];
#pragma GCC unroll 3
    for (int t = 0; t < kTokens; ++t) xv[t] = _mm256_load_ps(x + 8 * t);
#pragma GCC unroll 4
    for (int r = 0; r < kTileRows; ++r) {
      const __m256 wv = _mm256_load_ps(w + 8 * r);
#pragma GCC unroll 3
      for (int t = 0; t < kTokens; ++t) sum[r][t] = _mm256_fmadd_ps(wv, xv[t], sum[r][t]);
    }
  }
#pragma GCC unroll 3
  for (int t = 0; t < kTokens; ++t, sums += kPanelRows) {
    const __m128 part = reduce4(sum[0][t], sum[1][t], sum[2][t], sum[3][t]);
    _mm_store_ps(sums, first ? part : _mm_add_ps(_mm_load_ps(sums), part));
  }
}

// A part of a panel with kTokens tokens.
template <int kTokens>
PERP_AVX2 void panel_tokens(const float* panel, std::int64_t rows, const float* x, std::int64_t steps, bool first,
                                 float* sums) {
  for (std::int64_t r = 0; r < rows; r += kTileRows) {
    tile<kTokens>(panel + r * 8 * steps, x, steps, first, sums + r);
  }
}

// `steps` vectors of a row to every kTileRows-th from `out` on; zeros after the `left` that the row still has.
template <class T, Layout kLayout>
PERP_AVX2 void decode(Cursor<T, kLayout>& cursor, std::int64_t left, std::int64_t steps, float* out) {
  const std::int64_t whole = std::clamp<std::int64_t>(left, 0, steps);
  std::int64_t s = 0;
  for (; s + 4 <= whole; s += 4) {
    cursor.prefetch();
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u, out += 8 * kTileRows) _mm256_store_ps(out, cursor.next());
  }
  for (; s < steps; ++s, out += 8 * kTileRows) _mm256_store_ps(out, s < whole ? cursor.next() : _mm256_setzero_ps());
}

// Rows [begin, end) of the call with all its tokens.
template <class T, Layout kLayout>
void panel_rows(const Weight& weight, const LinearCall& call, const float* x, std::int64_t begin, std::int64_t end) {
  thread_local Scratch rooms, all_sums;
  const std::int64_t width = padded(weight.columns), room_size = weight.columns + kReadAhead;
  T* room = rooms.get<T>(kPanelRows * room_size);
  float* sums = all_sums.get<float>(call.tokens * kPanelRows);
  alignas(64) float panel[kPanelRows * kDepth];
  Cursor<T, kLayout> cursors[kPanelRows];
  for (std::int64_t row = begin; row < end; row += kPanelRows) {
    // Rows that fill up the last tile repeat the last one; their sums are not stored.
    const std::int64_t count = std::min<std::int64_t>(kPanelRows, end - row);
    const std::int64_t rows = (count + kTileRows - 1) / kTileRows * kTileRows;
    for (std::int64_t r = 0; r < rows; ++r) {
      cursors[r] = Cursor<T, kLayout>(weight, call.first_row + row + std::min(r, count - 1), room + r * room_size);
    }
    for (std::int64_t j = 0; j < width; j += kDepth) {
      const std::int64_t steps = std::min(width - j, kDepth) / 8;
      for (std::int64_t r = 0; r < rows; ++r) {
        float* out = panel + (r / kTileRows * kTileRows * steps + r % kTileRows) * 8;
        decode(cursors[r], weight.index_stride() - j / 8, steps, out);
      }
      std::int64_t t = 0;
      for (; t + kBlockTokensAvx2 <= call.tokens; t += kBlockTokensAvx2) {
        panel_tokens<kBlockTokensAvx2>(panel, rows, x + t * width + j * kBlockTokensAvx2, steps, j == 0, sums + t * kPanelRows);
      }
      float* rest = sums + t * kPanelRows;
      if (call.tokens - t == 2) panel_tokens<2>(panel, rows, x + t * width + j * 2, steps, j == 0, rest);
      if (call.tokens - t == 1) panel_tokens<1>(panel, rows, x + t * width + j, steps, j == 0, rest);
    }
    for (std::int64_t t = 0; t < call.tokens; ++t) {
      for (std::int64_t r = 0; r < count; ++r) store<T>(call, row + r, t, sums[t * kPanelRows + r]);
    }
  }
}

template <class T, Layout kLayout>
void rows(const Weight& weight, const LinearCall& call, const float* x, std::int64_t begin, std::int64_t end) {
  switch (call.tokens) {
    case 1: return fused_rows<T, kLayout, 1>(weight, call, x, begin, end);
    case 2: return fused_rows<T, kLayout, 2>(weight, call, x, begin, end);
    case 3: return fused_rows<T, kLayout, 3>(weight, call, x, begin, end);
    case 4: return fused_rows<T, kLayout, 4>(weight, call, x, begin, end);
    case 5: return fused_rows<T, kLayout, 5>(weight, call, x, begin, end);
    case 6: return fused_rows<T, kLayout, 6>(weight, call, x, begin, end);
    case 7: return fused_rows<T, kLayout, 7>(weight, call, x, begin, end);
    case 8: return fused_rows<T, kLayout, 8>(weight, call, x, begin, end);
    default: return panel_rows<T, kLayout>(weight, call, x, begin, end);
  }
}

}  // namespace

template <class T>
RowsAvx2 rows_avx2(Layout layout) {
  return layout == Layout::dense    ? rows<T, Layout::dense>
         : layout == Layout::bitmap ? rows<T, Layout::bitmap>
                                    : rows<T, Layout::semi24>;
}

template RowsAvx2 rows_avx2<float>(Layout);
template RowsAvx2 rows_avx2<f16>(Layout);
template RowsAvx2 rows_avx2<bf16>(Layout);

}  // namespace perp
#endif
