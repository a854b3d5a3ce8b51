"""The table of plans for 8 to 1,024 GPUs is what the plan says, and the page shows it."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from benchmarks import scale

ROOT = Path(__file__).parent.parent
STEM = ROOT / "benchmarks/results/scale-sdxl-h100"


def recorded() -> list[dict[str, str]]:
    with STEM.with_suffix(".csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_page_shows_the_recorded_table() -> None:
    assert STEM.with_suffix(".md").read_text().strip() in (ROOT / "docs/scale.md").read_text()
    rows = [
        {name: float(row[name]) if name not in ("model", "gpu") else row[name] for name in scale.COLUMNS}
        for row in recorded()
    ]
    header, *body = scale.table(rows).rows
    assert len(body) == len(scale.STAGES) * len(scale.NETWORKS) and len(header) == len(scale.SIZES) + 3
    for row in body:
        assert f"| {' | '.join(row)} |" in STEM.with_suffix(".md").read_text()


@pytest.mark.slow
def test_the_recorded_table_is_what_the_plan_says() -> None:
    rows = scale.rows("sdxl", "h100", 2, 4)
    for row, before in zip(rows, recorded(), strict=True):
        assert {name: str(value) for name, value in row.items()} == {name: before[name] for name in scale.COLUMNS}
