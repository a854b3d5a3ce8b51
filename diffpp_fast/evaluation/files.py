"""The folder of an evaluation: tables as CSV, pictures, and the first of them side by side."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import pad

from diffpp_fast.errors import ConfigurationError
from diffpp_fast.evaluation.models import Model
from diffpp_fast.evaluation.pictures import facts_of
from diffpp_fast.evaluation.plan import Place, Plan
from diffpp_fast.spreadsheet import cell
from diffpp_fast.training.grids import tile_bytes, write_png
from diffpp_fast.training.lock import LOCK

#: Prompts in the picture that shows the models side by side.
GRID_PROMPTS = 8


def refuse_used_folder(folder: Path) -> None:
    """Raises ConfigurationError for an output that holds something, which would be mixed with what comes."""
    if folder.exists() and not folder.is_dir():
        raise ConfigurationError(f"--output {folder}: it is a file; name a folder")
    if folder.is_dir() and any(path.name != LOCK for path in folder.iterdir()):
        raise ConfigurationError(f"--output {folder} holds something already: choose another folder, or empty it")


class Files:
    """Writes an evaluation into a folder; pictures and their rows as they come.

    Args:
        folder: is made.
        plan: what is drawn.
        scores: names of the columns.
    """

    def __init__(self, folder: Path, plan: Plan, scores: Sequence[str]) -> None:
        self.folder, self.plan, self.scores = folder, plan, list(scores)
        #: Each model's first pictures of the first prompts.
        self._shown: dict[str, list[torch.Tensor]] = {}
        folder.mkdir(parents=True, exist_ok=True)
        self._write_row("pictures.csv", ["model", "number", "prompt", "group", "image", "sample", *scores], "w")
        self._write_row("prompts.csv", ["model", "number", "prompt", "group", "images", *scores], "w")

    def add_pictures(
        self, model: Model, places: Sequence[Place], pictures: torch.Tensor, values: Mapping[str, Sequence[float]]
    ) -> None:
        """A batch: B places, pictures uint8 [B, 3, H, W] and B scores for each name."""
        for at, (place, picture) in enumerate(zip(places, pictures, strict=True)):
            text, group = place.prompt.text, place.prompt.group or ""
            scored = [_cell(values[name][at]) for name in self.scores]
            self._write_row("pictures.csv", [model.name, place.number, text, group, place.image, place.sample, *scored])
            if place.number < GRID_PROMPTS and place.image == 0:
                self._shown.setdefault(model.name, []).append(picture)
            if self.plan.keep_images:
                path = self.folder / "images" / model.name / f"{place.number:06d}_{place.image}.png"
                facts = facts_of(model, text, seed=self.plan.seed, sample=place.sample)
                write_png(path, picture.permute(1, 2, 0), facts)

    def add_prompts(self, model: Model, means: Mapping[str, np.ndarray]) -> None:
        """A model's scores by name, [P] each, means over the pictures of each prompt."""
        for number, prompt in enumerate(self.plan.prompts):
            values = [_cell(float(means[name][number])) for name in self.scores]
            facts = [model.name, number, prompt.text, prompt.group or "", self.plan.images_per_prompt]
            self._write_row("prompts.csv", [*facts, *values])

    def write_grid(self) -> None:
        """The first prompts in rows, the models in columns; text in the file says which."""
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


def _cell(number: float) -> str:
    """A number to its last digit; nothing where there is none."""
    return repr(number) if math.isfinite(number) else ""


def _side_by_side(columns: Sequence[torch.Tensor]) -> torch.Tensor:
    """[N, 3, H, W] of each model -> all, row by row; smaller pictures are filled up with white."""
    height, width = (max(column.shape[side] for column in columns) for side in (2, 3))
    filled = [pad(column, (0, width - column.shape[3], 0, height - column.shape[2]), value=255) for column in columns]
    return torch.stack(filled, 1).flatten(0, 1)
