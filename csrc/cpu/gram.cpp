#include "cpu/gram.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "cpu/convert.h"
#include "cpu/decode_avx512.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace perp {

#if PERP_X86
namespace {

// A tile is 8 x 48: 24 sums, 3 operands and 1 broadcast are 28 of the 32 registers.
constexpr int kTileRows = 8;
constexpr int kPanel = 48;

// Tokens in one step: a panel's 24 KB stay in L1 while the rows of a block pass by, and no chain of roundings is longer.
constexpr std::int64_t kTokens = 128;

// Words packed at a time: 16 MB, which leaves half of the smallest L3 of these CPUs to H.
constexpr std::int64_t kPacked = 4 << 20;

// Panels on either side of a block of H. The block's sums and one step of its operands are half a megabyte, within L2.
constexpr int kSide = 4;

// A word is one fp32 element, or two bf16 of neighbouring tokens, which dpbf16 multiplies and adds at once.
template <class T>
constexpr std::int64_t kTokensPerWord = std::is_same_v<T, bf16> ? 2 : 1;

template <class T>
constexpr std::int64_t kDepth = kTokens / kTokensPerWord<T>;  // words of each column in one step

PERP_AVX512 __m512i words(const float* x, const float*, __mmask16 some, __mmask16) {
  return _mm512_maskz_loadu_epi32(some, x);
}
PERP_AVX512 __m512i words(const f16* x, const f16*, __mmask16 some, __mmask16) {
  return _mm512_castps_si512(_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(some, x)));
}
PERP_AVX512 __m512i words(const bf16* x, const bf16* next, __mmask16 some, __mmask16 some_next) {
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, x));
  const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some_next, next));
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

// What has been packed: steps of kDepth words, in each step the panels, in each panel words of kPanel columns. Columns
// beyond the last are zero.
template <class T>
struct Packed {
  std::uint32_t* data;
  std::int64_t panels;
  std::int64_t words;

  std::uint32_t* panel(std::int64_t step, std::int64_t p) const { return data + (step * panels + p) * kDepth<T> * kPanel; }
};

// Packs panels [begin, end) of the tokens from `first` on.
template <class T>
PERP_AVX512 void pack(const Tokens& x, std::int64_t first, const Packed<T>& out, std::int64_t begin, std::int64_t end) {
  for (std::int64_t w = 0; w < out.words; ++w) {
    const std::int64_t token = first + w * kTokensPerWord<T>;
    const bool paired = token + 1 < x.count;
    const T* row = static_cast<const T*>(x.data) + token * x.stride;
    for (std::int64_t p = begin; p < end; ++p) {
      std::uint32_t* to = out.panel(w / kDepth<T>, p) + w % kDepth<T> * kPanel;
      for (std::int64_t v = 0; v < kPanel; v += 16) {
        const std::int64_t column = p * kPanel + v, left = std::clamp<std::int64_t>(x.columns - column, 0, 16);
        const auto some = static_cast<__mmask16>((1u << left) - 1);
        const T* from = left > 0 ? row + column : row;  // no pointer past the row, though nothing were read there
        _mm512_store_si512(to + v, words(from, paired ? from + x.stride : from, some, paired ? some : 0));
      }
    }
  }
}

// sums [kTileRows, kPanel], rows `pitch` apart, += rows^T columns over `depth` words of one step.
template <class C>
PERP_AVX512 void tile(const std::uint32_t* rows, const std::uint32_t* columns, std::int64_t depth, float* sums,
                      std::int64_t pitch) {
  __m512 sum[kTileRows][3];
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r) sum[r][0] = sum[r][1] = sum[r][2] = _mm512_setzero_ps();
  for (std::int64_t w = 0; w < depth; ++w, rows += kPanel, columns += kPanel) {
    const __m512i c0 = _mm512_load_si512(columns), c1 = _mm512_load_si512(columns + 16),
                  c2 = _mm512_load_si512(columns + 32);
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) {
      const __m512i a = _mm512_set1_epi32(static_cast<int>(rows[r]));
      sum[r][0] = C::fma(a, c0, sum[r][0]);
      sum[r][1] = C::fma(a, c1, sum[r][1]);
      sum[r][2] = C::fma(a, c2, sum[r][2]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 3
    for (int v = 0; v < 3; ++v) {
      float* to = sums + r * pitch + 16 * v;
      _mm512_store_ps(to, _mm512_add_ps(_mm512_load_ps(to), sum[r][v]));
    }
  }
}

// Fetches what `add` will touch, while the products of the last step are formed.
PERP_AVX512 void fetch(const float* H, std::int64_t K, std::int64_t row, std::int64_t column) {
  const std::int64_t width = std::min<std::int64_t>(kPanel, K - column);
  for (std::int64_t i = row; i < std::min(row + kPanel, K); ++i) {
    for (std::int64_t j = 0; j < width; j += 16) _mm_prefetch(H + i * K + column + j, _MM_HINT_T1);
    _mm_prefetch(H + i * K + column + width - 1, _MM_HINT_T1);
  }
}

// Adds sums [kPanel, kPanel] to H from (row, column) on and, transposed, to its mirror image. On the diagonal only what
// lies above is read.
PERP_AVX512 void add(float* H, std::int64_t K, std::int64_t row, std::int64_t column, const float* sums, std::int64_t pitch) {
  const std::int64_t rows = std::min<std::int64_t>(kPanel, K - row), columns = std::min<std::int64_t>(kPanel, K - column);
  const bool diagonal = row == column;
  alignas(64) float mirrored[kPanel][kPanel];
  for (std::int64_t i = 0; i < rows; ++i) {
    float* to = H + (row + i) * K + column;
    const float* from = sums + i * pitch;
    for (std::int64_t j = diagonal ? i : 0; j < columns; ++j) to[j] += from[j];
    for (std::int64_t j = 0; j < columns; ++j) mirrored[j][i] = from[j];
  }
  for (std::int64_t j = 0; j < columns; ++j) {
    float* to = H + (column + j) * K + row;
    const std::int64_t end = diagonal ? j : rows;
    for (std::int64_t i = 0; i < end; ++i) to[i] += mirrored[j][i];
  }
}

// The block of H at panels (rows, columns), `side` of them each way: its sums over all that is packed, then one addition.
template <class T>
PERP_AVX512 void block(float* H, std::int64_t K, const Packed<T>& packed, std::int64_t rows, std::int64_t columns, int side) {
  using C = Codec<std::conditional_t<std::is_same_v<T, bf16>, bf16, float>>;
  thread_local Scratch scratch;
  const std::int64_t pitch = side * kPanel;
  float* sums = scratch.get<float>(pitch * pitch);
  std::memset(sums, 0, pitch * pitch * sizeof(float));
  const std::int64_t last_row = std::min(rows + side, packed.panels), last_column = std::min(columns + side, packed.panels);
  for (std::int64_t first = 0; first < packed.words; first += kDepth<T>) {
    const std::int64_t depth = std::min(kDepth<T>, packed.words - first), step = first / kDepth<T>;
    for (std::int64_t c = columns; c < last_column; ++c) {
      for (std::int64_t r = rows; r < std::min(last_row, c + 1); ++r) {
        if (first + kDepth<T> >= packed.words) {
          fetch(H, K, r * kPanel, c * kPanel);
          fetch(H, K, c * kPanel, r * kPanel);
        }
        float* to = sums + (r - rows) * kPanel * pitch + (c - columns) * kPanel;
        for (int i = 0; i < kPanel; i += kTileRows) {
          tile<C>(packed.panel(step, r) + i, packed.panel(step, c), depth, to + i * pitch, pitch);
        }
      }
    }
  }
  for (std::int64_t c = columns; c < last_column; ++c) {
    for (std::int64_t r = rows; r < std::min(last_row, c + 1); ++r) {
      add(H, K, r * kPanel, c * kPanel, sums + (r - rows) * kPanel * pitch + (c - columns) * kPanel, pitch);
    }
  }
}

template <class T>
void gram_of(float* H, const Tokens& x) {
  thread_local Scratch scratch;
  const std::int64_t panels = (x.columns + kPanel - 1) / kPanel;
  const std::int64_t most = std::max<std::int64_t>(1, kPacked / (panels * kDepth<T> * kPanel)) * kTokens;
  for (std::int64_t first = 0; first < x.count; first += most) {
    const std::int64_t words = (std::min(most, x.count - first) + kTokensPerWord<T> - 1) / kTokensPerWord<T>;
    const std::int64_t steps = (words + kDepth<T> - 1) / kDepth<T>;
    const Packed<T> packed{scratch.get<std::uint32_t>(steps * panels * kDepth<T> * kPanel), panels, words};
    parallel_ranges(panels, 1 + (1 << 16) / (words * kPanel),
                    [&](std::int64_t begin, std::int64_t end) { pack<T>(x, first, packed, begin, end); });

    // A thread is worth waking for some 2^20 products; smaller blocks give many threads equal shares.
    const int threads = static_cast<int>(std::clamp<std::int64_t>(panels * panels * words * kPanel * kPanel >> 21, 1, max_threads()));
    int side = kSide;
    const auto blocks = [&] { return (panels + side - 1) / side * ((panels + side - 1) / side + 1) / 2; };
    while (side > 1 && threads > 1 && blocks() < 4 * threads) side /= 2;
    parallel(threads, [&](int part) {
      std::int64_t index = 0;
      for (std::int64_t r = 0; r < panels; r += side) {
        for (std::int64_t c = r; c < panels; c += side) {
          if (index++ % threads == part) block<T>(H, x.columns, packed, r, c, side);
        }
      }
    });
  }
}

}  // namespace
#endif

void gram(float* H, const Tokens& x) {
#if PERP_X86
  if (use_avx512() && x.columns > 0) {
    if (x.dtype == DType::bf16) return gram_of<bf16>(H, x);
    if (x.dtype == DType::f16) return gram_of<f16>(H, x);
    return gram_of<float>(H, x);
  }
#endif
  (void)H;
  (void)x;
}

}  // namespace perp
