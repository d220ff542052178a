// The prepared order of a semi24 weight: the layout "tiled24" of perp_kernels/layouts.py, which both tensor-core
// instructions read as it lies in memory.
//
// The weight is cut into tiles of 64 outputs by 64 inputs, output blocks outermost; outputs are padded to whole tiles
// with zeros. A tile is one contiguous record in `values` and one in `index`, so that it arrives by one bulk copy each
// and needs no rearranging on the chip:
//
//   values   4,096 bytes: 64 rows of 32 kept values (64 bytes), in column order, their 16-byte chunks swizzled.
//   index    512 bytes: 128 words, word 32 w + l for lane l of warp w. With g = l / 4 and t = l % 4 its low half is
//            the index of row 16 w + g at inputs 16 t .. 16 t + 15 (the canonical nibbles, unchanged), its high half
//            that of row 16 w + g + 8.
//
// Why the words are so: mma.sp.m16n8k32 and wgmma.mma_async.sp.m64nNk32 take the positions of a 16 x 32 strip from two
// lanes of each four (PTX ISA, "Matrix fragments ... with sparse matrix A", figures of m16n8k32 and m64nNk32): with
// selector 0 lanes t = 0, 1 give inputs 0-15 and 16-31, with selector 1 lanes t = 2, 3 do. One word a lane therefore
// holds two instructions' worth, 64 inputs: the first reads it with selector 0, the second with selector 1.
#pragma once

#include "host_device.h"

namespace perp {

constexpr int kTileRows = 64;    // wgmma's m
constexpr int kTileInputs = 64;  // two instructions of k = 32: 128 bytes of a token, the widest swizzle's row
constexpr int kTileValueBytes = kTileRows * kTileInputs / 2 * 2;
constexpr int kTileIndexBytes = kTileRows * kTileInputs / 8;

// Swizzles of the PTX manual, which XOR the chunk of 16 bytes by the row within the pattern, so that eight rows at one
// column lie in different banks. `offset` counts from where a pattern begins (512 or 1,024 bytes, aligned).
PERP_BOTH u32 swizzle_64(u32 offset) { return offset ^ ((offset >> 3) & 0x30); }    // rows of 64 bytes
PERP_BOTH u32 swizzle_128(u32 offset) { return offset ^ ((offset >> 3) & 0x70); }  // rows of 128 bytes

// Byte offset within a tile of chunk 0..3 (eight kept values) of a row.
PERP_BOTH u32 value_chunk(int row, int chunk) { return swizzle_64(row * 64 + chunk * 16); }

// Byte offset within a block of tokens [tokens, 64] of chunk 0..7 (eight inputs) of a token.
PERP_BOTH u32 token_chunk(int token, int chunk) { return swizzle_128(token * 128 + chunk * 16); }

// Which word of a tile's index holds the half word of inputs 16 t .. 16 t + 15 of a row, and whether it is the high one.
PERP_BOTH int index_word(int row, int t) { return (row / 16) * 32 + (row % 8) * 4 + t; }
PERP_BOTH int index_half(int row) { return row / 8 % 2; }

// Tiles before that of an output block and an input block.
PERP_BOTH i64 tile_number(int row_tile, int input_tile, int input_tiles) {
  return static_cast<i64>(row_tile) * input_tiles + input_tile;
}

// The share of `tiles` that part `part` of `parts` sums: first(part) .. first(part + 1), possibly none.
PERP_BOTH int first_tile(int tiles, int part, int parts) { return static_cast<int>(static_cast<i64>(tiles) * part / parts); }

struct Place {
  int rows;    // block of outputs
  int tokens;  // block of tokens
};

// The blocks in the order in which they start. Blocks that run together should share what they read: of a GPU's
// 100-odd, eight neighbours along the outputs and a dozen along the tokens re-read a weight and tokens of about equal
// size, and both stay in the L2 cache whatever the layer's shape.
constexpr int kGroup = 8;
PERP_BOTH Place place(int block, int row_blocks, int token_blocks) {
  const int group = block / (kGroup * token_blocks), first = group * kGroup;
  const int rows = row_blocks - first < kGroup ? row_blocks - first : kGroup;
  const int within = block - first * token_blocks;
  return {first + within % rows, within / rows};
}

}  // namespace perp
