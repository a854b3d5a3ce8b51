// The GPU kernels as bindings call them: same arguments as on the CPU, work on the whole batch, enqueued on a cudaStream_t.
#pragma once

#include "../cpu/add_noise.h"
#include "../cpu/noise.h"

namespace diffpp::cuda {

void draw_normal(const DrawNormal& arguments, void* stream);
void draw_one(const DrawOne& arguments, int64_t batch, void* stream);
void add_noise_forward(const AddNoise& arguments, void* stream);
void add_noise_backward(const AddNoise& arguments, void* stream);

}  // namespace diffpp::cuda
