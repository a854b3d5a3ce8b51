#include "../common/cuda.cuh"
#include "arguments.h"

namespace diffpp::score_gap::cuda {
namespace {

// With mean_abs the gradient holds d until it is normalised if it can hold it unrounded; else d is made again then.
template <typename S>
constexpr bool kKeepsGap = sizeof(S) >= sizeof(float);

// The partial sums of d^2, |r| and d r: [3, B, gridDim.x]; and factor d to the gradient.
template <typename S, Access kAccess, bool kTarget>
__global__ void __launch_bounds__(kThreads, blocks_per_sm(sizeof(S), Run<S, kAccess>::kCount))
    sums(const __grid_constant__ Arguments a) {
  using R = Run<S, kAccess>;
  using C = typename R::C;
  const Outputs& outputs = a.outputs;
  const Layout& layout = outputs.layout;
  const int64_t runs = R::per_sample(layout);
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  const bool write = !a.mean_abs || kKeepsGap<S>;
  for (int64_t b = blockIdx.y; b < layout.batch; b += gridDim.y) {
    const C factor = a.mean_abs ? C(1) : number<C>(a.scales, b, static_cast<C>(a.scale));
    const typename R::Sample sample(layout, b, outputs.target);
    double totals[3] = {};
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < runs; i += step) {
      const R run(sample, i);
      C guided[R::kCount], fake[R::kCount], target[R::kCount];
      run.load(outputs.fake, fake);
      run.guided(outputs, guided);
      if constexpr (kTarget) run.target(outputs.target, target);
      C gap_sq = 0, residual_abs = 0, gap_dot_residual = 0;
#pragma unroll
      for (int lane = 0; lane < R::kCount; ++lane) {
        const C d = guided[lane] - fake[lane];
        fake[lane] = factor * d;
        if (!run.holds(lane)) continue;
        gap_sq += d * d;
        if constexpr (kTarget) {
          const C r = guided[lane] - target[lane];
          residual_abs += fabs(r);
          gap_dot_residual += d * r;
        }
      }
      if (write) run.store(fake, a.gradient);
      totals[0] += static_cast<double>(gap_sq);
      totals[1] += static_cast<double>(residual_abs);
      totals[2] += static_cast<double>(gap_dot_residual);
    }
    block_sum(totals);
    if (threadIdx.x == 0) {
#pragma unroll
      for (int k = 0; k < (kTarget ? 3 : 1); ++k)
        a.partials[(k * layout.batch + b) * gridDim.x + blockIdx.x] = totals[k];
    }
  }
}

// One of the sums of a sample, to every lane.
__device__ double sample_sum(const Arguments& a, int k, int64_t b, int64_t partials) {
  const double* from = a.partials + (k * a.outputs.layout.batch + b) * partials;
  double sum = 0.0;
  for (int64_t p = threadIdx.x % kWarp; p < partials; p += kWarp) sum += from[p];
  return warp_sum(sum);
}

// The statistics of a sample, by a warp.
template <typename C>
__device__ void write_statistics(const Arguments& a, int64_t b, int64_t partials) {
  const double gap_sq = sample_sum(a, 0, b, partials);
  const bool writes = threadIdx.x % kWarp == 0;
  if (writes) static_cast<C*>(a.gap_sq)[b] = static_cast<C>(gap_sq);
  if (!a.outputs.has_target) return;
  const double residual_abs = sample_sum(a, 1, b, partials) / static_cast<double>(a.outputs.layout.sample());
  const double gap_dot_residual = sample_sum(a, 2, b, partials);
  if (writes) {
    static_cast<C*>(a.residual_abs)[b] = static_cast<C>(residual_abs);
    static_cast<C*>(a.gap_dot_residual)[b] = static_cast<C>(gap_dot_residual);
  }
}

// A warp per sample.
template <typename C>
__global__ void __launch_bounds__(kThreads) statistics(const __grid_constant__ Arguments a, int64_t partials) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t b = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp; b < a.outputs.layout.batch; b += step)
    write_statistics<C>(a, b, partials);
}

// scale / N d to the gradient. Each block adds up N for itself, all of a sample in the same order; the first of a sample
// writes the statistics.
template <typename S, Access kAccess>
__global__ void __launch_bounds__(kThreads) normalize(const __grid_constant__ Arguments a) {
  using R = Run<S, kAccess>;
  using C = typename R::C;
  const Outputs& outputs = a.outputs;
  const Layout layout = in_any_order(outputs.layout);
  const int64_t runs = R::per_sample(layout);
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t b = blockIdx.y; b < layout.batch; b += gridDim.y) {
    const typename R::Sample sample(layout, b);
    if (blockIdx.x == 0 && threadIdx.x < kWarp) write_statistics<C>(a, b, gridDim.x);
    const C mean = static_cast<C>(sample_sum(a, 1, b, gridDim.x) / static_cast<double>(layout.sample()));
    const C floor = static_cast<C>(kMeanAbsFloor);
    const C factor = number<C>(a.scales, b, static_cast<C>(a.scale)) / (mean < floor ? floor : mean);
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < runs; i += step) {
      const R run(sample, i);
      C gap[R::kCount];
      if constexpr (kKeepsGap<S>) {
        run.load(a.gradient, gap);
      } else {
        C fake[R::kCount];
        run.load(outputs.fake, fake);
        run.guided(outputs, gap);
#pragma unroll
        for (int lane = 0; lane < R::kCount; ++lane) gap[lane] -= fake[lane];
      }
#pragma unroll
      for (int lane = 0; lane < R::kCount; ++lane) gap[lane] *= factor;
      run.store(gap, a.gradient);
    }
  }
}

}  // namespace

int64_t bytes_of_partials(const Arguments& a) { return bytes_of_sums(a.outputs.layout, 3); }

void forward(const Arguments& a, void* stream) {
  const Outputs& outputs = a.outputs;
  const Layout& layout = outputs.layout;
  if (layout.batch * layout.sample() == 0) return;
  const auto on = static_cast<cudaStream_t>(stream);
  dispatch(outputs.dtype, [&](auto* kind) {
    using S = std::remove_pointer_t<decltype(kind)>;
    using C = typename Storage<S>::Compute;
    const Noise& noise = outputs.target.noise;
    const Access by = access<S>(
        layout, noise.samples != nullptr,
        {outputs.fake, outputs.cond, outputs.uncond, outputs.target.x0, noise.stored, a.gradient});
    const dim3 grid = grid_of_sums(layout);
    if (!outputs.has_target) {
      (by == Access::any ? sums<S, Access::any, false> : sums<S, Access::packed, false>)<<<grid, kThreads, 0, on>>>(a);
    } else if (by == Access::tiled) {
      if constexpr (sizeof(S) < 8) sums<S, Access::tiled, true><<<grid, kThreads, 0, on>>>(a);
    } else if (by == Access::any) {
      sums<S, Access::any, true><<<grid, kThreads, 0, on>>>(a);
    } else {
      (by == Access::drawn ? sums<S, Access::drawn, true> : sums<S, Access::packed, true>)<<<grid, kThreads, 0, on>>>(a);
    }
    check_launch("score_gap");
    if (a.mean_abs) {
      const bool whole = access<S>(layout, false, {outputs.fake, outputs.cond, outputs.uncond, a.gradient}) == Access::packed;
      (whole ? normalize<S, Access::packed> : normalize<S, Access::any>)<<<grid, kThreads, 0, on>>>(a);
    } else {
      statistics<C><<<grid_of(kWarp * layout.batch), kThreads, 0, on>>>(a, grid.x);
    }
  });
  check_launch("score_gap");
}

}  // namespace diffpp::score_gap::cuda
