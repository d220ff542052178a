// The packed weight as a handle: checked once, then called with x and y alone.
#include "cpu/weight.h"

#include <string>

#include "bindings/bindings.h"
#include "cpu/sparse_linear.h"

namespace perp {
namespace {

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
    check_padding(bits);
    values.sized("values", {bits.rows, columns}).contiguous("values");
  }
  return weight;
}

void linear_checked(const Weight& weight, const View& x, const View& y, const std::optional<View>& bias,
                    std::int64_t first_row) {
  x.typed("x", {weight.dtype}).sized("x", {-1, weight.columns}).rowwise("x");
  y.typed("y", {weight.dtype}).sized("y", {x.size(0), -1}).rowwise("y");
  LinearCall call{x.read(), x.row_stride(), y.write(), y.row_stride(), x.size(0), nullptr, false, first_row, y.size(1)};
  if (first_row < 0 || first_row > weight.rows - call.rows) {
    refuse("the weight has no " + std::to_string(call.rows) + " rows from row " + std::to_string(first_row) + " on");
  }
  if (bias) {
    bias->typed("bias", {weight.dtype, DType::f32}).sized("bias", {call.rows}).contiguous("bias");
    call.bias = bias->read();
    call.bias_is_float = bias->dtype() == DType::f32;
  }
  if (call.tokens > 0 && call.rows > 0) sparse_linear(weight, call);
}

}  // namespace

void bind_weight(pybind11::module_& m) {
  using pybind11::arg;
  pybind11::class_<Weight>(m, "Weight")
      .def(pybind11::init(&make_weight), arg("values"), arg("index"), arg("row_ptr"), arg("columns"), arg("layout"))
      .def("linear", &linear_checked, arg("x"), arg("y"), arg("bias"), arg("first_row"), Release());
}

}  // namespace perp
