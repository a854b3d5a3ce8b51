"""Fused operators of diffusion models and their distillation, forward and backward."""

from . import layers
from .backends import use_backend
from .noise import Noise
from .ops import (
    RewardedScoreGap,
    ScoreGap,
    ada_layer_norm,
    add_noise,
    denoising_loss,
    gated_residual_norm,
    geglu,
    group_norm_silu,
    reward_pixels,
    rms_norm_rope,
    score_gap,
    sid_loss,
    sim_loss,
)
from .schedule import NoiseSchedule

__all__ = [
    "Noise",
    "NoiseSchedule",
    "RewardedScoreGap",
    "ScoreGap",
    "ada_layer_norm",
    "add_noise",
    "denoising_loss",
    "gated_residual_norm",
    "geglu",
    "group_norm_silu",
    "layers",
    "reward_pixels",
    "rms_norm_rope",
    "score_gap",
    "sid_loss",
    "sim_loss",
    "use_backend",
]
