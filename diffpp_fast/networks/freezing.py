"""Networks that are differentiated by their inputs alone, in place and undone at will."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn

from diffpp_fast.networks import frozen_blocks as frozen
from diffpp_fast.networks import fused_blocks as fused
from diffpp_fast.networks.fusion import BEFORE, fuse
from diffpp_fast.networks.quantization import is_quantized

logger = logging.getLogger("diffpp_fast")

#: What is computed again in the backward pass, by the names that `freeze` takes.
RECOMPUTE = ("none", "feed_forward", "projections", "blocks")


class FreezingRow(NamedTuple):
    """One layer or block of a network: whether it is frozen and, if not, why."""

    name: str  # its path in the module; "" for the module itself
    kind: str  # the class of diffusers or torch
    frozen: bool
    reason: str | None


def freeze(module: nn.Module, *, recompute: str = "none") -> int:
    """Freeze a network that is differentiated by its inputs alone, in place. `unfreeze` undoes it.

    No parameter requires gradient any more, blocks are fused as by `fuse`, and nothing is kept for the gradient of a
    weight: convolutions keep no input, where torch's keep it for frozen weights, too. Outputs and gradients by the
    inputs (samples, conditioning) are those of the network as it was but for rounding. Modules stay the objects that
    they are: only their classes change. Freeze before modules are sharded (FSDP) or hooked (offloading), and before
    adapters are added. What was left and why is logged at INFO and is in `freezing_report`.

    Args:
        module: a UNet2DConditionModel, a PixArtTransformer2DModel, or any module that holds such layers and blocks.
        recompute: what the backward pass computes again. "none": elementwise arithmetic; "feed_forward": the first
            layer of each feed-forward network in `BasicTransformerBlock` (GEGLU's projection, say) with the norm
            before it; "projections": these, and queries, keys and values; "blocks": residual and transformer blocks,
            which keep their inputs.

    Returns:
        How many modules this call has frozen: 0 the second time.

    Raises:
        ValueError: unknown `recompute`, or another than the module was frozen with; a network that is trained:
            parameters hold gradients, or belong to adapters. Nothing is changed then.
    """
    if recompute not in RECOMPUTE:
        raise ValueError(f"freeze: recompute is {recompute!r}; known: {', '.join(RECOMPUTE)}")
    _refuse(module, recompute)
    parts = [part for part in module.modules() if BEFORE not in vars(part)]
    before = {part: _Before(type(part), _flags(part), recompute) for part in parts}
    fuse(module)
    swaps = [swap for swap in _swaps(module, recompute) if swap.reason is None and not swap.frozen]
    for swap in swaps:
        for part, forward in swap.parts:
            part.__class__ = frozen.frozen_class(forward, type(part))
        for part, norm in swap.behind:
            # In a tuple, so that it is no child of the layer behind it.
            vars(part)["norm_before"] = (norm,)
    count = 0
    for part, state in before.items():
        state.after = type(part)
        if state.after is not state.before or state.flags:
            vars(part)[BEFORE] = state
            count += 1
        for parameter in part.parameters(recurse=False):
            parameter.requires_grad_(False)
    for sentence in _in_words(freezing_report(module)):
        logger.info("freeze %s: %s", type(module).__name__, sentence)
    return count


def unfreeze(module: nn.Module) -> int:
    """Give what `freeze` has frozen in `module` the class that it had, and every parameter its `requires_grad`.

    Blocks that were fused before they were frozen stay fused.

    Returns:
        How many modules were frozen.

    Raises:
        RuntimeError: a frozen layer or block was sharded or given a forward of its own since; nothing is changed then.
    """
    states = {name: (part, vars(part)[BEFORE]) for name, part in module.named_modules() if BEFORE in vars(part)}
    for name, (part, state) in states.items():
        if state.before is not state.after and (type(part) is not state.after or "forward" in vars(part)):
            raise RuntimeError(
                f"unfreeze: {name or type(part).__name__} was wrapped after it was frozen (FSDP, offloading hooks); "
                "take that off first"
            )
    for part, state in states.values():
        if state.before is not state.after:
            part.__class__ = state.before
        for name, parameter in part.named_parameters(recurse=False):
            parameter.requires_grad_(state.flags.get(name, parameter.requires_grad))
        vars(part).pop("norm_before", None)
        del vars(part)[BEFORE]
    return len(states)


def freezing_report(module: nn.Module) -> list[FreezingRow]:
    """Return a row for every layer or block of `module` that is frozen, could be, or looks as if it could be."""
    asked = {vars(part)[BEFORE].recompute for part in module.modules() if BEFORE in vars(part)}
    recompute = next(iter(asked), "none")
    rows = []
    for swap in _swaps(module, recompute):
        reason = swap.reason or (None if swap.frozen else "freeze was not called")
        rows.append(FreezingRow(swap.name, swap.kind, swap.frozen, reason))
    return rows


@dataclass
class _Before:
    """A module as it was before it was frozen, and the class that it got."""

    before: type[nn.Module]
    flags: dict[str, bool]  # requires_grad of its own parameters
    recompute: str
    after: type[nn.Module] = nn.Module


@dataclass
class _Swap:
    """Modules that get their frozen classes together."""

    name: str
    kind: str
    parts: list[tuple[nn.Module, type[frozen.FrozenPart]]]
    behind: list[tuple[nn.Module, nn.Module]] = field(default_factory=list)  # layers with the norms that they call
    reason: str | None = None

    @property
    def frozen(self) -> bool:
        return all(isinstance(part, forward) for part, forward in self.parts)


def _refuse(module: nn.Module, recompute: str) -> None:
    """Raise ValueError for a network that is trained, or was frozen otherwise."""
    kind = type(module).__name__
    held = next((name for name, parameter in module.named_parameters() if parameter.grad is not None), None)
    if held is not None:
        raise ValueError(
            f"freeze: {kind} is trained: {held} holds a gradient. Freeze a copy, or drop the gradients (zero_grad) if "
            "the training is over"
        )
    adapted = next((name for name, part in module.named_modules() if hasattr(part, "base_layer")), None)
    if adapted is not None:
        raise ValueError(f"freeze: {kind} has adapters, as in {adapted}, which are trained: freeze it before they come")
    for part in module.modules():
        state: _Before | None = vars(part).get(BEFORE)
        if state is not None and state.recompute != recompute:
            raise ValueError(
                f"freeze: {kind} is frozen with recompute={state.recompute!r}: call unfreeze before {recompute!r}"
            )


def _flags(part: nn.Module) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in part.named_parameters(recurse=False)}


def _swaps(module: nn.Module, recompute: str) -> Iterator[_Swap]:
    """The layers and blocks of a network that freezing is about."""
    for name, part in module.named_modules():
        if isinstance(part, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            yield _convolution(name, part)
        elif recompute in ("feed_forward", "projections"):
            yield from _transformer(name, part, attention=recompute == "projections")
        elif recompute == "blocks":
            yield from _block(name, part)


def _convolution(name: str, part: Any) -> _Swap:
    swap = _swap(name, part, (part, frozen.FrozenConvolution), nn.Conv2d)
    if is_quantized(part):
        swap.reason = "its weight is quantised, and it keeps nothing as it is"
    if swap.reason is None and (part.padding_mode != "zeros" or isinstance(part.padding, str)):
        swap.reason = f"its padding is {part.padding_mode!r}, {part.padding!r}"
    return swap


def _transformer(name: str, part: Any, *, attention: bool) -> Iterator[_Swap]:
    """The norms of a transformer block with the layers behind them, and nothing between."""
    from diffusers.models.attention import BasicTransformerBlock

    if not isinstance(part, BasicTransformerBlock):
        return
    if isinstance(part, fused.AdaNormSingleForward):
        recomputed = frozen.RecomputedProjections if attention else frozen.RecomputedFeedForward
        yield _swap(name, part, (part, recomputed), type(part))
        return
    swap = _Swap(name, _base(type(part)).__name__, [])
    if part.norm_type != "layer_norm":
        swap.reason = f"its norm_type is {part.norm_type!r}"
    first: list[tuple[Any, Any, type[frozen.FrozenPart]]] = [(part.norm3, part.ff.net[0], frozen.NormedLayer)]
    if attention and part.pos_embed is None:
        first.append((part.norm1, part.attn1, frozen.NormedAttention))
        if part.attn2 is not None:
            first.append((part.norm2, part.attn2, frozen.NormedAttention))
    for norm, layer, forward in first:
        for target, kind, expected in ((norm, frozen.DeferredNorm, nn.LayerNorm), (layer, forward, type(layer))):
            swap.parts.append((target, kind))
            swap.reason = swap.reason or _swap(name, part, (target, kind), expected).reason
        swap.behind.append((layer, norm))
    yield swap


def _block(name: str, part: nn.Module) -> Iterator[_Swap]:
    from diffusers.models.attention import BasicTransformerBlock, JointTransformerBlock
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.transformers.sana_transformer import SanaTransformerBlock
    from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
    from diffusers.models.transformers.transformer_flux2 import Flux2SingleTransformerBlock, Flux2TransformerBlock
    from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock
    from diffusers.models.transformers.transformer_z_image import ZImageTransformerBlock

    known = (
        BasicTransformerBlock,
        JointTransformerBlock,
        ResnetBlock2D,
        FluxTransformerBlock,
        FluxSingleTransformerBlock,
        Flux2TransformerBlock,
        Flux2SingleTransformerBlock,
        QwenImageTransformerBlock,
        SanaTransformerBlock,
        ZImageTransformerBlock,
    )
    if isinstance(part, known):
        yield _swap(name, part, (part, frozen.RecomputedBlock), type(part))


def _swap(
    name: str, part: nn.Module, first: tuple[nn.Module, type[frozen.FrozenPart]], expected: type[nn.Module]
) -> _Swap:
    """A swap of one module, which is left if it is not what it should be."""
    target, forward = first
    base: type[nn.Module] = _base(type(target))
    swap = _Swap(name, _base(type(part)).__name__, [first])
    if isinstance(target, forward):
        return swap
    if base is not expected and type(target) is not expected:
        swap.reason = f"it is a {type(target).__name__}, not a {expected.__name__}"
    elif "forward" in vars(target):
        swap.reason = "it has a forward of its own (a hook): freeze before that is put on"
    return swap


def _base(kind: Any) -> type[nn.Module]:
    """The class of torch or diffusers beneath a frozen or fused one."""
    while hasattr(kind, "frozen_from") or hasattr(kind, "unfused_class"):
        kind = kind.frozen_from if hasattr(kind, "frozen_from") else kind.unfused_class
    result: type[nn.Module] = kind
    return result


def _in_words(rows: list[FreezingRow]) -> Iterator[str]:
    """How many layers and blocks are frozen, by kind, and how many are left, by kind and reason."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(row.kind for row in rows if row.frozen).items())
    yield f"frozen: {kinds or 'no layer that keeps more than its gradient needs'}"
    for (kind, reason), count in Counter((row.kind, row.reason) for row in rows if not row.frozen).items():
        yield f"{count} {kind} left: {reason}"
