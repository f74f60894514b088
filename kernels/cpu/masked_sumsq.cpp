// The squares of a gradient, with and without its isolated entries; see ../reference/masked_sumsq.py.
//
// Sums are made in one order, whatever the instruction set and the number of threads: of the entries of a chunk whose
// index has the same remainder by 16, of these 16, and of the chunks.

#include <vector>

#include "export.h"
#include "mask_bits.h"
#include "simd.h"

namespace {

// As many fp64 lanes as one register has.
constexpr int HALF = LANES / 2;
constexpr int CHAINS = 16 / HALF;
typedef float f32_half __attribute__((vector_size(4 * HALF)));
typedef uint32_t u32_half __attribute__((vector_size(4 * HALF)));
typedef uint16_t u16_half __attribute__((vector_size(2 * HALF)));
typedef double f64 __attribute__((vector_size(8 * HALF)));
typedef int64_t i64 __attribute__((vector_size(8 * HALF)));

struct Fp32 {
  typedef float Entry;
  static f64 at(const Entry *values) { return __builtin_convertvector(load<f32_half>(values), f64); }
};

struct BF16 {
  typedef uint16_t Entry;
  static f64 at(const Entry *values) {
    const u32_half patterns = __builtin_convertvector(load<u16_half>(values), u32_half) << 16;
    return __builtin_convertvector(as<f32_half>(patterns), f64);
  }
};

struct Sums {
  double all = 0, plastic = 0;
};

template <class Value>
Sums sums_of(const typename Value::Entry *values, int64_t numel, const Words &mask) {
  typename Value::Entry rest[16];
  i64 lane_bits;
  for (int lane = 0; lane < HALF; lane++) lane_bits[lane] = int64_t(1) << lane;
  f64 all[CHAINS] = {}, plastic[CHAINS] = {};
  for (int64_t entry = 0; entry < numel; entry += 16) {
    const typename Value::Entry *from = values + entry;
    if (numel - entry < 16) {
      memset(rest, 0, sizeof rest);
      std::copy_n(from, numel - entry, rest);
      from = rest;
    }
    const int64_t isolated = mask.words[entry >> 6] >> (entry & 63);
    for (int chain = 0; chain < CHAINS; chain++) {
      const f64 value = Value::at(from + chain * HALF), square = value * value;
      all[chain] += square;
      const i64 moves = ((i64{} + (isolated >> (chain * HALF))) & lane_bits) == 0;
      plastic[chain] += as<f64>(as<i64>(square) & moves);
    }
  }
  Sums sums;
  for (int chain = 0; chain < CHAINS; chain++)
    for (int lane = 0; lane < HALF; lane++) {
      sums.all += all[chain][lane];
      sums.plastic += plastic[chain][lane];
    }
  return sums;
}

template <class Value>
void masked_sumsq(const void *values, int64_t numel, const uint8_t *bits, int64_t first_entry, double *result,
                  int threads) {
  std::vector<Sums> chunks((numel + CHUNK - 1) / CHUNK);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t chunk = 0; chunk < int64_t(chunks.size()); chunk++) {
    const int64_t first = chunk * CHUNK, size = std::min(CHUNK, numel - first);
    chunks[chunk] = sums_of<Value>(static_cast<const typename Value::Entry *>(values) + first, size,
                                   Words(bits, first_entry + first, size));
  }
  Sums total;
  for (const Sums &sums : chunks) {
    total.all += sums.all;
    total.plastic += sums.plastic;
  }
  result[0] = total.all;
  result[1] = total.plastic;
}

}  // namespace

// value_format  1 fp32, 2 bf16
// values        [numel]
// bits          mask, of which entry `first_entry` is that of the first value
// result        [2] overwritten: of all entries, of those that are not isolated
EPI_EXPORT(masked_sumsq)(int value_format, const void *values, int64_t numel, const uint8_t *bits, int64_t first_entry,
                         double *result, int threads) {
  (value_format == 1 ? masked_sumsq<Fp32> : masked_sumsq<BF16>)(values, numel, bits, first_entry, result, threads);
}
