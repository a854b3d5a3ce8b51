#include "../common/cuda.cuh"
#include "arguments.h"

namespace diffpp::noise::cuda {
namespace {

// One thread makes the four normals of one Philox block.
template <typename S>
__global__ void __launch_bounds__(kThreads) normal(const __grid_constant__ Normals a) {
  const int64_t sample = a.layout.pixels;
  const int64_t per_sample = (sample + 3) / 4;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t b = blockIdx.y; b < a.layout.batch; b += gridDim.y) {
    for (int64_t block = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; block < per_sample; block += step) {
      const float4 drawn = normals(block, a.noise, b);
      const float lanes[4] = {drawn.x, drawn.y, drawn.z, drawn.w};
      S* to = static_cast<S*>(a.to) + b * sample + 4 * block;
      if (sample % 4 == 0) {  // then a fresh tensor's blocks are aligned
        Four<S> four;
#pragma unroll
        for (int lane = 0; lane < 4; ++lane) four.values[lane] = to_stored<S>(lanes[lane]);
        *reinterpret_cast<Four<S>*>(to) = four;
      } else {
#pragma unroll
        for (int lane = 0; lane < 4; ++lane)
          if (4 * block + lane < sample) to[lane] = to_stored<S>(lanes[lane]);
      }
    }
  }
}

__global__ void __launch_bounds__(kThreads) one(const __grid_constant__ Single a) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t b = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; b < a.batch; b += step) {
    const uint32_t word = philox(0, a.noise.stream, static_cast<uint64_t>(a.noise.samples[b]), a.noise.seed).x;
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
    const dim3 grid = grid_of((a.layout.pixels + 3) / 4, a.layout.batch);
    normal<S><<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(a);
  });
  check_launch("normal");
}

void draw_single(const Single& a, void* stream) {
  if (a.batch == 0) return;
  one<<<grid_of(a.batch), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(a);
  check_launch(a.uniform != nullptr ? "uniform" : "integers");
}

}  // namespace diffpp::noise::cuda
