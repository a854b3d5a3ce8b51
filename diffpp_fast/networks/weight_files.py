"""The safetensors files of a network's folder: which they are, and what is wrong with them before any is loaded."""

from __future__ import annotations

import re
from pathlib import Path

from diffpp_fast.networks.foreign import FILES, describe
from diffpp_fast.tensor_files import StoredTensors, read_index

#: What diffusers and transformers call a network's weights.
DIFFUSERS, TRANSFORMERS = "diffusion_pytorch_model", "model"
#: What diffusers and peft call adapters, with a name like those of the tensors in such a file.
LORA_FILES = {
    "pytorch_lora_weights.safetensors": ("unet.lora_A.weight",),
    "adapter_model.safetensors": ("base_model.model.lora_A.weight",),
}


def patterns(stem: str, variant: str | None) -> list[str]:
    """Return the names of the files that hold a network's weights, as patterns."""
    return [_single(stem, variant), _index(stem, variant), f"{_dotted(stem, variant)}-*-of-*.safetensors"]


def open_weights(folder: Path, stem: str, variant: str | None, loader: str) -> StoredTensors:
    """Return the tensors of a network's folder, none of which is read yet.

    Args:
        folder: in diffusers' or transformers' format.
        stem: `DIFFUSERS` or `TRANSFORMERS`.
        variant: e.g. "fp16", which is part of the files' names.
        loader: the class of the network, with its library, for advice.

    Raises:
        FileNotFoundError: there are none in safetensors, or not all; the message says what is there instead.
        ValueError: they are damaged, ambiguous, or not those that the index lists.
    """
    single, index = folder / _single(stem, variant), folder / _index(stem, variant)
    if single.is_file() and index.is_file():
        raise ValueError(f"{folder} holds both {single.name} and {index.name}: remove the one that is out of date")
    if single.is_file():
        return StoredTensors([single])
    if not index.is_file():
        raise FileNotFoundError(f"{folder} {_explain(folder, stem, variant, loader)}")
    listed = read_index(index)
    missing = sorted({name for name in listed.values() if not (folder / name).is_file()})
    if missing:
        raise FileNotFoundError(f"{index} lists {', '.join(missing)}, which {_is_or_are(missing)} not there")
    tensors = StoredTensors(folder / name for name in sorted(set(listed.values())))
    wrong = sorted(
        name for name, file in listed.items() if name not in tensors or tensors.places[name].path.name != file
    )
    unlisted = sorted(tensors.keys() - listed.keys())
    if wrong or unlisted:
        name = (wrong or unlisted)[0]
        said = (
            f"{listed[name]} does not hold {name}"
            if wrong
            else f"{tensors.places[name].path.name} holds {name} besides"
        )
        raise ValueError(f"{index} is not that of the files beside it: {said}")
    return tensors


def holds_weights(folder: Path) -> bool:
    """Return whether a folder here holds weights in any format, or an index of them, and not configurations alone."""
    names = [entry.name for entry in folder.iterdir() if entry.is_file()] if folder.is_dir() else []
    return any(".index." in name or Path(name).suffix not in (".json", ".txt", ".md", ".model") for name in names)


def _dotted(stem: str, variant: str | None) -> str:
    return stem if variant is None else f"{stem}.{variant}"


def _single(stem: str, variant: str | None) -> str:
    return f"{_dotted(stem, variant)}.safetensors"


def _index(stem: str, variant: str | None) -> str:
    return f"{_dotted(f'{stem}.safetensors.index', variant)}.json"


def _explain(folder: Path, stem: str, variant: str | None, loader: str) -> str:
    """Say what a folder without the wanted weights holds, and how to go on."""
    held = sorted(entry.name for entry in folder.iterdir() if entry.is_file())
    variants = _variants(held, stem)
    if variants:
        said = "holds these weights only as " + " and ".join(
            "full ones" if other is None else f"the variant {other}" for other in variants
        )
        wanted = variants[0]
        return f"{said}: set the key variant beside path to {'null' if wanted is None else wanted}"
    lora = next((name for name in LORA_FILES if name in held), None)
    if lora is not None:
        return f"holds no network: {describe(LORA_FILES[lora], folder / lora)}"
    parts = [name for name in held if re.fullmatch(rf"{stem}.*-of-\d+\.safetensors", name)]
    if parts:
        return f"holds {parts[0]} without {_index(stem, variant)}, which lists the parts: copy it, too"
    if any(name.endswith(".bin") for name in held):
        return (
            "holds its weights only as pickles (.bin), which are not loaded here. Write them as safetensors beside "
            f"them once: python -c \"import {loader.partition('.')[0]}; {loader}.from_pretrained('{folder}', "
            f"use_safetensors=False).save_pretrained('{folder}')\""
        )
    for name in held:
        if Path(name).suffix in FILES:
            return f"holds {name}: that is {FILES[Path(name).suffix]}"
    others = [name for name in held if name.endswith((".safetensors", ".ckpt", ".pt", ".pth"))]
    if others:
        return f"holds no {_single(stem, variant)}, by which it would be loaded, but {', '.join(others[:4])}"
    return f"holds no {_single(stem, variant)}; it holds {', '.join(held[:8]) or 'nothing'}"


def _variants(held: list[str], stem: str) -> list[str | None]:
    """Those whose weights a folder holds; None is the one without a name."""
    found: set[str | None] = set()
    for name in held:
        single = re.fullmatch(rf"{stem}(?:\.([\w-]+?))?(-\d+-of-\d+)?\.safetensors", name)
        index = re.fullmatch(rf"{stem}\.safetensors\.index(?:\.([\w-]+))?\.json", name)
        if single is not None and single[2] is None:
            found.add(single[1])
        elif index is not None:
            found.add(index[1])
    return sorted(found, key=lambda name: name or "")


def _is_or_are(names: list[str]) -> str:
    return "is" if len(names) == 1 else "are"
