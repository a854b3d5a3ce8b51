// The arithmetic that the losses share: targets, d = guided - fake and r = guided - target, a chunk at a time.
#pragma once

#include "outputs.h"
#include "philox.h"

namespace diffpp {
namespace DIFFPP_ISA {
namespace {

// The target of a chunk, in `noise_scratch` or where the data is; `x0_scratch` is free again. Each holds kChunk.
template <typename T>
inline const T* target_run(
    const Target& a, Dtype dtype, const Layout& layout, const Chunk& chunk, T* x0_scratch, T* noise_scratch) {
  const auto [b, first, n, offset] = chunk;
  if (a.prediction == Prediction::sample) return load(a.x0, dtype, offset, n, noise_scratch);
  const T* noise = noise_run(a.noise, layout, dtype, b, first, n, noise_scratch);
  if (a.prediction == Prediction::epsilon) return noise;
  const bool v = a.prediction == Prediction::v_prediction;
  const T alpha = v ? number<T>(a.alpha, b) : T(1);
  const T sigma = v ? number<T>(a.sigma, b) : T(1);
  const T* x0 = load(a.x0, dtype, offset, n, x0_scratch);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) noise_scratch[i] = madd(alpha, noise[i], -sigma * x0[i]);
  return noise_scratch;
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

template <typename E>
struct GapScratch {
  alignas(64) E fake[kChunk], cond[kChunk], uncond[kChunk], grad_x0[kChunk];
  alignas(64) Wide<E> x0[kChunk], noise[kChunk];
};

// A chunk of outputs of element type E; `guidance` is whether there is an uncond.
template <typename E, bool guidance>
struct GapRuns {
  using T = Wide<E>;

  const E* fake;
  const E* cond;
  const E* uncond;
  const T* target;  // none where the outputs have none or it was not asked for
  T w;

  T guided(int64_t i) const {
    if constexpr (!guidance) return widen(cond[i]);
    const T from = widen(uncond[i]);
    return madd(w, widen(cond[i]) - from, from);
  }
  T gap(int64_t i) const { return guided(i) - widen(fake[i]); }
  T residual(int64_t i) const { return guided(i) - target[i]; }
};

// Calls `work` with the runs of a chunk.
template <typename E, typename Work>
inline void with_gap_runs(
    const Outputs& a, const Chunk& chunk, bool with_target, GapScratch<E>& scratch, const Work& work) {
  const auto [b, first, n, offset] = chunk;
  const E* fake = load(a.fake, a.dtype, offset, n, scratch.fake);
  const E* cond = load(a.cond, a.dtype, offset, n, scratch.cond);
  const Wide<E>* target =
      with_target ? target_run(a.target, a.dtype, a.layout, chunk, scratch.x0, scratch.noise) : nullptr;
  if (a.uncond == nullptr) {
    work(GapRuns<E, false>{fake, cond, nullptr, target, 1});
  } else {
    const E* uncond = load(a.uncond, a.dtype, offset, n, scratch.uncond);
    work(GapRuns<E, true>{fake, cond, uncond, target, static_cast<Wide<E>>(a.guidance_scale)});
  }
}

// The gradients of a chunk where dL/dd = outer (r - curvature d) and dL/dr = outer d: d = o_g - fake, r = o_g - o*,
// o_g = w cond + (1 - w) uncond, and o* moves with x0. One loop writes all of them, so that reads and writes of memory
// overlap; one that is not needed goes to the scratch.
template <typename E, typename T>
inline void route_gradients(
    const Outputs& a, const OutputGradients& to, const Chunk& chunk, T outer, T curvature, GapScratch<E>& scratch) {
  const auto destination_of = [&](void* array, E* otherwise) {
    return array == nullptr ? otherwise : destination(array, a.dtype, chunk.offset, otherwise);
  };
  E* const fake = destination_of(to.fake, scratch.fake);
  E* const cond = destination_of(to.cond, scratch.cond);
  E* const uncond = destination_of(to.uncond, scratch.uncond);
  E* const x0 = destination_of(to.x0, scratch.grad_x0);
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
  if (to.fake != nullptr) store(fake, to.fake, a.dtype, chunk.offset, chunk.n);
  if (to.cond != nullptr) store(cond, to.cond, a.dtype, chunk.offset, chunk.n);
  if (to.uncond != nullptr) store(uncond, to.uncond, a.dtype, chunk.offset, chunk.n);
  if (to.x0 != nullptr) store(x0, to.x0, a.dtype, chunk.offset, chunk.n);
}

}  // namespace
}  // namespace DIFFPP_ISA
}  // namespace diffpp
