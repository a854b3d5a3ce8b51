"""`diffpp-fast controls`: the same run with and without reward and guidance, and what is refused before it begins."""

from __future__ import annotations

import json
import shlex
import signal
from pathlib import Path
from typing import Any

import processes
import pytest
import tiny
import yaml

from diffpp_fast import report
from diffpp_fast.cli import controls as command
from diffpp_fast.cli.main import main
from diffpp_fast.training import ConfigurationError, Outcome, load_config
from diffpp_fast.training.callbacks import read_records, read_sessions
from diffpp_fast.training.controls import NAMES, controls_of

SHORT = ["training.steps=2", "training.baseline_steps=null", "logging.tensorboard=false", "training.global_batch=2"]


def controls(*arguments: str) -> int:
    return main(["controls", "align.yaml", *SHORT, *arguments])


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny configuration, whose four runs are in runs/all."""
    with tiny.project(tmp_path_factory.mktemp("project")) as folder:
        assert controls("output=runs/all") == 0
    return folder


@pytest.fixture(autouse=True)
def in_project(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work there, with reports that are begun only: drawing takes time, and the first command has drawn everything."""
    monkeypatch.chdir(project)
    monkeypatch.setattr("diffpp_fast.report.write_report", begin_report)


def begin_report(folders: list[Path], output: Path) -> Path:
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(" ".join(map(str, folders)))
    return output


def scalars(folder: str) -> dict[int, dict[str, Any]]:
    """Return the logged scalars by step."""
    logged: dict[int, dict[str, Any]] = {}
    for line in read_records(Path(folder) / "metrics.jsonl"):
        logged.setdefault(line["step"], {}).update(line)
    return logged


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert controls(*arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    return said


def test_the_runs_differ_by_what_is_switched_off_alone() -> None:
    configs = {name: yaml.safe_load(Path(f"runs/all/{name}/config.yaml").read_text()) for name in NAMES}
    switches = {
        name: (config["rewards"]["optimised"].pop("scale"), config["method"].pop("guidance_scale"))
        for name, config in configs.items()
    }
    assert switches == {"full": (2.0, 1.5), "no-reward": (0.0, 1.5), "no-guidance": (2.0, 1.0), "neither": (0.0, 1.0)}
    assert [config.pop("output") for config in configs.values()] == [f"runs/all/{name}" for name in NAMES]
    assert all(config == configs["full"] for config in configs.values())


def test_all_begin_with_the_same_and_have_the_same_curves() -> None:
    logged = {name: scalars(f"runs/all/{name}") for name in NAMES}
    full = logged["full"]
    for name in NAMES:
        # The teaching assistant's first update comes before any of the generator's: same latents, times and noise.
        assert logged[name][1]["fake/loss"] == full[1]["fake/loss"]
        assert logged[name][1]["generator/reward"] == full[1]["generator/reward"]
        assert logged[name][0]["grid/held_out"] == full[0]["grid/held_out"]
        first = Path(f"runs/all/{name}/grids/step_000000.png")
        assert first.read_bytes() == Path("runs/all/full/grids/step_000000.png").read_bytes()
        assert {"grid/reward", "grid/held_out", "generator/reward", "generator/score_gap"} <= logged[name][2].keys()
        assert ("generator/reward_gradient_norm" in logged[name][2]) == (name in ("full", "no-guidance"))
    assert len({logged[name][2]["generator/loss"] for name in NAMES}) == 4


def test_the_report_has_them_side_by_side() -> None:
    page = Path("runs/all/report.html").read_text(encoding="utf-8")
    assert "4 runs side by side" in page and "What each part does" in page
    for name in NAMES:
        assert f"<b>{name}</b>: complete: 2 steps" in page


def test_what_is_complete_is_left_alone(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "_train", lambda *_: pytest.fail("a complete run was trained again"))
    assert "already holds checkpoints: go on with --resume latest" in refusal(capsys, "output=runs/all")
    assert controls("output=runs/all", "--resume", "latest") == 0
    said = capsys.readouterr().out.splitlines()
    assert said == [*(f"{name}: complete, in runs/all/{name}" for name in NAMES), "report: runs/all/report.html"]
    assert Path("runs/all/report.html").read_text().split() == [f"runs/all/{name}" for name in NAMES]


def test_without_guidance_there_are_two_runs_and_an_interrupted_one_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    output = ["method.guidance_scale=1", "training.grid_every=null", "rewards.held_out=null"]
    assert main(["train", "align.yaml", *SHORT, *output, "output=runs/two/full", "training.steps=1"]) == 0
    capsys.readouterr()
    assert controls("output=runs/two", *output, "--resume", "latest") == 0
    said = capsys.readouterr().out
    assert "no-guidance, neither: left out, there is no guidance to switch off" in said
    assert sorted(path.name for path in Path("runs/two").iterdir() if path.is_dir()) == ["full", "no-reward"]
    sessions = read_sessions(Path("runs/two/full/environment.json"))
    assert [(session["first_step"], session["last_step"]) for session in sessions] == [(0, 1), (1, 2)]


def test_a_complete_run_may_serve_as_the_full_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert controls("output=runs/again", "--full", "runs/all/full", "--only", "full") == 0
    assert capsys.readouterr().out == "full: complete, in runs/all/full\nreport: runs/again/report.html\n"
    said = refusal(capsys, "output=runs/again", "--full", "runs/all/no-reward")
    assert "belongs to another run" in said and "rewards.optimised.scale was 0.0, is 2.0" in said
    assert "may have had another default when the run began: write the old value there" in said
    said = refusal(capsys, "output=runs/again", "training.steps=3", "--full", "runs/all/full")
    assert "--full runs/all/full: it is no complete run, which ended at step 2 of this configuration's 3" in said
    assert said.rstrip().endswith("or say training.steps=2")
    assert [path.name for path in Path("runs/again").iterdir()] == ["report.html"]
    assert Path("runs/again/report.html").read_text() == "runs/all/full"


def test_an_interruption_says_how_to_go_on(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    trained = []

    def stopped(control: Any, resume: str | None) -> Outcome:
        trained.append(control.name)
        return Outcome(1, signal.SIGTERM if control.name == "no-reward" else None)

    monkeypatch.setattr(command, "_train", stopped)
    assert controls("output=runs/a b") == 128 + signal.SIGTERM
    assert trained == ["full", "no-reward"]
    said = capsys.readouterr().out.splitlines()
    assert said[-2] == "stopped after step 1 of no-reward; to go on:"
    expected = ["diffpp-fast", "controls", "align.yaml", *SHORT, "output=runs/a b", "--resume", "latest"]
    assert shlex.split(said[-1]) == expected


def test_refused_before_anything_is_trained(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "_train", lambda *_: pytest.fail("it was trained"))
    said = refusal(capsys, "output=runs/none", "method.guidance_scale=1", "rewards.optimised.scale=0")
    assert "there is nothing to switch off: rewards.optimised.scale is 0 or missing" in said
    said = refusal(capsys, "output=runs/all", "rewards.optimised.scale=3", "--resume", "latest")
    assert "runs/all/full" in said and "belongs to another run" in said
    said = refusal(capsys, "output=runs/none", "--only", "guidance")
    assert "--only guidance: the runs of this configuration are full, no-reward, no-guidance, neither" in said
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        patch.setenv("RANK", "0")
        assert "launch one after the other with --only NAME, of full, no-reward" in refusal(capsys, "output=runs/none")
    monkeypatch.setattr(report, "find_spec", lambda name: None if name == "matplotlib" else report)
    assert "reports need matplotlib" in refusal(capsys, "output=runs/none")
    assert not Path("runs/none").exists()


def test_a_complete_run_without_checkpoints_is_not_trained_over(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = tmp_path / "full"
    (folder / "generator").mkdir(parents=True)
    (folder / "environment.json").write_text(json.dumps({"sessions": [{"last_step": 2}]}))
    said = refusal(capsys, f"output={tmp_path}", "--resume", "latest")
    assert f"{folder} is complete, but without its last checkpoint nothing tells of what" in said


def test_guidance_alone_can_be_switched_off_too() -> None:
    alone = ["method.name=diff_instruct", "rewards.optimised=null"]
    assert [control.name for control in controls_of(load_config("align.yaml", alone))] == ["full", "no-guidance"]
    with pytest.raises(ConfigurationError, match="there is nothing to switch off"):
        controls_of(load_config("align.yaml", [*alone, "method.guidance_scale=1"]))


@pytest.mark.slow
def test_several_processes_train_one_of_them() -> None:
    stages = ["distributed.generator.stage=0", "distributed.fake.stage=0"]
    arguments = ["-m", "diffpp_fast", "controls", "align.yaml", *SHORT, *stages, "output=runs/pair"]
    first, second = processes.run([*arguments, "--only", "no-reward"], 2)
    assert "report: runs/pair/report.html" in first and "report" not in second
    (session,) = read_sessions(Path("runs/pair/no-reward/environment.json"))
    assert (session["processes"], session["last_step"]) == (2, 2)
