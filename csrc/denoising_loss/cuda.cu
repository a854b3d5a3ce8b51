#include "../common/cuda.cuh"
#include "arguments.h"

namespace diffpp::denoising_loss::cuda {
namespace {

// The partial sums of r^2, r = prediction - target: [B, gridDim.x]; and r itself where it is kept.
template <typename S, Access kAccess>
__global__ void __launch_bounds__(kThreads, blocks_per_sm(sizeof(S), Run<S, kAccess>::kCount))
    forward(const __grid_constant__ Forward a) {
  using R = Run<S, kAccess>;
  using C = typename R::C;
  const int64_t runs = R::per_sample(a.layout);
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t b = blockIdx.y; b < a.layout.batch; b += gridDim.y) {
    const typename R::Sample sample(a.layout, b, a.target);
    double total[1] = {};
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < runs; i += step) {
      const R run(sample, i);
      C residual[R::kCount], target[R::kCount];
      run.load(a.prediction, residual);
      run.target(a.target, target);
      C sum = 0;
#pragma unroll
      for (int lane = 0; lane < R::kCount; ++lane) {
        residual[lane] -= target[lane];
        if (run.holds(lane)) sum += residual[lane] * residual[lane];
      }
      if (a.residual != nullptr) run.store(residual, a.residual);
      total[0] += static_cast<double>(sum);
    }
    block_sum(total);
    if (threadIdx.x == 0) a.partials[b * gridDim.x + blockIdx.x] = total[0];
  }
}

// One block. The mean over nothing is NaN, as torch's.
template <typename C>
__global__ void __launch_bounds__(kThreads) combine(const __grid_constant__ Forward a, int64_t partials) {
  double total[1] = {};
  for (int64_t i = threadIdx.x; i < a.layout.batch * partials; i += kThreads)
    total[0] += number<double>(a.weight, i / partials, 1.0) * a.partials[i];
  block_sum(total);
  if (threadIdx.x == 0)
    *static_cast<C*>(a.loss) = static_cast<C>(total[0] / static_cast<double>(a.layout.batch * a.layout.sample()));
}

template <typename S, Access kAccess>
__global__ void __launch_bounds__(kThreads) backward(const __grid_constant__ Backward a) {
  using R = Run<S, kAccess>;
  using C = typename R::C;
  const Layout layout = in_any_order(a.layout);
  const int64_t runs = R::per_sample(layout);
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  const C mean = static_cast<C>(2.0 / static_cast<double>(a.layout.batch * a.layout.sample()));
  for (int64_t b = blockIdx.y; b < a.layout.batch; b += gridDim.y) {
    const typename R::Sample sample(layout, b);
    const C scale = number<C>(a.grad_output, 0) * mean * number<C>(a.weight, b, C(1));
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < runs; i += step) {
      const R run(sample, i);
      C values[R::kCount];
      run.load(a.residual, values);
#pragma unroll
      for (int lane = 0; lane < R::kCount; ++lane) values[lane] *= scale;
      run.store(values, a.gradient);
    }
  }
}

}  // namespace

int64_t bytes_of_partials(const Forward& a) { return bytes_of_sums(a.layout, 1); }

void forward(const Forward& a, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  dispatch(a.dtype, [&](auto* kind) {
    using S = std::remove_pointer_t<decltype(kind)>;
    int64_t partials = 0;
    if (a.layout.batch * a.layout.sample() > 0) {
      const Noise& noise = a.target.noise;
      const Access by = access<S>(
          a.layout, noise.samples != nullptr, {a.prediction, a.residual, a.target.x0, noise.stored});
      const dim3 grid = grid_of_sums(a.layout);
      partials = grid.x;
      if (by == Access::tiled) {
        if constexpr (sizeof(S) < 8) forward<S, Access::tiled><<<grid, kThreads, 0, on>>>(a);
      } else if (by == Access::any) {
        forward<S, Access::any><<<grid, kThreads, 0, on>>>(a);
      } else {
        (by == Access::drawn ? forward<S, Access::drawn> : forward<S, Access::packed>)<<<grid, kThreads, 0, on>>>(a);
      }
      check_launch("denoising_loss");
    }
    combine<typename Storage<S>::Compute><<<1, kThreads, 0, on>>>(a, partials);
  });
  check_launch("denoising_loss");
}

void backward(const Backward& a, void* stream) {
  if (a.layout.batch * a.layout.sample() == 0) return;
  const auto on = static_cast<cudaStream_t>(stream);
  dispatch(a.dtype, [&](auto* kind) {
    using S = std::remove_pointer_t<decltype(kind)>;
    const bool packs = access<S>(a.layout, false, {a.residual, a.gradient}) == Access::packed;
    const int64_t runs = packs ? Run<S, Access::packed>::per_sample(a.layout) : Run<S, Access::any>::per_sample(a.layout);
    const dim3 grid = grid_of(runs, a.layout.batch);
    (packs ? backward<S, Access::packed> : backward<S, Access::any>)<<<grid, kThreads, 0, on>>>(a);
  });
  check_launch("denoising_loss_backward");
}

}  // namespace diffpp::denoising_loss::cuda
