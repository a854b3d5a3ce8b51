"""Optimizers by name, and their state as float32 tensors whatever they keep it in."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from diffpp_fast.errors import ConfigurationError
from diffpp_fast.training.config import Optimizer
from diffpp_fast.training.engines.quantisation import dequantise, quantise


def make_optimizer(parameters: Iterable[torch.nn.Parameter], settings: Optimizer) -> torch.optim.Optimizer:
    """The optimizer that a configuration names.

    Raises ConfigurationError where it is bitsandbytes' and that is not installed.
    """
    lr, weight_decay = settings.lr, settings.weight_decay
    betas = settings.betas or ((0.9, 0.99) if settings.name == "lion8bit" else (0.9, 0.999))
    eps = settings.eps if settings.eps is not None else 1e-8
    if not settings.is_8bit:
        return torch.optim.AdamW(parameters, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
    try:
        from bitsandbytes import optim
    except ImportError as error:
        raise ConfigurationError(
            f"the optimizer {settings.name} is bitsandbytes': pip install bitsandbytes, or use adamw ({error})"
        ) from None
    if settings.name == "lion8bit":
        return optim.Lion8bit(parameters, lr=lr, betas=betas, weight_decay=weight_decay)
    made = optim.PagedAdamW8bit if settings.name == "paged_adamw8bit" else optim.AdamW8bit
    return made(parameters, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)


class OptimizerState:
    """What an optimizer keeps of the tensors that it updates, by torch's names and in float32.

    Args:
        optimizer: from `make_optimizer`, with one group of parameters.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer: Any = optimizer
        self.is_torch = isinstance(optimizer, torch.optim.AdamW)
        one = not self.is_torch and type(optimizer).__name__.startswith("Lion")
        #: Tensors of the shape of the weights.
        self.names: tuple[str, ...] = ("exp_avg",) if one else ("exp_avg", "exp_avg_sq")

    def begin(self, weights: torch.Tensor) -> None:
        """Makes the state of an optimizer that has not yet updated these weights; it is zero."""
        if self.optimizer.state.get(weights):
            return
        if self.is_torch:
            state: dict[str, torch.Tensor] = {"step": torch.zeros((), device=weights.device)}
            state.update({name: torch.zeros_like(weights, requires_grad=False) for name in self.names})
            self.optimizer.state[weights] = state
            return
        # bitsandbytes looks for the weights in the group, from which ZeRO-3 takes them between updates.
        (group,) = self.optimizer.param_groups
        listed, group["params"] = group["params"], [weights]
        self.optimizer.init_state(group, weights, 0, 0)
        group["params"] = listed

    def get(self, weights: torch.Tensor, name: str) -> torch.Tensor:
        """A tensor of the state in float32, of the shape of the weights."""
        state = self.optimizer.state[weights]
        if self.is_torch:
            return state[name]
        number = 1 + self.names.index(name)
        kept = state[f"state{number}"]
        if kept.dtype != torch.uint8:  # of small tensors bitsandbytes keeps float32
            return kept
        return dequantise(kept, state[f"qmap{number}"], state[f"absmax{number}"])

    def set(self, weights: torch.Tensor, name: str, values: torch.Tensor) -> None:
        """Takes over what `get` gave, of these weights or of others in the same place, to the bit."""
        state = self.optimizer.state[weights]
        if self.is_torch:
            state[name].copy_(values)
            return
        number = 1 + self.names.index(name)
        kept = state[f"state{number}"]
        if kept.dtype != torch.uint8:
            kept.copy_(values)
            return
        codes, scales = quantise(values, state[f"qmap{number}"])
        kept.copy_(codes)
        state[f"absmax{number}"].copy_(scales)

    def get_step(self, weights: torch.Tensor) -> int:
        """Updates of these weights that were not skipped."""
        return int(self.optimizer.state[weights]["step"])

    def set_step(self, weights: torch.Tensor, step: int) -> None:
        state = self.optimizer.state[weights]
        if self.is_torch:
            state["step"].fill_(step)
        else:
            state["step"] = step
