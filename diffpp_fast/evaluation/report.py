"""The tables of an evaluation on the terminal, out of what `summary.json` holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from diffpp_fast.terminal import printable


def print_summary(summary: Mapping[str, Any], console: Console) -> None:
    """Means with intervals, by model; by group where prompts have groups; differences to the first model."""
    models, metrics = summary["models"], summary["metrics"]
    scores = list(models[0]["scores"])
    distances = list(models[0]["distances"])
    count, each = summary["prompts"]["count"], summary["images_per_prompt"]
    title = f"{count} prompts, {each} {'picture' if each == 1 else 'pictures'} each; 95 % intervals"
    rows = {
        model["name"]: [*(_estimate(model["scores"][name]) for name in scores),
                        *(_distance(model["distances"][name]) for name in distances)]
        for model in models
    }  # fmt: skip
    _print(console, title, "model", [*scores, *distances], rows)
    for group, found in models[0]["groups"].items():
        cells = {model["name"]: [_estimate(model["groups"][group][name]) for name in scores] for model in models}
        _print(console, f"of them: {group}, {_prompts(found)} prompts", "model", scores, cells)
    first = models[0]["name"]
    differences = [found for found in summary["differences"] if found["minus"] == first]
    if differences and scores:
        difference_rows = {
            found["model"]: [
                f"{_estimate(found['scores'][name])}, higher for {_share(found['scores'][name]['higher'])}"
                for name in scores
            ]
            for found in differences
        }
        _print(console, f"paired difference to {first}; share of prompts with a higher score", "model", scores,
               difference_rows)  # fmt: skip
    for model in models:
        for name, pictures in model["undefined"].items():
            if pictures:
                said = f"{model['name']}: {name} is not finite for {pictures} pictures, which are in no mean."
                console.print(printable(said))
    for name in [*scores, *distances]:
        facts = metrics[name]
        said = f"{name}: {facts['meaning']}; {facts['better']} is better. Pixels: {facts['preprocessing']}."
        console.print(printable(said))


def _print(console: Console, title: str, corner: str, columns: list[str], rows: Mapping[str, list[str]]) -> None:
    table = Table(title=printable(title), title_justify="left")
    table.add_column(corner)
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


def _distance(found: Mapping[str, float]) -> str:
    return f"{found['value']:.4g}" + (f" (std {found['std']:.2g})" if "std" in found else "")


def _prompts(scores: Mapping[str, Any]) -> int:
    return max((int(found["prompts"]) for found in scores.values()), default=0)


def _share(found: float | None) -> str:
    return "-" if found is None else f"{found:.0%}"
