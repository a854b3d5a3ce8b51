"""Every warning is raised by a run that goes wrong in its way, once, and by no run that is merely noisy."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from diffpp_fast.training.callbacks import JsonLines
from diffpp_fast.training.watch import LevelChange, Watch, standard_rules

Scalars = dict[str, float]
#: What changes in a log as a function of its number.
Fault = Callable[[int], Scalars]

LOGS, BEGIN = 100, 60
REFERENCE = {"reference/x0_mean": 0.1, "reference/x0_std": 0.8}


def healthy(log: int, seed: int = 0, noise: float = 0.2) -> Scalars:
    """Noisy, with an outlier now and then, and with the trends of a run that goes well: it becomes sharper, and both
    rewards rise."""
    draw = random.Random(1_000_003 * seed + log)
    progress = 1 - math.exp(-log / 20)

    def around(level: float) -> float:
        outlier = 30.0 if draw.random() < 0.02 else 1.0
        return level * outlier * math.exp(draw.gauss(0, noise))

    return {
        "fake/loss": around(0.2 + 0.1 * progress),
        "fake/gradient_norm": around(0.3 + 0.6 * progress),
        "generator/gradient_norm": around(1000 - 500 * progress),
        "generator/x0_mean": 0.1 + 0.2 * draw.gauss(0, noise),
        "generator/x0_std": (0.7 + 0.1 * progress) * math.exp(draw.gauss(0, noise / 4)),
        "generator/updates_skipped": 0.1 if draw.random() < 0.05 else 0.0,
        "fake/updates_skipped": 0.0,
        "grid/reward": 2 * progress + draw.gauss(0, noise / 2),
        "grid/held_out": progress + draw.gauss(0, noise / 2),
    }


def warnings_of(logs: list[Scalars]) -> list[tuple[int, str]]:
    """Step and name of every warning; each log is split into that of the steps and that of the grid."""
    told: list[tuple[int, str]] = []
    watch = Watch(lambda step, name, message: told.append((step, name)))
    watch.on_start(0, len(logs))
    for step, scalars in enumerate(logs):
        grid = {name: value for name, value in scalars.items() if name.startswith("grid/")}
        watch.on_log(step, {name: value for name, value in scalars.items() if name not in grid})
        watch.on_log(step, grid)
    return told


def run(fault: Fault = lambda log: {}, seed: int = 0, known: Mapping[str, float] = REFERENCE) -> list[Scalars]:
    return [{**healthy(log, seed), **known, **(fault(log - BEGIN) if log >= BEGIN else {})} for log in range(LOGS)]


def noisy(level: float, log: int) -> float:
    return level * math.exp(random.Random(log).gauss(0, 0.2))


FAULTS: dict[str, Fault] = {
    "fake-diverging": lambda log: {"fake/loss": noisy(0.3 * 1.1**log, log)},
    "fake-gradient-exploding": lambda log: {"fake/gradient_norm": noisy(0.9 * 1.3**log, log)},
    "fake-gradient-vanishing": lambda log: {"fake/gradient_norm": noisy(0.9 * 0.7**log, log)},
    "generator-gradient-exploding": lambda log: {"generator/gradient_norm": noisy(500 * 1.3**log, log)},
    "generator-gradient-vanishing": lambda log: {"generator/gradient_norm": 0.0},
    "latents-collapsing": lambda log: {"generator/x0_std": noisy(0.8 * 0.95**log, log)},
    "latents-spreading": lambda log: {"generator/x0_std": noisy(0.8 * 1.05**log, log)},
    "latents-drifting": lambda log: {"generator/x0_mean": 0.1 - 0.02 * log + 0.02 * random.Random(log).gauss(0, 1)},
    "reward-hacking": lambda log: {
        "grid/reward": 2 + 0.1 * log + random.Random(log).gauss(0, 0.1),
        "grid/held_out": 1 - 0.05 * log + random.Random(-log).gauss(0, 0.1),
    },
    "updates-skipped": lambda log: {"generator/updates_skipped": 0.3 if log % 2 else 0.0},
}


def test_every_rule_has_its_fault() -> None:
    assert {rule.name for rule in standard_rules()} == FAULTS.keys()


@pytest.mark.parametrize("known", [REFERENCE, {}], ids=["with the reference's latents", "with its own start"])
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named_once(name: str, known: Mapping[str, float], caplog: pytest.LogCaptureFixture) -> None:
    told = warnings_of(run(FAULTS[name], known=known))
    assert [warning for _, warning in told] == [name]
    assert BEGIN < told[0][0] < LOGS - 1
    (record,) = caplog.records
    assert record.levelname == "WARNING" and f"step {told[0][0]}: {name}: " in record.getMessage()


@pytest.mark.parametrize("seed", range(5))
def test_noise_outliers_and_progress_raise_nothing(seed: int) -> None:
    assert warnings_of(run(seed=seed)) == []


@pytest.mark.parametrize("noise", [0.05, 0.3, 1.0])
def test_small_batches_and_long_runs_raise_nothing(noise: float) -> None:
    draw = random.Random(5)
    level = {"fake/loss": 0.2, "fake/gradient_norm": 1.0, "generator/gradient_norm": 500.0, "generator/x0_std": 0.8}
    logs = [
        {
            **REFERENCE,
            **{name: value * math.exp(draw.gauss(0, noise)) for name, value in level.items()},
            "generator/x0_mean": 0.1 + draw.gauss(0, noise),
            **({"grid/reward": draw.gauss(0, noise), "grid/held_out": draw.gauss(0, noise)} if log % 20 == 0 else {}),
        }
        for log in range(2000)
    ]
    assert warnings_of(logs) == []


def test_the_demo_raises_nothing() -> None:
    """The scalars of examples/emoji/align.yaml, in float32 and logged at every second step."""
    lines = (Path(__file__).parent / "healthy_run.jsonl").read_text().splitlines()
    logs = [{name: value for name, value in json.loads(line).items() if name != "step"} for line in lines]
    assert len(logs) > 90
    assert warnings_of(logs) == []
    assert warnings_of([{**log, "reference/x0_mean": 0.0, "reference/x0_std": 1.0} for log in logs]) == []


def test_a_generator_may_begin_with_less_spread_than_the_reference() -> None:
    blurred = [{**REFERENCE, "generator/x0_std": 0.3, "generator/x0_mean": 0.6} for _ in range(40)]
    assert warnings_of(blurred) == []
    sharp = [{**scalars, "generator/x0_std": 0.7, "generator/x0_mean": 0.1} for scalars in blurred]
    assert [name for _, name in warnings_of(blurred + sharp)] == []
    assert {name for _, name in warnings_of(blurred + sharp + blurred)} == {"latents-collapsing", "latents-drifting"}


def test_an_episode_ends_and_another_one_begins() -> None:
    bad = [{"fake/loss": 3.0}] * 10
    good = [{"fake/loss": 0.2}] * 20
    flicker = [{"fake/loss": value} for value in (3.0, 3.0, 3.0, 0.2, 0.2, 0.2) * 5]
    assert [step for step, _ in warnings_of(good + bad + good + bad)] == [22, 52]
    assert len(warnings_of(good + flicker)) == 1


def test_what_is_missing_or_not_finite_is_passed_over() -> None:
    rule = LevelChange("fake-diverging", "fake/loss", factor=3.0, advice="")
    watch = Watch(lambda *warning: pytest.fail(str(warning)), rules=[rule])
    for scalars in ({}, {"fake/loss": math.nan}, {"fake/loss": math.inf}, {"generator/loss": 1e9}):
        for step in range(30):
            watch.on_log(step, scalars)
    assert rule.series.start is None


class Remembers(JsonLines):
    """metrics.jsonl, and what of the warnings is told while the program runs."""

    def __init__(self, path: Path, told: list[tuple[int, str]]) -> None:
        super().__init__(path)
        self.told = told

    def on_warning(self, step: int, name: str, message: str) -> None:
        super().on_warning(step, name, message)
        self.told.append((step, name))


def test_a_resumed_run_remembers(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    logs = run(FAULTS["latents-collapsing"])
    (straight,) = warnings_of(logs)
    for cut in (straight[0] - 4, straight[0] + 4):
        path.unlink(missing_ok=True)
        told: list[tuple[int, str]] = []
        for part in (range(cut + 3), range(cut, LOGS)):  # killed three logs after the last checkpoint
            lines = Remembers(path, told)
            watch = Watch(lines.on_warning, path)
            for callback in (lines, watch):
                callback.on_start(part.start - 1, LOGS)
            for step in part:
                for callback in (lines, watch):
                    callback.on_log(step, logs[step])
        assert told == [straight]
