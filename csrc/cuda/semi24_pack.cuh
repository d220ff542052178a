// Writing tiled24 weights, at the speed of a copy: from a dense weight and its mask, from a dense weight under the mask
// that is there already, and from a tiled weight with an adapter added at its kept places.
//
// A block of 128 threads has one tile, a thread one word of its index: inputs 16 t .. 16 t + 15 of rows g and g + 8 of a
// strip. That makes every access of a warp whole sectors: 128 bytes of each of 16 dense rows, one swizzled chunk of 16
// bytes of each of the values' rows, 128 bytes of the index.
#pragma once

#include "fragments.h"
#include "ptx.cuh"

namespace perp {

// The two elements of the four in low, high at the positions that a nibble p0 | p1 << 2 holds, p0 in the low half.
PERP_BOTH u32 select_pair(u32 low, u32 high, u32 nibble) {
  const u64 four = static_cast<u64>(high) << 32 | low;
  const u32 first = static_cast<u32>(four >> (nibble % 4 * 16)) & 0xFFFF;
  const u32 second = static_cast<u32>(four >> (nibble / 4 % 4 * 16)) & 0xFFFF;
  return first | second << 16;
}

// Half a word of the nibble of positions 0 and 1: what rows past the last hold, with values of 0.
constexpr u32 kPadding = 0x4444;

// The nibble of four mask bits of which two are set.
PERP_BOTH u32 positions(u32 four) {
  const u32 p0 = four & 1 ? 0 : four & 2 ? 1 : 2, p1 = four & 8 ? 3 : four & 4 ? 2 : 1;
  return p0 | p1 << 2;
}

struct Tiled {
  unsigned char* values;
  unsigned char* index;
  int outputs, inputs;
};

// A thread's place: its tile, its two rows, its word.
struct Share {
  i64 tile;
  int row_tile, first_input, row, t, word;

  PERP_DEVICE static Share of(const Tiled& w) {
    const int input_tiles = w.inputs / kTileInputs, block = block_index(), word = thread_index();
    const int t = word % 4, row = word / 32 * 16 + word % 32 / 4;
    return {block, block / input_tiles, block % input_tiles * kTileInputs + 16 * t, row, t, word};
  }
  PERP_DEVICE int row_of(int half) const { return row + 8 * half; }
  PERP_DEVICE int output(int half) const { return row_tile * kTileRows + row_of(half); }
  PERP_DEVICE uint4* values(const Tiled& w, int half) const {
    return reinterpret_cast<uint4*>(w.values + tile * kTileValueBytes + value_chunk(row_of(half), t));
  }
  PERP_DEVICE u32* index(const Tiled& w) const { return reinterpret_cast<u32*>(w.index + tile * kTileIndexBytes) + word; }
};

// Eight values of sixteen dense ones at the positions of a half word.
PERP_DEVICE uint4 compressed(const u16* dense, u32 half_word) {
  const uint4 a = reinterpret_cast<const uint4*>(dense)[0], b = reinterpret_cast<const uint4*>(dense)[1];
  return {select_pair(a.x, a.y, half_word), select_pair(a.z, a.w, half_word >> 4), select_pair(b.x, b.y, half_word >> 8),
          select_pair(b.z, b.w, half_word >> 12)};
}

// values and index of dense [outputs, inputs] under mask bits [outputs, inputs / 8], two of each four set. Rows of `dense`
// are 16-byte aligned, row_stride elements apart.
PERP_DEVICE void compress(const Tiled& w, const u16* dense, i64 row_stride, const unsigned char* bits) {
  const Share share = Share::of(w);
  u32 halves[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int output = share.output(half);
    halves[half] = kPadding;
    uint4 chunk{0, 0, 0, 0};
    if (output < w.outputs) {
      const u32 mask = *reinterpret_cast<const u16*>(bits + (static_cast<i64>(output) * w.inputs + share.first_input) / 8);
      halves[half] = positions(mask) | positions(mask >> 4) << 4 | positions(mask >> 8) << 8 | positions(mask >> 12) << 12;
      chunk = compressed(dense + output * row_stride + share.first_input, halves[half]);
    }
    *share.values(w, half) = chunk;
  }
  *share.index(w) = halves[0] | halves[1] << 16;
}

// values of dense [outputs, inputs] under the index that w has.
PERP_DEVICE void repack(const Tiled& w, const u16* dense, i64 row_stride) {
  const Share share = Share::of(w);
  const u32 word = *share.index(w);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int output = share.output(half);
    uint4 chunk{0, 0, 0, 0};
    if (output < w.outputs) chunk = compressed(dense + output * row_stride + share.first_input, word >> 16 * half);
    *share.values(w, half) = chunk;
  }
}

// One of four float products at the position in `nibble` % 4; comparisons, since an index would put them in memory.
PERP_DEVICE float at_position(const float* four, u32 position) {
  const float low = position & 1 ? four[1] : four[0], high = position & 1 ? four[3] : four[2];
  return position & 2 ? high : low;
}

// Two values (a word of them) plus scale times the products at their positions, each rounded once.
template <class Type>
PERP_DEVICE u32 adapted_pair(u32 values, const float* four, u32 nibble, float scale) {
  const float first = widen<Type>(static_cast<u16>(values)), second = widen<Type>(static_cast<u16>(values >> 16));
  return round_pair<Type>(first + scale * at_position(four, nibble), second + scale * at_position(four, nibble >> 2));
}

// The values of W + scale M (B A) into `to`, which may be w.values: A float [rank, inputs], B float [outputs, rank].
// The product of a thread's 32 places is formed in full: twice the arithmetic, but every read of A serves 8 lanes at once.
template <class Type>
PERP_DEVICE void add_lowrank(const Tiled& w, const float* A, const float* B, int rank, float scale, unsigned char* to) {
  const Share share = Share::of(w);
  const int last = w.outputs - 1;
  const float* b[2];
  float products[2][16] = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) b[half] = B + static_cast<i64>(share.output(half) < last ? share.output(half) : last) * rank;
  for (int r = 0; r < rank; ++r) {
    const float4* a = reinterpret_cast<const float4*>(A + static_cast<i64>(r) * w.inputs + share.first_input);
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const float4 v = a[q];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float* p = products[half] + 4 * q;
        const float scalar = b[half][r];
        p[0] += scalar * v.x, p[1] += scalar * v.y, p[2] += scalar * v.z, p[3] += scalar * v.w;
      }
    }
  }
  const u32 word = *share.index(w);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint4 chunk = *share.values(w, half);
    if (share.output(half) <= last) {
      const u32 nibbles = word >> 16 * half;
      chunk.x = adapted_pair<Type>(chunk.x, products[half], nibbles, scale);
      chunk.y = adapted_pair<Type>(chunk.y, products[half] + 4, nibbles >> 4, scale);
      chunk.z = adapted_pair<Type>(chunk.z, products[half] + 8, nibbles >> 8, scale);
      chunk.w = adapted_pair<Type>(chunk.w, products[half] + 12, nibbles >> 12, scale);
    }
    *reinterpret_cast<uint4*>(to + share.tile * kTileValueBytes + value_chunk(share.row_of(half), share.t)) = chunk;
  }
}

}  // namespace perp
