#include "../common/cuda.cuh"
#include "arguments.h"

namespace diffpp::add_noise::cuda {
namespace {

template <typename S, Access kAccess>
__global__ void __launch_bounds__(kThreads, blocks_per_sm(sizeof(S), Run<S, kAccess>::kCount))
    forward(const __grid_constant__ Forward a) {
  using R = Run<S, kAccess>;
  using C = typename R::C;
  const int64_t runs = R::per_sample(a.layout);
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads * R::kAtOnce;
  for (int64_t b = blockIdx.y; b < a.layout.batch; b += gridDim.y) {
    const typename R::Sample sample(a.layout, b, a.noise);
    const C alpha = number<C>(a.alpha, b);
    const C sigma = number<C>(a.sigma, b);
#pragma unroll 1
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads * R::kAtOnce + threadIdx.x; i < runs; i += step) {
#pragma unroll
      for (int which = 0; which < R::kAtOnce; ++which) {
        if (which > 0 && i + which * kThreads >= runs) break;
        const R run(sample, i + which * kThreads);
        C x[R::kCount], noise[R::kCount];
        run.load(a.x0, x);
        run.noise(a.noise, noise);
#pragma unroll
        for (int lane = 0; lane < R::kCount; ++lane) x[lane] = fma(sigma, noise[lane], alpha * x[lane]);
        run.store(x, a.x_t);
      }
    }
  }
}

template <typename S, Access kAccess>
__global__ void __launch_bounds__(kThreads) backward(const __grid_constant__ Backward a) {
  using R = Run<S, kAccess>;
  using C = typename R::C;
  const Layout layout = in_any_order(a.layout);
  const int64_t runs = R::per_sample(layout);
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t b = blockIdx.y; b < layout.batch; b += gridDim.y) {
    const typename R::Sample sample(layout, b);
    const C alpha = number<C>(a.alpha, b);
#pragma unroll 1
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < runs; i += step) {
      const R run(sample, i);
      C values[R::kCount];
      run.load(a.grad_output, values);
#pragma unroll
      for (int lane = 0; lane < R::kCount; ++lane) values[lane] *= alpha;
      run.store(values, a.grad_x0);
    }
  }
}

}  // namespace

void forward(const Forward& a, void* stream) {
  if (a.layout.batch * a.layout.sample() == 0) return;
  const auto on = static_cast<cudaStream_t>(stream);
  dispatch(a.dtype, [&](auto* kind) {
    using S = std::remove_pointer_t<decltype(kind)>;
    const Access by = access<S>(a.layout, a.noise.stored == nullptr, {a.x0, a.x_t, a.noise.stored});
    const int64_t batch = a.layout.batch;
    if (by == Access::tiled) {
      if constexpr (sizeof(S) < 8)
        forward<S, Access::tiled><<<grid_of(Run<S, Access::tiled>::threads(a.layout), batch), kThreads, 0, on>>>(a);
    } else if (by == Access::any) {
      forward<S, Access::any><<<grid_of(Run<S, Access::any>::threads(a.layout), batch), kThreads, 0, on>>>(a);
    } else {
      const bool drawn = by == Access::drawn;
      const dim3 grid = grid_of(
          drawn ? Run<S, Access::drawn>::threads(a.layout) : Run<S, Access::packed>::threads(a.layout), batch);
      (drawn ? forward<S, Access::drawn> : forward<S, Access::packed>)<<<grid, kThreads, 0, on>>>(a);
    }
  });
  check_launch("add_noise");
}

void backward(const Backward& a, void* stream) {
  if (a.layout.batch * a.layout.sample() == 0) return;
  const auto on = static_cast<cudaStream_t>(stream);
  dispatch(a.dtype, [&](auto* kind) {
    using S = std::remove_pointer_t<decltype(kind)>;
    const bool packs = access<S>(a.layout, false, {a.grad_output, a.grad_x0}) == Access::packed;
    const int64_t runs = packs ? Run<S, Access::packed>::per_sample(a.layout) : Run<S, Access::any>::per_sample(a.layout);
    const dim3 grid = grid_of(runs, a.layout.batch);
    (packs ? backward<S, Access::packed> : backward<S, Access::any>)<<<grid, kThreads, 0, on>>>(a);
  });
  check_launch("add_noise_backward");
}

}  // namespace diffpp::add_noise::cuda
