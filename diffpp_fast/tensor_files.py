"""Files of weights from elsewhere: safetensors, and what torch.save wrote, read without unpickling."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

#: What files of weights are called.
SUFFIXES = (".safetensors", ".bin", ".ckpt", ".pkl", ".pt", ".pth")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of what torch.save wrote, on the CPU; nothing is unpickled.

    A state dict inside a checkpoint's "state_dict", "model" or "module" is taken out, and the prefix that
    DistributedDataParallel adds to every key is cut off.

    Raises ValueError, with what to do, for a file that is damaged or holds anything else.
    """
    tensors = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickled(path)
    if tensors and all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
    return tensors


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} can't be read as safetensors: {error}. Is it whole?") from error


def _read_pickled(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors, and nothing else is unpickled, because unpickling runs code. If you "
            "trust it, write its state dict once with safetensors.torch.save_file and give that file's path. "
            f"({_first_line(error)})"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise ValueError(
            f"{path} can't be read: {_first_line(error)}. It should be what torch.save wrote of a state dict (no "
            "TorchScript), or .safetensors; is it whole?"
        ) from error
    for name in ("state_dict", "model", "module"):
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    if not isinstance(content, Mapping) or not any(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} holds no state dict: {type(content).__name__}")
    return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
