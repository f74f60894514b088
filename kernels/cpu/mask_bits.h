// Masks as words of bits: entry j is bit j % 64 of word j / 64. See ../reference/mask_bits.py.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "bytes of a mask are read as words");

// Entries that are walked at once.
constexpr int64_t CHUNK = 4096;

struct Words {
  uint64_t words[CHUNK / 64];

  // Entries [first, first + numel) of a mask, at most CHUNK of them; what follows in the last word is zero. Only bytes
  // that hold one of these entries are read.
  Words(const uint8_t *bits, int64_t first, int64_t numel) {
    const uint8_t *from = bits + (first >> 3);
    const int shift = first & 7;
    const int64_t num_bytes = (shift + numel + 7) >> 3;
    for (int64_t word = 0; word < (numel + 63) / 64; word++) {
      const int64_t left = num_bytes - word * 8;
      uint64_t found = 0;
      memcpy(&found, from + word * 8, std::min<int64_t>(8, left));
      found >>= shift;
      if (shift && left > 8) found |= uint64_t(from[word * 8 + 8]) << (64 - shift);
      words[word] = found;
    }
    if (numel & 63) words[numel >> 6] &= (uint64_t(1) << (numel & 63)) - 1;
  }
};

}  // namespace
