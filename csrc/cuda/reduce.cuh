// Sums over a warp and over a block, in an order that depends on nothing but the number of threads.
#pragma once

#include "launch.cuh"

namespace diffpp::cuda {

constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;

// Every lane gets the sum: partners add the same two numbers, so all lanes get the same bits.
__device__ inline double warp_sum(double value) {
#pragma unroll
  for (int apart = kWarp / 2; apart > 0; apart /= 2) value += __shfl_xor_sync(0xFFFFFFFFu, value, apart);
  return value;
}

// Every thread gets the sums over the block of kThreads.
template <int kSums>
__device__ inline void block_sum(double (&sums)[kSums]) {
  __shared__ double of_warps[kWarps][kSums];
  const int warp = threadIdx.x / kWarp;
#pragma unroll
  for (int k = 0; k < kSums; ++k) {
    sums[k] = warp_sum(sums[k]);
    if (threadIdx.x % kWarp == 0) of_warps[warp][k] = sums[k];
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kSums; ++k) {
    sums[k] = 0.0;
    for (int w = 0; w < kWarps; ++w) sums[k] += of_warps[w][k];
  }
  __syncthreads();
}

}  // namespace diffpp::cuda
