"""Mistakes on the command line, in files and in the environment: a sentence, exit code 2, and nothing else."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny

from diffpp_fast import backends
from diffpp_fast.cli.main import main

TRAIN = ["train", "align.yaml", "output=never"]
EMBED = ["embed", "align.yaml", "--out", "never"]
PLAN = ["plan", "align.yaml"]
EVALUATE = ["evaluate", "align.yaml", "--prompts", "prompts.txt", "--output", "never", "--metrics"]
LONG = "x" * 300

#: Keys of text that names something, and what is no such thing.
PATHS = ("afile", "adir", LONG, "a/" * 3000, "~nosuch/x", "aloop", "package:no_such_package/x", "package:")
KEYS = (
    "models.base",
    "models.reference.path",
    "models.scheduler.path",
    "models.text_encoder.path",
    "models.decoder.path",
)

#: Overrides that the schema refuses, or one part of it because of another.
OVERRIDES = (
    "seed=-1",
    "seed=1.5",
    "seed=18446744073709551616",
    "seed=" + "9" * 5000,
    "output=",
    "output=$HOME/runs",
    "device=tpu",
    "device=",
    "precision=float16",
    "precision=1",
    "prompts=[]",
    "prompts={}",
    "prompts.format=xml",
    "prompts.column=''",
    "models=weights",
    "models.latent_shape=4",
    "models.latent_shape=[4, 0, 8]",
    "models.latent_shape=[4, 8.5, 8]",
    "models.generator.timestep=-1",
    "models.generator.timestep=1e400",
    "models.generator.input_scale=sgima",
    "models.generator.lora={rank: 0}",
    "models.generator.lora={targets: []}",
    "models.generator.lora={targets: to_q}",
    "models.text_encoder.max_length=0",
    "models.text_encoder.mask_padding=no",
    "models.text_encoder.dtype=int8",
    "models.size_conditions.target=[0, 1]",
    "models.empty_prompt=ones",
    "method=sid",
    "method.name=",
    "method.name=sids",
    "method.guidance_scale=.inf",
    "method.guidance_scale=high",
    "method.t_range=[0]",
    "method.t_range=[0, 1, 2]",
    "method.t_range=[-1, 5]",
    "method.fake_rounds=0",
    "method.sid_alpha=1",
    "method.huber_c=0",
    "rewards=rewards.py",
    "rewards.optimised.factory=rewards.py",
    "rewards.optimised.factory=:redness",
    "rewards.optimised.factory=rewards.py:1x",
    "rewards.optimised.scale=strong",
    "rewards.optimised.clip=0",
    "rewards.optimised.arguments=[1]",
    "rewards.optimised.arguments={a: {b: c: d}}",
    "optimizers.fake=adam",
    "optimizers.fake.name=sgd",
    "optimizers.fake.lr=0",
    "optimizers.fake.lr=1e-400",
    "optimizers.fake.lr=fast",
    "optimizers.fake.betas=[0.9]",
    "optimizers.fake.betas=[0.9, 1]",
    "optimizers.fake.schedule=cosin",
    "optimizers.fake.final_lr=2",
    "distributed.engine=fsdp",
    "distributed.fake.stage=4",
    "distributed.fake.overlap=1",
    "distributed.reference=lost",
    "ema.decay=1",
    "ema=[]",
    "training=[]",
    "training.steps=0",
    "training.steps=010.5",
    "training.steps=9223372036854775808",
    "training.global_batch=9223372036854775807",
    "training.micro_batch=0",
    "training.grid_prompts=[]",
    "training.grid_prompts=[1]",
    "training.keep_best={metric: ''}",
    "training.keep_best={metric: a, mode: up}",
    "training.attention=fast",
    "training.fuse=yes",
    "training.threads=-1",
    "training.threads=9223372036854775807",
    "training.threads=99999999",
    "logging.wandb={}",
    "logging.wandb={project: a, mode: on}",
    "logging.tensorboard=1",
    "extends=other.yaml",
    "nothing=1",
    "training..steps=1",
    "training.steps.more=1",
    "training.steps=[1",
    "training.steps=" + "[" * 2000,
    "training.steps",
    "=1",
)

#: Text of a whole configuration.
FILES = (
    "",
    "just text",
    "- a list",
    "seed: [",
    "seed: 1\nseed: 2",
    "\tseed: 1",
    "seed: &a [*a]",
    "seed: !!python/object:os.system {}",
    "--- {}\n--- {}",
    "extends: align.yaml\nextends: other.yaml",
    "extends: bad.yaml",
    "extends: nothing.yaml",
    "extends: [a]",
    "extends: adir",
    "extends: align.yaml\noutput: 2024",
    "extends: align.yaml\noutput: [a]",
    "extends: align.yaml\nprompts: 7",
    'extends: align.yaml\noutput: "a\\0b"',
    "extends: align.yaml\n1: 2",
    "? [a]\n: b",
)

#: Whole commands, and what the message says.
COMMANDS = (
    (["train", "nothing.yaml"], "No such file"),
    (["train", "adir"], "directory"),
    (["train", LONG], "too long"),
    (["plan", "nothing.yaml"], "No such file"),
    (["embed", "nothing.yaml"], "No such file"),
    (["controls", "nothing.yaml"], "No such file"),
    ([*TRAIN, "--resume", LONG], LONG),
    ([*TRAIN, "--resume", "afile"], "afile"),
    ([*TRAIN, "--resume", "aloop"], "aloop"),
    ([*EMBED, "prompts=aloop"], "aloop"),
    ([*TRAIN, "rewards.optimised.factory=aloop/x.py:y"], "no such file"),
    (["export", "adir", "--out", "aloop"], "aloop"),
    ([*EMBED, "prompts=nothing.txt"], "No such file"),
    ([*EMBED, f"prompts={LONG}"], LONG),
    ([*EMBED, "prompts=adir"], "adir"),
    ([*EMBED, "prompts=afile"], "afile"),
    ([*EMBED, "prompts={00..99999999999}.txt"], "No such file"),
    (["embed", "align.yaml"], "--out FOLDER"),
    (["embed", "align.yaml", "--out", "afile"], "afile is a file: name a folder"),
    (["sample"], "sample what?"),
    (["sample", "a", "--run", "adir"], "adir is neither"),
    (["sample", "a", "--run", LONG], "too long"),
    (["sample", "a", "--model", "nothing"], "nothing is neither"),
    (["sample", "a", "--model", "weights/generator"], "without text encoder and decoder"),
    (["sample", "a", "--model", "weights/generator", "--config", "nothing.yaml"], "No such file"),
    (["sample", "a", "--model", "weights/generator", "--base", "adir"], "has no generator.json"),
    (["sample", "a", "--seed", "-1"], "--seed must be in"),
    (["sample", "a", "--out", "picture.jpg"], "ends in .png"),
    (["sample", "--prompts", "nothing.txt"], "No such file"),
    (["sample", "caf\udce9"], "'caf\\udce9' is not UTF-8"),
    (["sample", "--prompts", "half.json"], "half of a surrogate pair"),
    (["sample", "--prompts", "nul.json"], "NUL character"),
    (["sample", "--prompts", "half.jsonl"], "half of a surrogate pair"),
    ([*EVALUATE, "beauty"], "there is no metric"),
    ([*EVALUATE, "rewards.py:nothing"], "has no function nothing"),
    ([*EVALUATE, "rewards.py:redness", "--set", "redness.chanel=0"], "do not fit redness"),
    ([*EVALUATE, "rewards.py:redness", "--set", "redness.channel=[1"], "is not valid YAML"),
    ([*EVALUATE, "os:system"], "os is Python's own"),
    ([*EVALUATE, "broken.py:make"], "broken.py, line 2: "),
    ([*EVALUATE, "failing.py:make"], "ZeroDivisionError: division by zero"),
    (["evaluate", "nothing=no.yaml", *EVALUATE[2:], "rewards.py:redness"], "no.yaml is neither"),
    (["export", "adir", "--out", "never"], "adir"),
    (["export", LONG, "--out", "never"], "too long"),
    (["report", "nothing"], "nothing"),
    (["report", "~nosuch/run"], "~nosuch/run: there is no home folder"),
    (["report", LONG], LONG),
    (["controls", "align.yaml", "--only", "nothing"], "--only nothing"),
    (["plan"], "plan what?"),
    (["plan", "--model", "sd9"], "sd9"),
    ([*PLAN, "--gpu", "gtx"], "gtx"),
    ([*PLAN, "--batch", "4"], "--batch belongs to --model"),
    (["plan", "--model", "sd15", "--reward", "beauty"], "beauty"),
)  # fmt: skip

#: Variables of the environment, a command, and what the message says; None where the command does its work.
ENVIRONMENTS = (
    ({"DIFFPP_FAST_BACKEND": "fastest"}, TRAIN, "DIFFPP_FAST_BACKEND is 'fastest': known are auto"),
    ({"DIFFPP_FAST_BACKEND": "cuda"}, EMBED, "the backend cuda can't serve on cpu"),
    ({"OMP_NUM_THREADS": "abc"}, TRAIN, "OMP_NUM_THREADS is 'abc'"),
    ({"OMP_NUM_THREADS": ""}, TRAIN, "OMP_NUM_THREADS is ''"),
    ({"RANK": "first", "WORLD_SIZE": "2"}, TRAIN, "RANK is 'first'"),
    (
        {"DIFFPP_FAST_BACKEND": "", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "4,2"},
        [*TRAIN, "--print-config"],
        None,
    ),
)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    tiny.write(folder)
    (folder / "afile").write_text("x")
    (folder / "adir").mkdir()
    (folder / "aloop").symlink_to("aloop")
    (folder / "half.json").write_text('["a \\ud800 b"]')
    (folder / "nul.json").write_text('["a \\u0000 b"]')
    (folder / "half.jsonl").write_text('{"prompt": "a \\ud800 b"}')
    (folder / "broken.py").write_text("import torch\ndef make(:\n")
    (folder / "failing.py").write_text("1 / 0\n")
    (folder / "other.yaml").write_text("seed: 1\n")
    return folder


@pytest.fixture(autouse=True)
def in_project(project: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(project)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    yield
    assert not (project / "never").exists()


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """Return the sentence that a refused command ends with."""
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "Traceback" not in said and len(said) < 20_000
    return said


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("path", PATHS, ids=range(len(PATHS)))
def test_paths_that_name_nothing(key: str, path: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, [*PLAN, f"{key}={path}"])
    assert key.removesuffix(".path") in said or "~nosuch" in said


@pytest.mark.parametrize("override", OVERRIDES, ids=range(len(OVERRIDES)))
def test_overrides(override: str, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, [*TRAIN, override])


@pytest.mark.parametrize("text", FILES, ids=range(len(FILES)))
def test_files(text: str, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "bad.yaml").write_text(text)
    refused(capsys, ["train", "bad.yaml"])


@pytest.mark.parametrize(("arguments", "said"), COMMANDS, ids=range(len(COMMANDS)))
def test_commands(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in refused(capsys, arguments)


@pytest.mark.parametrize(("variables", "arguments", "said"), ENVIRONMENTS, ids=range(len(ENVIRONMENTS)))
def test_environments(
    variables: dict[str, str],
    arguments: list[str],
    said: str | None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    # A process reads it once.
    monkeypatch.setattr(backends, "_from_environment", backends._from_environment.__wrapped__)
    if said is None:
        assert main(arguments) == 0
    else:
        assert said in refused(capsys, arguments)


def test_where_an_error_is_can_be_seen(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFPP_FAST_TRACEBACK", "1")
    assert main(["train", "nothing.yaml"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_fault_of_the_program_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffpp_fast.training.loading._read", lambda file: json.loads("{"))
    with pytest.raises(json.JSONDecodeError):
        main(TRAIN)
    assert not os.path.exists("never")
