"""Embeddings from the disk in place of a run's text encoders, checked against its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from diffpp_fast.errors import ConfigurationError
from diffpp_fast.training.build.checks import naming
from diffpp_fast.training.build.text import conditioning_facts
from diffpp_fast.training.config import Config, TextEncoder
from diffpp_fast.training.prompts import EmbeddingCache, PromptSource
from diffpp_fast.training.prompts.embed import Seen, encoder_facts, refuse_other_cache
from diffpp_fast.training.prompts.embeddings import read_manifest


def open_embeddings(config: Config, prompts: PromptSource, device: torch.device) -> EmbeddingCache | None:
    """The embeddings that a configuration names in `prompts.embeddings`; None where it names none.

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
    cache = EmbeddingCache(folder, manifest, device)
    for prompt in listed_grid_prompts(config):
        if not cache.holds(prompt):
            raise ConfigurationError(
                f"training.grid_prompts: {folder} holds no embedding of {prompt!r}: run `diffpp-fast embed` again, "
                "which adds it"
            )
    return cache


def embedding_facts(config: Config, prompts: PromptSource, seen: Mapping[str, Any]) -> dict[str, Any]:
    """What embeddings of these prompts depend on, as it stands in a cache's manifest.

    Args:
        config: whose text encoders they are.
        prompts: of which they are made.
        seen: from another manifest, what is known of files that may have stayed the same; they aren't read again.
    """
    reading: Seen = {}
    encoder = conditioning_facts(config.models)
    for name, section in config.models:
        if isinstance(section, TextEncoder):
            with naming(f"models.{name}", section.path):
                encoder[name] = encoder_facts(section, seen, reading)
    return {
        "encoder": encoder,
        "prompts": {"sha256": prompts.digest(), "count": len(prompts)},
        "seen": reading,
    }


def listed_grid_prompts(config: Config) -> list[str]:
    """The grid's prompts where the configuration lists them; others are among the run's own."""
    wanted = config.training.grid_prompts
    return wanted if isinstance(wanted, list) else []
