"""What to change first where a plan does not fit: each change tried alone, by the bytes that it saves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from diffpp_fast.training.planning.plan import Plan, make_plan
from diffpp_fast.training.planning.setup import Setup, Spread, Zero

#: How many changes are told.
MOST = 6


class Change(NamedTuple):
    """A change of the configuration, and the bytes that a GPU has more by it."""

    keys: str
    saves: int
    setup: Setup


def changes(plan: Plan) -> list[Change]:
    """Changes that save memory, those that save most first."""
    found = []
    for keys, setup in _candidates(plan.setup):
        other = make_plan(setup, plan.gpu, efficiency=plan.efficiency, network=plan.network)
        if plan.total > other.total:
            found.append(Change(keys, plan.total - other.total, setup))
    return sorted(found, key=lambda change: change.saves, reverse=True)[:MOST]


def _candidates(setup: Setup) -> Iterator[tuple[str, Setup]]:
    if setup.micro > 1:
        half = setup.micro // 2
        yield f"training.micro_batch={half}", replace(setup, micro_batch=half)
    if not setup.activation_checkpointing:
        yield "training.activation_checkpointing=true", replace(setup, activation_checkpointing=True)
    if setup.rewards is not None and not setup.decoder_checkpoint:
        yield "models.decoder.checkpoint=true", replace(setup, decoder_checkpoint=True)
    if setup.precision == "float32":
        yield "precision=bfloat16", replace(setup, precision="bfloat16")
    if setup.text_resident:
        yield "prompts.embeddings=FOLDER", replace(setup, text_resident=False)
    if setup.reference == "replica":
        place: Spread = "shard" if setup.gpus > 1 else "offload"
        yield f"distributed.reference={place}", replace(setup, reference=place)
    roles = ("generator", "fake")
    both = {role: getattr(setup, role) for role in roles}
    if all(trained.optimizer.startswith("adamw") and "8bit" not in trained.optimizer for trained in both.values()):
        eight = {role: replace(trained, optimizer="adamw8bit") for role, trained in both.items()}
        yield "optimizers.*.name=adamw8bit", replace(setup, **eight)
    stages = {trained.zero.stage if trained.zero is not None else 0 for trained in both.values()}
    if setup.gpus > 1 and max(stages) < 3 and all(trained.lora is None for trained in both.values()):
        stage = max(stages) + 1
        spread = {role: replace(trained, zero=_with_stage(trained.zero, stage)) for role, trained in both.items()}
        yield f"distributed.*.stage={stage}", replace(setup, **spread)
    zeros = [trained.zero for trained in both.values()]
    if all(zero is not None and zero.stage and zero.offload_optimizer == "none" for zero in zeros):
        away = {
            role: replace(trained, zero=replace(trained.zero, offload_optimizer="cpu"))
            for role, trained in both.items()
            if trained.zero is not None
        }
        yield "distributed.*.offload_optimizer=cpu", replace(setup, **away)


def _with_stage(zero: Zero | None, stage: int) -> Zero:
    return Zero(stage) if zero is None else replace(zero, stage=stage)
