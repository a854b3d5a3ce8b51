"""Networks in diffusers' format from a hub id, a folder, or a folder inside an installed package."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffpp_fast.networks.decoder import FrozenDecoder
from diffpp_fast.networks.denoiser import Denoiser
from diffpp_fast.schedule import NoiseSchedule


def resolve(path: str) -> str:
    """`package:NAME/sub/folder` -> that folder of an installed package; anything else stays as it is.

    Raises FileNotFoundError where the package, or a path that is written like one, does not exist.
    """
    if path.startswith("package:"):
        package, _, rest = path.removeprefix("package:").partition("/")
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise FileNotFoundError(f"{path}: the package {package} is not installed")
        path = str(Path(spec.submodule_search_locations[0]) / rest)
    elif not path.startswith((".", "/", "~")) and path.count("/") == 1 and not Path(path).exists():
        return path  # a hub id
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder: {folder}")
    return str(folder)


def load_denoiser(path: str, *, dtype: torch.dtype = torch.float32) -> Denoiser:
    """A UNet or a transformer, whichever class its `config.json` names."""
    return Denoiser(_load(path, dtype))


def load_decoder(path: str, *, dtype: torch.dtype = torch.float32, checkpoint: bool = False) -> FrozenDecoder:
    """An `AutoencoderKL` or `AutoencoderTiny`, frozen."""
    return FrozenDecoder(_load(path, dtype), checkpoint=checkpoint)


def load_schedule(path: str) -> NoiseSchedule:
    """The noise schedule of a folder with `scheduler_config.json`."""
    import diffusers

    config = _config(path, "scheduler_config.json")
    return NoiseSchedule.from_diffusers(_class(diffusers, config, path).from_config(config))


def _load(path: str, dtype: torch.dtype) -> nn.Module:
    import diffusers

    config = _config(path, "config.json")
    return _class(diffusers, config, path).from_pretrained(
        resolve(path), torch_dtype=dtype, use_safetensors=True, low_cpu_mem_usage=False
    )


def _config(path: str, name: str) -> dict[str, Any]:
    folder = Path(resolve(path))
    if not folder.is_dir():
        from huggingface_hub import hf_hub_download

        return json.loads(Path(hf_hub_download(path, name)).read_text())
    if not (folder / name).is_file():
        raise FileNotFoundError(f"{folder} holds no {name}: is it a folder written by save_pretrained()?")
    return json.loads((folder / name).read_text())


def _class(diffusers: Any, config: dict[str, Any], path: str) -> Any:
    name = config.get("_class_name")
    known = getattr(diffusers, name, None) if name else None
    if known is None:
        raise ValueError(f"{path}: diffusers has no class {name!r}")
    return known
