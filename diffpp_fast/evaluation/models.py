"""Generators to draw with: a run's, an exported one, or the one that a configuration begins with."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from diffpp_fast.errors import CheckpointError, ConfigurationError
from diffpp_fast.networks.loading import read_config
from diffpp_fast.training.base_pipeline import fill_models
from diffpp_fast.training.build import Sampler, build_sampler
from diffpp_fast.training.checkpoint import load_role, read_role
from diffpp_fast.training.config import Config
from diffpp_fast.training.export import CALL, SavedGenerator, find_weights
from diffpp_fast.training.inputs import warn_of_changed_inputs
from diffpp_fast.training.loading import load_config
from diffpp_fast.training.publish import MANIFEST
from diffpp_fast.training.saved_config import load_saved_config, naming_moves
from diffpp_fast.training.state import Which, read_record

PIPELINE, NETWORK, SCHEDULE = "model_index.json", "config.json", "scheduler_config.json"
#: Keys of `models.generator` that a description of its calls replaces, whether it has them or not.
CALLS: Mapping[str, Any] = {"timestep": None, "timesteps": None, "renoise": "fresh"}


@dataclass(frozen=True)
class LoadedModel:
    """A generator in memory.

    Attributes:
        name: its name in tables, and its folder of pictures.
        origin: where its weights are from.
        sampler: prompts and latents -> pictures.
        config: the run's configuration, or one that stands for it.
        fingerprint: SHA-256 of the generator's weights: the same in a run and in its export, where the dtype is.
    """

    name: str
    origin: str
    sampler: Sampler
    config: Config
    fingerprint: str


@dataclass(frozen=True)
class ModelSource:
    """A generator that was found and is not loaded yet.

    Attributes:
        name, origin, config: see `LoadedModel`.
        weights: a checkpoint's; None: those that the configuration names.
        takes: the options of `diffpp-fast sample` that have a meaning for it.
    """

    name: str
    origin: str
    config: Config
    weights: SavedGenerator | None = None
    takes: tuple[str, ...] = ()

    def load(
        self, device: torch.device, *, ahead: Sequence[str] | None = None, embeddings: Path | None = None
    ) -> LoadedModel:
        """Load it; `ahead` and `embeddings` are those of `build_sampler`.

        Raises ConfigurationError and CheckpointError for what can't be loaded or does not fit together."""
        with nullcontext() if self.weights is None else naming_moves(self.weights.folder):
            sampler = build_sampler(self.config, device, ahead=ahead, embeddings=embeddings)
        if self.weights is not None:
            folder = self.weights.folder
            load_role(sampler.trained, read_role(*self.weights), folder)
            # In another precision the same networks have other bytes.
            if load_config(folder / "config.yaml").precision == self.config.precision:
                warn_of_changed_inputs(folder, read_record(folder).get("inputs"), sampler.inputs)
        return LoadedModel(self.name, self.origin, sampler, self.config, fingerprint(sampler.trained.network))


def find_source(
    path: Path | None,
    *,
    name: str | None = None,
    which: Which = "latest",
    config: Path | None = None,
    base: str | None = None,
    precision: str | None = None,
    overrides: Sequence[str] = (),
) -> ModelSource:
    """Find the generator of a run, of a checkpoint, of a folder that `diffpp-fast export` wrote, or of a configuration.

    Args:
        path: any of these; None: the run under runs/ that saved last.
        name: None: the name of the folder or file.
        which: the checkpoint of a run.
        config: for the folder of a network alone: a configuration that names text encoder and decoder. Where the
            folder has no `generator.json`, it also says how the generator is called.
        base: in place of `config`, a whole pipeline in diffusers' format, a folder or a hub id.
        precision: "float32" or "bfloat16"; None: the configuration's, float32 where there is none.
        overrides: values that replace the configuration's.

    Raises:
        CheckpointError: the path is nothing of all that.
        ConfigurationError: something that surrounds the generator is missing.
    """
    overrides = [*overrides, *([] if precision is None else [f"precision={precision}"])]
    if path is not None and path.suffix in (".yaml", ".yml") and path.is_file():
        source = ModelSource(name or path.stem, str(path), load_config(path, overrides), takes=("override",))
    elif path is not None and (path / PIPELINE).is_file():
        models = {"base": str(path.resolve()), "generator": _call(path)}
        source = ModelSource(name or path.resolve().name, str(path), _configuration(models, precision, path))
    elif path is not None and (path / NETWORK).is_file():
        around = _around(path, config, base, precision, overrides)
        takes = ("base",) if config is None else ("config", "override")
        source = ModelSource(name or path.resolve().name, str(path), around, takes=takes)
    else:
        weights = _find_in_run(path, which)
        # Of a run it is the run's name, not "step_002000", which other runs have too.
        run = weights.folder.resolve().parents[1].name
        takes = ("checkpoint", "override")
        source = ModelSource(name or run, str(weights), load_saved_config(weights.folder, overrides), weights, takes)
    if source.config.models.decoder is None:
        raise ConfigurationError(f"{source.origin}: models.decoder is missing, so there are no images")
    return source


def refuse_equal_names(sources: Sequence[ModelSource]) -> None:
    """Raise ConfigurationError where two are called alike, or one has a name that can't be a folder's."""
    names = [source.name for source in sources]
    for name in names:
        if not re.fullmatch(r"\w[\w .+-]*", name):
            raise ConfigurationError(f"{name!r} can't be the name of a model: use letters, digits, _ . + -")
        if names.count(name) > 1:
            origins = " and ".join(source.origin for source in sources if source.name == name)
            raise ConfigurationError(f"{origins} are both called {name}: write NAME=PATH for one of them")


def fingerprint(network: nn.Module) -> str:
    """Return the SHA-256 of a network's weights: names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _find_in_run(path: Path | None, which: Which) -> SavedGenerator:
    if path is not None and (path / CALL).is_file():
        raise CheckpointError(f"{path} holds adapters alone: export the run without --no-merge, or name the run itself")
    if path is not None and not ((path / MANIFEST).is_file() or (path / "checkpoints").is_dir()):
        raise CheckpointError(
            f"{path} is neither a whole checkpoint (no {MANIFEST}) nor a run (no checkpoints/), nor an exported "
            f"generator (no {NETWORK}, no {PIPELINE}), nor a configuration (.yaml)"
        )
    return find_weights(path, which)


def _around(
    path: Path, config: Path | None, base: str | None, precision: str | None, overrides: Sequence[str]
) -> Config:
    """Return the configuration of a network that stands alone."""
    if (config is None) == (base is None):
        raise ConfigurationError(
            f"{path} is a network without text encoder and decoder: name what has them, either --config CONFIG.yaml, "
            "the run's configuration, or --base PIPELINE, a folder or hub id in diffusers' format"
        )
    generator = {"path": str(path.resolve()), **(_call(path) if base or (path / CALL).is_file() else {})}
    models: dict[str, Any] = {"generator": generator}
    if (path / SCHEDULE).is_file():
        models["scheduler"] = {"path": str(path.resolve())}
    if base is not None:
        models["base"] = str(Path(base).resolve()) if Path(base).exists() else base
        return _configuration(models, precision, path)
    assert config is not None
    if "input_scale" not in generator:
        generator |= {**CALLS, **load_config(config).models.generator.call()}
    return load_config(config, [*overrides, *(f"models.{key}={json.dumps(value)}" for key, value in models.items())])


def _call(path: Path) -> dict[str, Any]:
    """Return how an exported generator is called, as keys of `models.generator`."""
    if not (path / CALL).is_file():
        raise ConfigurationError(
            f"{path} has no {CALL}, which says at which timesteps a generator makes its steps: `diffpp-fast export` "
            'writes one; by hand, e.g. {"timestep": 625, "input_scale": "sigma"}'
        )
    call = read_config(str(path.resolve()), CALL)
    return {**CALLS, **{key: call[key] for key in (*CALLS, "input_scale") if key in call}}


def _configuration(models: Mapping[str, Any], precision: str | None, path: Path) -> Config:
    """Return a configuration that holds models alone: nothing is trained with it."""
    data: dict[str, Any] = {
        "output": "",
        "precision": precision or "float32",
        "prompts": {"path": ""},
        "models": dict(models),
        "method": {"name": "diff_instruct"},
        "optimizers": {"generator": {"lr": 1.0}, "fake": {"lr": 1.0}},
        "training": {"steps": 1, "global_batch": 1},
    }
    fill_models(data, path)
    try:
        return Config.model_validate_json(json.dumps(data))
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, found['loc']))}: {found['msg']}" for found in error.errors())
        raise ConfigurationError(f"{path}: {problems}") from None
