#include "sid_loss.h"

#include "gap.h"

namespace diffpp {
namespace DIFFPP_ISA {
namespace {

template <typename E>
void forward(const SidLoss& a, int64_t begin, int64_t end) {
  using T = Wide<E>;
  GapScratch<E> scratch;
  const Chunks chunks(a.outputs.layout);
  const T sid_alpha = static_cast<T>(a.sid_alpha);
  for (int64_t item = begin; item < end; ++item) {
    const Chunk chunk = chunks[item];
    double* const partial = a.partials + 2 * item;
    partial[0] = partial[1] = 0.0;
    with_gap_runs(a.outputs, chunk, true, scratch, [&](const auto runs) {
      for (int64_t start = 0; start < chunk.n; start += kSumRun) {
        const int64_t stop = smaller(start + kSumRun, chunk.n);
        T product = 0, residual_abs = 0;
#pragma omp simd reduction(+ : product, residual_abs)
        for (int64_t i = start; i < stop; ++i) {
          const T d = runs.gap(i);
          const T r = runs.residual(i);
          product += d * madd(-sid_alpha, d, r);
          residual_abs += magnitude(r);
        }
        partial[0] += static_cast<double>(product);
        partial[1] += static_cast<double>(residual_abs);
      }
    });
  }
}

// |k|, the size of a difference of implied x0 per size of a difference of outputs.
inline double gap_size(const Target& target, int64_t b) {
  if (target.prediction == Prediction::sample) return 1.0;
  const double sigma = number<double>(target.sigma, b);
  return magnitude(target.prediction == Prediction::epsilon ? sigma / number<double>(target.alpha, b) : sigma);
}

template <typename E>
void backward(const SidGradient& a, int64_t begin, int64_t end) {
  using T = Wide<E>;
  GapScratch<E> scratch;
  const Chunks chunks(a.outputs.layout);
  for (int64_t item = begin; item < end; ++item) {
    const Chunk chunk = chunks[item];
    const T outer = number<T>(a.grad_output, chunk.b) * number<T>(a.factor, chunk.b);
    route_gradients(a.outputs, a.gradients, chunk, outer, static_cast<T>(2.0 * a.sid_alpha), scratch);
  }
}

}  // namespace

void sid_loss_forward(const SidLoss& a, int64_t begin, int64_t end) {
  by_elements(a.outputs.dtype, [&](auto element) { forward<decltype(element)>(a, begin, end); });
}

void sid_loss_combine(const SidLoss& a, int64_t begin, int64_t end) {
  const Chunks chunks(a.outputs.layout);
  for (int64_t b = begin; b < end; ++b) {
    double product = 0.0, residual_abs = 0.0;
    for (int64_t c = 0; c < chunks.per_sample; ++c) {
      const double* partial = a.partials + 2 * (b * chunks.per_sample + c);
      product += partial[0];
      residual_abs += partial[1];
    }
    const double mean = residual_abs / static_cast<double>(chunks.sample);
    const double factor = gap_size(a.outputs.target, b) / (mean < kMeanAbsFloor ? kMeanAbsFloor : mean);
    put(a.loss, a.outputs.dtype, b, factor * product);
    put(a.factor, a.outputs.dtype, b, factor);
  }
}

void sid_loss_backward(const SidGradient& a, int64_t begin, int64_t end) {
  by_elements(a.outputs.dtype, [&](auto element) { backward<decltype(element)>(a, begin, end); });
}

}  // namespace DIFFPP_ISA
}  // namespace diffpp
