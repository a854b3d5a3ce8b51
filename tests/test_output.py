"""A run, and every command that writes, replaces its own files and nobody else's."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from diffpp_fast.cli.main import main
from diffpp_fast.errors import CheckpointError, ConfigurationError
from diffpp_fast.evaluation.pictures import refuse_foreign_pictures
from diffpp_fast.report import refuse_foreign_report
from diffpp_fast.training import Config, Trainer, load_config, lock
from diffpp_fast.training.distributed import World
from diffpp_fast.training.export import refuse_foreign_folder
from diffpp_fast.training.grids import write_png
from diffpp_fast.training.lock import LOCK
from diffpp_fast.training.output import MARK, claim_output, lock_target
from diffpp_fast.training.state import open_checkpoint

QUIET = ("training.grid_every=null", "rewards.held_out=null", "training.baseline_steps=null")
ALONE = World.alone("cpu")


@pytest.fixture(scope="module")
def done(project: Path) -> Path:
    """A run's output folder after one step."""
    Trainer(load_config(project, [f"output={project.parent / 'done'}", "training.steps=1", *QUIET])).run()
    return project.parent / "done"


@pytest.fixture
def run(done: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(done, tmp_path / "run"))


def configured(project: Path, output: Path, *overrides: str) -> Config:
    return load_config(project, [f"output={output}", *QUIET, *overrides])


def contents(folder: Path) -> dict[str, bytes | str]:
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in folder.rglob("*")
        if path.is_symlink() or path.is_file()
    }


def test_a_configuration_in_the_output_folder_stays(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = project.with_name("config.yaml")
    shutil.copy(project, own)
    before = contents(project.parent)
    assert main(["train", str(own), f"output={project.parent}"]) == 2
    said = capsys.readouterr().err
    assert f"{project.parent} holds config.yaml, which no run has written" in said and "another output=FOLDER" in said
    assert contents(project.parent) == before
    own.unlink()


FOREIGN = (
    "config.yaml",
    "metrics.jsonl",
    "environment.json",
    "baseline.json",
    "generator/diffusion_pytorch_model.safetensors",
    "generator/generator.json",
    "grids/step_000000.png",
    "checkpoints/step_000002/model.safetensors",
    "checkpoints",
    "tensorboard/events",
)


@pytest.mark.parametrize("name", FOREIGN)
def test_what_no_run_has_written_is_not_replaced(project: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(ConfigurationError, match=rf"holds {Path(name).parts[0]}, which no run has written"):
        claim_output(configured(project, tmp_path), ALONE)
    assert contents(tmp_path) == {name: b"mine"}


def test_links_are_not_written_through(project: Path, run: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    (mine / "empty").mkdir(parents=True)
    (mine / "file").write_text("mine")
    for name, target in (("config.yaml", mine / "file"), ("metrics.jsonl", mine / "new"), ("generator", mine)):
        for output in (tmp_path / name.partition(".")[0], Path(shutil.copytree(run, tmp_path / f"{name} of a run"))):
            output.mkdir(exist_ok=True)
            shutil.rmtree(output / name) if (output / name).is_dir() else (output / name).unlink(missing_ok=True)
            (output / name).symlink_to(target)
            with pytest.raises(ConfigurationError, match=f"holds {name}, which no run has written"):
                claim_output(configured(project, output), ALONE)
    assert contents(mine) == {"file": b"mine"}
    # A larger disk, for all of a run or for its checkpoints.
    (tmp_path / "linked").symlink_to(mine / "empty")
    (mine / "disk").mkdir()
    (mine / "empty" / "checkpoints").symlink_to(mine / "disk")
    claimed = claim_output(configured(project, tmp_path / "linked"), ALONE)
    assert claimed is not None
    claimed.release()


def test_a_run_does_not_replace_what_it_is_started_from(project: Path, run: Path) -> None:
    before = contents(run)
    for key, path in {
        "models.generator.path": run / "generator",
        "prompts": run / "grids" / "prompts.txt",
        "rewards.optimised.factory": run / "checkpoints" / "rewards.py",
    }.items():
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            shutil.copy(project.parent / path.name, path)
        factory = f"{path}:redness" if path.suffix == ".py" else path
        with pytest.raises(ConfigurationError, match=rf"{key}[a-z.]* is {path}, which would be replaced"):
            claim_output(configured(project, run, f"{key}={factory}"), ALONE)
        if path.is_file():
            path.unlink()
    assert contents(run) == before


def test_a_run_goes_on_in_its_folder_also_in_one_of_an_earlier_version(project: Path, run: Path) -> None:
    (run / MARK).unlink()
    shutil.copytree(run, run.with_name("killed"))
    shutil.rmtree(run.with_name("killed") / "checkpoints")
    shutil.rmtree(run.with_name("killed") / "generator")
    claimed = claim_output(configured(project, run.with_name("killed")), ALONE)  # before its first checkpoint
    assert claimed is not None
    claimed.release()
    # By its own configuration, which it wrote itself.
    assert main(["train", str(run / "config.yaml"), f"output={run}", "training.steps=2", "--resume", "latest"]) == 0
    assert (run / MARK).is_file() and not (run / LOCK).exists()
    assert load_config(run / "config.yaml").training.steps == 2


def test_a_configuration_that_was_edited_is_kept(project: Path, run: Path, caplog: pytest.LogCaptureFixture) -> None:
    edited = (run / "config.yaml").read_text().replace("steps: 1\n", "steps: 2  # one more\n")
    (run / "config.yaml").write_text(edited)
    trainer = Trainer(load_config(run / "config.yaml", [f"output={run}"]), resume="latest")
    assert trainer.run().step == 2
    assert (run / "config.edited-1.yaml").read_text() == edited and "config.yaml was edited: kept as" in caplog.text


def test_another_run_s_checkpoints_and_generator_stay(project: Path, done: Path, run: Path) -> None:
    before = contents(run)
    checkpoint = done / "checkpoints" / "step_000001"
    with pytest.raises(CheckpointError, match=rf"already holds checkpoints, of another run than {checkpoint}"):
        Trainer(configured(project, run, "training.steps=2"), resume=str(checkpoint))
    assert contents(run) == before
    shutil.rmtree(run / "checkpoints")
    for resume in (None, "latest"):
        with pytest.raises(CheckpointError, match="holds the generator of a run whose checkpoints are gone"):
            Trainer(configured(project, run), resume=resume)


def test_a_start_that_is_refused_touches_nothing_of_a_live_run(project: Path, run: Path) -> None:
    # Half-written: the live run is saving.
    (run / "checkpoints" / ".step_000002.partial").mkdir()
    (run / "checkpoints" / ".step_000002.partial" / "generator.safetensors").write_text("half")
    other = os.getppid()
    alive = {**lock._identity(), "pid": other, "start": lock._start_of(other), "token": "other", "beat": "0"}
    (run / LOCK).write_text(json.dumps(alive))
    before = contents(run)
    for resume in (None, "latest", "best"):
        with pytest.raises(ConfigurationError, match=f"output: {run} is being written by process {other} on"):
            Trainer(configured(project, run), resume=resume)
    with pytest.raises(ConfigurationError, match="is being written by process"):
        lock_target(run / "generator")  # as `diffpp-fast export` does it
    assert contents(run) == before


def test_a_run_whose_folder_holds_embeddings_too_is_a_run(project: Path, run: Path) -> None:
    assert main(["embed", str(project), "--out", str(run)]) == 0
    found = open_checkpoint(run, ALONE)
    assert found == run / "checkpoints" / "step_000001" and open_checkpoint(found, ALONE) == found


def test_an_export_replaces_exports_only(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refuse_foreign_folder(run / "generator")
    (run / "generator" / "README.md").write_text("mine")
    with pytest.raises(CheckpointError, match=r"holds README\.md, which no export has written"):
        refuse_foreign_folder(run / "generator")
    with pytest.raises(CheckpointError, match="an exported generator: choose another"):
        refuse_foreign_folder(run / "generator" / "deeper")
    with pytest.raises(CheckpointError, match=r"step_000009 lies in .*, which is for a run's checkpoints"):
        refuse_foreign_folder(run / "checkpoints" / "step_000009")
    (run.parent / "empty").mkdir()
    assert main(["export", str(run), "--out", str(run.parent / "empty"), "--raw"]) == 0
    (run.parent / "link").symlink_to(run.parent / "nothing")
    with pytest.raises(CheckpointError, match="exists and is no exported generator"):
        refuse_foreign_folder(run.parent / "link")
    # What the run was started from: a checkpoint of it may need these weights.
    config = run / "checkpoints" / "step_000001" / "config.yaml"
    assert "weights/generator" in config.read_text()
    (run / "generator" / "README.md").unlink()
    capsys.readouterr()
    started_from = str(Path(load_config(config).models.generator.path or ""))
    assert main(["export", str(run), "--out", started_from]) == 2
    assert "is no exported generator" in capsys.readouterr().err


def test_pictures_and_reports_replace_their_own_kind(tmp_path: Path) -> None:
    pixels = torch.zeros(4, 4, 3, dtype=torch.uint8)
    photo, drawn = tmp_path / "photo.png", tmp_path / "drawn.png"
    Image.fromarray(pixels.numpy()).save(photo)
    write_png(drawn, pixels, {"weights": "sha256:0"})
    refuse_foreign_pictures([drawn, tmp_path / "new.png"])
    (tmp_path / "text.png").write_text("mine")
    for path in (photo, tmp_path / "text.png", tmp_path):
        with pytest.raises(ConfigurationError, match=f"{path} exists and was not drawn by diffpp-fast"):
            refuse_foreign_pictures([drawn, path])
    # A link is replaced by a picture; what it points to stays.
    (tmp_path / "link.png").symlink_to(photo)
    before = photo.read_bytes()
    write_png(tmp_path / "link.png", pixels, {"weights": "sha256:0"})
    assert photo.read_bytes() == before and not (tmp_path / "link.png").is_symlink()

    refuse_foreign_report(tmp_path / "report.html")
    (tmp_path / "report-reward.png").write_text("mine")
    with pytest.raises(ConfigurationError, match=r"report-reward\.png exists and is no report"):
        refuse_foreign_report(tmp_path / "report.html")
    (tmp_path / "report.html").write_text("<title>diffpp_fast: a</title>")
    refuse_foreign_report(tmp_path / "report.html")
    (tmp_path / "page.html").write_text("<title>my page</title>")
    with pytest.raises(ConfigurationError, match=r"page\.html exists and is no report"):
        refuse_foreign_report(tmp_path / "page.html")
