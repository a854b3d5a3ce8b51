"""Optimizers by name, their learning rate, and their state as float32 tensors whatever they keep it in.

bitsandbytes keeps 8 bits: numbers of a table of 256, scaled block by block.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from diffpp_fast import install
from diffpp_fast.errors import ConfigurationError
from diffpp_fast.training.config import Config, Optimizer

#: Numbers that share a scale, in bitsandbytes' optimizers.
BLOCK = 256
#: Numbers that are worked on at a time, so that the intermediate results stay small.
CHUNK = 2**14 * BLOCK


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
            f"the optimizer {settings.name} is bitsandbytes': {install.extra('gpu')}, or use adamw ({error})"
        ) from None
    if settings.name == "lion8bit":
        return optim.Lion8bit(parameters, lr=lr, betas=betas, weight_decay=weight_decay)
    made = optim.PagedAdamW8bit if settings.name == "paged_adamw8bit" else optim.AdamW8bit
    return made(parameters, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)


class OptimizerState:
    """The state that an optimizer keeps of the tensors that it updates, by torch's names and in float32.

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


def updates_of(role: str, config: Config) -> int:
    """Return how many updates a run asks of a network, "generator" or "fake"."""
    steps = config.training.steps
    return steps if role == "generator" else config.training.fake_warmup + steps * config.method.fake_rounds


def learning_rate(settings: Optimizer, update: int, updates: int) -> float:
    """Return the learning rate of update number `update` (from 0) of `updates` in all.

    It rises linearly to `lr` over `warmup_steps`; then it is constant, or falls along a line or half a cosine to
    `final_lr` times `lr` at the last update. A run that is prolonged past its end stays there.
    """
    if update < settings.warmup_steps:
        return settings.lr * (update + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return settings.lr
    falling = updates - 1 - settings.warmup_steps
    progress = min(1.0, (update - settings.warmup_steps) / falling) if falling > 0 else 1.0
    share = 1.0 - progress if settings.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return settings.lr * (settings.final_lr + (1.0 - settings.final_lr) * share)


def dequantise(codes: torch.Tensor, table: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The numbers behind uint8 codes: their entries in `table` [256] times the scale [ceil(n / 256)] of their block.

    Returns float32, of the shape of the codes.
    """
    values = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    parts = zip(codes.reshape(-1).split(CHUNK), scales.split(CHUNK // BLOCK), values.view(-1).split(CHUNK), strict=True)
    for part, scale, result in parts:
        result.copy_((_blocks(table[part.int()]) * scale[:, None]).reshape(-1)[: len(part)])
    return values


def quantise(values: torch.Tensor, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest codes, and the scales: such that what came out of `dequantise` comes out of it again, to the bit.

    A block's scale is its largest magnitude where that is a positive number. The table's ends are not symmetric (1
    and about -0.993), so that the scale of a block whose largest number is negative lies above it; without this the
    state would shrink a little with every save.

    Returns uint8 codes of the shape of `values`, and float32 scales [ceil(n / 256)].
    """
    parts = [_quantise_blocks(_blocks(part.float()), table) for part in values.reshape(-1).split(CHUNK)]
    codes = torch.cat([codes.reshape(-1) for codes, _ in parts])
    return codes[: values.numel()].view(values.shape), torch.cat([scales for _, scales in parts])


def _quantise_blocks(blocks: torch.Tensor, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 codes [blocks, 256] and scales [blocks]."""
    largest = blocks.abs().amax(dim=1)
    scales = largest.clone()
    codes = _nearest(blocks, table, scales)
    if table[0] < 0:
        # The quotient is rounded, and so was the product that it undoes: it is one place off at most.
        quotient = largest / -table[0]
        for candidate in (quotient, quotient.nextafter(largest), quotient.nextafter(2 * quotient)):
            rows = ((table[codes.int()] * scales[:, None]) != blocks).any(dim=1).nonzero().squeeze(1)
            tried = _nearest(blocks[rows], table, candidate[rows])
            exact = ((table[tried.int()] * candidate[rows, None]) == blocks[rows]).all(dim=1)
            codes[rows[exact]], scales[rows[exact]] = tried[exact], candidate[rows[exact]]
    return codes, scales


def _nearest(blocks: torch.Tensor, table: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The codes of the nearest entries of the ascending table, uint8 [blocks, 256]."""
    shares = blocks / torch.where(scales > 0, scales, 1.0)[:, None]
    return torch.bucketize(shares, (table[1:] + table[:-1]) / 2).to(torch.uint8)


def _blocks(values: torch.Tensor) -> torch.Tensor:
    """[n] -> [ceil(n / 256), 256], with zeros at the end."""
    return torch.nn.functional.pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK)
