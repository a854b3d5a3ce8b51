// A tensor is worked on in lines, which are cut into pieces of fixed length. Each piece leaves partial results; they are combined
// in order, so the bits depend on the shape alone.
#include "../common/cpu.h"
#include "arguments.h"

namespace diffpp::group_norm_silu::DIFFPP_ISA {
namespace {

struct Pieces {
  int64_t lines;
  int64_t line;      // elements of a line
  int64_t length;    // elements of a piece; the last of a line may be shorter
  int64_t per_line;

  constexpr Pieces(int64_t lines, int64_t line, int64_t length)
      : lines(lines), line(line), length(length), per_line((line + length - 1) / length) {}

  constexpr int64_t count() const { return lines * per_line; }
};

// In channels_last the kernels go by rows of whole pixels, wide enough for vectors when channels are few.
inline int64_t row_of(const Shape& shape) {
  constexpr int64_t row = 512;
  return shape.channels < row ? row / shape.channels * shape.channels : shape.channels;
}

inline Pieces bands(const Shape& shape) {
  // Enough that the two numbers per channel that a band leaves are few; 128 KB of float32 at 512 channels.
  constexpr int64_t rows = 64;
  return {shape.batch, shape.channels * shape.pixels, rows * row_of(shape)};
}

// For the sums over a group. Row-major: a line is a group of a sample. channels_last: a sample.
inline Pieces group_pieces(const Shape& shape) {
  return shape.channels_last ? bands(shape)
                             : Pieces(shape.batch * shape.groups, shape.per_group() * shape.pixels, kChunk);
}

// For work by channel. Row-major: a line is a channel of a sample. channels_last: a sample.
inline Pieces channel_pieces(const Shape& shape) {
  return shape.channels_last ? bands(shape) : Pieces(shape.batch * shape.channels, shape.pixels, kChunk);
}

struct ForwardStages : Forward {
  double* pieces;  // mean, sum of squared deviations from it: [B, group pieces, 2, G]

  const void* normalised() const { return residual == nullptr ? x : sum; }
};

struct BackwardStages : Backward {
  void* pieces;  // T [B, channel pieces, 2, C]: of g and of g (x - mean), g the gradient before SiLU
  void* sums;    // T [B, 2, C]: of g and of g (x - mean) rstd
  void* terms;   // T [B, 2, G]: slope and offset in dx = g weight rstd + slope (x - mean) + offset
};

static_assert(kChunk <= kMostChannels, "a piece of a row-major line fits where a pixel does");

// Only narrower dtypes are converted.
template <typename T>
constexpr int64_t kScratch = sizeof(T) == sizeof(float) ? kMostChannels : 1;

// One number for a whole run, where channels_last has one for each of its elements.
template <typename T>
struct Same {
  T value;
  T operator[](int64_t) const { return value; }
};

struct Piece {
  int64_t line;
  int64_t number;  // in its line
  int64_t first;   // element of the line
  int64_t n;       // elements

  Piece(const Pieces& pieces, int64_t item)
      : line(item / pieces.per_line),
        number(item % pieces.per_line),
        first(number * pieces.length),
        n(smaller(pieces.length, pieces.line - first)) {}
};

template <typename T>
inline T silu(T y) {
  return y * sigmoid(y);
}

// grad times the derivative of SiLU at y.
template <typename T>
inline T through_silu(T grad, T y) {
  const T s = sigmoid(y);
  return grad * s * madd(y, T(1) - s, T(1));
}

// y = (x - mean) scale + bias. The mean goes off first: x scale + (bias - mean scale) would cancel where it is large.
template <typename T, typename Values>
struct Affine {
  Values mean;
  Values scale;  // weight rstd
  Values bias;

  T operator()(T x, int64_t i) const { return madd(x - mean[i], scale[i], bias[i]); }
};

// What is added to a channel before it is normalised.
template <typename T>
inline T offset_of(const Inputs& a, int64_t b, int64_t c) {
  return a.offset.data == nullptr
             ? T(0)
             : number<T>({a.offset.data, a.offset.dtype, 1}, b * a.offset_row + c * a.offset.stride);
}

template <typename T>
inline Affine<T, Same<T>> channel_affine(const Inputs& a, const T* mean, const T* rstd, int64_t b, int64_t c) {
  const int64_t at = b * a.shape.groups + c / a.shape.per_group();
  return {{mean[at] - offset_of<T>(a, b, c)}, {number<T>(a.weight, c, T(1)) * rstd[at]}, {number<T>(a.bias, c)}};
}

// The coefficients of each element of a row in channels_last: tables for one sample, filled when a piece of another sample
// begins.
template <typename T, int kTables>
class RowTables {
 public:
  explicit RowTables(const Shape& shape) : shape_(shape), row_(row_of(shape)) {}

  T* operator[](int table) { return values_ + table * row_; }

  bool turn_to(int64_t b) {
    const bool turned = b != b_;
    b_ = b;
    return turned;
  }

  // `value(g, c)` for every channel c of group g, repeated for every pixel of the row.
  template <typename Value>
  void fill(int table, const Value& value) {
    T* to = (*this)[table];
    int64_t c = 0;
    for (int64_t g = 0; g < shape_.groups; ++g)
      for (int64_t end = c + shape_.per_group(); c < end; ++c) to[c] = value(g, c);
    for (int64_t i = shape_.channels; i < row_; ++i) to[i] = to[i - shape_.channels];
  }

  Affine<T, const T*> affine(const Inputs& a, const T* mean, const T* rstd) {
    mean += b_ * shape_.groups;
    rstd += b_ * shape_.groups;
    fill(0, [&](int64_t g, int64_t c) { return mean[g] - offset_of<T>(a, b_, c); });
    fill(1, [&](int64_t g, int64_t c) { return number<T>(a.weight, c, T(1)) * rstd[g]; });
    fill(2, [&](int64_t, int64_t c) { return number<T>(a.bias, c); });
    return {(*this)[0], (*this)[1], (*this)[2]};
  }

 private:
  const Shape& shape_;
  int64_t row_;
  int64_t b_ = -1;
  alignas(64) T values_[kTables * kMostChannels];
};

// Statistics

struct Sums {
  double first;
  double second;
};

template <typename T>
inline T sum_of(const T* x, int64_t n) {
  // Four sums at a time: one alone would wait for itself.
  const int64_t quarter = n / 4;
  T s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
  for (int64_t i = 0; i < quarter; ++i) {
    s0 += x[i];
    s1 += x[i + quarter];
    s2 += x[i + 2 * quarter];
    s3 += x[i + 3 * quarter];
  }
  for (int64_t i = 4 * quarter; i < n; ++i) s0 += x[i];
  return (s0 + s1) + (s2 + s3);
}

// Sums of x - pivot and of its square.
template <typename T>
inline Sums deviations(const T* x, int64_t n, T pivot) {
  const int64_t half = n / 2;
  T first0 = 0, first1 = 0, second0 = 0, second1 = 0;
#pragma omp simd reduction(+ : first0, first1, second0, second1)
  for (int64_t i = 0; i < half; ++i) {
    const T d0 = x[i] - pivot;
    const T d1 = x[i + half] - pivot;
    first0 += d0;
    first1 += d1;
    second0 = madd(d0, d0, second0);
    second1 = madd(d1, d1, second1);
  }
  for (int64_t i = 2 * half; i < n; ++i) {
    const T d = x[i] - pivot;
    first0 += d;
    second0 = madd(d, d, second0);
  }
  return {static_cast<double>(first0) + first1, static_cast<double>(second0) + second1};
}

// Mean and sum of squared deviations of n values from sums around a pivot that is their mean but for rounding.
inline void store_partial(double* partial, int64_t apart, double pivot, const Sums& sums, int64_t n) {
  const double shift = sums.first / static_cast<double>(n);
  const double squares = sums.second - sums.first * shift;
  partial[0] = pivot + shift;
  partial[apart] = squares < 0.0 ? 0.0 : squares;
}

// The elements [offset, offset + n) of x, or of x + residual as it is stored: then that is stored here.
template <typename T>
inline const T* summed(const ForwardStages& a, int64_t offset, int64_t n, T* scratch, T* residual_scratch) {
  const T* x = load(a.x, a.dtype, offset, n, scratch);
  if (a.residual == nullptr) return x;
  const T* residual = load(a.residual, a.dtype, offset, n, residual_scratch);
  T* sum = destination(a.sum, a.dtype, offset, scratch);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) sum[i] = x[i] + residual[i];
  store(sum, a.sum, a.dtype, offset, n);
  return load<T>(a.sum, a.dtype, offset, n, scratch);
}

// A piece of a group with the offsets of its channels added.
template <typename T>
inline const T* with_offsets(const ForwardStages& a, const Piece& piece, const T* x, T* shifted) {
  if (a.offset.data == nullptr) return x;
  const int64_t b = piece.line / a.shape.groups, first_channel = piece.line % a.shape.groups * a.shape.per_group();
  for (int64_t i = 0; i < piece.n;) {
    const int64_t c = (piece.first + i) / a.shape.pixels;
    const int64_t until = smaller(piece.n, (c + 1) * a.shape.pixels - piece.first);
    const T offset = offset_of<T>(a, b, first_channel + c);
    for (; i < until; ++i) shifted[i] = x[i] + offset;
  }
  return shifted;
}

template <typename T>
void row_major_statistics(const ForwardStages& a, int64_t begin, int64_t end) {
  alignas(64) T scratch[kScratch<T>], residual_scratch[kScratch<T>], shifted[kChunk];
  const Pieces pieces = group_pieces(a.shape);
  const int64_t groups = a.shape.groups;
  for (int64_t item = begin; item < end; ++item) {
    const Piece piece(pieces, item);
    const T* stored = summed(a, piece.line * pieces.line + piece.first, piece.n, scratch, residual_scratch);
    const T* x = with_offsets(a, piece, stored, shifted);
    const T pivot = sum_of(x, piece.n) / static_cast<T>(piece.n);
    double* partial = a.pieces + (piece.line / groups * pieces.per_line + piece.number) * 2 * groups;
    store_partial(partial + piece.line % groups, groups, pivot, deviations(x, piece.n, pivot), piece.n);
  }
}

// The sum over the channels of group g and the pixels of a row.
template <typename T>
inline double group_sum(const Shape& shape, const T* row, int64_t g) {
  const int64_t width = row_of(shape);
  double sum = 0.0;
  for (int64_t pixel = g * shape.per_group(); pixel < width; pixel += shape.channels)
    for (int64_t i = pixel; i < pixel + shape.per_group(); ++i) sum += static_cast<double>(row[i]);
  return sum;
}

// The sum of the offsets of group g's channels.
inline double group_offset(const Inputs& a, int64_t b, int64_t g) {
  double sum = 0.0;
  if (a.offset.data != nullptr)
    for (int64_t c = g * a.shape.per_group(); c < (g + 1) * a.shape.per_group(); ++c) sum += offset_of<double>(a, b, c);
  return sum;
}

template <typename T>
void channels_last_statistics(const ForwardStages& a, int64_t begin, int64_t end) {
  alignas(64) T scratch[kScratch<T>], residual_scratch[kScratch<T>];
  RowTables<T, 3> tables(a.shape);
  T* pivot = tables[0];
  T* first = tables[1];
  T* second = tables[2];
  const Pieces pieces = group_pieces(a.shape);
  const int64_t row = row_of(a.shape);
  const int64_t groups = a.shape.groups;
  for (int64_t item = begin; item < end; ++item) {
    const Piece piece(pieces, item);
    const int64_t offset = piece.line * pieces.line + piece.first;
    const int64_t n = piece.n / groups;
    for (int64_t i = 0; i < row; ++i) first[i] = second[i] = T(0);
    for (int64_t at = 0; at < piece.n; at += row) {
      const int64_t width = smaller(row, piece.n - at);
      const T* x = summed(a, offset + at, width, scratch, residual_scratch);
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) first[i] += x[i];
    }
    double* partial = a.pieces + item * 2 * groups;
    const double rows = static_cast<double>(piece.n / a.shape.channels);
    for (int64_t g = 0; g < groups; ++g)
      partial[g] = (group_sum(a.shape, first, g) + rows * group_offset(a, piece.line, g)) / static_cast<double>(n);
    tables.fill(0, [&](int64_t g, int64_t c) { return static_cast<T>(partial[g]) - offset_of<T>(a, piece.line, c); });
    for (int64_t i = 0; i < row; ++i) first[i] = T(0);
    for (int64_t at = 0; at < piece.n; at += row) {
      const int64_t width = smaller(row, piece.n - at);
      const T* x = load(a.normalised(), a.dtype, offset + at, width, scratch);
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) {
        const T d = x[i] - pivot[i];
        first[i] += d;
        second[i] = madd(d, d, second[i]);
      }
    }
    for (int64_t g = 0; g < groups; ++g) {
      const double around = static_cast<double>(static_cast<T>(partial[g]));
      store_partial(partial + g, groups, around, {group_sum(a.shape, first, g), group_sum(a.shape, second, g)}, n);
    }
  }
}

template <typename T>
void statistics(const ForwardStages& a, int64_t begin, int64_t end) {
  a.shape.channels_last ? channels_last_statistics<T>(a, begin, end) : row_major_statistics<T>(a, begin, end);
}

template <typename T>
void moments(const ForwardStages& a, int64_t begin, int64_t end) {
  const Pieces pieces = group_pieces(a.shape);
  const int64_t groups = a.shape.groups;
  const int64_t shared_by = a.shape.channels_last ? groups : 1;
  for (int64_t item = begin; item < end; ++item) {
    const double* partial = a.pieces + item / groups * pieces.per_line * 2 * groups + item % groups;
    double n = 0.0, mean = 0.0, squares = 0.0;
    for (int64_t p = 0; p < pieces.per_line; ++p, partial += 2 * groups) {
      // Chan, Golub, LeVeque: "Algorithms for computing the sample variance", 1983.
      const double more = static_cast<double>(Piece(pieces, p).n / shared_by);
      const double difference = partial[0] - mean;
      const double share = more / (n + more);
      squares += partial[groups] + difference * difference * (n * share);
      mean += difference * share;
      n += more;
    }
    static_cast<T*>(a.mean)[item] = static_cast<T>(mean);
    static_cast<T*>(a.rstd)[item] = static_cast<T>(1.0 / root(squares / n + a.eps));
  }
}

// The output

template <bool kSilu, typename T, typename Values>
inline void activate_run(const T* x, int64_t n, const Affine<T, Values>& affine, T* y) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const T value = affine(x[i], i);
    y[i] = kSilu ? silu(value) : value;
  }
}

// Backwards, here and in the gradient of x: what the pass before read last is still in a cache.
template <typename T, bool kSilu>
void activate_pieces(const ForwardStages& a, int64_t begin, int64_t end) {
  alignas(64) T x_scratch[kScratch<T>], y_scratch[kScratch<T>];
  const Pieces pieces = channel_pieces(a.shape);
  const T* mean = static_cast<const T*>(a.mean);
  const T* rstd = static_cast<const T*>(a.rstd);
  const auto run = [&](int64_t offset, int64_t n, const auto& affine) {
    const T* x = load(a.normalised(), a.dtype, offset, n, x_scratch);
    T* y = destination(a.y, a.dtype, offset, y_scratch);
    activate_run<kSilu>(x, n, affine, y);
    store(y, a.y, a.dtype, offset, n);
  };
  if (a.shape.channels_last) {
    RowTables<T, 3> tables(a.shape);
    Affine<T, const T*> affine{};
    for (int64_t item = end; item-- > begin;) {
      const Piece piece(pieces, item);
      if (tables.turn_to(piece.line)) affine = tables.affine(a, mean, rstd);
      for (int64_t at = 0; at < piece.n; at += row_of(a.shape))
        run(piece.line * pieces.line + piece.first + at, smaller(row_of(a.shape), piece.n - at), affine);
    }
  } else {
    for (int64_t item = end; item-- > begin;) {
      const Piece piece(pieces, item);
      const int64_t b = piece.line / a.shape.channels, c = piece.line % a.shape.channels;
      run(piece.line * pieces.line + piece.first, piece.n, channel_affine(a, mean, rstd, b, c));
    }
  }
}

template <typename T>
void activate(const ForwardStages& a, int64_t begin, int64_t end) {
  a.silu ? activate_pieces<T, true>(a, begin, end) : activate_pieces<T, false>(a, begin, end);
}

// Sums for the gradients

template <typename T, bool kSilu>
void row_major_sums(const BackwardStages& a, int64_t begin, int64_t end) {
  alignas(64) T x_scratch[kScratch<T>], grad_scratch[kScratch<T>];
  const Pieces pieces = channel_pieces(a.shape);
  const int64_t channels = a.shape.channels;
  for (int64_t item = begin; item < end; ++item) {
    const Piece piece(pieces, item);
    const int64_t b = piece.line / channels, c = piece.line % channels;
    const int64_t offset = piece.line * pieces.line + piece.first;
    const auto affine = channel_affine(a, static_cast<const T*>(a.mean), static_cast<const T*>(a.rstd), b, c);
    const T* x = load(a.x, a.dtype, offset, piece.n, x_scratch);
    const T* grad = load(a.grad_output, a.dtype, offset, piece.n, grad_scratch);
    T first = 0, second = 0;
#pragma omp simd reduction(+ : first, second)
    for (int64_t i = 0; i < piece.n; ++i) {
      const T g = kSilu ? through_silu(grad[i], affine(x[i], i)) : grad[i];
      first += g;
      second = madd(g, x[i] - affine.mean[i], second);
    }
    T* partial = static_cast<T*>(a.pieces) + (b * pieces.per_line + piece.number) * 2 * channels + c;
    partial[0] = first;
    partial[channels] = second;
  }
}

template <typename T, bool kSilu>
void channels_last_sums(const BackwardStages& a, int64_t begin, int64_t end) {
  alignas(64) T x_scratch[kScratch<T>], grad_scratch[kScratch<T>];
  RowTables<T, 5> tables(a.shape);
  Affine<T, const T*> affine{};
  T* first = tables[3];
  T* second = tables[4];
  const Pieces pieces = channel_pieces(a.shape);
  const int64_t row = row_of(a.shape);
  const int64_t channels = a.shape.channels;
  for (int64_t item = begin; item < end; ++item) {
    const Piece piece(pieces, item);
    if (tables.turn_to(piece.line))
      affine = tables.affine(a, static_cast<const T*>(a.mean), static_cast<const T*>(a.rstd));
    for (int64_t i = 0; i < row; ++i) first[i] = second[i] = T(0);
    for (int64_t at = 0; at < piece.n; at += row) {
      const int64_t offset = piece.line * pieces.line + piece.first + at;
      const int64_t width = smaller(row, piece.n - at);
      const T* x = load(a.x, a.dtype, offset, width, x_scratch);
      const T* grad = load(a.grad_output, a.dtype, offset, width, grad_scratch);
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) {
        const T g = kSilu ? through_silu(grad[i], affine(x[i], i)) : grad[i];
        first[i] += g;
        second[i] = madd(g, x[i] - affine.mean[i], second[i]);
      }
    }
    T* partial = static_cast<T*>(a.pieces) + item * 2 * channels;
    for (int64_t c = 0; c < channels; ++c) {
      T sum = 0, product = 0;
      for (int64_t i = c; i < row; i += channels) {
        sum += first[i];
        product += second[i];
      }
      partial[c] = sum;
      partial[channels + c] = product;
    }
  }
}

template <typename T>
void sums(const BackwardStages& a, int64_t begin, int64_t end) {
  if (a.shape.channels_last)
    a.silu ? channels_last_sums<T, true>(a, begin, end) : channels_last_sums<T, false>(a, begin, end);
  else
    a.silu ? row_major_sums<T, true>(a, begin, end) : row_major_sums<T, false>(a, begin, end);
}

template <typename T>
void terms(const BackwardStages& a, int64_t begin, int64_t end) {
  const Shape& shape = a.shape;
  const int64_t per_line = channel_pieces(shape).per_line;
  const double n = static_cast<double>(shape.per_group() * shape.pixels);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / shape.groups, g = item % shape.groups;
    const double rstd = static_cast<double>(static_cast<const T*>(a.rstd)[item]);
    T* sums = static_cast<T*>(a.sums) + b * 2 * shape.channels;
    double weighted = 0.0, weighted_product = 0.0;
    for (int64_t c = g * shape.per_group(); c < (g + 1) * shape.per_group(); ++c) {
      double sum = 0.0, product = 0.0;
      const T* partial = static_cast<const T*>(a.pieces) + b * per_line * 2 * shape.channels + c;
      for (int64_t p = 0; p < per_line; ++p, partial += 2 * shape.channels) {
        sum += static_cast<double>(partial[0]);
        product += static_cast<double>(partial[shape.channels]);
      }
      product *= rstd;
      sums[c] = static_cast<T>(sum);
      sums[shape.channels + c] = static_cast<T>(product);
      const double weight = static_cast<double>(number<T>(a.weight, c, T(1)));
      weighted += weight * sum;
      weighted_product += weight * product;
    }
    T* terms = static_cast<T*>(a.terms) + b * 2 * shape.groups + g;
    terms[0] = static_cast<T>(-rstd * rstd * (weighted_product / n));
    terms[shape.groups] = static_cast<T>(-rstd * (weighted / n));
  }
}

// The gradient of x: g scale + slope (x - mean) + offset

template <bool kSilu, typename T, typename Values>
inline void input_gradient_run(
    const T* grad, const T* x, int64_t n, const Affine<T, Values>& affine, const Values& slope, const Values& offset,
    T* grad_x) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const T g = kSilu ? through_silu(grad[i], affine(x[i], i)) : grad[i];
    grad_x[i] = madd(g, affine.scale[i], madd(slope[i], x[i] - affine.mean[i], offset[i]));
  }
}

template <typename T, bool kSilu>
void input_gradient_pieces(const BackwardStages& a, int64_t begin, int64_t end) {
  alignas(64) T x_scratch[kScratch<T>], grad_scratch[kScratch<T>], result_scratch[kScratch<T>];
  const Shape& shape = a.shape;
  const Pieces pieces = channel_pieces(shape);
  const T* mean = static_cast<const T*>(a.mean);
  const T* rstd = static_cast<const T*>(a.rstd);
  const auto run = [&](int64_t at, int64_t n, const auto& affine, const auto& slope, const auto& offset) {
    const T* x = load(a.x, a.dtype, at, n, x_scratch);
    const T* grad = load(a.grad_output, a.dtype, at, n, grad_scratch);
    T* grad_x = destination(a.grad_x, a.dtype, at, result_scratch);
    input_gradient_run<kSilu>(grad, x, n, affine, slope, offset, grad_x);
    if (a.grad_sum != nullptr) {
      const T* more = load(a.grad_sum, a.dtype, at, n, x_scratch);
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) grad_x[i] += more[i];
    }
    store(grad_x, a.grad_x, a.dtype, at, n);
  };
  if (shape.channels_last) {
    RowTables<T, 5> tables(shape);
    Affine<T, const T*> affine{};
    const T* const slope = tables[3];
    const T* const offset = tables[4];
    for (int64_t item = end; item-- > begin;) {
      const Piece piece(pieces, item);
      if (tables.turn_to(piece.line)) {
        const T* terms = static_cast<const T*>(a.terms) + piece.line * 2 * shape.groups;
        affine = tables.affine(a, mean, rstd);
        tables.fill(3, [&](int64_t g, int64_t) { return terms[g]; });
        tables.fill(4, [&](int64_t g, int64_t) { return terms[shape.groups + g]; });
      }
      for (int64_t at = 0; at < piece.n; at += row_of(shape))
        run(piece.line * pieces.line + piece.first + at, smaller(row_of(shape), piece.n - at), affine, slope, offset);
    }
  } else {
    for (int64_t item = end; item-- > begin;) {
      const Piece piece(pieces, item);
      const int64_t b = piece.line / shape.channels, c = piece.line % shape.channels;
      const T* terms = static_cast<const T*>(a.terms) + b * 2 * shape.groups + c / shape.per_group();
      run(piece.line * pieces.line + piece.first, piece.n, channel_affine(a, mean, rstd, b, c), Same<T>{terms[0]},
          Same<T>{terms[shape.groups]});
    }
  }
}

template <typename T>
void input_gradient(const BackwardStages& a, int64_t begin, int64_t end) {
  a.silu ? input_gradient_pieces<T, true>(a, begin, end) : input_gradient_pieces<T, false>(a, begin, end);
}

// Writes one number of an array of any dtype.
inline void write_one(void* array, Dtype dtype, int64_t i, double value) {
  if (dtype == Dtype::float64) {
    static_cast<double*>(array)[i] = value;
  } else if (dtype == Dtype::float32) {
    static_cast<float*>(array)[i] = static_cast<float>(value);
  } else {
    const float narrow = static_cast<float>(value);
    convert(&narrow, static_cast<uint16_t*>(array) + i, dtype, 1);
  }
}

template <typename T>
void parameter_gradients(const BackwardStages& a, int64_t begin, int64_t end) {
  const int64_t channels = a.shape.channels;
  for (int64_t c = begin; c < end; ++c) {
    double sum = 0.0, product = 0.0;
    for (int64_t b = 0; b < a.shape.batch; ++b) {
      const T* sums = static_cast<const T*>(a.sums) + b * 2 * channels;
      sum += static_cast<double>(sums[c]);
      product += static_cast<double>(sums[channels + c]);
    }
    if (a.grad_weight != nullptr) write_one(a.grad_weight, a.weight.dtype, c, product);
    if (a.grad_bias != nullptr) write_one(a.grad_bias, a.bias.dtype, c, sum);
  }
}

// A stage for one line of the group pieces, which has an equal share of the stage's work items.
template <typename Arguments>
inline void for_line(
    void (*stage)(const Arguments&, int64_t, int64_t), const Arguments& a, int64_t line, int64_t items) {
  const int64_t share = items / group_pieces(a.shape).lines;
  stage(a, line * share, (line + 1) * share);
}

template <typename T>
void forward_of_lines(const ForwardStages& a, int64_t begin, int64_t end) {
  for (int64_t line = begin; line < end; ++line) {
    for_line(statistics<T>, a, line, group_pieces(a.shape).count());
    for_line(moments<T>, a, line, a.shape.batch * a.shape.groups);
    for_line(activate<T>, a, line, channel_pieces(a.shape).count());
  }
}

template <typename T>
void backward_of_lines(const BackwardStages& a, int64_t begin, int64_t end) {
  for (int64_t line = begin; line < end; ++line) {
    for_line(sums<T>, a, line, channel_pieces(a.shape).count());
    for_line(terms<T>, a, line, a.shape.batch * a.shape.groups);
    if (a.grad_x != nullptr) for_line(input_gradient<T>, a, line, channel_pieces(a.shape).count());
  }
}

// Lines go to threads whole if that keeps all threads busy, or if there is work for one alone: a line that is done in
// all stages before the next begins comes from memory once.
inline bool by_line(const Shape& shape, const Pool& pool) {
  const int64_t elements = shape.batch * shape.channels * shape.pixels;
  return elements <= kChunksPerThread * kChunk || group_pieces(shape).lines >= 4 * pool.threads();
}

// The work items that make a thread worth waking, if one goes through so many elements.
inline int64_t grain(int64_t elements) {
  constexpr int64_t enough = kChunksPerThread * kChunk;
  return elements <= 1 ? enough : elements < enough ? enough / elements : 1;
}

inline int64_t grain(const Pieces& pieces) { return grain(smaller(pieces.line, pieces.length)); }

template <typename T>
void run_stages(const ForwardStages& a, const Pool& pool) {
  const Shape& shape = a.shape;
  const Pieces pieces = group_pieces(shape);
  if (by_line(shape, pool)) return run(pool, forward_of_lines<T>, a, pieces.lines, grain(pieces.line));
  const Pieces outputs = channel_pieces(shape);
  run(pool, statistics<T>, a, pieces.count(), grain(pieces));
  run(pool, moments<T>, a, shape.batch * shape.groups, grain(pieces.per_line));
  run(pool, activate<T>, a, outputs.count(), grain(outputs));
}

template <typename T>
void run_stages(const BackwardStages& a, const Pool& pool) {
  const Shape& shape = a.shape;
  const Pieces pieces = channel_pieces(shape);
  if (by_line(shape, pool)) {
    const Pieces lines = group_pieces(shape);
    run(pool, backward_of_lines<T>, a, lines.lines, grain(lines.line));
  } else {
    run(pool, sums<T>, a, pieces.count(), grain(pieces));
    run(pool, terms<T>, a, shape.batch * shape.groups, grain(pieces.per_line * shape.per_group()));
    if (a.grad_x != nullptr) run(pool, input_gradient<T>, a, pieces.count(), grain(pieces));
  }
  if (a.grad_weight != nullptr || a.grad_bias != nullptr)
    run(pool, parameter_gradients<T>, a, shape.channels, grain(shape.batch));
}

}  // namespace

void forward(const Forward& arguments, const Pool& pool) {
  const Shape& shape = arguments.shape;
  const int64_t pairs = shape.batch * group_pieces(shape).per_line * shape.groups;
  const Memory memory(pairs * 2 * static_cast<int64_t>(sizeof(double)));
  const ForwardStages a{arguments, memory.doubles()};
  a.dtype == Dtype::float64 ? run_stages<double>(a, pool) : run_stages<float>(a, pool);
}

void backward(const Backward& arguments, const Pool& pool) {
  const Shape& shape = arguments.shape;
  const int64_t pair = 2 * static_cast<int64_t>(arguments.dtype == Dtype::float64 ? sizeof(double) : sizeof(float));
  const int64_t pieces = shape.batch * channel_pieces(shape).per_line * shape.channels * pair;
  const int64_t sums = shape.batch * shape.channels * pair;
  const Memory memory(pieces + sums + shape.batch * shape.groups * pair);
  const BackwardStages a{arguments, memory.at(0), memory.at(pieces), memory.at(pieces + sums)};
  a.dtype == Dtype::float64 ? run_stages<double>(a, pool) : run_stages<float>(a, pool);
}

}  // namespace diffpp::group_norm_silu::DIFFPP_ISA
