"""`python -m benchmarks step`: a whole training step, the generator's update and the teaching assistant's.

Networks have their true sizes, or scaled-down ones, and random weights: neither time nor memory depends on values. All
providers compute with the same parameters, optimizers and batches. A provider that fails, is wrong or has no room is a
record with the reason, and the others go on.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from benchmarks import memory, reward
from benchmarks.gate import compiler, first_line
from benchmarks.memory import is_out_of_memory, peak_temporary_bytes, release
from benchmarks.reward import TOWERS, NetworkPlan, by_phase, complaints
from benchmarks.step_gate import Oracle
from benchmarks.step_networks import MODELS, StepNetworks, Trained, lay_out, resident_bytes
from benchmarks.step_providers import (
    PROVIDERS,
    ROLES,
    Fused,
    Marks,
    Now,
    Step,
    Unfused,
    balanced_scale,
    differentiate,
    no_time,
    operations,
    seconds,
)
from benchmarks.tables import Outcome
from benchmarks.timing import Timing, count_launches, counted_operations, matrix_peak, turns
from diffpp_fast.errors import ConfigurationError
from diffpp_fast.methods import Batch

#: All providers at one batch, and each at the largest that fits.
COMMON, OWN = "common", "own"
#: The part of the device's memory that the search for a batch may use. The rest is for what the allocator can't use.
SEARCHED = 0.92
#: How often a compiled provider's batch may be lowered by an eighth until it fits.
LOWERED = 2
#: Models that take no time in float64.
SMALL = ("tiny", "small")
WARM_UPS = 1


@dataclass(frozen=True)
class StepRun:
    """A provider at one batch, by role: times by phase, bytes at the peak beyond what is resident, launches."""

    batch: int
    timings: dict[str, dict[str, Timing]]
    peak: dict[str, int]
    launches: dict[str, int]


@dataclass(frozen=True)
class StepOutcome(Outcome):
    """One provider."""

    own_batch: int | None = None  # the largest that fits
    first_call: dict[str, float] = field(default_factory=dict)  # seconds, compilation included, by role
    errors: dict[str, float] = field(default_factory=dict)  # relative, of losses and gradients, by the gate
    runs: dict[str, StepRun] = field(default_factory=dict)  # at COMMON and OWN


@dataclass(frozen=True)
class StepResults:
    """All that is known so far."""

    outcomes: tuple[StepOutcome, ...]
    batch: int | None  # the common one
    resident: int  # bytes of weights, gradients, optimizer states and average
    peak_rate: float  # operations per second of a large matrix product
    operations: dict[str, dict[str, float]]  # for one image of the unfused step, by role and phase


def plan(*, device: torch.device, batch: int | str | None, lora: int | None = None, **choices: Any) -> NetworkPlan:
    """Fill in what was not chosen; on a GPU the batch fills the memory. Raises ConfigurationError as `reward.plan`."""
    if batch == "fill" and device.type != "cuda":
        raise ConfigurationError("--batch fill: needs a GPU, whose memory says where it ends; name a number")
    if batch is None and device.type == "cuda":
        batch = "fill"
    compiles = {name: provider.compiles for name, provider in PROVIDERS.items()}
    chosen = reward.plan(device=device, batch=batch, models=MODELS, providers=compiles, **choices)
    return replace(chosen, lora=lora)


def measure(plan: NetworkPlan) -> Iterator[StepResults]:
    """Yields the results whenever there are more of them.

    Raises:
        ConfigurationError: weights and optimizer states don't fit.
    """
    check_room(plan)
    torch._dynamo.reset()
    with compiler(plan.device, torch.get_num_threads()):
        yield from _Measurement(plan).run()


def check_room(plan: NetworkPlan) -> None:
    """Raises ConfigurationError unless what is resident fits into the device's memory."""
    if plan.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(plan.device)
        needed = resident_bytes(_without_memory(plan))
        if needed > SEARCHED * free:
            raise ConfigurationError(
                f"--model {plan.model}: weights, gradients, AdamW's moments and the average of two networks in float32 "
                f"and the frozen ones take {needed / 2**30:.0f} GiB, {free / 2**30:.0f} GiB are free"
            )


def count_operations(plan: NetworkPlan) -> dict[str, dict[str, float]]:
    """Count the operations of the unfused step for one image, by role and phase, on tensors without memory."""
    networks = _without_memory(replace(plan, dtype=torch.float32))
    counted = {}
    with counted_operations() as total:
        now, between = operations(total)
        for role in ROLES:
            _, marks = differentiate(Unfused(networks), role, networks.batch(0, 1), now)
            marks.end()
            counted[role] = marks.spans(between)
    return counted


def _without_memory(plan: NetworkPlan) -> StepNetworks:
    return StepNetworks(plan.model, plan.latent, plan.dtype, torch.device("meta"), TOWERS[plan.device.type], plan.lora)


class _Measurement:
    """The state of a measurement: networks, what trains them, and the providers that are still in it."""

    def __init__(self, plan: NetworkPlan) -> None:
        self.plan, self.device = plan, plan.device
        self.now, self.between = seconds(plan.device)
        self.peak_rate = matrix_peak(plan.dtype, plan.device)
        self.operations = count_operations(plan)
        self.networks = StepNetworks(plan.model, plan.latent, plan.dtype, plan.device, lora=plan.lora)
        self.networks.reward_scale = balanced_scale(self.networks)
        parts = self.networks.parts
        self.roles = {"generator": parts.generator, "fake": parts.fake}
        self.trained = {role: Trained(network, role == "generator") for role, network in self.roles.items()}
        self.outcomes = {name: StepOutcome(name) for name in plan.names}
        self.steps: dict[str, Step] = {}
        self.batch = plan.batch
        self.oracle: Oracle | None = None
        self.next_batch = 0
        self.memory_format = torch.contiguous_format

    def run(self) -> Iterator[StepResults]:
        filling = self.plan.batch is None
        # Compiling takes minutes: what needs none of it comes first, and is told before the rest begins.
        plain, later = ([n for n in self.plan.names if PROVIDERS[n].compiles == compiles] for compiles in (False, True))
        self._make(plain)
        if filling:
            self._search()
        if self.steps:
            self._judge(plain)
            self._time(COMMON)
            yield self._results()
            if filling:
                self._time(OWN)
                yield self._results()
            for name in later:
                self._make([name])
                self._judge([name])
            if self.steps.keys() & set(later):
                self._time(COMMON)
                yield self._results()
                if filling:
                    self._extend(later)
                    self._time(OWN)
        yield self._results()

    def _results(self) -> StepResults:
        resident = resident_bytes(self.networks)
        return StepResults(tuple(self.outcomes.values()), self.batch, resident, self.peak_rate, self.operations)

    def _note(self, name: str, **changes: Any) -> None:
        self.outcomes[name] = replace(self.outcomes[name], **changes)

    # Providers that come and go

    def _make(self, names: Sequence[str]) -> None:
        for name in names:
            with self._reported(name):
                self.steps[name] = PROVIDERS[name].make(self.networks)

    def _search(self) -> None:
        """The largest batch of every provider, and of all of them."""
        for name in list(self.steps):
            with self._reported(name), _less_memory(self.device):
                batch = memory.largest(lambda size, name=name: self._fits(name, size))  # type: ignore[misc]
                if batch == 0:
                    raise torch.OutOfMemoryError("not even one image fits")
                self._note(name, own_batch=batch)
        self.batch = min((self._size(name, OWN) for name in self.steps), default=None)

    def _extend(self, names: Sequence[str]) -> None:
        """The largest batch of compiled providers, from the memory that they take at the common one."""
        for name in self.steps.keys() & set(names):
            run = self.outcomes[name].runs[COMMON]
            free = int(SEARCHED * torch.cuda.get_device_properties(self.device).total_memory)
            batch = memory.extrapolated(
                run.batch, max(run.peak.values()), free - torch.cuda.memory_allocated(self.device)
            )
            with self._reported(name), _less_memory(self.device):
                for _ in range(LOWERED):
                    if batch > run.batch and not self._fits(name, batch):
                        batch = max(run.batch, batch - max(1, batch // memory.PARTS))
                self._note(name, own_batch=batch)

    def _fits(self, name: str, size: int) -> bool:
        """Whether a provider's two updates run at a batch of this size."""
        try:
            self._lay_out(name)
            for role in ROLES:
                self._step(name, role, self.networks.batch(0, size))
            self._synchronize()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        else:
            return True
        # Out here, for the error held the frames in which it arose, and they what fills the memory.
        self._forget()
        return False

    def _judge(self, names: Sequence[str]) -> None:
        """Takes out what is wrong, so that it is not timed."""
        assert self.batch is not None
        if self.oracle is None:
            self._lay_out("eager")
            exact = torch.float64 if self.plan.model in SMALL else torch.float32
            self.oracle = Oracle(self.networks, self.networks.batch(0, self.batch), exact)
        for name in [name for name in names if name in self.steps]:
            with self._reported(name):
                self._lay_out(name)
                errors: dict[str, float] = {}
                for role, network in self.roles.items():
                    with self._first_call(name, role):
                        loss = self.oracle.differentiate(self.steps[name], role)
                    errors |= self.oracle.errors(role, loss, network)
                    self.trained[role].forget()
                wrong = complaints(errors, self.oracle.allowed)
                self._note(name, errors=errors, wrong="; ".join(wrong) or None)
                if wrong:
                    del self.steps[name]

    @contextmanager
    def _reported(self, name: str) -> Iterator[None]:
        """An error of any kind within the block is the end of this provider, not of the others."""
        failed = True
        try:
            yield
            failed = False
        except Exception as error:
            reason = first_line(error)
            absent = PROVIDERS[name].compiles or is_out_of_memory(error)
            self._note(name, **{"left_out" if absent else "wrong": reason})
        if failed:
            self.steps.pop(name, None)
            self._forget()

    # One step

    def _step(self, name: str, role: str, batch: Batch, now: Now = no_time) -> Marks:
        """A loss, its backward pass and the update of its network."""
        with self._first_call(name, role):
            _, marks = differentiate(self.steps[name], role, batch, now)
        marks.begin("update")
        self.trained[role].update(ours=isinstance(self.steps[name], Fused))
        marks.end()
        return marks

    @contextmanager
    def _first_call(self, name: str, role: str) -> Iterator[None]:
        """Notes how long the first block of this provider and role took."""
        known = self.outcomes[name].first_call
        start = time.perf_counter()
        yield
        if role not in known:
            self._synchronize()
            self._note(name, first_call={**known, role: time.perf_counter() - start})

    def _lay_out(self, name: str) -> bool:
        """Moves all weights into the provider's order of memory. Returns whether they were in another."""
        wanted = PROVIDERS[name].memory_format
        if wanted == self.memory_format:
            return False
        for trained in self.trained.values():
            trained.lay_out(wanted)
        parts = self.networks.parts
        for frozen in (parts.reference, *parts.path.networks):
            lay_out(frozen.parameters(), wanted)
        self.memory_format = wanted
        return True

    def _forget(self) -> None:
        """Frees what a step that has failed has left."""
        for trained in self.trained.values():
            trained.forget()
        release(self.device)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    # Time and memory

    def _size(self, name: str, section: str) -> int:
        size = self.batch if section == COMMON else self.outcomes[name].own_batch
        assert size is not None
        return size

    def _time(self, section: str) -> None:
        """Interleaved: every round times every provider on a batch of its own, the next one first."""
        samples: dict[str, dict[str, list[dict[str, float]]]] = {
            name: {role: [] for role in ROLES} for name in self.steps
        }
        first = self.next_batch + WARM_UPS
        for turn, name in turns(self.steps, self.plan.rounds, WARM_UPS):
            self.next_batch = first + turn
            if name in self.steps:
                with self._reported(name):
                    for role, spans in self._spans(name, section).items():
                        if turn >= 0:
                            samples[name][role].append(spans)
        self.next_batch += 1
        for name in list(self.steps):
            with self._reported(name):
                run = self._measured(name, section, samples[name])
                self._note(name, runs={**self.outcomes[name].runs, section: run})

    def _spans(self, name: str, section: str) -> dict[str, dict[str, float]]:
        """Seconds of each phase of both roles' updates."""
        moved = self._lay_out(name)
        if section == OWN:
            release(self.device)
        batch = self.networks.batch(self.next_batch, self._size(name, section))
        spans = {}
        for role in ROLES:
            if moved or section == OWN:
                self._step(name, role, batch)  # the allocator has to find other blocks
            marks = self._step(name, role, batch, self.now)
            self._synchronize()
            spans[role] = marks.spans(self.between)
        return spans

    def _measured(self, name: str, section: str, samples: dict[str, list[dict[str, float]]]) -> StepRun:
        self._spans(name, section)  # once more, so that nothing that comes is a first
        batch = self.networks.batch(self.next_batch, self._size(name, section))
        peak, launches = {}, {}
        for role in ROLES:

            def call(role: str = role) -> tuple[torch.Tensor, ...]:
                self._step(name, role, batch)
                return ()

            peak[role] = peak_temporary_bytes(call, self.device)
            if self.device.type == "cuda":
                launches[role] = count_launches(call)
        timings = {role: by_phase(taken) for role, taken in samples.items()}
        return StepRun(len(batch), timings, peak, launches)


@contextmanager
def _less_memory(device: torch.device) -> Iterator[None]:
    """Within the block, a part of the device's memory can't be had: what fits without it will fit again."""
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(SEARCHED, device)
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0, device)
