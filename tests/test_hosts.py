"""Runs on two network hosts: the same as on one, what they send, and what becomes of a run whose other host is gone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import hosts
import processes
import pytest
import tiny
import torch
from hosts import Host, two_hosts, worker_of
from test_rendezvous import write_plugin

from diffpp_fast.training import Trainer, load_config
from diffpp_fast.training.checkpoint import read_role
from diffpp_fast.training.peers import EXIT_CODE
from diffpp_fast.training.planning import GPUS, make_plan, run_of

pytestmark = pytest.mark.slow

SETTINGS = (
    "training.grid_every=null",
    "training.baseline_steps=null",
    "rewards.held_out=null",
    "training.threads=1",
    "training.keep=99",
)
#: Seconds after which a silent process counts as gone.
TIMEOUT = 8.0
#: The most that this may take, with what it takes to tell the others, on a machine that is busy.
LATEST = 3 * TIMEOUT
WORKER = Path(__file__).parent / "hosts_worker.py"
ROOT = Path(__file__).parents[1]
#: Of a run that loses a host after the seventh.
STEPS = 20


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run, with networks large enough that stage 3 takes most of their weights apart."""
    config = tiny.write(tmp_path_factory.mktemp("project"))
    for seed, name in enumerate(("reference", "generator")):
        network: Any = tiny.unet(seed, block_out_channels=(64, 128))
        network.save_pretrained(config.parent / "weights" / name)
    return config


@pytest.fixture
def pair() -> Iterator[tuple[Host, Host]]:
    with two_hosts() as made:
        yield made


def stages(stage: int) -> str:
    return f"distributed={{generator: {{stage: {stage}}}, fake: {{stage: {stage}}}}}"


def ended(launchers: Sequence[subprocess.Popen[str]]) -> list[str]:
    """Return what two launchers have said, which must have gone well."""
    finished = processes.finish(launchers, timeout=300)
    for code, output in finished:
        assert code == 0, output
    return [output for _, output in finished]


def steps_of(output: Path) -> list[int]:
    """Return the steps in a run's log, in the order in which they stand there."""
    path = output / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    # The last line may be half written.
    return [json.loads(line)["step"] for line in lines if line.endswith("}") and "samples_per_second" in line]


def weights(output: Path, step: int) -> torch.Tensor:
    tensors = read_role(output / "checkpoints" / f"step_{step:06d}", "generator")
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


@pytest.mark.parametrize(("stage", "micro_batch"), [(2, 1), (3, 2)])
def test_two_hosts_compute_what_one_does_and_send_what_the_plan_says(
    project: Path, pair: tuple[Host, Host], tmp_path: Path, stage: int, micro_batch: int
) -> None:
    first, _ = pair
    steps = 4
    settings = (
        *SETTINGS, f"training.steps={steps}", "training.checkpoint_every=99", "training.log_every=99", stages(stage),
        f"training.micro_batch={micro_batch}",
    )  # fmt: skip
    counts = tmp_path / "counts.json"

    def arguments(interface: str, output: Path) -> list[str]:
        return [str(WORKER), interface, str(counts), str(project), f"output={output}", *settings]

    processes.run(arguments("lo", tmp_path / "one"), 2)
    ended([host.torchrun(first, *arguments(hosts.INTERFACE, tmp_path / "two")) for host in pair])
    one, two = (weights(tmp_path / name, steps) for name in ("one", "two"))
    assert (two - one).norm() <= 1e-6 * one.norm()

    run = run_of(load_config(project, [*settings, "rewards.optimised.factory=diffpp_fast.rewards:mixture"]), gpus=2)
    plan = make_plan(run, GPUS["h100"])
    # Gloo adds gradients up in all processes where NCCL scatters the sum, which takes as much again.
    scattered = 4 * sum(sum(plan.counted.sizes[role].trained) for role in ("generator", "fake")) * run.rounds // 2
    planned = plan.time.sent + (scattered if stage == 3 else 0)
    after = json.loads(counts.read_text())
    a_step = (after[-1] - after[1]) / (len(after) - 2)
    assert a_step == pytest.approx(planned, rel=0.1), a_step / planned


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of a tiny run."""
    return tiny.write(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def straight(small: Path) -> Path:
    """The output of the run in one process that nothing stops."""
    output = small.parent / "straight"
    Trainer(load_config(small, [f"output={output}", f"training.steps={STEPS}", *SETTINGS])).run()
    return output


def has_ended(worker: int) -> bool:
    """Tell whether a process has ended, also where its launcher has not taken notice yet."""
    try:
        return ") Z " in Path(f"/proc/{worker}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True


class Run:
    """A run on two hosts, of which one is about to be lost."""

    def __init__(
        self,
        config: Path,
        output: Path,
        pair: tuple[Host, Host],
        *,
        nodes: str = "2",
        restarts: int,
        limit: float | None = None,
        extra: Mapping[str, str] | None = None,
    ) -> None:
        self.output, (self.first, self.other) = output, pair
        settings = (
            *SETTINGS, "training.log_every=1", "training.checkpoint_every=5", stages(2),
            f"distributed.peer_timeout={TIMEOUT:g}",
        )  # fmt: skip
        command = ("-m", "diffpp_fast", "train", str(config), f"output={output}", f"training.steps={STEPS}", *settings)
        self.launchers = [
            host.torchrun(
                self.first, *command, "--resume", "auto", nodes=nodes, restarts=restarts, limit=limit, extra=extra
            )
            for host in pair
        ]

    def until(self, ready: Callable[[], bool], seconds: float = 60.0) -> float:
        """Wait for something; return how long it took."""
        begun = time.monotonic()
        while not ready():
            if time.monotonic() - begun > seconds:
                for launcher in self.launchers:
                    launcher.kill()
                raise AssertionError([launcher.communicate()[0] for launcher in self.launchers])
            time.sleep(0.02)
        return time.monotonic() - begun

    def until_step(self, step: int) -> None:
        self.until(lambda: step in steps_of(self.output))

    def assert_like(self, straight: Path) -> None:
        """Every step stands in the log once, and the weights are those of a run in one process that nothing stops."""
        assert steps_of(self.output) == list(range(1, STEPS + 1))
        lost, expected, begun = weights(self.output, STEPS), weights(straight, STEPS), weights(self.output, 5)
        # One process more or less adds gradients up in another order.
        assert (lost - expected).norm() <= 1e-2 * (expected - begun).norm()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_process_that_vanishes_is_started_again_and_nothing_is_trained_twice(
    small: Path, straight: Path, pair: tuple[Host, Host], tmp_path: Path, number: int
) -> None:
    run = Run(small, tmp_path / "run", pair, restarts=3)
    run.until_step(7)
    lost, left = (worker_of(run.launchers[end]) for end in (1, 0))
    os.kill(lost, number)
    if number == signal.SIGSTOP:
        run.until(lambda: has_ended(left))
        # As torchrun does, but only half a minute after its SIGTERM, which a stopped process does not hear.
        os.kill(lost, signal.SIGKILL)
    said = ended(run.launchers)
    if number == signal.SIGSTOP:
        assert "rank 0 on host-a misses rank 1 on host-b: no sign of life for 8 s" in said[0]
    assert "resuming from" in said[0] and "checkpoints/step_0000" in said[0]
    run.assert_like(straight)


def test_a_host_that_is_cut_off_is_named_on_both_sides_and_the_other_goes_on_alone(
    small: Path, straight: Path, pair: tuple[Host, Host], tmp_path: Path
) -> None:
    """Its launcher, too, gives up; torch's own rendezvous leaves it in a call to the first host."""
    extra = {"PYTHONPATH": os.pathsep.join([str(write_plugin(tmp_path / "plugin")), str(ROOT)])}
    run = Run(small, tmp_path / "run", pair, nodes="1:2", restarts=3, limit=TIMEOUT, extra=extra)
    run.until_step(7)
    run.other.link("down")
    lost = worker_of(run.launchers[1])
    assert TIMEOUT / 2 < run.until(lambda: has_ended(lost)) < LATEST
    (said,) = ended(run.launchers[:1])
    assert "rank 0 on host-a misses rank 1 on host-b: no sign of life for 8 s" in said, said
    run.until(lambda: run.launchers[1].poll() is not None, LATEST)
    cut_off = run.launchers[1].communicate()[0]
    assert "rank 1 on host-b misses the store at 10.77.0.1:" in cut_off, cut_off
    assert "on the machine of rank 0 on host-a: no answer for 8 s" in cut_off and f"exit code {EXIT_CODE}" in cut_off
    run.assert_like(straight)
