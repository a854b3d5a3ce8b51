"""A plan as tables for people and as data for machines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from diffpp_fast.terminal import printable
from diffpp_fast.training.build.agreement import idle_sentences
from diffpp_fast.training.initial_lora import open_role_lora
from diffpp_fast.training.planning import timing
from diffpp_fast.training.planning.architectures import TOWERS, towers_of
from diffpp_fast.training.planning.plan import KINDS, ROLES, STEP, TRAINED, RunPlan, Saving
from diffpp_fast.training.planning.states import PlannedRun
from diffpp_fast.training.prompts.encoder import CAPACITY

if TYPE_CHECKING:
    from rich.console import Console

GIB = 2**30
#: Host memory of a process without its networks' tensors, once it has built them: 0.68 to 0.69 GiB measured with CPU
#: builds on Linux, of which 0.23 are libraries' files.
PROCESS = 0.68 * GIB


def verdict(plan: RunPlan) -> str:
    """Say whether it fits, and by how much."""
    where = f"fits in {plan.gpu.memory:g} GiB ({plan.gpu.name})"
    if plan.spare >= 0:
        return f"{where}: yes, {plan.spare / GIB:.1f} GiB to spare"
    return f"{where}: no, {-plan.spare / GIB:.1f} GiB too much"


def assumptions(plan: RunPlan) -> list[str]:
    """Return what the numbers rest on, in sentences."""
    run, time = plan.run, plan.time
    config, stages = run.config, [run.zero(role).stage for role in TRAINED]
    said = []
    if config.device == "cpu":
        said.append(f"device is cpu, of which nothing is known here: this is the plan for a GPU, {plan.gpu.name}.")
    said += [f"{sentence}." for sentence in idle_sentences(config)]
    for role in TRAINED:
        initial = open_role_lora(config.models, role)
        said += [] if initial is None else [f"The {role} begins with {initial.describe()}."]
    said += [
        "Activations and operations were counted by running the method on networks without numbers (meta); weights, "
        "gradients, optimizer and average follow from the sizes of tensors.",
        f"{plan.reserve / GIB:.1f} GiB are left to CUDA's context, its libraries' workspaces and fragmentation.",
        f"Time: matrix products at {plan.efficiency:g} of the peak ({plan.gpu.bfloat16:g} TFLOP/s in bfloat16, "
        f"{plan.gpu.float32:g} in float32 without TF32), memory and links at "
        f"{timing.BANDWIDTH:g} of the datasheet, nothing at the same time as anything else.",
    ]
    if run.gpus > timing.GPUS_OF_A_MACHINE:
        machine = timing.GPUS_OF_A_MACHINE
        said.append(
            f"A machine of {machine} GPUs sends {machine * plan.network:g} GB/s to others, {plan.network:g} a GPU."
        )
    if time.sent and 3 in stages:
        said.append("Stage 3 is counted with as many whole weights as DeepSpeed lets live at once.")
    if config.precision == "bfloat16" and 0 in stages:
        said.append(
            "Autocast copies float32 weights to bfloat16 in every call, and a backward pass keeps the copies: they are "
            "part of the activations, and do not grow with the batch."
        )
    if config.training.capture:
        said.append(
            "Captured graphs keep both networks' gradients, and share memory as large as the activations of the "
            "fullest phase; it is theirs while an optimizer works, too."
        )
    if run.architectures.text_encoders:
        kept = f", up to {CAPACITY / GIB:.2f} GiB of encodings" if config.prompts.embeddings is None else ""
        said.append(f"Prompts are encoded once and kept{kept}: text encoders take memory and no time.")
    said.append(
        f"The process itself takes about {PROCESS / GIB:.1f} GiB of host memory for interpreter and libraries, "
        + ("and the C library keeps some freed memory." if config.device == "cpu" else "and more with CUDA.")
    )
    rewards = [reward for reward in (config.rewards.optimised, config.rewards.held_out) if reward is not None]
    counted = dict.fromkeys(TOWERS[name] for reward in rewards for name in towers_of(reward).names)
    if counted:
        said.append(f"The reward's row: {', '.join(counted)}.")
    unknown = [name for reward in rewards for name in towers_of(reward).unknown]
    if unknown:
        said.append(
            f"Not counted, because only loading them would tell: {', '.join(unknown)}. Their decoder is counted."
        )
    return said


def print_plan(plan: RunPlan, advice: list[Saving], console: Console) -> None:
    """Print tables on a terminal, plain columns elsewhere."""
    from rich.markup import escape
    from rich.table import Table

    def table(title: str, *columns: str) -> Table:
        made = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
        for number, column in enumerate(columns):
            made.add_column(column, justify="left" if number == 0 else "right")
        return made

    run, config = plan.run, plan.run.config
    name = escape(printable(run.architectures.name))
    console.print(
        f"[bold]{name}[/bold], latents {' x '.join(map(str, config.models.latent_shape))}, "
        f"{run.gpus} x {plan.gpu.name}, {config.precision}"
    )
    console.print(
        f"{config.training.global_batch} samples an update: on each GPU {run.rounds} x {run.micro}; "
        f"generator {_how(run, 'generator')}; fake {_how(run, 'fake')}; reference {_of_reference(run)}\n"
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
    rounds = f", {config.method.fake_rounds} of the fake" if config.method.fake_rounds > 1 else ""
    counts = (f"{count / 1e12:.4g} TFLOP in {_short(dtype)}" for dtype, count in plan.time.operations.items())
    for name, seconds in (
        (f"matrix products ({', '.join(counts)}{rounds})", plan.time.compute),
        ("optimizers and average", plan.time.update),
        (f"communication ({plan.time.sent / 1e9:.2f} GB from each GPU)", plan.time.communication),
        ("step", plan.time.seconds),
    ):
        spent.add_row(name, f"{seconds:.3g}")
    console.print(spent)
    console.print(f"About {config.training.global_batch / plan.time.seconds:,.1f} samples of the generator a second.\n")
    for sentence in assumptions(plan):
        console.print(printable(f"- {sentence}"), markup=False)
    console.print(f"\n[bold]{escape(verdict(plan))}[/bold]")
    if advice:
        console.print("What to change first, each alone:")
        for change in advice:
            peak = (plan.total - change.saves) / GIB
            console.print(
                f"  {change.keys:<52} saves {change.saves / GIB:.1f} GiB: {peak:.1f} at the peak", markup=False
            )


def as_data(plan: RunPlan, advice: list[Saving]) -> dict[str, Any]:
    """Return the plan for machines: bytes, operations, seconds."""
    run, time = plan.run, plan.time
    return {
        "model": run.architectures.name,
        "gpu": plan.gpu._asdict(),
        "gpus": run.gpus,
        "global_batch": run.config.training.global_batch,
        "micro_batch": run.micro,
        "precision": run.config.precision,
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


def _how(run: PlannedRun, role: str) -> str:
    adapters = getattr(run.config.models, role).lora
    lora = f", LoRA of rank {adapters.rank}" if adapters is not None else ""
    return f"{run.optimizer(role)}{lora}{f', stage {run.zero(role).stage}' if run.is_spread else ''}"


def _of_reference(run: PlannedRun) -> str:
    kind = run.config.models.reference.quantization
    place: str = run.config.distributed.reference
    return place if kind is None else f"{place} in {kind}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
