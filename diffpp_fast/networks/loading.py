"""Networks in diffusers' format from a hub id, a folder, or a folder inside an installed package."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffpp_fast import tensor_files
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
    elif not path.startswith((".", "/", "~")) and "/" in path and not Path(path).exists():
        return path  # a hub id
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder: {folder}")
    return str(folder)


def pretrained_arguments(path: str) -> dict[str, str]:
    """What `from_pretrained` takes for a path: of the hub id `owner/name/sub/folder` the last part is a subfolder."""
    found = resolve(path)
    if Path(found).is_dir():
        return {"pretrained_model_name_or_path": found}
    repository, inside = split_hub_id(found)
    arguments = {"pretrained_model_name_or_path": repository}
    return {**arguments, "subfolder": inside} if inside else arguments


def split_hub_id(path: str) -> tuple[str, str]:
    """`owner/name/what/is/inside` -> (`owner/name`, `what/is/inside`)."""
    owner, name, *inside = path.split("/")
    return f"{owner}/{name}", "/".join(inside)


def read_config(path: str, name: str = "config.json") -> dict[str, Any]:
    """A JSON file in a folder or at a hub id. Raises FileNotFoundError where a folder has no such file."""
    found = resolve(path)
    folder = Path(found)
    if not folder.is_dir():
        from huggingface_hub import hf_hub_download

        repository, inside = split_hub_id(found)
        return json.loads(Path(hf_hub_download(repository, name, subfolder=inside or None)).read_text(encoding="utf-8"))
    if not (folder / name).is_file():
        raise FileNotFoundError(f"{folder} holds no {name}: is it a folder written by save_pretrained()?")
    return json.loads((folder / name).read_text(encoding="utf-8"))


def is_file(path: str) -> bool:
    """Whether a path names a single file of weights, and not a folder in diffusers' format."""
    return path.endswith(tensor_files.SUFFIXES)


def load_denoiser(path: str, *, dtype: torch.dtype = torch.float32, configuration: str | None = None) -> Denoiser:
    """A UNet or a transformer, whichever class its `config.json` names.

    Args:
        path: a folder or a hub id, or a file with a network's weights by diffusers' names: `.safetensors`, or what
            torch.save wrote of a state dict, which is read without unpickling.
        dtype: of the weights, whatever they are stored in.
        configuration: for a file: the folder or hub id of a network with the same `config.json`.

    Raises:
        FileNotFoundError: there is no such folder or file.
        ValueError: a file without `configuration`, one that holds more than tensors, or weights that are not those
            of the network.
    """
    if not is_file(path):
        return Denoiser(_load(path, dtype))
    if configuration is None:
        raise ValueError(f"{path} is a single file: it needs the configuration of a network to fit into")
    return Denoiser(_load_weights(path, configuration).to(dtype))


def load_decoder(path: str, *, dtype: torch.dtype = torch.float32, checkpoint: bool = False) -> FrozenDecoder:
    """An `AutoencoderKL` or `AutoencoderTiny`, frozen."""
    return FrozenDecoder(_load(path, dtype), checkpoint=checkpoint)


def load_schedule(path: str) -> NoiseSchedule:
    """The noise schedule of a folder with `scheduler_config.json`."""
    return NoiseSchedule.from_diffusers(load_scheduler(path))


def load_scheduler(path: str) -> Any:
    """The scheduler of diffusers that a folder with `scheduler_config.json` names."""
    config = read_config(path, "scheduler_config.json")
    return _class(config, path).from_config(config)


def build_network(config: Mapping[str, Any], path: str) -> nn.Module:
    """A network at random weights; nothing is drawn from the global generator's own sequence."""
    with torch.random.fork_rng(devices=[]):
        return _class(config, path).from_config(config)


def _load(path: str, dtype: torch.dtype) -> nn.Module:
    return _class(read_config(path), path).from_pretrained(
        **pretrained_arguments(path), torch_dtype=dtype, use_safetensors=True, low_cpu_mem_usage=False
    )


def _load_weights(path: str, configuration: str) -> nn.Module:
    state = tensor_files.read_tensors(_find_file(path))
    network = build_network(read_config(configuration), configuration)
    known = network.state_dict()
    missing, unknown = sorted(known.keys() - state.keys()), sorted(state.keys() - known.keys())
    if missing or unknown:
        wrong = [f"lacks {len(missing)} of {len(known)} tensors, e.g. {missing[0]}"] if missing else []
        wrong += [f"has {len(unknown)} that the network does not know, e.g. {unknown[0]}"] if unknown else []
        raise ValueError(
            f"{path} {' and '.join(wrong)}: it must hold all weights of the {type(network).__name__} "
            f"of {configuration}, by diffusers' names"
        )
    for name, tensor in known.items():
        if state[name].shape != tensor.shape:
            raise ValueError(
                f"{path}: {name} has shape {list(state[name].shape)}, in {configuration} it has {list(tensor.shape)}"
            )
    network.load_state_dict(state)
    return network


def _find_file(path: str) -> Path:
    if path.startswith("package:"):
        folder, _, name = path.rpartition("/")
        path = str(Path(resolve(folder)) / name)
    file = Path(path).expanduser()
    if file.is_file():
        return file
    if path.startswith((".", "/", "~")) or path.count("/") < 2:
        raise FileNotFoundError(f"no such file: {file}")
    from huggingface_hub import hf_hub_download

    repository, inside = split_hub_id(path)
    return Path(hf_hub_download(repository, inside))


def _class(config: Mapping[str, Any], path: str) -> Any:
    import diffusers

    name = config.get("_class_name")
    known = getattr(diffusers, name, None) if name else None
    if known is None:
        raise ValueError(f"{path}: diffusers has no class {name!r}")
    return known
