"""Prompts to conditioning, as the family of the reference wants it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from diffpp_fast.errors import ConfigurationError
from diffpp_fast.networks import Conditioning, DualTextEncoder, TextEncoder
from diffpp_fast.networks.loading import read_config
from diffpp_fast.networks.text import load_text_model, load_tokenizer
from diffpp_fast.training import config
from diffpp_fast.training.build.checks import naming
from diffpp_fast.training.inputs import digest_of, digest_of_tokenizer, public
from diffpp_fast.training.prompts import EmbeddingCache, PromptEncoder, PromptSource

#: A prompt's length in tokens, as the families' pipelines have it.
CLIP_LENGTH, PIXART_LENGTH = 77, 120


@dataclass(frozen=True)
class TextFacts:
    """Channels of hidden states, and of Stable Diffusion XL's pooled projection."""

    width: int
    pooled_width: int | None = None

    @classmethod
    def of(cls, conditioning: Conditioning) -> TextFacts:
        """Of what an encoder has given."""
        pooled = conditioning.tensors.get("added_cond_kwargs", {}).get("text_embeds")
        width = conditioning.tensors["encoder_hidden_states"].shape[-1]
        return cls(width, None if pooled is None else pooled.shape[-1])


@dataclass(frozen=True)
class Text:
    """What gives prompts their conditioning: encoders in memory, or embeddings on the disk.

    Attributes:
        encode: B prompts -> their conditioning, on the device.
        null: the unconditional counterpart of one prompt, for guidance.
        inputs: digests of what it is made of.
    """

    encode: Callable[[Sequence[str]], Conditioning]
    null: Callable[[], Conditioning]
    facts: TextFacts
    inputs: Mapping[str, str | None]


def open_text(
    models: config.Models,
    device: torch.device,
    embeddings: EmbeddingCache | None = None,
    prompts: PromptSource | None = None,
) -> Text:
    """The text encoders of a run with these prompts, or the embeddings in their place; raises like `load_text`."""
    if embeddings is not None:
        return Text(embeddings, embeddings.null, TextFacts.of(embeddings.null()), {"embeddings": embeddings.digest})
    encoder, facts = load_text(models)
    inputs = _digests(models, encoder)
    encoder.to(device)
    return Text(PromptEncoder(encoder, prompts), encoder.null, facts, inputs)


def load_text(models: config.Models) -> tuple[TextEncoder | DualTextEncoder, TextFacts]:
    """The text encoders of a run; what their output holds follows from the reference's `config.json`.

    Raises ConfigurationError for what can't be loaded, and for one encoder too many or too few.
    """
    with naming("models.reference", models.reference.path):
        facts = read_config(models.reference.path)
    second = models.text_encoder_2
    if facts.get("addition_embed_type") == "text_time":
        if second is None:
            raise ConfigurationError(
                "models.reference is a Stable Diffusion XL network: it needs models.text_encoder_2 for its pooled text"
            )
        return _load_two(models, second)
    if second is not None:
        raise ConfigurationError("models.reference takes one text encoder: remove models.text_encoder_2")
    return _load_one(models, facts)


def conditioning_facts(models: config.Models) -> dict[str, Any]:
    """What a prompt's conditioning depends on besides the text encoders: the family, and settings that enter it."""
    with naming("models.reference", models.reference.path):
        facts = read_config(models.reference.path)
    two = facts.get("addition_embed_type") == "text_time"
    sizes = models.size_conditions.model_dump(mode="json") | {"picture": list(_picture_size(models))}
    return {
        "family": [facts["_class_name"], facts.get("addition_embed_type")],
        "empty_prompt": models.empty_prompt,
        "negative_prompt": models.negative_prompt,
        "size_conditions": sizes if two or (_is_pixart(facts) and _wants_sizes(facts)) else None,
    }


def _load_one(models: config.Models, facts: Mapping[str, Any]) -> tuple[TextEncoder, TextFacts]:
    section, pixart = models.text_encoder, _is_pixart(facts)
    with naming("models.text_encoder", section.path):
        model = load_text_model(section.path, _dtype(section))
        settings: Any = model.config
        clip = settings.model_type.startswith("clip")
        encoder = TextEncoder(
            model,
            load_tokenizer(section.tokenizer or section.path),
            section.max_length or (PIXART_LENGTH if pixart else CLIP_LENGTH),
            not clip if section.mask_padding is None else section.mask_padding,
            lowercase=pixart,
            added=_picture_conditions(models) if pixart and _wants_sizes(facts) else None,
            zero_empty=models.empty_prompt == "zeros",
            negative_prompt=models.negative_prompt,
        )
    return encoder, TextFacts(encoder.width)


def _load_two(models: config.Models, second: config.TextEncoder) -> tuple[DualTextEncoder, TextFacts]:
    first = models.text_encoder
    if first.mask_padding or second.mask_padding:
        raise ConfigurationError("models.text_encoder.mask_padding: Stable Diffusion XL attends to padding")
    lengths = {section.max_length or CLIP_LENGTH for section in (first, second)}
    if len(lengths) > 1:
        raise ConfigurationError(
            "models.text_encoder.max_length and models.text_encoder_2.max_length must be equal: "
            "their hidden states stand side by side"
        )
    loaded = []
    for key, section in (("text_encoder", first), ("text_encoder_2", second)):
        with naming(f"models.{key}", section.path):
            model = load_text_model(section.path, _dtype(section), projection=key == "text_encoder_2")
            loaded.append((model, load_tokenizer(section.tokenizer or section.path)))
    sizes, picture = models.size_conditions, _picture_size(models)
    encoder = DualTextEncoder(
        loaded[0],
        loaded[1],
        lengths.pop(),
        time_ids=torch.tensor([*(sizes.original or picture), *sizes.crop, *(sizes.target or picture)]),
        zero_empty=models.empty_prompt != "encoded",
        negative_prompt=models.negative_prompt,
    )
    return encoder, TextFacts(encoder.width, encoder.pooled_width)


def _digests(models: config.Models, encoder: TextEncoder | DualTextEncoder) -> dict[str, str | None]:
    one = isinstance(encoder, TextEncoder)
    networks: Any = [encoder.model] if one else encoder.models
    tokenizers: Any = [encoder.tokenizer] if one else encoder.tokenizers
    sections = [section for section in (models.text_encoder, models.text_encoder_2) if section is not None]
    digests: dict[str, str | None] = {}
    for number, section, network, tokenizer in zip(("", "_2"), sections, networks, tokenizers, strict=False):
        digests[f"text_encoder{number}"] = digest_of(public(read_config(section.path)), network.state_dict())
        digests[f"tokenizer{number}"] = digest_of_tokenizer(tokenizer)
    return digests


def _dtype(section: config.TextEncoder) -> torch.dtype:
    # A prompt is encoded once and kept: what float32 costs here is memory alone.
    dtype: torch.dtype = getattr(torch, "float32" if section.dtype == "auto" else section.dtype)
    return dtype


def _is_pixart(facts: Mapping[str, Any]) -> bool:
    # Its folders on the hub were written before diffusers gave it a class of its own.
    return facts["_class_name"] in ("PixArtTransformer2DModel", "Transformer2DModel")


def _wants_sizes(facts: Mapping[str, Any]) -> bool:
    wanted = facts.get("use_additional_conditions")
    return bool(facts.get("sample_size") == 128 if wanted is None else wanted)


def _picture_conditions(models: config.Models) -> dict[str, torch.Tensor]:
    height, width = models.size_conditions.target or _picture_size(models)
    resolution = torch.tensor([float(height), float(width)])
    return {"resolution": resolution, "aspect_ratio": torch.tensor([height / width])}


def _picture_size(models: config.Models) -> tuple[int, int]:
    """Height and width of a decoded picture, in pixels."""
    scale = 8
    if models.decoder is not None:
        with naming("models.decoder", models.decoder.path):
            facts = read_config(models.decoder.path)
        blocks = facts.get("block_out_channels") or facts.get("decoder_block_out_channels")
        scale = 2 ** (len(blocks) - 1) if blocks else scale
    _, height, width = models.latent_shape
    return scale * height, scale * width
