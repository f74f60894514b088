// Isolated entries taken out, put back, and set to zero; see ../reference/hold.py.

#include <vector>

#include "export.h"
#include "mask_bits.h"

namespace {

// Call `visit(entry)` for every isolated entry of a chunk, in order.
template <class Visit>
inline void each_isolated(const Words &mask, int64_t first, int64_t numel, const Visit &visit) {
  for (int64_t word = 0; word < (numel + 63) / 64; word++)
    for (uint64_t left = mask.words[word]; left; left &= left - 1) visit(first + word * 64 + __builtin_ctzll(left));
}

// Isolated entries in front of every chunk, and of all.
std::vector<int64_t> offsets_of(const uint8_t *bits, int64_t numel) {
  std::vector<int64_t> offsets;
  int64_t before = 0;
  for (int64_t first = 0; first < numel; first += CHUNK) {
    const int64_t size = std::min(CHUNK, numel - first);
    const Words mask(bits, first, size);
    offsets.push_back(before);
    for (int64_t word = 0; word < (size + 63) / 64; word++) before += __builtin_popcountll(mask.words[word]);
  }
  offsets.push_back(before);
  return offsets;
}

template <class Entry>
int64_t hold(const void *values, const uint8_t *bits, int64_t numel, void *held, int64_t num_held, int threads) {
  const std::vector<int64_t> offsets = offsets_of(bits, numel);
  if (offsets.back() != num_held) return offsets.back();
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t chunk = 0; chunk < int64_t(offsets.size()) - 1; chunk++) {
    const int64_t first = chunk * CHUNK, size = std::min(CHUNK, numel - first);
    const Entry *from = static_cast<const Entry *>(values);
    Entry *to = static_cast<Entry *>(held) + offsets[chunk];
    each_isolated(Words(bits, first, size), first, size, [&](int64_t entry) { *to++ = from[entry]; });
  }
  return num_held;
}

template <class Entry>
int64_t restore(void *values, const uint8_t *bits, int64_t numel, const void *held, int64_t num_held, int threads) {
  const std::vector<int64_t> offsets = offsets_of(bits, numel);
  if (offsets.back() != num_held) return offsets.back();
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t chunk = 0; chunk < int64_t(offsets.size()) - 1; chunk++) {
    const int64_t first = chunk * CHUNK, size = std::min(CHUNK, numel - first);
    const Entry *from = static_cast<const Entry *>(held) + offsets[chunk];
    Entry *to = static_cast<Entry *>(values);
    each_isolated(Words(bits, first, size), first, size, [&](int64_t entry) { to[entry] = *from++; });
  }
  return num_held;
}

template <class Entry>
void mask(void *values, const uint8_t *bits, int64_t numel, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t chunk = 0; chunk < (numel + CHUNK - 1) / CHUNK; chunk++) {
    const int64_t first = chunk * CHUNK, size = std::min(CHUNK, numel - first);
    Entry *to = static_cast<Entry *>(values);
    each_isolated(Words(bits, first, size), first, size, [&](int64_t entry) { to[entry] = 0; });
  }
}

}  // namespace

// entry_bytes  2 or 4
// values       [numel]
// bits         [ceil(numel / 8)]
// held         [num_held] overwritten
// count        overwritten: bits that are set; if these are not `num_held`, nothing else is done
EPI_EXPORT(hold)(int entry_bytes, const void *values, const uint8_t *bits, int64_t numel, void *held, int64_t num_held,
                 int64_t *count, int threads) {
  *count = (entry_bytes == 4 ? hold<uint32_t> : hold<uint16_t>)(values, bits, numel, held, num_held, threads);
}

// values       mutated
EPI_EXPORT(restore)(int entry_bytes, void *values, const uint8_t *bits, int64_t numel, const void *held,
                    int64_t num_held, int64_t *count, int threads) {
  *count = (entry_bytes == 4 ? restore<uint32_t> : restore<uint16_t>)(values, bits, numel, held, num_held, threads);
}

// values       mutated
EPI_EXPORT(mask)(int entry_bytes, void *values, const uint8_t *bits, int64_t numel, int threads) {
  (entry_bytes == 4 ? mask<uint32_t> : mask<uint16_t>)(values, bits, numel, threads);
}

// count        overwritten: bits that are set
EPI_EXPORT(count_bits)(const uint8_t *bits, int64_t num_bytes, int64_t *count, int threads) {
  int64_t found = 0;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(+ : found)
  for (int64_t chunk = 0; chunk < (num_bytes * 8 + CHUNK - 1) / CHUNK; chunk++) {
    const int64_t size = std::min(CHUNK, num_bytes * 8 - chunk * CHUNK);
    const Words mask(bits, chunk * CHUNK, size);
    for (int64_t word = 0; word < (size + 63) / 64; word++) found += __builtin_popcountll(mask.words[word]);
  }
  *count = found;
}
