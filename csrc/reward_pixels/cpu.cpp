#include "../common/cpu.h"
#include "arguments.h"

#if defined(__FMA__)
#include <immintrin.h>
#endif

namespace diffpp::reward_pixels::DIFFPP_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// Output rows of a band, a work item: the columns are resized with one row per lane.
template <typename T>
constexpr int64_t kLanes = sizeof(T) == sizeof(double) ? 8 : 16;

template <typename T>
struct Native;

template <>
struct Native<float> {
  typedef float Vector __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Indices __attribute__((vector_size(kVectorBytes)));
};

template <>
struct Native<double> {
  typedef double Vector __attribute__((vector_size(kVectorBytes)));
  typedef int64_t Indices __attribute__((vector_size(kVectorBytes)));
};

template <typename T>
using Vector = typename Native<T>::Vector;

// Elements of a vector.
template <typename T>
constexpr int kWidth = kVectorBytes / sizeof(T);

template <typename T>
inline Vector<T> read(const T* from) {
  Vector<T> value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}

template <typename T>
inline void write(T* to, const Vector<T>& value) {
  std::memcpy(to, &value, sizeof(value));
}

using diffpp::madd;

inline Vector<float> madd(float a, const Vector<float>& b, const Vector<float>& c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(_mm512_set1_ps(a), b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(_mm256_set1_ps(a), b, c);
#else
  return a * b + c;
#endif
}

inline Vector<double> madd(double a, const Vector<double>& b, const Vector<double>& c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_pd(_mm512_set1_pd(a), b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_pd(_mm256_set1_pd(a), b, c);
#else
  return a * b + c;
#endif
}

// a0 b0 a1 b1 ... of the first halves (second = 0) or of the second halves of a and b.
template <typename T>
inline Vector<T> interleave(const Vector<T>& a, const Vector<T>& b, int second) {
  constexpr int n = kWidth<T>;
  typename Native<T>::Indices indices;
  for (int i = 0; i < n; ++i) indices[i] = i / 2 + second * n / 2 + (i % 2) * n;
#if defined(__clang__)
  Vector<T> result;
  for (int i = 0; i < n; ++i) result[i] = indices[i] < n ? a[indices[i]] : b[indices[i] - n];
  return result;
#else
  return __builtin_shuffle(a, b, indices);
#endif
}

// to[j][i] = from[i][j] for i, j < kLanes.
template <typename T>
inline void transpose(const T* from, int64_t from_stride, T* to, int64_t to_stride) {
  constexpr int n = kWidth<T>;
  for (int64_t row = 0; row < kLanes<T>; row += n) {
    for (int64_t column = 0; column < kLanes<T>; column += n) {
      Vector<T> v[n], w[n];
      for (int i = 0; i < n; ++i) v[i] = read(from + (row + i) * from_stride + column);
      // log2(n) perfect shuffles of the rows.
      for (int round = 1; round < n; round *= 2) {
        for (int i = 0; i < n / 2; ++i) {
          w[2 * i] = interleave<T>(v[i], v[i + n / 2], 0);
          w[2 * i + 1] = interleave<T>(v[i], v[i + n / 2], 1);
        }
        for (int i = 0; i < n; ++i) v[i] = w[i];
      }
      for (int i = 0; i < n; ++i) write(to + (column + i) * to_stride + row, v[i]);
    }
  }
}

// As `load` and `store` of cpu.h, for an array of any dtype whatever T.
template <typename T>
inline const T* load_any(const void* array, Dtype dtype, int64_t offset, int64_t n, T* scratch) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (dtype == Dtype::float64) {
      const double* from = static_cast<const double*>(array) + offset;
      for (int64_t i = 0; i < n; ++i) scratch[i] = static_cast<float>(from[i]);
      return scratch;
    }
  } else if (dtype != Dtype::float64) {
    alignas(64) float narrow[kTile];
    const float* from = load(array, dtype, offset, n, narrow);
    for (int64_t i = 0; i < n; ++i) scratch[i] = static_cast<double>(from[i]);
    return scratch;
  }
  return load(array, dtype, offset, n, scratch);
}

template <typename T>
inline void store_any(const T* values, void* array, Dtype dtype, int64_t offset, int64_t n) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (dtype == Dtype::float64) {
      double* to = static_cast<double*>(array) + offset;
      for (int64_t i = 0; i < n; ++i) to[i] = static_cast<double>(values[i]);
      return;
    }
  } else if (dtype != Dtype::float64) {
    alignas(64) float scratch[kTile];
    float* to = destination(array, dtype, offset, scratch);
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<float>(values[i]);
    store(to, array, dtype, offset, n);
    return;
  }
  store(values, array, dtype, offset, n);
}

// The numbers of the channels, repeated over a tile that starts with a pixel.
template <typename T>
inline void fill(const double* values, const Resampling& a, int64_t plane, int64_t n, T* tile) {
  if (a.inner == 1) {
    const T value = static_cast<T>(values[plane % a.channels]);
    for (int64_t x = 0; x < n; ++x) tile[x] = value;
  } else {
    for (int64_t c = 0, x = 0; x < n; ++x, c = c + 1 < a.inner ? c + 1 : 0) tile[x] = static_cast<T>(values[c]);
  }
}

// Value range to [0, 1] and clamp; (p - mean) / std.
template <typename T>
struct Normalise {
  const Resampling& a;
  T low, per_range, least, most;
  alignas(64) T mean[kTile], std[kTile], scratch[kTile];

  explicit Normalise(const Resampling& a)
      : a(a),
        low(static_cast<T>(a.low)),
        per_range(static_cast<T>(1.0) / static_cast<T>(a.high - a.low)),
        least(a.clamp ? T(0) : -static_cast<T>(__builtin_inf())),
        most(a.clamp ? T(1) : static_cast<T>(__builtin_inf())) {}

  void start(int64_t plane, int64_t n) {
    fill(a.mean, a, plane, n, mean);
    fill(a.std, a, plane, n, std);
  }

  void load(int64_t offset, int64_t n, T* line) {
    const T* images = load_any(a.from, a.from_dtype, offset, n, line);
    for (int64_t x = 0; x < n; ++x) {
      T pixel = (images[x] - low) * per_range;
      // In this order NaN stays NaN.
      pixel = least > pixel ? least : pixel;
      line[x] = most < pixel ? most : pixel;
    }
  }

  void store(const T* resized, int64_t offset, int64_t n) {
    T* pixels = destination(a.to, a.to_dtype, offset, scratch);
    for (int64_t x = 0; x < n; ++x) pixels[x] = (resized[x] - mean[x]) / std[x];
    store_any(pixels, a.to, a.to_dtype, offset, n);
  }
};

// g / std; zero where the image was clamped.
template <typename T>
struct Adjoint {
  const Resampling& a;
  T low, high, per_range;
  alignas(64) T std[kTile], scratch[kTile], images_scratch[kTile];

  explicit Adjoint(const Resampling& a)
      : a(a),
        low(static_cast<T>(a.low)),
        high(static_cast<T>(a.high)),
        per_range(static_cast<T>(1.0) / static_cast<T>(a.high - a.low)) {}

  void start(int64_t plane, int64_t n) { fill(a.std, a, plane, n, std); }

  void load(int64_t offset, int64_t n, T* line) {
    const T* grad = load_any(a.from, a.from_dtype, offset, n, line);
    for (int64_t x = 0; x < n; ++x) line[x] = grad[x] / std[x];
  }

  void store(const T* resized, int64_t offset, int64_t n) {
    T* grad = destination(a.to, a.to_dtype, offset, scratch);
    if (a.images == nullptr) {
      for (int64_t x = 0; x < n; ++x) grad[x] = resized[x] * per_range;
    } else {
      const T* images = load_any(a.images, a.to_dtype, offset, n, images_scratch);
      for (int64_t x = 0; x < n; ++x) {
        const T value = resized[x] * per_range;
        grad[x] = (images[x] >= low) & (images[x] <= high) ? value : T(0);
      }
    }
    store_any(grad, a.to, a.to_dtype, offset, n);
  }
};

// A tile of a row is too short for the processor to see the next one coming.
inline void prefetch(const void* array, Dtype dtype, int64_t offset, int64_t n) {
  const int64_t size = dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2;
  const char* from = static_cast<const char*>(array) + offset * size;
  for (int64_t byte = 0; byte < n * size; byte += 64) __builtin_prefetch(from + byte);
}

// The elements [x, x + n) of the band's `rows` rows from `top` on, resized vertically, to band[kLanes][kTile].
template <typename T, typename Edge>
inline void resize_rows(
    const Resampling& a, int64_t plane, int64_t top, int64_t rows, int64_t x, int64_t n, Edge& edge, T* band) {
  alignas(64) T line[kTile];
  int64_t begin = a.rows.in, end = 0;
  for (int64_t r = 0; r < kLanes<T>; ++r) {
    if (r < rows && a.rows.count[top + r] > 0) {
      begin = smaller(begin, a.rows.first[top + r]);
      end = larger(end, a.rows.first[top + r] + a.rows.count[top + r]);
    } else {
      for (int64_t j = 0; j < n; ++j) band[r * kTile + j] = T(0);
    }
  }
  const T* weights = static_cast<const T*>(a.inputs.weights);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t first = larger(a.inputs.first[i], top);
    const int64_t last = smaller(a.inputs.first[i] + a.inputs.count[i], top + rows);
    if (first >= last) continue;
    const int64_t offset = (plane * a.rows.in + i) * a.columns.in * a.inner + x;
    if (i + 1 < end) prefetch(a.from, a.from_dtype, offset + a.columns.in * a.inner, n);
    edge.load(offset, n, line);
    for (int64_t o = first; o < last; ++o) {
      const T weight = weights[i * a.inputs.taps + o - a.inputs.first[i]];
      T* row = band + (o - top) * kTile;
      if (i == a.rows.first[o]) {
        for (int64_t j = 0; j < n; ++j) row[j] = weight * line[j];
      } else {
        for (int64_t j = 0; j < n; ++j) row[j] = madd(weight, line[j], row[j]);
      }
    }
  }
}

// The output pixels [first, first + pixels) of a band, one row per lane: from `from`, whose first column is `start`.
template <typename T>
inline void resize_columns(
    const Resampling& a, int64_t first, int64_t pixels, int64_t start, const T* from, T* to) {
  const int64_t step = a.inner * kLanes<T>;
  for (int64_t j = first; j < first + pixels; ++j) {
    const T* weights = static_cast<const T*>(a.columns.weights) + j * a.columns.taps;
    const int64_t count = a.columns.count[j];
    const T* pixel = from + (a.columns.first[j] - start) * step;
    for (int64_t c = 0; c < a.inner; ++c, to += kLanes<T>, pixel += kLanes<T>) {
      for (int64_t lane = 0; lane < kLanes<T>; lane += kWidth<T>) {
        Vector<T> sum = {};
        for (int64_t k = 0; k < count; ++k) sum = madd(weights[k], read(pixel + k * step + lane), sum);
        write(to + lane, sum);
      }
    }
  }
}

template <typename T, typename Edge>
void bands(const Resampling& a, int64_t begin, int64_t end) {
  const int64_t tile = kTile / a.inner * a.inner;
  // The input columns that are used, and whether they are the output's.
  int64_t start = a.columns.in, stop = 0;
  bool same = a.columns.in == a.columns.out;
  const T* weights = static_cast<const T*>(a.columns.weights);
  for (int64_t j = 0; j < a.columns.out; ++j) {
    const int64_t first = a.columns.first[j], count = a.columns.count[j];
    same = same && first == j && count == 1 && weights[j * a.columns.taps] == T(1);
    if (count == 0) continue;
    start = smaller(start, first);
    stop = larger(stop, first + count);
  }
  const int64_t used = (stop - start) * a.inner;
  constexpr auto alignment = std::align_val_t(64);
  // A last transpose may write a few columns more.
  T* columns = static_cast<T*>(::operator new((used + kLanes<T>) * kLanes<T> * sizeof(T), alignment));
  alignas(64) T band[kLanes<T> * kTile], lanes[kTile * kLanes<T>];
  Edge edge(a);
  const int64_t per_plane = (a.rows.out + kLanes<T> - 1) / kLanes<T>;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t plane = item / per_plane;
    const int64_t top = item % per_plane * kLanes<T>;
    const int64_t rows = smaller(kLanes<T>, a.rows.out - top);
    edge.start(plane, tile);
    const auto store_band = [&](int64_t x, int64_t n) {
      for (int64_t r = 0; r < rows; ++r)
        edge.store(band + r * kTile, (plane * a.rows.out + top + r) * a.columns.out * a.inner + x, n);
    };
    for (int64_t x = 0; x < used; x += tile) {
      const int64_t n = smaller(tile, used - x);
      resize_rows(a, plane, top, rows, start * a.inner + x, n, edge, band);
      if (same) {
        store_band(x, n);
      } else {
        for (int64_t j = 0; j < n; j += kLanes<T>)
          transpose(band + j, kTile, columns + (x + j) * kLanes<T>, kLanes<T>);
      }
    }
    if (same) continue;
    for (int64_t x = 0; x < a.columns.out * a.inner; x += tile) {
      const int64_t n = smaller(tile, a.columns.out * a.inner - x);
      resize_columns(a, x / a.inner, n / a.inner, start, columns, lanes);
      for (int64_t j = 0; j < n; j += kLanes<T>) transpose(lanes + j * kLanes<T>, kLanes<T>, band + j, kTile);
      store_band(x, n);
    }
  }
  ::operator delete(columns, alignment);
}

template <typename T>
void share_out(const Resampling& a, const Pool& pool) {
  const int64_t per_plane = (a.rows.out + kLanes<T> - 1) / kLanes<T>;
  // Elements read and written for a band, roughly.
  const int64_t work = (a.rows.in / per_plane + kLanes<T>) * (a.columns.in + a.columns.out);
  const int64_t grain = 1 + kChunksPerThread * kChunk / (work * a.inner);
  run(pool, a.adjoint ? bands<T, Adjoint<T>> : bands<T, Normalise<T>>, a, a.planes * per_plane, grain);
}

}  // namespace

void resample(const Resampling& a, const Pool& pool) {
  a.wide ? share_out<double>(a, pool) : share_out<float>(a, pool);
}

}  // namespace diffpp::reward_pixels::DIFFPP_ISA
