"""Latents to images with a frozen autoencoder, and the gradient back to the latents alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from diffpp_fast import transforms
from diffpp_fast.networks.decoder import checks
from diffpp_fast.networks.decoder.deep import deep_stages
from diffpp_fast.networks.decoder.latents import Unscale, channels_of
from diffpp_fast.networks.decoder.still import still_stages
from diffpp_fast.networks.decoder.walk import Stage, kl_stages, kl_stages_by_rows, tiny_stages
from diffpp_fast.ops.autograd import needs_gradient

#: How to walk each class of autoencoder.
STAGES = {
    "AutoencoderKL": kl_stages,
    "AutoencoderKLFlux2": kl_stages,
    "AutoencoderKLQwenImage": still_stages,
    "AutoencoderDC": deep_stages,
    "AutoencoderTiny": tiny_stages,
}


class FrozenDecoder(nn.Module):
    """The decoding half of a diffusers autoencoder: its images, and a backward pass that keeps no convolution's input.

    What is kept for the gradient to the latents is the input of every group norm, with two statistics per group, and
    the attention's q, k, v and output; of an `AutoencoderTiny` one byte per ReLU. Nothing is kept where the latents
    need no gradient. Weights get no gradient, also if they are unfrozen later.

    The arithmetic is in the weights' dtype, or in autocast's where it is on; latents of any floating dtype are unscaled
    before they are cast. There are no waits for the device and no branches on data: it can be compiled in one graph
    and captured. A latent that is not finite gives an image that is not, without an error.

    Transforms:
        Second derivatives by the latents are exact, as far as torch's attention has them, and so are gradients in
        batches (`is_grads_batched`). Forward mode and the transforms of `torch.func` are exact; they recompute nothing,
        and raise RuntimeError for a derivative by a weight.

    Args:
        vae: an `AutoencoderKL` (Stable Diffusion 1.5, XL and 3, PixArt, FLUX.1), `AutoencoderKLFlux2`,
            `AutoencoderKLQwenImage`, `AutoencoderDC` or `AutoencoderTiny`. It is shared, not copied; it is set to eval
            and its parameters to `requires_grad_(False)`, and otherwise stays as it is. Its `use_slicing` is not read.
        checkpoint: keep only the tensor before every enlargement, and compute what lies between again in the
            backward pass, one resolution at a time.
        slice_size: decode at most so many images at once. With `checkpoint`, or where no gradient is needed, this
            bounds the memory beyond inputs, results and what `checkpoint` keeps.
        rows: of an `AutoencoderKL` and of FLUX.2's: compute so many rows of each tensor at a time, forward and
            backward, and keep the input of every residual block alone. Image and gradient are the same but for
            rounding. It takes more time, less memory the fewer rows, and with `checkpoint` the least.
        memory_format: of the activations: `torch.channels_last` or `torch.contiguous_format`. None chooses
            channels_last, which was faster on the CPU in float32 and bfloat16, and is what tensor cores take.

    Raises:
        TypeError: not a known class of autoencoder, or rows that are no integer.
        ValueError: it holds something unknown, it blends tiles, or it is in float16 and says that it overflows there;
            slice_size or rows below 1, or rows of what has no such slices.
    """

    def __init__(
        self,
        vae: nn.Module,
        checkpoint: bool = False,
        *,
        slice_size: int | None = None,
        rows: int | None = None,
        memory_format: torch.memory_format | None = None,
    ) -> None:
        super().__init__()
        kind = type(vae).__name__
        if kind not in STAGES or not hasattr(vae, "config"):
            raise TypeError(f"FrozenDecoder needs a diffusers autoencoder, one of {', '.join(STAGES)}; got {kind}")
        if slice_size is not None and slice_size < 1:
            raise ValueError(f"FrozenDecoder: slice_size must be at least 1, got {slice_size}")
        checks.check_vae(vae)
        checks.check_rows(vae, rows)
        self.vae: Any = vae.eval().requires_grad_(False)
        self.kind = kind
        self.checkpoint = checkpoint
        self.slice_size = slice_size
        self.rows = rows
        self.memory_format = memory_format or torch.channels_last
        self.unscale = Unscale(vae)
        # diffusers' autoencoders share no base class that declares `config`.
        config: Any = vae.config
        self.channels = channels_of(kind, config)
        checks.check_dtype(vae, self._first.weight.dtype)

    def forward(self, latents: Tensor) -> Tensor:
        """latents [B, C, h, w], as diffusion sees them -> images [B, 3, H, W], about [-1, 1], not clamped, contiguous.

        The images have the dtype of the arithmetic, the gradient has that of the latents.

        Raises:
            TypeError: not a floating-point tensor.
            ValueError: a wrong or empty shape, another device than the weights', or float16 where it overflows.
        """
        checks.check_latents(latents, self._first.weight, self.channels)
        dtype = self._compute_dtype(latents.device)
        checks.check_dtype(self.vae, dtype)
        z = self.unscale(latents.to(torch.promote_types(latents.dtype, dtype)))
        z = z.to(dtype)
        if not transforms.functional():  # which hides the layout
            z = z.contiguous(memory_format=self.memory_format)
        stages = STAGES[self.kind](self.vae, z) if self.rows is None else kl_stages_by_rows(self.vae, z, self.rows)
        if self.slice_size is None or len(z) <= self.slice_size:
            return self._decode(z, stages).contiguous()
        return torch.cat([self._decode(part, stages).contiguous() for part in z.split(self.slice_size)])

    def scale(self, latents: Tensor) -> Tensor:
        """Return as diffusion sees them [B, C, h, w] what the autoencoder itself calls latents."""
        return self.unscale.inverse(latents)

    def extra_repr(self) -> str:
        return f"{self.kind}, checkpoint={self.checkpoint}, slice_size={self.slice_size}, rows={self.rows}"

    @property
    def _first(self) -> Any:
        """The first convolution."""
        if self.kind == "AutoencoderTiny":
            return self.vae.decoder.layers[0]
        before = getattr(self.vae, "post_quant_conv", None)
        return self.vae.decoder.conv_in if before is None else before

    def _compute_dtype(self, device: torch.device) -> torch.dtype:
        dtype: torch.dtype = self._first.weight.dtype
        # There is no autocast for meta, where shapes and bytes are counted.
        if dtype == torch.float64 or not torch.amp.is_autocast_available(device.type):
            return dtype
        return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else dtype

    def _decode(self, x: Tensor, stages: list[Stage]) -> Tensor:
        for stage in stages:
            if self.checkpoint and needs_gradient(x) and not transforms.active():
                # There is nothing random to repeat, and reading the generators' states would wait for the device.
                x = recompute(_run, stage, x, use_reentrant=False, preserve_rng_state=False)
            else:
                x = _run(stage, x)
        return x


def _run(stage: Stage, x: Tensor) -> Tensor:
    for step in stage:
        x = step(x)
    return x
