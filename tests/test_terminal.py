"""Text from files on a terminal and in spreadsheets: shown, never obeyed."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import pytest
import tiny
from rich.console import Console

from diffpp_fast import spreadsheet, terminal
from diffpp_fast.cli import quiet
from diffpp_fast.cli.main import main
from diffpp_fast.evaluation.tables import print_summary
from diffpp_fast.networks.lora import Adapters

HOSTILE = "a\x1b[31mred\x07\r\u202egnp\u2066\x9b1m [red]apple[/] [/nothing]"


def test_what_a_terminal_would_obey_is_written_out() -> None:
    shown = terminal.printable(HOSTILE)
    assert shown == r"a\x1b[31mred\x07\r\u202egnp\u2066\x9b1m [red]apple[/] [/nothing]"
    assert terminal.printable("夜\tein\nÄpfel 🍎") == "夜\tein\nÄpfel 🍎"


def test_errors_and_logs_go_through_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "no\x1b[31mthing.yaml"]) == 2
    logger = logging.Logger("hostile")
    logger.addHandler(quiet.Stderr())
    logger.warning("prompt %s", HOSTILE)
    logger.warning("prompt %s", HOSTILE)  # said once
    error = capsys.readouterr().err
    assert "\x1b" not in error and "\u202e" not in error and r"no\x1b[31mthing.yaml" in error
    assert error.count("prompt a") == 1


def test_what_holds_for_every_network_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    """Three networks of one kind take two sentences each."""
    logger = logging.Logger("networks")
    logger.addHandler(quiet.Stderr())
    for _ in range(3):
        logger.info("2 blocks are fused")
        logger.info("1 is left")
        logger.warning("this step was skipped")
    error = capsys.readouterr().err
    assert (error.count("fused"), error.count("left"), error.count("skipped")) == (1, 1, 3)


def test_two_adapters_on_one_network_are_no_news(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.warnoptions", [])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        quiet.silence_libraries()
        adapters = Adapters(tiny.unet())
        for name in ("generator", "fake"):
            adapters.add(name, rank=2, alpha=2, targets=["to_q"], seed=0, stream=0)


def test_a_plan_of_a_folder_with_markup_in_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny.write(tmp_path / "[red]a[/]\x1b[1m")
    assert main(["plan", str(config), "rewards.held_out.factory=[/b].py:make"]) == 0
    printed = capsys.readouterr().out
    assert "[red]a[/]\\x1b[1m" in printed and "\x1b" not in printed and "[/b].py:make" in printed


def test_a_summary_with_markup_in_its_names(capsys: pytest.CaptureFixture[str]) -> None:
    found = {"mean": 1.0, "high": None, "prompts": 1}
    model = {
        "name": HOSTILE,
        "scores": {"[b]": found},
        "distances": {},
        "undefined": {"[b]": 1},
        "groups": {HOSTILE: {"[b]": found}},
    }
    facts = {"meaning": "[/]", "better": "higher", "preprocessing": HOSTILE}
    summary = {
        "models": [model],
        "metrics": {"[b]": facts},
        "prompts": {"count": 1},
        "images_per_prompt": 1,
        "differences": [],
    }
    print_summary(summary, Console(width=200, soft_wrap=True, highlight=False, markup=False))
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and "[red]apple[/] [/nothing]" in printed


@pytest.mark.parametrize("text", ["=1+1", "+cmd", "-x", "@SUM(A1)", "\tx", "\rx", "\uff1d1"])
def test_a_formula_is_text_in_every_table(tmp_path: Path, text: str) -> None:
    assert spreadsheet.cell(text) == f"'{text}"
    assert [spreadsheet.cell(value) for value in ("-1.5e-3", "+3", -2, "a=b", "")] == ["-1.5e-3", "+3", -2, "a=b", ""]
    root = Path(terminal.__file__).parent.parent
    sources = [*(root / "diffpp_fast").rglob("*.py"), *(root / "benchmarks").rglob("*.py")]
    codes = {file.relative_to(root).as_posix(): file.read_text() for file in sources}
    writers = {name: code for name, code in codes.items() if "csv.writer(" in code or "DictWriter(" in code}
    assert set(writers) == {"diffpp_fast/evaluation/tables.py", "benchmarks/tables.py", "benchmarks/full_size.py"}
    assert all("spreadsheet import cell" in code for code in writers.values())
