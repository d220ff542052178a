// y = x W^T for 1 to 16 tokens, the weight a bitmap as it is stored: kept values in column order and a bit per place.
//
// A block has ROWS outputs and walks the inputs COLUMNS at a time. A step lies in one stage of shared memory:
//
//   values   a slot for each row: the kept values of these columns, from the multiple of 16 bytes at or before the
//            first, since a row may begin at any value. As wide as if all were kept.
//   tokens   [TOKENS, COLUMNS]
//   table    for each row and word of 32 columns: its bits, and where in the slot its values begin
//
// Where a row's values lie is known only by counting the bits before them. While step s is multiplied, the threads count
// the words of step s + STAGES - 1, one each, add them up along the row, and start the copies of just the values it
// keeps. A part of the inputs that is not the first begins by counting all before it: the layout asks for that.
//
// Each warp multiplies columns of its own by mma.m16n8k16, whose operand A it decodes straight into registers. Of a word,
// lane 4 g + t has, in row g and row g + 8 of a strip, columns 8 h + 2 t and the next for h = 0..3: what A asks of it, and
// what ldmatrix gives it of the tokens. Two neighbours share one count: with c values up to and including the first,
// that one, if kept, is value c - 1 of the word, and the second, if kept, value c whether or not the first is. Lanes
// whose bit is 0 do not load; they are half, so there are fewer conflicts of banks too.
#pragma once

#include "product.cuh"

namespace perp {

// The layout bitmap of perp_kernels/layouts.py, the rows of its index padded to whole words.
struct Bitmap {
  const u16* values;   // 16-byte aligned
  const u32* index;    // [outputs, words()]
  const i64* row_ptr;  // null where each row keeps as many
  i64 values_in_row;   // then
  i64 values_in_all;
  int outputs, inputs;

  PERP_DEVICE int words() const { return divide_up(inputs, 32); }
  PERP_DEVICE i64 start(int row) const { return row_ptr == nullptr ? row * values_in_row : load_constant(row_ptr + row); }
};

template <class Type, int TOKENS, int ROWS, int COLUMNS, int STAGES>
struct BitmapLinear {
  static constexpr int kWords = COLUMNS / 32;
  static constexpr int kThreads = ROWS * kWords;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kStrips = ROWS / 16;
  static constexpr int kEights = TOKENS / 8;
  static constexpr int kWordsEach = kWords / kWarps;
  static_assert(kWords <= 32 && 32 % kWords == 0, "the words of a row are counted within a warp");
  static_assert(kWordsEach * kWarps == kWords && kStrips >= 1 && kEights >= 1, "every warp has words of its own");

  // Chunks of 16 bytes: all columns of a row, and one more for where it begins. An odd number, so that the eight rows
  // that ldmatrix reads lie in different banks.
  static constexpr int kInRow = COLUMNS / 8, kChunks = kInRow + 1;
  static constexpr int kPitch = 16 * kChunks;
  // An entry more than a row has words: eight rows, 8 bytes each, lie in different banks.
  static constexpr int kTablePitch = 8 * (kWords + 1);
  static constexpr int kTokens = ROWS * kPitch;
  static constexpr int kTable = kTokens + TOKENS * kPitch;
  static constexpr int kStage = kTable + ROWS * kTablePitch;
  static_assert(kChunks % 2 == 1 && kStage % 16 == 0, "the padding and the copies count on it");

  using Sums = Staging<ROWS>;
  static_assert(kWarps * TOKENS * Sums::kPitch <= STAGES * kStage, "the sums reuse the stages");

  const Product& p;
  u32 shared;
  int thread;

  // A thread counts the words of one row of the block, at one place in each step.
  PERP_DEVICE int row() const { return thread / kWords; }
  PERP_DEVICE int place() const { return thread % kWords; }

  // The sum of `own` over the words of a row up to this thread's, and over all of them.
  PERP_DEVICE static int along_row(int own) {
#pragma unroll
    for (int by = 1; by < kWords; by *= 2) own = add_from_below<kWords>(own, by);
    return own;
  }
  PERP_DEVICE static int whole_row(int along) { return shuffle<kWords>(along, kWords - 1); }

  // What a thread brings in, a step at a time: a chunk of some tokens, and every kWords-th chunk of its row's values.
  struct Source {
    const u32* index;   // its word of the row
    int words;          // of the row from there on, none of a row past the last
    const u16* x;       // its chunk of its first token
    int inputs;         // from there on
    const u16* chunk;   // of the row's first value
    int next;           // the row's next value, counted from there
    int whole;          // chunks from there on that end within the weight's values

    PERP_DEVICE static Source of(const Bitmap& w, const Product& p, int output, int thread, int first) {
      const int place = thread % kWords, input = first * COLUMNS + thread % kInRow * 8;
      Source s;
      s.index = w.index + static_cast<i64>(output) * w.words() + place;
      s.words = output < w.outputs ? w.words() - place : 0;
      int before = 0;
#pragma unroll 8
      for (int step = 0; step < first; ++step) before += count_bits(s.take_word());
      if (first > 0) before = whole_row(along_row(before));
      s.x = p.x + thread / kInRow * p.x_stride + input;
      s.inputs = p.inputs - input;
      const i64 start = output < w.outputs ? w.start(output) : 0, whole = w.values_in_all / 8 - start / 8;
      s.chunk = w.values + start / 8 * 8;
      s.next = static_cast<int>(start % 8) + before;
      s.whole = whole < w.inputs ? static_cast<int>(whole) : w.inputs;  // a row needs no more
      return s;
    }
    // Of the next step; 0 past the last column or row.
    PERP_DEVICE u32 take_word() {
      const u32 word = words > 0 ? load_constant(index) : 0;
      index += kWords;
      words -= kWords;
      return word;
    }
  };

  // The tokens of a step, zeros past the last input. A thread stays in its column of chunks.
  PERP_DEVICE void copy_tokens(u32 to, Source& s) const {
    constexpr int kAtOnce = kThreads / kInRow;
    const int token = thread / kInRow, tokens = p.tokens - token;
    to += kTokens + token * kPitch + thread % kInRow * 16;
#pragma unroll
    for (int i = 0; i < TOKENS / kAtOnce; ++i) {
      if (i * kAtOnce < tokens) cp_async16(to + i * kAtOnce * kPitch, s.x + i * kAtOnce * p.x_stride, s.inputs > 0);
    }
    s.x += COLUMNS;
    s.inputs -= COLUMNS;
  }

  // Starts the copies of the source's next step, whose word of this thread is `word`.
  PERP_DEVICE void fetch(u32 to, u32 word, const Bitmap& w, Source& s) const {
    copy_tokens(to, s);
    const int own = count_bits(word), along = along_row(own), kept = whole_row(along), head = s.next & 7;
    const u32 slot = to + row() * kPitch;
    // One value early: a count includes the value that it is to find.
    store_shared2(to + kTable + row() * kTablePitch + place() * 8, uint2{word, slot + 2 * (head + along - own) - 2});

    // Where the row keeps nothing here, that may be the chunk of its head once more.
    const int first = s.next >> 3, left = s.whole - first, chunks = (head + kept + 7) >> 3, whole = chunks < left ? chunks : left;
    const u16* from = s.chunk + static_cast<i64>(first + place()) * 8;
    u32 chunk = slot + 16 * place();
    hold(from), hold(chunk);
    const int mine = whole - place();
#pragma unroll
    for (int i = 0; i < divide_up(kChunks, kWords); ++i) {
      if (i * kWords < mine) cp_async16(chunk + 16 * i * kWords, from + 8 * i * kWords, true);
    }
    // The weight's last values, where they fill no chunk: nothing may be read past them.
    if (whole < chunks) {
      const int rest = static_cast<int>(w.values_in_all % 8);
      if (place() < rest) store_shared16(slot + 16 * whole + 2 * place(), load_constant(w.values + (w.values_in_all - rest + place())));
    }
    s.next += kept;
  }

  PERP_DEVICE int column() const { return thread % 4 * 2; }

  // up_to: the bits of columns 0 .. 8 h + column().
  PERP_DEVICE void multiply(u32 from, const u32 (&up_to)[4], float (&sums)[kStrips][kEights][4]) const {
    const int lane = thread % 32;
#pragma unroll
    for (int i = 0; i < kWordsEach; ++i) {
      const int word = thread / 32 * kWordsEach + i;
      u32 x[kEights][4];
#pragma unroll
      for (int n = 0; n < kEights; ++n) {
        const int token = 8 * n + lane % 8;  // those that there are not read the last again, and are not written
        ldmatrix4(x[n], from + kTokens + (token < p.tokens ? token : p.tokens - 1) * kPitch + word * 64 + lane / 8 * 16);
      }
#pragma unroll
      for (int m = 0; m < kStrips; ++m) {
        u32 a[2][4];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint2 entry = load_shared2(from + kTable + (m * 16 + half * 8 + lane / 4) * kTablePitch + word * 8);
          const u32 bits = entry.x >> column();
#pragma unroll
          for (int h = 0; h < 4; ++h) {
            const u32 at = entry.y + 2 * count_bits(entry.x & up_to[h]);
            const u32 low = load_shared16(at, bits & 1u << 8 * h), high = load_shared16(at + 2, bits & 2u << 8 * h);
            a[h / 2][half + h % 2 * 2] = join_halves(low, high);
          }
        }
#pragma unroll
        for (int n = 0; n < kEights; ++n) {
          mma<Type>(sums[m][n], a[0], x[n][0], x[n][1]);
          mma<Type>(sums[m][n], a[1], x[n][2], x[n][3]);
        }
      }
    }
  }

  // The outputs from first_output on, of inputs steps first .. first + count - 1.
  PERP_DEVICE void run(const Bitmap& w, int first_output, int first, int count, float* part_sums, int parts, int part) const {
    Source source = Source::of(w, p, first_output + row(), thread, first);
    // The words of the first steps are asked for at once: from then on each has a step's time to come.
    u32 words[STAGES];
#pragma unroll
    for (int step = 0; step < STAGES; ++step) words[step] = source.take_word();
    u32 up_to[4];
#pragma unroll
    for (int h = 0; h < 4; ++h) {
      up_to[h] = (2u << (8 * h + column())) - 1;
      hold(up_to[h]);
    }
    float sums[kStrips][kEights][4] = {};

    // Every step commits a group, empty past the end, so that one wait count serves all (as in sm80_semi24_gemm.cuh).
#pragma unroll
    for (int step = 0; step < STAGES - 1; ++step) {
      if (step < count) fetch(shared + step * kStage, words[step], w, source);
      cp_async_commit();
    }
    u32 word = words[STAGES - 1], read = shared, free = shared + (STAGES - 1) * kStage;
    for (int step = 0; step < count; ++step) {
      cp_async_wait<STAGES - 2>();
      // One barrier does two jobs: what others copied is here, and the stage that is filled next, multiplied in the
      // step before, is no longer read.
      block_sync();
      if (step + STAGES - 1 < count) {
        const u32 now = word;
        word = source.take_word();
        fetch(free, now, w, source);
      }
      cp_async_commit();
      multiply(read, up_to, sums);
      free = read;
      read = read == shared + (STAGES - 1) * kStage ? shared : read + kStage;
    }

    cp_async_wait<0>();
    block_sync();  // the stages become the staging of the sums, which the warps have for the same outputs
    const int lane = thread % 32, warp = thread / 32;
    constexpr u32 kSums = TOKENS * Sums::kPitch;
#pragma unroll
    for (int m = 0; m < kStrips; ++m) {
#pragma unroll
      for (int n = 0; n < kEights; ++n) Sums::put(shared + warp * kSums, lane, m * 16, n * 8, sums[m][n]);
    }
    block_sync();
    for (int i = thread; i < TOKENS * Sums::kQuads; i += kThreads) {
      const int token = i / Sums::kQuads, quad = i % Sums::kQuads * 4, output = first_output + quad;
      float4 sum = load_shared4(Sums::at(shared, quad, token));
#pragma unroll
      for (int other = 1; other < kWarps; ++other) {
        const float4 more = load_shared4(Sums::at(shared + other * kSums, quad, token));
        sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
      }
      if (parts == 1) {
        store_outputs<Type>(p, token, output, sum);
      } else {
        store_part(p, part_sums, part, token, output, sum);
      }
    }
  }

  // A block of the grid: block_index over the outputs, part_index over the parts of the inputs.
  PERP_DEVICE static void launched(const Bitmap& w, const Product& p, float* part_sums, int parts) {
    const int steps = divide_up(w.inputs, COLUMNS), part = part_index();
    const int first = first_tile(steps, part, parts), end = first_tile(steps, part + 1, parts);
    const BitmapLinear block{p, shared_memory<16>(), thread_index()};
    block.run(w, block_index() * ROWS, first, end - first, part_sums, parts, part);
  }
};

}  // namespace perp
