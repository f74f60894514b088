// How often every 16-bit code occurs; see ../reference/code_histogram.py.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "export.h"

namespace {

constexpr int64_t NUM_CODES = 1 << 16;
// Entries that are walked at once, and from how many on tables of their own are worth clearing and adding up.
constexpr int64_t CHUNK = 4096;
constexpr int64_t MANY = 1 << 18;

struct Extremes {
  uint16_t smallest = 0xFFFF, largest = 0;

  void take(const uint16_t *codes, int64_t numel) {
    uint16_t low = smallest, high = largest;
    for (int64_t entry = 0; entry < numel; entry++) {
      low = std::min(low, codes[entry]);
      high = std::max(high, codes[entry]);
    }
    smallest = low;
    largest = high;
  }
};

// Neighbouring codes are often equal, and an addition must not wait for the one before: they go to two tables in turn.
void count(const uint16_t *codes, int64_t numel, uint32_t *even, uint32_t *odd) {
  int64_t entry = 0;
  for (; entry + 4 <= numel; entry += 4) {
    even[codes[entry]]++;
    odd[codes[entry + 1]]++;
    even[codes[entry + 2]]++;
    odd[codes[entry + 3]]++;
  }
  for (; entry < numel; entry++) even[codes[entry]]++;
}

}  // namespace

// bins      [65536]  mutated
// codes     [numel]  at least one, less than 2^32
// extremes  [2]      overwritten: smallest, largest
EPI_EXPORT(code_histogram)(int64_t *bins, const uint16_t *codes, int64_t numel, int64_t *extremes, int threads) {
  Extremes all;
  if (numel < MANY) {
    all.take(codes, numel);
    for (int64_t entry = 0; entry < numel; entry++) bins[codes[entry]]++;
  } else {
#pragma omp parallel num_threads(threads)
    {
      Extremes own;
      std::vector<uint32_t> even(NUM_CODES), odd(NUM_CODES);
#pragma omp for schedule(static)
      for (int64_t first = 0; first < numel; first += CHUNK) {
        const int64_t size = std::min(CHUNK, numel - first);
        own.take(codes + first, size);
        count(codes + first, size, even.data(), odd.data());
      }
#pragma omp critical
      {
        all.smallest = std::min(all.smallest, own.smallest);
        all.largest = std::max(all.largest, own.largest);
        for (int64_t code = 0; code < NUM_CODES; code++) bins[code] += int64_t(even[code]) + odd[code];
      }
    }
  }
  extremes[0] = all.smallest;
  extremes[1] = all.largest;
}
