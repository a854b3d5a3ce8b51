"""The way through diffusers' decoders: their modules in order, as steps from tensor to tensor.

The modules' own `forward` is not called. The steps are grouped in stages, one per resolution: a stage ends before an
enlargement, where the tensor between two steps is smallest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from diffpp_fast import transforms
from diffpp_fast.networks.decoder import rows as by_rows
from diffpp_fast.networks.decoder.layers import (
    convolution,
    enlarged_convolution,
    enlarging_taps,
    group_norm,
    group_norm_of_sum,
    linear,
)
from diffpp_fast.ops.autograd import needs_gradient

Step = Callable[[Tensor], Tensor]
Stage = list[Step]


def kl_stages(vae: Any, like: Tensor) -> list[Stage]:
    """Return the stages of an `AutoencoderKL`, or of FLUX.2's: unscaled latents -> images.

    `like` has the dtype and device of the decode.
    """
    decoder, taps = vae.decoder, enlarging_taps(like)
    steps = _entrance(vae)
    first, *rest = decoder.mid_block.resnets
    steps.append(partial(_resnets, [first]))
    for attention, resnet in zip(decoder.mid_block.attentions, rest, strict=True):
        if attention is not None:
            steps.append(partial(_attention, attention))
        steps.append(partial(_resnets, [resnet]))
    stages = [steps]
    for block in decoder.up_blocks:
        stages[-1].append(partial(_resnets, block.resnets))
        for upsampler in block.upsamplers or ():
            stages.append([partial(enlarged_convolution, layer=upsampler.conv, taps=taps)])
    return [*stages[:-1], [*stages[-1], partial(_exit, decoder)]]


def kl_stages_by_rows(vae: Any, like: Tensor, rows: int) -> list[Stage]:
    """Return the same stages, whose steps are one block each and compute so many rows at a time."""
    decoder, taps = vae.decoder, enlarging_taps(like)
    steps = _entrance(vae)
    first, *rest = decoder.mid_block.resnets
    steps.append(partial(_block_by_rows, first, None, taps, rows))
    for attention, resnet in zip(decoder.mid_block.attentions, rest, strict=True):
        if attention is not None:
            steps.append(partial(_attention_by_rows, attention, rows))
        steps.append(partial(_block_by_rows, resnet, None, taps, rows))
    stages, enlargement = [steps], None
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            if enlargement is not None:
                stages.append([])
            stages[-1].append(partial(_block_by_rows, resnet, enlargement, taps, rows))
            enlargement = None
        for upsampler in block.upsamplers or ():
            enlargement = upsampler.conv
    plain = partial(_exit, decoder)
    norm, layer = decoder.conv_norm_out, decoder.conv_out
    stages[-1].append(lambda x: by_rows.normed_convolution(x, norm, layer, rows, plain))
    return stages


def tiny_stages(vae: Any, like: Tensor) -> list[Stage]:
    """Return the stages of an `AutoencoderTiny`."""
    layers, taps = list(vae.decoder.layers), enlarging_taps(like)
    stages: list[Stage] = [[_soft_clamp]]
    while layers:
        layer = layers.pop(0)
        if isinstance(layer, nn.Conv2d):
            relu = bool(layers) and isinstance(layers[0], nn.ReLU)
            if relu:
                layers.pop(0)
            stages[-1].append(partial(convolution, layer=layer, relu=relu))
        elif isinstance(layer, nn.Upsample):
            if layer.mode == "nearest" and layer.scale_factor == 2:
                stages.append([partial(enlarged_convolution, layer=layers.pop(0), taps=taps)])
            else:
                stages.append([layer])
        elif hasattr(layer, "fuse"):
            stages[-1].append(partial(_tiny_block, layer))
        else:
            stages[-1].append(layer)  # an activation
    stages[-1].append(_to_signed)
    return stages


def _entrance(vae: Any) -> Stage:
    layers = (vae.post_quant_conv, vae.decoder.conv_in)
    return [partial(convolution, layer=layer) for layer in layers if layer is not None]


def _exit(decoder: Any, x: Tensor) -> Tensor:
    return convolution(group_norm(x, decoder.conv_norm_out), decoder.conv_out)


def _resnets(blocks: Sequence[Any], x: Tensor) -> Tensor:
    """`ResnetBlock2D`s without time embedding, one after the other.

    What a block adds to its shortcut is added by the norm of the next one, which reads both anyway.
    """
    residual = None
    for block in blocks:
        if residual is None:
            h = group_norm(x, block.norm1)
        else:
            h, x = group_norm_of_sum(x, residual, block.norm1)
        h = group_norm(convolution(h, block.conv1), block.norm2)
        residual = x if block.conv_shortcut is None else convolution(x, block.conv_shortcut)
        if block is blocks[-1] or block.output_scale_factor != 1.0:
            x, residual = convolution(h, block.conv2, residual=residual), None
            x = x if block.output_scale_factor == 1.0 else x / block.output_scale_factor
        else:
            x = convolution(h, block.conv2)
    return x


def _block_by_rows(block: Any, enlargement: Any, taps: Tensor, rows: int, x: Tensor) -> Tensor:
    """A `ResnetBlock2D`, behind an enlargement and its convolution if there is one. Keeps x."""

    def plain(x: Tensor) -> Tensor:
        return _resnets([block], x if enlargement is None else enlarged_convolution(x, enlargement, taps))

    return by_rows.residual_block(x, block, enlargement, rows, plain)


def _attention(block: Any, x: Tensor, way: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None) -> Tensor:
    """An `Attention` over the pixels, with its residual connection. Keeps q, k, v, the output and its row sums."""
    tokens = group_norm(x, block.group_norm, "identity").permute(0, 2, 3, 1).flatten(1, 2)
    q, k, v = (
        linear(tokens, layer).unflatten(2, (block.heads, -1)).transpose(1, 2)
        for layer in (block.to_q, block.to_k, block.to_v)
    )
    attended = (way or attend)(q, k, v).transpose(1, 2).flatten(2)
    y = x + linear(attended, block.to_out[0]).unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)
    return y if block.rescale_output_factor == 1.0 else y / block.rescale_output_factor


def _attention_by_rows(block: Any, rows: int, x: Tensor) -> Tensor:
    """The same for the queries of so many rows at a time. Keeps x."""
    if transforms.active():
        return _attention(block, x)
    way = partial(by_rows.attention, queries=rows * x.shape[3])
    # torch.compile chooses by itself what it keeps.
    if torch.compiler.is_compiling() or not needs_gradient(x):
        return _attention(block, x, way)
    y: Tensor = recompute(_attention, block, x, way, use_reentrant=False, preserve_rng_state=False)
    return y


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return the attention of q, k and v [B, heads, N, D]."""
    if transforms.active():  # torch's own has no tangents
        return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


def _tiny_block(block: Any, x: Tensor) -> Tensor:
    """An `AutoencoderTinyBlock`."""
    first, activation, second, _, third = block.conv
    relu = isinstance(activation, nn.ReLU)
    h = x
    for layer in (first, second):
        h = convolution(h, layer, relu=relu)
        h = h if relu else activation(h)
    shortcut = convolution(x, block.skip) if isinstance(block.skip, nn.Conv2d) else x
    return convolution(h, third, residual=shortcut, relu=True)


def _soft_clamp(x: Tensor) -> Tensor:
    return 3.0 * torch.tanh(x / 3.0)


def _to_signed(x: Tensor) -> Tensor:
    return 2.0 * x - 1.0
