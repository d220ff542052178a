// The column loop of SparseGPT within one block of columns.
#pragma once

#include <cstdint>

namespace perp {

// Columns W [rows, columns] of the weight and the diagonal block U [columns, columns] of the factor, upper triangular with
// a positive diagonal. Strides count elements between rows, which have unit stride.
struct Block {
  float* W;  // pruned and compensated in place
  std::int64_t w_stride;
  const float* U;
  std::int64_t u_stride;
  float* errors;  // [rows, columns], written
  std::int64_t errors_stride;
  std::uint8_t* kept;  // [rows, columns], written: 1 = kept
  std::int64_t kept_stride;
  std::int64_t rows;
  std::int64_t columns;

  float* row(std::int64_t r) const { return W + r * w_stride; }
};

// Column by column: e = the pruned weights of column j / U_jj, and each column l > j loses e U_jl. Scores are
// (w_j / U_jj)^2. Results do not depend on the number of threads.

// Prunes `pruned` of each `group` columns of a row, chosen when the first is reached; `group` divides the columns.
void sparsegpt_groups(const Block& block, std::int64_t group, std::int64_t pruned);

// Prunes the `pruned` lowest scores at the start, of each row or, `jointly`, of all rows.
void sparsegpt_share(const Block& block, std::int64_t pruned, bool jointly);

}  // namespace perp
