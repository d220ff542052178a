// The kernels of csrc/cuda, entry points and all, on the machine of machine.h, and the mistakes it has to find: C functions for Python.

#include "host_device.h"
#include "instructions.h"
#include "mistakes.h"

#include "semi24_pack.cu"
#include "sm80_bf16_bitmap_linear.cu"
#include "sm80_bf16_semi24_gemm.cu"
#include "sm80_fp16_bitmap_linear.cu"
#include "sm80_fp16_semi24_gemm.cu"
#include "sm90_bf16_semi24_gemm.cu"
#include "sm90_fp16_semi24_gemm.cu"

namespace {

using Words = const std::int64_t*;  // arguments, each in eight bytes

template <class T>
T argument(std::int64_t word) {
  if constexpr (std::is_pointer_v<T>) {
    return reinterpret_cast<T>(word);
  } else if constexpr (std::is_same_v<T, float>) {
    float value;
    std::memcpy(&value, &word, 4);
    return value;
  } else {
    return static_cast<T>(word);
  }
}

template <class... T, std::size_t... I>
void call(void (*kernel)(T...), Words words, std::index_sequence<I...>) {
  kernel(argument<T>(words[I])...);
}

template <class... T>
std::function<void(Words)> entry(void (*kernel)(T...)) {
  return [kernel](Words words) { call(kernel, words, std::index_sequence_for<T...>{}); };
}

#define ENTRY(name) {#name, entry(&name)}
#define GEMM_80(type) \
  ENTRY(sm80_##type##_semi24_gemm_t16), ENTRY(sm80_##type##_semi24_gemm_t64), ENTRY(sm80_##type##_semi24_gemm_t128), ENTRY(sm80_##type##_semi24_gemm_sum)
#define GEMM_90(type)                                                                                      \
  ENTRY(sm90_##type##_semi24_gemm_t16_p2), ENTRY(sm90_##type##_semi24_gemm_t16_p4),                        \
      ENTRY(sm90_##type##_semi24_gemm_t64_p2), ENTRY(sm90_##type##_semi24_gemm_t64_p4),                    \
      ENTRY(sm90_##type##_semi24_gemm_t128_p4), ENTRY(sm90_##type##_semi24_gemm_t128_p1), ENTRY(sm90_##type##_semi24_gemm_t128_wide), \
      ENTRY(sm90_##type##_semi24_gemm_t128_pair)
#define BITMAP(type)                                                                                 \
  ENTRY(sm80_##type##_bitmap_linear_t8_r16_s3), ENTRY(sm80_##type##_bitmap_linear_t8_r16_s4),        \
      ENTRY(sm80_##type##_bitmap_linear_t8_r32_s3), ENTRY(sm80_##type##_bitmap_linear_t8_r32_s4),    \
      ENTRY(sm80_##type##_bitmap_linear_t16_r32_s3), ENTRY(sm80_##type##_bitmap_linear_t16_r32_s4),  \
      ENTRY(sm80_##type##_bitmap_linear_sum)

const std::map<std::string, std::function<void(Words)>> kernels = {
    BITMAP(bf16), BITMAP(fp16), GEMM_80(bf16), GEMM_80(fp16), GEMM_90(bf16), GEMM_90(fp16), ENTRY(semi24_compress), ENTRY(semi24_repack),
    ENTRY(semi24_add_lowrank_bf16), ENTRY(semi24_add_lowrank_fp16)};

std::string message;

}  // namespace

// Runs a launch, cluster by cluster. `buffers` are begin and size of what the kernel may read by asynchronous copies.
// Returns what went wrong, or null.
extern "C" const char* emulate(const char* name, int grid_x, int grid_y, int cluster, int threads, int shared_bytes, Words arguments,
                               const std::int64_t* buffers, int buffer_count, unsigned seed) {
  try {
    const auto found = kernels.find(name);
    if (found == kernels.end()) emulator::fail("there is no such kernel");
    if (grid_x % cluster) emulator::fail("the grid is no whole number of clusters");
    for (int y = 0; y < grid_y; ++y) {
      for (int x = 0; x < grid_x; x += cluster) {
        emulator::Machine machine(cluster, threads, shared_bytes, seed++);
        machine.grid_x = x, machine.grid_y = y;
        for (int i = 0; i < buffer_count; ++i) machine.buffers.emplace_back(buffers[2 * i], buffers[2 * i + 1]);
        machine.run([&] { found->second(arguments); });
      }
    }
    return nullptr;
  } catch (const std::exception& error) {
    message = std::string(name) + ": " + error.what();
    return message.c_str();
  }
}

// One of the kernels of mistakes.h, on 128 threads.
extern "C" const char* mistake(const char* name, unsigned seed) {
  try {
    emulator::Machine machine(1, 128, mistakes::kShared, seed);
    machine.buffers.emplace_back(reinterpret_cast<std::uintptr_t>(mistakes::device_memory), sizeof mistakes::device_memory);
    machine.run(mistakes::kernels.at(name));
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}
