#include "cpu/sparsegpt.h"

#include <algorithm>
#include <cstring>

#include "cpu/parallel.h"
#include "cpu/platform.h"
#include "cpu/scratch.h"
#include "cpu/select.h"

namespace perp {
namespace {

// Of each `size` columns, `pruned` are pruned when the first is reached; size 0 leaves `kept` as it was given.
struct Groups {
  std::int64_t size;
  std::int64_t pruned;
};

float score(float weight, float pivot) { return (weight / pivot) * (weight / pivot); }

// ---- portable: one row at a time ----

void choose(const Block& b, const float* w, std::int64_t first, const Groups& groups, float* scores, std::uint8_t* kept) {
  for (std::int64_t i = 0; i < groups.size; ++i) scores[i] = score(w[first + i], b.U[(first + i) * (b.u_stride + 1)]);
  for (std::int64_t i = 0; i < groups.size; ++i) {
    std::int64_t rank = 0;
    for (std::int64_t j = 0; j < i; ++j) rank += scores[j] <= scores[i];
    for (std::int64_t j = i + 1; j < groups.size; ++j) rank += scores[j] < scores[i];
    kept[first + i] = rank >= groups.pruned;
  }
}

void rows_portable(const Block& b, const Groups& groups, std::int64_t begin, std::int64_t end) {
  thread_local Scratch scratch;
  float* scores = scratch.get<float>(groups.size);
  for (std::int64_t r = begin; r < end; ++r) {
    float *w = b.row(r), *errors = b.errors + r * b.errors_stride;
    std::uint8_t* kept = b.kept + r * b.kept_stride;
    for (std::int64_t j = 0; j < b.columns; ++j) {
      if (groups.size > 0 && j % groups.size == 0) choose(b, w, j, groups, scores, kept);
      const float* u = b.U + j * b.u_stride;
      const float error = kept[j] ? 0.0f : w[j] / u[j];
      errors[j] = error;
      if (kept[j]) continue;
      w[j] = 0.0f;
      for (std::int64_t l = j + 1; l < b.columns; ++l) w[l] -= error * u[l];
    }
  }
}

// ---- AVX-512: 32 rows at a time, each a lane of two registers ----
#if PERP_X86

constexpr std::int64_t kRows = 32;

// Errors of this many columns are taken off the columns to their right at once, from registers.
constexpr int kPanel = 8;

PERP_AVX512 void transpose(__m512 (&v)[16]) {
  __m512 a[16], b[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_ps(v[i], v[i + 1]);
    a[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      const __m512d low = _mm512_castps_pd(a[i + h]), high = _mm512_castps_pd(a[i + h + 2]);
      b[i + 2 * h] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      b[i + 2 * h + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512 x = _mm512_shuffle_f32x4(b[c], b[4 + c], 0x88), y = _mm512_shuffle_f32x4(b[c], b[4 + c], 0xdd);
    const __m512 z = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0x88), w = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0xdd);
    v[c] = _mm512_shuffle_f32x4(x, z, 0x88);
    v[4 + c] = _mm512_shuffle_f32x4(y, w, 0x88);
    v[8 + c] = _mm512_shuffle_f32x4(x, z, 0xdd);
    v[12 + c] = _mm512_shuffle_f32x4(y, w, 0xdd);
  }
}

// Bit r of out[c] = bit c of in[r].
PERP_AVX512 void transpose_bits(const std::uint16_t (&in)[16], std::uint16_t (&out)[16]) {
  const __m256i rows = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in));
#pragma GCC unroll 16
  for (int c = 0; c < 16; ++c) out[c] = _mm256_movepi16_mask(_mm256_slli_epi16(rows, 15 - c));
}

// 32 rows, transposed. `weights` [columns, 32] holds the weight where it is kept and its error where it is pruned; bit r
// of kept[column][h] is row 16 h + r. Padded with zeros to whole vectors of columns.
struct Lanes {
  float* weights;
  std::uint16_t (*kept)[2];
  float* scores;  // of one group

  float* column(std::int64_t j, int half) const { return weights + j * kRows + 16 * half; }
};

__mmask16 columns_left(const Block& b, std::int64_t first) {
  return static_cast<__mmask16>(b.columns - first < 16 ? (1u << (b.columns - first)) - 1 : 0xffffu);
}

PERP_AVX512 void load(const Block& b, std::int64_t first_row, bool masks, const Lanes& lanes) {
  for (std::int64_t c = 0; c < b.columns; c += 16) {
    const __mmask16 some = columns_left(b, c);
    for (int half = 0; half < 2; ++half) {
      __m512 v[16];
      std::uint16_t by_row[16], by_column[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        const std::int64_t r = first_row + 16 * half + i;
        const bool there = r < b.rows;
        v[i] = there ? _mm512_maskz_loadu_ps(some, b.row(r) + c) : _mm512_setzero_ps();
        if (masks) {
          const __m128i bytes = there ? _mm_maskz_loadu_epi8(some, b.kept + r * b.kept_stride + c) : _mm_setzero_si128();
          by_row[i] = _mm_test_epi8_mask(bytes, bytes);
        }
      }
      transpose(v);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) _mm512_store_ps(lanes.column(c + i, half), v[i]);
      if (masks) {
        transpose_bits(by_row, by_column);
        for (int i = 0; i < 16; ++i) lanes.kept[c + i][half] = by_column[i];
      }
    }
  }
}

PERP_AVX512 void store(const Block& b, std::int64_t first_row, bool masks, const Lanes& lanes) {
  for (std::int64_t c = 0; c < b.columns; c += 16) {
    const __mmask16 some = columns_left(b, c);
    for (int half = 0; half < 2; ++half) {
      __m512 v[16];
      std::uint16_t by_row[16], by_column[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        v[i] = _mm512_load_ps(lanes.column(c + i, half));
        by_column[i] = lanes.kept[c + i][half];
      }
      transpose(v);
      transpose_bits(by_column, by_row);
      const std::int64_t rows = std::min<std::int64_t>(16, b.rows - first_row - 16 * half);
      for (std::int64_t i = 0; i < rows; ++i) {
        const std::int64_t r = first_row + 16 * half + i;
        const __mmask16 kept = by_row[i];
        _mm512_mask_storeu_ps(b.row(r) + c, some, _mm512_maskz_mov_ps(kept, v[i]));
        _mm512_mask_storeu_ps(b.errors + r * b.errors_stride + c, some, _mm512_maskz_mov_ps(_knot_mask16(kept), v[i]));
        if (masks) _mm_mask_storeu_epi8(b.kept + r * b.kept_stride + c, some, _mm_maskz_set1_epi8(kept, 1));
      }
    }
  }
}

PERP_AVX512 void choose(const Block& b, const Lanes& lanes, std::int64_t first, const Groups& groups) {
  for (int half = 0; half < 2; ++half) {
    for (std::int64_t i = 0; i < groups.size; ++i) {
      const __m512 pivot = _mm512_set1_ps(b.U[(first + i) * (b.u_stride + 1)]);
      const __m512 ratio = _mm512_div_ps(_mm512_load_ps(lanes.column(first + i, half)), pivot);
      _mm512_store_ps(lanes.scores + 16 * i, _mm512_mul_ps(ratio, ratio));
    }
    const __m512i one = _mm512_set1_epi32(1), least = _mm512_set1_epi32(static_cast<int>(groups.pruned));
    for (std::int64_t i = 0; i < groups.size; ++i) {
      const __m512 own = _mm512_load_ps(lanes.scores + 16 * i);
      __m512i rank = _mm512_setzero_si512();
      for (std::int64_t j = 0; j < i; ++j) {
        rank = _mm512_mask_add_epi32(rank, _mm512_cmp_ps_mask(_mm512_load_ps(lanes.scores + 16 * j), own, _CMP_LE_OQ), rank, one);
      }
      for (std::int64_t j = i + 1; j < groups.size; ++j) {
        rank = _mm512_mask_add_epi32(rank, _mm512_cmp_ps_mask(_mm512_load_ps(lanes.scores + 16 * j), own, _CMP_LT_OQ), rank, one);
      }
      lanes.kept[first + i][half] = _mm512_cmpge_epi32_mask(rank, least);
    }
  }
}

// Columns [first, first + kWidth), and what their errors take off the columns to their right. A group may begin inside
// only if it ends inside too.
template <int kWidth>
PERP_AVX512 void panel(const Block& b, const Lanes& lanes, std::int64_t first, const Groups& groups) {
  __m512 errors[kWidth][2];
  const float* u[kWidth];
#pragma GCC unroll 8
  for (int i = 0; i < kWidth; ++i) {
    const std::int64_t j = first + i;
    if (groups.size > 0 && j % groups.size == 0) choose(b, lanes, j, groups);
    u[i] = b.U + j * b.u_stride;
    const __m512 pivot = _mm512_set1_ps(u[i][j]);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const __mmask16 kept = lanes.kept[j][half];
      const __m512 w = _mm512_load_ps(lanes.column(j, half));
      errors[i][half] = _mm512_maskz_div_ps(_knot_mask16(kept), w, pivot);
      _mm512_store_ps(lanes.column(j, half), _mm512_mask_mov_ps(errors[i][half], kept, w));
    }
#pragma GCC unroll 8
    for (int l = i + 1; l < kWidth; ++l) {
      const __m512 factor = _mm512_set1_ps(u[i][first + l]);
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        float* to = lanes.column(first + l, half);
        _mm512_store_ps(to, _mm512_fnmadd_ps(errors[i][half], factor, _mm512_load_ps(to)));
      }
    }
  }
  for (std::int64_t l = first + kWidth; l < b.columns; ++l) {
    __m512 low = _mm512_load_ps(lanes.column(l, 0)), high = _mm512_load_ps(lanes.column(l, 1));
#pragma GCC unroll 8
    for (int i = 0; i < kWidth; ++i) {
      const __m512 factor = _mm512_set1_ps(u[i][l]);
      low = _mm512_fnmadd_ps(errors[i][0], factor, low);
      high = _mm512_fnmadd_ps(errors[i][1], factor, high);
    }
    _mm512_store_ps(lanes.column(l, 0), low);
    _mm512_store_ps(lanes.column(l, 1), high);
  }
}

PERP_AVX512 void rows_avx512(const Block& b, const Groups& groups, std::int64_t begin, std::int64_t end) {
  thread_local Scratch weights, kept, scores;
  const std::int64_t width = (b.columns + 15) / 16 * 16;
  const Lanes lanes{weights.get<float>(width * kRows), kept.get<std::uint16_t[2]>(width), scores.get<float>(groups.size * 16)};
  std::memset(lanes.kept, 0, width * sizeof lanes.kept[0]);
  const bool whole = groups.size == 0 || kPanel % groups.size == 0 || groups.size % kPanel == 0;
  const std::int64_t by_panels = whole ? b.columns / kPanel * kPanel : 0;
  for (std::int64_t r = begin; r < end; r += kRows) {
    load(b, r, groups.size == 0, lanes);
    for (std::int64_t j = 0; j < by_panels; j += kPanel) panel<kPanel>(b, lanes, j, groups);
    for (std::int64_t j = by_panels; j < b.columns; ++j) panel<1>(b, lanes, j, groups);
    store(b, r, groups.size > 0, lanes);
  }
}
#endif

void solve(const Block& b, const Groups& groups) {
  if (b.rows == 0 || b.columns == 0) return;
#if PERP_X86
  if (use_avx512()) {
    // 32 rows of 128 columns take some 10 us.
    const std::int64_t bundles = (b.rows + kRows - 1) / kRows, grain = std::max<std::int64_t>(1, 256 / b.columns);
    return parallel_ranges(bundles, grain, [&](std::int64_t begin, std::int64_t end) {
      Block part = b;
      part.rows = std::min(b.rows, end * kRows);
      rows_avx512(part, groups, begin * kRows, part.rows);
    });
  }
#endif
  parallel_ranges(b.rows, std::max<std::int64_t>(1, 2048 / b.columns),
                  [&](std::int64_t begin, std::int64_t end) { rows_portable(b, groups, begin, end); });
}

}  // namespace

void sparsegpt_groups(const Block& block, std::int64_t group, std::int64_t pruned) { solve(block, {group, pruned}); }

void sparsegpt_share(const Block& block, std::int64_t pruned, bool jointly) {
  thread_local Scratch scratch;
  float* scores = scratch.get<float>(block.rows * block.columns);
  const std::int64_t grain = std::max<std::int64_t>(1, (1 << 16) / std::max<std::int64_t>(block.columns, 1));
  parallel_ranges(block.rows, grain, [&](std::int64_t begin, std::int64_t end) {
    thread_local Scratch diagonal;
    float* pivots = diagonal.get<float>(block.columns);
    for (std::int64_t j = 0; j < block.columns; ++j) pivots[j] = block.U[j * (block.u_stride + 1)];
    for (std::int64_t r = begin; r < end; ++r) {
      for (std::int64_t j = 0; j < block.columns; ++j) scores[r * block.columns + j] = score(block.row(r)[j], pivots[j]);
    }
  });
  const Scores s{scores, DType::f32, block.rows, block.columns, block.columns, block.kept, block.kept_stride};
  jointly ? select_jointly(s, pruned) : select_rows(s, pruned);  // weights that overflowed to NaN stay NaN either way
  solve(block, {0, 0});
}

}  // namespace perp
