"""Errors that name the configuration's key, and numbers that have to agree."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from diffpp_fast import install
from diffpp_fast.errors import ConfigurationError


def agree(role: str, what: str, number: int, other: str, expected: int) -> None:
    """Raises ConfigurationError where two networks don't fit together."""
    if number != expected:
        raise ConfigurationError(f"{role} has {number} {what}, {other} has {expected}")


@contextmanager
def naming(key: str, path: str | None = None) -> Iterator[None]:
    """Names the configuration's key in the errors of whatever it is handed to."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name != "peft":
            raise
        raise ConfigurationError(f"{key}: peft is not installed: {install.extra('lora')}") from None
    except ConfigurationError:
        raise
    except (ValueError, OSError, RuntimeError) as error:
        where = f"{key} ({path})" if path and path not in str(error) else key
        hint = "; it was taken for a hub id, for there is no such folder" if _is_hub_id(path) else ""
        raise ConfigurationError(f"{where}: {error}{hint}") from error


def _is_hub_id(path: str | None) -> bool:
    # Folders are absolute in a loaded configuration.
    return path is not None and not path.startswith(("/", "package:"))
