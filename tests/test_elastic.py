"""A run is the same run on any number of processes: the command itself, started once per rank, on gloo."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import processes
import pytest
import tiny
import torch

from diffpp_fast.training import Trainer, load_config
from diffpp_fast.training.checkpoint import read_role

#: A large eps: with the usual one Adam's first updates are sign(g), which magnifies rounding. Clips that bite, and
#: steps large enough for a difference to show.
COMMON = (
    "training.steps=4",
    "training.checkpoint_every=2",
    "training.fake_warmup=1",
    "training.grid_every=null",
    "training.keep=9",
    "rewards.held_out=null",
    "optimizers.generator={lr: 1e-2, betas: [0.5, 0.99], eps: 1e-2, clip: 0.5, warmup_steps: 2, schedule: cosine}",
    "optimizers.fake={lr: 1e-2, betas: [0.5, 0.99], eps: 1e-2, clip: 0.05}",
    "ema={decay: 0.5}",
)
#: ||difference|| / ||weights||, in float32.
TOLERANCE = 1e-6
#: ||difference|| / ||update||: what the run itself has changed.
UPDATE_TOLERANCE = 1e-4
WEIGHTS = ("generator", "fake", "generator_ema")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run whose reward is not finite for some of the prompts."""
    config = tiny.write(tmp_path_factory.mktemp("elastic"))
    reward = "rewards.py:undefined_for\n    arguments:\n      word: frog"
    config.write_text(config.read_text().replace("rewards.py:redness\n    arguments:\n      channel: 0", reward))
    return config


@pytest.fixture(scope="module")
def alone(project: Path) -> Path:
    """The run in one process."""
    output = project.parent / "alone"
    Trainer(load_config(project, [f"output={output}", *COMMON])).run()
    return output


def train(project: Path, output: Path, size: int, *overrides: str) -> None:
    """The same run, or its next part, on so many processes."""
    command = ["-m", "diffpp_fast", "train", str(project), f"output={output}", *COMMON, *overrides]
    processes.run([*command, "--resume", "latest"], size)


def go_back(output: Path) -> None:
    """As if the run had been stopped after step 2. Fewer steps in all would be another run: the learning rate falls."""
    shutil.rmtree(output / "checkpoints" / "step_000004")


def zero(stage: int) -> str:
    return f"distributed={{generator: {{stage: {stage}}}, fake: {{stage: {stage}}}}}"


def tensors(output: Path, step: int, stem: str) -> dict[str, torch.Tensor]:
    return read_role(output / "checkpoints" / f"step_{step:06d}", stem)


def assert_same_run(output: Path, alone: Path) -> None:
    """Weights, averages, moments and everything that was logged: prompts, latents, times and noise are in all of it."""
    for stem in WEIGHTS:
        mine, theirs, start = tensors(output, 4, stem), tensors(alone, 4, stem), tensors(alone, 2, stem)
        assert mine.keys() == theirs.keys()
        flat, other, before = (torch.cat([part[name].flatten() for name in theirs]) for part in (mine, theirs, start))
        assert (flat - other).norm() <= TOLERANCE * other.norm(), stem
        assert (flat - other).norm() <= UPDATE_TOLERANCE * (other - before).norm(), stem
    for role in ("generator", "fake"):
        mine, theirs = (tensors(run, 4, f"{role}_optimizer") for run in (output, alone))
        assert mine.keys() == theirs.keys()
        for name in theirs:
            difference = (mine[name] - theirs[name]).double()
            assert difference.norm() <= 1e-3 * theirs[name].double().norm() + 1e-9, name
    mine, theirs = records(output), records(alone)
    assert any(0 < record.get("generator/reward_undefined", 0) < 1 for record in theirs)
    assert [record["step"] for record in mine] == [record["step"] for record in theirs]
    for one, other in zip(mine, theirs, strict=True):
        assert one.get("message") == other.get("message")
        for name, value in other.items():
            if name.startswith(("fake/", "generator/")):
                # A cosine rounds in units of 1, however small it is itself.
                slack = 1e-5 if name == "generator/gradient_cosine" else 1e-6
                assert math.isclose(one[name], value, rel_tol=1e-4, abs_tol=slack), (name, one[name], value)


def records(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_then_four_are_one(project: Path, alone: Path, tmp_path: Path) -> None:
    """Stage 2 and micro-batches of one, interrupted; then stage 1 in twice as many processes."""
    train(project, tmp_path, 2, zero(2), "training.micro_batch=1")
    go_back(tmp_path)
    train(project, tmp_path, 4, zero(1))
    assert_same_run(tmp_path, alone)


@pytest.mark.slow
def test_stage_3_is_the_same_run_and_one_process_goes_on(project: Path, alone: Path, tmp_path: Path) -> None:
    train(project, tmp_path, 2, zero(3), "distributed.reference=shard")
    go_back(tmp_path)
    train(project, tmp_path, 1)
    assert_same_run(tmp_path, alone)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("micro_batch", ["null", "1"])
def test_every_stage_is_the_same_run(
    project: Path, alone: Path, tmp_path: Path, size: int, stage: int, micro_batch: str
) -> None:
    train(project, tmp_path, size, zero(stage), f"training.micro_batch={micro_batch}")
    assert_same_run(tmp_path, alone)


@pytest.mark.slow
def test_one_process_then_many_are_one(project: Path, alone: Path, tmp_path: Path) -> None:
    train(project, tmp_path, 1, "training.micro_batch=3")
    go_back(tmp_path)
    train(project, tmp_path, 4, zero(3))
    assert_same_run(tmp_path, alone)


@pytest.mark.slow
@pytest.mark.parametrize(
    "parts",
    [
        ("models.generator.lora={rank: 4}", "models.fake.lora={rank: 4}"),
        ("models.generator.lora={rank: 4}",),
        ("distributed.reference=offload",),
        ("training.activation_checkpointing=true", "method.fake_rounds=2"),
        ("method.share_samples=true", "training.micro_batch=1"),
        ("models.generator.timestep=null", "models.generator.timesteps=[900, 600, 200]", "training.micro_batch=1"),
    ],
    ids=["adapters", "one adapter", "reference offloaded", "checkpointing", "shared samples", "three calls"],
)
def test_other_parts_are_the_same_run_in_two_processes(project: Path, tmp_path: Path, parts: tuple[str, ...]) -> None:
    one = [part for part in parts if not part.startswith("distributed")]
    train(project, tmp_path / "alone", 1, *one)
    train(project, tmp_path / "two", 2, zero(2), *parts)
    assert_same_run(tmp_path / "two", tmp_path / "alone")


def test_a_batch_that_can_not_be_shared_is_refused(project: Path, tmp_path: Path) -> None:
    command = ["-m", "diffpp_fast", "train", str(project), f"output={tmp_path / 'run'}", "training.global_batch=3"]
    for code, output in processes.finish(processes.start(command, 2)):
        assert code == 2 and "training.global_batch is 3, which 2 processes can't share evenly" in output
    assert not (tmp_path / "run").exists()
