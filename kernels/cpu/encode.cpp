// Values into the formats of importance; see ../reference/codecs.py.

#include <algorithm>

#include "codecs.h"
#include "export.h"

namespace {

struct Given {
  const float *values;
  f32 operator()(int part) const { return load<f32>(values + part * LANES); }
  f32 unbounded(int part) const { return (*this)(part); }
};

template <class State>
void encode(void *codes, float *scales, const float *values, int64_t numel, int64_t first_index, uint32_t key,
            uint16_t phase, int threads) {
  typedef typename State::Code Code;
  const int64_t first_block = first_index / BLOCK, num_blocks = (first_index + numel - 1) / BLOCK - first_block + 1;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t block = 0; block < num_blocks; block++) {
    const int64_t begin = (first_block + block) * BLOCK;
    const int64_t first = std::max(first_index, begin), last = std::min(first_index + numel, begin + BLOCK);
    // A cut block is padded with zeros, which change nothing, not even its largest value.
    float padded[BLOCK] = {};
    std::copy_n(values + (first - first_index), last - first, padded + (first - begin));
    Code whole[BLOCK];
    Dither dither(key, begin, phase);
    const float scale = State::encode(whole, Given{padded}, dither);
    std::copy_n(whole + (first - begin), last - first, static_cast<Code *>(codes) + (first - first_index));
    if (scales != nullptr) scales[block] = scale;
  }
}

}  // namespace

// state_format  1 bf16, 2 u16, 3 u8
// codes         [numel]       overwritten
// scales        [num_blocks]  overwritten; null unless the state is u8
// values        [numel]       finite, not negative
EPI_EXPORT(encode)(int state_format, void *codes, float *scales, const float *values, int64_t numel,
                   int64_t first_index, uint32_t key, uint16_t phase, int threads) {
  if (numel == 0) return;
  const auto run = state_format == 1 ? encode<BF16> : state_format == 2 ? encode<U16> : encode<U8>;
  run(codes, scales, values, numel, first_index, key, phase, threads);
}
