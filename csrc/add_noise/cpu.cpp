#include "../common/cpu_noise.h"
#include "arguments.h"

namespace diffpp::add_noise::DIFFPP_ISA {
namespace {

template <typename T>
void noisy(const Forward& a, int64_t begin, int64_t end) {
  alignas(64) T x0_scratch[kChunk], noise_scratch[kChunk], x_t_scratch[kChunk];
  const Chunks chunks(a.layout);
  for (int64_t item = begin; item < end; ++item) {
    const auto [b, first, n, offset] = chunks[item];
    const T alpha = number<T>(a.alpha, b);
    const T sigma = number<T>(a.sigma, b);
    const T* x0 = load(a.x0, a.dtype, offset, n, x0_scratch);
    const T* noise = noise_run(a.noise, a.layout, a.dtype, b, first, n, noise_scratch);
    T* x_t = destination(a.x_t, a.dtype, offset, x_t_scratch);
    for (int64_t i = 0; i < n; ++i) x_t[i] = madd(sigma, noise[i], alpha * x0[i]);
    store(x_t, a.x_t, a.dtype, offset, n);
  }
}

template <typename T>
void gradient(const Backward& a, int64_t begin, int64_t end) {
  alignas(64) T grad_scratch[kChunk], result_scratch[kChunk];
  const Chunks chunks(a.layout);
  for (int64_t item = begin; item < end; ++item) {
    const auto [b, first, n, offset] = chunks[item];
    const T alpha = number<T>(a.alpha, b);
    const T* grad = load(a.grad_output, a.dtype, offset, n, grad_scratch);
    T* result = destination(a.grad_x0, a.dtype, offset, result_scratch);
    for (int64_t i = 0; i < n; ++i) result[i] = alpha * grad[i];
    store(result, a.grad_x0, a.dtype, offset, n);
  }
}

}  // namespace

void forward(const Forward& a, const Pool& pool) {
  run(pool, a.dtype == Dtype::float64 ? noisy<double> : noisy<float>, a, Chunks(a.layout).count, kChunksPerThread);
}

void backward(const Backward& a, const Pool& pool) {
  run(pool, a.dtype == Dtype::float64 ? gradient<double> : gradient<float>, a, Chunks(a.layout).count,
      kChunksPerThread);
}

}  // namespace diffpp::add_noise::DIFFPP_ISA
