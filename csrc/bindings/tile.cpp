#include "cpu/tile.h"

#include <string>

#include "bindings/bindings.h"

namespace perp {
namespace {

Effect effect_of(const std::string& name) {
  if (name == "none") return Effect::none;
  if (name == "add") return Effect::add;
  if (name == "multiply") return Effect::multiply;
  refuse("effect must be \"none\", \"add\" or \"multiply\", not \"" + name + "\"");
}

// The tile of the weight at (first_row, first_column) that has the shape of `view`.
Tile tile_of(const Weight& weight, const char* name, const View& view, std::int64_t first_row, std::int64_t first_column) {
  view.typed(name, {weight.dtype}).sized(name, {-1, -1}).rowwise(name);
  const Tile tile{first_row, view.size(0), first_column, view.size(1)};
  if (first_row < 0 || first_row > weight.rows - tile.rows || first_column < 0 || first_column > weight.columns - tile.columns) {
    refuse(std::string(name) + " reaches beyond the weight");
  }
  if (first_column % 8 != 0) refuse("a tile begins at a multiple of 8 columns, not at " + std::to_string(first_column));
  return tile;
}

Adapter adapter_of(const Tile& tile, const std::string& effect, float scale, const View& A, const View& B) {
  A.typed("A", {DType::f32}).sized("A", {-1, tile.columns}).rowwise("A");
  B.typed("B", {DType::f32}).sized("B", {tile.rows, A.size(0)}).rowwise("B");
  return {effect_of(effect), scale, A.as<const float>(), A.row_stride(), B.as<const float>(), B.row_stride(), A.size(0)};
}

void form_tile_checked(const Weight& weight, std::int64_t first_row, std::int64_t first_column, const std::string& effect,
                       float scale, const View& A, const View& B, const View& out) {
  const Tile tile = tile_of(weight, "out", out, first_row, first_column);
  const Adapter adapter = adapter_of(tile, effect, scale, A, B);
  form_tile(weight, tile, adapter, out.write(), out.row_stride());
}

void unpack_tile_checked(const Weight& weight, std::int64_t first_row, std::int64_t first_column, const View& out) {
  const Tile tile = tile_of(weight, "out", out, first_row, first_column);
  form_tile(weight, tile, {Effect::none, 0, nullptr, 0, nullptr, 0, 0}, out.write(), out.row_stride());
}

void fold_tile_checked(const Weight& weight, std::int64_t first_row, std::int64_t first_column, const std::string& effect,
                       float scale, const View& A, const View& B, const View& G, const std::optional<View>& dA,
                       const std::optional<View>& dB) {
  const Tile tile = tile_of(weight, "G", G, first_row, first_column);
  const Adapter adapter = adapter_of(tile, effect, scale, A, B);
  if (adapter.effect == Effect::none) refuse("a weight without an adapter has no gradient to fold");
  Gradient gradient{G.read(), G.row_stride(), nullptr, 0, nullptr, 0};
  if (dA) {
    dA->typed("dA", {DType::f32}).sized("dA", {adapter.rank, tile.columns}).rowwise("dA");
    gradient.dA = dA->as<float>();
    gradient.dA_stride = dA->row_stride();
  }
  if (dB) {
    dB->typed("dB", {DType::f32}).sized("dB", {tile.rows, adapter.rank}).rowwise("dB");
    gradient.dB = dB->as<float>();
    gradient.dB_stride = dB->row_stride();
  }
  if (adapter.rank > 0) fold_tile(weight, tile, adapter, gradient);
}

void store_rows_checked(const Weight& weight, std::int64_t first_row, const View& in, const View& values) {
  const Tile tile = tile_of(weight, "in", in, first_row, 0);
  if (tile.columns != weight.columns) refuse("in must have all columns of the weight");
  values.typed("values", {weight.dtype});
  if (weight.starts.row_ptr != nullptr) {
    values.sized("values", {weight.starts.row_ptr[weight.rows]});
  } else {
    values.sized("values", {weight.rows, weight.starts.per_row});
  }
  values.contiguous("values");
  store_rows(weight, first_row, tile.rows, in.read(), in.row_stride(), values.write());
}

}  // namespace

void bind_tile(pybind11::module_& m) {
  using pybind11::arg;
  m.def("form_tile", &form_tile_checked, arg("weight"), arg("first_row"), arg("first_column"), arg("effect"), arg("scale"),
        arg("A"), arg("B"), arg("out"), Release());
  m.def("unpack_tile", &unpack_tile_checked, arg("weight"), arg("first_row"), arg("first_column"), arg("out"), Release());
  m.def("fold_tile", &fold_tile_checked, arg("weight"), arg("first_row"), arg("first_column"), arg("effect"), arg("scale"),
        arg("A"), arg("B"), arg("G"), arg("dA"), arg("dB"), Release());
  m.def("store_rows", &store_rows_checked, arg("weight"), arg("first_row"), arg("in"), arg("values"), Release());
}

}  // namespace perp
