// Rows of a packed weight as vectors of consecutive columns, for AVX-512 kernels.
#pragma once

#include <bit>

#include "cpu/convert.h"
#include "cpu/platform.h"
#include "cpu/weight.h"

#if PERP_X86
namespace perp {

// Columns decoded per step: 16 bytes of index, one load and, for semi24, one table look-up.
constexpr std::int64_t kBlock = 128;

// How an element type is multiplied. A vector of `kLanes` stored elements becomes one register of operands, which
// `fma` multiplies by operands of type X from memory into 16 fp32 sums.
template <class Stored>
struct Codec;

// bf16 stays bf16: dpbf16_ps multiplies 32 pairs and adds neighbouring products in fp32.
template <>
struct Codec<bf16> {
  using X = bf16;
  using Mask = __mmask32;
  static constexpr int kLanes = 32;
  PERP_AVX512 static __m512i expand(Mask m, const bf16* p) { return _mm512_maskz_expandloadu_epi16(m, p); }
  PERP_AVX512 static __m512i load(Mask m, const bf16* p) { return _mm512_maskz_loadu_epi16(m, p); }
  PERP_AVX512 static __m512 fma(__m512i w, __m512i x, __m512 sum) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(w), reinterpret_cast<__m512bh>(x));
  }
};

template <>
struct Codec<float> {
  using X = float;
  using Mask = __mmask16;
  static constexpr int kLanes = 16;
  PERP_AVX512 static __m512i expand(Mask m, const float* p) { return _mm512_maskz_expandloadu_epi32(m, p); }
  PERP_AVX512 static __m512i load(Mask m, const float* p) { return _mm512_maskz_loadu_epi32(m, p); }
  PERP_AVX512 static __m512 fma(__m512i w, __m512i x, __m512 sum) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(w), _mm512_castsi512_ps(x), sum);
  }
};

// fp16 is widened: without AVX512-FP16 there is no arithmetic on it, and with it none that accumulates in fp32.
template <>
struct Codec<f16> {
  using X = float;
  using Mask = __mmask16;
  static constexpr int kLanes = 16;
  PERP_AVX512 static __m512i expand(Mask m, const f16* p) { return widen(_mm256_maskz_expandloadu_epi16(m, p)); }
  PERP_AVX512 static __m512i load(Mask m, const f16* p) { return widen(_mm256_maskz_loadu_epi16(m, p)); }
  PERP_AVX512 static __m512 fma(__m512i w, __m512i x, __m512 sum) { return Codec<float>::fma(w, x, sum); }

 private:
  PERP_AVX512 static __m512i widen(__m256i half) { return _mm512_castps_si512(_mm512_cvtph_ps(half)); }
};

// Walks one row, kBlock columns at a time: block() and then vector(0) .. vector(kBlock / kLanes - 1) in order, from an
// unrolled loop. Past the last column vectors are zero; loads are masked and suppress faults, so nothing beyond the row
// is touched.
template <class Stored, Layout kLayout>
class RowCursor {
 public:
  using C = Codec<Stored>;

  RowCursor() = default;
  RowCursor(const Weight& weight, std::int64_t row)
      : values_(weight.row_values<Stored>(row)), index_(weight.row_index(row)), columns_left_(weight.columns) {}

  PERP_AVX512 void block() {
    if constexpr (kLayout == Layout::dense) {
      low_ = ones(columns_left_);
      high_ = ones(columns_left_ - 64);
    } else {
      __m128i bits = columns_left_ >= kBlock
                         ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(index_))
                         : _mm_maskz_loadu_epi8(static_cast<__mmask16>((1u << ((columns_left_ + 7) / 8)) - 1), index_);
      if constexpr (kLayout == Layout::semi24) bits = bits_of_positions(bits);
      low_ = static_cast<std::uint64_t>(_mm_cvtsi128_si64(bits));
      high_ = static_cast<std::uint64_t>(_mm_extract_epi64(bits, 1));
      index_ += kBlock / 8;
    }
    columns_left_ -= kBlock;
  }

  PERP_AVX512 __m512i vector(int v) {
    const int bit = v * C::kLanes;
    const auto mask = static_cast<typename C::Mask>((bit < 64 ? low_ : high_) >> (bit % 64));
    const __m512i result = kLayout == Layout::dense ? C::load(mask, values_) : C::expand(mask, values_);
    // semi24 needs no count: half of the columns are kept, except past the end, where nothing follows.
    values_ += kLayout == Layout::dense ? C::kLanes : kLayout == Layout::semi24 ? C::kLanes / 2 : std::popcount(mask);
    return result;
  }

 private:
  static std::uint64_t ones(std::int64_t count) {
    return count >= 64 ? ~std::uint64_t{0} : count <= 0 ? 0 : (std::uint64_t{1} << count) - 1;
  }

  // Each nibble pos0 | pos1 << 2 to the mask 1 << pos0 | 1 << pos1. The padding nibble 0, no valid pair, gives 0.
  PERP_AVX512 static __m128i bits_of_positions(__m128i positions) {
    const __m128i table = _mm_setr_epi8(0, 0, 0, 0, 3, 0, 0, 0, 5, 6, 0, 0, 9, 10, 12, 0);
    const __m128i nibble = _mm_set1_epi8(15);
    const __m128i low = _mm_shuffle_epi8(table, _mm_and_si128(positions, nibble));
    const __m128i high = _mm_shuffle_epi8(table, _mm_and_si128(_mm_srli_epi16(positions, 4), nibble));
    return _mm_or_si128(low, _mm_slli_epi16(high, 4));
  }

  const Stored* values_ = nullptr;
  const std::uint8_t* index_ = nullptr;
  std::int64_t columns_left_ = 0;
  std::uint64_t low_ = 0, high_ = 0;
};

// Fetches the rows that follow the ones being read. Rows lie back to back in memory, so what follows is one stream; the
// hardware's prefetchers stop at each 4 KB page and lose it again where several rows are read at once.
template <class Stored, Layout kLayout>
class Prefetcher {
 public:
  Prefetcher(const Weight& weight, std::int64_t row, int rows) {
    // At least 2 KB ahead: one core's bandwidth times the latency of memory.
    const auto* begin = reinterpret_cast<const char*>(weight.row_values<Stored>(row));
    const auto* end = reinterpret_cast<const char*>(weight.row_values<Stored>(row) + (weight.starts.begin(row + rows) - weight.starts.begin(row)));
    values_ = begin + std::max<std::int64_t>(end - begin, 2048);
    index_ = reinterpret_cast<const char*>(weight.row_index(row)) + std::max<std::int64_t>(rows * weight.index_stride(), 256);
  }

  // What `rows` rows need for one block of columns, supposing half of them kept.
  PERP_AVX512 void block(int rows) {
    constexpr int kBytes = kBlock * sizeof(Stored) / (kLayout == Layout::dense ? 1 : 2);
#pragma GCC unroll 32
    for (int line = 0; line < rows * kBytes; line += 64) _mm_prefetch(values_ + line, _MM_HINT_T0);
    values_ += rows * kBytes;
    if constexpr (kLayout != Layout::dense) {
      _mm_prefetch(index_, _MM_HINT_T0);
      index_ += rows * kBlock / 8;
    }
  }

 private:
  const char* values_;
  const char* index_;
};

}  // namespace perp
#endif
