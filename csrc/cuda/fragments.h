// Which lane of a warp holds what, for the instructions of this folder (PTX ISA, "Matrix fragments").
#pragma once

#include "tiled24.h"

namespace perp {

// ldmatrix.x4 gives each lane, from four 8 x 8 matrices of 16-bit elements, row lane / 4 and columns 2 (lane % 4), + 1;
// lanes 8 i .. 8 i + 7 name the rows of matrix i. The offsets below name them so that the four registers are an operand.

// A of mma.sp.m16n8k32, 16 rows x 16 kept values: strip 0..3 of a tile, instruction 0..1 along its inputs.
// Registers: rows 0-7 and 8-15 of the first eight values, then of the last eight.
PERP_BOTH u32 a_row_offset(int lane, int strip, int step) { return value_chunk(strip * 16 + lane % 16, 2 * step + lane / 16); }

// B of mma.sp.m16n8k32, 32 inputs x 8 tokens, from a block of tokens. Registers: inputs 0-7, 8-15, 16-23, 24-31.
PERP_BOTH u32 b_row_offset(int lane, int tokens8, int step) { return token_chunk(tokens8 * 8 + lane % 8, 4 * step + lane / 8); }

// Element e = 0..3 of an m16n8 accumulator: its row of 16 and its token of 8. wgmma's m64nN accumulator is, warp by
// warp, N / 8 of these side by side: element 4 j + e is that of tokens 8 j .. 8 j + 7.
PERP_BOTH int accumulator_row(int lane, int e) { return lane / 4 + 8 * (e / 2); }
PERP_BOTH int accumulator_token(int lane, int e) { return 2 * (lane % 4) + e % 2; }

// The matrix descriptor of wgmma: a K-major operand in shared memory, swizzled; `address` of its first element.
// Fields in units of 16 bytes: start 0-13; the offset from one column of chunks to the next 16-29, which swizzled
// layouts do not use and expect to be 1; from eight rows to the next eight 32-45; the swizzle 62-63. The base offset
// 49-51 is 0 because every tile begins where a pattern does.
constexpr u32 kSwizzle128 = 1, kSwizzle64 = 2;
PERP_BOTH u64 descriptor(u32 address, u32 bytes_per_8_rows, u32 swizzle) {
  return static_cast<u64>((address & 0x3FFFF) >> 4) | static_cast<u64>(1) << 16 |
         static_cast<u64>(bytes_per_8_rows >> 4) << 32 | static_cast<u64>(swizzle) << 62;
}

// Operands of wgmma step 0..1 within a tile: 32 inputs on, that is 16 kept values (32 bytes) and 32 elements of a token
// (64 bytes). The hardware swizzles the address it computes, so stepping the start inside a pattern is right.
PERP_BOTH u64 weight_descriptor(u32 tile, int step) { return descriptor(tile + 32 * step, 8 * 64, kSwizzle64); }
PERP_BOTH u64 token_descriptor(u32 block, int step) { return descriptor(block + 64 * step, 8 * 128, kSwizzle128); }

}  // namespace perp
