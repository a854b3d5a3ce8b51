#include "../common/cpu.h"
#include "arguments.h"

namespace diffpp::ada_layer_norm::DIFFPP_ISA {
namespace {

// Rows of a work item of the backward pass: they share the two sums per column that it leaves.
constexpr int64_t kRowsPerSum = 32;

inline int64_t row_chunks(const Shape& shape) { return (shape.rows + kRowsPerSum - 1) / kRowsPerSum; }
inline int64_t pieces(const Shape& shape) { return (shape.width + kChunk - 1) / kChunk; }

struct Stages : Backward {
  void* partials;  // T [B, row chunks, 2, width]: sums of g normalized and of g; or null
};

// The pieces of one row of a tensor. A row of one piece is converted once, however often it is read.
template <typename T>
class Row {
 public:
  Row(const void* data, Dtype dtype) : data_(data), dtype_(dtype) {}

  const T* piece(int64_t offset, int64_t n) {
    if (offset != offset_) values_ = load(data_, dtype_, offset, n, scratch_);
    offset_ = offset;
    return values_;
  }

 private:
  const void* data_;
  Dtype dtype_;
  int64_t offset_ = -1;
  const T* values_ = nullptr;
  alignas(64) T scratch_[kChunk];
};

// Calls `work(first, n)` for every piece of a row.
template <typename Work>
inline void each_piece(int64_t width, const Work& work) {
  for (int64_t first = 0; first < width; first += kChunk) work(first, smaller(kChunk, width - first));
}

template <typename T>
void outputs(const Forward& a, int64_t begin, int64_t end) {
  Row<T> xs(a.x, a.dtype), scales(a.scale.data, a.scale.dtype), shifts(a.shift.data, a.shift.dtype);
  alignas(64) T y_scratch[kChunk];
  const int64_t width = a.shape.width;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t b = row / a.shape.rows, offset = row * width;
    double sum = 0.0;
    each_piece(width, [&](int64_t first, int64_t n) {
      const T* x = xs.piece(offset + first, n);
      T s = 0;
#pragma omp simd reduction(+ : s)
      for (int64_t i = 0; i < n; ++i) s += x[i];
      sum += static_cast<double>(s);
    });
    const T pivot = static_cast<T>(sum / static_cast<double>(width));
    // The second pass goes around the mean but for rounding, and its first moment takes the rounding off.
    double first_moment = 0.0, second_moment = 0.0;
    each_piece(width, [&](int64_t first, int64_t n) {
      const T* x = xs.piece(offset + first, n);
      T s1 = 0, s2 = 0;
#pragma omp simd reduction(+ : s1, s2)
      for (int64_t i = 0; i < n; ++i) {
        const T d = x[i] - pivot;
        s1 += d;
        s2 = madd(d, d, s2);
      }
      first_moment += static_cast<double>(s1);
      second_moment += static_cast<double>(s2);
    });
    const double count = static_cast<double>(width), off = first_moment / count;
    const double variance = second_moment / count - off * off;
    const T mean = static_cast<T>(static_cast<double>(pivot) + off);
    const T rstd = static_cast<T>(1.0 / root((variance < 0.0 ? 0.0 : variance) + a.eps));
    static_cast<T*>(a.mean)[row] = mean;
    static_cast<T*>(a.rstd)[row] = rstd;
    each_piece(width, [&](int64_t first, int64_t n) {
      const T* x = xs.piece(offset + first, n);
      const T* scale = scales.piece(b * a.scale.stride + first, n);
      const T* shift = shifts.piece(b * a.shift.stride + first, n);
      T* y = destination(a.y, a.dtype, offset + first, y_scratch);
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) y[i] = madd((x[i] - mean) * rstd, T(1) + scale[i], shift[i]);
      store(y, a.y, a.dtype, offset + first, n);
    });
  }
}

template <typename T>
void gradients(const Stages& a, int64_t begin, int64_t end) {
  Row<T> xs(a.x, a.dtype), grads(a.grad_output, a.dtype), scales(a.scale.data, a.scale.dtype);
  alignas(64) T grad_scratch[kChunk];
  const int64_t width = a.shape.width, chunks = row_chunks(a.shape);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / chunks, first_row = item % chunks * kRowsPerSum;
    const int64_t stop = smaller(a.shape.rows, first_row + kRowsPerSum);
    T* by_scale = a.partials == nullptr ? nullptr : static_cast<T*>(a.partials) + item * 2 * width;
    T* by_shift = by_scale == nullptr ? nullptr : by_scale + width;
    if (by_scale != nullptr)
      for (int64_t i = 0; i < 2 * width; ++i) by_scale[i] = T(0);
    for (int64_t r = first_row; r < stop; ++r) {
      const int64_t row = b * a.shape.rows + r, offset = row * width;
      const T mean = static_cast<const T*>(a.mean)[row], rstd = static_cast<const T*>(a.rstd)[row];
      if (by_scale != nullptr)
        each_piece(width, [&](int64_t first, int64_t n) {
          const T* x = xs.piece(offset + first, n);
          const T* g = grads.piece(offset + first, n);
          T* to_scale = by_scale + first;
          T* to_shift = by_shift + first;
#pragma omp simd
          for (int64_t i = 0; i < n; ++i) {
            to_scale[i] = madd(g[i], (x[i] - mean) * rstd, to_scale[i]);
            to_shift[i] += g[i];
          }
        });
      if (a.grad_x == nullptr) continue;
      double sum = 0.0, product = 0.0;
      each_piece(width, [&](int64_t first, int64_t n) {
        const T* x = xs.piece(offset + first, n);
        const T* g = grads.piece(offset + first, n);
        const T* scale = scales.piece(b * a.scale.stride + first, n);
        T s1 = 0, s2 = 0;
#pragma omp simd reduction(+ : s1, s2)
        for (int64_t i = 0; i < n; ++i) {
          const T scaled = madd(g[i], scale[i], g[i]);
          s1 += scaled;
          s2 = madd(scaled, (x[i] - mean) * rstd, s2);
        }
        sum += static_cast<double>(s1);
        product += static_cast<double>(s2);
      });
      const T sum_mean = static_cast<T>(sum / static_cast<double>(width));
      const T product_mean = static_cast<T>(product / static_cast<double>(width));
      each_piece(width, [&](int64_t first, int64_t n) {
        const T* x = xs.piece(offset + first, n);
        const T* g = grads.piece(offset + first, n);
        const T* scale = scales.piece(b * a.scale.stride + first, n);
        T* grad = destination(a.grad_x, a.dtype, offset + first, grad_scratch);
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) {
          const T scaled = madd(g[i], scale[i], g[i]);
          grad[i] = rstd * (scaled - madd((x[i] - mean) * rstd, product_mean, sum_mean));
        }
        store(grad, a.grad_x, a.dtype, offset + first, n);
      });
    }
  }
}

// The sums of a piece of the columns over the chunks of rows of a sample, in their order.
template <typename T>
void combine(const Stages& a, int64_t begin, int64_t end) {
  // As double, whatever the dtype of the result.
  alignas(64) double sums[kChunk];
  alignas(64) float narrow[kChunk];
  const int64_t width = a.shape.width, chunks = row_chunks(a.shape), per_row = pieces(a.shape);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / per_row, first = item % per_row * kChunk;
    const int64_t n = smaller(kChunk, width - first);
    for (int64_t which = 0; which < 2; ++which) {
      void* result = which == 0 ? a.grad_scale : a.grad_shift;
      if (result == nullptr) continue;
      for (int64_t i = 0; i < n; ++i) sums[i] = 0.0;
      for (int64_t c = 0; c < chunks; ++c) {
        const T* partial = static_cast<const T*>(a.partials) + ((b * chunks + c) * 2 + which) * width + first;
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) sums[i] += static_cast<double>(partial[i]);
      }
      const int64_t at = b * width + first;
      if (a.scale.dtype == Dtype::float64) {
        for (int64_t i = 0; i < n; ++i) static_cast<double*>(result)[at + i] = sums[i];
        continue;
      }
      float* values = destination(result, a.scale.dtype, at, narrow);
      for (int64_t i = 0; i < n; ++i) values[i] = static_cast<float>(sums[i]);
      store(values, result, a.scale.dtype, at, n);
    }
  }
}

// Rows that make a thread worth waking.
inline int64_t grain(const Shape& shape) {
  constexpr int64_t enough = kChunksPerThread * kChunk;
  return shape.width < enough ? enough / shape.width : 1;
}

template <typename T>
void stages(const Backward& arguments, const Pool& pool) {
  const Shape& shape = arguments.shape;
  const bool sums = arguments.grad_scale != nullptr || arguments.grad_shift != nullptr;
  const int64_t chunks = shape.batch * row_chunks(shape);
  const Memory partials(sums ? chunks * 2 * shape.width * static_cast<int64_t>(sizeof(T)) : 0);
  const Stages a{arguments, sums ? partials.at(0) : nullptr};
  run(pool, gradients<T>, a, chunks, larger(grain(shape) / kRowsPerSum, 1));
  if (sums) run(pool, combine<T>, a, shape.batch * pieces(shape), kChunksPerThread);
}

}  // namespace

void forward(const Forward& a, const Pool& pool) {
  run(pool, a.dtype == Dtype::float64 ? outputs<double> : outputs<float>, a, a.shape.batch * a.shape.rows,
      grain(a.shape));
}

void backward(const Backward& a, const Pool& pool) {
  a.dtype == Dtype::float64 ? stages<double>(a, pool) : stages<float>(a, pool);
}

}  // namespace diffpp::ada_layer_norm::DIFFPP_ISA
