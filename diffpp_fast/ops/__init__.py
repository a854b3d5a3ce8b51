"""The operators of one-step distillation, each with its hand-written gradient. They need torch alone.

Large tensors may be float32, bfloat16, float16 or float64; the arithmetic is float32 (float64 for float64). Large
tensors of different dtypes are promoted to their common one first. channels_last stays channels_last, no input is
written, and nothing waits for the device.
"""

from diffpp_fast.ops.ada_layer_norm import ada_layer_norm
from diffpp_fast.ops.add_noise import add_noise
from diffpp_fast.ops.denoising_loss import denoising_loss
from diffpp_fast.ops.gap_loss import sid_loss, sim_loss
from diffpp_fast.ops.gated_residual_norm import gated_residual_norm
from diffpp_fast.ops.geglu import geglu
from diffpp_fast.ops.group_norm_silu import group_norm_silu
from diffpp_fast.ops.reward_pixels import reward_pixels
from diffpp_fast.ops.rms_norm_rope import rms_norm_rope
from diffpp_fast.ops.score_gap import RewardedScoreGap, ScoreGap, score_gap

__all__ = [
    "RewardedScoreGap",
    "ScoreGap",
    "ada_layer_norm",
    "add_noise",
    "denoising_loss",
    "gated_residual_norm",
    "geglu",
    "group_norm_silu",
    "reward_pixels",
    "rms_norm_rope",
    "score_gap",
    "sid_loss",
    "sim_loss",
]
