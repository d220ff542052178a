#include "cpu/sparse_linear.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "cpu/fused_avx512.h"
#include "cpu/linear.h"
#include "cpu/linear_avx2.h"
#include "cpu/panel_avx512.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/segment.h"

namespace perp {
namespace {

// A thread is worth waking for about this many values (some 10 us of one core).
constexpr std::int64_t kValuesPerThread = 64 * 1024;

// Tokens taken at a time, whole blocks of them: the prepared x is memory that a thread keeps.
constexpr std::int64_t kMostTokens = 85 * kBlockTokens;

// x as the kernels read it: in blocks of `block` tokens, each stored vector of `lanes` columns by vector of columns, zero
// from the last column to `padded(columns)`.
template <class T, class X>
const X* prepare(const LinearCall& call, std::int64_t columns, std::int64_t block, std::int64_t lanes) {
  thread_local Scratch scratch;
  const std::int64_t width = padded(columns);
  X* out = scratch.get<X>(call.tokens * width);
  parallel_ranges(call.tokens, kValuesPerThread / width, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t t = begin; t < end; ++t) {
      const std::int64_t first = t / block * block, count = std::min(block, call.tokens - first);
      const T* from = static_cast<const T*>(call.x) + t * call.x_stride;
      X* to = out + first * width + (t - first) * lanes;
      for (std::int64_t j = 0; j < width; j += lanes, to += count * lanes) {
        const std::int64_t filled = std::clamp<std::int64_t>(columns - j, 0, lanes);
        if constexpr (std::is_same_v<T, X>) {
          std::memcpy(to, from + j, filled * sizeof(T));
        } else {
          for (std::int64_t i = 0; i < filled; ++i) to[i] = to_float(from[j + i]);
        }
        std::memset(static_cast<void*>(to + filled), 0, (lanes - filled) * sizeof(X));
      }
    }
  });
  return out;
}

// ---- portable: each row is decoded into floats once and multiplied with every token ----

template <class T>
void decode_row(const Weight& weight, std::int64_t row, float* out) {
  const T* values = weight.row_values<T>(row);
  if (weight.layout == Layout::dense) {
    for (std::int64_t j = 0; j < weight.columns; ++j) out[j] = to_float(values[j]);
    return;
  }
  SegmentBits bits;
  for (std::int64_t j = 0; j < weight.columns; j += kSegment) {
    const std::int64_t count = std::min(kSegment, weight.columns - j);
    read_bits(weight, row, j, count, bits);
    values = expand(values, bits.bytes, count, out + j);
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
    for (std::int64_t t = 0; t < call.tokens; ++t) store<T>(call, r, t, dot(row, x + t * width, width));
  }
}

// ---- AVX-512 ----
#if PERP_X86

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
    using X = typename Codec<T>::X;
    const X* x = prepare<T, X>(call, weight.columns, block_tokens(call.tokens), 64 / sizeof(X));
    const auto rows = weight.layout == Layout::dense    ? rows_avx512<T, Layout::dense>
                      : weight.layout == Layout::bitmap ? rows_avx512<T, Layout::bitmap>
                                                        : rows_avx512<T, Layout::semi24>;
    return share_rows(weight, call, [&](std::int64_t begin, std::int64_t end) { rows(weight, call, x, begin, end); });
  }
  if (use_avx2()) {
    const float* x = prepare<T, float>(call, weight.columns, block_tokens_avx2(call.tokens), 8);
    const RowsAvx2 rows = rows_avx2<T>(weight.layout);
    return share_rows(weight, call, [&](std::int64_t begin, std::int64_t end) { rows(weight, call, x, begin, end); });
  }
#endif
  const float* x = prepare<T, float>(call, weight.columns, 1, padded(weight.columns));
  share_rows(weight, call, [&](std::int64_t begin, std::int64_t end) { rows_portable<T>(weight, call, x, begin, end); });
}

}  // namespace

void sparse_linear(const Weight& weight, const LinearCall& call) {
  if (call.tokens > kMostTokens) {
    const std::int64_t size = info(weight.dtype).size;
    for (std::int64_t token = 0; token < call.tokens; token += kMostTokens) {
      LinearCall part = call;
      part.x = static_cast<const char*>(call.x) + token * call.x_stride * size;
      part.y = static_cast<char*>(call.y) + token * call.y_stride * size;
      part.tokens = std::min(kMostTokens, call.tokens - token);
      sparse_linear(weight, part);
    }
    return;
  }
  if (weight.dtype == DType::bf16) return linear<bf16>(weight, call);
  if (weight.dtype == DType::f16) return linear<f16>(weight, call);
  linear<float>(weight, call);
}

}  // namespace perp
