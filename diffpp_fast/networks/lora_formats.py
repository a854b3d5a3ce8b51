"""LoRA files as other programs read them: diffusers and peft, kohya's sd-scripts, ComfyUI.

All of them compute weight + alpha / rank B A, and differ in the names of B and A and in where alpha stands:

- diffusers: `unet.LAYER.lora_A.weight`. Whoever reads no metadata takes alpha for the rank, so alpha / rank is
  multiplied into B. PixArt, which diffusers has no loader for, is in peft's format, with the same rule.
- kohya: `lora_unet_LAYER.lora_down.weight`, dots as underscores, and `.alpha`. The layers of Stable Diffusion XL have
  the names of its authors' code. sd-scripts makes modules for what is in transformers, residual blocks and resampling
  alone, and leaves out whatever else is in a file.
- ComfyUI: the same with diffusers' names of layers, everywhere in the network; PixArt's as `transformer.LAYER`.

In the last two all layers have one alpha, and what differs is multiplied into B: diffusers' converter finds no layer of
an attention for an alpha of its own.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import torch
from torch import Tensor

T = TypeVar("T")
LoraFormat = Literal["diffusers", "kohya", "comfyui"]
FORMATS: tuple[LoraFormat, ...] = get_args(LoraFormat)

#: Blocks by which kohya's code knows the networks that it is written for.
KOHYA_NETWORKS = {
    "Stable Diffusion 1 and 2": (["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], 1),
    "Stable Diffusion XL": (["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2, [1, 2, 10]),
}
#: Layers in residual blocks by their names in the code of Stable Diffusion's authors.
RESNET = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
#: What diffusers' converter would misread of the names outside of blocks, as Stable Diffusion's authors call it.
EMBEDDINGS = {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}


class LowRank(NamedTuple):
    """The update of one layer's weight: alpha / rank B A.

    Attributes:
        down: A, [r, in], of a convolution [r, in, kh, kw].
        up: B, [out, r], of a convolution [out, r, 1, 1].
        alpha: see there.
    """

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return len(self.down)


class LoraTarget(NamedTuple):
    """A network that a LoRA is for: its class, its configuration, and whether diffusers loads adapters into it."""

    kind: str
    config: Mapping[str, Any]
    loadable: bool

    @classmethod
    def of(cls, network: Any) -> LoraTarget:
        """Return that of a network of diffusers."""
        return cls(type(network).__name__, dict(network.config), hasattr(network, "load_lora_adapter"))

    @classmethod
    def named(cls, config: Mapping[str, Any]) -> LoraTarget:
        """Return that of a network's `config.json`."""
        import diffusers

        kind = str(config.get("_class_name"))
        return cls(kind, dict(config), hasattr(getattr(diffusers, kind, None), "load_lora_adapter"))

    @property
    def is_unet(self) -> bool:
        return self.kind == "UNet2DConditionModel"

    @property
    def is_xl(self) -> bool:
        return self.config.get("addition_embed_type") == "text_time"

    @property
    def part(self) -> str:
        """The name that pipelines have for the network."""
        return "transformer" if "Transformer" in self.kind else "unet"


def refuse_format(kind: LoraFormat, target: LoraTarget) -> None:
    """Raise ValueError for a network whose LoRA the program of a format does not read."""
    if kind == "kohya" and not target.is_unet:
        raise ValueError(
            f"kohya's sd-scripts read LoRA files of Stable Diffusion's UNets, and not of a {target.kind}: "
            "use the format comfyui or diffusers"
        )
    if kind == "comfyui" and not target.is_unet and target.kind != "PixArtTransformer2DModel":
        raise ValueError(f"no names of ComfyUI are known here for a {target.kind}: use the format diffusers")
    if kind == "kohya" and _kohya_network(target) is None:
        raise ValueError(
            f"kohya's sd-scripts read LoRA files of {' and of '.join(KOHYA_NETWORKS)}, and this UNet has other blocks: "
            "use the format comfyui or diffusers"
        )


def is_carried(kind: LoraFormat, layer: str) -> bool:
    """Return whether the program of a format reads a layer's update, in a network that `refuse_format` lets pass."""
    return kind != "kohya" or re.match(r"(down_blocks|mid_block|up_blocks)\.", layer) is not None


def names_of(layer: str, target: LoraTarget) -> list[str]:
    """Return the names that programs have for a layer's module in their files, without dots: kohya's and ComfyUI's."""
    names = {_module_name("comfyui", layer, target)} if target.is_unet else set()
    if target.is_unet and target.is_xl and _kohya_network(target) is not None and is_carried("kohya", layer):
        names.add(_module_name("kohya", layer, target))
    plain = layer.replace(".", "_")
    return sorted(names | {f"lora_unet_{plain}", f"lora_transformer_{plain}"})


def factors_of_up(kind: LoraFormat, layers: Mapping[str, LowRank]) -> dict[str, float]:
    """Return what each layer's B is multiplied by in a file of a format."""
    common = None if kind == "diffusers" else _commonest(update.alpha for update in layers.values())
    return {layer: update.alpha / (common or update.rank) for layer, update in layers.items()}


def write_lora(
    folder: Path,
    kind: LoraFormat,
    layers: Mapping[str, LowRank],
    target: LoraTarget,
    *,
    prediction_type: str,
    name: str,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a LoRA file, with what its program reads beside it.

    Args:
        folder: is there.
        kind: the format.
        layers: by the layers' names in diffusers; all of them are carried.
        target: the network.
        prediction_type: of the schedule.
        name: of the file, where the format leaves it open.
        dtype: of A and B; None: theirs. alpha is float32.
    """
    if kind == "diffusers":
        _write_diffusers(folder, layers, target, dtype)
        return
    ends = ("lora_down", "lora_up") if target.is_unet else ("lora_A", "lora_B")
    factors = factors_of_up(kind, layers)
    names = {layer: _module_name(kind, layer, target) for layer in layers}
    alpha = _commonest(update.alpha for update in layers.values())
    tensors = {}
    for layer, update in layers.items():
        tensors[f"{names[layer]}.{ends[0]}.weight"] = _cast(update.down, dtype)
        tensors[f"{names[layer]}.{ends[1]}.weight"] = _scaled(update.up, factors[layer], dtype)
        tensors[f"{names[layer]}.alpha"] = torch.tensor(float(alpha))
    metadata = _kohya_metadata(layers, alpha, target, prediction_type) if target.is_unet else {}
    _save(folder / f"{name}.safetensors", tensors, metadata)


def peft_settings(layers: Mapping[str, LowRank]) -> Any:
    """Return peft's settings of updates whose alpha is their rank."""
    from peft import LoraConfig

    ranks = {layer: update.rank for layer, update in layers.items()}
    rank = _commonest(ranks.values())
    others = {f"^{layer}": own for layer, own in ranks.items() if own != rank}
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        rank_pattern=others,
        alpha_pattern=dict(others),
        target_modules=sorted(layers),
        bias="none",
    )


def _write_diffusers(
    folder: Path, layers: Mapping[str, LowRank], target: LoraTarget, dtype: torch.dtype | None
) -> None:
    prefix = f"{target.part}." if target.loadable else "base_model.model."
    factors = factors_of_up("diffusers", layers)
    tensors = {}
    for layer, update in layers.items():
        tensors[f"{prefix}{layer}.lora_A.weight"] = _cast(update.down, dtype)
        tensors[f"{prefix}{layer}.lora_B.weight"] = _scaled(update.up, factors[layer], dtype)
    settings = peft_settings(layers)
    if not target.loadable:
        settings.save_pretrained(folder)
        _save(folder / "adapter_model.safetensors", tensors, {})
        return
    facts = {f"{target.part}.{key}": _plain(value) for key, value in settings.to_dict().items()}
    text = json.dumps(facts, indent=2, sort_keys=True)
    _save(folder / "pytorch_lora_weights.safetensors", tensors, {"lora_adapter_metadata": text})


def _plain(value: Any) -> Any:
    """Return a value as JSON has it: sets as lists, enumerations as their values."""
    if isinstance(value, set | frozenset):
        return sorted(value)
    return getattr(value, "value", value)


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.detach().cpu().to(dtype or tensor.dtype).contiguous()


def _scaled(tensor: Tensor, factor: float, dtype: torch.dtype | None) -> Tensor:
    return _cast(tensor if factor == 1.0 else tensor.float() * factor, dtype or tensor.dtype)


def _commonest(values: Iterable[T]) -> T:
    """Return the value that is there most often."""
    return Counter(values).most_common(1)[0][0]


def _save(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    from safetensors.torch import save_file

    save_file(dict(tensors), path, {"format": "pt", **metadata})


def _kohya_network(target: LoraTarget) -> str | None:
    config = target.config
    blocks, per_block = config.get("down_block_types"), config.get("layers_per_block", 2)
    depth = config.get("transformer_layers_per_block", 1)
    for name, (known, known_depth) in KOHYA_NETWORKS.items():
        if [*(blocks or ())] == known and per_block == 2 and _as_list(depth) == _as_list(known_depth):
            return name if target.is_xl == (name == "Stable Diffusion XL") else None
    return None


def _as_list(value: Any) -> Any:
    return [*value] if isinstance(value, Sequence) else value


def _module_name(kind: LoraFormat, layer: str, target: LoraTarget) -> str:
    if not target.is_unet:
        return f"transformer.{layer}"
    known = _kohya_name(layer) if kind == "kohya" and target.is_xl else EMBEDDINGS.get(layer, layer)
    return f"lora_unet_{known.replace('.', '_')}"


def _kohya_name(layer: str) -> str:
    """Return a layer's name in the code of Stable Diffusion XL's authors, whose blocks have two layers each."""
    if match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.+)", layer):
        group, number, rest = match[1], int(match[2]), match[3]
        return f"middle_block.{1 if group == 'attentions' else 2 * number}.{_inside(group, rest)}"
    match = re.fullmatch(r"(down|up)_blocks\.(\d)\.(resnets|attentions|downsamplers|upsamplers)\.(\d)\.(.+)", layer)
    assert match is not None, layer
    way, block, group, number, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    if group == "downsamplers":
        return f"input_blocks.{3 * (block + 1)}.0.op"
    if group == "upsamplers":
        return f"output_blocks.{3 * block + 2}.2.{rest}"
    place = f"input_blocks.{3 * block + number + 1}" if way == "down" else f"output_blocks.{3 * block + number}"
    return f"{place}.{1 if group == 'attentions' else 0}.{_inside(group, rest)}"


def _inside(group: str, rest: str) -> str:
    return RESNET[rest] if group == "resnets" else rest


def _kohya_metadata(
    layers: Mapping[str, LowRank], alpha: float, target: LoraTarget, prediction_type: str
) -> dict[str, str]:
    """Return what programs look up in a file of kohya's, as far as it is known."""
    ranks = {update.rank for update in layers.values()}
    second = not target.is_xl and target.config.get("cross_attention_dim") == 1024
    version = "sdxl_base_v1-0" if target.is_xl else "sd_v2" if second else "sd_v1"
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": f"{alpha:g}",
        "ss_v2": str(second),
        "ss_base_model_version": version + ("_v" if prediction_type == "v_prediction" else ""),
    }
