// target <- source + factor * (w - a); see ../reference/pull.py.

#include "export.h"
#include "pull.h"

namespace {

struct OneFactor {
  float factor;
  OneFactor from(int64_t) const { return *this; }
  f32 at(int64_t) const { return splat(factor); }
  float of(int64_t) const { return factor; }
};

}  // namespace

// anchor_format  1 fp32, 2 bf16
// target         [numel] fp32, mutated; may be `weights`
// source         [numel] fp32; may be `target`
// weights        [numel] fp32
// anchor         [numel]
// factors        [numel] fp32; null where `factor` is that of all
EPI_EXPORT(pull)(int anchor_format, float *target, const float *source, const float *weights, const void *anchor,
                 const float *factors, float factor, int64_t numel, int threads) {
  if (factors == nullptr)
    pull(anchor_format, target, source, weights, anchor, OneFactor{factor}, numel, threads);
  else
    pull(anchor_format, target, source, weights, anchor, FactorOfEach{factors}, numel, threads);
}
