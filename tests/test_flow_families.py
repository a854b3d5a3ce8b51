"""Families with files of their own: called and conditioned as diffusers' pipelines do it, trained, exported, drawn."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_flux
import torch

from diffpp_fast.cli.main import main
from diffpp_fast.networks import (
    Conditioning,
    Denoiser,
    FrozenDecoder,
    freeze,
    freezing_report,
    fusion_report,
    load_denoiser,
    quantize,
)
from diffpp_fast.networks.families import FAMILIES
from diffpp_fast.tensor_files import read_tensors
from diffpp_fast.training import Config, ConfigurationError, Trainer, dump_config, load_config
from diffpp_fast.training.build import build_run
from diffpp_fast.training.build.agreement import refuse_misfits
from diffpp_fast.training.build.text import load_text
from diffpp_fast.training.distributed import World
from diffpp_fast.training.export import export_generator, export_pipeline, find_weights, load_sampler
from diffpp_fast.training.phases import Phases
from diffpp_fast.training.schedulers import pipeline_call

#: By family: settings of the pipeline's call, and the names of its network's first arguments.
FLOWS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "z_image": ({}, ("x", "t", "cap_feats")),
    "stable_diffusion_3": ({}, ("hidden_states",)),
    "sana": ({"use_resolution_binning": False, "clean_caption": False}, ("hidden_states",)),
}
#: Pixels of the decoded picture to a pixel of the latents.
PIXELS = {"z_image": 2, "stable_diffusion_3": 2, "sana": 4}
#: Which guidance scale of ours the pipeline's is, and whether it puts the prompt before the empty one.
FROM_ZERO, PROMPT_FIRST = {"z_image"}, {"z_image"}
PROMPTS = ("A red apple", "a green frog and a yellow sun")
SCALE = 3.0


def guided_step(family: str, pipeline: Any, latents: torch.Tensor, sigma: float) -> tuple[dict[str, Any], Any, Any]:
    """Return what the pipeline hands its network in one guided step, what that predicts, and the latents after it."""
    extra, names = FLOWS[family]
    calls: list[tuple[dict[str, Any], Any]] = []

    def remember(module: Any, given: Any, named: dict[str, Any], output: Any) -> None:
        calls.append(({**dict(zip(names, given, strict=False)), **named}, output[0]))

    handle = pipeline.transformer.register_forward_hook(remember, with_kwargs=True)
    pipeline.set_progress_bar_config(disable=True)
    size = PIXELS[family] * tiny.LATENT[1]
    # The shift of the scheduler, undone.
    asked = sigma / (pipeline.scheduler.config.shift * (1 - sigma) + sigma)
    made = pipeline(
        list(PROMPTS),
        num_inference_steps=1,
        sigmas=[asked],
        guidance_scale=SCALE,
        latents=latents,
        height=size,
        width=size,
        output_type="latent",
        **extra,
    ).images
    handle.remove()
    (call,) = calls
    return *call, made


@pytest.mark.parametrize("family", FLOWS)
def test_a_guided_step_is_the_pipelines(family: str, tmp_path: Path) -> None:
    """Compare the network's inputs and prediction, sign and time, text of two lengths, and guidance."""
    config = load_config(tiny.write_base(tmp_path, family), ["models.latent_shape=[4, 8, 8]"])
    latents = torch.randn(2, *tiny.LATENT)
    call, expected, made = guided_step(family, tiny.pipeline(family), latents.clone(), 0.6)

    encode, _ = load_text(config.models)
    null, prompts = encode.null().expand(2), encode(PROMPTS)
    order = [prompts, null] if family in PROMPT_FIRST else [null, prompts]
    whole = {name: torch.cat([each.tensors[name] for each in order]) for name in prompts.tensors}
    for name, tensor in whole.items():
        if name in call:
            torch.testing.assert_close(tensor.to(call[name].dtype), call[name])
    denoiser = load_denoiser(config.models.reference.path).eval()
    predictions = denoiser(torch.cat([latents, latents]), torch.full((4,), 600), Conditioning(("",) * 4, whole))
    if isinstance(expected, list):  # Z-Image's, which predicts x0 - eps of samples with a frame's dimension
        for place, text in enumerate(call["cap_feats"]):
            mask = whole["encoder_attention_mask"][place].bool()
            torch.testing.assert_close(whole["encoder_hidden_states"][place][mask], text)
        expected = -torch.stack(expected).squeeze(2)
    torch.testing.assert_close(predictions, expected, rtol=1e-4, atol=1e-5)
    first, second = predictions.chunk(2)
    cond, uncond = (first, second) if family in PROMPT_FIRST else (second, first)
    assert (cond - uncond).abs().max() > 1e-4, "the conditioning does nothing"
    scale = SCALE + 1 if family in FROM_ZERO else SCALE
    torch.testing.assert_close(made, latents - 0.6 * (uncond + scale * (cond - uncond)), rtol=1e-4, atol=1e-4)


def test_every_family_is_compared() -> None:
    named = {type(family).__module__.rpartition(".")[2] for family in FAMILIES}
    assert named == FLOWS.keys() | tiny_flux.LATENTS.keys()


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The configuration of a run on a whole pipeline, by family."""
    return {family: tiny.write_base(tmp_path_factory.mktemp(family), family) for family in FLOWS}


def align(base: Path, output: Path, *overrides: str) -> Config:
    """A run of two steps that saves after each, with latents that are wider than high."""
    return load_config(
        base,
        [
            f"output={output}",
            "models.latent_shape=[4, 8, 16]",
            "models.generator={timestep: 999, input_scale: 1.0}",
            "training.steps=2",
            "training.activation_checkpointing=true",
            "training.grid_every=null",
            "training.baseline_steps=null",
            *overrides,
        ],
    )


def test_a_flows_generator_begins_with_noise_alone(bases: dict[str, Path], tmp_path: Path) -> None:
    """Where nothing is said of its call; what a run has saved, or a user has written, stays."""
    cases: tuple[tuple[list[str], tuple[int, Any]], ...] = (
        ([], (999, 1.0)),
        (["models.generator.lora.rank=2", "models.generator.input_scale=sigma"], (999, "sigma")),
        (["models.generator.timestep=625"], (625, "sigma")),
    )
    for given, call in cases:
        config = load_config(bases["z_image"], [*given, f"output={tmp_path}"])
        generator = config.models.generator
        assert (generator.timestep, generator.input_scale) == call
        (tmp_path / "saved.yaml").write_text(dump_config(config))
        assert load_config(tmp_path / "saved.yaml").models.generator == generator
    several = load_config(bases["sana"], ["models.generator.timesteps=[999, 500]"]).models.generator
    assert (several.times, several.input_scale) == ((999, 500), "sigma")


@pytest.mark.slow
@pytest.mark.parametrize("family", FLOWS)
@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
def test_trained_resumed_exported_and_drawn(bases: dict[str, Path], family: str, lora: bool, tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler

    adapters = ["models.generator.lora={rank: 2}", "models.fake.lora={rank: 2}"] if lora else []
    through = align(bases[family], tmp_path / "through", *adapters)
    assert Trainer(through).run().step == 2
    parted = align(bases[family], tmp_path / "parted", *adapters)
    first = Path(through.output) / "checkpoints" / "step_000001"
    assert Trainer(parted, resume=str(first)).run().step == 2
    states = [
        read_tensors(Path(config.output) / "checkpoints" / "step_000002" / "generator.safetensors")
        for config in (through, parted)
    ]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())

    weights = find_weights(Path(through.output))
    config, sampler = load_sampler(weights, torch.device("cpu"))
    z = torch.randn(1, 4, 8, 16)
    assert sampler.decoder is not None
    with torch.no_grad():
        expected = sampler.generator(z, sampler.encode(["a red apple"]))
        images = sampler.decoder(expected)
    export_pipeline(tmp_path / "pipeline", config, weights)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    arguments = eval(f"dict({pipeline_call(config)})")  # as the card and the command line tell it
    arguments |= FLOWS[family][0] | {"latents": z.clone(), "height": 8 * PIXELS[family], "width": 16 * PIXELS[family]}
    made = pipeline("a red apple", **arguments, output_type="latent").images
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)
    drawn = pipeline("a red apple", **arguments, output_type="pt").images
    torch.testing.assert_close(drawn, (images / 2 + 0.5).clamp(0, 1), rtol=1e-3, atol=1e-3)
    if lora:  # the adapters alone, on the base, with the scheduler beside them
        export_generator(tmp_path / "lora", config, weights, merge=False)
        base = DiffusionPipeline.from_pretrained(bases[family].parent / "base")
        base.set_progress_bar_config(disable=True)
        base.load_lora_weights(tmp_path / "lora")
        base.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "lora", subfolder="scheduler")
        made = base("a red apple", **arguments, output_type="latent").images
        torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["z_image", "sd3", "sana"])
def test_a_frozen_network_has_the_gradient_that_it_had(kind: str) -> None:
    """`freeze` fuses blocks, and computes them again."""
    networks = [getattr(tiny, kind)().eval() for _ in range(2)]
    denoisers = [Denoiser(network) for network in networks]
    freeze(networks[1], recompute="blocks")
    blocks = [row for row in freezing_report(networks[1]) if row.kind.endswith("TransformerBlock")]
    assert blocks and all(row.frozen for row in blocks)
    assert all(row.fused for row in fusion_report(networks[1]))
    width = tiny.TEXT_WIDTH
    text = {"encoder_hidden_states": torch.randn(2, 40, width), "encoder_attention_mask": torch.ones(2, 40).long()}
    if kind == "sd3":
        text = {"encoder_hidden_states": torch.randn(2, 5, width), "pooled_projections": torch.randn(2, 8)}
    x, direction = torch.randn(2, *tiny.LATENT), torch.randn(2, *tiny.LATENT)
    gradients = []
    for denoise in denoisers:
        leaf = x.clone().requires_grad_()
        gradients.append(
            torch.autograd.grad((denoise(leaf, torch.tensor([300, 700]), text) * direction).sum(), leaf)[0]
        )
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"upsample_block_type": "interpolate"}, {"decoder_in_shortcut": False}])
@pytest.mark.parametrize("side", [5, 1])  # where attention is linear, and where it is quadratic
def test_sanas_decoder_has_diffusers_image_and_gradient(changes: dict[str, Any], side: int) -> None:
    vae: Any = tiny.deep_vae(**changes).eval()
    latents = torch.randn(2, tiny.LATENT[0], side, side + 1)
    direction = torch.randn(2, 3, 4 * side, 4 * side + 4)
    found = []
    decoders: list[Callable[[torch.Tensor], torch.Tensor]] = [
        lambda z: vae.decode(z / vae.config.scaling_factor).sample,
        FrozenDecoder(vae),
        FrozenDecoder(vae, checkpoint=True, slice_size=1),
    ]
    for decode in decoders:
        leaf = latents.clone().requires_grad_()
        image = decode(leaf)
        found.append((image.detach(), *torch.autograd.grad((image * direction).sum(), leaf)))
    for image, gradient in found[1:]:
        torch.testing.assert_close(image, found[0][0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(gradient, found[0][1], rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="rows is for AutoencoderKL"):
        FrozenDecoder(vae, rows=2)


def edit(part: str, **changes: Any) -> Callable[[Path], None]:
    """Changes keys of a part's configuration."""

    def change(base: Path) -> None:
        file = base / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


def nothing(_: Path) -> None:
    """Leaves a base as it is."""


#: What is changed of a base, the overrides, and what is said.
MISFITS: dict[str, tuple[str, Callable[[Path], None], list[str], str]] = {
    "fits": ("z_image", nothing, [], ""),
    "pictures among the conditions": ("z_image", edit("transformer", siglip_feat_dim=8), [], "siglip_feat_dim=8"),
    "patches": ("z_image", edit("transformer", all_patch_size=[4]), [], "no patches of 2 x 2"),
    "odd latents": ("z_image", nothing, ["models.latent_shape=[4, 9, 8]"], "patches of 2"),
    "large latents": ("z_image", nothing, ["models.latent_shape=[4, 8, 40]"], "at most 32"),
    "no flow": ("z_image", edit("scheduler", _class_name="DDPMScheduler", beta_schedule="linear", beta_start=1e-4,
                                beta_end=0.02), [], "trained by flow matching"),
    "other times": ("z_image", edit("scheduler", num_train_timesteps=500), [], "has 500 times, but Z-Image takes 1000"),
    "width of text": ("z_image", edit("text_encoder", hidden_size=24), [], "16 channels of text, .* has 24"),
    "kind of text": ("z_image", edit("text_encoder", model_type="gemma2"), [], "is a gemma2; Z-Image takes a qwen3"),
    "mask": ("z_image", nothing, ["models.text_encoder.mask_padding=false"], "mask_padding has no effect for Z-Image"),
    "one encoder too many": ("sana", nothing, ["models.text_encoder_2={path: BASE/text_encoder}"], "one text encoder"),
    "guidance embedding": ("sana", edit("transformer", guidance_embeds=True), [], "told the guidance scale"),
    "no second encoder": ("stable_diffusion_3", nothing, ["models.text_encoder_2=null"], "needs models.text_encoder_2"),
    "no third encoder": ("stable_diffusion_3", nothing, ["models.text_encoder_3=null"], ""),
    "pooled": ("stable_diffusion_3", edit("text_encoder_2", projection_dim=8), [], "32 channels of pooled text, .* 24"),
    "third for others": ("stable_diffusion", nothing, ["models.text_encoder_3={path: BASE/text_encoder}"],
                         "remove models.text_encoder_3"),
    "another family": ("sana", nothing, ["models.fake.path=BASE/../other"], "called in different ways"),
    "rows": ("sana", nothing, ["models.decoder.rows=2"], "rows is for AutoencoderKL"),
}  # fmt: skip


@pytest.fixture(scope="module")
def empty_bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Whole pipelines without one byte of weights."""
    found = {}
    for family in (*FLOWS, "stable_diffusion"):
        found[family] = tiny.write_base(tmp_path_factory.mktemp(family), family).parent
        other: Any = tiny.sd3()
        other.save_config(found[family] / "other")
        for weights in found[family].rglob("*.safetensors"):
            weights.unlink()
    return found


@pytest.mark.parametrize("name", MISFITS)
def test_what_does_not_fit_is_refused(name: str, empty_bases: dict[str, Path], tmp_path: Path) -> None:
    family, change, overrides, said = MISFITS[name]
    shutil.copytree(empty_bases[family], tmp_path / "project")
    base = tmp_path / "project" / "base"
    change(base)
    overrides = [override.replace("BASE", str(base)) for override in overrides]
    shape = [] if any("latent_shape" in each for each in overrides) else ["models.latent_shape=[4, 8, 8]"]
    config = load_config(tmp_path / "project" / "align.yaml", [*shape, *overrides])
    if not said:
        refuse_misfits(config)
        return
    with pytest.raises(ConfigurationError, match=said):
        refuse_misfits(config)


def test_stable_diffusion_3_does_without_its_third_encoder(bases: dict[str, Path]) -> None:
    """T5's hidden states are zeros then, as they are in the pipeline."""
    encode, facts = load_text(load_config(bases["stable_diffusion_3"], ["models.text_encoder_3=null"]).models)
    pipeline = tiny.pipeline("stable_diffusion_3")
    pipeline.text_encoder_3 = None
    prompt, negative, pooled, _ = pipeline.encode_prompt(PROMPTS[0], None, None)
    found = encode([PROMPTS[0]]).tensors
    torch.testing.assert_close(found["encoder_hidden_states"], prompt)
    torch.testing.assert_close(found["pooled_projections"], pooled)
    torch.testing.assert_close(encode.null().tensors["encoder_hidden_states"], negative)
    assert facts.width == prompt.shape[-1] and facts.pooled_width == pooled.shape[-1]


@pytest.mark.slow
@pytest.mark.parametrize("family", FLOWS)
def test_embeddings_are_what_the_encoders_give(bases: dict[str, Path], family: str, tmp_path: Path) -> None:
    assert main(["embed", str(bases[family]), "--out", str(tmp_path / "embeddings")]) == 0
    config = align(
        bases[family], tmp_path / "run", f"prompts.embeddings={tmp_path / 'embeddings'}", "precision=bfloat16"
    )
    encode, _ = load_text(config.models)
    sampler = build_run(config, World.alone("cpu"), Phases(torch.device("cpu"))).sampler
    for name, tensor in sampler.encode(["a red apple"]).tensors.items():
        torch.testing.assert_close(tensor, encode(["a red apple"]).tensors[name])
    assert Trainer(config).run().step == 2


def test_a_quantised_z_image_has_its_blocks_in_fewer_bits() -> None:
    network: Any = tiny.z_image(dim=96, axes_dims=(16, 16, 16)).eval()
    denoise = Denoiser(network)
    text = {
        "encoder_hidden_states": torch.randn(1, 9, tiny.TEXT_WIDTH),
        "encoder_attention_mask": torch.ones(1, 9).long(),
    }
    inputs = torch.randn(1, *tiny.LATENT), torch.tensor([500]), text
    with torch.no_grad():
        before = denoise(*inputs)
        assert quantize(network, "float8") == 7 * 4  # of the blocks; what modulates norms is left
        torch.testing.assert_close(denoise(*inputs), before, rtol=0.2, atol=0.2 * float(before.abs().max()))
