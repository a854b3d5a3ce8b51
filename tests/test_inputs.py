"""A run's inputs are known by their content, and a run that has trained nothing has nothing to show."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from diffpp_fast.cli.main import main
from diffpp_fast.methods import Batch, StepOutput
from diffpp_fast.training import CheckpointError, Config, ConfigurationError, NonFiniteError, Trainer, load_config
from diffpp_fast.training.build.agreement import idle_sentences, refuse_misfits
from diffpp_fast.training.distributed import World
from diffpp_fast.training.inputs import digest_of, refuse_unequal_inputs

QUIET = (
    "logging.tensorboard=false",
    "training.grid_every=null",
    "rewards.held_out=null",
    "training.baseline_steps=null",
    "models.generator.lora={rank: 2}",
    "training.steps=1",
)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step, `run`, on adapters, so that the generator's own weights count."""
    folder = tmp_path_factory.mktemp("project")
    config = tiny.write(folder)
    (folder / "head.py").write_text(
        "import torch\n\n\ndef head(path):\n    weight = torch.load(path, weights_only=True)\n"
        "    return lambda images, prompts: (images.mean((2, 3)) * weight).sum(1)\n"
    )
    torch.save(torch.ones(3), folder / "head.pt")
    Trainer(config_of(config)).run()
    return config


@pytest.fixture
def copy(project: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Puts a file or folder of the project back when the test is over."""
    kept: list[tuple[Path, Path]] = []

    def keep(name: str) -> Path:
        kept.append((project.parent / name, tmp_path / str(len(kept))))
        shutil.copy2(*kept[-1])
        return kept[-1][0]

    yield keep
    for original, saved in kept:
        shutil.copy2(saved, original)


def head(project: Path) -> str:
    folder = project.parent
    return f"rewards.optimised={{factory: {folder}/head.py:head, arguments: {{path: {folder}/head.pt}}, scale: 1.0}}"


def config_of(project: Path, *overrides: str) -> Config:
    return load_config(project, [f"output={project.parent / 'run'}", head(project), *QUIET, *overrides])


def change_weights(path: Path) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    # Of an autoencoder, a weight that decodes.
    last = tensors[max(name for name in tensors if not name.startswith(("encoder.", "quant_conv.")))]
    last.view(-1)[-1:].view(torch.int32).bitwise_xor_(1)  # one bit, the last
    save_file(tensors, path, {"format": "pt"})


def change_vocabulary(path: Path) -> None:
    path.write_text(path.read_text().replace("apple", "pears"))


def change_betas(path: Path) -> None:
    path.write_text(path.read_text().replace("0.012", "0.0121"))


def change_head(path: Path) -> None:
    torch.save(torch.tensor([1.0, 1.0, 1.001]), path)


def change_code(path: Path) -> None:
    path.write_text(path.read_text().replace("sum(1)", "mean(1)"))


CHANGES: dict[str, tuple[str, str, Callable[[Path], None]]] = {
    "reference": ("models.reference", "weights/reference/diffusion_pytorch_model.safetensors", change_weights),
    "generator": ("models.generator", "weights/generator/diffusion_pytorch_model.safetensors", change_weights),
    "decoder": ("models.decoder", "weights/vae/diffusion_pytorch_model.safetensors", change_weights),
    "text_encoder": ("models.text_encoder", "weights/text/model.safetensors", change_weights),
    "tokenizer": ("models.text_encoder.tokenizer", "weights/text/tokenizer.json", change_vocabulary),
    "scheduler": ("models.scheduler", "weights/scheduler/scheduler_config.json", change_betas),
    "reward": ("rewards.optimised", "head.pt", change_head),
    "reward's code": ("rewards.optimised", "head.py", change_code),
}


@pytest.mark.parametrize("name", CHANGES)
def test_an_input_with_other_content_is_refused_or_accepted_by_name(
    project: Path, copy: Callable[[str], Path], name: str
) -> None:
    key, file, change = CHANGES[name]
    short = name.partition("'")[0]
    change(copy(file))
    config = config_of(project, "training.steps=2")
    with pytest.raises(CheckpointError, match=rf"the content of {key} has changed.*--accept-changed {short}$"):
        Trainer(config, resume="latest")
    if name == "reference":
        assert Trainer(config, resume="latest", accept_changed=["reference"]).step == 1


def test_nothing_has_changed_where_nothing_has(project: Path, caplog: pytest.LogCaptureFixture) -> None:
    Trainer(config_of(project, "training.steps=2"), resume="latest")
    assert "input" not in caplog.text and "earlier version" not in caplog.text


def test_sampling_and_exporting_say_what_has_changed(
    project: Path, copy: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    change_weights(copy("weights/vae/diffusion_pytorch_model.safetensors"))
    change_weights(copy("weights/generator/diffusion_pytorch_model.safetensors"))
    run = str(project.parent / "run")
    assert main(["sample", "--run", run, "a red apple", "--count", "1", "--grid", str(tmp_path / "grid.png")]) == 0
    assert "was trained with another models.decoder than this" in caplog.text
    caplog.clear()
    assert main(["export", run, "--out", str(tmp_path / "export")]) == 0
    assert "was trained with another models.generator than this" in caplog.text


def test_a_checkpoint_of_an_earlier_version_goes_on(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    output = f"output={tmp_path / 'old'}"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_record", lambda self: {})
        Trainer(config_of(project, output)).run()
    assert Trainer(config_of(project, output, "training.steps=2"), resume="latest").run().step == 2
    assert "is of an earlier version" in caplog.text
    assert "inputs" in json.loads((tmp_path / "old" / "checkpoints" / "step_000002" / "state.json").read_text())


def test_a_project_that_has_moved_goes_on(project: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """By the place of its files in it, and by their content."""
    moved = shutil.copytree(project.parent, tmp_path / "moved") / project.name
    changed = [f"output={moved.parent / 'run'}", "training.steps=1"]
    assert Trainer(config_of(moved, *changed), resume="latest").step == 1
    shutil.copytree(moved.parent / "weights" / "reference", moved.parent / "other")
    with pytest.raises(CheckpointError, match=r"models\.reference\.path was .*, is .*/moved/other'"):
        Trainer(config_of(moved, *changed, f"models.reference.path={moved.parent / 'other'}"), resume="latest")
    change_weights(moved.parent / "weights" / "reference" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(CheckpointError, match=r"the content of models\.reference"):
        Trainer(config_of(moved, *changed), resume="latest")


def test_keys_without_effect_are_told_of(project: Path) -> None:
    unguided = ["method.guidance_scale=1", "models.negative_prompt=a fog", "method.guidance_rescale=0.5"]
    said = idle_sentences(config_of(project, *unguided))
    assert [sentence.partition(" has no effect: ")[0] for sentence in said] == [
        "models.negative_prompt",
        "method.guidance_rescale",
    ]
    assert len(idle_sentences(config_of(project, *unguided, "method.prompt_dropout=0.1"))) == 1
    assert idle_sentences(config_of(project, *unguided[1:], "method.guidance_scale=2")) == []
    with pytest.raises(ConfigurationError, match=r"models\.size_conditions has no effect: .* Remove it"):
        refuse_misfits(config_of(project, "models.size_conditions={target: [512, 512]}"))


def test_an_unknown_input_is_named(project: Path) -> None:
    with pytest.raises(ConfigurationError, match="--accept-changed vae: there is no such input; known are reference"):
        Trainer(config_of(project), accept_changed=["vae"])


def test_every_bit_and_every_fact_counts_in_a_digest() -> None:
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.bfloat16), "c": torch.tensor(3)}
    digests = {digest_of({"x": 1}, tensors), digest_of({"x": 2}, tensors), digest_of({"x": 1})}
    for name, tensor in tensors.items():
        raw = tensor.reshape(-1).view(torch.uint8)
        for place in range(len(raw)):
            raw[place] ^= 1
            digests.add(digest_of({"x": 1}, tensors))
            raw[place] ^= 1
        digests.add(digest_of({"x": 1}, {other: value for other, value in tensors.items() if other != name}))
    digests.add(digest_of({"x": 1}, {**tensors, "a": tensors["a"].view(3, 2)}))
    assert len(digests) == 3 + 24 + 4 + 8 + 3 + 1
    assert digest_of({"x": 1}, {**tensors, "a": tensors["a"].t().contiguous().t()}) == digest_of({"x": 1}, tensors)


def test_processes_must_read_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    mine, of_main = {"reference": "ab" * 16, "reward": None}, {"reference": "cd" * 16, "reward": None}
    world = World(1, 2, 1, torch.device("cpu"))
    said: list[str] = []
    sent = torch.tensor([int(digest[:12], 16) if digest else 0 for digest in of_main.values()])
    monkeypatch.setattr(World, "sum", lambda self, tensor: tensor + sent)
    monkeypatch.setattr(World, "first_error", lambda self, error: None if error is None else str(error))
    with pytest.raises(ConfigurationError, match=r"rank 1: models\.reference differ from what rank 0 has read"):
        refuse_unequal_inputs(mine, world)
    refuse_unequal_inputs(of_main, world)
    assert not said


# -- runs that have trained nothing ------------------------------------------------------------------------------------


def undefined(project: Path, word: str) -> str:
    factory = f"{project.parent}/rewards.py:undefined_for"
    return f"rewards.optimised={{factory: {factory}, arguments: {{word: {word}}}, scale: 1.0}}"


def weights(trainer: Trainer) -> Mapping[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in trainer.generator.parameters.items()}


def test_a_run_whose_rewards_are_never_finite_fails_and_exports_nothing(project: Path, tmp_path: Path) -> None:
    given = (f"output={tmp_path / 'run'}", undefined(project, "a"), "training.steps=2", "training.micro_batch=1")
    trainer = Trainer(config_of(project, *given, "training.checkpoint_every=2"))
    before = weights(trainer)
    with pytest.raises(NonFiniteError) as error:
        trainer.run()
    said = str(error.value)
    assert "undefined_for) is not finite for 4 of 4 samples" in said
    assert "trained nothing: none of the 2 updates of the generator was made" in said
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.generator.parameters.items())
    assert not (tmp_path / "run" / "generator").exists()
    # The checkpoint that was due at the last step is there; going on from it finds the same.
    with pytest.raises(NonFiniteError, match="the last 2 updates were skipped"):
        Trainer(config_of(project, *given), resume="latest").run()
    # Rows of skipped updates go on over a resume.
    with pytest.raises(NonFiniteError, match="the last 3 updates were skipped"):
        Trainer(
            config_of(project, *given, "training.steps=9", "training.skip_limit=2", "training.log_every=1"),
            resume="latest",
        ).run()
    assert main(["train", str(project), *QUIET, f"output={tmp_path / 'cli'}", undefined(project, "a")]) == 2


@pytest.mark.parametrize("role", ["fake", "generator"])
def test_a_session_that_skips_every_update_of_a_role_fails(project: Path, tmp_path: Path, role: str) -> None:
    given = f"output={tmp_path / 'run'}"
    Trainer(config_of(project, given)).run()
    shutil.rmtree(tmp_path / "run" / "generator")
    trainer = Trainer(config_of(project, given, "training.steps=3"), resume="latest")
    method: Any = trainer.parts.method
    loss_of = getattr(method, f"{role}_loss")

    def broken(batch: Batch) -> StepOutput:
        output: StepOutput = loss_of(batch)
        return output._replace(loss=output.loss * torch.nan)

    setattr(method, f"{role}_loss", broken)
    with pytest.raises(NonFiniteError, match=rf"since it was resumed: none of the 2 updates of the {role} was made"):
        trainer.run()
    assert not (tmp_path / "run" / "generator").exists()
    # What was trained before is still there, and a run without anything left to do exports it.
    assert Trainer(config_of(project, given), resume="latest").run().step == 2
    assert (tmp_path / "run" / "generator").is_dir()


def test_a_run_with_nothing_left_to_do_says_so(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(project), f"output={project.parent / 'run'}", *QUIET, head(project)]
    assert main(["train", *arguments, "--resume", "latest"]) == 0
    assert "nothing left to do after 1 steps" in capsys.readouterr().out
