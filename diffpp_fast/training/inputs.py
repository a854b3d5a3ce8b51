"""A run's inputs besides its configuration: networks, tokenizers, schedule, reward and embeddings, by content."""

from __future__ import annotations

import hashlib
import json
import logging
import zlib
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from diffpp_fast.errors import CheckpointError, ConfigurationError
from diffpp_fast.training.distributed import World

#: Inputs by the name that `--accept-changed` takes, with their keys in a configuration.
INPUTS = {
    "reference": "models.reference",
    "generator": "models.generator",
    "fake": "models.fake",
    "generator_lora": "models.generator.initial_lora",
    "fake_lora": "models.fake.initial_lora",
    "text_encoder": "models.text_encoder",
    "tokenizer": "models.text_encoder.tokenizer",
    "text_encoder_2": "models.text_encoder_2",
    "tokenizer_2": "models.text_encoder_2.tokenizer",
    "text_encoder_3": "models.text_encoder_3",
    "tokenizer_3": "models.text_encoder_3.tokenizer",
    "scheduler": "models.scheduler",
    "decoder": "models.decoder",
    "reward": "rewards.optimised",
    "images": "method.regularizers.images",
    "embeddings": "prompts.embeddings",
}
#: Checksums leave the interpreter lock.
THREADS = 8
#: Texts that tell tokenizers with the same vocabulary from each other: case, accents, scripts, spaces, punctuation.
PROBES = (
    "",
    "A photograph of an ASTRONAUT riding a horse",
    "Zażółć  gęślą jaźń, naïve café",
    "画像 картинка 3.14 (a:b)",
)

logger = logging.getLogger(__name__)


def digest_of(facts: Any, tensors: Mapping[str, torch.Tensor] | None = None) -> str:
    """Return a digest of an input: of facts as JSON has them, and of tensors' names, dtypes, shapes and bytes.

    The tensors are taken as they lie in memory, by several threads, or are read one by one where a mapping is no dict:
    CRC-32 of each. That finds what has changed by accident, not what was forged.
    """
    held = tensors or {}

    def entry(name: str) -> list[Any]:
        tensor = held[name]
        return [name, str(tensor.dtype), list(tensor.shape), _checksum(tensor)]

    with ThreadPoolExecutor(THREADS if isinstance(held, dict) else 1) as pool:
        about = list(pool.map(entry, sorted(held)))
    return hashlib.sha256(json.dumps([facts, about], sort_keys=True, default=str).encode()).hexdigest()[:32]


def public(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a `config.json` without what says where it came from and which version wrote it."""
    return {name: value for name, value in config.items() if not name.startswith("_") and not name.endswith("_version")}


def digest_of_tokenizer(tokenizer: Any) -> str:
    """Return a digest of its vocabulary, and of what it makes of some texts."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    return digest_of([vocabulary, [tokenizer(text)["input_ids"] for text in PROBES]])


def digest_of_files(files: Sequence[Path]) -> list[str]:
    """Return the SHA-256 of each; raises OSError for one that can't be read."""
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]


def refuse_unknown_inputs(names: Collection[str]) -> None:
    """Raise ConfigurationError for what `--accept-changed` does not know."""
    unknown = sorted(set(names) - set(INPUTS))
    if unknown:
        raise ConfigurationError(
            f"--accept-changed {unknown[0]}: there is no such input; known are {', '.join(INPUTS)}"
        )


def refuse_unequal_inputs(inputs: Mapping[str, str | None], world: World) -> None:
    """Raise ConfigurationError in all processes where one has another input than rank 0: each reads its own files
    (collective)."""
    mine = torch.tensor([int((digest or "0")[:12], 16) for digest in inputs.values()], dtype=torch.int64)
    of_main = world.sum(mine if world.is_main else torch.zeros_like(mine))
    different = [INPUTS[name] for name, same in zip(inputs, (mine == of_main).tolist(), strict=True) if not same]
    error = f"rank {world.rank}: {' and '.join(different)} differ from what rank 0 has read: bring the files into line"
    said = world.first_error(ConfigurationError(error) if different else None)
    if said is not None:
        raise ConfigurationError(said)


def refuse_changed_inputs(
    folder: Path, before: Mapping[str, str | None] | None, now: Mapping[str, str | None], accepted: Collection[str]
) -> None:
    """Raise CheckpointError if a run's inputs are not those that its checkpoint was computed with.

    Args:
        folder: of the checkpoint.
        before, now: digests by the names of `INPUTS`, then and now. None: an earlier version noted none.
        accepted: which may differ.
    """
    if before is None:
        logger.warning(
            "%s is of an earlier version: whether networks and reward are still the same is not known", folder
        )
        return
    changed = changes(before, now)
    for name in changed:
        if name in accepted:
            logger.warning("going on from %s with another %s", folder, INPUTS[name])
    refused = [name for name in changed if name not in accepted]
    if refused:
        raise CheckpointError(
            f"{folder} was computed with other inputs: the content of {' and '.join(INPUTS[name] for name in refused)} "
            "has changed. Put back what was there; or go on with what is there now: "
            f"--accept-changed {','.join(refused)}"
        )


def warn_of_changed_inputs(
    folder: Path, before: Mapping[str, str | None] | None, now: Mapping[str, str | None]
) -> None:
    """Say where a generator is used with other networks around it than it was trained with."""
    for name in changes(before or {}, now):
        logger.warning("%s was trained with another %s than this: its content has changed since", folder, INPUTS[name])


def changes(before: Mapping[str, str | None], now: Mapping[str, str | None]) -> list[str]:
    """Return names that both know, with another digest."""
    return [name for name, digest in now.items() if None not in (digest, before.get(name)) and digest != before[name]]


def _checksum(tensor: torch.Tensor) -> int:
    return zlib.crc32(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
