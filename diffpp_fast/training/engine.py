"""A trained network with its optimizer: all that a training loop may do to weights."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from diffpp_fast.training import config
from diffpp_fast.training.ema import Ema


class PlainEngine:
    """AdamW on one network in one process.

    Args:
        role: "generator" or "fake", for messages.
        network: the module that is trained.
        settings: of AdamW, the clipping and the warm-up of the learning rate.
        ema: keep a moving average of the weights.
        parameters: those that are trained, and saved, by name; None: all of the network's.
    """

    def __init__(
        self,
        role: str,
        network: nn.Module,
        settings: config.Optimizer,
        ema: config.Ema | None = None,
        parameters: Mapping[str, nn.Parameter] | None = None,
    ) -> None:
        self.role = role
        self.network = network
        self.parameters = dict(network.named_parameters() if parameters is None else parameters)
        self.settings = settings
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=settings.lr,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self.ema = Ema(network, ema.decay, ema.warmup, self.parameters) if ema is not None else None
        self.updates = 0

    @property
    def learning_rate(self) -> float:
        """Of the next update."""
        warmup = self.settings.warmup_steps
        return self.settings.lr * min(1.0, (self.updates + 1) / warmup) if warmup else self.settings.lr

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the loss's gradient to what earlier micro-batches left."""
        loss.backward()

    @torch.no_grad()
    def gradient_norm(self) -> torch.Tensor:
        """The norm of the whole gradient (scalar, on the device); the gradient is clipped if it is to be."""
        parameters = [p for p in self.parameters.values() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.settings.clip is not None:
            nn.utils.clip_grads_with_norm_(parameters, self.settings.clip, norm)
        return norm

    def step(self) -> None:
        """One update of the weights and of their average."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update(self.updates)
        self.updates += 1

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def averaged(self) -> AbstractContextManager[None]:
        """Inside, the network computes with the moving average of its weights, where one is kept."""
        return nullcontext() if self.ema is None else self.ema.applied()

    def optimizer_state(self) -> dict[str, torch.Tensor]:
        """Plain tensors by name: `NUMBER.exp_avg` and so on, with the number of the parameter."""
        state = self.optimizer.state_dict()["state"]
        return {f"{number}.{name}": tensor for number, entry in state.items() for name, tensor in entry.items()}

    def load_optimizer_state(self, tensors: dict[str, torch.Tensor]) -> None:
        state: dict[int, dict[str, torch.Tensor]] = {}
        for key, tensor in tensors.items():
            number, _, name = key.partition(".")
            state.setdefault(int(number), {})[name] = tensor
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
