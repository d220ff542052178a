// What lets one header serve nvcc, NVRTC (which has no standard headers) and the C++ compiler of the tests.
#pragma once

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define PERP_BOTH __host__ __device__ __forceinline__
#else
#define PERP_BOTH inline
#endif

// Set by the build: what the sources were when a cubin was made of them, so that a stale one is known.
#ifdef PERP_FINGERPRINT
extern "C" __device__ char perp_fingerprint[] = PERP_FINGERPRINT;
#endif

namespace perp {

using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;

PERP_BOTH constexpr int divide_up(int a, int b) { return (a + b - 1) / b; }

}  // namespace perp
