#include "cpu/sparse_linear.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "cpu/convert.h"
#include "cpu/decode_avx512.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace perp {
namespace {

constexpr std::int64_t kPad = 128;  // activations are padded with zeros to whole blocks of columns, so kernels need no tails

std::int64_t padded(std::int64_t columns) { return (columns + kPad - 1) / kPad * kPad; }

// Distance of rows of activations and of decoded weights: a cache line more than their width, since rows a multiple of
// 4 KB apart would all fall into the same few sets of L1.
template <class X>
std::int64_t pitch(std::int64_t columns) {
  return padded(columns) + 64 / static_cast<std::int64_t>(sizeof(X));
}

// A thread is worth waking for about this many values (some 10 us of one core).
constexpr std::int64_t kValuesPerThread = 64 * 1024;

// Rounds the sum of row `row`, token `token` into y.
template <class T>
void store(const LinearCall& call, std::int64_t row, std::int64_t token, float sum) {
  if (call.bias != nullptr) {
    sum += call.bias_is_float ? static_cast<const float*>(call.bias)[row] : to_float(static_cast<const T*>(call.bias)[row]);
  }
  static_cast<T*>(call.y)[token * call.y_stride + row] = from_float<T>(sum);
}

// ---- portable: each row is decoded into floats once and multiplied with every token ----

template <class T>
void decode_row(const Weight& weight, std::int64_t row, float* out) {
  const T* values = weight.row_values<T>(row);
  const std::uint8_t* index = weight.row_index(row);
  if (weight.layout == Layout::dense) {
    for (std::int64_t j = 0; j < weight.columns; ++j) out[j] = to_float(values[j]);
    return;
  }
  std::fill_n(out, weight.columns, 0.0f);
  if (weight.layout == Layout::bitmap) {
    for (std::int64_t j = 0; j < weight.columns; ++j) {
      if ((index[j / 8] >> (j % 8)) & 1) out[j] = to_float(*values++);
    }
    return;
  }
  for (std::int64_t j = 0; j < weight.columns; j += 4) {
    const unsigned nibble = index[j / 8] >> (j % 8);
    out[j + (nibble & 3)] = to_float(*values++);
    out[j + ((nibble >> 2) & 3)] = to_float(*values++);
  }
}

// Eight partial sums, which a compiler may keep in vector registers without being allowed to reorder additions.
float dot(const float* a, const float* b, std::int64_t count) {
  float sums[8] = {};
  for (std::int64_t j = 0; j < count; j += 8) {
    for (int lane = 0; lane < 8; ++lane) sums[lane] += a[j + lane] * b[j + lane];
  }
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

template <class T>
void rows_portable(const Weight& weight, const LinearCall& call, const float* x, std::int64_t begin, std::int64_t end) {
  thread_local Scratch scratch;
  const std::int64_t width = padded(weight.columns);
  float* row = scratch.get<float>(width);
  std::fill(row + weight.columns, row + width, 0.0f);
  for (std::int64_t r = begin; r < end; ++r) {
    decode_row<T>(weight, call.first_row + r, row);
    for (std::int64_t t = 0; t < call.tokens; ++t) store<T>(call, r, t, dot(row, x + t * pitch<float>(weight.columns), width));
  }
}

// ---- AVX-512 ----
#if PERP_X86

// kRows rows with kTokens tokens straight from the packed form. Up to 4 / kTokens sums per product, added at the end,
// keep one row and token from waiting on the latency of its own multiply-add.
template <class T, Layout kLayout, int kRows, int kTokens>
PERP_AVX512 void fused(const Weight& weight, const LinearCall& call, const typename Codec<T>::X* x, std::int64_t row) {
  using C = Codec<T>;
  constexpr int kSums = kTokens >= 4 ? 1 : 4 / kTokens;
  const std::int64_t width = padded(weight.columns), x_pitch = pitch<typename C::X>(weight.columns);
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
  for (std::int64_t j = 0; j < width; j += kBlock) {
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
        const __m512i xv = _mm512_load_si512(x + t * x_pitch + j + v * C::kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) sums[r][t][v % kSums] = C::fma(w[r], xv, sums[r][t][v % kSums]);
      }
    }
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

// 4 rows x 6 tokens: 24 sums, 4 operands of the weight and 1 of x are 29 of the 32 registers.
constexpr int kTileRows = 4;
constexpr int kTileTokens = 6;
constexpr int kPanelRows = 32;

// Columns [begin, end) of kTileRows decoded rows with kTokens tokens, added to sums[kTileRows * kTokens]. Each step also
// fetches one cache line from `ahead` on.
template <class C, int kTokens>
PERP_AVX512 void tile(const typename C::X* rows, const typename C::X* x, std::int64_t pitch, std::int64_t begin,
                      std::int64_t end, float* sums, const char* ahead) {
  constexpr int kLanes = 64 / sizeof(typename C::X);
  __m512 sum[kTileRows][kTokens];
#pragma GCC unroll 4
  for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 6
    for (int t = 0; t < kTokens; ++t) sum[r][t] = _mm512_load_ps(sums + 16 * (r * kTokens + t));
  }
  for (std::int64_t j = begin; j < end; j += kLanes) {
    _mm_prefetch(ahead, _MM_HINT_T1);
    ahead += 64;
    __m512i w[kTileRows];
#pragma GCC unroll 4
    for (int r = 0; r < kTileRows; ++r) w[r] = _mm512_load_si512(rows + r * pitch + j);
#pragma GCC unroll 6
    for (int t = 0; t < kTokens; ++t) {
      const __m512i xv = _mm512_load_si512(x + t * pitch + j);
#pragma GCC unroll 4
      for (int r = 0; r < kTileRows; ++r) sum[r][t] = C::fma(w[r], xv, sum[r][t]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 6
    for (int t = 0; t < kTokens; ++t) _mm512_store_ps(sums + 16 * (r * kTokens + t), sum[r][t]);
  }
}

// Decodes one row to `out`, padded with zeros to a whole number of blocks.
template <class T, Layout kLayout>
PERP_AVX512 void decode(const Weight& weight, std::int64_t row, typename Codec<T>::X* out) {
  using C = Codec<T>;
  RowCursor<T, kLayout> cursor(weight, row);
  for (std::int64_t j = 0; j < weight.columns; j += kBlock) {
    cursor.block();
#pragma GCC unroll 8
    for (int v = 0; v < kBlock / C::kLanes; ++v) _mm512_store_si512(out + j + v * C::kLanes, cursor.vector(v));
  }
}

// The sums of four registers' lanes: two rounds of transposing adds, then one register to fold. A reduction of each
// alone takes four times the instructions, a tenth of the time of a whole product.
PERP_AVX512 __m128 reduce4(const float* a, const float* b, const float* c, const float* d) {
  const __m512 a_ = _mm512_load_ps(a), b_ = _mm512_load_ps(b), c_ = _mm512_load_ps(c), d_ = _mm512_load_ps(d);
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a_, b_), _mm512_unpackhi_ps(a_, b_));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c_, d_), _mm512_unpackhi_ps(c_, d_));
  const __m512 abcd = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

PERP_AVX512 __m128 load4(const float* p) { return _mm_loadu_ps(p); }
PERP_AVX512 __m128 load4(const f16* p) { return _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))); }
PERP_AVX512 __m128 load4(const bf16* p) {
  return _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))), 16));
}
PERP_AVX512 void store4(float* p, __m128 v) { _mm_storeu_ps(p, v); }
PERP_AVX512 void store4(f16* p, __m128 v) {
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
PERP_AVX512 void store4(bf16* p, __m128 v) {
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), reinterpret_cast<__m128i>(_mm_cvtneps_pbh(v)));
}

// store() for four consecutive rows.
template <class T>
PERP_AVX512 void store_rows(const LinearCall& call, std::int64_t row, std::int64_t token, __m128 sums) {
  if (call.bias != nullptr) {
    sums = _mm_add_ps(sums, call.bias_is_float ? load4(static_cast<const float*>(call.bias) + row)
                                               : load4(static_cast<const T*>(call.bias) + row));
  }
  store4(static_cast<T*>(call.y) + token * call.y_stride + row, sums);
}

// Decoded rows [first, first + count) of the call with tokens [token, token + kTokens).
template <class T, int kTokens>
PERP_AVX512 void tile_panel(const LinearCall& call, const typename Codec<T>::X* panel, std::int64_t first,
                            std::int64_t count, const typename Codec<T>::X* x, std::int64_t columns, std::int64_t token,
                            const char*& ahead) {
  static_assert(kTileRows == 4);
  using X = typename Codec<T>::X;
  const std::int64_t width = padded(columns), stride = pitch<X>(columns);
  constexpr std::int64_t kDepth = 2048 / sizeof(X);  // 6 tokens x 2 KB stay in L1 while all rows of the panel pass by
  alignas(64) float sums[kPanelRows / kTileRows][16 * kTileRows * kTokens];
  std::memset(sums, 0, (count + kTileRows - 1) / kTileRows * sizeof sums[0]);
  for (std::int64_t j = 0; j < width; j += kDepth) {
    const std::int64_t end = std::min(width, j + kDepth);
    for (std::int64_t r = 0; r < count; r += kTileRows) {
      tile<Codec<T>, kTokens>(panel + r * stride, x + token * stride, stride, j, end, sums[r / kTileRows], ahead);
      ahead += (end - j) * sizeof(X);
    }
  }
  for (std::int64_t r = 0; r < count; r += kTileRows) {
    for (int t = 0; t < kTokens; ++t) {
      const float* lanes = sums[r / kTileRows] + 16 * t;
      constexpr int kNext = 16 * kTokens;
      const __m128 four = reduce4(lanes, lanes + kNext, lanes + 2 * kNext, lanes + 3 * kNext);
      if (count - r >= kTileRows) {
        store_rows<T>(call, first + r, token + t, four);
      } else {
        for (std::int64_t i = 0; i < count - r; ++i) store<T>(call, first + r + i, token + t, four[i]);
      }
    }
  }
}

template <class T, Layout kLayout>
void panel_rows(const Weight& weight, const LinearCall& call, const typename Codec<T>::X* x, std::int64_t begin,
                std::int64_t end) {
  using X = typename Codec<T>::X;
  thread_local Scratch scratch;
  const std::int64_t stride = pitch<X>(weight.columns);
  // A quarter of a megabyte of decoded rows: they stay in L2 beside the tokens that are multiplied with them.
  const std::int64_t fitting = (256 * 1024) / (stride * static_cast<int>(sizeof(X))) / kTileRows * kTileRows;
  const std::int64_t rows = std::clamp<std::int64_t>(fitting, kTileRows, kPanelRows);
  X* panel = scratch.get<X>(rows * stride);
  for (std::int64_t first = begin; first < end; first += rows) {
    const std::int64_t count = std::min(rows, end - first);
    for (std::int64_t r = 0; r < count; ++r) decode<T, kLayout>(weight, call.first_row + first + r, panel + r * stride);
    const std::int64_t unused = (kTileRows - count % kTileRows) % kTileRows;
    std::memset(static_cast<void*>(panel + count * stride), 0, unused * stride * sizeof(X));
    // The next panel's values come in while this one is multiplied.
    const char* ahead = reinterpret_cast<const char*>(weight.row_values<T>(call.first_row + first + count));
    std::int64_t token = 0;
    for (; token + kTileTokens <= call.tokens; token += kTileTokens) {
      tile_panel<T, kTileTokens>(call, panel, first, count, x, weight.columns, token, ahead);
    }
    switch (call.tokens - token) {
      case 1: tile_panel<T, 1>(call, panel, first, count, x, weight.columns, token, ahead); break;
      case 2: tile_panel<T, 2>(call, panel, first, count, x, weight.columns, token, ahead); break;
      case 3: tile_panel<T, 3>(call, panel, first, count, x, weight.columns, token, ahead); break;
      case 4: tile_panel<T, 4>(call, panel, first, count, x, weight.columns, token, ahead); break;
      case 5: tile_panel<T, 5>(call, panel, first, count, x, weight.columns, token, ahead); break;
    }
  }
}

template <class T, Layout kLayout>
void rows_avx512(const Weight& weight, const LinearCall& call, const typename Codec<T>::X* x, std::int64_t begin,
                 std::int64_t end) {
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
#endif

// x as the kernels read it: rows of X, `pitch(columns)` apart and zero from the last column to `padded(columns)`.
template <class T, class X>
const X* prepare(const LinearCall& call, std::int64_t columns) {
  thread_local Scratch scratch;
  const std::int64_t width = padded(columns), stride = pitch<X>(columns);
  X* out = scratch.get<X>(call.tokens * stride);
  for (std::int64_t t = 0; t < call.tokens; ++t) {
    const T* from = static_cast<const T*>(call.x) + t * call.x_stride;
    X* to = out + t * stride;
    if constexpr (std::is_same_v<T, X>) {
      std::memcpy(to, from, columns * sizeof(T));
    } else {
      for (std::int64_t j = 0; j < columns; ++j) to[j] = to_float(from[j]);
    }
    std::memset(static_cast<void*>(to + columns), 0, (width - columns) * sizeof(X));
  }
  return out;
}

// Runs body(begin, end) on runs of rows of the call that hold about equally many values.
template <class Body>
void share_rows(const Weight& weight, const LinearCall& call, const Body& body) {
  const std::int64_t last = call.first_row + call.rows;
  const std::int64_t values = weight.starts.begin(last) - weight.starts.begin(call.first_row);
  const int parts = static_cast<int>(std::clamp<std::int64_t>(values * call.tokens / kValuesPerThread, 1, max_threads()));
  parallel(parts, [&](int part) {
    body(weight.cut(call.first_row, last, part, parts) - call.first_row,
         weight.cut(call.first_row, last, part + 1, parts) - call.first_row);
  });
}

template <class T>
void linear(const Weight& weight, const LinearCall& call) {
#if PERP_X86
  if (use_avx512()) {
    const auto* x = prepare<T, typename Codec<T>::X>(call, weight.columns);
    const auto rows = weight.layout == Layout::dense    ? rows_avx512<T, Layout::dense>
                      : weight.layout == Layout::bitmap ? rows_avx512<T, Layout::bitmap>
                                                        : rows_avx512<T, Layout::semi24>;
    return share_rows(weight, call, [&](std::int64_t begin, std::int64_t end) { rows(weight, call, x, begin, end); });
  }
#endif
  const float* x = prepare<T, float>(call, weight.columns);
  share_rows(weight, call, [&](std::int64_t begin, std::int64_t end) { rows_portable<T>(weight, call, x, begin, end); });
}

}  // namespace

void sparse_linear(const Weight& weight, const LinearCall& call) {
  if (weight.dtype == DType::bf16) return linear<bf16>(weight, call);
  if (weight.dtype == DType::f16) return linear<f16>(weight, call);
  linear<float>(weight, call);
}

}  // namespace perp
