"""The parts that a decoder may be made of. All else is refused by name before anything is computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

#: Classes of modules that the walk knows, by name, and what it takes for granted about them.
KNOWN: dict[str, dict[str, Any]] = {
    "Decoder": {},
    "UNetMidBlock2D": {},
    "UpDecoderBlock2D": {},
    "ResnetBlock2D": {"time_emb_proj": None, "upsample": None, "downsample": None},
    "Attention": {"spatial_norm": None, "norm_q": None, "norm_k": None, "residual_connection": True},
    "Upsample2D": {"norm": None, "name": "conv", "use_conv": True, "use_conv_transpose": False, "interpolate": True},
    "DecoderTiny": {},
    "AutoencoderTinyBlock": {},
    "QwenImageDecoder3d": {},
    "QwenImageMidBlock": {},
    "QwenImageUpBlock": {},
    "QwenImageResidualBlock": {},
    "QwenImageAttentionBlock": {},
    "QwenImageResample": {},
    "QwenImageRMS_norm": {"bias": 0.0},
    "QwenImageCausalConv3d": {"stride": (1, 1, 1), "dilation": (1, 1, 1), "groups": 1},
    "DCUpBlock2d": {"interpolation_mode": "nearest", "factor": 2},
    "ResBlock": {"norm_type": "rms_norm"},
    "EfficientViTBlock": {},
    "SanaMultiscaleLinearAttention": {"norm_type": "rms_norm", "residual_connection": True},
    "SanaMultiscaleAttentionProjection": {},
    "GLUMBConv": {"norm_type": "rms_norm", "residual_connection": True},
    "RMSNorm": {},
    "Conv2d": {"stride": (1, 1), "padding_mode": "zeros"},
    "GroupNorm": {},
    "Linear": {},
    "Upsample": {},
    **{name: {} for name in ("ModuleList", "Sequential", "Identity", "Dropout", "SiLU", "ReLU", "GELU", "Mish")},
}
UP_BLOCK = "UpDecoderBlock2D"
#: Classes that can be decoded by slices of rows.
BY_ROWS = ("AutoencoderKL", "AutoencoderKLFlux2")
#: Sana's, whose enlargements have their geometry by construction.
DEEP = "AutoencoderDC"
ACTIVATIONS = ("silu", "swish")
KERNEL = {"kernel_size": (3, 3), "padding": (1, 1), "dilation": (1, 1), "groups": 1}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_vae(vae: Any) -> None:
    """Raises ValueError for an autoencoder of a known class that holds something unknown.

    The first convolution of the decoder, which `check_latents` and the dtypes go by, exists afterwards.
    """
    config = vae.config
    for block in getattr(config, "up_block_types", ()):
        if block != UP_BLOCK:
            raise ValueError(f"FrozenDecoder: up_block_types holds {block!r}; known: {UP_BLOCK}")
    if hasattr(config, "up_block_types") and config.act_fn not in ACTIVATIONS:
        raise ValueError(f"FrozenDecoder: unknown act_fn {config.act_fn!r}; known: {', '.join(ACTIVATIONS)}")
    if vae.use_tiling:
        raise ValueError(
            "FrozenDecoder: the vae blends tiles, which is another image: vae.disable_tiling(); slice_size saves memory"
        )
    parts = {"decoder": vae.decoder, "post_quant_conv": getattr(vae, "post_quant_conv", None)}
    for part, module in parts.items():
        for name, child in () if module is None else module.named_modules(prefix=part):
            _check_module(name, child)
    if type(vae).__name__ != DEEP:
        _check_enlargements(vae.decoder)
    dtypes = {weight.dtype for module in parts.values() if module is not None for weight in module.parameters()}
    if len(dtypes) != 1 or not dtypes <= set(DTYPES):
        raise ValueError(
            f"FrozenDecoder: the decoder's weights must have one floating dtype, got {sorted(map(str, dtypes))}"
        )
    mean, std = (getattr(config, name, None) for name in ("latents_mean", "latents_std"))
    if (mean is None) != (std is None):
        raise ValueError("FrozenDecoder: the config has one of latents_mean and latents_std; it takes both or none")
    if mean is not None and getattr(config, "shift_factor", None):
        raise ValueError(
            "FrozenDecoder: the config has both latents_mean and shift_factor; which one counts is unknown"
        )
    for name, values in (("latents_mean", mean), ("latents_std", std)):
        channels = config.z_dim if hasattr(config, "z_dim") else config.latent_channels
        if values is not None and len(values) != channels:
            raise ValueError(f"FrozenDecoder: {name} must have {channels} values, got {len(values)}")


def check_rows(vae: Any, rows: Any) -> None:
    """Raises TypeError or ValueError unless the decoder can be computed by so many rows at a time; None is all."""
    if rows is None:
        return
    if isinstance(rows, bool) or not isinstance(rows, int):
        raise TypeError(f"FrozenDecoder: rows must be an integer or None, got {rows!r}")
    if rows < 1:
        raise ValueError(f"FrozenDecoder: rows must be at least 1, got {rows}")
    kind = type(vae).__name__
    if kind == DEEP:
        raise ValueError(f"FrozenDecoder: rows is for AutoencoderKL; of an {DEEP} give slice_size")
    if kind not in BY_ROWS:
        keeps = "keeps a byte per ReLU" if kind == "AutoencoderTiny" else "keeps the inputs of its norms"
        raise ValueError(f"FrozenDecoder: rows is for AutoencoderKL; {kind} {keeps}, give slice_size")
    blocks = {
        name: module
        for name, module in vae.decoder.named_modules()
        if any(cls.__name__ == "ResnetBlock2D" for cls in type(module).__mro__)
    }
    layers = {f"{name}.{part}": getattr(block, part) for name, block in blocks.items() for part in ("conv1", "conv2")}
    for name, layer in (layers | {"conv_out": vae.decoder.conv_out}).items():
        _check_kernel(name, layer)


def check_latents(latents: Tensor, weight: Tensor, channels: int) -> None:
    """Raises TypeError or ValueError unless the latents are [B, C, h, w] where the weights are."""
    if not isinstance(latents, Tensor) or latents.dtype not in DTYPES:
        got = latents.dtype if isinstance(latents, Tensor) else type(latents).__name__
        raise TypeError(f"FrozenDecoder: latents must be a float32, bfloat16, float16 or float64 tensor, got {got}")
    if latents.dim() != 4 or latents.shape[1] != channels or 0 in latents.shape:
        raise ValueError(
            f"FrozenDecoder: latents must have shape [B, {channels}, h, w], none of them 0, got {list(latents.shape)}"
        )
    if latents.device != weight.device:
        raise ValueError(f"FrozenDecoder: latents are on {latents.device}, the weights on {weight.device}")


def check_dtype(vae: Any, dtype: torch.dtype) -> None:
    """Raises ValueError for float16 where the config says in so many words that it overflows.

    `force_upcast` is true by default, which says nothing: Stable Diffusion 1.5's config leaves it out.
    """
    config = vae.config
    stated = "force_upcast" not in config.get("_use_default_values", ())
    if dtype == torch.float16 and stated and getattr(config, "force_upcast", False):
        raise ValueError(
            "FrozenDecoder: this decoder's activations overflow in float16 (its config has force_upcast=True, as "
            "SDXL's does): use bfloat16 or float32, or a decoder that was mended for it and says force_upcast=False"
        )


def _check_module(name: str, module: nn.Module) -> None:
    kind = next((cls.__name__ for cls in type(module).__mro__ if cls.__name__ in KNOWN), None)
    if kind is None:
        known = ", ".join(KNOWN)
        raise ValueError(f"FrozenDecoder: {name} is a {type(module).__name__}, which it does not know; known: {known}")
    for attribute, expected in KNOWN[kind].items():
        value = getattr(module, attribute)
        if value is not expected and value != expected:
            raise ValueError(f"FrozenDecoder: {name}.{attribute} is {value!r}; only {expected!r} is known")


def _check_enlargements(decoder: Any) -> None:
    """The convolutions behind an enlargement by nearest neighbours have the one geometry that can be combined."""
    layers = list(getattr(decoder, "layers", ()))
    convolutions = {
        f"up_blocks.{index}.upsamplers.{place}.{name}": layer
        for index, block in enumerate(getattr(decoder, "up_blocks", ()))
        for place, upsampler in enumerate(block.upsamplers or ())
        for name, layer in (("conv", getattr(upsampler, "conv", None)), ("resample.1", _resampling(upsampler)))
        if layer is not None
    }
    convolutions |= {
        f"layers.{index + 1}": layers[index + 1] for index, layer in enumerate(layers) if isinstance(layer, nn.Upsample)
    }
    for name, layer in convolutions.items():
        _check_kernel(name, layer)


def _resampling(upsampler: Any) -> Any:
    """Return the convolution behind an enlargement in Qwen-Image's decoder; None for another's."""
    return upsampler.resample[1] if hasattr(upsampler, "resample") else None


def _check_kernel(name: str, layer: nn.Module) -> None:
    for attribute, expected in KERNEL.items():
        if getattr(layer, attribute, None) != expected:
            raise ValueError(
                f"FrozenDecoder: decoder.{name} must be a convolution with {attribute} {expected}, "
                f"got {getattr(layer, attribute, type(layer).__name__)}"
            )
