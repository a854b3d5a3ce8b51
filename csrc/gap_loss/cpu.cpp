#include "../common/cpu_noise.h"
#include "arguments.h"

namespace diffpp::gap_loss::DIFFPP_ISA {
namespace {

// The share of a chunk or a sample in the loss: Q and, for the factor, sum |r| of SiD or sum d^2 of SIM.
struct Sums {
  double product = 0.0;
  double size = 0.0;
};

struct Stages : Forward {
  Sums* partials;  // of the chunks
};

template <Kind kind, typename E>
void sums(const Stages& a, int64_t begin, int64_t end) {
  using T = Wide<E>;
  GapScratch<E> scratch;
  const Chunks chunks(a.outputs.layout);
  const T slope = kind == Kind::sid ? static_cast<T>(a.option) : T(1);
  for (int64_t item = begin; item < end; ++item) {
    const Chunk chunk = chunks[item];
    Sums total;
    with_gap_runs(a.outputs, chunk, true, scratch, [&](const auto runs) {
      for (int64_t start = 0; start < chunk.n; start += kSumRun) {
        const int64_t stop = smaller(start + kSumRun, chunk.n);
        T product = 0, size = 0;
#pragma omp simd reduction(+ : product, size)
        for (int64_t i = start; i < stop; ++i) {
          const T d = runs.gap(i);
          const T r = runs.residual(i);
          product += d * madd(-slope, d, r);
          size += kind == Kind::sid ? magnitude(r) : d * d;
        }
        total.product += static_cast<double>(product);
        total.size += static_cast<double>(size);
      }
    });
    a.partials[item] = total;
  }
}

// |k|, the size of a difference of implied x0 per size of a difference of outputs.
inline double gap_size(const Target& target, int64_t b) {
  if (target.prediction == Prediction::sample) return 1.0;
  const double sigma = number<double>(target.sigma, b);
  return magnitude(target.prediction == Prediction::epsilon ? sigma / number<double>(target.alpha, b) : sigma);
}

// m, the size of a difference of scores per size of a difference of outputs.
inline double score_scale(const Target& target, int64_t b) {
  const double sigma = number<double>(target.sigma, b);
  if (target.prediction == Prediction::epsilon) return 1.0 / sigma;
  const double alpha = number<double>(target.alpha, b);
  return target.prediction == Prediction::sample ? alpha / (sigma * sigma) : alpha / sigma;
}

inline void combine(const Stages& a) {
  const Chunks chunks(a.outputs.layout);
  const Dtype dtype = a.outputs.dtype;
  for (int64_t b = 0; b < a.outputs.layout.batch; ++b) {
    Sums total;
    for (int64_t c = b * chunks.per_sample; c < (b + 1) * chunks.per_sample; ++c) {
      total.product += a.partials[c].product;
      total.size += a.partials[c].size;
    }
    double scale, norm;
    if (a.kind == Kind::sid) {
      const double mean = total.size / static_cast<double>(chunks.sample);
      scale = gap_size(a.outputs.target, b);
      norm = mean < kMeanAbsFloor ? kMeanAbsFloor : mean;
    } else {
      const double m = score_scale(a.outputs.target, b);
      scale = m * m;
      norm = root(scale * total.size + a.option * a.option);
    }
    const double factor = scale / norm;
    put(a.loss, dtype, b, factor * total.product);
    put(a.factor, dtype, b, factor);
    if (a.kind == Kind::sim) put(a.shrink, dtype, b, factor * total.product / norm);
  }
}

// do*/dx0 of a sample.
template <typename T>
inline T target_slope(const Target& a, int64_t b) {
  switch (a.prediction) {
    case Prediction::epsilon: return T(0);
    case Prediction::v_prediction: return -number<T>(a.sigma, b);
    case Prediction::flow_prediction: return T(-1);
    default: return T(1);
  }
}

// The gradients of a chunk where dL/dd = outer (r - curvature d) and dL/dr = outer d: d = o_g - fake, r = o_g - o*,
// o_g = w cond + (1 - w) uncond, and o* moves with x0. One loop writes all of them, so that reads and writes of memory
// overlap; one that is not needed goes to the scratch.
template <typename E, typename T>
inline void route_gradients(
    const Backward& to, const Chunk& chunk, T outer, T curvature, GapScratch<E>& scratch, E* x0_scratch) {
  const Outputs& a = to.outputs;
  const auto destination_of = [&](void* array, E* otherwise) {
    return array == nullptr ? otherwise : destination(array, a.dtype, chunk.offset, otherwise);
  };
  E* const fake = destination_of(to.grad_fake, scratch.fake);
  E* const cond = destination_of(to.grad_cond, scratch.cond);
  E* const uncond = destination_of(to.grad_uncond, scratch.uncond);
  E* const x0 = destination_of(to.grad_x0, x0_scratch);
  const T w = a.uncond == nullptr ? T(1) : static_cast<T>(a.guidance_scale);
  const T slope = target_slope<T>(a.target, chunk.b);
  with_gap_runs(a, chunk, true, scratch, [&](const auto runs) {
#pragma omp simd
    for (int64_t i = 0; i < chunk.n; ++i) {
      const T d = runs.gap(i);
      const T through_residual = outer * d;
      const T through_gap = outer * madd(-curvature, d, runs.residual(i));
      const T through_guided = through_gap + through_residual;
      narrow(-through_gap, fake[i]);
      narrow(w * through_guided, cond[i]);
      narrow((T(1) - w) * through_guided, uncond[i]);
      narrow(-slope * through_residual, x0[i]);
    }
  });
  if (to.grad_fake != nullptr) store(fake, to.grad_fake, a.dtype, chunk.offset, chunk.n);
  if (to.grad_cond != nullptr) store(cond, to.grad_cond, a.dtype, chunk.offset, chunk.n);
  if (to.grad_uncond != nullptr) store(uncond, to.grad_uncond, a.dtype, chunk.offset, chunk.n);
  if (to.grad_x0 != nullptr) store(x0, to.grad_x0, a.dtype, chunk.offset, chunk.n);
}

template <typename E>
void gradients(const Backward& a, int64_t begin, int64_t end) {
  using T = Wide<E>;
  GapScratch<E> scratch;
  alignas(64) E x0_scratch[kChunk];
  const Chunks chunks(a.outputs.layout);
  for (int64_t item = begin; item < end; ++item) {
    const Chunk chunk = chunks[item];
    const T outer = number<T>(a.grad_output, chunk.b) * number<T>(a.factor, chunk.b);
    const T curvature = static_cast<T>(a.curvature) + number<T>(a.shrink, chunk.b);
    route_gradients(a, chunk, outer, curvature, scratch, x0_scratch);
  }
}

}  // namespace

void forward(const Forward& arguments, const Pool& pool) {
  const int64_t chunks = Chunks(arguments.outputs.layout).count;
  const Memory partials(chunks * static_cast<int64_t>(sizeof(Sums)));
  const Stages a{arguments, static_cast<Sums*>(partials.at(0))};
  by_elements(a.outputs.dtype, [&](auto element) {
    using E = decltype(element);
    run(pool, a.kind == Kind::sid ? sums<Kind::sid, E> : sums<Kind::sim, E>, a, chunks, kChunksPerThread);
  });
  combine(a);
}

void backward(const Backward& a, const Pool& pool) {
  by_elements(a.outputs.dtype, [&](auto element) {
    run(pool, gradients<decltype(element)>, a, Chunks(a.outputs.layout).count, kChunksPerThread);
  });
}

}  // namespace diffpp::gap_loss::DIFFPP_ISA
