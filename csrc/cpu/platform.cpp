#include "cpu/platform.h"

#include <atomic>
#include <stdexcept>

namespace perp {
namespace {

bool cpu_has_avx512() {
#if PERP_X86
  // libgcc's check covers the operating system's part (XCR0: are the ZMM registers saved at a context switch?).
  static const bool has = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                          __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512bf16") &&
                          __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt") &&
                          __builtin_cpu_supports("fma");
  return has;
#else
  return false;
#endif
}

std::atomic<bool> portable_forced{false};

}  // namespace

std::vector<std::string> cpu_features() {
  std::vector<std::string> found;
#if PERP_X86
  // __builtin_cpu_supports wants a literal, hence the list of calls.
  if (__builtin_cpu_supports("avx2")) found.push_back("avx2");
  if (__builtin_cpu_supports("fma")) found.push_back("fma");
  if (__builtin_cpu_supports("avx512f")) found.push_back("avx512f");
  if (__builtin_cpu_supports("avx512bw")) found.push_back("avx512bw");
  if (__builtin_cpu_supports("avx512vl")) found.push_back("avx512vl");
  if (__builtin_cpu_supports("avx512dq")) found.push_back("avx512dq");
  if (__builtin_cpu_supports("avx512vbmi2")) found.push_back("avx512_vbmi2");
  if (__builtin_cpu_supports("avx512bf16")) found.push_back("avx512_bf16");
#endif
  return found;
}

bool use_avx512() { return cpu_has_avx512() && !portable_forced.load(std::memory_order_relaxed); }

void set_path(const std::string& name) {
  if (name != "auto" && name != "avx512" && name != "portable") {
    throw std::invalid_argument("path must be \"auto\", \"avx512\" or \"portable\", not \"" + name + "\"");
  }
  if (name == "avx512" && !cpu_has_avx512()) {
    throw std::invalid_argument("path \"avx512\" needs a CPU with AVX-512 F, BW, VL, DQ, VBMI2 and BF16; use \"auto\"");
  }
  portable_forced = name == "portable";
}

std::string active_path() { return use_avx512() ? "avx512" : "portable"; }

}  // namespace perp
