"""Rewards of a run: from the configuration's `file.py:name` to a callable on latents."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from diffpp_fast.errors import ConfigurationError
from diffpp_fast.networks import Conditioning
from diffpp_fast.precision import widen
from diffpp_fast.rewards import Mixture
from diffpp_fast.training import config

#: (images [B, 3, H, W] about [-1, 1], prompts) -> [B]
Scorer = Callable[[torch.Tensor, tuple[str, ...]], torch.Tensor]


class LatentReward:
    """A scorer of images as a reward of latents: decodes, scores, and remembers what it gave.

    Args:
        name: of the reward, for messages.
        scorer: images [B, 3, H, W], float32, about [-1, 1], and B prompts -> [B].
        decoder: latents [B, C, h, w] -> such images.
    """

    def __init__(self, name: str, scorer: Scorer, decoder: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.name = name
        self.scorer = scorer
        self.decoder = decoder
        self._given: list[torch.Tensor] = []
        self._parts: dict[str, list[torch.Tensor]] = {}

    def __call__(self, x0: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """x0 [B, C, h, w] -> [B]; differentiable in x0 as far as the scorer is in its images."""
        values = self.score(widen(self.decoder(x0)), conditioning.prompts)
        if x0.requires_grad and not values.requires_grad:
            raise ConfigurationError(
                f"{self.name} has no gradient by the images: it must be differentiable, or its scale 0"
            )
        self._given.append(values.detach().float())
        if isinstance(self.scorer, Mixture):
            for name, part in self.scorer.last.items():
                self._parts.setdefault(name, []).append(part)
        return values

    def score(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """The scorer itself, its result checked for its shape."""
        values = self.scorer(images, tuple(prompts))
        if not isinstance(values, torch.Tensor) or values.shape != (len(images),):
            got = f"shape {tuple(values.shape)}" if isinstance(values, torch.Tensor) else type(values).__name__
            raise ConfigurationError(f"{self.name} must give one number per image, shape ({len(images)},), got {got}")
        return values

    def take_given(self) -> torch.Tensor:
        """The rewards of all calls since the last taking, in order, float32."""
        given, self._given = self._given, []
        return torch.cat(given)

    def take_parts(self) -> dict[str, torch.Tensor]:
        """What a mixture consists of, by name, of all calls since the last taking; nothing of any other scorer."""
        parts, self._parts = self._parts, {}
        return {name: torch.cat(values) for name, values in parts.items() if name != "total"}


def load_scorer(key: str, reward: config.Reward, device: torch.device) -> Scorer:
    """Calls the reward's factory. A module that it gives is moved to `device`, frozen and set to eval.

    Raises ConfigurationError where the factory can't be found or doesn't take the arguments.
    """
    source, _, name = reward.factory.rpartition(":")
    module = _load_file(key, source) if source.endswith(".py") else _import(key, source)
    factory = getattr(module, name, None)
    if not callable(factory):
        known = [other for other, value in vars(module).items() if callable(value) and not other.startswith("_")]
        raise ConfigurationError(f"{key}.factory: {source} has no function {name}; it has {', '.join(known) or 'none'}")
    try:
        inspect.signature(factory).bind(**reward.arguments)
    except TypeError as error:
        raise ConfigurationError(f"{key}.arguments do not fit {name}{inspect.signature(factory)}: {error}") from None
    scorer: Any = factory(**reward.arguments)
    if not callable(scorer):
        raise ConfigurationError(f"{key}: {reward.factory} gave {type(scorer).__name__}, which can't be called")
    if isinstance(scorer, nn.Module):
        scorer.to(device).eval().requires_grad_(False)
    return scorer


def _load_file(key: str, path: str) -> ModuleType:
    if not Path(path).is_file():
        raise ConfigurationError(f"{key}.factory: no such file: {path}")
    spec = importlib.util.spec_from_file_location(f"diffpp_fast_user_{Path(path).stem}", path)
    assert spec is not None and spec.loader is not None  # a path that ends in .py always has them
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def _import(key: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise ConfigurationError(f"{key}.factory: there is no module {name}; a file is written file.py:name") from None
