"""Factories that a configuration names, `file.py:name` or `module:name`: found, and called where they belong.

A configuration is code: what it names is imported and run. So a name stands for what its file or package defines, and
for nothing that merely can be reached through it.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

from diffpp_fast.errors import ConfigurationError, UserError
from diffpp_fast.user_paths import real_path

#: Modules that files have imported from their own folders, and these folders.
_neighbours: dict[str, Path] = {}


def call_factory(factory: str, arguments: Mapping[str, Any], key: str, folder: Path = Path()) -> Any:
    """Return what a factory gives for these arguments.

    Args:
        factory: `file.py:name`, relative to `folder`, or `module:name`. A file may import what lies beside it.
        arguments: by name.
        key: of the configuration, for messages: what comes of `key.factory` and `key.arguments`.

    Raises ConfigurationError where there is no such function or class, where the file or package only imports it, where
    it does not take the arguments, and where the code fails; the message has its file and line.
    """
    source, _, name = factory.rpartition(":")
    path = real_path(folder / source)
    is_file = source.endswith(".py")
    if is_file and not path.is_file():
        raise ConfigurationError(f"{key}.factory: no such file: {folder / source}")
    with _beside(path.parent) if is_file else nullcontext():
        with explained(f"{key}.factory: {source}"):
            module = _load(path) if is_file else _import(source, key)
        found = _defined(module, source, name, key)
        try:
            inspect.signature(found).bind(**arguments)
        except TypeError as error:
            said = f"{key}.arguments do not fit {name}{inspect.signature(found)}"
            raise ConfigurationError(f"{said}: {error}") from None
        except ValueError:  # a class of a compiled module may tell nothing of its arguments
            pass
        with explained(f"{key}: {factory}"):
            return found(**arguments)


def _defined(module: ModuleType, source: str, name: str, key: str) -> Any:
    found = getattr(module, name, None)
    if callable(found) and _is_own(found, module):
        return found
    if callable(found):
        home = getattr(found, "__module__", None) or type(found).__module__
        raise ConfigurationError(
            f"{key}.factory: {source} does not define {name}, which is {home}'s: a factory is a function or class that "
            "the named file or package defines itself"
        )
    own = [other for other, value in vars(module).items() if callable(value) and _is_own(value, module)]
    known = ", ".join(other for other in own if not other.startswith("_")) or "none"
    raise ConfigurationError(f"{key}.factory: {source} has no function {name}; it has {known}")


def _is_own(value: Any, module: ModuleType) -> bool:
    """Whether a module, or another module of the same package that its `__init__` stands for, defines a value."""
    home = str(getattr(value, "__module__", ""))
    is_package = hasattr(module, "__path__")
    return home == module.__name__ or (is_package and home.startswith(f"{module.__name__}."))


def _load(path: Path) -> ModuleType:
    # Two files of one name in different folders are two modules.
    place = hashlib.sha256(str(path).encode()).hexdigest()[:12]
    spec = importlib.util.spec_from_file_location(f"diffpp_fast_user_{path.stem}_{place}", path)
    assert spec is not None and spec.loader is not None  # a path that ends in .py always has them
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[spec.name]
        raise
    return module


def _import(name: str, key: str) -> ModuleType:
    root = name.partition(".")[0]
    if root in sys.stdlib_module_names or root in ("builtins", "__main__"):
        raise ConfigurationError(f"{key}.factory: {name} is Python's own: a factory comes from a file or a package")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise ConfigurationError(f"{key}.factory: there is no module {name}; a file is written file.py:name") from None


@contextmanager
def _beside(folder: Path) -> Iterator[None]:
    """Within the block, modules in a folder can be imported, as if a file in it were run by itself.

    What a file of another folder has imported by the same name makes room; it stays what that file has.
    """
    for name, home in list(_neighbours.items()):
        if home != folder and ((folder / f"{name}.py").exists() or (folder / name).is_dir()):
            for other in [other for other in sys.modules if f"{other}.".startswith(f"{name}.")]:
                del sys.modules[other]
            del _neighbours[name]
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        if str(folder) in sys.path:
            sys.path.remove(str(folder))
        for name in sys.modules.keys() - before:
            if "." not in name and ((folder / f"{name}.py").exists() or (folder / name).is_dir()):
                _neighbours[name] = folder


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Says what failed, and where, if it is not one of the package's own errors."""
    try:
        yield
    except (UserError, KeyboardInterrupt):
        raise
    except SyntaxError as error:
        raise ConfigurationError(f"{what}: {error.filename}, line {error.lineno}: {error.msg}") from error
    except Exception as error:
        places = traceback.extract_tb(error.__traceback__)
        # What failed is told by the library; where, by the last line of somebody's own code.
        last = next((place for place in reversed(places) if "site-packages" not in place.filename), places[-1])
        raise ConfigurationError(
            f"{what}: {type(error).__name__}: {error} ({last.filename}, line {last.lineno})"
        ) from error
