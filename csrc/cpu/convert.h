// Scalar conversions between the 16-bit formats and float, rounding to nearest even.
#pragma once

#include <bit>
#include <cstdint>

namespace perp {

struct bf16 {
  std::uint16_t bits;
};
struct f16 {
  std::uint16_t bits;
};

inline float to_float(bf16 value) { return std::bit_cast<float>(static_cast<std::uint32_t>(value.bits) << 16); }
inline float to_float(f16 value) { return static_cast<float>(std::bit_cast<_Float16>(value.bits)); }
inline float to_float(float value) { return value; }

template <class T>
T from_float(float value);

template <>
inline float from_float<float>(float value) {
  return value;
}

template <>
inline f16 from_float<f16>(float value) {
  return {std::bit_cast<std::uint16_t>(static_cast<_Float16>(value))};
}

template <>
inline bf16 from_float<bf16>(float value) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
  if (value != value) return {static_cast<std::uint16_t>((bits >> 16) | 0x40)};  // rounding could carry a NaN into infinity
  return {static_cast<std::uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

}  // namespace perp
