#include "cpu/pack.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cstring>

#include "cpu/decode_avx2.h"
#include "cpu/expand.h"
#include "cpu/parallel.h"
#include "cpu/platform.h"
#include "cpu/scratch.h"

namespace perp {
namespace {

// Rows per thread below which a second thread costs more than it saves: about 64 KB of weight.
std::int64_t row_grain(std::int64_t columns, int element_size) {
  return (64 * 1024) / std::max<std::int64_t>(columns * element_size, 1) + 1;
}

// The first row for which bad(r) holds, else kNoRow.
template <class Bad>
std::int64_t find_row(std::int64_t rows, std::int64_t grain, const Bad& bad) {
  std::atomic<std::int64_t> first{rows};
  parallel_ranges(rows, grain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t r = begin; r < end; ++r) {
      if (!bad(r)) continue;
      std::int64_t seen = first.load();
      while (r < seen && !first.compare_exchange_weak(seen, r)) {
      }
      return;
    }
  });
  return first.load() == rows ? kNoRow : first.load();
}

std::int64_t count_row(const std::uint8_t* bits, std::int64_t bytes) {
  std::int64_t count = 0, i = 0;
  for (; i + 8 <= bytes; i += 8) {
    std::uint64_t word;
    std::memcpy(&word, bits + i, 8);
    count += std::popcount(word);
  }
  for (; i < bytes; ++i) count += std::popcount(bits[i]);
  return count;
}

bool padding_set(const Bits& bits, std::int64_t r) {
  const std::int64_t used = bits.columns % 8;
  return used != 0 && (bits.row(r)[bits.bytes_per_row() - 1] >> used) != 0;
}

// ---- portable: one byte of mask at a time ----

template <class T>
void pack_row(const T* weight, const std::uint8_t* bits, std::int64_t columns, T* values) {
  for (std::int64_t i = 0; 8 * i < columns; ++i) {
    for (unsigned rest = bits[i]; rest != 0; rest &= rest - 1) *values++ = weight[8 * i + std::countr_zero(rest)];
  }
}

template <class T>
void mask_row(const T* weight, const std::uint8_t* bits, std::int64_t columns, T* out) {
  for (std::int64_t j = 0; j < columns; ++j) out[j] = (bits[j / 8] >> (j % 8)) & 1 ? weight[j] : T{0};
}

// ---- AVX-512: one vector of columns at a time, its mask loaded straight into a mask register ----
#if PERP_X86

// Compress goes to a register and then through a masked store: the form with a memory destination is microcoded on
// Zen 4 (over 100 cycles each). Expand and loads take memory directly, and suppress faults in lanes they do not read,
// so row ends need no scalar tail.
template <class T>
struct Lanes;

template <>
struct Lanes<std::uint16_t> {
  using Mask = __mmask32;
  PERP_AVX512 static __m512i load(Mask m, const void* p) { return _mm512_maskz_loadu_epi16(m, p); }
  PERP_AVX512 static void store(void* p, Mask m, __m512i v) { _mm512_mask_storeu_epi16(p, m, v); }
  PERP_AVX512 static __m512i compress(Mask m, __m512i v) { return _mm512_maskz_compress_epi16(m, v); }
  PERP_AVX512 static __m512i expand(Mask m, const void* p) { return _mm512_maskz_expandloadu_epi16(m, p); }
};

template <>
struct Lanes<std::uint32_t> {
  using Mask = __mmask16;
  PERP_AVX512 static __m512i load(Mask m, const void* p) { return _mm512_maskz_loadu_epi32(m, p); }
  PERP_AVX512 static void store(void* p, Mask m, __m512i v) { _mm512_mask_storeu_epi32(p, m, v); }
  PERP_AVX512 static __m512i compress(Mask m, __m512i v) { return _mm512_maskz_compress_epi32(m, v); }
  PERP_AVX512 static __m512i expand(Mask m, const void* p) { return _mm512_maskz_expandloadu_epi32(m, p); }
};

template <>
struct Lanes<std::uint64_t> {
  using Mask = __mmask8;
  PERP_AVX512 static __m512i load(Mask m, const void* p) { return _mm512_maskz_loadu_epi64(m, p); }
  PERP_AVX512 static void store(void* p, Mask m, __m512i v) { _mm512_mask_storeu_epi64(p, m, v); }
  PERP_AVX512 static __m512i compress(Mask m, __m512i v) { return _mm512_maskz_compress_epi64(m, v); }
  PERP_AVX512 static __m512i expand(Mask m, const void* p) { return _mm512_maskz_expandloadu_epi64(m, p); }
};

// The mask of the vector that starts at column j; `bytes` is the row's length, past which bits read as 0.
template <class Mask>
Mask mask_at(const std::uint8_t* bits, std::int64_t bytes, std::int64_t j) {
  Mask mask = 0;
  const std::int64_t left = bytes - j / 8;
  if (left >= static_cast<std::int64_t>(sizeof mask)) {
    std::memcpy(&mask, bits + j / 8, sizeof mask);
  } else {
    std::memcpy(&mask, bits + j / 8, left);
  }
  return mask;
}

template <class Mask>
Mask first_lanes(std::int64_t count) {
  return count >= static_cast<std::int64_t>(8 * sizeof(Mask)) ? static_cast<Mask>(~Mask{0})
                                                              : static_cast<Mask>((Mask{1} << count) - 1);
}

template <class T>
PERP_AVX512 void pack_row_avx512(const T* weight, const std::uint8_t* bits, std::int64_t columns, T* values) {
  using Mask = typename Lanes<T>::Mask;
  constexpr std::int64_t step = 8 * sizeof(Mask);
  const std::int64_t bytes = (columns + 7) / 8;
  for (std::int64_t j = 0; j < columns; j += step) {
    const Mask mask = mask_at<Mask>(bits, bytes, j);
    const int kept = std::popcount(mask);
    Lanes<T>::store(values, first_lanes<Mask>(kept), Lanes<T>::compress(mask, Lanes<T>::load(mask, weight + j)));
    values += kept;
  }
}

template <class T>
PERP_AVX512 void unpack_row_avx512(const T* values, const std::uint8_t* bits, std::int64_t columns, T* out) {
  using Mask = typename Lanes<T>::Mask;
  constexpr std::int64_t step = 8 * sizeof(Mask);
  const std::int64_t bytes = (columns + 7) / 8;
  for (std::int64_t j = 0; j < columns; j += step) {
    const Mask mask = mask_at<Mask>(bits, bytes, j);
    Lanes<T>::store(out + j, first_lanes<Mask>(columns - j), Lanes<T>::expand(mask, values));
    values += std::popcount(mask);
  }
}

template <class T>
PERP_AVX512 void mask_row_avx512(const T* weight, const std::uint8_t* bits, std::int64_t columns, T* out) {
  using Mask = typename Lanes<T>::Mask;
  constexpr std::int64_t step = 8 * sizeof(Mask);
  const std::int64_t bytes = (columns + 7) / 8;
  for (std::int64_t j = 0; j < columns; j += step) {
    const Mask mask = mask_at<Mask>(bits, bytes, j);
    Lanes<T>::store(out + j, first_lanes<Mask>(columns - j), Lanes<T>::load(mask, weight + j));
  }
}

#endif

template <class RowKernel>
void for_rows(std::int64_t rows, std::int64_t columns, int element_size, const RowKernel& kernel) {
  parallel_ranges(rows, row_grain(columns, element_size), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t r = begin; r < end; ++r) kernel(r);
  });
}

// The row kernel of that name which this CPU takes.

#if PERP_X86
#define PERP_PICK(name, T) (use_avx512() ? name##_avx512<T> : name<T>)
#else
#define PERP_PICK(name, T) (name<T>)
#endif

template <class T>
void pack_bitmap_as(const T* weight, std::int64_t row_stride, const Bits& bits, const RowStarts& starts, T* values) {
  const auto kernel = PERP_PICK(pack_row, T);
  for_rows(bits.rows, bits.columns, sizeof(T), [&](std::int64_t r) {
    kernel(weight + r * row_stride, bits.row(r), bits.columns, values + starts.begin(r));
  });
}

template <class T>
void unpack_bitmap_as(const T* values, const Bits& bits, const RowStarts& starts, T* out, std::int64_t row_stride) {
  const auto unpack = [&](const auto& kernel) {
    for_rows(bits.rows, bits.columns, sizeof(T), [&](std::int64_t r) {
      kernel(values + starts.begin(r), r, out + r * row_stride);
    });
  };
#if PERP_X86
  if (use_avx512()) {
    return unpack([&](const T* row, std::int64_t r, T* to) { unpack_row_avx512(row, bits.row(r), bits.columns, to); });
  }
  if constexpr (sizeof(T) <= 4) {
    if (use_avx2()) {
      return unpack([&](const T* row, std::int64_t r, T* to) {
        thread_local Scratch scratch;
        const T *row_end = values + starts.begin(r + 1), *end = values + starts.begin(bits.rows);
        const T* from = readable(row, row_end, end, scratch.get<T>(bits.columns + kReadAhead));
        expand_avx2(from, bits.row(r), bits.columns, to);
      });
    }
  }
#endif
  unpack([&](const T* row, std::int64_t r, T* to) { expand(row, bits.row(r), bits.columns, to); });
}

template <class T>
void pack_dense_as(const T* weight, std::int64_t row_stride, const Bits& bits, T* out) {
  const auto kernel = PERP_PICK(mask_row, T);
  for_rows(bits.rows, bits.columns, sizeof(T), [&](std::int64_t r) {
    kernel(weight + r * row_stride, bits.row(r), bits.columns, out + r * bits.columns);
  });
}

#undef PERP_PICK

// Calls f with a value of the unsigned type that has `element_size` bytes.
template <class F>
void with_element(int element_size, const F& f) {
  if (element_size == 2) return f(std::uint16_t{});
  if (element_size == 4) return f(std::uint32_t{});
  f(std::uint64_t{});
}

// ---- semi24 positions, two groups (one byte) at a time through a table ----

constexpr std::uint8_t kInvalid = 0xff;  // pos0 = pos1 = 3 in both groups: no pair gives it, nor is it two masks of two

constexpr std::array<std::uint8_t, 16> kNibbleOfMask = [] {
  std::array<std::uint8_t, 16> table{};
  for (unsigned mask = 0; mask < 16; ++mask) {
    const unsigned low = std::countr_zero(mask | 16u), high = std::countr_zero((mask & (mask - 1)) | 16u);
    table[mask] = std::popcount(mask) == 2 ? static_cast<std::uint8_t>(low | high << 2) : kInvalid;
  }
  return table;
}();

constexpr std::array<std::uint8_t, 16> kMaskOfNibble = [] {
  std::array<std::uint8_t, 16> table{};
  for (unsigned nibble = 0; nibble < 16; ++nibble) {
    const unsigned low = nibble & 3, high = nibble >> 2;
    table[nibble] = low < high ? static_cast<std::uint8_t>(1u << low | 1u << high) : kInvalid;
  }
  return table;
}();

constexpr std::array<std::uint8_t, 256> both_nibbles(const std::array<std::uint8_t, 16>& nibbles) {
  std::array<std::uint8_t, 256> table{};
  for (unsigned byte = 0; byte < 256; ++byte) {
    const unsigned low = nibbles[byte & 15], high = nibbles[byte >> 4];
    table[byte] = low == kInvalid || high == kInvalid ? kInvalid : static_cast<std::uint8_t>(low | high << 4);
  }
  return table;
}

constexpr auto kPositionsOfBits = both_nibbles(kNibbleOfMask);
constexpr auto kBitsOfPositions = both_nibbles(kMaskOfNibble);

// Translates every byte; where K is 4 mod 8 the last byte holds one group and four padding zeros, which stay.
std::int64_t translate(const Bits& in, std::uint8_t* out, const std::array<std::uint8_t, 256>& bytes,
                       const std::array<std::uint8_t, 16>& nibbles) {
  const std::int64_t width = in.bytes_per_row(), whole = in.columns / 8;
  return find_row(in.rows, row_grain(in.columns, 1), [&](std::int64_t r) {
    const std::uint8_t* from = in.row(r);
    std::uint8_t* to = out + r * width;
    bool bad = false;
    for (std::int64_t i = 0; i < whole; ++i) {
      to[i] = bytes[from[i]];
      bad |= to[i] == kInvalid;
    }
    if (whole < width) {
      to[whole] = nibbles[from[whole] & 15];
      bad |= to[whole] == kInvalid || from[whole] > 15;
    }
    return bad;
  });
}

}  // namespace

std::int64_t first_padded_row(const Bits& bits) {
  if (bits.columns % 8 == 0) return kNoRow;
  // A byte of each row, from a cache line of its own where rows are long.
  return find_row(bits.rows, row_grain(64, 1), [&](std::int64_t r) { return padding_set(bits, r); });
}

void count_bits(const Bits& bits, std::int64_t* counts) {
  for_rows(bits.rows, bits.columns, 1, [&](std::int64_t r) { counts[r] = count_row(bits.row(r), bits.bytes_per_row()); });
}

std::int64_t first_bad_row(const Bits& bits, const RowStarts& starts) {
  return find_row(bits.rows, row_grain(bits.columns, 1), [&](std::int64_t r) {
    // Unsigned, because a corrupt row_ptr may hold anything and a signed difference could overflow.
    const auto held = static_cast<std::uint64_t>(starts.begin(r + 1)) - static_cast<std::uint64_t>(starts.begin(r));
    return static_cast<std::uint64_t>(count_row(bits.row(r), bits.bytes_per_row())) != held || padding_set(bits, r);
  });
}

void pack_bitmap(const void* weight, std::int64_t row_stride, int element_size, const Bits& bits,
                 const RowStarts& starts, void* values) {
  with_element(element_size, [&]<class T>(T) {
    pack_bitmap_as(static_cast<const T*>(weight), row_stride, bits, starts, static_cast<T*>(values));
  });
}

void unpack_bitmap(const void* values, int element_size, const Bits& bits, const RowStarts& starts, void* out,
                   std::int64_t row_stride) {
  with_element(element_size, [&]<class T>(T) {
    unpack_bitmap_as(static_cast<const T*>(values), bits, starts, static_cast<T*>(out), row_stride);
  });
}

void pack_dense(const void* weight, std::int64_t row_stride, int element_size, const Bits& bits, void* out) {
  with_element(element_size, [&]<class T>(T) {
    pack_dense_as(static_cast<const T*>(weight), row_stride, bits, static_cast<T*>(out));
  });
}

std::int64_t bits_to_positions(const Bits& bits, std::uint8_t* positions) {
  return translate(bits, positions, kPositionsOfBits, kNibbleOfMask);
}

std::int64_t positions_to_bits(const Bits& positions, std::uint8_t* bits) {
  return translate(positions, bits, kBitsOfPositions, kMaskOfNibble);
}

std::int64_t first_bad_positions(const Bits& positions) {
  const std::int64_t width = positions.bytes_per_row(), whole = positions.columns / 8;
  return find_row(positions.rows, row_grain(positions.columns, 1), [&](std::int64_t r) {
    const std::uint8_t* row = positions.row(r);
    bool bad = whole < width && (row[whole] > 15 || kMaskOfNibble[row[whole]] == kInvalid);
    for (std::int64_t i = 0; i < whole; ++i) bad |= kBitsOfPositions[row[i]] == kInvalid;
    return bad;
  });
}

}  // namespace perp
