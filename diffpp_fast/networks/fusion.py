"""Fused blocks in diffusers' networks, in place and undone at will."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn

from diffpp_fast.networks import fused_blocks as blocks
from diffpp_fast.networks import fused_flow_blocks as flow_blocks

logger = logging.getLogger("diffpp_fast")

#: Weights of a network's convolutions up to which it computes in channels_last on a CPU. There oneDNN's calls read
#: pixels as they are, and rearrange weights more slowly than in the other layout: a pass of Stable Diffusion 1.5 (589
#: million) for one image of 256 px took 1.5 times as long, and those of small networks less time than before.
MOST_IN_CHANNELS_LAST = 2**25
#: Where a frozen module remembers what it was, in its `__dict__`: no parameter, no buffer, nothing that is saved.
BEFORE = "_before_freezing"


class FusionRow(NamedTuple):
    """One block of a network: whether it is fused and, if not, why."""

    name: str  # its path in the module; "" for the module itself
    kind: str  # the class of diffusers or torch
    fused: bool
    reason: str | None


def fuse(module: nn.Module) -> int:
    """Gives the blocks of a diffusers network fused forwards, in place. `unfuse` undoes it.

    Modules stay the objects that they are, and so do parameters, state_dict keys, hooks, LoRA layers and what
    `save_pretrained` writes: only their classes change. Outputs and gradients are those of the unfused network but for
    rounding. Fuse before modules are sharded (FSDP) or given forwards of their own (offloading hooks); blocks that are
    so already are left. What was left and why is logged at INFO and is in `fusion_report`. A fused norm returns its
    input's dtype, where torch's returns float32 under autocast on CUDA. For tangents, second derivatives and
    `torch.func` the blocks compute unfused. A network that is loaded from disk is unfused.

    Args:
        module: a UNet2DConditionModel, a PixArtTransformer2DModel, an AutoencoderKL, or any module that holds such
            blocks.

    Returns:
        How many blocks this call has fused: 0 the second time.
    """
    found = list(_blocks(module))
    to_do = [block for block in found if block.reason is None and not block.fused]
    for block in to_do:
        for part, fused in block.parts:
            part.__class__ = fused
    for part, fused in _of_the_layout(module):
        part.__class__ = fused
    for sentence in _in_words(_rows(found)):
        logger.info("fuse %s: %s", type(module).__name__, sentence)
    return len(to_do)


def unfuse(module: nn.Module) -> int:
    """Gives every block of `module` that `fuse` has fused its own class again.

    Returns:
        How many blocks were fused.

    Raises:
        RuntimeError: a fused block was frozen, sharded or given a forward of its own since; nothing is changed then.
    """
    count = sum(row.fused for row in fusion_report(module))
    fused = [(name, part) for name, part in module.named_modules() if isinstance(part, blocks.Fused)]
    for name, part in fused:
        if BEFORE in vars(part):
            raise RuntimeError(f"unfuse: {name or type(part).__name__} is frozen: call networks.unfreeze first")
        if _is_wrapped(part):
            raise RuntimeError(
                f"unfuse: {name or type(part).__name__} was wrapped after it was fused (FSDP, offloading hooks); "
                "take that off first"
            )
    for _, part in fused:
        unfused: Any = part.unfused_class
        part.__class__ = unfused
    return count


def fusion_report(module: nn.Module) -> list[FusionRow]:
    """Every block of `module` that is fused, could be, or looks as if it could be."""
    return _rows(list(_blocks(module)))


@dataclass
class _Block:
    """Modules that are fused together or not at all, each with the class that it gets."""

    name: str
    kind: str
    parts: list[tuple[nn.Module, type[nn.Module]]] = field(default_factory=list)
    reason: str | None = None

    def add(self, role: str, part: Any, expected: type[nn.Module], fused: type[nn.Module]) -> None:
        """Leaves the block if the part is not what it should be."""
        self.parts.append((part, fused))
        if isinstance(part, fused):
            return
        if type(part) is not expected:
            remedy = ": fuse before it is wrapped or sharded" if isinstance(part, expected) else ""
            self.leave(f"{role} is a {type(part).__name__}, not a {expected.__name__}{remedy}")
        elif "forward" in vars(part):
            self.leave(f"{role} has a forward of its own (a hook): fuse before that is put on")

    def leave(self, reason: str) -> None:
        self.reason = self.reason or reason

    @property
    def fused(self) -> bool:
        return self.reason is None and all(isinstance(part, fused) for part, fused in self.parts)


def _convolution_weights(module: nn.Module) -> int:
    return sum(part.weight.numel() for part in module.modules() if isinstance(part, nn.Conv2d))


def _of_the_layout(module: nn.Module) -> Iterator[tuple[nn.Module, type[nn.Module]]]:
    """Yield the parts on which hangs how a UNet's pixels lie in memory, with their classes; they are no blocks."""
    from diffusers.models.transformers.transformer_2d import Transformer2DModel
    from diffusers.models.unets.unet_2d import UNet2DModel
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    for part in list(module.modules()):
        if isinstance(part, UNet2DConditionModel | UNet2DModel):
            plain = type(part.conv_in) is nn.Conv2d and "forward" not in vars(part.conv_in)
            if plain and _convolution_weights(part) <= MOST_IN_CHANNELS_LAST:
                yield part.conv_in, blocks.FusedEntrance
        elif type(part) is Transformer2DModel and part.is_input_continuous:
            yield part, blocks.fused_class(blocks.Transformer2DForward, Transformer2DModel)


def _blocks(module: nn.Module) -> Iterator[_Block]:
    """The blocks of a network, then the group norms that belong to none."""
    claimed: set[nn.Module] = set()
    for name, part in module.named_modules():
        for block in _of(name, part):
            claimed |= {part for part, _ in block.parts}
            yield block
    for name, part in module.named_modules():
        if isinstance(part, nn.GroupNorm) and part not in claimed:
            parent = module.get_submodule(name.rpartition(".")[0])
            yield _Block(name, "GroupNorm", reason=f"{type(parent).__name__} has no fused version")


def _of(name: str, module: nn.Module) -> Iterator[_Block]:
    """The blocks that `module` is, or that are made of its children."""
    from diffusers.models.activations import GEGLU
    from diffusers.models.attention import BasicTransformerBlock, JointTransformerBlock
    from diffusers.models.normalization import AdaLayerNormZeroSingle
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
    from diffusers.models.transformers.sana_transformer import SanaModulatedNorm, SanaTransformerBlock
    from diffusers.models.transformers.transformer_2d import Transformer2DModel
    from diffusers.models.transformers.transformer_flux import FluxAttention, FluxTransformerBlock
    from diffusers.models.transformers.transformer_flux2 import (
        Flux2Attention,
        Flux2ParallelSelfAttention,
        Flux2SingleTransformerBlock,
        Flux2TransformerBlock,
    )
    from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock
    from diffusers.models.transformers.transformer_z_image import FinalLayer, ZImageTransformerBlock

    if isinstance(module, ResnetBlock2D):
        yield _resnet(name, module, ResnetBlock2D)
    elif isinstance(module, GEGLU):
        block = _Block(name, "GEGLU")
        block.add("it", module, GEGLU, blocks.fused_class(blocks.GegluForward, GEGLU))
        yield block
    elif isinstance(module, BasicTransformerBlock):
        yield from _transformer(name, module, BasicTransformerBlock)
    elif isinstance(module, JointTransformerBlock):
        yield _joint(name, module, JointTransformerBlock, blocks.JointForward)
    elif isinstance(module, FluxTransformerBlock):
        yield _joint(name, module, FluxTransformerBlock, blocks.FluxForward)
    elif isinstance(module, FluxAttention):
        yield _flux_attention(name, module, FluxAttention)
    elif isinstance(module, Flux2Attention):
        yield _flux_attention(name, module, Flux2Attention)
    elif isinstance(module, Flux2ParallelSelfAttention):
        yield _flux_attention(name, module, Flux2ParallelSelfAttention, flow_blocks.Flux2ParallelForward)
    elif isinstance(
        module,
        Flux2TransformerBlock
        | Flux2SingleTransformerBlock
        | QwenImageTransformerBlock
        | SanaTransformerBlock
        | SanaModulatedNorm
        | FinalLayer,
    ):
        yield _of_plain_norms(name, module)
    elif isinstance(module, ZImageTransformerBlock):
        yield from _z_image(name, module, ZImageTransformerBlock)
    elif isinstance(module, AdaLayerNormZeroSingle):
        block = _Block(name, "AdaLayerNormZeroSingle")
        _ada_zero(block, "it", module)
        yield block
    elif isinstance(module, Transformer2DModel):
        if isinstance(norm := getattr(module, "norm", None), nn.GroupNorm):
            block = _Block(_join(name, "norm"), "GroupNorm")
            block.add("it", norm, nn.GroupNorm, blocks.FusedGroupNorm)
            yield block
    elif isinstance(module, PixArtTransformer2DModel):
        yield _Block(
            _join(name, "norm_out"), "LayerNorm", reason="its modulation is part of the network's forward, and is small"
        )
    elif getattr(module, "conv_norm_out", None) is not None and getattr(module, "conv_act", None) is not None:
        yield _final_norm(name, module)


def _resnet(name: str, module: Any, base: type[nn.Module]) -> _Block:
    block = _Block(name, base.__name__)
    block.add("it", module, base, blocks.fused_class(blocks.ResnetForward, base))
    if type(module.nonlinearity) is not nn.SiLU:
        block.leave(f"its activation is {type(module.nonlinearity).__name__}, not SiLU")
    for role in ("norm1", "norm2"):
        block.add(role, getattr(module, role), nn.GroupNorm, blocks.FusedGroupNorm)
    return block


def _transformer(name: str, module: Any, base: type[nn.Module]) -> Iterator[_Block]:
    block = _Block(name, base.__name__)
    if module.norm_type != "ada_norm_single":
        # Affine layer norms are one kernel already.
        if module.norm_type.startswith("ada_"):
            block.leave(f"its norm_type is {module.norm_type!r}; only 'ada_norm_single' has a fused version")
            yield block
        return
    block.add("it", module, base, blocks.fused_class(blocks.AdaNormSingleForward, base))
    for role in ("norm1", "norm2"):
        _plain_layer_norm(block, role, getattr(module, role))
    yield block


def _joint(name: str, module: Any, base: type[nn.Module], forward: type[blocks.Fused]) -> _Block:
    """A block of two streams, text and image; the text ends in the last one."""
    block = _Block(name, base.__name__)
    block.add("it", module, base, blocks.fused_class(forward, base))
    _ada_zero(block, "norm1", module.norm1)
    if module.norm2_context is not None:
        _ada_zero(block, "norm1_context", module.norm1_context)
        _plain_layer_norm(block, "norm2_context", module.norm2_context)
    _plain_layer_norm(block, "norm2", module.norm2)
    return block


#: Forwards of blocks whose norms have no parameters and are modulated in the block's own, by the block's class.
PLAIN: dict[str, type[blocks.Fused]] = {
    "Flux2TransformerBlock": flow_blocks.Flux2Forward,
    "Flux2SingleTransformerBlock": flow_blocks.Flux2SingleForward,
    "QwenImageTransformerBlock": flow_blocks.QwenImageForward,
    "SanaTransformerBlock": flow_blocks.SanaForward,
    "SanaModulatedNorm": flow_blocks.SanaLastForward,
    "FinalLayer": flow_blocks.ZImageLastForward,
}


def _of_plain_norms(name: str, module: Any) -> _Block:
    """A block of FLUX.2, Qwen-Image or Sana, or a last norm; what its attention does stays as it is."""
    base = next(kind for kind in type(module).__mro__ if kind.__name__ in PLAIN)
    block = _Block(name, base.__name__)
    block.add("it", module, base, blocks.fused_class(PLAIN[base.__name__], base))
    for role, norm in module.named_children():
        if "norm" in role:
            _plain_layer_norm(block, role, norm)
    return block


def _flux_attention(
    name: str, module: Any, base: type[nn.Module], forward: type[blocks.Fused] = blocks.FluxAttentionForward
) -> _Block:
    block = _Block(name, base.__name__)
    block.add("it", module, base, blocks.fused_class(forward, base))
    if (processor := type(module.processor).__name__) not in blocks.PROCESSORS:
        block.leave(f"its processor is a {processor}")
    for role in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
        if hasattr(module, role):
            block.add(role, getattr(module, role), nn.RMSNorm, blocks.FusedRMSNorm)
    return block


def _z_image(name: str, module: Any, base: type[nn.Module]) -> Iterator[_Block]:
    """A block of Z-Image, and its attention."""
    from diffusers.models.attention_processor import Attention

    block = _Block(name, base.__name__)
    block.add("it", module, base, blocks.fused_class(flow_blocks.ZImageForward, base))
    for role in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"):
        _rms_norm(block, role, getattr(module, role), flow_blocks.RmsNormForward)
    yield block
    attention = module.attention
    block = _Block(_join(name, "attention"), "Attention")
    block.add("it", attention, Attention, blocks.fused_class(flow_blocks.ZImageAttentionForward, Attention))
    if (processor := type(attention.processor).__name__) not in blocks.PROCESSORS:
        block.leave(f"its processor is a {processor}")
    for role in ("norm_q", "norm_k"):
        _rms_norm(block, role, getattr(attention, role), flow_blocks.RotatedNormForward)
    yield block


def _rms_norm(block: _Block, role: str, norm: Any, forward: type[blocks.Fused]) -> None:
    """One of diffusers' own."""
    from diffusers.models.normalization import RMSNorm

    if getattr(norm, "bias", None) is not None:
        block.leave(f"{role} has a bias")
    block.add(role, norm, RMSNorm, blocks.fused_class(forward, RMSNorm))


def _ada_zero(block: _Block, role: str, norm: Any) -> None:
    from diffusers.models.normalization import AdaLayerNormZero, AdaLayerNormZeroSingle, SD35AdaLayerNormZeroX

    forwards: dict[type[nn.Module], type[blocks.Fused]] = {
        SD35AdaLayerNormZeroX: blocks.AdaZeroTwiceForward,
        AdaLayerNormZeroSingle: blocks.AdaZeroSingleForward,
    }
    expected = next((each for each in forwards if isinstance(norm, each)), AdaLayerNormZero)
    forward = forwards.get(expected, blocks.AdaZeroForward)
    block.add(role, norm, expected, blocks.fused_class(forward, expected))
    _plain_layer_norm(block, f"{role}.norm", getattr(norm, "norm", None))


def _plain_layer_norm(block: _Block, role: str, norm: Any) -> None:
    if getattr(norm, "elementwise_affine", False):
        block.leave(f"{role} has parameters")
    block.add(role, norm, nn.LayerNorm, blocks.FusedLayerNorm)


def _final_norm(name: str, module: Any) -> _Block:
    """The last norm and activation of a network that calls one right after the other."""
    from diffusers.models.autoencoders.vae import Decoder, Encoder
    from diffusers.models.unets.unet_2d import UNet2DModel
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    block = _Block(_join(name, "conv_norm_out"), "GroupNorm")
    known = (UNet2DConditionModel, UNet2DModel, Encoder, Decoder)
    if all(type(module).forward is not network.forward for network in known):
        block.leave(f"how {type(module).__name__} goes on after it is not known")
    if not isinstance(module.conv_act, nn.SiLU):
        block.leave(f"the activation after it is {type(module.conv_act).__name__}, not SiLU")
    block.add("it", module.conv_norm_out, nn.GroupNorm, blocks.FusedGroupNormSiLU)
    block.add("conv_act", module.conv_act, nn.SiLU, blocks.AbsorbedSiLU)
    return block


def _is_wrapped(part: nn.Module) -> bool:
    """Whether a fused module has got a class derived from its fused one, or a forward of its own, since."""
    return "unfused_class" not in vars(type(part)) or "forward" in vars(part)


def _rows(found: list[_Block]) -> list[FusionRow]:
    return [FusionRow(block.name, block.kind, block.fused, _reason(block)) for block in found]


def _reason(block: _Block) -> str | None:
    return block.reason or (None if block.fused else "fuse was not called")


def _in_words(rows: list[FusionRow]) -> Iterator[str]:
    """How many blocks are fused, by kind, and how many are left, by kind and reason."""
    fused = Counter(row.kind for row in rows if row.fused)
    kinds = ", ".join(f"{count} {kind}" for kind, count in fused.items())
    yield f"{fused.total()} blocks are fused{f' ({kinds})' if kinds else ''}"
    for (kind, reason), count in Counter((row.kind, row.reason) for row in rows if not row.fused).items():
        yield f"{count} {kind} left: {reason}"


def _join(parent: str, child: str) -> str:
    return f"{parent}.{child}" if parent else child
