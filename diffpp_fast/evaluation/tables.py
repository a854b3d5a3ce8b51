"""The tables and pictures of an evaluation: in its folder, and on the terminal."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch.nn.functional import pad

from diffpp_fast.errors import ConfigurationError
from diffpp_fast.evaluation.models import LoadedModel
from diffpp_fast.evaluation.pictures import EvaluationPlan, PictureAddress, facts_of
from diffpp_fast.spreadsheet import cell
from diffpp_fast.terminal import printable
from diffpp_fast.training.grids import tile_bytes, write_png
from diffpp_fast.training.lock import LOCK
from diffpp_fast.user_paths import refuse_no_folder

#: Prompts in the picture that shows the models side by side.
GRID_PROMPTS = 8


def refuse_used_folder(folder: Path) -> None:
    """Raise ConfigurationError for an output that holds something already, which would be mixed with new files."""
    refuse_no_folder("--output", folder)
    if folder.is_dir() and any(path.name != LOCK for path in folder.iterdir()):
        raise ConfigurationError(f"--output {folder} holds something already: choose another folder, or empty it")


class EvaluationFolder:
    """Writes an evaluation into a folder; pictures and their rows as they come.

    Args:
        folder: is made.
        plan: the pictures.
        scores: the names of the columns.
    """

    def __init__(self, folder: Path, plan: EvaluationPlan, scores: Sequence[str]) -> None:
        self.folder, self.plan, self.scores = folder, plan, list(scores)
        #: Each model's first pictures of the first prompts.
        self._shown: dict[str, list[torch.Tensor]] = {}
        folder.mkdir(parents=True, exist_ok=True)
        self._write_row("pictures.csv", ["model", "number", "prompt", "group", "image", "sample", *scores], "w")
        self._write_row("prompts.csv", ["model", "number", "prompt", "group", "images", *scores], "w")

    def add_pictures(
        self,
        model: LoadedModel,
        addresses: Sequence[PictureAddress],
        pictures: torch.Tensor,
        values: Mapping[str, Sequence[float]],
    ) -> None:
        """Write a batch: B addresses, pictures uint8 [B, 3, H, W] and B scores for each name."""
        for at, (address, picture) in enumerate(zip(addresses, pictures, strict=True)):
            number, (text, group), image, sample = address
            scored = [_digits(values[name][at]) for name in self.scores]
            self._write_row("pictures.csv", [model.name, number, text, group or "", image, sample, *scored])
            if number < GRID_PROMPTS and image == 0:
                self._shown.setdefault(model.name, []).append(picture)
            if self.plan.keep_images:
                path = self.folder / "images" / model.name / f"{number:06d}_{image}.png"
                write_png(path, picture.permute(1, 2, 0), facts_of(model, text, seed=self.plan.seed, sample=sample))

    def add_prompts(self, model: LoadedModel, means: Mapping[str, np.ndarray]) -> None:
        """Write a model's scores by name, [P] each, means over the pictures of each prompt."""
        for number, (text, group) in enumerate(self.plan.prompts):
            values = [_digits(float(means[name][number])) for name in self.scores]
            row = [model.name, number, text, group or "", self.plan.images_per_prompt, *values]
            self._write_row("prompts.csv", row)

    def write_grid(self) -> None:
        """Write the first prompts in rows, the models in columns; text in the file says which."""
        columns = [torch.stack(pictures) for pictures in self._shown.values()]
        facts = {
            "columns": json.dumps(list(self._shown)),
            "prompts": json.dumps([prompt.text for prompt in self.plan.prompts[:GRID_PROMPTS]], ensure_ascii=False),
            "seed": str(self.plan.seed),
            "first_sample": str(self.plan.first_sample),
        }
        write_png(self.folder / "grid.png", tile_bytes(_side_by_side(columns), columns=len(columns)), facts)

    def _write_row(self, name: str, cells: Sequence[object], mode: str = "a") -> None:
        with (self.folder / name).open(mode, newline="", encoding="utf-8") as file:
            csv.writer(file).writerow([cell(value) for value in cells])


def print_summary(summary: Mapping[str, Any], console: Console) -> None:
    """Print means with intervals by model, also by group where prompts have groups, and differences to the first."""
    models, metrics = summary["models"], summary["metrics"]
    scores, distances = list(models[0]["scores"]), list(models[0]["distances"])
    count, each = summary["prompts"]["count"], summary["images_per_prompt"]
    rows = {
        model["name"]: [*(_estimate(model["scores"][name]) for name in scores),
                        *(_distance(model["distances"][name]) for name in distances)]
        for model in models
    }  # fmt: skip
    title = f"{count} prompts, {each} {'picture' if each == 1 else 'pictures'} each; 95 % intervals"
    _print_table(console, title, [*scores, *distances], rows)
    for group, found in models[0]["groups"].items():
        rows = {model["name"]: [_estimate(model["groups"][group][name]) for name in scores] for model in models}
        prompts = max((int(score["prompts"]) for score in found.values()), default=0)
        _print_table(console, f"of them: {group}, {prompts} prompts", scores, rows)
    first = models[0]["name"]
    rows = {
        found["model"]: [_difference(found["scores"][name]) for name in scores]
        for found in summary["differences"] if found["minus"] == first
    }  # fmt: skip
    if rows and scores:
        title = f"paired difference to {first}; share of prompts with a higher score"
        _print_table(console, title, scores, rows)
    for model in models:
        for name, pictures in model["undefined"].items():
            if pictures:
                said = f"{model['name']}: {name} is not finite for {pictures} pictures, which are in no mean."
                console.print(printable(said))
    for name in [*scores, *distances]:
        facts = metrics[name]
        said = f"{name}: {facts['meaning']}; {facts['better']} is better. Pixels: {facts['preprocessing']}."
        console.print(printable(said))


def _print_table(console: Console, title: str, columns: list[str], rows: Mapping[str, list[str]]) -> None:
    table = Table(title=printable(title), title_justify="left")
    table.add_column("model")
    for column in columns:
        table.add_column(printable(column), justify="right")
    for name, cells in rows.items():
        table.add_row(printable(name), *cells)
    console.print(table)


def _estimate(found: Mapping[str, Any]) -> str:
    if found["high"] is None:
        return "-" if found["mean"] is None else f"{found['mean']:.4g}"
    margin = found["high"] - found["mean"]
    return f"{found['mean']:.4f} ± {margin:.4f}"


def _difference(found: Mapping[str, Any]) -> str:
    share = "-" if found["higher"] is None else f"{found['higher']:.0%}"
    return f"{_estimate(found)}, higher for {share}"


def _distance(found: Mapping[str, float]) -> str:
    return f"{found['value']:.4g}" + (f" (std {found['std']:.2g})" if "std" in found else "")


def _digits(number: float) -> str:
    """Return a number to its last digit, or an empty text where it is not finite."""
    return repr(number) if math.isfinite(number) else ""


def _side_by_side(columns: Sequence[torch.Tensor]) -> torch.Tensor:
    """Put [N, 3, H, W] of each model into one batch, row by row; smaller pictures are filled up with white."""
    height, width = (max(column.shape[side] for column in columns) for side in (2, 3))
    filled = [pad(column, (0, width - column.shape[3], 0, height - column.shape[2]), value=255) for column in columns]
    return torch.stack(filled, 1).flatten(0, 1)
