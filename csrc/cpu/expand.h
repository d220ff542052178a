// Kept values back to their columns, one set bit at a time: the portable path, and the tails of the others.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/convert.h"

namespace perp {

// A semi24 nibble pos0 | pos1 << 2 as mask bits. The padding nibble 0, no valid pair, gives 0.
inline constexpr std::array<std::uint8_t, 16> kMaskOfPair = {0, 0, 0, 0, 3, 0, 0, 0, 5, 6, 0, 0, 9, 10, 12, 0};

// Both nibbles of an index byte: the mask bits of its eight columns.
inline constexpr std::array<std::uint8_t, 256> kMaskOfPairs = [] {
  std::array<std::uint8_t, 256> table{};
  for (unsigned byte = 0; byte < 256; ++byte) table[byte] = kMaskOfPair[byte & 15] | kMaskOfPair[byte >> 4] << 4;
  return table;
}();

// out [columns] <- the values at the set bits, as they are or as floats; zero elsewhere. Returns the first value behind those taken. Words of 64
// columns, because each ends in a mispredicted branch.
template <class T, class Out>
const T* expand(const T* values, const std::uint8_t* bits, std::int64_t columns, Out* out) {
  std::fill_n(out, columns, Out{});
  for (std::int64_t j = 0; j < columns; j += 64) {
    std::uint64_t rest = 0;
    std::memcpy(&rest, bits + j / 8, std::min<std::int64_t>(8, (columns - j + 7) / 8));
    for (; rest != 0; rest &= rest - 1, ++values) {
      Out& to = out[j + std::countr_zero(rest)];
      if constexpr (std::is_same_v<T, Out>) {
        to = *values;
      } else {
        to = to_float(*values);
      }
    }
  }
  return values;
}

}  // namespace perp
