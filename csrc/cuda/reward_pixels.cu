#include "elements.cuh"
#include "kernels.h"
#include "launch.cuh"

namespace diffpp::cuda {
namespace {

static_assert(kGpuTile == kThreads, "a thread per element of a tile's rows");

// Input rows that are staged at a time.
constexpr int kStaged = 8;

template <typename T>
constexpr int kBand = static_cast<int>(band_rows(sizeof(T) == sizeof(double)));

template <typename T>
__device__ inline T read(const void* array, Dtype dtype, int64_t i) {
  switch (dtype) {
    case Dtype::float32: return static_cast<T>(static_cast<const float*>(array)[i]);
    case Dtype::float64: return static_cast<T>(static_cast<const double*>(array)[i]);
    case Dtype::bfloat16: return static_cast<T>(to_compute(static_cast<const __nv_bfloat16*>(array)[i]));
    default: return static_cast<T>(to_compute(static_cast<const __half*>(array)[i]));
  }
}

// What is done to a pixel before and after the resize. `S` is the dtype of the images: that of `from` for the forward
// direction, of `to` for the adjoint; the other one is looked up for each pixel, of which there are few.
template <typename S, bool kAdjoint>
struct Edge {
  using T = typename Storage<S>::Compute;

  const RewardPixels& a;
  T low, high, per_range, least, most;

  __device__ explicit Edge(const RewardPixels& a)
      : a(a),
        low(static_cast<T>(a.low)),
        high(static_cast<T>(a.high)),
        per_range(T(1) / static_cast<T>(a.high - a.low)),
        least(a.clamp ? T(0) : -static_cast<T>(INFINITY)),
        most(a.clamp ? T(1) : static_cast<T>(INFINITY)) {}

  // Of a plane and a place in its pixels. A division of 64 bits would take longer; the binding refuses more planes.
  __device__ int64_t channel(int64_t plane, int64_t c) const {
    return a.inner == 1 ? static_cast<uint32_t>(plane) % static_cast<uint32_t>(a.channels) : c;
  }

  // Value range to [0, 1] and clamp. In this order NaN stays NaN.
  __device__ T normalise(T value) const {
    T pixel = (value - low) * per_range;
    pixel = least > pixel ? least : pixel;
    return most < pixel ? most : pixel;
  }

  __device__ T per_std(int64_t channel) const { return static_cast<T>(a.per_std[channel]); }

  // Element i of `from`; `scale` is its channel's 1 / std, for the adjoint.
  __device__ T load(int64_t i, T scale) const {
    if constexpr (kAdjoint) return read<T>(a.from, a.from_dtype, i) * scale;
    return normalise(to_compute(static_cast<const S*>(a.from)[i]));
  }

  __device__ void store(T resized, int64_t channel, int64_t i) const {
    if constexpr (kAdjoint) {
      T grad = resized * per_range;
      if (a.images != nullptr) {
        const T image = to_compute(static_cast<const S*>(a.images)[i]);
        grad = image >= low && image <= high ? grad : T(0);
      }
      static_cast<S*>(a.to)[i] = to_stored<S>(grad);
    } else {
      put(a.to, a.to_dtype, i, (resized - static_cast<T>(a.mean[channel])) * per_std(channel));
    }
  }
};

__host__ __device__ inline int64_t tiles_of(const RewardPixels& a) {
  return (a.columns.out + a.columns.tile - 1) / a.columns.tile;
}

// A block makes a tile of a band of output rows: it stages the input rows that the band reads, few at a time, adds each to the
// band's rows, one column per thread, and then resizes the columns of what came out. `packed`: every row of `from` begins
// and ends with a whole pack.
template <typename S, bool kAdjoint>
__global__ void __launch_bounds__(kThreads, 3) resample(const __grid_constant__ RewardPixels a, bool packed) {
  using T = typename Storage<S>::Compute;
  constexpr int kRows = kBand<T>;
  constexpr int kPack = 16 / sizeof(S);
  static_assert(kPack - 1 <= kGpuSlack && kStaged % kPack == 0, "a thread stages whole packs");
  __shared__ T staged[kStaged][kGpuTile];
  __shared__ T band[kRows][kGpuTile];
  __shared__ int64_t first[kRows], end[kRows];
  const Edge<S, kAdjoint> edge(a);
  const int thread = static_cast<int>(threadIdx.x);
  const auto tiles = static_cast<uint32_t>(tiles_of(a));
  const int64_t tile = blockIdx.x % tiles, top = static_cast<int64_t>(blockIdx.x / tiles) * kRows;
  const int64_t line = a.columns.in * a.inner;
  for (int64_t plane = blockIdx.y; plane < a.planes; plane += gridDim.y) {
    const int rows = static_cast<int>(a.rows.out - top < kRows ? a.rows.out - top : kRows);
    const int64_t row_begin = a.rows.windows[2 * (top / kRows)], row_end = a.rows.windows[2 * (top / kRows) + 1];
    const int64_t end_element = a.columns.windows[2 * tile + 1] * a.inner;
    int64_t begin_element = a.columns.windows[2 * tile] * a.inner;
    if (packed) begin_element -= begin_element % kPack;
    const int64_t element = begin_element + thread;
    if (thread < kRows) {
      first[thread] = thread < rows ? a.rows.first[top + thread] : 0;
      end[thread] = thread < rows ? first[thread] + a.rows.count[top + thread] : 0;
    }
    // Only the forward direction is packed: of the adjoint, the window's first element is the first of a pixel.
    const T per_std = kAdjoint ? edge.per_std(edge.channel(plane, thread % static_cast<int>(a.inner))) : T(1);

    // The thread's share of the rows [i, i + kStaged): packs, or its own column.
    T next[kStaged];
    const auto load = [&](int64_t i) {
      const int64_t offset = (plane * a.rows.in + i) * line + begin_element;
      if constexpr (!kAdjoint) {
        if (packed) {
#pragma unroll
          for (int k = 0; k < kStaged / kPack; ++k) {
            const int number = k * kThreads + thread;
            const int row = number / (kGpuTile / kPack), column = number % (kGpuTile / kPack) * kPack;
            if (i + row >= row_end || begin_element + column >= end_element) continue;
            const auto pack = *reinterpret_cast<const Pack<S, kPack>*>(
                static_cast<const S*>(a.from) + offset + row * line + column);
#pragma unroll
            for (int lane = 0; lane < kPack; ++lane)
              next[k * kPack + lane] = edge.normalise(to_compute(pack.values[lane]));
          }
          return;
        }
      }
#pragma unroll
      for (int row = 0; row < kStaged; ++row)
        if (i + row < row_end && element < end_element) next[row] = edge.load(offset + row * line + thread, per_std);
    };
    const auto stage = [&] {
      if (!kAdjoint && packed) {
#pragma unroll
        for (int k = 0; k < kStaged / kPack; ++k) {
          const int number = k * kThreads + thread;
#pragma unroll
          for (int lane = 0; lane < kPack; ++lane)
            staged[number / (kGpuTile / kPack)][number % (kGpuTile / kPack) * kPack + lane] = next[k * kPack + lane];
        }
      } else {
#pragma unroll
        for (int row = 0; row < kStaged; ++row) staged[row][thread] = next[row];
      }
    };

    T sums[kRows] = {};
    const T* row_weights = static_cast<const T*>(a.rows.weights) + top * a.rows.taps;
    if (row_begin < row_end) load(row_begin);
    for (int64_t i = row_begin; i < row_end; i += kStaged) {
      stage();
      __syncthreads();
      // On its way while the rows before are used.
      if (i + kStaged < row_end) load(i + kStaged);
      if (element < end_element) {
#pragma unroll
        for (int o = 0; o < kRows; ++o) {
          const int from = static_cast<int>((first[o] > i ? first[o] : i) - i);
          const int until = static_cast<int>((end[o] < i + kStaged ? end[o] : i + kStaged) - i);
          const T* weights = row_weights + o * a.rows.taps + (i - first[o]);
          for (int k = from; k < until; ++k) sums[o] = fma(weights[k], staged[k][thread], sums[o]);
        }
      }
      __syncthreads();
    }
#pragma unroll
    for (int o = 0; o < kRows; ++o) band[o][thread] = sums[o];
    __syncthreads();

    // A thread per element: neighbours write to neighbouring addresses, and read without conflicts of banks when enlarging.
    const int64_t begin_pixel = tile * a.columns.tile;
    const int64_t pixels = a.columns.out - begin_pixel < a.columns.tile ? a.columns.out - begin_pixel : a.columns.tile;
    const int inner = static_cast<int>(a.inner);
    const int width = static_cast<int>(pixels) * inner;
    for (int i = thread; i < rows * width; i += kThreads) {
      const int row = i / width, at = i % width;
      const int64_t pixel = begin_pixel + (inner == 1 ? at : at / inner);
      const int c = inner == 1 ? 0 : at % inner;
      const int count = static_cast<int>(a.columns.count[pixel]);
      const T* weights = static_cast<const T*>(a.columns.weights) + pixel * a.columns.taps;
      const T* from = band[row] + (a.columns.first[pixel] * a.inner + c - begin_element);
      T sum = 0;
      for (int k = 0; k < count; ++k) sum = fma(weights[k], from[k * inner], sum);
      edge.store(
          sum, edge.channel(plane, c),
          (plane * a.rows.out + top + row) * a.columns.out * a.inner + begin_pixel * a.inner + at);
    }
    __syncthreads();
  }
}

// Where the window of a single pixel does not fit in a tile (an image shrunk to a hundredth, hundreds of channels innermost): a
// thread per output element adds up all of its inputs, in the order of the tiles: rows, then columns.
template <typename S, bool kAdjoint>
__global__ void __launch_bounds__(kThreads, 3) resample_directly(const __grid_constant__ RewardPixels a) {
  using T = typename Storage<S>::Compute;
  const Edge<S, kAdjoint> edge(a);
  const int64_t line = a.columns.out * a.inner;
  const uint32_t element = blockIdx.x * kThreads + threadIdx.x;
  if (element >= line) return;
  const int64_t pixel = element / static_cast<uint32_t>(a.inner), c = element % static_cast<uint32_t>(a.inner);
  for (int64_t plane = blockIdx.z; plane < a.planes; plane += gridDim.z) {
    const int64_t channel = edge.channel(plane, c);
    const T per_std = kAdjoint ? edge.per_std(channel) : T(1);
    for (int64_t row = blockIdx.y; row < a.rows.out; row += gridDim.y) {
      const T* row_weights = static_cast<const T*>(a.rows.weights) + row * a.rows.taps;
      const T* weights = static_cast<const T*>(a.columns.weights) + pixel * a.columns.taps;
      T sum = 0;
      for (int64_t k = 0; k < a.columns.count[pixel]; ++k) {
        const int64_t from = (plane * a.rows.in + a.rows.first[row]) * a.columns.in + a.columns.first[pixel] + k;
        T of_column = 0;
        for (int64_t r = 0; r < a.rows.count[row]; ++r)
          of_column = fma(row_weights[r], edge.load((from + r * a.columns.in) * a.inner + c, per_std), of_column);
        sum = fma(weights[k], of_column, sum);
      }
      edge.store(sum, channel, (plane * a.rows.out + row) * line + element);
    }
  }
}

template <bool kAdjoint>
void launch(const char* op, const RewardPixels& a, void* stream) {
  if (a.planes == 0) return;
  const auto on = static_cast<cudaStream_t>(stream);
  dispatch(kAdjoint ? a.to_dtype : a.from_dtype, [&](auto* kind) {
    using S = std::remove_pointer_t<decltype(kind)>;
    using T = typename Storage<S>::Compute;
    constexpr int64_t kMost = 65535;  // of a grid's second and third extent
    const auto planes = static_cast<unsigned>(a.planes < kMost ? a.planes : kMost);
    if (a.columns.tile == 0) {
      const dim3 grid(
          static_cast<unsigned>((a.columns.out * a.inner + kThreads - 1) / kThreads),
          static_cast<unsigned>(a.rows.out < kMost ? a.rows.out : kMost), planes);
      resample_directly<S, kAdjoint><<<grid, kThreads, 0, on>>>(a);
      return;
    }
    using P = Pack<S, 16 / sizeof(S)>;
    const bool packed = !kAdjoint && a.columns.in * a.inner % (16 / sizeof(S)) == 0 && aligned<P>(a.from);
    const int64_t bands = (a.rows.out + kBand<T> - 1) / kBand<T>;
    const dim3 grid(static_cast<unsigned>(bands * tiles_of(a)), planes);
    resample<S, kAdjoint><<<grid, kThreads, 0, on>>>(a, packed);
  });
  check_launch(op);
}

}  // namespace

void reward_pixels_forward(const RewardPixels& a, void* stream) { launch<false>("reward_pixels", a, stream); }
void reward_pixels_backward(const RewardPixels& a, void* stream) { launch<true>("reward_pixels_backward", a, stream); }

}  // namespace diffpp::cuda
