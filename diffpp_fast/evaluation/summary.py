"""The findings of an evaluation, as the data of `summary.json`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from diffpp_fast.evaluation.intervals import LEVEL, METHOD, PAIRED, Estimate, difference, estimate, preferred
from diffpp_fast.evaluation.models import Model
from diffpp_fast.evaluation.plan import Plan
from diffpp_fast.version import __version__


@dataclass(frozen=True)
class Result:
    """The findings about a model.

    Attributes:
        model: facts about it.
        means: by score, [P]: of each prompt the mean over its pictures whose score is finite; NaN where none is.
        undefined: by score, how many pictures' were not.
        distances: by name, facts of each.
    """

    model: dict[str, Any]
    means: dict[str, np.ndarray]
    undefined: dict[str, int]
    distances: dict[str, dict[str, float]]


def facts_about(model: Model) -> dict[str, Any]:
    """Return what tells a model's pictures from another's."""
    call = model.config.models.generator
    return {
        "name": model.name,
        "origin": model.origin,
        "weights": f"sha256:{model.fingerprint}",
        "timestep": call.timestep,
        "input_scale": call.input_scale,
        "precision": model.config.precision,
        "latent_shape": list(model.config.models.latent_shape),
    }


def summarise(plan: Plan, results: Sequence[Result], metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Means with intervals by model and by group, and the differences of every two models.

    Args:
        plan: what was drawn.
        results: of its models, in their order.
        metrics: facts about each, by name.
    """
    groups = list(dict.fromkeys(prompt.group for prompt in plan.prompts if prompt.group is not None))
    members = {group: np.array([prompt.group == group for prompt in plan.prompts]) for group in groups}
    return {
        "diffpp_fast": __version__,
        "prompts": {"from": plan.prompt_file, "count": len(plan.prompts)},
        "images_per_prompt": plan.images_per_prompt,
        "seed": plan.seed,
        "first_sample": plan.first_sample,
        "batch": plan.batch,
        "device": str(plan.device),
        "interval": {"level": LEVEL, "method": METHOD, "differences": PAIRED},
        "metrics": dict(metrics),
        "models": [
            {
                **result.model,
                "scores": {name: _as_data(estimate(values)) for name, values in result.means.items()},
                "undefined": result.undefined,
                "groups": {
                    group: {name: _as_data(estimate(values[of])) for name, values in result.means.items()}
                    for group, of in members.items()
                },
                "distances": result.distances,
            }
            for result in results
        ],
        "differences": [
            {
                "model": result.model["name"],
                "minus": baseline.model["name"],
                "scores": {
                    name: {
                        **_as_data(difference(values, baseline.means[name])),
                        "higher": _or_none(preferred(values, baseline.means[name])),
                    }
                    for name, values in result.means.items()
                },
            }
            for baseline, result in combinations(results, 2)
        ],
    }


def _as_data(found: Estimate) -> dict[str, float | int | None]:
    return {
        "mean": _or_none(found.mean),
        "low": _or_none(found.mean - found.margin),
        "high": _or_none(found.mean + found.margin),
        "std": _or_none(found.std),
        "prompts": found.count,
    }


def _or_none(number: float) -> float | None:
    """JSON has no NaN: what no value or a single one does not tell is null."""
    return number if math.isfinite(number) else None
