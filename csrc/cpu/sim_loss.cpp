#include "sim_loss.h"

#include "gap.h"

namespace diffpp {
namespace DIFFPP_ISA {
namespace {

template <typename E>
void forward(const SimLoss& a, int64_t begin, int64_t end) {
  using T = Wide<E>;
  GapScratch<E> scratch;
  const Chunks chunks(a.outputs.layout);
  for (int64_t item = begin; item < end; ++item) {
    const Chunk chunk = chunks[item];
    double* const partial = a.partials + 2 * item;
    partial[0] = partial[1] = 0.0;
    with_gap_runs(a.outputs, chunk, true, scratch, [&](const auto runs) {
      for (int64_t start = 0; start < chunk.n; start += kSumRun) {
        const int64_t stop = smaller(start + kSumRun, chunk.n);
        T gap_sq = 0, excess = 0;
#pragma omp simd reduction(+ : gap_sq, excess)
        for (int64_t i = start; i < stop; ++i) {
          const T d = runs.gap(i);
          gap_sq += d * d;
          excess += d * (runs.residual(i) - d);
        }
        partial[0] += static_cast<double>(gap_sq);
        partial[1] += static_cast<double>(excess);
      }
    });
  }
}

// m, the size of a difference of scores per size of a difference of outputs.
inline double score_scale(const Target& target, int64_t b) {
  const double sigma = number<double>(target.sigma, b);
  if (target.prediction == Prediction::epsilon) return 1.0 / sigma;
  const double alpha = number<double>(target.alpha, b);
  return target.prediction == Prediction::sample ? alpha / (sigma * sigma) : alpha / sigma;
}

template <typename E>
void backward(const SimGradient& a, int64_t begin, int64_t end) {
  using T = Wide<E>;
  GapScratch<E> scratch;
  const Chunks chunks(a.outputs.layout);
  for (int64_t item = begin; item < end; ++item) {
    const Chunk chunk = chunks[item];
    const T outer = number<T>(a.grad_output, chunk.b) * number<T>(a.factor, chunk.b);
    route_gradients(a.outputs, a.gradients, chunk, outer, T(2) + number<T>(a.shrink, chunk.b), scratch);
  }
}

}  // namespace

void sim_loss_forward(const SimLoss& a, int64_t begin, int64_t end) {
  by_elements(a.outputs.dtype, [&](auto element) { forward<decltype(element)>(a, begin, end); });
}

void sim_loss_combine(const SimLoss& a, int64_t begin, int64_t end) {
  const Chunks chunks(a.outputs.layout);
  for (int64_t b = begin; b < end; ++b) {
    double gap_sq = 0.0, excess = 0.0;
    for (int64_t c = 0; c < chunks.per_sample; ++c) {
      const double* partial = a.partials + 2 * (b * chunks.per_sample + c);
      gap_sq += partial[0];
      excess += partial[1];
    }
    const double m = score_scale(a.outputs.target, b);
    const double norm = root(m * m * gap_sq + a.huber_c * a.huber_c);
    const double factor = m * m / norm;
    put(a.loss, a.outputs.dtype, b, factor * excess);
    put(a.factor, a.outputs.dtype, b, factor);
    put(a.shrink, a.outputs.dtype, b, factor * excess / norm);
  }
}

void sim_loss_backward(const SimGradient& a, int64_t begin, int64_t end) {
  by_elements(a.outputs.dtype, [&](auto element) { backward<decltype(element)>(a, begin, end); });
}

}  // namespace DIFFPP_ISA
}  // namespace diffpp
