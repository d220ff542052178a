// The functions of csrc/cuda/ptx.cuh and ptx_sm90.cuh on the machine. What the instructions read and write is written
// from the PTX ISA manual (sections on mma.sp, wgmma.mma_async.sp, ldmatrix, matrix descriptors, shared memory matrix
// layout); it shares no code with the index headers of the kernels, which it is here to test.
#pragma once

#include "machine.h"

struct uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

#define PERP_DEVICE inline
#define __global__
#define __launch_bounds__(...)
#define __cluster_dims__(...)

namespace perp {

using emulator::Chunk;
using emulator::fail;
using emulator::Machine;

inline Machine& machine() { return *Machine::self; }
inline emulator::Fiber& me() { return *machine().current; }

struct Bf16 {
  static constexpr bool kBrain = true;
};
struct Fp16 {
  static constexpr bool kBrain = false;
};

inline int thread_index() { return me().thread; }
inline int block_index() { return machine().grid_x + me().block; }
inline int part_index() { return machine().grid_y; }
inline int block_threads() { return machine().threads; }

constexpr int kAlignment = 1024;
template <int ALIGNMENT = kAlignment>
u32 shared_memory() {
  return (Machine::kBase + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
}

// --- 16-bit floats

template <class Type>
u16 round_one(float value) {
  if constexpr (Type::kBrain) {
    u32 bits;
    std::memcpy(&bits, &value, 4);
    if (value != value) return static_cast<u16>(bits >> 16 | 0x40);
    return static_cast<u16>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
  } else {
    const _Float16 half = static_cast<_Float16>(value);
    u16 bits;
    std::memcpy(&bits, &half, 2);
    return bits;
  }
}
template <class Type>
u32 round_pair(float low, float high) {
  return round_one<Type>(low) | static_cast<u32>(round_one<Type>(high)) << 16;
}
template <class Type>
float widen(u16 bits) {
  if constexpr (Type::kBrain) {
    const u32 wide = static_cast<u32>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
  } else {
    _Float16 half;
    std::memcpy(&half, &bits, 2);
    return static_cast<float>(half);
  }
}

inline void hold(u32&) {}
template <class T>
void hold(T*&) {}

// --- device memory

template <class T>
T load_constant(const T* from) {
  machine().global(from, sizeof(T));
  if (reinterpret_cast<std::uintptr_t>(from) % sizeof(T)) fail("a misaligned read of device memory");
  return *from;
}

// --- shared memory

inline u32 load_shared(u32 address) {
  u32 word;
  machine().read(machine().block(), address, 4, &word, false);
  return word;
}
inline uint2 load_shared2(u32 address) {
  uint2 two;
  machine().read(machine().block(), address, 8, &two, false);
  return two;
}
inline u32 load_shared16(u32 address, u32 wanted) {
  u16 half = 0;
  if (wanted != 0) machine().read(machine().block(), address, 2, &half, false);
  return half;
}
inline float4 load_shared4(u32 address) {
  float4 four;
  machine().read(machine().block(), address, 16, &four, false);
  return four;
}
inline void store_shared(u32 address, float value) { machine().write(machine().block(), address, &value, 4); }
inline void store_shared2(u32 address, uint2 value) { machine().write(machine().block(), address, &value, 8); }
inline void store_shared16(u32 address, u16 value) { machine().write(machine().block(), address, &value, 2); }

inline void ldmatrix4(u32 (&r)[4], u32 row_address) {
  emulator::Block& block = machine().block();
  const int own = me().block, warp = me().thread / 32;
  me().slot[0] = row_address;
  me().slot[1] = reinterpret_cast<std::uintptr_t>(&r[0]);
  machine().meet(block.warps[warp], 32, "ldmatrix", [&block, own, warp] {
    for (int matrix = 0; matrix < 4; ++matrix) {
      for (int row = 0; row < 8; ++row) {
        u16 eight[8];
        machine().read(block, static_cast<u32>(machine().fiber(own, warp * 32 + matrix * 8 + row).slot[0]), 16, eight, false);
        for (int column = 0; column < 8; ++column) {
          // Thread 4 row + column / 2 receives elements column, column + 1 of the row, the even one in the low half.
          auto* to = reinterpret_cast<u32*>(machine().fiber(own, warp * 32 + row * 4 + column / 2).slot[1]);
          reinterpret_cast<u16*>(to + matrix)[column % 2] = eight[column];
        }
      }
    }
  });
}

// --- asynchronous copies by each thread: they land when they are waited for

inline void cp_async16(u32 to, const void* from, bool inside) {
  machine().shared(machine().block(), to, 16);
  if (reinterpret_cast<std::uintptr_t>(from) % 16) fail("a misaligned cp.async");
  if (inside) machine().global(from, 16);
  machine().overwrite(machine().block(), to);
  me().copies.back().push_back({to, inside ? from : nullptr});
}
inline void cp_async_commit() { me().copies.emplace_back(); }
template <int PENDING>
void cp_async_wait() {
  auto& groups = me().copies;
  while (static_cast<int>(groups.size()) - 1 > PENDING) {
    for (const emulator::Copy& copy : groups.front()) {
      machine().block().chunks[copy.to / 16] = Chunk::nothing;
      machine().write(machine().block(), copy.to, copy.from, 16);
    }
    groups.erase(groups.begin());
  }
}

// --- barriers

inline void block_sync() { machine().meet(machine().block().named[0], machine().threads, "the block's barrier"); }
inline void warp_sync() { machine().meet(machine().block().warps[me().thread / 32], 32, "the warp's barrier"); }
inline void named_sync(int id, int threads) {
  if (id < 1 || id > 15 || threads % 32) fail("a named barrier has an id of 1 to 15 and whole warps");
  machine().meet(machine().block().named[id], threads, "a named barrier");
}

// --- within a warp

inline int count_bits(u32 word) { return __builtin_popcount(word); }
inline u32 join_halves(u32 low, u32 high) {
  if (low >> 16 || high >> 16) fail("a half that is not alone in its word");
  return low | high << 16;
}

// Each lane gets what the one that it names within its WIDTH lanes brought, or its own where `from` is outside.
template <int WIDTH>
int shuffled(int value, int from, bool& inside) {
  const int warp = me().thread / 32, lane = me().thread % 32, first = lane / WIDTH * WIDTH;
  inside = from >= first && from < first + WIDTH;
  int found = value;
  me().slot[0] = static_cast<u32>(value);
  me().slot[1] = static_cast<u64>(inside ? from : lane);
  me().slot[2] = reinterpret_cast<std::uintptr_t>(&found);
  machine().meet(machine().block().warps[warp], 32, "shfl", [own = me().block, warp] {
    for (int l = 0; l < 32; ++l) {
      emulator::Fiber& fiber = machine().fiber(own, warp * 32 + l);
      *reinterpret_cast<int*>(fiber.slot[2]) = static_cast<int>(machine().fiber(own, warp * 32 + static_cast<int>(fiber.slot[1])).slot[0]);
    }
  });
  return found;
}
template <int WIDTH>
int add_from_below(int value, int by) {
  bool there;
  const int below = shuffled<WIDTH>(value, me().thread % 32 - by, there);
  return there ? value + below : value;
}
template <int WIDTH>
int shuffle(int value, int from) {
  bool there;
  return shuffled<WIDTH>(value, me().thread % 32 / WIDTH * WIDTH + from % WIDTH, there);
}

// --- products

// mma.m16n8k16, 16-bit floats. Thread 4 g + t:
//   A, a0..a7: row g for a0 a1 a4 a5, else g + 8; columns 2 t, 2 t + 1 for a0..a3, 8 further on for a4..a7.
//   B, b0..b3: column g; rows 2 t, 2 t + 1, then 8 further on.   C: rows g (c0 c1), g + 8; columns 2 t, 2 t + 1.
template <class Type>
void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  const u32 b[2] = {b0, b1};
  const int own = me().block, warp = me().thread / 32;
  me().slot[0] = reinterpret_cast<std::uintptr_t>(&d[0]);
  me().slot[1] = reinterpret_cast<std::uintptr_t>(&a[0]);
  me().slot[2] = reinterpret_cast<std::uintptr_t>(&b[0]);
  machine().meet(machine().block().warps[warp], 32, "mma", [own, warp] {
    float left[16][16], right[16][8];
    for (int l = 0; l < 32; ++l) {
      const int g = l / 4, t = l % 4;
      const emulator::Fiber& lane = machine().fiber(own, warp * 32 + l);
      for (int i = 0; i < 8; ++i) {
        left[i / 2 % 2 == 0 ? g : g + 8][2 * t + i % 2 + (i < 4 ? 0 : 8)] = widen<Type>(reinterpret_cast<const u16*>(lane.slot[1])[i]);
      }
      for (int i = 0; i < 4; ++i) right[2 * t + i % 2 + (i < 2 ? 0 : 8)][g] = widen<Type>(reinterpret_cast<const u16*>(lane.slot[2])[i]);
    }
    for (int l = 0; l < 32; ++l) {
      auto* sums = reinterpret_cast<float*>(machine().fiber(own, warp * 32 + l).slot[0]);
      for (int c = 0; c < 4; ++c) {
        const int row = l / 4 + (c < 2 ? 0 : 8), column = 2 * (l % 4) + c % 2;
        double sum = sums[c];
        for (int k = 0; k < 16; ++k) sum += static_cast<double>(left[row][k]) * right[k][column];
        sums[c] = static_cast<float>(sum);
      }
    }
  });
}

// Positions of the two kept elements of each four, from one nibble of metadata.
inline void kept_pair(u32 nibble, int& first, int& second) {
  first = nibble & 3, second = nibble >> 2 & 3;
  if (first >= second) fail("metadata that is no rising pair of positions");
}

// mma.sp.m16n8k32, 16-bit floats. Thread 4 g + t:
//   A, kept elements a0..a7: row g for a0 a1 a4 a5, else g + 8; they come from the four columns from 4 t (a0..a3) or 16 + 4 t.
//   B, b0..b7: column g; rows 2 t, 2 t + 1, then 8, 16 and 24 further on.   C: rows g (c0 c1), g + 8; columns 2 t, 2 t + 1.
//   metadata: threads 4 g + 2 selector and the next hold columns 0-15 and 16-31: bits 0-15 for row g, 16-31 for row g + 8.
template <class Type, int SELECTOR>
void mma_sp(float (&d)[4], const u32 (&a)[4], const u32 (&b)[4], u32 index) {
  static_assert(SELECTOR == 0 || SELECTOR == 1, "two of four threads hold the metadata");
  emulator::Block& block = machine().block();
  const int own = me().block, warp = me().thread / 32;
  me().slot[0] = reinterpret_cast<std::uintptr_t>(&d[0]);
  me().slot[1] = reinterpret_cast<std::uintptr_t>(&a[0]);
  me().slot[2] = reinterpret_cast<std::uintptr_t>(&b[0]);
  me().slot[3] = index;
  machine().meet(block.warps[warp], 32, "mma.sp", [own, warp] {
    float dense[16][32] = {}, right[32][8];
    const auto lane = [&](int l) -> emulator::Fiber& { return machine().fiber(own, warp * 32 + l); };
    for (int l = 0; l < 32; ++l) {
      const int g = l / 4, t = l % 4;
      const auto* kept = reinterpret_cast<const u16*>(lane(l).slot[1]);
      for (int pair = 0; pair < 4; ++pair) {  // a0 a1, a2 a3, ...
        const int row = pair % 2 ? g + 8 : g, first_column = 4 * t + (pair < 2 ? 0 : 16);
        const u32 word = static_cast<u32>(lane(4 * g + 2 * SELECTOR + first_column / 16).slot[3]);
        int p0, p1;
        kept_pair(word >> (row >= 8 ? 16 : 0) >> (first_column % 16 / 4 * 4), p0, p1);
        dense[row][first_column + p0] = widen<Type>(kept[2 * pair]);
        dense[row][first_column + p1] = widen<Type>(kept[2 * pair + 1]);
      }
      const auto* element = reinterpret_cast<const u16*>(lane(l).slot[2]);
      for (int i = 0; i < 8; ++i) right[2 * t + i % 2 + 8 * (i / 2)][g] = widen<Type>(element[i]);
    }
    for (int l = 0; l < 32; ++l) {
      auto* sums = reinterpret_cast<float*>(lane(l).slot[0]);
      for (int c = 0; c < 4; ++c) {
        const int row = l / 4 + (c < 2 ? 0 : 8), column = 2 * (l % 4) + c % 2;
        double sum = sums[c];
        for (int k = 0; k < 32; ++k) sum += static_cast<double>(dense[row][k]) * right[k][column];
        sums[c] = static_cast<float>(sum);
      }
    }
  });
}

// --- mbarriers

inline void mbarrier_init(u32 barrier, int count) {
  machine().shared(machine().block(), barrier, 8);
  if (!machine().block().mbarriers.emplace(barrier, emulator::Mbarrier{count, count, 0, 0}).second) fail("an mbarrier is initialised twice");
}
inline void mbarrier_init_fence() {}
inline void mbarrier_arrive(u32 barrier) {
  emulator::Mbarrier& at = machine().mbarrier(machine().block(), barrier);
  --at.pending;
  machine().advance(at);
}
inline void mbarrier_arrive_expect(u32 barrier, u32 bytes) {
  emulator::Mbarrier& at = machine().mbarrier(machine().block(), barrier);
  at.bytes += bytes;
  --at.pending;
  machine().advance(at);
}
inline void mbarrier_wait(u32 barrier, u32 parity) {
  emulator::Mbarrier& at = machine().mbarrier(machine().block(), barrier);
  machine().wait("an mbarrier", [&at, parity] { return at.phase % 2 != parity; });
}

inline void mbarrier_arrive_at(u32 barrier, int rank) {
  emulator::Mbarrier& at = machine().mbarrier(machine().block(rank), barrier);
  --at.pending;
  machine().advance(at);
}

inline void bulk_copy(u32 to, const void* from, u32 bytes, u32 barrier) { machine().start({me().block, to, from, bytes, barrier}); }
inline void bulk_copy_to_all(u32 to, const void* from, u32 bytes, u32 barrier, u16 blocks) {
  for (int rank = 0; rank < 16; ++rank) {
    if (blocks >> rank & 1) machine().start({rank, to, from, bytes, barrier});
  }
}

inline void async_proxy_fence() {
  for (const u32 chunk : me().unfenced) {
    Chunk& state = machine().block().chunks[chunk];
    if (state == Chunk::unfenced) state = Chunk::settled;
  }
  me().unfenced.clear();
}

// --- warp-group products

// A 16-byte piece of a K-major operand by its descriptor: row r, piece c. Canonical layouts ((8,m),(T,2k)):((w T,SBO),(1,T))
// for w = 8, 4, 2 pieces a row, under Swizzle<3,4,3>, <2,4,3>, <1,4,3> of the address.
inline void read_operand(emulator::Block& block, u64 descriptor, int r, int c, void* to) {
  const u32 start = static_cast<u32>(descriptor & 0x3FFF) << 4, stride = static_cast<u32>(descriptor >> 32 & 0x3FFF) << 4;
  const int mode = static_cast<int>(descriptor >> 62);
  if (mode == 0) fail("the model has no unswizzled operands");
  if (descriptor >> 49 & 7) fail("the model has no base offset");
  const u32 width = 256u >> mode;  // 1: 128, 2: 64, 3: 32 bytes
  const u32 address = start + r % 8 * width + r / 8 * stride + c * 16;
  machine().read(block, address ^ ((address >> 7 & (width / 16 - 1)) << 4), 16, to, true);
}

inline void wgmma_fence() { machine().meet(machine().block().groups[me().thread / 128], 128, "wgmma.fence"); }

template <int N>
void settled(float (&)[N]) {}

// wgmma.mma_async.sp.m64nNk32. Warp w has rows 16 w ..; metadata and D within a warp as for mma.sp, D element i of thread
// 4 g + t: row g + 8 (i / 2 % 2), column 8 (i / 4) + 2 t + i % 2. Metadata is read when the product is issued.
template <class Type, int TOKENS, int SELECTOR>
void wgmma_sp(float (&d)[TOKENS / 2], u64 weight, u64 tokens, u32 index) {
  emulator::Block& block = machine().block();
  const int own = me().block, group = me().thread / 128;
  me().slot[0] = reinterpret_cast<std::uintptr_t>(&d[0]);
  me().slot[1] = weight;
  me().slot[2] = tokens;
  me().slot[3] = index;
  machine().meet(block.groups[group], 128, "wgmma", [&block, own, group] {
    std::vector<float*> sums(128);
    std::vector<u32> words(128);
    u64 descriptors[2] = {0, 0};
    for (int l = 0; l < 128; ++l) {
      const emulator::Fiber& fiber = machine().fiber(own, group * 128 + l);
      sums[l] = reinterpret_cast<float*>(fiber.slot[0]);
      words[l] = static_cast<u32>(fiber.slot[3]);
      if (l > 0 && (fiber.slot[1] != descriptors[0] || fiber.slot[2] != descriptors[1])) fail("descriptors differ within a warp group");
      descriptors[0] = fiber.slot[1], descriptors[1] = fiber.slot[2];
    }
    const u64 a = descriptors[0], b = descriptors[1];
    block.products[group].back().push_back({[&block, sums, words, a, b] {
      std::vector<float> dense(64 * 32, 0.0f), right(TOKENS * 32);
      for (int row = 0; row < 64; ++row) {
        u16 kept[16];
        for (int c = 0; c < 2; ++c) read_operand(block, a, row, c, kept + 8 * c);
        for (int four = 0; four < 8; ++four) {
          const int lane = 32 * (row / 16) + row % 8 * 4 + 2 * SELECTOR + four / 4;
          int p0, p1;
          kept_pair(words[lane] >> (row % 16 >= 8 ? 16 : 0) >> (four % 4 * 4), p0, p1);
          dense[row * 32 + 4 * four + p0] = widen<Type>(kept[2 * four]);
          dense[row * 32 + 4 * four + p1] = widen<Type>(kept[2 * four + 1]);
        }
      }
      for (int token = 0; token < TOKENS; ++token) {
        u16 element[32];
        for (int c = 0; c < 4; ++c) read_operand(block, b, token, c, element + 8 * c);
        for (int k = 0; k < 32; ++k) right[token * 32 + k] = widen<Type>(element[k]);
      }
      for (int l = 0; l < 128; ++l) {
        for (int i = 0; i < TOKENS / 2; ++i) {
          const int row = 16 * (l / 32) + l % 32 / 4 + 8 * (i / 2 % 2), token = 8 * (i / 4) + 2 * (l % 4) + i % 2;
          double sum = sums[l][i];
          for (int k = 0; k < 32; ++k) sum += static_cast<double>(dense[row * 32 + k]) * right[token * 32 + k];
          sums[l][i] = static_cast<float>(sum);
        }
      }
    }});
  });
}

inline void wgmma_commit() {
  emulator::Block& block = machine().block();
  const int group = me().thread / 128;
  machine().meet(block.groups[group], 128, "wgmma.commit_group", [&block, group] { block.products[group].emplace_back(); });
}
template <int PENDING>
void wgmma_wait() {
  emulator::Block& block = machine().block();
  const int group = me().thread / 128;
  machine().meet(block.groups[group], 128, "wgmma.wait_group", [&block, group] {
    auto& sets = block.products[group];
    while (static_cast<int>(sets.size()) - 1 > PENDING) {
      for (const emulator::Product& product : sets.front()) product.run();
      sets.erase(sets.begin());
    }
  });
}

// --- clusters

inline void cluster_sync() { machine().meet(machine().everybody, machine().blocks() * machine().threads, "the cluster's barrier"); }
inline float4 load_cluster4(u32 address, int rank) {
  float4 four;
  machine().read(machine().block(rank), address, 16, &four, false);
  return four;
}

}  // namespace perp
