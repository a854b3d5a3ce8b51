// The GPU kernels as bindings call them: same arguments as on the CPU, work on the whole batch, enqueued on a cudaStream_t.
// Pointers in the arguments are to the GPU's memory. Grids depend on shapes, dtypes and alignment alone, and so do the bits.
#pragma once

#include "../cpu/add_noise.h"
#include "../cpu/denoising_loss.h"
#include "../cpu/group_norm_silu.h"
#include "../cpu/noise.h"
#include "../cpu/reward_pixels.h"
#include "../cpu/score_gap.h"

namespace diffpp::cuda {

void draw_normal(const DrawNormal& arguments, void* stream);
void draw_one(const DrawOne& arguments, int64_t batch, void* stream);
void add_noise_forward(const AddNoise& arguments, void* stream);
void add_noise_backward(const AddNoise& arguments, void* stream);
void denoising_loss_forward(const DenoisingLoss& arguments, void* stream);
void denoising_loss_backward(const DenoisingGradient& arguments, void* stream);
void score_gap(const ScoreGap& arguments, void* stream);
void reward_pixels_forward(const RewardPixels& arguments, void* stream);
void reward_pixels_backward(const RewardPixels& arguments, void* stream);

// Bytes of `partials`, which may be null in the arguments.
int64_t group_norm_workspace(const GroupNormForward& arguments);
int64_t group_norm_workspace(const GroupNormBackward& arguments);
void group_norm_forward(const GroupNormForward& arguments, void* stream);
void group_norm_backward(const GroupNormBackward& arguments, void* stream);

}  // namespace diffpp::cuda
