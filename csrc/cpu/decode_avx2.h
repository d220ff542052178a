// Rows of a packed weight as vectors of eight columns, for AVX2 kernels. A byte of mask picks a shuffle from a table.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>

#include "cpu/expand.h"
#include "cpu/platform.h"
#include "cpu/weight.h"

#if PERP_X86
namespace perp {

// Which of the values at hand goes to each of eight columns, by the byte of mask.
struct Shuffles {
  // Doublewords: the value's number, with the sign bit set; 0 where pruned.
  alignas(32) std::array<std::array<std::uint32_t, 8>, 256> of32{};
  // Bytes of eight 16-bit values to 16-bit lanes, and to the upper halves of 32-bit lanes. 0x80 gives a zero.
  alignas(32) std::array<std::array<std::uint8_t, 16>, 256> of16{};
  alignas(32) std::array<std::array<std::uint8_t, 32>, 256> of16_upper{};
};

inline constexpr Shuffles kShuffles = [] {
  Shuffles tables;
  for (unsigned mask = 0; mask < 256; ++mask) {
    unsigned rank = 0;
    for (unsigned lane = 0; lane < 8; ++lane) {
      const bool kept = mask >> lane & 1;
      tables.of32[mask][lane] = kept ? rank | 0x80000000u : 0;
      for (unsigned byte = 0; byte < 2; ++byte) {
        const auto from = static_cast<std::uint8_t>(kept ? 2 * rank + byte : 0x80);
        tables.of16[mask][2 * lane + byte] = from;
        tables.of16_upper[mask][4 * lane + byte] = 0x80;
        tables.of16_upper[mask][4 * lane + 2 + byte] = from;
      }
      rank += kept;
    }
  }
  return tables;
}();

// Loads take eight values wherever a vector begins, so that many have to be readable behind a row's last.
constexpr std::int64_t kReadAhead = 8;

// `from`, the rest of a row that ends at `row_end`, or a copy in `room` where too little of the weight's values, which
// end at `end`, follows the row. `room` holds row_end - from + kReadAhead values.
template <class T>
const T* readable(const T* from, const T* row_end, const T* end, T* room) {
  if (end - row_end >= kReadAhead) return from;
  if (row_end > from) std::memcpy(static_cast<void*>(room), from, (row_end - from) * sizeof(T));
  return room;
}

template <class T>
const T* readable_row(const Weight& weight, std::int64_t row, const T* from, T* room) {
  return readable(from, weight.row_values<T>(row + 1), weight.row_values<T>(weight.rows), room);
}

PERP_AVX2 inline __m256i expand32(const void* values, unsigned mask) {
  const __m256i shuffle = _mm256_load_si256(reinterpret_cast<const __m256i*>(kShuffles.of32[mask].data()));
  const __m256i moved = _mm256_permutevar8x32_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(values)), shuffle);
  return _mm256_and_si256(moved, _mm256_srai_epi32(shuffle, 31));
}

PERP_AVX2 inline __m128i expand16(const void* values, unsigned mask) {
  const __m128i shuffle = _mm_load_si128(reinterpret_cast<const __m128i*>(kShuffles.of16[mask].data()));
  return _mm_shuffle_epi8(_mm_loadu_si128(static_cast<const __m128i*>(values)), shuffle);
}

// All bits set in the kept lanes.
PERP_AVX2 inline __m256 kept_lanes(unsigned mask) {
  const auto* shuffle = reinterpret_cast<const __m256i*>(kShuffles.of32[mask].data());
  return _mm256_castsi256_ps(_mm256_srai_epi32(_mm256_load_si256(shuffle), 31));
}

// The kept ones of eight columns as fp32, zero elsewhere.
PERP_AVX2 inline __m256 expand_wide(const float* values, unsigned mask) { return _mm256_castsi256_ps(expand32(values, mask)); }
PERP_AVX2 inline __m256 expand_wide(const f16* values, unsigned mask) { return _mm256_cvtph_ps(expand16(values, mask)); }
PERP_AVX2 inline __m256 expand_wide(const bf16* values, unsigned mask) {
  const __m256i both = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values)));
  const __m256i shuffle = _mm256_load_si256(reinterpret_cast<const __m256i*>(kShuffles.of16_upper[mask].data()));
  return _mm256_castsi256_ps(_mm256_shuffle_epi8(both, shuffle));
}

// expand() for values of 2 or 4 bytes, moved as they are; kReadAhead values are readable behind the last.
template <class T>
PERP_AVX2 const T* expand_avx2(const T* values, const std::uint8_t* bits, std::int64_t columns, T* out) {
  std::int64_t j = 0;
  for (; j + 8 <= columns; j += 8) {
    const unsigned mask = bits[j / 8];
    if constexpr (sizeof(T) == 4) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + j), expand32(values, mask));
    } else {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + j), expand16(values, mask));
    }
    values += std::popcount(mask);
  }
  return j < columns ? expand(values, bits + j / 8, columns - j, out + j) : values;
}

// Walks one row eight columns at a time. The last vector is zero past the last column.
template <class T, Layout kLayout>
class Cursor {
 public:
  Cursor() = default;
  // `room` as for readable().
  Cursor(const Weight& weight, std::int64_t row, T* room)
      : values_(readable_row(weight, row, weight.row_values<T>(row), room)),
        index_(kLayout == Layout::dense ? nullptr : weight.row_index(row)),
        columns_left_(weight.columns) {}

  PERP_AVX2 __m256 next() {
    const unsigned mask = next_mask();
    const __m256 result = expand_wide(values_, mask);
    values_ += kLayout == Layout::dense ? 8 : kLayout == Layout::semi24 ? 4 : std::popcount(mask);
    return result;
  }

  // Fetches what comes 2 KB later, one core's bandwidth times the latency of memory: the hardware's prefetchers stop at
  // each 4 KB page.
  PERP_AVX2 void prefetch() const { _mm_prefetch(reinterpret_cast<const char*>(values_) + 2048, _MM_HINT_T0); }

 private:
  PERP_AVX2 unsigned next_mask() {
    if constexpr (kLayout == Layout::bitmap) return *index_++;
    if constexpr (kLayout == Layout::semi24) return kMaskOfPairs[*index_++];
    const unsigned mask = columns_left_ >= 8 ? 0xffu : (1u << columns_left_) - 1;
    columns_left_ -= 8;
    return mask;
  }

  const T* values_ = nullptr;
  const std::uint8_t* index_ = nullptr;
  std::int64_t columns_left_ = 0;
};

}  // namespace perp
#endif
