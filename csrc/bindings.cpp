// perp_kernels._C: the CPU kernels for Python, free of torch. perp_kernels/cpu.py is its only caller.
// Every function checks its views before it touches memory, and runs without the GIL.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "cpu/pack.h"
#include "cpu/parallel.h"
#include "cpu/platform.h"
#include "cpu/sparse_linear.h"
#include "cpu/weight.h"
#include "view.h"

namespace py = pybind11;

namespace perp {
namespace {

using Release = py::call_guard<py::gil_scoped_release>;

Bits bits_of(const char* name, const View& index, std::int64_t rows, std::int64_t columns) {
  if (columns < 0) refuse("the number of columns must not be negative");
  index.typed(name, {DType::u8}).sized(name, {rows, (columns + 7) / 8}).contiguous(name);
  return {index.as<const std::uint8_t>(), index.size(0), columns};
}

// Checks values, row_ptr and bits against each other, so that no row reads past its values.
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

void count_bits_checked(const View& index, std::int64_t columns, const View& counts) {
  const Bits bits = bits_of("index", index, -1, columns);
  counts.typed("counts", {DType::i64}).sized("counts", {bits.rows}).contiguous("counts");
  const std::int64_t bad = count_bits(bits, counts.as<std::int64_t>());
  if (bad != kNoRow) refuse("row " + std::to_string(bad) + " of index has a bit set beyond column " + std::to_string(columns));
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
  pack_dense(weight.read(), weight.row_stride(), weight.element_size(), bits, out.write());
}

void check_groups(std::int64_t columns) {
  if (columns % 4 != 0) refuse("semi24 needs a multiple of 4 columns, got " + std::to_string(columns));
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

Layout layout_of(const std::string& name) {
  if (name == "dense") return Layout::dense;
  if (name == "bitmap") return Layout::bitmap;
  if (name == "semi24") return Layout::semi24;
  refuse("layout must be \"dense\", \"bitmap\" or \"semi24\", not \"" + name + "\"");
}

// The only way to a Weight: no kernel sees components that have not passed here.
Weight make_weight(const View& values, const View& index, const std::optional<View>& row_ptr, std::int64_t columns,
                   const std::string& layout_name) {
  values.typed("values", {DType::bf16, DType::f16, DType::f32});
  const Layout layout = layout_of(layout_name);
  const Bits bits = bits_of("index", index, -1, columns);
  Weight weight{values.dtype(), layout, bits.rows, columns, values.read(), bits.data, {columns, nullptr}};
  if (layout != Layout::bitmap && row_ptr) refuse("only the layout bitmap has row_ptr");
  if (layout == Layout::bitmap) {
    weight.starts = starts_of(values, row_ptr, bits);
  } else if (layout == Layout::semi24) {
    check_groups(columns);
    if (first_bad_positions(bits) != kNoRow) refuse("index is not a semi24 index: a nibble is no pair of ascending positions");
    values.sized("values", {bits.rows, columns / 2}).contiguous("values");
    weight.starts.per_row = columns / 2;
  } else {
    values.sized("values", {bits.rows, columns}).contiguous("values");
  }
  return weight;
}

void check_rows(const Weight& weight, std::int64_t first_row, std::int64_t rows) {
  if (first_row < 0 || first_row > weight.rows - rows) refuse("the weight has no rows " + std::to_string(first_row) + " to " + std::to_string(first_row + rows - 1));
}

void unpack_rows_checked(const Weight& weight, const View& out, std::int64_t first_row) {
  out.typed("out", {weight.dtype}).sized("out", {-1, weight.columns}).rowwise("out");
  check_rows(weight, first_row, out.size(0));
  unpack_rows(weight, first_row, out.size(0), out.write(), out.row_stride());
}

void linear_checked(const Weight& weight, const View& x, const View& y, const std::optional<View>& bias,
                    std::int64_t first_row) {
  x.typed("x", {weight.dtype}).sized("x", {-1, weight.columns}).rowwise("x");
  y.typed("y", {weight.dtype}).sized("y", {x.size(0), -1}).rowwise("y");
  LinearCall call{x.read(), x.row_stride(), y.write(), y.row_stride(), x.size(0), nullptr, false, first_row, y.size(1)};
  check_rows(weight, first_row, call.rows);
  if (bias) {
    bias->typed("bias", {weight.dtype, DType::f32}).sized("bias", {call.rows}).contiguous("bias");
    call.bias = bias->read();
    call.bias_is_float = bias->dtype() == DType::f32;
  }
  if (call.tokens > 0 && call.rows > 0) sparse_linear(weight, call);
}

}  // namespace
}  // namespace perp

PYBIND11_MODULE(_C, m) {
  using namespace perp;
  using py::arg;

  py::class_<View>(m, "View")
      .def(py::init<std::uintptr_t, const std::string&, std::vector<std::int64_t>, std::vector<std::int64_t>>(),
           arg("address"), arg("dtype"), arg("sizes"), arg("strides"));

  py::class_<Weight>(m, "Weight")
      .def(py::init(&make_weight), arg("values"), arg("index"), arg("row_ptr"), arg("columns"), arg("layout"))
      .def("linear", &linear_checked, arg("x"), arg("y"), arg("bias"), arg("first_row"), Release())
      .def("unpack", &unpack_rows_checked, arg("out"), arg("first_row"), Release());

  m.attr("sanitizers") = PERP_SANITIZERS;  // lets a test tell that it runs against the build it means
  m.def("cpu_features", &cpu_features);
  m.def("set_path", &set_path, arg("name"));
  m.def("active_path", &active_path);
  m.def("max_threads", &max_threads);

  m.def("count_bits", &count_bits_checked, arg("index"), arg("columns"), arg("counts"), Release());
  m.def("pack_bitmap", &pack_bitmap_checked, arg("weight"), arg("index"), arg("values"), arg("row_ptr"), Release());
  m.def("unpack_bitmap", &unpack_bitmap_checked, arg("values"), arg("index"), arg("row_ptr"), arg("out"), Release());
  m.def("pack_dense", &pack_dense_checked, arg("weight"), arg("index"), arg("out"), Release());
  m.def("bits_to_positions", &bits_to_positions_checked, arg("index"), arg("columns"), arg("positions"), Release());
  m.def("positions_to_bits", &positions_to_bits_checked, arg("positions"), arg("columns"), arg("index"), Release());
}
