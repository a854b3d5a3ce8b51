"""Captured steps against uncaptured ones, on a GPU: a tiny run of each, from the same start.

`python tests/capture_check.py --device cuda`; without a GPU a stand-in for CUDA graphs does the recorded work again.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import tiny
import torch

from diffpp_fast.training import Trainer, load_config, trainer

T = TypeVar("T")
#: Of a scalar of the log, and of a weight: sums on a GPU come in any order.
ALLOWED = 1e-3
#: Two shapes of a micro-batch, a guided reference, a reward through the decoder, and a TA that warms up.
OVERRIDES = [
    *("training.checkpoint_every=100", "training.fake_warmup=1"),
    *("training.global_batch=5", "training.micro_batch=2", "training.grid_every=null", "training.baseline_steps=null"),
    *("rewards.held_out=null", "logging.tensorboard=false"),
    # With the usual eps Adam's first updates are sign(g), which magnifies rounding.
    *("optimizers.generator.eps=1", "optimizers.fake.eps=1", "optimizers.fake.lr=1"),
]


class Again:
    """In place of CUDA graphs: does the recorded work again on the same inputs.

    Args:
        watch: a context that refuses to wait for a device.
    """

    def __init__(self, watch: Callable[[], Any] | None = None) -> None:
        self.watch = watch
        self.replays = self.recorded = 0

    def rehearse(self, work: Callable[[], T], *, watch: bool) -> T:
        if self.watch is None or not watch:
            return work()
        with self.watch():
            return work()

    def record(self, work: Callable[[], T]) -> Callable[[], T]:
        self.recorded += 1

        def replay() -> T:
            self.replays += 1
            return work()

        return replay


@contextmanager
def standing_in(device: str) -> Iterator[None]:
    """Where there are no CUDA graphs."""
    make_tape = trainer.make_tape
    if device == "cpu":
        trainer.make_tape = lambda *_: Again()
    try:
        yield
    finally:
        trainer.make_tape = make_tape


def run(folder: Path, device: str, steps: int, *, capture: bool) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Return a run's weights and the scalars of its last log."""
    output = folder / f"capture_{capture}".lower()
    given = [*OVERRIDES, f"device={device}", f"output={output}", f"training.steps={steps}"]
    given.append(f"training.capture={capture}".lower())
    with standing_in(device):
        made = Trainer(load_config(folder / "align.yaml", given))
        made.run()
    weights = {
        f"{engine.role}.{name}": weight.detach().cpu()
        for engine in (made.generator, made.fake)
        for name, weight in engine.parameters.items()
    }
    return weights, dict(made._scores)


def differences(device: str, steps: int = 6) -> dict[str, float]:
    """Relative differences of captured and uncaptured: of every weight's norm, and of every scalar that is no time."""
    with tempfile.TemporaryDirectory() as folder:
        tiny.write(Path(folder))
        (plain, about), (captured, figures) = (
            run(Path(folder), device, steps, capture=capture) for capture in (False, True)
        )
    found = {
        name: float((captured[name] - weight).norm() / weight.norm().clamp(min=1e-3)) for name, weight in plain.items()
    }
    measured = ("time/", "memory/", "samples_per_second")
    for name, value in about.items():
        if not name.startswith(measured):
            found[name] = abs(figures[name] - value) / max(abs(value), 1e-3)
    print(f"{about['samples_per_second']:.1f} samples/s uncaptured, {figures['samples_per_second']:.1f} captured")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    found = differences(parser.parse_args().device)
    worst = max(found, key=lambda name: found[name] if found[name] == found[name] else float("inf"))
    right = all(value <= ALLOWED for value in found.values())
    print(f"captured steps: {len(found)} weights and scalars, {worst} differs most, by {found[worst]:.1e}")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
