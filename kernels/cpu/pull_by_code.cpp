// target <- source + factors[code] * (w - a); see ../reference/pull_by_code.py.
//
// A table is 256 kB, but the codes of importance lie close together: what is read of it stays in the first cache. There
// loads of single entries are faster than gathers, which take several microoperations an entry on many processors.

#include "export.h"
#include "pull.h"

namespace {

constexpr int64_t NUM_CODES = 1 << 16;

inline f32 looked_up(const float *factors, const uint16_t *codes) {
  f32 found;
  for (int lane = 0; lane < LANES; lane++) found[lane] = factors[codes[lane]];
  return found;
}

inline i32 size_of(f32 v) { return as<i32>(v) & 0x7FFFFFFF; }

// What lies further from zero. The order of patterns without their sign is that of sizes.
inline f32 stronger_of(f32 a, f32 b) { return size_of(b) > size_of(a) ? b : a; }
inline float stronger_of(float a, float b) { return std::fabs(b) > std::fabs(a) ? b : a; }

struct FactorOfCode {
  const uint16_t *codes;
  const float *factors;
  FactorOfCode from(int64_t entry) const { return {codes + entry, factors}; }
  f32 at(int64_t entry) const { return looked_up(factors, codes + entry); }
  float of(int64_t entry) const { return factors[codes[entry]]; }
};

struct StrongestOfCodes {
  const uint16_t *const *codes;
  const float *factors;
  int num_tables;
  int64_t first;
  StrongestOfCodes from(int64_t entry) const { return {codes, factors, num_tables, first + entry}; }
  f32 at(int64_t entry) const {
    f32 strongest = looked_up(factors, codes[0] + first + entry);
    for (int table = 1; table < num_tables; table++)
      strongest = stronger_of(strongest, looked_up(factors + table * NUM_CODES, codes[table] + first + entry));
    return strongest;
  }
  float of(int64_t entry) const {
    float strongest = factors[codes[0][first + entry]];
    for (int table = 1; table < num_tables; table++)
      strongest = stronger_of(strongest, factors[table * NUM_CODES + codes[table][first + entry]]);
    return strongest;
  }
};

}  // namespace

// anchor_format  1 fp32, 2 bf16
// target         [numel] fp32, mutated; may be `weights`
// source         [numel] fp32; may be `target`
// weights        [numel] fp32
// anchor         [numel]
// codes          [num_tables][numel]
// factors        [num_tables, 65536] fp32
// num_tables     at least 1
EPI_EXPORT(pull_by_code)(int anchor_format, float *target, const float *source, const float *weights,
                         const void *anchor, const uint16_t *const *codes, const float *factors, int num_tables,
                         int64_t numel, int threads) {
  if (num_tables == 1)
    pull(anchor_format, target, source, weights, anchor, FactorOfCode{codes[0], factors}, numel, threads);
  else
    pull(anchor_format, target, source, weights, anchor, StrongestOfCodes{codes, factors, num_tables, 0}, numel,
         threads);
}
