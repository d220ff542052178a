#include "cpu/weight.h"

#include <cstring>
#include <vector>

namespace perp {

void unpack_rows(const Weight& weight, std::int64_t first_row, std::int64_t rows, void* out, std::int64_t row_stride) {
  const int size = info(weight.dtype).size;
  const auto* values = static_cast<const char*>(weight.values);
  if (weight.layout == Layout::dense) {
    for (std::int64_t r = 0; r < rows; ++r) {
      std::memcpy(static_cast<char*>(out) + r * row_stride * size, values + (first_row + r) * weight.columns * size,
                  weight.columns * size);
    }
    return;
  }
  Bits bits{weight.row_index(first_row), rows, weight.columns};
  std::vector<std::uint8_t> translated;
  if (weight.layout == Layout::semi24) {
    translated.resize(rows * weight.index_stride());
    positions_to_bits(bits, translated.data());
    bits.data = translated.data();
  }
  RowStarts starts = weight.starts;
  if (starts.row_ptr != nullptr) {
    starts.row_ptr += first_row;  // its entries stay offsets into all values
  } else {
    values += first_row * starts.per_row * size;
  }
  unpack_bitmap(values, size, bits, starts, out, row_stride);
}

}  // namespace perp
