// Runs of neighbouring elements of a sample, and the arithmetic that the losses share on them: targets, d = guided - fake
// and r = guided - target.
#pragma once

#include <initializer_list>

#include "../cpu/outputs.h"
#include "philox.cuh"
#include "reduce.cuh"

namespace diffpp::cuda {

// A thread's elements: 16 bytes of each tensor, and whole Philox blocks. They are neighbours in logical order; `kPacked` says
// that every tensor has them aligned and in the order of its memory, in every sample.
template <typename S, bool kPacked>
class Run {
 public:
  using C = typename Storage<S>::Compute;
  static constexpr int kCount = kPacked && sizeof(S) == 2 ? 8 : 4;

  // How many runs a sample has.
  __host__ __device__ static int64_t per_sample(const Layout& layout) {
    return (layout.sample() + kCount - 1) / kCount;
  }

  // What a thread knows of every run before the first.
  struct Start {
    const Layout& layout;
    uint64_t per_pixels;

    __device__ explicit Start(const Layout& layout)
        : layout(layout), per_pixels(kPacked ? 0 : Walk::reciprocal(layout)) {}
  };

  __device__ Run(const Start& start, int64_t b, int64_t number) : b_(b), number_(number) {
    const Layout& layout = start.layout;
    if constexpr (kPacked) {
      at_[0] = b * layout.sample() + number * kCount;
    } else {
      Walk walk(layout, start.per_pixels, number * kCount);
#pragma unroll
      for (int lane = 0; lane < kCount; ++lane, walk.next())
        at_[lane] = number * kCount + lane < layout.sample() ? b * layout.sample() + walk.in_memory() : -1;
    }
  }

  // Whether a lane holds an element: the last run of a sample may be shorter. Other lanes load as zero.
  __device__ bool holds(int lane) const { return kPacked || at_[lane] >= 0; }

  __device__ void load(const void* array, C (&to)[kCount]) const {
    const S* from = static_cast<const S*>(array);
    if constexpr (kPacked) {
      const auto pack = *reinterpret_cast<const Pack<S, kCount>*>(from + at_[0]);
#pragma unroll
      for (int lane = 0; lane < kCount; ++lane) to[lane] = to_compute(pack.values[lane]);
    } else {
#pragma unroll
      for (int lane = 0; lane < kCount; ++lane) to[lane] = holds(lane) ? to_compute(from[at_[lane]]) : C(0);
    }
  }

  __device__ void store(const C (&values)[kCount], void* array) const {
    S* to = static_cast<S*>(array);
    if constexpr (kPacked) {
      Pack<S, kCount> pack;
#pragma unroll
      for (int lane = 0; lane < kCount; ++lane) pack.values[lane] = to_stored<S>(values[lane]);
      *reinterpret_cast<Pack<S, kCount>*>(to + at_[0]) = pack;
    } else {
#pragma unroll
      for (int lane = 0; lane < kCount; ++lane)
        if (holds(lane)) to[at_[lane]] = to_stored<S>(values[lane]);
    }
  }

  __device__ void noise(const Noise& noise, C (&to)[kCount]) const {
    if (noise.stored != nullptr) return load(noise.stored, to);
#pragma unroll
    for (int block = 0; block < kCount / 4; ++block) {
      const float4 drawn = normals(number_ * (kCount / 4) + block, noise, b_);
      to[4 * block] = static_cast<C>(drawn.x);
      to[4 * block + 1] = static_cast<C>(drawn.y);
      to[4 * block + 2] = static_cast<C>(drawn.z);
      to[4 * block + 3] = static_cast<C>(drawn.w);
    }
  }

  __device__ void target(const Target& a, C (&to)[kCount]) const {
    if (a.prediction == Prediction::sample) return load(a.x0, to);
    noise(a.noise, to);
    if (a.prediction == Prediction::epsilon) return;
    const bool v = a.prediction == Prediction::v_prediction;
    const C alpha = v ? number<C>(a.alpha, b_) : C(1);
    const C sigma = v ? number<C>(a.sigma, b_) : C(1);
    C x0[kCount];
    load(a.x0, x0);
#pragma unroll
    for (int lane = 0; lane < kCount; ++lane) to[lane] = fma(alpha, to[lane], -sigma * x0[lane]);
  }

  __device__ void guided(const Outputs& a, C (&to)[kCount]) const {
    load(a.cond, to);
    if (a.uncond == nullptr) return;
    const C w = static_cast<C>(a.guidance_scale);
    C from[kCount];
    load(a.uncond, from);
#pragma unroll
    for (int lane = 0; lane < kCount; ++lane) to[lane] = fma(w, to[lane] - from[lane], from[lane]);
  }

 private:
  int64_t b_;
  int64_t number_;
  int64_t at_[kPacked ? 1 : kCount];
};

// For work that no noise takes part in: elements go by their place in memory.
__device__ inline Layout in_any_order(const Layout& layout) { return {layout.batch, 1, layout.sample()}; }

// Whether kPacked holds. `addressed`: noise is drawn, whose logical order is that of memory in row-major tensors alone.
template <typename S>
bool packed(const Layout& layout, bool addressed, std::initializer_list<const void*> arrays) {
  using R = Run<S, true>;
  bool result = layout.sample() % R::kCount == 0 && (layout.channels == 1 || !addressed);
  for (const void* array : arrays) result = result && aligned<Pack<S, R::kCount>>(array);
  return result;
}

// Blocks that share a sample's sum, each of which leaves a partial one: enough in the batch for eight on each SM of a large
// GPU, few enough that reading the partial sums again costs nothing, and never more than the chunks of the CPU, for which the
// caller has made room. They depend on the shape alone, and so do the bits of the sum.
inline int64_t blocks_per_sum(const Layout& layout) {
  constexpr int64_t wanted = 1024;
  const int64_t share = layout.batch < wanted ? wanted / layout.batch : 1;
  const int64_t most = Chunks(layout).per_sample;
  return share < most ? share : most;
}

inline dim3 grid_of_sums(const Layout& layout) {
  constexpr int64_t kMostY = 65535;
  return dim3(
      static_cast<unsigned>(blocks_per_sum(layout)),
      static_cast<unsigned>(layout.batch < kMostY ? layout.batch : kMostY));
}

}  // namespace diffpp::cuda
