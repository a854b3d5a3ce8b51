"""`python -m benchmarks scale`: what `diffpp-fast plan` predicts for more and more GPUs, by ZeRO stage and network.

Nothing is measured: operations and bytes are counted as for any plan, and divided by datasheets' numbers.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.tables import Place, Table, text
from benchmarks.timing import Provenance, provenance
from diffpp_fast.cli.options import positive
from diffpp_fast.terminal import say
from diffpp_fast.training.planning import GPUS, KNOWN, PlannedRun, RunPlan, known_config, make_plan
from diffpp_fast.training.planning.timing import GPUS_OF_A_MACHINE
from diffpp_fast.user_paths import user_path

SIZES = (8, 64, 1024)
STAGES = (1, 2, 3)
#: Gbit/s of all adapters of a machine, together.
NETWORKS = (3200.0, 800.0, 100.0)
MODELS = ("sd15", "sdxl", "pixart")
COLUMNS = (
    "model", "gpu", "micro_batch", "rounds", "stage", "network_gbit_s", "gpus", "seconds", "communication_s", "sent_gb",
    "samples_per_second", "spare_gib",
)  # fmt: skip


class Planned(Provenance):
    """The origin of what was planned, on no device."""

    def __str__(self) -> str:
        return ""


def plan_of(model: str, gpu: str, micro_batch: int, rounds: int, stage: int, gigabits: float, gpus: int) -> RunPlan:
    """Return the plan of Diff-Instruct++ with HPSv2 on a known model, with the same batch on each GPU."""
    changes = {
        "training.micro_batch": micro_batch,
        "training.global_batch": micro_batch * rounds * gpus,
        "distributed.generator.stage": stage,
        "distributed.fake.stage": stage,
    }
    run = PlannedRun(known_config(model, changes), KNOWN[model], gpus)
    return make_plan(run, GPUS[gpu], network=gigabits / 8 / GPUS_OF_A_MACHINE)


def rows(model: str, gpu: str, micro_batch: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Return a row for each stage, network and number of GPUs."""
    for stage in STAGES:
        for gigabits in NETWORKS:
            for gpus in SIZES:
                plan = plan_of(model, gpu, micro_batch, rounds, stage, gigabits, gpus)
                seconds, samples = plan.time.seconds, micro_batch * rounds * gpus
                figures = (
                    seconds, plan.time.communication, plan.time.sent / 1e9, samples / seconds, plan.spare / 2**30,
                )  # fmt: skip
                values = (model, gpu, micro_batch, rounds, stage, gigabits, gpus, *(round(each, 3) for each in figures))
                yield dict(zip(COLUMNS, values, strict=True))


def table(planned: list[dict[str, Any]]) -> Table:
    """Return samples a second and the share of a step that is communication, with the memory to spare."""
    header = ["stage", "Gbit/s", *(f"{size:,}" for size in SIZES), "GiB to spare"]
    body = []
    for stage in STAGES:
        for gigabits in NETWORKS:
            here = [row for row in planned if (row["stage"], row["network_gbit_s"]) == (stage, gigabits)]
            cells = [
                f"{row['samples_per_second']:.0f}/{100 * row['communication_s'] / row['seconds']:.0f}%" for row in here
            ]
            spare = [f"{row['spare_gib']:.0f}" for row in (here[0], here[-1])]
            body.append([str(stage), f"{gigabits:.0f}", *cells, "-".join(spare)])
    return Table([header, *body])


def add_arguments(add: Callable[..., Any]) -> None:
    add("--model", choices=MODELS, default="sdxl", help="a known model (sdxl)")
    add("--gpu", choices=[*GPUS], default="h100", help="the GPU (h100)")
    add("--micro-batch", type=positive, default=2, metavar="N", help="images of a GPU at a time (2)")
    add("--rounds", type=positive, default=4, metavar="N", help="micro-batches of an update (4)")
    add("--out", type=user_path, default=Path("benchmarks/results"), metavar="FOLDER", help="(benchmarks/results)")
    add("--docs", type=user_path, metavar="PAGE.md", help="also put the table between the page's markers")


def run(arguments: argparse.Namespace, device: torch.device) -> int:
    """Print the table and write the files. Return 0."""
    kind = f"{arguments.model}-{arguments.gpu}"
    place = Place(arguments.out / f"scale-{kind}", arguments.docs, "scale", kind)
    place.check()
    planned = list(rows(arguments.model, arguments.gpu, arguments.micro_batch, arguments.rounds))
    name, gpu = KNOWN[arguments.model].name, GPUS[arguments.gpu].name
    batch = f"{arguments.rounds} x {arguments.micro_batch}"
    said = (
        f"{name}, {batch} images an update on each of 8 to 1,024 {gpu}, by the Gbit/s of a machine of "
        f"{GPUS_OF_A_MACHINE}: images a second/share of communication.\n"
    )
    short = table(planned)
    for path in place.write(planned, COLUMNS, [said, short], Planned(*provenance(torch.device("cpu")))):
        say(f"written: {path}")
    say(f"\n{said}\n{text(short)}")
    return 0
