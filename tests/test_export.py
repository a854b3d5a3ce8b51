"""Exports: what comes back is what was trained, to diffusers' own pipelines as to the package."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from diffpp_fast import Noise
from diffpp_fast.cli.main import main
from diffpp_fast.networks import OneStepGenerator, load_denoiser, load_schedule
from diffpp_fast.training import CheckpointError, Config, ConfigurationError, Trainer, load_config
from diffpp_fast.training.build import Sampler, build_sampler
from diffpp_fast.training.checkpoint import read_role, read_tensors
from diffpp_fast.training.export import export_generator, export_pipeline, find_weights
from diffpp_fast.training.exported import Exported
from diffpp_fast.training.state import read_record

CPU = torch.device("cpu")
PROMPT = "a red apple"


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    cases: dict[str, tuple[str, dict[str, Any]]] = {
        "stable_diffusion": ("stable_diffusion", {}),
        "stable_diffusion_v": ("stable_diffusion", {"prediction_type": "v_prediction"}),
        "stable_diffusion_xl": ("stable_diffusion_xl", {}),
        "pixart": ("pixart", {}),
    }
    return {
        name: tiny.write_base(tmp_path_factory.mktemp(name), family, **changes)
        for name, (family, changes) in cases.items()
    }


@pytest.fixture(scope="module")
def runs(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Config]:
    """Two that were trained for a step: the whole generator, and adapters for both roles."""
    lora = ("models.generator.lora={rank: 3, alpha: 6}", "models.fake.lora.rank=2", "optimizers.generator.lr=0.1")
    configs = {}
    for name, overrides in (("whole", ()), ("lora", lora)):
        output = tmp_path_factory.mktemp("runs") / name
        configs[name] = load_config(bases["stable_diffusion"], [f"output={output}", *overrides])
        Trainer(configs[name]).run()
    return configs


def sampler_of(config: Config) -> Sampler:
    """One with weights of its own, so that it is not the pipeline's network by chance."""
    sampler = build_sampler(config, CPU)
    with torch.no_grad():
        for weight in sampler.trained.parameters.values():
            weight.add_(0.02 * torch.randn_like(weight))
    return sampler


def one_step(pipeline: Any, z: torch.Tensor, **arguments: Any) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    extra = {} if not hasattr(pipeline, "transformer") else {"use_resolution_binning": False, "clean_caption": False}
    latents: torch.Tensor = pipeline(
        PROMPT, num_inference_steps=1, guidance_scale=1.0, latents=z, output_type="latent", **extra, **arguments
    ).images
    return latents


@pytest.mark.parametrize(
    ("case", "timestep", "input_scale"),
    [
        ("stable_diffusion", 625, "sigma"),
        ("stable_diffusion", 399, 1.0),
        ("stable_diffusion_v", 625, "sigma"),
        ("stable_diffusion_v", 999, 1.0),
        ("stable_diffusion_xl", 399, 1.0),
        ("stable_diffusion_xl", 625, "sigma"),
        ("pixart", 400, 1.0),
        ("pixart", 440, "sigma"),
    ],
)
def test_diffusers_makes_the_same_step(
    bases: dict[str, Path], tmp_path: Path, case: str, timestep: int, input_scale: float | str
) -> None:
    from diffusers import DiffusionPipeline

    call = f"models.generator={{timestep: {timestep}, input_scale: {input_scale}}}"
    config = load_config(bases[case], [call])
    sampler = sampler_of(config)
    export_pipeline(tmp_path / "pipeline", config, sampler.trained)
    z = torch.randn(1, *tiny.LATENT)
    with torch.no_grad():
        expected = sampler.generator(z, sampler.encode([PROMPT]))
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    torch.testing.assert_close(one_step(pipeline, z), expected, rtol=1e-4, atol=1e-4)
    assert pipeline.scheduler.timesteps.tolist() == [timestep]
    said = json.loads((tmp_path / "pipeline" / "generator.json").read_text())
    assert said == {"timestep": timestep, "input_scale": input_scale}


def test_another_input_scale_is_a_factor_of_the_latents(bases: dict[str, Path], tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    config = load_config(bases["stable_diffusion"], ["models.generator={timestep: 500, input_scale: 0.5}"])
    sampler = sampler_of(config)
    export_pipeline(tmp_path / "pipeline", config, sampler.trained)
    z = torch.randn(1, *tiny.LATENT)
    expected = sampler.generator(z, sampler.encode([PROMPT])).detach()
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    torch.testing.assert_close(one_step(pipeline, 0.5 * z), expected, rtol=1e-4, atol=1e-4)


def test_a_schedule_that_no_pipeline_steps_through_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    FlowMatchEulerDiscreteScheduler().save_pretrained(tmp_path / "flow")
    config = load_config(bases["stable_diffusion"], [f"models.scheduler.path={tmp_path / 'flow'}"])
    sampler = build_sampler(config, CPU)
    with pytest.raises(ConfigurationError, match="FlowMatchEulerDiscreteScheduler without betas, or of flow matching"):
        export_pipeline(tmp_path / "pipeline", config, sampler.trained)
    export_generator(tmp_path / "generator", config, sampler.trained)
    assert not (tmp_path / "generator" / "scheduler").exists()
    assert load_schedule(str(tmp_path / "generator")).prediction_type == "flow_prediction"


def test_a_run_leaves_its_averaged_generator(runs: dict[str, Config]) -> None:
    from diffusers import EulerDiscreteScheduler, UNet2DConditionModel

    folder = Path(runs["whole"].output) / "generator"
    exported = UNet2DConditionModel.from_pretrained(folder).state_dict()
    averaged = read_tensors(Path(runs["whole"].output) / "checkpoints" / "step_000001" / "generator_ema.safetensors")
    assert exported.keys() == averaged.keys()
    assert all(torch.equal(exported[name], tensor) for name, tensor in averaged.items())
    assert len(load_schedule(str(folder))) == 1000
    assert runs["whole"].models.reference.path not in (folder / "config.json").read_text()
    assert EulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler").config.num_train_timesteps == 626
    call = json.loads((folder / "generator.json").read_text())
    generator = OneStepGenerator(load_denoiser(str(folder)).eval(), load_schedule(str(folder)), **call)
    z = Noise(1, torch.arange(2), stream=0).normal(tiny.LATENT)
    assert generator(z, torch.randn(2, 5, tiny.TEXT_WIDTH)).shape == z.shape


def test_the_command_exports_raw_weights_in_half_precision(
    runs: dict[str, Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = Path(runs["whole"].output), tmp_path / "half"
    for _ in range(2):  # an earlier export is replaced
        assert main(["export", str(run), "--out", str(out), "--raw", "--dtype", "float16"]) == 0
    said = capsys.readouterr().out
    assert f"weights: {run}/checkpoints/step_000001/generator\n" in said and "guidance_scale=1.0)" in said
    raw = read_role(run / "checkpoints" / "step_000001", "generator")
    exported = load_file(out / "diffusion_pytorch_model.safetensors")
    assert exported.keys() == raw.keys()
    assert all(torch.equal(tensor, raw[name].half()) for name, tensor in exported.items())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--no-merge"], "there are no adapters"),
        (["--no-merge", "--pipeline"], "--pipeline holds merged weights"),
    ],
)
def test_what_can_not_be_exported(
    runs: dict[str, Config], tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert main(["export", runs["whole"].output, "--out", str(tmp_path / "out"), *arguments]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_folder_with_something_else_is_not_replaced(
    runs: dict[str, Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    assert main(["export", runs["whole"].output, "--out", str(tmp_path)]) == 2
    assert "choose another --out" in capsys.readouterr().err and (tmp_path / "thesis.tex").exists()


def test_adapters_leave_merged_or_alone(runs: dict[str, Config], bases: dict[str, Path], tmp_path: Path) -> None:
    """Both load into diffusers and compute what the run's own generator does."""
    from diffusers import DiffusionPipeline, EulerDiscreteScheduler

    from diffpp_fast.training.export import load_sampler

    run = runs["lora"].output
    assert main(["export", run, "--out", str(tmp_path / "pipeline"), "--pipeline"]) == 0
    assert main(["export", run, "--out", str(tmp_path / "lora"), "--no-merge"]) == 0
    _, sampler = load_sampler(find_weights(Path(run)), CPU)
    z = torch.randn(1, *tiny.LATENT)
    with torch.no_grad():
        expected = sampler.generator(z, sampler.encode([PROMPT]))
    merged = DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    torch.testing.assert_close(one_step(merged, z), expected, rtol=1e-4, atol=1e-4)

    scheduler = EulerDiscreteScheduler.from_pretrained(tmp_path / "lora", subfolder="scheduler")
    loaded = DiffusionPipeline.from_pretrained(bases["stable_diffusion"].parent / "base", scheduler=scheduler)
    before = one_step(loaded, z)
    loaded.load_lora_weights(tmp_path / "lora")
    torch.testing.assert_close(one_step(loaded, z), expected, rtol=1e-4, atol=1e-4)
    assert (before - expected).abs().max() > 1e-2, "the adapters do nothing"
    files = load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    assert all(name.startswith("unet.") and name.endswith((".lora_A.weight", ".lora_B.weight")) for name in files)
    assert len(files) == len(sampler.trained.parameters)
    trained = load_denoiser(str(Path(run) / "generator")).network.state_dict()
    assert all(torch.equal(tensor, trained[name]) for name, tensor in merged.unet.state_dict().items())


def test_adapters_of_a_transformer_load_too(bases: dict[str, Path], tmp_path: Path) -> None:
    """With peft: diffusers has no loader of adapters for PixArt."""
    from peft import PeftModel

    config = load_config(bases["pixart"], ["models.generator.lora={rank: 2, alpha: 5}"])
    sampler = sampler_of(config)
    export_generator(tmp_path / "lora", config, sampler.trained, merge=False)
    network: Any = load_denoiser(config.models.reference.path).network.eval()
    network = PeftModel.from_pretrained(network, tmp_path / "lora")
    x_t, t = torch.randn(1, *tiny.LATENT), torch.tensor([440])
    arguments = sampler.encode([PROMPT]).tensors
    expected = sampler.trained.denoise(x_t, t, arguments)
    torch.testing.assert_close(network(x_t, timestep=t, **arguments).sample[:, :4], expected, rtol=1e-4, atol=1e-4)


def stored(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize(("family", "precision"), [("stable_diffusion", "float32"), ("pixart", "float16")])
def test_merging_rounds_nothing_of_the_base(
    bases: dict[str, Path], tmp_path: Path, family: str, precision: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a run in bfloat16 frozen weights are rounded in memory: the file has the base's own, and float32 sums."""
    shutil.copytree(bases[family].parent, tmp_path / "project")
    part = "transformer" if family == "pixart" else "unet"
    base = tmp_path / "project" / "base" / part
    tensors = {name: tensor.to(getattr(torch, precision)) for name, tensor in stored(base).items()}
    save_file(tensors, base / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    output, lora = tmp_path / "run", "models.generator.lora={rank: 3, alpha: 6, targets: [to_q, to_out.0, conv1, proj]}"
    config = load_config(
        tmp_path / "project" / "align.yaml",
        ["precision=bfloat16", f"output={output}", lora, "optimizers.generator.lr=0.1"],
    )
    Trainer(config).run()
    exported, adapters = (
        stored(output / "generator"),
        read_role(output / "checkpoints" / "step_000001", "generator_ema"),
    )
    changed = 0
    for name, tensor in tensors.items():
        assert exported[name].dtype == torch.float32
        layer = name.removesuffix(".weight")
        if f"{layer}.lora_A.generator.weight" in adapters:
            down, up = (adapters[f"{layer}.lora_{side}.generator.weight"] for side in "AB")
            expected = tensor.float() + (2.0 * (up.flatten(1) @ down.flatten(1))).view_as(tensor)
            assert torch.equal(exported[name], expected) and not torch.equal(exported[name], tensor.float())
            changed += 1
        else:
            assert torch.equal(exported[name], tensor.float()), name
    assert exported.keys() == tensors.keys() and 2 * changed == len(adapters) > 4
    assert main(["export", str(output), "--out", str(tmp_path / "out")]) == 0
    noted = read_record(output / "checkpoints" / "step_000001")["inputs"]
    assert Exported(config, find_weights(output)).inputs() == {"reference": noted["reference"]}
    again = stored(tmp_path / "out")
    assert all(torch.equal(again[name], exported[name]) for name in exported)


def test_an_export_holds_one_tensor_at_a_time(runs: dict[str, Config], tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """No network is built on the way, and of what is read nothing stays."""
    import weakref

    from diffpp_fast.tensor_files import StoredTensors

    held: list[weakref.ref[torch.Tensor]] = []
    most = 0
    read = StoredTensors.__getitem__

    def watch(self: StoredTensors, name: str) -> torch.Tensor:
        nonlocal most
        tensor = read(self, name)
        held.append(weakref.ref(tensor))
        most = max(most, sum(reference() is not None for reference in held))
        return tensor

    monkeypatch.setattr(StoredTensors, "__getitem__", watch)
    monkeypatch.setattr("diffpp_fast.networks.loading.load_denoiser", None)
    for run in ("lora", "whole"):
        assert main(["export", runs[run].output, "--out", str(tmp_path / run)]) == 0
        assert most == {"lora": 3, "whole": 1}[run]  # a weight with its A and B
        held, most = [], 0


def test_weights_that_are_not_finite_are_not_exported(
    runs: dict[str, Config], bases: dict[str, Path], tmp_path: Path
) -> None:
    """The first update is made, and takes the weights beyond float32."""
    output = f"output={tmp_path / 'run'}"
    with pytest.raises(CheckpointError, match=r"holds values that are NaN or infinite: the generator has diverged"):
        Trainer(load_config(bases["stable_diffusion"], [output, "optimizers.generator.lr=1e39"])).run()
    assert not (tmp_path / "run" / "generator").exists()
    for name, merge in (("whole", True), ("lora", True), ("lora", False)):
        sampler = build_sampler(runs[name], CPU)
        with torch.no_grad():
            for weight in sampler.trained.parameters.values():
                weight.add_(1e5)
        with pytest.raises(CheckpointError, match=r"holds values up to .*e\+.*, and float16 ends at 6\.55e\+04"):
            export_generator(tmp_path / "half", runs[name], sampler.trained, dtype=torch.float16, merge=merge)
    assert not (tmp_path / "half").exists()


def test_a_pipelines_other_parts_are_the_bases_files(bases: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(bases["stable_diffusion_xl"].parent, tmp_path / "project")
    base = tmp_path / "project" / "base"
    for part, stem in (
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder_2", "model"),
        ("unet", "diffusion_pytorch_model"),
    ):
        tensors = load_file(base / part / f"{stem}.safetensors")
        halves = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
        save_file(halves, base / part / f"{stem}.fp16.safetensors", {"format": "pt"})
    (base / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (base / "vae" / "leftover.bin").write_bytes(b"1")
    (base / "text_encoder" / "model.safetensors").rename(base / "text_encoder" / "model.fp16.safetensors")
    config = load_config(tmp_path / "project" / "align.yaml", ["models.variant=fp16"])
    sampler = sampler_of(config)
    export_pipeline(tmp_path / "out", config, sampler.trained, dtype=torch.bfloat16)
    for part, stem in (("vae", "diffusion_pytorch_model"), ("text_encoder", "model"), ("text_encoder_2", "model")):
        copied = (tmp_path / "out" / part / f"{stem}.safetensors").read_bytes()
        assert copied == (base / part / f"{stem}.fp16.safetensors").read_bytes()
        assert (tmp_path / "out" / part / "config.json").read_bytes() == (base / part / "config.json").read_bytes()
    assert not list((tmp_path / "out").rglob("*.bin")) and not list((tmp_path / "out").rglob("*fp16*"))
    assert {tensor.dtype for tensor in stored(tmp_path / "out" / "unet").values()} == {torch.bfloat16}
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert type(pipeline).__name__ == "StableDiffusionXLPipeline"
    assert type(pipeline.scheduler).__name__ == "EulerDiscreteScheduler"
    (base / "text_encoder" / "model.fp16.safetensors").unlink()
    with pytest.raises(ConfigurationError, match=r"models\.base.*text_encoder holds no model\.safetensors"):
        export_pipeline(tmp_path / "out", config, sampler.trained)


def test_a_project_that_has_moved_says_so(bases: dict[str, Path], tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    shutil.copytree(bases["stable_diffusion"].parent, tmp_path / "old")
    config = load_config(tmp_path / "old" / "align.yaml", [f"output={tmp_path / 'run'}", "models.fake.lora.rank=2"])
    Trainer(config).run()
    run, new = str(tmp_path / "run"), tmp_path / "new"
    (tmp_path / "old").rename(new)
    out = str(tmp_path / "out")
    for command in (["export", run, "--out", out], ["sample", "--run", run, "a red apple", "--out", f"{out}.png"]):
        assert main(command) == 2
        said = capsys.readouterr().err
        assert f"models.base={tmp_path}/old/base" in said and "--override models.base=FOLDER" in said
        assert main([*command, "--override", f"models.base={new / 'base'}"]) == 0


def test_what_was_trained_must_be_of_the_network(runs: dict[str, Config], tmp_path: Path) -> None:
    config = runs["whole"]
    weights = find_weights(Path(config.output))
    tensors = dict(read_role(*weights))
    tensors.pop("conv_in.weight")
    save_file(tensors, tmp_path / "generator_ema.safetensors")
    with pytest.raises(CheckpointError, match=r"1 names differ, e\.g\. conv_in\.weight"):
        export_generator(tmp_path / "out", config, type(weights)(tmp_path, "generator_ema"))


def test_a_pipeline_needs_the_base_that_the_run_computes_with(bases: dict[str, Path], tmp_path: Path) -> None:
    tiny.vae(seed=4).save_pretrained(tmp_path / "vae")
    config = load_config(bases["stable_diffusion"], [f"models.decoder.path={tmp_path / 'vae'}"])
    sampler = build_sampler(config, CPU)
    with pytest.raises(ConfigurationError, match=r"does not compute with the vae of models\.base"):
        export_pipeline(tmp_path / "pipeline", config, sampler.trained)
    without = config.model_copy(update={"models": config.models.model_copy(update={"base": None})})
    with pytest.raises(ConfigurationError, match=r"has no models\.base"):
        export_pipeline(tmp_path / "pipeline", without, sampler.trained)


def test_weights_of_several_writers_are_read_together(tmp_path: Path) -> None:
    tensors = {f"layer.{number}": torch.full((2,), float(number)) for number in range(4)}
    names = list(tensors)
    for number, part in enumerate((names[:3], names[3:]), 1):
        save_file({name: tensors[name] for name in part}, tmp_path / f"fake-0000{number}-of-00002.safetensors")
    read = read_role(tmp_path, "fake")
    assert read.keys() == tensors.keys() and all(torch.equal(read[name], tensors[name]) for name in names)
    (tmp_path / "fake-00001-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="parts of fake are missing"):
        read_role(tmp_path, "fake")
    with pytest.raises(CheckpointError, match="holds no weights of generator"):
        read_role(tmp_path, "generator")
    with pytest.raises(CheckpointError, match="is gone: a run that goes on removes its oldest checkpoints"):
        read_role(tmp_path / "gone", "generator")
