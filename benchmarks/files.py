"""What a benchmark leaves behind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import plot, tables
from benchmarks.csv_file import write_csv
from benchmarks.machine import Provenance
from benchmarks.results import Group


def write_results(
    stem: Path,
    groups: Sequence[Group],
    origin: Provenance,
    device: torch.device,
    page: Path | None = None,
    warm: bool = False,
) -> list[Path]:
    """Writes the results under `stem` with several suffixes, and into the page. Returns the paths."""
    paths = [stem.with_suffix(suffix) for suffix in (".csv", ".md")]
    write_csv(paths[0], groups, origin, device)
    markdown = tables.markdown(groups, origin)
    paths[1].write_text(markdown, encoding="utf-8")
    if plot.available():
        paths.append(stem.with_suffix(".png"))
        plot.write_plot(paths[-1], groups, origin.device_name)
    else:
        print("the plot is left out: matplotlib is not installed, pip install matplotlib brings it")
    if page is not None:
        tables.rewrite_page(page, tables.place_of(device, warm), markdown)
        paths.append(page)
    return paths
