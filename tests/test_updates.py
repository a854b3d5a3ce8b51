"""Launches around the networks in an update: no more than the file of results holds, and fewer than by hand."""

import csv
from pathlib import Path

import pytest

from benchmarks import weight_passes
from benchmarks.updates import CODES, KINDS, OPERATORS, ROLES, count, launches, of_kind

FILE = Path(__file__).parent.parent / "benchmarks/results/updates.csv"
PAGE = FILE.parent.parent.parent / "docs/performance.md"


def recorded(role: str, code: str, kind: str) -> int:
    with FILE.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if (row["update"], row["code"], row["kind"]) == (role, code, kind)]
    return sum(int(row["calls"]) for row in rows)


@pytest.mark.parametrize("role", ROLES)
def test_no_kind_of_call_has_grown(role: str) -> None:
    counts = count(role, "ours")
    for kind in KINDS:
        assert of_kind(counts, kind) <= recorded(role, "ours", kind), f"{kind}: {counts}"
    # A counter that sees nothing would pass.
    assert of_kind(counts, OPERATORS) == recorded(role, "ours", OPERATORS) > 0


@pytest.mark.parametrize("role", ROLES)
def test_there_are_fewer_than_by_hand_with_the_same_metrics(role: str) -> None:
    by_hand, guarded, ours = (count(role, code).total() for code in CODES)
    assert by_hand < guarded and ours < guarded


def test_launches_over_many_tensors() -> None:
    assert launches([1] * 110, 1, "CUDA 12") == 1 and launches([1] * 111, 1, "CUDA 12") == 2
    # 321 blocks; the second launch holds the rest of the first tensor and the other 63.
    assert launches([65536 * 320 + 1, *[1] * 63], 2, "CUDA 12") == 2
    assert launches([65536 * 320 + 1, *[1] * 64], 2, "CUDA 12") == 3
    assert launches([65536 * 320 + 1, *[1] * 64], 2, "CUDA 13") == 1


@pytest.mark.parametrize("role", ROLES)
def test_the_page_shows_what_the_file_holds(role: str) -> None:
    (row,) = (
        line for line in PAGE.read_text().splitlines() if line.startswith(f"| {role} | ") and line.count("|") == 7
    )
    kinds = [[recorded(role, code, kind) for kind in KINDS] for code in CODES]
    by_hand, guarded, ours = map(sum, kinds)
    *_, shown = row.strip("| ").split(" | ")
    assert row.startswith(f"| {role} | {by_hand} | {guarded} | ") and row.endswith(f" | {ours} | {shown} |")
    assert shown == ", ".join(map(str, kinds[-1]))


def test_the_plain_engine_passes_over_memory_as_seldom_as_the_page_says() -> None:
    """The norm reads once; AdamW reads four, and clips what it writes four of; the average reads two and writes one."""
    plain = next(engine for _, engine in weight_passes.engines())
    read, written = weight_passes.count(plain)
    assert (round(read, 2), round(written, 2)) == (7, 5)
    assert f"`plain` {read:.0f} and {written:.0f}" in PAGE.read_text(encoding="utf-8")
