// Reading memory and nothing else: the bandwidth that bounds the products of few tokens.
#pragma once

#include <cstdint>

namespace perp {

// The bitwise or of the `bytes` / 8 whole words at `data`, read by all threads; `data` is aligned to 8 bytes.
std::uint64_t read_words(const void* data, std::int64_t bytes);

}  // namespace perp
