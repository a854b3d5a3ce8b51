"""Weights of reward models: found, read without unpickling, and fitted to a network key by key."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from diffpp_fast import tensor_files
from diffpp_fast.errors import ConfigurationError
from diffpp_fast.hub_files import hub_file

#: Where the value of a network's key comes from: the key in the file, and how the tensor there becomes the value.
Source = Callable[[str], tuple[str, Callable[[Tensor], Tensor]]]

# What a file with such a key is, most telling first.
_KINDS = (
    (r"blip\.visual_encoder\.", "ImageReward"),
    (r"visual_encoder\.(blocks|pos_embed)", "BLIP in its authors' format"),
    (r"visual\.(conv1|transformer|trunk)", "CLIP in OpenAI's or open_clip's format"),
    (r"vision_model\.", "CLIP or BLIP in transformers' format"),
    (r"text_model\.", "a text encoder in transformers' format"),
    (r"mm_projector\.", "a LLaVA or a CLIP-T5"),
    (r"(encoder|decoder)\.block\.", "a T5 in transformers' format"),
    (r"layers\.[0-9]+\.weight$", "an MLP such as the aesthetic predictor's"),
    (r"(decoder|encoder)\.(up|down)_blocks\.", "a diffusers autoencoder"),
    (r"(down|up|mid)_blocks?\.", "a diffusers UNet"),
    (r"transformer_blocks\.", "a diffusion transformer"),
    (r"param_groups", "an optimizer's state"),
)


def locate(path: str | Path, names: Sequence[str], what: str) -> Path:
    """A file that is given itself, or the first of `names` that a folder or a repository of the hub holds.

    Raises ConfigurationError, naming `what`, where there is none.
    """
    if not isinstance(path, str | Path):
        raise ConfigurationError(f"{what}: path must be text, got {path!r}")
    local = Path(path).expanduser()
    if local.is_file():
        return local
    if local.is_dir():
        found = next((local / name for name in names if (local / name).is_file()), None)
        if found is None:
            held = ", ".join(sorted(entry.name for entry in local.iterdir())[:8]) or "nothing"
            raise ConfigurationError(f"{what}: {local} has no {' or '.join(names)}; it holds {held}")
        return found
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(path)):
        raise ConfigurationError(f"{what}: no such file or folder: {local}")
    return _download(str(path), names, what)


def _download(repository: str, names: Sequence[str], what: str) -> Path:
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

    failures: list[Exception] = []
    for name in names:
        try:
            return hub_file(repository, name)
        except (OSError, ValueError, HfHubHTTPError, HFValidationError) as error:
            failures.append(error)
            # The repository, or the cache, is there and has no such file: it may have the next.
            if not isinstance(error, EntryNotFoundError | FileNotFoundError):
                break
    first, name = failures[0], names[0]
    reason = str(first).strip().splitlines()[0] if str(first).strip() else type(first).__name__
    command = f"hf download {repository}" + ("" if name == "config.json" else f" {name}")
    raise ConfigurationError(
        f"{what}: there is no folder {repository}, and the hub gave no {name} of that repository ({reason}). "
        f"Where there is a network: {command}; then give the path."
    ) from first


def read_tensors(path: Path, what: str) -> Mapping[str, Tensor]:
    """The tensors of a file, as `tensor_files` reads them.

    Raises ConfigurationError, naming `what`, where it can't be read.
    """
    try:
        return tensor_files.read_tensors(path)
    except ValueError as error:
        raise ConfigurationError(f"{what}: {error}") from error


def read_parts(path: str | Path, names: Sequence[str], what: str) -> tuple[Path, Mapping[str, Tensor]]:
    """A file of weights, or an index of several, located like any, and its tensors.

    Raises ConfigurationError, naming `what`, where one is missing, can't be read, or is not what the index says.
    """
    file = locate(path, names, what)
    if not file.name.endswith(".index.json"):
        return file, read_tensors(file, what)
    try:
        listed = tensor_files.read_index(file)
    except ValueError as error:
        raise ConfigurationError(f"{what}: {error}") from error
    # Beside a local index, or downloaded one by one.
    place = file.parent if Path(path).expanduser().exists() else path
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(listed.values())):
        part = read_tensors(locate(place, (name,), what), what)
        wrong = next((key for key in part if listed.get(key) != name), None)
        if wrong is not None:
            raise ConfigurationError(f"{what}: {file} is not that of the files beside it: {name} holds {wrong} besides")
        tensors.update(part)
    lost = sorted(listed.keys() - tensors.keys())
    if lost:
        raise ConfigurationError(
            f"{what}: {file} is not that of the files beside it: {listed[lost[0]]} does not hold {lost[0]}"
        )
    return file, tensors


def unchanged(key: str) -> tuple[str, Callable[[Tensor], Tensor]]:
    """The source of a file with the network's own keys."""
    return key, lambda value: value


def fit(
    network: nn.Module,
    tensors: Mapping[str, Tensor],
    path: Path,
    what: str,
    *,
    source: Source = unchanged,
    spare: Iterable[str] = (),
    dtype: torch.dtype = torch.float32,
) -> None:
    """Fills a network that was built on the meta device.

    Args:
        network: takes `tensors`, or its converted copies, as its weights.
        source: which key of the file a key of the network comes from, and how.
        spare: regular expressions of keys that the file may hold though the network has no use for them.
        dtype: of the weights.

    Raises ConfigurationError, naming the file and the first keys in question, unless every key fits and is finite.
    """
    values, missing, shapes, used = {}, [], [], set()
    for key, wanted in network.state_dict().items():
        name, convert = source(key)
        used.add(name)
        if name not in tensors:
            missing.append(name)
            continue
        try:
            value = convert(tensors[name])
        except (RuntimeError, IndexError):
            value = tensors[name]
        if value.shape != wanted.shape:
            shapes.append(f"{name} has shape {list(tensors[name].shape)}, for a {key} of {list(wanted.shape)}")
        values[key] = value.to(dtype) if value.is_floating_point() else value
    spares = re.compile("|".join(f"(?:{pattern})" for pattern in (*spare, r"(^|\.)position_ids$")))
    unexpected = [name for name in tensors if name not in used and not spares.search(name)]
    if missing or shapes or unexpected:
        raise ConfigurationError(_misfit(what, path, tensors, missing, shapes, unexpected))
    bad = tensor_files.first_not_finite(values)
    if bad is not None:
        raise ConfigurationError(f"{what}: {path}: {source(bad)[0]} holds values that are NaN or infinite")
    network.load_state_dict(values, assign=True)
    for module in network.modules():
        positions = module._buffers.get("position_ids")
        if positions is not None and positions.is_meta:  # transformers saves it no more: it counts the positions
            module._buffers["position_ids"] = torch.arange(positions.shape[-1]).expand(positions.shape)


def _misfit(
    what: str, path: Path, tensors: Mapping[str, Tensor], missing: list[str], shapes: list[str], unexpected: list[str]
) -> str:
    found = [
        f"{title} ({len(items)}): {', '.join(items[:3])}{', ...' if len(items) > 3 else ''}"
        for title, items in (("missing", missing), ("shapes", shapes), ("unexpected", unexpected))
        if items
    ]
    return f"{what}: {path} does not fit. It looks like {kind_of(tensors)}. {'; '.join(found)}"


def kind_of(tensors: Mapping[str, Tensor]) -> str:
    """Say what a file with these keys seems to be."""
    for pattern, kind in _KINDS:
        if any(re.match(pattern, name) for name in tensors):
            return kind
    return f"nothing known (first keys: {', '.join(list(tensors)[:3]) or 'none'})"
