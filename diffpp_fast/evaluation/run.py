"""An evaluation: every model draws the same prompts at the same latents; pictures are scored as they are drawn."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from diffpp_fast.errors import NonFiniteError
from diffpp_fast.evaluation.distances import Distances
from diffpp_fast.evaluation.intervals import LEVEL, METHOD, PAIRED, Estimate, difference, estimate, preferred
from diffpp_fast.evaluation.metrics import Scores
from diffpp_fast.evaluation.models import LoadedModel, refuse_equal_names
from diffpp_fast.evaluation.pictures import EvaluationPlan, draw
from diffpp_fast.evaluation.tables import EvaluationFolder
from diffpp_fast.version import __version__

logger = logging.getLogger(__name__)

#: Called with a model's name and the number of its pictures that are done.
Progress = Callable[[str, int], None]


@dataclass(frozen=True)
class ModelResult:
    """The findings about a model.

    Attributes:
        model: facts about it.
        means: by score, [P]: each prompt's mean over its pictures whose score is finite; NaN where none is.
        undefined: by score, the number of pictures whose score is not finite.
        distances: by name, facts about each.
    """

    model: dict[str, Any]
    means: dict[str, np.ndarray]
    undefined: dict[str, int]
    distances: dict[str, dict[str, float]]


def evaluate(
    plan: EvaluationPlan,
    scores: Scores | None,
    distances: Distances | None,
    output: Path,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Draw, score and write; return the content of `summary.json`.

    Into `output` go `summary.json`, `pictures.csv` with a row for each picture, `prompts.csv` with a row for each
    prompt and model, `grid.png` with the first prompts, and `images/MODEL/` if pictures are kept. One batch of pictures
    is in memory at a time, and one model.

    Args:
        plan: the pictures.
        scores, distances: the metrics; one of them at least.
        output: a folder, which is made.
        progress: told of every batch.

    A score that is not finite is in no mean, and is told with its prompt.

    Raises UserError for what goes wrong with a model or a picture, and for a score that is finite for no picture.
    """
    refuse_equal_names(plan.sources)
    folder = EvaluationFolder(output, plan, [] if scores is None else scores.names)
    results = [_evaluate_model(plan.load(source), plan, scores, distances, folder, progress) for source in plan.sources]
    folder.write_grid()
    metrics = {name: fact for part in (scores, distances) if part is not None for name, fact in part.facts().items()}
    summary = _summarise(plan, results, metrics)
    (output / "summary.json").write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return summary


def _evaluate_model(
    model: LoadedModel,
    plan: EvaluationPlan,
    scores: Scores | None,
    distances: Distances | None,
    folder: EvaluationFolder,
    progress: Progress | None,
) -> ModelResult:
    found: dict[str, list[float]] = {name: [] for name in folder.scores}
    if distances is not None:
        distances.forget_model()
    for addresses in plan.batches():
        prompts = [address.prompt.text for address in addresses]
        pictures = draw(model, prompts, [address.sample for address in addresses], seed=plan.seed)
        values = {} if scores is None else scores(pictures, prompts)
        for name, numbers in values.items():
            found[name] += numbers
        if distances is not None:
            distances.add(pictures)
        folder.add_pictures(model, addresses, pictures, values)
        if progress is not None:
            progress(model.name, addresses[-1].number * plan.images_per_prompt + addresses[-1].image + 1)
    tables = {name: np.array(numbers).reshape(-1, plan.images_per_prompt) for name, numbers in found.items()}
    undefined = {name: _undefined(f"{model.name}: metric {name}", plan, table) for name, table in tables.items()}
    means = {name: _finite_means(table) for name, table in tables.items()}
    folder.add_prompts(model, means)
    return ModelResult(_facts(model), means, undefined, {} if distances is None else distances.result())


def _undefined(name: str, plan: EvaluationPlan, table: np.ndarray) -> int:
    """Count a score's numbers [P, K] that are not finite, with a warning; raise NonFiniteError where all are."""
    bad = ~np.isfinite(table)
    prompts = ", ".join(repr(plan.prompts[number].text) for number in bad.any(1).nonzero()[0][:4])
    said = f"{name} is not finite for {bad.sum()} of {bad.size} pictures, of {bad.any(1).sum()} prompts: {prompts}"
    if bad.all():
        raise NonFiniteError(said)
    if bad.any():
        logger.warning("%s. They are in no mean.", said)
    return int(bad.sum())


def _finite_means(table: np.ndarray) -> np.ndarray:
    """Return the mean of each row's finite numbers, [P, K] -> [P]; NaN where there are none."""
    finite = np.isfinite(table)
    with np.errstate(invalid="ignore"):
        means: np.ndarray = np.where(finite, table, 0.0).sum(1) / finite.sum(1)
    return means


def _facts(model: LoadedModel) -> dict[str, Any]:
    """Return facts that tell a model's pictures from another's."""
    return {
        "name": model.name,
        "origin": model.origin,
        "weights": f"sha256:{model.fingerprint}",
        **model.config.models.generator.call(),
        "precision": model.config.precision,
        "latent_shape": list(model.config.models.latent_shape),
    }


def _summarise(plan: EvaluationPlan, results: Sequence[ModelResult], metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return means with intervals by model and by group, and the differences of every two models, as data for JSON."""
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
                    group: {name: _as_data(estimate(values[own])) for name, values in result.means.items()}
                    for group, own in members.items()
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
    """Return None for NaN, which JSON does not have."""
    return number if math.isfinite(number) else None
