// Which instructions this CPU has and which code path serves a call.
#pragma once

#include <string>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__)
#define PERP_X86 1
#include <immintrin.h>
// Compiles one function for AVX-512 while the file around it stays baseline x86-64. One set of extensions for all
// kernels: F/BW/VL/DQ are the common base, VBMI2 has 16-bit expand and compress, BF16 the bf16 dot product, and every CPU with
// these two (Ice Lake had no BF16; Cooper Lake no VBMI2) is Zen 4 or Sapphire Rapids or newer.
#define PERP_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,avx512bf16,bmi2,popcnt,fma,f16c")))
// What CPUs without them have had since 2013 (Haswell, Zen).
#define PERP_AVX2 __attribute__((target("avx2,fma,f16c,bmi,bmi2,popcnt,lzcnt")))
#else
#define PERP_X86 0
#endif

namespace perp {

// The features above that this CPU and operating system provide, by their Linux names.
std::vector<std::string> cpu_features();

// The code paths, the fastest last.
enum class Path { portable, avx2, avx512 };

// The path that serves calls: what set_path forced, else the fastest this CPU has every feature for. A kernel without a
// version of its own for the path takes its portable one.
Path path();
inline bool use_avx512() { return path() == Path::avx512; }
inline bool use_avx2() { return path() == Path::avx2; }

// "auto" or a path's name, for the whole process. Throws std::invalid_argument for another name, and for a path that
// this CPU lacks the features of.
void set_path(const std::string& name);

// The name of path(): "avx512", "avx2" or "portable".
std::string active_path();

}  // namespace perp
