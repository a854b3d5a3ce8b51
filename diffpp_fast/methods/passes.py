"""Calls of networks in a method's loss: those that differ in their inputs alone are made as one, where that is faster.

Samples of a batch know nothing of each other in a network, so that predictions for several conditionings are those of
one larger batch, up to rounding. Noise, times and addresses are drawn before, and are the same either way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch

from diffpp_fast.methods.outputs import check_differentiable, check_output
from diffpp_fast.networks.conditioning import Unjoinable, join

#: Positions of the latents of all samples of a call up to which calls are made as one, where nothing else is asked for.
#: Measured on a CPU: 1.01 to 1.4x faster at up to half of this, 0.91 to 1.08x at this, 1 % slower beyond.
MOST_ON_CPU = 2 * 64 * 64
#: Counted, not measured: up to here a GPU waits for launches, or nearly. A call of Stable Diffusion 1.5's UNet is 943
#: launches, 12 ms of a server's core, and 0.80 TFLOP for each 64 x 64, 2 ms of an H200 at 40 % of its peak: as much at
#: six of them, and Stable Diffusion XL's 3115 launches and 28 ms at seven. Slower GPUs have work enough sooner: one
#: call saves them nothing then, and takes more memory.
MOST_ON_GPU = 8 * 64 * 64


class Pass(NamedTuple):
    """A prediction to ask for.

    Attributes:
        who: the role, in messages.
        network: (x_t, t, conditioning) -> prediction.
        x_t, t: [B, ...] and [B].
        conditioning: for B samples.
    """

    who: str
    network: Callable[..., Any]
    x_t: torch.Tensor
    t: torch.Tensor
    conditioning: Any


def predict(passes: Sequence[Pass], batched: bool | None) -> list[torch.Tensor]:
    """Return the predictions of some passes, in their order.

    Args:
        passes: those of one network stand side by side, and an adapter's before those of its base.
        batched: one call for all passes of a network, and for those of adapters on its weights where nothing is
            differentiated; False: a call for each; None: one call where it is small.

    Raises ValueError where `batched` is True and conditionings can't be one batch, and as `outputs.check_output`.
    """
    predictions: list[torch.Tensor] = []
    for group in _groups(passes):
        predictions += _together(group, batched) or [_call(one) for one in group]
    return predictions


def _groups(passes: Sequence[Pass]) -> list[list[Pass]]:
    groups = [list(group) for _, group in groupby(passes, key=lambda one: id(one.network))]
    merged: list[list[Pass]] = []
    for group in groups:
        if merged and _joins(group[0], merged[-1][0]):
            merged[-1] += group
        else:
            merged.append(group)
    return merged


def _joins(base: Pass, adapter: Pass) -> bool:
    """Whether one call can be as both roles. A graph would hold the adapter's part of it to no use."""
    asked = getattr(base.network, "joins", None)
    return asked is not None and not base.x_t.requires_grad and bool(asked(adapter.network))


def _together(group: Sequence[Pass], batched: bool | None) -> list[torch.Tensor] | None:
    """The predictions of a group by one call; None where it is not to be one."""
    if len(group) == 1 or batched is False or (batched is None and not _is_small(group)):
        return None
    count, last = len(group[0].x_t), group[-1]
    try:
        conditioning = join([one.conditioning for one in group], count)
    except Unjoinable as error:
        if batched:
            raise ValueError(
                f"batched_passes: the passes of {last.who} can't be one call, for {error}: leave it None"
            ) from None
        return None
    x_t, t = (torch.cat([getattr(one, name) for one in group]) for name in ("x_t", "t"))
    others = [one for one in group if one.network is not last.network]
    if others:
        first = others[0].network, len(others) * count
        prediction = last.network(x_t, t, conditioning, first=first)
        who = f"{last.who} with {others[0].who}"
    else:
        prediction, who = last.network(x_t, t, conditioning), last.who
    prediction = check_output(who, prediction, x_t)
    if x_t.requires_grad:
        check_differentiable(who, prediction, "x_t")
    return list(prediction.split(count))


def _is_small(group: Sequence[Pass]) -> bool:
    """Whether a call of all is so small that two take longer: for launches, and for reading weights once more."""
    positions = sum(len(one.x_t) * math.prod(one.x_t.shape[2:]) for one in group)
    return positions <= (MOST_ON_CPU if group[0].x_t.device.type == "cpu" else MOST_ON_GPU)


def _call(one: Pass) -> torch.Tensor:
    prediction = check_output(one.who, one.network(one.x_t, one.t, one.conditioning), one.x_t)
    if one.x_t.requires_grad:
        check_differentiable(one.who, prediction, "x_t")
    return prediction
