// How many codes are at or above every edge of a grid; see ../reference/sketch_counts.py.

#include <algorithm>
#include <vector>

#include "export.h"
#include "simd.h"

namespace {

constexpr int64_t CHUNK = 4096;
constexpr int BUCKET_BITS = 12;

// Finds the edges that a code reaches. Codes and edges are below 2^31.
class Grid {
 public:
  Grid(const int32_t *edges, int64_t num_edges) : edges_(edges, edges + num_edges), lowest_(edges[0]) {
    const uint32_t span = uint32_t(edges[num_edges - 1] - lowest_);
    while (span >> shift_ >= 1u << BUCKET_BITS) shift_++;
    // Of a bucket of codes: the edges that its smallest one reaches.
    first_.resize((span >> shift_) + 1);
    int64_t reached = 0;
    for (size_t bucket = 0; bucket < first_.size(); bucket++) {
      const int64_t smallest = int64_t(lowest_) + (int64_t(bucket) << shift_);
      while (reached < num_edges && edges_[reached] <= smallest) reached++;
      first_[bucket] = int32_t(reached);
    }
    edges_.push_back(INT32_MAX);
  }

  // `code` is at or above the first edge and below the last.
  int32_t reached(int32_t code) const {
    int32_t edge = first_[uint32_t(code - lowest_) >> shift_];
    while (edges_[edge] <= code) edge++;
    return edge;
  }

 private:
  std::vector<int32_t> edges_;
  std::vector<int32_t> first_;
  int32_t lowest_;
  int shift_ = 0;
};

// Append the codes in [lowest, highest) to `inside`; return how many there are, and add those above to `above`.
int64_t filter(const int32_t *codes, int64_t numel, int32_t lowest, int32_t highest, int32_t *inside, int64_t &above) {
  int64_t found = 0, entry = 0;
#if defined(EPI_AVX512)
  const __m512i low = _mm512_set1_epi32(lowest), high = _mm512_set1_epi32(highest);
  for (; entry + LANES <= numel; entry += LANES) {
    const __m512i chunk = _mm512_loadu_si512(codes + entry);
    const __mmask16 reaches_last = _mm512_cmpge_epi32_mask(chunk, high);
    const __mmask16 is_inside = _mm512_cmpge_epi32_mask(chunk, low) & ~reaches_last;
    above += __builtin_popcount(reaches_last);
    _mm512_storeu_si512(inside + found, _mm512_maskz_compress_epi32(is_inside, chunk));
    found += __builtin_popcount(is_inside);
  }
#endif
  for (; entry < numel; entry++) {
    inside[found] = codes[entry];
    above += codes[entry] >= highest;
    found += codes[entry] >= lowest && codes[entry] < highest;
  }
  return found;
}

}  // namespace

// codes   [numel]      not negative
// edges   [num_edges]  never falling, at least one
// counts  [num_edges]  overwritten
EPI_EXPORT(sketch_counts)(const int32_t *codes, int64_t numel, const int32_t *edges, int64_t num_edges,
                          int64_t *counts, int threads) {
  const int32_t lowest = edges[0], highest = edges[num_edges - 1];
  const Grid grid(edges, num_edges);
  // bins[j] counts the codes that reach exactly the first j edges.
  std::vector<int64_t> bins(num_edges + 1, 0);
#pragma omp parallel num_threads(threads)
  {
    // Neighbouring codes often lie in one bin, and an addition must not wait for the one before.
    std::vector<int64_t> own[2] = {std::vector<int64_t>(num_edges + 1, 0), std::vector<int64_t>(num_edges + 1, 0)};
    int32_t inside[CHUNK + LANES];
    int64_t above = 0;
#pragma omp for schedule(static)
    for (int64_t chunk = 0; chunk < (numel + CHUNK - 1) / CHUNK; chunk++) {
      const int64_t first = chunk * CHUNK, size = std::min(CHUNK, numel - first);
      const int64_t found = filter(codes + first, size, lowest, highest, inside, above);
      int64_t entry = 0;
      for (; entry + 2 <= found; entry += 2) {
        own[0][grid.reached(inside[entry])]++;
        own[1][grid.reached(inside[entry + 1])]++;
      }
      if (entry < found) own[0][grid.reached(inside[entry])]++;
    }
#pragma omp critical
    {
      bins[num_edges] += above;
      for (int64_t bin = 0; bin <= num_edges; bin++) bins[bin] += own[0][bin] + own[1][bin];
    }
  }
  int64_t reaching = 0;
  for (int64_t edge = num_edges - 1; edge >= 0; edge--) counts[edge] = reaching += bins[edge + 1];
}
