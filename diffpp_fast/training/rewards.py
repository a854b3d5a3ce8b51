"""Rewards of a run: from `file.py:name` in a configuration to a callable on latents, and what it computes with."""

from __future__ import annotations

import functools
import logging
import sys
import sysconfig
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffpp_fast.errors import ConfigurationError
from diffpp_fast.methods import RewardOutput
from diffpp_fast.networks import Conditioning
from diffpp_fast.precision import widen
from diffpp_fast.rewards import Mixture
from diffpp_fast.rewards.base import undisturbed
from diffpp_fast.rewards.text import HeldPrompts
from diffpp_fast.rewards.user_code import call_factory, explained
from diffpp_fast.training import config
from diffpp_fast.training.inputs import digest_of, digest_of_files

logger = logging.getLogger(__name__)

#: (images [B, 3, H, W] about [-1, 1], prompts) -> [B]
Scorer = Callable[[torch.Tensor, tuple[str, ...]], torch.Tensor]


class LatentReward:
    """A scorer of images as a reward of latents: it decodes and scores.

    Args:
        name: of the reward, for messages.
        scorer: images [B, 3, H, W], float32, about [-1, 1], and B prompts -> [B].
        decoder: latents [B, C, h, w] -> such images.
    """

    def __init__(self, name: str, scorer: Scorer, decoder: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.name = name
        self.scorer = scorer
        self.decoder = decoder
        self._modules = modules_of(scorer)
        self._watched = False

    def __call__(self, x0: torch.Tensor, conditioning: Conditioning) -> RewardOutput:
        """x0 [B, C, h, w] -> [B], with the parts of a mixture; differentiable in x0 as the scorer is in its images.

        Scores that are constant, for these prompts or for all, have the gradient 0.
        """
        values, parts = self._score(widen(self.decoder(x0)), conditioning.prompts)
        if not x0.requires_grad:
            return RewardOutput(values, parts, differentiable=False)
        # Which samples are computed together must not decide whether there is a graph: x0 is in it, times 0.
        nowhere = torch.zeros_like(values, dtype=torch.bool)
        attached = torch.where(nowhere, x0.flatten(1)[:, 0], values)
        return RewardOutput(attached, parts, differentiable=values.requires_grad)

    def score(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Return the scorer's own result, on images that are its own, checked for its shape.

        Raises ConfigurationError where the scorer fails, for another shape, and for a network in it that is not in eval
        mode.
        """
        return self._score(images, prompts)[0]

    def _score(self, images: torch.Tensor, prompts: Sequence[str]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        before = None if self._watched else _generators(images.device)
        parts: dict[str, torch.Tensor] = {}
        texts: Any = prompts if isinstance(prompts, HeldPrompts) else tuple(prompts)
        with undisturbed(self.name), explained(self.name):
            if isinstance(self.scorer, Mixture):
                components = self.scorer.components(images.clone(), texts)
                values = components.pop("total")
                parts = {name: part.detach() for name, part in components.items()}
            else:
                values = self.scorer(images.clone(), texts)
        if not isinstance(values, torch.Tensor) or values.shape != (len(images),):
            got = f"shape {tuple(values.shape)}" if isinstance(values, torch.Tensor) else type(values).__name__
            raise ConfigurationError(f"{self.name} must give one number per image, shape ({len(images)},), got {got}")
        if any(part.training for module in self._modules for part in module.modules()):
            raise ConfigurationError(
                f"{self.name} puts a network into train mode, where dropout is random and batch norm looks at the "
                "other samples: leave it in eval mode"
            )
        if before is not None:
            self._watched = True
            if not all(map(torch.equal, before, _generators(images.device))):
                logger.warning(
                    "%s draws from PyTorch's global generator, or seeds it. Nothing else in a run depends on it, but "
                    "scores that do differ when the run is resumed, or cut into other micro-batches",
                    self.name,
                )
        return values.to(images.device), parts


def load_scorer(key: str, reward: config.RewardSection, device: torch.device) -> Scorer:
    """Calls the reward's factory. A module that it gives is moved to `device`; that one, and those that are found in
    what else it gives, are frozen and set to eval.

    Raises ConfigurationError like `call_factory`.
    """
    scorer: Any = call_factory(reward.factory, reward.arguments, key)
    if not callable(scorer):
        raise ConfigurationError(f"{key}: {reward.factory} gave {type(scorer).__name__}, which can't be called")
    if isinstance(scorer, nn.Module):
        scorer.to(device)  # of what a function closes over only its author knows where it belongs
    for network in modules_of(scorer):
        network.eval().requires_grad_(False)
    return scorer


def digest_of_reward(reward: config.RewardSection, scorer: Scorer) -> str:
    """Return a digest of a scorer's own code, no installed package's, and of the tensors that it computes with.

    Where no tensors are found in it, the files that its arguments name stand for them.
    """
    source = reward.factory.rpartition(":")[0]
    code = {*sources_of(scorer), *([Path(source).resolve()] if source.endswith(".py") else [])}
    tensors = tensors_of(scorer)
    given = [value for value in reward.arguments.values() if isinstance(value, str)]
    files = [] if tensors else [Path(value) for value in given if Path(value).is_file()]
    return digest_of(digest_of_files([*sorted(code), *files]), tensors)


def _generators(device: torch.device) -> list[torch.Tensor]:
    """States of the global generators that a scorer might draw from."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


#: How far is looked: steps from the scorer to what it holds, and values in all.
DEPTH, MOST = 6, 100_000
#: Types of values that hold no others.
PLAIN = (str, bytes, int, float, complex, type(None), type, types.ModuleType)
#: Where code lies that a run does not stand on by its content: installed packages, and this one.
LIBRARIES = [
    *(Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")),
    Path(__file__).resolve().parents[1],
]


def modules_of(scorer: Any) -> list[nn.Module]:
    """Modules that a scorer is, closes over, is bound to or keeps in its attributes, each once; none inside another."""
    found = {id(value): value for value in _walk(scorer) if isinstance(value, nn.Module)}
    inner = {id(part) for module in found.values() for part in module.modules() if part is not module}
    return [module for number, module in found.items() if number not in inner]


def tensors_of(scorer: Any) -> dict[str, torch.Tensor]:
    """Tensors that it computes with: of its modules by number and name, then the others by number."""
    tensors = {
        f"{number}.{name}": tensor
        for number, module in enumerate(modules_of(scorer))
        for name, tensor in module.state_dict().items()
    }
    others = [value for value in _walk(scorer) if isinstance(value, torch.Tensor)]
    return {**tensors, **{str(number): tensor for number, tensor in enumerate(others)}}


def sources_of(scorer: Any) -> list[Path]:
    """Files with code of it that belong neither to this package nor to an installed one."""
    values = list(_walk(scorer))
    values += [part for module in modules_of(scorer) for part in module.modules()]
    functions = {value.__code__.co_filename for value in values if isinstance(value, types.FunctionType)}
    classes = {getattr(sys.modules.get(type(value).__module__), "__file__", None) for value in values}
    return sorted({Path(file).resolve() for file in (*functions, *classes) if file and _is_own(file)})


@functools.cache
def _is_own(file: str) -> bool:
    path = Path(file).resolve()
    return path.is_file() and not any(path.is_relative_to(folder) for folder in LIBRARIES)


def _walk(value: Any, depth: int = DEPTH, seen: dict[int, Any] | None = None) -> Iterator[Any]:
    seen = {} if seen is None else seen
    if isinstance(value, PLAIN) or id(value) in seen or len(seen) > MOST:
        return
    seen[id(value)] = value  # kept, so that its number stays its own
    yield value
    if depth:
        for inner in _held(value):
            yield from _walk(inner, depth - 1, seen)


def _held(value: Any) -> Iterator[Any]:
    """List what a value holds: a function's cells, defaults and globals, a method's owner, items, attributes."""
    if isinstance(value, types.MethodType):
        yield from (value.__self__, value.__func__)
    elif isinstance(value, types.FunctionType):
        for cell in value.__closure__ or ():
            try:
                yield cell.cell_contents
            except ValueError:  # not yet assigned
                continue
        if _is_own(value.__code__.co_filename):
            yield from (value.__globals__[name] for name in value.__code__.co_names if name in value.__globals__)
        yield from value.__defaults__ or ()
        yield from (value.__kwdefaults__ or {}).values()
    elif isinstance(value, functools.partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, Mapping):
        yield from list(value.values())
    elif isinstance(value, list | tuple):
        yield from value
    elif isinstance(value, nn.Module):
        for part in value.modules():
            yield from [inner for name, inner in vars(part).items() if not name.startswith("_")]
    elif hasattr(value, "__dict__") and not isinstance(value, torch.Tensor):
        yield from list(vars(value).values())
