"""An evaluation: every model draws the same prompts at the same latents; pictures are scored as they are drawn."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from diffpp_fast.errors import ConfigurationError
from diffpp_fast.evaluation.distances import Distances
from diffpp_fast.evaluation.intervals import LEVEL, METHOD, PAIRED, Estimate, difference, estimate, preferred
from diffpp_fast.evaluation.metrics import Scores
from diffpp_fast.evaluation.models import Model, Source, refuse_equal_names
from diffpp_fast.evaluation.pictures import draw, facts_of
from diffpp_fast.evaluation.prompts import Prompt
from diffpp_fast.training.grids import tile_bytes, write_png
from diffpp_fast.version import __version__

#: Trainings begin with seed 0: evaluation has another key altogether, so that no training has drawn its latents.
SEED = 20250101
#: Between the sample numbers of a prompt's pictures, so that more of them leave those that were there as they are.
STRIDE = 2**32
#: Prompts in the picture that shows the models side by side.
GRID_PROMPTS = 8


class Place(NamedTuple):
    """A picture to draw: the prompt's number and text, which of its pictures, and the sample number of its latent."""

    number: int
    prompt: Prompt
    image: int
    sample: int

    @property
    def file(self) -> str:
        return f"{self.number:06d}_{self.image}.png"


@dataclass(frozen=True)
class Plan:
    """What is drawn.

    Attributes:
        sources: the models, in the order of the tables; differences are also taken in it.
        prompts, prompt_file: of all models, and where they are from.
        device: of everything.
        images_per_prompt: image k of prompt p has the sample number first_sample + p + k 2^32.
        seed, first_sample: of the latents.
        batch: pictures that are drawn and scored at a time.
        keep_images: write the pictures.
    """

    sources: Sequence[Source]
    prompts: Sequence[Prompt]
    prompt_file: str
    device: torch.device
    images_per_prompt: int = 1
    seed: int = SEED
    first_sample: int = 0
    batch: int = 8
    keep_images: bool = True

    def places(self) -> Iterator[list[Place]]:
        """All pictures of a model, in batches."""
        every = (
            Place(number, prompt, image, self.first_sample + number + image * STRIDE)
            for number, prompt in enumerate(self.prompts)
            for image in range(self.images_per_prompt)
        )
        batch: list[Place] = []
        for place in every:
            batch.append(place)
            if len(batch) == self.batch:
                yield batch
                batch = []
        if batch:
            yield batch


@dataclass(frozen=True)
class Result:
    """What was found out about a model.

    Attributes:
        model: facts about it.
        scores: [P, K] by name: of P prompts with K pictures each.
        distances: by name, facts of each.
    """

    model: dict[str, Any]
    scores: dict[str, np.ndarray]
    distances: dict[str, dict[str, float]]


def evaluate(
    plan: Plan,
    scores: Scores | None,
    distances: Distances | None,
    output: Path,
    progress: Callable[[str, int], None] = lambda name, pictures: None,
) -> dict[str, Any]:
    """Draws, scores and writes; returns what `summary.json` holds.

    Into `output` go `summary.json`, `pictures.csv` with a row for each picture, `prompts.csv` with a row for each
    prompt and model, `grid.png` with the first prompts, and `images/MODEL/` if pictures are kept. One batch of pictures
    is in memory at a time, and one model.

    Args:
        plan: what is drawn.
        scores, distances: what is computed of it; one of them at least.
        output: a folder, which is made.
        progress: is told the model's name and how many pictures of it are done.

    Raises UserError for what goes wrong with a model, a picture or a score.
    """
    refuse_equal_names(plan.sources)
    results, columns = [], []
    names = [] if scores is None else [score.name for score in scores.wanted]
    output.mkdir(parents=True, exist_ok=True)
    with (output / "pictures.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["model", "number", "prompt", "group", "image", "sample", *names])
        for source in plan.sources:
            model = source.load(plan.device)
            result, column = _evaluate_model(model, plan, scores, distances, output, rows, progress)
            results.append(result)
            columns.append(column)
            file.flush()
    _write_prompts(output / "prompts.csv", plan, results, names)
    _write_grid(output / "grid.png", plan, columns)
    summary = _summary(plan, results, scores, distances)
    (output / "summary.json").write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return summary


def refuse_used_folder(folder: Path) -> None:
    """Raises ConfigurationError for an output that holds something, which would be mixed with what comes."""
    if folder.exists() and not folder.is_dir():
        raise ConfigurationError(f"--output {folder}: it is a file; name a folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise ConfigurationError(f"--output {folder} holds something already: choose another folder, or empty it")


def _evaluate_model(
    model: Model,
    plan: Plan,
    scores: Scores | None,
    distances: Distances | None,
    output: Path,
    rows: Any,
    progress: Callable[[str, int], None],
) -> tuple[Result, torch.Tensor]:
    """A model's result, and its first pictures of the first prompts [N, 3, H, W]."""
    with ExitStack() as stack:
        found: dict[str, list[float]] = {} if scores is None else {score.name: [] for score in scores.wanted}
        shown: list[torch.Tensor] = []
        done = 0
        if distances is not None:
            stack.callback(distances.forget_model)
        for places in plan.places():
            texts = [place.prompt.text for place in places]
            pictures = draw(model, texts, [place.sample for place in places], seed=plan.seed)
            values = {} if scores is None else scores(pictures, texts)
            for name, numbers in values.items():
                found[name] += numbers
            if distances is not None:
                distances.add(pictures)
            for at, place in enumerate(places):
                prompt = place.prompt
                scored = [repr(numbers[at]) for numbers in values.values()]
                rows.writerow(
                    [model.name, place.number, prompt.text, prompt.group or "", place.image, place.sample, *scored]
                )
                if place.number < GRID_PROMPTS and place.image == 0:
                    shown.append(pictures[at])
                if plan.keep_images:
                    facts = facts_of(model, prompt.text, seed=plan.seed, sample=place.sample)
                    write_png(output / "images" / model.name / place.file, pictures[at].permute(1, 2, 0), facts)
            done += len(places)
            progress(model.name, done)
        shape = len(plan.prompts), plan.images_per_prompt
        arrays = {name: np.array(numbers).reshape(shape) for name, numbers in found.items()}
        return Result(_model_facts(model), arrays, {} if distances is None else distances.result()), torch.stack(shown)


def _model_facts(model: Model) -> dict[str, Any]:
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


def _write_grid(path: Path, plan: Plan, columns: Sequence[torch.Tensor]) -> None:
    """The first prompts in rows, models in columns; what is what stands in the file."""
    facts = {
        "columns": json.dumps([source.name for source in plan.sources]),
        "prompts": json.dumps([prompt.text for prompt in plan.prompts[: len(columns[0])]], ensure_ascii=False),
        "seed": str(plan.seed),
        "first_sample": str(plan.first_sample),
    }
    write_png(path, tile_bytes(_side_by_side(columns), columns=len(columns)), facts)


def _side_by_side(columns: Sequence[torch.Tensor]) -> torch.Tensor:
    """[N, 3, H, W] of each model -> all, row by row; smaller pictures are filled up with white."""
    height, width = (max(column.shape[side] for column in columns) for side in (2, 3))
    padded = [
        torch.nn.functional.pad(column, (0, width - column.shape[3], 0, height - column.shape[2]), value=255)
        for column in columns
    ]
    return torch.stack(padded, 1).flatten(0, 1)


def _write_prompts(path: Path, plan: Plan, results: Sequence[Result], names: Sequence[str]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["model", "number", "prompt", "group", "images", *names])
        for result in results:
            means = [result.scores[name].mean(1).tolist() for name in names]
            for number, prompt in enumerate(plan.prompts):
                values = [repr(column[number]) for column in means]
                start = [result.model["name"], number, prompt.text, prompt.group or "", plan.images_per_prompt]
                rows.writerow([*start, *values])


def _summary(
    plan: Plan, results: Sequence[Result], scores: Scores | None, distances: Distances | None
) -> dict[str, Any]:
    groups = list(dict.fromkeys(prompt.group for prompt in plan.prompts if prompt.group is not None))
    members = {group: np.array([prompt.group == group for prompt in plan.prompts]) for group in groups}
    metrics = {**({} if scores is None else scores.facts()), **({} if distances is None else distances.facts())}
    return {
        "diffpp_fast": __version__,
        "prompts": {"from": plan.prompt_file, "count": len(plan.prompts)},
        "images_per_prompt": plan.images_per_prompt,
        "seed": plan.seed,
        "first_sample": plan.first_sample,
        "batch": plan.batch,
        "device": str(plan.device),
        "interval": {"level": LEVEL, "method": METHOD, "differences": PAIRED},
        "metrics": metrics,
        "models": [
            {
                **result.model,
                "scores": {name: _as_data(estimate(values.mean(1))) for name, values in result.scores.items()},
                "groups": {
                    group: {name: _as_data(estimate(values[of].mean(1))) for name, values in result.scores.items()}
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
                        **_as_data(difference(values.mean(1), baseline.scores[name].mean(1))),
                        "higher": preferred(values.mean(1), baseline.scores[name].mean(1)),
                    }
                    for name, values in result.scores.items()
                },
            }
            for baseline, result in combinations(results, 2)
        ],
    }


def _as_data(found: Estimate) -> dict[str, float | int | None]:
    """JSON has no NaN: what one value does not tell is null."""
    single = found.count == 1
    return {
        "mean": found.mean,
        "low": None if single else found.mean - found.margin,
        "high": None if single else found.mean + found.margin,
        "std": None if single else found.std,
        "prompts": found.count,
    }
