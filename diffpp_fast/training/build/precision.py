"""The dtype that a part of a run computes in, and autocast for weights that are kept in another one."""

from __future__ import annotations

import torch

from diffpp_fast.training.config import Config, Dtype


def compute_dtype(wanted: Dtype, config: Config) -> torch.dtype:
    """The dtype of a configuration's key; "auto" is the run's precision."""
    dtype: torch.dtype = getattr(torch, config.precision if wanted == "auto" else wanted)
    return dtype


def autocast_to(dtype: torch.dtype) -> torch.dtype | None:
    """The dtype of the autocast under which a network computes in `dtype`; None: it needs none."""
    return None if dtype == torch.float32 else dtype
