"""LoRA files as diffusers, kohya's scripts and ComfyUI read them, on the true architectures with narrow layers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from diffpp_fast.networks.lora_formats import (
    FORMATS,
    LoraFormat,
    LoraTarget,
    LowRank,
    is_carried,
    refuse_format,
    write_lora,
)
from diffpp_fast.networks.low_rank import approximate, rank_of

#: The architectures' own blocks, and nothing of their width.
NARROW = {"norm_num_groups": 4, "attention_head_dim": 4, "cross_attention_dim": 12, "layers_per_block": 2}
SD15: dict[str, Any] = {
    "block_out_channels": (8, 12, 16, 16),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    **NARROW,
}
SDXL: dict[str, Any] = {
    "block_out_channels": (8, 12, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    **NARROW,
}
NETWORKS: dict[str, Callable[[], Any]] = {
    "sd15": lambda: tiny.unet(**SD15),
    "sdxl": lambda: tiny.sdxl_unet(**SDXL),
    "pixart": tiny.pixart,
}
#: What kohya's sd-scripts make LoRA modules in: whatever is linear or a convolution there, and nothing else.
KOHYA_PARTS = {"Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D"}


def updates_of(network: nn.Module, kind: LoraFormat = "diffusers") -> dict[str, LowRank]:
    """An update of every layer that a format carries: of other ranks in some, with an alpha that is not the rank."""
    torch.manual_seed(3)
    updates, target = {}, LoraTarget.of(network)
    for number, (name, layer) in enumerate(network.named_modules()):
        grouped = getattr(layer, "groups", 1) != 1
        if isinstance(layer, nn.Linear | nn.Conv2d) and not grouped and is_carried(kind, name, target):
            rank, alpha = (2, 3.0) if number % 3 else (3, 7.5)
            shape = layer.weight.shape
            ones = [1] * (len(shape) - 2)
            down, up = torch.randn(rank, *shape[1:]), torch.randn(shape[0], rank, *ones)
            updates[name] = LowRank(down, up, alpha)
    return updates


def changes_of(network: nn.Module, updates: Mapping[str, LowRank]) -> dict[str, Tensor]:
    return {
        layer: update.alpha / update.rank * (update.up.flatten(1) @ update.down.flatten(1))
        for layer, update in updates.items()
    }


def write(target: Path, kind: LoraFormat, network: Any, **options: Any) -> Path:
    options = {"prediction_type": "epsilon", "name": "lora", **options}
    write_lora(target, kind, updates_of(network, kind), LoraTarget.of(network), **options)
    (file,) = target.glob("*.safetensors")
    return file


def folder(parent: Path, name: str) -> Path:
    (parent / name).mkdir()
    return parent / name


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_diffusers_loads_what_was_written(family: str, kind: LoraFormat, tmp_path: Path) -> None:
    """All layers, through the pipelines' own loader and converters."""
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    network = NETWORKS[family]()
    before = {name: weight.clone() for name, weight in network.state_dict().items()}
    changes = changes_of(network, updates_of(network, kind))
    file = write(tmp_path, kind, network)
    loader: Any = StableDiffusionXLPipeline if family == "sdxl" else StableDiffusionPipeline
    told = {"unet_config": network.config} if family == "sdxl" else {}  # as their load_lora_weights do
    state, alphas, metadata = loader.lora_state_dict(tmp_path, weight_name=file.name, return_lora_metadata=True, **told)
    network.load_lora_adapter(
        state, prefix="unet", network_alphas=alphas, metadata=metadata if kind == "diffusers" else None
    )
    network.fuse_lora()
    network.unload_lora()
    loaded = network.state_dict()
    for layer, change in changes.items():
        name = f"{layer}.weight"
        torch.testing.assert_close((loaded[name] - before[name]).flatten(1), change, rtol=1e-4, atol=1e-4, msg=name)
    assert len(changes) > 200 and changes.keys() == updates_of(network, kind).keys()


@pytest.mark.parametrize("family", NETWORKS)
def test_a_reader_of_alpha_and_of_names_gets_the_same(family: str, tmp_path: Path) -> None:
    """ComfyUI's rule: for every name that it knows, alpha / rank B A with the alpha beside it, else B A."""
    network = NETWORKS[family]()
    changes = changes_of(network, updates_of(network, "comfyui"))
    tensors = load_file(write(tmp_path, "comfyui", network))
    ends = ("lora_A", "lora_B") if family == "pixart" else ("lora_down", "lora_up")
    own = {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}
    for layer, change in changes.items():
        known = f"transformer.{layer}" if family == "pixart" else "lora_unet_" + own.get(layer, layer).replace(".", "_")
        down, up = (tensors.pop(f"{known}.{end}.weight").flatten(1) for end in ends)
        alpha = tensors.pop(f"{known}.alpha").item()
        torch.testing.assert_close(alpha / len(down) * (up @ down), change, rtol=1e-4, atol=1e-4)
    assert not tensors


@pytest.mark.parametrize("family", NETWORKS)
def test_diffusers_files_need_no_alpha(family: str, tmp_path: Path) -> None:
    """Who reads neither metadata nor an adapter's configuration computes with alpha as the rank."""
    network = NETWORKS[family]()
    changes = changes_of(network, updates_of(network))
    tensors = load_file(write(tmp_path, "diffusers", network))
    prefix = "base_model.model" if family == "pixart" else "unet"
    for layer, change in changes.items():
        down, up = (tensors.pop(f"{prefix}.{layer}.lora_{side}.weight").flatten(1) for side in "AB")
        torch.testing.assert_close(up @ down, change, rtol=1e-4, atol=1e-4)
    assert not tensors


def test_peft_loads_a_transformers_updates(tmp_path: Path) -> None:
    from peft import PeftModel

    network = tiny.pixart()
    before = {name: weight.clone() for name, weight in network.state_dict().items()}
    write(tmp_path, "diffusers", network)
    merged = PeftModel.from_pretrained(network, tmp_path).merge_and_unload().state_dict()
    for layer, change in changes_of(network, updates_of(network)).items():
        name = f"{layer}.weight"
        torch.testing.assert_close((merged[name] - before[name]).flatten(1), change, rtol=1e-4, atol=1e-4)


def test_kohyas_names_of_stable_diffusion_1_are_those_of_its_modules(tmp_path: Path) -> None:
    network = NETWORKS["sd15"]()
    with torch.device("meta"):
        wide = tiny.unet(**SD15 | {"block_out_channels": (320, 640, 1280, 1280), "norm_num_groups": 32})
    expected = {
        f"lora_unet_{outer}.{inner}".replace(".", "_")
        for outer, part in wide.named_modules()
        if type(part).__name__ in KOHYA_PARTS
        for inner, layer in part.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    }
    names = {name.partition(".")[0] for name in load_file(write(tmp_path, "kohya", network))}
    assert names == expected and len(names) == 278


def test_diffusers_own_conversion_to_kohyas_names_is_the_same(tmp_path: Path) -> None:
    """Its tensors, too, but for alpha, which it takes for the rank."""
    from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya

    network = NETWORKS["sd15"]()
    theirs = convert_state_dict_to_kohya(load_file(write(folder(tmp_path, "theirs"), "diffusers", network)))
    ours = load_file(write(folder(tmp_path, "ours"), "comfyui", network))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours if name.endswith(".lora_down.weight"))


def test_kohyas_names_of_stable_diffusion_xl_are_its_authors(tmp_path: Path) -> None:
    network = NETWORKS["sdxl"]()
    tensors = load_file(write(tmp_path, "kohya", network))
    names = {name.partition(".")[0].removeprefix("lora_unet_") for name in tensors}
    assert len(names) == 788 and all(re.match(r"(input_blocks|middle_block|output_blocks)_", name) for name in names)
    for name in (
        "input_blocks_1_0_in_layers_2",
        "input_blocks_3_0_op",
        "input_blocks_4_0_skip_connection",
        "input_blocks_8_1_transformer_blocks_9_ff_net_0_proj",
        "middle_block_0_emb_layers_1",
        "middle_block_1_proj_in",
        "middle_block_2_out_layers_3",
        "output_blocks_2_2_conv",
        "output_blocks_5_1_transformer_blocks_1_attn2_to_out_0",
        "output_blocks_8_0_skip_connection",
    ):
        assert name in names, name


@pytest.mark.parametrize(
    ("family", "prediction", "version", "second"),
    [
        ("sd15", "epsilon", "sd_v1", "False"),
        ("sd15", "v_prediction", "sd_v1_v", "False"),
        ("sdxl", "epsilon", "sdxl_base_v1-0", "False"),
    ],
)
def test_kohyas_metadata(family: str, prediction: str, version: str, second: str, tmp_path: Path) -> None:
    file = write(tmp_path, "kohya", NETWORKS[family](), prediction_type=prediction)
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {
            "format": "pt",
            "ss_network_module": "networks.lora",
            "ss_network_dim": "Dynamic",
            "ss_network_alpha": "3",
            "ss_v2": second,
            "ss_base_model_version": version,
        }


@pytest.mark.parametrize("kind", FORMATS)
def test_half_precision_is_of_the_factors_alone(kind: LoraFormat, tmp_path: Path) -> None:
    tensors = load_file(write(tmp_path, kind, NETWORKS["sd15"](), dtype=torch.bfloat16))
    for name, tensor in tensors.items():
        assert tensor.dtype == (torch.float32 if name.endswith(".alpha") else torch.bfloat16), name
        assert tensor.dim() == 0 or not name.endswith(".alpha")


def test_metadata_for_diffusers_is_json(tmp_path: Path) -> None:
    network = NETWORKS["sd15"]()
    with safe_open(write(tmp_path, "diffusers", network), "pt") as opened:
        facts = json.loads(opened.metadata()["lora_adapter_metadata"])
    assert (facts["unet.r"], facts["unet.lora_alpha"]) == (2, 2)
    assert facts["unet.target_modules"] == sorted(updates_of(network))
    assert set(facts["unet.rank_pattern"].values()) == {3} and facts["unet.alpha_pattern"] == facts["unet.rank_pattern"]


@pytest.mark.parametrize(
    ("network", "kind", "said"),
    [
        (tiny.pixart, "kohya", r"not of a PixArtTransformer2DModel: use the format comfyui or diffusers"),
        (tiny.unet, "kohya", r"this UNet has other blocks: use the format comfyui or diffusers"),
        (tiny.sana, "comfyui", r"no names of ComfyUI are known here for a SanaTransformer2DModel: use .* diffusers"),
        (tiny.sana, "kohya", r"not of a SanaTransformer2DModel: use the format diffusers$"),
    ],
)
def test_formats_refuse_networks_that_their_programs_do_not_read(network: Any, kind: LoraFormat, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        refuse_format(kind, LoraTarget.of(network()))


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (12, 8, 3, 3), (4, 30, 3, 3), (16, 16, 1, 1)])
def test_a_change_of_low_rank_is_kept_whole(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    inputs = torch.Size(shape[1:]).numel()
    change = (torch.randn(shape[0], 3) @ torch.randn(3, inputs)).view(shape)
    for rank in (3, 5):
        update, energy, lost = approximate(change, rank)
        assert update.rank == min(rank, shape[0]) == update.alpha and lost < 1e-10 * energy
        assert update.down.shape == (update.rank, *shape[1:])
        assert update.up.shape == (shape[0], update.rank, *[1] * (len(shape) - 2))
        torch.testing.assert_close((update.up.flatten(1) @ update.down.flatten(1)).view(shape), change)
    assert approximate(change, 2).lost > 1e-3 * change.square().sum()
    assert approximate(torch.zeros(shape), 2).update.up.isfinite().all()


@pytest.mark.parametrize("shape", [(60, 50), (50, 60), (20, 30, 3, 3)])
def test_no_update_of_that_rank_loses_less(shape: tuple[int, ...]) -> None:
    """The loss is the sum of the squares of all further singular values."""
    torch.manual_seed(0)
    change = torch.randn(shape)
    values = torch.linalg.svdvals(change.double().flatten(1))
    for rank in (1, 7, 200):
        update, energy, lost = approximate(change, rank)
        assert update.rank == min(rank, rank_of(shape))
        assert energy == pytest.approx(values.square().sum().item())
        assert lost == pytest.approx(values[rank:].square().sum().item(), rel=1e-6, abs=1e-9 * energy)
    half = approximate(change, 7, torch.bfloat16)
    product = half.update.up.float().flatten(1) @ half.update.down.float().flatten(1)
    assert half.update.up.dtype == torch.bfloat16 and half.lost > approximate(change, 7).lost
    assert half.lost == pytest.approx((change.flatten(1) - product).square().sum().item(), rel=1e-4)
