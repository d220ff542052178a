#include "cpu/parallel.h"
#include "cpu/reduce_avx512.h"
#include "cpu/scratch.h"
#include "cpu/segment.h"

namespace perp {
namespace {

// Rows whose part of dA is summed by itself before the parts are added up, so that the order of additions is that of
// the rows however many threads share the groups.
constexpr std::int64_t kGroupRows = 256;

// Rows whose dP is held at a time, 16 KB: a register each in `spread`.
constexpr int kBlockRows = 8;

// Distance of the rows of a partial dA: whole pairs of vectors, and off the powers of two that share sets of L1.
std::int64_t partial_stride(std::int64_t columns) { return (columns + 31) / 32 * 32 + 16; }

// Each of the two paths has three steps over one segment of `rows` <= kBlockRows rows:
//   slope   dP [rows, kSegment], zero where pruned and from the segment's end to the next multiple of 32; moves `values`
//   project dB [rows, rank] += dP A^T
//   spread  part [rank, columns] += B^T dP

template <class T>
struct Portable {
  static void slope(const Weight& weight, const Adapter& adapter, std::int64_t row, std::int64_t column, std::int64_t count,
                    const T* G, const T*& values, float* dP) {
    SegmentBits bits;
    read_bits(weight, row, column, count, bits);
    for (std::int64_t j = 0; j < count; ++j) {
      const bool kept = (bits.bytes[j / 8] >> (j % 8)) & 1;
      const bool stored = kept || weight.layout == Layout::dense;
      const float w = kept ? to_float(*values) : 0.0f;
      values += stored;
      dP[j] = !kept ? 0.0f : to_float(G[j]) * (adapter.effect == Effect::add ? adapter.scale : w);
    }
  }

  static void project(const Adapter& adapter, const float* dP, int rows, const float* A, std::int64_t count, float* dB,
                      std::int64_t stride) {
    for (int i = 0; i < rows; ++i) {
      for (std::int64_t r = 0; r < adapter.rank; ++r) {
        float sums[8] = {};
        for (std::int64_t j = 0; j < count; ++j) sums[j % 8] += dP[i * kSegment + j] * A[r * adapter.A_stride + j];
        dB[i * stride + r] += ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
      }
    }
  }

  static void spread(const Adapter& adapter, const float* dP, int rows, const float* B, std::int64_t count, float* part,
                     std::int64_t stride) {
    for (int i = 0; i < rows; ++i) {
      for (std::int64_t r = 0; r < adapter.rank; ++r) {
        const float b = B[i * adapter.B_stride + r];
        for (std::int64_t j = 0; j < count; ++j) part[r * stride + j] += b * dP[i * kSegment + j];
      }
    }
  }
};

#if PERP_X86

// kRows x kRanks elements of dB: 16 sums, 4 operands and 1 are within the registers.
template <int kRows, int kRanks>
PERP_AVX512 void dots(const float* dP, const float* A, std::int64_t A_stride, std::int64_t count, float* dB,
                      std::int64_t stride) {
  __m512 sums[kRows][kRanks];
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int q = 0; q < kRanks; ++q) sums[i][q] = _mm512_setzero_ps();
  }
  for (std::int64_t j = 0; j < count; j += 16) {
    const __mmask16 inside = first_lanes(count - j);
    __m512 a[kRanks];
#pragma GCC unroll 4
    for (int q = 0; q < kRanks; ++q) a[q] = _mm512_maskz_loadu_ps(inside, A + q * A_stride + j);
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      const __m512 p = _mm512_load_ps(dP + i * kSegment + j);
#pragma GCC unroll 4
      for (int q = 0; q < kRanks; ++q) sums[i][q] = _mm512_fmadd_ps(p, a[q], sums[i][q]);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) {
    if constexpr (kRanks == 4) {
      float* to = dB + i * stride;
      _mm_storeu_ps(to, _mm_add_ps(_mm_loadu_ps(to), reduce4(sums[i][0], sums[i][1], sums[i][2], sums[i][3])));
    } else {
      for (int q = 0; q < kRanks; ++q) dB[i * stride + q] += _mm512_reduce_add_ps(sums[i][q]);
    }
  }
}

template <int kRows>
PERP_AVX512 void spread_rows(const Adapter& adapter, const float* dP, const float* B, std::int64_t count, float* part,
                             std::int64_t stride) {
  for (std::int64_t j = 0; j < count; j += 32) {
    __m512 p[kRows][2];
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      p[i][0] = _mm512_load_ps(dP + i * kSegment + j);
      p[i][1] = _mm512_load_ps(dP + i * kSegment + j + 16);
    }
    float* to = part + j;
    for (std::int64_t r = 0; r < adapter.rank; ++r, to += stride) {
      __m512 low = _mm512_load_ps(to), high = _mm512_load_ps(to + 16);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        const __m512 b = _mm512_set1_ps(B[i * adapter.B_stride + r]);
        low = _mm512_fmadd_ps(b, p[i][0], low);
        high = _mm512_fmadd_ps(b, p[i][1], high);
      }
      _mm512_store_ps(to, low);
      _mm512_store_ps(to + 16, high);
    }
  }
}

template <class T>
struct Avx512 {
  template <bool kDense>
  PERP_AVX512 static void scaled_by_weight(const SegmentBits& bits, std::int64_t count, const T* G, const T*& values,
                                           float* dP) {
    for (std::int64_t j = 0; j < (count + 31) / 32 * 32; j += 16) {
      const __mmask16 kept = bits.at(j);
      const __m512 w = next_vector<T, kDense>(values, kept);
      _mm512_store_ps(dP + j, _mm512_maskz_mul_ps(kept, Wide<T>::load(kept, G + j), w));
    }
  }

  PERP_AVX512 static void slope(const Weight& weight, const Adapter& adapter, std::int64_t row, std::int64_t column,
                                std::int64_t count, const T* G, const T*& values, float* dP) {
    SegmentBits bits;
    read_bits_avx512(weight, row, column, count, bits);
    if (adapter.effect == Effect::multiply) {
      return weight.layout == Layout::dense ? scaled_by_weight<true>(bits, count, G, values, dP)
                                            : scaled_by_weight<false>(bits, count, G, values, dP);
    }
    const __m512 scale = _mm512_set1_ps(adapter.scale);
    for (std::int64_t j = 0; j < (count + 31) / 32 * 32; j += 16) {
      const __mmask16 kept = bits.at(j);
      _mm512_store_ps(dP + j, _mm512_maskz_mul_ps(kept, Wide<T>::load(kept, G + j), scale));
    }
  }

  static void project(const Adapter& adapter, const float* dP, int rows, const float* A, std::int64_t count, float* dB,
                      std::int64_t stride) {
    std::int64_t r = 0;
    for (; r + 4 <= adapter.rank; r += 4) {
      int i = 0;
      for (; i + 4 <= rows; i += 4) {
        dots<4, 4>(dP + i * kSegment, A + r * adapter.A_stride, adapter.A_stride, count, dB + i * stride + r, stride);
      }
      for (; i < rows; ++i) {
        dots<1, 4>(dP + i * kSegment, A + r * adapter.A_stride, adapter.A_stride, count, dB + i * stride + r, stride);
      }
    }
    for (; r < adapter.rank; ++r) {
      for (int i = 0; i < rows; ++i) {
        dots<1, 1>(dP + i * kSegment, A + r * adapter.A_stride, adapter.A_stride, count, dB + i * stride + r, stride);
      }
    }
  }

  static void spread(const Adapter& adapter, const float* dP, int rows, const float* B, std::int64_t count, float* part,
                     std::int64_t stride) {
    if (rows == kBlockRows) return spread_rows<kBlockRows>(adapter, dP, B, count, part, stride);
    for (int i = 0; i < rows; ++i) {
      spread_rows<1>(adapter, dP + i * kSegment, B + i * adapter.B_stride, count, part, stride);
    }
  }
};
#endif

// Rows [begin, end) of the tile; part [rank, columns] is overwritten by their part of dA.
template <class T, class Path>
void fold_rows(const Weight& weight, const Tile& tile, const Adapter& adapter, const Gradient& gradient, std::int64_t begin,
               std::int64_t end, float* part) {
  alignas(64) float dP[kBlockRows * kSegment];
  const std::int64_t stride = partial_stride(tile.columns);
  if (part != nullptr) std::fill_n(part, adapter.rank * stride, 0.0f);
  for (std::int64_t first = begin; first < end; first += kBlockRows) {
    const int rows = static_cast<int>(std::min<std::int64_t>(kBlockRows, end - first));
    const T* values[kBlockRows] = {};
    for (int i = 0; i < rows; ++i) values[i] = first_value<T>(weight, tile.first_row + first + i, tile.first_column);
    for (std::int64_t start = 0; start < tile.columns; start += kSegment) {
      const std::int64_t count = std::min(kSegment, tile.columns - start);
      for (int i = 0; i < rows; ++i) {
        const T* G = static_cast<const T*>(gradient.G) + (first + i) * gradient.stride + start;
        Path::slope(weight, adapter, tile.first_row + first + i, tile.first_column + start, count, G, values[i],
                    dP + i * kSegment);
      }
      if (gradient.dB != nullptr) {
        Path::project(adapter, dP, rows, adapter.A + start, count, gradient.dB + first * gradient.dB_stride,
                      gradient.dB_stride);
      }
      if (part != nullptr) {
        Path::spread(adapter, dP, rows, adapter.B + first * adapter.B_stride, count, part + start, stride);
      }
    }
  }
}

template <class T, class Path>
void fold(const Weight& weight, const Tile& tile, const Adapter& adapter, const Gradient& gradient) {
  thread_local Scratch scratch;
  const std::int64_t groups = (tile.rows + kGroupRows - 1) / kGroupRows, stride = partial_stride(tile.columns);
  const std::int64_t part_size = adapter.rank * stride;
  float* parts = gradient.dA == nullptr ? nullptr : scratch.get<float>(groups * part_size);
  parallel_ranges(groups, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t g = begin; g < end; ++g) {
      fold_rows<T, Path>(weight, tile, adapter, gradient, g * kGroupRows, std::min(tile.rows, (g + 1) * kGroupRows),
                         parts == nullptr ? nullptr : parts + g * part_size);
    }
  });
  if (parts == nullptr) return;
  for (std::int64_t g = 0; g < groups; ++g) {
    for (std::int64_t r = 0; r < adapter.rank; ++r) {
      const float* from = parts + g * part_size + r * stride;
      float* to = gradient.dA + r * gradient.dA_stride;
      for (std::int64_t j = 0; j < tile.columns; ++j) to[j] += from[j];
    }
  }
}

}  // namespace

void fold_tile(const Weight& weight, const Tile& tile, const Adapter& adapter, const Gradient& gradient) {
  with_type(weight.dtype, [&]<class T>(T) {
#if PERP_X86
    if (use_avx512()) return fold<T, Avx512<T>>(weight, tile, adapter, gradient);
#endif
    fold<T, Portable<T>>(weight, tile, adapter, gradient);
  });
}

}  // namespace perp
