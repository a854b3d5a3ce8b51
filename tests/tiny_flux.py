"""Whole pipelines at random weights whose networks take packed latents: FLUX.1, FLUX.2 and Qwen-Image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny
import torch
import yaml

#: Channels, height and width of a latent, by the names of `diffpp_fast.networks.families`' files.
LATENTS = {"flux": (4, 8, 8), "flux_2": (16, 4, 4), "qwen_image": (4, 8, 8)}
#: Pixels along a side of the pictures that they make.
PIXELS = 16


def flux_2(seed: int = 0, **changes: Any) -> torch.nn.Module:
    """A Flux2Transformer2DModel of two blocks of each kind, without guidance embedding."""
    from diffusers import Flux2Transformer2DModel

    settings: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": LATENTS["flux_2"][0],
        "num_layers": 2,
        "num_single_layers": 2,
        "joint_attention_dim": 3 * tiny.TEXT_WIDTH,
        "timestep_guidance_channels": 32,
        "axes_dims_rope": (4, 4, 4, 4),
        "guidance_embeds": False,
    }
    return tiny._seeded(lambda: Flux2Transformer2DModel(**settings | changes), seed)


def qwen_image(seed: int = 0, **changes: Any) -> torch.nn.Module:
    """A QwenImageTransformer2DModel of two blocks."""
    from diffusers import QwenImageTransformer2DModel

    settings: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4 * LATENTS["qwen_image"][0],
        "out_channels": LATENTS["qwen_image"][0],
        "num_layers": 2,
        "joint_attention_dim": tiny.TEXT_WIDTH,
        "axes_dims_rope": (4, 6, 6),
    }
    return tiny._seeded(lambda: QwenImageTransformer2DModel(**settings | changes), seed)


def flux_2_vae(seed: int = 0) -> torch.nn.Module:
    """An AutoencoderKLFlux2 that doubles height and width twice, patches included."""
    from diffusers import AutoencoderKLFlux2

    blocks: dict[str, Any] = {
        "block_out_channels": (8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 4,
        "latent_channels": LATENTS["flux_2"][0] // 4,
        "sample_size": PIXELS,
    }
    made: Any = tiny._seeded(lambda: AutoencoderKLFlux2(**blocks), seed)
    made.bn.running_mean.copy_(torch.linspace(-0.5, 0.5, LATENTS["flux_2"][0]))
    made.bn.running_var.copy_(torch.linspace(0.5, 2.0, LATENTS["flux_2"][0]))
    return made.eval()


def qwen_image_vae(seed: int = 0) -> torch.nn.Module:
    """An AutoencoderKLQwenImage that doubles height and width."""
    from diffusers import AutoencoderKLQwenImage

    settings: dict[str, Any] = {
        "base_dim": 8,
        "z_dim": LATENTS["qwen_image"][0],
        "dim_mult": [1, 2],
        "num_res_blocks": 1,
        "temperal_downsample": [True],
        "latents_mean": [-0.7, 0.4, 1.1, -0.2],
        "latents_std": [2.8, 1.4, 2.3, 0.6],
    }
    return tiny._seeded(lambda: AutoencoderKLQwenImage(**settings), seed).eval()


def qwen3(seed: int = 0) -> torch.nn.Module:
    """A Qwen3 of as many layers as FLUX.2 klein asks for, with its head."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    settings = Qwen3Config(
        vocab_size=64,
        hidden_size=tiny.TEXT_WIDTH,
        intermediate_size=tiny.TEXT_WIDTH,
        num_hidden_layers=28,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    return tiny._seeded(lambda: Qwen3ForCausalLM(settings), seed).eval()


def mistral3(seed: int = 0) -> torch.nn.Module:
    """A Mistral of as many layers as FLUX.2 dev asks for, which also sees, with its head."""
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    text = {
        "model_type": "mistral",
        "vocab_size": 64,
        "hidden_size": tiny.TEXT_WIDTH,
        "intermediate_size": tiny.TEXT_WIDTH,
        "num_hidden_layers": 31,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
    }
    sight = {
        "model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8,
        "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    settings = Mistral3Config(text_config=text, vision_config=sight, image_token_index=60)
    return tiny._seeded(lambda: Mistral3ForConditionalGeneration(settings), seed).eval()


def mistral_tokenizer() -> Any:
    """Qwen's tokenizer with a first token, which it adds itself and its template writes, and padding in front."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny.qwen_tokenizer()
    tokenizer.bos_token, tokenizer.padding_side = "<|im_start|>", "left"
    tokenizer.init_kwargs["padding_side"] = "left"  # which alone is saved
    first = [("<|im_start|>", tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<|im_start|> $A", special_tokens=first)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for message in messages %}{{ message.role }} "
        "{% for part in message.content %}{{ part.text }}{% endfor %}<|im_end|>{% endfor %}"
    )
    return tokenizer


def qwen2_5_vl(seed: int = 0) -> torch.nn.Module:
    """A Qwen2.5-VL of two layers, which also sees."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {
        "vocab_size": 64,
        "hidden_size": tiny.TEXT_WIDTH,
        "intermediate_size": 2 * tiny.TEXT_WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    }
    sight = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": tiny.TEXT_WIDTH,
        "fullatt_block_indexes": [0],
    }  # fmt: skip
    ids = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}
    settings = Qwen2_5_VLConfig(text_config=text, vision_config=sight, **ids)
    return tiny._seeded(lambda: Qwen2_5_VLForConditionalGeneration(settings), seed).eval()


def pipeline(family: str, **changes: Any) -> Any:
    """A whole pipeline of diffusers.

    Args:
        family: by the names of `diffpp_fast.networks.families`' files.
        changes: settings of the network.
    """
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        Flux2KleinPipeline,
        Flux2Pipeline,
        FluxPipeline,
        QwenImagePipeline,
    )

    scheduler = FlowMatchEulerDiscreteScheduler()
    if family == "flux":
        settings = {"in_channels": 4 * LATENTS[family][0], "pooled_projection_dim": tiny.TEXT_WIDTH}
        vae = tiny.vae(shift_factor=0.1159, scaling_factor=0.3611, use_post_quant_conv=False, use_quant_conv=False)
        return FluxPipeline(
            scheduler=scheduler,
            vae=vae.eval(),
            text_encoder=tiny.clip(),
            tokenizer=tiny.clip_tokenizer(),
            text_encoder_2=tiny.t5(),
            tokenizer_2=tiny.t5_tokenizer(),
            transformer=tiny.flux(**settings | changes).eval(),
        )
    if family == "flux_2" and changes.get("guidance_embeds"):  # dev
        return Flux2Pipeline(
            scheduler=scheduler,
            vae=flux_2_vae(),
            text_encoder=mistral3(),
            tokenizer=mistral_tokenizer(),
            transformer=flux_2(**changes).eval(),
        )
    if family == "flux_2":
        return Flux2KleinPipeline(
            scheduler=scheduler,
            vae=flux_2_vae(),
            text_encoder=qwen3(),
            tokenizer=tiny.qwen_tokenizer(),
            transformer=flux_2(**changes).eval(),
        )
    return QwenImagePipeline(
        scheduler=scheduler,
        vae=qwen_image_vae(),
        text_encoder=qwen2_5_vl(),
        tokenizer=tiny.qwen_tokenizer(),
        transformer=qwen_image(**changes).eval(),
    )


def write_base(folder: Path, family: str, **changes: Any) -> Path:
    """A run on a whole pipeline in `folder / "base"`; returns the configuration's path."""
    pipeline(family, **changes).save_pretrained(folder / "base")
    (folder / "prompts.txt").write_text("\n".join(tiny.PROMPTS) + "\n")
    (folder / "rewards.py").write_text(tiny.REWARDS)
    config = folder / "align.yaml"
    settings = {
        **tiny.settings(),
        "models": {"base": "base", "latent_shape": list(LATENTS[family])},
        "training": {"steps": 2, "global_batch": 2, "log_every": 1, "checkpoint_every": 1},
        "rewards": {"optimised": {"factory": "rewards.py:redness", "arguments": {"channel": 0}, "scale": 2.0}},
    }
    config.write_text(yaml.safe_dump(settings, sort_keys=False))
    return config
