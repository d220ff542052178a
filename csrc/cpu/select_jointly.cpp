// The lowest scores of a matrix as a whole: one cut for all, which ties reach in row-major order.
#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/platform.h"
#include "cpu/rank.h"
#include "cpu/scratch.h"
#include "cpu/select.h"

namespace perp {
namespace {

// A thread is worth waking for about this many scores (some 20 us of one core).
constexpr std::int64_t kGrain = 1 << 14;

// Scores are turned into keys this many at a time, within L1.
constexpr std::int64_t kChunk = 1024;

// The positions [0, total) of the scores in row-major order, cut into one run for each thread, and what is found in it.
struct Runs {
  explicit Runs(const Scores& s) : total(s.rows * s.columns) {
    count = static_cast<int>(std::clamp<std::int64_t>(total / kGrain, 1, max_threads()));
    tied.resize(count);
    nan.resize(count, 0);
  }
  std::int64_t begin(int run) const { return total / count * run + std::min<std::int64_t>(run, total % count); }

  std::int64_t total;
  int count;
  std::vector<std::int64_t> tied;  // scores equal to the cut
  std::vector<char> nan;
};

// body(scores, mask, count) for the scores of positions [begin, end), chunk by chunk.
template <class T, class Body>
void chunks(const Scores& s, std::int64_t begin, std::int64_t end, const Body& body) {
  for (std::int64_t at = begin; at < end;) {
    const std::int64_t r = at / s.columns, c = at % s.columns;
    const std::int64_t count = std::min({kChunk, s.columns - c, end - at});
    body(static_cast<const T*>(s.data) + r * s.stride + c, s.kept + r * s.kept_stride + c, count);
    at += count;
  }
}

// ---- by a sample: the cut lies almost surely between two keys of which one pass keeps what lies between ----

constexpr std::int64_t kSample = 4096;
// Four standard deviations of a sample's rank: misses are rarer than one in 10,000, and cost only the other way.
constexpr std::int64_t kMargin = 128;
// The share of a run that may lie between the bounds, 1 / 8: twice what a sample without many ties gives.
constexpr int kBetween = 3;

template <class Key>
struct Bounds {
  Key low;
  Key high;
};

template <class Key>
struct Sifted {
  std::int64_t below = 0;
  std::int64_t between = 0;
  bool nan = false;
};

// Counts keys below the bounds and appends those between to `out`, which has room for a chunk more.
template <class T>
void sift_portable(const T* scores, std::int64_t count, Bounds<typename Ranked<T>::Key> bounds,
                   typename Ranked<T>::Key* out, Sifted<typename Ranked<T>::Key>& sifted) {
  typename Ranked<T>::Key keys[kChunk], low, high;
  sifted.nan |= !to_keys(scores, count, keys, low, high);
  for (std::int64_t j = 0; j < count; ++j) {
    sifted.below += keys[j] < bounds.low;
    out[sifted.between] = keys[j];
    sifted.between += keys[j] >= bounds.low && keys[j] <= bounds.high;
  }
}

#if PERP_X86
template <class T>
PERP_AVX512 void sift_avx512(const T* scores, std::int64_t count, Bounds<typename Ranked<T>::Key> bounds,
                             typename Ranked<T>::Key* out, Sifted<typename Ranked<T>::Key>& sifted) {
  static_assert(sizeof(*out) == 4);
  typename Ranked<T>::Key keys[kChunk], low, high;
  sifted.nan |= !to_keys(scores, count, keys, low, high);
  const __m512i least = _mm512_set1_epi32(bounds.low), most = _mm512_set1_epi32(bounds.high);
  for (std::int64_t j = 0; j < count; j += 16) {
    const auto some = static_cast<__mmask16>(count - j < 16 ? (1u << (count - j)) - 1 : 0xffffu);
    const __m512i key = _mm512_maskz_loadu_epi32(some, keys + j);
    const __mmask16 below = _mm512_mask_cmplt_epi32_mask(some, key, least);
    const __mmask16 between = _mm512_mask_cmple_epi32_mask(_kandn_mask16(below, some), key, most);
    _mm512_storeu_si512(out + sifted.between, _mm512_maskz_compress_epi32(between, key));
    sifted.below += __builtin_popcount(below);
    sifted.between += __builtin_popcount(between);
  }
}
#endif

template <class T>
Bounds<typename Ranked<T>::Key> sample_bounds(const Scores& s, std::int64_t total, std::int64_t pruned) {
  using Key = typename Ranked<T>::Key;
  static_assert(kSample % kChunk == 0);
  Key keys[kSample], low = std::numeric_limits<Key>::max(), high = std::numeric_limits<Key>::min();
  const std::int64_t step = total / kSample;
  std::uint32_t random = 1;
  for (std::int64_t i = 0; i < kSample; ++i) {
    random = random * 1664525u + 1013904223u;  // a place within each step: an even stride could follow a column
    const std::int64_t at = i * step + (random >> 8) % step;
    keys[i] = Ranked<T>::key(static_cast<const T*>(s.data)[at / s.columns * s.stride + at % s.columns]);
    low = std::min(low, keys[i]);
    high = std::max(high, keys[i]);
  }
  const std::int64_t rank = static_cast<std::int64_t>(static_cast<double>(pruned) / static_cast<double>(total) * kSample);
  const auto at_rank = [&](std::int64_t wanted) { return find_cut<Key>(keys, kSample, static_cast<Key>(wanted), low, high).key; };
  return {rank > kMargin ? at_rank(rank - kMargin) : std::numeric_limits<Key>::min(),
          rank + kMargin <= kSample ? at_rank(rank + kMargin) : std::numeric_limits<Key>::max()};
}

// Whether the cut could be found so; then `cut` and the runs' ties are set.
template <class T>
bool cut_by_sample(const Scores& s, std::int64_t pruned, Runs& runs, Cut<typename Ranked<T>::Key>& cut) {
  using Key = typename Ranked<T>::Key;
  if (runs.total < 16 * kSample || runs.total >> 32 != 0 || pruned == 0) return false;  // counts of keys are keys
  thread_local Scratch scratch;
  const Bounds<Key> bounds = sample_bounds<T>(s, runs.total, pruned);
  const std::int64_t room = (runs.total / runs.count + 1 >> kBetween) + 2 * kChunk;
  Key* const found = scratch.get<Key>(runs.count * room);
  std::vector<Sifted<Key>> sifted(runs.count);
  auto* sift = &sift_portable<T>;
#if PERP_X86
  if constexpr (!Ranked<T>::kDouble) {
    if (use_avx512()) sift = &sift_avx512<T>;
  }
#endif
  parallel(runs.count, [&](int run) {
    Sifted<Key> own;
    chunks<T>(s, runs.begin(run), runs.begin(run + 1), [&](const T* scores, std::uint8_t*, std::int64_t count) {
      if (own.between <= room - kChunk - 16) sift(scores, count, bounds, found + run * room, own);
    });
    sifted[run] = own;
  });
  std::int64_t rank = pruned, between = 0;
  for (int run = 0; run < runs.count; ++run) {
    if (sifted[run].between > room - kChunk - 16) return false;
    std::memmove(found + between, found + run * room, sifted[run].between * sizeof(Key));
    between += sifted[run].between;
    rank -= sifted[run].below;
    runs.nan[run] = sifted[run].nan;
  }
  if (rank < 1 || rank > between) return false;
  cut = find_cut<Key>(found, static_cast<Key>(between), static_cast<Key>(rank), bounds.low, bounds.high);
  std::int64_t at = 0;
  for (int run = 0; run < runs.count; at += sifted[run++].between) {
    runs.tied[run] = std::count(found + at, found + at + sifted[run].between, cut.key);
  }
  return true;
}

// ---- by digits: one pass over the scores for each, from the highest on, counts those that share the cut's digits ----

constexpr int kDigit = 11;  // 2,048 counters stay in L1

// The bits of the cut's key above the lowest `left`. Keys are taken as unsigned numbers of kBits bits.
template <class T>
struct Prefix {
  using Unsigned = typename Ranked<T>::Unsigned;
  static constexpr Unsigned kOffset = Unsigned{1} << (Ranked<T>::kBits - 1);
  Unsigned bits = 0;
  int left = Ranked<T>::kBits;
};

// Counts the next digit of the scores that share the prefix. Returns whether one is NaN.
template <class T>
bool count_digit(const Scores& s, std::int64_t begin, std::int64_t end, Prefix<T> prefix, int shift, std::int64_t* counts) {
  using Unsigned = typename Ranked<T>::Unsigned;
  typename Ranked<T>::Key keys[kChunk];
  const Unsigned digits = (Unsigned{1} << (prefix.left - shift)) - 1;
  const bool first = prefix.left == Ranked<T>::kBits;
  bool nan = false;
  std::fill_n(counts, std::int64_t{1} << kDigit, 0);
  chunks<T>(s, begin, end, [&](const T* scores, std::uint8_t*, std::int64_t count) {
    typename Ranked<T>::Key low, high;
    nan |= !to_keys(scores, count, keys, low, high);
    for (std::int64_t j = 0; j < count; ++j) {
      const Unsigned key = static_cast<Unsigned>(keys[j]) + Prefix<T>::kOffset;
      if (first || key >> prefix.left == prefix.bits) ++counts[(key >> shift) & digits];
    }
  });
  return nan;
}

template <class T>
Cut<typename Ranked<T>::Key> cut_by_digits(const Scores& s, std::int64_t pruned, Runs& runs) {
  using Unsigned = typename Ranked<T>::Unsigned;
  std::vector<std::int64_t> counts(static_cast<std::size_t>(runs.count) << kDigit);
  const auto counts_of = [&](int run) { return counts.data() + (static_cast<std::size_t>(run) << kDigit); };
  Prefix<T> prefix;
  std::int64_t rank = pruned;  // of the cut among the scores that share the prefix, from 1
  while (prefix.left > 0) {
    const int shift = std::max(0, prefix.left - kDigit);
    parallel(runs.count, [&](int run) {
      runs.nan[run] = count_digit<T>(s, runs.begin(run), runs.begin(run + 1), prefix, shift, counts_of(run));
    });
    Unsigned digit = 0;
    for (;; ++digit) {
      std::int64_t found = 0;
      for (int run = 0; run < runs.count; ++run) found += runs.tied[run] = counts_of(run)[digit];
      if (found >= rank) break;
      rank -= found;
    }
    prefix.bits = static_cast<Unsigned>(prefix.bits << (prefix.left - shift)) | digit;
    prefix.left = shift;
  }
  return {static_cast<typename Ranked<T>::Key>(prefix.bits - Prefix<T>::kOffset), rank};
}

// ---- the mask ----

template <class T>
PERP_INLINE void write(const T* scores, std::int64_t count, Cut<typename Ranked<T>::Key>& cut, std::uint8_t* kept) {
  typename Ranked<T>::Key keys[kChunk], low, high;
  to_keys(scores, count, keys, low, high);
  write_mask(keys, count, cut, kept);
}

template <class T>
void write_portable(const T* scores, std::int64_t count, Cut<typename Ranked<T>::Key>& cut, std::uint8_t* kept) {
  write(scores, count, cut, kept);
}

#if PERP_X86
template <class T>
PERP_AVX512 void write_avx512(const T* scores, std::int64_t count, Cut<typename Ranked<T>::Key>& cut, std::uint8_t* kept) {
  write(scores, count, cut, kept);
}
#endif

template <class T>
bool jointly(const Scores& s, std::int64_t pruned) {
  Runs runs(s);
  Cut<typename Ranked<T>::Key> cut;
  if (!cut_by_sample<T>(s, pruned, runs, cut)) cut = cut_by_digits<T>(s, pruned, runs);
  auto* write_chunk = &write_portable<T>;
#if PERP_X86
  if (use_avx512()) write_chunk = &write_avx512<T>;
#endif
  parallel(runs.count, [&](int run) {
    Cut<typename Ranked<T>::Key> own = cut;
    for (int before = 0; before < run; ++before) own.ties -= runs.tied[before];
    chunks<T>(s, runs.begin(run), runs.begin(run + 1),
              [&](const T* scores, std::uint8_t* kept, std::int64_t count) { write_chunk(scores, count, own, kept); });
  });
  return std::find(runs.nan.begin(), runs.nan.end(), 1) == runs.nan.end();
}

}  // namespace

bool select_jointly(const Scores& scores, std::int64_t pruned) {
  if (scores.rows == 0 || scores.columns == 0) return true;
  // Rows without gaps are one long row, which is walked in longer runs.
  Scores s = scores;
  if (s.stride == s.columns && s.kept_stride == s.columns) s = {s.data, s.dtype, 1, s.rows * s.columns, 0, s.kept, 0};
  return with_scores(s.dtype, [&]<class T>(As<T>) { return jointly<T>(s, pruned); });
}

}  // namespace perp
