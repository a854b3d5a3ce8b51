"""An evaluation: every model draws the same prompts at the same latents; pictures are scored as they are drawn."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from diffpp_fast.errors import NonFiniteError
from diffpp_fast.evaluation.distances import Distances
from diffpp_fast.evaluation.files import Files
from diffpp_fast.evaluation.metrics import Scores
from diffpp_fast.evaluation.models import Model, refuse_equal_names
from diffpp_fast.evaluation.pictures import draw
from diffpp_fast.evaluation.plan import Plan
from diffpp_fast.evaluation.summary import Result, facts_about, summarise

logger = logging.getLogger(__name__)

#: Is told a model's name, and how many of its pictures are done.
Progress = Callable[[str, int], None]


def evaluate(
    plan: Plan, scores: Scores | None, distances: Distances | None, output: Path, progress: Progress | None = None
) -> dict[str, Any]:
    """Draws, scores and writes; returns what `summary.json` holds.

    Into `output` go `summary.json`, `pictures.csv` with a row for each picture, `prompts.csv` with a row for each
    prompt and model, `grid.png` with the first prompts, and `images/MODEL/` if pictures are kept. One batch of pictures
    is in memory at a time, and one model.

    Args:
        plan: what is drawn.
        scores, distances: what is computed of it; one of them at least.
        output: a folder, which is made.

    A score that is not finite is in no mean, and is told with its prompt.

    Raises UserError for what goes wrong with a model or a picture, and for a score that is finite for no picture.
    """
    refuse_equal_names(plan.sources)
    files = Files(output, plan, [] if scores is None else scores.names)
    results = []
    for source in plan.sources:
        model = source.load(plan.device)
        results.append(_evaluate_model(model, plan, scores, distances, files, progress))
    files.write_grid()
    metrics = {name: fact for part in (scores, distances) if part is not None for name, fact in part.facts().items()}
    summary = summarise(plan, results, metrics)
    (output / "summary.json").write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return summary


def _evaluate_model(
    model: Model,
    plan: Plan,
    scores: Scores | None,
    distances: Distances | None,
    files: Files,
    progress: Progress | None,
) -> Result:
    found: dict[str, list[float]] = {name: [] for name in files.scores}
    if distances is not None:
        distances.forget_model()
    for places in plan.batches():
        prompts = [place.prompt.text for place in places]
        pictures = draw(model, prompts, [place.sample for place in places], seed=plan.seed)
        values = {} if scores is None else scores(pictures, prompts)
        for name, numbers in values.items():
            found[name] += numbers
        if distances is not None:
            distances.add(pictures)
        files.add_pictures(model, places, pictures, values)
        if progress is not None:
            progress(model.name, places[-1].number * plan.images_per_prompt + places[-1].image + 1)
    shape = len(plan.prompts), plan.images_per_prompt
    tables = {name: np.array(numbers).reshape(shape) for name, numbers in found.items()}
    undefined = {name: _undefined(f"{model.name}: metric {name}", plan, table) for name, table in tables.items()}
    means = {name: _finite_means(table) for name, table in tables.items()}
    files.add_prompts(model, means)
    return Result(facts_about(model), means, undefined, {} if distances is None else distances.result())


def _undefined(name: str, plan: Plan, table: np.ndarray) -> int:
    """How many of a score's numbers [P, K] are not finite, with a warning; raises NonFiniteError where all are."""
    bad = ~np.isfinite(table)
    prompts = ", ".join(repr(plan.prompts[number].text) for number in bad.any(1).nonzero()[0][:4])
    said = f"{name} is not finite for {bad.sum()} of {bad.size} pictures, of {bad.any(1).sum()} prompts: {prompts}"
    if bad.all():
        raise NonFiniteError(said)
    if bad.any():
        logger.warning("%s. They are in no mean.", said)
    return int(bad.sum())


def _finite_means(table: np.ndarray) -> np.ndarray:
    """[P, K] -> [P], of each row's finite numbers; NaN where there are none."""
    finite = np.isfinite(table)
    with np.errstate(invalid="ignore"):
        means: np.ndarray = np.where(finite, table, 0.0).sum(1) / finite.sum(1)
    return means
