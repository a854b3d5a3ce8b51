"""LoRA files as diffusers, kohya's scripts and ComfyUI read them, on the true architectures with narrow layers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from diffpp_fast.networks.lora_formats import LoraFormat, LoraTarget, LowRank, is_carried, write_lora

#: The architectures' own blocks, and nothing of their width.
NARROW = {"norm_num_groups": 4, "attention_head_dim": 4, "cross_attention_dim": 12, "layers_per_block": 2}
SD15: dict[str, Any] = {
    "block_out_channels": (8, 8, 12, 12),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    **NARROW,
}
SDXL: dict[str, Any] = {
    "block_out_channels": (8, 8, 12),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    **NARROW,
}
NETWORKS = {
    "sd15": lambda: tiny.unet(**SD15),
    "sdxl": lambda: tiny.sdxl_unet(**SDXL),
    "pixart": tiny.pixart,
}


def updates_of(network: nn.Module, kind: LoraFormat = "diffusers") -> dict[str, LowRank]:
    """An update of every layer that a format carries: of other ranks in some, with an alpha that is not the rank."""
    torch.manual_seed(3)
    updates = {}
    for number, (name, layer) in enumerate(network.named_modules()):
        if isinstance(layer, nn.Linear | nn.Conv2d) and is_carried(kind, name):
            rank, alpha = (2, 3.0) if number % 3 else (3, 7.5)
            shape = layer.weight.shape
            ones = [1] * (len(shape) - 2)
            down, up = torch.randn(rank, *shape[1:]), torch.randn(shape[0], rank, *ones)
            updates[name] = LowRank(down, up, alpha)
    return updates


def changed(network: nn.Module, updates: Mapping[str, LowRank]) -> dict[str, Tensor]:
    """The weights that the updates make of the network's."""
    weights = {name: weight.detach().clone() for name, weight in network.state_dict().items()}
    for layer, update in updates.items():
        product = (update.up.flatten(1) @ update.down.flatten(1)).view_as(weights[f"{layer}.weight"])
        weights[f"{layer}.weight"] += update.alpha / update.rank * product
    return weights


def written(folder: Path, kind: LoraFormat, network: nn.Module, **options: Any) -> Path:
    write_lora(
        folder,
        kind,
        updates_of(network, kind),
        LoraTarget.of(network),
        prediction_type="epsilon",
        name="lora",
        **options,
    )
    (file,) = folder.glob("*.safetensors")
    return file


@pytest.mark.parametrize("kind", ["diffusers", "kohya", "comfyui"])
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_diffusers_loads_what_was_written(family: str, kind: LoraFormat, tmp_path: Path) -> None:
    """All layers, through the pipelines' own loader and converters."""
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    network: Any = NETWORKS[family]()
    expected = changed(network, updates_of(network, kind))
    file = written(tmp_path, kind, network)
    loader: Any = StableDiffusionXLPipeline if family == "sdxl" else StableDiffusionPipeline
    told = {"unet_config": network.config} if family == "sdxl" else {}  # as their load_lora_weights do
    state, alphas, metadata = loader.lora_state_dict(tmp_path, weight_name=file.name, return_lora_metadata=True, **told)
    network.load_lora_adapter(
        state, prefix="unet", network_alphas=alphas, metadata=metadata if kind == "diffusers" else None
    )
    network.fuse_lora()
    network.unload_lora()
    loaded = network.state_dict()
    wrong = [name for name, weight in expected.items() if not torch.allclose(loaded[name], weight, atol=1e-4)]
    assert not wrong, (len(wrong), list(alphas)[:3] if alphas else None, list(state)[:3])
