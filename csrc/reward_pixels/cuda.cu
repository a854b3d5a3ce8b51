#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <tuple>
#include <vector>

#include "../common/cuda.cuh"
#include "arguments.h"
#include "tables.h"

namespace diffpp::reward_pixels::cuda {
namespace {

// Elements of a row that a block has at a time, one for each thread. Its first may be up to kSlack before that of the window.
constexpr int64_t kBlock = kThreads;
constexpr int64_t kSlack = 7;

// Input rows that are staged at a time.
constexpr int kStaged = 8;

// Output rows of a block.
template <typename T>
constexpr int kBand = sizeof(T) == sizeof(double) ? 8 : 16;

// The outputs [t tile, (t + 1) tile) of the axis read the inputs [windows[2 t], windows[2 t + 1]). Of the columns, `tile` is 0
// where the window of a single pixel is too wide for a block.
struct TiledAxis : Axis {
  int64_t tile = 0;
  const int64_t* windows = nullptr;
};

// A call with its tables, in the GPU's memory, as is `mean`.
struct Tiled : Arguments {
  TiledAxis rows;
  TiledAxis columns;
  const double* per_std;  // [C], 1 / std: a division takes registers
};

template <typename T>
__device__ inline T read(const void* array, Dtype dtype, int64_t i) {
  switch (dtype) {
    case Dtype::float32: return static_cast<T>(static_cast<const float*>(array)[i]);
    case Dtype::float64: return static_cast<T>(static_cast<const double*>(array)[i]);
    case Dtype::bfloat16: return static_cast<T>(to_compute(static_cast<const __nv_bfloat16*>(array)[i]));
    default: return static_cast<T>(to_compute(static_cast<const __half*>(array)[i]));
  }
}

// The work on a pixel before and after the resize. `S` is the dtype of the images: that of `from` for the forward
// direction, of `to` for the adjoint; the other one is looked up for each pixel, of which there are few.
template <typename S, bool kAdjoint>
struct Edge {
  using T = typename Storage<S>::Compute;

  const Tiled& a;
  T low, high, per_range, least, most;

  __device__ explicit Edge(const Tiled& a)
      : a(a),
        low(static_cast<T>(a.low)),
        high(static_cast<T>(a.high)),
        per_range(T(1) / static_cast<T>(a.high - a.low)),
        least(a.clamp ? T(0) : -static_cast<T>(INFINITY)),
        most(a.clamp ? T(1) : static_cast<T>(INFINITY)) {}

  // The channel of place `c` in a pixel of a plane. A division of 64 bits would take longer; the binding refuses more planes.
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

__host__ __device__ inline int64_t tiles_of(const Tiled& a) {
  return (a.columns.out + a.columns.tile - 1) / a.columns.tile;
}

// A block makes a tile of a band of output rows: it stages the input rows that the band reads, few at a time, adds each to the
// band's rows, one column per thread, and then resizes the columns of what came out. `packed`: every row of `from` begins
// and ends with a whole pack.
template <typename S, bool kAdjoint>
__global__ void __launch_bounds__(kThreads, 3) resample(const __grid_constant__ Tiled a, bool packed) {
  using T = typename Storage<S>::Compute;
  constexpr int kRows = kBand<T>;
  constexpr int kPack = 16 / sizeof(S);
  static_assert(kPack - 1 <= kSlack && kStaged % kPack == 0, "a thread stages whole packs");
  __shared__ T staged[kStaged][kBlock];
  __shared__ T band[kRows][kBlock];
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
            const int row = number / (kBlock / kPack), column = number % (kBlock / kPack) * kPack;
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
            staged[number / (kBlock / kPack)][number % (kBlock / kPack) * kPack + lane] = next[k * kPack + lane];
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
__global__ void __launch_bounds__(kThreads, 3) resample_directly(const __grid_constant__ Tiled a) {
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
void launch(const char* op, const Tiled& a, void* stream) {
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

// The inputs that each tile's outputs read: [tiles, 2] as `windows` of TiledAxis.
std::vector<int64_t> windows_of(const AxisTable& table, int64_t tile) {
  std::vector<int64_t> windows;
  for (int64_t begin = 0; begin < table.out; begin += tile) {
    int64_t first = table.in, end = 0;
    for (int64_t o = begin; o < std::min(begin + tile, table.out); ++o) {
      if (table.count[o] == 0) continue;
      first = std::min(first, table.first[o]);
      end = std::max(end, table.first[o] + table.count[o]);
    }
    windows.insert(windows.end(), {end > 0 ? first : 0, end});
  }
  return windows;
}

// The most output pixels of `inner` channels whose windows a block can hold, balanced over the tiles; 0 if a single
// one is too wide.
int64_t column_tile(const AxisTable& table, int64_t inner) {
  const auto fits = [&](int64_t tile) {
    const std::vector<int64_t> windows = windows_of(table, tile);
    for (size_t t = 0; t < windows.size(); t += 2)
      if ((windows[t + 1] - windows[t]) * inner + kSlack > kBlock) return false;
    return true;
  };
  int64_t tile = std::min(table.out, kBlock / inner);
  while (tile > 0 && !fits(tile)) --tile;
  if (tile == 0) return 0;
  const int64_t tiles = (table.out + tile - 1) / tile;
  return (table.out + tiles - 1) / tiles;
}

// The tables of both axes and directions with mean and std, in one piece of a GPU's memory.
class GpuTables {
 public:
  GpuTables(const Arguments& a, const Upload& upload) : wide_(a.wide) {
    const auto rows = tables_of(a.height), columns = tables_of(a.width);
    const int64_t band = wide_ ? kBand<double> : kBand<float>;
    add(rows->forward, band, axes_[0]);
    add(columns->forward, column_tile(columns->forward.table(), a.inner), axes_[1]);
    add(rows->adjoint, band, axes_[2]);
    add(columns->adjoint, column_tile(columns->adjoint.table(), a.inner), axes_[3]);
    mean_ = append(a.mean, a.channels * sizeof(double));
    std::vector<double> per_std(a.std, a.std + a.channels);
    for (double& value : per_std) value = 1.0 / value;
    per_std_ = append(per_std.data(), per_std.size() * sizeof(double));
    memory_ = static_cast<const char*>(upload.copy(bytes_.data(), static_cast<int64_t>(bytes_.size()), upload.context));
    bytes_ = {};
  }

  Tiled call(const Arguments& arguments) const {
    Tiled a{arguments, axis(axes_[arguments.adjoint ? 2 : 0]), axis(axes_[arguments.adjoint ? 3 : 1]),
            at<double>(per_std_)};
    a.mean = at<double>(mean_);
    return a;
  }

 private:
  struct Entry {
    TiledAxis sizes;
    size_t first, count, weights, windows;
  };

  template <typename T>
  const T* at(size_t byte) const {
    return reinterpret_cast<const T*>(memory_ + byte);
  }

  TiledAxis axis(const Entry& entry) const {
    TiledAxis result = entry.sizes;
    result.first = at<int64_t>(entry.first);
    result.count = at<int64_t>(entry.count);
    result.weights = at<char>(entry.weights);
    result.windows = at<int64_t>(entry.windows);
    return result;
  }

  void add(const Weights& weights, int64_t tile, Entry& entry) {
    const AxisTable& table = weights.table();
    entry.sizes = {weights.view(wide_), tile, nullptr};
    entry.first = append(table.first.data(), table.first.size() * sizeof(int64_t));
    entry.count = append(table.count.data(), table.count.size() * sizeof(int64_t));
    entry.weights =
        append(weights.weights(wide_), table.weights.size() * (wide_ ? sizeof(double) : sizeof(float)));
    const std::vector<int64_t> windows = tile > 0 ? windows_of(table, tile) : std::vector<int64_t>();
    entry.windows = append(windows.data(), windows.size() * sizeof(int64_t));
  }

  // Returns where the data begins, a multiple of eight bytes.
  size_t append(const void* data, size_t size) {
    const size_t begin = bytes_.size();
    bytes_.resize((begin + size + 7) / 8 * 8);
    if (size > 0) std::memcpy(bytes_.data() + begin, data, size);
    return begin;
  }

  bool wide_;
  Entry axes_[4];
  size_t mean_, per_std_;
  std::vector<char> bytes_;
  const char* memory_ = nullptr;
};

// The tables on a GPU, copied there by the first call with them. They stay for as long as the process, for a graph may hold
// their address.
const GpuTables& gpu_tables_of(const Arguments& a, const Upload& upload) {
  using Numbers = std::vector<double>;
  using ResizeKey = decltype(key_of(a.height));
  using Key = std::tuple<int32_t, bool, int64_t, ResizeKey, ResizeKey, Numbers, Numbers>;
  static std::mutex mutex;
  static std::map<Key, GpuTables> cache;
  const std::lock_guard<std::mutex> lock(mutex);
  const Key key(
      upload.device, a.wide, a.inner, key_of(a.height), key_of(a.width), Numbers(a.mean, a.mean + a.channels),
      Numbers(a.std, a.std + a.channels));
  const auto found = cache.find(key);
  if (found != cache.end()) return found->second;
  return cache.try_emplace(key, a, upload).first->second;
}

}  // namespace

void run(const Arguments& arguments, const Upload& upload, void* stream) {
  const GpuTables& tables = gpu_tables_of(arguments, upload);
  if (arguments.planes == 0) return;
  const Tiled a = tables.call(arguments);
  a.adjoint ? launch<true>("reward_pixels_backward", a, stream) : launch<false>("reward_pixels", a, stream);
}

}  // namespace diffpp::reward_pixels::cuda
