// perp_kernels._C: the CPU kernels for Python, free of torch. perp_kernels/cpu is its only caller.

#include "bindings/bindings.h"
#include "cpu/parallel.h"
#include "cpu/platform.h"
#include "cpu/read.h"

namespace perp {
namespace {

std::uint64_t read_words_checked(const View& buffer) {
  buffer.typed("buffer", {DType::i64}).sized("buffer", {-1}).contiguous("buffer");
  return read_words(buffer.read(), buffer.size(0) * buffer.element_size());
}

}  // namespace
}  // namespace perp

PYBIND11_MODULE(_C, m) {
  using namespace perp;
  namespace py = pybind11;
  using py::arg;

  py::class_<View>(m, "View")
      .def(py::init<std::uintptr_t, const std::string&, std::vector<std::int64_t>, std::vector<std::int64_t>>(),
           arg("address"), arg("dtype"), arg("sizes"), arg("strides"));

  m.attr("sanitizers") = PERP_SANITIZERS;  // lets a test tell that it runs against the build it means
  m.def("cpu_features", &cpu_features);
  m.def("set_path", &set_path, arg("name"));
  m.def("active_path", &active_path);
  m.def("max_threads", &max_threads);
  m.def("read_words", &read_words_checked, arg("buffer"), Release());

  bind_gram(m);
  bind_pack(m);
  bind_select(m);
  bind_sparsegpt(m);
  bind_swap_round(m);
  bind_weight(m);
  bind_tile(m);
}
