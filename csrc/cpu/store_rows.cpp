#include <vector>

#include "cpu/pack.h"
#include "cpu/tile.h"

namespace perp {

void store_rows(const Weight& weight, std::int64_t first_row, std::int64_t rows, const void* in, std::int64_t stride,
                void* values) {
  const int size = info(weight.dtype).size;
  Bits bits{weight.row_index(first_row), rows, weight.columns};
  if (weight.layout == Layout::dense) {
    return pack_dense(in, stride, size, bits, static_cast<char*>(values) + first_row * weight.columns * size);
  }
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
    values = static_cast<char*>(values) + first_row * starts.per_row * size;
  }
  pack_bitmap(in, stride, size, bits, starts, values);
}

}  // namespace perp
