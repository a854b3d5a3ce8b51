// Elements of any dtype seen as the dtype of the arithmetic, one thread at a time; vectors of four where memory allows.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../cpu/data.h"

namespace diffpp::cuda {

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

template <typename S>
using Four = Pack<S, 4>;

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

}  // namespace diffpp::cuda
