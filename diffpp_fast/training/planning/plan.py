"""The plan: memory of one GPU at the moment when it is fullest, the step's time, and what to change first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

from diffpp_fast.errors import ConfigurationError
from diffpp_fast.training.config import Config
from diffpp_fast.training.loading import with_keys
from diffpp_fast.training.planning.architectures import Architectures, architectures_of
from diffpp_fast.training.planning.counting import Counted, Phase, count
from diffpp_fast.training.planning.states import NetworkState, PlannedRun, states_of
from diffpp_fast.training.planning.timing import EFFICIENCY, NETWORK, Gpu, StepTime, estimate

ROLES = ("generator", "fake", "reference", "text encoder", "decoder", "reward")
KINDS = ("weights", "master weights", "gradients", "optimizer", "EMA", "activations", "communication")
TRAINED = ("generator", "fake")
#: What CUDA, cuBLAS, cuDNN and NCCL take for themselves, and what is lost between blocks of the allocator: bytes, and a
#: share of the GPU's memory. An assumption.
RESERVE, RESERVED_SHARE = 1.5 * 2**30, 0.03
#: The phase in which an optimizer works, after its backward pass.
STEP = "optimizer"
#: How many changes are told.
MOST_CHANGES = 8
#: What `models.decoder.rows` is tried with: more take more memory, fewer compute more rows twice.
ROWS = 32


@dataclass(frozen=True)
class RunPlan:
    """The memory and the time that a run needs.

    Attributes:
        memory: bytes on one GPU by role and kind, at the peak.
        peak: the update and the phase of the peak.
        phases: every phase, for one micro-batch, with the bytes that are alive in it in all.
        host: bytes in the CPU's memory, or on disk, per process.
        reserve: bytes that are left to libraries and to fragmentation.
    """

    run: PlannedRun
    gpu: Gpu
    efficiency: float
    network: float
    memory: Mapping[str, Mapping[str, int]]
    peak: tuple[str, str]
    phases: tuple[tuple[Phase, int], ...]
    host: int
    time: StepTime
    counted: Counted

    @property
    def total(self) -> int:
        return sum(sum(kinds.values()) for kinds in self.memory.values())

    @property
    def reserve(self) -> int:
        return int(RESERVE + RESERVED_SHARE * self.gpu.memory * 2**30)

    @property
    def spare(self) -> int:
        """Bytes of the GPU that are left; below 0 it does not fit."""
        return int(self.gpu.memory * 2**30) - self.reserve - self.total


def run_of(config: Config, gpus: int = 1) -> PlannedRun:
    """Return the run of a configuration on so many GPUs; raises like `architectures_of`."""
    return PlannedRun(config, architectures_of(config), gpus)


def make_plan(run: PlannedRun, gpu: Gpu, *, efficiency: float = EFFICIENCY, network: float = NETWORK) -> RunPlan:
    """Count a step on meta and add what the engines hold.

    Args:
        efficiency: share of the GPU's peak that matrix products reach.
        network: GB/s per GPU between machines.
    """
    counted = count_run(run)
    states = states_of(run, counted)
    resident = sum(state.resident for state in states.values())
    captured = run.config.training.capture
    pool = _fullest(counted).at_peak if captured else {}
    phases = [*counted.phases, *(Phase(role, STEP, {}, pool) for role in reversed(TRAINED))]
    moments = [
        (phase, resident + sum(sum(_passing(role, state, phase, captured).values()) for role, state in states.items()))
        for phase in phases
    ]
    peak, _ = max(moments, key=lambda moment: moment[1])
    return RunPlan(
        run=run,
        gpu=gpu,
        efficiency=efficiency,
        network=network,
        memory={role: _kinds(role, states.get(role, NetworkState()), peak, captured) for role in ROLES},
        peak=(peak.update, peak.name),
        phases=tuple(moments),
        host=sum(state.host for state in states.values()),
        time=estimate(run, counted, gpu, efficiency, network),
        counted=counted,
    )


def count_run(run: PlannedRun) -> Counted:
    """Count one micro-batch; runs that differ in nothing that changes it are counted once, for it takes seconds."""
    defaults = {f"optimizers.{role}": {"lr": 1e-6} for role in TRAINED} | {
        "prompts": {"path": "prompts"},
        "distributed": {},
        "training.global_batch": run.micro * (1 + run.normalizes_apart),
        "training.micro_batch": run.micro,
        "method.fake_rounds": 1,
        "training.capture": False,
        # They draw other times, at the same cost.
        "method.time_distribution": None,
        "method.fake_time_distribution": None,
        "method.time_intervals": "whole",
    }
    low_weights = tuple(role for role in TRAINED if run.zero(role).stage > 0)

    def counted(**call: Any) -> Counted:
        of_generator = {f"models.generator.{key}": value for key, value in call.items()}
        config = with_keys(run.config, defaults | of_generator)
        return _count(config.model_dump_json(), run.architectures, low_weights)

    times = run.config.models.generator.times
    if run.generator_calls == len(times):
        return counted()
    # Calls cost alike, so that the mean lies between what one takes and what all do; memory is that of all.
    one, every = counted(timesteps=times[:1], gradient_step="last"), counted(gradient_step="last")
    share = (run.generator_calls - 1) / (len(times) - 1)
    return replace(every, phases=tuple(map(partial(_between, share), one.phases, every.phases)))


def _between(share: float, one: Phase, every: Phase) -> Phase:
    """Return the phase of all calls with the operations of some, at this share of the way from one to all."""
    operations = {
        dtype: round(one.operations.get(dtype, 0) * (1 - share) + count * share)
        for dtype, count in every.operations.items()
    }
    return replace(every, operations=operations)


@lru_cache(maxsize=64)
def _count(config: str, architectures: Architectures, low_weights: tuple[str, ...]) -> Counted:
    return count(Config.model_validate_json(config), architectures, low_weights=low_weights)


def _fullest(counted: Counted) -> Phase:
    """Return the phase whose activations are as large as the memory that captured graphs share."""
    return max(counted.phases, key=lambda phase: sum(phase.at_peak.values()))


def _passing(role: str, state: NetworkState, phase: Phase, captured: bool) -> dict[str, int]:
    """Return the bytes that a role holds in a phase only, by kind.

    An update's gradients are there from its first backward pass to its end: with several micro-batches in all of its
    phases, so they are counted in all of them. Graphs add to those of both roles, which stay.
    """
    own = role == phase.update
    has_gradients = own or captured
    gathered = state.communication if own or phase.name.startswith(role) else 0
    return {
        "gradients": (state.gradients if has_gradients else 0) + (state.update if own and phase.name == STEP else 0),
        "activations": phase.at_peak.get(role, 0) + state.kept,
        "communication": gathered,
    }


def _kinds(role: str, state: NetworkState, peak: Phase, captured: bool) -> dict[str, int]:
    lasting = {
        "weights": state.weights,
        "master weights": state.master,
        "optimizer": state.optimizer,
        "EMA": state.ema,
    }
    kinds = {**lasting, **_passing(role, state, peak, captured)}
    return {kind: kinds[kind] for kind in KINDS}


class Saving(NamedTuple):
    """A change of the configuration, and the bytes that a GPU has more by it."""

    keys: str
    saves: int
    run: PlannedRun


def savings(plan: RunPlan) -> list[Saving]:
    """Return changes that save memory, each tried alone, those that save most first."""
    found = []
    for said, keys in _candidates(plan.run):
        try:
            run = replace(plan.run, config=with_keys(plan.run.config, keys))
            other = make_plan(run, plan.gpu, efficiency=plan.efficiency, network=plan.network)
        except ConfigurationError:  # the method or the decoder, say, does not do with it
            continue
        if plan.total > other.total:
            found.append(Saving(said, plan.total - other.total, run))
    return sorted(found, key=lambda saving: saving.saves, reverse=True)[:MOST_CHANGES]


def _candidates(run: PlannedRun) -> Iterator[tuple[str, dict[str, Any]]]:
    """Changes as they are told, and as values by key."""
    config = run.config
    zeros = {role: run.zero(role) for role in TRAINED}
    stage = max(zero.stage for zero in zeros.values())
    whole = all(getattr(config.models, role).lora is None for role in TRAINED)

    def of_both(section: str, key: str, value: Any) -> tuple[str, dict[str, Any]]:
        return f"{section}.*.{key}={value}", {f"{section}.{role}.{key}": value for role in TRAINED}

    if config.training.capture:
        yield "training.capture=false", {"training.capture": False}
    if run.micro > 1:
        yield f"training.micro_batch={run.micro // 2}", {"training.micro_batch": run.micro // 2}
    if not config.training.activation_checkpointing:
        yield "training.activation_checkpointing=true", {"training.activation_checkpointing": True}
    if config.rewards.optimised is not None and not (config.models.decoder and config.models.decoder.checkpoint):
        yield "models.decoder.checkpoint=true", {"models.decoder.checkpoint": True}
    if config.rewards.optimised is not None and not (config.models.decoder and config.models.decoder.rows):
        rows = {"models.decoder.rows": ROWS}
        yield f"models.decoder.rows={ROWS}", rows
        yield f"models.decoder.rows={ROWS} models.decoder.checkpoint=true", rows | {"models.decoder.checkpoint": True}
    if config.precision == "float32":
        yield "precision=bfloat16", {"precision": "bfloat16"}
    if config.prompts.embeddings is None:
        yield "prompts.embeddings=FOLDER", {"prompts.embeddings": "FOLDER"}
    if config.distributed.reference == "replica":
        place = "shard" if run.gpus > 1 else "offload"
        yield f"distributed.reference={place}", {"distributed.reference": place}
    if all(run.optimizer(role) in ("adamw", "adamw_fused") for role in TRAINED):
        yield of_both("optimizers", "name", "adamw8bit")
    if run.gpus > 1 and stage < 3 and whole:
        yield of_both("distributed", "stage", stage + 1)
    if all(zero.stage and zero.offload_optimizer == "none" for zero in zeros.values()):
        yield of_both("distributed", "offload_optimizer", "cpu")
