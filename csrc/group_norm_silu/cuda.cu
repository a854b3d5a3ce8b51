#include <algorithm>
#include <cmath>
#include <numeric>

#include "../common/cuda.cuh"
#include "arguments.h"

namespace diffpp::group_norm_silu::cuda {
namespace {

template <typename C>
struct alignas(2 * sizeof(C)) Pair {
  C first;
  C second;
};

__host__ __device__ constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

__device__ inline int64_t group_of(const Shape& shape, int64_t c) {
  return static_cast<uint32_t>(c) / static_cast<uint32_t>(shape.per_group());
}

// How the work is cut. Either way a first kernel leaves pairs of partial results for every group, `entries()` of them; the
// second kernel adds them up where it needs them.

// channels_last: a block takes a band of a sample's pixels and a tile of their channels. A thread keeps to kPack neighbouring
// channels, and `rows` pixels are worked on at a time.
struct Bands {
  int64_t columns;  // threads side by side
  int64_t rows;
  int64_t width;  // channels of a tile; the last may be narrower
  int64_t tiles;
  int64_t band;  // pixels of a band; the last may be shorter
  int64_t bands;

  __host__ __device__ int64_t entries(const Shape&) const { return tiles * bands; }
  __host__ __device__ int64_t items(const Shape& shape) const { return shape.batch * entries(shape); }
};

Bands bands_of(const Shape& shape, int64_t pack, int64_t bytes_per_element) {
  // Two blocks for each SM of a large GPU: loads in flight to saturate its memory. Reading all pairs of a sample again takes a
  // block bands * groups pairs of 8 bytes; more than a quarter of what it then reads of the sample would not pay.
  constexpr int64_t wanted = 264;
  Bands result{};
  const int64_t vectors = shape.channels / pack;
  result.tiles = divide_up(vectors, kThreads);
  result.columns = divide_up(vectors, result.tiles);
  result.rows = kThreads / result.columns;
  result.width = result.columns * pack;
  const double bytes = static_cast<double>(shape.channels * shape.pixels * bytes_per_element);
  const int64_t paying = static_cast<int64_t>(std::sqrt(bytes / static_cast<double>(32 * shape.groups)));
  int64_t share = wanted / (shape.batch * result.tiles);
  share = share < paying ? share : paying;
  share = share > 1 ? share : 1;
  result.band = divide_up(divide_up(shape.pixels, share), result.rows) * result.rows;
  result.bands = divide_up(shape.pixels, result.band);
  return result;
}

// Row-major: a warp takes a piece of a channel.
struct Strips {
  int64_t length;  // of a piece, a multiple of kPack; the last may be shorter
  int64_t pieces;  // of a channel

  __host__ __device__ int64_t entries(const Shape& shape) const { return shape.per_group() * pieces; }
  __host__ __device__ int64_t items(const Shape& shape) const {
    return shape.batch * shape.channels * pieces;
  }
};

Strips strips_of(const Shape& shape, int64_t pack) {
  // 32 warps for each SM of a large GPU, if that leaves each lane a few packs.
  constexpr int64_t wanted = 132 * 32;
  const int64_t most = divide_up(shape.pixels, 4 * kWarp * pack);
  int64_t share = divide_up(wanted, shape.batch * shape.channels);
  share = share < most ? share : most;
  const int64_t length = divide_up(divide_up(shape.pixels, share), pack) * pack;
  return {length, divide_up(shape.pixels, length)};
}

// For float32 within 4 ulp, but for y below -87, where it may be 0. For 2-byte dtypes by two instructions that approximate, relatively
// within 2^-22 and 2^-24 |y|.
template <typename S, typename C>
__device__ inline C sigmoid(C y) {
  if constexpr (sizeof(S) == 8) return 1.0 / (1.0 + exp(-y));
  else if constexpr (sizeof(S) == 4) return __fdividef(1.0f, 1.0f + expf(-y));
  else return approximate_reciprocal(1.0f + approximate_power(-1.44269504f * y));
}

template <typename S, bool kSilu, typename C>
__device__ inline C activate(C y) {
  return kSilu ? y * sigmoid<S>(y) : y;
}

// grad times the derivative of the activation at y.
template <typename S, bool kSilu, typename C>
__device__ inline C through(C grad, C y) {
  if (!kSilu) return grad;
  const C s = sigmoid<S>(y);
  return grad * s * fma(y, C(1) - s, C(1));
}

// y = (x - mean) scale + bias. The mean goes off first: x scale + (bias - mean scale) would cancel where it is large.
template <typename C>
struct Affine {
  C mean;
  C scale;  // weight rstd
  C bias;

  Affine() = default;
  __device__ Affine(const Inputs& a, int64_t c, C mean, C rstd)
      : mean(mean), scale(number<C>(a.weight, c, C(1)) * rstd), bias(number<C>(a.bias, c)) {}
  __device__ C operator()(C x) const { return fma(x - mean, scale, bias); }
};

// Packs that a thread loads before it works on them, so that several loads are in flight.
constexpr int kAhead = 4;

// Calls work(pack of x, pack of grad, index) for first, first + step, ... below end; `grad` may be null.
template <typename P, bool kGrad, typename Work>
__device__ inline void for_packs(
    const P* x, const P* grad, int64_t first, int64_t step, int64_t end, const Work& work) {
  constexpr int ahead = kGrad ? kAhead / 2 : kAhead;
  for (int64_t i = first; i < end; i += ahead * step) {
    P xs[ahead], grads[kGrad ? ahead : 1];
#pragma unroll
    for (int u = 0; u < ahead; ++u) {
      if (i + u * step < end) {
        xs[u] = x[i + u * step];
        if constexpr (kGrad) grads[u] = grad[i + u * step];
      }
    }
#pragma unroll
    for (int u = 0; u < ahead; ++u)
      if (i + u * step < end) work(xs[u], grads[kGrad ? u : 0], i + u * step);
  }
}

// Mean and sum of squared deviations from it of the values of each lane of a pack: Welford's recurrence on their distances
// from the first one. A mean that is far from zero would be rounded at each step, by as much as a small deviation.
template <typename C, int kPack>
struct Welford {
  C first[kPack] = {};
  C mean[kPack] = {};  // of the distances
  C squares[kPack] = {};
  C n = 0;

  template <typename S>
  __device__ void add(const Pack<S, kPack>& pack) {
    const bool none = n == C(0);
    n += C(1);
    const C share = C(1) / n;
#pragma unroll
    for (int lane = 0; lane < kPack; ++lane) {
      const C x = to_compute(pack.values[lane]);
      first[lane] = none ? x : first[lane];
      const C distance = x - first[lane];
      const C d = distance - mean[lane];
      mean[lane] = fma(d, share, mean[lane]);
      squares[lane] = fma(d, distance - mean[lane], squares[lane]);
    }
  }

  __device__ double mean_of(int lane) const {
    return static_cast<double>(first[lane]) + static_cast<double>(mean[lane]);
  }
};

// Mean and sum of squares of all values from those of parts (Chan, Golub, LeVeque, "Algorithms for computing the sample
// variance", 1983, for any number of parts): part(i, n, mean, squares) tells part i < parts. By a warp; every lane gets both.
template <typename Part>
__device__ inline void merge(int64_t parts, const Part& part, double& mean, double& squares) {
  double n = 0.0, sum = 0.0;
  for (int64_t i = threadIdx.x % kWarp; i < parts; i += kWarp) {
    double more = 0.0, of_part = 0.0, unused;
    part(i, more, of_part, unused);
    if (more == 0.0) continue;
    n += more;
    sum += more * of_part;
  }
  n = warp_sum(n);
  mean = warp_sum(sum) / n;
  squares = 0.0;
  for (int64_t i = threadIdx.x % kWarp; i < parts; i += kWarp) {
    double more = 0.0, of_part = 0.0, inside = 0.0;
    part(i, more, of_part, inside);
    if (more == 0.0) continue;
    const double d = of_part - mean;
    squares += inside + more * d * d;
  }
  squares = warp_sum(squares);
}

// Mean and rstd of a group from its pairs, by a warp; every lane gets both. count(e) is how many values entry e stands for.
template <typename C, typename Count>
__device__ inline Pair<C> moments(
    const Forward& a, int64_t group, int64_t entries, const Count& count) {
  const Pair<C>* pairs = reinterpret_cast<const Pair<C>*>(a.partials) + group * entries;
  double mean, squares;
  merge(
      entries,
      [&](int64_t e, double& n, double& of_part, double& inside) {
        n = static_cast<double>(count(e));
        if (n == 0.0) return;
        const Pair<C> pair = pairs[e];
        of_part = static_cast<double>(pair.first);
        inside = static_cast<double>(pair.second);
      },
      mean, squares);
  const double n = static_cast<double>(a.shape.per_group() * a.shape.pixels);
  return {static_cast<C>(mean), static_cast<C>(1.0 / sqrt(squares / n + a.eps))};
}

template <typename C>
__device__ inline void write_moments(const Forward& a, int64_t group, const Pair<C>& moments) {
  if (threadIdx.x % kWarp != 0) return;
  static_cast<C*>(a.mean)[group] = moments.first;
  static_cast<C*>(a.rstd)[group] = moments.second;
}

// dx = g scale + slope (x - mean) + offset
template <typename C>
struct Terms {
  C slope;
  C offset;

  // From the group's sums of weight g and of weight g (x - mean).
  __device__ Terms(const Shape& shape, double rstd, double sum, double product) {
    const double n = static_cast<double>(shape.per_group() * shape.pixels);
    slope = static_cast<C>(-rstd * rstd * (rstd * product / n));
    offset = static_cast<C>(-rstd * (sum / n));
  }
  Terms() = default;
};

// The gradient's workspace. Row-major has no pairs for groups: those of the channels are few.
template <typename C>
struct Sums {
  Pair<C>* channels;  // of g and of g (x - mean): channels_last [B, bands, C], row-major [B, C, pieces]
  Pair<C>* groups;    // times the weight: channels_last [B, G, entries]
};

template <typename C>
__host__ __device__ Sums<C> sums_of(const Backward& a, int64_t channel_pairs) {
  Pair<C>* pairs = static_cast<Pair<C>*>(a.partials);
  return {pairs, pairs + channel_pairs};
}

__host__ __device__ inline bool needs_parameters(const Backward& a) {
  return a.grad_weight != nullptr || a.grad_bias != nullptr;
}

// The part of the tensor that a block of channels_last works on, and each thread's share of it.
template <int kPack>
struct Place {
  const Shape& shape;
  const Bands& cut;
  int64_t b, tile, band;
  int64_t first_pixel, end_pixel;
  int64_t first_channel, end_channel;  // of the tile
  int64_t first_group, end_group;      // that have channels in the tile
  int64_t row, column, channel;        // of the thread
  bool works;

  __device__ Place(const Shape& shape, const Bands& cut, int64_t item) : shape(shape), cut(cut) {
    band = item % cut.bands;
    tile = item / cut.bands % cut.tiles;
    b = item / cut.entries(shape);
    first_pixel = band * cut.band;
    end_pixel = first_pixel + cut.band < shape.pixels ? first_pixel + cut.band : shape.pixels;
    first_channel = tile * cut.width;
    end_channel = first_channel + cut.width < shape.channels ? first_channel + cut.width : shape.channels;
    first_group = first_channel / shape.per_group();
    end_group = (end_channel - 1) / shape.per_group() + 1;
    const int columns = static_cast<int>(cut.columns);
    row = static_cast<int>(threadIdx.x) / columns;
    column = static_cast<int>(threadIdx.x) % columns;
    channel = first_channel + column * kPack;
    works = row < cut.rows && channel < end_channel;
  }

  // The channels [from, until) of group g in a tile.
  __device__ static int64_t from(const Shape& shape, const Bands& cut, int64_t g, int64_t tile) {
    const int64_t group = g * shape.per_group(), first = tile * cut.width;
    return group > first ? group : first;
  }
  __device__ static int64_t until(const Shape& shape, const Bands& cut, int64_t g, int64_t tile) {
    const int64_t group = (g + 1) * shape.per_group(), end = (tile + 1) * cut.width;
    return group < end ? group : end;
  }

  // The values of group g that entry (tile, band) stands for. Divisions of 64 bits would take longer than all else here.
  __device__ static int64_t count(const Shape& shape, const Bands& cut, int64_t g, int64_t entry) {
    const uint32_t bands = static_cast<uint32_t>(cut.bands), number = static_cast<uint32_t>(entry);
    const int64_t tile = number / bands, first = number % bands * cut.band;
    const int64_t channels = until(shape, cut, g, tile) - from(shape, cut, g, tile);
    const int64_t pixels = first + cut.band < shape.pixels ? cut.band : shape.pixels - first;
    return channels > 0 ? channels * pixels : 0;
  }

  // Pixels of the band that a row of threads has worked on.
  __device__ int64_t pixels_of(int64_t row) const {
    const int64_t pixels = end_pixel - first_pixel;
    return row < pixels ? divide_up(pixels - row, cut.rows) : 0;
  }

  // The packs of the thread's channels, by pixel.
  template <typename P>
  __device__ P* packs(void* array) const {
    return static_cast<P*>(array) + (b * shape.pixels * shape.channels + channel) / kPack;
  }
  template <typename P>
  __device__ const P* packs(const void* array) const {
    return static_cast<const P*>(array) + (b * shape.pixels * shape.channels + channel) / kPack;
  }

  // Calls work(pack of x, pack of grad, index of the pack) for the thread's pixels.
  template <typename P, bool kGrad, typename Work>
  __device__ void for_pixels(const void* x, const void* grad, const Work& work) const {
    if (!works) return;
    const int64_t step = shape.channels / kPack;
    for_packs<P, kGrad>(
        packs<P>(x), kGrad ? packs<P>(grad) : nullptr, (first_pixel + row) * step, cut.rows * step, end_pixel * step,
        work);
  }
};

// The item that a block or a warp works on; grids that are too large for the GPU take turns.
#define DIFFPP_ITEMS(item, count, first, step) \
  for (int64_t item = (first), item##_end = (count); item < item##_end; item += (step))

template <typename S, int kPack>
__global__ void __launch_bounds__(kThreads, 2)
    channels_last_statistics(const __grid_constant__ Forward a, const __grid_constant__ Bands cut) {
  using C = typename Storage<S>::Compute;
  using P = Pack<S, kPack>;
  __shared__ C means[kThreads * kPack], squares[kThreads * kPack];  // [row][channel of the tile]
  DIFFPP_ITEMS(item, cut.items(a.shape), blockIdx.x, gridDim.x) {
    const Place<kPack> place(a.shape, cut, item);
    Welford<C, kPack> values;
    place.template for_pixels<P, false>(a.x, nullptr, [&](const P& x, const P&, int64_t) { values.add(x); });
    if (place.works) {
#pragma unroll
      for (int lane = 0; lane < kPack; ++lane) {
        const int64_t at = place.row * cut.width + place.column * kPack + lane;
        means[at] = static_cast<C>(values.mean_of(lane));
        squares[at] = values.squares[lane];
      }
    }
    __syncthreads();
    for (int64_t g = place.first_group + threadIdx.x / kWarp; g < place.end_group; g += kWarps) {
      const int from = static_cast<int>(Place<kPack>::from(a.shape, cut, g, place.tile) - place.first_channel);
      const int width =
          static_cast<int>(Place<kPack>::until(a.shape, cut, g, place.tile) - place.first_channel) - from;
      double mean, inside;
      merge(
          cut.rows * width,
          [&](int64_t i, double& n, double& of_part, double& squares_of_part) {
            const int row = static_cast<int>(i) / width;
            const int64_t at = row * cut.width + from + static_cast<int>(i) % width;
            n = static_cast<double>(place.pixels_of(row));
            of_part = static_cast<double>(means[at]);
            squares_of_part = static_cast<double>(squares[at]);
          },
          mean, inside);
      if (threadIdx.x % kWarp == 0)
        reinterpret_cast<Pair<C>*>(
            a.partials)[(place.b * a.shape.groups + g) * cut.entries(a.shape) + place.tile * cut.bands + place.band] = {
            static_cast<C>(mean), static_cast<C>(inside)};
    }
    __syncthreads();
  }
}

template <typename S, int kPack, bool kSilu>
__global__ void __launch_bounds__(kThreads, 2)
    channels_last_activate(const __grid_constant__ Forward a, const __grid_constant__ Bands cut) {
  using C = typename Storage<S>::Compute;
  using P = Pack<S, kPack>;
  __shared__ Pair<C> groups[kThreads * kPack];  // mean and rstd of the tile's groups
  DIFFPP_ITEMS(item, cut.items(a.shape), blockIdx.x, gridDim.x) {
    const Place<kPack> place(a.shape, cut, item);
    for (int64_t g = place.first_group + threadIdx.x / kWarp; g < place.end_group; g += kWarps) {
      const int64_t group = place.b * a.shape.groups + g;
      const Pair<C> of_group = moments<C>(
          a, group, cut.entries(a.shape), [&](int64_t e) { return Place<kPack>::count(a.shape, cut, g, e); });
      if (threadIdx.x % kWarp == 0) groups[g - place.first_group] = of_group;
      if (place.band == 0 && g * a.shape.per_group() >= place.first_channel) write_moments(a, group, of_group);
    }
    __syncthreads();
    if (place.works) {
      Affine<C> affine[kPack];
#pragma unroll
      for (int lane = 0; lane < kPack; ++lane) {
        const int64_t c = place.channel + lane;
        const Pair<C> of_group = groups[group_of(a.shape, c) - place.first_group];
        affine[lane] = Affine<C>(a, c, of_group.first, of_group.second);
      }
      P* y = place.template packs<P>(a.y);
      place.template for_pixels<P, false>(a.x, nullptr, [&](const P& x, const P&, int64_t i) {
        P result;
#pragma unroll
        for (int lane = 0; lane < kPack; ++lane)
          result.values[lane] = to_stored<S>(activate<S, kSilu>(affine[lane](to_compute(x.values[lane]))));
        y[i] = result;
      });
    }
    __syncthreads();
  }
}

template <typename C>
__device__ inline Affine<C> affine_of(const Backward& a, int64_t b, int64_t c) {
  const int64_t group = b * a.shape.groups + group_of(a.shape, c);
  return Affine<C>(a, c, static_cast<const C*>(a.mean)[group], static_cast<const C*>(a.rstd)[group]);
}

template <typename S, int kPack, bool kSilu>
__global__ void __launch_bounds__(kThreads, 2)
    channels_last_sums(const __grid_constant__ Backward a, const __grid_constant__ Bands cut) {
  using C = typename Storage<S>::Compute;
  using P = Pack<S, kPack>;
  __shared__ C first[kThreads * kPack], second[kThreads * kPack];  // [row][channel of the tile]
  const Sums<C> sums = sums_of<C>(a, a.shape.batch * cut.bands * a.shape.channels);
  DIFFPP_ITEMS(item, cut.items(a.shape), blockIdx.x, gridDim.x) {
    const Place<kPack> place(a.shape, cut, item);
    if (place.works) {
      Affine<C> affine[kPack];
      C sum[kPack] = {}, product[kPack] = {};
#pragma unroll
      for (int lane = 0; lane < kPack; ++lane) affine[lane] = affine_of<C>(a, place.b, place.channel + lane);
      place.template for_pixels<P, true>(a.x, a.grad_output, [&](const P& xs, const P& grads, int64_t) {
#pragma unroll
        for (int lane = 0; lane < kPack; ++lane) {
          const C x = to_compute(xs.values[lane]);
          const C g = through<S, kSilu>(to_compute(grads.values[lane]), affine[lane](x));
          sum[lane] += g;
          product[lane] = fma(g, x - affine[lane].mean, product[lane]);
        }
      });
#pragma unroll
      for (int lane = 0; lane < kPack; ++lane) {
        const int64_t at = place.row * cut.width + place.column * kPack + lane;
        first[at] = sum[lane];
        second[at] = product[lane];
      }
    }
    __syncthreads();
    const int64_t width = place.end_channel - place.first_channel;
    for (int64_t c = threadIdx.x; c < width; c += kThreads) {
      double sum = 0.0, product = 0.0;
      for (int64_t row = 0; row < cut.rows; ++row) {
        sum += static_cast<double>(first[row * cut.width + c]);
        product += static_cast<double>(second[row * cut.width + c]);
      }
      const int64_t channel = place.first_channel + c;
      if (needs_parameters(a))
        sums.channels[(place.b * cut.bands + place.band) * a.shape.channels + channel] = {
            static_cast<C>(sum), static_cast<C>(product)};
      const double weight = static_cast<double>(number<C>(a.weight, channel, C(1)));
      first[c] = static_cast<C>(weight * sum);
      second[c] = static_cast<C>(weight * product);
    }
    __syncthreads();
    for (int64_t g = place.first_group + threadIdx.x / kWarp; g < place.end_group; g += kWarps) {
      const int64_t until = Place<kPack>::until(a.shape, cut, g, place.tile) - place.first_channel;
      double sum = 0.0, product = 0.0;
      for (int64_t c = Place<kPack>::from(a.shape, cut, g, place.tile) - place.first_channel + threadIdx.x % kWarp;
           c < until && c < width; c += kWarp) {
        sum += static_cast<double>(first[c]);
        product += static_cast<double>(second[c]);
      }
      sum = warp_sum(sum);
      product = warp_sum(product);
      if (threadIdx.x % kWarp == 0)
        sums.groups[(place.b * a.shape.groups + g) * cut.entries(a.shape) + place.tile * cut.bands + place.band] = {
            static_cast<C>(sum), static_cast<C>(product)};
    }
    __syncthreads();
  }
}

template <typename S, int kPack, bool kSilu>
__global__ void __launch_bounds__(kThreads, 2)
    channels_last_input_gradient(const __grid_constant__ Backward a, const __grid_constant__ Bands cut) {
  using C = typename Storage<S>::Compute;
  using P = Pack<S, kPack>;
  __shared__ Terms<C> groups[kThreads * kPack];
  const Sums<C> sums = sums_of<C>(a, a.shape.batch * cut.bands * a.shape.channels);
  DIFFPP_ITEMS(item, cut.items(a.shape), blockIdx.x, gridDim.x) {
    const Place<kPack> place(a.shape, cut, item);
    for (int64_t g = place.first_group + threadIdx.x / kWarp; g < place.end_group; g += kWarps) {
      const int64_t group = place.b * a.shape.groups + g;
      const Pair<C>* pairs = sums.groups + group * cut.entries(a.shape);
      double sum = 0.0, product = 0.0;
      for (int64_t e = threadIdx.x % kWarp; e < cut.entries(a.shape); e += kWarp) {
        if (Place<kPack>::count(a.shape, cut, g, e) == 0) continue;
        const Pair<C> pair = pairs[e];
        sum += static_cast<double>(pair.first);
        product += static_cast<double>(pair.second);
      }
      const Terms<C> terms(
          a.shape, static_cast<double>(static_cast<const C*>(a.rstd)[group]), warp_sum(sum), warp_sum(product));
      if (threadIdx.x % kWarp == 0) groups[g - place.first_group] = terms;
    }
    __syncthreads();
    if (place.works) {
      Affine<C> affine[kPack];
      Terms<C> terms[kPack];
#pragma unroll
      for (int lane = 0; lane < kPack; ++lane) {
        const int64_t c = place.channel + lane;
        affine[lane] = affine_of<C>(a, place.b, c);
        terms[lane] = groups[group_of(a.shape, c) - place.first_group];
      }
      P* grad_x = place.template packs<P>(a.grad_x);
      place.template for_pixels<P, true>(a.x, a.grad_output, [&](const P& xs, const P& grads, int64_t i) {
        P result;
#pragma unroll
        for (int lane = 0; lane < kPack; ++lane) {
          const C x = to_compute(xs.values[lane]);
          const C g = through<S, kSilu>(to_compute(grads.values[lane]), affine[lane](x));
          const C rest = fma(terms[lane].slope, x - affine[lane].mean, terms[lane].offset);
          result.values[lane] = to_stored<S>(fma(g, affine[lane].scale, rest));
        }
        grad_x[i] = result;
      });
    }
    __syncthreads();
  }
}

// From Hopper on, where a tile of channels fits in the shared memory of a cluster: each block of the cluster keeps a share of the
// tile's pixels, so that memory is read once.

constexpr int kMostGroups = 32, kMostColumns = 64;  // of a tile
constexpr int64_t kMultiprocessors = 132;           // of a large GPU

struct Tiles {
  int64_t width;    // channels of a tile: whole groups and whole packs
  int64_t tiles;    // of a sample
  int64_t columns;  // threads side by side
  int64_t rows;
  int64_t share;  // pixels of a block; the last may be shorter
  int blocks;     // of a cluster; 0 where a tile does not fit

  __host__ __device__ int64_t bytes(int64_t per_element) const { return share * width * per_element; }
};

// `kept`: bytes of an element in shared memory.
Tiles tiles_of(const Shape& shape, int64_t pack, int64_t kept) {
  constexpr int64_t kBytes = 64;             // of a pixel at least, two sectors: memory is read by sectors
  Tiles result{};
  result.width = std::lcm(shape.per_group(), pack);
  while (result.width * 16 < kBytes * pack && shape.channels % (2 * result.width) == 0) result.width *= 2;
  result.columns = result.width / pack;
  if (result.columns > kMostColumns || result.width > kMostGroups * shape.per_group()) return result;
  result.rows = kThreads / result.columns;
  result.tiles = shape.channels / result.width;
  int blocks = 1;
  const auto wants_more = [&] {
    result.share = divide_up(shape.pixels, blocks);
    if (result.bytes(kept) > kHalfOfShared) return true;
    return shape.batch * result.tiles * blocks < kMultiprocessors && result.share > 2 * result.rows;
  };
  while (wants_more() && blocks < kMostBlocks) blocks *= 2;
  const bool fits = result.bytes(kept) <= kMostShared && shape.batch * result.tiles < (int64_t{1} << 27);
  result.blocks = fits ? blocks : 0;
  return result;
}

// A block's part of a tile, and each thread's share of it.
template <int kPack>
struct Part {
  const Shape& shape;
  const Tiles& cut;
  int64_t b;
  int block;                            // in its cluster
  int64_t first_channel, first_group;   // of the tile
  int64_t first_pixel;
  int pixels, groups, row, column;
  int each, rest;   // pixels of a row of threads, of which the first `rest` have one more
  int64_t channel;  // of the thread
  bool works;

  __device__ Part(const Shape& shape, const Tiles& cut) : shape(shape), cut(cut) {
    const int64_t tile = blockIdx.x / static_cast<unsigned>(cut.blocks);
    block = static_cast<int>(blockIdx.x % static_cast<unsigned>(cut.blocks));
    b = tile / cut.tiles;
    first_channel = tile % cut.tiles * cut.width;
    first_group = first_channel / shape.per_group();
    groups = static_cast<int>(cut.width / shape.per_group());
    first_pixel = block * cut.share;
    const int64_t left = shape.pixels - first_pixel;
    pixels = static_cast<int>(left < 0 ? 0 : left < cut.share ? left : cut.share);
    each = pixels / static_cast<int>(cut.rows);
    rest = pixels % static_cast<int>(cut.rows);
    row = static_cast<int>(threadIdx.x) / static_cast<int>(cut.columns);
    column = static_cast<int>(threadIdx.x) % static_cast<int>(cut.columns);
    channel = first_channel + column * kPack;
    works = row < cut.rows;
  }

  __device__ int group_of(int lane) const { return static_cast<int>(cuda::group_of(shape, channel + lane) - first_group); }

  // Where a lane's number is in an array [row][channel of the tile].
  __device__ int at(int lane) const { return row * static_cast<int>(cut.width) + column * kPack + lane; }

  // Pixels that a row of threads works on.
  __device__ int pixels_of(int row) const { return each + (row < rest ? 1 : 0); }

  // The pack of the thread's channels at the block's first pixel, as an index.
  __device__ int64_t first_pack() const { return ((b * shape.pixels + first_pixel) * shape.channels + channel) / kPack; }

  // Calls work(pack of x, pack of grad, index in shared memory) for the thread's pixels, from memory.
  template <typename P, bool kGrad, typename Work>
  __device__ void for_pixels(const void* x, const void* grad, const Work& work) const {
    if (!works) return;
    const int64_t step = shape.channels / kPack, first = first_pack();
    int kept = row * static_cast<int>(cut.columns) + column;
    for_packs<P, kGrad>(
        static_cast<const P*>(x) + first, kGrad ? static_cast<const P*>(grad) + first : nullptr, row * step, cut.rows * step,
        pixels * step, [&](const P& of_x, const P& of_grad, int64_t) {
          work(of_x, of_grad, kept);
          kept += static_cast<int>(cut.rows * cut.columns);
        });
  }

  // Calls work(index in shared memory, index of the pack in memory) for the thread's pixels.
  template <typename Work>
  __device__ void for_kept(const Work& work) const {
    if (!works) return;
    const int64_t step = cut.rows * (shape.channels / kPack);
    int64_t in_memory = first_pack() + row * (shape.channels / kPack);
    const int end = pixels * static_cast<int>(cut.columns), rows = static_cast<int>(cut.rows * cut.columns);
#pragma unroll 2
    for (int kept = row * static_cast<int>(cut.columns) + column; kept < end; kept += rows, in_memory += step)
      work(kept, in_memory);
  }

  // The sums over groups of an array [row][channel of the tile], to sums [groups]: entry(row, number) is added up. The whole
  // block's, first over rows and then over channels; `columns_of` is room for a number for each channel.
  template <typename C, typename Entry>
  __device__ void add_up(const C* array, double* columns_of, double* sums, const Entry& entry) const {
    const int width = static_cast<int>(cut.width), channels = static_cast<int>(shape.per_group());
    __syncthreads();
    for (int c = threadIdx.x; c < width; c += kThreads) {
      double sum = 0.0;
      for (int in_row = 0; in_row < static_cast<int>(cut.rows); ++in_row)
        sum += entry(in_row, static_cast<double>(array[in_row * width + c]));
      columns_of[c] = sum;
    }
    __syncthreads();
    for (int g = threadIdx.x / kWarp; g < groups; g += kWarps) {
      double sum = 0.0;
      for (int c = threadIdx.x % kWarp; c < channels; c += kWarp) sum += columns_of[g * channels + c];
      sum = warp_sum(sum);
      if (threadIdx.x % kWarp == 0) sums[g] = sum;
    }
  }
};

template <typename S, int kPack, bool kSilu>
__global__ void __launch_bounds__(kThreads, 2)
    clustered_forward(const __grid_constant__ Forward a, const __grid_constant__ Tiles cut) {
#if DIFFPP_CLUSTERS
  using C = typename Storage<S>::Compute;
  using P = Pack<S, kPack>;
  __shared__ C parts[kThreads * kPack];  // [row][channel of the tile]
  __shared__ double of_channels[kMostColumns * kPack];
  __shared__ double sums[kMostGroups], squares[kMostGroups], rounded_off[kMostGroups];
  __shared__ Pair<C> moments[kMostGroups];
  P* kept = dynamic_shared<P>();
  const Part<kPack> part(a.shape, cut);
  const int thread = static_cast<int>(threadIdx.x);
  const double n = static_cast<double>(a.shape.per_group() * a.shape.pixels);

  // Means of each lane's pixels, of their distances from the first one: no large mean is rounded at each step.
  C first[kPack] = {}, sum[kPack] = {};
  if (part.works && part.row < part.pixels) {
    const P pack = static_cast<const P*>(a.x)[part.first_pack() + part.row * (a.shape.channels / kPack)];
#pragma unroll
    for (int lane = 0; lane < kPack; ++lane) first[lane] = to_compute(pack.values[lane]);
  }
  part.template for_pixels<P, false>(a.x, nullptr, [&](const P& x, const P&, int at) {
    kept[at] = x;
#pragma unroll
    for (int lane = 0; lane < kPack; ++lane) sum[lane] += to_compute(x.values[lane]) - first[lane];
  });
  if (part.works) {
    const C share = C(1) / static_cast<C>(part.row < part.pixels ? part.pixels_of(part.row) : 1);
#pragma unroll
    for (int lane = 0; lane < kPack; ++lane) parts[part.at(lane)] = fma(sum[lane], share, first[lane]);
  }
  part.add_up(parts, of_channels, sums, [&](int row, double of_row) { return static_cast<double>(part.pixels_of(row)) * of_row; });
  cluster_sync();
  if (thread < part.groups) {
    const double mean = cluster_sum(sums[thread], cut.blocks) / n;
    moments[thread].first = static_cast<C>(mean);
    rounded_off[thread] = mean - static_cast<double>(moments[thread].first);
  }
  __syncthreads();

  // Squared deviations from the mean as it was rounded.
  C mean[kPack], square[kPack] = {};
#pragma unroll
  for (int lane = 0; lane < kPack; ++lane) mean[lane] = part.works ? moments[part.group_of(lane)].first : C(0);
  part.for_kept([&](int at, int64_t) {
    const P x = kept[at];
#pragma unroll
    for (int lane = 0; lane < kPack; ++lane) {
      const C d = to_compute(x.values[lane]) - mean[lane];
      square[lane] = fma(d, d, square[lane]);
    }
  });
  if (part.works) {
#pragma unroll
    for (int lane = 0; lane < kPack; ++lane) parts[part.at(lane)] = square[lane];
  }
  part.add_up(parts, of_channels, squares, [](int, double of_row) { return of_row; });
  cluster_sync();
  if (thread < part.groups) {
    const double off = rounded_off[thread];
    const double variance = cluster_sum(squares[thread], cut.blocks) / n - off * off;
    moments[thread].second = static_cast<C>(1.0 / sqrt((variance < 0.0 ? 0.0 : variance) + a.eps));
    if (part.block == 0) {
      const int64_t group = part.b * a.shape.groups + part.first_group + thread;
      static_cast<C*>(a.mean)[group] = moments[thread].first;
      static_cast<C*>(a.rstd)[group] = moments[thread].second;
    }
  }
  __syncthreads();

  if (part.works) {
    Affine<C> affine[kPack];
#pragma unroll
    for (int lane = 0; lane < kPack; ++lane) {
      const Pair<C> of_group = moments[part.group_of(lane)];
      affine[lane] = Affine<C>(a, part.channel + lane, of_group.first, of_group.second);
    }
    part.for_kept([&](int at, int64_t i) {
      const P x = kept[at];
      C y[kPack];
#pragma unroll
      for (int lane = 0; lane < kPack; ++lane) y[lane] = activate<S, kSilu>(affine[lane](to_compute(x.values[lane])));
      store_pack(y, static_cast<P*>(a.y) + i);
    });
  }
  // Another block may be reading from this one's shared memory.
  cluster_sync();
#endif
}

// The gradient of x, and sums.channels [B, blocks, C].
template <typename S, int kPack, bool kSilu>
__global__ void __launch_bounds__(kThreads, 2)
    clustered_backward(const __grid_constant__ Backward a, const __grid_constant__ Tiles cut) {
#if DIFFPP_CLUSTERS
  using C = typename Storage<S>::Compute;
  using P = Pack<S, kPack>;
  __shared__ C first[kThreads * kPack], second[kThreads * kPack];  // [row][channel of the tile]
  __shared__ double sums[kMostGroups], products[kMostGroups];
  __shared__ Terms<C> of_groups[kMostGroups];
  P* kept = dynamic_shared<P>();
  P* kept_grad = kept + cut.share * cut.columns;
  const Part<kPack> part(a.shape, cut);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, width = static_cast<int>(cut.width);

  Affine<C> affine[kPack];
  if (part.works) {
    C sum[kPack] = {}, product[kPack] = {};
#pragma unroll
    for (int lane = 0; lane < kPack; ++lane) affine[lane] = affine_of<C>(a, part.b, part.channel + lane);
    part.template for_pixels<P, true>(a.x, a.grad_output, [&](const P& xs, const P& grads, int at) {
      kept[at] = xs;
      kept_grad[at] = grads;
#pragma unroll
      for (int lane = 0; lane < kPack; ++lane) {
        const C x = to_compute(xs.values[lane]);
        const C g = through<S, kSilu>(to_compute(grads.values[lane]), affine[lane](x));
        sum[lane] += g;
        product[lane] = fma(g, x - affine[lane].mean, product[lane]);
      }
    });
#pragma unroll
    for (int lane = 0; lane < kPack; ++lane) {
      first[part.at(lane)] = sum[lane];
      second[part.at(lane)] = product[lane];
    }
  }
  __syncthreads();
  Pair<C>* channels = static_cast<Pair<C>*>(a.partials) + (part.b * cut.blocks + part.block) * a.shape.channels;
  for (int c = thread; c < width; c += kThreads) {
    double sum = 0.0, product = 0.0;
    for (int row = 0; row < cut.rows; ++row) {
      sum += static_cast<double>(first[row * width + c]);
      product += static_cast<double>(second[row * width + c]);
    }
    const int64_t channel = part.first_channel + c;
    if (needs_parameters(a)) channels[channel] = {static_cast<C>(sum), static_cast<C>(product)};
    const double weight = static_cast<double>(number<C>(a.weight, channel, C(1)));
    first[c] = static_cast<C>(weight * sum);
    second[c] = static_cast<C>(weight * product);
  }
  __syncthreads();
  const int per_group = static_cast<int>(a.shape.per_group());
  for (int g = warp; g < part.groups; g += kWarps) {
    double sum = 0.0, product = 0.0;
    for (int c = g * per_group + thread % kWarp; c < (g + 1) * per_group; c += kWarp) {
      sum += static_cast<double>(first[c]);
      product += static_cast<double>(second[c]);
    }
    sum = warp_sum(sum);
    product = warp_sum(product);
    if (thread % kWarp == 0) {
      sums[g] = sum;
      products[g] = product;
    }
  }
  cluster_sync();
  if (thread < part.groups) {
    const int64_t group = part.b * a.shape.groups + part.first_group + thread;
    of_groups[thread] = Terms<C>(
        a.shape, static_cast<double>(static_cast<const C*>(a.rstd)[group]), cluster_sum(sums[thread], cut.blocks),
        cluster_sum(products[thread], cut.blocks));
  }
  __syncthreads();
  if (part.works) {
    Terms<C> terms[kPack];
#pragma unroll
    for (int lane = 0; lane < kPack; ++lane) terms[lane] = of_groups[part.group_of(lane)];
    part.for_kept([&](int at, int64_t i) {
      const P xs = kept[at], grads = kept_grad[at];
      C result[kPack];
#pragma unroll
      for (int lane = 0; lane < kPack; ++lane) {
        const C x = to_compute(xs.values[lane]);
        const C g = through<S, kSilu>(to_compute(grads.values[lane]), affine[lane](x));
        const C rest = fma(terms[lane].slope, x - affine[lane].mean, terms[lane].offset);
        result[lane] = fma(g, affine[lane].scale, rest);
      }
      store_pack(result, static_cast<P*>(a.grad_x) + i);
    });
  }
  // Another block may be reading from this one's shared memory.
  cluster_sync();
#endif
}

// The same where a group is contiguous: each block of a cluster keeps a share of the pixels of all of a group's channels, and each
// of its warps takes channels in turn.

struct Lines {
  int64_t share;  // pixels of a block, whole packs; the last may be shorter
  int blocks;     // of a cluster; 0 where a group does not fit

  __host__ __device__ int64_t bytes(const Shape& shape, int64_t per_element) const {
    return share * shape.per_group() * per_element;
  }
};

// `kept`: bytes of an element in shared memory.
Lines lines_of(const Shape& shape, int64_t pack, int64_t kept) {
  Lines result{};
  const int64_t groups = shape.batch * shape.groups;
  int blocks = 1;
  const auto wants_more = [&] {
    result.share = divide_up(divide_up(shape.pixels, blocks), pack) * pack;
    if (result.bytes(shape, kept) > kHalfOfShared) return true;
    return groups * blocks < kMultiprocessors && result.share > 2 * kWarp * pack;
  };
  while (wants_more() && blocks < kMostBlocks) blocks *= 2;
  const bool fits = result.bytes(shape, kept) <= kMostShared && groups < (int64_t{1} << 27);
  result.blocks = fits ? blocks : 0;
  return result;
}

// A block's part of a group.
template <int kPack>
struct Lot {
  int64_t b, group, first_channel;
  int block;         // in its cluster
  int packs, share;  // of a channel, and those that each block of the cluster has room for
  int channels;
  int64_t first, step;  // the first pack, and from a channel to the next, in packs of the whole tensor

  __device__ Lot(const Shape& shape, const Lines& cut) {
    group = blockIdx.x / static_cast<unsigned>(cut.blocks);
    block = static_cast<int>(blockIdx.x % static_cast<unsigned>(cut.blocks));
    b = group / shape.groups;
    channels = static_cast<int>(shape.per_group());
    first_channel = group % shape.groups * channels;
    const int64_t pixel = block * cut.share, left = shape.pixels - pixel;
    packs = static_cast<int>((left < 0 ? 0 : left < cut.share ? left : cut.share) / kPack);
    share = static_cast<int>(cut.share / kPack);
    step = shape.pixels / kPack;
    first = group * channels * step + pixel / kPack;
  }

  // Calls work(channel of the group) for the warp's channels.
  template <typename Work>
  __device__ void for_channels(const Work& work) const {
    for (int c = threadIdx.x / kWarp; c < channels; c += kWarps) work(c);
  }

  // Calls work(pack of x, pack of grad, index in shared memory) for the thread's packs of a channel, from memory.
  template <typename P, bool kGrad, typename Work>
  __device__ void for_pixels(int c, const void* x, const void* grad, const Work& work) const {
    const int64_t line = first + c * step;
    for_packs<P, kGrad>(
        static_cast<const P*>(x) + line, kGrad ? static_cast<const P*>(grad) + line : nullptr, threadIdx.x % kWarp, kWarp, packs,
        [&](const P& of_x, const P& of_grad, int64_t i) { work(of_x, of_grad, c * share + static_cast<int>(i)); });
  }

  // Calls work(index in shared memory, index in memory) for them.
  template <typename Work>
  __device__ void for_kept(int c, const Work& work) const {
#pragma unroll 2
    for (int i = threadIdx.x % kWarp; i < packs; i += kWarp) work(c * share + i, first + c * step + i);
  }
};

template <typename S, int kPack, bool kSilu>
__global__ void __launch_bounds__(kThreads, 2)
    clustered_lines_forward(const __grid_constant__ Forward a, const __grid_constant__ Lines cut) {
#if DIFFPP_CLUSTERS
  using C = typename Storage<S>::Compute;
  using P = Pack<S, kPack>;
  __shared__ double sum_of_block, squares_of_block, rounded_off;
  __shared__ Pair<C> moments;
  P* kept = dynamic_shared<P>();
  const Lot<kPack> lot(a.shape, cut);
  const double n = static_cast<double>(a.shape.per_group() * a.shape.pixels);

  // Distances from the thread's first value: no large mean is rounded at each step.
  C first = 0, sums[kPack] = {};
  int seen = 0;
  lot.for_channels([&](int c) {
    lot.template for_pixels<P, false>(c, a.x, nullptr, [&](const P& x, const P&, int at) {
      kept[at] = x;
      if (seen == 0) first = to_compute(x.values[0]);
      seen += kPack;
#pragma unroll
      for (int lane = 0; lane < kPack; ++lane) sums[lane] += to_compute(x.values[lane]) - first;
    });
  });
  double total[1] = {static_cast<double>(seen) * static_cast<double>(first)};
#pragma unroll
  for (int lane = 0; lane < kPack; ++lane) total[0] += static_cast<double>(sums[lane]);
  block_sum(total);
  if (threadIdx.x == 0) sum_of_block = total[0];
  cluster_sync();
  if (threadIdx.x == 0) {
    const double mean = cluster_sum(sum_of_block, cut.blocks) / n;
    moments.first = static_cast<C>(mean);
    rounded_off = mean - static_cast<double>(moments.first);
  }
  __syncthreads();

  // Squared deviations from the mean as it was rounded.
  const C mean = moments.first;
  C squares[kPack] = {};
  lot.for_channels([&](int c) {
    lot.for_kept(c, [&](int at, int64_t) {
      const P x = kept[at];
#pragma unroll
      for (int lane = 0; lane < kPack; ++lane) {
        const C d = to_compute(x.values[lane]) - mean;
        squares[lane] = fma(d, d, squares[lane]);
      }
    });
  });
  total[0] = 0.0;
#pragma unroll
  for (int lane = 0; lane < kPack; ++lane) total[0] += static_cast<double>(squares[lane]);
  block_sum(total);
  if (threadIdx.x == 0) squares_of_block = total[0];
  cluster_sync();
  if (threadIdx.x == 0) {
    const double variance = cluster_sum(squares_of_block, cut.blocks) / n - rounded_off * rounded_off;
    moments.second = static_cast<C>(1.0 / sqrt((variance < 0.0 ? 0.0 : variance) + a.eps));
    if (lot.block == 0) {
      static_cast<C*>(a.mean)[lot.group] = moments.first;
      static_cast<C*>(a.rstd)[lot.group] = moments.second;
    }
  }
  __syncthreads();
  lot.for_channels([&](int c) {
    const Affine<C> affine(a, lot.first_channel + c, mean, moments.second);
    lot.for_kept(c, [&](int at, int64_t i) {
      const P x = kept[at];
      C y[kPack];
#pragma unroll
      for (int lane = 0; lane < kPack; ++lane) y[lane] = activate<S, kSilu>(affine(to_compute(x.values[lane])));
      store_pack(y, static_cast<P*>(a.y) + i);
    });
  });
  // Another block may be reading from this one's shared memory.
  cluster_sync();
#endif
}

// The gradient of x, and the channels' pairs [B, C, blocks].
template <typename S, int kPack, bool kSilu>
__global__ void __launch_bounds__(kThreads, 2)
    clustered_lines_backward(const __grid_constant__ Backward a, const __grid_constant__ Lines cut) {
#if DIFFPP_CLUSTERS
  using C = typename Storage<S>::Compute;
  using P = Pack<S, kPack>;
  __shared__ double sum_of_block, product_of_block;
  __shared__ Terms<C> of_group;
  P* kept = dynamic_shared<P>();
  const Lot<kPack> lot(a.shape, cut);
  P* kept_grad = kept + static_cast<int64_t>(lot.share) * lot.channels;

  double totals[2] = {};
  lot.for_channels([&](int c) {
    const int64_t channel = lot.first_channel + c;
    const Affine<C> affine = affine_of<C>(a, lot.b, channel);
    C sums[kPack] = {}, products[kPack] = {};
    lot.template for_pixels<P, true>(c, a.x, a.grad_output, [&](const P& xs, const P& grads, int at) {
      kept[at] = xs;
      kept_grad[at] = grads;
#pragma unroll
      for (int lane = 0; lane < kPack; ++lane) {
        const C x = to_compute(xs.values[lane]);
        const C g = through<S, kSilu>(to_compute(grads.values[lane]), affine(x));
        sums[lane] += g;
        products[lane] = fma(g, x - affine.mean, products[lane]);
      }
    });
    double sum = 0.0, product = 0.0;
#pragma unroll
    for (int lane = 0; lane < kPack; ++lane) {
      sum += static_cast<double>(sums[lane]);
      product += static_cast<double>(products[lane]);
    }
    sum = warp_sum(sum);
    product = warp_sum(product);
    if (threadIdx.x % kWarp != 0) return;
    if (needs_parameters(a))
      static_cast<Pair<C>*>(a.partials)[(lot.b * a.shape.channels + channel) * cut.blocks + lot.block] = {
          static_cast<C>(sum), static_cast<C>(product)};
    const double weight = static_cast<double>(number<C>(a.weight, channel, C(1)));
    totals[0] += weight * sum;
    totals[1] += weight * product;
  });
  block_sum(totals);
  if (threadIdx.x == 0) {
    sum_of_block = totals[0];
    product_of_block = totals[1];
  }
  cluster_sync();
  if (threadIdx.x == 0)
    of_group = Terms<C>(
        a.shape, static_cast<double>(static_cast<const C*>(a.rstd)[lot.group]), cluster_sum(sum_of_block, cut.blocks),
        cluster_sum(product_of_block, cut.blocks));
  __syncthreads();
  const Terms<C> terms = of_group;
  lot.for_channels([&](int c) {
    const Affine<C> affine = affine_of<C>(a, lot.b, lot.first_channel + c);
    lot.for_kept(c, [&](int at, int64_t i) {
      const P xs = kept[at], grads = kept_grad[at];
      C result[kPack];
#pragma unroll
      for (int lane = 0; lane < kPack; ++lane) {
        const C x = to_compute(xs.values[lane]);
        const C g = through<S, kSilu>(to_compute(grads.values[lane]), affine(x));
        result[lane] = fma(g, affine.scale, fma(terms.slope, x - affine.mean, terms.offset));
      }
      store_pack(result, static_cast<P*>(a.grad_x) + i);
    });
  });
  // Another block may be reading from this one's shared memory.
  cluster_sync();
#endif
}

// The part of the tensor that a warp of the row-major kernels works on: a piece of channel `line` = b C + c.
template <int kPack>
struct Strip {
  int64_t line, b, c, group;
  int64_t first, end;  // in packs of the whole tensor

  __device__ Strip(const Shape& shape, const Strips& cut, int64_t item) {
    line = item / cut.pieces;
    b = line / shape.channels;
    c = line % shape.channels;
    group = line / shape.per_group();
    const int64_t from = item % cut.pieces * cut.length;
    const int64_t until = from + cut.length < shape.pixels ? from + cut.length : shape.pixels;
    first = (line * shape.pixels + from) / kPack;
    end = (line * shape.pixels + until) / kPack;
  }

  template <typename P, bool kGrad, typename Work>
  __device__ void for_packs(const void* x, const void* grad, const Work& work) const {
    cuda::for_packs<P, kGrad>(
        static_cast<const P*>(x), static_cast<const P*>(grad), first + threadIdx.x % kWarp, kWarp, end, work);
  }
};

__device__ inline int64_t first_warp() { return static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp; }
__device__ inline int64_t all_warps() { return static_cast<int64_t>(gridDim.x) * kWarps; }

template <typename S, int kPack>
__global__ void __launch_bounds__(kThreads, 2)
    row_major_statistics(const __grid_constant__ Forward a, const __grid_constant__ Strips cut) {
  using C = typename Storage<S>::Compute;
  using P = Pack<S, kPack>;
  DIFFPP_ITEMS(item, cut.items(a.shape), first_warp(), all_warps()) {
    const Strip<kPack> strip(a.shape, cut, item);
    Welford<C, kPack> values;
    strip.template for_packs<P, false>(a.x, nullptr, [&](const P& x, const P&, int64_t) { values.add(x); });
    // First over the lanes of the thread's packs, which have equal counts; then over the warp's threads.
    double mean = 0.0, squares = 0.0;
#pragma unroll
    for (int lane = 0; lane < kPack; ++lane) mean += values.mean_of(lane) / kPack;
#pragma unroll
    for (int lane = 0; lane < kPack; ++lane) {
      const double d = values.mean_of(lane) - mean;
      squares += static_cast<double>(values.squares[lane]) + static_cast<double>(values.n) * d * d;
    }
    const double n = static_cast<double>(values.n) * kPack;
    double of_all, inside;
    merge(
        kWarp,
        [&](int64_t, double& n_of_part, double& of_part, double& squares_of_part) {
          n_of_part = n;
          of_part = mean;
          squares_of_part = squares;
        },
        of_all, inside);
    if (threadIdx.x % kWarp == 0)
      reinterpret_cast<Pair<C>*>(a.partials)[item] = {static_cast<C>(of_all), static_cast<C>(inside)};
  }
}

template <typename S, int kPack, bool kSilu>
__global__ void __launch_bounds__(kThreads, 2)
    row_major_activate(const __grid_constant__ Forward a, const __grid_constant__ Strips cut) {
  using C = typename Storage<S>::Compute;
  using P = Pack<S, kPack>;
  DIFFPP_ITEMS(item, cut.items(a.shape), first_warp(), all_warps()) {
    const Strip<kPack> strip(a.shape, cut, item);
    const Pair<C> of_group = moments<C>(a, strip.group, cut.entries(a.shape), [&](int64_t e) {
      const int64_t from = static_cast<uint32_t>(e) % static_cast<uint32_t>(cut.pieces) * cut.length;
      return from + cut.length < a.shape.pixels ? cut.length : a.shape.pixels - from;
    });
    if (strip.c % a.shape.per_group() == 0 && item % cut.pieces == 0) write_moments(a, strip.group, of_group);
    const Affine<C> affine(a, strip.c, of_group.first, of_group.second);
    strip.template for_packs<P, false>(a.x, nullptr, [&](const P& x, const P&, int64_t i) {
      P result;
#pragma unroll
      for (int lane = 0; lane < kPack; ++lane)
        result.values[lane] = to_stored<S>(activate<S, kSilu>(affine(to_compute(x.values[lane]))));
      static_cast<P*>(a.y)[i] = result;
    });
  }
}

template <typename S, int kPack, bool kSilu>
__global__ void __launch_bounds__(kThreads, 2)
    row_major_sums(const __grid_constant__ Backward a, const __grid_constant__ Strips cut) {
  using C = typename Storage<S>::Compute;
  using P = Pack<S, kPack>;
  DIFFPP_ITEMS(item, cut.items(a.shape), first_warp(), all_warps()) {
    const Strip<kPack> strip(a.shape, cut, item);
    const Affine<C> affine = affine_of<C>(a, strip.b, strip.c);
    C sums[kPack] = {}, products[kPack] = {};
    strip.template for_packs<P, true>(a.x, a.grad_output, [&](const P& xs, const P& grads, int64_t) {
#pragma unroll
      for (int lane = 0; lane < kPack; ++lane) {
        const C x = to_compute(xs.values[lane]);
        const C g = through<S, kSilu>(to_compute(grads.values[lane]), affine(x));
        sums[lane] += g;
        products[lane] = fma(g, x - affine.mean, products[lane]);
      }
    });
    double sum = 0.0, product = 0.0;
#pragma unroll
    for (int lane = 0; lane < kPack; ++lane) {
      sum += static_cast<double>(sums[lane]);
      product += static_cast<double>(products[lane]);
    }
    sum = warp_sum(sum);
    product = warp_sum(product);
    if (threadIdx.x % kWarp == 0)
      static_cast<Pair<C>*>(a.partials)[item] = {static_cast<C>(sum), static_cast<C>(product)};
  }
}

template <typename S, int kPack, bool kSilu>
__global__ void __launch_bounds__(kThreads, 2)
    row_major_input_gradient(const __grid_constant__ Backward a, const __grid_constant__ Strips cut) {
  using C = typename Storage<S>::Compute;
  using P = Pack<S, kPack>;
  DIFFPP_ITEMS(item, cut.items(a.shape), first_warp(), all_warps()) {
    const Strip<kPack> strip(a.shape, cut, item);
    const int64_t entries = cut.entries(a.shape);
    const int64_t first_channel = strip.c / a.shape.per_group() * a.shape.per_group();
    const Pair<C>* pairs = static_cast<const Pair<C>*>(a.partials) + strip.group * entries;
    double sum = 0.0, product = 0.0;
    for (int64_t e = threadIdx.x % kWarp; e < entries; e += kWarp) {
      const Pair<C> pair = pairs[e];
      const int64_t c = first_channel + static_cast<uint32_t>(e) / static_cast<uint32_t>(cut.pieces);
      const double weight = static_cast<double>(number<C>(a.weight, c, C(1)));
      sum += weight * static_cast<double>(pair.first);
      product += weight * static_cast<double>(pair.second);
    }
    const double rstd = static_cast<double>(static_cast<const C*>(a.rstd)[strip.group]);
    const Terms<C> terms(a.shape, rstd, warp_sum(sum), warp_sum(product));
    const Affine<C> affine = affine_of<C>(a, strip.b, strip.c);
    strip.template for_packs<P, true>(a.x, a.grad_output, [&](const P& xs, const P& grads, int64_t i) {
      P result;
#pragma unroll
      for (int lane = 0; lane < kPack; ++lane) {
        const C x = to_compute(xs.values[lane]);
        const C g = through<S, kSilu>(to_compute(grads.values[lane]), affine(x));
        result.values[lane] = to_stored<S>(fma(g, affine.scale, fma(terms.slope, x - affine.mean, terms.offset)));
      }
      static_cast<P*>(a.grad_x)[i] = result;
    });
  }
}

// The gradients of weight and bias from the channels' pairs: a block adds up kWarp channels, each of its warps a share of the
// samples' parts.
template <typename C>
__global__ void __launch_bounds__(kThreads) parameter_gradients(
    const __grid_constant__ Backward a, int64_t parts, int64_t part_stride, int64_t channel_stride) {
  __shared__ double sums[kWarps][kWarp], products[kWarps][kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kWarp + lane;
  double sum = 0.0, product = 0.0;
  if (c < a.shape.channels) {
    const int64_t group = group_of(a.shape, c);
    for (int64_t i = warp; i < a.shape.batch * parts; i += kWarps) {
      const int64_t b = i / parts;
      const Pair<C> pair = static_cast<const Pair<C>*>(
          a.partials)[b * parts * a.shape.channels + i % parts * part_stride + c * channel_stride];
      sum += static_cast<double>(pair.first);
      product += static_cast<double>(pair.second) *
                 static_cast<double>(static_cast<const C*>(a.rstd)[b * a.shape.groups + group]);
    }
  }
  sums[warp][lane] = sum;
  products[warp][lane] = product;
  __syncthreads();
  if (warp > 0 || c >= a.shape.channels) return;
  for (int w = 1; w < kWarps; ++w) {
    sum += sums[w][lane];
    product += products[w][lane];
  }
  if (a.grad_weight != nullptr) put(a.grad_weight, a.weight.dtype, c, product);
  if (a.grad_bias != nullptr) put(a.grad_bias, a.bias.dtype, c, sum);
}

// Calls f(null pointer of the stored type, elements of a pack as a constant): 16 bytes where every array, `run` of whose
// elements are neighbours wherever a thread looks, has them aligned; else single elements.
template <typename F>
void with_packs(const Inputs& a, std::initializer_list<const void*> arrays, const F& f) {
  dispatch(a.dtype, [&](auto* kind) {
    using S = std::remove_pointer_t<decltype(kind)>;
    constexpr int pack = 16 / sizeof(S);
    bool packs = (a.shape.channels_last ? a.shape.channels : a.shape.pixels) % pack == 0;
    for (const void* array : arrays) packs = packs && aligned<Pack<S, pack>>(array);
    packs ? f(kind, std::integral_constant<int, pack>()) : f(kind, std::integral_constant<int, 1>());
  });
}

unsigned grid_of_items(int64_t items) {
  constexpr int64_t most = (int64_t{1} << 31) - 1;
  return static_cast<unsigned>(items < most ? items : most);
}

unsigned grid_of_warps(int64_t warps) { return grid_of_items(divide_up(warps, kWarps)); }

bool empty(const Shape& shape) { return shape.batch * shape.channels * shape.pixels == 0; }

}  // namespace

int64_t bytes_of_partials(const Forward& a) {
  int64_t bytes = 0;
  if (empty(a.shape)) return bytes;
  with_packs(a, {a.x, a.y}, [&](auto* kind, auto pack) {
    using S = std::remove_pointer_t<decltype(kind)>;
    using C = typename Storage<S>::Compute;
    const int64_t entries = a.shape.channels_last ? bands_of(a.shape, pack, sizeof(S)).entries(a.shape)
                                                  : strips_of(a.shape, pack).entries(a.shape);
    bytes = a.shape.batch * a.shape.groups * entries * static_cast<int64_t>(sizeof(Pair<C>));
  });
  return bytes;
}

void forward(const Forward& a, void* stream) {
  if (empty(a.shape)) return;
  const auto on = static_cast<cudaStream_t>(stream);
  with_packs(a, {a.x, a.y}, [&](auto* kind, auto pack) {
    using S = std::remove_pointer_t<decltype(kind)>;
    constexpr int kPack = decltype(pack)::value;
    if constexpr (kPack > 1 && sizeof(S) < 8) {
      const bool serve = clusters_serve(&clustered_forward<S, kPack, true>);
      const Tiles tiles = serve && a.shape.channels_last ? tiles_of(a.shape, kPack, sizeof(S)) : Tiles{};
      const Lines lines = serve && !a.shape.channels_last ? lines_of(a.shape, kPack, sizeof(S)) : Lines{};
      if (tiles.blocks > 0) {
        const unsigned grid = static_cast<unsigned>(a.shape.batch * tiles.tiles * tiles.blocks);
        launch_clusters(
            (a.silu ? clustered_forward<S, kPack, true> : clustered_forward<S, kPack, false>), grid, tiles.blocks,
            tiles.bytes(sizeof(S)), on, a, tiles);
        return;
      }
      if (lines.blocks > 0) {
        const unsigned grid = static_cast<unsigned>(a.shape.batch * a.shape.groups * lines.blocks);
        launch_clusters(
            (a.silu ? clustered_lines_forward<S, kPack, true> : clustered_lines_forward<S, kPack, false>), grid, lines.blocks,
            lines.bytes(a.shape, sizeof(S)), on, a, lines);
        return;
      }
    }
    if (a.shape.channels_last) {
      const Bands cut = bands_of(a.shape, kPack, sizeof(S));
      const unsigned grid = grid_of_items(cut.items(a.shape));
      channels_last_statistics<S, kPack><<<grid, kThreads, 0, on>>>(a, cut);
      check_launch("group_norm_silu");
      (a.silu ? channels_last_activate<S, kPack, true> : channels_last_activate<S, kPack, false>)
          <<<grid, kThreads, 0, on>>>(a, cut);
    } else {
      const Strips cut = strips_of(a.shape, kPack);
      const unsigned grid = grid_of_warps(cut.items(a.shape));
      row_major_statistics<S, kPack><<<grid, kThreads, 0, on>>>(a, cut);
      check_launch("group_norm_silu");
      (a.silu ? row_major_activate<S, kPack, true> : row_major_activate<S, kPack, false>)
          <<<grid, kThreads, 0, on>>>(a, cut);
    }
  });
  check_launch("group_norm_silu");
}

int64_t bytes_of_partials(const Backward& a) {
  int64_t bytes = 0;
  if (empty(a.shape)) return bytes;
  with_packs(a, {a.x, a.grad_output, a.grad_x}, [&](auto* kind, auto pack) {
    using S = std::remove_pointer_t<decltype(kind)>;
    using C = typename Storage<S>::Compute;
    int64_t pairs = strips_of(a.shape, pack).items(a.shape);
    if (a.shape.channels_last) {
      const Bands cut = bands_of(a.shape, pack, sizeof(S));
      pairs = a.shape.batch * (cut.bands * a.shape.channels + a.shape.groups * cut.entries(a.shape));
    }
    // Which GPU it will be is not known yet.
    if constexpr (pack > 1 && sizeof(S) < 8) {
      const int64_t kept = 2 * sizeof(S);
      const int blocks = a.shape.channels_last ? tiles_of(a.shape, pack, kept).blocks : lines_of(a.shape, pack, kept).blocks;
      pairs = std::max(pairs, a.shape.batch * a.shape.channels * blocks);
    }
    bytes = pairs * static_cast<int64_t>(sizeof(Pair<C>));
  });
  return bytes;
}

void backward(const Backward& a, void* stream) {
  constexpr auto op = "group_norm_silu_backward";
  const auto on = static_cast<cudaStream_t>(stream);
  const auto add_up_parameters = [&](auto compute, int64_t parts, int64_t part_stride, int64_t channel_stride) {
    if (!needs_parameters(a)) return;
    const unsigned grid = static_cast<unsigned>(divide_up(a.shape.channels, kWarp));
    parameter_gradients<decltype(compute)><<<grid, kThreads, 0, on>>>(a, parts, part_stride, channel_stride);
  };
  with_packs(a, {a.x, a.grad_output, a.grad_x}, [&](auto* kind, auto pack) {
    using S = std::remove_pointer_t<decltype(kind)>;
    using C = typename Storage<S>::Compute;
    constexpr int kPack = decltype(pack)::value;
    if (empty(a.shape)) return add_up_parameters(C(), 0, 0, 0);
    if constexpr (kPack > 1 && sizeof(S) < 8) {
      const bool serve = a.grad_x != nullptr && clusters_serve(&clustered_backward<S, kPack, true>);
      const Tiles tiles = serve && a.shape.channels_last ? tiles_of(a.shape, kPack, 2 * sizeof(S)) : Tiles{};
      const Lines lines = serve && !a.shape.channels_last ? lines_of(a.shape, kPack, 2 * sizeof(S)) : Lines{};
      if (tiles.blocks > 0) {
        const unsigned grid = static_cast<unsigned>(a.shape.batch * tiles.tiles * tiles.blocks);
        launch_clusters(
            (a.silu ? clustered_backward<S, kPack, true> : clustered_backward<S, kPack, false>), grid, tiles.blocks,
            tiles.bytes(2 * sizeof(S)), on, a, tiles);
        check_launch(op);
        return add_up_parameters(C(), tiles.blocks, a.shape.channels, 1);
      }
      if (lines.blocks > 0) {
        const unsigned grid = static_cast<unsigned>(a.shape.batch * a.shape.groups * lines.blocks);
        launch_clusters(
            (a.silu ? clustered_lines_backward<S, kPack, true> : clustered_lines_backward<S, kPack, false>), grid, lines.blocks,
            lines.bytes(a.shape, 2 * sizeof(S)), on, a, lines);
        check_launch(op);
        return add_up_parameters(C(), lines.blocks, 1, lines.blocks);
      }
    }
    if (a.shape.channels_last) {
      const Bands cut = bands_of(a.shape, kPack, sizeof(S));
      const unsigned grid = grid_of_items(cut.items(a.shape));
      (a.silu ? channels_last_sums<S, kPack, true> : channels_last_sums<S, kPack, false>)
          <<<grid, kThreads, 0, on>>>(a, cut);
      check_launch(op);
      if (a.grad_x != nullptr) {
        (a.silu ? channels_last_input_gradient<S, kPack, true> : channels_last_input_gradient<S, kPack, false>)
            <<<grid, kThreads, 0, on>>>(a, cut);
        check_launch(op);
      }
      add_up_parameters(C(), cut.bands, a.shape.channels, 1);
    } else {
      const Strips cut = strips_of(a.shape, kPack);
      const unsigned grid = grid_of_warps(cut.items(a.shape));
      (a.silu ? row_major_sums<S, kPack, true> : row_major_sums<S, kPack, false>)<<<grid, kThreads, 0, on>>>(a, cut);
      check_launch(op);
      if (a.grad_x != nullptr) {
        (a.silu ? row_major_input_gradient<S, kPack, true> : row_major_input_gradient<S, kPack, false>)
            <<<grid, kThreads, 0, on>>>(a, cut);
        check_launch(op);
      }
      add_up_parameters(C(), cut.pieces, 1, cut.pieces);
    }
  });
  check_launch(op);
}

}  // namespace diffpp::group_norm_silu::cuda
