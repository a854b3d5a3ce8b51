#include "add_noise.h"

#include "philox.h"

namespace diffpp {
namespace DIFFPP_ISA {
namespace {

template <typename T>
void forward(const AddNoise& a, int64_t begin, int64_t end) {
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
void backward(const AddNoise& a, int64_t begin, int64_t end) {
  alignas(64) T grad_scratch[kChunk], result_scratch[kChunk];
  const Chunks chunks(a.layout);
  for (int64_t item = begin; item < end; ++item) {
    const auto [b, first, n, offset] = chunks[item];
    const T alpha = number<T>(a.alpha, b);
    const T* grad = load(a.x0, a.dtype, offset, n, grad_scratch);
    T* result = destination(a.x_t, a.dtype, offset, result_scratch);
    for (int64_t i = 0; i < n; ++i) result[i] = alpha * grad[i];
    store(result, a.x_t, a.dtype, offset, n);
  }
}

}  // namespace

void add_noise_forward(const AddNoise& a, int64_t begin, int64_t end) {
  a.dtype == Dtype::float64 ? forward<double>(a, begin, end) : forward<float>(a, begin, end);
}

void add_noise_backward(const AddNoise& a, int64_t begin, int64_t end) {
  a.dtype == Dtype::float64 ? backward<double>(a, begin, end) : backward<float>(a, begin, end);
}

}  // namespace DIFFPP_ISA
}  // namespace diffpp
