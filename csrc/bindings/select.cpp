#include "cpu/select.h"

#include "bindings/bindings.h"

namespace perp {
namespace {

Scores checked(const View& scores, const View& kept) {
  scores.typed("scores", {DType::bf16, DType::f16, DType::f32, DType::f64}).sized("scores", {-1, -1}).rowwise("scores");
  kept.typed("kept", {DType::u8}).sized("kept", {scores.size(0), scores.size(1)}).rowwise("kept");
  return {scores.read(), scores.dtype(), scores.size(0), scores.size(1), scores.row_stride(), kept.as<std::uint8_t>(), kept.row_stride()};
}

void check_pruned(std::int64_t pruned, std::int64_t count) {
  if (pruned < 0 || pruned > count) refuse(std::to_string(pruned) + " of " + std::to_string(count) + " scores cannot be pruned");
}

bool select_rows_checked(const View& scores, std::int64_t pruned, const View& kept) {
  const Scores s = checked(scores, kept);
  check_pruned(pruned, s.columns);
  return select_rows(s, pruned);
}

bool select_groups_checked(const View& scores, std::int64_t group, std::int64_t pruned, const View& kept) {
  const Scores s = checked(scores, kept);
  if (group < 1 || s.columns % group != 0) refuse(std::to_string(s.columns) + " columns do not divide into groups of " + std::to_string(group));
  check_pruned(pruned, group);
  return select_groups(s, group, pruned);
}

bool select_jointly_checked(const View& scores, std::int64_t pruned, const View& kept) {
  const Scores s = checked(scores, kept);
  check_pruned(pruned, s.rows * s.columns);
  return select_jointly(s, pruned);
}

bool wanda_select_checked(const View& weight, const View& norms, std::int64_t group, std::int64_t pruned, const View& kept) {
  weight.typed("weight", {DType::bf16, DType::f16, DType::f32});
  const Scores s = checked(weight, kept);
  norms.typed("norms", {DType::f32}).sized("norms", {s.columns}).contiguous("norms");
  if (s.columns == 0) return true;
  if (group < 1 || s.columns % group != 0) refuse(std::to_string(s.columns) + " columns do not divide into groups of " + std::to_string(group));
  check_pruned(pruned, group);
  if (pruned == 0) refuse("a weight of which nothing is pruned has no scores to rank");
  return select_weighted(s, norms.as<const float>(), group, pruned);
}

}  // namespace

void bind_select(pybind11::module_& m) {
  using pybind11::arg;
  m.def("select_rows", &select_rows_checked, arg("scores"), arg("pruned"), arg("kept"), Release());
  m.def("select_groups", &select_groups_checked, arg("scores"), arg("group"), arg("pruned"), arg("kept"), Release());
  m.def("wanda_select", &wanda_select_checked, arg("weight"), arg("norms"), arg("group"), arg("pruned"), arg("kept"), Release());
  m.def("select_jointly", &select_jointly_checked, arg("scores"), arg("pruned"), arg("kept"), Release());
}

}  // namespace perp
