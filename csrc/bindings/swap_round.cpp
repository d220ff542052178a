#include "cpu/swap_round.h"

#include <limits>

#include "bindings/bindings.h"

namespace perp {
namespace {

void swap_round_checked(const View& weight, const View& kept, const View& correlation, const View& H, std::int64_t group, const View& gain) {
  weight.typed("weight", {DType::f32}).sized("weight", {-1, -1}).rowwise("weight");
  const std::int64_t rows = weight.size(0), columns = weight.size(1);
  kept.typed("kept", {DType::u8}).sized("kept", {rows, columns}).rowwise("kept");
  correlation.typed("correlation", {DType::f32}).sized("correlation", {rows, columns}).rowwise("correlation");
  H.typed("H", {DType::f32}).sized("H", {columns, columns}).rowwise("H");
  gain.typed("gain", {DType::f32}).sized("gain", {rows}).contiguous("gain");
  if (columns > std::numeric_limits<std::int32_t>::max()) refuse("a row has " + std::to_string(columns) + " columns, more than 2^31 - 1");
  if (columns > 0 && (group < 1 || columns % group != 0)) refuse(std::to_string(columns) + " columns do not divide into groups of " + std::to_string(group));
  swap_round({weight.as<const float>(), weight.row_stride(), kept.as<std::uint8_t>(), kept.row_stride(), correlation.as<float>(),
              correlation.row_stride(), H.as<const float>(), H.row_stride(), gain.as<float>(), rows, columns},
             group);
}

}  // namespace

void bind_swap_round(pybind11::module_& m) {
  using pybind11::arg;
  m.def("swap_round", &swap_round_checked, arg("weight"), arg("kept"), arg("correlation"), arg("H"), arg("group"), arg("gain"), Release());
}

}  // namespace perp
