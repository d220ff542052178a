#include "cpu/swap_round.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/parallel.h"
#include "cpu/platform.h"
#include "cpu/scratch.h"

namespace perp {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Of the magnitudes in a change of the loss, what a sum of up to 2^17 terms can lose in double.
constexpr double kGuard = 0x1p-36;

struct Pair {
  float change;  // infinity: there is none
  std::int64_t u;
  std::int64_t p;
};

float leave(float w, float c, float diagonal) { return w * (2 * c + w * diagonal); }
float enter(float w, float c, float diagonal) { return w * (w * diagonal - 2 * c); }

// ---- the verdict ----

// The sums over a row's pruned weights times a row of H, and of their magnitudes. Eight of each, so that an addition need
// not wait for the one before.
struct Sums {
  double signed_sum, magnitude;
};

Sums correlate(const float* w, const std::uint8_t* kept, const float* h, std::int64_t count) {
  constexpr int kLanes = 8;
  double sum[kLanes] = {}, size[kLanes] = {};
  for (std::int64_t j = 0; j < count; ++j) {
    const double term = kept[j] ? 0.0 : static_cast<double>(w[j]) * h[j];
    sum[j % kLanes] += term;
    size[j % kLanes] += std::abs(term);
  }
  Sums all{0, 0};
  for (int lane = 0; lane < kLanes; ++lane) {
    all.signed_sum += sum[lane];
    all.magnitude += size[lane];
  }
  return all;
}

// Trades the pair if that lowers the loss for certain.
void decide(const Swaps& s, std::int64_t row, const Pair& pair) {
  s.gain[row] = 0;
  if (!(std::abs(pair.change) < kInfinity)) return;
  const float* w = s.weight + row * s.weight_stride;
  std::uint8_t* kept = s.kept + row * s.kept_stride;
  const float *h_u = s.H + pair.u * s.H_stride, *h_p = s.H + pair.p * s.H_stride;
  const double w_u = w[pair.u], w_p = w[pair.p];
  const Sums to_u = correlate(w, kept, h_u, s.columns), to_p = correlate(w, kept, h_p, s.columns);
  const double own = w_u * w_u * h_u[pair.u] + w_p * w_p * h_p[pair.p], joint = 2 * w_u * w_p * h_u[pair.p];
  const double change = 2 * w_u * to_u.signed_sum - 2 * w_p * to_p.signed_sum + own - joint;
  const double size = 2 * std::abs(w_u) * to_u.magnitude + 2 * std::abs(w_p) * to_p.magnitude + own + std::abs(joint);
  if (!(change < -kGuard * size)) return;
  s.gain[row] = static_cast<float>(-change);
  kept[pair.u] = 0;
  kept[pair.p] = 1;
  float* c = s.correlation + row * s.correlation_stride;
  const float a = w[pair.u], b = w[pair.p];
  for (std::int64_t j = 0; j < s.columns; ++j) c[j] += a * h_u[j] - b * h_p[j];
}

// ---- groups: the few pairs of each, by a scalar loop ----

void trade_in_groups(const Swaps& s, std::int64_t group, const float* blocks, std::int64_t begin, std::int64_t end) {
  for (std::int64_t row = begin; row < end; ++row) {
    const float *w = s.weight + row * s.weight_stride, *c = s.correlation + row * s.correlation_stride;
    const std::uint8_t* kept = s.kept + row * s.kept_stride;
    Pair best{kInfinity, 0, 0};
    for (std::int64_t first = 0; first < s.columns; first += group) {
      for (std::int64_t u = first; u < first + group; ++u) {
        if (!kept[u]) continue;
        const float* g = blocks + u * group - first;
        const float alone = leave(w[u], c[u], g[u]), twice = -2 * w[u];
        for (std::int64_t p = first; p < first + group; ++p) {
          if (kept[p]) continue;
          const float change = alone + (enter(w[p], c[p], blocks[p * group + p - first]) + twice * (w[p] * g[p]));
          if (change < best.change) best = {change, u, p};
        }
      }
    }
    decide(s, row, best);
  }
}

// ---- whole rows: a tile of H against some rows at a time ----

// A tile of H is 256 KiB, which stays in L2 beside as much of these rows while each of them reads all of it.
constexpr std::int64_t kRows = 32;
constexpr std::int64_t kTileRows = 64;
constexpr std::int64_t kTileColumns = 1024;

// Kept weights whose rows of H are read side by side: each load of the row's own numbers then serves four.
constexpr int kAbreast = 4;

// One row being searched. Beyond the columns, up to a whole vector, nothing can be revived.
struct Row {
  const float* w;
  const float* c;
  float* enter;        // what reviving each weight costs alone, infinity where it is kept
  std::int32_t* kept;  // the places of kept weights, ascending, `count` of them
  std::int64_t count;
  std::int64_t first;  // the first of `kept` that lies in the tile in hand
  float lowest[kTileRows];
  Pair best;
};

// lowest[i] = min(lowest[i], least of enter + twice[i] w h[i] over `count` columns).
template <int kWidth>
void search_portable(const float* const (&h)[kWidth], const float (&twice)[kWidth], const float* w, const float* enter,
                     std::int64_t count, float* lowest) {
  for (int i = 0; i < kWidth; ++i) {
    float least = lowest[i];
    for (std::int64_t j = 0; j < count; ++j) least = std::min(least, enter[j] + twice[i] * (w[j] * h[i][j]));
    lowest[i] = least;
  }
}

std::int64_t partner_portable(const float* h, float twice, const float* w, const float* enter, std::int64_t count) {
  std::int64_t place = 0;
  float least = kInfinity;
  for (std::int64_t j = 0; j < count; ++j) {
    const float change = enter[j] + twice * (w[j] * h[j]);
    if (change < least) least = change, place = j;
  }
  return place;
}

#if PERP_X86
PERP_AVX512 __mmask16 left(std::int64_t count) { return static_cast<__mmask16>(count < 16 ? (1u << count) - 1 : 0xffffu); }

// The columns that the mask leaves out are never the least: enter is infinite there.
PERP_AVX512 __m512 changes(const float* h, __m512 twice, const float* w, __m512 enter, __mmask16 some) {
  const __m512 product = _mm512_mul_ps(_mm512_maskz_loadu_ps(some, w), _mm512_maskz_loadu_ps(some, h));
  return _mm512_fmadd_ps(twice, product, enter);
}

template <int kWidth>
PERP_AVX512 void search_avx512(const float* const (&h)[kWidth], const float (&twice)[kWidth], const float* w, const float* enter,
                               std::int64_t count, float* lowest) {
  __m512 least[kWidth], factor[kWidth];
#pragma GCC unroll 4
  for (int i = 0; i < kWidth; ++i) {
    least[i] = _mm512_set1_ps(lowest[i]);
    factor[i] = _mm512_set1_ps(twice[i]);
  }
  std::int64_t j = 0;
  for (; j + 16 <= count; j += 16) {
    const __m512 weight = _mm512_loadu_ps(w + j), alone = _mm512_load_ps(enter + j);
#pragma GCC unroll 4
    for (int i = 0; i < kWidth; ++i) {
      const __m512 product = _mm512_mul_ps(weight, _mm512_loadu_ps(h[i] + j));
      least[i] = _mm512_min_ps(_mm512_fmadd_ps(factor[i], product, alone), least[i]);  // of a NaN, the second
    }
  }
  if (j < count) {
    const __mmask16 some = left(count - j);
    const __m512 alone = _mm512_load_ps(enter + j);
#pragma GCC unroll 4
    for (int i = 0; i < kWidth; ++i) least[i] = _mm512_min_ps(changes(h[i] + j, factor[i], w + j, alone, some), least[i]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < kWidth; ++i) lowest[i] = _mm512_reduce_min_ps(least[i]);
}

PERP_AVX512 std::int64_t partner_avx512(const float* h, float twice, const float* w, const float* enter, std::int64_t count) {
  const float* const rows[1] = {h};
  const float factors[1] = {twice};
  float least[1] = {kInfinity};
  search_avx512<1>(rows, factors, w, enter, count, least);
  const __m512 factor = _mm512_set1_ps(twice), wanted = _mm512_set1_ps(least[0]);
  for (std::int64_t j = 0; j < count; j += 16) {
    const __mmask16 some = left(count - j);
    const __m512 change = changes(h + j, factor, w + j, _mm512_load_ps(enter + j), some);
    const __mmask16 found = _mm512_mask_cmpeq_ps_mask(some, change, wanted);
    if (found) return j + __builtin_ctz(found);
  }
  return 0;
}
#endif

// How rows are searched on one code path.
struct Search {
  decltype(&search_portable<kAbreast>) several;
  decltype(&search_portable<1>) one;
  decltype(&partner_portable) partner;
};

void prepare(const Swaps& s, std::int64_t index, std::int64_t width, float* enters, std::int32_t* places, Row& row) {
  row.w = s.weight + index * s.weight_stride;
  row.c = s.correlation + index * s.correlation_stride;
  row.enter = enters;
  row.kept = places;
  row.count = row.first = 0;
  row.best = {kInfinity, 0, 0};
  const std::uint8_t* kept = s.kept + index * s.kept_stride;
  for (std::int64_t j = 0; j < s.columns; ++j) {
    row.enter[j] = kept[j] ? kInfinity : enter(row.w[j], row.c[j], s.H[j * (s.H_stride + 1)]);
    if (kept[j]) row.kept[row.count++] = static_cast<std::int32_t>(j);
  }
  std::fill(row.enter + s.columns, row.enter + width, kInfinity);
}

// The kept weights [row.first, end) of the list against the pruned ones in `count` columns from `column` on.
void search_tile(const Swaps& s, const Search& search, Row& row, std::int64_t end, std::int64_t column, std::int64_t count) {
  const float *w = row.w + column, *enters = row.enter + column;
  const auto row_of_H = [&](std::int64_t i) { return s.H + row.kept[i] * s.H_stride + column; };
  const auto twice = [&](std::int64_t i) { return -2 * row.w[row.kept[i]]; };
  std::int64_t i = row.first;
  for (; i + kAbreast <= end; i += kAbreast) {
    const float* const h[kAbreast] = {row_of_H(i), row_of_H(i + 1), row_of_H(i + 2), row_of_H(i + 3)};
    const float factors[kAbreast] = {twice(i), twice(i + 1), twice(i + 2), twice(i + 3)};
    search.several(h, factors, w, enters, count, row.lowest + (i - row.first));
  }
  for (; i < end; ++i) {
    const float* const h[1] = {row_of_H(i)};
    const float factors[1] = {twice(i)};
    search.one(h, factors, w, enters, count, row.lowest + (i - row.first));
  }
}

void trade_in_rows(const Swaps& s, const Search& search, std::int64_t begin, std::int64_t end) {
  thread_local Scratch enter_scratch, place_scratch, row_scratch;
  const std::int64_t width = (s.columns + 15) / 16 * 16;
  float* enters = enter_scratch.get<float>(kRows * width);
  std::int32_t* places = place_scratch.get<std::int32_t>(kRows * width);
  Row* rows = row_scratch.get<Row>(kRows);
  for (std::int64_t start = begin; start < end; start += kRows) {
    const std::int64_t count = std::min(kRows, end - start);
    for (std::int64_t r = 0; r < count; ++r) prepare(s, start + r, width, enters + r * width, places + r * width, rows[r]);
    for (std::int64_t u = 0; u < s.columns; u += kTileRows) {
      std::int64_t last[kRows];
      for (std::int64_t r = 0; r < count; ++r) {
        Row& row = rows[r];
        last[r] = std::lower_bound(row.kept + row.first, row.kept + row.count, u + kTileRows) - row.kept;
        std::fill(row.lowest, row.lowest + kTileRows, kInfinity);
      }
      for (std::int64_t p = 0; p < s.columns; p += kTileColumns) {
        const std::int64_t columns = std::min(kTileColumns, s.columns - p);
        for (std::int64_t r = 0; r < count; ++r) search_tile(s, search, rows[r], last[r], p, columns);
      }
      for (std::int64_t r = 0; r < count; ++r) {
        Row& row = rows[r];
        for (std::int64_t i = row.first; i < last[r]; ++i) {
          const std::int64_t place = row.kept[i];
          const float change = leave(row.w[place], row.c[place], s.H[place * (s.H_stride + 1)]) + row.lowest[i - row.first];
          if (change < row.best.change) row.best = {change, place, 0};
        }
        row.first = last[r];
      }
    }
    for (std::int64_t r = 0; r < count; ++r) {
      Row& row = rows[r];
      if (row.best.change < kInfinity) {
        const float* h = s.H + row.best.u * s.H_stride;
        row.best.p = search.partner(h, -2 * row.w[row.best.u], row.w, row.enter, s.columns);
      }
      decide(s, start + r, row.best);
    }
  }
}

}  // namespace

void swap_round(const Swaps& s, std::int64_t group) {
  if (s.columns == 0) {
    std::fill(s.gain, s.gain + s.rows, 0.0f);
    return;
  }
  if (group < s.columns) {
    thread_local Scratch scratch;
    float* blocks = scratch.get<float>(s.columns * group);  // those on the diagonal of H: elsewhere in it they lie apart
    for (std::int64_t j = 0; j < s.columns; ++j) {
      std::copy_n(s.H + j * s.H_stride + j / group * group, group, blocks + j * group);
    }
    return parallel_ranges(s.rows, std::max<std::int64_t>(1, (1 << 14) / s.columns),
                           [&](std::int64_t begin, std::int64_t end) { trade_in_groups(s, group, blocks, begin, end); });
  }
  Search search{&search_portable<kAbreast>, &search_portable<1>, &partner_portable};
#if PERP_X86
  if (use_avx512()) search = {&search_avx512<kAbreast>, &search_avx512<1>, &partner_avx512};
#endif
  // Some 2^17 pairs are worth waking a thread for.
  const std::int64_t grain = std::max<std::int64_t>(1, (1 << 17) / (s.columns * s.columns));
  parallel_ranges(s.rows, grain, [&](std::int64_t begin, std::int64_t end) { trade_in_rows(s, search, begin, end); });
}

}  // namespace perp
