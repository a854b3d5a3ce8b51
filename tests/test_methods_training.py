"""Every method by the trainer: what a configuration may say of it, two steps of each, resumed and spread."""

from __future__ import annotations

import inspect
import json
import logging
import shutil
from pathlib import Path
from typing import get_args

import processes
import pytest
import tiny
import torch
import yaml

from diffpp_fast import Noise
from diffpp_fast.cli.main import main
from diffpp_fast.errors import CheckpointError
from diffpp_fast.methods import METHODS
from diffpp_fast.methods import Method as MethodClass
from diffpp_fast.methods.method import Options
from diffpp_fast.networks import freezing_report
from diffpp_fast.training import Config, ConfigurationError, Trainer, dump_config, load_config
from diffpp_fast.training.build.networks import Networks
from diffpp_fast.training.checkpoint import read_role
from diffpp_fast.training.prompts import open_prompts
from diffpp_fast.training.state import refuse_other_run

#: What the constructors take that is no key of the section `method`.
OF_OTHER_SECTIONS = {"self", "generator", "fake", "reference", "schedule", "reward", "reward_scale", "reward_clip"}
OF_OTHER_SECTIONS.add("batched_passes")
OF_PYTHON_ALONE = {
    "options",
    "normalizer_floor",
    "discriminator",
    "gan_weight",
    "fake_gan_weight",
    "gan_t_range",
}
QUIET = (
    "training.grid_every=null",
    "training.baseline_steps=null",
    "training.steps=2",
    "training.checkpoint_every=1",
    "rewards.held_out=null",
    "logging.tensorboard=false",
)


#: As in test_elastic.py: steps large enough for a difference to show, an eps that does not magnify rounding.
SPREAD = (
    "optimizers.generator={lr: 1e-2, betas: [0.5, 0.99], eps: 1e-2, clip: 0.5}",
    "optimizers.fake={lr: 1e-2, betas: [0.5, 0.99], eps: 1e-2, clip: 0.05}",
)


def of(name: str, *overrides: str) -> list[str]:
    """Overrides that choose a method."""
    without = [] if METHODS[name].takes_reward else ["rewards.optimised=null"]
    return [f"method.name={name}", *without, *overrides]


def refusal(project: Path, *overrides: str) -> str:
    with pytest.raises(ConfigurationError) as error:
        load_config(project, overrides)
    return str(error.value)


def tensors(config: Config, step: int) -> dict[str, torch.Tensor]:
    folder = Path(config.output) / "checkpoints" / f"step_{step:06d}"
    return {
        f"{role}.{name}": tensor for role in ("generator", "fake") for name, tensor in read_role(folder, role).items()
    }


def log(config: Config) -> list[dict[str, float]]:
    return [json.loads(line) for line in (Path(config.output) / "metrics.jsonl").read_text().splitlines()]


SECTIONS = {
    name: section
    for section in get_args(Config.model_fields["method"].annotation)
    for name in get_args(section.model_fields["name"].annotation)
}


@pytest.mark.parametrize("name", METHODS)
def test_keys_and_defaults_are_those_of_the_class(name: str) -> None:
    # What all take alike stands in the class that they share.
    parameters = {**inspect.signature(MethodClass).parameters, **inspect.signature(METHODS[name]).parameters}
    taken = {key: value.default for key, value in parameters.items() if key not in OF_OTHER_SECTIONS | OF_PYTHON_ALONE}
    assert METHODS.keys() == SECTIONS.keys()
    assert SECTIONS[name](name=name).model_dump(exclude={"name"}) == taken


@pytest.mark.parametrize("name", METHODS)
def test_a_configuration_with_all_defaults_written_out_is_the_same(project: Path, tmp_path: Path, name: str) -> None:
    config = load_config(project, of(name))
    (tmp_path / "copy.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "copy.yaml") == config
    assert SECTIONS[name].model_fields.keys() == yaml.safe_load(dump_config(config))["method"].keys()


@pytest.mark.parametrize("name", METHODS)
def test_files_with_the_keys_of_all_methods_are_read(project: Path, tmp_path: Path, name: str) -> None:
    """As earlier versions have saved them: null for those that the method doesn't have."""
    config = load_config(project, [*of(name), "method.time_distribution={name: shifted, shift: 3}"])
    saved = yaml.safe_load(dump_config(config))
    others = {key: None for section in SECTIONS.values() for key in section.model_fields}
    saved["method"] = {**others, **saved["method"]}
    saved["method"]["time_distribution"] |= {"mean": None, "std": None}
    (tmp_path / "saved.yaml").write_text(yaml.safe_dump(saved))
    assert load_config(tmp_path / "saved.yaml") == config


def test_a_null_leaves_a_key_of_a_method_open(project: Path) -> None:
    assert load_config(project, ["method.weighting=null"]) == load_config(project)


@pytest.mark.parametrize(
    ("name", "override", "said"),
    [
        ("dmd2", "method.weighting=x0", "weighting belongs to diff_instruct and diff_instruct_pp and sim and"),
        ("sim", "method.sid_alpha=1.2", "sid_alpha belongs to sid, not to sim: remove it"),
        ("sid", "method.huber_c=1", "huber_c belongs to sim and diff_instruct_star, not to sid"),
        ("sim", "method.guidance=outside", "guidance belongs to diff_instruct_star, not to sim"),
        ("dmd2", "method.guidance_t_range=[0, 9]", "guidance_t_range belongs to decoupled_dmd, not to dmd2"),
        ("diff_instruct", "method.fake_guidance_scale=2", "fake_guidance_scale belongs to sid"),
        ("sim", "method.weighting=unit", "method.weighting should be 'x0' or 'score', got 'unit'"),
        ("sim", "method.normalizer=batch", "normalizer belongs to dmd2, not to sim"),
        ("sim", "method.guidance_rescale=2", "method.guidance_rescale should be less than or equal to 1"),
        ("sid", "method.prompt_dropout=1", "method.prompt_dropout should be less than 1"),
        (
            "sim",
            "method.time_distribution={name: normal}",
            "method.time_distribution.name should be 'uniform',",
        ),
        ("sim", "method.time_distribution={name: shifted}", "the key method.time_distribution.shift is missing"),
        (
            "sim",
            "method.fake_time_distribution={name: shifted, shift: 3, std: 1}",
            "method.fake_time_distribution: std belongs to log_normal and logit_normal, not to shifted: remove it",
        ),
        ("sim", "models.negative_prompt=''", "models.negative_prompt should have at least 1 character"),
        ("sim", "method.huber_c=0", "method.huber_c should be greater than 0"),
        ("dmd2", "method.discriminator=true", "unknown key method.discriminator"),
        ("sid", "distributed.fake={stage: 3}", "sid differentiates through the fake score and the reference, whose"),
        ("sim", "distributed.reference=shard", "which shard spreads for calls without gradient"),
        ("sid", "training.activation_checkpointing=true|models.fake.lora={}", "models.fake.lora=null"),
    ],
)
def test_what_a_method_does_not_take_is_refused_by_name(project: Path, name: str, override: str, said: str) -> None:
    assert said in refusal(project, *of(name, *override.split("|")))


def test_rewards_belong_to_the_methods_that_take_them(project: Path) -> None:
    said = refusal(project, "method.name=sid")
    assert (
        "sid optimises no reward: remove rewards.optimised or use diff_instruct_pp or diff_instruct_star or didr"
        in said
    )
    said = refusal(project, "method.name=diff_instruct_star", "rewards.optimised=null")
    assert "diff_instruct_star needs rewards.optimised" in said


def test_stage_3_is_no_matter_where_the_plain_engine_is_asked_for(project: Path) -> None:
    load_config(project, of("sid", "distributed={engine: plain, fake: {stage: 3}}"))


EXTRA = {
    "dmd2": ("method.fake_rounds=2",),
    "decoupled_dmd": ("method.fake_rounds=1", "method.guidance_t_range=[500, 1000]"),
    "sid": ("method.guidance_scale=1", "method.fake_guidance_scale=2", "method.t_range=[20, 980]"),
    "sim": ("training.activation_checkpointing=true",),
    "diff_instruct_star": ("method.guidance=outside", "precision=bfloat16"),
    "didr": ("method.beta=0.5", "method.denoising_steps=2", "method.guidance_scale=2"),
}


@pytest.mark.parametrize("name", EXTRA)
def test_two_steps_train_both_networks_and_resume(project: Path, tmp_path: Path, name: str) -> None:
    config = load_config(project, [*QUIET, f"output={tmp_path}/run", *of(name, *EXTRA[name])])
    assert Trainer(config).run().step == 2
    first, last, lines = tensors(config, 1), tensors(config, 2), log(config)
    for role in ("generator", "fake"):
        assert any(not torch.equal(first[key], last[key]) for key in last if key.startswith(role))
    assert all(tensor.isfinite().all() for tensor in last.values())
    assert lines[0]["generator/score_gap"] > 0 and lines[0]["generator/gradient_norm"] > 0
    assert ("generator/divergence_loss" in lines[0]) == ("fake" in METHODS[name].differentiates)
    assert ("generator/reward" in lines[0]) == METHODS[name].takes_reward

    if name == "sid":  # what is written and read does not depend on the method, see test_trainer.py
        shutil.rmtree(Path(config.output) / "checkpoints" / "step_000002")
        Trainer(config, resume="latest").run()
        again = tensors(config, 2)
        assert all(torch.equal(again[key], tensor) for key, tensor in last.items())


@pytest.mark.parametrize("name", ["sim", "didr"])
def test_a_frozen_reference_trains_the_same(
    project: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for label in ("frozen", "plain"):
        if label == "plain":
            monkeypatch.setattr(Networks, "freeze_reference", lambda networks: None)
        overrides = (*QUIET, *SPREAD, "training.steps=1", f"output={tmp_path}/{label}")
        trainer = Trainer(load_config(project, [*overrides, *of(name, "method.guidance_scale=2")]))
        parts = trainer.parts
        networks = [parts.sampler.trained.network, parts.fake.network, parts.reference]
        frozen = [any(row.frozen for row in freezing_report(network)) for network in networks]
        assert frozen == [False, False, label == "frozen"]
        trainer.run()
        results.append(tensors(trainer.config, 1))
    for key, tensor in results[0].items():
        torch.testing.assert_close(tensor, results[1][key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("override", "why"),
    [
        ("models.fake.lora={rank: 2}", "its weights serve fake too, by LoRA"),
        ("training.fuse=false", "training.fuse=false leaves its blocks as they are"),
    ],
)
def test_a_reference_that_is_not_frozen_is_told_of(
    override: str, why: str, project: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    overrides = of("sid", override)
    with caplog.at_level(logging.INFO):
        trainer = Trainer(load_config(project, [*QUIET, f"output={tmp_path}/run", *overrides]))
    assert f"reference: not frozen for its gradient, for {why}" in caplog.text
    assert not any(row.frozen for row in freezing_report(trainer.parts.reference))


def test_adapters_of_both_roles_on_one_backbone_keep_their_gradients(project: Path, tmp_path: Path) -> None:
    """The reference, the fake score and the generator are one network."""
    adapters = "{rank: 2}"
    overrides = of("sid", f"models.generator={{path: null, lora: {adapters}}}", f"models.fake.lora={adapters}")
    trainer = Trainer(load_config(project, [*QUIET, f"output={tmp_path}/run", *overrides]))
    generator, fake = trainer.parts.trained("generator"), trainer.parts.trained("fake")
    batch = next(iter(trainer.batches.micro_batches(0, trainer.parts.sampler.encode, trainer.parts.null))).batch
    with generator.active():
        trainer.parts.method.generator_loss(batch).loss.backward()
    assert all(weight.grad is None and weight.requires_grad for weight in fake.parameters.values())
    assert any(weight.grad is not None and weight.grad.norm() > 0 for weight in generator.parameters.values())


@pytest.fixture
def weightless(tmp_path: Path) -> Path:
    """A run's inputs without one byte of weights, on a flow's schedule; the configuration."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    config = tiny.write(tmp_path / "weightless")
    for weights in config.parent.rglob("*.safetensors"):
        weights.unlink()
    FlowMatchEulerDiscreteScheduler().save_pretrained(config.parent / "weights" / "scheduler")
    return config


@pytest.mark.parametrize(
    ("name", "override", "said"),
    [
        (
            "sim",
            "seed=1",
            "method: the loss of SIM is not finite at t = 0: leave such times out by t_range, e.g. [1,",
        ),
        ("diff_instruct_pp", "method.fake_weighting=score", "method: fake_weighting 'score' is not finite at t = 0"),
        ("dmd2", "models.generator.timestep=0", "models.generator: timestep 0, where alpha is 1 and sigma 0: x0 would"),
        ("dmd2", "models.generator.timestep=1000", "models.generator: timestep must lie in [0, 1000), got 1000"),
        ("dmd2", "method.t_range=[0, 1001]", "method: t_range must lie within [0, 1000)"),
        (
            "dmd2",
            "method.time_distribution={name: log_normal, mean: 30, std: 1}",
            "method: LogNormal(mean=30.0, std=1.0) has only 0.0e+00 of its mass on t_range [0, 1000)",
        ),
        ("decoupled_dmd", "method.guidance_rescale=0.5", "method: guidance_rescale changes the guided output"),
    ],
)
def test_what_the_schedule_does_not_serve_is_refused_before_anything_is_loaded(
    weightless: Path, name: str, override: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the run and by `--dry-run`, which reads the schedule alone."""
    given = of(name, override, f"output={weightless.parent}/run")
    for flags in ([], ["--dry-run"]):
        assert main(["train", str(weightless), *given, *flags]) == 2
        assert said in capsys.readouterr().err


def test_the_normaliser_of_a_batch_spans_the_whole_update(project: Path, tmp_path: Path) -> None:
    """The micro-batch changes memory only."""
    weights = []
    for micro_batch in (4, 3):
        chosen = of("dmd2", "method.normalizer=batch", "method.fake_rounds=1", f"training.micro_batch={micro_batch}")
        config = load_config(
            project, [*QUIET, *chosen, *SPREAD, "training.steps=1", f"output={tmp_path}/{micro_batch}"]
        )
        trainer = Trainer(config)
        before = torch.cat(
            [weight.detach().flatten() for weight in trainer.parts.trained("generator").parameters.values()]
        )
        trainer.run()
        after = read_role(Path(config.output) / "checkpoints" / "step_000001", "generator")
        weights.append(torch.cat([tensor.flatten() for tensor in after.values()]))
    assert len(before) == len(weights[0])
    assert (weights[1] - weights[0]).norm() < 1e-4 * (weights[0] - before).norm()


def test_what_guidance_leads_away_from_and_the_new_keys_reach_the_run(project: Path, tmp_path: Path) -> None:
    overrides = [
        "models.negative_prompt=a blue whale",
        "method.guidance_rescale=0.7",
        "method.prompt_dropout=0.25",
        "method.t_range=[20, 980]",
        "method.time_distribution={name: log_normal, mean: -1.2, std: 1.2}",
        "method.fake_t_range=[0, 1000]",
        "method.fake_time_distribution={name: shifted, shift: 3}",
        "training.baseline_steps=1",
        "training.steps=1",
    ]
    config = load_config(project, [*QUIET, *of("diff_instruct_pp", *overrides), f"output={tmp_path}/run"])
    (tmp_path / "copy.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "copy.yaml") == config
    trainer = Trainer(config)
    expected = trainer.parts.sampler.encode(["a blue whale"]).tensors["encoder_hidden_states"]
    assert trainer.parts.null is not None
    assert torch.equal(trainer.parts.null.tensors["encoder_hidden_states"], expected)
    method = trainer.parts.method
    assert (method.t_range, method.fake_t_range) == ((20, 980), (0, 1000))
    assert (method.guidance_rescale, method.prompt_dropout) == (0.7, 0.25)
    t = torch.arange(2000)
    assert method.times.draw(Noise(0, t)).float().mean() < 0.8 * method.fake_times.draw(Noise(0, t)).float().mean()
    assert trainer.run().step == 1
    facts = json.loads((tmp_path / "run" / "baseline.json").read_text())["facts"]
    assert (facts["negative_prompt"], facts["guidance_rescale"]) == ("a blue whale", 0.7)


def test_a_checkpoint_from_before_a_key_was_there_goes_on(project: Path, tmp_path: Path) -> None:
    config = load_config(project, of("dmd2"))
    prompts = open_prompts(config.prompts)
    before = yaml.safe_load(dump_config(config))
    del before["models"]["negative_prompt"]
    del before["training"]["batched_passes"]
    for key in {*Options.__annotations__, "normalizer"} - {"batched_passes"}:
        del before["method"][key]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(before))
    (tmp_path / "state.json").write_text(json.dumps({"prompts": prompts.digest()}))
    refuse_other_run(tmp_path, config, prompts)
    changed = load_config(project, of("dmd2", "method.prompt_dropout=0.1"))
    with pytest.raises(CheckpointError, match=r"method\.prompt_dropout was 0\.0, is 0\.1"):
        refuse_other_run(tmp_path, changed, prompts)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "stage"), [("sid", 0), ("sid", 1), ("sid", 2), ("diff_instruct_star", 2), ("dmd2", 2)]
)
def test_two_processes_at_any_stage_compute_what_one_does(project: Path, tmp_path: Path, name: str, stage: int) -> None:
    common = [*QUIET, *SPREAD, *of(name, *(["method.normalizer=batch"] if name == "dmd2" else []))]
    alone = load_config(project, [*common, f"output={tmp_path}/alone"])
    Trainer(alone).run()
    zero = f"distributed={{generator: {{stage: {stage}}}, fake: {{stage: {stage}}}}}"
    spread = load_config(project, [*common, f"output={tmp_path}/spread", zero])
    processes.run(["-m", "diffpp_fast", "train", str(project), f"output={spread.output}", *common, zero], 2)
    start, one, two = tensors(alone, 1), tensors(alone, 2), tensors(spread, 2)
    for role in ("generator", "fake"):
        before, expected, found = (
            torch.cat([part[key].flatten() for key in one if key.startswith(role)]) for part in (start, one, two)
        )
        assert (found - expected).norm() <= 1e-4 * (expected - before).norm(), role
