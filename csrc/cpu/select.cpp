#include "cpu/select.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/platform.h"
#include "cpu/rank.h"
#include "cpu/scratch.h"

namespace perp {
namespace {

// A thread is worth waking for about this many scores (some 20 us of one core).
constexpr std::int64_t kGrain = 1 << 14;

// A longer row leaves L2 and is cheaper to rank by digits.
constexpr std::int64_t kLongRow = 1 << 17;

// Calls body(row) for each row, in parallel; returns whether it did so for all.
template <class Body>
bool all_rows(const Scores& s, const Body& body) {
  std::vector<char> failed(max_threads(), 0);
  const std::int64_t grain = std::max<std::int64_t>(1, kGrain / std::max<std::int64_t>(s.columns, 1));
  const int parts = static_cast<int>(std::clamp<std::int64_t>(s.rows / grain, 1, max_threads()));
  parallel(parts, [&](int part) {
    bool good = true;
    for (std::int64_t r = s.rows * part / parts; r < s.rows * (part + 1) / parts; ++r) good &= body(r);
    failed[part] = !good;
  });
  return std::find(failed.begin(), failed.end(), 1) == failed.end();
}

// ---- rows ----

template <class T>
PERP_INLINE bool row(const T* scores, std::int64_t count, std::int64_t pruned, typename Ranked<T>::Key* keys, std::uint8_t* kept) {
  using Key = typename Ranked<T>::Key;
  Key low, high;
  const bool good = to_keys(scores, count, keys, low, high);
  Cut<Key> cut = find_cut<Key>(keys, static_cast<Key>(count), static_cast<Key>(pruned), low, high);
  write_mask(keys, count, cut, kept);
  return good;
}

template <class T>
bool row_portable(const T* scores, std::int64_t count, std::int64_t pruned, typename Ranked<T>::Key* keys, std::uint8_t* kept) {
  return row(scores, count, pruned, keys, kept);
}

#if PERP_X86
template <class T>
PERP_AVX512 bool row_avx512(const T* scores, std::int64_t count, std::int64_t pruned, typename Ranked<T>::Key* keys,
                            std::uint8_t* kept) {
  return row(scores, count, pruned, keys, kept);
}
#endif

template <class T>
auto row_ranker() {
  auto* rank = &row_portable<T>;
#if PERP_X86
  if (use_avx512()) rank = &row_avx512<T>;
#endif
  return rank;
}

template <class T>
bool rows_of(const Scores& s, std::int64_t pruned) {
  auto* rank = row_ranker<T>();
  return all_rows(s, [&](std::int64_t r) {
    thread_local Scratch scratch;
    auto* keys = scratch.get<typename Ranked<T>::Key>(s.columns);
    return rank(static_cast<const T*>(s.data) + r * s.stride, s.columns, pruned, keys, s.kept + r * s.kept_stride);
  });
}

// ---- groups ----

// A score's rank in its group is the number of those pruned before it.
template <class T>
bool groups_portable(const T* scores, std::int64_t count, std::int64_t group, std::int64_t pruned,
                     typename Ranked<T>::Key* keys, std::uint8_t* kept) {
  using Key = typename Ranked<T>::Key;
  constexpr std::int64_t kCounted = 32;  // above, bisection takes fewer comparisons than the square of the group
  Key low, high;
  const bool good = to_keys(scores, count, keys, low, high);
  for (std::int64_t first = 0; first < count; first += group, keys += group, kept += group) {
    if (group > kCounted) {
      Cut<Key> cut = find_cut<Key>(keys, static_cast<Key>(group), static_cast<Key>(pruned), low, high);
      write_mask(keys, group, cut, kept);
      continue;
    }
    for (std::int64_t i = 0; i < group; ++i) {
      std::int64_t rank = 0;
      for (std::int64_t j = 0; j < i; ++j) rank += keys[j] <= keys[i];
      for (std::int64_t j = i + 1; j < group; ++j) rank += keys[j] < keys[i];
      kept[i] = rank >= pruned;
    }
  }
  return good;
}

#if PERP_X86
PERP_AVX512 __m512i load_bits(const float* scores, __mmask16 some) { return _mm512_maskz_loadu_epi32(some, scores); }
template <class T>
PERP_AVX512 __m512i load_bits(const T* scores, __mmask16 some) {
  return _mm512_cvtepi16_epi32(_mm256_maskz_loadu_epi16(some, scores));
}

// 16 scores hold whole groups of kGroup: each is compared with the others of its group, rotated into its lane.
template <class T, int kGroup>
PERP_AVX512 bool groups_avx512(const T* scores, std::int64_t count, std::int64_t, std::int64_t pruned,
                               typename Ranked<T>::Key*, std::uint8_t* kept) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i within = _mm512_set1_epi32(kGroup - 1), one = _mm512_set1_epi32(1);
  const __m512i magnitude = _mm512_set1_epi32(Ranked<T>::kMagnitude), infinity = _mm512_set1_epi32(Ranked<T>::kInfinity);
  const __m512i least = _mm512_set1_epi32(static_cast<int>(pruned));
  __mmask16 nan = 0;
  for (std::int64_t j = 0; j < count; j += 16) {
    const auto some = static_cast<__mmask16>(count - j < 16 ? (1u << (count - j)) - 1 : 0xffffu);
    const __m512i bits = load_bits(scores + j, some), sign = _mm512_srai_epi32(bits, 31);
    const __m512i size = _mm512_and_si512(bits, magnitude);
    const __m512i key = _mm512_sub_epi32(_mm512_xor_si512(size, sign), sign);
    nan |= _mm512_cmpgt_epi32_mask(size, infinity);
    __m512i rank = _mm512_setzero_si512();
#pragma GCC unroll 16
    for (int s = 1; s < kGroup; ++s) {
      const __m512i place = _mm512_or_si512(_mm512_andnot_si512(within, lane),
                                            _mm512_and_si512(_mm512_add_epi32(lane, _mm512_set1_epi32(s)), within));
      const __m512i other = _mm512_permutexvar_epi32(place, key);
      const __mmask16 earlier = _mm512_cmplt_epi32_mask(place, lane);
      const __mmask16 before = _mm512_cmplt_epi32_mask(other, key) | _mm512_mask_cmpeq_epi32_mask(earlier, other, key);
      rank = _mm512_mask_add_epi32(rank, before, rank, one);
    }
    _mm_mask_storeu_epi8(kept + j, some, _mm_maskz_set1_epi8(_mm512_cmpge_epi32_mask(rank, least), 1));
  }
  return nan == 0;
}
#endif

template <class T>
auto group_ranker([[maybe_unused]] std::int64_t group) {
  auto* rank = &groups_portable<T>;
#if PERP_X86
  if constexpr (!Ranked<T>::kDouble) {
    if (use_avx512()) {
      if (group == 2) rank = &groups_avx512<T, 2>;
      if (group == 4) rank = &groups_avx512<T, 4>;
      if (group == 8) rank = &groups_avx512<T, 8>;
      if (group == 16) rank = &groups_avx512<T, 16>;
    }
  }
#endif
  return rank;
}

template <class T>
bool groups_of(const Scores& s, std::int64_t group, std::int64_t pruned) {
  auto* rank = group_ranker<T>(group);
  return all_rows(s, [&](std::int64_t r) {
    thread_local Scratch scratch;
    auto* keys = scratch.get<typename Ranked<T>::Key>(s.columns);
    return rank(static_cast<const T*>(s.data) + r * s.stride, s.columns, group, pruned, keys, s.kept + r * s.kept_stride);
  });
}

// ---- scores that are formed row by row ----

template <class T>
PERP_INLINE void weigh(const T* weights, const float* norms, std::int64_t count, float* scores) {
  for (std::int64_t j = 0; j < count; ++j) scores[j] = std::abs(to_float(weights[j])) * norms[j];
}

template <class T>
void weigh_portable(const T* weights, const float* norms, std::int64_t count, float* scores) {
  weigh(weights, norms, count, scores);
}

#if PERP_X86
template <class T>
PERP_AVX512 void weigh_avx512(const T* weights, const float* norms, std::int64_t count, float* scores) {
  weigh(weights, norms, count, scores);
}
#endif

template <class T>
bool weighted_of(const Scores& s, const float* norms, std::int64_t group, std::int64_t pruned) {
  auto* weigh_row = &weigh_portable<T>;
#if PERP_X86
  if (use_avx512()) weigh_row = &weigh_avx512<T>;
#endif
  auto* rank_row = row_ranker<float>();
  auto* rank_groups = group_ranker<float>(group);
  return all_rows(s, [&](std::int64_t r) {
    thread_local Scratch score_scratch, key_scratch;
    float* scores = score_scratch.get<float>(s.columns);
    auto* keys = key_scratch.get<Ranked<float>::Key>(s.columns);
    std::uint8_t* kept = s.kept + r * s.kept_stride;
    weigh_row(static_cast<const T*>(s.data) + r * s.stride, norms, s.columns, scores);
    return group == s.columns ? rank_row(scores, s.columns, pruned, keys, kept)
                              : rank_groups(scores, s.columns, group, pruned, keys, kept);
  });
}

}  // namespace

bool select_weighted(const Scores& scores, const float* norms, std::int64_t group, std::int64_t pruned) {
  if (scores.columns == 0) return true;
  if (scores.dtype == DType::bf16) return weighted_of<bf16>(scores, norms, group, pruned);
  if (scores.dtype == DType::f16) return weighted_of<f16>(scores, norms, group, pruned);
  return weighted_of<float>(scores, norms, group, pruned);
}

bool select_rows(const Scores& scores, std::int64_t pruned) {
  if (scores.columns == 0) return true;
  if (scores.columns <= kLongRow && pruned > 0) {
    return with_scores(scores.dtype, [&]<class T>(As<T>) { return rows_of<T>(scores, pruned); });
  }
  const std::int64_t size = info(scores.dtype).size;
  bool good = true;
  for (std::int64_t r = 0; r < scores.rows; ++r) {
    const char* data = static_cast<const char*>(scores.data) + r * scores.stride * size;
    const Scores one{data, scores.dtype, 1, scores.columns, scores.columns, scores.kept + r * scores.kept_stride, scores.columns};
    good &= select_jointly(one, pruned);
  }
  return good;
}

bool select_groups(const Scores& scores, std::int64_t group, std::int64_t pruned) {
  return with_scores(scores.dtype, [&]<class T>(As<T>) { return groups_of<T>(scores, group, pruned); });
}

}  // namespace perp
