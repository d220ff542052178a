// What the files of csrc/bindings share. Each wraps its kernels in functions that check every size, stride and dtype
// before a pointer is used, and gives them to Python without the GIL.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "cpu/pack.h"
#include "view.h"

namespace perp {

using Release = pybind11::call_guard<pybind11::gil_scoped_release>;

void bind_gram(pybind11::module_& m);
void bind_pack(pybind11::module_& m);
void bind_select(pybind11::module_& m);
void bind_sparsegpt(pybind11::module_& m);
void bind_swap_round(pybind11::module_& m);
void bind_weight(pybind11::module_& m);
void bind_tile(pybind11::module_& m);

// The bits [rows, ceil(columns / 8)] of `index`; -1 takes any number of rows.
Bits bits_of(const char* name, const View& index, std::int64_t rows, std::int64_t columns);

// Checks values, row_ptr and bits against each other, so that no row reads past its values.
RowStarts starts_of(const View& values, const std::optional<View>& row_ptr, const Bits& bits);

// Refuses bits with a padding bit set, which a kernel would follow past the end of a row.
void check_padding(const Bits& bits);

// semi24 divides the columns into groups of four.
void check_groups(std::int64_t columns);

}  // namespace perp
