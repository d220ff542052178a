// Many tokens: panels of rows decoded into L2 once and multiplied there with every token.
#pragma once

#include <algorithm>
#include <cstring>

#include "cpu/decode_avx512.h"
#include "cpu/linear.h"
#include "cpu/reduce_avx512.h"
#include "cpu/scratch.h"

#if PERP_X86
namespace perp {

// 4 rows x 6 tokens: 24 sums, 4 operands of the weight and 1 of x are 29 of the 32 registers.
constexpr int kTileRows = 4;
constexpr int kPanelRows = 32;

// Bytes of a row that one pass over a panel multiplies. Fewer would keep 6 tokens' share of x in L1, but the sums between
// passes then cost more than L2 does.
constexpr std::int64_t kDepthBytes = 8192;

// A quarter of a megabyte of decoded rows stays in L2 beside the tokens they are multiplied with.
constexpr std::int64_t kPanelBytes = 256 * 1024;

// A run of memory to be fetched a cache line per step, some lines in each tile.
struct Ahead {
  const char* next;
  const char* end;

  // The line to begin a tile of `lines` steps with, and the distance of its lines: 0 when nothing is left to fetch.
  std::int64_t take(std::int64_t lines, const char*& begin) {
    begin = next;
    if (next >= end) return 0;
    next += 64 * lines;
    return 64;
  }
};

PERP_AVX512 inline __m128 load4(const float* p) { return _mm_loadu_ps(p); }
PERP_AVX512 inline __m128 load4(const f16* p) { return _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))); }
PERP_AVX512 inline __m128 load4(const bf16* p) {
  return _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))), 16));
}
PERP_AVX512 inline void store4(float* p, __m128 v) { _mm_storeu_ps(p, v); }
PERP_AVX512 inline void store4(f16* p, __m128 v) {
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
// Not by cvtneps, which makes zeros of denormals: what is stored must not depend on which of four rows a row is.
PERP_AVX512 inline void store4(bf16* p, __m128 v) {
  const __m128i bits = _mm_castps_si128(v), high = _mm_srli_epi32(bits, 16);
  const __m128i even = _mm_and_si128(high, _mm_set1_epi32(1));
  const __m128i rounded = _mm_srli_epi32(_mm_add_epi32(bits, _mm_add_epi32(even, _mm_set1_epi32(0x7fff))), 16);
  const __m128i quiet = _mm_or_si128(high, _mm_set1_epi32(0x40));
  const __m128i result = _mm_mask_mov_epi32(rounded, _mm_cmp_ps_mask(v, v, _CMP_UNORD_Q), quiet);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_cvtepi32_epi16(result));
}

// store() for `count` consecutive rows, at most four.
template <class T>
PERP_AVX512 void store_rows(const LinearCall& call, std::int64_t row, std::int64_t count, std::int64_t token, __m128 sums) {
  if (count < 4) {
    for (std::int64_t i = 0; i < count; ++i) store<T>(call, row + i, token, sums[i]);
    return;
  }
  if (call.bias != nullptr) {
    sums = _mm_add_ps(sums, call.bias_is_float ? load4(static_cast<const float*>(call.bias) + row)
                                               : load4(static_cast<const T*>(call.bias) + row));
  }
  store4(static_cast<T*>(call.y) + token * call.y_stride + row, sums);
}

// Where a tile stands: rows [row, row + rows) of the call and the tokens from `token` on, in the first or last of the
// passes over its columns or both. Between passes its sums are in `sums`.
struct Place {
  std::int64_t row, rows, token;
  bool first, last;
  float* sums;
};

// `steps` vectors of columns of kTileRows decoded rows with kTokens tokens.
template <class T, int kTokens>
PERP_AVX512 void tile(const LinearCall& call, const Place& place, const typename Codec<T>::X* w,
                      const typename Codec<T>::X* x, std::int64_t steps, Ahead& values, Ahead& tokens) {
  static_assert(kTileRows == 4);
  using C = Codec<T>;
  constexpr int kLanes = 64 / sizeof(typename C::X);
  const char *value_line, *token_line;
  const std::int64_t value_stride = values.take(steps, value_line), token_stride = tokens.take(steps, token_line);
  __m512 sum[kTileRows][kTokens];
#pragma GCC unroll 4
  for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 6
    for (int t = 0; t < kTokens; ++t) {
      sum[r][t] = place.first ? _mm512_setzero_ps() : _mm512_load_ps(place.sums + 16 * (r * kTokens + t));
    }
  }
  for (std::int64_t s = 0; s < steps; ++s) {
    _mm_prefetch(value_line, _MM_HINT_T1);
    _mm_prefetch(token_line, _MM_HINT_T0);
    value_line += value_stride;
    token_line += token_stride;
    __m512i rows[kTileRows];
#pragma GCC unroll 4
    for (int r = 0; r < kTileRows; ++r) rows[r] = _mm512_load_si512(w + r * kLanes);
#pragma GCC unroll 6
    for (int t = 0; t < kTokens; ++t) {
      const __m512i xv = _mm512_load_si512(x + t * kLanes);
#pragma GCC unroll 4
      for (int r = 0; r < kTileRows; ++r) sum[r][t] = C::fma(rows[r], xv, sum[r][t]);
    }
    w += kTileRows * kLanes;
    x += kTokens * kLanes;
  }
  if (place.last) {
#pragma GCC unroll 6
    for (int t = 0; t < kTokens; ++t) {
      store_rows<T>(call, place.row, place.rows, place.token + t, reduce4(sum[0][t], sum[1][t], sum[2][t], sum[3][t]));
    }
    return;
  }
#pragma GCC unroll 4
  for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 6
    for (int t = 0; t < kTokens; ++t) _mm512_store_ps(place.sums + 16 * (r * kTokens + t), sum[r][t]);
  }
}

// Decodes one row to every kTileRows-th vector from `out` on.
template <class T, Layout kLayout>
PERP_AVX512 void decode(const Weight& weight, std::int64_t row, typename Codec<T>::X* out) {
  using C = Codec<T>;
  constexpr int kAhead = 8;
  RowCursor<T, kLayout> cursor(weight, row);
  for (std::int64_t j = 0; j < weight.columns; j += kBlock) {
    cursor.block();
#pragma GCC unroll 8
    for (int v = 0; v < kBlock / C::kLanes; ++v) {
      // Stores leave in order, so each would wait for its line to come from L2.
      _mm_prefetch(reinterpret_cast<const char*>(out + (v + kAhead) * kTileRows * C::kLanes), _MM_HINT_T0);
      _mm512_store_si512(out + v * kTileRows * C::kLanes, cursor.vector(v));
    }
    out += kTileRows * kBlock;
  }
}

// Decoded rows [first, first + count) of the call with the block of kTokens tokens from `token` on.
template <class T, int kTokens>
PERP_AVX512 void panel_block(const LinearCall& call, const typename Codec<T>::X* panel, std::int64_t first,
                             std::int64_t count, const typename Codec<T>::X* x, std::int64_t width, std::int64_t token,
                             Ahead& values) {
  using X = typename Codec<T>::X;
  constexpr std::int64_t kDepth = kDepthBytes / sizeof(X), kLanes = 64 / sizeof(X);
  alignas(64) float sums[kPanelRows / kTileRows][16 * kTileRows * kTokens];
  for (std::int64_t j = 0; j < width; j += kDepth) {
    const std::int64_t depth = std::min(width - j, kDepth);
    const X* part = x + j * kTokens;
    // The part of x after this one comes into L1 meanwhile; it follows in memory, also from block to block.
    Ahead tokens{reinterpret_cast<const char*>(part + depth * kTokens), reinterpret_cast<const char*>(part + 2 * depth * kTokens)};
    for (std::int64_t r = 0; r < count; r += kTileRows) {
      const Place place{first + r, std::min<std::int64_t>(count - r, kTileRows), token, j == 0, j + depth == width, sums[r / kTileRows]};
      tile<T, kTokens>(call, place, panel + r * width + j * kTileRows, part, depth / kLanes, values, tokens);
    }
  }
}

// Rows [begin, end) of the call with all its tokens.
template <class T, Layout kLayout>
void panel_rows(const Weight& weight, const LinearCall& call, const typename Codec<T>::X* x, std::int64_t begin,
                std::int64_t end) {
  using X = typename Codec<T>::X;
  thread_local Scratch scratch;
  const std::int64_t width = padded(weight.columns);
  const std::int64_t fitting = kPanelBytes / (width * static_cast<int>(sizeof(X))) / kTileRows * kTileRows;
  const std::int64_t rows = std::clamp<std::int64_t>(fitting, kTileRows, kPanelRows);
  X* panel = scratch.get<X>(rows * width);
  constexpr std::int64_t kLanes = 64 / sizeof(X);
  for (std::int64_t first = begin; first < end; first += rows) {
    const std::int64_t count = std::min(rows, end - first);
    // Rows that fill up the last tile hold whatever was decoded there before: their sums are not stored. But a NaN from
    // memory never written would be slow, so they repeat the last row.
    for (std::int64_t r = 0; r < (count + kTileRows - 1) / kTileRows * kTileRows; ++r) {
      decode<T, kLayout>(weight, call.first_row + first + std::min(r, count - 1),
                         panel + r / kTileRows * kTileRows * width + r % kTileRows * kLanes);
    }
    // The next panel's values come in while this one is multiplied.
    const std::int64_t next = call.first_row + first + count, after = std::min(next + rows, call.first_row + end);
    Ahead values{reinterpret_cast<const char*>(weight.row_values<T>(next)), reinterpret_cast<const char*>(weight.row_values<T>(after))};
    std::int64_t token = 0;
    for (; token + kBlockTokens <= call.tokens; token += kBlockTokens) {
      panel_block<T, kBlockTokens>(call, panel, first, count, x + token * width, width, token, values);
    }
    const X* last = x + token * width;
    switch (call.tokens - token) {
      case 1: panel_block<T, 1>(call, panel, first, count, last, width, token, values); break;
      case 2: panel_block<T, 2>(call, panel, first, count, last, width, token, values); break;
      case 3: panel_block<T, 3>(call, panel, first, count, last, width, token, values); break;
      case 4: panel_block<T, 4>(call, panel, first, count, last, width, token, values); break;
      case 5: panel_block<T, 5>(call, panel, first, count, last, width, token, values); break;
    }
  }
}

}  // namespace perp
#endif
