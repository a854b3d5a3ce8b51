"""The plan: memory of one GPU at the moment when it is fullest, and the step's time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from diffpp_fast.training.planning.gpus import Gpu
from diffpp_fast.training.planning.setup import Setup, Trained, Zero
from diffpp_fast.training.planning.states import State, frozen_state, trained_state
from diffpp_fast.training.planning.step import Counted, Phase, count
from diffpp_fast.training.planning.timing import EFFICIENCY, NETWORK, Time, estimate
from diffpp_fast.training.prompts.encoder import CAPACITY

ROLES = ("generator", "fake", "reference", "text encoder", "decoder", "reward")
KINDS = ("weights", "master weights", "gradients", "optimizer", "EMA", "activations", "communication")
#: What CUDA, cuBLAS, cuDNN and NCCL take for themselves, and what is lost between blocks of the allocator: bytes, and a
#: share of the GPU's memory. An assumption.
RESERVE, RESERVED_SHARE = 1.5 * 2**30, 0.03
#: The phase in which an optimizer works, after its backward pass.
STEP = "optimizer"


@dataclass(frozen=True)
class Plan:
    """What a run needs.

    Attributes:
        memory: bytes on one GPU by role and kind, at the peak.
        peak: the update and the phase of the peak.
        phases: every phase, for one micro-batch, with the bytes that are alive in it in all.
        host: bytes in the CPU's memory, or on disk, per process.
        reserve: bytes that are left to libraries and to fragmentation.
    """

    setup: Setup
    gpu: Gpu
    efficiency: float
    network: float
    memory: Mapping[str, Mapping[str, int]]
    peak: tuple[str, str]
    phases: tuple[tuple[Phase, int], ...]
    host: int
    time: Time
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


def make_plan(setup: Setup, gpu: Gpu, *, efficiency: float = EFFICIENCY, network: float = NETWORK) -> Plan:
    """Counts a step on meta and adds what the engines hold.

    Args:
        efficiency: share of the GPU's peak that matrix products reach.
        network: GB/s per GPU between machines.
    """
    counted = _counted(_as_counted(setup))
    states = _states(setup, counted)
    resident = sum(state.resident for state in states.values())
    moments = [(phase, resident + _of_update(states, phase)) for phase in _with_steps(counted.phases)]
    peak, _ = max(moments, key=lambda moment: moment[1])
    return Plan(
        setup=setup,
        gpu=gpu,
        efficiency=efficiency,
        network=network,
        memory=_memory(states, peak),
        peak=(peak.update, peak.name),
        phases=tuple(moments),
        host=sum(state.host for state in states.values()),
        time=estimate(setup, counted, gpu, efficiency, network),
        counted=counted,
    )


@lru_cache(maxsize=64)
def _counted(setup: Setup) -> Counted:
    return count(setup)


def _as_counted(setup: Setup) -> Setup:
    """The same run for the count, without what does not change it: a count takes seconds."""

    def plain(trained: Trained) -> Trained:
        return Trained(lora=trained.lora, zero=Zero(1) if _is_spread(trained) else None)

    return replace(
        setup,
        generator=plain(setup.generator),
        fake=plain(setup.fake),
        gpus=1,
        global_batch=setup.micro,
        micro_batch=setup.micro,
        reference="replica",
        text_resident=True,
        fake_rounds=1,
    )


def _is_spread(trained: Trained) -> bool:
    """The network computes with weights of the run's precision, not with float32 ones under autocast."""
    return trained.zero is not None and trained.zero.stage > 0


def _states(setup: Setup, counted: Counted) -> dict[str, State]:
    sizes, models, low = counted.sizes, setup.models, setup.precision == "bfloat16"
    width = (setup.reference_dtype or setup.dtype).itemsize
    states: dict[str, State] = {}
    held = {models.backbones[2]}  # the reference's frozen weights
    for role, backbone in zip(("generator", "fake"), models.backbones, strict=False):
        trained: Trained = getattr(setup, role)
        # Adapters on weights that another role holds already add nothing but themselves.
        shared = trained.lora is not None and backbone in held
        if trained.lora is not None:
            held.add(backbone)
        states[role] = trained_state(
            sizes[role], trained, setup.gpus, low, frozen=0 if shared else None, frozen_width=width
        )
    states["reference"] = frozen_state(sizes["reference"].elements, width, setup.reference, setup.gpus)
    states["text encoder"] = State(weights=counted.text_bytes, kept=CAPACITY) if setup.text_resident else State()
    states["decoder"] = State(weights=(setup.decoder_dtype or setup.dtype).itemsize * sizes["decoder"].elements)
    states["reward"] = State(weights=counted.reward_bytes)
    return states


def _with_steps(phases: tuple[Phase, ...]) -> list[Phase]:
    return [*phases, *(Phase(role, STEP, {}, {}) for role in ("fake", "generator"))]


def _of_update(states: Mapping[str, State], phase: Phase) -> int:
    """Bytes of a phase beyond what is there all the time."""
    return sum(sum(_passing(role, state, phase).values()) for role, state in states.items())


def _passing(role: str, state: State, phase: Phase) -> dict[str, int]:
    """What a role holds in a phase only, by kind.

    An update's gradients are there from its first backward pass to its end: with several micro-batches in all of its
    phases, so they are counted in all of them.
    """
    own = role == phase.update
    gathered = state.communication if own or phase.name.startswith(role) else 0
    return {
        "gradients": (state.gradients if own else 0) + (state.update if own and phase.name == STEP else 0),
        "activations": phase.at_peak.get(role, 0) + state.kept,
        "communication": gathered,
    }


def _memory(states: Mapping[str, State], peak: Phase) -> dict[str, dict[str, int]]:
    memory = {}
    for role in ROLES:
        state = states[role]
        lasting = {
            "weights": state.weights,
            "master weights": state.master,
            "optimizer": state.optimizer,
            "EMA": state.ema,
        }
        kinds = {**lasting, **_passing(role, state, peak)}
        memory[role] = {kind: kinds[kind] for kind in KINDS}
    return memory
