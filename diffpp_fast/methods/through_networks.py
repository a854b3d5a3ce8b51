"""The gradient of a loss that goes on through the teaching assistant and the reference into the samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from diffpp_fast.methods.base import input_gradient


def gradient_through(
    networks: Sequence[Callable[..., Any]],
    losses_of: Callable[[torch.Tensor], torch.Tensor],
    x0: torch.Tensor,
    differentiate: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = input_gradient,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses per sample, and the gradient of each by its own sample.

    The networks' graphs are differentiated by x0 alone and freed in here, before the generator's own backward pass.
    Their parameters take no part: they get no gradient, none is computed for them, no hook of theirs runs, and what
    autograd would keep for them is not kept. So it does not matter who trains them, and how they are spread.

    Args:
        networks: what `losses_of` calls; the parameters of those that are modules are left out of the graph.
        losses_of: x0 [B, ...] -> [B]; a sample's loss depends on no other sample.
        x0: [B, ...], the samples.
        differentiate: (losses, x0) -> d sum of losses / dx0, the second of the two passes.

    Returns:
        losses [B] and gradient [B, ...], without graph.
    """
    with without_parameters(networks), torch.enable_grad():
        x0 = x0.detach().requires_grad_()
        losses = losses_of(x0)
        gradient = differentiate(losses, x0)
    return losses.detach(), gradient


@contextmanager
def without_parameters(networks: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """Inside, no parameter of the networks requires gradient. Callables that have no parameters are left as they are.

    Both passes belong inside: what is recomputed in the backward pass has to keep what the forward pass kept.
    """
    owners = [network for network in networks if hasattr(network, "parameters")]
    trained = [weight for owner in owners for weight in owner.parameters() if weight.requires_grad]
    for weight in trained:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in trained:
            weight.requires_grad_(True)
