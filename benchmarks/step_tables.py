"""A whole step's results: one row of CSV per provider, batch, update and phase, and tables of what they say."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from benchmarks import tables
from benchmarks.reward import MODELS as LATENTS
from benchmarks.reward import TOWERS, NetworkPlan, sentences
from benchmarks.step import COMMON, OWN, StepOutcome, StepResults, StepRun
from benchmarks.step_providers import PHASES, WHOLE
from benchmarks.tables import Place, Table, dtype_name, figure, loses, milliseconds, shown, threads_name
from benchmarks.timing import Provenance, Timing, restless_sentence

COLUMNS = (
    *("model", "tower", "latent", "dtype", "device", "threads", "provider", "status", "batches", "batch", "update"),
    *("phase", "median_ms", "quartile1_ms", "quartile3_ms", "rounds", "images_per_s", "x_eager", "x_compile"),
    *("operations", "percent_of_matrix_peak", "matrix_operations_per_s", "peak_bytes", "resident_bytes", "launches"),
    *("first_call_s", "gradient_error"),
)
EAGER, COMPILE = "eager", "compile"
TITLES = {"generator": "The generator's update", "fake": "The teaching assistant's update"}
SECTIONS = {COMMON: "All at one batch:", OWN: "Each at the largest batch that fits:"}
HEADER = ("provider", "batch", "ms", "spread %", "images/s", "x eager", "x compile")
MORE = ("% of matrix", "peak MiB")
LEGEND = """\
Medians of interleaved rounds. `x eager` and `x compile` are ratios of images per second: above 1 the row is faster.
`% of matrix` is the unfused step's operations over the time, as a part of what one large matrix product reaches: work
that a provider does twice, or spares, does not count. `peak` is memory beyond what is resident. `first s` is the first
forward and backward pass, compilation included.
"""
Runs = Mapping[str, StepRun]


def write(where: Place, plan: NetworkPlan, results: StepResults, origin: Provenance) -> list[Any]:
    """Write CSV, Markdown and a plot. Return the paths."""
    parts: list[str | Table] = [_facts(plan, results), LEGEND, *step_tables(results), tables.bullets(doubts(results))]
    paths = where.write(list(_rows(plan, results)), COLUMNS, parts, origin)
    runs = _runs(results, COMMON)
    speeds = {name: value for name in runs if (value := faster(runs, EAGER, name, iteration)) is not None}
    if tables.can_plot() and speeds:
        paths.append(where.stem.with_suffix(".png"))
        tables.write_bars(paths[-1], speeds, f"{kind_of(plan)}, images per second of whole iterations over eager")
    return paths


def kind_of(plan: NetworkPlan) -> str:
    """Return the name of these tables' place in the documentation, and of their files."""
    pixels = "" if plan.latent == LATENTS[plan.model].latent else f"-{8 * plan.latent}px"
    return f"{plan.device.type}-{plan.model}{pixels}{'' if plan.lora is None else '-lora'}"


def doubts(results: StepResults) -> list[str]:
    """Say who was wrong, who did not take part, and what casts doubt on the times."""
    spreads = [iteration(run).spread for outcome in results.outcomes for run in outcome.runs.values()]
    return [*sentences(results.outcomes), *restless_sentence(spreads, "rows of the iteration")]


def step_tables(results: StepResults) -> Iterator[Table]:
    """Yield the tables of what has been measured."""
    for role, title in TITLES.items():
        for section, kind in SECTIONS.items():
            if runs := _runs(results, section):
                yield Table(_update_rows(results, runs, role), f"{title}. {kind}")
        if runs := _runs(results, COMMON):
            rows = [
                [name, *(milliseconds(run.timings[role][phase]) for phase in PHASES[role])]
                for name, run in runs.items()
            ]
            yield Table([["provider", *PHASES[role]], *rows], f"{title} at one batch, phase by phase, in ms:")
    for section, kind in SECTIONS.items():
        if runs := _runs(results, section):
            rows = [[*_speeds(runs, name, iteration), _mark(runs, name, iteration)] for name in runs]
            yield Table([[*HEADER, ""], *rows], f"The whole iteration, one update of each. {kind}")


def iteration(run: StepRun) -> Timing:
    """Return the time of both updates of every round together."""
    updates = zip(*(run.timings[role][WHOLE].samples for role in TITLES), strict=True)
    return Timing(tuple(map(sum, updates)))


def of_phase(role: str, phase: str = WHOLE) -> Callable[[StepRun], Timing]:
    return lambda run: run.timings[role][phase]


def faster(runs: Runs, other: str, name: str, timing: Callable[[StepRun], Timing]) -> float | None:
    """Return the images per second over another provider's; None where that was not measured."""
    if other not in runs:
        return None
    base, own = (timing(runs[each]).median / runs[each].batch for each in (other, name))
    return base / own if own else None


def _update_rows(results: StepResults, runs: Runs, role: str) -> list[list[str]]:
    on_cuda = any(run.launches for run in runs.values())
    rows = [[*HEADER, *MORE, *(["launches"] if on_cuda else []), "first s", ""]]
    outcomes = {outcome.provider: outcome for outcome in results.outcomes}
    for name, run in runs.items():
        rows.append(
            [
                *_speeds(runs, name, of_phase(role)),
                f"{100.0 * _share(results, run, role):.1f}",
                f"{run.peak[role] / 2**20:.0f}",
                *([str(run.launches[role])] if on_cuda else ()),
                f"{outcomes[name].first_call[role]:.1f}",
                _mark(runs, name, of_phase(role)),
            ]
        )
    return rows


def _speeds(runs: Runs, name: str, timing: Callable[[StepRun], Timing]) -> list[str]:
    """Return the cells below `HEADER`."""
    run, measured = runs[name], timing(runs[name])
    speed = f"{run.batch / measured.median:#.3g}"
    ratios = (shown(faster(runs, other, name, timing), ".2f") for other in (EAGER, COMPILE))
    return [name, str(run.batch), milliseconds(measured), f"{100.0 * measured.spread:.0f}", speed, *ratios]


def _mark(runs: Runs, name: str, timing: Callable[[StepRun], Timing]) -> str:
    """Mark a row in which fused code loses."""
    ratios = (faster(runs, other, name, timing) for other in (EAGER, COMPILE))
    return tables.SLOWER if name.startswith("fused") and loses(*ratios) else ""


def _facts(plan: NetworkPlan, results: StepResults) -> str:
    asked = {role: f"{counts[WHOLE] * 1e-12:#.3g}" for role, counts in results.operations.items()}
    trained = "" if plan.lora is None else f", LoRA of rank {plan.lora}"
    return (
        f"{plan.model}{trained}: latents of {plan.latent} x {plan.latent}, {dtype_name(plan.dtype)}, "
        f"{threads_name(torch.get_num_threads())}, {TOWERS[plan.device.type].name} as the reward. For one image the "
        f"generator's update asks for {asked['generator']} TFLOP and the teaching assistant's for {asked['fake']}; one "
        f"large matrix product runs at {results.peak_rate * 1e-12:#.3g} TFLOP/s. Weights, gradients, AdamW's moments "
        f"and the average take {results.resident / 2**30:#.3g} GiB.\n"
    )


def _rows(plan: NetworkPlan, results: StepResults) -> Iterator[dict[str, Any]]:
    facts = {
        **{"model": plan.model, "tower": TOWERS[plan.device.type].name, "latent": plan.latent},
        **{"dtype": dtype_name(plan.dtype), "device": plan.device.type, "threads": torch.get_num_threads()},
        **{"matrix_operations_per_s": figure(results.peak_rate), "resident_bytes": results.resident},
    }
    for outcome in results.outcomes:
        row = {**facts, "provider": outcome.provider, "status": outcome.status}
        if not outcome.runs:
            yield row
        for section, run in outcome.runs.items():
            for role, phases in PHASES.items():
                for phase in (WHOLE, *phases):
                    place = {"batches": section, "batch": run.batch, "update": role, "phase": phase}
                    yield {**row, **place, **_figures(results, outcome, section, role, phase)}


def _figures(results: StepResults, outcome: StepOutcome, section: str, role: str, phase: str) -> dict[str, Any]:
    runs, run, timing = _runs(results, section), outcome.runs[section], outcome.runs[section].timings[role][phase]
    figures = {
        **tables.times(timing),
        "operations": f"{run.batch * results.operations[role].get(phase, 0.0):.6g}",
        "x_eager": figure(faster(runs, EAGER, outcome.provider, of_phase(role, phase))),
        "x_compile": figure(faster(runs, COMPILE, outcome.provider, of_phase(role, phase))),
    }
    if phase != WHOLE:
        return figures
    return {
        **figures,
        "images_per_s": figure(run.batch / timing.median),
        "percent_of_matrix_peak": f"{100.0 * _share(results, run, role):.4g}",
        "peak_bytes": run.peak[role],
        "launches": run.launches.get(role),
        "first_call_s": f"{outcome.first_call[role]:.3f}",
        "gradient_error": f"{outcome.errors[f'{role} gradient']:.2e}",
    }


def _runs(results: StepResults, section: str) -> dict[str, StepRun]:
    return {outcome.provider: outcome.runs[section] for outcome in results.outcomes if section in outcome.runs}


def _share(results: StepResults, run: StepRun, role: str) -> float:
    rate = run.batch * results.operations[role][WHOLE] / run.timings[role][WHOLE].median
    return rate / results.peak_rate
