// What the kernels of sparse_linear share: the packed order of activations, and the last step of a product.
#pragma once

#include <cstdint>

#include "cpu/convert.h"
#include "cpu/sparse_linear.h"

namespace perp {

// Activations are padded with zeros to whole blocks of columns, so kernels need no tails.
constexpr std::int64_t kPad = 128;

inline std::int64_t padded(std::int64_t columns) { return (columns + kPad - 1) / kPad * kPad; }

// Up to this many tokens a row is multiplied straight from its packed form, with more from a decoded panel.
constexpr std::int64_t kFusedTokens = 8;

// Tokens are multiplied in blocks: all at once up to kFusedTokens, else kBlockTokens at a time, the last block smaller.
// A block is stored column vector by column vector (64 bytes of each of its tokens in turn), so that any kernel reads it
// as one stream, which the hardware's prefetchers follow and which no two tokens share the sets of a cache in.
constexpr std::int64_t kBlockTokens = 6;

inline std::int64_t block_tokens(std::int64_t tokens) { return tokens <= kFusedTokens ? tokens : kBlockTokens; }

// Rounds the sum of row `row`, token `token` into y.
template <class T>
void store(const LinearCall& call, std::int64_t row, std::int64_t token, float sum) {
  if (call.bias != nullptr) {
    sum += call.bias_is_float ? static_cast<const float*>(call.bias)[row] : to_float(static_cast<const T*>(call.bias)[row]);
  }
  static_cast<T*>(call.y)[token * call.y_stride + row] = from_float<T>(sum);
}

}  // namespace perp
