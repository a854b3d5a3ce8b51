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

Of other transformers (`TRANSFORMERS`) kohya's programs read files with the modules of `networks.lora_modules`, or with
diffusers' layers where musubi-tuner's own code has them; every module has an alpha of its own. ComfyUI reads diffusers'
files of them, under any name.
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

from diffpp_fast.networks.lora_modules import AuthorsModule, block_diagonal, module_of, swap_halves

T = TypeVar("T")
LoraFormat = Literal["diffusers", "kohya", "comfyui"]
FORMATS: tuple[LoraFormat, ...] = get_args(LoraFormat)

#: Blocks by which kohya's code knows the networks that it is written for.
KOHYA_NETWORKS = {
    "Stable Diffusion 1 and 2": (["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], 1),
    "Stable Diffusion XL": (["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2, [1, 2, 10]),
}
#: Other networks than UNets and PixArt that kohya's programs and ComfyUI read: the module of a kohya's program that
#: does, and the base's name in its files, where a network has one alone.
TRANSFORMERS: dict[str, tuple[str, str | None]] = {
    "FluxTransformer2DModel": ("networks.lora_flux", "flux1"),
    "SD3Transformer2DModel": ("networks.lora_sd3", None),
    "Flux2Transformer2DModel": ("networks.lora_flux_2", None),
    "QwenImageTransformer2DModel": ("networks.lora_qwen_image", "qwen_image"),
    "ZImageTransformer2DModel": ("networks.lora_zimage", "z_image"),
}
#: Those that musubi-tuner is for; sd-scripts are for the others.
MUSUBI = ("Flux2Transformer2DModel", "QwenImageTransformer2DModel", "ZImageTransformer2DModel")
#: Networks whose code there is diffusers'.
UNCHANGED = ("QwenImageTransformer2DModel", "ZImageTransformer2DModel")
#: How the names of the layers begin that a format carries, where not all are.
CARRIED: dict[tuple[str, str], str] = {
    ("kohya", "UNet2DConditionModel"): r"(down_blocks|mid_block|up_blocks)\.",
    ("kohya", "FluxTransformer2DModel"): r"(?!norm_out\.|proj_out$)",
    ("kohya", "Flux2Transformer2DModel"): r"(single_)?transformer_blocks\.",
    ("kohya", "QwenImageTransformer2DModel"): r"transformer_blocks\.",
    ("kohya", "ZImageTransformer2DModel"): r"(layers|noise_refiner|context_refiner)\.",
    ("comfyui", "Flux2Transformer2DModel"): r"(?!time_guidance_embed\.|(double|single)_stream_modulation)",
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
    comfyui = target.is_unet or target.kind in TRANSFORMERS or target.kind == "PixArtTransformer2DModel"
    others = "comfyui or diffusers" if comfyui else "diffusers"
    if kind == "kohya" and not target.is_unet and target.kind not in TRANSFORMERS:
        raise ValueError(
            "kohya's sd-scripts read LoRA files of Stable Diffusion's networks and of FLUX.1, musubi-tuner of FLUX.2, "
            f"Qwen-Image and Z-Image, and not of a {target.kind}: use the format {others}"
        )
    if kind == "comfyui" and not comfyui:
        raise ValueError(f"no names of ComfyUI are known here for a {target.kind}: use the format diffusers")
    if kind == "kohya" and target.is_unet and _kohya_network(target) is None:
        raise ValueError(
            f"kohya's sd-scripts read LoRA files of {' and of '.join(KOHYA_NETWORKS)}, and this UNet has other blocks: "
            "use the format comfyui or diffusers"
        )


def is_carried(kind: LoraFormat, layer: str, target: LoraTarget) -> bool:
    """Return whether the program of a format reads a layer's update, in a network that `refuse_format` lets pass."""
    return re.match(CARRIED.get((kind, target.kind), ""), layer) is not None


def refuse_layers(kind: LoraFormat, layers: Iterable[str], target: LoraTarget) -> None:
    """Raise ValueError for layers whose updates the program of a format does not read."""
    left = [layer for layer in layers if not is_carried(kind, layer, target)]
    if left:
        who, others = (
            ("ComfyUI does", "diffusers")
            if kind == "comfyui"
            else (f"{kohyas_program(target)} do", "comfyui or diffusers")
        )
        raise ValueError(f"{', '.join(left[:4])} have adapters that {who} not read: use the format {others}")


def kohyas_program(target: LoraTarget) -> str:
    """Return which of kohya's programs reads LoRA files of a network."""
    return f"kohya's {'musubi-tuner' if target.kind in MUSUBI else 'sd-scripts'}"


def is_for_diffusers(kind: LoraFormat, target: LoraTarget) -> bool:
    """Return whether a pipeline of diffusers loads a format's file."""
    return target.loadable and (kind, target.kind) != ("kohya", "SD3Transformer2DModel")


def names_of(layer: str, target: LoraTarget) -> list[str]:
    """Return the names that programs have for a layer's module in their files, without dots: kohya's and ComfyUI's."""
    names = {_module_name("comfyui", layer, target)} if target.is_unet else set()
    if target.is_unet and target.is_xl and _kohya_network(target) is not None and is_carried("kohya", layer, target):
        names.add(_module_name("kohya", layer, target))
    plain = layer.replace(".", "_")
    return sorted(names | {f"lora_unet_{plain}", f"lora_transformer_{plain}"})


def factors_of_up(kind: LoraFormat, layers: Mapping[str, LowRank], target: LoraTarget) -> dict[str, float]:
    """Return what each layer's B is multiplied by in a file of a format."""
    if kind == "kohya" and target.kind in TRANSFORMERS:
        return {
            layer: layers[layer].alpha / layers[layer].rank / _scale(module, layers)
            for module in _modules_of(layers, target)
            for layer in module.layers
            if layer in layers
        }
    common = None if _is_diffusers(kind, target) else _commonest(update.alpha for update in layers.values())
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
    if kind == "kohya" and target.kind in TRANSFORMERS:
        _write_modules(folder / f"{name}.safetensors", layers, target, dtype)
        return
    if _is_diffusers(kind, target):
        _write_diffusers(folder, layers, target, dtype, None if kind == "diffusers" else name)
        return
    ends = ("lora_down", "lora_up") if target.is_unet else ("lora_A", "lora_B")
    factors = factors_of_up(kind, layers, target)
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
    folder: Path, layers: Mapping[str, LowRank], target: LoraTarget, dtype: torch.dtype | None, name: str | None
) -> None:
    """Write a file for diffusers, under the name that it looks for or another."""
    prefix = f"{target.part}." if target.loadable else "base_model.model."
    factors = factors_of_up("diffusers", layers, target)
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
    _save(folder / f"{name or 'pytorch_lora_weights'}.safetensors", tensors, {"lora_adapter_metadata": text})


def _is_diffusers(kind: LoraFormat, target: LoraTarget) -> bool:
    """Whether a format's file is as diffusers reads it."""
    return kind == "diffusers" or (kind == "comfyui" and target.kind in TRANSFORMERS)


def _write_modules(file: Path, layers: Mapping[str, LowRank], target: LoraTarget, dtype: torch.dtype | None) -> None:
    """Write a file for one of kohya's programs, of a transformer: rank and alpha of every module are its own."""
    factors = factors_of_up("kohya", layers, target)
    tensors, ranks, alphas = {}, [], []
    for module in _modules_of(layers, target):
        down, up = _factors_of_module(module, layers, factors)
        ranks.append(len(down))
        alphas.append(_scale(module, layers) * len(down))
        name = f"lora_unet_{module.name.replace('.', '_')}"
        tensors[f"{name}.lora_down.weight"] = _cast(down, dtype)
        tensors[f"{name}.lora_up.weight"] = _cast(swap_halves(up) if module.swapped else up, dtype)
        tensors[f"{name}.alpha"] = torch.tensor(alphas[-1])
    program, base = TRANSFORMERS[target.kind]
    metadata = {
        "ss_network_module": program,
        "ss_network_dim": _uniform(ranks),
        "ss_network_alpha": _uniform(alphas),
        **({} if base is None else {"ss_base_model_version": base}),
    }
    _save(file, tensors, metadata)


def _modules_of(layers: Mapping[str, LowRank], target: LoraTarget) -> list[AuthorsModule]:
    """Return the modules of a kohya's program that hold layers, each once."""
    found: dict[str, AuthorsModule] = {}
    for layer in layers:
        module = None if target.kind in UNCHANGED else module_of(layer, target.kind, target.config)
        module = module or AuthorsModule(layer, (layer,), swapped=False)
        found[module.name] = module
    return list(found.values())


def _scale(module: AuthorsModule, layers: Mapping[str, LowRank]) -> float:
    """Return the largest alpha / rank of a module's layers."""
    return max(layers[layer].alpha / layers[layer].rank for layer in module.layers if layer in layers)


def _factors_of_module(
    module: AuthorsModule, layers: Mapping[str, LowRank], factors: Mapping[str, float]
) -> tuple[Tensor, Tensor]:
    present = {
        layer: (layers[layer].down, _scaled(layers[layer].up, factors[layer], None))
        for layer in module.layers
        if layer in layers
    }
    if len(module.layers) == 1:
        return present[module.layers[0]]
    rows = module.rows(next(iter(present.values()))[0].shape[1], {layer: len(up) for layer, (_, up) in present.items()})
    return block_diagonal([present.get(layer) for layer in module.layers], rows)


def _uniform(values: Sequence[float]) -> str:
    return f"{values[0]:g}" if len(set(values)) == 1 else "Dynamic"


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
