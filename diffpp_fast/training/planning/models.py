"""Networks on meta, from their configurations alone: those of a run's folders, or of known models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from diffpp_fast.errors import ConfigurationError
from diffpp_fast.networks.conditioning import Conditioning
from diffpp_fast.schedule import NoiseSchedule

#: Makes a network, in float32; to be called where meta is the default device.
Recipe = Callable[[], nn.Module]


@dataclass(frozen=True)
class Models:
    """The networks of a run as recipes.

    Attributes:
        name: for the plan's heading.
        text_encoders: with the bytes of an element of their weights.
        latent_shape: channels, height, width.
        tokens: of a prompt; `masked`: networks do not attend to padding.
        timestep: of the generator.
        backbones: what tells frozen weights of generator, fake and reference apart: roles that compute with LoRA on
            equal ones share them.
    """

    name: str
    reference: Recipe
    generator: Recipe
    fake: Recipe
    decoder: Recipe | None
    text_encoders: tuple[tuple[Recipe, int], ...]
    schedule: Callable[[], NoiseSchedule]
    latent_shape: tuple[int, int, int]
    tokens: int
    masked: bool = False
    timestep: int = 625
    backbones: tuple[str, str, str] = ("", "", "")

    def at(self, latent: int | None) -> Models:
        """The same models on latents of another side."""
        return self if latent is None else replace(self, latent_shape=(self.latent_shape[0], latent, latent))


def on_meta(recipe: Recipe) -> Any:
    """Builds a network without numbers, in eval mode."""
    with torch.device("meta"):
        return recipe().eval()


def parameters_of(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def conditioning(network: Any, models: Models, samples: int) -> Conditioning:
    """What a text encoder would hand to this network, on meta.

    Raises ConfigurationError for a network whose conditions are not known.
    """
    facts = network.config
    width = getattr(facts, "caption_channels", None) or getattr(facts, "cross_attention_dim", None)
    if not isinstance(width, int):
        raise ConfigurationError(f"{type(network).__name__} takes no text hidden states: it can't be planned")

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(samples, *shape, dtype=dtype, device="meta")

    tensors: dict[str, Any] = {"encoder_hidden_states": empty(models.tokens, width)}
    if models.masked:
        tensors["encoder_attention_mask"] = empty(models.tokens, dtype=torch.int64)
    if getattr(facts, "addition_embed_type", None) == "text_time":
        pooled = facts.projection_class_embeddings_input_dim - 6 * facts.addition_time_embed_dim
        tensors["added_cond_kwargs"] = {"text_embeds": empty(pooled), "time_ids": empty(6)}
    elif getattr(network, "use_additional_conditions", False):
        tensors["added_cond_kwargs"] = {"resolution": empty(2), "aspect_ratio": empty(1)}
    return Conditioning(("",) * samples, tensors)


# Known models, as their configurations on the hub have them; what is not written is diffusers' default.

_VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}
_CLIP_L: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
_CLIP_BIG_G: dict[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
_SDXL: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_T5_XXL: dict[str, Any] = {
    "d_model": 4096,
    "d_ff": 10240,
    "d_kv": 64,
    "num_layers": 24,
    "num_heads": 64,
    "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
}


def _diffusers(name: str, **settings: Any) -> Recipe:
    def make() -> nn.Module:
        import diffusers

        network: nn.Module = getattr(diffusers, name)(**settings)
        return network

    return make


def _transformers(name: str, configuration: str, **settings: Any) -> Recipe:
    def make() -> nn.Module:
        import transformers

        network: nn.Module = getattr(transformers, name)(getattr(transformers, configuration)(**settings))
        return network

    return make


def _schedule(**settings: Any) -> Callable[[], NoiseSchedule]:
    def make() -> NoiseSchedule:
        from diffusers import DDPMScheduler

        return NoiseSchedule.from_diffusers(DDPMScheduler(**settings))

    return make


def _known(name: str, denoiser: Recipe, **rest: Any) -> Models:
    return Models(name, denoiser, denoiser, denoiser, **rest, backbones=(name, name, name))


_STABLE = _schedule(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
_FLOAT32, _HALF = 4, 2

KNOWN = {
    "sd15": _known(
        "Stable Diffusion 1.5",
        _diffusers("UNet2DConditionModel", cross_attention_dim=768, sample_size=64),
        decoder=_diffusers("AutoencoderKL", **_VAE, sample_size=512),
        text_encoders=((_transformers("CLIPTextModel", "CLIPTextConfig", **_CLIP_L), _FLOAT32),),
        schedule=_STABLE,
        latent_shape=(4, 64, 64),
        tokens=77,
    ),
    "sdxl": _known(
        "Stable Diffusion XL",
        _diffusers("UNet2DConditionModel", **_SDXL),
        decoder=_diffusers("AutoencoderKL", **_VAE, sample_size=1024, scaling_factor=0.13025),
        text_encoders=(
            (_transformers("CLIPTextModel", "CLIPTextConfig", **_CLIP_L), _FLOAT32),
            (_transformers("CLIPTextModelWithProjection", "CLIPTextConfig", **_CLIP_BIG_G), _FLOAT32),
        ),
        schedule=_STABLE,
        latent_shape=(4, 128, 128),
        tokens=77,
        timestep=399,
    ),
    "pixart": _known(
        "PixArt-alpha 512",
        _diffusers("PixArtTransformer2DModel", caption_channels=4096, sample_size=64),
        decoder=_diffusers("AutoencoderKL", **_VAE, sample_size=512),
        text_encoders=((_transformers("T5EncoderModel", "T5Config", **_T5_XXL), _HALF),),
        schedule=_schedule(beta_start=0.0001, beta_end=0.02),
        latent_shape=(4, 64, 64),
        tokens=120,
        masked=True,
        timestep=440,
    ),
}


def known(name: str) -> Models:
    """Raises ConfigurationError for another name."""
    if name not in KNOWN:
        raise ConfigurationError(f"--model: there is no {name!r}; known: {', '.join(KNOWN)}, or give a configuration")
    return KNOWN[name]
