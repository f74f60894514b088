// Which entries are isolated: those whose code reaches the threshold; see ../reference/select.py.

#include "export.h"
#include "mask_bits.h"
#include "simd.h"

// bits            mask, mutated: entries [first_entry, first_entry + numel)
// codes           [numel]  not negative
// before          mask in force
// counts          [2]      overwritten: isolated now, isolated before and now
EPI_EXPORT(select)(uint8_t *bits, const int32_t *codes, int64_t numel, const uint8_t *before, int32_t threshold_code,
                   int64_t first_entry, int64_t *counts, int threads) {
  int64_t now = 0, kept = 0;
  // Chunks are cut at multiples of an entry's number, which are borders of bytes: no two threads write to one.
  const int64_t first_chunk = first_entry / CHUNK, last_chunk = (first_entry + numel + CHUNK - 1) / CHUNK;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(+ : now, kept)
  for (int64_t chunk = first_chunk; chunk < last_chunk; chunk++) {
    const int64_t begin = std::max(first_entry, chunk * CHUNK) - first_entry;
    const int64_t end = std::min(first_entry + numel, (chunk + 1) * CHUNK) - first_entry;
    // One word more: the first entries of the chunk may be another parameter's.
    const int64_t offset = (first_entry + begin) & 7;
    uint64_t found[CHUNK / 64 + 1] = {};
    int64_t entry = begin;
    for (; entry + LANES <= end; entry += LANES) {
      const uint64_t lanes = bits_of(load<i32>(codes + entry) >= splat(threshold_code));
      const int64_t position = offset + entry - begin;
      found[position >> 6] |= lanes << (position & 63);
      if ((position & 63) > 64 - LANES) found[(position >> 6) + 1] |= lanes >> (64 - (position & 63));
    }
    for (; entry < end; entry++) {
      const int64_t position = offset + entry - begin;
      found[position >> 6] |= uint64_t(codes[entry] >= threshold_code) << (position & 63);
    }
    const int64_t num_bytes = (offset + end - begin + 7) >> 3;
    uint8_t *to = bits + ((first_entry + begin) >> 3);
    const uint8_t *old = before + ((first_entry + begin) >> 3);
    const uint8_t *bytes = reinterpret_cast<const uint8_t *>(found);
    for (int64_t byte = 0; byte < num_bytes; byte++) {
      // Neighbours that share the first or the last byte keep their entries.
      uint8_t own = 0xFF;
      if (byte == 0) own &= 0xFF << offset;
      if (byte == num_bytes - 1 && (offset + end - begin) & 7) own &= 0xFF >> (8 - ((offset + end - begin) & 7));
      to[byte] = (to[byte] & ~own) | bytes[byte];
    }
    int64_t byte = 0;
    for (; byte + 8 <= num_bytes; byte += 8) {
      uint64_t was;
      memcpy(&was, old + byte, sizeof was);
      now += __builtin_popcountll(found[byte >> 3]);
      kept += __builtin_popcountll(found[byte >> 3] & was);
    }
    for (; byte < num_bytes; byte++) {
      now += __builtin_popcount(bytes[byte]);
      kept += __builtin_popcount(bytes[byte] & old[byte]);
    }
  }
  counts[0] = now;
  counts[1] = kept;
}
