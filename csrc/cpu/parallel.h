// Threads: OpenMP's pool, which in this process is torch's own (see CMakeLists.txt).
#pragma once

#include <algorithm>
#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace perp {

inline int max_threads() {
#ifdef _OPENMP
  return omp_in_parallel() ? 1 : omp_get_max_threads();
#else
  return 1;
#endif
}

// Calls body(part) for every part in [0, parts), one thread each; parts <= max_threads(). `body` must not throw.
template <class Body>
void parallel(int parts, const Body& body) {
#ifdef _OPENMP
  if (parts > 1) {
#pragma omp parallel for num_threads(parts) schedule(static, 1)
    for (int part = 0; part < parts; ++part) body(part);
    return;
  }
#endif
  for (int part = 0; part < parts; ++part) body(part);
}

// Splits [0, count) into one contiguous range per thread and calls body(begin, end). A range holds at least `grain`
// items, so that small work is not spread thinner than waking a thread is worth (about 5 us).
template <class Body>
void parallel_ranges(std::int64_t count, std::int64_t grain, const Body& body) {
  if (count <= 0) return;
  const int parts =
      static_cast<int>(std::clamp<std::int64_t>(count / std::max<std::int64_t>(grain, 1), 1, max_threads()));
  parallel(parts, [&](int part) { body(count * part / parts, count * (part + 1) / parts); });
}

}  // namespace perp
