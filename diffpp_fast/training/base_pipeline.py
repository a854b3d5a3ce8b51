"""A whole pipeline in diffusers' format as the default of what a configuration's `models` leave open."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffpp_fast.errors import ConfigurationError
from diffpp_fast.networks.families import FAMILIES, family_named
from diffpp_fast.networks.inputs import inputs_of
from diffpp_fast.networks.loading import read_config

#: The pipelines whose networks are conditioned as diffpp_fast does it.
PIPELINES = (
    "StableDiffusionPipeline",
    "StableDiffusionXLPipeline",
    "PixArtAlphaPipeline",
    *(pipeline for family in FAMILIES for pipeline in family.pipelines),
)


def fill_models(data: dict[str, Any], file: Path) -> None:
    """Fills in the sections of a raw configuration's `models` from `models.base`, a latent's shape, and a flow's call.

    What is given wins, key by key; a section with a path of its own gets nothing of the base's.

    Args:
        data: as it was read, with absolute paths.
        file: for messages.

    Raises ConfigurationError for a base that can't be read or is of another family.
    """
    models = data.get("models")
    if not isinstance(models, dict):
        return
    if isinstance(models.get("base"), str) and not _is_complete(models):
        for key, section in _sections(models["base"], file).items():
            given = models.get(key, {})
            if isinstance(section, dict) and key != "scheduler" and models.get("variant") is not None:
                section["variant"] = models["variant"]
            if isinstance(section, str):
                models.setdefault(key, section)
            elif isinstance(given, dict) and "path" not in given:
                models[key] = {**section, **given}
    reference = models.get("reference")
    path = reference.get("path") if isinstance(reference, dict) else None
    if "latent_shape" not in models and isinstance(path, str) and path:
        models["latent_shape"] = _latent_shape(path, file)
    generator = models.get("generator") or {}
    if isinstance(path, str) and isinstance(generator, dict) and not {"timestep", "timesteps"} & generator.keys():
        models["generator"] = {**_call_of_a_flow(path, models.get("scheduler")), **generator}


def _call_of_a_flow(reference: str, scheduler: Any) -> dict[str, Any]:
    """The last time and noise as it is, of which alone a flow's sampler begins; nothing for other networks."""
    where = scheduler.get("path") if isinstance(scheduler, dict) else None
    try:
        if family_named(read_config(reference).get("_class_name")) is None or not isinstance(where, str):
            return {}
        times = read_config(where, "scheduler_config.json").get("num_train_timesteps", 1000)
    except (OSError, ValueError):  # which is said where it is loaded
        return {}
    return {"timestep": times - 1, "input_scale": 1.0}


def _is_complete(models: dict[str, Any]) -> bool:
    """Whether nothing is left open, as in what a run has saved: the base may have gone since."""
    return "empty_prompt" in models and all(
        key in models and (models[key] is None or (isinstance(models[key], dict) and "path" in models[key]))
        for key in ("text_encoder", "text_encoder_2", "scheduler", "reference", "decoder")
    )


def _sections(base: str, file: Path) -> dict[str, Any]:
    """The sections of `models` that a pipeline has, with the paths of its subfolders."""
    index = _read(base, "model_index.json", f"{file}: models.base")
    if index.get("_class_name") not in PIPELINES:
        raise ConfigurationError(
            f"{file}: models.base ({base}) is a {index.get('_class_name')}; known are {', '.join(PIPELINES)}"
        )
    # A component that a pipeline does without is [null, null].
    parts = {name for name, value in index.items() if isinstance(value, list) and value[0] is not None}
    sections: dict[str, Any] = {}
    for key, part in (
        ("text_encoder", "text_encoder"),
        ("text_encoder_2", "text_encoder_2"),
        ("text_encoder_3", "text_encoder_3"),
        ("scheduler", "scheduler"),
        ("reference", "unet"),
        ("reference", "transformer"),
        ("decoder", "vae"),
    ):
        if part in parts:
            sections[key] = {"path": f"{base}/{part}"}
    for key, part in (
        ("text_encoder", "tokenizer"),
        ("text_encoder_2", "tokenizer_2"),
        ("text_encoder_3", "tokenizer_3"),
    ):
        if key in sections and part in parts:
            sections[key]["tokenizer"] = f"{base}/{part}"
    if "force_zeros_for_empty_prompt" in index:
        sections["empty_prompt"] = "zeros" if index["force_zeros_for_empty_prompt"] else "encoded"
    return sections


def _latent_shape(reference: str, file: Path) -> list[int]:
    config = _read(reference, "config.json", f"{file}: models.latent_shape is left open, and models.reference")
    if "model_type" in config:
        raise ConfigurationError(
            f"{file}: models.reference ({reference}) is a {config['model_type']} of transformers, not a network of "
            "diffusers"
        )
    family = family_named(config.get("_class_name"))
    size = config.get("sample_size", None if family is None else family.sample_size)
    height, width = (size, size) if isinstance(size, int) else size or (None, None)
    channels = config.get("in_channels")
    if family is not None:
        try:
            channels = inputs_of(config, reference).channels
        except ValueError as error:
            raise ConfigurationError(f"{file}: models.reference: {error}") from error
    if height is None or channels is None:
        raise ConfigurationError(
            f"{file}: the key models.latent_shape is missing, and {reference}/config.json names no sample_size"
        )
    return [channels, height, width]


def _read(path: str, name: str, key: str) -> dict[str, Any]:
    try:
        return read_config(path, name)
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{key} ({path}): {error}") from error
