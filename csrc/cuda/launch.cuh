// Grid sizes and the check after a launch.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace diffpp::cuda {

constexpr int kThreads = 256;

// Blocks that an SM must hold at least, for a kernel of elements S: 128 registers are a thread's then. Left alone, the compiler
// spills for a larger share of the SM; float64 pairs do not fit in what it chooses.
template <typename S>
constexpr int kBlocksPerSm = sizeof(S) == sizeof(double) ? 2 : 0;

inline void check_launch(const char* op) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(op) + ": the kernel was not launched: " + cudaGetErrorString(error));
}

// Blocks of kThreads for the threads of a sample, times the batch. Kernels stride over what a grid of this size leaves.
inline dim3 grid_of(int64_t threads, int64_t batch = 1) {
  constexpr int64_t kMostX = 1 << 20, kMostY = 65535;
  const int64_t blocks = (threads + kThreads - 1) / kThreads;
  return dim3(
      static_cast<unsigned>(blocks < kMostX ? blocks : kMostX), static_cast<unsigned>(batch < kMostY ? batch : kMostY));
}

}  // namespace diffpp::cuda
