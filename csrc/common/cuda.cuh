// The ground of the kernels for GPUs: elements of any dtype, launches, sums, addressed noise, and runs of neighbouring
// elements with the arithmetic that the losses share on them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <atomic>
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

// Two neighbours of a 2-byte dtype, rounded by one instruction.
__device__ inline uint32_t to_stored_pair(float first, float second, __nv_bfloat16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
__device__ inline uint32_t to_stored_pair(float first, float second, __half) {
  const __half2 pair = __floats2half2_rn(first, second);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// One store of 8 or 16 bytes. Of an assignment the compiler makes several, where it has computed the words one by one.
template <int kWords>
__device__ inline void store_words(const uint32_t (&words)[kWords], void* to) {
#if defined(__CUDA_ARCH__)
  const size_t global = __cvta_generic_to_global(to);
  if constexpr (kWords == 4)
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(global), "r"(words[0]), "r"(words[1]), "r"(words[2]),
                 "r"(words[3])
                 : "memory");
  else
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(global), "r"(words[0]), "r"(words[1]) : "memory");
#else
  for (int i = 0; i < kWords; ++i) static_cast<uint32_t*>(to)[i] = words[i];
#endif
}

template <typename S, int kCount, typename C>
__device__ inline void store_pack(const C (&values)[kCount], Pack<S, kCount>* to) {
  if constexpr (sizeof(S) < 8) {
    constexpr int kEach = 4 / sizeof(S);
    uint32_t words[kCount / kEach];
#pragma unroll
    for (int i = 0; i < kCount / kEach; ++i) {
      if constexpr (kEach == 2) words[i] = to_stored_pair(values[2 * i], values[2 * i + 1], S());
      else words[i] = static_cast<uint32_t>(__float_as_int(values[i]));
    }
    store_words(words, to);
  } else {
    Pack<S, kCount> pack;
#pragma unroll
    for (int lane = 0; lane < kCount; ++lane) pack.values[lane] = to_stored<S>(values[lane]);
    *to = pack;
  }
}

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

// Blocks that an SM must hold at least, for a kernel of so many numbers in flight a thread: 128 or 64 registers are a thread's then.
// Left alone, the compiler spills for a larger share of the SM; float64 and tiles do not fit in what it chooses.
constexpr int blocks_per_sm(size_t size, int count) { return size == sizeof(double) || count > 8 ? 2 : 4; }

inline void check_launch(const char* op) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(op) + ": the kernel was not launched: " + cudaGetErrorString(error));
}

// Blocks of kThreads for the threads of a sample, times the batch. Kernels stride over what a grid of this size leaves: from 31
// blocks for each SM of a large GPU on, what a thread does before its first elements would be done more often instead.
inline dim3 grid_of(int64_t threads, int64_t batch = 1) {
  constexpr int64_t kMost = 4096, kMostY = 65535;
  const int64_t blocks = (threads + kThreads - 1) / kThreads, share = batch < kMost ? kMost / batch : 1;
  return dim3(
      static_cast<unsigned>(blocks < share ? blocks : share), static_cast<unsigned>(batch < kMostY ? batch : kMostY));
}

// Clusters of blocks, which read each other's shared memory: from sm_90 on. A kernel for them is empty on older GPUs.

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define DIFFPP_CLUSTERS 1
#else
#define DIFFPP_CLUSTERS 0
#endif

// What a block may have of its SM's shared memory, and what leaves room for a second block; 20 KiB of each are static arrays'.
constexpr int64_t kMostShared = (227 - 20) << 10, kHalfOfShared = (113 - 20) << 10;
constexpr int kMostBlocks = 8;  // of a cluster, on any GPU that has them

#if DIFFPP_CLUSTERS
__device__ inline void cluster_sync() {
  __cluster_barrier_arrive();
  __cluster_barrier_wait();
}

// The sum of what the blocks of a cluster hold in the same place of their shared memory, in their order.
__device__ inline double cluster_sum(double& value, int blocks) {
  double sum = 0.0;
  for (int block = 0; block < blocks; ++block)
    sum += *static_cast<const double*>(__cluster_map_shared_rank(&value, static_cast<unsigned>(block)));
  return sum;
}
#endif

// The shared memory whose size a launch names.
template <typename T>
__device__ inline T* dynamic_shared() {
#if defined(__CUDACC__)
  extern __shared__ uint4 memory[];
  return reinterpret_cast<T*>(memory);
#else
  return static_cast<T*>(emulation::dynamic_shared());
#endif
}

// Whether the current GPU has clusters, and this kernel was compiled for them: all kernels are for the same GPUs.
template <typename Kernel>
bool clusters_serve(Kernel* kernel) {
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices];
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= kDevices) return false;
  if (known[device] == 0) {
    cudaFuncAttributes attributes{};
    const bool found = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)) == cudaSuccess;
    known[device] = found && attributes.ptxVersion >= 90 ? 1 : -1;
  }
  return known[device] == 1;
}

// Launches clusters of `blocks`, each block with `shared` bytes.
template <typename... Parameters, typename... Arguments>
void launch_clusters(
    void (*kernel)(Parameters...), unsigned grid, int blocks, int64_t shared, cudaStream_t on, const Arguments&... arguments) {
  // What any launch may have, less static arrays, needs no asking for.
  if (shared > (48 - 20) << 10)
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(blocks), 1, 1};
  const cudaLaunchConfig_t config{dim3(grid), dim3(kThreads), static_cast<size_t>(shared), on, &cluster, 1};
  cudaLaunchKernelEx(&config, kernel, arguments...);
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

// What one instruction of a GPU approximates, within 2^-23 of its value

__device__ inline float approximate_reciprocal(float x) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return 1.0f / x;
#endif
}

__device__ inline float approximate_root(float x) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return sqrtf(x);
#endif
}

// 2^x
__device__ inline float approximate_power(float x) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return exp2f(x);
#endif
}

// The logarithm to base 2: within 2^-22 of it, or within 2^-22 of its value where that is larger than 1.
__device__ inline float approximate_log2(float x) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return log2f(x);
#endif
}

// Addressed noise: the words and the formula of cpu_noise.h, one block of four normals per call

// Both words of a product of 32 bits by 32. Written in C++, where the first factor is the same for all threads in one round, the
// compiler adds a carry that is always 0 in all others.
__device__ inline uint2 product(uint32_t a, uint32_t b) {
  uint2 words;
#if defined(__CUDA_ARCH__)
  asm("{ .reg .b64 both; mul.wide.u32 both, %2, %3; mov.b64 {%0, %1}, both; }" : "=r"(words.x), "=r"(words.y) : "r"(a), "r"(b));
#else
  const uint64_t both = static_cast<uint64_t>(a) * b;
  words = make_uint2(static_cast<uint32_t>(both), static_cast<uint32_t>(both >> 32));
#endif
  return words;
}

__device__ inline uint4 philox(uint32_t index, const Noise& noise, uint64_t sample) {
  uint4 c = make_uint4(index, noise.stream, static_cast<uint32_t>(sample), static_cast<uint32_t>(sample >> 32));
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint2 p0 = product(c.x, 0xD2511F53u), p1 = product(c.z, 0xCD9E8D57u);
    c = make_uint4(p1.y ^ c.y ^ noise.keys[round][0], p1.x, p0.y ^ c.w ^ noise.keys[round][1], p0.x);
  }
  return c;
}

// sqrt(-log2 u) for u in (0, 1]. What one instruction computes is too far off for a root near u = 1: there a polynomial in 1 - u
// serves, which is exactly 0 at 1.
__device__ inline float root_of_log2(float u) {
  float y = -approximate_log2(u);
  const float g = 1.0f - u;
  float p = fmaf(g, 0.501392066f, 0.308016419f);
  p = fmaf(p, g, 0.48628217f);
  p = fmaf(p, g, 0.721127748f);
  p = fmaf(p, g, 1.44269753f);
  if (g < 0.22f) y = g * p;
  return approximate_root(y);
}

// Two normals from two words. No product is left to be fused with what a caller does: noise that is drawn where it is used has
// the bits of noise that was stored.
__device__ inline void box_muller(uint32_t a, uint32_t b, float& first, float& second) {
  const float radius = root_of_log2(fmaf(static_cast<float>(a), 0x1p-32f, 0x1p-33f));
  // An angle of q quarter turns around the nearest half turn, whose number comes as the low bits of a sum with 1.5 2^24. Odd ones
  // change the sign of both: it is added, for the top bit of the radius is free.
  const float word = static_cast<float>(b);
  const float sum = fmaf(word, 0x1p-30f, 25165824.0f);
  const float q = fmaf(word, 0x1p-30f, 25165824.0f - sum);
  const float towards = __int_as_float(static_cast<int>(
      static_cast<uint32_t>(__float_as_int(radius)) + (static_cast<uint32_t>(__float_as_int(sum)) << 31)));
  const float square = q * q;
  // The cosine by (1 - q^2) and the sine by q, both times sqrt(2 ln 2). 1 - q^2 has the zeros of the cosine, which keeps its error
  // a part of it.
  float c = fmaf(square, 2.5967027e-05f, -0.0010483908f);
  c = fmaf(c, square, 0.023508923f);
  c = fmaf(c, square, -0.27516085f);
  c = fmaf(c, square, 1.1774100f);
  float s = fmaf(square, 0.00017823219f, -0.0055027427f);
  s = fmaf(s, square, 0.093827352f);
  s = fmaf(s, square, -0.76056415f);
  s = fmaf(s, square, 1.8494713f);
  first = __fmul_rn(towards * fmaf(-q, q, 1.0f), c);
  second = __fmul_rn(towards * q, s);
}

// The normals of the elements [4 block, 4 block + 4) of a sample.
__device__ inline float4 normals(int64_t block, const Noise& noise, uint64_t sample) {
  const uint4 words = philox(static_cast<uint32_t>(block), noise, sample);
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

// How a thread reaches the elements of a run.
enum class Access {
  any,     // four neighbours in logical order, one at a time
  packed,  // packs that every tensor has aligned and in the order of its memory; the noise, if any, is stored
  drawn,   // the same, and the noise is drawn: whole Philox blocks
  tiled,   // channels_last with noise drawn: four pixels of four channels are four Philox blocks, and a pack of each pixel
};

// A thread's elements.
template <typename S, Access kAccess>
class Run {
 public:
  using C = typename Storage<S>::Compute;
  static constexpr bool kAny = kAccess == Access::any;
  static constexpr bool kTiled = kAccess == Access::tiled;
  static constexpr int kPack = !kAny && !kTiled && sizeof(S) == 2 ? 8 : 4;
  static constexpr int kCount = kTiled ? 16 : kPack;
  // Runs that a thread draws before it asks whether there are more: what comes before the first costs a third of drawing one, and
  // in small samples threads are worth more.
  static constexpr int kAtOnce = kAccess == Access::drawn && sizeof(S) == 2 ? 2 : 1;

  // How many runs a sample has.
  __host__ __device__ static int64_t per_sample(const Layout& layout) {
    return static_cast<int64_t>(static_cast<uint64_t>(layout.sample() + kCount - 1) / kCount);
  }
  // How many threads a kernel has for them that takes kAtOnce.
  static int64_t threads(const Layout& layout) { return (per_sample(layout) + kAtOnce - 1) / kAtOnce; }

  // What a thread knows of a sample before its first run.
  struct Sample {
    const Layout& layout;
    int64_t first;        // element of the sample in memory
    int64_t b;
    uint64_t per_pixels;  // of a Walk
    uint64_t number = 0;  // in the noise's address
    C alpha = C(1), sigma = C(1);

    __device__ Sample(const Layout& layout, int64_t b)
        : layout(layout), first(b * layout.sample()), b(b), per_pixels(kAny ? Walk::reciprocal(layout) : 0) {}
    __device__ Sample(const Layout& layout, int64_t b, const Noise& noise) : Sample(layout, b) {
      if (noise.samples != nullptr) number = static_cast<uint64_t>(noise.samples[b]);
    }
    __device__ Sample(const Layout& layout, int64_t b, const Target& target) : Sample(layout, b, target.noise) {
      if (target.prediction != Prediction::v_prediction) return;
      alpha = number_of(target.alpha, b);
      sigma = number_of(target.sigma, b);
    }

   private:
    __device__ static C number_of(const PerSample& values, int64_t b) { return diffpp::number<C>(values, b); }
  };

  __device__ Run(const Sample& sample, int64_t number) : sample_(sample), number_(number) {
    const Layout& layout = sample.layout;
    const int64_t first = sample.first;
    if constexpr (kAny) {
      Walk walk(layout, sample.per_pixels, number * kCount);
#pragma unroll
      for (int lane = 0; lane < kCount; ++lane, walk.next())
        at_[lane] = number * kCount + lane < layout.sample() ? first + walk.in_memory() : -1;
    } else if constexpr (kTiled) {
      // Neighbouring threads take neighbouring channels. A sample has fewer than 2^34 elements where noise is drawn.
      const uint32_t channels = static_cast<uint32_t>(layout.channels) / 4;
      const uint32_t pixels = static_cast<uint32_t>(number) / channels, channel = static_cast<uint32_t>(number) % channels;
      at_[0] = first + 4 * (pixels * layout.channels + channel);
      number_ = 4 * channel * (layout.pixels / 4) + pixels;
    } else {
      at_[0] = first + number * kCount;
    }
  }

  // Whether a lane holds an element: the last run of a sample may be shorter. Other lanes load as zero.
  __device__ bool holds(int lane) const { return !kAny || at_[lane] >= 0; }

  __device__ void load(const void* array, C (&to)[kCount]) const {
    const S* from = static_cast<const S*>(array);
    if constexpr (kAny) {
#pragma unroll
      for (int lane = 0; lane < kCount; ++lane) to[lane] = holds(lane) ? to_compute(from[at_[lane]]) : C(0);
    } else {
#pragma unroll
      for (int pack = 0; pack < kCount / kPack; ++pack) {
        const auto values = *reinterpret_cast<const Pack<S, kPack>*>(from + at_[0] + pack * sample_.layout.channels);
#pragma unroll
        for (int lane = 0; lane < kPack; ++lane) to[pack * kPack + lane] = to_compute(values.values[lane]);
      }
    }
  }

  __device__ void store(const C (&values)[kCount], void* array) const {
    S* to = static_cast<S*>(array);
    if constexpr (kAny) {
#pragma unroll
      for (int lane = 0; lane < kCount; ++lane)
        if (holds(lane)) to[at_[lane]] = to_stored<S>(values[lane]);
    } else {
#pragma unroll
      for (int pack = 0; pack < kCount / kPack; ++pack) {
        C of_pack[kPack];
#pragma unroll
        for (int lane = 0; lane < kPack; ++lane) of_pack[lane] = values[pack * kPack + lane];
        store_pack(of_pack, reinterpret_cast<Pack<S, kPack>*>(to + at_[0] + pack * sample_.layout.channels));
      }
    }
  }

  __device__ void noise(const Noise& noise, C (&to)[kCount]) const {
    if (kAccess == Access::packed || (kAny && noise.stored != nullptr)) return load(noise.stored, to);
    // Of tiles, a block is four pixels of a channel.
    constexpr int to_lane = kTiled ? 4 : 1, to_block = kTiled ? 1 : 4;
#pragma unroll
    for (int block = 0; block < kCount / 4; ++block) {
      const int64_t number = kTiled ? number_ + block * (sample_.layout.pixels / 4) : number_ * (kCount / 4) + block;
      const float4 drawn = normals(number, noise, sample_.number);
      const float lanes[4] = {drawn.x, drawn.y, drawn.z, drawn.w};
#pragma unroll
      for (int lane = 0; lane < 4; ++lane) to[block * to_block + lane * to_lane] = static_cast<C>(lanes[lane]);
    }
  }

  __device__ void target(const Target& a, C (&to)[kCount]) const {
    if (a.prediction == Prediction::sample) return load(a.x0, to);
    noise(a.noise, to);
    if (a.prediction == Prediction::epsilon) return;
    C x0[kCount];
    load(a.x0, x0);
#pragma unroll
    for (int lane = 0; lane < kCount; ++lane) to[lane] = fma(sample_.alpha, to[lane], -sample_.sigma * x0[lane]);
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
  const Sample& sample_;
  int64_t number_;  // of tiles, that of their first Philox block
  int64_t at_[kAny ? kCount : 1];
};

// For work that no noise takes part in: elements go by their place in memory.
__device__ inline Layout in_any_order(const Layout& layout) { return {layout.batch, 1, layout.sample()}; }

// The best access that there is. Noise that is drawn has the order of memory in row-major tensors alone.
template <typename S>
Access access(const Layout& layout, bool drawn, std::initializer_list<const void*> arrays) {
  constexpr int kPack = Run<S, Access::packed>::kPack;
  bool packs = layout.sample() % kPack == 0, fours = true;
  for (const void* array : arrays) {
    packs = packs && aligned<Pack<S, kPack>>(array);
    fours = fours && aligned<Pack<S, 4>>(array);
  }
  if (!drawn) return packs ? Access::packed : Access::any;
  if (layout.channels == 1) return packs ? Access::drawn : Access::any;
  // Sixteen float64 are more than a thread's registers hold.
  const bool tiles = fours && sizeof(S) < 8 && layout.channels % 4 == 0 && layout.pixels % 4 == 0;
  return tiles ? Access::tiled : Access::any;
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
