#include "../common/cuda.cuh"
#include "arguments.h"

namespace diffpp::noise::cuda {
namespace {

template <typename S, Access kAccess>
__global__ void __launch_bounds__(kThreads) normal(const __grid_constant__ Normals a) {
  using R = Run<S, kAccess>;
  const int64_t runs = R::per_sample(a.layout);
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads * R::kAtOnce;
  for (int64_t b = blockIdx.y; b < a.layout.batch; b += gridDim.y) {
    const typename R::Sample sample(a.layout, b, a.noise);
#pragma unroll 1
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads * R::kAtOnce + threadIdx.x; i < runs; i += step) {
#pragma unroll
      for (int which = 0; which < R::kAtOnce; ++which) {
        if (which > 0 && i + which * kThreads >= runs) break;
        const R run(sample, i + which * kThreads);
        typename R::C values[R::kCount];
        run.noise(a.noise, values);
        run.store(values, a.to);
      }
    }
  }
}

__global__ void __launch_bounds__(kThreads) one(const __grid_constant__ Single a) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t b = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; b < a.batch; b += step) {
    const uint32_t word = philox(0, a.noise, static_cast<uint64_t>(a.noise.samples[b])).x;
    if (a.uniform != nullptr) {
      a.uniform[b] = static_cast<float>(word >> 8) * 0x1p-24f;
    } else {
      a.integers[b] = a.low + static_cast<int64_t>((word * a.range) >> 32);
    }
  }
}

}  // namespace

void draw_normals(const Normals& a, void* stream) {
  if (a.layout.batch * a.layout.pixels == 0) return;
  dispatch(a.dtype, [&](auto* kind) {
    using S = std::remove_pointer_t<decltype(kind)>;
    const bool packs = access<S>(a.layout, true, {a.to}) == Access::drawn;
    const int64_t threads = packs ? Run<S, Access::drawn>::threads(a.layout) : Run<S, Access::any>::threads(a.layout);
    const dim3 grid = grid_of(threads, a.layout.batch);
    (packs ? normal<S, Access::drawn> : normal<S, Access::any>)<<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(a);
  });
  check_launch("normal");
}

void draw_single(const Single& a, void* stream) {
  if (a.batch == 0) return;
  one<<<grid_of(a.batch), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(a);
  check_launch(a.uniform != nullptr ? "uniform" : "integers");
}

}  // namespace diffpp::noise::cuda
