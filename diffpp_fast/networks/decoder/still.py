"""The way through Qwen-Image's decoder, a video's: on a single frame its causal convolutions are those of a picture.

What precedes the frame is zeros, so that of each convolution over time the last tap alone acts, and the layers that
make further frames have no part.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from diffpp_fast.networks.decoder.layers import channel_norm, convolution, enlarged_convolution, enlarging_taps
from diffpp_fast.networks.decoder.walk import Stage, attend


def still_stages(vae: Any, like: Tensor) -> list[Stage]:
    """Return an `AutoencoderKLQwenImage`'s stages: unscaled latents -> images. `like` is as in `kl_stages`."""
    decoder, taps = vae.decoder, enlarging_taps(like)
    steps: Stage = [partial(_convolution, layer=layer) for layer in (vae.post_quant_conv, decoder.conv_in)]
    first, *rest = decoder.mid_block.resnets
    steps.append(partial(_blocks, [first]))
    for attention, block in zip(decoder.mid_block.attentions, rest, strict=True):
        steps += [partial(_attention, attention), partial(_blocks, [block])]
    stages = [steps]
    for block in decoder.up_blocks:
        stages[-1].append(partial(_blocks, block.resnets))
        for upsampler in block.upsamplers or ():
            stages.append([partial(enlarged_convolution, layer=upsampler.resample[1], taps=taps)])
    stages[-1].append(partial(_exit, decoder))
    return stages


class _Last:
    """A causal convolution by its last tap in time, with what `layers.convolution` reads of a layer."""

    stride, dilation, groups = (1, 1), (1, 1), 1

    def __init__(self, layer: Any) -> None:
        self.weight, self.bias = layer.weight[:, :, -1], layer.bias
        self.padding = tuple(size // 2 for size in layer.kernel_size[1:])


def _convolution(x: Tensor, layer: Any, residual: Tensor | None = None) -> Tensor:
    last: Any = _Last(layer)
    return convolution(x, last, residual=residual)


def _blocks(blocks: Sequence[Any], x: Tensor) -> Tensor:
    """`QwenImageResidualBlock`s. Each keeps the inputs of its norms."""
    for block in blocks:
        h = _convolution(channel_norm(x, block.norm1.gamma), block.conv1)
        h = channel_norm(h, block.norm2.gamma)
        shortcut = _convolution(x, block.conv_shortcut) if hasattr(block.conv_shortcut, "weight") else x
        x = _convolution(h, block.conv2, residual=shortcut)
    return x


def _attention(block: Any, x: Tensor) -> Tensor:
    """A `QwenImageAttentionBlock`. Keeps x, q, k, v, the output and its row sums."""
    tokens = convolution(channel_norm(x, block.norm.gamma, "identity"), block.to_qkv).flatten(2).transpose(1, 2)
    q, k, v = tokens[:, None].chunk(3, dim=-1)
    attended = attend(q, k, v)[:, 0].transpose(1, 2).unflatten(2, x.shape[2:])
    return convolution(attended, block.proj, residual=x)


def _exit(decoder: Any, x: Tensor) -> Tensor:
    return _convolution(channel_norm(x, decoder.norm_out.gamma), decoder.conv_out)
