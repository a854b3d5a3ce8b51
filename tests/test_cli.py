"""The command line: what it prints, where it writes, and its exit codes."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import yaml
from PIL import Image

from diffpp_fast.cli.main import main


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny run, trained for two steps into runs/demo."""
    with tiny.project(tmp_path_factory.mktemp("project")) as folder:
        assert main(["train", "align.yaml", "output=runs/demo", "training.steps=2"]) == 0
    return folder


@pytest.fixture(autouse=True)
def in_project(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "diffpp_fast", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_importing_the_command_line_is_cheap() -> None:
    code = """
import sys, diffpp_fast.cli.main
drawing = {"jinja2", "matplotlib"}
heavy = {"diffusers", "transformers", "pydantic", "yaml", "PIL", "rich", "tensorboard", *drawing} & sys.modules.keys()
assert not heavy, heavy
import diffpp_fast.report
assert not drawing & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_who_types_bench_is_told_where_measuring_went(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "kernels"]) == 2
    assert "measuring is `python -m benchmarks ...` in a clone" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["sample", "--help"], ["doctor", "--help"]])
def test_help(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 0
    assert "diffpp-fast" in capsys.readouterr().out


def test_the_printed_configuration_runs_alike(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["train", "align.yaml", "--print-config", "training.steps=9"]) == 0
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["training"]["steps"] == 9
    (tmp_path / "copy.yaml").write_text(printed)
    assert main(["train", str(tmp_path / "copy.yaml"), "--print-config"]) == 0
    assert capsys.readouterr().out == printed


def test_pictures(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def draw(name: str, *arguments: str) -> Image.Image:
        assert main(["sample", *arguments, "--out", str(tmp_path / name)]) == 0
        return Image.open(tmp_path / name)

    both = draw("both.png", "a red apple", "a green frog", "--count", "3")
    said = capsys.readouterr().out
    assert "weights: runs/demo/checkpoints/step_000002/generator_ema" in said and str(tmp_path / "both.png") in said
    assert both.size == (3 * 16, 2 * 16)
    # A row does not depend on the other rows, nor on whether the run or its checkpoint is named.
    frog = draw("frog.png", "a green frog", "--count", "3", "--run", "runs/demo/checkpoints/step_000002")
    assert frog.tobytes() == both.crop((0, 16, 48, 32)).tobytes()
    assert draw("again.png", "a green frog", "--count", "3", "--seed", "1").tobytes() != frog.tobytes()


@pytest.mark.parametrize(
    "arguments", [["train", "align.yaml", "--resum"], ["doctor", "now"], [], ["plan", "--network", "nan"]]
)
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    assert "usage: diffpp-fast" in capsys.readouterr().err


def test_what_may_be_left_out_is_not_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train"])
    assert capsys.readouterr().err.endswith("required: CONFIG.yaml\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "nothing.yaml"], "can't read the configuration nothing.yaml"),
        (["train", "align.yaml", "training.stepz=3"], "did you mean training.steps?"),
        (["train", "align.yaml", "output=runs/demo"], "--resume latest"),
        (
            ["sample", "a red apple", "--run", "nowhere"],
            "nowhere is neither a whole checkpoint (no manifest.json) nor a run",
        ),
        (["sample", "a red apple", "--seed", "-1"], "--seed must be in"),
    ],
)
def test_a_users_error_is_a_sentence(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and "Traceback" not in error


def test_an_unwritable_output_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "align.yaml", "output=/proc/nowhere"]) == 2
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("number", "code"), [pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow), (signal.SIGTERM, 143)]
)
def test_a_signal_saves_and_says_how_to_go_on(number: int, code: int) -> None:
    output = f"runs/stopped {code}"
    arguments = ["train", "align.yaml", f"output={output}", "training.steps=1000000", "training.grid_every=1000"]
    process = start(*arguments, "training.checkpoint_every=1000000")
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 3/"):
            break
    process.send_signal(number)
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, err
    assert "finishing this step" in err
    assert f"'output={output}'" in out and out.rstrip().endswith("--resume latest")
    saved = [path.name for path in Path(output, "checkpoints").iterdir()]
    assert len(saved) == 1 and int(saved[0].removeprefix("step_")) >= 3


def test_code_that_ends_the_program_is_no_success(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("diffpp_fast.cli.doctor.run", lambda arguments: sys.exit(0))
    assert main(["doctor"]) == 2
    assert "has ended the program" in capsys.readouterr().err
