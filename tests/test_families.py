"""The families of networks: conditioned as diffusers' pipelines do it, from a whole pipeline or from its parts."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from safetensors.torch import save_file

from diffpp_fast.networks import Conditioning, Denoiser, load_denoiser
from diffpp_fast.networks.loading import build_network, pretrained_arguments, read_config
from diffpp_fast.training import Config, ConfigurationError, Trainer, dump_config, load_config
from diffpp_fast.training.build import build_run, build_sampler
from diffpp_fast.training.build.text import load_text
from diffpp_fast.training.distributed import World
from diffpp_fast.training.phases import Phases

CPU = torch.device("cpu")
#: Families, with what makes a difference to their conditioning.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "stable_diffusion": ("stable_diffusion", {}),
    "stable_diffusion_v": ("stable_diffusion", {"prediction_type": "v_prediction"}),
    "stable_diffusion_xl": ("stable_diffusion_xl", {}),
    "stable_diffusion_xl_encoded_empty": ("stable_diffusion_xl", {"force_zeros_for_empty_prompt": False}),
    "pixart": ("pixart", {}),
    # At 1024 x 1024 the network is told resolution and aspect ratio, in thirds of its width. Latents may be smaller.
    "pixart_1024": ("pixart", {"sample_size": 128, "attention_head_dim": 12, "cross_attention_dim": 24}),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The configuration of a run on a whole pipeline, by family."""
    return {
        family: tiny.write_base(tmp_path_factory.mktemp(family), family)
        for family in ("stable_diffusion", "stable_diffusion_xl", "pixart")
    }


@pytest.fixture
def config_of(bases: dict[str, Path], tmp_path: Path):  # type: ignore[no-untyped-def]
    def load(family: str, *overrides: str) -> Config:
        return load_config(bases[family], [f"output={tmp_path / 'run'}", *overrides])

    return load


def calls_of(pipeline: Any, prompt: str, **arguments: Any) -> list[tuple[dict[str, Any], torch.Tensor]]:
    """Return what the pipeline hands its network in one guided step, and what that predicts."""
    network = pipeline.transformer if hasattr(pipeline, "transformer") else pipeline.unet
    calls: list[tuple[dict[str, Any], torch.Tensor]] = []

    def remember(module: Any, given: Any, named: dict[str, Any], output: Any) -> None:
        names = ("hidden_states", "timestep") if hasattr(pipeline, "transformer") else ("sample", "timestep")
        calls.append(({**dict(zip(names, given, strict=False)), **named}, output[0]))

    handle = network.register_forward_hook(remember, with_kwargs=True)
    pipeline.set_progress_bar_config(disable=True)
    try:
        pipeline(prompt, num_inference_steps=1, guidance_scale=3.0, output_type="latent", **arguments)
    finally:
        handle.remove()
    return calls


@pytest.mark.parametrize("case", CASES)
def test_networks_are_called_as_in_the_pipeline(case: str, tmp_path: Path) -> None:
    family, changes = CASES[case]
    config = load_config(tiny.write_base(tmp_path, family, **changes), ["models.latent_shape=[4, 8, 8]"])
    pipeline = tiny.pipeline(family, **changes)
    prompt = "A red Apple"
    latents = torch.randn(1, *tiny.LATENT)
    extra = {"use_resolution_binning": False, "clean_caption": False} if family == "pixart" else {}
    call, expected = calls_of(pipeline, prompt, latents=latents, height=16, width=16, **extra)[0]

    encode, _ = load_text(config.models)
    whole = [encode.null(), encode([prompt])]  # the order of a guided call
    x_t = call["hidden_states"] if family == "pixart" else call["sample"]
    t = torch.full((2,), int(call["timestep"].flatten()[0]))
    both = Conditioning(("", prompt), _join(whole[0].tensors, whole[1].tensors))
    torch.testing.assert_close(both.tensors["encoder_hidden_states"], call["encoder_hidden_states"])
    if family == "pixart":
        assert torch.equal(both.tensors["encoder_attention_mask"], call["encoder_attention_mask"])
    else:
        assert "encoder_attention_mask" not in both.tensors
    for name, tensor in (call.get("added_cond_kwargs") or {}).items():
        if tensor is not None:
            torch.testing.assert_close(both.tensors["added_cond_kwargs"][name], tensor)
    denoiser = load_denoiser(config.models.reference.path).eval()
    torch.testing.assert_close(denoiser(x_t, t, both), expected[:, :4])
    assert (denoiser(x_t, t, both)[0] - denoiser(x_t, t, both)[1]).abs().max() > 1e-4, "the conditioning does nothing"


def _join(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _join(value, other[name]) if isinstance(value, dict) else torch.cat([value, other[name]])
        for name, value in one.items()
    }


def test_stable_diffusion_xl_takes_other_sizes(config_of) -> None:  # type: ignore[no-untyped-def]
    sizes = "models.size_conditions={original: [512, 384], crop: [1, 2], target: [64, 32]}"
    encode, _ = load_text(config_of("stable_diffusion_xl", sizes).models)
    assert encode(["a", "b"]).tensors["added_cond_kwargs"]["time_ids"].tolist() == [[512, 384, 1, 2, 64, 32]] * 2


@pytest.mark.parametrize("family", ["stable_diffusion", "stable_diffusion_xl", "pixart"])
def test_a_run_on_a_whole_pipeline(config_of, family: str) -> None:  # type: ignore[no-untyped-def]
    """With the memory savers on, in bfloat16, with guidance and a reward through the decoder."""
    config = config_of(family, "training.activation_checkpointing=true", "precision=bfloat16")
    trainer = Trainer(config)
    before = {name: weight.clone() for name, weight in trainer.generator.network.state_dict().items()}
    assert all(weight.dtype == torch.float32 for weight in before.values())
    assert trainer.run().step == 1
    after = trainer.generator.network.state_dict()
    changed = [name for name, weight in before.items() if not torch.equal(weight, after[name])]
    assert len(changed) > len(before) / 2
    assert all(weight.isfinite().all() for weight in after.values())
    exported = load_denoiser(str(Path(config.output) / "generator")).network
    assert type(exported) is type(trainer.generator.network)


def test_sections_default_to_the_subfolders_of_the_base(config_of, bases: dict[str, Path], tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    base = str(bases["stable_diffusion_xl"].parent / "base")
    models = config_of("stable_diffusion_xl").models
    assert models.text_encoder.path == f"{base}/text_encoder" and models.text_encoder.tokenizer == f"{base}/tokenizer"
    assert models.text_encoder_2 is not None and models.text_encoder_2.tokenizer == f"{base}/tokenizer_2"
    assert models.reference.path == f"{base}/unet" and models.scheduler.path == f"{base}/scheduler"
    assert models.generator.path is None and models.fake.path is None
    assert models.decoder is not None and models.decoder.path == f"{base}/vae"
    assert models.latent_shape == (4, 8, 8) and models.empty_prompt == "zeros"
    pixart = config_of("pixart").models
    assert pixart.reference.path.endswith("base/transformer") and pixart.text_encoder_2 is None
    assert pixart.empty_prompt == "auto"


def test_what_is_given_wins_over_the_base(config_of, bases: dict[str, Path], tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    config = config_of(
        "stable_diffusion",
        "models.text_encoder.dtype=bfloat16",
        "models.reference.path=./mine",
        "models.generator.timestep=399",
        "models.latent_shape=[4, 16, 8]",
        "rewards.optimised=null",
        "method.name=diff_instruct",
        "models.decoder=null",
        "training.grid_every=null",
    )
    base = bases["stable_diffusion"].parent / "base"
    models = config.models
    assert models.text_encoder.path == f"{base}/text_encoder" and models.text_encoder.dtype == "bfloat16"
    assert models.reference.path == str(Path("mine").absolute()) and models.generator.timestep == 399
    assert models.decoder is None and models.latent_shape == (4, 16, 8)
    written = tmp_path / "copy.yaml"
    written.write_text(dump_config(config))
    assert load_config(written) == config


def test_a_base_of_another_family_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "KandinskyPipeline"}))
    with pytest.raises(
        ConfigurationError, match=r"models.base .* is a KandinskyPipeline; known are StableDiffusionPipeline"
    ):
        load_config(bases["pixart"], [f"models.base={tmp_path}"])
    with pytest.raises(ConfigurationError, match=r"models.base .*no such folder"):
        load_config(bases["pixart"], ["models.base=./nowhere"])


def test_text_encoders_have_to_fit_the_network(config_of, bases: dict[str, Path]) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigurationError, match=r"needs models.text_encoder_2"):
        build_sampler(config_of("stable_diffusion_xl", "models.text_encoder_2=null"), CPU)
    second = f"models.text_encoder_2.path={bases['stable_diffusion_xl'].parent}/base/text_encoder_2"
    with pytest.raises(ConfigurationError, match=r"remove models.text_encoder_2"):
        build_sampler(config_of("stable_diffusion", second), CPU)
    wide = f"models.text_encoder.path={bases['stable_diffusion'].parent}/base/text_encoder"
    tokenizer = f"models.text_encoder.tokenizer={bases['stable_diffusion'].parent}/base/tokenizer"
    with pytest.raises(
        ConfigurationError, match=r"models.reference has 16 channels of text, models.text_encoder has 24"
    ):
        build_sampler(config_of("stable_diffusion_xl", wide, tokenizer), CPU)
    with pytest.raises(ConfigurationError, match="max_length must be equal"):
        build_sampler(config_of("stable_diffusion_xl", "models.text_encoder.max_length=20"), CPU)


def test_a_generator_from_a_single_file(config_of, bases: dict[str, Path], tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    released = tiny.sdxl_unet(seed=5).state_dict()
    half = {name: tensor.half() for name, tensor in released.items()}
    save_file(half, tmp_path / "one_step.safetensors")
    torch.save(half, tmp_path / "one_step.bin")
    random = torch.get_rng_state()
    for file in ("one_step.bin", "one_step.safetensors"):
        override = f"models.generator.path={tmp_path / file}"
        sampler = build_sampler(config_of("stable_diffusion_xl", override), CPU)
        assert torch.equal(torch.get_rng_state(), random)
        for name, tensor in sampler.trained.network.state_dict().items():
            assert tensor.dtype == torch.float32 and torch.equal(tensor, released[name].half().float())

    del released["conv_in.weight"]
    released["model.diffusion_model.out"] = torch.zeros(1)
    save_file(released, tmp_path / "one_step.safetensors")
    with pytest.raises(
        ConfigurationError, match=r"lacks 1 of \d+ tensors, e.g. conv_in.weight and has 1 .*diffusers' n"
    ):
        build_sampler(config_of("stable_diffusion_xl", override), CPU)
    torch.save({"G_ema": tiny.sdxl_unet()}, tmp_path / "object.pkl")
    (tmp_path / "cut.bin").write_bytes((tmp_path / "one_step.bin").read_bytes()[:-100])
    for name, said in (
        ("object.pkl", "holds more than tensors.*save_file"),
        ("cut.bin", "can't be read.*is it whole"),
        ("gone.safetensors", "no such file"),
    ):
        with pytest.raises(ConfigurationError, match=rf"models.generator.*{said}"):
            build_sampler(config_of("stable_diffusion_xl", f"models.generator.path={tmp_path / name}"), CPU)


def test_dtypes_that_overflow_are_refused(config_of, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigurationError, match=r"models.text_encoder.*t5 overflows in float16; use dtype bfloat16"):
        build_sampler(config_of("pixart", "models.text_encoder.dtype=float16"), CPU)
    tiny.vae(force_upcast=True).save_pretrained(tmp_path / "vae")
    overrides = (f"models.decoder.path={tmp_path / 'vae'}", "models.decoder.dtype=float16")
    with pytest.raises(ConfigurationError, match=r"models.decoder.*float16"):
        build_sampler(config_of("stable_diffusion_xl", *overrides), CPU)


def test_frozen_parts_keep_the_dtype_that_is_asked_for(config_of) -> None:  # type: ignore[no-untyped-def]
    keys = ("reference", "text_encoder", "decoder")
    run = build_run(
        config_of("pixart", *(f"models.{key}.dtype=bfloat16" for key in keys)), World.alone("cpu"), Phases(CPU)
    )
    encoded = run.sampler.encode(["a red apple"])
    assert encoded.tensors["encoder_hidden_states"].dtype == torch.float32
    assert next(run.sampler.encode.encoder.parameters()).dtype == torch.bfloat16  # type: ignore[attr-defined]
    assert {weight.dtype for weight in run.method.reference.parameters()} == {torch.bfloat16}  # type: ignore[attr-defined]
    assert next(run.sampler.trained.network.parameters()).dtype == torch.float32
    x_t, t = torch.randn(1, *tiny.LATENT), torch.tensor([500])
    half, whole = run.method.reference(x_t, t, encoded), run.method.fake(x_t, t, encoded)
    assert half.dtype == whole.dtype == torch.float32 and not torch.equal(half, whole)
    torch.testing.assert_close(half, whole, rtol=0.1, atol=0.1)
    assert run.sampler.decoder is not None and run.sampler.decoder(x_t).dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["stable_diffusion", "pixart"])
def test_networks_in_eval_mode_still_checkpoint(config_of, family: str) -> None:  # type: ignore[no-untyped-def]
    sampler = build_sampler(config_of(family, "training.activation_checkpointing=true"), CPU)
    network: Any = sampler.trained.network
    assert not network.training
    block = network.transformer_blocks[0] if family == "pixart" else network.down_blocks[0].resnets[0]
    calls = []
    block.register_forward_pre_hook(lambda *_: calls.append(1))
    latents = sampler.generator(torch.randn(1, *tiny.LATENT), sampler.encode(["a red apple"]))
    assert len(calls) == 1
    latents.sum().backward()
    assert len(calls) == 2


def test_fusing_and_attention_are_applied(config_of) -> None:  # type: ignore[no-untyped-def]
    from diffpp_fast.networks import AttentionProcessor, fusion_report

    fused = build_sampler(config_of("stable_diffusion", "training.attention=math"), CPU)
    plain = build_sampler(config_of("stable_diffusion", "training.fuse=false"), CPU)
    assert any(row.fused for row in fusion_report(fused.trained.network))
    assert not any(row.fused for row in fusion_report(plain.trained.network))
    processors: Any = fused.trained.network
    assert all(isinstance(kind, AttentionProcessor) for kind in processors.attn_processors.values())
    z = torch.randn(1, *tiny.LATENT)
    outputs = [sampler.generator(z, sampler.encode(["a red apple"])) for sampler in (fused, plain)]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigurationError, match=r"training\.attention"):
        build_sampler(config_of("stable_diffusion", "training.attention=flash_attn"), CPU)


@pytest.mark.slow
def test_networks_compile_in_place(config_of) -> None:  # type: ignore[no-untyped-def]
    compiled = build_sampler(config_of("stable_diffusion", "training.compile=true"), CPU)
    plain = build_sampler(config_of("stable_diffusion"), CPU)
    assert compiled.trained.network.state_dict().keys() == plain.trained.network.state_dict().keys()
    z = torch.randn(2, *tiny.LATENT)
    outputs = [sampler.generator(z, sampler.encode(["a", "b"])) for sampler in (compiled, plain)]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)


def test_a_hub_id_may_hold_a_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert pretrained_arguments("owner/name") == {"pretrained_model_name_or_path": "owner/name"}
    with_folder = {"pretrained_model_name_or_path": "owner/name", "subfolder": "unet/best"}
    assert pretrained_arguments("owner/name/unet/best") == with_folder
    (tmp_path / "config.json").write_text('{"sample_size": 64}')
    asked = []

    def download(repository: str, name: str, subfolder: str | None = None, **_: Any) -> str:
        asked.append((repository, name, subfolder))
        return str(tmp_path / "config.json")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert read_config("owner/name/unet") == {"sample_size": 64}
    assert asked == [("owner/name", "config.json", "unet")]


@pytest.mark.slow
def test_a_base_on_the_hub(bases: dict[str, Path], tmp_path: Path) -> None:
    """From a cache as huggingface_hub fills it, offline."""
    repository = tmp_path / "cache" / "models--owner--name"
    commit = "0a1b" * 10
    shutil.copytree(bases["stable_diffusion_xl"].parent / "base", repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    code = f"""
import torch
from diffpp_fast.training import load_config
from diffpp_fast.training.build import build_sampler
config = load_config({str(bases["stable_diffusion_xl"])!r}, ["models.base=owner/name"])
assert config.models.reference.path == "owner/name/unet"
sampler = build_sampler(config, torch.device("cpu"))
print(sampler.generator(torch.randn(1, 4, 8, 8), sampler.encode(["a red apple"])).shape)
"""
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=300)


#: As their makers have published them, and their sizes. All else is the constructor's default.
SDXL_UNET = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 128,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
TRUE_SIZES = {
    "Stable Diffusion 1.5": (
        {"_class_name": "UNet2DConditionModel", "cross_attention_dim": 768, "sample_size": 64},
        859_520_964,
    ),
    "Stable Diffusion 2.1": (
        {
            "_class_name": "UNet2DConditionModel",
            "cross_attention_dim": 1024,
            "sample_size": 96,
            "attention_head_dim": [5, 10, 20, 20],
            "use_linear_projection": True,
        },
        865_910_724,
    ),
    "Stable Diffusion XL": (SDXL_UNET, 2_567_463_684),
    "PixArt-alpha 512": (
        {"_class_name": "Transformer2DModel", "norm_type": "ada_norm_single", **{
            "activation_fn": "gelu-approximate", "attention_bias": True, "attention_head_dim": 72,
            "num_attention_heads": 16, "num_layers": 28, "in_channels": 4, "out_channels": 8, "patch_size": 2,
            "cross_attention_dim": 1152, "caption_channels": 4096, "sample_size": 64, "norm_elementwise_affine": False,
            "norm_eps": 1e-6, "num_embeds_ada_norm": 1000,
        }},
        610_856_096,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TRUE_SIZES)
def test_true_architectures_take_their_conditioning(name: str) -> None:
    config, size = TRUE_SIZES[name]
    with torch.device("meta"):
        network: Any = build_network(config, name)
        assert sum(weight.numel() for weight in network.parameters()) == size
        length, width = (120, 4096) if name.startswith("PixArt") else (77, config["cross_attention_dim"])
        tensors: dict[str, Any] = {"encoder_hidden_states": torch.empty(2, length, width)}
        if name.startswith("PixArt"):
            tensors["encoder_attention_mask"] = torch.ones(2, length, dtype=torch.int64)
        if name.endswith("XL"):
            tensors["added_cond_kwargs"] = {"text_embeds": torch.empty(2, 1280), "time_ids": torch.empty(2, 6)}
        side = config["sample_size"]
        x_t, t = torch.empty(2, 4, side, side), torch.zeros(2, dtype=torch.int64)
        assert Denoiser(network.eval())(x_t, t, Conditioning(("a", "b"), tensors)).shape == x_t.shape


def test_prompts_that_are_too_long_are_cut_with_a_warning(config_of, caplog: pytest.LogCaptureFixture) -> None:  # type: ignore[no-untyped-def]
    encode, _ = load_text(config_of("stable_diffusion_xl").models)
    with caplog.at_level(logging.WARNING):
        assert encode(["apple " * 40]).tensors["encoder_hidden_states"].shape == (1, 77, 16)
    assert "1 of 1 prompts cut to 77 tokens" in caplog.text


def test_configurations_of_a_base_name_what_is_wrong(bases: dict[str, Path]) -> None:
    with pytest.raises(ConfigurationError, match=r"unknown key models.generator.lora.rang: did you mean .*rank"):
        load_config(bases["pixart"], ["models.generator.lora.rang=3"])
    fake = yaml.safe_load(dump_config(load_config(bases["pixart"])))["models"]["fake"]
    assert fake == dict.fromkeys(("path", "variant", "state_dict", "lora", "initial_lora", "guidance_embedding"))
