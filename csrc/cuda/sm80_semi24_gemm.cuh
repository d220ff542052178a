// A 2:4 product by mma.sp: Ampere, Ada, and whatever has no kernel of its own.
//
// A block computes ROWS outputs of TOKENS tokens and walks the inputs 64 at a time. A stage of shared memory holds one
// step: the tiles of the weight and of its index, copied as they lie, and the tokens, swizzled on the way in. STAGES - 1
// copies are in flight while one stage is multiplied. Warps are WARPS_M by WARPS_N; each multiplies its rows by its tokens
// from registers filled by ldmatrix, without bank conflicts thanks to the two swizzles.
//
// With few tokens the weight's bytes are all that matters and the rows alone would leave processors idle: the inputs are
// cut into `parts`, each writes float sums of its own, and sum_parts adds them in their order, so that a result does not
// depend on chance.
#pragma once

#include "product.cuh"

namespace perp {

template <class Type, int ROWS, int TOKENS, int WARPS_M, int WARPS_N, int STAGES>
struct Semi24Gemm80 {
  static constexpr int kThreads = 32 * WARPS_M * WARPS_N;
  static constexpr int kTiles = ROWS / kTileRows;
  static constexpr int kStrips = ROWS / 16 / WARPS_M;   // m16 strips of a warp
  static constexpr int kEights = TOKENS / 8 / WARPS_N;  // n8 strips of a warp

  // A stage begins where the widest pattern, 1,024 bytes, does; every part of it is a multiple of that but the index.
  static constexpr int kTokens = kTiles * kTileValueBytes;
  static constexpr int kIndex = kTokens + TOKENS * 128;
  static constexpr int kStage = divide_up(kIndex + kTiles * kTileIndexBytes, 1024) * 1024;
  static constexpr int kShared = STAGES * kStage + kAlignment;

  using Sums = Staging<ROWS>;
  static_assert(TOKENS * Sums::kPitch <= STAGES * kStage, "the sums reuse the stages");
  static_assert(kTileValueBytes / 16 % kThreads == 0, "all threads copy a tile");
  static_assert(kStrips >= 1 && kEights >= 1 && STAGES >= 2, "every warp needs a strip, and every copy a stage ahead");

  const Product& p;
  u32 shared;
  int thread, row_block, first_token, first, count;  // input tiles first .. first + count - 1

  PERP_DEVICE u32 stage(int step) const { return shared + step % STAGES * kStage; }

  // The last block of rows may hold fewer tiles than ROWS: it reads its last one again, and writes nothing of it.
  PERP_DEVICE i64 tile(int i, int step) const {
    const int row_tile = row_block * kTiles + i, last = p.row_tiles() - 1;
    return tile_number(row_tile < last ? row_tile : last, first + step, p.input_tiles());
  }

  PERP_DEVICE void copy(int step) const {
    const u32 to = stage(step);
    constexpr int kValueChunks = kTileValueBytes / 16, kIndexChunks = kTileIndexBytes / 16;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      const i64 from = tile(t, step);
#pragma unroll
      for (int i = 0; i < kValueChunks; i += kThreads) {
        const int at = (i + thread) * 16;
        cp_async16(to + t * kTileValueBytes + at, p.values + from * kTileValueBytes + at, true);
      }
      if (thread < kIndexChunks) {
        cp_async16(to + kIndex + t * kTileIndexBytes + thread * 16, p.index + from * kTileIndexBytes + thread * 16, true);
      }
    }
    copy_tokens<TOKENS, kThreads>(p, to + kTokens, first_token, first + step, thread);
  }

  // One of the two instructions along a step's 64 inputs, for all strips of the warp.
  template <int HALF>
  PERP_DEVICE void multiply(u32 from, const u32 (&words)[kStrips], float (&sums)[kStrips][kEights][4]) const {
    const int lane = thread % 32, warp = thread / 32;
    u32 a[kStrips][4];
#pragma unroll
    for (int m = 0; m < kStrips; ++m) {
      const int strip = warp % WARPS_M * kStrips + m;
      ldmatrix4(a[m], from + strip / 4 * kTileValueBytes + a_row_offset(lane, strip % 4, HALF));
    }
#pragma unroll
    for (int n = 0; n < kEights; ++n) {
      u32 b[4];
      ldmatrix4(b, from + kTokens + b_row_offset(lane, warp / WARPS_M * kEights + n, HALF));
#pragma unroll
      for (int m = 0; m < kStrips; ++m) mma_sp<Type, HALF>(sums[m][n], a[m], b, words[m]);
    }
  }

  PERP_DEVICE void run(float* part_sums, int parts, int part) const {
    const int lane = thread % 32, warp = thread / 32;
    float sums[kStrips][kEights][4] = {};

    // Every step commits a group, empty past the end, so that one wait count serves all: with STAGES - 2 groups still
    // under way, the oldest, which is the step about to be multiplied, has landed.
    for (int step = 0; step < STAGES - 1; ++step) {
      if (step < count) copy(step);
      cp_async_commit();
    }
    for (int step = 0; step < count; ++step) {
      cp_async_wait<STAGES - 2>();
      // One barrier does two jobs: what others copied is here, and the stage that the next copy overwrites, multiplied
      // in the step before, is no longer read.
      block_sync();
      if (step + STAGES - 1 < count) copy(step + STAGES - 1);
      cp_async_commit();
      u32 words[kStrips];
#pragma unroll
      for (int m = 0; m < kStrips; ++m) {
        const int strip = warp % WARPS_M * kStrips + m;
        words[m] = load_shared(stage(step) + kIndex + strip / 4 * kTileIndexBytes + (strip % 4 * 32 + lane) * 4);
      }
      multiply<0>(stage(step), words, sums);
      multiply<1>(stage(step), words, sums);
    }

    cp_async_wait<0>();
    block_sync();  // the stages become the staging of the sums
#pragma unroll
    for (int m = 0; m < kStrips; ++m) {
#pragma unroll
      for (int n = 0; n < kEights; ++n) {
        Sums::put(shared, lane, (warp % WARPS_M * kStrips + m) * 16, (warp / WARPS_M * kEights + n) * 8, sums[m][n]);
      }
    }
    block_sync();
    for (int i = thread; i < TOKENS * Sums::kQuads; i += kThreads) {
      const int token = i / Sums::kQuads, row = i % Sums::kQuads * 4, output = row_block * ROWS + row;
      const float4 sum = load_shared4(Sums::at(shared, row, token));
      if (parts == 1) {
        store_outputs<Type>(p, first_token + token, output, sum);
      } else {
        store_part(p, part_sums, part, first_token + token, output, sum);
      }
    }
  }

  // A block of the grid: block_index over the blocks of y, part_index over the parts of the inputs.
  PERP_DEVICE static void launched(const Product& p, float* part_sums, int parts) {
    const Place at = place(block_index(), divide_up(p.outputs, ROWS), divide_up(p.tokens, TOKENS));
    const int first = first_tile(p.input_tiles(), part_index(), parts), end = first_tile(p.input_tiles(), part_index() + 1, parts);
    const Semi24Gemm80 block{p, shared_memory(), thread_index(), at.rows, at.tokens * TOKENS, first, end - first};
    block.run(part_sums, parts, part_index());
  }
};

}  // namespace perp
