"""Networks in diffusers' format from a hub id, a folder, or a folder inside an installed package."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from diffpp_fast import tensor_files
from diffpp_fast.hub_files import hub_file, hub_folder
from diffpp_fast.networks.authors_names import Parts, from_authors
from diffpp_fast.networks.decoder import FrozenDecoder
from diffpp_fast.networks.denoiser import Denoiser
from diffpp_fast.networks.foreign import FILES, describe, misfit
from diffpp_fast.networks.weight_files import DIFFUSERS, LORA_FILES, open_weights, patterns
from diffpp_fast.schedule import NoiseSchedule

#: Names in attention layers that autoencoders were saved with before diffusers 0.15.
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def resolve(path: str) -> str:
    """Return `package:NAME/sub/folder` as that folder of an installed package; anything else stays as it is.

    Raises FileNotFoundError where the package, or a path that is written like one, does not exist, and ValueError for a
    path that is empty or of a file.
    """
    if not path.strip():
        raise ValueError("the path is empty: name a folder or a hub id")
    if path.startswith("package:"):
        package, _, rest = path.removeprefix("package:").partition("/")
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise FileNotFoundError(f"{path}: the package {package} is not installed")
        path = str(Path(spec.submodule_search_locations[0]) / rest)
    elif not path.startswith((".", "/", "~")) and "/" in path and not exists(Path(path)):
        return path  # a hub id
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(absent(folder, "folder"))
    return str(folder)


def absent(path: Path, wanted: Literal["file", "folder"]) -> str:
    """Return why there is no such file or folder: another kind of thing is there, a link leads nowhere, nothing is."""
    if path.is_file():
        return f"{path} is a file, where a folder is wanted"
    if path.is_dir():
        return f"{path} is a folder, where a file is wanted"
    for place in (path, *path.parents):
        if place.is_symlink() and not place.exists():
            return f"no such {wanted}: {path}: {place} is a link to {place.readlink()}, which is not there"
        if place.exists():
            return f"no such {wanted}: {path}" + ("" if place.is_dir() else f": {place} is a file")
    return f"no such {wanted}: {path}"


def exists(path: Path) -> bool:
    """Return whether a path is of something; one that can't be looked at, or is too long, is of nothing."""
    try:
        return path.exists()
    except OSError:
        return False


def local_folder(path: str, files: Sequence[str]) -> Path:
    """Return a folder with these files (patterns), which come from the hub where the path is a hub id.

    Raises FileNotFoundError for a path of neither.
    """
    found = resolve(path)
    if Path(found).is_dir():
        return Path(found)
    repository, inside = split_hub_id(found)
    with _asking_the_hub(found):
        root = hub_folder(repository, [f"{inside}/{name}" if inside else name for name in files])
    if not (root / inside).is_dir():
        raise FileNotFoundError(f"the hub's {repository} has no folder {inside}")
    return root / inside


def pretrained_arguments(path: str) -> dict[str, str]:
    """Return what `from_pretrained` takes for a path: the last parts of the hub id `owner/name/sub/folder` are a
    subfolder."""
    found = resolve(path)
    if Path(found).is_dir():
        return {"pretrained_model_name_or_path": found}
    repository, inside = split_hub_id(found)
    arguments = {"pretrained_model_name_or_path": repository}
    return {**arguments, "subfolder": inside} if inside else arguments


def split_hub_id(path: str) -> tuple[str, str]:
    """Split `owner/name/what/is/inside` into `owner/name` and `what/is/inside`."""
    owner, name, *inside = path.split("/")
    return f"{owner}/{name}", "/".join(inside)


def read_config(path: str, name: str = "config.json") -> dict[str, Any]:
    """Return the content of a JSON file in a folder or at a hub id.

    Raises FileNotFoundError where a folder has no such file, and ValueError where it holds no JSON object.
    """
    found = resolve(path)
    file = Path(found) / name
    if not Path(found).is_dir():
        repository, inside = split_hub_id(found)
        with _asking_the_hub(found):
            file = hub_file(repository, name, inside or None)
    elif not file.is_file():
        raise FileNotFoundError(f"{found} holds no {name}: {_instead(Path(found), name)}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged: it is no JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} is damaged: it should hold keys and values")
    return content


def is_file(path: str) -> bool:
    """Return whether a path names a single file of weights, and not a folder in diffusers' format."""
    named = path.lower().endswith((*tensor_files.SUFFIXES, *FILES))
    return named and not (exists(Path(path)) and Path(path).is_dir())


def load_denoiser(
    path: str,
    *,
    dtype: torch.dtype = torch.float32,
    configuration: str | None = None,
    variant: str | None = None,
    state_dict: str | None = None,
) -> Denoiser:
    """Return a UNet or a transformer, whichever class its `config.json` names.

    Args:
        path: a folder or a hub id, or a file with a network's weights by diffusers' names: `.safetensors`, or what
            torch.save wrote of a state dict, which is read without unpickling.
        dtype: of the weights, whatever they are stored in.
        configuration: for a file: the folder or hub id of a network with the same `config.json`.
        variant: for a folder: which of its weights, e.g. "fp16".
        state_dict: for a file: which of its state dicts.

    Raises:
        FileNotFoundError: there is no such folder or file.
        ValueError: a file without `configuration`, one that holds more than tensors, or weights that are not those
            of the network, or not finite.
    """
    if not is_file(path):
        return Denoiser(_load(path, dtype, variant))
    if configuration is None:
        raise ValueError(f"{path} is a single file: it needs the configuration of a network to fit into")
    return Denoiser(_load_file(path, configuration, state_dict).to(dtype))


def load_decoder(
    path: str,
    *,
    dtype: torch.dtype = torch.float32,
    checkpoint: bool = False,
    rows: int | None = None,
    variant: str | None = None,
) -> FrozenDecoder:
    """Return an `AutoencoderKL` or `AutoencoderTiny`, frozen.

    Args:
        path: a folder or a hub id.
        dtype: of the weights, whatever they are stored in.
        checkpoint, rows: as in `FrozenDecoder`.
        variant: which of the folder's weights, e.g. "fp16".

    Raises like `load_denoiser` and `FrozenDecoder`.
    """
    return FrozenDecoder(_load(path, dtype, variant), checkpoint=checkpoint, rows=rows)


def load_schedule(path: str) -> NoiseSchedule:
    """Return the noise schedule of `path`, a folder with `scheduler_config.json`."""
    return NoiseSchedule.from_diffusers(load_scheduler(path))


def load_scheduler(path: str) -> Any:
    """Return the scheduler of diffusers that a folder with `scheduler_config.json` names.

    Raises ValueError where the file leaves the noise levels open, for which diffusers' defaults would stand in.
    """
    config = read_config(path, "scheduler_config.json")
    kind = diffusers_class(config, path, "SchedulerMixin")
    parameters = inspect.signature(kind.__init__).parameters
    needed = ["num_train_timesteps"]
    if config.get("trained_betas") is None and "beta_schedule" in parameters:
        needed += ["beta_schedule"]
        if config.get("beta_schedule") in ("linear", "scaled_linear", None):
            needed += ["beta_start", "beta_end"]
    open_keys = [key for key in needed if key in parameters and config.get(key) is None]
    if open_keys:
        raise ValueError(
            f"{path}: scheduler_config.json lacks {', '.join(open_keys)}, which say how much noise there is"
        )
    return kind.from_config(config)


def build_network(config: Mapping[str, Any], path: str) -> nn.Module:
    """Return a network at random weights; nothing is drawn from the global generator's own sequence."""
    with torch.random.fork_rng(devices=[]):
        network: nn.Module = diffusers_class(config, path, "ModelMixin").from_config(config)
        return network


def open_denoiser(
    path: str, configuration: str, variant: str | None = None, state_dict: str | None = None
) -> Mapping[str, torch.Tensor]:
    """Return the stored weights of a network by name, in the precision that they have there.

    Args are those of `load_denoiser`. Raises ValueError, with what is wrong, unless they are exactly the network's.
    """
    if not is_file(path):
        return _open(path, variant)
    tensors = read_file(path, state_dict)
    wanted = _shapes(configuration)
    by_authors = from_authors(tensors) if "pos_embed.proj.weight" in wanted else None
    return _refuse_misfit(path, by_authors or pick(tensors, wanted), wanted, configuration)


def network_shapes(configuration: str) -> Mapping[str, tuple[int, ...]]:
    """Return the shapes of a network's tensors by name, of the folder or hub id of its `config.json`."""
    return _shapes(configuration)


def find_file(path: str) -> Path:
    """Return a single file, here, in an installed package or on the hub; raises FileNotFoundError for none."""
    return _find_file(path)


def refuse_stored(path: str, variant: str | None) -> None:
    """Raises like `load_denoiser` for a folder or hub id of diffusers whose weights don't fit; none is read."""
    _open(path, variant)


def read_file(path: str, state_dict: str | None = None) -> Mapping[str, torch.Tensor]:
    """Return the tensors of a single file of weights, here or on the hub; raises like `load_denoiser`."""
    suffix = Path(path).suffix.lower()
    if suffix in FILES:
        raise ValueError(f"{path} is {FILES[suffix]}")
    return tensor_files.read_tensors(_find_file(path), state_dict)


def pick(tensors: Mapping[str, torch.Tensor], wanted: Iterable[str]) -> Mapping[str, torch.Tensor]:
    """Return the one network that a file with several holds, where all of its names are behind one prefix.

    Raises ValueError for several such networks.
    """
    names = list(wanted)
    if not names or names[0] in tensors:
        return tensors
    places = {name.removesuffix(names[0]) for name in tensors if name.endswith(f".{names[0]}")}
    whole = sorted(place for place in places if all(place + name in tensors for name in names))
    if len(whole) > 1:
        known = ", ".join(place.rstrip(".") for place in whole)
        raise ValueError(f"it holds several such networks: choose one of {known} with the key state_dict")
    if not whole:
        return tensors
    inside = [name for name in tensors if name.startswith(whole[0])]
    return tensor_files.Renamed(tensors, {name.removeprefix(whole[0]): name for name in inside})


def diffusers_class(config: Mapping[str, Any], path: str, base: Literal["ModelMixin", "SchedulerMixin"]) -> Any:
    """Return the class that a configuration names, which must be a network or a scheduler of diffusers."""
    import diffusers

    name = config.get("_class_name")
    if name is None and "model_type" in config:
        raise ValueError(f"{path} is a {config['model_type']} of transformers, not a network of diffusers")
    known = getattr(diffusers, name, None) if isinstance(name, str) else None
    if known is None:
        raise ValueError(f"{path}: diffusers has no class {name!r}")
    if not (isinstance(known, type) and issubclass(known, getattr(diffusers, base))):
        wanted = "network" if base == "ModelMixin" else "scheduler"
        raise ValueError(f"{path}: {name} is no {wanted} of diffusers")
    return known


def refuse_not_finite(path: str, network: nn.Module) -> None:
    """Raises ValueError, naming the first, for weights that are NaN or infinite."""
    name = tensor_files.first_not_finite(network.state_dict())
    if name is not None:
        raise ValueError(f"{path}: {name} holds values that are NaN or infinite")


def _load(path: str, dtype: torch.dtype, variant: str | None) -> nn.Module:
    tensors = _open(path, variant)
    folder = next(iter(tensors.places.values())).path.parent
    kind = diffusers_class(read_config(str(folder)), path, "ModelMixin")
    network: nn.Module = kind.from_pretrained(
        folder, torch_dtype=dtype, variant=variant, use_safetensors=True, low_cpu_mem_usage=False
    )
    refuse_not_finite(path, network)
    return network


def _load_file(path: str, configuration: str, state_dict: str | None) -> nn.Module:
    network = build_network(read_config(configuration), configuration)
    tensors = open_denoiser(path, configuration, state_dict=state_dict)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            tensor.copy_(tensors[name])
    refuse_not_finite(path, network)
    return network


def _open(path: str, variant: str | None) -> tensor_files.StoredTensors:
    """The weights of a folder or hub id, compared by name and shape with the network of its `config.json`."""
    folder = local_folder(path, ["config.json", *patterns(DIFFUSERS, variant)])
    config = read_config(str(folder))
    kind = diffusers_class(config, path, "ModelMixin")
    tensors = open_weights(folder, DIFFUSERS, variant, f"diffusers.{kind.__name__}")
    spare = getattr(kind, "_keys_to_ignore_on_load_unexpected", None) or ()
    _refuse_misfit(path, tensors, _shapes(str(folder)), "its config.json", spare)
    return tensors


def _refuse_misfit(
    path: str,
    tensors: Mapping[str, torch.Tensor],
    wanted: Mapping[str, tuple[int, ...]],
    configuration: str,
    spare: Iterable[str] = (),
) -> Mapping[str, torch.Tensor]:
    shapes = tensors.shapes() if isinstance(tensors, Parts) else tensor_files.shapes_of(tensors)
    stored = {_renamed(name, wanted): shape for name, shape in shapes.items()}
    said = misfit(stored, wanted, spare)
    if said is not None:
        kind = describe(stored.keys() - wanted.keys(), path)
        raise ValueError(
            f"{path} {said}: it must hold all weights of the network of {configuration}, by diffusers' names"
            + (f"; {kind}" if kind else "")
        )
    return tensors


def _renamed(name: str, wanted: Mapping[str, Any]) -> str:
    """A name of an attention layer as diffusers has it now: it reads those of before version 0.15, too."""
    if name in wanted:
        return name
    for old, new in OLD_ATTENTION.items():
        name = name.replace(f".{old}.", f".{new}.")
    return name


def _shapes(configuration: str) -> Mapping[str, tuple[int, ...]]:
    """The shapes of a network's tensors by name, without building any."""
    return _shapes_of(json.dumps(read_config(configuration)), configuration)


@lru_cache(maxsize=8)
def _shapes_of(config: str, path: str) -> Mapping[str, tuple[int, ...]]:
    with torch.device("meta"):
        network = build_network(json.loads(config), path)
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def _find_file(path: str) -> Path:
    if path.startswith("package:"):
        folder, _, name = path.rpartition("/")
        path = str(Path(resolve(folder)) / name)
    file = Path(path).expanduser()
    if file.is_file():
        return file
    if path.startswith((".", "/", "~")) or path.count("/") < 2:
        raise FileNotFoundError(absent(file, "file"))
    repository, inside = split_hub_id(path)
    with _asking_the_hub(path):
        return hub_file(repository, inside)


def _instead(folder: Path, name: str) -> str:
    """Say what a folder without a configuration may be."""
    held = sorted(entry.name for entry in folder.iterdir())
    lora = next((file for file in LORA_FILES if file in held), None)
    if lora is not None:
        return describe(LORA_FILES[lora], folder / lora)
    if "model_index.json" in held and name != "model_index.json":
        return "it is a whole pipeline, to be named in models.base; its parts are in its subfolders"
    return "is it a folder written by save_pretrained()?"


@contextmanager
def _asking_the_hub(path: str) -> Iterator[None]:
    """Says of whatever fails what to do: it is a name, the network, or a permission."""
    try:
        yield
    except Exception as error:
        repository, inside = split_hub_id(path)
        kind = "file" if inside and is_file(path) else "folder"
        # A repository may hold many networks: the command takes what is missing alone.
        part = "" if not inside else f" {inside}" if kind == "file" else f" --include '{inside}/*'"
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FileNotFoundError(
            f"there is no {kind} {path} here, and the hub gave no {repository} ({reason}). Where there is a network: "
            f"hf download {repository}{part}; then it is found in the cache, or by the {kind}'s path"
        ) from error
