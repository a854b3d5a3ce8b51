"""Runs whose generator makes several calls: configuration, training and resuming, pictures, exports and plans."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import processes
import pytest
import tiny
import torch

from diffpp_fast import Noise, NoiseSchedule
from diffpp_fast.evaluation.models import find_source
from diffpp_fast.evaluation.pictures import draw, facts_of
from diffpp_fast.networks import FewStepGenerator, OneStepGenerator, load_denoiser, load_schedule
from diffpp_fast.networks.few_step import RENOISE, Renoise
from diffpp_fast.training import CheckpointError, Config, ConfigurationError, Trainer, load_config
from diffpp_fast.training.build import build_sampler
from diffpp_fast.training.build.agreement import idle_sentences
from diffpp_fast.training.build.run import load_checked_schedule, make_generator
from diffpp_fast.training.checkpoint import read_role
from diffpp_fast.training.config import Generator
from diffpp_fast.training.export import export_generator, export_pipeline
from diffpp_fast.training.grids import sample_latents
from diffpp_fast.training.loading import with_keys
from diffpp_fast.training.planning import run_of
from diffpp_fast.training.planning.plan import count_run
from diffpp_fast.training.planning.timing import _sent
from diffpp_fast.training.schedulers import few_step_scheduler, pipeline_call

CPU = torch.device("cpu")
PROMPT = "a red apple"
SECTION = "models.generator"
STEPS = f"{SECTION}={{timestep: null, timesteps: [900, 600, 200], input_scale: 1.0}}"
QUICK = ("training.steps=2", "training.grid_every=null", "rewards.held_out=null", "training.checkpoint_every=1")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module")
def run(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """One step, on samples that generator and teaching assistant share, at times of their steps."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    method = ("method.share_samples=true", "method.time_intervals=separate")
    config = load_config(project, [STEPS, *QUICK, "training.steps=1", f"output={output}", *method])
    Trainer(config).run()
    return config


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            "{timestep: 625, timesteps: [999, 499]}",
            "timestep is the time of one call and timesteps are those of several",
        ),
        ("{timestep: null}", "timestep is null, and there are no timesteps"),
        ("{timestep: null, timesteps: []}", "timesteps must be 1 to 8 times, got 0"),
        ("{timestep: null, timesteps: [8, 7, 6, 5, 4, 3, 2, 1, 0]}", "timesteps must be 1 to 8 times, got 9"),
        ("{timestep: null, timesteps: [499, 999]}", r"timesteps must fall .*got \[499, 999\]"),
        ("{timestep: null, timesteps: [499, 499]}", "timesteps must fall"),
        ("{timestep: null, timesteps: [499, -1]}", "greater than or equal to 0"),
        ("{timestep: null, timesteps: [1000, 499]}", r"models.generator: timestep must lie in \[0, 1000\), got 1000"),
        ("{timestep: null, timesteps: [999, 499], renoise: ode}", "renoise"),
    ],
)
def test_what_makes_no_steps_is_refused_before_anything_is_loaded(project: Path, value: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        load_checked_schedule(load_config(project, [f"{SECTION}={value}"]))


def test_one_time_is_one_step_and_what_says_nothing_of_it_is_told(project: Path) -> None:
    config = load_config(project, [f"{SECTION}={{timestep: null, timesteps: [399], gradient_step: last}}"])
    schedule = NoiseSchedule(torch.linspace(1, 0.1, 1000), torch.linspace(0.1, 1, 1000))
    generator = make_generator(config, torch.nn.Identity(), schedule)
    assert isinstance(generator, OneStepGenerator) and generator.timestep == 399
    assert config.models.generator.call() == {"timestep": 399, "input_scale": "sigma"}
    (said,) = idle_sentences(config)
    assert said.startswith("models.generator.gradient_step has no effect: the generator makes one call")
    several = load_config(project, [STEPS, f"{SECTION}.renoise=ddim", f"{SECTION}.gradient_step=last"])
    generator = make_generator(several, torch.nn.Identity(), schedule)
    assert isinstance(generator, FewStepGenerator) and generator.timesteps == (900, 600, 200)
    assert (generator.renoise, generator.gradient_step, generator.input_scale) == ("ddim", "last", 1.0)
    assert not idle_sentences(several)


def test_a_run_goes_on_from_a_checkpoint_to_the_bit(project: Path, tmp_path: Path) -> None:
    """With a step that is drawn for each update, at which the calls end, and in other micro-batches, too."""
    steps = [STEPS, f"{SECTION}.gradient_step=random_exit", "method.time_intervals=nested"]
    config = load_config(project, [*steps, *QUICK, f"output={tmp_path}"])
    Trainer(config).run()
    checkpoint = tmp_path / "checkpoints" / "step_000002"
    roles = ("generator", "fake")
    whole = {(role, name): tensor.clone() for role in roles for name, tensor in read_role(checkpoint, role).items()}
    shutil.rmtree(checkpoint)
    Trainer(config, resume="latest").run()
    for role in roles:
        begun = read_role(checkpoint.with_name("step_000001"), role)
        again = read_role(checkpoint, role)
        assert all(torch.equal(tensor, whole[role, name]) for name, tensor in again.items())
        assert any(not torch.equal(tensor, whole[role, name]) for name, tensor in begun.items())
    others = {
        f"{SECTION}.gradient_step": "last",
        f"{SECTION}.timesteps": [900, 600],
        "method.time_intervals": "separate",
    }
    with pytest.raises(CheckpointError) as refused:
        Trainer(with_keys(config, others), resume="latest")
    for key, change in (
        (f"{SECTION}.gradient_step", "was 'random_exit', is 'last'"),
        (f"{SECTION}.timesteps", "was [900, 600, 200], is [900, 600]"),
        ("method.time_intervals", "was 'nested', is 'separate'"),
    ):
        assert f"{key} {change}" in str(refused.value)


def test_pictures_are_of_all_steps_wherever_they_are_drawn_from(run: Config, tmp_path: Path) -> None:
    """A run, its checkpoint and its export draw one picture for a prompt and a sample number, in any batch."""
    model = find_source(Path(run.output)).load(CPU)
    pictures = draw(model, [PROMPT, "a blue whale"], [4, 2**40], seed=5)
    assert torch.equal(draw(model, ["a blue whale"], [2**40], seed=5), pictures[1:])
    call: dict[str, Any] = {"timesteps": [900, 600, 200], "input_scale": 1.0, "renoise": "fresh"}
    facts = facts_of(model, PROMPT, seed=5, sample=4)
    assert {key: facts[key] for key in call} == {key: str(value) for key, value in call.items()}
    folder = Path(run.output) / "generator"
    assert json.loads((folder / "generator.json").read_text()) == call
    card = (folder / "README.md").read_text()
    assert "3-step" in card and "few-step" in card and "timesteps=[900, 600, 200], guidance_scale=1.0" in card
    one_step = tmp_path / "around.yaml"
    one_step.write_text(Path(run.output, "config.yaml").read_text())
    exported = find_source(folder, config=one_step, overrides=[f"{SECTION}={{timesteps: null, timestep: 625}}"])
    assert torch.equal(draw(exported.load(CPU), [PROMPT], [4], seed=5), pictures[:1])
    generator = FewStepGenerator(load_denoiser(str(folder)).eval(), load_schedule(str(folder)), **call)
    z = torch.randn(2, *tiny.LATENT)
    samples = torch.arange(2)
    x0 = generator(z, torch.randn(2, 5, tiny.TEXT_WIDTH), noise=lambda stream: Noise(1, samples, stream))
    assert x0.shape == z.shape


CASES = [
    ("stable_diffusion", {}, "{timesteps: [999, 749, 499, 249], input_scale: 1.0}"),
    ("stable_diffusion", {"prediction_type": "v_prediction"}, "{timesteps: [700, 1], renoise: ddim}"),
    ("pixart", {}, "{timesteps: [900, 400, 3], input_scale: sigma}"),
    pytest.param(
        "stable_diffusion_xl", {}, "{timesteps: [999, 400], input_scale: 1.0, renoise: ddim}", marks=pytest.mark.slow
    ),
]


@pytest.mark.parametrize(("family", "changes", "call"), CASES)
def test_diffusers_makes_the_same_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, changes: dict[str, Any], call: str
) -> None:
    """With the addressed noise in the place of what its scheduler draws, and no warning of its times."""
    from diffusers import DiffusionPipeline
    from diffusers.schedulers import scheduling_lcm

    config = load_config(tiny.write_base(tmp_path, family, **changes), [f"{SECTION}={call}"])
    sampler = build_sampler(config, CPU)
    with torch.no_grad():
        for weight in sampler.trained.parameters.values():
            weight.add_(0.02 * torch.randn_like(weight))
    export_pipeline(tmp_path / "pipeline", config, sampler.trained)
    samples, shape = torch.tensor([17]), tiny.LATENT
    expected = sample_latents(sampler, [PROMPT], samples, seed=3, shape=shape, batch=1)
    streams = iter(range(RENOISE, 2**32))
    monkeypatch.setattr(scheduling_lcm, "randn_tensor", lambda *_, **__: Noise(3, samples, next(streams)).normal(shape))
    warned: list[str] = []
    monkeypatch.setattr(scheduling_lcm.logger, "warning", warned.append)
    z = Noise(3, samples, stream=0).normal(shape)
    arguments = eval(f"dict({pipeline_call(config)})", {"z": z})
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    extra = {"use_resolution_binning": False, "clean_caption": False} if family == "pixart" else {}
    drawn = pipeline(PROMPT, output_type="latent", **{"latents": z, **arguments}, **extra).images
    assert pipeline.scheduler.timesteps.tolist() == list(config.models.generator.times) and not warned
    torch.testing.assert_close(drawn, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("renoise", ["fresh", "ddim"])
def test_a_flow_has_a_scheduler_for_its_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renoise: Renoise
) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.schedulers import scheduling_flow_match_euler_discrete as flow

    call = Generator(timesteps=[999, 750, 300], renoise=renoise, input_scale=1.0)
    of_training = FlowMatchEulerDiscreteScheduler(shift=3.0)
    few_step_scheduler(of_training, call).save_pretrained(tmp_path)
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path)
    weight = torch.randn(4, 4) / 4

    def predict(x: torch.Tensor, t: torch.Tensor, _: Any) -> torch.Tensor:
        return torch.einsum("oc,bchw->bohw", weight, x).tanh() * (1 + t.view(-1, 1, 1, 1) / 1000)

    schedule, samples = NoiseSchedule.from_diffusers(of_training), torch.arange(2)
    network: Any = predict
    generator = FewStepGenerator(network, schedule, **call.call())
    x = Noise(3, samples, stream=0).normal(tiny.LATENT)
    expected = generator(x, noise=lambda stream: Noise(3, samples, stream))
    streams = iter(range(RENOISE, 2**32))
    monkeypatch.setattr(flow, "randn_tensor", lambda *_, **__: Noise(3, samples, next(streams)).normal(tiny.LATENT))
    scheduler.set_timesteps(sigmas=[0.999, 0.75, 0.3])
    for t in scheduler.timesteps:
        x = scheduler.step(predict(x, t.expand(2), None), t, x).prev_sample
    torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-4)


def test_the_call_of_a_flow_names_its_sigmas_and_what_no_scheduler_serves_is_told(
    project: Path, tmp_path: Path
) -> None:
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

    FlowMatchEulerDiscreteScheduler().save_pretrained(tmp_path / "flow")
    steps = f"{SECTION}={{timestep: null, timesteps: [999, 500]}}"
    config = load_config(project, [steps, f"models.scheduler.path={tmp_path / 'flow'}"])
    assert pipeline_call(config) == "sigmas=[0.999, 0.5], guidance_scale=1.0, latents=0.999 * z"
    with pytest.raises(ConfigurationError, match="timesteps end at 0, where LCMScheduler returns its input"):
        few_step_scheduler(DDIMScheduler(), Generator(timesteps=[999, 0]))
    with pytest.raises(ConfigurationError, match="renoise=ddim: no scheduler makes these steps"):
        few_step_scheduler(DDIMScheduler(prediction_type="sample"), Generator(timesteps=[999, 500], renoise="ddim"))
    config = load_config(project, [f"{SECTION}={{timestep: null, timesteps: [999, 0]}}"])
    export_generator(tmp_path / "generator", config, build_sampler(config, CPU).trained)
    assert not (tmp_path / "generator" / "scheduler").exists()
    assert "use `diffpp_fast.networks.FewStepGenerator`" in (tmp_path / "generator" / "README.md").read_text()


def test_a_plan_counts_every_call_and_the_memory_of_one(project: Path) -> None:
    config = load_config(project, [*QUICK, "training.micro_batch=4"])
    calls = {"timesteps": [900, 600, 200], "gradient_step": "last"}
    one, several = (run_of(with_keys(config, {SECTION: section})) for section in ({}, calls))
    counted = [count_run(run) for run in (one, several)]
    for update in ("generator", "fake"):
        forward, more = (
            next(phase for phase in each.phases if (phase.update, phase.name) == (update, "generator"))
            for each in counted
        )
        assert sum(more.operations.values()) == 3 * sum(forward.operations.values()) > 0
        # Beside the activations, latents between the calls.
        latents = 4 * 4 * 4 * 8 * 8
        assert forward.peak <= more.peak <= forward.peak + 8 * latents
    # A drawn step ends the calls: 1, 2 or 3 of them, 2 on the average.
    leaving = run_of(with_keys(several.config, {f"{SECTION}.gradient_step": "random_exit"}))
    for phase, all_calls in zip(count_run(leaving).phases, counted[1].phases, strict=True):
        share = 2 / 3 if phase.name == "generator" else 1
        assert sum(phase.operations.values()) == pytest.approx(share * sum(all_calls.operations.values()))
    spread = {"distributed.generator.stage": 3}
    gathered = [_sent(run_of(with_keys(run.config, spread), 2), counted[0], "fake") for run in (one, several)]
    # Two calls more gather all weights, of which each of the two GPUs sends half.
    assert gathered[1] - gathered[0] == sum(counted[0].sizes["generator"].trained) * one.dtype.itemsize


@pytest.mark.slow
def test_an_update_in_parts_and_on_two_processes_ends_its_calls_together(project: Path, tmp_path: Path) -> None:
    """ZeRO 3 gathers the generator's weights in every call: processes that made another number of them would hang."""
    optimizer = "{lr: 1e-2, betas: [0.5, 0.99], eps: 1e-2, clip: 0.5}"
    common = [
        f"{SECTION}={{path: null, timestep: null, timesteps: [900, 600, 200], gradient_step: random_exit}}",
        "method={name: dmd2, fake_rounds: 2, share_samples: true, normalizer: batch, time_intervals: separate}",
        "rewards={}",
        "training.grid_every=null",
        "training.steps=3",
        "training.checkpoint_every=1",
        "training.keep=9",
        f"optimizers={{generator: {optimizer}, fake: {optimizer}}}",
    ]
    spread = ["distributed.generator.stage=3", "distributed.fake.stage=3"]
    Trainer(load_config(project, [*common, f"output={tmp_path}/whole"])).run()
    Trainer(load_config(project, [*common, f"output={tmp_path}/parts", "training.micro_batch=1"])).run()
    processes.run(["-m", "diffpp_fast", "train", str(project), f"output={tmp_path}/spread", *common, *spread], 2)
    start, whole, parts, two = (
        torch.cat([tensor.flatten() for _, tensor in sorted(read_role(tmp_path / place, "generator").items())])
        for place in (
            f"{run}/checkpoints/step_00000{step}"
            for run, step in (("whole", 1), ("whole", 3), ("parts", 3), ("spread", 3))
        )
    )
    for other in (parts, two):
        assert (other - whole).norm() <= 1e-3 * (whole - start).norm() > 0
