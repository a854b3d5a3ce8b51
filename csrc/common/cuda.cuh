// The ground of the kernels for GPUs: elements of any dtype, launches, sums, addressed noise, and runs of neighbouring
// elements with the arithmetic that the losses share on them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "kernel.h"

namespace diffpp {
namespace {

// Elements, one thread at a time; vectors of four where memory allows

template <typename T>
struct Storage;  // the dtype of the arithmetic for elements stored as T

template <> struct Storage<float> { using Compute = float; };
template <> struct Storage<__nv_bfloat16> { using Compute = float; };
template <> struct Storage<__half> { using Compute = float; };
template <> struct Storage<double> { using Compute = double; };

__device__ inline float to_compute(float value) { return value; }
__device__ inline float to_compute(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline float to_compute(__half value) { return __half2float(value); }
__device__ inline double to_compute(double value) { return value; }

template <typename S, typename C>
__device__ inline S to_stored(C value) {
  if constexpr (sizeof(S) == 8) return static_cast<S>(value);
  else if constexpr (sizeof(S) == 4) return static_cast<S>(value);
  else return S(static_cast<float>(value));  // rounds to nearest even
}

// Neighbours; moved 16 bytes at a time where their address is a multiple of their size, or of 16 bytes if they are larger.
template <typename S, int kCount>
struct alignas(kCount * sizeof(S) > 16 ? 16 : kCount * sizeof(S)) Pack {
  S values[kCount];
};

template <typename S>
using Four = Pack<S, 4>;

template <typename P>
bool aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % alignof(P) == 0;
}

// One of the numbers of a [B] tensor, or `otherwise` where there is none.
template <typename C>
__device__ inline C number(const PerSample& values, int64_t b, C otherwise = C(0)) {
  if (values.data == nullptr) return otherwise;
  const int64_t i = b * values.stride;
  switch (values.dtype) {
    case Dtype::float32: return static_cast<C>(static_cast<const float*>(values.data)[i]);
    case Dtype::float64: return static_cast<C>(static_cast<const double*>(values.data)[i]);
    case Dtype::bfloat16: return static_cast<C>(to_compute(static_cast<const __nv_bfloat16*>(values.data)[i]));
    default: return static_cast<C>(to_compute(static_cast<const __half*>(values.data)[i]));
  }
}

// Writes one number of an array of any dtype.
template <typename C>
__device__ inline void put(void* values, Dtype dtype, int64_t i, C value) {
  switch (dtype) {
    case Dtype::float32: static_cast<float*>(values)[i] = to_stored<float>(value); return;
    case Dtype::float64: static_cast<double*>(values)[i] = to_stored<double>(value); return;
    case Dtype::bfloat16: static_cast<__nv_bfloat16*>(values)[i] = to_stored<__nv_bfloat16>(value); return;
    default: static_cast<__half*>(values)[i] = to_stored<__half>(value);
  }
}

// Calls `f` with a null pointer of the stored type.
template <typename F>
void dispatch(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::float32: return f(static_cast<float*>(nullptr));
    case Dtype::bfloat16: return f(static_cast<__nv_bfloat16*>(nullptr));
    case Dtype::float16: return f(static_cast<__half*>(nullptr));
    case Dtype::float64: return f(static_cast<double*>(nullptr));
  }
}

// Launches. Grids depend on shapes, dtypes and alignment alone, and so do the bits.

constexpr int kThreads = 256;

// Blocks that an SM must hold at least, for a kernel of elements S: 128 registers are a thread's then. Left alone, the compiler
// spills for a larger share of the SM; float64 pairs do not fit in what it chooses.
template <typename S>
constexpr int kBlocksPerSm = sizeof(S) == sizeof(double) ? 2 : 0;

inline void check_launch(const char* op) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(op) + ": the kernel was not launched: " + cudaGetErrorString(error));
}

// Blocks of kThreads for the threads of a sample, times the batch. Kernels stride over what a grid of this size leaves.
inline dim3 grid_of(int64_t threads, int64_t batch = 1) {
  constexpr int64_t kMostX = 1 << 20, kMostY = 65535;
  const int64_t blocks = (threads + kThreads - 1) / kThreads;
  return dim3(
      static_cast<unsigned>(blocks < kMostX ? blocks : kMostX), static_cast<unsigned>(batch < kMostY ? batch : kMostY));
}

// Sums over a warp and over a block, in an order that depends on nothing but the number of threads

constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;

// Every lane gets the sum: partners add the same two numbers, so all lanes get the same bits.
__device__ inline double warp_sum(double value) {
#pragma unroll
  for (int apart = kWarp / 2; apart > 0; apart /= 2) value += __shfl_xor_sync(0xFFFFFFFFu, value, apart);
  return value;
}

// Every thread gets the sums over the block of kThreads.
template <int kSums>
__device__ inline void block_sum(double (&sums)[kSums]) {
  __shared__ double of_warps[kWarps][kSums];
  const int warp = threadIdx.x / kWarp;
#pragma unroll
  for (int k = 0; k < kSums; ++k) {
    sums[k] = warp_sum(sums[k]);
    if (threadIdx.x % kWarp == 0) of_warps[warp][k] = sums[k];
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kSums; ++k) {
    sums[k] = 0.0;
    for (int w = 0; w < kWarps; ++w) sums[k] += of_warps[w][k];
  }
  __syncthreads();
}

// Addressed noise: the words and the formula of cpu_noise.h, one block of four normals per call

__device__ inline uint4 philox(uint32_t index, uint32_t stream, uint64_t sample, uint64_t seed) {
  uint4 c = make_uint4(index, stream, static_cast<uint32_t>(sample), static_cast<uint32_t>(sample >> 32));
  uint32_t k0 = static_cast<uint32_t>(seed);
  uint32_t k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(c.x) * 0xD2511F53u;
    const uint64_t p1 = static_cast<uint64_t>(c.z) * 0xCD9E8D57u;
    c = make_uint4(
        static_cast<uint32_t>(p1 >> 32) ^ c.y ^ k0, static_cast<uint32_t>(p1), static_cast<uint32_t>(p0 >> 32) ^ c.w ^ k1,
        static_cast<uint32_t>(p0));
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

__device__ inline void box_muller(uint32_t a, uint32_t b, float& first, float& second) {
  const float u1 = static_cast<float>(a) * 0x1p-32f + 0x1p-33f;
  const float u2 = static_cast<float>(b) * 0x1p-32f;
  const float radius = sqrtf(-2.0f * logf(u1));
  float sine, cosine;
  sincospif(2.0f * u2, &sine, &cosine);
  first = radius * cosine;
  second = radius * sine;
}

// The normals of the elements [4 block, 4 block + 4) of a sample.
__device__ inline float4 normals(int64_t block, const Noise& noise, int64_t b) {
  const uint4 words = philox(
      static_cast<uint32_t>(block), noise.stream, static_cast<uint64_t>(noise.samples[b]), noise.seed);
  float4 result;
  box_muller(words.x, words.y, result.x, result.y);
  box_muller(words.z, words.w, result.z, result.w);
  return result;
}

// Walks a sample in logical order and tells where its elements are in memory: channels_last keeps [pixel][channel],
// row-major [channel][pixel].
class Walk {
 public:
  // `per_pixels`: reciprocal(layout).
  __device__ Walk(const Layout& layout, uint64_t per_pixels, int64_t i) : layout_(layout) {
    channel_ = static_cast<int64_t>(__umul64hi(static_cast<uint64_t>(i), per_pixels));
    pixel_ = i - channel_ * layout.pixels;
    if (pixel_ >= layout.pixels) next_channel();
  }

  // 2^64 / pixels, rounded down: i times this is the channel of element i or the one before it. Divisions of 64 bits take
  // long, and registers: one for a thread, none for an element.
  __device__ static uint64_t reciprocal(const Layout& layout) {
    return layout.channels == 1 ? 0 : UINT64_MAX / static_cast<uint64_t>(layout.pixels);
  }

  __device__ int64_t in_memory() const { return pixel_ * layout_.channels + channel_; }

  __device__ void next() {
    if (++pixel_ == layout_.pixels) next_channel();
  }

 private:
  __device__ void next_channel() {
    pixel_ -= layout_.pixels;
    ++channel_;
  }

  const Layout& layout_;
  int64_t channel_, pixel_;
};

// Runs of neighbouring elements: targets, d = guided - fake and r = guided - target

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

  // A thread knows this of every run before the first.
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
// GPU, few enough that reading the partial sums again costs nothing, and each with some elements for every thread. They depend
// on the shape alone, and so do the bits of the sum.
inline int64_t blocks_per_sum(const Layout& layout) {
  constexpr int64_t wanted = 1024, least = 2048;
  const int64_t share = layout.batch < wanted ? wanted / layout.batch : 1;
  const int64_t most = (layout.sample() + least - 1) / least;
  return share < most ? share : most;
}

// Bytes of the partial sums of a batch.
inline int64_t bytes_of_sums(const Layout& layout, int64_t sums_per_sample) {
  if (layout.batch * layout.sample() == 0) return 0;
  return layout.batch * blocks_per_sum(layout) * sums_per_sample * static_cast<int64_t>(sizeof(double));
}

inline dim3 grid_of_sums(const Layout& layout) {
  constexpr int64_t kMostY = 65535;
  return dim3(
      static_cast<unsigned>(blocks_per_sum(layout)),
      static_cast<unsigned>(layout.batch < kMostY ? layout.batch : kMostY));
}

}  // namespace
}  // namespace diffpp
