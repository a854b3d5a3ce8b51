"""Scores of pictures for their prompts: the ones that papers report, and any scorer that a configuration can name."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from diffpp_fast.errors import ConfigurationError
from diffpp_fast.rewards import ImageBatch, Mixture, Preprocessing, Reward, mixture
from diffpp_fast.rewards.base import as_reward
from diffpp_fast.training.config import Reward as Factory
from diffpp_fast.training.rewards import load_scorer
from diffpp_fast.training.yaml_files import YamlError, parse_value


@dataclass(frozen=True)
class Known:
    """A score that is known by name: the reward that computes it, and its meaning, in a sentence."""

    reward: str
    meaning: str


SCORES = {
    "image_reward": Known(
        "imagereward",
        "ImageReward v1.0 (arXiv 2304.05977), normalised by its authors to mean 0 and deviation 1 on their prompts; "
        "the prompt is cut after 35 tokens",
    ),
    "pick_score": Known(
        "pickscore", "PickScore v1 (arXiv 2305.01569): exp(logit_scale) cos(image, text); the prompt is cut after 77"
    ),
    "hps_v21": Known("hpsv2.1", "HPSv2.1 (arXiv 2306.09341): cos(image, text); the prompt is cut after 77 tokens"),
    "clip_score": Known("clip", "CLIP score: cos(image, text), neither times 2.5 nor times 100, and not cut at 0"),
    "aesthetic": Known("aesthetic", "LAION's aesthetic predictor v2, of the picture alone"),
}
#: Distances of a set of pictures to another set; `diffpp_fast.evaluation.distances` computes them.
DISTANCES = ("fid", "kid")
PIXELS = "the 8-bit picture"


@dataclass(frozen=True)
class Wanted:
    """A score that is asked for: its name in tables, its factory, and the factory's arguments."""

    name: str
    factory: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


def parse_metrics(names: Sequence[str], settings: Sequence[str] = ()) -> tuple[list[Wanted], list[str]]:
    """Return the metrics that the command line asks for: the scores, and the names of the distances, in their order.

    Args:
        names: keys of `SCORES` and `DISTANCES`, and `file.py:name` or `module:name` for the factory of a scorer, which
            is then called `name`.
        settings: METRIC.ARGUMENT=VALUE, for the scores; values as in YAML.

    Raises ConfigurationError for a name that is none, with the nearest that is, and for two of a name.
    """
    called = {name: name.rpartition(":")[2] for name in names}
    for name, short in called.items():
        if ":" not in name and name not in SCORES and name not in DISTANCES:
            raise ConfigurationError(f"there is no metric {name!r}{_nearest(name)}")
        if list(called.values()).count(short) > 1 or list(names).count(name) > 1:
            raise ConfigurationError(f"two metrics are called {short}: leave one out, or rename its function")
    arguments = _settings(settings, [short for name, short in called.items() if name not in DISTANCES])
    scores = [Wanted(short, name, arguments[short]) for name, short in called.items() if name not in DISTANCES]
    return scores, [name for name in names if name in DISTANCES]


class Scores:
    """Several scores of a batch of pictures; those with the same preprocessing or the same CLIP share it.

    Args:
        wanted: at least one, with different names.
        device: where they are computed.

    Raises ConfigurationError, naming the metric, for one that can't be loaded.
    """

    def __init__(self, wanted: Sequence[Wanted], device: torch.device) -> None:
        self.wanted = list(wanted)
        self.device = device
        known = {score.name: score for score in wanted if score.factory in SCORES}
        together = _load_known(known, device) if known else None
        self._rewards: dict[str, Reward] = {}
        for score in wanted:
            if together is not None and score.name in known:
                self._rewards[score.name] = together[score.name]
            else:
                factory = Factory(factory=score.factory, arguments=dict(score.arguments))
                self._rewards[score.name] = as_reward(load_scorer(f"metric {score.name}", factory, device))

    @property
    def names(self) -> list[str]:
        """The scores' names, in the order of the tables."""
        return [score.name for score in self.wanted]

    @torch.no_grad()
    def __call__(self, pictures: torch.Tensor, prompts: Sequence[str]) -> dict[str, list[float]]:
        """Score pictures uint8 [B, 3, H, W] for B prompts: B numbers for each name, finite or not.

        Raises ConfigurationError where a scorer gave something else than one number per picture, or works in place on
        what other scorers see.
        """
        batch = ImageBatch(pictures.to(self.device).float() / 127.5 - 1.0)
        values: dict[str, list[float]] = {}
        for name, reward in self._rewards.items():
            try:
                values[name] = reward.score(batch, tuple(prompts)).tolist()
            except ValueError as error:
                raise ConfigurationError(f"metric {name}: {error}") from error
            batch.refuse_changed(f"metric {name}")
        return values

    def facts(self) -> dict[str, dict[str, Any]]:
        """Return facts about each score, for the record."""
        return {
            score.name: {
                "meaning": SCORES[score.factory].meaning if score.factory in SCORES else f"what {score.factory} gives",
                "preprocessing": _preprocessing(self._rewards[score.name]),
                "better": "higher",
                "arguments": {name: str(value) for name, value in score.arguments.items()},
            }
            for score in self.wanted
        }


def _load_known(known: Mapping[str, Wanted], device: torch.device) -> Mixture:
    """Load all at once, so that what they have in common is there once."""
    entries = {
        name: {"weight": 0.0, "reward": SCORES[score.factory].reward, "arguments": dict(score.arguments)}
        for name, score in known.items()
    }
    try:
        return mixture(entries, device=device)
    except ConfigurationError as error:
        raise ConfigurationError(
            f"metrics: {error}\nWeights are named with --set METRIC.path=PATH, e.g. --set {next(iter(known))}.path=PATH"
        ) from error


def _settings(settings: Sequence[str], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    arguments: dict[str, dict[str, Any]] = {name: {} for name in names}
    for setting in settings:
        key, equals, text = setting.partition("=")
        name, dot, argument = key.partition(".")
        if not (equals and dot and argument):
            raise ConfigurationError(f"--set {setting}: write METRIC.ARGUMENT=VALUE, e.g. pick_score.path=/weights")
        if name not in arguments:
            raise ConfigurationError(f"--set {setting}: no such score is asked for; there are {', '.join(names)}")
        try:
            arguments[name][argument] = parse_value(text)
        except YamlError as error:
            raise ConfigurationError(f"--set {setting[:200]}: the value {error}") from None
    return arguments


def _nearest(name: str) -> str:
    known = [*SCORES, *DISTANCES]
    # People write names with and without underscores.
    plain = {other.replace("_", ""): other for other in known}
    close = difflib.get_close_matches(name.lower().replace("_", ""), plain, n=1, cutoff=0.5)
    hint = f": did you mean {plain[close[0]]}?" if close else "."
    return f"{hint} Known are {', '.join(known)}; a scorer of your own is written file.py:name or module:name"


def _preprocessing(reward: Reward) -> str:
    """Say in words how a reward prepares the picture."""
    scorer: Any = getattr(reward, "scorer", reward)
    how = getattr(scorer, "preprocessing", None)
    if not isinstance(how, Preprocessing):
        return f"{PIXELS}, in [-1, 1]; the rest is the scorer's own"
    side = "short side to {0}, centre crop" if how.fit == "crop" else "long side to {0}, black around"
    antialias = "with" if how.antialias else "without"
    return (
        f"{PIXELS}; {side.format(how.size)}, {how.filter} {antialias} antialiasing and no rounding; "
        f"mean {how.mean}, standard deviation {how.std}"
    )
