// Scores as integers of the same order, and the cut below which they are pruned.
//
// The functions are templates to be inlined into a caller of either code path, which the compiler then vectorises with
// the instructions that path has.
#pragma once

#include <bit>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "cpu/convert.h"
#include "view.h"

#define PERP_INLINE inline __attribute__((always_inline))

namespace perp {

// Sign and magnitude become two's complement: the order of the scores, in which -0.0 and 0.0 are one and a NaN lies
// beyond an infinity.
template <class T>
struct Ranked {
  static constexpr bool kDouble = std::is_same_v<T, double>;
  using Key = std::conditional_t<kDouble, std::int64_t, std::int32_t>;
  using Unsigned = std::make_unsigned_t<Key>;
  static constexpr int kBits = 8 * sizeof(T);
  static constexpr Key kMagnitude = static_cast<Key>((Unsigned{1} << (kBits - 1)) - 1);
  static constexpr Key kInfinity = kDouble                       ? static_cast<Key>(0x7ffull << 52)
                                   : std::is_same_v<T, float>    ? 0x7f800000
                                   : std::is_same_v<T, bf16>     ? 0x7f80
                                                                 : 0x7c00;

  static PERP_INLINE Key key(T score) {
    Key bits;
    if constexpr (sizeof(T) == 2) {
      bits = static_cast<std::int16_t>(score.bits);
    } else {
      bits = std::bit_cast<Key>(score);
    }
    const Key sign = bits >> (8 * sizeof(Key) - 1);
    return ((bits & kMagnitude) ^ sign) - sign;
  }
};

// Pruned are the keys below `key` and the first `ties` of those equal to it.
template <class Key>
struct Cut {
  Key key;
  std::int64_t ties;
};

// Writes the keys of `count` scores; returns whether none is NaN.
template <class T>
PERP_INLINE bool to_keys(const T* __restrict scores, std::int64_t count, typename Ranked<T>::Key* __restrict keys,
                         typename Ranked<T>::Key& lowest, typename Ranked<T>::Key& highest) {
  using Key = typename Ranked<T>::Key;
  Key low = std::numeric_limits<Key>::max(), high = std::numeric_limits<Key>::min();
  for (std::int64_t j = 0; j < count; ++j) {
    const Key key = Ranked<T>::key(scores[j]);
    keys[j] = key;
    low = key < low ? key : low;
    high = key > high ? key : high;
  }
  lowest = low;
  highest = high;
  return count == 0 || (low >= -Ranked<T>::kInfinity && high <= Ranked<T>::kInfinity);
}

template <class Key>
PERP_INLINE Key count_up_to(const Key* keys, Key count, Key bound) {
  Key found = 0;
  for (Key j = 0; j < count; ++j) found += keys[j] <= bound;
  return found;
}

// The cut that prunes `pruned` of `count` keys, 1 <= pruned <= count, which lie in [low, high]. It bisects the range of
// the keys: each step is one pass without a branch, which beats a partition while the keys stay in cache.
template <class Key>
PERP_INLINE Cut<Key> find_cut(const Key* keys, Key count, Key pruned, Key low, Key high) {
  using Unsigned = std::make_unsigned_t<Key>;
  while (low < high) {
    const Key middle = low + static_cast<Key>((static_cast<Unsigned>(high) - static_cast<Unsigned>(low)) / 2);
    const Key found = count_up_to(keys, count, middle);
    if (found == pruned) return {middle, count};
    if (found > pruned) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return {low, pruned - count_up_to<Key>(keys, count, low - 1)};
}

// Writes the mask of `count` keys, and takes the ties it prunes off `cut`.
template <class Key>
PERP_INLINE void write_mask(const Key* __restrict keys, std::int64_t count, Cut<Key>& cut, std::uint8_t* __restrict kept) {
  constexpr std::int64_t kRun = 64;  // ties are rare: whole runs without one are written by vectors
  for (std::int64_t first = 0; first < count; first += kRun) {
    const std::int64_t end = count - first < kRun ? count : first + kRun;
    const Key key = cut.key;
    Key tied = 0;
    for (std::int64_t j = first; j < end; ++j) {
      kept[j] = keys[j] > key;
      tied += keys[j] == key;
    }
    if (tied == 0) continue;
    for (std::int64_t j = first; j < end; ++j) {
      if (keys[j] == key && cut.ties-- <= 0) kept[j] = 1;
    }
  }
}

template <class T>
struct As {
  using type = T;
};

// body(As<T>()) for the type T of the scores.
template <class Body>
auto with_scores(DType dtype, const Body& body) {
  if (dtype == DType::bf16) return body(As<bf16>());
  if (dtype == DType::f16) return body(As<f16>());
  if (dtype == DType::f64) return body(As<double>());
  return body(As<float>());
}

}  // namespace perp
