// A 2:4 product by Hopper's warp-group instruction, wgmma.mma_async.sp.m64nNk32. How it works, from the outside in:
//
// A block computes 128 * TILES outputs of TOKENS tokens. Two warp groups multiply, TILES m64 tiles each; a third fetches.
// They meet in a ring of STAGES stages of shared memory, each of which holds 64 inputs of everything:
//
//   values   2 * TILES tiles of 4,096 bytes, one bulk copy each: the prepared order is what wgmma reads (64-byte swizzle)
//   tokens   TOKENS x 64 inputs, 128 bytes a token, by cp.async of each fetching thread, which swizzles (128 bytes); a
//            bulk copy could not, and needs no tensor map this way
//   index    2 * TILES tiles of 512 bytes, one bulk copy each: a word for each lane
//
// Two barriers a stage. `full` completes when the announced bytes of the bulk copies have landed and all fetching warps
// have said that their part of the tokens has; `empty`, when every multiplying warp is done reading. Round r of a stage is
// phase r of both, so a parity bit tells rounds apart: nobody can be two rounds ahead, since each round of one barrier
// waits for the other's.
//
// The fetching side says "landed" LAG steps after it asked. cp.async writes through the generic proxy and the tensor cores
// read through the async one, so a fence has to stand between them, and only the thread that waited for its own copies can
// place it. LAG = STAGES - 3: LAG + 1 steps of tokens are in flight. Step j is announced after step j + LAG has been asked
// for, into the stage of step j - 3. So nobody waits for ever, for step j - 3 was announced before and its release waits
// for nothing else; and nobody waits long, for two more steps lie announced while that stage is filled.
//
// SHARERS = 2 pairs blocks of the same outputs and neighbouring tokens in a cluster. Each fetches half of the tiles of the
// weight, for both, which takes a quarter off what the pair reads from L2. A stage is then free when both have released it,
// so every warp releases it to both; and no block may leave while the other still writes to it.
//
// PARTS > 1 cuts the inputs among the blocks of a cluster, for few tokens, when the rows alone would leave processors idle.
// Each leaves its sums in its own shared memory; every block then adds a share of them over the cluster, in the order of
// the parts, so no result depends on chance and nothing goes through device memory.
#pragma once

#include "product.cuh"
#include "ptx_sm90.cuh"

namespace perp {

template <class Type, int TOKENS, int TILES, int STAGES, int PARTS, int SHARERS = 1>
struct Semi24Gemm90 {
  static constexpr int kGroupThreads = 128;
  static constexpr int kGroups = 2;  // of the multiplying kind: one's barriers hide behind the other's products
  static constexpr int kConsumers = kGroups * kGroupThreads;
  static constexpr int kThreads = kConsumers + kGroupThreads;
  static constexpr int kTiles = kGroups * TILES;
  static constexpr int kRows = kTiles * kTileRows;
  static constexpr int kLag = STAGES - 3;

  static constexpr int kTokens = kTiles * kTileValueBytes;  // offsets in a stage; the first two are multiples of 1,024
  static constexpr int kIndex = kTokens + TOKENS * 128;
  static constexpr int kStage = kIndex + kTiles * kTileIndexBytes;
  static constexpr int kRing = STAGES * kStage;
  static constexpr int kShared = kRing + STAGES * 16 + kAlignment;
  static constexpr int kBulkBytes = kTiles * (kTileValueBytes + kTileIndexBytes);

  // `full` is arrived at by each fetching warp and by the thread that announces the bulk copies.
  static constexpr int kFullArrivals = kGroupThreads / 32 + 1;
  static constexpr int kEmptyArrivals = SHARERS * kConsumers / 32;

  using Sums = Staging<kTileRows>;
  static constexpr int kStaging = TOKENS * Sums::kPitch;  // of one warp group
  static_assert(kStage % 1024 == 0, "every stage begins where a 128-byte swizzle pattern does");
  static_assert(kGroups * kStaging <= kRing, "the sums reuse the ring");
  static_assert(kLag >= 1, "fewer stages would announce what has just been asked for");
  static_assert(PARTS == 1 || TILES == 1, "the cluster adds one tile of each warp group");
  static_assert(SHARERS == 1 || PARTS == 1, "a cluster has one purpose");
  static_assert(kTiles % SHARERS == 0, "each block of a pair fetches as many tiles");

  const Product& p;
  u32 shared;
  int thread, rank, row_block, first_token, first, count;  // input tiles first .. first + count - 1

  PERP_DEVICE u32 stage(int step) const { return shared + step % STAGES * kStage; }
  PERP_DEVICE u32 full(int step) const { return shared + kRing + step % STAGES * 16; }
  PERP_DEVICE u32 empty(int step) const { return full(step) + 8; }

  // The last block of rows may hold fewer tiles: it reads its last one again, and writes nothing of it.
  PERP_DEVICE i64 tile(int i, int step) const {
    const int row_tile = row_block * kTiles + i, last = p.row_tiles() - 1;
    return tile_number(row_tile < last ? row_tile : last, first + step, p.input_tiles());
  }

  PERP_DEVICE void fetch_tile(u32 to, int i, int step) const {
    const unsigned char* values = p.values + tile(i, step) * kTileValueBytes;
    const unsigned char* index = p.index + tile(i, step) * kTileIndexBytes;
    const u32 to_values = to + i * kTileValueBytes, to_index = to + kIndex + i * kTileIndexBytes;
    if constexpr (SHARERS == 1) {
      bulk_copy(to_values, values, kTileValueBytes, full(step));
      bulk_copy(to_index, index, kTileIndexBytes, full(step));
    } else {
      bulk_copy_to_all(to_values, values, kTileValueBytes, full(step), (1 << SHARERS) - 1);
      bulk_copy_to_all(to_index, index, kTileIndexBytes, full(step), (1 << SHARERS) - 1);
    }
  }

  PERP_DEVICE void fetch() const {
    const int own = thread - kConsumers;
    for (int step = 0; step < count; ++step) {
      if (step >= STAGES) mbarrier_wait(empty(step), (step / STAGES - 1) % 2);
      const u32 to = stage(step);
      if (own == 0) {
        mbarrier_arrive_expect(full(step), kBulkBytes);
#pragma unroll
        for (int i = 0; i < kTiles / SHARERS; ++i) fetch_tile(to, SHARERS == 1 ? i : rank * (kTiles / SHARERS) + i, step);
      }
      copy_tokens<TOKENS, kGroupThreads>(p, to + kTokens, first_token, first + step, own);
      cp_async_commit();
      if (step >= kLag) {
        cp_async_wait<kLag>();  // of the groups of all steps so far, all but the last kLag have landed
        announce(step - kLag);
      }
    }
    cp_async_wait<0>();
    for (int step = count < kLag ? 0 : count - kLag; step < count; ++step) announce(step);
  }

  PERP_DEVICE void announce(int step) const {
    async_proxy_fence();
    warp_sync();  // every lane's copies and fence before the one arrival
    if (thread % 32 == 0) mbarrier_arrive(full(step));
  }

  PERP_DEVICE void release(int step) const {
    warp_sync();
    if constexpr (SHARERS == 1) {
      if (thread % 32 == 0) mbarrier_arrive(empty(step));
    } else {
      if (thread % 32 < SHARERS) mbarrier_arrive_at(empty(step), thread % 32);
    }
  }

  PERP_DEVICE void multiply(float (&sums)[TILES][TOKENS / 2]) const {
    const int group = thread / kGroupThreads, own = thread % kGroupThreads;
    for (int step = 0; step < count; ++step) {
      mbarrier_wait(full(step), step / STAGES % 2);
      const u32 from = stage(step);
      u32 words[TILES];
#pragma unroll
      for (int t = 0; t < TILES; ++t) words[t] = load_shared(from + kIndex + (group * TILES + t) * kTileIndexBytes + own * 4);
      wgmma_fence();
#pragma unroll
      for (int t = 0; t < TILES; ++t) {
        const u32 values = from + (group * TILES + t) * kTileValueBytes;
        wgmma_sp<Type, TOKENS, 0>(sums[t], weight_descriptor(values, 0), token_descriptor(from + kTokens, 0), words[t]);
        wgmma_sp<Type, TOKENS, 1>(sums[t], weight_descriptor(values, 1), token_descriptor(from + kTokens, 1), words[t]);
      }
      wgmma_commit();
      // Waiting for all of them, where one step could stay under way: the manual does not say when a product has read its
      // words, and the next step's would come into the same registers. The other group's products fill the gap.
      wgmma_wait<0>();
      release(step);
    }
#pragma unroll
    for (int t = 0; t < TILES; ++t) settled(sums[t]);
    // Every copy has landed, for both groups have waited for each, and past this barrier neither reads the ring any more:
    // it becomes the staging of the sums.
    named_sync(1, kConsumers);
  }

  // The sums of a warp group's tile, into its staging.
  PERP_DEVICE void put(const float (&sums)[TOKENS / 2]) const {
    const int group = thread / kGroupThreads, warp = thread % kGroupThreads / 32;
    const u32 staging = shared + group * kStaging;
#pragma unroll
    for (int j = 0; j < TOKENS / 8; ++j) Sums::put(staging, thread % 32, warp * 16, j * 8, sums + 4 * j);
  }

  PERP_DEVICE void run_alone() const {
    if (thread >= kConsumers) return fetch();
    float sums[TILES][TOKENS / 2] = {};
    multiply(sums);
    const int group = thread / kGroupThreads, own = thread % kGroupThreads;
    const u32 staging = shared + group * kStaging;
#pragma unroll
    for (int t = 0; t < TILES; ++t) {
      if (t > 0) named_sync(2 + group, kGroupThreads);  // the tile before has been read
      put(sums[t]);
      named_sync(2 + group, kGroupThreads);
      for (int i = own; i < TOKENS * Sums::kQuads; i += kGroupThreads) {
        const int token = i / Sums::kQuads, row = i % Sums::kQuads * 4;
        const int output = row_block * kRows + (group * TILES + t) * kTileRows + row;
        store_outputs<Type>(p, first_token + token, output, load_shared4(Sums::at(staging, row, token)));
      }
    }
  }

  PERP_DEVICE void run_in_cluster(int part) const {
    if (thread < kConsumers) {
      float sums[TILES][TOKENS / 2] = {};
      multiply(sums);
      put(sums[0]);
    } else {
      fetch();
    }
    cluster_sync();  // every part's sums are in its staging
    constexpr int kGroupQuads = TOKENS * Sums::kQuads, kShare = kGroups * kGroupQuads / PARTS;
    for (int i = part * kShare + thread; i < (part + 1) * kShare; i += kThreads) {
      const int group = i / kGroupQuads, token = i % kGroupQuads / Sums::kQuads, row = i % Sums::kQuads * 4;
      const u32 at = Sums::at(shared + group * kStaging, row, token);
      float4 sum = load_cluster4(at, 0);
#pragma unroll
      for (int rank = 1; rank < PARTS; ++rank) {
        const float4 more = load_cluster4(at, rank);
        sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
      }
      store_outputs<Type>(p, first_token + token, row_block * kRows + group * kTileRows + row, sum);
    }
    cluster_sync();  // no block leaves while another reads its sums
  }

  // A block of the grid: block_index over the parts of the inputs or the blocks that share, innermost, and the blocks of y.
  PERP_DEVICE static void launched(const Product& p) {
    const int part = block_index() % PARTS, rank = block_index() % SHARERS;
    const Place at = place(block_index() / (PARTS * SHARERS), divide_up(p.outputs, kRows), divide_up(p.tokens, TOKENS * SHARERS));
    const int first = first_tile(p.input_tiles(), part, PARTS), end = first_tile(p.input_tiles(), part + 1, PARTS);
    const Semi24Gemm90 block{p, shared_memory(), thread_index(), rank, at.rows, (at.tokens * SHARERS + rank) * TOKENS, first, end - first};
    if (block.thread == 0) {
      for (int s = 0; s < STAGES; ++s) {
        mbarrier_init(block.full(s), kFullArrivals);
        mbarrier_init(block.empty(s), kEmptyArrivals);
      }
      mbarrier_init_fence();
      async_proxy_fence();
    }
    if constexpr (PARTS > 1) {
      block_sync();
      block.run_in_cluster(part);
    } else if constexpr (SHARERS > 1) {
      cluster_sync();  // the other's barriers are there too
      block.run_alone();
      cluster_sync();
    } else {
      block_sync();
      block.run_alone();
    }
  }
};

}  // namespace perp
