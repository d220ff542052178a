#include "cpu/platform.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>

namespace perp {
namespace {

Path fastest_path() {
#if PERP_X86
  // libgcc's check covers the operating system's part (XCR0: are the wide registers saved at a context switch?).
  static const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                           __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi") &&
                           __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt") &&
                           __builtin_cpu_supports("lzcnt");
  static const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                             __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512bf16");
  return avx512 ? Path::avx512 : avx2 ? Path::avx2 : Path::portable;
#else
  return Path::portable;
#endif
}

struct Choice {
  const char* name;
  Path path;
  const char* needs;
};

constexpr Choice kChoices[] = {{"portable", Path::portable, ""},
                               {"avx2", Path::avx2, "AVX2, FMA, F16C and BMI"},
                               {"avx512", Path::avx512, "AVX-512 F, BW, VL, DQ, VBMI2 and BF16"}};

// No path above this one is taken.
std::atomic<Path> limit{Path::avx512};

}  // namespace

std::vector<std::string> cpu_features() {
  std::vector<std::string> found;
#if PERP_X86
  // __builtin_cpu_supports wants a literal, hence the list of calls.
  if (__builtin_cpu_supports("avx2")) found.push_back("avx2");
  if (__builtin_cpu_supports("fma")) found.push_back("fma");
  if (__builtin_cpu_supports("f16c")) found.push_back("f16c");
  if (__builtin_cpu_supports("bmi2")) found.push_back("bmi2");
  if (__builtin_cpu_supports("avx512f")) found.push_back("avx512f");
  if (__builtin_cpu_supports("avx512bw")) found.push_back("avx512bw");
  if (__builtin_cpu_supports("avx512vl")) found.push_back("avx512vl");
  if (__builtin_cpu_supports("avx512dq")) found.push_back("avx512dq");
  if (__builtin_cpu_supports("avx512vbmi2")) found.push_back("avx512_vbmi2");
  if (__builtin_cpu_supports("avx512bf16")) found.push_back("avx512_bf16");
#endif
  return found;
}

Path path() { return std::min(fastest_path(), limit.load(std::memory_order_relaxed)); }

void set_path(const std::string& name) {
  if (name == "auto") {
    limit = Path::avx512;
    return;
  }
  for (const Choice& choice : kChoices) {
    if (name != choice.name) continue;
    if (choice.path > fastest_path()) {
      throw std::invalid_argument("path \"" + name + "\" needs a CPU with " + choice.needs + "; use \"auto\"");
    }
    limit = choice.path;
    return;
  }
  throw std::invalid_argument("path must be \"auto\", \"avx512\", \"avx2\" or \"portable\", not \"" + name + "\"");
}

std::string active_path() { return kChoices[static_cast<int>(path())].name; }

}  // namespace perp
