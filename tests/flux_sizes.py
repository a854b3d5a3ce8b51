"""FLUX.1-dev, FLUX.2 klein base 4B and dev, Qwen-Image as their makers have published them: configurations alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CLIP = {
    "architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "hidden_size": 768, "intermediate_size": 3072,
    "num_attention_heads": 12, "num_hidden_layers": 12, "projection_dim": 768, "vocab_size": 49408,
}  # fmt: skip
T5 = {
    "architectures": ["T5EncoderModel"], "model_type": "t5", "d_model": 4096, "d_ff": 10240, "d_kv": 64,
    "num_heads": 64, "num_layers": 24, "vocab_size": 32128, "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}  # fmt: skip
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 2560, "intermediate_size": 9728,
    "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 36, "head_dim": 128,
    "vocab_size": 151936, "max_position_embeddings": 40960,
}  # fmt: skip
MISTRAL = {
    "architectures": ["Mistral3ForConditionalGeneration"], "model_type": "mistral3",
    "text_config": {
        "model_type": "mistral", "hidden_size": 5120, "intermediate_size": 32768, "num_attention_heads": 32,
        "num_key_value_heads": 8, "num_hidden_layers": 40, "head_dim": 128, "vocab_size": 131072,
        "max_position_embeddings": 131072,
    },
    "vision_config": {
        "model_type": "pixtral", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
        "head_dim": 64, "num_attention_heads": 16, "image_size": 1540, "patch_size": 14,
    },
}  # fmt: skip
QWEN_VL = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl",
    "text_config": {
        "model_type": "qwen2_5_vl_text", "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28,
        "num_key_value_heads": 4, "num_hidden_layers": 28, "vocab_size": 152064, "max_position_embeddings": 128000,
    },
    "vision_config": {"hidden_size": 1280, "out_hidden_size": 3584},
}  # fmt: skip
BLOCKS = {
    "block_out_channels": [128, 256, 512, 512], "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4, "layers_per_block": 2,
}  # fmt: skip
#: By the names of `diffpp_fast.networks.families`' files: the pipeline, its parts, and the network's parameters.
SIZES: dict[str, tuple[str, dict[str, dict[str, Any]], int]] = {
    "flux": (
        "FluxPipeline",
        {
            "transformer": {"_class_name": "FluxTransformer2DModel", "guidance_embeds": True},
            "vae": {
                "_class_name": "AutoencoderKL", **BLOCKS, "latent_channels": 16, "scaling_factor": 0.3611,
                "shift_factor": 0.1159, "use_quant_conv": False, "use_post_quant_conv": False, "force_upcast": True,
            },
            "text_encoder": CLIP,
            "text_encoder_2": T5,
        },
        11_901_408_320,
    ),
    "flux_2": (
        "Flux2KleinPipeline",
        {
            "transformer": {
                "_class_name": "Flux2Transformer2DModel", "num_layers": 5, "num_single_layers": 20,
                "num_attention_heads": 24, "joint_attention_dim": 7680, "guidance_embeds": False,
            },
            "vae": {"_class_name": "AutoencoderKLFlux2"},
            "text_encoder": QWEN3,
        },
        3_875_544_576,
    ),
    "flux_2_dev": (
        "Flux2Pipeline",
        {
            "transformer": {"_class_name": "Flux2Transformer2DModel"},
            "vae": {"_class_name": "AutoencoderKLFlux2"},
            "text_encoder": MISTRAL,
        },
        32_223_281_152,
    ),
    "qwen_image": (
        "QwenImagePipeline",
        {
            "transformer": {"_class_name": "QwenImageTransformer2DModel"},
            "vae": {"_class_name": "AutoencoderKLQwenImage"},
            "text_encoder": QWEN_VL,
        },
        20_430_401_088,
    ),
}  # fmt: skip


def write_base(folder: Path, family: str, **changes: Any) -> Path:
    """A pipeline's folder with configurations alone; `changes` are those of the network's."""
    pipeline, parts, _ = SIZES[family]
    parts = {**parts, "transformer": {**parts["transformer"], **changes}}
    scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0, "use_dynamic_shifting": True}
    parts = {**parts, "scheduler": {**scheduler, "num_train_timesteps": 1000}}
    for number in ("", "_2"):
        if f"text_encoder{number}" in parts:
            parts[f"tokenizer{number}"] = {}
    for part, config in parts.items():
        (folder / part).mkdir(parents=True)
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        (folder / part / name).write_text(json.dumps(config))
    index = {"_class_name": pipeline, **{part: ["library", "class"] for part in parts}}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
