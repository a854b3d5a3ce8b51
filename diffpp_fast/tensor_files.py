"""Files of weights: safetensors, read and written tensor by tensor, and what torch.save wrote, without unpickling."""

from __future__ import annotations

import json
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: What files of weights are called.
SUFFIXES = (".safetensors", ".bin", ".ckpt", ".pkl", ".pt", ".pth")
#: What wrappers put into every name, wherever the wrapped module is.
WRAPPERS = re.compile(r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
#: What a network is called inside a larger module; taken off where all names begin with it.
PREFIXES = ("module.", "model.", "unet.", "transformer.", "network.", "generator.")
#: Nodes of a checkpoint that hold tensors and are no weights.
NO_WEIGHTS = re.compile(r"opt|sched|scaler|rng|random|callback|loop", re.IGNORECASE)
#: The first bytes of files that are not what their names say.
SIGNS = {
    b"version https://git-lfs": "is a pointer of Git LFS, not the file itself: run `git lfs pull` where it was cloned",
    b"<!DOCTYPE": "is a web page, not weights: the download went wrong",
    b"<html": "is a web page, not weights: the download went wrong",
    b"GGUF": "is GGUF, which holds quantised weights for llama.cpp and its kin: take the model's safetensors",
}
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.complex64: "C64",
}  # fmt: skip
_NAMED = {name: dtype for dtype, name in _DTYPES.items()}


class Place(NamedTuple):
    """Where a tensor lies: the file, its dtype and shape, and its first and last byte."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class StoredTensors(Mapping[str, Tensor]):
    """Tensors in safetensors files by name; each is read when it is asked for, and not kept.

    Nothing is mapped into memory, where it would count as the process's own.

    Args:
        files: to read; a name in two of them is an error.

    Raises ValueError, naming the file, for one that is damaged, empty or no safetensors.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self.places: dict[str, Place] = {}
        for path in files:
            for name, place in _places(path).items():
                if name in self.places:
                    raise ValueError(f"{name} is in {self.places[name].path.name} and in {path.name} of {path.parent}")
                self.places[name] = place

    def __getitem__(self, name: str) -> Tensor:
        place = self.places[name]
        return self.elements(name, 0, torch.Size(place.shape).numel()).reshape(place.shape)

    def elements(self, name: str, start: int, count: int) -> Tensor:
        """Return elements [start, start + count) of a flattened tensor, [count]; no others are read."""
        place = self.places[name]
        data = bytearray(count * place.dtype.itemsize)
        with place.path.open("rb", buffering=0) as file:
            file.seek(place.begin + start * place.dtype.itemsize)
            view = memoryview(data)
            while view and (count := file.readinto(view)):
                view = view[count:]
        if view:
            raise ValueError(f"{place.path} has become shorter while it was read")
        return torch.frombuffer(data, dtype=place.dtype) if data else torch.empty(0, dtype=place.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


class Renamed(Mapping[str, Tensor]):
    """Some of the tensors of another mapping, by other names; each is looked up when it is asked for.

    Args:
        source: has them.
        names: those in `source`, by those here.
    """

    def __init__(self, source: Mapping[str, Tensor], names: Mapping[str, str]) -> None:
        self.source = source
        self.names = names

    def __getitem__(self, name: str) -> Tensor:
        return self.source[self.names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class Planned(NamedTuple):
    """A tensor that will be written: its dtype, its shape, and what makes it when its turn comes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


def read_tensors(path: Path, state_dict: str | None = None) -> Mapping[str, Tensor]:
    """Return the tensors of a .safetensors file, or of what torch.save wrote, on the CPU; nothing is unpickled.

    The one state dict inside a training checkpoint is taken out, and names that wrappers (torch.compile, FSDP,
    DistributedDataParallel) or a larger module have put in front of every key are taken off. Those of a .safetensors
    file are read when they are asked for.

    Args:
        path: of the file.
        state_dict: which of a file's state dicts: its key, with dots between those of nested ones, or what the names
            of its tensors begin with.

    Raises ValueError, with what to do, for a file that is damaged, holds anything else, or several state dicts.
    """
    stored = path.suffix == ".safetensors"
    content = None if stored else _read_pickled(path)
    found = {"": StoredTensors([path])} if stored else dict(_state_dicts(content))
    if not found:
        raise ValueError(f"{path} holds no state dict: {type(content).__name__}")
    tensors = _choose(path, found, state_dict)
    return Renamed(tensors, _plain_names({name: name for name in tensors}))


def read_index(path: Path) -> dict[str, str]:
    """Return which file beside an index in JSON holds a tensor, by the tensor's name.

    Raises ValueError, naming the index, for one that is damaged or names files elsewhere.
    """
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if not listed or not all(isinstance(name, str) and Path(name).name == name for name in listed.values()):
            raise TypeError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{path} is damaged: it should map names of tensors to files beside it") from None
    return dict(listed)


def metadata_of(path: Path) -> dict[str, str]:
    """Return the metadata of a .safetensors file; {} where it has none. Raises ValueError for one that is damaged."""
    _places(path)
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return dict(header.get("__metadata__") or {})


def drop_metadata(path: Path, unwanted: Callable[[str], bool]) -> None:
    """Take values out of the metadata of a .safetensors file, in place; the tensors stay where they are."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        metadata = header.get("__metadata__") or {}
        kept = {name: value for name, value in metadata.items() if not unwanted(value)}
        if kept != metadata:
            text = json.dumps({**header, "__metadata__": kept}, separators=(",", ":"), ensure_ascii=False)
            file.seek(8)
            file.write(text.encode().ljust(length))


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of tensors by name; those that are stored are not read."""
    if isinstance(tensors, Renamed):
        shapes = shapes_of(tensors.source)
        return {name: shapes[other] for name, other in tensors.names.items()}
    if isinstance(tensors, StoredTensors):
        return {name: place.shape for name, place in tensors.places.items()}
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the name of the first tensor with values that are NaN or infinite; None where there is none."""
    for name, tensor in tensors.items():
        if (
            not tensor.is_meta
            and tensor.is_floating_point()
            and tensor.numel()
            # Of 8 bits torch finds no extremes; bfloat16 has all of their values.
            and not torch.stack((tensor if tensor.itemsize > 1 else tensor.bfloat16()).aminmax()).isfinite().all()
        ):
            return name
    return None


def write_tensors(path: Path, tensors: Mapping[str, Planned]) -> None:
    """Write a safetensors file tensor by tensor, so that one of them is in memory at a time.

    Raises OSError where the disk fails, and ValueError where a tensor is not what was planned.
    """
    # Wider elements first keep every tensor aligned, as the format's own writer has it.
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    with TensorWriter(path, [(name, tensors[name].dtype, tensors[name].shape) for name in order]) as writer:
        for name in order:
            # No variable keeps a tensor while the next one is made.
            writer.write(tensors[name].make())


class TensorWriter:
    """Writes a safetensors file tensor by tensor, in the order that was announced.

    The header comes first in this format and holds every position, so that shapes have to be known beforehand.

    Args:
        path: of the file; replaced if there is one.
        tensors: name, dtype and shape of each.
    """

    def __init__(self, path: Path, tensors: Iterable[tuple[str, torch.dtype, Sequence[int]]]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._announced = list(tensors)
        end = 0
        for name, dtype, shape in self._announced:
            begin, end = end, end + dtype.itemsize * torch.Size(shape).numel()
            header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the data are aligned, as safetensors itself writes them
        self._file = path.open("wb")
        self._file.write(struct.pack("<Q", len(text)) + text)
        self._announced.reverse()

    def write(self, tensor: Tensor) -> None:
        """Append the next of the announced tensors; raise ValueError where it is another one."""
        name, dtype, shape = self._announced.pop()
        if (tensor.dtype, tuple(tensor.shape)) != (dtype, tuple(shape)):
            raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}, planned as {list(shape)}")
        self._file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()


def _places(path: Path) -> dict[str, Place]:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= size - 8:
                raise ValueError("the header is longer than the file")
            header: dict[str, Any] = json.loads(file.read(length))
        header.pop("__metadata__", None)
        unknown = sorted({facts["dtype"] for facts in header.values()} - _NAMED.keys())
        if not unknown:
            return _checked(path, header, 8 + length, size)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(_unreadable(path, f"can't be read as safetensors: {error}. Is it whole?")) from error
    raise ValueError(f"{path} holds tensors of {', '.join(unknown)}, which are not read here: quantised weights?")


def _checked(path: Path, header: Mapping[str, Any], begin: int, size: int) -> dict[str, Place]:
    """Return where tensors lie, if they fill the file from `begin` to its end, without gaps."""
    places, end = {}, begin
    for name, facts in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape = _NAMED[facts["dtype"]], tuple(facts["shape"])
        first, end = end, end + dtype.itemsize * torch.Size(shape).numel()
        if [begin + offset for offset in facts["data_offsets"]] != [first, end]:
            raise ValueError(f"{name} does not lie where the tensor before it ends")
        places[name] = Place(path, dtype, shape, first, end)
    if end != size:
        raise ValueError(f"it has {size} bytes, and its tensors end at {end}")
    return places


def _plain_names(names: Mapping[str, str]) -> dict[str, str]:
    """Return tensors' names in the network itself, without the names of what it was wrapped in: new -> old."""
    plain = {WRAPPERS.sub("", name): old for name, old in names.items()}
    prefix = next((prefix for prefix in PREFIXES if plain and all(name.startswith(prefix) for name in plain)), None)
    return plain if prefix is None else _plain_names({name.removeprefix(prefix): old for name, old in plain.items()})


def _read_pickled(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # damage shows as almost any kind of error
        if isinstance(error, pickle.UnpicklingError):
            raise ValueError(
                f"{path} holds more than tensors, and nothing else is unpickled, because unpickling runs code. If you "
                "trust it, write its state dict once with safetensors.torch.save_file and give that file's path. "
                f"({_first_line(error)})"
            ) from error
        said = f"can't be read: {_first_line(error)}. It should be what torch.save wrote of a state dict (no "
        raise ValueError(_unreadable(path, f"{said}TorchScript), or .safetensors; is it whole?")) from error


def _state_dicts(content: Any, place: str = "") -> Iterator[tuple[str, Mapping[str, Tensor]]]:
    """The mappings of names to tensors inside a checkpoint, each with the keys that lead to it."""
    if not isinstance(content, Mapping):
        return
    tensors = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}
    # A counter or a learning rate beside nested state dicts makes no state dict.
    if any(tensor.dim() > 0 for tensor in tensors.values()):
        yield place, tensors
    for name, value in content.items():
        if isinstance(name, str) and not NO_WEIGHTS.search(name):
            yield from _state_dicts(value, f"{place}.{name}" if place else name)


def _choose(path: Path, found: Mapping[str, Mapping[str, Tensor]], wanted: str | None) -> Mapping[str, Tensor]:
    if wanted is None:
        if len(found) > 1:
            names = ", ".join(name or "(the file's own tensors)" for name in found)
            raise ValueError(f"{path} holds several state dicts: choose one of {names} with the key state_dict")
        return next(iter(found.values()))
    if wanted in found:
        return found[wanted]
    for tensors in found.values():
        part = {name.removeprefix(f"{wanted}."): name for name in tensors if name.startswith(f"{wanted}.")}
        if part:
            return Renamed(tensors, part)
    beginnings = {name.partition(".")[0] for tensors in found.values() for name in tensors}
    known = ", ".join(name for name in found if name) or ", ".join(sorted(beginnings))
    raise ValueError(f"{path} holds no state dict {wanted}; it holds {known or 'no tensors'}")


def _unreadable(path: Path, said: str) -> str:
    if path.is_dir():
        return f"{path} is a folder, not a file"
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        return f"{path} can't be read: {error.strerror}"
    if not start:
        return f"{path} is empty: the download or the copy was cut off"
    known = next((words for sign, words in SIGNS.items() if start.startswith(sign)), None)
    return f"{path} {known or said}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
