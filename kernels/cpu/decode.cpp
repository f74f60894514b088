// The values of stored importance as fp32; see ../reference/codecs.py.

#include <algorithm>

#include "codecs.h"
#include "export.h"

namespace {

template <class State>
void decode(const void *codes, const float *scales, float *values, int64_t numel, int64_t first_index, int threads) {
  typedef typename State::Code Code;
  const int64_t first_block = first_index / BLOCK, num_blocks = (first_index + numel - 1) / BLOCK - first_block + 1;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t block = 0; block < num_blocks; block++) {
    const int64_t first = std::max(first_index, (first_block + block) * BLOCK) - first_index;
    const int64_t last = std::min(first_index + numel, (first_block + block + 1) * BLOCK) - first_index;
    const Code *from = static_cast<const Code *>(codes) + first;
    const float unit = scales == nullptr ? 0.0f : scales[block] / 65025.0f;
    int64_t entry = 0;
    for (; entry + LANES <= last - first; entry += LANES)
      store(values + first + entry, State::decode(from + entry, unit));
    if (entry < last - first) {
      Code rest[LANES] = {};
      std::copy_n(from + entry, last - first - entry, rest);
      const f32 decoded = State::decode(rest, unit);
      memcpy(values + first + entry, &decoded, (last - first - entry) * sizeof(float));
    }
  }
}

}  // namespace

// state_format  1 bf16, 2 u16, 3 u8
// codes         [numel]
// scales        [num_blocks]; null unless the state is u8
// values        [numel] overwritten
EPI_EXPORT(decode)(int state_format, const void *codes, const float *scales, float *values, int64_t numel,
                   int64_t first_index, int threads) {
  if (numel == 0) return;
  const auto run = state_format == 1 ? decode<BF16> : state_format == 2 ? decode<U16> : decode<U8>;
  run(codes, scales, values, numel, first_index, threads);
}
