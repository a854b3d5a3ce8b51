"""Sample grids before and after, cut into their pictures so that each stands with its prompt."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import NamedTuple

from PIL import Image

from diffpp_fast.report.runs import GridFile, RunRecord
from diffpp_fast.training.layout import columns_of

#: Prompts on the page; a grid may have more.
MOST_PROMPTS = 32
#: Larger pictures are shown with this side, in pixels; those up to the second are shown without loss.
MOST_PIXELS, EXACT_PIXELS = 256, 128
JPEG_QUALITY = 90
#: The PNG beside the page: how many prompts; inches of a picture, of the names at the left and of the prompts at the
#: top; letters of a prompt in a line.
PNG_PROMPTS, PNG_CELL, PNG_LEFT, PNG_TOP, PNG_LETTERS = 12, 1.1, 0.5, 0.45, 20


class GridColumn(NamedTuple):
    """Pictures of one grid, in the order of the prompts.

    Attributes:
        run: the run's name; "" where there is one run, or all share the grid.
        place: the run's place in the report; None in these cases.
        step: the generator's.
        pictures: one per prompt.
    """

    run: str
    place: int | None
    step: int
    pictures: list[Image.Image]


class Sheet(NamedTuple):
    """Grids with the same prompts side by side: the first of the runs, then the last of each."""

    prompts: tuple[str, ...]
    columns: list[GridColumn]


def sheets_of(runs: Sequence[RunRecord]) -> list[Sheet]:
    """Return the first and the last grid of every run that has any; runs with other prompts have a sheet of their own.

    A note is added to a run of which a grid is left out.
    """
    by_prompts: dict[tuple[str, ...], list[list[GridColumn]]] = {}
    for place, run in enumerate(runs):
        known = [grid for grid in run.grids if grid.prompts is not None]
        if len(known) < len(run.grids):
            run.notes.append(f"sample grids without prompts in environment.json: {len(run.grids) - len(known)}")
        # From both ends: only a grid that can't be shown makes the one behind it looked at.
        first = _first_cut(known, run.notes)
        if first is None:
            continue
        last = _first_cut(known[::-1], run.notes) or first
        ends = [last] if first[0] == last[0] else [first, last]
        if first[0].prompts != last[0].prompts:
            run.notes.append(f"{first[0].path.name} is left out: its prompts are not those of {last[0].path.name}")
            ends = [last]
        several = len(runs) > 1
        columns = [
            GridColumn(run.name if several else "", place if several else None, grid.step, pictures)
            for grid, pictures in ends
        ]
        by_prompts.setdefault(last[0].prompts or (), []).append(columns)
    return [Sheet(prompts, _side_by_side(found)) for prompts, found in by_prompts.items()]


def compress(picture: Image.Image) -> tuple[str, bytes]:
    """Return the picture as it stands on the page: the type of a file, and its bytes."""
    kind = "png" if max(picture.size) <= EXACT_PIXELS else "jpeg"
    if max(picture.size) > MOST_PIXELS:
        picture = picture.copy()
        picture.thumbnail((MOST_PIXELS, MOST_PIXELS), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.save(file, kind, quality=JPEG_QUALITY)
    return f"image/{kind}", file.getvalue()


def write_png(path: Path, sheet: Sheet) -> None:
    """Write the first few prompts' pictures: one row per grid, one column per prompt."""
    import matplotlib
    from matplotlib.figure import Figure

    shown, rows = min(PNG_PROMPTS, len(sheet.prompts)), len(sheet.columns)
    width, height = PNG_CELL * shown + PNG_LEFT, PNG_CELL * rows + PNG_TOP
    with matplotlib.rc_context({"text.parse_math": False}):
        figure = Figure(figsize=(width, height))
        figure.subplots_adjust(PNG_LEFT / width, 0.02, 0.99, 1 - PNG_TOP / height, wspace=0.08, hspace=0.08)
        grid = figure.subplots(rows, shown, squeeze=False, subplot_kw={"xticks": [], "yticks": [], "frame_on": False})
        for axis, prompt in zip(grid[0], sheet.prompts, strict=False):
            axis.set_title(fill(prompt, PNG_LETTERS, max_lines=3), fontsize=6)
        for axes, column in zip(grid, sheet.columns, strict=True):
            axes[0].set_ylabel(f"{column.run}\nstep {column.step}".strip(), fontsize=7)
            for axis, picture in zip(axes, column.pictures, strict=False):
                axis.imshow(picture)
        figure.savefig(path, dpi=150)


def _first_cut(grids: Sequence[GridFile], notes: list[str]) -> tuple[GridFile, list[Image.Image]] | None:
    """Return the first grid that can be shown, and its pictures."""
    for grid in grids:
        pictures = _cut(grid, grid.prompts or (), notes)
        if pictures is not None:
            return grid, pictures
    return None


def _cut(grid: GridFile, prompts: Sequence[str], notes: list[str]) -> list[Image.Image] | None:
    """Return the grid's pictures, row by row; None, with a note, where it can't be cut."""
    try:
        with Image.open(grid.path) as opened:
            image = opened.convert("RGB")
    except OSError as error:
        notes.append(f"{grid.path.name} is left out: {error}")
        return None
    columns = columns_of(len(prompts))
    rows = -(-len(prompts) // columns)
    if image.width % columns or image.height % rows:
        notes.append(f"{grid.path.name} is left out: {image.width} x {image.height} is no grid of its prompts")
        return None
    width, height = image.width // columns, image.height // rows
    corners = [(place % columns * width, place // columns * height) for place in range(len(prompts))]
    return [image.crop((left, top, left + width, top + height)) for left, top in corners]


def _side_by_side(runs: Sequence[Sequence[GridColumn]]) -> list[GridColumn]:
    """Return the first grids, one where they are the same in all runs, and then the last ones."""
    first = [columns[0] for columns in runs if len(columns) > 1]
    last = [columns[-1] for columns in runs]
    bytes_of = [[picture.tobytes() for picture in column.pictures] for column in first]
    if len(first) > 1 and all(one == bytes_of[0] for one in bytes_of):
        first = [first[0]._replace(run="", place=None)]
    return [*first, *last]
