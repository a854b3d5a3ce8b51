"""Options, the update of the weights, and the faster precision, for all scripts."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch


def make_parser(description: str | None, *, out: str, steps: int) -> argparse.ArgumentParser:
    """Return a parser with the options of every script: --data, --out, --steps and --seed."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("build/emoji"))
    parser.add_argument("--out", type=Path, default=Path(out))
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--seed", type=int, default=0)
    return parser


def update(
    loss: torch.Tensor,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler | None = None,
    *,
    clip: float | None = 1.0,
) -> None:
    """Follow the gradient of a loss, its norm cut at `clip`."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    if clip is not None:
        torch.nn.utils.clip_grad_norm_((weight for group in optimizer.param_groups for weight in group["params"]), clip)
    optimizer.step()
    if schedule is not None:
        schedule.step()


def fastest_precision() -> str:
    """The one in which this processor convolves faster: bfloat16 takes 30 times as long without instructions for it."""
    seconds = {}
    for name in ("float32", "bfloat16"):
        dtype = getattr(torch, name)
        weights, images = torch.zeros(64, 64, 3, 3, dtype=dtype), torch.zeros(4, 64, 16, 16, dtype=dtype)
        torch.conv2d(images, weights)  # the first call prepares the kernel
        began = time.perf_counter()
        torch.conv2d(images, weights)
        seconds[name] = time.perf_counter() - began
    return min(seconds, key=lambda name: seconds[name])
