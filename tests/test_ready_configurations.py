"""examples/configs on pipelines of the true size: configurations without weights, as their repositories have them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import yaml

from diffpp_fast.training import load_config
from diffpp_fast.training.build.networks import stored_weights
from diffpp_fast.training.planning import GPUS, KNOWN, make_plan, run_of
from diffpp_fast.training.planning.architectures import on_meta

CONFIGS = Path(__file__).parents[1] / "examples" / "configs"
PIPELINES = {
    "sd15": ("StableDiffusionPipeline", "unet"),
    "sdxl": ("StableDiffusionXLPipeline", "unet"),
    "pixart": ("PixArtAlphaPipeline", "transformer"),
    "zimage": ("ZImagePipeline", "transformer"),
    "sd35": ("StableDiffusion3Pipeline", "transformer"),
    "sana": ("SanaPipeline", "transformer"),
}
FLOWS = ("zimage", "sd35", "sana")
#: The part of a file's name that says the machine: how many GPUs, and which.
MACHINES = {
    "1x24gb": (1, "rtx4090"),
    "1x80gb": (1, "a100-80"),
    "8x80gb": (8, "a100-80"),
    "64x80gb": (64, "a100-80"),
}
OTHERS = (
    *("sdxl-didr-8x80gb", "sdxl-dipp-8x80gb", "sdxl-4step-8x80gb", "pixart-sim-8x80gb"),
    *("zimage-1x80gb", "sd35-1x24gb", "sana-1x24gb"),
)
READY = [
    *(f"{model}-{machine}" for model in PIPELINES if model not in FLOWS for machine in MACHINES if machine != "1x80gb"),
    *(f"{model}-8x80gb" for model in FLOWS),
    *OTHERS,
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

    folders = {}
    for name, (pipeline, denoiser) in PIPELINES.items():
        base = tmp_path_factory.mktemp(name)
        models = KNOWN[name]
        assert models.decoder is not None
        on_meta(models.reference).save_config(base / denoiser)
        on_meta(models.decoder).save_config(base / "vae")
        parts = {denoiser: "", "vae": "", "scheduler": ""}
        for number, (recipe, _) in enumerate(models.text_encoders, 1):
            part, tokenizer = (f"{name}_{number}" if number > 1 else name for name in ("text_encoder", "tokenizer"))
            on_meta(recipe).config.save_pretrained(base / part)
            (base / tokenizer).mkdir()
            parts |= {part: "", tokenizer: ""}
        linear = {"beta_start": 0.0001, "beta_end": 0.02}
        scaled = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0) if name in FLOWS else None
        scheduler = scheduler or DDPMScheduler(**(linear if name == "pixart" else scaled))
        scheduler.save_config(base / "scheduler")
        index = {"_class_name": pipeline, **{part: ["library", "class"] for part in parts}}
        (base / "model_index.json").write_text(json.dumps(index))
        (base / "prompts.txt").write_text("a red apple\n")
        folders[name] = base
    return folders


def overrides(bases: dict[str, Path], model: str) -> list[str]:
    changes = [f"models.base={bases[model]}", f"prompts.path={bases[model] / 'prompts.txt'}"]
    if model == "pixart":  # its generator has a repository of its own
        changes.append(f"models.generator.path={bases[model] / 'transformer'}")
    return changes


def test_every_file_is_known() -> None:
    assert sorted(path.stem for path in CONFIGS.glob("*-*.yaml")) == sorted(READY)


@pytest.mark.parametrize("name", READY)
def test_it_loads(name: str, bases: dict[str, Path]) -> None:
    config = load_config(CONFIGS / f"{name}.yaml", overrides(bases, name.split("-")[0]))
    gpus = MACHINES[name.split("-")[-1]][0]
    per_process, rest = divmod(config.training.global_batch, gpus)
    assert rest == 0 and config.training.micro_batch is not None
    assert per_process % config.training.micro_batch == 0
    assert config.output == f"runs/{name}"
    assert (config.models.generator.lora is not None) == (gpus == 1) == (config.models.fake.lora is not None)
    if "on one copy" in (CONFIGS / f"{name}.yaml").read_text():
        assert stored_weights(config.models, "generator") == stored_weights(config.models, "reference")


@pytest.mark.parametrize("model", PIPELINES)
def test_every_value_says_where_it_is_from(model: str) -> None:
    """The comments behind the values of the method, the rewards and the optimizers, which matter most."""
    lines = (CONFIGS / f"{model}.yaml").read_text().splitlines()
    for section in ("method", "optimizers"):
        start = lines.index(f"{section}:") + 1
        body = [line for line in lines[start : start + len(yaml.safe_load("\n".join(lines))[section])]]
        assert body and all("#" in line for line in body if not line.strip().startswith("name:")), section


@pytest.mark.parametrize("model", PIPELINES)
def test_what_is_in_units_of_a_gradient_is_converted(model: str, bases: dict[str, Path]) -> None:
    """DMD's and DMD2's clip of 10 is for a mean over elements, and DMD's mean lacks a factor 1/2."""
    config = load_config(CONFIGS / f"{model}-8x80gb.yaml", overrides(bases, model))
    factor = math.prod(config.models.latent_shape) / (2 if model == "pixart" else 1)
    eps = {"sd15": (1e-8 / factor, 1e-8 / factor), "sdxl": (1e-8, 1e-8), "pixart": (1e-6, 1e-6)}.get(
        model, (1e-8, 1e-8)
    )
    generator, fake = config.optimizers.generator, config.optimizers.fake
    assert (generator.clip, fake.clip) == (10 * factor, 10)
    assert (generator.eps, fake.eps) == pytest.approx((eps[0] * factor, eps[1]), rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("name", READY)
def test_it_fits(name: str, bases: dict[str, Path]) -> None:
    model, machine = name.split("-")[0], name.split("-")[-1]
    gpus, kind = MACHINES[machine]
    changes = overrides(bases, model)
    if model in ("pixart", *FLOWS) or machine == "1x24gb" or "didr" in name:  # as their files say
        (bases[model] / "embeddings").mkdir(exist_ok=True)
        changes.append(f"prompts.embeddings={bases[model] / 'embeddings'}")
    plan = make_plan(run_of(load_config(CONFIGS / f"{name}.yaml", changes), gpus), GPUS[kind])
    assert plan.spare > 0, f"{name} lacks {-plan.spare / 2**30:.1f} GiB"
