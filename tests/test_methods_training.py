"""Every method by the trainer: what a configuration may say of it, two steps of each, resumed and spread."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path

import processes
import pytest
import tiny
import torch
import yaml

from diffpp_fast.methods import METHODS
from diffpp_fast.training import Config, ConfigurationError, Trainer, load_config
from diffpp_fast.training.config import METHOD_KEYS, Method
from diffpp_fast.training.weights import read_role

#: What the constructors take that is no key of the section `method`.
OF_OTHER_SECTIONS = {"self", "generator", "fake", "reference", "schedule", "reward", "reward_scale", "reward_clip"}
OF_PYTHON_ALONE = {
    "normalizer",
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


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("project"))


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


@pytest.mark.parametrize("name", METHODS)
def test_keys_and_defaults_are_those_of_the_class(name: str) -> None:
    parameters = inspect.signature(METHODS[name]).parameters
    taken = {key: value.default for key, value in parameters.items() if key not in OF_OTHER_SECTIONS | OF_PYTHON_ALONE}
    assert METHODS.keys() == METHOD_KEYS.keys()
    section = Method.model_validate({"name": name})
    assert section.model_dump(exclude={"name"}, exclude_none=True) == {
        key: default for key, default in taken.items() if default is not None
    }
    others = Method.model_fields.keys() - taken.keys() - {"name"}
    assert all(getattr(section, key) is None for key in others)


@pytest.mark.parametrize("name", METHODS)
def test_a_configuration_with_all_defaults_written_out_is_the_same(project: Path, tmp_path: Path, name: str) -> None:
    from diffpp_fast.training import dump_config

    config = load_config(project, of(name))
    (tmp_path / "copy.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "copy.yaml") == config
    assert set(METHOD_KEYS[name]) <= yaml.safe_load(dump_config(config))["method"].keys()


@pytest.mark.parametrize(
    ("name", "override", "said"),
    [
        ("dmd2", "method.weighting=x0", "weighting belongs to diff_instruct and diff_instruct_pp and sim and"),
        ("sim", "method.sid_alpha=1.2", "sid_alpha belongs to sid, not to sim: remove it"),
        ("sid", "method.huber_c=1", "huber_c belongs to sim and diff_instruct_star, not to sid"),
        ("sim", "method.guidance=outside", "guidance belongs to diff_instruct_star, not to sim"),
        ("dmd2", "method.guidance_t_range=[0, 9]", "guidance_t_range belongs to decoupled_dmd, not to dmd2"),
        ("diff_instruct", "method.fake_guidance_scale=2", "fake_guidance_scale belongs to sid"),
        ("sim", "method.weighting=unit", "weighting of sim should be x0 or score, got 'unit'"),
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
    assert "sid optimises no reward: remove rewards.optimised or use diff_instruct_pp or diff_instruct_star" in said
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
    assert ("generator/divergence_loss" in lines[0]) == METHODS[name].differentiates_networks
    assert ("generator/reward" in lines[0]) == METHODS[name].takes_reward

    if name == "sid":  # what is written and read does not depend on the method, see test_trainer.py
        shutil.rmtree(Path(config.output) / "checkpoints" / "step_000002")
        Trainer(config, resume="latest").run()
        again = tensors(config, 2)
        assert all(torch.equal(again[key], tensor) for key, tensor in last.items())


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


#: As in test_elastic.py: steps large enough for a difference to show, an eps that does not magnify rounding.
SPREAD = (
    "optimizers.generator={lr: 1e-2, betas: [0.5, 0.99], eps: 1e-2, clip: 0.5}",
    "optimizers.fake={lr: 1e-2, betas: [0.5, 0.99], eps: 1e-2, clip: 0.05}",
)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "stage"), [("sid", 0), ("sid", 1), ("sid", 2), ("diff_instruct_star", 2)])
def test_two_processes_at_any_stage_compute_what_one_does(project: Path, tmp_path: Path, name: str, stage: int) -> None:
    common = [*QUIET, *SPREAD, *of(name)]
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
