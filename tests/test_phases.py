"""The times of a step's parts: they add up, and no one waits for the device before the log."""

from __future__ import annotations

import ctypes
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import torch

from diffpp_fast.methods import Batch, DiffInstructPP
from diffpp_fast.schedule import NoiseSchedule
from diffpp_fast.training import load_config
from diffpp_fast.training import phases as module
from diffpp_fast.training.build import build_run
from diffpp_fast.training.distributed import World
from diffpp_fast.training.phases import Memory, Phases, Timed


class Clock:
    """Stands in for the module `time`, and for the device's own timeline."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now

    def work(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


class Event:
    """torch.cuda.Event's contract: what was recorded may be read only once it has been waited for."""

    clock: Clock
    made = 0
    waits: list[float] = []  # noqa: RUF012
    reached = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        Event.made += 1
        self.at: float | None = None

    def record(self, stream: str) -> None:
        assert stream == "stream of cuda:0"
        self.at = Event.clock.now

    def synchronize(self) -> None:
        assert self.at is not None
        Event.waits.append(self.at)
        Event.reached = max(Event.reached, self.at)

    def elapsed_time(self, end: Event) -> float:
        assert self.at is not None and end.at is not None
        assert end.at <= Event.reached, "read before it was waited for"
        return (end.at - self.at) * 1000


@pytest.fixture(params=["cpu", "cuda:0"])
def phases(request: pytest.FixtureRequest, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Iterator[Phases]:
    Event.clock, Event.made, Event.waits, Event.reached = clock, 0, [], 0.0
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    yield Phases(torch.device(request.param))


def test_nested_phases_add_up_to_the_whole(phases: Phases, clock: Clock) -> None:
    clock.work(1)
    with phases("loss"):
        clock.work(2)
        with phases("reference"):
            clock.work(4)
        clock.work(8)
        with phases("reference"), phases("decode"):
            clock.work(16)
    clock.work(32)
    taken = phases.take()
    assert taken == pytest.approx({"loss": 10, "reference": 4, "decode": 16, "other": 33})
    assert sum(taken.values()) == pytest.approx(clock.now - 100)


def test_a_taking_begins_anew_and_loses_nothing(phases: Phases, clock: Clock) -> None:
    with phases("loss"):
        clock.work(1)
        assert phases.take() == pytest.approx({"loss": 1, "other": 0})
        clock.work(2)
    clock.work(4)
    assert phases.take() == pytest.approx({"loss": 2, "other": 4})
    clock.work(8)
    assert phases.take() == pytest.approx({"other": 8})


def test_of_a_whole_phase_what_is_inside_is_no_other(phases: Phases, clock: Clock) -> None:
    with phases("grid", whole=True):
        clock.work(1)
        with phases("decode"):
            clock.work(2)
    with phases("decode"):
        clock.work(4)
    assert phases.take() == pytest.approx({"grid": 3, "decode": 4, "other": 0})


def test_a_module_is_timed_in_place_also_when_it_fails(phases: Phases, clock: Clock) -> None:
    class Network(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            clock.work(3)
            if len(x) == 0:
                raise ValueError("nothing")
            return 2 * x

    network = Network()
    assert phases.wrap(network, "reference") is network
    assert torch.equal(network(torch.ones(1)), torch.tensor([2.0]))
    with pytest.raises(ValueError, match="nothing"):
        network(torch.ones(0))
    clock.work(1)
    assert phases.take() == pytest.approx({"reference": 6, "other": 1})


def test_an_error_closes_its_phases(phases: Phases, clock: Clock) -> None:
    with pytest.raises(ValueError), phases("loss"), phases("reference"):
        clock.work(1)
        raise ValueError
    clock.work(2)
    assert phases.take() == pytest.approx({"loss": 0, "reference": 1, "other": 2})


def test_on_cuda_only_the_taking_waits_and_events_are_used_again(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    Event.clock, Event.made, Event.waits, Event.reached = clock, 0, [], 0.0
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    phases = Phases(torch.device("cuda", 0))
    for log in range(3):
        for _ in range(5):
            with phases("loss"):
                clock.work(1)
        assert len(Event.waits) == log
        assert phases.take()["loss"] == pytest.approx(5)
        assert Event.waits == sorted(Event.waits) and Event.waits[-1] == clock.now
    # Two marks per phase, one where a taking begins and one where it ends.
    assert Event.made == 12


def test_timed_callables_serve_a_method_as_they_are(clock: Clock) -> None:
    class Reference:
        name = "frozen"

        def __call__(self, x: torch.Tensor, t: torch.Tensor, conditioning: object) -> torch.Tensor:
            clock.work(3)
            return 0.5 * x

    phases = Phases(torch.device("cpu"))
    reference = phases.wrap(Reference(), "reference")
    assert isinstance(reference, Timed) and reference.name == "frozen"
    with pytest.raises(AttributeError, match="nothing"):
        _ = reference.nothing
    schedule = NoiseSchedule(torch.tensor([0.8, 0.6]), torch.tensor([0.6, 0.8]))
    shift = torch.zeros(2, requires_grad=True)

    def build(wrap):  # type: ignore[no-untyped-def]
        return DiffInstructPP(
            wrap(lambda z, conditioning: z + shift, "generator"),
            wrap(lambda x, t, conditioning: 0.1 * x, "fake"),
            reference if wrap is not plain else Reference(),
            schedule,
            reward=wrap(lambda x0, conditioning: x0.sum(1), "reward"),
            reward_scale=1.0,
        )

    def plain(function, name):  # type: ignore[no-untyped-def]
        return function

    batch = Batch(torch.arange(3), None, shape=(2,))
    timed, untimed = build(phases.wrap).generator_loss(batch), build(plain).generator_loss(batch)
    assert torch.equal(timed.loss, untimed.loss)
    timed.loss.backward()
    assert shift.grad is not None
    taken = phases.take()
    assert taken["reference"] == pytest.approx(3)
    assert taken.keys() == {"generator", "fake", "reference", "reward", "other"}


def test_passes_through_reward_and_networks_are_phases_of_a_run(tmp_path: Path) -> None:
    """They are half of a step or more, and belong neither to the loss nor to the generator's backward pass."""
    path = tiny.write(tmp_path)
    for name, overrides in (
        ("reward_backward", ()),
        ("networks_backward", ("method.name=sim", "method.weighting=score", "rewards.optimised=null")),
    ):
        phases = Phases(torch.device("cpu"))
        run = build_run(load_config(path, overrides), World.alone("cpu"), phases)
        batch = Batch(
            torch.arange(2),
            run.sampler.encode(["a", "b"]),
            shape=tiny.LATENT,
            null_conditioning=run.null and run.null.expand(2),
        )
        phases.take()
        run.method.generator_loss(batch)
        assert phases.take()[name] > 0


def test_memory_on_the_cpu_is_the_process_s_peak() -> None:
    memory = Memory(torch.device("cpu"))
    before = memory.take()
    assert before.keys() == {"memory/host_peak"}
    taken = torch.ones(2**28, dtype=torch.uint8)  # a quarter of a GiB, touched
    after = memory.take()["memory/host_peak"]
    del taken
    assert 0.01 < before["memory/host_peak"] <= after
    assert after >= 0.25
    assert memory.take()["memory/host_peak"] == after


def test_memory_on_cuda_peaks_since_the_last_taking(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 1)
    peaks = {device: 3 * 2**30}
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda at: 2**30 if at == device else 0)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda at: 4 * 2**30 if at == device else 0)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda at: peaks[at])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda at: peaks.update({at: 2**30}))
    memory = Memory(device)
    first, second = memory.take(), memory.take()
    assert (first["memory/allocated"], first["memory/reserved"], first["memory/peak"]) == (1.0, 4.0, 3.0)
    assert second["memory/peak"] == 1.0


def test_freed_memory_is_given_back_where_a_phase_begins() -> None:
    """Blocks between others that stay: glibc keeps them otherwise."""
    if not hasattr(ctypes.CDLL(None), "malloc_trim"):
        pytest.skip("needs glibc")

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    phases, held = Phases(torch.device("cpu")), list[int]()
    for gives_back in (False, True):
        blocks = [torch.ones(2**14) for _ in range(512)]  # 32 MiB, each too small for a mapping of its own
        kept = blocks[::64]
        del blocks
        phases.gives_back, before = gives_back, resident()
        with phases("part"):
            held.append(before - resident())
        del kept
    assert held[0] < 2**23 < 2**24 < held[1]
