"""Networks, tensors and code that a scorer computes with, whatever kind of callable it is."""

from __future__ import annotations

import functools
import sys
import sysconfig
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

#: How far is looked: steps from the scorer to what it holds, and values in all.
DEPTH, MOST = 6, 100_000
#: What holds nothing.
PLAIN = (str, bytes, int, float, complex, type(None), type, types.ModuleType)
#: Where code lies that a run does not stand on by its content: installed packages, and this one.
LIBRARIES = [
    *(Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")),
    Path(__file__).resolve().parents[1],
]


def modules_of(scorer: Any) -> list[nn.Module]:
    """Modules that a scorer is, closes over, is bound to or keeps in its attributes, each once; none inside another."""
    found = {id(value): value for value in _walk(scorer) if isinstance(value, nn.Module)}
    inner = {id(part) for module in found.values() for part in module.modules() if part is not module}
    return [module for number, module in found.items() if number not in inner]


def tensors_of(scorer: Any) -> dict[str, torch.Tensor]:
    """Tensors that it computes with: of its modules by number and name, then the others by number."""
    tensors = {
        f"{number}.{name}": tensor
        for number, module in enumerate(modules_of(scorer))
        for name, tensor in module.state_dict().items()
    }
    others = [value for value in _walk(scorer) if isinstance(value, torch.Tensor)]
    return {**tensors, **{str(number): tensor for number, tensor in enumerate(others)}}


def sources_of(scorer: Any) -> list[Path]:
    """Files with code of it that belong neither to this package nor to an installed one."""
    values = list(_walk(scorer))
    values += [part for module in modules_of(scorer) for part in module.modules()]
    functions = {value.__code__.co_filename for value in values if isinstance(value, types.FunctionType)}
    classes = {getattr(sys.modules.get(type(value).__module__), "__file__", None) for value in values}
    return sorted({Path(file).resolve() for file in (*functions, *classes) if file and _is_own(file)})


@functools.cache
def _is_own(file: str) -> bool:
    path = Path(file).resolve()
    return path.is_file() and not any(path.is_relative_to(folder) for folder in LIBRARIES)


def _walk(value: Any, depth: int = DEPTH, seen: dict[int, Any] | None = None) -> Iterator[Any]:
    seen = {} if seen is None else seen
    if isinstance(value, PLAIN) or id(value) in seen or len(seen) > MOST:
        return
    seen[id(value)] = value  # kept, so that its number stays its own
    yield value
    if depth:
        for inner in _held(value):
            yield from _walk(inner, depth - 1, seen)


def _held(value: Any) -> Iterator[Any]:
    """List what a value holds: a function's cells, defaults and globals, a method's owner, items, attributes."""
    if isinstance(value, types.MethodType):
        yield from (value.__self__, value.__func__)
    elif isinstance(value, types.FunctionType):
        for cell in value.__closure__ or ():
            try:
                yield cell.cell_contents
            except ValueError:  # not yet assigned
                continue
        if _is_own(value.__code__.co_filename):
            yield from (value.__globals__[name] for name in value.__code__.co_names if name in value.__globals__)
        yield from value.__defaults__ or ()
        yield from (value.__kwdefaults__ or {}).values()
    elif isinstance(value, functools.partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, Mapping):
        yield from list(value.values())
    elif isinstance(value, list | tuple):
        yield from value
    elif isinstance(value, nn.Module):
        for part in value.modules():
            yield from [inner for name, inner in vars(part).items() if not name.startswith("_")]
    elif hasattr(value, "__dict__") and not isinstance(value, torch.Tensor):
        yield from list(vars(value).values())
