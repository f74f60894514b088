// target <- target + factor * (w - a); see ../reference/pull.py.

#include <algorithm>

#include "export.h"
#include "simd.h"

namespace {

constexpr int64_t CHUNK = 4096;

inline f32 anchor_at(const float *anchor) { return load<f32>(anchor); }
inline f32 anchor_at(const uint16_t *anchor) { return as<f32>(widen(load<u16>(anchor)) << 16); }

struct OneFactor {
  float factor;
  OneFactor from(int64_t) const { return *this; }
  f32 at(int64_t) const { return splat(factor); }
  float of(int64_t) const { return factor; }
};

struct FactorOfEach {
  const float *factors;
  FactorOfEach from(int64_t entry) const { return {factors + entry}; }
  f32 at(int64_t entry) const { return load<f32>(factors + entry); }
  float of(int64_t entry) const { return factors[entry]; }
};

template <class Anchor, class Factor>
inline void pull_lanes(float *target, const float *weights, const Anchor *anchor, const Factor &factor, int64_t entry) {
  const f32 moved = load<f32>(weights + entry) - anchor_at(anchor + entry);
  store(target + entry, load<f32>(target + entry) + moved * factor.at(entry));
}

template <class Anchor, class Factor>
void pull_chunk(float *target, const float *weights, const Anchor *anchor, const Factor &factor, int64_t numel) {
  int64_t entry = 0;
  for (; entry + LANES <= numel; entry += LANES) pull_lanes(target, weights, anchor, factor, entry);
  if (entry == numel) return;
  // What is left over, in lanes of its own: beside it is other memory.
  const int64_t left = numel - entry;
  float to[LANES] = {}, of[LANES] = {}, factors[LANES] = {};
  Anchor from[LANES] = {};
  std::copy_n(target + entry, left, to);
  std::copy_n(weights + entry, left, of);
  std::copy_n(anchor + entry, left, from);
  for (int64_t lane = 0; lane < left; lane++) factors[lane] = factor.of(entry + lane);
  pull_lanes(to, of, from, FactorOfEach{factors}, 0);
  std::copy_n(to, left, target + entry);
}

template <class Anchor, class Factor>
void pull(float *target, const float *weights, const void *anchor, const Factor &factor, int64_t numel, int threads) {
  const Anchor *from = static_cast<const Anchor *>(anchor);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t chunk = 0; chunk < (numel + CHUNK - 1) / CHUNK; chunk++) {
    const int64_t first = chunk * CHUNK;
    pull_chunk(target + first, weights + first, from + first, factor.from(first), std::min(CHUNK, numel - first));
  }
}

}  // namespace

// anchor_format  1 fp32, 2 bf16
// target         [numel] fp32, mutated; may be `weights`
// weights        [numel] fp32
// anchor         [numel]
// factors        [numel] fp32; null where `factor` is that of all
EPI_EXPORT(pull)(int anchor_format, float *target, const float *weights, const void *anchor, const float *factors,
                 float factor, int64_t numel, int threads) {
  if (factors == nullptr)
    (anchor_format == 1 ? pull<float, OneFactor> : pull<uint16_t, OneFactor>)(target, weights, anchor, {factor}, numel,
                                                                              threads);
  else
    (anchor_format == 1 ? pull<float, FactorOfEach> : pull<uint16_t, FactorOfEach>)(target, weights, anchor, {factors},
                                                                                    numel, threads);
}
