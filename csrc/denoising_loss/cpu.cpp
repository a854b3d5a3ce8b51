#include "../common/cpu_noise.h"
#include "arguments.h"

namespace diffpp::denoising_loss::DIFFPP_ISA {
namespace {

// The sum over a chunk of r^2, and r = prediction - target to `residual` where `write`.
template <bool write, typename T>
inline double sum_of_squares(const T* prediction, const T* target, int64_t n, T* residual) {
  double total = 0.0;
  for (int64_t start = 0; start < n; start += kSumRun) {
    const int64_t stop = smaller(start + kSumRun, n);
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = start; i < stop; ++i) {
      const T r = prediction[i] - target[i];
      sum += r * r;
      if constexpr (write) residual[i] = r;
    }
    total += static_cast<double>(sum);
  }
  return total;
}

template <typename T>
void residuals(const Forward& a, int64_t begin, int64_t end) {
  alignas(64) T prediction_scratch[kChunk], x0_scratch[kChunk], noise_scratch[kChunk];
  const Chunks chunks(a.layout);
  for (int64_t item = begin; item < end; ++item) {
    const Chunk chunk = chunks[item];
    const T* prediction = load(a.prediction, a.dtype, chunk.offset, chunk.n, prediction_scratch);
    const T* target = target_run(a.target, a.dtype, a.layout, chunk, x0_scratch, noise_scratch);
    if (a.residual == nullptr) {
      a.partials[item] = sum_of_squares<false, T>(prediction, target, chunk.n, nullptr);
    } else {
      T* residual = destination(a.residual, a.dtype, chunk.offset, prediction_scratch);
      a.partials[item] = sum_of_squares<true>(prediction, target, chunk.n, residual);
      store(residual, a.residual, a.dtype, chunk.offset, chunk.n);
    }
  }
}

template <typename T>
void gradients(const Backward& a, int64_t begin, int64_t end) {
  alignas(64) T residual_scratch[kChunk];
  const Chunks chunks(a.layout);
  const T mean = static_cast<T>(2.0 / static_cast<double>(a.layout.batch * a.layout.sample()));
  for (int64_t item = begin; item < end; ++item) {
    const auto [b, first, n, offset] = chunks[item];
    const T scale = number<T>(a.grad_output, 0) * mean * number<T>(a.weight, b, T(1));
    const T* residual = load(a.residual, a.dtype, offset, n, residual_scratch);
    T* gradient = destination(a.gradient, a.dtype, offset, residual_scratch);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) gradient[i] = scale * residual[i];
    store(gradient, a.gradient, a.dtype, offset, n);
  }
}

void combine(const Forward& a) {
  const Chunks chunks(a.layout);
  double total = 0.0;
  for (int64_t b = 0; b < a.layout.batch; ++b) {
    double sum = 0.0;
    for (int64_t c = 0; c < chunks.per_sample; ++c) sum += a.partials[b * chunks.per_sample + c];
    total += number<double>(a.weight, b, 1.0) * sum;
  }
  put(a.loss, a.dtype, 0, total / static_cast<double>(a.layout.batch * a.layout.sample()));
}

}  // namespace

void forward(const Forward& arguments, const Pool& pool) {
  Forward a = arguments;
  const int64_t chunks = Chunks(a.layout).count;
  const Memory partials(chunks * static_cast<int64_t>(sizeof(double)));
  a.partials = partials.doubles();
  run(pool, a.dtype == Dtype::float64 ? residuals<double> : residuals<float>, a, chunks, kChunksPerThread);
  combine(a);
}

void backward(const Backward& a, const Pool& pool) {
  run(pool, a.dtype == Dtype::float64 ? gradients<double> : gradients<float>, a, Chunks(a.layout).count,
      kChunksPerThread);
}

}  // namespace diffpp::denoising_loss::DIFFPP_ISA
