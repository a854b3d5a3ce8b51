// csrc's host code for GPUs on the CPU's tensors, and in place of CUDA's runtime one that tells of each launch and does nothing.
//
// Every binding takes a tensor on the CPU for one on a GPU; what it calls are the objects that nvcc has made, with the kernels'
// names as they are in the machine code. `diffpp_on_launch` says whom to tell.
#include "common/binding.h"
// After torch's headers, whose own functions have these names.
#define is_cuda is_cpu
#define kCuda true

#include BINDINGS

#include <cuda_runtime.h>

#include <map>
#include <vector>

namespace {

using OnLaunch = void (*)(const char* kernel, const unsigned* grid_block_cluster, size_t shared, void** arguments);
OnLaunch on_launch = nullptr;

struct Configuration {
  dim3 grid, block;
  size_t shared;
  void* stream;
};
std::vector<Configuration> configurations;

std::map<const void*, const char*>& names() {
  static std::map<const void*, const char*> all;
  return all;
}

}  // namespace

#define DIFFPP_VISIBLE extern "C" __attribute__((visibility("default")))

DIFFPP_VISIBLE void diffpp_on_launch(OnLaunch function) { on_launch = function; }

extern "C" {

void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(
    void**, const char* host, char*, const char* device, int, uint3*, uint3*, dim3*, dim3*, int*) {
  names()[host] = device;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(host));
  return cudaSuccess;
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, CUstream_st* stream) {
  configurations.push_back({grid, block, shared, stream});
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  const Configuration last = configurations.back();
  configurations.pop_back();
  *grid = last.grid;
  *block = last.block;
  *shared = last.shared;
  *static_cast<void**>(stream) = last.stream;
  return cudaSuccess;
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* how, const void* host, void** arguments) {
  dim3 cluster(1, 1, 1);
  for (unsigned i = 0; i < how->numAttrs; ++i)
    if (how->attrs[i].id == cudaLaunchAttributeClusterDimension) {
      const auto& asked = how->attrs[i].val.clusterDim;
      cluster = dim3(asked.x, asked.y, asked.z);
    }
  const dim3 &grid = how->gridDim, &block = how->blockDim;
  const unsigned sizes[] = {grid.x, grid.y, grid.z, block.x, block.y, block.z, cluster.x, cluster.y, cluster.z};
  if (on_launch != nullptr) on_launch(names()[host], sizes, how->dynamicSmemBytes, arguments);
  return cudaSuccess;
}
cudaError_t cudaLaunchKernel(
    const void* host, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t) {
  cudaLaunchConfig_t how{};
  how.gridDim = grid;
  how.blockDim = block;
  how.dynamicSmemBytes = shared;
  return cudaLaunchKernelExC(&how, host, arguments);
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  attributes->ptxVersion = 90;  // the GPU whose code is counted has clusters
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t __cudaLaunchKernel(
    cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t stream) {
  return cudaLaunchKernel(kernel, grid, block, arguments, shared, stream);
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "none"; }

}  // extern "C"
