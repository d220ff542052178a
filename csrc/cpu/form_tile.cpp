#include "cpu/form_avx2.h"
#include "cpu/parallel.h"
#include "cpu/segment.h"

namespace perp {
namespace {

// A thread is worth waking for about this many multiply-adds.
constexpr std::int64_t kWorkPerThread = 256 * 1024;

// ---- portable: a segment of one row at a time ----

template <class T>
void form_row(const Weight& weight, const Tile& tile, const Adapter& adapter, std::int64_t row, T* out) {
  const T* values = first_value<T>(weight, tile.first_row + row, tile.first_column);
  SegmentBits bits;
  float sums[kSegment];
  for (std::int64_t start = 0; start < tile.columns; start += kSegment) {
    const std::int64_t count = std::min(kSegment, tile.columns - start);
    read_bits(weight, tile.first_row + row, tile.first_column + start, count, bits);
    if (adapter.effect == Effect::none && weight.layout != Layout::dense) {
      values = expand(values, bits.bytes, count, out + start);
      continue;
    }
    multiply_factors(adapter, row, start, count, sums);
    for (std::int64_t j = 0; j < count; ++j) {
      const bool kept = (bits.bytes[j / 8] >> (j % 8)) & 1;
      const bool stored = kept || weight.layout == Layout::dense;
      const T value = stored ? *values : T{};
      values += stored;
      out[start + j] = kept ? formed(adapter.effect, adapter.scale, value, sums[j]) : T{};
    }
  }
}

// ---- AVX-512: kRows rows x 32 columns, their sums in registers ----
#if PERP_X86

template <class T, Effect kEffect, bool kDense, int kRows>
PERP_AVX512 void form_rows(const Weight& weight, const Tile& tile, const Adapter& adapter, std::int64_t row, T* out,
                           std::int64_t stride) {
  const T* values[kRows];
  SegmentBits bits[kRows];
  for (int i = 0; i < kRows; ++i) values[i] = first_value<T>(weight, tile.first_row + row + i, tile.first_column);
  const float* B = adapter.B + row * adapter.B_stride;
  const __m512 scale = _mm512_set1_ps(adapter.scale);
  for (std::int64_t start = 0; start < tile.columns; start += kSegment) {
    const std::int64_t count = std::min(kSegment, tile.columns - start);
    for (int i = 0; i < kRows; ++i) {
      read_bits_avx512(weight, tile.first_row + row + i, tile.first_column + start, count, bits[i]);
    }
    for (std::int64_t j = 0; j < count; j += 32) {
      const __mmask16 inside[2] = {first_lanes(count - j), first_lanes(count - j - 16)};
      __m512 sums[kRows][2];
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) sums[i][0] = sums[i][1] = _mm512_setzero_ps();
      if constexpr (kEffect != Effect::none) {
        const float* a = adapter.A + start + j;
        for (std::int64_t r = 0; r < adapter.rank; ++r, a += adapter.A_stride) {
          const __m512 a0 = _mm512_maskz_loadu_ps(inside[0], a), a1 = _mm512_maskz_loadu_ps(inside[1], a + 16);
#pragma GCC unroll 8
          for (int i = 0; i < kRows; ++i) {
            const __m512 b = _mm512_set1_ps(B[i * adapter.B_stride + r]);
            sums[i][0] = _mm512_fmadd_ps(b, a0, sums[i][0]);
            sums[i][1] = _mm512_fmadd_ps(b, a1, sums[i][1]);
          }
        }
      }
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) {
          const __mmask16 kept = bits[i].at(j + 16 * v);
          __m512 w = next_vector<T, kDense>(values[i], kept);
          if constexpr (kEffect == Effect::add) w = _mm512_maskz_fmadd_ps(kept, scale, sums[i][v], w);
          if constexpr (kEffect == Effect::multiply) w = _mm512_maskz_mul_ps(kept, w, sums[i][v]);
          Wide<T>::store(out + i * stride + start + j + 16 * v, inside[v], w);
        }
      }
    }
  }
}

template <class T, Effect kEffect, bool kDense>
void form_range(const Weight& weight, const Tile& tile, const Adapter& adapter, std::int64_t begin, std::int64_t end, T* out,
                std::int64_t stride) {
  std::int64_t r = begin;
  for (; r + 8 <= end; r += 8) form_rows<T, kEffect, kDense, 8>(weight, tile, adapter, r, out + r * stride, stride);
  for (; r < end; ++r) form_rows<T, kEffect, kDense, 1>(weight, tile, adapter, r, out + r * stride, stride);
}

template <class T, Effect kEffect>
auto range_kernel(Layout layout) {
  return layout == Layout::dense ? form_range<T, kEffect, true> : form_range<T, kEffect, false>;
}
#endif

template <class T>
void form(const Weight& weight, const Tile& tile, const Adapter& adapter, T* out, std::int64_t stride) {
  const std::int64_t work = std::max<std::int64_t>(tile.columns * (adapter.rank + 4), 1);
  parallel_ranges(tile.rows, kWorkPerThread / work + 1, [&](std::int64_t begin, std::int64_t end) {
#if PERP_X86
    if (use_avx512()) {
      const auto kernel = adapter.effect == Effect::none  ? range_kernel<T, Effect::none>(weight.layout)
                          : adapter.effect == Effect::add ? range_kernel<T, Effect::add>(weight.layout)
                                                          : range_kernel<T, Effect::multiply>(weight.layout);
      return kernel(weight, tile, adapter, begin, end, out, stride);
    }
    if (use_avx2() && weight.layout != Layout::dense) {
      for (std::int64_t r = begin; r < end; ++r) form_row_avx2<T>(weight, tile, adapter, r, out + r * stride);
      return;
    }
#endif
    for (std::int64_t r = begin; r < end; ++r) form_row<T>(weight, tile, adapter, r, out + r * stride);
  });
}

}  // namespace

void form_tile(const Weight& weight, const Tile& tile, const Adapter& adapter, void* out, std::int64_t stride) {
  with_type(weight.dtype, [&]<class T>(T) { form<T>(weight, tile, adapter, static_cast<T*>(out), stride); });
}

}  // namespace perp
