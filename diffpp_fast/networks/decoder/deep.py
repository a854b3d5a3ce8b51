"""The way through an `AutoencoderDC`, Sana's, whose latents have a thirty-second of the picture's height and width.

As in `walk`, convolutions and linear layers keep nothing; what is kept are the inputs of norms, activations and of the
linear attention, as torch keeps them.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffpp_fast.networks.decoder.layers import convolution, enlarged_convolution, enlarging_taps, linear
from diffpp_fast.networks.decoder.walk import Stage
from diffpp_fast.plain import compute_dtype


def deep_stages(vae: Any, like: Tensor) -> list[Stage]:
    """Return an `AutoencoderDC`'s stages: unscaled latents -> images. `like` has the dtype and device of the decode."""
    decoder, taps = vae.decoder, enlarging_taps(like)
    stages: list[Stage] = [[partial(_entrance, decoder)]]
    for block in reversed(decoder.up_blocks):
        for layer in block:
            if hasattr(layer, "interpolate"):
                stages.append([partial(_enlarge, layer, taps)])
            elif hasattr(layer, "attn"):
                stages[-1] += [partial(_attention, layer.attn), partial(_gated, layer.conv_out)]
            else:
                stages[-1].append(partial(_residual, layer))
    stages[-1].append(partial(_exit, decoder, taps))
    return stages


def _entrance(decoder: Any, x: Tensor) -> Tensor:
    if not decoder.in_shortcut:
        return convolution(x, decoder.conv_in)
    return convolution(x, decoder.conv_in, residual=_repeated(x, decoder.in_shortcut_repeats))


def _exit(decoder: Any, taps: Tensor, x: Tensor) -> Tensor:
    x = decoder.conv_act(_rms_norm(x, decoder.norm_out))
    if isinstance(decoder.conv_out, nn.Conv2d):
        return convolution(x, decoder.conv_out)
    return _enlarge(decoder.conv_out, taps, x)


def _enlarge(block: Any, taps: Tensor, x: Tensor) -> Tensor:
    """A `DCUpBlock2d`: twice the height and width, plus the pixels themselves where it has a shortcut."""
    if block.interpolate:
        y = enlarged_convolution(x, block.conv, taps)
    else:
        y = F.pixel_shuffle(convolution(x, block.conv), block.factor)
    return y + F.pixel_shuffle(_repeated(x, block.repeats), block.factor) if block.shortcut else y


def _residual(block: Any, x: Tensor) -> Tensor:
    """A `ResBlock`."""
    h = block.nonlinearity(convolution(x, block.conv1))
    return x + _rms_norm(convolution(h, block.conv2), block.norm)


def _attention(block: Any, x: Tensor) -> Tensor:
    """A `SanaMultiscaleLinearAttention` over the pixels, with its residual connection."""
    channels, pixels = block.attention_head_dim, x.shape[2] * x.shape[3]
    tokens = x.movedim(1, -1)
    qkv = torch.cat([linear(tokens, layer) for layer in (block.to_q, block.to_k, block.to_v)], dim=3).movedim(-1, 1)
    scales = [qkv, *(convolution(convolution(qkv, each.proj_in), each.proj_out) for each in block.to_qkv_multiscale)]
    q, k, v = torch.cat(scales, dim=1).reshape(len(x), -1, 3 * channels, pixels).chunk(3, dim=2)
    if pixels > channels:  # else the quadratic form is the smaller one
        wide = compute_dtype(x)
        made = block.apply_linear_attention(q.to(wide).relu(), k.to(wide).relu(), v.to(wide)).to(x.dtype)
    else:
        made = block.apply_quadratic_attention(q.relu(), k.relu(), v)
    made = linear(made.reshape(len(x), -1, *x.shape[2:]).movedim(1, -1), block.to_out).movedim(-1, 1)
    return x + _rms_norm(made, block.norm_out)


def _gated(block: Any, x: Tensor) -> Tensor:
    """A `GLUMBConv`, with its residual connection."""
    h, gate = convolution(F.silu(convolution(x, block.conv_inverted)), block.conv_depth).chunk(2, dim=1)
    return x + _rms_norm(convolution(h * F.silu(gate), block.conv_point), block.norm)


def _rms_norm(x: Tensor, layer: Any) -> Tensor:
    """x over the root of its mean square over the channels, times weight, plus bias, in x's dtype."""
    wide = x.to(compute_dtype(x))
    y = wide * torch.rsqrt(wide.square().mean(1, keepdim=True) + layer.eps)
    weight, bias = (
        None if each is None else each.detach().to(y.dtype)[:, None, None] for each in (layer.weight, layer.bias)
    )
    y = y if weight is None else y * weight
    return (y if bias is None else y + bias).to(x.dtype)


def _repeated(x: Tensor, times: int) -> Tensor:
    return x.repeat_interleave(times, dim=1, output_size=x.shape[1] * times)
