// Tiles of a packed weight: formed together with a low-rank adapter, and the gradient of a tile folded into the adapter's.
//
// P = B A is the adapter's product. An effective weight is W, W + scale * M * P (M the mask) or W * P; it is formed in
// fp32 and rounded once, every element by the same operations in whatever tile it lies, and is +0 where pruned.
#pragma once

#include <cstdint>

#include "cpu/weight.h"

namespace perp {

// first_column is a multiple of 8.
struct Tile {
  std::int64_t first_row, rows;
  std::int64_t first_column, columns;
};

enum class Effect { none, add, multiply };

// The factors that belong to a tile: A [rank, columns] and B [rows, rank], unit stride along their last dimension.
struct Adapter {
  Effect effect;
  float scale;
  const float* A;
  std::int64_t A_stride;
  const float* B;
  std::int64_t B_stride;
  std::int64_t rank;
};

// out [rows, columns] <- the effective weight, in the dtype of the values.
void form_tile(const Weight& weight, const Tile& tile, const Adapter& adapter, void* out, std::int64_t stride);

// The gradient G [rows, columns] by a tile of the effective weight, in the dtype of the values, and where its parts go:
// dA [rank, columns] and dB [rows, rank]; either may be null.
struct Gradient {
  const void* G;
  std::int64_t stride;
  float* dA;
  std::int64_t dA_stride;
  float* dB;
  std::int64_t dB_stride;
};

// dA += B^T dP and dB += dP A^T with dP = scale * M * G or W * G. Effect add or multiply. Sums are formed in fp32, in an
// order that does not depend on the number of threads.
void fold_tile(const Weight& weight, const Tile& tile, const Adapter& adapter, const Gradient& gradient);

// values <- the kept columns of in [rows, columns], the weight's rows from `first_row` on; the layout dense stores +0
// elsewhere. `values` has the form of the weight's own and may be those.
void store_rows(const Weight& weight, std::int64_t first_row, std::int64_t rows, const void* in, std::int64_t stride,
                void* values);

}  // namespace perp
