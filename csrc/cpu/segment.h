// Segments of rows of a packed weight as fp32: what form_tile and fold_tile are built from.
#pragma once

#include <algorithm>
#include <bit>
#include <cstring>

#include "cpu/convert.h"
#include "cpu/expand.h"
#include "cpu/platform.h"
#include "cpu/tile.h"

namespace perp {

// Columns at a time: 64 bytes of mask, one vector.
constexpr std::int64_t kSegment = 512;

// Mask bits of one segment of a row, zero past its end.
struct alignas(64) SegmentBits {
  std::uint8_t bytes[kSegment / 8];

  std::uint16_t at(std::int64_t column) const {  // the 16 columns from a multiple of 16 on
    std::uint16_t mask;
    std::memcpy(&mask, bytes + column / 8, sizeof mask);
    return mask;
  }
};

// Where the value of (row, column) stands among those of its row.
inline std::int64_t kept_before(const Weight& weight, std::int64_t row, std::int64_t column) {
  if (weight.layout == Layout::dense) return column;
  if (weight.layout == Layout::semi24) return column / 2;
  const std::uint8_t* bytes = weight.row_index(row);
  std::int64_t kept = 0, i = 0;
  for (; 8 * i + 64 <= column; i += 8) {
    std::uint64_t word;
    std::memcpy(&word, bytes + i, 8);
    kept += std::popcount(word);
  }
  for (; 8 * i < column; ++i) kept += std::popcount(bytes[i]);
  return kept;
}

template <class T>
const T* first_value(const Weight& weight, std::int64_t row, std::int64_t column) {
  return weight.row_values<T>(row) + kept_before(weight, row, column);
}

// The bits of columns [column, column + count), count <= kSegment, by one table look-up per byte for semi24.
inline void read_bits(const Weight& weight, std::int64_t row, std::int64_t column, std::int64_t count, SegmentBits& out) {
  const std::int64_t bytes = (count + 7) / 8;
  const std::uint8_t* from = weight.row_index(row) + column / 8;
  std::memset(out.bytes, 0, sizeof out.bytes);
  if (weight.layout == Layout::semi24) {
    for (std::int64_t i = 0; i < bytes; ++i) out.bytes[i] = kMaskOfPairs[from[i]];
  } else {
    std::memcpy(out.bytes, from, bytes);
  }
  // The columns may end inside a byte, before the row does.
  if (count % 8 != 0) out.bytes[bytes - 1] &= static_cast<std::uint8_t>((1u << count % 8) - 1);
}

// Calls f with a value of the weight's element type.
template <class F>
void with_type(DType dtype, const F& f) {
  if (dtype == DType::bf16) return f(bf16{});
  if (dtype == DType::f16) return f(f16{});
  f(float{});
}

#if PERP_X86

PERP_AVX512 inline void read_bits_avx512(const Weight& weight, std::int64_t row, std::int64_t column, std::int64_t count,
                                         SegmentBits& out) {
  const std::int64_t bytes = (count + 7) / 8;
  const __mmask64 loaded = bytes == 64 ? ~__mmask64{0} : (__mmask64{1} << bytes) - 1;
  __m512i bits = _mm512_maskz_loadu_epi8(loaded, weight.row_index(row) + column / 8);
  if (weight.layout == Layout::semi24) {
    const __m512i table = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 0, 0, 0, 3, 0, 0, 0, 5, 6, 0, 0, 9, 10, 12, 0));
    const __m512i nibble = _mm512_set1_epi8(15);
    const __m512i low = _mm512_shuffle_epi8(table, _mm512_and_si512(bits, nibble));
    const __m512i high = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(bits, 4), nibble));
    bits = _mm512_or_si512(low, _mm512_slli_epi16(high, 4));
  }
  _mm512_store_si512(out.bytes, bits);
  if (count % 8 != 0) out.bytes[bytes - 1] &= static_cast<std::uint8_t>((1u << count % 8) - 1);
}

// Sixteen elements of a stored type as fp32, those of the mask alone; nothing else is touched.
template <class T>
struct Wide;

template <>
struct Wide<float> {
  PERP_AVX512 static __m512 load(__mmask16 m, const float* p) { return _mm512_maskz_loadu_ps(m, p); }
  PERP_AVX512 static __m512 expand(__mmask16 m, const float* p) { return _mm512_maskz_expandloadu_ps(m, p); }
  PERP_AVX512 static void store(float* p, __mmask16 m, __m512 v) { _mm512_mask_storeu_ps(p, m, v); }
};

template <>
struct Wide<f16> {
  PERP_AVX512 static __m512 load(__mmask16 m, const f16* p) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(m, p)); }
  PERP_AVX512 static __m512 expand(__mmask16 m, const f16* p) {
    return _mm512_cvtph_ps(_mm256_maskz_expandloadu_epi16(m, p));
  }
  PERP_AVX512 static void store(f16* p, __mmask16 m, __m512 v) {
    _mm256_mask_storeu_epi16(p, m, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
};

template <>
struct Wide<bf16> {
  PERP_AVX512 static __m512 load(__mmask16 m, const bf16* p) { return widen(_mm256_maskz_loadu_epi16(m, p)); }
  PERP_AVX512 static __m512 expand(__mmask16 m, const bf16* p) { return widen(_mm256_maskz_expandloadu_epi16(m, p)); }
  // By integers: cvtneps_pbh would flush denormals, and a weight that nothing is added to must stay as it is.
  PERP_AVX512 static void store(bf16* p, __mmask16 m, __m512 v) {
    const __m512i bits = _mm512_castps_si512(v), high = _mm512_srli_epi32(bits, 16);
    const __m512i half = _mm512_add_epi32(_mm512_and_si512(high, _mm512_set1_epi32(1)), _mm512_set1_epi32(0x7fff));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, half), 16);
    const __m512i quiet = _mm512_or_si512(high, _mm512_set1_epi32(0x40));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    _mm256_mask_storeu_epi16(p, m, _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, quiet)));
  }

 private:
  PERP_AVX512 static __m512 widen(__m256i v) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
  }
};

// The next vector of a row whose kept columns are `mask`; moves `values` past it.
template <class T, bool kDense>
PERP_AVX512 inline __m512 next_vector(const T*& values, __mmask16 mask) {
  const __m512 v = kDense ? Wide<T>::load(mask, values) : Wide<T>::expand(mask, values);
  values += kDense ? 16 : std::popcount(static_cast<std::uint16_t>(mask));
  return v;
}

PERP_AVX512 inline __mmask16 first_lanes(std::int64_t count) {
  return count >= 16 ? 0xffff : count <= 0 ? 0 : static_cast<__mmask16>((1u << count) - 1);
}

#endif

}  // namespace perp
