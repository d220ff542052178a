#include "cpu/pack.h"

#include "bindings/bindings.h"

namespace perp {

Bits bits_of(const char* name, const View& index, std::int64_t rows, std::int64_t columns) {
  if (columns < 0) refuse("the number of columns must not be negative");
  const std::int64_t bytes = columns / 8 + (columns % 8 != 0);  // columns + 7 could overflow
  index.typed(name, {DType::u8}).sized(name, {rows, bytes}).contiguous(name);
  return {index.as<const std::uint8_t>(), index.size(0), columns};
}

RowStarts starts_of(const View& values, const std::optional<View>& row_ptr, const Bits& bits) {
  RowStarts starts{0, nullptr};
  if (row_ptr) {
    row_ptr->typed("row_ptr", {DType::i64}).sized("row_ptr", {bits.rows + 1}).contiguous("row_ptr");
    values.sized("values", {-1}).contiguous("values");
    starts.row_ptr = row_ptr->as<const std::int64_t>();
    if (starts.row_ptr[0] != 0 || starts.row_ptr[bits.rows] != values.size(0)) {
      refuse("row_ptr must run from 0 to the number of values, " + std::to_string(values.size(0)));
    }
  } else {
    values.sized("values", {bits.rows, -1}).contiguous("values");
    starts.per_row = values.size(1);
  }
  const std::int64_t bad = first_bad_row(bits, starts);
  if (bad != kNoRow) {
    refuse("row " + std::to_string(bad) + " of index does not keep as many columns as values holds for it, or has a padding bit set");
  }
  return starts;
}

void check_padding(const Bits& bits) {
  const std::int64_t bad = first_padded_row(bits);
  if (bad != kNoRow) refuse("row " + std::to_string(bad) + " of index has a bit set beyond column " + std::to_string(bits.columns));
}

void check_groups(std::int64_t columns) {
  if (columns % 4 != 0) refuse("semi24 needs a multiple of 4 columns, got " + std::to_string(columns));
}

namespace {

void count_bits_checked(const View& index, std::int64_t columns, const View& counts) {
  const Bits bits = bits_of("index", index, -1, columns);
  counts.typed("counts", {DType::i64}).sized("counts", {bits.rows}).contiguous("counts");
  check_padding(bits);
  count_bits(bits, counts.as<std::int64_t>());
}

const View& element(const char* name, const View& view) {
  return view.typed(name, {DType::bf16, DType::f16, DType::f32, DType::f64});
}

void pack_bitmap_checked(const View& weight, const View& index, const View& values, const std::optional<View>& row_ptr) {
  element("weight", weight).sized("weight", {-1, -1}).rowwise("weight");
  values.typed("values", {weight.dtype()});
  const Bits bits = bits_of("index", index, weight.size(0), weight.size(1));
  const RowStarts starts = starts_of(values, row_ptr, bits);
  pack_bitmap(weight.read(), weight.row_stride(), weight.element_size(), bits, starts, values.write());
}

void unpack_bitmap_checked(const View& values, const View& index, const std::optional<View>& row_ptr, const View& out) {
  element("out", out).sized("out", {-1, -1}).rowwise("out");
  values.typed("values", {out.dtype()});
  const Bits bits = bits_of("index", index, out.size(0), out.size(1));
  const RowStarts starts = starts_of(values, row_ptr, bits);
  unpack_bitmap(values.read(), out.element_size(), bits, starts, out.write(), out.row_stride());
}

void pack_dense_checked(const View& weight, const View& index, const View& out) {
  element("weight", weight).sized("weight", {-1, -1}).rowwise("weight");
  out.typed("out", {weight.dtype()}).sized("out", {weight.size(0), weight.size(1)}).contiguous("out");
  const Bits bits = bits_of("index", index, weight.size(0), weight.size(1));
  check_padding(bits);
  pack_dense(weight.read(), weight.row_stride(), weight.element_size(), bits, out.write());
}

void bits_to_positions_checked(const View& index, std::int64_t columns, const View& positions) {
  check_groups(columns);
  const Bits bits = bits_of("index", index, -1, columns);
  bits_of("positions", positions, bits.rows, columns);
  const std::int64_t bad = bits_to_positions(bits, positions.as<std::uint8_t>());
  if (bad != kNoRow) {
    refuse("semi24 keeps exactly two of each four columns, and row " + std::to_string(bad) +
           " has a group that does not; use the bitmap layout");
  }
}

void positions_to_bits_checked(const View& positions, std::int64_t columns, const View& index) {
  check_groups(columns);
  const Bits in = bits_of("index", positions, -1, columns);
  bits_of("bits", index, in.rows, columns);
  const std::int64_t bad = positions_to_bits(in, index.as<std::uint8_t>());
  if (bad != kNoRow) refuse("row " + std::to_string(bad) + " of index is not a semi24 index: a nibble is no pair of ascending positions");
}

}  // namespace

void bind_pack(pybind11::module_& m) {
  using pybind11::arg;
  m.def("count_bits", &count_bits_checked, arg("index"), arg("columns"), arg("counts"), Release());
  m.def("pack_bitmap", &pack_bitmap_checked, arg("weight"), arg("index"), arg("values"), arg("row_ptr"), Release());
  m.def("unpack_bitmap", &unpack_bitmap_checked, arg("values"), arg("index"), arg("row_ptr"), arg("out"), Release());
  m.def("pack_dense", &pack_dense_checked, arg("weight"), arg("index"), arg("out"), Release());
  m.def("bits_to_positions", &bits_to_positions_checked, arg("index"), arg("columns"), arg("positions"), Release());
  m.def("positions_to_bits", &positions_to_bits_checked, arg("positions"), arg("columns"), arg("index"), Release());
}

}  // namespace perp
