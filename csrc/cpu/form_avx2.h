// One row of a tile formed by AVX2, and what it shares with the portable path.
#pragma once

#include "cpu/decode_avx2.h"
#include "cpu/scratch.h"
#include "cpu/segment.h"

namespace perp {

// An element of the effective weight from a stored one and its place in B A.
template <class T>
T formed(Effect effect, float scale, T value, float product) {
  const float w = to_float(value);
  return from_float<T>(effect == Effect::none ? w : effect == Effect::add ? w + scale * product : w * product);
}

// sums [count] <- the row of B A, from the tile's column `start` on. Inlined, so that it takes its caller's instructions.
inline __attribute__((always_inline)) void multiply_factors(const Adapter& adapter, std::int64_t row, std::int64_t start,
                                                             std::int64_t count, float* sums) {
  const float* b = adapter.B + row * adapter.B_stride;
  std::fill_n(sums, count, 0.0f);
  for (std::int64_t r = 0; r < adapter.rank; ++r) {
    const float* a = adapter.A + r * adapter.A_stride + start;
    for (std::int64_t j = 0; j < count; ++j) sums[j] += b[r] * a[j];
  }
}

#if PERP_X86

PERP_AVX2 inline void narrow(float* out, __m256 v) { _mm256_storeu_ps(out, v); }
PERP_AVX2 inline void narrow(f16* out, __m256 v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
PERP_AVX2 inline void narrow(bf16* out, __m256 v) {
  const __m256i bits = _mm256_castps_si256(v), high = _mm256_srli_epi32(bits, 16);
  const __m256i half = _mm256_add_epi32(_mm256_and_si256(high, _mm256_set1_epi32(1)), _mm256_set1_epi32(0x7fff));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, half), 16);
  const __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i lanes = _mm256_blendv_epi8(rounded, quiet, nan);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(lanes, lanes), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_castsi256_si128(packed));
}

// Not for the layout dense.
template <class T>
PERP_AVX2 void form_row_avx2(const Weight& weight, const Tile& tile, const Adapter& adapter, std::int64_t row, T* out) {
  thread_local Scratch scratch;
  const std::int64_t stored_row = tile.first_row + row;
  const T* values = readable_row(weight, stored_row, first_value<T>(weight, stored_row, tile.first_column),
                                 scratch.get<T>(weight.columns + kReadAhead));
  const __m256 scale = _mm256_set1_ps(adapter.scale);
  SegmentBits bits;
  alignas(32) float sums[kSegment];
  for (std::int64_t start = 0; start < tile.columns; start += kSegment, out += kSegment) {
    const std::int64_t count = std::min(kSegment, tile.columns - start);
    read_bits(weight, stored_row, tile.first_column + start, count, bits);
    if (adapter.effect == Effect::none) {
      values = expand_avx2(values, bits.bytes, count, out);
      continue;
    }
    multiply_factors(adapter, row, start, count, sums);
    std::int64_t j = 0;
    for (; j + 8 <= count; j += 8) {
      const unsigned mask = bits.bytes[j / 8];
      const __m256 w = expand_wide(values, mask), product = _mm256_load_ps(sums + j);
      const __m256 all = adapter.effect == Effect::add ? _mm256_add_ps(w, _mm256_mul_ps(scale, product))
                                                       : _mm256_mul_ps(w, product);
      narrow(out + j, _mm256_and_ps(all, kept_lanes(mask)));
      values += std::popcount(mask);
    }
    const unsigned rest = j < count ? bits.bytes[j / 8] : 0;
    for (int lane = 0; j < count; ++j, ++lane) {
      out[j] = rest >> lane & 1 ? formed(adapter.effect, adapter.scale, *values++, sums[j]) : T{};
    }
  }
}

#endif

}  // namespace perp
