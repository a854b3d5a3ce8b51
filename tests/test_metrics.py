"""Means between two logs: over steps, micro-batches and processes, whatever is not finite."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import processes
import pytest
import torch

from diffpp_fast.training.distributed import World
from diffpp_fast.training.faults import SkippedUpdates
from diffpp_fast.training.metrics import Means

ALONE = World.alone("cpu")

#: Two processes share updates of four samples; what they log has to be what one process with all samples logs.
WORKER = """
import torch
import torch.distributed as dist
from diffpp_fast.training.distributed import World
from diffpp_fast.training.metrics import Means

world = World.join("cpu")
calls, reduce = [], dist.all_reduce
dist.all_reduce = lambda *arguments, **options: (calls.append(1), reduce(*arguments, **options))
means = Means()
rewards = torch.tensor([[1.0, 2.0, 4.0, 8.0], [0.0, 0.0, 3.0, 3.0]])
for update, values in enumerate(rewards):
    mine = world.share(values)
    means.add({"loss": mine.mean(), "norm": torch.tensor(float(update))}, prefix="generator", weight=0.5)
    means.add_samples("generator/reward", mine)
# An update that only one process finds not to be finite.
means.add({"gap": torch.tensor(3.0 if world.rank == 0 else torch.nan)}, prefix="generator")
taken = means.take(world, {"time/loss": 1.0 + world.rank, "memory/peak": 4.0 - world.rank})
assert len(calls) == 1, calls
expected = {
    "generator/loss": rewards.mean().item(),
    "generator/norm": 0.5,
    "generator/gap": 3.0,
    "generator/reward": rewards.mean().item(),
    "generator/reward_std": rewards.std(1, correction=0).mean().item(),
    "time/loss": 1.5, "time/loss_max": 2.0,
    "memory/peak": 3.5, "memory/peak_max": 4.0,
}
assert taken.keys() == expected.keys(), taken
assert all(abs(taken[name] - value) < 1e-6 for name, value in expected.items()), taken
assert means.take(world) == {} and len(calls) == 1
world.close()
print("agreed")
"""


def test_processes_log_what_one_process_would_with_one_collective(tmp_path: Path) -> None:
    assert [output.strip() for output in processes.run_source(WORKER, tmp_path, 2)] == ["agreed"] * 2


def test_means_are_weighted() -> None:
    means = Means()
    for loss, gap, weight in ((1.0, 10.0, 0.75), (5.0, 20.0, 0.25), (3.0, 30.0, 1.0)):
        means.add({"loss": torch.tensor(loss), "gap": torch.tensor(gap)}, prefix="fake", weight=weight)
    means.add({"loss": torch.tensor(7.0)}, prefix="generator")
    assert means.take(ALONE) == pytest.approx(
        {"fake/loss": (0.75 + 1.25 + 3) / 2, "fake/gap": (7.5 + 5 + 30) / 2, "generator/loss": 7.0}
    )
    assert means.take(ALONE) == {}


def test_what_is_not_finite_is_left_out_with_its_weight() -> None:
    means = Means()
    for loss, gap in ((1.0, 1.0), (math.nan, 2.0), (math.inf, 3.0), (3.0, 4.0)):
        means.add({"loss": torch.tensor(loss), "gap": torch.tensor(gap)}, prefix="fake")
    means.add({"norm": torch.tensor(math.nan)}, prefix="fake")
    means.add_samples("reward", torch.tensor([1.0, math.nan]))
    means.add_samples("reward", torch.tensor([1.0, 3.0]))
    taken = means.take(ALONE)
    assert math.isnan(taken.pop("fake/norm"))
    # Of the first update's samples one is left: 1, without spread.
    assert taken == pytest.approx({"fake/loss": 2.0, "fake/gap": 2.5, "reward": 1.5, "reward_std": 0.5})


def test_a_spread_about_a_mean_does_not_depend_on_the_parts() -> None:
    values = torch.linspace(-3.0, 5.0, 12) ** 3
    for size in (1, 3, 4, 12):
        means = Means()
        for part in values.split(size):
            scalars = {"x0_mean": part.mean(), "x0_std": part.std(correction=0)}
            means.add(scalars, prefix="generator", weight=size / 12)
        expected = {"generator/x0_mean": values.mean().item(), "generator/x0_std": values.std(correction=0).item()}
        assert means.take(ALONE) == pytest.approx(expected, rel=1e-6), size


def test_what_each_sample_was_given_is_told_in_the_order_of_the_samples() -> None:
    means, told = Means(), {}
    means.add_samples("reward", torch.tensor([1.0, math.nan]))
    means.add_samples("reward", torch.tensor([3.0, 4.0]))
    means.take(ALONE, tell=lambda name, given: told.update({name: given.tolist()}))
    assert str(told) == "{'reward': [[1.0, nan], [3.0, 4.0]]}"


def test_the_spread_of_samples_is_that_within_an_update() -> None:
    means = Means()
    means.add_samples("reward", torch.tensor([1.0, 3.0]))
    means.add_samples("reward", torch.tensor([11.0, 17.0]))
    assert means.take(ALONE) == pytest.approx({"reward": 8.0, "reward_std": 2.0})


def test_alone_a_figure_of_the_process_is_itself() -> None:
    assert Means().take(ALONE, {"memory/peak": 0.5}) == {"memory/peak": 0.5}


def test_nothing_is_read_before_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    for name in ("item", "tolist", "__float__", "__bool__"):
        original = getattr(torch.Tensor, name)

        def counted(self: torch.Tensor, *arguments: object, original: object = original, name: str = name) -> object:
            reads.append(name)
            return original(self, *arguments)  # type: ignore[operator]

        monkeypatch.setattr(torch.Tensor, name, counted)
    means = Means()
    for _ in range(3):
        means.add({"loss": torch.tensor(1.0)}, prefix="fake", weight=0.5)
        means.add_samples("reward", torch.ones(2))
    assert reads == []
    means.take(ALONE, {"memory/peak": 0.5})
    assert reads == ["tolist"]


def test_skipped_updates_are_counted_when_they_are_read() -> None:
    batches: Any = SimpleNamespace(world=ALONE)
    skips = SkippedUpdates("fake", batches, row=2, first_sample=5)
    assert skips.record() == (2, 5) and skips.take_share() is None
    for first, norm in ((8, math.inf), (16, 1.0), (24, math.nan)):
        skips.note(torch.tensor(norm), first)
    assert skips.record() == (1, 24)
    skips.note(torch.tensor(math.nan), 32)
    assert skips.record() == (2, 24) and skips.take_share() == 0.75 and skips.take_share() is None
    # A row that began before a resume goes on.
    skips = SkippedUpdates("fake", batches, row=2, first_sample=5)
    skips.note(torch.tensor(math.inf), 8)
    assert skips.record() == (3, 5)
