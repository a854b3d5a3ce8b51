"""The reward path's results as CSV, as a table for the terminal and as Markdown."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from benchmarks import tables
from benchmarks.machine import Provenance
from benchmarks.reward_path import MODELS, PHASES, TOWERS, WHOLE, Plan, Record

COLUMNS = (
    "model",
    "tower",
    "batch",
    "latent",
    "dtype",
    "device",
    "threads",
    "provider",
    "status",
    "phase",
    "median_ms",
    "quartile1_ms",
    "quartile3_ms",
    "rounds",
    "x_eager",
    "kept_bytes",
    "kept_bytes_full_size",
    "peak_bytes",
    *Provenance._fields,
)
#: The command that writes these tables.
SUBJECT = "reward"
LEGEND = """\
Medians of interleaved rounds, in ms. `kept` is what the decode keeps for its backward pass, `of eager` its part of
what eager code keeps, `kept, full` the same for one image of {pixels} x {pixels}, counted on fake tensors. `peak` is
the most memory at once of the whole path, beyond parameters, latents and results.
"""


def write(stem: Path, plan: Plan, records: Sequence[Record], origin: Provenance, page: Path | None) -> list[Path]:
    """Writes CSV and Markdown under `stem`, and the Markdown into the page. Returns the paths."""
    paths = [stem.with_suffix(suffix) for suffix in (".csv", ".md")]
    _write_csv(paths[0], plan, records, origin)
    text = markdown(plan, records, origin)
    paths[1].write_text(text, encoding="utf-8")
    if page is not None:
        tables.rewrite_page(page, place_of(plan), text, SUBJECT)
        paths.append(page)
    return paths


def place_of(plan: Plan) -> str:
    """The name of the place of these tables in the documentation, and of their files."""
    own = plan.latent == MODELS[plan.model].latent
    return f"{plan.device.type}-{plan.model}" + ("" if own else f"-latent{plan.latent}")


def text_table(records: Sequence[Record]) -> str:
    """One line per provider."""
    columns = []
    for column in zip(*_rows(records), strict=True):
        width = max(map(len, column))
        columns.append([cell.ljust(width) if column[0] == "provider" else cell.rjust(width) for cell in column])
    return "\n".join("  ".join(row).rstrip() for row in zip(*columns, strict=True))


def markdown(plan: Plan, records: Sequence[Record], origin: Provenance) -> str:
    facts = (
        f"{plan.model}: {plan.batch} latent{'s' * (plan.batch > 1)} of {plan.latent} x {plan.latent}, "
        f"{_dtype(plan)}, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}, "
        f"{TOWERS[plan.device.type].name} as the reward.\n"
    )
    header, *body = _rows(records)
    rule = ["---", *["---:"] * (len(header) - 1)]
    table = "".join(f"| {' | '.join(row)} |\n" for row in (header, rule, *body))
    parts = [tables.origin_line(origin), facts, LEGEND.format(pixels=8 * MODELS[plan.model].latent), table]
    missing = sentences(records)
    if missing:
        parts.append("".join(f"- {sentence}\n" for sentence in missing))
    return "\n".join(parts)


def sentences(records: Sequence[Record]) -> list[str]:
    """Who was wrong, and who did not take part."""
    wrong = [f"{record.provider} is wrong: {record.wrong}" for record in records if record.wrong]
    return wrong + [f"without {record.provider}: {record.left_out}" for record in records if record.left_out]


def _rows(records: Sequence[Record]) -> list[list[str]]:
    eager = next((record for record in records if record.provider == "eager"), None)
    rows = [["provider", *PHASES, WHOLE, "x eager", "kept MiB", "of eager", "kept, full MiB", "peak MiB"]]
    for record in records:
        if not record.timings:
            continue
        ratio = _ratio(eager, record, WHOLE)
        kept = record.kept["decode"]
        rows.append(
            [
                record.provider,
                *(_milliseconds(record, phase) for phase in (*PHASES, WHOLE)),
                "-" if ratio is None else f"{ratio:.2f}",
                f"{kept / 2**20:.1f}",
                "-" if eager is None or not eager.kept else f"{kept / eager.kept['decode']:.1%}",
                "-" if record.kept_whole is None else f"{record.kept_whole / 2**20:.0f}",
                "-" if record.peak is None else f"{record.peak / 2**20:.0f}",
            ]
        )
    return rows


def _write_csv(path: Path, plan: Plan, records: Sequence[Record], origin: Provenance) -> None:
    """One row per provider and phase. What was not measured is empty."""
    eager = next((record for record in records if record.provider == "eager"), None)
    facts = {
        "model": plan.model,
        "tower": TOWERS[plan.device.type].name,
        "batch": plan.batch,
        "latent": plan.latent,
        "dtype": _dtype(plan),
        "device": plan.device.type,
        "threads": torch.get_num_threads(),
    }
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for record in records:
            for phase in (*PHASES, WHOLE) if record.timings else (WHOLE,):
                row = {**facts, "provider": record.provider, "status": _status(record), "phase": phase}
                writer.writerow({**row, **_figures(record, eager, phase), **origin._asdict()})


def _figures(record: Record, eager: Record | None, phase: str) -> Mapping[str, object]:
    if not record.timings:
        return {}
    timing = record.timings[phase]
    low, high = timing.quartiles
    ratio = _ratio(eager, record, phase)
    figures: dict[str, object] = {
        "median_ms": f"{1e3 * timing.median:.5g}",
        "quartile1_ms": f"{1e3 * low:.5g}",
        "quartile3_ms": f"{1e3 * high:.5g}",
        "rounds": len(timing.samples),
        "x_eager": "" if ratio is None else f"{ratio:.5g}",
    }
    if phase == WHOLE:
        whole = sum(record.kept.values())
        return {**figures, "kept_bytes": whole, "peak_bytes": record.peak}
    full = record.kept_whole if phase == "decode" else None
    return {**figures, "kept_bytes": record.kept.get(phase), "kept_bytes_full_size": full}


def _ratio(eager: Record | None, record: Record, phase: str) -> float | None:
    if eager is None or not eager.timings or not record.timings:
        return None
    return eager.timings[phase].median / record.timings[phase].median


def _status(record: Record) -> str:
    if record.wrong is not None:
        return f"wrong: {record.wrong}"
    return "ok" if record.left_out is None else f"left out: {record.left_out}"


def _milliseconds(record: Record, phase: str) -> str:
    value = 1e3 * record.timings[phase].median
    return f"{value:.0f}" if value >= 100.0 else f"{value:#.3g}".rstrip(".")


def _dtype(plan: Plan) -> str:
    return str(plan.dtype).removeprefix("torch.")
