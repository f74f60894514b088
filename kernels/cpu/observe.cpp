// S <- d*S + (1-d) * g*g (eq. 5 of arXiv 2604.14010), and unscaling of the gradient; see ../reference/observe.py.

#include <algorithm>

#include "codecs.h"
#include "export.h"

namespace {

struct Update {
  float decay, share, inverse_scale, rescale;
  uint16_t phase;
};

// What a gradient is read from; `RESCALES` where it is also multiplied in place.
struct NoGradient {
  typedef uint8_t Entry;
  static constexpr bool IS_ZERO = true, RESCALES = false;
};

struct Fp32Gradient {
  typedef float Entry;
  static constexpr bool IS_ZERO = false, RESCALES = false;
  static f32 at(const Entry *gradient) { return load<f32>(gradient); }
};

struct RescaledGradient : Fp32Gradient {
  static constexpr bool RESCALES = true;
};

struct Bf16Gradient {
  typedef uint16_t Entry;
  static constexpr bool IS_ZERO = false, RESCALES = false;
  static f32 at(const Entry *gradient) { return as<f32>(widen(load<u16>(gradient)) << 16); }
};

// The new values of a whole block. Where each is asked for once, its gradient is rescaled on the way.
template <class State, class Gradient>
struct Average {
  static constexpr bool RESCALES = Gradient::RESCALES && State::ASKS_ONCE;
  const typename State::Code *codes;
  typename Gradient::Entry *gradient;
  float unit;
  const Update update;

  f32 operator()(int part) const {
    const f32 decayed = State::decode(codes + part * LANES, unit) * update.decay;
    if constexpr (Gradient::IS_ZERO) {
      return decayed;
    } else {
      const f32 raw = Gradient::at(gradient + part * LANES);
      if constexpr (RESCALES) store(gradient + part * LANES, raw * update.rescale);
      // NaN counts as zero, infinity as the largest finite value.
      const f32 squared = min_of(max_of(square(raw), f32{}), splat(LARGEST));
      return min_of(decayed + squared * update.share, splat(LARGEST));
    }
  }

  // The same where all is finite, else infinity or NaN somewhere in the block.
  f32 unbounded(int part) const {
    const f32 decayed = State::decode_unbounded(codes + part * LANES, unit) * update.decay;
    if constexpr (Gradient::IS_ZERO) {
      return decayed;
    } else {
      return decayed + square(Gradient::at(gradient + part * LANES)) * update.share;
    }
  }

 private:
  f32 square(f32 raw) const {
    const f32 scaled = raw * update.inverse_scale;
    return scaled * scaled;
  }
};

template <class State, class Gradient>
inline float observe_whole(typename State::Code *codes, float scale, typename Gradient::Entry *gradient,
                           const Update &update, Dither &dither) {
  const Average<State, Gradient> average = {codes, gradient, scale / 65025.0f, update};
  const float updated = State::encode(codes, average, dither);
  if constexpr (Gradient::RESCALES && !average.RESCALES)
    for (int part = 0; part < BLOCK / LANES; part++)
      store(gradient + part * LANES, Gradient::at(gradient + part * LANES) * update.rescale);
  return updated;
}

// Entries [first, last) of the parameter, all within one block; `codes` and `gradient` begin at `first`.
template <class State, class Gradient>
void observe_block(typename State::Code *codes, float *scale, typename Gradient::Entry *gradient, int64_t first,
                   int64_t last, const Update &update, uint32_t key) {
  const int64_t begin = first / BLOCK * BLOCK, before = first - begin, numel = last - first;
  Dither dither(key, begin, update.phase);
  if (numel == BLOCK) {
    *scale = observe_whole<State, Gradient>(codes, *scale, gradient, update, dither);
    return;
  }
  // A cut block is padded with zeros, which change nothing, not even its largest value.
  typename State::Code whole[BLOCK] = {};
  typename Gradient::Entry entries[BLOCK] = {};
  std::copy_n(codes, numel, whole + before);
  if (gradient != nullptr) std::copy_n(gradient, numel, entries + before);
  *scale = observe_whole<State, Gradient>(whole, *scale, entries, update, dither);
  std::copy_n(whole + before, numel, codes);
  if constexpr (Gradient::RESCALES) std::copy_n(entries + before, numel, gradient);
}

// A row of the table; see ../reference/runs.py.
struct Run {
  int64_t first_tile, start, numel, first_code, first_block, first_index, key;
};
constexpr int64_t TILE = 4096;

template <class State, class Gradient>
void observe_tile(void *codes, float *scales, void *gradient, const Run &run, int64_t tile, const Update &update) {
  typedef typename Gradient::Entry Entry;
  const int64_t begin = (run.first_index / TILE + tile - run.first_tile) * TILE;
  const int64_t first = std::max(run.first_index, begin), last = std::min(run.first_index + run.numel, begin + TILE);
  Entry *entries = static_cast<Entry *>(gradient);
  if (entries != nullptr) entries += run.start + (first - run.first_index);
  if (run.first_code < 0) {
    if constexpr (Gradient::RESCALES)
      for (int64_t entry = 0; entry < last - first; entry++) entries[entry] *= update.rescale;
    return;
  }
  typename State::Code *own = static_cast<typename State::Code *>(codes) + run.first_code + (first - run.first_index);
  float none = 0;
  for (int64_t block_first = first; block_first < last;) {
    const int64_t block = block_first / BLOCK, block_last = std::min(last, (block + 1) * BLOCK);
    float *scale = scales == nullptr ? &none : scales + run.first_block + (block - run.first_index / BLOCK);
    observe_block<State, Gradient>(own + (block_first - first), scale,
                                   entries == nullptr ? nullptr : entries + (block_first - first), block_first,
                                   block_last, update, uint32_t(run.key));
    block_first = block_last;
  }
}

template <class State, class Gradient>
void observe(void *codes, float *scales, void *gradient, const Run *runs, int64_t num_runs, const Update &update,
             int threads) {
  const Run &last = runs[num_runs - 1];
  const int64_t num_tiles =
      last.first_tile + (last.first_index + last.numel - 1) / TILE - last.first_index / TILE + 1;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t tile = 0; tile < num_tiles; tile++) {
    const auto behind = [](int64_t number, const Run &run) { return number < run.first_tile; };
    const Run &run = *(std::upper_bound(runs, runs + num_runs, tile, behind) - 1);
    observe_tile<State, Gradient>(codes, scales, gradient, run, tile, update);
  }
}

template <class State>
void observe_any(int gradient_format, void *codes, float *scales, void *gradient, const Run *runs, int64_t num_runs,
                 const Update &update, int threads) {
  const auto run = gradient_format == 0   ? observe<State, NoGradient>
                   : gradient_format == 2 ? observe<State, Bf16Gradient>
                   : update.rescale == 1  ? observe<State, Fp32Gradient>
                                          : observe<State, RescaledGradient>;
  run(codes, scales, gradient, runs, num_runs, update, threads);
}

}  // namespace

// state_format     0 fp32, 1 bf16, 2 u16, 3 u8
// codes            mutated
// scales           mutated; null unless the state is u8
// gradient_format  0 none (a gradient of zero), 1 fp32, 2 bf16
// gradient         mutated unless `rescale` is 1, then fp32
// runs             [num_runs] in the order of their first tiles
EPI_EXPORT(observe)(int state_format, int gradient_format, void *codes, float *scales, void *gradient,
                    const int64_t *runs, int64_t num_runs, float decay, float share, float inverse_scale,
                    float rescale, uint16_t phase, int threads) {
  const Update update = {decay, share, inverse_scale, rescale, phase};
  if (num_runs == 0) return;
  const auto run = state_format == 0   ? observe_any<Fp32>
                   : state_format == 1 ? observe_any<BF16>
                   : state_format == 2 ? observe_any<U16>
                                       : observe_any<U8>;
  run(gradient_format, codes, scales, gradient, reinterpret_cast<const Run *>(runs), num_runs, update, threads);
}
