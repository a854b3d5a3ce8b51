#include "../common/cuda.cuh"
#include "arguments.h"

namespace diffpp::score_gap::cuda {
namespace {

// With mean_abs the gradient holds d until it is normalised if it can hold it unrounded; else, and with a reward, d is made
// again then.
template <typename S>
constexpr bool kKeepsGap = sizeof(S) >= sizeof(float);

template <typename C>
__device__ C reward_factor(const Arguments& a, int64_t b) {
  return number<C>(a.reward.scales, b, static_cast<C>(a.reward.scale));
}

// The partial sums of d^2, |r| and d r, with a reward of s^2 and d s, too: [3 or 5, B, gridDim.x]; and factor d, less the reward's
// term, to the gradient.
template <typename S, Access kAccess, bool kTarget, bool kReward>
__global__ void __launch_bounds__(kThreads, blocks_per_sm(sizeof(S), Run<S, kAccess>::kCount) - (kReward ? 1 : 0))
    sums(const __grid_constant__ Arguments a) {
  using R = Run<S, kAccess>;
  using C = typename R::C;
  const Outputs& outputs = a.outputs;
  const Layout& layout = outputs.layout;
  const int64_t runs = R::per_sample(layout);
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  const bool write = !a.mean_abs || (kKeepsGap<S> && !kReward);
  constexpr int kSums = kReward ? 5 : 3;
  for (int64_t b = blockIdx.y; b < layout.batch; b += gridDim.y) {
    const C factor = a.mean_abs ? C(1) : number<C>(a.scales, b, static_cast<C>(a.scale));
    const C toward = kReward ? reward_factor<C>(a, b) : C(0);
    const typename R::Sample sample(layout, b, outputs.target);
    double totals[kSums] = {};
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
        if constexpr (kReward) guided[lane] = d;
      }
      if constexpr (kReward) {
        C score[R::kCount], reward_sq = 0, gap_dot_reward = 0;
        run.load(a.reward.score, score);
#pragma unroll
        for (int lane = 0; lane < R::kCount; ++lane) {
          const C d = guided[lane];
          fake[lane] = fma(-toward, score[lane], factor * d);
          reward_sq += score[lane] * score[lane];
          gap_dot_reward += d * score[lane];
        }
        totals[3] += static_cast<double>(reward_sq);
        totals[4] += static_cast<double>(gap_dot_reward);
      }
      if (write) run.store(fake, a.gradient);
      totals[0] += static_cast<double>(gap_sq);
      totals[1] += static_cast<double>(residual_abs);
      totals[2] += static_cast<double>(gap_dot_residual);
    }
    block_sum(totals);
    if (threadIdx.x == 0) {
#pragma unroll
      for (int k = 0; k < kSums; ++k)
        if (kTarget || k < 1 || k > 2) a.partials[(k * layout.batch + b) * gridDim.x + blockIdx.x] = totals[k];
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

// The share of the reward's term, by the sums of d^2 and s^2.
template <typename C>
__device__ C reward_share(const Arguments& a, int64_t b, double gap_sq, double reward_sq) {
  const C length = fabs(reward_factor<C>(a, b)) * sqrt(static_cast<C>(reward_sq));
  if (!(length - length == C(0))) return C(0);
  const C scale = fabs(number<C>(a.scales, b, static_cast<C>(a.scale)));
  const C limit = static_cast<C>(a.reward.clip) * scale * sqrt(static_cast<C>(gap_sq));
  return length > limit ? limit / length : C(1);
}

// The statistics of a sample, by a warp.
template <typename C, bool kReward = false>
__device__ void write_statistics(const Arguments& a, int64_t b, int64_t partials) {
  const double gap_sq = sample_sum(a, 0, b, partials);
  const bool writes = threadIdx.x % kWarp == 0;
  if (writes) static_cast<C*>(a.gap_sq)[b] = static_cast<C>(gap_sq);
  if constexpr (kReward) {
    const double reward_sq = sample_sum(a, 3, b, partials), gap_dot_reward = sample_sum(a, 4, b, partials);
    if (writes) {
      static_cast<C*>(a.reward.reward_sq)[b] = static_cast<C>(reward_sq);
      static_cast<C*>(a.reward.gap_dot_reward)[b] = static_cast<C>(gap_dot_reward);
      static_cast<C*>(a.reward.share)[b] = reward_share<C>(a, b, gap_sq, reward_sq);
    }
  }
  if (!a.outputs.has_target) return;
  const double residual_abs = sample_sum(a, 1, b, partials) / static_cast<double>(a.outputs.layout.sample());
  const double gap_dot_residual = sample_sum(a, 2, b, partials);
  if (writes) {
    static_cast<C*>(a.residual_abs)[b] = static_cast<C>(residual_abs);
    static_cast<C*>(a.gap_dot_residual)[b] = static_cast<C>(gap_dot_residual);
  }
}

// The statistics of every sample, a warp each.
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

// The same with a reward, whose term the sums settle: a sample that has none of it to change, and no normaliser, is done.
template <typename S, Access kAccess>
__global__ void __launch_bounds__(kThreads, blocks_per_sm(sizeof(S), Run<S, kAccess>::kCount))
    settle(const __grid_constant__ Arguments a) {
  using R = Run<S, kAccess>;
  using C = typename R::C;
  const Outputs& outputs = a.outputs;
  const Layout layout = in_any_order(outputs.layout);
  const int64_t runs = R::per_sample(layout);
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t b = blockIdx.y; b < layout.batch; b += gridDim.y) {
    const typename R::Sample sample(layout, b);
    if (blockIdx.x == 0 && threadIdx.x < kWarp) write_statistics<C, true>(a, b, gridDim.x);
    const C share = reward_share<C>(a, b, sample_sum(a, 0, b, gridDim.x), sample_sum(a, 3, b, gridDim.x));
    if (!a.mean_abs && share == C(1)) continue;
    C divisor = C(1);
    if (a.mean_abs) {
      const C mean = static_cast<C>(sample_sum(a, 1, b, gridDim.x) / static_cast<double>(layout.sample()));
      const C floor = static_cast<C>(kMeanAbsFloor);
      divisor = mean < floor ? floor : mean;
    }
    const C factor = number<C>(a.scales, b, static_cast<C>(a.scale)) / divisor;
    const C toward = share == C(0) ? C(0) : share / divisor * reward_factor<C>(a, b);
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < runs; i += step) {
      const R run(sample, i);
      C gap[R::kCount], other[R::kCount];
      run.load(outputs.fake, other);
      run.guided(outputs, gap);
#pragma unroll
      for (int lane = 0; lane < R::kCount; ++lane) gap[lane] = factor * (gap[lane] - other[lane]);
      if (toward != C(0)) {
        run.load(a.reward.score, other);
#pragma unroll
        for (int lane = 0; lane < R::kCount; ++lane) gap[lane] = fma(-toward, other[lane], gap[lane]);
      }
      run.store(gap, a.gradient);
    }
  }
}

template <bool kReward>
void launch(const Arguments& a, cudaStream_t on) {
  const Outputs& outputs = a.outputs;
  const Layout& layout = outputs.layout;
  dispatch(outputs.dtype, [&](auto* kind) {
    using S = std::remove_pointer_t<decltype(kind)>;
    using C = typename Storage<S>::Compute;
    const Noise& noise = outputs.target.noise;
    const Access by = access<S>(
        layout, noise.samples != nullptr,
        {outputs.fake, outputs.cond, outputs.uncond, outputs.target.x0, noise.stored, a.reward.score, a.gradient});
    const dim3 grid = grid_of_sums(layout);
    if (!outputs.has_target) {
      (by == Access::any ? sums<S, Access::any, false, kReward>
                         : sums<S, Access::packed, false, kReward>)<<<grid, kThreads, 0, on>>>(a);
    } else if (by == Access::tiled) {
      if constexpr (sizeof(S) < 8) sums<S, Access::tiled, true, kReward><<<grid, kThreads, 0, on>>>(a);
    } else if (by == Access::any) {
      sums<S, Access::any, true, kReward><<<grid, kThreads, 0, on>>>(a);
    } else {
      (by == Access::drawn ? sums<S, Access::drawn, true, kReward>
                           : sums<S, Access::packed, true, kReward>)<<<grid, kThreads, 0, on>>>(a);
    }
    check_launch("score_gap");
    const bool whole =
        access<S>(layout, false, {outputs.fake, outputs.cond, outputs.uncond, a.reward.score, a.gradient}) == Access::packed;
    if (kReward) {
      (whole ? settle<S, Access::packed> : settle<S, Access::any>)<<<grid, kThreads, 0, on>>>(a);
    } else if (a.mean_abs) {
      (whole ? normalize<S, Access::packed> : normalize<S, Access::any>)<<<grid, kThreads, 0, on>>>(a);
    } else {
      statistics<C><<<grid_of(kWarp * layout.batch), kThreads, 0, on>>>(a, grid.x);
    }
  });
  check_launch("score_gap");
}

}  // namespace

int64_t bytes_of_partials(const Arguments& a) { return bytes_of_sums(a.outputs.layout, a.sums()); }

void forward(const Arguments& a, void* stream) {
  if (a.outputs.layout.batch * a.outputs.layout.sample() == 0) return;
  const auto on = static_cast<cudaStream_t>(stream);
  a.reward.score == nullptr ? launch<false>(a, on) : launch<true>(a, on);
}

}  // namespace diffpp::score_gap::cuda
