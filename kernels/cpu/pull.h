// target <- source + factor * (w - a), whatever the factor of an entry is; see ../reference/pull.py.
#pragma once

#include <algorithm>

#include "simd.h"

namespace {

constexpr int64_t PULL_CHUNK = 4096;

inline f32 anchor_at(const float *anchor) { return load<f32>(anchor); }
inline f32 anchor_at(const uint16_t *anchor) { return as<f32>(widen(load<u16>(anchor)) << 16); }

// A `Factor` says what factors are: `at(entry)` those of the LANES entries that begin there, `of(entry)` that of one,
// and `from(entry)` all of those from there on.
struct FactorOfEach {
  const float *factors;
  FactorOfEach from(int64_t entry) const { return {factors + entry}; }
  f32 at(int64_t entry) const { return load<f32>(factors + entry); }
  float of(int64_t entry) const { return factors[entry]; }
};

template <class Anchor, class Factor>
inline void pull_lanes(float *target, const float *source, const float *weights, const Anchor *anchor,
                       const Factor &factor, int64_t entry) {
  const f32 moved = load<f32>(weights + entry) - anchor_at(anchor + entry);
  store(target + entry, load<f32>(source + entry) + moved * factor.at(entry));
}

template <class Anchor, class Factor>
void pull_chunk(float *target, const float *source, const float *weights, const Anchor *anchor, const Factor &factor,
                int64_t numel) {
  int64_t entry = 0;
  for (; entry + LANES <= numel; entry += LANES) pull_lanes(target, source, weights, anchor, factor, entry);
  if (entry == numel) return;
  // What is left over, in lanes of its own: beside it is other memory.
  const int64_t left = numel - entry;
  float to[LANES] = {}, of[LANES] = {}, factors[LANES] = {};
  Anchor from[LANES] = {};
  std::copy_n(source + entry, left, to);
  std::copy_n(weights + entry, left, of);
  std::copy_n(anchor + entry, left, from);
  for (int64_t lane = 0; lane < left; lane++) factors[lane] = factor.of(entry + lane);
  pull_lanes(to, to, of, from, FactorOfEach{factors}, 0);
  std::copy_n(to, left, target + entry);
}

template <class Anchor, class Factor>
void pull(float *target, const float *source, const float *weights, const void *anchor, const Factor &factor,
          int64_t numel, int threads) {
  const Anchor *from = static_cast<const Anchor *>(anchor);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t chunk = 0; chunk < (numel + PULL_CHUNK - 1) / PULL_CHUNK; chunk++) {
    const int64_t first = chunk * PULL_CHUNK;
    pull_chunk(target + first, source + first, weights + first, from + first, factor.from(first),
               std::min(PULL_CHUNK, numel - first));
  }
}

// By the format of the anchor: 1 fp32, 2 bf16.
template <class Factor>
void pull(int anchor_format, float *target, const float *source, const float *weights, const void *anchor,
          const Factor &factor, int64_t numel, int threads) {
  (anchor_format == 1 ? pull<float, Factor> : pull<uint16_t, Factor>)(target, source, weights, anchor, factor, numel,
                                                                      threads);
}

}  // namespace
