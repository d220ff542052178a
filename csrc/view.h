// A tensor as Python hands it over: address, element type, sizes and strides. Nothing is dereferenced before the checks
// here have passed; each throws std::invalid_argument (ValueError in Python) with a sentence that names the argument.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace perp {

enum class DType { u8, i64, bf16, f16, f32, f64 };

struct DTypeInfo {
  const char* name;  // as torch prints it
  DType dtype;
  int size;
};

inline constexpr DTypeInfo kDTypes[] = {{"uint8", DType::u8, 1},    {"int64", DType::i64, 8},   {"bfloat16", DType::bf16, 2},
                                        {"float16", DType::f16, 2}, {"float32", DType::f32, 4}, {"float64", DType::f64, 8}};

inline const DTypeInfo& info(DType dtype) { return kDTypes[static_cast<int>(dtype)]; }

[[noreturn]] inline void refuse(const std::string& sentence) { throw std::invalid_argument(sentence); }

class View {
 public:
  View(std::uintptr_t address, const std::string& dtype, std::vector<std::int64_t> sizes, std::vector<std::int64_t> strides)
      : address_(address), sizes_(std::move(sizes)), strides_(std::move(strides)) {
    const DTypeInfo* found = nullptr;
    for (const DTypeInfo& known : kDTypes) {
      if (dtype == known.name) found = &known;
    }
    if (found == nullptr) refuse("dtype " + dtype + " is not one the CPU kernels know");
    dtype_ = found->dtype;
    if (sizes_.size() != strides_.size()) refuse("a view needs as many strides as sizes");
    std::int64_t count = found->size;
    for (std::int64_t size : sizes_) {
      if (size < 0 || __builtin_mul_overflow(count, size, &count)) refuse("a view's sizes must be non-negative and fit in 63 bits");
    }
    if (count > 0 && address_ == 0) refuse("a view with elements needs an address");
    if (address_ % found->size != 0) refuse("a view of " + dtype + " must be aligned to " + std::to_string(found->size) + " bytes");
  }

  DType dtype() const { return dtype_; }
  int element_size() const { return info(dtype_).size; }
  std::int64_t size(int dim) const { return sizes_[dim]; }
  std::int64_t stride(int dim) const { return strides_[dim]; }
  int dims() const { return static_cast<int>(sizes_.size()); }

  // Throws unless the sizes are these. -1 takes any size.
  const View& sized(const char* name, std::initializer_list<std::int64_t> wanted) const {
    bool same = sizes_.size() == wanted.size();
    std::string text;
    int dim = 0;
    for (std::int64_t size : wanted) {
      same = same && (size < 0 || sizes_[dim] == size);
      text += (dim++ ? ", " : "") + (size < 0 ? std::string("*") : std::to_string(size));
    }
    if (!same) refuse(std::string(name) + " has shape [" + joined() + "], expected [" + text + "]");
    return *this;
  }

  const View& typed(const char* name, std::initializer_list<DType> allowed) const {
    std::string text;
    for (DType dtype : allowed) {
      if (dtype == dtype_) return *this;
      text += (text.empty() ? "" : " or ") + std::string(info(dtype).name);
    }
    refuse(std::string(name) + " is " + info(dtype_).name + ", expected " + text);
  }

  // Unit stride in the last dimension, and rows that do not overlap (2-D): what the row kernels read or write.
  const View& rowwise(const char* name) const {
    const int last = dims() - 1;
    if (size(last) > 1 && stride(last) != 1) refuse(std::string(name) + " must have stride 1 along its last dimension");
    if (last == 1 && size(0) > 1 && stride(0) < size(1)) refuse(std::string(name) + " has rows that overlap");
    return *this;
  }

  const View& contiguous(const char* name) const {
    std::int64_t expected = 1;
    for (int dim = dims() - 1; dim >= 0; --dim) {
      if (size(dim) > 1 && stride(dim) != expected) refuse(std::string(name) + " must be contiguous");
      expected *= size(dim) > 0 ? size(dim) : 1;  // torch's convention for empty tensors
    }
    return *this;
  }

  // Distance of rows in elements; for a single row any value serves.
  std::int64_t row_stride() const { return stride(0); }

  const void* read() const { return reinterpret_cast<const void*>(address_); }
  void* write() const { return reinterpret_cast<void*>(address_); }
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(address_);
  }

 private:
  std::string joined() const {
    std::string text;
    for (std::int64_t size : sizes_) text += (text.empty() ? "" : ", ") + std::to_string(size);
    return text;
  }

  std::uintptr_t address_;
  DType dtype_ = DType::u8;
  std::vector<std::int64_t> sizes_, strides_;
};

}  // namespace perp
