"""Released one-step generators: files with the keys, dtypes and nesting of their sources, at random weights."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import save_file
from torch import Tensor

from diffpp_fast.networks import load_denoiser
from diffpp_fast.training import load_config
from diffpp_fast.training.build import build_sampler

CPU = torch.device("cpu")


def by_authors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A PixArt network's weights as its authors' code has them: their layout, written from that code's modules."""
    state = dict(state)
    made: dict[str, Tensor] = {}

    def move(new: str, *old: str) -> None:
        for kind in ("weight", "bias"):
            made[f"{new}.{kind}"] = torch.cat([state.pop(f"{name}.{kind}") for name in old])

    move("x_embedder.proj", "pos_embed.proj")
    move("y_embedder.y_proj.fc1", "caption_projection.linear_1")
    move("y_embedder.y_proj.fc2", "caption_projection.linear_2")
    move("t_embedder.mlp.0", "adaln_single.emb.timestep_embedder.linear_1")
    move("t_embedder.mlp.2", "adaln_single.emb.timestep_embedder.linear_2")
    move("t_block.1", "adaln_single.linear")
    move("final_layer.linear", "proj_out")
    made["final_layer.scale_shift_table"] = state.pop("scale_shift_table")
    for number in range(2):
        old, new = f"transformer_blocks.{number}", f"blocks.{number}"
        made[f"{new}.scale_shift_table"] = state.pop(f"{old}.scale_shift_table")
        move(f"{new}.attn.qkv", *(f"{old}.attn1.to_{part}" for part in "qkv"))
        move(f"{new}.attn.proj", f"{old}.attn1.to_out.0")
        move(f"{new}.cross_attn.q_linear", f"{old}.attn2.to_q")
        move(f"{new}.cross_attn.kv_linear", f"{old}.attn2.to_k", f"{old}.attn2.to_v")
        move(f"{new}.cross_attn.proj", f"{old}.attn2.to_out.0")
        move(f"{new}.mlp.fc1", f"{old}.ff.net.0.proj")
        move(f"{new}.mlp.fc2", f"{old}.ff.net.2")
    assert not state, "all of the network is there"
    made["pos_embed"] = torch.zeros(1, 16, 16)
    made["y_embedder.y_embedding"] = torch.zeros(120, 16)
    return made


@pytest.mark.parametrize("other", [False, True])
def test_sims_pixart_by_its_authors_names(other: bool, tmp_path: Path) -> None:
    """`{"ema": ...}` with `module.model.` in front of every name, and the table `u` of the module around it."""
    network: Any = tiny.pixart(seed=4)
    network.save_pretrained(tmp_path / "base")
    state = {f"module.model.{name}": tensor for name, tensor in by_authors(network.state_dict()).items()}
    content: dict[str, Any] = {"ema": state | {"module.u": torch.rand(1001)}}
    if other:
        content["net"] = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    torch.save(content, tmp_path / "sim.pth")
    chosen = "ema" if other else None
    loaded = load_denoiser(str(tmp_path / "sim.pth"), configuration=str(tmp_path / "base"), state_dict=chosen).network
    for name, tensor in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_sims_weights_of_another_width_or_not_whole_are_named(tmp_path: Path) -> None:
    network: Any = tiny.pixart()
    network.save_pretrained(tmp_path / "base")
    state = by_authors(network.state_dict())
    for edit, said in (
        ({"blocks.0.attn.qkv.weight": torch.zeros(30, 16)}, r"attn1.to_k.weight has shape \[10, 16\]"),
        ({"blocks.0.attn.extra": torch.zeros(3)}, "does not know, e.g. blocks.0.attn.extra"),
    ):
        save_file(state | edit, tmp_path / "sim.safetensors")
        with pytest.raises(ValueError, match=said):
            load_denoiser(str(tmp_path / "sim.safetensors"), configuration=str(tmp_path / "base"))


def test_sims_call_is_that_of_the_table() -> None:
    """Its `round_sigma` of 2.5 in PixArt's schedule is timestep 440, and what it feeds the network sigma z."""
    betas = torch.linspace(0.0001, 0.02, 1000, dtype=torch.float64)
    levels = torch.zeros(1001, dtype=torch.float64)
    for j in range(1000, 0, -1):
        beta = 0.02 + (0.0001 - 0.02) * j / 1000
        levels[j - 1] = ((levels[j] ** 2 + 1) / (1 - beta) - 1).sqrt()
    timestep = 1000 - 1 - int((levels - 2.5).abs().argmin())
    sigma = (1 - torch.cumprod(1 - betas, 0)).sqrt()[440]
    assert timestep == 440
    assert sigma.item() == pytest.approx(2.5 / (2.5**2 + 1) ** 0.5, rel=2e-4)


def test_sid_lsgs_pickle_is_refused_with_the_way_out(tmp_path: Path) -> None:
    """`pickle.dump(dict(ema=UNet))`, which only its own code can read."""
    network: Any = tiny.unet()
    network.save_pretrained(tmp_path / "base")
    for protocol in (2, pickle.HIGHEST_PROTOCOL):
        (tmp_path / "sid.pkl").write_bytes(pickle.dumps({"ema": network}, protocol))
        with pytest.raises(ValueError, match=r"holds more than tensors.*state dict once with .*save_file"):
            load_denoiser(str(tmp_path / "sid.pkl"), configuration=str(tmp_path / "base"))


@pytest.mark.parametrize(
    ("inside", "variant"),
    [("dipp_1step/unet", "fp16"), ("didr_sdxl_1step_unet_fp16.safetensors", None)],
)
def test_the_authors_own_of_sdxl(inside: str, variant: str | None, tmp_path: Path) -> None:
    """A pipeline's folder in half precision, also without its config.json, and a bare file of a UNet."""
    base = tiny.write_base(tmp_path, "stable_diffusion_xl")
    released: Any = tiny.sdxl_unet(seed=5).half()
    place = tmp_path / inside
    if variant is None:
        save_file(released.state_dict(), place)
        paths = [f"models.generator.path={place}"]
    else:
        released.save_pretrained(place, variant=variant)
        paths = [f"models.generator.path={place}", f"models.generator.variant={variant}"]
    file = place if variant is None else place / "diffusion_pytorch_model.fp16.safetensors"
    for overrides in (paths, [f"models.generator.path={file}"]):
        sampler = build_sampler(
            load_config(base, [*overrides, "models.generator.timestep=399", "models.generator.input_scale=1.0"]), CPU
        )
        assert sampler.generator.timestep == 399
        for name, tensor in sampler.trained.network.state_dict().items():
            assert tensor.dtype == torch.float32 and torch.equal(tensor, released.state_dict()[name].float())


def test_the_times_of_few_step_generators_are_those_of_their_schedulers() -> None:
    """As docs/models.md has them: diffusers' sigmas, in thousandths, and 999 in place of 1."""
    from diffusers import EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

    def times(steps: int, **settings: Any) -> list[int]:
        lowest, mu, given = (settings.pop(key, None) for key in ("lowest", "mu", "given"))
        scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=mu is not None, **settings)
        scheduler.sigma_min = scheduler.sigma_min if lowest is None else lowest
        scheduler.set_timesteps(steps, sigmas=given, mu=mu)
        return [min(round(1000 * float(sigma)), 999) for sigma in scheduler.sigmas]

    quarters = [1.0, 0.75, 0.5, 0.25]
    euler = EulerDiscreteScheduler(timestep_spacing="trailing")
    euler.set_timesteps(4)
    page = " ".join((Path(__file__).parents[1] / "docs" / "models.md").read_text().split())
    for name, found in (
        ("`sigma`)", [int(time) for time in euler.timesteps]),
        ("FLUX.1-schnell", times(4, given=quarters)[:4]),
        # Its pipeline's mu for 4 steps of 4096 tokens.
        ("FLUX.2-klein-4B", times(4, given=quarters, mu=2.2912)[:4]),
        ("3.5 large turbo", times(4, shift=3.0)[:4]),
        # Its pipeline begins with sigma_min = 0, so that the last of nine calls changes nothing.
        ("Z-Image-Turbo", times(9, shift=3.0, lowest=0.0)[:8]),
    ):
        assert f"{name} {', '.join(map(str, found))}" in page, (name, found)
