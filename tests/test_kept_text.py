"""Projections of one prompt that are kept: exact, and computed again where anything has changed."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from torch import nn

from diffpp_fast.methods.through_networks import gradient_through
from diffpp_fast.networks import Denoiser, freeze, fuse
from diffpp_fast.networks.kept_text import keep_text
from diffpp_fast.training import load_config
from diffpp_fast.training.build import build_run
from diffpp_fast.training.distributed import World
from diffpp_fast.training.phases import Phases

CPU = torch.device("cpu")


def built(build: Any) -> Any:
    network = build().eval().requires_grad_(False)
    if build is tiny.pixart:
        nn.init.normal_(network.proj_out.weight, std=0.3)
    fuse(network)
    return network


def inputs(build: Any, count: int = 3) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Samples with one prompt, expanded."""
    torch.manual_seed(0)
    tensors: dict[str, Any] = {"encoder_hidden_states": torch.randn(1, 5, tiny.TEXT_WIDTH).expand(count, -1, -1)}
    if build is tiny.sdxl_unet:
        pooled = torch.randn(count, tiny.TEXT_WIDTH)
        tensors["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": torch.ones(count, 6)}
    return torch.randn(count, *tiny.LATENT), torch.arange(count), tensors


def projections(network: nn.Module) -> list[int]:
    """Notes the rows of every text that a layer really projects."""
    rows: list[int] = []
    plain = torch.nn.functional.linear
    layer: Any = next(part for name, part in network.named_modules() if name.endswith("attn2.to_k"))

    def linear(text: torch.Tensor, weight: torch.Tensor, *rest: Any) -> torch.Tensor:
        if weight is layer.weight:
            rows.append(len(text))
        return plain(text, weight, *rest)

    torch.nn.functional.linear = linear  # type: ignore[assignment]
    return rows


@pytest.fixture(autouse=True)
def restored() -> Any:
    plain = torch.nn.functional.linear
    yield
    torch.nn.functional.linear = plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("build", [tiny.unet, tiny.sdxl_unet, tiny.pixart])
def test_the_prediction_is_the_same_and_text_is_projected_once(build: Any, dtype: torch.dtype) -> None:
    network = nn.Module.to(built(build), dtype)
    denoise, given = Denoiser(network, dtype=None if dtype == torch.float32 else dtype), inputs(build)
    names, expected = set(network.state_dict()), denoise(*given)
    found = keep_text(network)
    assert found == keep_text(network) > 0 and set(network.state_dict()) == names
    rows = projections(network)
    for _ in range(3):
        torch.testing.assert_close(denoise(*given), expected, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-2)
    assert rows == [1]


def test_what_has_changed_is_projected_again() -> None:
    network = built(tiny.unet)
    denoise, (x, t, tensors) = Denoiser(network), inputs(tiny.unet)
    keep_text(network)
    rows, text = projections(network), tensors["encoder_hidden_states"]
    first = denoise(x, t, tensors)
    with torch.no_grad():
        text[:1].add_(1.0)
        changed = denoise(x, t, tensors)
        assert not torch.equal(changed, first)
        assert torch.equal(denoise(x, t, {"encoder_hidden_states": text[:1].clone().expand(3, -1, -1)}), changed)
        network.load_state_dict({name: 1.1 * tensor for name, tensor in network.state_dict().items()})
        again = denoise(x, t, tensors)
        with torch.autocast("cpu", torch.bfloat16):
            denoise(x, t, tensors)
    assert rows == [1] * 5
    # Other samples' prompts, one sample alone, and weights that are trained go the usual way.
    denoise(x, t, {"encoder_hidden_states": text.clone()})
    denoise(x[:1], t[:1], {"encoder_hidden_states": text[:1]})
    network.requires_grad_(True)
    torch.testing.assert_close(denoise(x, t, tensors), again)
    assert rows == [1] * 5 + [3, 1, 3]


def test_gradients_by_the_samples_go_through() -> None:
    gradients = []
    for kept in (False, True):
        network = built(tiny.unet)
        freeze(network)
        if kept:
            keep_text(network)
        x, t, tensors = inputs(tiny.unet)
        denoise = Denoiser(network)
        for _ in range(2):
            _, gradient = gradient_through([denoise], lambda x: denoise(x, t, tensors).flatten(1).sum(1), x)  # noqa: B023
        gradients.append(gradient)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("overrides", "kept"), [((), True), (("models.fake.lora.rank=2",), False)])
def test_a_run_keeps_the_frozen_references(tmp_path: Any, overrides: tuple[str, ...], kept: bool) -> None:
    base = tiny.write_base(tmp_path, "stable_diffusion")
    run = build_run(load_config(base, [f"output={tmp_path / 'run'}", *overrides]), World.alone("cpu"), Phases(CPU))
    kinds = {
        role: {hasattr(part, "kept") for name, part in network.named_modules() if name.endswith("attn2.to_k")}
        for role, network in (("reference", run.reference), ("generator", run.sampler.trained.network))
    }
    assert kinds["reference"] == {kept} and kinds["generator"] == {False}
