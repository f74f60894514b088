// S <- d*S + (1-d) * g*g (eq. 5 of arXiv 2604.14010) in one pass over the state; see ../reference/observe.py.

#include <algorithm>

#include "codecs.h"
#include "export.h"

namespace {

struct Update {
  float decay, share, inverse_scale;
};

struct NoGradient {
  typedef uint8_t Entry;
  static constexpr bool IS_ZERO = true;
};

struct Fp32Gradient {
  typedef float Entry;
  static constexpr bool IS_ZERO = false;
  static f32 at(const Entry *gradient) { return load<f32>(gradient); }
};

struct Bf16Gradient {
  typedef uint16_t Entry;
  static constexpr bool IS_ZERO = false;
  static f32 at(const Entry *gradient) { return as<f32>(widen(load<u16>(gradient)) << 16); }
};

// The new values of a whole block, vector by vector.
template <class State, class Gradient>
struct Average {
  const typename State::Code *codes;
  const typename Gradient::Entry *gradient;
  float unit;
  const Update &update;

  f32 operator()(int part) const {
    const f32 decayed = State::decode(codes + part * LANES, unit) * update.decay;
    if constexpr (Gradient::IS_ZERO) {
      return decayed;
    } else {
      const f32 scaled = Gradient::at(gradient + part * LANES) * update.inverse_scale;
      // NaN counts as zero, infinity as the largest finite value.
      const f32 squared = min_of(max_of(scaled * scaled, f32{}), splat(LARGEST));
      return min_of(decayed + squared * update.share, splat(LARGEST));
    }
  }
};

template <class State, class Gradient>
inline float observe_whole(typename State::Code *codes, float scale, const typename Gradient::Entry *gradient,
                           const Update &update, Dither &dither) {
  return State::encode(codes, Average<State, Gradient>{codes, gradient, scale / 65025.0f, update}, dither);
}

// Entries [first, last) of the parameter, all within one block; `codes` and `gradient` begin at `first`.
template <class State, class Gradient>
void observe_block(typename State::Code *codes, float *scale, const typename Gradient::Entry *gradient, int64_t first,
                   int64_t last, const Update &update, uint32_t key, uint16_t phase) {
  const int64_t begin = first / BLOCK * BLOCK, before = first - begin, numel = last - first;
  Dither dither(key, begin, phase);
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
}

template <class State, class Gradient>
void observe(void *codes, float *scales, const void *gradient, int64_t numel, int64_t first_index, const Update &update,
             uint32_t key, uint16_t phase, int threads) {
  typedef typename State::Code Code;
  typedef typename Gradient::Entry Entry;
  const int64_t first_block = first_index / BLOCK, num_blocks = (first_index + numel - 1) / BLOCK - first_block + 1;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t block = 0; block < num_blocks; block++) {
    const int64_t first = std::max(first_index, (first_block + block) * BLOCK);
    const int64_t last = std::min(first_index + numel, (first_block + block + 1) * BLOCK);
    float none = 0;
    const Entry *entries = gradient == nullptr ? nullptr : static_cast<const Entry *>(gradient) + (first - first_index);
    observe_block<State, Gradient>(static_cast<Code *>(codes) + (first - first_index),
                                   scales == nullptr ? &none : scales + block, entries, first, last, update, key, phase);
  }
}

template <class State>
void observe_any(int gradient_format, void *codes, float *scales, const void *gradient, int64_t numel,
                 int64_t first_index, const Update &update, uint32_t key, uint16_t phase, int threads) {
  const auto run = gradient_format == 0   ? observe<State, NoGradient>
                   : gradient_format == 1 ? observe<State, Fp32Gradient>
                                          : observe<State, Bf16Gradient>;
  run(codes, scales, gradient, numel, first_index, update, key, phase, threads);
}

}  // namespace

// state_format     0 fp32, 1 bf16, 2 u16, 3 u8
// codes            [numel]       mutated
// scales           [num_blocks]  mutated; null unless the state is u8
// gradient_format  0 none (a gradient of zero), 1 fp32, 2 bf16
EPI_EXPORT(observe)(int state_format, int gradient_format, void *codes, float *scales, const void *gradient,
                    int64_t numel, int64_t first_index, float decay, float share, float inverse_scale, uint32_t key,
                    uint16_t phase, int threads) {
  const Update update = {decay, share, inverse_scale};
  if (numel == 0) return;
  const auto run = state_format == 0   ? observe_any<Fp32>
                   : state_format == 1 ? observe_any<BF16>
                   : state_format == 2 ? observe_any<U16>
                                       : observe_any<U8>;
  run(gradient_format, codes, scales, gradient, numel, first_index, update, key, phase, threads);
}
