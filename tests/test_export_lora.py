"""Exports for other programs: a run's LoRA in their formats, one that is extracted, the model card, the hub."""

from __future__ import annotations

import ast
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hub_stand_in
import pytest
import tiny
import torch
import yaml
from safetensors.torch import load_file, save_file
from test_lora_formats import SD15

from diffpp_fast.cli.main import main
from diffpp_fast.networks.low_rank import rank_of
from diffpp_fast.training import CheckpointError, Config, ConfigurationError, Trainer, load_config
from diffpp_fast.training.build import build_sampler
from diffpp_fast.training.checkpoint import read_role
from diffpp_fast.training.export import LoraSource, export_lora, find_weights, load_sampler
from diffpp_fast.training.exported import Exported
from diffpp_fast.training.publish import find_damage

CPU = torch.device("cpu")
PROMPT = "a red apple"
TARGETS = "[to_q, to_out.0, conv1, proj_in, time_emb_proj]"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline with Stable Diffusion's own blocks."""
    changes = SD15 | {"cross_attention_dim": tiny.TEXT_WIDTH}
    return tiny.write_base(tmp_path_factory.mktemp("project"), "stable_diffusion", **changes)


@pytest.fixture(scope="module")
def runs(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Config]:
    """Two that were trained for a step: the whole generator, and adapters."""
    held_out = f"rewards.held_out.factory={base.parent / 'rewards.py'}:Brightness"
    common = ("training.grid_every=1", "training.grid_prompts=2", "training.baseline_steps=null", held_out)
    lora = (f"models.generator.lora={{rank: 3, alpha: 6, targets: {TARGETS}}}", "optimizers.generator.lr=0.1")
    configs = {}
    for name, overrides in (("whole", ("optimizers.generator.lr=0.01",)), ("lora", lora)):
        output = tmp_path_factory.mktemp("runs") / name
        configs[name] = load_config(base, [f"output={output}", *common, *overrides])
        Trainer(configs[name]).run()
    return configs


def export(run: Config | str, out: Path, *options: str) -> Path:
    output = run if isinstance(run, str) else run.output
    assert main(["export", output, "--out", str(out), *options]) == 0
    return out


def one_step(pipeline: Any, z: torch.Tensor) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    latents: torch.Tensor = pipeline(
        PROMPT, num_inference_steps=1, guidance_scale=1.0, latents=z, output_type="latent"
    ).images
    return latents


@pytest.mark.parametrize(
    ("kind", "file"),
    [("diffusers", "pytorch_lora_weights"), ("kohya", "exported"), ("comfyui", "exported")],
)
def test_a_pipeline_with_the_file_draws_what_the_run_does(
    runs: dict[str, Config], base: Path, tmp_path: Path, kind: str, file: str
) -> None:
    from diffusers import DiffusionPipeline, EulerDiscreteScheduler

    out = export(runs["lora"], tmp_path / "exported", "--format", kind)
    assert {path.name for path in out.iterdir()} == {
        f"{file}.safetensors", "scheduler", "scheduler_config.json", "generator.json", "README.md", "manifest.json"
    }  # fmt: skip
    assert find_damage(out) is None
    _, sampler = load_sampler(find_weights(Path(runs["lora"].output)), CPU)
    z = torch.randn(1, *tiny.LATENT)
    with torch.no_grad():
        expected = sampler.generator(z, sampler.encode([PROMPT]))
    scheduler = EulerDiscreteScheduler.from_pretrained(out, subfolder="scheduler")
    pipeline = DiffusionPipeline.from_pretrained(base.parent / "base", scheduler=scheduler)
    before = one_step(pipeline, z)
    pipeline.load_lora_weights(out, weight_name=f"{file}.safetensors")
    torch.testing.assert_close(one_step(pipeline, z), expected, rtol=1e-3, atol=1e-3)
    assert (before - expected).abs().max() > 1e-2, "the adapters do nothing"


def test_a_trained_loras_alpha_is_written_as_it_is(runs: dict[str, Config], tmp_path: Path) -> None:
    tensors = load_file(export(runs["lora"], tmp_path / "out", "--format", "kohya") / "out.safetensors")
    trained = read_role(*find_weights(Path(runs["lora"].output)))
    alphas = {name: tensor for name, tensor in tensors.items() if name.endswith(".alpha")}
    assert 3 * len(alphas) == len(tensors) and {alpha.item() for alpha in alphas.values()} == {6.0}
    for name, tensor in trained.items():
        layer, side = name.removesuffix(".generator.weight").rsplit(".lora_", 1)
        part = {"A": "lora_down", "B": "lora_up"}[side]
        assert torch.equal(tensors[f"lora_unet_{layer.replace('.', '_')}.{part}.weight"], tensor)


def test_an_extraction_of_full_rank_is_the_whole_change_of_linear_layers(
    runs: dict[str, Config], base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Norms and biases are left, and named."""
    begun = load_file(base.parent / "base" / "unet" / "diffusion_pytorch_model.safetensors")
    trained = read_role(*find_weights(Path(runs["whole"].output)))
    most = max(rank_of(tuple(weight.shape)) for weight in begun.values() if weight.dim() > 1)
    out = export(runs["whole"], tmp_path / "out", "--extract-lora", str(most))
    said = capsys.readouterr().out
    tensors = load_file(out / "pytorch_lora_weights.safetensors")
    layers = {name.removeprefix("unet.").partition(".lora_")[0] for name in tensors}
    for layer in layers:
        down, up = (tensors[f"unet.{layer}.lora_{side}.weight"].flatten(1) for side in "AB")
        change = (trained[f"{layer}.weight"] - begun[f"{layer}.weight"]).flatten(1)
        torch.testing.assert_close(up @ down, change, rtol=1e-4, atol=1e-6)
    facts = json.loads((out / "extraction.json").read_text())
    energy = {name: (trained[name] - begun[name]).double().square().sum().item() for name in begun}
    others = {name: value for name, value in energy.items() if name.removesuffix(".weight") not in layers and value}
    assert facts["not_carried"].keys() == others.keys() and "conv_norm_out.bias" in others
    assert sum(facts["not_carried"].values()) == pytest.approx(sum(others.values()) / sum(energy.values()))
    assert facts["kept"] == pytest.approx(1 - sum(facts["not_carried"].values()), abs=1e-6)
    assert f"rank {most} on {len(layers)} layers keeps {facts['kept']:.2%}" in said
    assert f"not carried: {len(others)} tensors" in said
    shares = facts["layers"].values()
    assert sum(share["of_change"] for share in shares) + sum(facts["not_carried"].values()) == pytest.approx(1)
    assert all(share["kept"] == pytest.approx(1, abs=1e-6) for share in shares)


def test_a_low_rank_keeps_less_and_says_so(
    runs: dict[str, Config], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same from the base by its own name; kohya's file leaves out what its scripts don't read, which is lost."""
    monkeypatch.setenv("HOME", str(base.parent))
    kept = {}
    for name, options in {
        "default": (),
        "pipeline": ("--base", str(base.parent / "base")),
        "network": ("--base", "~/base/unet/."),
        "file": ("--base", str(base.parent / "base" / "unet" / "diffusion_pytorch_model.safetensors")),
        "kohya": ("--format", "kohya"),
        "half": ("--dtype", "bfloat16"),
    }.items():
        out = export(runs["whole"], tmp_path / name, "--extract-lora", "2", *options)
        facts = json.loads((out / "extraction.json").read_text())
        kept[name] = facts["kept"]
        assert ("conv_in.weight" in facts["not_carried"]) == (name == "kohya")
        if name == "network":
            card = (out / "README.md").read_text()
            assert facts["base"] == "unet" and "base_model" not in card and "~" not in card
    assert kept["default"] == kept["pipeline"] == kept["network"] == kept["file"] < 0.9
    assert kept["kohya"] < kept["default"] and kept["half"] < kept["default"]
    assert kept["half"] == pytest.approx(kept["default"], rel=1e-3)


def test_a_lora_on_another_base_is_extracted_from_the_merged_weights(
    runs: dict[str, Config], base: Path, tmp_path: Path
) -> None:
    """From the base that it was trained on it comes back, at its rank."""
    out = export(runs["lora"], tmp_path / "out", "--extract-lora", "3", "--base", str(base.parent / "base"))
    facts = json.loads((out / "extraction.json").read_text())
    assert facts["kept"] == pytest.approx(1, abs=1e-5) and not facts["not_carried"] and facts["unchanged_layers"] > 100
    trained = read_role(*find_weights(Path(runs["lora"].output)))
    moved = {name for name, tensor in trained.items() if ".lora_B." in name and tensor.any()}
    assert facts["layers"].keys() == {name.partition(".lora_B.")[0] for name in moved} and len(moved) > 100


@pytest.fixture(scope="module")
def others(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network that is not the runs', and copies of theirs: damaged, quantised, far away."""
    folder = tmp_path_factory.mktemp("others")
    small: Any = tiny.unet()
    small.save_pretrained(folder / "small")
    unet = base.parent / "base" / "unet"
    shutil.copytree(unet, folder / "lacking")
    tensors = load_file(unet / "diffusion_pytorch_model.safetensors")
    first = tensors.pop("conv_in.weight")
    save_file(tensors, folder / "lacking" / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    for name, changed in {
        "nan": first.index_fill(1, torch.tensor(0), torch.nan),
        "infinite": first.index_fill(1, torch.tensor(0), torch.inf),
        "quantised": first.to(torch.int8),
        "far": first + 1e38,
    }.items():
        shutil.copytree(unet, folder / name)
        every = {**tensors, "conv_in.weight": changed}
        save_file(every, folder / name / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    (folder / "empty").mkdir()
    return folder


@pytest.mark.parametrize(
    ("run", "options", "said"),
    [
        ("whole", "--format kohya", "of LoRA files, and the run trained all weights of its generator: add --extract-"),
        ("whole", "--format diffusers", "add --extract-lora RANK, or leave --format out for the network"),
        ("whole", "--no-merge", "--extract-lora RANK makes a LoRA of them"),
        ("lora", "--format kohya --merge", "--merge writes whole weights, and --format a LoRA alone"),
        ("lora", "--format comfyui --pipeline", "--pipeline writes whole weights, and --format a LoRA alone"),
        ("whole", "--extract-lora 4 --pipeline", "--pipeline writes whole weights, and --extract-lora a LoRA alone"),
        ("lora", "--extract-lora 4", "the run trained adapters, which --format writes as they are"),
        ("whole", "--extract-lora 1000", "--extract-lora 1000: no layer has a rank above 32"),
        ("whole", "--base x", "--base says what --extract-lora RANK subtracts"),
        ("whole", "--extract-lora 2 --base OTHERS/small", "it is another network than the generator"),
        ("whole", "--extract-lora 2 --base OTHERS/lacking", "conv_in.weight"),
        ("whole", "--extract-lora 2 --base OTHERS/nan", "conv_in.weight of nan holds values that are NaN or infinite"),
        ("whole", "--extract-lora 2 --base OTHERS/infinite --format kohya", "conv_in.weight of infinite holds values"),
        ("whole", "--extract-lora 2 --base OTHERS/quantised", "conv_in.weight of quantised is int8: quantised"),
        ("whole", "--extract-lora 2 --base OTHERS/far --dtype float16", "not hold in float16: use --dtype bfloat16"),
        ("whole", "--extract-lora 2 --base OTHERS/empty", "holds no config.json"),
        ("whole", "--extract-lora 2 --base OTHERS/nowhere", "no such folder"),
        ("whole", "--evaluation OTHERS", "holds no summary.json of `diffpp-fast evaluate`"),
        ("whole", "--license-link https://x", "name it with --license, too"),
        ("whole", "--license Mine", "give --license-link URL, too"),
        ("whole", "--license other", "name the licence"),
        ("whole", "--license Mine --license-link javascript:alert(1)", "an address begins with https:// or http://"),
        ("whole", "--license Mi\vne --license-link https://x", "a licence's name is a line of text"),
        ("whole", "--public", "--public says something of --push"),
        ("whole", "--push emoji", "--push emoji: a repository's name is OWNER/NAME"),
        ("whole", "--push a/b/c", "a repository's name is OWNER/NAME"),
        ("whole", "--push anna/.git", "in letters, digits"),
        ("whole", "--push anna/a--b", "none of them twice in a row"),
    ],
)
def test_what_is_refused_before_work(
    runs: dict[str, Config],
    others: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    run: str,
    options: str,
    said: str,
) -> None:
    monkeypatch.setattr("diffpp_fast.training.export.publish", None)
    arguments = [word.replace("OTHERS", str(others)) for word in options.split(" ")]
    assert main(["export", runs[run].output, "--out", str(tmp_path / "out"), *arguments]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_an_unknown_format_is_refused(runs: dict[str, Config], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["export", runs["lora"].output, "--out", "out", "--format", "a1111"])
    assert "argument --format: invalid choice: 'a1111'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("family", "targets", "said"),
    [
        ("pixart", "[to_q]", "kohya's sd-scripts read LoRA files of .*, and not of a PixArtTransformer2DModel"),
        ("stable_diffusion", "[to_q, conv_in]", "conv_in have adapters that kohya's sd-scripts do not read"),
    ],
)
def test_formats_that_can_not_hold_a_networks_adapters(
    base: Path, tmp_path: Path, family: str, targets: str, said: str
) -> None:
    path = tiny.write_base(tmp_path, family) if family == "pixart" else base
    config = load_config(path, [f"models.generator.lora={{rank: 2, targets: {targets}}}"])
    trained = build_sampler(config, CPU).trained
    exported = Exported(config, trained)
    with pytest.raises(ConfigurationError, match=f"--format kohya: {said}.*: use the format comfyui or diffusers"):
        LoraSource(exported, "kohya")
    for kind in ("comfyui", "diffusers"):
        export_lora(tmp_path / kind, config, trained, LoraSource(exported, kind))
    if family == "pixart":
        assert (tmp_path / "diffusers" / "adapter_config.json").is_file()
        assert "from peft import PeftModel" in (tmp_path / "diffusers" / "README.md").read_text()
        names = load_file(tmp_path / "comfyui" / "comfyui.safetensors")
        assert "transformer.transformer_blocks.0.attn1.to_q.alpha" in names


def test_what_alpha_takes_beyond_a_precision_is_refused(runs: dict[str, Config], tmp_path: Path) -> None:
    """diffusers' files have alpha / rank, here 2, in B."""
    trained = build_sampler(runs["lora"], CPU).trained
    with torch.no_grad():
        next(weight for name, weight in trained.parameters.items() if ".lora_B." in name).fill_(4e4)
    exported = Exported(runs["lora"], trained)
    half: Any = {"dtype": torch.float16}
    with pytest.raises(CheckpointError, match=r"holds values up to 8e\+04, and float16 ends at 6\.55e\+04"):
        export_lora(tmp_path / "out", runs["lora"], trained, LoraSource(exported, "diffusers"), **half)
    export_lora(tmp_path / "out", runs["lora"], trained, LoraSource(exported, "kohya"), **half)


def test_nothing_to_extract(runs: dict[str, Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, own = runs["whole"].output, str(Path(runs["whole"].output) / "generator")
    assert main(["export", run, "--out", str(tmp_path / "out"), "--extract-lora", "2", "--base", own]) == 2
    assert "they are the same network" in capsys.readouterr().err and not (tmp_path / "out").exists()


# The model card.


def card_of(out: Path) -> tuple[dict[str, Any], str]:
    """The metadata, as the hub's own reader has them, and the text."""
    from huggingface_hub import ModelCard

    card = ModelCard.load(out / "README.md", ignore_metadata_errors=False)
    return card.data.to_dict(), card.text


def test_every_export_has_a_card_with_what_the_run_knows(runs: dict[str, Config], base: Path, tmp_path: Path) -> None:
    out = export(runs["whole"], tmp_path / "pipeline", "--pipeline")
    data, text = card_of(out)
    assert data == {
        "library_name": "diffusers",
        "license": "unknown",
        "pipeline_tag": "text-to-image",
        "tags": ["one-step", "diffpp_fast", "diff-instruct-pp"],
    }
    for said in (
        "# whole\n",
        "Diff-Instruct++ (`diff_instruct_pp`), guidance scale 1.5",
        "| data | 5 prompts of `prompts.txt`, no pictures; digest of their text: ",
        "`rewards.py:redness`, scale 2 |",
        "| seed | 7 |",
        "| updates of the generator | 1 |",
        "moving average",
        "a folder of the author's, `base/unet`; its origin is unknown",
        "Unknown: nobody has named one.",
        "held-out reward, mean over the run's sample grid",
        "timestep 625",
    ):
        assert said in text, said
    whole = (out / "README.md").read_text()
    assert str(base.parent) not in whole and str(Path(runs["whole"].output).parent) not in whole
    assert (Path(runs["whole"].output) / "generator" / "README.md").is_file()


def test_the_code_of_a_card_draws_a_picture(runs: dict[str, Config], base: Path, tmp_path: Path) -> None:
    for run, options in (
        ("whole", ("--pipeline",)),
        ("whole", ()),
        ("lora", ("--format", "diffusers")),
        ("lora", ("--format", "kohya")),
        ("whole", ("--extract-lora", "2", "--format", "comfyui")),
    ):
        out = export(runs[run], tmp_path / f"{run}{len(options)}{options[-1:]}", *options)
        (code,) = [part for part in card_of(out)[1].split("```") if part.startswith("python\n")]
        assert "a change of" not in code
        code = code.removeprefix("python\n").replace('"BASE"', repr(str(base.parent / "base")))
        scope: dict[str, Any] = {"FOLDER": str(out), "PROMPT": PROMPT}
        exec(code, scope)
        assert scope["image"].size == (16, 16), options


def test_a_card_names_the_weights_that_a_lora_is_a_change_of(
    runs: dict[str, Config], base: Path, tmp_path: Path
) -> None:
    """A pipeline's own network is no place for a LoRA that was trained on a released generator."""
    shutil.copy(base.parent / "base" / "unet" / "diffusion_pytorch_model.safetensors", tmp_path / "one.safetensors")
    moved = ("--override", f"models.generator.path={tmp_path / 'one.safetensors'}")
    text = card_of(export(runs["lora"], tmp_path / "out", "--format", "kohya", *moved))[1]
    assert "a change of a file of the author's, `one.safetensors`: load that into the pipeline first" in text
    assert "# first load what the LoRA is a change of into pipeline.unet\n" in text


def test_a_card_quotes_whatever_names_hold(runs: dict[str, Config], tmp_path: Path) -> None:
    """Markup, HTML and quotation marks in names stay what they are, and the card's code stays code."""
    out, name = tmp_path / """a"b'`c`""", "[x](y) <b> | `z` \\ # *v*"
    link = "https://example.org/l_(2)?a=b"
    data, text = card_of(export(runs["lora"], out, "--format", "kohya", "--license", name, "--license-link", link))
    assert (data["license_name"], data["license_link"]) == (name, link)
    escaped = r"\[x\](y) \<b\> \| \`z\` \\ \# \*v\*"
    assert f"[{escaped}](https://example.org/l_%282%29?a=b), as the person" in text
    assert f"``{out.name}.safetensors`` is for kohya's" in text
    (code,) = [part for part in text.split("```") if part.startswith("python\n")]
    (call,) = [node for node in ast.walk(ast.parse(code.removeprefix("python\n"))) if isinstance(node, ast.keyword)
               and node.arg == "weight_name"]  # fmt: skip
    assert ast.literal_eval(call.value) == f"{out.name}.safetensors"


def test_licences_and_a_base_on_the_hub_are_metadata(
    runs: dict[str, Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = ("--license", "My licence", "--license-link", "https://example.org/licence")
    data, text = card_of(export(runs["whole"], tmp_path / "own", *own))
    assert (data["license"], data["license_name"], data["license_link"]) == ("other", own[1], own[3])
    assert "[My licence](https://example.org/licence), as the person who exported it says." in text
    data, text = card_of(export(runs["lora"], tmp_path / "known", "--format", "comfyui", "--license", "openrail++"))
    assert data["license"] == "openrail++" and "lora" in data["tags"]
    assert "`known.safetensors` in its folder `models/loras`" in text

    from diffpp_fast.networks.lora_formats import LoraTarget
    from diffpp_fast.training.model_card import NOTHING_SAID, write_card

    models = runs["lora"].models
    there = models.model_copy(update={"reference": models.reference.model_copy(update={"path": "anna/sd/unet"})})
    there = there.model_copy(update={"generator": there.generator.model_copy(update={"path": None}), "base": "anna/sd"})
    target = LoraTarget.of(tiny.unet())
    write_card(
        tmp_path, runs["lora"].model_copy(update={"models": there}), None, "lora", NOTHING_SAID, target=target,
        scheduler="DDIMScheduler", kind="diffusers", file="pytorch_lora_weights.safetensors",
    )  # fmt: skip
    data, text = card_of(tmp_path)
    assert (data["base_model"], data["base_model_relation"]) == ("anna/sd", "adapter")
    assert 'DiffusionPipeline.from_pretrained("anna/sd")' in text and "| updates of the generator | unknown |" in text
    assert "Unknown: neither the run nor an evaluation has measured any." in text


def test_figures_of_an_evaluation_are_in_text_and_metadata(
    runs: dict[str, Config], base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, scores = runs["whole"].output, tmp_path / "scores"
    prompts = str(base.parent / "prompts.txt")
    metric = f"{base.parent / 'rewards.py'}:redness"
    command = ["evaluate", run, "--prompts", prompts, "--metrics", metric, "--output", str(scores)]
    assert main(command) == 0
    mean = json.loads((scores / "summary.json").read_text())["models"][0]["scores"]
    ((name, score),) = mean.items()
    _, text = card_of(export(runs["whole"], tmp_path / "out", "--evaluation", str(scores)))
    (result,) = yaml.safe_load((tmp_path / "out" / "README.md").read_text().split("---")[1])["model-index"][0][
        "results"
    ]
    assert result["dataset"]["name"] == "prompts.txt" and result["metrics"][0]["value"] == score["mean"]
    assert f"| {name} | {score['mean']:.4g} [" in text and "5 prompts of `prompts.txt`" in text
    assert str(base.parent) not in (tmp_path / "out" / "README.md").read_text()
    assert main(["export", run, "--raw", "--out", str(tmp_path / "raw"), "--evaluation", str(scores)]) == 2
    assert "evaluate that one, or leave the option out" in capsys.readouterr().err
    summary = json.loads((scores / "summary.json").read_text())
    for damaged in ("[" * 100_000, *(json.dumps({**summary, key: None}) for key in ("prompts", "metrics", "models"))):
        (scores / "summary.json").write_text(damaged)
        assert main(["export", run, "--out", str(tmp_path / "damaged"), "--evaluation", str(scores)]) == 2
        assert "it holds no summary.json of `diffpp-fast evaluate`" in capsys.readouterr().err
    summary["models"][0]["scores"][name].pop("low")
    (scores / "summary.json").write_text(json.dumps(summary))
    assert main(["export", run, "--out", str(tmp_path / "damaged"), "--evaluation", str(scores)]) == 2


def test_a_card_that_was_edited_is_not_replaced(
    runs: dict[str, Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = export(runs["whole"], tmp_path / "out")
    with (out / "README.md").open("a") as file:
        file.write("Words of my own.\n")
    assert main(["export", runs["whole"].output, "--out", str(out)]) == 2
    assert "holds README.md, which no export has written" in capsys.readouterr().err
    (out / "README.md").unlink()
    export(runs["whole"], out)


# The hub.


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[hub_stand_in.Hub]:
    from huggingface_hub import constants

    with hub_stand_in.hub() as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # its servers are others
        monkeypatch.setenv("HF_TOKEN", hub_stand_in.TOKEN)
        yield served


def test_an_export_is_pushed_as_it_is(
    runs: dict[str, Config], tmp_path: Path, hub: hub_stand_in.Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    out = export(runs["lora"], tmp_path / "out", "--format", "kohya", "--push", "anna/emoji")
    assert hub.repositories["anna/emoji"]["visibility"] == "private"
    assert hub.files == {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert set(hub.cards) == {(out / "README.md").read_text()} and "# emoji\n" in hub.cards[0]
    assert f"pushed: {hub.endpoint}/anna/emoji" in capsys.readouterr().out
    export(runs["lora"], tmp_path / "public", "--push", "anna/emoji", "--public")
    assert hub.repositories["anna/emoji"]["visibility"] == "public"


def test_a_hub_that_does_not_take_it_is_named_before_work(
    runs: dict[str, Config],
    tmp_path: Path,
    hub: hub_stand_in.Hub,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from huggingface_hub import constants

    def refused() -> str:
        made = [*hub.repositories]
        command = ["export", runs["whole"].output, "--out", str(tmp_path / "out"), "--push", "anna/emoji"]
        with monkeypatch.context() as patch:
            patch.setattr("diffpp_fast.training.export.publish", None)
            assert main(command) == 2
        assert not (tmp_path / "out").exists() and not hub.files and [*hub.repositories] == made
        return capsys.readouterr().err

    hub.refuse, hub.repositories["anna/emoji"] = 403, {}
    assert "--push anna/emoji: the hub refuses: the token may not write there (HTTP 403)" in refused()
    hub.role = "read"
    assert "the token of anna may only read: log in with one that may write" in refused()
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "the hub refuses: the token is not valid (HTTP 401)" in refused()
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    assert "nobody has logged in to the hub here: run `hf auth login`, or set HF_TOKEN" in refused()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refused()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", hub_stand_in.TOKEN)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    said = refused()
    assert "http://127.0.0.1:9 can't be reached" in said and "hf upload anna/emoji FOLDER ." in said


def test_a_repository_is_made_for_a_whole_export(
    runs: dict[str, Config],
    tmp_path: Path,
    hub: hub_stand_in.Hub,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where its owner may have none the export stays; for weights that turn out to be NaN none is made."""
    out = tmp_path / "out"
    command = ["export", runs["whole"].output, "--out", str(out), "--push", "anna/emoji"]
    hub.refuse = 403
    assert main(command) == 2
    said = capsys.readouterr().err
    assert "the token may not write there (HTTP 403)" in said and "hf upload anna/emoji" in said
    assert find_damage(out) is None
    hub.refuse = None
    monkeypatch.setattr("diffpp_fast.training.exported.first_not_finite", lambda tensors: next(iter(tensors)))
    assert main(command) == 2
    assert "NaN or infinite" in capsys.readouterr().err
    assert not hub.repositories and not hub.files


def test_an_upload_that_fails_leaves_the_export(
    runs: dict[str, Config],
    tmp_path: Path,
    hub: hub_stand_in.Hub,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hub, "_commit", lambda lines: 1 / 0)
    out = tmp_path / "an export"
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    assert main(["export", runs["whole"].output, "--out", str(out), "--push", "anna/emoji"]) == 2
    said = capsys.readouterr().err
    assert f"The export is whole in {out}; to push it later: hf upload anna/emoji '{out}' ." in said
    assert find_damage(out) is None
