"""Pictures by address and what is measured of them: the commands `sample` and `evaluate`."""

from __future__ import annotations

import csv
import json
import math
import re
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import official_rewards as official
import pytest
import tiny
import torch
from PIL import Image
from test_rewards_networks import BLIP_STATE, HEAD, STATE

from diffpp_fast import Noise, rewards
from diffpp_fast.cli.main import main
from diffpp_fast.errors import ConfigurationError
from diffpp_fast.evaluation.distances import Distances
from diffpp_fast.evaluation.intervals import difference, estimate, preferred
from diffpp_fast.evaluation.metrics import Scores, parse_metrics
from diffpp_fast.evaluation.models import find_source
from diffpp_fast.evaluation.pictures import draw, read_facts, read_picture
from diffpp_fast.evaluation.prompts import Prompt, read_prompts
from diffpp_fast.rewards import factories
from diffpp_fast.version import __version__

PAGE = Path(__file__).parent.parent / "docs" / "evaluation.md"
CPU = torch.device("cpu")
RED = "rewards.py:redness"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run on a tiny pipeline, runs/demo, and of its exports."""
    folder = tmp_path_factory.mktemp("project")
    tiny.write_base(folder, "stable_diffusion")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["train", "align.yaml", "output=runs/demo", "optimizers.generator.lr=0.05"]) == 0
        assert main(["export", "runs/demo", "--out", "generator"]) == 0
        assert main(["export", "runs/demo", "--out", "pipeline", "--pipeline"]) == 0
    return folder


@pytest.fixture(autouse=True)
def in_project(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)


def evaluate(output: Path, *arguments: str) -> dict[str, Any]:
    """Return the content of `summary.json`."""
    assert main(["evaluate", *arguments, "--output", str(output)]) == 0
    summary: dict[str, Any] = json.loads((output / "summary.json").read_text())
    return summary


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def pixels(path: Path) -> torch.Tensor:
    return read_picture(path).int()


# -- where generators come from ----------------------------------------------------------------------------------------


SOURCES: dict[str, list[str]] = {
    "run": ["runs/demo"],
    "checkpoint": ["runs/demo/checkpoints/step_000001"],
    "exported network, with the run's configuration": ["generator", "--config", "align.yaml"],
    "exported network, with a pipeline": ["generator", "--base", "base"],
    "exported pipeline": ["pipeline"],
}


def test_a_run_and_its_exports_draw_the_same_and_have_the_same_fingerprint(tmp_path: Path) -> None:
    drawn = {}
    for name, (path, *rest) in SOURCES.items():
        folder = tmp_path / name
        assert main(["sample", "--model", path, *rest, "a red apple", "--count", "2", "--images", str(folder)]) == 0
        drawn[name] = [pixels(folder / f"000000_{column}.png") for column in range(2)]
        facts = read_facts(folder / "000000_1.png")
        drawn[name].append(facts["weights"])
    first = drawn.pop("run")
    for name, (one, other, weights) in drawn.items():
        assert (one - first[0]).abs().max() <= 1 and (other - first[1]).abs().max() <= 1, name
        assert weights == first[2], name
    assert (first[0] - first[1]).abs().float().mean() > 1, "the latent does not matter"


def test_other_weights_have_another_fingerprint() -> None:
    before, after = (find_source(Path(path)).load(CPU) for path in ("align.yaml", "runs/demo"))
    assert before.name == "align" and after.name == "demo"
    assert before.fingerprint != after.fingerprint
    assert before.fingerprint == find_source(Path("align.yaml"), name="again").load(CPU).fingerprint


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["generator"], "is a network without text encoder and decoder: name what has them, either --config"),
        (["generator", "--config", "align.yaml", "--base", "base"], "either --config CONFIG.yaml"),
        (["base"], "base has no generator.json, which says at which timestep"),
        (["weights"], "weights is neither a whole checkpoint (no manifest.json) nor a run (no checkpoints/), nor an"),
        (["adapters"], "adapters holds adapters alone: export the run without --no-merge"),
        (["nothing.yaml"], "nothing.yaml is neither"),
    ],
)
def test_a_model_that_is_none_is_named(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], project: Path
) -> None:
    for folder, name in (("weights", "thesis.tex"), ("adapters", "generator.json")):
        (project / folder).mkdir(exist_ok=True)
        (project / folder / name).write_text("{}")
    output = ["--output", "never", "--prompts", "prompts.txt", "--metrics", RED]
    assert main(["evaluate", *arguments, *output]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and not Path("never").exists()


# -- pictures ----------------------------------------------------------------------------------------------------------


def test_a_picture_is_a_function_of_its_address(tmp_path: Path) -> None:
    model = find_source(Path("runs/demo")).load(CPU)
    prompts = list(tiny.PROMPTS)
    together = draw(model, prompts, [7, 8, 9, 10, 11], seed=3)
    alone = torch.cat([draw(model, [prompt], [7 + n], seed=3) for n, prompt in enumerate(prompts)])
    # Convolutions of another batch round otherwise: a level of 255 at most.
    assert (together.int() - alone.int()).abs().max() <= 1
    latents = Noise(3, torch.tensor([9]), stream=0).normal(tiny.LATENT)
    with torch.no_grad():
        image = model.sampler.decoder(model.sampler.generator(latents, model.sampler.encode([prompts[2]])))
    expected = ((image.clamp(-1, 1) + 1) * 127.5).round()
    assert (together[2].float() - expected[0]).abs().max() <= 1
    assert not torch.equal(together, draw(model, prompts, [7, 8, 9, 10, 11], seed=4))


def test_sampled_files_say_what_they_are_and_depend_on_no_batch(tmp_path: Path) -> None:
    arguments = ["sample", "--run", "runs/demo", "--prompts", "prompts.txt", "--count", "3", "--seed", "5"]
    for batch in ("1", "4"):
        assert main([*arguments, "--first-sample", "40", "--batch", batch, "--images", str(tmp_path / batch)]) == 0
    names = sorted(path.name for path in (tmp_path / "1").iterdir())
    assert names == [f"{number:06d}_{column}.png" for number in range(5) for column in range(3)]
    for name in names:
        assert (pixels(tmp_path / "1" / name) - pixels(tmp_path / "4" / name)).abs().max() <= 1
    facts = read_facts(tmp_path / "4" / "000003_2.png")
    assert re.fullmatch(r"sha256:[0-9a-f]{64}", facts.pop("weights"))
    assert facts == {
        "prompt": "a yellow sun",
        "seed": "5",
        "sample": "42",
        "model": "runs/demo/checkpoints/step_000001/generator_ema",
        "timestep": "625",
        "input_scale": "sigma",
        "precision": "float32",
        "Software": f"diffpp-fast {__version__}",
    }


def test_text_beyond_latin_survives_in_a_file(tmp_path: Path) -> None:
    from diffpp_fast.training.grids import write_png

    facts = {"prompt": "ein Käfer, 甲虫 \N{LADY BEETLE}", "seed": "1"}
    picture = torch.arange(5 * 7 * 3, dtype=torch.uint8).view(5, 7, 3)
    write_png(tmp_path / "new" / "one.png", picture, facts)
    assert read_facts(tmp_path / "new" / "one.png") == facts
    assert torch.equal(read_picture(tmp_path / "new" / "one.png"), picture.permute(2, 0, 1))


def test_a_grid_holds_the_pictures_in_rows_and_says_so(tmp_path: Path) -> None:
    grid, folder = tmp_path / "grid.png", tmp_path / "images"
    arguments = ["a red apple", "a green frog", "--count", "3", "--grid", str(grid), "--images", str(folder)]
    assert main(["sample", "--run", "runs/demo", *arguments]) == 0
    whole = pixels(grid)
    for row in range(2):
        for column in range(3):
            cell = whole[:, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
            assert torch.equal(cell, pixels(folder / f"{row:06d}_{column}.png"))
    facts = read_facts(grid)
    assert json.loads(facts["prompts"]) == ["a red apple", "a green frog"] and facts["columns"] == "3"


def test_bfloat16_draws_nearly_the_same(tmp_path: Path) -> None:
    for dtype in ("float32", "bfloat16"):
        arguments = ["sample", "a red apple", "--run", "runs/demo", "--dtype", dtype, "--count", "1"]
        assert main([*arguments, "--images", str(tmp_path / dtype)]) == 0
    one, other = (tmp_path / dtype / "000000_0.png" for dtype in ("float32", "bfloat16"))
    assert read_facts(other)["precision"] == "bfloat16"
    assert 0 < (pixels(one) - pixels(other)).abs().float().mean() < 8


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "Give prompts, or a file of them with --prompts FILE"),
        (["a red apple", "--prompts", "prompts.txt"], "and not both"),
        (["--prompts", "empty.txt"], "empty.txt holds no prompt"),
        (["a red apple", "--first-sample", "-1"], "--first-sample must be in"),
        (["a red apple", "--grid", "folder"], "must be a file that ends in .png"),
        (["a red apple", "--count", "5000"], "a grid of 5000 pictures is too large"),
    ],
)
def test_what_can_not_be_sampled(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("empty.txt").write_text("\n \n")
    assert main(["sample", "--run", "runs/demo", *arguments]) == 2
    assert said in capsys.readouterr().err and not Path("samples.png").exists()


# -- prompts -----------------------------------------------------------------------------------------------------------


def test_the_standard_sets_are_read_by_their_format(tmp_path: Path) -> None:
    for style in ("photo", "anime", "concept-art", "paintings", "drawbench"):
        (tmp_path / f"{style}.json").write_text(json.dumps([f"{style} one", f" {style}\ntwo "]))
    benchmark = read_prompts(str(tmp_path))
    assert [prompt.group for prompt in benchmark] == [
        style for style in ("anime", "concept-art", "paintings", "photo") for _ in range(2)
    ]
    assert benchmark[1] == Prompt("anime two", "anime")
    assert read_prompts(str(tmp_path / "photo.json"), limit=1) == [Prompt("photo one", "photo")]

    parti = tmp_path / "PartiPrompts.tsv"
    parti.write_text('Prompt\tCategory\tChallenge\tNote\nbond\tAbstract\tBasic\t\n"Fly" on a wall\tArts\tComplex\tx\n')
    assert read_prompts(str(parti)) == [Prompt("bond", "Abstract"), Prompt('"Fly" on a wall', "Arts")]

    captions = [(3, 9, "late"), (1, 5, "second"), (1, 4, " first "), (2, 7, "other")]
    entries = [{"image_id": image, "id": number, "caption": text} for image, number, text in captions]
    (tmp_path / "captions.json").write_text(json.dumps({"images": [], "annotations": entries}))
    assert [prompt.text for prompt in read_prompts(str(tmp_path / "captions.json"))] == ["first", "other", "late"]

    table = tmp_path / "table.csv"
    table.write_text("id,caption\n1,a red apple\n2,a green frog\n")
    assert read_prompts(str(table), column="caption", limit=5) == [Prompt("a red apple"), Prompt("a green frog")]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("none.json", "[]", "none.json holds no prompt"),
        ("half.json", '["a",', "half.json, line 1"),
        ("other.json", '{"prompts": ["a"]}', "is neither a list of prompts, as HPSv2's, nor captions"),
        ("blank.json", '["a", " "]', "blank.json: prompt 2 is empty"),
        ("captions.json", '{"annotations": [{"id": 1}]}', "must have image_id, id and caption"),
        ("PartiPrompts.tsv", "Prompt\tCategory\n\tArts\n", "line 2: no prompt and category"),
        ("PartiPrompts.tsv", "Prompt\tCategory\n", "holds no prompt"),
        ("empty.txt", "", "empty.txt holds no prompt"),
    ],
)
def test_prompts_that_can_not_be_read_are_named(tmp_path: Path, name: str, content: str, said: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigurationError, match=re.escape(said)):
        read_prompts(str(tmp_path / name))


# -- intervals ---------------------------------------------------------------------------------------------------------


def test_intervals_are_those_of_the_formula() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, 57)
    found = estimate(values)
    mean = sum(values) / 57
    error = math.sqrt(sum((value - mean) ** 2 for value in values) / 56) / math.sqrt(57)
    assert found.count == 57
    assert found.mean == pytest.approx(mean, rel=1e-12)
    assert found.margin == pytest.approx(1.959963984540054 * error, rel=1e-12)
    assert math.isnan(estimate(np.array([1.0])).margin)


def test_intervals_hold_the_mean_in_95_of_100_cases() -> None:
    draws = np.random.default_rng(1).exponential(1.0, (4000, 100))
    held = [abs((found := estimate(sample)).mean - 1.0) <= found.margin for sample in draws]
    assert 0.925 < np.mean(held) < 0.96  # skewed values: a little below 95 %


def test_a_paired_difference_is_free_of_what_prompts_have_in_common() -> None:
    generator = np.random.default_rng(2)
    difficulty, noise = generator.normal(0, 3, 50), generator.normal(0, 0.1, 50)
    one, other = difficulty, difficulty + 0.5 + noise
    found = difference(other, one)
    assert found.mean == pytest.approx(float((other - one).mean()))
    assert found.margin == pytest.approx(1.959963984540054 * float(np.std(0.5 + noise, ddof=1)) / math.sqrt(50))
    assert found.margin < 0.1 * estimate(one).margin
    assert preferred(np.array([1.0, 2.0, 3.0, 4.0]), np.array([0.0, 2.0, 5.0, 3.0])) == 0.625


# -- scores ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """--set for all scores that are known by name, as small networks in files of the official formats."""
    small = official.clip_architecture(official.SMALL_CLIP, "gelu")
    blip = official.blip_architecture(official.SMALL_BLIP)
    monkeypatch.setattr(factories, "load_open_clip", partial(factories.load_open_clip, architecture=small))
    monkeypatch.setattr(factories, "load_imagereward", partial(factories.load_imagereward, architecture=blip))
    clip = official.write_clip_folder(tmp_path / "clip", STATE)
    torch.save({"state_dict": STATE}, tmp_path / "HPS_v2.1_compressed.pt")
    torch.save(BLIP_STATE, tmp_path / "ImageReward.pt")
    torch.save(HEAD, tmp_path / "aesthetic-model.pth")
    return [
        f"image_reward.path={tmp_path}",
        f"image_reward.tokenizer={official.write_bert_vocabulary(tmp_path)}",
        f"pick_score.path={clip}",
        f"hps_v21.path={tmp_path}",
        f"hps_v21.tokenizer={clip / 'bpe.txt'}",
        f"clip_score.path={clip}",
        f"aesthetic.path={tmp_path}",
        f"aesthetic.clip={clip}",
    ]


KNOWN = {
    "image_reward": "imagereward",
    "pick_score": "pickscore",
    "hps_v21": "hpsv2.1",
    "clip_score": "clip",
    "aesthetic": "aesthetic",
}


def test_scores_are_those_of_the_rewards_for_the_kept_pictures(tmp_path: Path, settings: list[str]) -> None:
    arguments = [part for setting in settings for part in ("--set", setting)]
    metrics = ",".join([*KNOWN, RED])
    shared = ["runs/demo", "--prompts", "prompts.txt", "--metrics", metrics, "--images-per-prompt", "2", *arguments]
    summary = evaluate(tmp_path / "out", *shared, "--batch", "3")
    alone = evaluate(tmp_path / "alone", *shared, "--batch", "1")
    table = rows(tmp_path / "out" / "pictures.csv")
    assert [(row["number"], row["image"]) for row in table] == [(str(n), str(k)) for n in range(5) for k in range(2)]
    assert [int(row["sample"]) for row in table] == [n + k * 2**32 for n in range(5) for k in range(2)]
    assert [row["prompt"] for row in table[::2]] == list(tiny.PROMPTS)

    kept = tmp_path / "out" / "images" / "demo"
    files = [kept / f"{int(row['number']):06d}_{row['image']}.png" for row in table]
    assert [read_facts(file)["sample"] for file in files] == [row["sample"] for row in table]
    images = torch.stack([read_picture(file) for file in files]).float() / 127.5 - 1
    prompts = [row["prompt"] for row in table]
    options: dict[str, dict[str, str]] = {name: {} for name in KNOWN}
    for setting in settings:
        key, _, value = setting.partition("=")
        options[key.partition(".")[0]][key.partition(".")[2]] = value
    for name, kind in KNOWN.items():
        expected = rewards.score(rewards.load(kind, **options[name]), images, prompts)
        found = torch.tensor([float(row[name]) for row in table])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert found.std() > 0
    reds = np.array([float(row["redness"]) for row in table]).reshape(5, 2)
    np.testing.assert_allclose(reds.reshape(-1), images[:, 0].mean((1, 2)).numpy(), rtol=1e-5, atol=1e-6)

    means = rows(tmp_path / "out" / "prompts.csv")
    np.testing.assert_allclose([float(row["redness"]) for row in means], reds.mean(1), rtol=1e-12)
    scores = summary["models"][0]["scores"]
    error = np.std(reds.mean(1), ddof=1) / math.sqrt(5)
    assert scores["redness"]["mean"] == pytest.approx(reds.mean())
    assert scores["redness"]["high"] - scores["redness"]["mean"] == pytest.approx(1.959963984540054 * error)
    for name, found in scores.items():
        # Of another batch a picture may differ by a level, and a score by what that makes.
        assert alone["models"][0]["scores"][name]["mean"] == pytest.approx(found["mean"], rel=2e-3, abs=2e-3), name
    said = summary["metrics"]
    assert "long side to 32, black around" in said["hps_v21"]["preprocessing"]
    assert "short side to 32, centre crop, bicubic with antialiasing" in said["pick_score"]["preprocessing"]
    assert "the scorer's own" in said["redness"]["preprocessing"]


def test_scores_share_a_clip(settings: list[str]) -> None:
    wanted, _ = parse_metrics(["clip_score", "aesthetic"], [s for s in settings if s[:4] in ("clip", "aest")])
    scores = Scores(wanted, CPU)
    assert scores._rewards["clip_score"].clip is scores._rewards["aesthetic"].clip


def test_the_score_of_a_factory_is_its_last_stage_and_files_may_hold_dataclasses(tmp_path: Path) -> None:
    code = """
from __future__ import annotations
from dataclasses import dataclass
from diffpp_fast import rewards

@dataclass
class Level:
    value: float

def shifted(by=1.0):
    level = Level(by)
    return rewards.Normalized(lambda images, prompts: images.mean((1, 2, 3)), mean=-level.value, std=2.0)
"""
    (tmp_path / "mine.py").write_text(code)
    wanted, distances = parse_metrics([f"{tmp_path}/mine.py:shifted"], ["shifted.by=3"])
    assert distances == []
    pictures = torch.full((2, 3, 4, 4), 255, dtype=torch.uint8)
    assert Scores(wanted, CPU)(pictures, ["a", "b"]) == {"shifted": [2.0, 2.0]}


def test_a_score_that_is_not_finite_is_told_and_is_in_no_mean(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    metric = ["--metrics", "rewards.py:undefined_for", "--prompts", "prompts.txt", "--no-images"]
    whole = evaluate(tmp_path / "whole", "runs/demo", *metric, "--set", "undefined_for.word=nothing")
    summary = evaluate(tmp_path / "out", "again=runs/demo", "runs/demo", *metric, "--set", "undefined_for.word=frog")
    values = [float(row["undefined_for"]) for row in rows(tmp_path / "whole" / "prompts.csv")]
    others = [value for value, prompt in zip(values, tiny.PROMPTS, strict=True) if "frog" not in prompt]
    for model in summary["models"]:
        assert model["undefined"] == {"undefined_for": 2}
        found = model["scores"]["undefined_for"]
        assert found["mean"] == pytest.approx(np.mean(others)) and found["prompts"] == 3
        assert found["std"] == pytest.approx(np.std(others, ddof=1))
    assert summary["differences"][0]["scores"]["undefined_for"]["prompts"] == 3
    assert whole["models"][0]["undefined"] == {"undefined_for": 0}
    cells = [row["undefined_for"] for row in rows(tmp_path / "out" / "pictures.csv")][:5]
    assert [cell == "" for cell in cells] == ["frog" in prompt for prompt in tiny.PROMPTS]
    assert "undefined_for is not finite for 2 of 5 pictures, of 2 prompts: 'a green frog', 'a red frog'" in caplog.text
    assert "again: undefined_for is not finite for 2 pictures" in capsys.readouterr().out
    nowhere = ["evaluate", "runs/demo", *metric, "--set", "undefined_for.word=a", "--output", str(tmp_path / "none")]
    assert main(nowhere) == 2
    assert "is not finite for 5 of 5 pictures" in capsys.readouterr().err


def test_a_scorer_that_works_in_place_changes_no_other_score() -> None:
    pictures, prompts = torch.randint(256, (2, 3, 4, 4), dtype=torch.uint8), ["a", "b"]
    names = ["rewards.py:in_place", "rewards.py:redness"]
    both, alone = (Scores(parse_metrics(chosen)[0], CPU)(pictures, prompts) for chosen in (names, names[1:]))
    assert both["redness"] == alone["redness"]


# -- several models ----------------------------------------------------------------------------------------------------


def test_every_model_draws_the_same_prompts_at_the_same_latents(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = ["before=align.yaml", "runs/demo", "again=pipeline"]
    common = ["--prompts", "prompts.txt", "--metrics", RED, "--seed", "9", "--first-sample", "100"]
    summary = evaluate(tmp_path / "out", *models, *common)
    table = rows(tmp_path / "out" / "pictures.csv")
    by_model = {name: [row for row in table if row["model"] == name] for name in ("before", "demo", "again")}
    assert [row["sample"] for row in by_model["before"]] == ["100", "101", "102", "103", "104"]
    for name, of_model in by_model.items():
        for row, first in zip(of_model, by_model["before"], strict=True):
            assert (row["prompt"], row["sample"], row["image"]) == (first["prompt"], first["sample"], first["image"])
        facts = read_facts(tmp_path / "out" / "images" / name / "000004_0.png")
        assert (facts["prompt"], facts["sample"], facts["seed"]) == ("a red frog", "104", "9")

    values = {name: np.array([float(row["redness"]) for row in found]) for name, found in by_model.items()}
    np.testing.assert_allclose(values["again"], values["demo"], atol=2 / 127.5)
    found = {(each["model"], each["minus"]): each["scores"]["redness"] for each in summary["differences"]}
    assert found.keys() == {("demo", "before"), ("again", "before"), ("again", "demo")}
    gap = values["demo"] - values["before"]
    paired = found["demo", "before"]
    assert paired["mean"] == pytest.approx(gap.mean())
    assert paired["high"] - paired["low"] == pytest.approx(2 * 1.959963984540054 * np.std(gap, ddof=1) / math.sqrt(5))
    assert paired["higher"] == np.mean(gap > 0)
    assert [model["name"] for model in summary["models"]] == ["before", "demo", "again"]
    assert summary["models"][1]["weights"] == summary["models"][2]["weights"] != summary["models"][0]["weights"]

    grid = pixels(tmp_path / "out" / "grid.png")
    assert grid.shape == (3, 5 * 16, 3 * 16)
    assert torch.equal(grid[:, 16:32, 16:32], pixels(tmp_path / "out" / "images" / "demo" / "000001_0.png"))
    said = capsys.readouterr().out
    assert "paired difference to before" in said and "redness: what rewards.py:redness gives; higher is better" in said


def test_more_pictures_per_prompt_leave_the_first_as_they_are(tmp_path: Path) -> None:
    common = ["runs/demo", "--prompts", "prompts.txt", "--metrics", RED, "--limit", "3"]
    evaluate(tmp_path / "one", *common, "--no-images")
    evaluate(tmp_path / "three", *common, "--images-per-prompt", "3", "--no-images")
    assert not (tmp_path / "one" / "images").exists()
    one, three = (rows(tmp_path / name / "pictures.csv") for name in ("one", "three"))
    first = [row for row in three if row["image"] == "0"]
    assert [row["sample"] for row in first] == [row["sample"] for row in one]
    for row, other in zip(first, one, strict=True):
        assert float(row["redness"]) == pytest.approx(float(other["redness"]), abs=1 / 127.5)


def test_groups_have_means_of_their_own(tmp_path: Path) -> None:
    parti = tmp_path / "PartiPrompts.tsv"
    parti.write_text("Prompt\tCategory\na red apple\tFood\na blue whale\tAnimals\na green frog\tAnimals\n")
    summary = evaluate(tmp_path / "out", "runs/demo", "--prompts", str(parti), "--metrics", RED, "--no-images")
    table = rows(tmp_path / "out" / "prompts.csv")
    assert [row["group"] for row in table] == ["Food", "Animals", "Animals"]
    groups = summary["models"][0]["groups"]
    animals = [float(row["redness"]) for row in table[1:]]
    assert groups["Animals"]["redness"]["mean"] == pytest.approx(np.mean(animals))
    assert groups["Food"]["redness"] == {"mean": float(table[0]["redness"]), "low": None, "high": None, "std": None,
                                         "prompts": 1}  # fmt: skip


WRITERS: dict[str, list[str]] = {
    "train": ["train", "align.yaml", "output={}"],
    "train --dry-run": ["train", "align.yaml", "--dry-run", "output={}"],
    "controls": ["controls", "align.yaml", "output={}"],
    "embed": ["embed", "align.yaml", "--out", "{}"],
    "report": ["report", "runs/demo", "--output", "{}/page.html"],
    "evaluate": ["evaluate", "runs/demo", "--prompts", "prompts.txt", "--metrics", RED, "--output", "{}"],
    "export": ["export", "runs/demo", "--out", "{}/generator"],
    "sample --images": ["sample", "--run", "runs/demo", "a red apple", "--images", "{}"],
    "sample --grid": ["sample", "--run", "runs/demo", "a red apple", "--grid", "{}/grid.png"],
}


@pytest.mark.parametrize("command", WRITERS)
@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("file", "file is a file: name a"),
        ("file/below", "file is a file: name a"),
        ("circle", "Too many levels of symbolic links: name a"),
        ("circle/below", "Too many levels of symbolic links: name a"),
        ("dangling", "dangling is a link to nothing: name a"),
    ],
)
def test_what_can_be_no_folder_is_named_before_work_begins(
    command: str, place: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    there = sorted(tmp_path.iterdir())
    assert main([part.format(tmp_path / place) for part in WRITERS[command]]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ") and said in printed.err and not printed.out
    assert sorted(tmp_path.iterdir()) == there and (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--run", "runs/demo", "--base", "base"], "--base says nothing of runs/demo"),
        (["--run", "runs/demo", "--config", "align.yaml"], "what can be said is --checkpoint, --override"),
        (["--model", "pipeline", "--base", "base"], "--base says nothing of pipeline: leave it out"),
        (["--model", "pipeline", "--override", "precision=bfloat16"], "--override says nothing of pipeline"),
        (["--model", "generator", "--base", "base", "--checkpoint", "best"], "what can be said is --base"),
        (
            ["--model", "generator", "--base", "base", "--override", "device=cpu"],
            "--override says nothing of generator",
        ),
    ],
)
def test_an_option_that_a_generator_has_no_use_for_is_refused(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sample", *arguments, "a red apple", "--grid", str(tmp_path / "grid.png")]) == 2
    assert said in capsys.readouterr().err
    common = ["--prompts", "prompts.txt", "--metrics", RED, "--output", str(tmp_path / "scores")]
    assert main(["evaluate", arguments[1], *arguments[2:], *common]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("metrics", "arguments", "said"),
    [
        ("hps_v2", [], "there is no metric 'hps_v2': did you mean hps_v21? Known are image_reward, pick_score"),
        ("PickScore", [], "did you mean pick_score?"),
        ("xyz", [], "there is no metric 'xyz'. Known are"),
        ("pick_score", ["--set", "pick_score.path=/nowhere"], "--set METRIC.path=PATH, e.g. --set pick_score.path"),
        ("image_reward", ["--set", "image_reward.path=/nowhere"], "imagereward: no such file or folder: /nowhere"),
        ("pick_score", ["--set", "clip_score.path=x"], "no such score is asked for; there are pick_score"),
        ("pick_score", ["--set", "path=x"], "write METRIC.ARGUMENT=VALUE"),
        (f"{RED},./{RED}", [], "two metrics are called redness"),
        ("nothing.py:redness", [], "no such file: nothing.py"),
        ("rewards.py:blueness", [], "rewards.py has no function blueness; it has"),
        (RED, ["--set", "redness.colour=1"], "metric redness.arguments do not fit redness(channel=0)"),
        ("fid", [], "fid: the pictures to compare with are missing: --reference-images"),
        ("kid", ["--reference-images", "."], "download https://github.com/toshas/torch-fidelity/releases"),
        ("fid", ["--reference-images", ".", "--inception", "none.pth"], "--inception none.pth: no such file"),
        (RED, ["--prompts", "empty.txt"], "empty.txt holds no prompt"),
        (RED, ["--seed", "-1"], "--seed must be in"),
        (RED, ["--output", "runs"], "--output runs holds something already"),
        (RED, ["--output", "align.yaml"], "align.yaml is a file: name a folder"),
    ],
)
def test_a_mistake_is_named_before_work_begins(
    metrics: str, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: "nowhere")
    Path("empty.txt").write_text("")
    common = ["evaluate", "runs/demo", "--prompts", "prompts.txt", "--output", "never", "--metrics", metrics]
    assert main([*common, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and "Traceback" not in error
    assert not Path("never").exists()


def test_a_missing_package_is_named_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchmetrics"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    Image.new("RGB", (4, 3)).save(tmp_path / "one.png")
    with pytest.raises(ConfigurationError, match=r'fid: torchmetrics is not .*: pip install .*\[evaluate\]"'):
        Distances(["fid"], lambda pictures: pictures.float(), tmp_path, batch=1, device=CPU)


def test_two_models_of_one_name_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--prompts", "prompts.txt", "--output", "never", "--metrics", RED]
    assert main(["evaluate", "runs/demo", "demo=pipeline", *common]) == 2
    assert "are both called demo: write NAME=PATH for one of them" in capsys.readouterr().err


# -- the page ----------------------------------------------------------------------------------------------------------


def page_commands() -> list[str]:
    """The commands of the page's bash blocks but those whose title says that they need more."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line]


def test_the_commands_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    commands = page_commands()
    assert len(commands) > 5
    for command in commands:
        program, *arguments = shlex.split(command)
        if program == "diffpp-fast":
            assert main(arguments) == 0, command
        else:
            assert shlex.split(command)[1:3] == ["python", "-c"], command
            exec(arguments[-1], {})


def test_a_picture_of_another_kind_is_read_as_rgb(tmp_path: Path) -> None:
    Image.new("L", (4, 3), 7).save(tmp_path / "grey.png")
    assert torch.equal(read_picture(tmp_path / "grey.png"), torch.full((3, 3, 4), 7, dtype=torch.uint8))
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(ConfigurationError, match=r"can't read the picture .*broken\.png"):
        read_picture(tmp_path / "broken.png")
