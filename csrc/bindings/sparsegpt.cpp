#include "cpu/sparsegpt.h"

#include "bindings/bindings.h"

namespace perp {
namespace {

Block checked(const View& W, const View& U, const View& errors, const View& kept) {
  W.typed("W", {DType::f32}).sized("W", {-1, -1}).rowwise("W");
  const std::int64_t rows = W.size(0), columns = W.size(1);
  U.typed("U", {DType::f32}).sized("U", {columns, columns}).rowwise("U");
  errors.typed("errors", {DType::f32}).sized("errors", {rows, columns}).rowwise("errors");
  kept.typed("kept", {DType::u8}).sized("kept", {rows, columns}).rowwise("kept");
  return {W.as<float>(), W.row_stride(), U.as<const float>(), U.row_stride(), errors.as<float>(), errors.row_stride(),
          kept.as<std::uint8_t>(), kept.row_stride(), rows, columns};
}

void sparsegpt_groups_checked(const View& W, const View& U, std::int64_t group, std::int64_t pruned, const View& errors, const View& kept) {
  const Block block = checked(W, U, errors, kept);
  if (group < 1 || block.columns % group != 0) refuse(std::to_string(block.columns) + " columns do not divide into groups of " + std::to_string(group));
  if (pruned < 0 || pruned > group) refuse(std::to_string(pruned) + " of each " + std::to_string(group) + " columns cannot be pruned");
  sparsegpt_groups(block, group, pruned);
}

void sparsegpt_share_checked(const View& W, const View& U, std::int64_t pruned, bool jointly, const View& errors, const View& kept) {
  const Block block = checked(W, U, errors, kept);
  const std::int64_t count = jointly ? block.rows * block.columns : block.columns;
  if (pruned < 0 || pruned > count) refuse(std::to_string(pruned) + " of " + std::to_string(count) + " weights cannot be pruned");
  sparsegpt_share(block, pruned, jointly);
}

}  // namespace

void bind_sparsegpt(pybind11::module_& m) {
  using pybind11::arg;
  m.def("sparsegpt_groups", &sparsegpt_groups_checked, arg("W"), arg("U"), arg("group"), arg("pruned"), arg("errors"), arg("kept"), Release());
  m.def("sparsegpt_share", &sparsegpt_share_checked, arg("W"), arg("U"), arg("pruned"), arg("jointly"), arg("errors"), arg("kept"), Release());
}

}  // namespace perp
