"""LoRA files of other programs, read back as updates of a network's layers.

They are those of diffusers and peft, of kohya's sd-scripts (LCM-LoRAs are in its names) and of ComfyUI, whose rules
`networks.lora_formats` has: weight + alpha / rank B A. Where alpha stands tells the formats apart:

- beside A and B (`.alpha`): kohya's, ComfyUI's;
- in the file's metadata (diffusers) or in `adapter_config.json` beside it (peft), with exceptions by layer;
- nowhere: in names with dots it is the rank then, as diffusers and peft write updates that are scaled already. Of other
  names it is unknown.

A module may hold several layers of diffusers (`networks.lora_modules`): its update is taken apart.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffpp_fast.networks.loading import exists, find_file, is_file, local_folder
from diffpp_fast.networks.lora import merged_weight
from diffpp_fast.networks.lora_formats import LoraTarget, LowRank, names_of
from diffpp_fast.networks.lora_modules import AuthorsModule, module_of, swap_halves, taken_apart
from diffpp_fast.networks.weight_files import LORA_FILES
from diffpp_fast.tensor_files import first_not_finite, metadata_of, read_tensors

#: In front of a layer's name, where it has dots.
PREFIXES = ("", "unet.", "transformer.", "base_model.model.", "diffusion_model.")
#: Names without dots begin so.
DOTLESS = re.compile(r"lora_(unet|transformer)_")
#: Tensors of text encoders, which are not trained here.
TEXT = re.compile(r"(base_model\.model\.)?(text_encoders?(_\d)?|lora_te\d?|te\d?|clip_[lg]|t5xxl|text_model)[._]")
#: Projections that diffusers, too, can compute as one, by the name of that one.
FUSED = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
}
#: Whose LoRA a file is, by names in it.
SIGNS = (
    (r"(down_blocks|mid_block|up_blocks|input_blocks|middle_block|output_blocks)[._]", "a UNet of Stable Diffusion"),
    (r"joint_blocks[._]|transformer_blocks[._]\d+[._]attn2[._]add_", "Stable Diffusion 3"),
    (r"(to_qkv_mlp_proj|ff(_context)?[._]linear_(in|out)|(double|single)_stream_modulation)", "FLUX.2"),
    (r"(single_transformer_blocks|single_blocks|double_blocks)[._]", "FLUX"),
    (r"(noise_refiner|context_refiner)[._]|layers[._]\d+[._](attention|feed_forward)[._]", "Z-Image"),
    (r"transformer_blocks[._]\d+[._](img|txt)_(mlp|mod)[._]", "Qwen-Image"),
    (r"[._]ff[._]conv_(inverted|depth|point)", "Sana"),
)
#: Other kinds of adapters, by a name of theirs.
OTHERS = (
    (r"\.(dora_scale|lora_magnitude_vector)", "DoRA, which also learns each output's magnitude"),
    (r"\.hada_", "LoHa, a product of two low-rank updates"),
    (r"\.lokr_", "LoKr, a Kronecker product"),
    (r"\.(oft_|boft_)", "OFT, a rotation of the weights"),
    (r"\.lora_mid\.", "LoCon with a core between A and B"),
    (r"\.(diff|diff_b|w_norm|b_norm)$", "whole differences of weights"),
    (r"\.lora_embedding_[AB]", "a LoRA of embeddings"),
    (r"\.lora_(B|up)\.(\w+\.)?bias$", "a LoRA with biases"),
    (r"\.(on_input|ia3_l)", "(IA)^3, a scale of the activations"),
)


class LoraFile(NamedTuple):
    """A LoRA as a file has it.

    Attributes:
        file: it was read from.
        layers: updates by the layers' names in diffusers, in the file's dtype.
        text: how many of its tensors are of text encoders, and left out.
    """

    file: Path
    layers: Mapping[str, LowRank]
    text: int

    def facts(self) -> list[tuple[str, float]]:
        """Return each layer's alpha, for a digest."""
        return [(layer, update.alpha) for layer, update in sorted(self.layers.items())]

    def tensors(self) -> dict[str, Tensor]:
        """Return A and B by names that no format has a part in, for a digest."""
        both = [(layer, update) for layer, update in self.layers.items()]
        return {f"{layer}.{part}": getattr(update, part) for layer, update in both for part in ("down", "up")}

    def uniform(self) -> tuple[int, float, dict[str, LowRank]]:
        """Return the rank and the alpha that all layers have, and the layers with it; where alphas differ, B has the
        difference. Raises ValueError where ranks differ."""
        ranks: dict[int, list[str]] = {}
        for layer, update in self.layers.items():
            ranks.setdefault(update.rank, []).append(layer)
        if len(ranks) > 1:
            some = " and ".join(f"{rank} of {layers[0]}" for rank, layers in sorted(ranks.items())[:2])
            raise ValueError(
                f"its ranks differ ({some}), and a trained adapter has one: merge it, without the key keep, and train "
                "all weights or an adapter of your own"
            )
        alphas = [update.alpha for update in self.layers.values()]
        alpha = max(set(alphas), key=alphas.count)
        equal = {
            layer: update if update.alpha == alpha else _with_alpha(update, alpha)
            for layer, update in self.layers.items()
        }
        return next(iter(ranks)), alpha, equal


class Merged(Mapping[str, Tensor]):
    """The tensors of a network with updates in their weights, in float32 where they have one; each is made when it is
    asked for.

    Args:
        source: the tensors without.
        layers: the updates by the layers' names.
        scale: of the updates.
    """

    def __init__(self, source: Mapping[str, Tensor], layers: Mapping[str, LowRank], scale: float) -> None:
        self._source = source
        self._layers = {f"{layer}.weight": update for layer, update in layers.items()}
        self._scale = scale

    def __getitem__(self, name: str) -> Tensor:
        update = self._layers.get(name)
        if update is None:
            return self._source[name]
        return merged_weight(self._source[name], update.down, update.up, self._scale * update.alpha / update.rank)

    def __iter__(self) -> Any:
        return iter(self._source)

    def __len__(self) -> int:
        return len(self._source)

    @property
    def changed(self) -> list[str]:
        """The names of the weights with an update."""
        return list(self._layers)


def read_lora(
    path: str, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], alpha: float | None = None
) -> LoraFile:
    """Return a LoRA for a network; pickles are read without unpickling.

    Args:
        path: a file, or a folder or hub id that holds one.
        config: the network's `config.json`.
        shapes: of the network's tensors by name.
        alpha: of a file that has none.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, not finite, of another network or kind, or its alpha is unknown, or known although
            `alpha` is given.
    """
    file = _find(path)
    tensors = dict(read_tensors(file))
    settings = _settings(file)
    _refuse_others(tensors, settings)
    _refuse_settings(file, settings.values)
    text = [name for name in tensors if TEXT.match(name)]
    parts = {name: tensor for name, tensor in tensors.items() if name not in set(text)}
    modules = _modules(config, shapes)
    found, alphas = _group(parts, modules, config)
    if not found:
        kind = (
            f"only {len(text)} tensors of text encoders" if text else f"no LoRA, e.g. {min(parts, default='nothing')}"
        )
        raise ValueError(f"{file} holds {kind}: name the LoRA of a denoiser")
    name = first_not_finite(parts)
    if name is not None:
        raise ValueError(f"{file}: {name} holds values that are NaN or infinite")
    layers: dict[str, LowRank] = {}
    for module, factors in found.items():
        held = modules[module].layers
        rows = [shapes[f"{layer}.weight"][0] for layer in held]
        label = held[0] if len(held) == 1 else factors.name
        whole = LowRank(*_shaped(file, label, factors, (sum(rows), *shapes[f"{held[0]}.weight"][1:])), 0.0)
        known = alphas.get(module, settings.alpha(label, whole.rank, dotted=not DOTLESS.match(factors.name)))
        layers |= _taken_apart(modules[module], whole._replace(alpha=_alpha(file, label, known, alpha)), rows)
    return LoraFile(file, layers, len(text))


def endings(chosen: Iterable[str], modules: Iterable[str]) -> list[str]:
    """Return the fewest short ends of names that match these layers and no other module; `*` is a number."""
    wanted, names = set(chosen), set(modules)
    found: list[str] = []
    for layer in sorted(wanted):
        parts = layer.split(".")
        if any(_ends(layer, end) for end in found):
            continue
        for length in range(1, len(parts) + 1):
            end = ".".join(parts[-length:])
            if not parts[-length].isdigit() and {name for name in names if _ends(name, end)} <= wanted:
                break
        found.append(_of_all_blocks(end, wanted, names))
    return sorted(found)


def modules_of(shapes: Mapping[str, Any]) -> set[str]:
    """Return the names of all modules that have tensors in them."""
    parts = [name.split(".") for name in shapes]
    return {".".join(part[:length]) for part in parts for length in range(1, len(part))}


class _Factors(NamedTuple):
    """A and B of a module as they are stored, and its name in the file."""

    down: Tensor
    up: Tensor
    name: str


class _Settings(NamedTuple):
    """Settings of all layers in a file, by the names that peft has for them; there may be none."""

    values: Mapping[str, Any]
    is_peft: bool

    def alpha(self, layer: str, rank: int, *, dotted: bool) -> float | None:
        """Return a layer's alpha where no tensor has it; None where nothing does."""
        if "lora_alpha" in self.values:
            patterns = self.values.get("alpha_pattern") or {}
            own = next((each for each in patterns if re.match(rf"(.*\.)?({each})$", layer)), None)
            alpha = float(self.values["lora_alpha"] if own is None else patterns[own])
            return alpha * math.sqrt(rank) if self.values.get("use_rslora") else alpha
        return float(rank) if dotted and not self.is_peft else None


def _find(path: str) -> Path:
    """The file itself, of a folder or hub id the one that programs look for, else the only one."""
    if is_file(path):
        return find_file(path)
    folder = local_folder(path, [*LORA_FILES, "adapter_config.json"])
    names = [name for name in LORA_FILES if (folder / name).is_file()]
    names = names or [file.name for file in sorted(folder.glob("*.safetensors"))]
    if len(names) != 1:
        held = ", ".join(names[:4]) or f"none of {', '.join(LORA_FILES)}"
        raise FileNotFoundError(f"{folder} should hold one LoRA file, and holds {held}: name the file itself")
    return folder / names[0]


def _settings(file: Path) -> _Settings:
    beside = file.with_name("adapter_config.json")
    is_peft = file.name.startswith("adapter_model.")
    if is_peft and exists(beside):
        return _Settings(_object(beside, beside.read_text(encoding="utf-8")), is_peft)
    if file.suffix != ".safetensors":
        return _Settings({}, is_peft)
    text = metadata_of(file).get("lora_adapter_metadata")
    named = {} if text is None else _object(file, text)
    # Of a network's own keys: text encoders have theirs beside them.
    own = {name.rpartition(".")[2]: value for name, value in named.items() if not TEXT.match(name)}
    return _Settings(own, is_peft)


def _object(file: Path, text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
        if isinstance(content, dict):
            return content
    except (ValueError, RecursionError):
        pass
    raise ValueError(f"{file}: the settings of its adapter are damaged")


def _refuse_settings(file: Path, values: Mapping[str, Any]) -> None:
    """Raise ValueError for alphas that are no numbers, and patterns that are none."""
    patterns = values.get("alpha_pattern") or {}
    alphas = [values.get("lora_alpha", 1), *(patterns.values() if isinstance(patterns, Mapping) else ["none"])]
    try:
        sound = all(isinstance(alpha, int | float) and math.isfinite(alpha) for alpha in alphas)
        for pattern in patterns if sound else ():
            re.compile(pattern)
    except (re.error, OverflowError):
        sound = False
    if not sound:
        raise ValueError(
            f"{file}: the settings of its adapter are damaged: lora_alpha is {values.get('lora_alpha')!r} and "
            f"alpha_pattern {patterns!r}"
        )


def _refuse_others(names: Iterable[str], settings: _Settings) -> None:
    kind = next((said for pattern, said in OTHERS for name in names if re.search(pattern, name)), None)
    if settings.values.get("use_dora"):
        kind = OTHERS[0][1]
    other = str(settings.values.get("peft_type", "LORA")).upper()
    if kind is None and other != "LORA":
        kind = f"peft's {other}"
    if kind is not None:
        raise ValueError(
            f"it is {kind}: only LoRA is read, weight + alpha / rank B A. Merge it into its network with the program "
            "that made it, and give that network as path"
        )


def _modules(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, AuthorsModule]:
    """Return what a file may hold updates of, by all names that files have for it: layers, and modules of several."""
    layers = [name.removesuffix(".weight") for name, shape in shapes.items() if _is_layer(name, shape)]
    target = LoraTarget.named(config)
    found: dict[str, AuthorsModule] = {}
    for layer in layers:
        own = AuthorsModule(layer, (layer,), swapped=False)
        found |= dict.fromkeys([*names_of(layer, target), *(prefix + layer for prefix in PREFIXES)], own)
    for module in _several(layers, target):
        dotless = f"lora_unet_{module.name.replace('.', '_')}"
        for name in (dotless, *(prefix + module.name for prefix in PREFIXES)):
            found.setdefault(name, module)
    return found


def _several(layers: Sequence[str], target: LoraTarget) -> Iterator[AuthorsModule]:
    """The modules that hold several of a network's layers, or that have another name than theirs."""
    own = set(layers)
    for layer in layers:
        stem, _, end = layer.rpartition(".")
        for name, parts in FUSED.items():
            held = tuple(f"{stem}.{part}" for part in parts)
            if end == parts[0] and own.issuperset(held):
                yield AuthorsModule(f"{stem}.{name}", held, swapped=False)
        module = module_of(layer, target.kind, target.config)
        if module is not None and layer == module.layers[0] and own.issuperset(module.layers):
            yield module


def _group(
    tensors: Mapping[str, Tensor], modules: Mapping[str, AuthorsModule], config: Mapping[str, Any]
) -> tuple[dict[str, _Factors], dict[str, float]]:
    """Return the stored factors, and alphas where they are stored, by the module's name in the file."""
    halves: dict[str, dict[int, Tensor]] = {}
    alphas: dict[str, float] = {}
    of_layer: dict[str, str] = {}
    strange = []
    for name, tensor in tensors.items():
        module, half = _split(name)
        if module not in modules or half is None:
            strange.append(name)
        elif half == 2:
            if tensor.numel() != 1:
                raise ValueError(f"{name} has the shape {list(tensor.shape)}, and alpha is a number")
            alphas[module] = float(tensor)
        else:
            for layer in modules[module].layers:
                if of_layer.setdefault(layer, module) != module or half in halves.get(module, ()):
                    raise ValueError(
                        f"it holds two updates of {layer}, {name} is of the second: give a file of one adapter"
                    )
            halves.setdefault(module, {})[half] = tensor
    if strange and (len(strange) < len(tensors) or any(_split(name)[1] is not None for name in strange)):
        kind = config.get("_class_name")
        raise ValueError(
            f"it is of another network: {len(strange)} of its {len(tensors)} tensors are of layers that this {kind} "
            f"does not have, e.g. {min(strange)}{_whose(strange)}: give a LoRA of this network, or take its own as base"
        )
    lonely = sorted(module for module, found in halves.items() if len(found) < 2) + sorted(
        alphas.keys() - halves.keys()
    )
    if lonely:
        layers = modules[lonely[0]].layers
        label = layers[0] if len(layers) == 1 else lonely[0]
        raise ValueError(f"it is not whole: {label} lacks A or B: is the file cut off? Get it anew")
    return {module: _Factors(found[0], found[1], module) for module, found in halves.items()}, alphas


def _whose(names: Iterable[str]) -> str:
    """Say whose names they are, where it is known."""
    text = "\n".join(names)
    found = next((whose for pattern, whose in SIGNS if re.search(pattern, text)), None)
    return "" if found is None else f" (as in {found})"


def _taken_apart(module: AuthorsModule, update: LowRank, rows: Sequence[int]) -> dict[str, LowRank]:
    """Return the updates of the layers that a module holds."""
    if len(rows) == 1:
        return {module.layers[0]: update._replace(up=swap_halves(update.up)) if module.swapped else update}
    parts = zip(module.layers, taken_apart(update.down, update.up, rows), strict=True)
    alpha = update.alpha / update.rank
    return {layer: LowRank(*part, alpha * len(part[0])) for layer, part in parts if part is not None}


def _is_layer(name: str, shape: tuple[int, ...]) -> bool:
    return name.endswith(".weight") and len(shape) in (2, 4)


def _split(name: str) -> tuple[str, int | None]:
    """A module's name in the file, and 0 for A, 1 for B, 2 for alpha; None for anything else."""
    if name.endswith(".alpha"):
        return name.removesuffix(".alpha"), 2
    old = re.fullmatch(r"(.+?)\.processor\.(to_(?:q|k|v|out))_lora\.(down|up)\.weight", name)
    if old is not None:
        layer = f"{old[1]}.{old[2]}" + (".0" if old[2] == "to_out" else "")
        return layer, int(old[3] == "up")
    found = re.fullmatch(r"(.+)\.(?:lora_(A|B|down|up)|lora\.(down|up))(?:\.(?!weight)\w+)?\.weight", name)
    if found is None:
        return name, None
    return found[1], int((found[2] or found[3]) in ("B", "up"))


def _shaped(file: Path, layer: str, factors: _Factors, wanted: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """A and B in the shapes that the layer has; a convolution over single pixels may be stored as a matrix, and the
    other way about."""
    if not all(part.is_floating_point() for part in factors[:2]):
        kinds = " and ".join(str(part.dtype).removeprefix("torch.") for part in factors[:2])
        raise ValueError(f"{file}: the factors of {layer} are {kinds}: quantised? Only floating-point ones are read")
    if min((factors.down.shape or [0])[0], factors.up.numel()) == 0:
        raise ValueError(f"{file}: the factors of {layer} are empty: its rank is 0")
    rank, ones = len(factors.down), [1] * (len(wanted) - 2)
    if factors.up.dim() > 1 and factors.up.shape[1] != rank and len(factors.up) == wanted[0]:
        raise ValueError(
            f"{file}: A of {layer} has rank {rank} and B {factors.up.shape[1]}: the file is damaged, get it anew"
        )
    shapes = (rank, *wanted[1:]), (wanted[0], rank, *ones)
    for part, shape in zip(factors[:2], shapes, strict=True):
        if part.dim() not in (2, 4) or part.numel() != math.prod(shape) or part.shape[:2] != shape[:2]:
            raise ValueError(
                f"{file}: it is of another network: {layer} has factors of shape {list(factors.down.shape)} and "
                f"{list(factors.up.shape)}, and the network's weight {list(wanted)}: give a LoRA of this one"
            )
    return factors.down.reshape(shapes[0]), factors.up.reshape(shapes[1])


def _alpha(file: Path, layer: str, known: float | None, given: float | None) -> float:
    if known is None and given is None:
        raise ValueError(
            f"{file} says no alpha, by which its updates are scaled (alpha / rank): {layer} has none. Say it with the "
            "key alpha; most programs take the rank then"
        )
    if known is not None and given is not None:
        raise ValueError(f"{file} says its alpha ({known:g} of {layer}): remove the key alpha")
    found = given if known is None else known
    assert found is not None
    if not 0.0 < found < math.inf:
        raise ValueError(f"{file}: the alpha of {layer} is {found:g}, which scales nothing: it should be above 0")
    return found


def _with_alpha(update: LowRank, alpha: float) -> LowRank:
    up = update.up.to(torch.float32) * (update.alpha / alpha)
    return LowRank(update.down, up, alpha)


def _of_all_blocks(end: str, wanted: set[str], names: set[str]) -> str:
    """Return an end with `*` for the number of a block, where that matches more of the wanted names and no other."""
    starred = re.sub(r"\.\d+\.", ".*.", end)
    matched = {name for name in names if _ends(name, starred)}
    return starred if matched <= wanted and sum(_ends(name, end) for name in matched) < len(matched) else end


def _ends(name: str, end: str) -> bool:
    if "*" in end:
        return re.fullmatch(rf"(.*\.)?{re.escape(end)}".replace(r"\*", r"\d+"), name) is not None
    return name == end or name.endswith(f".{end}")
