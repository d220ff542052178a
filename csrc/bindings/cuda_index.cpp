// The index functions of the CUDA kernels, from the headers that the kernels include, for the tests to call.
#include "bindings/bindings.h"
#include "cuda/fragments.h"

namespace perp {

void bind_cuda_index(pybind11::module_& parent) {
  namespace py = pybind11;
  py::module_ m = parent.def_submodule("cuda_index", "Index functions of csrc/cuda/tiled24.h and fragments.h.");
  m.def("value_chunk", &value_chunk);
  m.def("token_chunk", &token_chunk);
  m.def("index_word", &index_word);
  m.def("index_half", &index_half);
  m.def("tile_number", &tile_number);
  m.def("first_tile", &first_tile);
  m.def("place", [](int block, int row_blocks, int token_blocks) {
    const Place at = place(block, row_blocks, token_blocks);
    return py::make_tuple(at.rows, at.tokens);
  });
  m.def("a_row_offset", &a_row_offset);
  m.def("b_row_offset", &b_row_offset);
  m.def("accumulator_row", &accumulator_row);
  m.def("accumulator_token", &accumulator_token);
  m.def("weight_descriptor", &weight_descriptor);
  m.def("token_descriptor", &token_descriptor);
}

}  // namespace perp
