"""Captured steps, without a GPU: what changes between steps goes through static inputs, and nothing is read."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import method_cases
import pytest
import tiny
import torch
from capture_check import ALLOWED, Again, differences
from test_trainer import QUIET, assert_equal, records, weights
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from diffpp_fast.methods import METHODS, Batch
from diffpp_fast.methods.times import StepTimes
from diffpp_fast.networks import Conditioning, Denoiser, FewStepGenerator, OneStepGenerator, freeze, fuse
from diffpp_fast.training import Config, ConfigurationError, NonFiniteError, Trainer, load_config
from diffpp_fast.training.batches import MicroBatch
from diffpp_fast.training.capture import Captured, make_tape, of_tensor
from diffpp_fast.training.phases import Phases

T = TypeVar("T")
aten = torch.ops.aten
#: What makes the processor wait for a GPU, or a shape depend on numbers.
WAITS = {
    aten._local_scalar_dense,
    aten.equal,
    aten.is_nonzero,
    aten.nonzero,
    aten.masked_select,
    aten.unique_dim,
    aten._unique2,
    aten.bincount,
    aten.repeat_interleave,
}
#: Where numbers are read on the CPU alone.
CPU_ONLY = ("diffpp_fast/ops/checks.py", "diffpp_fast/schedule.py")


class Watch(TorchDispatchMode):
    """Refuses what a GPU would be waited for."""

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if function.overloadpacket in WAITS and not self._is_cpu_only():
            raise RuntimeError(f"called a synchronizing operation, {function}")
        return function(*arguments, **(options or {}))

    def _is_cpu_only(self) -> bool:
        frame: Any = sys._getframe(2)
        while frame is not None and "diffpp_fast" not in frame.f_code.co_filename:
            frame = frame.f_back
        return frame is not None and frame.f_code.co_filename.endswith(CPU_ONLY)


@pytest.fixture
def tape(monkeypatch: pytest.MonkeyPatch) -> Again:
    again = Again(Watch)
    monkeypatch.setattr("diffpp_fast.training.trainer.make_tape", lambda *_: again)
    return again


@pytest.fixture
def config_of(project: Path, tmp_path: Path):  # type: ignore[no-untyped-def]
    def load(*overrides: str, output: str = "run") -> Config:
        return load_config(project, [f"output={tmp_path / output}", *QUIET, "training.baseline_steps=null", *overrides])

    return load


def figures(config: Config) -> list[dict[str, float]]:
    """The log, without what is measured of the machine."""
    measured = ("time/", "memory/", "samples_per_second", "time")
    return [
        {name: value for name, value in record.items() if not name.startswith(measured)} for record in records(config)
    ]


#: A reward that looks prompts up, as those of the package do, and one each that reads them and that waits.
REWARDS = """
import torch

from diffpp_fast.rewards.text import PromptCache

cache = PromptCache(100)


def encode(prompts):
    return torch.tensor([[float(len(prompt)), float(prompt.count("r"))] for prompt in prompts])


def looked_up():
    return lambda images, prompts: (images.mean((2, 3))[:, :2] * cache(prompts, encode)).sum(1)


def reading():
    return lambda images, prompts: images.mean((1, 2, 3)) * torch.tensor([float(len(prompt)) for prompt in prompts])


def waiting():
    return lambda images, prompts: images.mean((1, 2, 3)) / images.std().item()
"""


@pytest.fixture(scope="module")
def rewards(project: Path) -> str:
    (project.parent / "looking_up.py").write_text(REWARDS)
    return f"rewards.optimised.factory={project.parent}/looking_up.py:"


RUNS = {
    # 5 samples in parts of 2: the last one has a shape of its own.
    "two shapes": ("training.global_batch=5", "training.micro_batch=2", "training.fake_warmup=1"),
    "dmd2": (
        *("method.name=dmd2", "rewards.optimised=null", "method.normalizer=batch", "training.micro_batch=2"),
        *("method.share_samples=true", "method.fake_rounds=2"),
    ),
    "lora": (
        *("models.generator.path=null", "models.generator.lora={rank: 2}", "models.fake.lora={rank: 2}"),
        *("method.name=didr", "method.t_range=[20, 980]", "method.denoising_steps=2"),
        "training.activation_checkpointing=true",
    ),
    "steps": (
        *("method.name=dmd2", "rewards.optimised=null", "method.share_samples=true", "method.fake_rounds=2"),
        *("models.generator={timestep: null, timesteps: [900, 600, 200]}", "method.time_intervals=separate"),
    ),
    "dropout": ("method.name=diff_instruct", "rewards.optimised=null", "method.prompt_dropout=0.3"),
    "decoupled_dmd": ("method.name=decoupled_dmd", "rewards.optimised=null", "method.fake_rounds=1"),
    "sid": ("method.name=sid", "rewards.optimised=null", "method.fake_guidance_scale=1.5"),
    "sim": ("method.name=sim", "rewards.optimised=null", "method.time_distribution={name: shifted, shift: 3}"),
    "diff_instruct_star": ("method.name=diff_instruct_star", "method.guidance=outside", "method.t_range=[20, 980]"),
}
QUICK = ("two shapes", "dmd2", "lora")


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in RUNS])
def test_a_captured_run_is_the_uncaptured_one_to_the_bit(
    config_of: Callable[..., Config], rewards: str, tape: Again, name: str
) -> None:
    overrides = ["training.steps=2", "training.checkpoint_every=2", *RUNS[name]]
    if "rewards.optimised=null" not in overrides:
        overrides += [f"{rewards}looked_up", "rewards.optimised.arguments={}"]
    plain, captured = config_of(*overrides), config_of(*overrides, "training.capture=true", output="captured")
    Trainer(plain).run()
    Trainer(captured).run()
    assert tape.recorded and tape.replays >= 4
    assert_equal(weights(captured, 2), weights(plain, 2))
    assert figures(captured) == figures(plain)


def test_the_check_for_gpus_compares_all_weights() -> None:
    found = differences("cpu", steps=1)
    assert len(found) > 200 and max(found.values()) <= ALLOWED


def test_a_captured_run_goes_on_where_an_uncaptured_one_ended(
    config_of: Callable[..., Config], tape: Again, tmp_path: Path
) -> None:
    overrides = ("training.steps=2", "training.checkpoint_every=1")
    plain = config_of(*overrides)
    Trainer(plain).run()
    captured = config_of(*overrides, "training.capture=true", output="captured")
    Trainer(captured, resume=str(tmp_path / "run" / "checkpoints" / "step_000001")).run()
    assert tape.replays == 2
    assert_equal(weights(captured, 2), weights(plain, 2))
    assert figures(captured)[-1] == figures(plain)[-1]


def test_an_update_without_a_defined_reward_is_skipped(config_of: Callable[..., Config], tape: Again) -> None:
    config = config_of("training.capture=true", "training.steps=2", "rewards.optimised.scale=1e38")
    with pytest.raises(NonFiniteError, match="trained nothing"):
        Trainer(config).run()
    for role, skipped in (("generator", 1.0), ("fake", 0.0)):
        name = f"{role}/updates_skipped"
        assert [record[name] for record in records(config) if name in record] == [skipped, skipped]


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        ("reading", "TypeError: it reads its prompts as text"),
        ("waiting", "RuntimeError: called a synchronizing"),
    ],
)
def test_a_reward_that_a_graph_can_not_hold_is_named_before_the_first_step(
    config_of: Callable[..., Config], rewards: str, tape: Again, reward: str, said: str
) -> None:
    config = config_of("training.capture=true", f"{rewards}{reward}", "rewards.optimised.arguments={}")
    said = rf"record the generator: rewards.optimised \(.*{reward}\): {said}.*training.capture=false"
    with pytest.raises(ConfigurationError, match=said):
        Trainer(config)
    assert not Path(config.output, "metrics.jsonl").exists()


def test_what_can_not_be_captured_is_refused(config_of: Callable[..., Config]) -> None:
    with pytest.raises(ConfigurationError, match=r"this run computes on cpu: use training.capture=false"):
        Trainer(config_of("training.capture=true"))
    gpu = torch.device("cuda")
    zero: Any = SimpleNamespace(role="fake")
    with pytest.raises(ConfigurationError, match=r"DeepSpeed spreads the fake.*distributed.fake.stage=0"):
        make_tape(config_of(), gpu, [zero])
    with pytest.raises(ConfigurationError, match=r"distributed.reference=replica"):
        make_tape(config_of("distributed.reference=shard"), gpu, [])


def test_a_shape_that_was_not_recorded_is_refused() -> None:
    def conditioning(tokens: int) -> Conditioning:
        return Conditioning(("a", "b"), {"encoder_hidden_states": torch.ones(2, tokens, 3)})

    parts = [MicroBatch(Batch(torch.arange(2), conditioning(tokens)), 1.0, True) for tokens in (4, 5)]
    work = {"generator": (lambda batch, _: batch.conditioning.tensors["encoder_hidden_states"].sum(), of_tensor)}
    captured = Captured(Again(), work, nullcontext)
    captured.prepare("generator", parts[0])
    assert captured("generator", parts[0]) == 24.0
    with pytest.raises(ConfigurationError, match=r"a shape that no graph was captured for.*\[2, 5, 3\]"):
        captured("generator", parts[1])


def test_nothing_is_timed_inside_a_graph() -> None:
    phases = Phases(torch.device("cpu"))
    with phases("graph"), phases.muted(), phases("inside"):
        pass
    assert phases.take().keys() == {"graph", "other"}


def test_no_kernel_of_csrc_does_what_a_capture_forbids() -> None:
    forbidden = re.compile(
        r"\bcuda(Malloc|Free|Mem(set|cpy)|\w*Synchronize|StreamDefault|StreamLegacy)|<<<[^>]*, *0>>>"
    )
    files = [*Path(__file__).parents[1].glob("csrc/**/*.cu*"), *Path(__file__).parents[1].glob("csrc/**/*.h")]
    launches = 0
    for file in files:
        text = file.read_text()
        assert not forbidden.search(text), file
        launches += text.count("<<<")
    assert launches > 20


def networks() -> Iterator[nn.Module]:
    """Generator, teaching assistant and frozen reference, fused."""
    for seed in range(3):
        network = tiny.unet(seed).eval()
        fuse(network)
        yield network
    freeze(network)


@pytest.mark.parametrize(("name", "timesteps"), [*((name, (625,)) for name in METHODS), ("dmd2", (999, 499, 249))])
def test_both_updates_are_traced_without_a_number_that_is_read(name: str, timesteps: tuple[int, ...]) -> None:
    """A fake tensor has no numbers: whatever turned one into Python's, or a shape, would raise."""
    kind, schedule = METHODS[name], method_cases.variance_preserving()
    generator, fake, reference = map(Denoiser, networks())
    options: dict[str, Any] = {"guidance_scale": 1.5, "t_range": (20, 980)}
    if kind.takes_reward:
        options |= {"reward": lambda x0, _: x0.mean((1, 2, 3)), "reward_scale": 1.0, "reward_clip": 1.0}
    drawing: Any = OneStepGenerator(generator, schedule)
    if len(timesteps) > 1:
        drawing = FewStepGenerator(generator, schedule, timesteps=timesteps)
        options["time_intervals"] = "separate"
    method = kind(drawing, fake, reference, schedule, **options)
    text = torch.zeros(2, 8, tiny.TEXT_WIDTH)
    batch = Batch(torch.arange(2), text, seed=3, shape=tiny.LATENT, null_conditioning=text)
    with FakeTensorMode() as mode:
        for part in (generator, fake, reference):
            for module in part.modules():
                every: Any = (module._parameters, module._buffers)
                for own in every:
                    own.update({key: None if held is None else mode.from_tensor(held) for key, held in own.items()})
        text = mode.from_tensor(text)
        batch = replace(batch, samples=mode.from_tensor(batch.samples), conditioning=text, null_conditioning=text)
        schedule._tables = {device: mode.from_tensor(table) for device, table in schedule._tables.items()}
        if isinstance(method.times, StepTimes):
            rows = method.times._rows
            rows.update({device: (mode.from_tensor(one), mode.from_tensor(two)) for device, (one, two) in rows.items()})
        for role, loss in ((fake, method.fake_loss), (generator, method.generator_loss)):
            loss(batch).loss.backward()
            assert all(weight.grad is not None for weight in role.parameters())
            assert all(weight.grad is None for weight in reference.parameters())
