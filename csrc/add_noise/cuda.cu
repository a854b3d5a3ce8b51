#include "../common/cuda.cuh"
#include "arguments.h"

namespace diffpp::add_noise::cuda {
namespace {

// One thread makes four elements that are neighbours in logical order: those of one Philox block. `Aligned` says that they are
// neighbours in memory too, in every sample, at a multiple of their size.
template <typename S, bool Aligned>
__global__ void __launch_bounds__(kThreads) forward(const __grid_constant__ Forward a) {
  using C = typename Storage<S>::Compute;
  const int64_t sample = a.layout.sample();
  const int64_t per_sample = (sample + 3) / 4;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  const uint64_t per_pixels = Aligned ? 0 : Walk::reciprocal(a.layout);
  for (int64_t b = blockIdx.y; b < a.layout.batch; b += gridDim.y) {
    const C alpha = number<C>(a.alpha, b);
    const C sigma = number<C>(a.sigma, b);
    const S* x0 = static_cast<const S*>(a.x0) + b * sample;
    const S* stored = static_cast<const S*>(a.noise.stored) + b * sample;
    S* x_t = static_cast<S*>(a.x_t) + b * sample;
#pragma unroll 1
    for (int64_t block = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; block < per_sample; block += step) {
      float4 drawn = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if (a.noise.stored == nullptr) drawn = normals(block, a.noise, b);
      const float eps[4] = {drawn.x, drawn.y, drawn.z, drawn.w};
      if constexpr (Aligned) {
        const Four<S> clean = reinterpret_cast<const Four<S>*>(x0)[block];
        Four<S> noise{}, noisy;
        if (a.noise.stored != nullptr) noise = reinterpret_cast<const Four<S>*>(stored)[block];
#pragma unroll
        for (int lane = 0; lane < 4; ++lane) {
          const C e = a.noise.stored != nullptr ? to_compute(noise.values[lane]) : static_cast<C>(eps[lane]);
          noisy.values[lane] = to_stored<S>(fma(sigma, e, alpha * to_compute(clean.values[lane])));
        }
        reinterpret_cast<Four<S>*>(x_t)[block] = noisy;
      } else {
        Walk walk(a.layout, per_pixels, 4 * block);
#pragma unroll
        for (int lane = 0; lane < 4; ++lane, walk.next()) {
          if (4 * block + lane >= sample) break;
          const int64_t at = walk.in_memory();
          const C e = a.noise.stored != nullptr ? to_compute(stored[at]) : static_cast<C>(eps[lane]);
          x_t[at] = to_stored<S>(fma(sigma, e, alpha * to_compute(x0[at])));
        }
      }
    }
  }
}

// One thread per four elements in memory order; the tail of a sample that is no multiple of four element by element.
template <typename S, bool Aligned>
__global__ void __launch_bounds__(kThreads) backward(const __grid_constant__ Backward a) {
  using C = typename Storage<S>::Compute;
  const int64_t sample = a.layout.sample();
  const int64_t per_sample = (sample + 3) / 4;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t b = blockIdx.y; b < a.layout.batch; b += gridDim.y) {
    const C alpha = number<C>(a.alpha, b);
    const S* grad = static_cast<const S*>(a.grad_output) + b * sample;
    S* result = static_cast<S*>(a.grad_x0) + b * sample;
#pragma unroll 1
    for (int64_t block = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; block < per_sample; block += step) {
      if constexpr (Aligned) {
        Four<S> four = reinterpret_cast<const Four<S>*>(grad)[block];
#pragma unroll
        for (int lane = 0; lane < 4; ++lane) four.values[lane] = to_stored<S>(alpha * to_compute(four.values[lane]));
        reinterpret_cast<Four<S>*>(result)[block] = four;
      } else {
#pragma unroll
        for (int lane = 0; lane < 4; ++lane) {
          const int64_t i = 4 * block + lane;
          if (i < sample) result[i] = to_stored<S>(alpha * to_compute(grad[i]));
        }
      }
    }
  }
}

}  // namespace

void forward(const Forward& a, void* stream) {
  if (a.layout.batch * a.layout.sample() == 0) return;
  dispatch(a.dtype, [&](auto* kind) {
    using S = std::remove_pointer_t<decltype(kind)>;
    const bool fours = a.layout.channels == 1 && a.layout.pixels % 4 == 0 && aligned<Four<S>>(a.x0) && aligned<Four<S>>(a.x_t) &&
                       aligned<Four<S>>(a.noise.stored);
    const dim3 grid = grid_of((a.layout.sample() + 3) / 4, a.layout.batch);
    (fours ? forward<S, true> : forward<S, false>)<<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(a);
  });
  check_launch("add_noise");
}

void backward(const Backward& a, void* stream) {
  if (a.layout.batch * a.layout.sample() == 0) return;
  dispatch(a.dtype, [&](auto* kind) {
    using S = std::remove_pointer_t<decltype(kind)>;
    const bool fours = a.layout.sample() % 4 == 0 && aligned<Four<S>>(a.grad_output) && aligned<Four<S>>(a.grad_x0);
    const dim3 grid = grid_of((a.layout.sample() + 3) / 4, a.layout.batch);
    (fours ? backward<S, true> : backward<S, false>)<<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(a);
  });
  check_launch("add_noise_backward");
}

}  // namespace diffpp::add_noise::cuda
