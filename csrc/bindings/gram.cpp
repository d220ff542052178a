#include "cpu/gram.h"

#include "bindings/bindings.h"
#include "cpu/platform.h"

namespace perp {
namespace {

void gram_checked(const View& H, const View& x) {
  x.typed("x", {DType::bf16, DType::f16, DType::f32}).sized("x", {-1, -1}).rowwise("x");
  const std::int64_t columns = x.size(1);
  H.typed("H", {DType::f32}).sized("H", {columns, columns}).contiguous("H");
  if (!use_avx512()) refuse("gram has an AVX-512 path only, and it is not active");
  gram(H.as<float>(), {x.read(), x.dtype(), x.size(0), x.row_stride(), columns});
}

}  // namespace

void bind_gram(pybind11::module_& m) {
  using pybind11::arg;
  m.def("gram", &gram_checked, arg("H"), arg("x"), Release());
}

}  // namespace perp
