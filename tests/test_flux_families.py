"""FLUX.1, FLUX.2 and Qwen-Image: called, conditioned and decoded as diffusers' pipelines do it."""

from __future__ import annotations

import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import flux_sizes
import pytest
import tiny_flux
import torch
from diffusers.models import attention_dispatch as diffusers_attention

from diffpp_fast.cli.main import main
from diffpp_fast.networks import (
    Denoiser,
    freeze,
    freezing_report,
    fuse,
    fusion_report,
    set_attention,
    unfreeze,
    unfuse,
)
from diffpp_fast.networks.families.packing import unpack
from diffpp_fast.networks.loading import build_network, read_config
from diffpp_fast.training import ConfigurationError, Trainer, load_config
from diffpp_fast.training.build import build_sampler
from diffpp_fast.training.build.agreement import refuse_misfits
from diffpp_fast.training.build.text import load_text
from diffpp_fast.training.export import find_weights, load_sampler
from diffpp_fast.training.planning import GPUS, make_plan, run_of
from diffpp_fast.training.schedulers import pipeline_call

CPU = torch.device("cpu")
#: By case: the family, settings of its network, and of a guided call of its pipeline.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "flux": ("flux", {}, {"true_cfg_scale": 3.0, "negative_prompt": ["", ""], "max_sequence_length": 24}),
    "flux_guided": (
        "flux",
        {"guidance_embeds": True},
        {"true_cfg_scale": 3.0, "negative_prompt": ["", ""], "max_sequence_length": 24, "guidance_scale": 2.5},
    ),
    "flux_2": ("flux_2", {}, {"guidance_scale": 3.0, "max_sequence_length": 64}),
    "flux_2_dev": ("flux_2", {"guidance_embeds": True}, {"guidance_scale": 2.5, "max_sequence_length": 300}),
    "qwen_image": ("qwen_image", {}, {"true_cfg_scale": 3.0, "negative_prompt": ["", ""]}),
}
#: What their pipelines are called with for one step without guidance by two predictions.
UNGUIDED = {
    "flux": "true_cfg_scale=1.0",
    "flux_guided": "guidance_scale=2.5, true_cfg_scale=1.0",
    "flux_2": "guidance_scale=1.0",
    "flux_2_dev": "guidance_scale=2.5",
    "qwen_image": "true_cfg_scale=1.0",
}
PROMPTS = ("A red Apple", "a green frog and a yellow sun")
LENGTHS = {
    "flux": ("models.text_encoder_2.max_length=24",),
    "flux_2": ("models.text_encoder.max_length=64",),
    "qwen_image": ("models.text_encoder.max_length=256",),
}
SIGMA = 0.6


def guided_step(pipeline: Any, latents: torch.Tensor, **extra: Any) -> tuple[list[dict[str, Any]], list[Any], Any]:
    """Return what the pipeline hands its network in one guided step, what that predicts, and the picture after it."""
    calls, predictions = [], []

    def remember(module: Any, given: Any, named: dict[str, Any], output: Any) -> None:
        calls.append(named)
        predictions.append(output[0])

    handle = pipeline.transformer.register_forward_hook(remember, with_kwargs=True)
    pipeline.set_progress_bar_config(disable=True)
    pixels = tiny_flux.PIXELS
    made = pipeline(
        prompt=list(PROMPTS), num_inference_steps=1, sigmas=[SIGMA], height=pixels, width=pixels, output_type="pt",
        latents=latents, **extra,
    ).images  # fmt: skip
    handle.remove()
    return calls, predictions, made


def packed(family: str, latents: torch.Tensor) -> torch.Tensor:
    """Latents as the pipeline takes them."""
    from diffusers import FluxPipeline

    return latents if family == "flux_2" else FluxPipeline._pack_latents(latents, *latents.shape)


@pytest.mark.parametrize("case", CASES)
def test_a_guided_step_is_the_pipelines(case: str, tmp_path: Path) -> None:
    """Inputs and output of the network, sign and time, text of two lengths, guidance, and the picture."""
    family, changes, extra = CASES[case]
    guidance = ["models.generator.guidance_embedding=2.5"] if changes else []
    lengths = ["models.text_encoder.max_length=300"] if case == "flux_2_dev" else LENGTHS[family]
    config = load_config(tiny_flux.write_base(tmp_path, family, **changes), [*lengths, *guidance])
    assert config.models.latent_shape == tiny_flux.LATENTS[family]
    assert pipeline_call(config) == f"num_inference_steps=1, sigmas=[0.999], {UNGUIDED[case]}"
    latents = torch.randn(2, *tiny_flux.LATENTS[family])
    pipeline = tiny_flux.pipeline(family, **changes)
    calls, expected, made = guided_step(pipeline, packed(family, latents), **extra)

    sampler = build_sampler(config, CPU)
    handed: list[dict[str, Any]] = []
    denoise: Any = sampler.trained.denoise
    denoise.network.register_forward_pre_hook(lambda _, given, named: handed.append(named), with_kwargs=True)
    encode, _ = load_text(config.models)
    t = torch.full((2,), round(1000 * SIGMA))
    predictions = [denoise(latents, t, each) for each in (encode(PROMPTS), encode.null().expand(2))]
    assert len(calls) == (1 if case == "flux_2_dev" else 2)  # whose guidance is told alone
    for call, ours, prediction, theirs in zip(calls, handed, predictions, expected, strict=False):
        assert_handed(ours, call)
        torch.testing.assert_close(packed_prediction(family, prediction), theirs, rtol=1e-4, atol=1e-5)
    cond, uncond = predictions
    assert (cond - uncond).abs().max() > 1e-4, "the conditioning does nothing"
    guided = uncond + (3.0 if len(calls) == 2 else 1.0) * (cond - uncond)
    if family == "qwen_image":  # its pipeline goes on to the norm of the output with the prompt, token by token
        tokens = packed(family, guided)
        norms = [each.norm(dim=-1, keepdim=True) for each in (packed(family, cond), tokens)]
        guided = unpack(tokens * (norms[0] / norms[1]), *latents.shape[2:])
    assert sampler.decoder is not None
    picture = (sampler.decoder(latents - SIGMA * guided) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(picture, made, rtol=1e-4, atol=1e-4)


def assert_handed(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Compare what a network is handed with what the pipeline hands it, which pads text less."""
    given = {name for name, value in theirs.items() if value is not None}
    assert given <= {*ours, "joint_attention_kwargs", "attention_kwargs"}
    words = theirs["encoder_hidden_states"].shape[1]
    for name, value in ours.items():
        if name == "encoder_hidden_states_mask":
            mask = torch.ones(len(value), words) if theirs[name] is None else theirs[name]
            assert torch.equal(value[:, :words].float(), mask.float()) and not value[:, words:].any()
        elif not isinstance(value, torch.Tensor):
            assert value == theirs[name]
        elif name.endswith("_ids"):
            torch.testing.assert_close(value, (theirs[name] if theirs[name].dim() == 2 else theirs[name][0]).float())
        elif name == "encoder_hidden_states":
            torch.testing.assert_close(value[:, :words], theirs[name])
        else:
            torch.testing.assert_close(value, theirs[name])


def packed_prediction(family: str, prediction: torch.Tensor) -> torch.Tensor:
    return prediction.flatten(2).transpose(1, 2) if family == "flux_2" else packed(family, prediction)


def test_a_role_may_be_told_a_guidance_scale_of_its_own(tmp_path: Path) -> None:
    from diffpp_fast.networks.lora import Adapters

    network = tiny_flux.pipeline("flux", guidance_embeds=True).transformer
    adapters = Adapters(network)
    adapters.add("fake", rank=2, alpha=2, targets=["to_q"], seed=0, stream=0)
    handed: list[torch.Tensor] = []
    network.register_forward_pre_hook(lambda _, given, named: handed.append(named["guidance"]), with_kwargs=True)
    x, t = torch.randn(3, *tiny_flux.LATENTS["flux"]), torch.full((3,), 500)
    text = {"encoder_hidden_states": torch.randn(3, 5, 16), "pooled_projections": torch.randn(3, 16)}
    reference = Denoiser(network, adapters=adapters)
    fake = Denoiser(network, adapters=adapters, adapter="fake", guidance=1.0)
    reference(x, t, text), fake(x, t, text), reference(x, t, text, first=(fake, 1))
    assert [each.tolist() for each in handed] == [[3.5] * 3, [1.0] * 3, [1.0, 3.5, 3.5]]


REFUSED: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "a guidance scale that is not told": (
        "flux", {}, "models.fake.guidance_embedding=2", "models.fake.guidance_embedding has no effect",
    ),
    "a picture beside the latents": (
        "flux", {"in_channels": 24, "out_channels": 16}, "seed=1", "also takes a picture",
    ),
    "another guidance": ("qwen_image", {"zero_cond_t": True}, "seed=1", "zero_cond_t=True takes pictures"),
    "an odd side": ("flux", {}, "models.latent_shape=[4, 8, 7]", "cuts latents into patches of 2"),
    "one encoder too few": ("flux", {}, "models.text_encoder_2=null", "FLUX.1: it needs models.text_encoder_2"),
    "rows": ("qwen_image", {}, "models.decoder.rows=2", "models.decoder.rows is for AutoencoderKL"),
    "latents of another autoencoder": ("flux_2", {}, "models.latent_shape=[4, 4, 4]", "input channels"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case: str, tmp_path: Path) -> None:
    family, changes, override, said = REFUSED[case]
    config = tiny_flux.write_base(tmp_path, family, **changes)
    with pytest.raises(ConfigurationError, match=re.escape(said)):
        build_sampler(load_config(config, [override]), CPU)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("family", tiny_flux.LATENTS)
def test_a_run_resumes_is_exported_and_drawn(family: str, lora: bool, tmp_path: Path) -> None:
    """Two steps with guidance and a reward; the pipeline that comes out makes the generator's pictures."""
    from diffusers import DiffusionPipeline

    changes = {"guidance_embeds": True} if family == "flux" else {}
    file = tiny_flux.write_base(tmp_path, family, **changes)
    adapters = ["models.generator.lora.rank=2", "models.fake.lora.rank=2", "training.activation_checkpointing=true"]
    overrides = [*LENGTHS[family], *(adapters if lora else ()), "models.generator.timestep=600"]
    whole = Trainer(load_config(file, [f"output={tmp_path / 'whole'}", *overrides]))
    assert whole.run().step == 2
    parts = [f"output={tmp_path / 'parts'}", *overrides]
    Trainer(load_config(file, [*parts, "training.steps=1"])).run()
    resumed = Trainer(load_config(file, parts), resume="latest")
    assert resumed.run().step == 2
    for name, weight in whole.generator.parameters.items():
        assert torch.equal(weight, resumed.generator.parameters[name]), name

    run = str(tmp_path / "whole")
    assert main(["sample", "--run", run, "a red apple", "--out", str(tmp_path / "apple.png")]) == 0
    assert main(["export", run, "--pipeline", "--out", str(tmp_path / "pipeline")]) == 0
    config, sampler = load_sampler(find_weights(tmp_path / "whole"), CPU)
    z = torch.randn(1, *tiny_flux.LATENTS[family])
    with torch.no_grad():
        expected = sampler.decoder(sampler.generator(z, sampler.encode(["a red apple"])))  # type: ignore[misc]
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    call = pipeline_call(config)
    assert call in (tmp_path / "pipeline" / "README.md").read_text()
    given = eval(f"dict({call})", {"z": packed(family, z)})
    more = {"height": tiny_flux.PIXELS, "width": tiny_flux.PIXELS, "output_type": "pt"}
    more |= {} if family == "qwen_image" else {"max_sequence_length": 24 if family == "flux" else 64}
    picture = (expected / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(pipeline(prompt="a red apple", **given, **more).images, picture, rtol=1e-4, atol=1e-4)
    if lora:
        assert main(["export", run, "--no-merge", "--out", str(tmp_path / "adapters")]) == 0
        based = DiffusionPipeline.from_pretrained(tmp_path / "base", scheduler=pipeline.scheduler)
        based.load_lora_weights(tmp_path / "adapters")
        torch.testing.assert_close(based(prompt="a red apple", **given, **more).images, picture, rtol=1e-4, atol=1e-4)


#: The ready configurations, by family.
READY = {"flux": "flux", "flux_2": "flux2_klein", "flux_2_dev": "flux2_dev", "qwen_image": "qwen_image"}


def true_size(family: str, folder: Path) -> tuple[Path, list[str]]:
    """The ready configuration of a family, and what puts it on a pipeline of the true size without weights."""
    base = flux_sizes.write_base(folder / "base", family)
    (folder / "prompts.txt").write_text("a red apple\n")
    file = Path(__file__).parents[1] / "examples" / "configs" / f"{READY[family]}.yaml"
    changes = [f"models.base={base}", f"prompts.path={folder / 'prompts.txt'}", f"output={folder / 'run'}"]
    if family in ("flux", "flux_2"):  # their generators have repositories of their own
        other = flux_sizes.write_base(folder / "generator", family, guidance_embeds=False)
        changes.append(f"models.generator.path={other / 'transformer'}")
    return file, changes


@pytest.mark.parametrize("family", READY)
def test_a_ready_configuration_loads_at_the_true_size(family: str, tmp_path: Path) -> None:
    file, changes = true_size(family, tmp_path)
    config = load_config(file, changes)
    facts = read_config(config.models.reference.path)
    with torch.device("meta"):
        network = build_network(facts, family)
    assert sum(weight.numel() for weight in network.parameters()) == flux_sizes.SIZES[family][2]
    assert config.models.latent_shape == ((128, 64, 64) if family.startswith("flux_2") else (16, 128, 128))
    elements = math.prod(config.models.latent_shape)
    assert (config.optimizers.generator.clip, config.optimizers.fake.clip) == (10 * elements, 10)
    refuse_misfits(config)
    lines = [line for line in file.read_text().splitlines() if ": " in line and not line.lstrip().startswith("#")]
    for section in ("guidance_scale", "weighting", "t_range", "fake_rounds", "generator: {lr", "fake: {lr"):
        assert all("#" in line for line in lines if line.strip().startswith(section)), section


@pytest.mark.slow
@pytest.mark.parametrize("family", READY)
def test_a_ready_configuration_is_planned_and_fits(family: str, tmp_path: Path) -> None:
    file, changes = true_size(family, tmp_path)
    assert main(["train", str(file), "--dry-run", *changes]) in (0, 1)  # 1: it does not fit one GPU
    (tmp_path / "embeddings").mkdir()
    run = run_of(load_config(file, [*changes, f"prompts.embeddings={tmp_path / 'embeddings'}"]), 8)
    plan = make_plan(run, GPUS["a100-80"])
    assert plan.spare > 0, f"{family} lacks {-plan.spare / 2**30:.1f} GiB"


def loss_and_gradients(network: Any, family: str, frozen: bool) -> list[torch.Tensor]:
    """Return a product with the prediction, and its gradients by latents and weights."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, *tiny_flux.LATENTS[family], generator=generator, dtype=torch.float64).requires_grad_()
    width = {"flux": 16, "flux_2": 48, "qwen_image": 16}[family]
    text = {"encoder_hidden_states": torch.randn(2, 5, width, generator=generator, dtype=torch.float64)}
    if family == "flux":
        text["pooled_projections"] = torch.randn(2, 16, generator=generator, dtype=torch.float64)
    if family == "qwen_image":
        text["encoder_attention_mask"] = torch.tensor([[1, 1, 1, 0, 0], [1] * 5])
    prediction = Denoiser(network)(x, torch.tensor([300, 700]), text)
    total = (prediction * torch.randn(prediction.shape, generator=generator, dtype=torch.float64)).sum()
    leaves = [x] if frozen else [x, *network.parameters()]
    return [total, *torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)]


#: Blocks that are fused in the tiny networks, by kind.
FUSED = {
    "flux": {"FluxTransformerBlock": 2, "FluxAttention": 4, "AdaLayerNormZeroSingle": 2},
    "flux_2": {
        "Flux2TransformerBlock": 2, "Flux2Attention": 2, "Flux2SingleTransformerBlock": 2,
        "Flux2ParallelSelfAttention": 2,
    },
    "qwen_image": {"QwenImageTransformerBlock": 2},
}  # fmt: skip


@pytest.mark.parametrize("family", FUSED)
def test_fused_and_frozen_networks_have_the_gradients_that_they_had(family: str) -> None:
    network = tiny_flux.pipeline(family).transformer.double()
    expected = loss_and_gradients(network, family, frozen=False)
    assert fuse(network) == sum(FUSED[family].values())
    rows = fusion_report(network)
    assert all(row.fused for row in rows) and Counter(row.kind for row in rows) == FUSED[family]
    for ours, theirs in zip(loss_and_gradients(network, family, frozen=False), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    freeze(network, recompute="blocks")
    count = sum(row.frozen for row in freezing_report(network))
    assert count == len(network.transformer_blocks) + len(getattr(network, "single_transformer_blocks", ()))
    for ours, theirs in zip(loss_and_gradients(network, family, frozen=True), expected[:2], strict=True):
        torch.testing.assert_close(ours, theirs)
    unfreeze(network)
    assert unfuse(network) == sum(FUSED[family].values())


@pytest.mark.parametrize("family", FUSED)
def test_attention_goes_to_the_backend_that_is_named(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network = tiny_flux.pipeline(family).transformer.double()
    expected = loss_and_gradients(network, family, frozen=True)
    fuse(network)
    blocks = len(network.transformer_blocks) + len(getattr(network, "single_transformer_blocks", ()))
    assert set_attention(network, "math") == blocks
    asked: list[Any] = []

    backends = diffusers_attention._AttentionBackendRegistry._backends
    math_name = diffusers_attention.AttentionBackendName._NATIVE_MATH
    attend = backends[math_name]

    def remembered(*values: Any, **given: Any) -> Any:
        asked.append(given)
        return attend(*values, **given)

    monkeypatch.setitem(backends, math_name, remembered)
    for ours, theirs in zip(loss_and_gradients(network, family, frozen=True), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert len(asked) == blocks
    with pytest.raises(RuntimeError, match="serves CUDA tensors only"):
        set_attention(network, "efficient")
