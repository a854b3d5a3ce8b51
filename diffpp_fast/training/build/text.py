"""Prompts to conditioning, as the reference wants it: by text encoders, or from embeddings on the disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffpp_fast.errors import ConfigurationError
from diffpp_fast.networks import Conditioning, DualTextEncoder, TextEncoder
from diffpp_fast.networks.decoder.latents import pixels_of
from diffpp_fast.networks.families import Family, FamilyText, family_named
from diffpp_fast.networks.inputs import is_pixart, wants_sizes, with_defaults
from diffpp_fast.networks.loading import diffusers_class, read_config
from diffpp_fast.networks.streaming import encode_in_step, streaming
from diffpp_fast.networks.text import load_text_model, load_tokenizer
from diffpp_fast.training import config
from diffpp_fast.training.build.agreement import (
    CLIP_LENGTH,
    TEXT_KEYS,
    TextFacts,
    facts_of,
    family_sections,
    naming,
    takes_two_encoders,
    text_facts,
    text_length,
)
from diffpp_fast.training.config import Config, TextEncoderSection
from diffpp_fast.training.images import open_images
from diffpp_fast.training.inputs import digest_of, digest_of_tokenizer, public
from diffpp_fast.training.prompts import EmbeddingCache, PromptEncoder, PromptSource
from diffpp_fast.training.prompts.embed import Seen, encoder_facts, refuse_other_cache
from diffpp_fast.training.prompts.embeddings import read_manifest
from diffpp_fast.training.prompts.encoder import EncodedAhead

AnyTextEncoder = TextEncoder | DualTextEncoder | FamilyText


@dataclass(frozen=True)
class Text:
    """The source of prompts' conditioning: encoders in memory, or embeddings on the disk.

    Attributes:
        encode: B prompts -> their conditioning, on the device.
        null: the unconditional counterpart of one prompt, for guidance.
        inputs: digests of what it is made of.
    """

    encode: Callable[[Sequence[str]], Conditioning]
    null: Callable[[], Conditioning]
    inputs: Mapping[str, str | None]


def open_text(
    models: config.Models,
    device: torch.device,
    embeddings: EmbeddingCache | None = None,
    prompts: PromptSource | None = None,
) -> Text:
    """Load the text encoders of a run, or take embeddings in their place; raises like `load_text`."""
    if embeddings is not None:
        return Text(embeddings, embeddings.null, {"embeddings": embeddings.digest})
    encoder, _ = load_text(models)
    inputs = _digests(models, encoder)
    encoder.to(device)
    return Text(PromptEncoder(encoder, prompts), encoder.null, inputs)


def encode_ahead(models: config.Models, prompts: Sequence[str], device: torch.device) -> EncodedAhead:
    """Encode prompts by streamed text encoders, which are then forgotten; raises like `load_text`."""
    with streaming():
        encoder = load_text(models)[0].to(device)
    return EncodedAhead(encode_in_step(encoder, list(dict.fromkeys(prompts))), device)


def load_text(models: config.Models) -> tuple[AnyTextEncoder, TextFacts]:
    """Load the text encoders of a run; what their output holds follows from the reference's `config.json`.

    Raises ConfigurationError for what can't be loaded, and like `text_facts`.
    """
    facts = facts_of("models.reference", models.reference.path)
    known = text_facts(models)
    family = family_named(facts["_class_name"])
    if family is not None:
        return _load_family(family, models, facts), known
    if takes_two_encoders(models, facts):
        assert models.text_encoder_2 is not None
        two = _load_two(models, models.text_encoder_2)
        return two, TextFacts(two.width, two.pooled_width)
    one = _load_one(models, facts)
    return one, TextFacts(one.width)


def conditioning_facts(models: config.Models) -> dict[str, Any]:
    """Return the facts that conditioning depends on besides text encoders: the family, and settings that enter it."""
    facts = facts_of("models.reference", models.reference.path)
    two = facts.get("addition_embed_type") == "text_time"
    sizes = models.size_conditions.model_dump(mode="json") | {"picture": list(picture_size(models))}
    return {
        "family": [facts["_class_name"], facts.get("addition_embed_type")],
        "empty_prompt": models.empty_prompt,
        "negative_prompt": models.negative_prompt,
        "size_conditions": sizes if two or wants_sizes(facts) else None,
    }


def _load_one(models: config.Models, facts: Mapping[str, Any]) -> TextEncoder:
    section, pixart = models.text_encoder, is_pixart(facts)
    model, tokenizer = _load_encoder("models.text_encoder", section)
    settings: Any = model.config
    clip = settings.model_type.startswith("clip")
    return TextEncoder(
        model,
        tokenizer,
        text_length(section, pixart),
        not clip if section.mask_padding is None else section.mask_padding,
        lowercase=pixart,
        added=_picture_conditions(models) if wants_sizes(facts) else None,
        zero_empty=models.empty_prompt == "zeros",
        negative_prompt=models.negative_prompt,
    )


def _load_family(family: Family, models: config.Models, facts: Mapping[str, Any]) -> FamilyText:
    parts: list[tuple[nn.Module, Any, int] | None] = []
    for key, kind, section in zip(TEXT_KEYS, family.encoders, family_sections(family, models), strict=False):
        if section is None:
            parts.append(None)
        else:
            model, tokenizer = _load_encoder(key, section, loader=kind.loader)
            parts.append((model, tokenizer, section.max_length or kind.length))
    with naming("models.text_encoder", models.text_encoder.path):
        text = family.text(parts, with_defaults(facts, diffusers_class(facts, models.reference.path, "ModelMixin")))
    text.negative_prompt = models.negative_prompt
    text.zero_empty = models.empty_prompt == "zeros"
    return text


def _load_encoder(
    key: str, section: config.TextEncoderSection, *, projection: bool = False, loader: str | None = None
) -> tuple[nn.Module, Any]:
    with naming(key, section.path):
        model = load_text_model(
            section.path, _dtype(section), projection=projection, variant=section.variant, loader=loader,
            quantization=section.quantization,
        )  # fmt: skip
    where = section.tokenizer or section.path
    with naming(key if section.tokenizer is None else f"{key}.tokenizer", where):
        return model, load_tokenizer(where, model)


def _load_two(models: config.Models, second: config.TextEncoderSection) -> DualTextEncoder:
    first = models.text_encoder
    if first.mask_padding or second.mask_padding:
        raise ConfigurationError("models.text_encoder.mask_padding: Stable Diffusion XL attends to padding")
    lengths = {section.max_length or CLIP_LENGTH for section in (first, second)}
    if len(lengths) > 1:
        raise ConfigurationError(
            "models.text_encoder.max_length and models.text_encoder_2.max_length must be equal: "
            "their hidden states stand side by side"
        )
    sizes, picture = models.size_conditions, picture_size(models)
    return DualTextEncoder(
        _load_encoder("models.text_encoder", first),
        _load_encoder("models.text_encoder_2", second, projection=True),
        lengths.pop(),
        time_ids=torch.tensor([*(sizes.original or picture), *sizes.crop, *(sizes.target or picture)]),
        zero_empty=models.empty_prompt != "encoded",
        negative_prompt=models.negative_prompt,
    )


def _digests(models: config.Models, encoder: AnyTextEncoder) -> dict[str, str | None]:
    one = isinstance(encoder, TextEncoder)
    networks: Any = [encoder.model] if one else encoder.models
    tokenizers: Any = [encoder.tokenizer] if one else encoder.tokenizers
    every = {"": models.text_encoder, "_2": models.text_encoder_2, "_3": models.text_encoder_3}
    sections = {number: section for number, section in every.items() if section is not None}
    digests: dict[str, str | None] = {}
    for (number, section), network, tokenizer in zip(sections.items(), networks, tokenizers, strict=True):
        digests[f"text_encoder{number}"] = digest_of(public(read_config(section.path)), network.state_dict())
        digests[f"tokenizer{number}"] = digest_of_tokenizer(tokenizer)
    return digests


def _dtype(section: config.TextEncoderSection) -> torch.dtype:
    # A prompt is encoded once and kept: what float32 costs here is memory alone.
    dtype: torch.dtype = getattr(torch, "float32" if section.dtype == "auto" else section.dtype)
    return dtype


def _picture_conditions(models: config.Models) -> dict[str, torch.Tensor]:
    height, width = models.size_conditions.target or picture_size(models)
    resolution = torch.tensor([float(height), float(width)])
    return {"resolution": resolution, "aspect_ratio": torch.tensor([height / width])}


def picture_size(models: config.Models) -> tuple[int, int]:
    """Height and width of a decoded picture, in pixels."""
    scale = 8
    if models.decoder is not None:
        facts = facts_of("models.decoder", models.decoder.path)
        kind = diffusers_class(facts, models.decoder.path, "ModelMixin")
        scale = pixels_of(kind.__name__, with_defaults(facts, kind))
    _, height, width = models.latent_shape
    return scale * height, scale * width


def open_embeddings(config: Config, prompts: PromptSource, device: torch.device) -> EmbeddingCache | None:
    """Open the embeddings that a configuration names in `prompts.embeddings`; None where it names none.

    Raises ConfigurationError for a cache of another encoder or of other prompts, for one that isn't complete, and for
    one without the grid's prompts; the message says what differs.
    """
    if config.prompts.embeddings is None:
        return None
    folder = Path(config.prompts.embeddings)
    manifest = read_manifest(folder)
    if manifest is None:
        raise ConfigurationError(f"prompts.embeddings: no embeddings in {folder}: write them with `diffpp-fast embed`")
    refuse_other_cache(folder, manifest, embedding_facts(config, prompts, manifest["seen"]))
    cache = EmbeddingCache(folder, manifest, device, prompts)
    for key, prompt in _prompts_besides(config):
        if not cache.holds(prompt):
            raise ConfigurationError(
                f"{key}: {folder} holds no embedding of {prompt!r}: run `diffpp-fast embed` again, which adds it"
            )
    return cache


def embeddings_by(config: Config, folder: Path, device: torch.device) -> EmbeddingCache:
    """Open embeddings of any prompts by a configuration's text encoders.

    Raises ConfigurationError for those of other encoders, and for a folder that holds none or not all.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise ConfigurationError(f"--embeddings: no embeddings in {folder}: write them with `diffpp-fast embed`")
    seen: Seen = {}
    facts = {"encoder": _encoder_facts(config, manifest["seen"], seen), "prompts": manifest["prompts"]}
    refuse_other_cache(folder, manifest, facts)
    return EmbeddingCache(folder, manifest, device)


def embedding_facts(config: Config, prompts: PromptSource, seen: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts that embeddings of these prompts depend on, as they stand in a cache's manifest.

    Args:
        config: whose text encoders they are.
        prompts: of which they are made.
        seen: from another manifest, what is known of files that may have stayed the same; they aren't read again.
    """
    reading: Seen = {}
    return {
        "encoder": _encoder_facts(config, seen, reading),
        "prompts": {"sha256": prompts.digest(), "count": len(prompts)},
        "seen": reading,
    }


def _encoder_facts(config: Config, seen: Mapping[str, Any], reading: Seen) -> dict[str, Any]:
    encoder = conditioning_facts(config.models)
    for name, section in config.models:
        if isinstance(section, TextEncoderSection):
            with naming(f"models.{name}", section.path):
                encoder[name] = encoder_facts(section, seen, reading)
    return encoder


def extra_prompts(config: Config) -> list[str]:
    """Return the prompts that a run needs besides its own: listed ones of its grid, and the captions of its images."""
    return list(dict.fromkeys(prompt for _, prompt in _prompts_besides(config)))


def _prompts_besides(config: Config) -> list[tuple[str, str]]:
    """The same with the keys that ask for them."""
    wanted = config.training.grid_prompts
    listed = wanted if isinstance(wanted, list) else []
    images = open_images(config.method.images, picture_size(config.models))
    captions = [] if images is None else images.captions()
    return [
        *(("training.grid_prompts", prompt) for prompt in listed),
        *(("method.regularizers.images", caption) for caption in captions),
    ]
