"""A run that computes well does not die of its logs, and what ends it comes after a checkpoint."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from diffpp_fast.cli import quiet
from diffpp_fast.cli.main import main
from diffpp_fast.errors import CheckpointError, ConfigurationError
from diffpp_fast.training import Callback, Trainer, load_config, trainer
from diffpp_fast.training.checkpoint import read_tensors
from diffpp_fast.training.distributed import World
from diffpp_fast.training.grids import Grid
from diffpp_fast.training.interrupt import SIGNALS, Interrupt
from diffpp_fast.training.lock import LOCK

QUIET = ("training.grid_every=null", "rewards.held_out=null", "training.baseline_steps=null")

#: A reward that fails at the third of the generator's updates while a variable is set.
FAILING = """
import os


def served():
    calls = []

    def score(images, prompts):
        calls.append(len(prompts))
        if len(calls) == 3 and "REWARD_FAILS" in os.environ:
            raise RuntimeError("the reward's server is gone")
        return images[:, 0].mean((1, 2))

    return score
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration file of a tiny run."""
    config = tiny.write(tmp_path_factory.mktemp("project"))
    (config.parent / "failing.py").write_text(FAILING)
    return config


class Breaks(Callback):
    """Fails whenever it is told something but the start; breaks metrics.jsonl at the first step."""

    def __init__(self, output: Path) -> None:
        self.output = output

    def on_step(self, step: int) -> None:
        metrics = self.output / "metrics.jsonl"
        if metrics.is_file():
            metrics.unlink()
            metrics.mkdir()
            shutil.rmtree(self.output / "grids")
            (self.output / "grids").write_text("no folder")
        raise ValueError("not today")

    def on_end(self, step: int) -> None:
        raise ValueError("nor at the end")


class Gone(io.StringIO):
    """A reader that has seen enough."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")


def test_logs_that_fail_are_told_once_and_the_run_goes_on(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = load_config(project, [f"output={tmp_path}", "training.steps=3", "training.grid_every=1"])
    drawn, draw = [], Grid.draw

    def out_of_memory(grid: Grid) -> Any:
        drawn.append(1)
        if len(drawn) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return draw(grid)

    monkeypatch.setattr(Grid, "draw", out_of_memory)
    monkeypatch.setattr(sys, "stdout", Gone())
    assert Trainer(config, callbacks=[Breaks(tmp_path)]).run().step == 3
    monkeypatch.undo()
    warnings = [record.getMessage() for record in caplog.records if record.name.endswith("trainer")]
    said = (
        "Progress failed",
        "Breaks failed at step 1 (ValueError: not today)",
        "JsonLines failed",
        "can't write",
        "no sample",
    )
    assert [sum(part in warning for warning in warnings) for part in said] == [1] * 5 and len(warnings) == 5, warnings
    assert (tmp_path / "generator").is_dir() and (tmp_path / "checkpoints" / "step_000003").is_dir()


def test_the_first_grid_must_be_drawn(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(grid: Grid) -> Any:
        raise RuntimeError("a wrong decoder")

    monkeypatch.setattr(Grid, "draw", fail)
    with pytest.raises(RuntimeError, match="a wrong decoder"):  # there is nothing to lose yet
        Trainer(load_config(project, [f"output={tmp_path}"])).run()


def test_an_error_comes_after_a_checkpoint_and_the_run_goes_on_to_the_same_bits(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    factory = f"{project.parent}/failing.py:served"
    reward = f"rewards.optimised={{factory: '{factory}', scale: 2.0}}"
    rare = (*QUIET, reward, "training.steps=3", "training.checkpoint_every=100", "method.fake_rounds=2")

    def run(name: str, resume: str | None = None) -> dict[str, torch.Tensor]:
        Trainer(load_config(project, [f"output={tmp_path / name}", *rare]), resume=resume).run()
        return read_tensors(tmp_path / name / "checkpoints" / "step_000003" / "generator_optimizer.safetensors")

    straight = run("straight")
    monkeypatch.setenv("REWARD_FAILS", "1")
    with pytest.raises(ConfigurationError, match="RuntimeError: the reward's server is gone"):
        run("run")
    assert "an error ends the run; its state was saved" in caplog.text
    state = json.loads((tmp_path / "run" / "checkpoints" / "step_000002" / "state.json").read_text())
    assert (state["step"], state["rounds"], state["samples"]) == (2, 2, (2 * 3 + 2) * 4)
    assert not (tmp_path / "run" / LOCK).exists()
    monkeypatch.delenv("REWARD_FAILS")
    resumed = run("run", "latest")
    assert resumed.keys() == straight.keys()
    assert not [name for name, tensor in straight.items() if not torch.equal(tensor, resumed[name])]


def test_prompts_that_change_end_a_run_after_a_checkpoint(project: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    shutil.copy(project.parent / "prompts.txt", prompts)

    class Edit(Callback):
        def on_step(self, step: int) -> None:
            if step == 1:
                os.utime(prompts, ns=(1, 1))  # touched: nothing happens
            if step == 2:
                prompts.write_text("something else\n")

    rare = (*QUIET, f"prompts={prompts}", "training.checkpoint_every=100")
    with pytest.raises(ConfigurationError, match="has changed since it was opened"):
        Trainer(load_config(project, [f"output={tmp_path / 'run'}", *rare]), callbacks=[Edit()]).run()
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_000002"]


def test_an_export_that_fails_leaves_the_weights_and_says_where(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> None:
        raise ValueError("no such network")

    monkeypatch.setattr(trainer, "export_generator", fail)
    assert main(["train", str(project), f"output={tmp_path}", *QUIET, "training.steps=1"]) == 2
    said = capsys.readouterr().err
    assert "the run is complete and its last checkpoint is saved, but the generator can't be exported: no such" in said
    assert f"diffpp-fast export {tmp_path} --out FOLDER" in said


def test_a_run_that_was_replaced_saves_nothing_over_the_other(project: Path, tmp_path: Path) -> None:
    class Replaced(Callback):
        def on_step(self, step: int) -> None:
            lock = json.loads((tmp_path / LOCK).read_text())
            (tmp_path / LOCK).write_text(json.dumps(lock | {"token": "other", "host": "node7"}))

    with pytest.raises(CheckpointError, match=r"has been taken over by process .* on node7"):
        Trainer(load_config(project, [f"output={tmp_path}", *QUIET]), callbacks=[Replaced()]).run()
    assert not (tmp_path / "checkpoints").exists() and (tmp_path / LOCK).exists()


STREAMS = """
import os, runpy, sys
runpy.run_path(sys.argv[1])["open_streams"]()
with open(sys.argv[2], "w") as file:
    os.write(1, b"what a library prints")
    print("and what we do", file=sys.stderr)
    file.write("mine")
"""


def test_closed_streams_take_no_file_s_place(tmp_path: Path) -> None:
    # Without stdout and stderr the first files that are opened would be 1 and 2.
    command = [sys.executable, "-c", STREAMS, str(quiet.__file__), str(tmp_path / "file")]
    assert subprocess.run(["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *command], timeout=60).returncode == 0
    assert (tmp_path / "file").read_text() == "mine"


def test_a_command_whose_reader_is_gone_ends_quietly(monkeypatch: pytest.MonkeyPatch, project: Path) -> None:
    monkeypatch.setattr(sys, "stdout", Gone())
    assert main(["train", str(project), "--print-config"]) == 128 + signal.SIGPIPE


def test_what_a_terminal_and_schedulers_send_stops_a_run_and_nohup_is_heeded() -> None:
    assert {signal.SIGHUP, signal.SIGXCPU, signal.SIGUSR1, signal.SIGUSR2} <= set(SIGNALS)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupt(World.alone("cpu")) as interrupt:
            signal.raise_signal(signal.SIGHUP)
            assert interrupt.agree() is None
            signal.raise_signal(signal.SIGXCPU)
            assert interrupt.agree() == signal.SIGXCPU
    finally:
        signal.signal(signal.SIGHUP, before)
