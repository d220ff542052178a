// A packed weight whose components have been checked against each other, so that kernels may follow its index blindly.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/pack.h"
#include "view.h"

namespace perp {

enum class Layout { dense, bitmap, semi24 };

struct Weight {
  DType dtype;
  Layout layout;
  std::int64_t rows;
  std::int64_t columns;
  const void* values;
  const std::uint8_t* index;  // bits or semi24 nibbles
  RowStarts starts;

  std::int64_t index_stride() const { return (columns + 7) / 8; }
  const std::uint8_t* row_index(std::int64_t r) const { return index + r * index_stride(); }

  template <class T>
  const T* row_values(std::int64_t r) const {
    return static_cast<const T*>(values) + starts.begin(r);
  }

  // First row of part `part` when the rows [first, last) are cut into `parts` runs of about equal numbers of values.
  std::int64_t cut(std::int64_t first, std::int64_t last, int part, int parts) const {
    if (starts.row_ptr == nullptr) return first + (last - first) * part / parts;
    const std::int64_t *begin = starts.row_ptr + first, *end = starts.row_ptr + last;
    return part == parts ? last : first + (std::lower_bound(begin, end, *begin + (*end - *begin) / parts * part) - begin);
  }
};

}  // namespace perp
