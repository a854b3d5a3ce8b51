"""The files that a run's listeners write, and what happens where a package for it is missing."""

from __future__ import annotations

import io
import json
import math
import re
import sys
from pathlib import Path

import pytest
import tiny
import torch
import yaml

from diffpp_fast.training import Config, ConfigurationError, callbacks, load_config
from diffpp_fast.training.callbacks import (
    Callback,
    Environment,
    JsonLines,
    Progress,
    TensorBoard,
    WandB,
    read_records,
    read_sessions,
    standard_callbacks,
)
from diffpp_fast.training.grids import tile, to_bytes
from diffpp_fast.training.layout import cells_of, columns_of

PIXELS = torch.arange(4 * 6 * 3, dtype=torch.uint8).view(4, 6, 3)


@pytest.fixture
def config_of(tmp_path: Path):  # type: ignore[no-untyped-def]
    """A configuration that is only read: none of its networks is there."""
    file = tmp_path / "align.yaml"
    file.write_text(yaml.safe_dump(tiny.settings()))

    def load(*overrides: str) -> Config:
        return load_config(file, [f"output={tmp_path / 'run'}", *overrides])

    return load


def tell(callback: Callback, first: int, last: int) -> None:
    """A run's events from one step to another."""
    callback.on_start(first, 10)
    for step in range(first + 1, last + 1):
        callback.on_step(step)
        callback.on_log(step, {"fake/loss": 0.25 * step, "samples_per_second": 12.34})
    callback.on_grid(last, PIXELS, Path("grid.png"))
    callback.on_warning(last, "fake-diverging", "fake/loss is 9")
    callback.on_end(last)


def test_the_configuration_chooses_the_listeners(config_of) -> None:  # type: ignore[no-untyped-def]
    def kinds(*overrides: str) -> list[type]:
        return [type(callback) for callback in standard_callbacks(config_of(*overrides))]

    assert kinds() == [JsonLines, TensorBoard, Progress]
    assert kinds("logging.tensorboard=false") == [JsonLines, Progress]
    assert kinds("logging.wandb={project: emoji, mode: offline}") == [JsonLines, TensorBoard, WandB, Progress]
    with pytest.raises(ConfigurationError, match=r"logging.wandb.mode should be 'online' or 'offline', got 'never'"):
        config_of("logging.wandb={project: emoji, mode: never}")
    with pytest.raises(ConfigurationError, match=r"logging.wandb.project is missing"):
        config_of("logging.wandb.mode=offline")


def test_packages_that_are_missing_are_named_before_work_begins(config_of, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(callbacks, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"pip install .*\[train\]\", or set logging.tensorboard=false"):
        standard_callbacks(config_of())
    with pytest.raises(ConfigurationError, match=r"pip install .*\[wandb\]\", or set logging.wandb=null"):
        standard_callbacks(config_of("logging.tensorboard=false", "logging.wandb.project=emoji"))


def test_json_lines_hold_logs_and_warnings(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = JsonLines(path)
    lines.on_start(-2, 10)
    lines.on_log(-1, {"fake/loss": 0.5, "fake/gradient_norm": math.nan})
    lines.on_warning(3, "fake-diverging", "fake/loss is 9")
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": -1, "fake/loss": 0.5, "fake/gradient_norm": None},
        {"step": 3, "warning": "fake-diverging", "message": "fake/loss is 9"},
    ]


def test_json_lines_forget_what_a_resume_repeats(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tell(JsonLines(path), 0, 5)
    with path.open("a") as file:
        file.write('[1]\n{"step": 4, "fake/lo')
    assert [record["step"] for record in read_records(path)] == [1, 2, 3, 4, 5, 5]
    tell(JsonLines(path), 3, 4)
    assert [record["step"] for record in read_records(path)] == [1, 2, 3, 4, 4]
    assert read_records(tmp_path / "nowhere.jsonl") == []


def test_the_environment_has_a_session_for_every_part_of_a_run(tmp_path: Path) -> None:
    path = tmp_path / "environment.json"
    assert read_sessions(path) == []
    tell(Environment(path, {"device": "one"}), -2, 4)
    killed = Environment(path, {"device": "another"})
    killed.on_start(3, 10)
    first, second = read_sessions(path)
    assert {"first_step": -2, "last_step": 4, "steps": 10, "device": "one"}.items() <= first.items()
    assert first["began"] <= first["ended"] <= second["began"]
    assert (second["first_step"], second["ended"], second["last_step"]) == (3, None, None)
    # A resume after the kill closes its own session only.
    tell(Environment(path, {}), 3, 10)
    assert [session["last_step"] for session in read_sessions(path)] == [4, None, 10]


def test_an_environment_that_can_not_be_written_at_the_end_hides_no_other_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    environment = Environment(folder / "environment.json", {})
    environment.on_start(0, 10)
    (folder / "environment.json").unlink()
    folder.rmdir()
    environment.on_end(3)
    assert "can't write" in caplog.text
    Environment(folder / "environment.json", {}).on_end(3)  # never started: nothing to say


@pytest.mark.parametrize("text", ["", "{", "[]", '{"sessions": 3}', '{"sessions": [3]}'])
def test_a_damaged_environment_holds_no_session(tmp_path: Path, text: str) -> None:
    (tmp_path / "environment.json").write_text(text)
    assert read_sessions(tmp_path / "environment.json") == []


def test_tensorboard_shows_scalars_grids_and_warnings(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tell(TensorBoard(tmp_path), -2, 2)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("fake/loss")] == [
        (-1, -0.25),
        (0, 0.0),
        (1, 0.25),
        (2, 0.5),
    ]
    image = events.Images("grid")[0]
    assert (image.step, image.height, image.width) == (2, 4, 6)
    (text,) = events.Tensors("warning/fake-diverging/text_summary")
    assert (text.step, text.tensor_proto.string_val[0]) == (2, b"fake/loss is 9")
    assert "grid/prompts/text_summary" not in events.Tags()["tensors"]


def test_tensorboard_shows_the_prompts_of_a_grid_by_their_places(tmp_path: Path) -> None:
    """Once in a session, and again after a resume, which may have changed them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = TensorBoard(tmp_path, ["a red apple", "black | white", "a whale"])
    board.on_start(0, 10)
    for step in (2, 4):
        board.on_grid(step, PIXELS, Path("grid.png"))
    board.on_end(4)
    tell(TensorBoard(tmp_path, ["another"]), 4, 6)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [image.step for image in events.Images("grid")] == [2, 4, 6]
    texts = events.Tensors("grid/prompts/text_summary")
    assert [text.step for text in texts] == [2, 6]
    table = texts[0].tensor_proto.string_val[0].decode().splitlines()
    assert table == ["|  |  |", "| --- | --- |", "| a red apple | black \\| white |", "| a whale |  |"]


def test_a_grids_cells_are_its_pictures() -> None:
    pictures = torch.rand(5, 3, 4, 6) * 2 - 1
    cells = list(cells_of(tile(pictures, columns_of(5)), 5))
    assert len(cells) == 5
    for picture, cell in zip(to_bytes(pictures), cells, strict=True):
        assert torch.equal(cell, picture.permute(1, 2, 0))


def test_weights_and_biases_works_without_a_network(config_of, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    import wandb

    config = config_of("logging.wandb={project: emoji, name: first try, group: sweep, mode: offline}")
    random = torch.get_rng_state()
    try:
        tell(WandB(config.logging.wandb, config), -2, 2)
    finally:
        wandb.teardown()  # as at the end of a process: its service writes all and ends
    assert torch.equal(torch.get_rng_state(), random)
    folder = tmp_path / "run" / "wandb"
    run_id = (folder / "run_id").read_text()
    (log,) = folder.glob(f"offline-run-*-{run_id}/run-{run_id}.wandb")
    content = log.read_bytes()
    for part in (b"emoji", b"first try", b"sweep", b"fake/loss", b"fake-diverging", b"step 2: fake/loss is 9"):
        assert part in content, part
    (image,) = log.parent.glob("files/media/images/*.png")
    assert image.name.startswith("grid")


def test_weights_and_biases_shows_each_picture_with_its_prompt(  # type: ignore[no-untyped-def]
    config_of, tmp_path: Path
) -> None:
    import wandb
    from PIL import Image

    config = config_of("logging.wandb={project: emoji, mode: offline}")
    pictures = torch.rand(3, 3, 8, 8) * 2 - 1
    listener = WandB(config.logging.wandb, config, ["a red apple", "a green frog", "a blue whale"])
    try:
        listener.on_start(0, 10)
        listener.on_grid(2, tile(pictures, columns_of(3)), Path("grid.png"))
        listener.on_end(2)
    finally:
        wandb.teardown()
    (log,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    content = log.read_bytes()
    assert all(prompt in content for prompt in (b"a red apple", b"a green frog", b"a blue whale"))
    shown = sorted(log.parent.glob("files/media/images/grid*.png"))
    expected = {cell.permute(1, 2, 0).numpy().tobytes() for cell in to_bytes(pictures)}
    assert {Image.open(path).convert("RGB").tobytes() for path in shown} == expected and len(shown) == 3


def test_weights_and_biases_goes_on_with_the_folder_s_run_or_says_why_not(  # type: ignore[no-untyped-def]
    config_of, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    def refuse(**arguments: object) -> None:
        begun.append((arguments["id"], arguments["resume"], arguments["dir"]))
        raise wandb.Error("no API key")

    begun: list[tuple[object, ...]] = []
    monkeypatch.setattr(wandb, "init", refuse)
    config = config_of("logging.wandb.project=emoji")
    for _ in range(2):
        listener = WandB(config.logging.wandb, config)
        with pytest.raises(ConfigurationError, match=r"logging.wandb: no API key.*logging.wandb.mode=offline"):
            listener.on_start(0, 10)
        listener.on_end(0)  # a run that fails ends all of its listeners
    kept = (tmp_path / "run" / "wandb" / "run_id").read_text()
    assert begun == [(kept, "allow", str(tmp_path / "run"))] * 2


class Clock:
    """Stands in for the module `time`."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(callbacks, "time", clock)
    return clock


def follow(clock: Clock, steps: int, seconds: float) -> None:
    """Two rounds of warm-up, then steps of so many seconds each."""
    line = Progress()
    line.on_start(-2, 6000)
    for step in range(-1, steps + 1):
        clock.now += seconds if step > 0 else 5.0
        line.on_step(step)
        line.on_log(step, {"fake/loss": 0.123456, "samples_per_second": 12.34})
    line.on_log(steps, {"grid/held_out": -3.5})
    line.on_checkpoint(steps, Path("runs/a [bold] name/step_000002"))
    line.on_end(steps)


def test_progress_elsewhere_than_on_a_terminal_is_plain_lines(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    follow(clock, 2, 2.0)
    assert capsys.readouterr().out.splitlines() == [
        "warming the fake score up, 1 to go  12.3 images/s  fake loss 0.1235",
        "step 0/6000  time left unknown  12.3 images/s  fake loss 0.1235",
        "step 1/6000  3:19:58 left  12.3 images/s  fake loss 0.1235",
        "step 2/6000  3:19:56 left  12.3 images/s  fake loss 0.1235",
        "step 2/6000  3:19:56 left  12.3 images/s  held-out -3.5  fake loss 0.1235",
        "checkpoint: runs/a [bold] name/step_000002",
    ]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_on_a_terminal_is_one_line(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    for name, value in (("COLUMNS", "60"), ("LINES", "20"), ("TERM", "xterm")):
        monkeypatch.setenv(name, value)
    follow(clock, 2, 2.0)
    colourless = re.sub(r"\x1b\[[0-9;]*m", "", terminal.getvalue())
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "\n", colourless)
    lines = [line.rstrip() for line in shown.splitlines() if line.strip()]
    assert "checkpoint: runs/a [bold] name/step_000002" in lines
    assert max(map(len, lines)) <= 60
    last = [line for line in lines if "step 2/6000" in line][-1]
    assert re.match(r"\S{8} step 2/6000  3:19:56 left  12.3 images/s", last) and last.endswith("…")
    assert not [line for line in lines if "step" not in line and "left" in line], "the line was wrapped"
