"""A plan as tables for people and as data for machines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from diffpp_fast.terminal import printable
from diffpp_fast.training.planning import timing
from diffpp_fast.training.planning.advice import Change
from diffpp_fast.training.planning.plan import KINDS, ROLES, STEP, Plan
from diffpp_fast.training.prompts.encoder import CAPACITY

if TYPE_CHECKING:
    from rich.console import Console

GIB = 2**30
#: Host memory of a process with torch, diffusers and transformers imported, before anything is loaded: 596 to 608 MiB
#: measured with CPU builds on Linux.
PROCESS = 0.6 * GIB


def verdict(plan: Plan) -> str:
    """Whether it fits, and by how much."""
    where = f"fits in {plan.gpu.memory:g} GiB ({plan.gpu.name})"
    if plan.spare >= 0:
        return f"{where}: yes, {plan.spare / GIB:.1f} GiB to spare"
    return f"{where}: no, {-plan.spare / GIB:.1f} GiB too much"


def assumptions(plan: Plan) -> list[str]:
    """What the numbers rest on, in sentences."""
    setup, time = plan.setup, plan.time
    said = [
        "Activations and operations were counted by running the method on networks without numbers (meta); weights, "
        "gradients, optimizer and average follow from the sizes of tensors.",
        f"{plan.reserve / GIB:.1f} GiB are left to CUDA's context, its libraries' workspaces and fragmentation.",
        f"Time: matrix products at {plan.efficiency:g} of the peak ({plan.gpu.bfloat16:g} TFLOP/s in bfloat16, "
        f"{plan.gpu.float32:g} in float32 without TF32), memory and links at "
        f"{timing.BANDWIDTH:g} of the datasheet, nothing at the same time as anything else.",
    ]
    if setup.gpus > timing.GPUS_OF_A_MACHINE:
        said.append(f"Between machines of {timing.GPUS_OF_A_MACHINE} GPUs each sends {plan.network:g} GB/s.")
    if time.sent and any(zero is not None and zero.stage == 3 for zero in _zeros(plan)):
        said.append("Stage 3 is counted with as many whole weights as DeepSpeed lets live at once.")
    if setup.precision == "bfloat16" and any(zero is None or zero.stage == 0 for zero in _zeros(plan)):
        said.append(
            "Autocast copies float32 weights to bfloat16 in every call, and a backward pass keeps the copies: they are "
            "part of the activations, and do not grow with the batch."
        )
    if setup.models.text_encoders:
        kept = f", up to {CAPACITY / GIB:.2f} GiB of encodings" if setup.text_resident else ""
        said.append(f"Prompts are encoded once and kept{kept}: text encoders take memory and no time.")
    said.append(
        f"The process itself takes about {PROCESS / GIB:.1f} GiB of host memory for interpreter and libraries, "
        "and more with CUDA."
    )
    unknown = [name for towers in (setup.rewards, setup.held_out) if towers is not None for name in towers.unknown]
    if unknown:
        said.append(
            f"Not counted, because only loading them would tell: {', '.join(unknown)}. Their decoder is counted."
        )
    return said


def print_plan(plan: Plan, advice: list[Change], console: Console) -> None:
    """Tables on a terminal, plain columns elsewhere."""
    from rich.markup import escape
    from rich.table import Table

    def table(title: str, *columns: str) -> Table:
        made = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
        for number, column in enumerate(columns):
            made.add_column(column, justify="left" if number == 0 else "right")
        return made

    setup = plan.setup
    name = escape(printable(setup.models.name))
    console.print(
        f"[bold]{name}[/bold], latents {' x '.join(map(str, setup.models.latent_shape))}, "
        f"{setup.gpus} x {plan.gpu.name}, {setup.precision}"
    )
    console.print(
        f"{setup.global_batch} samples an update: on each GPU {setup.rounds} x {setup.micro}; "
        f"generator {_how(plan, 'generator')}; fake {_how(plan, 'fake')}; reference {setup.reference}\n"
    )
    update, phase = plan.peak
    # A small model in MiB: its numbers would be zeros.
    unit, size = ("GiB", GIB) if plan.total >= GIB else ("MiB", 2**20)

    def shown(count: int) -> str:
        return f"{count / size:.2f}" if count else "-"

    memory = table(
        f"Memory per GPU at its peak, {unit} ({phase}, in the update of the {update})", "role", *KINDS, "sum"
    )
    for role in ROLES:
        row = [plan.memory[role][kind] for kind in KINDS]
        if any(row):
            memory.add_row(role, *map(shown, row), shown(sum(row)))
    sums = [sum(plan.memory[role][kind] for role in ROLES) for kind in KINDS]
    memory.add_row("sum", *map(shown, sums), shown(plan.total), style="bold")
    console.print(memory)
    if plan.memory["decoder"]["activations"]:
        console.print("The decoder's activations are what its backward pass keeps.")
    if plan.host:
        console.print(f"In host memory or on disk, per process: {shown(plan.host)} {unit}.")
    console.print()
    phases = table("Phases of a micro-batch", "update", "phase", "TFLOP", f"{unit} alive")
    for part, alive in plan.phases:
        operations = "-" if part.name == STEP else f"{sum(part.operations.values()) / 1e12:.4g}"
        phases.add_row(part.update, part.name, operations, shown(alive))
    console.print(phases)
    console.print()
    spent = table("Time of a step, an estimate", "part", "seconds")
    rounds = f", {setup.fake_rounds} of the fake" if setup.fake_rounds > 1 else ""
    counts = (f"{count / 1e12:.4g} TFLOP in {_short(dtype)}" for dtype, count in plan.time.operations.items())
    for name, seconds in (
        (f"matrix products ({', '.join(counts)}{rounds})", plan.time.compute),
        ("optimizers and average", plan.time.update),
        (f"communication ({plan.time.sent / 1e9:.2f} GB from each GPU)", plan.time.communication),
        ("step", plan.time.seconds),
    ):
        spent.add_row(name, f"{seconds:.3g}")
    console.print(spent)
    console.print(f"About {setup.global_batch / plan.time.seconds:,.1f} samples of the generator a second.\n")
    for sentence in assumptions(plan):
        console.print(printable(f"- {sentence}"), markup=False)
    console.print(f"\n[bold]{escape(verdict(plan))}[/bold]")
    if advice:
        console.print("What to change first, each alone:")
        for change in advice:
            console.print(f"  {change.keys:<44} saves {change.saves / GIB:.1f} GiB", markup=False)


def as_data(plan: Plan, advice: list[Change]) -> dict[str, Any]:
    """The plan for machines: bytes, operations, seconds."""
    setup, time = plan.setup, plan.time
    return {
        "model": setup.models.name,
        "gpu": plan.gpu._asdict(),
        "gpus": setup.gpus,
        "global_batch": setup.global_batch,
        "micro_batch": setup.micro,
        "precision": setup.precision,
        "parameters": {
            role: {"trained": sum(size.trained), "frozen": size.frozen} for role, size in plan.counted.sizes.items()
        },
        "memory": {
            "roles": plan.memory,
            "total": plan.total,
            "peak": {"update": plan.peak[0], "phase": plan.peak[1]},
            "host": plan.host,
            "reserve": plan.reserve,
            "spare": plan.spare,
            "fits": plan.spare >= 0,
        },
        "phases": [
            {"update": part.update, "phase": part.name, "operations": sum(part.operations.values()), "alive": alive}
            for part, alive in plan.phases
        ],
        "time": {
            "estimate": time.seconds,
            "compute": time.compute,
            "update": time.update,
            "communication": time.communication,
            "operations": {_short(dtype): count for dtype, count in time.operations.items()},
            "sent": time.sent,
            "efficiency": plan.efficiency,
        },
        "assumptions": assumptions(plan),
        "changes": [{"keys": change.keys, "saves": change.saves} for change in advice],
    }


def _how(plan: Plan, role: str) -> str:
    trained = getattr(plan.setup, role)
    lora = f", LoRA of rank {trained.lora.rank}" if trained.lora is not None else ""
    stage = (
        "" if plan.setup.gpus == 1 and trained.zero is None else f", stage {trained.zero.stage if trained.zero else 0}"
    )
    return f"{trained.optimizer}{lora}{stage}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _zeros(plan: Plan) -> tuple[Any, Any]:
    return plan.setup.generator.zero, plan.setup.fake.zero
