// One round of SparseSwaps: each row trades its best pair of a kept and a pruned weight.
#pragma once

#include <cstdint>

namespace perp {

// weight, kept and correlation [rows, columns], H [columns, columns]. Strides count elements between rows, which have unit
// stride.
struct Swaps {
  const float* weight;
  std::int64_t weight_stride;
  std::uint8_t* kept;  // 1 = kept; two bytes of a row that trades change
  std::int64_t kept_stride;
  float* correlation;  // the pruned weights times H; changed with them
  std::int64_t correlation_stride;
  const float* H;
  std::int64_t H_stride;
  float* gain;  // [rows], written: by how much the loss of the row has fallen
  std::int64_t rows;
  std::int64_t columns;
};

// The contract of perp_kernels/ops/swap_round.py. Both weights of a pair are of one group of `group` columns, which divides
// their number. Results do not depend on the number of threads.
void swap_round(const Swaps& swaps, std::int64_t group);

}  // namespace perp
