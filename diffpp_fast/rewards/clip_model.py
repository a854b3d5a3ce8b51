"""A frozen CLIP: unit features of images, with gradient to the pixels, and of prompts, each encoded once."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffpp_fast.errors import ConfigurationError
from diffpp_fast.rewards.base import ImageBatch, Preprocessing
from diffpp_fast.rewards.files import fit, locate, read_tensors, unchanged
from diffpp_fast.rewards.text import PromptCache, PromptTokenizer
from diffpp_fast.rewards.towers import QuickGelu, recompute

#: ViT-H/14 of open_clip (model_configs/ViT-H-14.json), the network of HPSv2 and PickScore.
VIT_H_14: dict[str, Any] = {
    "vision_config": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "patch_size": 14,
        "image_size": 224,
        "hidden_act": "gelu",
        "projection_dim": 1024,
    },
    "text_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "hidden_act": "gelu",
        "vocab_size": 49408,
        "max_position_embeddings": 77,
        "bos_token_id": 49406,
        "eos_token_id": 49407,
        "projection_dim": 1024,
    },
    "projection_dim": 1024,
}

# transformers' keys -> those of OpenAI's and open_clip's CLIP (openai/CLIP clip/model.py).
_OPEN_CLIP = (
    (r"^vision_model\.encoder\.layers\.", "visual.transformer.resblocks."),
    (r"^text_model\.encoder\.layers\.", "transformer.resblocks."),
    (r"\.self_attn\.[qkv]_proj\.", ".attn.in_proj_"),
    (r"\.self_attn\.out_proj\.", ".attn.out_proj."),
    (r"\.layer_norm([12])\.", r".ln_\1."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    (r"^vision_model\.embeddings\.class_embedding$", "visual.class_embedding"),
    (r"^vision_model\.embeddings\.patch_embedding\.", "visual.conv1."),
    (r"^vision_model\.embeddings\.position_embedding\.weight$", "visual.positional_embedding"),
    (r"^vision_model\.pre_layrnorm\.", "visual.ln_pre."),
    (r"^vision_model\.post_layernorm\.", "visual.ln_post."),
    (r"^visual_projection\.weight$", "visual.proj"),
    (r"^text_model\.embeddings\.token_embedding\.", "token_embedding."),
    (r"^text_model\.embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^text_model\.final_layer_norm\.", "ln_final."),
    (r"^text_projection\.weight$", "text_projection"),
)


class Clip(nn.Module):
    """The two towers of a CLIP, frozen.

    Moving the module, changing its dtype and loading a state dict forget the cached prompts; after any other change of
    the text tower's weights call `clear_cache`.

    Args:
        model: transformers' `CLIPModel`; without `text_model` it encodes images only.
        tokenizer: the model's; None without `text_model`.
        scale: exp(logit_scale) of the checkpoint.
        name: of the reward, for logs.
        clean: applied to prompts before the tokenizer.
        checkpoint: compute each layer of the image tower again in the backward pass, instead of keeping what it needs.
        capacity: prompts whose features are kept.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        scale: float,
        name: str = "clip",
        clean: Callable[[str], str] | None = None,
        checkpoint: bool = False,
        capacity: int = 4096,
    ) -> None:
        super().__init__()
        config = model.config
        self.vision_model, self.visual_projection = model.vision_model, model.visual_projection
        self.text_model: Any = getattr(model, "text_model", None)
        self.text_projection: Any = getattr(model, "text_projection", None)
        self.scale = scale
        self.image_size: int = config.vision_config.image_size
        self.cache = PromptCache(capacity)
        if self.text_model is not None:
            text = config.text_config
            if text.eos_token_id not in (2, tokenizer.eos_token_id):  # 2: transformers takes the highest token's place
                raise ConfigurationError(
                    f"{name}: the tokenizer ends prompts with token {tokenizer.eos_token_id}, the text encoder expects "
                    f"{text.eos_token_id}: give the tokenizer that belongs to the model"
                )
            if len(tokenizer) > text.vocab_size:
                raise ConfigurationError(
                    f"{name}: the tokenizer has {len(tokenizer)} tokens, the text encoder {text.vocab_size}: "
                    "give the tokenizer that belongs to the model"
                )
            self.tokenize = PromptTokenizer(tokenizer, text.max_position_embeddings, name, clean)
        for layer in self.vision_model.encoder.layers:
            if config.vision_config.hidden_act == "quick_gelu":
                layer.mlp.activation_fn = QuickGelu()
        if checkpoint:
            recompute(self.vision_model.encoder.layers)
        self.register_load_state_dict_post_hook(lambda module, _: module.cache.clear())
        self.eval().requires_grad_(False)

    @property
    def dtype(self) -> torch.dtype:
        return self.visual_projection.weight.dtype

    def image_features(self, batch: ImageBatch, preprocessing: Preprocessing) -> Tensor:
        """Unit features [B, D] of a batch, float32; computed once per batch, whoever asks."""
        return batch.once((id(self), preprocessing), lambda: self._encode_images(batch, preprocessing))

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """Unit features [B, D] of prompts, float32, without gradient."""
        if self.text_model is None:
            raise ConfigurationError("this CLIP was loaded without its text encoder")
        return self.cache(prompts, self._encode)

    def clear_cache(self) -> None:
        """Forgets the prompts' features."""
        self.cache.clear()

    def _encode_images(self, batch: ImageBatch, preprocessing: Preprocessing) -> Tensor:
        pixels = batch.pixels(preprocessing, self.dtype)
        return unit(self.visual_projection(self.vision_model(pixel_values=pixels).pooler_output))

    def _encode(self, prompts: Sequence[str]) -> Tensor:
        ids, _ = self.tokenize(prompts)
        # No mask: attention is causal, so that nothing after the end token reaches it.
        pooled = self.text_model(input_ids=ids.to(self.visual_projection.weight.device)).pooler_output
        return unit(self.text_projection(pooled))

    def _apply(self, fn: Any, recurse: bool = True) -> Clip:
        self.cache.clear()
        super()._apply(fn, recurse)
        return self


def unit(features: Tensor) -> Tensor:
    """Features of length 1, in float32 unless they are float64."""
    return F.normalize(features if features.dtype == torch.float64 else features.float(), dim=1)


def load_transformers_clip(path: str, what: str, dtype: torch.dtype, *, text: bool = True) -> tuple[Any, float]:
    """A `CLIPModel` from a hub id or a folder with config.json, and exp(logit_scale) as the file has it."""
    from transformers import CLIPConfig

    folder = locate(path, ("config.json",), what).parent
    try:
        config = CLIPConfig.from_pretrained(str(folder), trust_remote_code=False)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigurationError(f"{what}: {folder / 'config.json'} is no configuration of a CLIP: {error}") from error
    file = locate(path, ("model.safetensors", "pytorch_model.bin"), what)
    return _build(config, file, what, dtype, unchanged, text)


def load_open_clip(
    path: str, names: Sequence[str], what: str, dtype: torch.dtype, architecture: Mapping[str, Any] = VIT_H_14
) -> tuple[Any, float]:
    """The same of a state dict with open_clip's keys, which does not say its architecture."""
    from transformers import CLIPConfig

    return _build(CLIPConfig(**architecture), locate(path, names, what), what, dtype, _from_open_clip, True)


def _build(config: Any, file: Path, what: str, dtype: torch.dtype, source: Any, text: bool) -> tuple[Any, float]:
    from transformers import CLIPModel

    with torch.device("meta"):
        model = CLIPModel(config)
    spare: tuple[str, ...] = (r"^(input_resolution|context_length|vocab_size|(visual\.)?attn_mask)$",)
    if not text:
        del model.text_model, model.text_projection
        spare += (r"^text_model\.", r"^text_projection\.")
    tensors = read_tensors(file, what)
    fit(model, tensors, file, what, source=source, spare=spare, dtype=dtype)
    # From the file: bfloat16 would round the scale by a percent.
    return model, float(tensors["logit_scale"].double().exp())


def _from_open_clip(key: str) -> tuple[str, Callable[[Tensor], Tensor]]:
    name = key
    for pattern, replacement in _OPEN_CLIP:
        name = re.sub(pattern, replacement, name)
    part = re.search(r"\.self_attn\.([qkv])_proj\.", key)
    if part is not None:  # one matrix there, three here
        return name, partial(_third, "qkv".index(part[1]))
    if key in ("visual_projection.weight", "text_projection.weight"):  # x @ p there, x @ w.T here
        return name, lambda value: value.T.contiguous()
    return unchanged(name)


def _third(index: int, value: Tensor) -> Tensor:
    return value.chunk(3)[index]
