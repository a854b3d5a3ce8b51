"""`diffpp-fast report`: what is read of a run's folder, whatever its state, and what the page says of it."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
from base64 import b64decode
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from PIL import Image

from diffpp_fast import report
from diffpp_fast.cli.main import main
from diffpp_fast.errors import ConfigurationError
from diffpp_fast.report import curves, figures, find_runs, make_page, pictures, write_report
from diffpp_fast.report.curves import DIVERGENCE, REWARD, concerns, divergence_panels, reward_panels
from diffpp_fast.report.runs import RunRecord, Scalar, Warned, read_runs
from diffpp_fast.training.grids import tile, write_png
from diffpp_fast.training.layout import columns_of
from diffpp_fast.training.watch import standard_rules

PROMPTS = ["a red apple", "<script>alert('frog')</script>", 'a "blue" whale & $x^2$']
#: Elements that never end.
VOID = {"meta", "img"}


class Page(HTMLParser):
    """The page as a reader's browser takes it: its elements, tables and references."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == [], "elements are not closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.text += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] = f"{self.rows[-1][-1]} {data.strip()}".strip()

    def row(self, scalar: str) -> list[str]:
        """The cells behind a scalar's name."""
        (found,) = (cells[1:] for cells in self.rows if cells[0].endswith(f" {scalar}"))
        return found

    def values(self, name: str) -> list[str]:
        """The values of an attribute, wherever it stands."""
        return [str(given[name]) for _, given in self.elements if name in given]


def record(step: int, **changes: float | None) -> dict[str, Any]:
    """A line of the log."""
    scalars = {
        "fake/loss": 0.25 + 0.001 * step,
        "generator/reward": -2.5 + 0.01 * step,
        "generator/updates_skipped": 0.0,
        "generator/x0_std": 0.98,
        "reference/x0_std": 1.01,
        "samples_per_second": 8.0,
        "time/backward": 1.5,
        "time/decode": 0.5,
        "memory/host_peak": 1.25,
    }
    return {"step": step, **scalars, **{name.replace("__", "/"): value for name, value in changes.items()}}


def session(first: int, last: int | None, steps: int = 4, prompts: list[str] | None = None) -> dict[str, Any]:
    ended = None if last is None else "2026-01-02T04:04:05+00:00"
    return {"began": "2026-01-02T03:04:05+00:00", "ended": ended, "first_step": first, "last_step": last,
            "steps": steps, "processes": 2, "device": "a device", "threads": 3, "commit": "abc1234", "dirty": "yes",
            "diffpp_fast": "0.1.0", "python": "3.11", "platform": "Linux", "cuda": "",
            "packages": {"torch": "2.13.0"}, "grid_prompts": PROMPTS if prompts is None else prompts}  # fmt: skip


def write_run(
    folder: Path,
    lines: list[dict[str, Any]],
    sessions: list[dict[str, Any]] | None = None,
    grids: tuple[int, ...] = (),
    **changes: float,
) -> Path:
    """A run's folder as the trainer leaves it; `changes` are keys of the configuration, with __ for dots."""
    (folder / "grids").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = tiny.settings()
    for key, value in changes.items():
        section, *names = key.split("__")
        inner = settings[section]
        for name in names[:-1]:
            inner = inner[name]
        inner[names[-1]] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    if sessions is not None:
        (folder / "environment.json").write_text(json.dumps({"sessions": sessions}))
    for step in grids:
        write_png(folder / "grids" / f"step_{step:06d}.png", grid(step))
    return folder


def grid(step: int, size: int = 8) -> torch.Tensor:
    """Three pictures, each of one colour."""
    levels = torch.tensor([0.0, 0.2, 0.4]) + step / 100
    return tile(levels.view(3, 1, 1, 1).expand(3, 3, size, size), columns=columns_of(3))


def text_of(*folders: Path) -> str:
    runs = read_runs(folders)
    return make_page(runs, pictures.sheets_of(runs))


def page_of(*folders: Path) -> Page:
    return Page(text_of(*folders))


def drawn_text(panel: curves.Panel, runs: list[RunRecord]) -> str:
    return curves.draw_svg(panel, runs).decode()


def write_whole_run(folder: Path) -> Path:
    """Write a run of four steps."""
    lines = [
        {"step": 0, "grid/reward": -2.4, "grid/held_out": -3.6},
        *(record(step) for step in (1, 2, 3, 4)),
        {"step": 4, "grid/reward": -2.1234567, "grid/held_out": -3.5},
    ]
    return write_run(folder, lines, [session(0, 4)], (0, 2, 4))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_whole_run(tmp_path / "run")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run's folder, and the page on it."""
    folder = write_whole_run(tmp_path_factory.mktemp("whole") / "run")
    return folder, text_of(folder)


def test_the_numbers_are_those_of_the_log(whole: tuple[Path, str]) -> None:
    folder, text = whole
    page = Page(text)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    shown = ["grid/reward", "grid/held_out", "generator/reward", "fake/loss", "generator/x0_std", "reference/x0_std"]
    for scalar in (*shown, "samples_per_second"):
        logged = [line[scalar] for line in records if scalar in line]
        assert page.row(scalar) == [f"{logged[0]:.4g}", f"{logged[-1]:.4g}"], scalar
    assert page.row("grid/reward") == ["-2.4", "-2.123"]
    assert "-2.1234567 at step 4" in page.values("title")
    assert "complete: 4 steps" in page.text and "The watch raised none" in page.text


def drawings(page: Page) -> list[str]:
    """The diagrams of the page."""
    uris = [uri for uri in page.values("src") if uri.startswith("data:image/svg+xml")]
    return [b64decode(uri.partition(",")[2]).decode() for uri in uris]


def test_the_page_needs_nothing_else(whole: tuple[Path, str]) -> None:
    _, text = whole
    page = Page(text)
    names = ("src", "srcset", "href", "xlink:href", "action", "data")
    references = [value for name in names for value in page.values(name)]
    assert references and all(value.startswith(("data:image/", "#")) for value in references)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.elements}
    assert "http:" not in text and "https:" not in text and "@import" not in text and "url(" not in text
    for drawn in drawings(page):
        assert all(target.startswith("#") for target in re.findall(r"url\((.*?)\)", drawn)) and "@import" not in drawn
        assert all(target.startswith("#") for target in re.findall(r'href="(.*?)"', drawn))
    ids = Counter(page.values("id"))
    assert set(ids.values()) == {1}
    assert {value[1:] for value in references if value.startswith("#")} <= set(ids)


def test_where_the_reader_has_dark_pages_lightness_is_inverted(whole: tuple[Path, str]) -> None:
    _, text = whole
    page = Page(text)
    assert len(drawings(page)) == 5
    for drawn in drawings(page):
        assert curves.TEXT in drawn and curves.LINE in drawn and curves.RUNS[0] in drawn
    light, dark = text.partition("</style>")[0].split("@media screen and (prefers-color-scheme: dark)")
    used = set(re.findall(r"var\(--([a-z0-9-]+)\)", text)) - {"picture"}
    assert all(f"--{name}:" in light for name in used)
    # Curves and the chips of runs by the same filter, so that they agree; the bars of phases serve on both.
    assert ".panel img, .run { filter: invert(1) hue-rotate(180deg); }" in dark
    assert all(f"--{name}:" in dark for name in used if not name.startswith(("run", "phase")))
    chips = [given for tag, given in page.elements if "var(--run-" in str(given.get("style"))]
    assert chips and all("run" in str(given["class"]).split() for given in chips)


def test_text_of_others_is_escaped_and_stays_itself(tmp_path: Path) -> None:
    lines = [record(4), {"step": 4, "warning": "odd", "message": "<b>loss</b> & more"}]
    page = page_of(write_run(tmp_path / "a <i>run $", lines, [session(0, 4)], (0, 4)))
    captions = [text for text in PROMPTS if text in page.text]
    assert captions == PROMPTS
    assert "<b>loss</b> & more" in page.text and "a <i>run $" in page.text
    assert f"{PROMPTS[1]} (step 4)" in page.values("alt")
    assert "script" not in {tag for tag, _ in page.elements}
    assert 'a "blue" whale & $x^2$ (step 4)' in page.values("alt")


def test_pictures_are_those_of_the_grids_with_their_prompts(whole: tuple[Path, str]) -> None:
    page = Page(whole[1])
    found = {str(given["alt"]): given["src"] for tag, given in page.elements if tag == "img"}
    images = {name: source for name, source in found.items() if "(step " in name}
    assert list(images) == [f"{prompt} (step {step})" for prompt in PROMPTS for step in (0, 4)]
    for place, prompt in enumerate(PROMPTS):
        picture = Image.open(io.BytesIO(b64decode(str(images[f"{prompt} (step 4)"]).partition(",")[2])))
        level = round((0.2 * place + 0.04 + 1) * 127.5)
        assert picture.size == (8, 8) and picture.getextrema() == ((level, level),) * 3


def test_what_all_runs_began_with_is_shown_once(run: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path / "other", [record(4)], [session(0, 4)], (0, 3))
    (sheet,) = pictures.sheets_of(read_runs([run, other]))
    assert [(column.run, column.step) for column in sheet.columns] == [("", 0), ("run", 4), ("other", 3)]
    write_png(other / "grids" / "step_000000.png", grid(9))
    (sheet,) = pictures.sheets_of(read_runs([run, other]))
    assert [(column.run, column.step) for column in sheet.columns] == [
        ("run", 0), ("other", 0), ("run", 4), ("other", 3)
    ]  # fmt: skip
    another = write_run(tmp_path / "another", [record(4)], [session(0, 4, prompts=["a", "b", "c"])], (0, 3))
    sheets = pictures.sheets_of(read_runs([run, another]))
    assert [sheet.prompts for sheet in sheets] == [tuple(PROMPTS), ("a", "b", "c")]


def test_large_pictures_are_shown_smaller() -> None:
    small, large = Image.new("RGB", (128, 100)), Image.new("RGB", (512, 300))
    kind, data = pictures.compress(small)
    assert kind == "image/png" and Image.open(io.BytesIO(data)).tobytes() == small.tobytes()
    kind, data = pictures.compress(large)
    assert kind == "image/jpeg" and Image.open(io.BytesIO(data)).size == (256, 150)
    assert large.size == (512, 300)


def test_a_grid_that_can_not_be_shown_is_named_and_the_next_one_taken(run: Path) -> None:
    (run / "grids" / "step_000004.png").write_bytes((run / "grids" / "step_000004.png").read_bytes()[:40])
    Image.new("RGB", (7, 5)).save(run / "grids" / "step_000000.png")
    page = page_of(run)
    assert "step_000004.png is left out" in page.text
    assert "step_000000.png is left out: 7 x 5 is no grid of its prompts" in page.text
    assert {text for text in page.values("alt") if "apple" in text} == {"a red apple (step 2)"}


def test_grids_have_the_prompts_of_the_session_that_drew_them(tmp_path: Path) -> None:
    sessions = [session(-3, None, prompts=["old"]), session(2, 6, prompts=["new"])]
    (found,) = read_runs([write_run(tmp_path / "run", [], sessions, (0, 2, 4))])
    assert [picture.prompts for picture in found.grids] == [("old",), ("old",), ("new",)]
    (found,) = read_runs([write_run(tmp_path / "older", [], None, (0,))])
    assert found.grids[0].prompts is None
    assert pictures.sheets_of([found]) == [] and found.notes == ["sample grids without prompts in environment.json: 1"]


@pytest.mark.parametrize(
    ("sessions", "said"),
    [
        ([session(0, 4)], "complete: 4 steps"),
        ([session(0, None), session(2, 3)], "stopped after step 3 of 4"),
        ([session(0, None)], "no end is recorded: it is still going, or was killed; the last log is of step 2 of 4"),
        (None, "no environment.json tells whether it has ended; the last log is of step 2 of 4"),
    ],
)
def test_how_a_run_stands(tmp_path: Path, sessions: list[dict[str, Any]] | None, said: str) -> None:
    page = page_of(write_run(tmp_path / "run", [record(1), record(2)], sessions))
    assert said in page.text


def test_a_damaged_last_line_is_left_out_and_said(run: Path) -> None:
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 5, "fake/loss": 9')
    page = page_of(run)
    assert "the last line of metrics.jsonl is not whole" in page.text
    assert page.row("fake/loss")[-1] == "0.254"


def test_other_damage_is_counted(run: Path) -> None:
    whole = (run / "metrics.jsonl").read_bytes()
    (run / "metrics.jsonl").write_bytes(b"\xff\xfe\x00\n[1]\n" + whole)
    page = page_of(run)
    assert "2 lines of metrics.jsonl are damaged" in page.text
    assert page.row("grid/reward") == ["-2.4", "-2.123"]


def test_one_log_is_enough_and_so_is_none(tmp_path: Path) -> None:
    bare = {"step": 1, "fake/loss": 0.5, "samples_per_second": None}
    page = page_of(write_run(tmp_path / "one", [bare]))
    assert page.row("fake/loss") == ["0.5", "0.5"]
    for said in ("No sample grid can be shown", "No times were logged", "Nothing of this was logged"):
        assert said in page.text
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "metrics.jsonl").write_text("")
    page = page_of(tmp_path / "none")
    assert "nothing is logged yet" in page.text and "config.yaml can't be read" in page.text


def test_values_that_are_not_finite_are_left_out_and_counted(tmp_path: Path) -> None:
    lines = [record(1), record(2, fake__loss=None), record(3)]
    folder = write_run(tmp_path / "run", lines)
    (found,) = read_runs([folder])
    assert found.scalars["fake/loss"] == Scalar([1, 3], [0.251, 0.253], 1)
    assert "Left out: 1 that are not finite." in page_of(folder).text


def test_folders_that_are_no_runs_are_refused(tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    for name, reason in (("empty", "it holds no metrics.jsonl"), ("nowhere", "there is no such folder")):
        assert main(["report", str(tmp_path / name)]) == 2
        assert capsys.readouterr().err.startswith(f"error: {tmp_path / name} is no run: {reason}")
    with pytest.raises(ConfigurationError, match="is given twice"):
        write_report([run, run.parent / "." / "run"], tmp_path / "report.html")
    with pytest.raises(ConfigurationError, match="9 runs are too many for one page: at most 8"):
        write_report([run] * 9, tmp_path / "report.html")
    with pytest.raises(ConfigurationError, match="it is a folder; name a file"):
        write_report([run], tmp_path)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("package", ["matplotlib", "jinja2"])
def test_without_a_package_the_remedy_is_said(run: Path, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "find_spec", lambda name: None if name == package else report)
    with pytest.raises(ConfigurationError, match=rf"reports need {package}: pip install .*\[train\]"):
        write_report([run], run / "report.html")


def test_the_command_line_finds_a_place_for_the_page(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["report", "run"]) == 0
    assert capsys.readouterr().out == "report: run/report.html\n"
    assert {path.name for path in run.glob("report*")} == {
        "report-divergence.png", "report-pictures.png", "report-reward.png", "report.html"
    }  # fmt: skip
    for name in ("full", "neither"):
        write_run(tmp_path / "controls" / name, [])
    assert find_runs(Path("controls")) == [Path("controls/full"), Path("controls/neither")]
    assert main(["report", "controls"]) == 0
    assert [path.name for path in (tmp_path / "controls").glob("report*")] == ["report.html"]
    assert main(["report", "controls/full", "controls"]) == 2
    assert main(["report", "controls/full", "controls/neither"]) == 0
    assert "2 runs side by side" in (tmp_path / "report.html").read_text()
    assert main(["report", "controls/full", "--output", "deep/down/page.html"]) == 0
    assert [path.name for path in (tmp_path / "deep" / "down").iterdir()] == ["page.html"]


def test_runs_are_told_apart_by_as_much_of_their_paths_as_it_takes(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name, []) for name in ("a/run", "b/run", "b/other")]
    assert [run.name for run in read_runs(folders[1:])] == ["run", "other"]
    assert [run.name for run in read_runs(folders)] == ["a/run", "b/run", "b/other"]


def test_runs_side_by_side(run: Path, tmp_path: Path) -> None:
    lines = [record(step, generator__reward=-3.0) for step in (1, 2, 3, 4)]
    other = write_run(tmp_path / "other", lines, [session(0, 4)], rewards__optimised__scale=0.0)
    page = page_of(run, other)
    assert page.row("generator/reward") == ["-2.46", "-3 -0.54"]
    assert page.row("grid/reward") == ["-2.123", "\N{EN DASH}"]
    assert page.row("rewards.optimised.scale") == ["2.0", "0.0"]
    changed = [given for tag, given in page.elements if tag == "tr" and given.get("class") == "changed"]
    assert len(changed) == 1
    assert ["rewards.optimised.scale", "2.0", "0.0"] in page.rows
    assert ["method.name", "diff_instruct_pp"] in page.rows


def test_a_difference_is_judged_by_what_differs_from_log_to_log() -> None:
    generator = torch.Generator().manual_seed(0)
    common, own = torch.randn(2, 200, generator=generator, dtype=torch.float64)

    def of(values: torch.Tensor) -> RunRecord:
        series = Scalar(list(range(len(values))), values.tolist(), 0)
        return RunRecord(Path(), "", {}, [], {"loss": series}, [], [], [])

    found = figures.difference(of(common), of(common + 0.01 * own), "loss")
    assert found is not None and found.noise == pytest.approx(0.01, rel=0.4)
    assert found.value == pytest.approx(0.01 * float(own[-1]))
    shifted = figures.difference(of(common), of(common + 0.01 * own + 0.1), "loss")
    assert shifted is not None and not shifted.is_noise
    assert figures.Difference(0.019, 0.01).is_noise and not figures.Difference(-0.021, 0.01).is_noise
    few = figures.difference(of(common[:9]), of(common[:9]), "loss")
    assert few is not None and few.noise is None and not few.is_noise
    assert figures.difference(of(common), of(common), "other") is None


def test_the_effects_of_reward_and_guidance(tmp_path: Path) -> None:
    rewards = {(2.0, 1.5): 7.0, (0.0, 1.5): 4.0, (2.0, 1.0): 2.5, (0.0, 1.0): 1.0}
    folders = [
        write_run(tmp_path / f"{scale} {guidance}", [{"step": 4, "grid/reward": value}],
                  rewards__optimised__scale=scale, method__guidance_scale=guidance)
        for (scale, guidance), value in rewards.items()
    ]  # fmt: skip
    runs = read_runs(folders)
    assert figures.effects_of(runs) == [
        figures.Effect("the reward's gradient", "grid/reward", 3.0, 1.5),
        figures.Effect("guidance", "grid/reward", 4.5, 3.0),
    ]
    assert figures.effects_of(runs[:3]) == []
    page = page_of(*folders)
    assert ["guidance on grid/reward", "+4.5", "+3", "+1.5"] in page.rows


def test_times_are_means_without_what_is_done_once(tmp_path: Path) -> None:
    lines = [
        record(-2, time__backward=99.0),
        record(0, time__backward=99.0),
        record(2, time__backward=99.0),  # the first of the generator
        record(4, time__backward=1.0, samples_per_second=6.0),
        record(5, time__backward=4.0, time__grid=3.0, time__backward_max=5.0),
        record(7, time__backward=99.0),  # the first after a resume
        record(8, time__backward=1.0, samples_per_second=7.0, memory__host_peak=2.0),
    ]
    (run,) = read_runs([write_run(tmp_path / "run", lines, [session(-4, None), session(6, 8)])])
    budget = figures.budget_of(run)
    assert budget is not None
    assert budget.phases == pytest.approx({"backward": (2 * 1 + 4 + 1) / 4, "grid": 3 / 4, "decode": 0.5})
    assert list(budget.phases) == ["backward", "grid", "decode"]
    assert budget.slowest == pytest.approx({"backward": 5 / 4})
    assert (budget.logs, budget.skipped, budget.speed, budget.memory) == (3, 4, 7.0, {"memory/host_peak": 2.0})
    (run,) = read_runs([write_run(tmp_path / "one", [record(3)])])
    budget = figures.budget_of(run)
    assert budget is not None and (budget.total, budget.logs, budget.skipped) == (2.0, 1, 0)


def test_long_runs_are_drawn_in_groups_and_the_page_says_so(tmp_path: Path) -> None:
    values = [float((7 * step) % 1000) for step in range(1000)]
    curve = curves.thin(Scalar(list(range(1000)), values, 0))
    assert curve.size == 4 and len(curve.steps) == 250
    assert (curve.steps[1], curve.values[1]) == (5.5, sum(values[4:8]) / 4)
    assert (curve.lowest[1], curve.highest[1]) == (min(values[4:8]), max(values[4:8]))
    short = curves.thin(Scalar([1, 2], [3.0, 4.0], 0))
    assert (short.steps, short.values, short.size) == ([1, 2], [3.0, 4.0], 1)
    page = page_of(write_run(tmp_path / "run", [{"step": step, "fake/loss": 1.0 + step % 3} for step in range(301)]))
    assert "Curves of more than 300 logs are drawn in groups" in page.text


def test_warnings_stand_on_the_curves_that_they_judge(tmp_path: Path) -> None:
    warned = {"step": 2, "warning": "fake-diverging", "message": "fake/loss is 9"}
    folder = write_run(tmp_path / "run", [record(1), record(2), warned, record(3)])
    page = page_of(folder)
    assert ["▾1", "2", "fake-diverging", "fake/loss is 9"] in page.rows
    runs = read_runs([folder])
    marked = [panel.title for panel in divergence_panels(runs) if "▾1" in drawn_text(panel, runs)]
    assert marked == ["Loss of the teaching assistant"]
    # Of every rule there is a curve to look at, and an unknown warning is on all.
    panels = [*DIVERGENCE, *REWARD]
    for rule in standard_rules():
        assert any(concerns(panel, Warned(1, rule.name, "")) for panel in panels), rule.name
    assert all(concerns(panel, Warned(1, "unknown", "")) for panel in panels)


def test_axes_are_labelled_and_wide_ranges_logarithmic(tmp_path: Path) -> None:
    lines = [record(step, generator__gradient_norm=10.0**step) for step in (1, 2, 3, 4)]
    lines.append({"step": 4, "generator/reward/a<b": 1.0})
    runs = read_runs([write_run(tmp_path / "run", lines)])
    panels = [*reward_panels(runs), *divergence_panels(runs)]
    drawn = {panel.title: drawn_text(panel, runs) for panel in panels}
    assert all("step (updates of the generator)" in svg for svg in drawn.values())
    assert "norm, logarithmic" in drawn["Gradient of the generator"]
    assert "logarithmic" not in drawn["Loss of the teaching assistant"]
    assert "Part a<b, reward by step" in page_of(runs[0].folder).values("alt")
    assert "Skipped updates" not in drawn


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="there is no chromium")
def test_in_a_browser_the_page_is_no_wider_than_a_phone(run: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path / "a-run-with-a-rather-long-name", [record(4)], [session(0, 4)], (0, 4))
    wider = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    text = text_of(run, other).replace("</body>", f"<script>parent.postMessage({wider}, '*')</script></body>")
    (tmp_path / "page.html").write_text(text, encoding="utf-8")
    (tmp_path / "frame.html").write_text(
        "<script>onmessage = message => document.title = `wider by ${message.data}`</script>"
        '<iframe src="page.html" width="390" height="800" style="border: 0"></iframe>'
    )
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--dump-dom"]
    done = subprocess.run([*command, str(tmp_path / "frame.html")], capture_output=True, text=True, timeout=120)
    assert "<title>wider by 0</title>" in done.stdout
