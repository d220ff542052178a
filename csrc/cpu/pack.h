// Conversion between a dense weight with packed mask bits and the bitmap and semi24 layouts.
//
// Canonical forms (perp_kernels/layouts.py defines them; R rows, K columns):
//   bits       uint8 [R, ceil(K/8)], bit j of byte i = column 8i+j, 1 = kept, padding bits 0
//   bitmap     the kept values of each row in column order; the bits are its index
//   semi24     the same values, two of each four columns; per group of four a nibble pos0 | pos1 << 2, low nibble first
// Elements are moved as bit patterns of 2, 4 or 8 bytes: -0.0 and NaN payloads survive.
#pragma once

#include <cstdint>

namespace perp {

constexpr std::int64_t kNoRow = -1;

// Mask bits of R rows, stored without gaps.
struct Bits {
  const std::uint8_t* data;
  std::int64_t rows;
  std::int64_t columns;

  std::int64_t bytes_per_row() const { return (columns + 7) / 8; }
  const std::uint8_t* row(std::int64_t r) const { return data + r * bytes_per_row(); }
};

// Where the kept values of each row start: either every row keeps `per_row`, or row_ptr[r] .. row_ptr[r + 1] bounds row r.
struct RowStarts {
  std::int64_t per_row;
  const std::int64_t* row_ptr;

  std::int64_t begin(std::int64_t r) const { return row_ptr != nullptr ? row_ptr[r] : r * per_row; }
};

// The first row with a padding bit set, else kNoRow.
std::int64_t first_padded_row(const Bits& bits);

// counts[r] = kept columns of row r. Requires first_padded_row(bits) == kNoRow.
void count_bits(const Bits& bits, std::int64_t* counts);

// The first row whose bits do not hold as many ones as `starts` says (or have a padding bit set), else kNoRow. Only
// after this check is it safe to follow `bits` through `values`.
std::int64_t first_bad_row(const Bits& bits, const RowStarts& starts);

// values <- kept columns of each row. `weight` rows are `row_stride` elements apart.
void pack_bitmap(const void* weight, std::int64_t row_stride, int element_size, const Bits& bits,
                 const RowStarts& starts, void* values);

// out <- values at kept columns, zero elsewhere. Requires first_bad_row(bits, starts) == kNoRow.
void unpack_bitmap(const void* values, int element_size, const Bits& bits, const RowStarts& starts, void* out,
                   std::int64_t row_stride);

// out <- weight at kept columns, +0 elsewhere. Requires first_padded_row(bits) == kNoRow.
void pack_dense(const void* weight, std::int64_t row_stride, int element_size, const Bits& bits, void* out);

// positions <- the semi24 nibbles of `bits`. Returns the first row with a group that does not keep exactly two, else kNoRow.
std::int64_t bits_to_positions(const Bits& bits, std::uint8_t* positions);

// The inverse: bits <- semi24 nibbles. Returns the first row with a nibble that no pair of positions gives, else kNoRow.
std::int64_t positions_to_bits(const Bits& positions, std::uint8_t* bits);

// The first row for which positions_to_bits would fail, else kNoRow.
std::int64_t first_bad_positions(const Bits& positions);

}  // namespace perp
