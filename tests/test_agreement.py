"""Parts of a run that don't fit together are refused by their configurations alone: no weight is there to be read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from diffpp_fast.cli.main import main
from diffpp_fast.networks import Denoiser, fuse
from diffpp_fast.training import ConfigurationError, load_config
from diffpp_fast.training.build.agreement import refuse_misfits
from diffpp_fast.training.build.networks import refuse_weights

Edit = Callable[[Path], Any]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Whole pipelines without one byte of weights."""
    found = {}
    for family in ("stable_diffusion", "stable_diffusion_xl", "pixart"):
        found[family] = tiny.write_base(tmp_path_factory.mktemp(family), family)
        for weights in found[family].parent.rglob("*.safetensors"):
            weights.unlink()
    return found


@pytest.fixture
def project(bases: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    def copy(family: str) -> Path:
        shutil.copytree(bases[family].parent, tmp_path / family)
        return tmp_path / family / "align.yaml"

    return copy


def edit(part: str, **changes: Any) -> Edit:
    """Changes keys of a part's configuration."""

    def change(base: Path) -> None:
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        file = base / part / name
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


def nothing(_: Path) -> None:
    """Leaves a base as it is."""


CASES: dict[str, tuple[str, Edit, tuple[str, ...], str]] = {
    "fits": ("stable_diffusion", nothing, (), ""),
    "fits XL": ("stable_diffusion_xl", nothing, (), ""),
    "fits PixArt": ("pixart", nothing, ("models.text_encoder.max_length=500",), ""),
    "LCM": ("stable_diffusion", edit("unet", time_cond_proj_dim=256), (), "time_cond_proj_dim=256 is told the"),
    "class labels": ("stable_diffusion", edit("unet", num_class_embeds=10), (), "num_class_embeds=10 takes class"),
    "projected labels": ("stable_diffusion", edit("unet", class_embed_type="projection"), (), "class_embed_type='proj"),
    "pictures": ("stable_diffusion", edit("unet", addition_embed_type="image"), (), "addition_embed_type='image' "),
    "IP": ("stable_diffusion", edit("unet", encoder_hid_dim_type="ip_image_proj"), (), "takes pictures' embeddings"),
    "inpainting": ("stable_diffusion", edit("unet", in_channels=9), ("models.latent_shape=[4,8,8]",), "inpainting"),
    "inpainting of a base": ("stable_diffusion", edit("unet", in_channels=9), (), "for inpainting"),
    "ip2p": ("stable_diffusion", edit("unet", in_channels=8), (), "for InstructPix2Pix"),
    "depth": ("stable_diffusion", edit("unet", in_channels=5), (), "for depth to image"),
    "channels": ("stable_diffusion", nothing, ("models.latent_shape=[16, 8, 8]",),
                 "models.reference has 4 input channels, models.latent_shape has 16"),
    "ControlNet": ("stable_diffusion", edit("unet", _class_name="ControlNetModel"), (), "takes controlnet_cond"),
    "T2I": ("stable_diffusion", edit("unet", _class_name="T2IAdapter"), (), "T2IAdapter is no denoiser"),
    "video": ("stable_diffusion", edit("unet", _class_name="UNet3DConditionModel"), (), "for video or sound"),
    "VAE as reference": ("stable_diffusion", nothing, ("models.reference.path=BASE/vae",), "KL is no denoiser"),
    "text as reference": ("stable_diffusion", nothing, ("models.reference.path=BASE/text_encoder",),
                          r"models\.reference.*clip_text_model of transformers, not a network"),
    "UNet as decoder": ("stable_diffusion", nothing, ("models.decoder.path=BASE/unet",),
                        r"models\.decoder .* is a UNet2DConditionModel; a decoder is one of AutoencoderKL"),
    "decoder's channels": ("stable_diffusion", edit("vae", latent_channels=16), (),
                           "models.decoder has 16 latent channels, models.latent_shape has 4"),
    "no scaling": ("stable_diffusion", edit("vae", scaling_factor=None), (), "has no scaling_factor"),
    "UNet as text": ("stable_diffusion", nothing, ("models.text_encoder.path=BASE/unet",),
                     r"models\.text_encoder.*no text encoder of transformers but a UNet2DConditionModel"),
    "vision as text": ("stable_diffusion", edit("text_encoder", model_type="clip_vision_model"), (), "encodes no text"),
    "positions": ("stable_diffusion", nothing, ("models.text_encoder.max_length=78",),
                  r"text_encoder\.max_length is 78, but .* has 77 positions"),
    "positions by default": ("stable_diffusion", edit("text_encoder", max_position_embeddings=32), (),
                             r"max_length is left open, which is 77, but .* has 32 positions"),
    "width": ("stable_diffusion", edit("unet", cross_attention_dim=32), (),
              "models.reference has 32 channels of text, models.text_encoder has 16"),
    "two encoders": ("stable_diffusion_xl", nothing, ("models.text_encoder_2=null",), "needs models.text_encoder_2"),
    "pooled": ("stable_diffusion_xl", edit("unet", projection_class_embeddings_input_dim=48), (),
               "models.reference has 24 channels of pooled text, models.text_encoder_2 has 16"),
    "no projection": ("stable_diffusion_xl", edit("text_encoder_2", architectures=["CLIPTextModel"]), (),
                      r"text_encoder_2 .* is a CLIPTextModel: .*CLIPTextModelWithProjection"),
    "no CLIP": ("stable_diffusion_xl", edit("text_encoder", model_type="t5"), (), "Stable Diffusion XL has two CLIPs"),
    "captions": ("pixart", edit("transformer", caption_channels=32), (), "has 32 channels of text"),
    "patches": ("pixart", nothing, ("models.latent_shape=[4, 7, 8]",),
                "the height is 7, but models.reference cuts latents into patches of 2: take a multiple, 6 or 8"),
    "patches across": ("pixart", nothing, ("models.latent_shape=[4, 8, 9]",), "the width is 9.* 8 or 10"),
    "DiT": ("pixart", edit("transformer", _class_name="Transformer2DModel", norm_type="layer_norm"), (), "no PixArt"),
    "guidance embedding": ("pixart", edit("transformer", _class_name="SanaTransformer2DModel", guidance_embeds=True),
                           (), "guidance_embeds=True is told the guidance scale"),
    "flow": ("pixart", edit("transformer", _class_name="SanaTransformer2DModel", in_channels=4, out_channels=4), (),
             "trained by flow matching: give its own scheduler"),
    "a file as reference": ("stable_diffusion", nothing,
                            ("models.reference.path=BASE/x.pt", "models.latent_shape=[4, 8, 8]"), "must be a folder"),
    "scheduler": ("stable_diffusion", edit("scheduler", beta_schedule=None), (), "scheduler.*lacks beta_schedule"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_parts_fit_or_are_refused(project, case: str) -> None:  # type: ignore[no-untyped-def]
    family, change, overrides, said = CASES[case]
    file = project(family)
    change(file.parent / "base")
    given = [override.replace("BASE", str(file.parent / "base")) for override in overrides]
    if not said:
        refuse_misfits(load_config(file, given))
        return
    with pytest.raises(ConfigurationError, match=said):
        refuse_misfits(load_config(file, given))


def test_a_roles_own_network_is_conditioned_like_the_reference(project, bases: dict[str, Path]) -> None:  # type: ignore[no-untyped-def]
    other = bases["stable_diffusion_xl"].parent / "base" / "unet"
    with pytest.raises(ConfigurationError, match=r"models\.generator and models\.reference are of two families"):
        refuse_misfits(load_config(project("stable_diffusion"), [f"models.generator.path={other}"]))


def test_a_decoder_of_other_latents_is_refused(project, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    file = project("stable_diffusion")
    shutil.copytree(file.parent / "base" / "vae", tmp_path / "vae")
    override = [f"models.decoder.path={tmp_path / 'vae'}"]
    refuse_misfits(load_config(file, override))
    edit("vae", scaling_factor=0.13025)(tmp_path)
    with pytest.raises(ConfigurationError, match=r"scaling_factor 0\.13025, the vae of models\.base has 0\.18215"):
        refuse_misfits(load_config(file, override))


def test_plans_and_dry_runs_refuse_too(project, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    file = project("stable_diffusion")
    edit("unet", time_cond_proj_dim=256)(file.parent / "base")
    for arguments in (["train", str(file), "--dry-run"], ["plan", str(file)], ["train", str(file)]):
        assert main([*arguments, f"output={tmp_path / 'run'}"]) == 2
        assert "models.reference" in (said := capsys.readouterr().err) and "time_cond_proj_dim=256" in said
    assert not (tmp_path / "run").exists()


def test_a_dry_run_looks_at_the_weights_that_are_there(project, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    file = project("stable_diffusion")
    (file.parent / "base" / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    assert main(["train", str(file), "--dry-run"]) == 2
    assert "models.decoder" in (said := capsys.readouterr().err) and "is empty" in said
    assert main(["train", str(project("pixart")), "--dry-run", "models.generator.path=gone.safetensors"]) == 2
    assert "models.generator" in (said := capsys.readouterr().err) and "no such file" in said


@pytest.mark.parametrize("name", ["x" * 300, "a/" + "x" * 300, "align.yaml"])
@pytest.mark.parametrize("key", ["reference", "generator", "scheduler", "decoder", "text_encoder"])
def test_paths_that_can_not_be_are_blamed_on_their_key(project, key: str, name: str) -> None:  # type: ignore[no-untyped-def]
    overrides = [f"models.{key}.path={name}", "models.latent_shape=[4, 8, 8]"]
    with pytest.raises(ConfigurationError, match=rf"models\.{key}\b"):
        refuse_misfits(load_config(project("stable_diffusion"), overrides))


def test_a_file_that_can_not_be_is_blamed_on_its_key(project) -> None:  # type: ignore[no-untyped-def]
    long = load_config(project("pixart"), [f"models.generator.path={'x' * 300}.safetensors"])
    with pytest.raises(ConfigurationError, match=r"models\.generator.*too long"):
        refuse_weights(long)


@pytest.mark.parametrize("build", [tiny.unet, tiny.sdxl_unet])
def test_a_unet_takes_latents_that_its_levels_do_not_divide(build: Callable[[], Any]) -> None:
    """diffusers brings the levels together again, and fused blocks do, too: there is nothing to refuse."""
    network, t = build().eval(), torch.tensor([3, 800])
    conditions: dict[str, Any] = {"encoder_hidden_states": torch.randn(2, 5, tiny.TEXT_WIDTH)}
    if build is tiny.sdxl_unet:
        conditions["added_cond_kwargs"] = {"text_embeds": torch.randn(2, tiny.TEXT_WIDTH), "time_ids": torch.ones(2, 6)}
    x_t = torch.randn(2, 4, 9, 7)
    expected = Denoiser(network)(x_t, t, conditions)
    fuse(network)
    torch.testing.assert_close(Denoiser(network)(x_t, t, conditions), expected)
