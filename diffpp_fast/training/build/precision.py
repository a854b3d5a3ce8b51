"""Which dtype a part of a run computes in, and autocast for weights that are kept in another one."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from diffpp_fast.training.config import Config, Dtype


class Autocast(nn.Module):
    """A network under autocast; its weights keep their precision."""

    def __init__(self, network: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.network = network
        self.dtype = dtype
        self.device_type = device.type

    def forward(self, *inputs: Any) -> torch.Tensor:
        with torch.autocast(self.device_type, dtype=self.dtype):
            return self.network(*inputs)


def compute_dtype(wanted: Dtype, config: Config) -> torch.dtype:
    """The dtype of a configuration's key; "auto" is the run's precision."""
    dtype: torch.dtype = getattr(torch, config.precision if wanted == "auto" else wanted)
    return dtype


def autocast_to(dtype: torch.dtype) -> torch.dtype | None:
    """The dtype of the autocast under which a network computes in `dtype`; None: it needs none."""
    return None if dtype == torch.float32 else dtype


def precise(network: nn.Module, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A network that computes in `dtype`, whatever its inputs and its weights are."""
    return network if dtype == torch.float32 else Autocast(network, dtype, device)
