"""The learning rate as a function of the update's number: nothing to keep, nothing to resume."""

from __future__ import annotations

import math

from diffpp_fast.training.config import Config, Optimizer


def updates_of(role: str, config: Config) -> int:
    """How many updates a run asks of a network, "generator" or "fake"."""
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
