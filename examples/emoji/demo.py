"""The demo: Diff-Instruct++ aligns the shipped one-step generator with a reward, next to the same run without reward.

    python examples/emoji/demo.py --out runs/demo

Two trainings run side by side, each on half of the cores: align.yaml into `--out`, and its control, the same with
rewards.optimised.scale=0, into `--out`/control. At the end `--out` holds before_after.png, curves.png, figures.json,
table.md, demo.html and every generator's pictures of all captions.
"""

from __future__ import annotations

import argparse
import base64
import csv
import html
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from common import fastest_precision
from evaluation import (
    BY_PICTURE,
    CHOOSING_STRIDE,
    Estimate,
    Measured,
    evaluate,
    features,
    paired_difference,
    reference_images,
    win_rate,
)
from rewards import captions
from rich.console import Console
from rich.table import Table

from diffpp_fast.cli.quiet import hide_loading_bars, silence_libraries
from diffpp_fast.networks import load_denoiser
from diffpp_fast.training.build import build_sampler
from diffpp_fast.training.export import find_weights, load_sampler
from diffpp_fast.training.grids import tile, write_png
from diffpp_fast.training.loading import load_config
from diffpp_fast.training.prompts import open_prompts

HERE = Path(__file__).parent
CONFIG = HERE / "align.yaml"
#: Shows that everything works, in about a minute; too short to show what alignment does.
SHORT = [
    "training.steps=6",
    "training.fake_warmup=2",
    "training.grid_every=3",
    "training.log_every=1",
    "training.baseline_steps=2",
]
COLUMNS = {"before": "before", "control": "after, reward scale 0", "aligned": "after, aligned"}
#: Rows of the table: label, factor and digits.
ROWS = {
    "optimised": ("optimised judge", 1, 2),
    "held_out": ("held-out judge", 1, 2),
    "own_first": ("own name first of 200, %", 100, 1),
    "spread": ("spread over latents", 1, 3),
    "distance": ("distance to the reference x 1000", 1000, 0),
    "edges": ("edges inside the subject x 1000", 1000, 1),
    "saturation": ("saturation", 1, 3),
}
DIFFERENCES = (("aligned", "before"), ("aligned", "control"), ("control", "before"))
#: Latents of every caption in the table.
LATENTS = 2
FRONTIER = HERE / "frontier"


def reference_features(prompts: list[str], steps: int, overrides: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference's DDIM samples, one per caption, and their features."""
    from diffusers import DDIMScheduler

    config = load_config(CONFIG, overrides)
    sampler = build_sampler(config, torch.device("cpu"))
    reference = load_denoiser(config.models.reference.path).eval().requires_grad_(False)
    scheduler = DDIMScheduler.from_pretrained(config.models.scheduler.path)
    guidance = config.method.guidance_scale
    images = reference_images(sampler, reference, scheduler, prompts, guidance_scale=guidance, steps=steps)
    return images, features(images)


def train_side_by_side(folders: dict[str, Path], overrides: list[str]) -> None:
    """The aligned run's progress goes to the terminal, the control's to a file."""
    threads = max(1, (os.cpu_count() or 2) // len(folders))
    log = folders["control"].with_suffix(".log")
    processes = []
    with log.open("w", encoding="utf-8") as file:
        for name, folder in folders.items():
            command = [sys.executable, "-m", "diffpp_fast", "train", str(CONFIG), f"output={folder}"]
            command += [f"training.threads={threads}", *overrides]
            command += ["rewards.optimised.scale=0"] if name == "control" else []
            print(shlex.join(command), flush=True)
            output = file if name == "control" else None
            environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
            processes.append(subprocess.Popen(command, env=environment, stdout=output, stderr=output))
    try:
        codes = [process.wait() for process in processes]
    except KeyboardInterrupt:  # the trainings got it too: they save a checkpoint and say how to go on
        codes = [process.wait() for process in processes]
    if any(codes):
        sys.exit(f"a training ended with exit codes {codes}; the control's output is in {log}")


def table_of(measured: dict[str, Measured]) -> list[list[str]]:
    """Return the figures of all generators, a heading first."""
    means = {name: of.means() for name, of in measured.items()}
    lines = [["", *(COLUMNS[name] for name in measured)]]
    for key, (label, factor, digits) in ROWS.items():
        lines.append([label, *(f"{factor * of[key]:.{digits}f}" for of in means.values())])
    return lines


def differences_of(measured: dict[str, Measured], prompts: list[str]) -> list[list[str]]:
    """Return paired differences with 95 % intervals, and win rates, a heading first."""

    def interval(found: Estimate, factor: float, digits: int) -> str:
        return f"{factor * found.mean:+.{digits}f} ± {factor * found.half:.{digits}f}"

    lines = [["paired", *(f"{one} - {other}" for one, other in DIFFERENCES)]]
    for key in BY_PICTURE:
        label, factor, digits = ROWS[key]
        found = [paired_difference(measured[one], measured[other], key) for one, other in DIFFERENCES]
        lines.append([label, *(interval(each, factor, digits) for each in found)])
    choosing = set(captions()[::CHOOSING_STRIDE])
    unused = [number for number, prompt in enumerate(prompts) if prompt not in choosing]
    wins = [("wins by the held-out judge, %", list(range(len(prompts))))]
    if unused:  # the short demo's captions are all among those chosen by
        wins.append((f"wins, the {len(unused)} captions never chosen by, %", unused))
    for label, chosen in wins:
        found = [win_rate(measured[one], measured[other], chosen) for one, other in DIFFERENCES]
        lines.append([label, *(f"{100 * each.mean:.1f} ± {100 * each.half:.1f}" for each in found)])
    return lines


def print_table(title: str, lines: list[list[str]]) -> None:
    table = Table(title=title)
    for number, heading in enumerate(lines[0]):
        table.add_column(heading, justify="right" if number else "left")
    for line in lines[1:]:
        table.add_row(*line)
    Console().print(table)


def as_markdown(lines: list[list[str]]) -> str:
    rows = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([rows[0], "|" + "---|" * len(lines[0]), *rows[1:]])


def save_page(path: Path, title: str, tables: list[list[list[str]]]) -> None:
    """Write one HTML file, which needs no other: tables and pictures of this run, and the committed frontier."""

    def table(lines: list[list[str]]) -> str:
        rows = ["".join(f"<td>{html.escape(cell)}</td>" for cell in line) for line in lines]
        return "<table>" + "".join(f"<tr>{row}</tr>" for row in rows) + "</table>"

    def picture(file: Path) -> str:
        data = base64.b64encode(file.read_bytes()).decode()
        return f'<p><img alt="{file.stem}" src="data:image/png;base64,{data}"></p>'

    parts = [f"<h1>{html.escape(title)}</h1>", picture(path.parent / "before_after.png"), *map(table, tables)]
    parts.append(picture(path.parent / "curves.png"))
    if (FRONTIER / "frontier.csv").is_file():
        parts.append("<h2>The frontier: as committed, of examples/emoji/frontier.py</h2>")
        parts += [picture(FRONTIER / f"{name}.png") for name in ("frontier", "frontier_pictures")]
        with (FRONTIER / "frontier.csv").open(newline="", encoding="utf-8") as file:
            parts.append(table(list(csv.reader(file))))
    style = "body{font:15px sans-serif;margin:2em}td{padding:.2em .8em;border-top:1px solid #ccc}img{max-width:100%}"
    page = f'<!doctype html><meta charset="utf-8"><title>{html.escape(title)}</title><style>{style}</style>'
    path.write_text(page + "\n".join(parts) + "\n", encoding="utf-8")


def save_before_after(path: Path, images: dict[str, torch.Tensor], prompts: list[str], chosen: list[int]) -> None:
    """One row for each generator, one column for each prompt, whose name is below; every pixel three wide."""
    figure, axes = plt.subplots(len(images), len(chosen), figsize=(1.28 * len(chosen) + 0.5, 1.3 * len(images) + 0.2))
    for row, (name, pictures) in zip(axes, images.items(), strict=True):
        for axis, index in zip(row, chosen, strict=True):
            axis.imshow(tile(pictures[index : index + 1], columns=1).numpy(), interpolation="bicubic")
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_frame_on(False)
        row[0].set_ylabel(name.replace(", ", ",\n"), fontsize=11)
    for axis, index in zip(axes[-1], chosen, strict=True):
        axis.set_xlabel(prompts[index], fontsize=11)
    edge = 0.5 / figure.get_figwidth()
    figure.subplots_adjust(left=edge, right=1, top=1, bottom=0.25 / figure.get_figheight(), wspace=0, hspace=0.02)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def save_curves(path: Path, folders: dict[str, Path]) -> None:
    panels = {
        "grid/reward": "optimised reward",
        "grid/held_out": "held-out reward",
        "generator/score_gap": "score gap (RMS)",
        "fake/loss": "TA's denoising loss",
    }
    figure, axes = plt.subplots(1, len(panels), figsize=(13, 2.8), dpi=120)
    for name, folder in folders.items():
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        for axis, (key, title) in zip(axes, panels.items(), strict=True):
            points = [(line["step"], line[key]) for line in lines if key in line]
            axis.plot(*zip(*points, strict=True), label=name, marker="." if len(points) < 12 else None)
            axis.set_title(title, fontsize=9)
            axis.set_xlabel("generator step", fontsize=8)
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument("--short", action="store_true", help="a minute: a few steps, 20 captions")
    parser.add_argument("--measure", action="store_true", help="measure the trainings in --out again, without training")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="of align.yaml, for both runs")
    args = parser.parse_args()

    silence_libraries()
    hide_loading_bars()
    began = time.monotonic()
    out: Path = args.out
    folders = {"aligned": out, "control": out / "control"}
    # The demo's own earlier result makes room, nothing else does.
    if (out / "control.log").exists() and not args.measure:
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    prompts = list(open_prompts(load_config(CONFIG).prompts))
    if args.short:
        prompts = prompts[:: len(prompts) // 20]
    precision = f"precision={fastest_precision()}"
    print(f"{precision}, the faster one here")
    overrides = [precision, *(SHORT if args.short else []), *args.overrides]

    if not args.measure:
        train_side_by_side(folders, overrides)
    trained = time.monotonic() - began
    with torch.inference_mode():
        reference_pictures, reference = reference_features(prompts, steps=5 if args.short else 20, overrides=overrides)
        samplers = {"before": build_sampler(load_config(CONFIG, overrides), torch.device("cpu"))}
        for name in ("control", "aligned"):
            samplers[name] = load_sampler(find_weights(folders[name]), torch.device("cpu"))[1]
        latents = 1 if args.short else LATENTS
        measured = {name: evaluate(sampler, prompts, reference, latents=latents) for name, sampler in samplers.items()}

    shown = list(range(2, len(prompts), max(1, len(prompts) // 8)))[:8]
    rows = {"reference, 20 steps": reference_pictures, **{COLUMNS[name]: of.images for name, of in measured.items()}}
    save_before_after(out / "before_after.png", rows, prompts, shown)
    save_curves(out / "curves.png", folders)
    for name, of in measured.items():
        write_png(out / f"all_{name}.png", tile(of.images, columns=20))
    figures = {name: of.means() for name, of in measured.items()}
    (out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")

    title = f"One-step generator, {len(prompts)} captions, {latents} pictures each"
    tables = [table_of(measured), differences_of(measured, prompts)]
    print_table(title, tables[0])
    print_table("Paired differences, 95 % intervals over captions", tables[1])
    (out / "table.md").write_text("\n\n".join(map(as_markdown, tables)) + "\n", encoding="utf-8")
    save_page(out / "demo.html", title, tables)
    print(f"training {trained:.0f} s, in all {time.monotonic() - began:.0f} s")
    print(f"pictures: {out / 'before_after.png'}, {out / 'curves.png'}; all on one page: {out / 'demo.html'}")
    command = ["diffpp-fast", "report", str(out), str(folders["control"])]
    print(f"for a page on both trainings:\n  {Path(sys.executable).parent / shlex.join(command)}")
    command = ["diffpp-fast", "sample", "--run", str(out), "a red apple"]
    print(f"to draw with the aligned generator:\n  {Path(sys.executable).parent / shlex.join(command)}")


if __name__ == "__main__":
    main()
