"""The classes that `freeze` gives to layers and blocks: the same parameters, and less kept for the backward pass.

As fused classes they call submodules and read no parameter but their own. Each derives from the class that its module
had, fused or not, and is that class inside transforms of `torch.func` and forward-mode AD.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from diffpp_fast import transforms
from diffpp_fast.networks.decoder import layers
from diffpp_fast.networks.fused_blocks import AdaNormSingleForward


class FrozenPart(nn.Module):
    """The base of every frozen class: knows the class that it took the place of."""

    frozen_from: ClassVar[type[nn.Module]]


class FrozenConvolution(FrozenPart):
    """A convolution that keeps its weight alone."""

    def forward(self: Any, input: Tensor) -> Any:
        """input [B, C, H, W] -> [B, C', H', W']."""
        if transforms.active() or not torch.is_grad_enabled():
            return super().forward(input)
        if self.weight.requires_grad:
            raise RuntimeError(
                "freeze: the weight of a frozen convolution requires gradient, but would get none: call "
                "networks.unfreeze before the network is trained"
            )
        if input.dim() != 4 or not input.requires_grad:
            return super().forward(input)
        return layers.convolution(input, self)


class DeferredNorm(FrozenPart):
    """A layer norm that leaves its work to the layer behind it, a `NormedLayer` or a `NormedAttention`."""

    def forward(self, input: Tensor, deferred: bool = True) -> Tensor:
        """input [..., D] -> the same tensor; with `deferred=False` its norm."""
        return input if deferred else super().forward(input)


class NormedLayer(FrozenPart):
    """The first feed-forward layer of a transformer block with the norm before it: both are computed again in the
    backward pass, for which the norm's input is kept."""

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """hidden_states [..., D], not normalised -> [..., D']."""
        (norm,) = self.norm_before
        layer = super().forward
        return recomputed(lambda hidden: layer(norm(hidden, deferred=False), *args, **kwargs), hidden_states)


class NormedAttention(FrozenPart):
    """Attention of a transformer block with the norm before it. What is attended is kept, with the norm's input;
    queries, keys and values are computed again."""

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """hidden_states [..., D], not normalised -> the same shape."""
        (norm,) = self.norm_before
        layer = super().forward
        return around_attention(lambda hidden: layer(norm(hidden, deferred=False), *args, **kwargs), hidden_states)


class RecomputedFeedForward(FrozenPart, AdaNormSingleForward):
    """`AdaNormSingleForward` whose second norm and first feed-forward layer are computed again in the backward pass."""

    def feed_forward(
        self: Any, hidden: Tensor, attended: Tensor, scale: Tensor, shift: Tensor, gate: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return hidden + gate attended, and the feed-forward layers of its modulated norm."""
        hidden = hidden + attended if gate is None else torch.addcmul(hidden, gate, attended)
        first, *others = self.ff.net
        fed = recomputed(lambda hidden: first(self.norm2(hidden, scale, shift)), hidden)
        for layer in others:
            fed = layer(fed)
        return hidden, fed


class RecomputedProjections(RecomputedFeedForward):
    """The same, with the first norm and the queries, keys and values."""

    def attend(self: Any, hidden: Tensor, scale: Tensor, shift: Tensor, **attention: Any) -> Tensor:
        """Return the self-attention of the modulated norm of hidden [B, N, D]."""
        base = super().attend
        return around_attention(lambda hidden: base(hidden, scale, shift, **attention), hidden)

    def attend_across(self: Any, hidden: Tensor, **attention: Any) -> Tensor:
        """Return the cross-attention of hidden [B, N, D]."""
        base = super().attend_across
        return around_attention(lambda hidden: base(hidden, **attention), hidden)


class RecomputedBlock(FrozenPart):
    """A block that keeps its inputs, and is computed again in the backward pass."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the block does."""
        return recomputed(super().forward, *args, draws=self.training, **kwargs)


def recomputed(function: Callable[..., Any], *args: Any, draws: bool = False, **kwargs: Any) -> Any:
    """function(*args, **kwargs), which is computed again in the backward pass.

    Args:
        function: reads nothing that changes before the backward pass.
        args, kwargs: its arguments; those that are tensors are kept.
        draws: whether it may draw random numbers, which must then be drawn again.
    """
    if transforms.active() or not torch.is_grad_enabled():
        return function(*args, **kwargs)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=draws, **kwargs)


def around_attention(function: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    """function(hidden), computed again in the backward pass but for torch's attention, whose results are kept."""
    if transforms.active() or not torch.is_grad_enabled():
        return function(hidden)
    attended: Tensor = checkpoint(
        function, hidden, use_reentrant=False, preserve_rng_state=False, context_fn=_keeping_attention
    )
    return attended


def _kept(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Torch's fused attention, by whichever kernel, is kept."""
    attends = operator.name().startswith("aten::_scaled_dot_product")
    return CheckpointPolicy.MUST_SAVE if attends else CheckpointPolicy.PREFER_RECOMPUTE


_keeping_attention = partial(create_selective_checkpoint_contexts, _kept)


_made: dict[tuple[type[FrozenPart], type[nn.Module]], type[nn.Module]] = {}


def frozen_class(forward: type[FrozenPart], base: type[nn.Module]) -> type[nn.Module]:
    """`base` with what a frozen class changes in it."""
    if (forward, base) not in _made:
        facts = {"frozen_from": base, "__module__": __name__, "__doc__": forward.__doc__}
        _made[forward, base] = type(f"{forward.__name__}Of{base.__name__}", (forward, base), facts)
    return _made[forward, base]
