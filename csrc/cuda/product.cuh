// y = x W^T + bias as the kernels see it, and what they do with the sums.
//
// The sparse operand has to be the first, so a block computes y^T: sums [outputs, tokens], in which neighbours in a
// register are neighbouring tokens, while neighbours in y are outputs. The sums go through shared memory once, which
// turns them, and leave in rows of 16-byte reads and 8-byte writes.
#pragma once

#include "fragments.h"
#include "ptx.cuh"

namespace perp {

struct Product {
  const unsigned char* values;
  const unsigned char* index;
  const u16* x;    // [tokens, inputs], 16-byte aligned rows x_stride elements apart
  i64 x_stride;
  u16* y;          // [tokens, outputs], contiguous
  const void* bias;
  int bias_kind;   // 0 none, 1 of the type of y, 2 float
  int tokens, outputs, inputs;

  PERP_DEVICE int input_tiles() const { return inputs / kTileInputs; }
  PERP_DEVICE int row_tiles() const { return divide_up(outputs, kTileRows); }
};

template <class Type>
PERP_DEVICE float bias_of(const Product& p, int output) {
  if (p.bias_kind == 1) return widen<Type>(static_cast<const u16*>(p.bias)[output]);
  return p.bias_kind == 2 ? static_cast<const float*>(p.bias)[output] : 0.0f;
}

// Adds the bias to the sums of outputs output .. output + 3 of a token, and writes those that exist.
template <class Type>
PERP_DEVICE void store_outputs(const Product& p, int token, int output, float4 sum) {
  if (token >= p.tokens || output >= p.outputs) return;
  u16* y = p.y + static_cast<i64>(token) * p.outputs + output;
  const bool whole = p.outputs % 4 == 0;  // then so is `output`, and y is aligned to 8 bytes
  const int last = whole ? 3 : (p.outputs - output < 4 ? p.outputs - output : 4) - 1;
  sum.x += bias_of<Type>(p, output);
  if (last > 0) sum.y += bias_of<Type>(p, output + 1);
  if (last > 1) sum.z += bias_of<Type>(p, output + 2);
  if (last > 2) sum.w += bias_of<Type>(p, output + 3);
  const u32 low = round_pair<Type>(sum.x, sum.y), high = round_pair<Type>(sum.z, sum.w);
  if (whole) {
    *reinterpret_cast<uint2*>(y) = uint2{low, high};
    return;
  }
  y[0] = static_cast<u16>(low);
  if (last > 0) y[1] = static_cast<u16>(low >> 16);
  if (last > 1) y[2] = static_cast<u16>(high);
  if (last > 2) y[3] = static_cast<u16>(high >> 16);
}

// The same as float sums of a part of the inputs [parts, tokens, outputs], without the bias.
PERP_DEVICE void store_part(const Product& p, float* part_sums, int part, int token, int output, float4 sum) {
  if (token >= p.tokens) return;
  float* to = part_sums + (static_cast<i64>(part) * p.tokens + token) * p.outputs + output;
  if (output < p.outputs) to[0] = sum.x;
  if (output + 1 < p.outputs) to[1] = sum.y;
  if (output + 2 < p.outputs) to[2] = sum.z;
  if (output + 3 < p.outputs) to[3] = sum.w;
}

// y = the parts' sums in their order, and the bias: a thread for each element.
template <class Type>
PERP_DEVICE void sum_parts(const Product& p, const float* part_sums, int parts) {
  const i64 count = static_cast<i64>(p.tokens) * p.outputs;
  const i64 i = static_cast<i64>(block_index()) * block_threads() + thread_index();
  if (i >= count) return;
  float sum = part_sums[i];
  for (int part = 1; part < parts; ++part) sum += part_sums[part * count + i];
  p.y[i] = static_cast<u16>(round_pair<Type>(sum + bias_of<Type>(p, static_cast<int>(i % p.outputs)), 0.0f));
}

// Where sums wait to be turned: float [tokens, rows], each token 4 floats longer than its rows. A warp writes 8 rows of
// 4 tokens that lie 2 apart: 2 (rows + 4) = 8 modulo 32 banks puts them in 32 different ones.
template <int ROWS>
struct Staging {
  static_assert(ROWS % 16 == 0, "the padding counts on it");
  static constexpr int kPitch = 4 * (ROWS + 4);  // bytes a token
  static constexpr int kQuads = ROWS / 4;  // reads of 16 bytes in a token

  PERP_DEVICE static u32 at(u32 base, int row, int token) { return base + token * kPitch + row * 4; }

  // An m16n8 accumulator, of rows row .. row + 15 and tokens token .. token + 7.
  PERP_DEVICE static void put(u32 base, int lane, int row, int token, const float* sums) {
#pragma unroll
    for (int e = 0; e < 4; ++e) store_shared(at(base, row + accumulator_row(lane, e), token + accumulator_token(lane, e)), sums[e]);
  }
};

// A block of tokens at inputs input_tile * 64 .. + 63, swizzled into `to` 16 bytes at a time; zeros past the last token.
// A thread stays in its column of chunks and goes on by whole patterns of eight tokens, so it swizzles once.
template <int TOKENS, int THREADS>
PERP_DEVICE void copy_tokens(const Product& p, u32 to, int first_token, int input_tile, int thread) {
  constexpr int kStride = THREADS / 8;
  static_assert(kStride % 8 == 0 && TOKENS % kStride == 0, "every copy lies where its swizzle is that of the first");
  const int token = first_token + thread / 8, chunk = thread % 8;
  const u16* from = p.x + token * p.x_stride + input_tile * kTileInputs + chunk * 8;
  to += token_chunk(thread / 8, chunk);
#pragma unroll
  for (int i = 0; i < TOKENS / kStride; ++i) {
    const bool inside = token + i * kStride < p.tokens;
    cp_async16(to + i * kStride * 128, inside ? from + i * kStride * p.x_stride : p.x, inside);
  }
}

}  // namespace perp
