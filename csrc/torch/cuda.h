// What a binding needs to enqueue a GPU kernel, where those were compiled (DIFFPP_CUDA).
#pragma once

#if defined(DIFFPP_CUDA)

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include "../cuda/kernels.h"

namespace diffpp {

// The current cudaStream_t of a device. torch exports this function from its CUDA library alone, which is not there, and not
// linked, where torch was built for the CPU.
inline void* current_stream(int32_t device) {
  using Function = AOTITorchError (*)(int32_t, void**);
  static const auto function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library == nullptr ? nullptr
                              : reinterpret_cast<Function>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }();
  STD_TORCH_CHECK(function != nullptr, "diffpp_fast: this torch has no CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(function(device, &stream));
  return stream;
}

// Calls `launch(arguments..., stream)` on the device and current stream of a tensor.
template <typename Launch, typename... Arguments>
void enqueue(const torch::stable::Tensor& on, Launch launch, const Arguments&... arguments) {
  const torch::stable::accelerator::DeviceGuard guard(on.get_device_index());
  launch(arguments..., current_stream(on.get_device_index()));
}

}  // namespace diffpp

// Whether the tensor is on a GPU; if so, diffpp::cuda::launch(arguments..., stream) has been enqueued there.
#define DIFFPP_ON_CUDA(tensor, launch, ...) \
  ((tensor).is_cuda() && (::diffpp::enqueue(tensor, ::diffpp::cuda::launch, __VA_ARGS__), true))
// A number that is diffpp::cuda::on_cuda for tensors on a GPU.
#define DIFFPP_FOR_CUDA(tensor, on_cuda, otherwise) ((tensor).is_cuda() ? ::diffpp::cuda::on_cuda : (otherwise))
#else
#define DIFFPP_ON_CUDA(tensor, launch, ...) false
#define DIFFPP_FOR_CUDA(tensor, on_cuda, otherwise) (otherwise)
#endif
