// The mask that prunes the lowest scores: of rows, of groups of columns, or of a matrix as a whole.
//
// Of equal scores the first in row-major order is pruned first; -0.0 equals 0.0. Each function returns false where a
// score is NaN, which ranks beyond the infinity of its sign.
#pragma once

#include <cstdint>

#include "view.h"

namespace perp {

// Scores [rows, columns] of bf16, f16, f32 or f64 and one byte of mask for each, 1 = kept. Strides count elements; rows
// have unit stride.
struct Scores {
  const void* data;
  DType dtype;
  std::int64_t rows;
  std::int64_t columns;
  std::int64_t stride;
  std::uint8_t* kept;
  std::int64_t kept_stride;
};

// Prunes the `pruned` lowest of each row, 0 <= pruned <= columns.
bool select_rows(const Scores& scores, std::int64_t pruned);

// Prunes the `pruned` lowest of each `group` consecutive columns of a row; `group` divides the columns.
bool select_groups(const Scores& scores, std::int64_t group, std::int64_t pruned);

// Prunes the `pruned` lowest of |scores| * norms, formed in float, of each `group` consecutive columns of a row; `group`
// divides the columns, 1 <= pruned <= group. The scores are bf16, f16 or f32.
bool select_weighted(const Scores& scores, const float* norms, std::int64_t group, std::int64_t pruned);

// Prunes the `pruned` lowest of all, 0 <= pruned <= rows * columns.
bool select_jointly(const Scores& scores, std::int64_t pruned);

}  // namespace perp
