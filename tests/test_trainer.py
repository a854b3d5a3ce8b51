"""The loop: what a run computes does not depend on how it is cut, and what can go wrong is said in time."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path

import pytest
import tiny
import torch

from diffpp_fast.methods import Batch, StepOutput
from diffpp_fast.training import (
    Callback,
    CheckpointError,
    Config,
    ConfigurationError,
    NonFiniteError,
    Trainer,
    load_config,
)
from diffpp_fast.training.checkpoint import read_tensors

QUIET = ("training.grid_every=null", "rewards.held_out=null")


@pytest.fixture
def config_of(project: Path, tmp_path: Path):  # type: ignore[no-untyped-def]
    def load(*overrides: str, output: str = "run") -> Config:
        return load_config(project, [f"output={tmp_path / output}", *overrides])

    return load


def weights(config: Config, step: int) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint by file and name."""
    folder = Path(config.output) / "checkpoints" / f"step_{step:06d}"
    return {
        f"{file.stem}.{name}": tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in read_tensors(file).items()
    }


def records(config: Config) -> list[dict[str, float]]:
    return [json.loads(line) for line in (Path(config.output) / "metrics.jsonl").read_text().splitlines()]


def assert_equal(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


class Recorder(Callback):
    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []

    def on_start(self, step: int, steps: int) -> None:
        self.events.append(("start", step))

    def on_step(self, step: int) -> None:
        self.events.append(("step", step))

    def on_checkpoint(self, step: int, path: Path) -> None:
        self.events.append((path.name, step))

    def on_end(self, step: int) -> None:
        self.events.append(("end", step))


class SignalAt(Callback):
    """Sends this process a signal once a step is complete."""

    def __init__(self, step: int, number: int) -> None:
        self.step, self.number = step, number

    def on_step(self, step: int) -> None:
        if step == self.step:
            os.kill(os.getpid(), self.number)


def test_a_run_leaves_all_that_it_promises(config_of) -> None:  # type: ignore[no-untyped-def]
    from diffusers import UNet2DConditionModel

    from diffpp_fast.networks import load_schedule

    config, recorder = config_of("training.fake_warmup=2"), Recorder()
    random = torch.get_rng_state()
    outcome = Trainer(config, callbacks=[recorder]).run()
    assert torch.equal(torch.get_rng_state(), random), "training drew from the global generator"
    assert (outcome.step, outcome.signal) == (4, None)
    steps = [("step", step) for step in (-1, 0, 1, 2)]
    assert recorder.events[:6] == [("start", -2), *steps, ("step_000002", 2)]
    assert recorder.events[-2:] == [("step_000004", 4), ("end", 4)]

    output = Path(config.output)
    assert load_config(output / "config.yaml") == config
    assert sorted(path.name for path in (output / "grids").iterdir()) == [f"step_00000{step}.png" for step in (0, 2, 4)]
    assert list((output / "tensorboard").glob("events.*"))
    (session,) = json.loads((output / "environment.json").read_text())["sessions"]
    assert {"first_step": -2, "last_step": 4, "steps": 4, "processes": 1}.items() <= session.items()
    assert session["packages"]["torch"] == torch.__version__
    assert session["grid_prompts"] == list(tiny.PROMPTS[:3])
    last = [record for record in records(config) if record["step"] == 4 and "fake/loss" in record]
    assert len(last) == 1
    assert {
        "generator/loss",
        "generator/reward",
        "generator/reward_std",
        "generator/score_gap",
        "generator/score_gradient_norm",
        "generator/reward_gradient_norm",
        "generator/gradient_cosine",
        "generator/gradient_norm",
        "generator/x0_std",
        "fake/gradient_norm",
        "samples_per_second",
    } <= last[0].keys()
    assert [record["step"] for record in records(config) if "grid/held_out" in record] == [-2, 2, 4]

    exported = UNet2DConditionModel.from_pretrained(output / "generator").state_dict()
    assert_equal(exported, read_tensors(output / "checkpoints" / "step_000004" / "generator_ema.safetensors"))
    assert len(load_schedule(str(output / "generator"))) == 1000
    call = json.loads((output / "generator" / "generator.json").read_text())
    assert call == {"timestep": 625, "input_scale": "sigma"}


def test_training_changes_both_networks_and_their_average(config_of) -> None:  # type: ignore[no-untyped-def]
    config = config_of(*QUIET)
    Trainer(config).run()
    after = weights(config, 4)
    for role, start in (("generator", tiny.unet(seed=1)), ("fake", tiny.unet(seed=0))):
        name, before = next(iter(start.state_dict().items()))
        assert not torch.equal(after[f"{role}.{name}"], before)
    name, before = next(iter(tiny.unet(seed=1).state_dict().items()))
    assert (after[f"generator_ema.{name}"] - before).norm() < (after[f"generator.{name}"] - before).norm()


@pytest.mark.parametrize("share", ["false", pytest.param("true", marks=pytest.mark.slow)])
def test_micro_batches_change_memory_only(config_of, share: str) -> None:  # type: ignore[no-untyped-def]
    # A large eps: with the usual one Adam's first updates are sign(g), which magnifies rounding.
    overrides = [
        *QUIET,
        "training.steps=2",
        "optimizers.generator.eps=1",
        "optimizers.fake.eps=1",
        f"method.share_samples={share}",
    ]
    whole = config_of(*overrides, output="whole")
    Trainer(whole).run()
    names = ("fake/loss", "generator/loss", "generator/reward", "generator/reward_std", "generator/gradient_norm")
    for size in (1, 2, 3):
        parts = config_of(*overrides, f"training.micro_batch={size}", output=f"parts of {size}")
        Trainer(parts).run()
        one, other = weights(whole, 2), weights(parts, 2)
        for name, tensor in one.items():
            difference = (tensor - other[name]).double()
            assert difference.norm() <= 1e-3 * tensor.double().norm(), name
        for before, after in zip(records(whole), records(parts), strict=True):
            for name in names:
                assert before[name] == pytest.approx(after[name], rel=1e-4)


@pytest.mark.parametrize("share", [pytest.param("false", marks=pytest.mark.slow), "true"])
def test_an_interrupted_run_resumes_to_the_same_bits(config_of, share: str) -> None:  # type: ignore[no-untyped-def]
    rounds = ("method.fake_rounds=2", f"method.share_samples={share}")
    overrides = ("training.fake_warmup=3", "ema.warmup=true", *rounds)
    straight = config_of(*overrides, output="straight")
    Trainer(straight).run()
    for stop in (-1, 1, 3):
        cut = config_of(*overrides, output=f"cut after {stop}")
        outcome = Trainer(cut, callbacks=[SignalAt(stop, signal.SIGTERM)]).run()
        assert (outcome.step, outcome.signal) == (stop, signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        assert not (Path(cut.output) / "generator").exists()
        outcome = Trainer(cut, resume="latest").run()
        assert (outcome.step, outcome.signal) == (4, None)
        assert_equal(weights(cut, 4), weights(straight, 4))
        grid = Path("grids") / "step_000004.png"
        assert (Path(cut.output) / grid).read_bytes() == (Path(straight.output) / grid).read_bytes()


def test_a_damaged_checkpoint_costs_only_its_steps(config_of, caplog: pytest.LogCaptureFixture) -> None:  # type: ignore[no-untyped-def]
    config = config_of(*QUIET)
    Trainer(config).run()
    before, lines = weights(config, 4), records(config)
    checkpoints = Path(config.output) / "checkpoints"
    os.truncate(checkpoints / "step_000004" / "fake.safetensors", 100)
    trainer = Trainer(config, resume="latest")
    assert trainer.step == 2
    assert "step_000004: fake.safetensors has 100 bytes" in caplog.text
    trainer.run()
    assert_equal(weights(config, 4), before)
    assert [record["step"] for record in records(config)] == [record["step"] for record in lines]


def test_resume_may_go_further_and_log_otherwise(config_of) -> None:  # type: ignore[no-untyped-def]
    Trainer(config_of(*QUIET, "training.steps=2")).run()
    config = config_of(*QUIET, "training.steps=3", "training.log_every=2", "training.micro_batch=2")
    assert Trainer(config, resume="latest").run().step == 3
    assert Trainer(config, resume="latest").run().step == 3  # nothing left to do


def test_resume_refuses_another_run_by_its_keys(project: Path, config_of, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    Trainer(config_of(*QUIET, "training.steps=1")).run()
    other = config_of(*QUIET, "seed=8", "training.global_batch=8", "method.guidance_scale=2", "ema=null")
    with pytest.raises(CheckpointError) as error:
        Trainer(other, resume="latest")
    said = str(error.value)
    assert "seed was 7, is 8" in said and "method.guidance_scale was 1.5, is 2.0" in said
    assert "training.global_batch was 4, is 8" in said and "ema.decay was 0.9" in said
    (tmp_path / "other.txt").write_text("something else\n")
    with pytest.raises(CheckpointError, match=r"the text of .*other\.txt has changed"):
        Trainer(config_of(*QUIET, f"prompts={tmp_path / 'other.txt'}"), resume="latest")
    shutil.copy(project.parent / "prompts.txt", tmp_path / "other.txt")
    Trainer(config_of(*QUIET, f"prompts={tmp_path / 'other.txt'}"), resume="latest")


def test_a_new_run_does_not_overwrite_another(config_of) -> None:  # type: ignore[no-untyped-def]
    config = config_of(*QUIET, "training.steps=1")
    Trainer(config).run()
    before = weights(config, 1)
    with pytest.raises(CheckpointError, match=r"--resume latest.*another output"):
        Trainer(config)
    assert_equal(weights(config, 1), before)


def test_resume_without_a_checkpoint_begins_anew(config_of, caplog: pytest.LogCaptureFixture) -> None:  # type: ignore[no-untyped-def]
    assert Trainer(config_of(*QUIET, "training.steps=1"), resume="latest").run().step == 1
    assert "starting from the beginning" in caplog.text


def test_diff_instruct_without_reward_decoder_and_average(config_of) -> None:  # type: ignore[no-untyped-def]
    config = config_of(
        *QUIET,
        "method.name=diff_instruct",
        "method.guidance_scale=1",
        "rewards.optimised=null",
        "models.decoder=null",
        "ema=null",
        "training.steps=1",
    )
    Trainer(config).run()
    assert "generator/reward" not in records(config)[0]
    assert not (Path(config.output) / "checkpoints" / "step_000001" / "generator_ema.safetensors").exists()


def test_bfloat16_trains_float32_weights(config_of) -> None:  # type: ignore[no-untyped-def]
    config = config_of("precision=bfloat16", "training.steps=2")
    Trainer(config).run()
    assert all(tensor.dtype in (torch.float32, torch.int64) for tensor in weights(config, 2).values())
    exact = config_of("training.steps=2", output="exact")
    Trainer(exact).run()
    for half, whole in zip(records(config), records(exact), strict=True):
        if "fake/loss" in whole:
            assert half["fake/loss"] == pytest.approx(whole["fake/loss"], rel=0.02)


def test_rewards_of_which_none_is_finite_stop_before_the_weights(project: Path, config_of) -> None:  # type: ignore[no-untyped-def]
    config = config_of(
        *QUIET,
        f"rewards.optimised.factory={project.parent / 'rewards.py'}:undefined_for",
        "rewards.optimised.arguments={word: a}",
        "training.micro_batch=2",
        "training.global_batch=5",
        "training.skip_limit=0",
    )
    trainer = Trainer(config)
    before = {name: tensor.clone() for name, tensor in trainer.generator.network.state_dict().items()}
    with pytest.raises(NonFiniteError) as error:
        trainer.run()
    said = str(error.value)
    assert "generator, after step 1" in said and "undefined_for) is not finite for 5 of 5 samples" in said
    assert "'a green frog'" in said and "'a red frog'" in said
    assert_equal(trainer.generator.network.state_dict(), before)


def test_a_network_that_is_not_finite_stops_the_run(config_of) -> None:  # type: ignore[no-untyped-def]
    trainer = Trainer(config_of(*QUIET, "training.skip_limit=0"))
    with torch.no_grad():
        next(trainer.fake.network.parameters()).fill_(torch.nan)
    with pytest.raises(NonFiniteError, match=r"after step 1: the last update was skipped.*prompts: "):
        trainer.run()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("wrong_shape", r"wrong_shape\) must give one number per image, shape \(4,\), got shape \(\)"),
        ("no_gradient", r"no_gradient\) has no gradient by the images"),
        ("nothing", "has no function nothing; it has redness, Brightness"),
        ("undefined_for", r"do not fit undefined_for\(word\): missing a required argument: 'word'"),
    ],
)
def test_rewards_that_can_not_serve(project: Path, config_of, name: str, said: str) -> None:  # type: ignore[no-untyped-def]
    factory = f"rewards.optimised.factory={project.parent / 'rewards.py'}:{name}"
    config = config_of(*QUIET, factory, "rewards.optimised.arguments={}")
    with pytest.raises(ConfigurationError, match=said):
        Trainer(config).run()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["rewards.optimised.factory=nowhere.py:name"], "no such file: .*nowhere.py"),
        (["rewards.optimised.factory=diffpp_nowhere.rewards:name"], "there is no module diffpp_nowhere.rewards"),
        (["models.latent_shape=[3, 8, 8]"], "models.generator has 4 input channels, models.latent_shape has 3"),
        (["models.generator.timestep=1000"], r"models.generator: timestep must lie in \[0, 1000\)"),
        (["method.t_range=[20, 2000]"], r"method: t_range must lie within \[0, 1000\)"),
        (["models.reference.path=./nowhere"], r"models.reference: no such folder: .*nowhere"),
        (["device=cuda"], "PyTorch sees no CUDA device"),
    ],
)
def test_configurations_that_can_not_run(config_of, overrides: list[str], said: str) -> None:  # type: ignore[no-untyped-def]
    if overrides == ["device=cuda"] and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(ConfigurationError, match=said):
        Trainer(config_of(*QUIET, *overrides))


@pytest.mark.parametrize(
    ("role", "build", "said"),
    [
        ("fake", lambda: tiny.unet(in_channels=3), "models.fake has 3 input channels, models.latent_shape has 4"),
        ("reference", lambda: tiny.unet(out_channels=3), "reference has 3 output channels, models.latent_shape has 4"),
        ("reference", lambda: tiny.unet(cross_attention_dim=32), "has 32 channels of text, models.text_encoder has 16"),
        ("decoder", lambda: tiny.vae(latent_channels=8), "decoder has 8 latent channels, models.latent_shape has 4"),
    ],
)
def test_networks_that_do_not_agree(config_of, tmp_path: Path, role: str, build, said: str) -> None:  # type: ignore[no-untyped-def]
    build().save_pretrained(tmp_path / "odd")
    with pytest.raises(ConfigurationError, match=said):
        Trainer(config_of(*QUIET, f"models.{role}.path={tmp_path / 'odd'}"))


def test_an_unknown_prediction_type_names_the_scheduler(config_of, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    betas = {"num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
    (tmp_path / "scheduler_config.json").write_text(
        json.dumps({"_class_name": "DDPMScheduler", "prediction_type": "wavelet", **betas})
    )
    with pytest.raises(ConfigurationError, match=rf"models.scheduler \({tmp_path}\).*'wavelet'"):
        Trainer(config_of(*QUIET, f"models.scheduler.path={tmp_path}"))


def test_an_error_before_samples_were_shared_saves_no_half_step(config_of, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    config = config_of(*QUIET, "method.share_samples=true", "training.checkpoint_every=2")
    trainer = Trainer(config)
    fake_loss = trainer.parts.method.fake_loss

    def fail_late(batch: Batch) -> StepOutput:
        if batch.x0 is not None and trainer.step == 3:
            raise MemoryError
        return fake_loss(batch)

    monkeypatch.setattr(trainer.parts.method, "fake_loss", fail_late)
    with pytest.raises(MemoryError):
        trainer.run()
    assert [path.name for path in sorted((Path(config.output) / "checkpoints").glob("step_*"))] == ["step_000002"]
