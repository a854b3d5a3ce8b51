"""The frontier of alignment: reward against divergence from the reference, over the reward's scale, and DIDR beside it.

    python examples/emoji/frontier.py --out runs/frontier

Runs of align.yaml, two side by side: for every seed every scale of SCALES, then DIDR at its own scales (DIDR_SCALES).
Writes frontier.csv (a line for each run), frontier.png (rewards over the divergence) and frontier_pictures.png (the
same captions and latents at every scale). What was trained already is taken over, so that a stopped call goes on.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from common import fastest_precision
from evaluation import Measured, evaluate, win_rate
from matplotlib.ticker import FixedLocator, NullFormatter, ScalarFormatter
from rewards import captions

from diffpp_fast.cli.quiet import hide_loading_bars, silence_libraries
from diffpp_fast.training.export import find_weights, load_sampler
from diffpp_fast.training.grids import tile
from diffpp_fast.training.loading import load_config

HERE = Path(__file__).parent
CONFIG = HERE / "align.yaml"
#: Norm of the reward's gradient over the score gap's: 0, 1, 4, 15, and a reward that is alone.
SCALES = (0.0, 5.0, 20.0, 80.0, 20000.0)
DIDR_SCALES = (2.0, 80.0)
SEEDS = (0, 1, 2)
#: Every fourth caption, one picture each.
PROMPTS = captions()[1::4]
METHODS = {"diff_instruct_pp": "Diff-Instruct++", "didr": "DIDR"}
COLUMNS = (
    "method", "scale", "seed", "steps", "score_gap", "optimised", "held_out", "win_rate", "own_first",
    "spread", "edges", "saturation",
)  # fmt: skip


class Point(NamedTuple):
    """One run of the frontier."""

    method: str
    scale: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method}-{self.scale:g}-{self.seed}"


def points(seeds: Sequence[int]) -> Iterator[Point]:
    """Yield all runs, seed by seed, that without reward first: the others are compared with it."""
    for seed in seeds:
        yield from (Point("diff_instruct_pp", scale, seed) for scale in SCALES)
        yield from (Point("didr", scale, seed) for scale in DIDR_SCALES)


def train(point: Point, out: Path, overrides: list[str]) -> None:
    """Train one run, unless it is there; its progress goes to a file beside its folder."""
    folder = out / point.name
    if (folder / "trained").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "diffpp_fast", "train", str(CONFIG), f"output={folder}", f"seed={point.seed}"]
    command += [f"method.name={point.method}", f"rewards.optimised.scale={point.scale}", *overrides]
    command += ["training.threads=1"]
    with (out / f"{point.name}.log").open("w", encoding="utf-8") as log:
        subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=log, stderr=log, check=True)
    (folder / "trained").touch()


def last_score_gap(folder: Path) -> float:
    """Return the mean squared score gap, TA against reference, over the last third of the run: the KL's integrand."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    gaps = [line["generator/score_gap"] ** 2 for line in lines if "generator/score_gap" in line]
    last = gaps[-max(1, len(gaps) // 3) :]
    return sum(last) / len(last)


@torch.inference_mode()
def measure(point: Point, out: Path) -> Measured:
    """Return the run's figures, one picture for every caption of PROMPTS."""
    return evaluate(load_sampler(find_weights(out / point.name), torch.device("cpu"))[1], PROMPTS, latents=1)


def row_of(point: Point, measured: Measured, control: Measured, out: Path, steps: int) -> dict[str, object]:
    means = measured.means()
    rounded = {
        key: round(means[key], 4) for key in ("optimised", "held_out", "own_first", "spread", "edges", "saturation")
    }
    return {
        **point._asdict(),
        "steps": steps,
        "score_gap": f"{last_score_gap(out / point.name):.6f}",
        "win_rate": round(win_rate(measured, control).mean, 4),
        **rounded,
    }


def save_csv(path: Path, rows: list[dict[str, object]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def mean_of(rows: list[dict[str, str]], key: str) -> tuple[float, float, float]:
    """Return mean, least and greatest of a column."""
    values = [float(row[key]) for row in rows]
    return sum(values) / len(values), min(values), max(values)


def groups(rows: list[dict[str, str]]) -> dict[tuple[str, float], list[dict[str, str]]]:
    """Return the rows by method and scale."""
    found: dict[tuple[str, float], list[dict[str, str]]] = {}
    for row in rows:
        found.setdefault((row["method"], float(row["scale"])), []).append(row)
    return found


def save_curves(path: Path, rows: list[dict[str, str]]) -> None:
    """Draw the optimised reward and the held-out judge over the divergence: a mark a run, a line through the means."""
    panels = {
        "optimised": "optimised judge",
        "held_out": "held-out judge",
        "own_first": "own name first (share)",
        "spread": "spread over latents",
    }
    figure, axes = plt.subplots(1, len(panels), figsize=(3.4 * len(panels), 3.2), dpi=110)
    for axis, (key, title) in zip(axes, panels.items(), strict=True):
        for method, label in METHODS.items():
            some = {scale: lines for (name, scale), lines in groups(rows).items() if name == method}
            if not some:
                continue
            means = [(mean_of(lines, "score_gap")[0], mean_of(lines, key)[0]) for lines in some.values()]
            (line,) = axis.plot(*zip(*means, strict=True), label=label)
            for lines in some.values():
                axis.scatter(
                    [float(row["score_gap"]) for row in lines],
                    [float(row[key]) for row in lines],
                    s=14, alpha=0.6, color=line.get_color(),
                )  # fmt: skip
            for scale, place in zip(some, means, strict=True):
                axis.annotate(f"{scale:g}", place, fontsize=7, textcoords="offset points", xytext=(3, 4))
        axis.set_xscale("log")
        if key in ("optimised", "held_out"):
            axis.set_yscale("symlog", linthresh=2, linscale=3)  # what breaks everything is far below the rest
            axis.yaxis.set_major_locator(FixedLocator([-5, -2, -1, 0, 1, 2]))
            axis.yaxis.set_major_formatter(ScalarFormatter())
            axis.yaxis.set_minor_formatter(NullFormatter())
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.margins(x=0.12, y=0.1)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("squared score gap to the reference", fontsize=8)
        axis.tick_params(labelsize=7)
    axes[0].legend(fontsize=8, loc="lower left")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def save_pictures(path: Path, pictures: dict[Point, torch.Tensor]) -> None:
    """One row for each run of the first seed, one column for every sixth caption of PROMPTS."""
    shown = list(range(0, len(PROMPTS), 6))
    figure, axes = plt.subplots(len(pictures), len(shown), figsize=(len(shown) * 1.2, len(pictures) * 1.2), dpi=110)
    for row, (point, images) in zip(axes, pictures.items(), strict=True):
        for axis, index in zip(row, shown, strict=True):
            axis.imshow(tile(images[index : index + 1], columns=1).numpy())
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_frame_on(False)
        row[0].set_ylabel(f"{METHODS[point.method]}\n{point.scale:g}", fontsize=8)
    figure.tight_layout(pad=0.3)
    figure.savefig(path)
    plt.close(figure)


def as_markdown(rows: list[dict[str, str]]) -> str:
    """Return the table of means over seeds, with least and greatest for the held-out judge."""
    lines = [
        "| method | scale | runs | squared score gap | optimised judge | held-out judge (least, greatest) "
        "| win rate over scale 0 | own name first | spread | edges x 1000 |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (method, scale), some in groups(rows).items():
        mean = {key: mean_of(some, key)[0] for key in COLUMNS[3:]}
        _, least, greatest = mean_of(some, "held_out")
        won = "" if scale == 0 else f"{mean['win_rate']:.1%}"
        lines.append(
            f"| {METHODS[method]} | {scale:g} | {len(some)} | {mean['score_gap']:.4f} | {mean['optimised']:.2f} "
            f"| {mean['held_out']:.2f} ({least:.2f}, {greatest:.2f}) | {won} | {mean['own_first']:.1%} "
            f"| {mean['spread']:.3f} | {1000 * mean['edges']:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/frontier"))
    parser.add_argument("--steps", type=int, default=load_config(CONFIG).training.steps)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--short", action="store_true", help="two scales, one seed, four steps: shows that it works")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="of align.yaml, for all runs")
    args = parser.parse_args()

    silence_libraries()
    hide_loading_bars()
    args.out.mkdir(parents=True, exist_ok=True)
    steps = 4 if args.short else args.steps
    wanted = list(points(args.seeds))
    if args.short:
        wanted = [
            Point("diff_instruct_pp", 0.0, 0),
            Point("diff_instruct_pp", SCALES[2], 0),
            Point("didr", DIDR_SCALES[0], 0),
        ]
    overrides = [f"precision={fastest_precision()}", f"training.steps={steps}", "training.baseline_steps=2"]
    overrides += ["training.grid_every=100000", "training.checkpoint_every=100000", "rewards.held_out=null"]
    overrides += [f"training.log_every={max(1, steps // 15)}", *(["training.fake_warmup=2"] if args.short else [])]
    began = time.monotonic()
    with ThreadPoolExecutor(max_workers=2) as pool:
        for number, _ in enumerate(
            pool.map(lambda point: train(point, args.out, [*overrides, *args.overrides]), wanted)
        ):
            print(f"{number + 1} of {len(wanted)} runs  {time.monotonic() - began:.0f} s", flush=True)
    measured = {point: measure(point, args.out) for point in wanted}
    control = {point.seed: found for point, found in measured.items() if point.scale == 0}
    lines = [row_of(point, found, control[point.seed], args.out, steps) for point, found in measured.items()]
    save_csv(args.out / "frontier.csv", lines)
    rows = read_csv(args.out / "frontier.csv")
    save_curves(args.out / "frontier.png", rows)
    first = {point: found.images for point, found in measured.items() if point.seed == args.seeds[0]}
    save_pictures(args.out / "frontier_pictures.png", first)
    print(as_markdown(rows))
    print(f"in all {time.monotonic() - began:.0f} s; {args.out / 'frontier.csv'}, frontier.png, frontier_pictures.png")


if __name__ == "__main__":
    main()
