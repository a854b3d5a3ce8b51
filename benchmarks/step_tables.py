"""A whole step's results as CSV, as tables for the terminal and as Markdown."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from benchmarks import phases, plot, tables
from benchmarks.machine import Provenance
from benchmarks.phases import PHASES, WHOLE
from benchmarks.reward_path import TOWERS
from benchmarks.step import COMMON, OWN, Plan, Record, Results, Run
from benchmarks.timing import Timing
from diffpp_fast.spreadsheet import cells

COLUMNS = (
    "model",
    "tower",
    "latent",
    "dtype",
    "device",
    "threads",
    "provider",
    "status",
    "batches",
    "batch",
    "update",
    "phase",
    "median_ms",
    "quartile1_ms",
    "quartile3_ms",
    "rounds",
    "images_per_s",
    "x_eager",
    "x_compile",
    "operations",
    "percent_of_matrix_peak",
    "matrix_operations_per_s",
    "peak_bytes",
    "resident_bytes",
    "launches",
    "first_call_s",
    "gradient_error",
    *Provenance._fields,
)
#: The command that writes these tables.
SUBJECT = "step"
#: A spread of the times that casts doubt on a row.
RESTLESS = 0.25
EAGER, COMPILE = "eager", "compile"
TITLES = {"generator": "The generator's update", "fake": "The teaching assistant's update"}
SECTIONS = {COMMON: "All at one batch:", OWN: "Each at the largest batch that fits:"}
HEADER = ("provider", "batch", "ms", "spread %", "images/s", "x eager", "x compile", "% of matrix", "peak MiB")
#: On CUDA, further; then the first call and the mark of a row in which fused code loses.
CUDA_HEADER = ("launches",)
LAST_HEADER = ("first s", "")
LEGEND = """\
Medians of interleaved rounds. `x eager` and `x compile` are ratios of images per second: above 1 the row is faster.
`% of matrix` is the unfused step's operations over the time, as a part of what one large matrix product reaches: work
that a provider does twice, or spares, does not count. `peak` is memory beyond what is resident. `first s` is the first
forward and backward pass, compilation included.
"""


def write(stem: Path, plan: Plan, results: Results, origin: Provenance, page: Path | None) -> list[Path]:
    """Write CSV, Markdown and a plot under `stem`, and the Markdown into the page. Return the paths."""
    paths = [stem.with_suffix(suffix) for suffix in (".csv", ".md")]
    _write_csv(paths[0], plan, results, origin)
    text = markdown(plan, results, origin)
    paths[1].write_text(text, encoding="utf-8")
    runs = _runs(results, COMMON)
    speeds = {name: iteration_ratio(runs, EAGER, name) for name in runs}
    shown = {name: ratio for name, ratio in speeds.items() if ratio is not None}
    if plot.available() and shown:
        paths.append(stem.with_suffix(".png"))
        plot.write_bars(paths[-1], shown, f"{place_of(plan)}, images per second of whole iterations over eager")
    if page is not None:
        tables.rewrite_page(page, place_of(plan), text, SUBJECT)
        paths.append(page)
    return paths


def place_of(plan: Plan) -> str:
    """The name of the place of these tables in the documentation, and of their files."""
    return f"{plan.device.type}-{plan.model}"


def text(results: Results) -> str:
    """The tables for a terminal."""
    parts = []
    for title, rows in _tables(results):
        columns = []
        for column in zip(*rows, strict=True):
            width = max(map(len, column))
            columns.append([cell.ljust(width) if column[0] == "provider" else cell.rjust(width) for cell in column])
        parts.append("\n".join([title, *("  ".join(row).rstrip() for row in zip(*columns, strict=True))]))
    return "\n\n".join(parts)


def markdown(plan: Plan, results: Results, origin: Provenance) -> str:
    parts = [tables.origin_line(origin), _facts(plan, results), LEGEND]
    for title, (header, *body) in _tables(results):
        rule = ["---" if name in ("provider", "") else "---:" for name in header]
        table = "".join(f"| {' | '.join(row)} |\n" for row in (header, rule, *body))
        parts.append(f"{title}\n\n{table}")
    missing = sentences(results)
    if missing:
        parts.append("".join(f"- {sentence}\n" for sentence in missing))
    return "\n".join(parts)


def sentences(results: Results) -> list[str]:
    """Who was wrong, and who did not take part."""
    wrong = [f"{record.provider} is wrong: {record.wrong}" for record in results.records if record.wrong]
    absent = [f"without {record.provider}: {record.left_out}" for record in results.records if record.left_out]
    return [*wrong, *absent, *_restless(results)]


def _restless(results: Results) -> list[str]:
    """Say what casts doubt on the times: a spread of the rounds."""
    spreads = [iteration(run).spread for record in results.records for run in record.runs.values()]
    restless = sum(spread > RESTLESS for spread in spreads)
    if not restless:
        return []
    return [
        f"{restless} of {len(spreads)} rows of the iteration have an interquartile range above {RESTLESS:.0%} of the "
        "median: the machine was busy, measure again"
    ]


def _facts(plan: Plan, results: Results) -> str:
    threads = torch.get_num_threads()
    asked = {role: f"{counts[WHOLE] * 1e-12:#.3g}" for role, counts in results.operations.items()}
    return (
        f"{plan.model}: latents of {plan.latent} x {plan.latent}, {_dtype(plan)}, "
        f"{threads} thread{'s' * (threads > 1)}, {TOWERS[plan.device.type].name} as the reward. For one image the "
        f"generator's update asks for {asked['generator']} TFLOP and the teaching assistant's for {asked['fake']}; one "
        f"large matrix product runs at {results.peak_rate * 1e-12:#.3g} TFLOP/s. Weights, gradients, AdamW's moments "
        f"and the average take {results.resident / 2**30:#.3g} GiB.\n"
    )


def _tables(results: Results) -> Iterator[tuple[str, list[list[str]]]]:
    """Titles, and rows with a header; of what has been measured."""
    for role, title in TITLES.items():
        for section, kind in SECTIONS.items():
            rows = list(_rows(results, role, section))
            if len(rows) > 1:
                yield f"{title}. {kind}", rows
        rows = list(_phase_rows(results, role))
        if len(rows) > 1:
            yield f"{title} at one batch, phase by phase, in ms:", rows
    for section, kind in SECTIONS.items():
        rows = list(_iteration_rows(results, section))
        if len(rows) > 1:
            yield f"The whole iteration, one update of each. {kind}", rows


def _rows(results: Results, role: str, section: str) -> Iterator[list[str]]:
    runs = _runs(results, section)
    on_cuda = any(run.launches for run in runs.values())
    yield [*HEADER, *(CUDA_HEADER if on_cuda else ()), *LAST_HEADER]
    for name, run in runs.items():
        record, timing = _record(results, name), run.timings[role][WHOLE]
        ratios = [_ratio(runs, other, name, role, WHOLE) for other in (EAGER, COMPILE)]
        loses = name.startswith("fused") and any(ratio is not None and ratio < 1.0 for ratio in ratios)
        yield [
            name,
            str(run.batch),
            _milliseconds(timing.median),
            f"{100.0 * timing.spread:.0f}",
            f"{run.batch / timing.median:#.3g}",
            *("-" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
            f"{100.0 * _share(results, run, role):.1f}",
            f"{run.peak[role] / 2**20:.0f}",
            *([str(run.launches[role])] if on_cuda else ()),
            f"{record.first_call[role]:.1f}",
            tables.SLOWER if loses else "",
        ]


def _iteration_rows(results: Results, section: str) -> Iterator[list[str]]:
    runs = _runs(results, section)
    yield [*HEADER[: HEADER.index("x compile") + 1], ""]
    for name, run in runs.items():
        timing = iteration(run)
        ratios = [iteration_ratio(runs, other, name) for other in (EAGER, COMPILE)]
        loses = name.startswith("fused") and any(ratio is not None and ratio < 1.0 for ratio in ratios)
        yield [
            name,
            str(run.batch),
            _milliseconds(timing.median),
            f"{100.0 * timing.spread:.0f}",
            f"{run.batch / timing.median:#.3g}",
            *("-" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
            tables.SLOWER if loses else "",
        ]


def iteration(run: Run) -> Timing:
    """Both updates of every round together."""
    updates = zip(*(run.timings[role][WHOLE].samples for role in TITLES), strict=True)
    return Timing(tuple(map(sum, updates)), 1)


def iteration_ratio(runs: Mapping[str, Run], other: str, name: str) -> float | None:
    """Images per second of whole iterations over another provider's."""
    if other not in runs:
        return None
    seconds = [iteration(runs[each]).median / runs[each].batch for each in (other, name)]
    return seconds[0] / seconds[1] if seconds[1] else None


def _phase_rows(results: Results, role: str) -> Iterator[list[str]]:
    yield ["provider", *PHASES[role]]
    for name, run in _runs(results, COMMON).items():
        yield [name, *(_milliseconds(run.timings[role][phase].median) for phase in PHASES[role])]


def _write_csv(path: Path, plan: Plan, results: Results, origin: Provenance) -> None:
    """One row per provider, batch, update and phase. What was not measured is empty."""
    facts = {
        "model": plan.model,
        "tower": TOWERS[plan.device.type].name,
        "latent": plan.latent,
        "dtype": _dtype(plan),
        "device": plan.device.type,
        "threads": torch.get_num_threads(),
        "matrix_operations_per_s": f"{results.peak_rate:.5g}",
        "resident_bytes": results.resident,
    }
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for record in results.records:
            row = {**facts, "provider": record.provider, "status": _status(record)}
            for section, run in record.runs.items():
                for role, phase in phases.every_phase():
                    place = {"batches": section, "batch": run.batch, "update": role, "phase": phase}
                    figures = _figures(results, record, section, role, phase)
                    writer.writerow(cells({**row, **place, **figures, **origin._asdict()}))
            if not record.runs:
                writer.writerow(cells({**row, **origin._asdict()}))


def _figures(results: Results, record: Record, section: str, role: str, phase: str) -> Mapping[str, object]:
    runs, run = _runs(results, section), record.runs[section]
    timing = run.timings[role][phase]
    low, high = timing.quartiles
    figures: dict[str, object] = {
        "median_ms": f"{1e3 * timing.median:.5g}",
        "quartile1_ms": f"{1e3 * low:.5g}",
        "quartile3_ms": f"{1e3 * high:.5g}",
        "rounds": len(timing.samples),
        "operations": f"{run.batch * results.operations[role].get(phase, 0.0):.6g}",
    }
    for column, other in (("x_eager", EAGER), ("x_compile", COMPILE)):
        ratio = _ratio(runs, other, record.provider, role, phase)
        figures[column] = "" if ratio is None else f"{ratio:.5g}"
    if phase != WHOLE:
        return figures
    return {
        **figures,
        "images_per_s": f"{run.batch / timing.median:.5g}",
        "percent_of_matrix_peak": f"{100.0 * _share(results, run, role):.4g}",
        "peak_bytes": run.peak[role],
        "launches": run.launches.get(role),
        "first_call_s": f"{record.first_call[role]:.3f}",
        "gradient_error": f"{record.errors[f'{role} gradient']:.2e}",
    }


def _runs(results: Results, section: str) -> dict[str, Run]:
    return {record.provider: record.runs[section] for record in results.records if section in record.runs}


def _record(results: Results, name: str) -> Record:
    return next(record for record in results.records if record.provider == name)


def _ratio(runs: Mapping[str, Run], other: str, name: str, role: str, phase: str) -> float | None:
    """Images per second over another provider's."""
    if other not in runs:
        return None
    seconds = [runs[each].timings[role][phase].median / runs[each].batch for each in (other, name)]
    return seconds[0] / seconds[1] if seconds[1] else None


def _share(results: Results, run: Run, role: str) -> float:
    rate = run.batch * results.operations[role][WHOLE] / run.timings[role][WHOLE].median
    return rate / results.peak_rate


def _status(record: Record) -> str:
    if record.wrong is not None:
        return f"wrong: {record.wrong}"
    return "ok" if record.left_out is None else f"left out: {record.left_out}"


def _milliseconds(seconds: float) -> str:
    value = 1e3 * seconds
    return f"{value:.0f}" if value >= 100.0 else f"{value:#.3g}".rstrip(".")


def _dtype(plan: Plan) -> str:
    return str(plan.dtype).removeprefix("torch.")
