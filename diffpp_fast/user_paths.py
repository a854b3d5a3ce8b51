"""Paths as people write them."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from diffpp_fast.errors import ConfigurationError


def user_path(text: str) -> Path:
    """Return a path with `~` and `~user` at its beginning replaced by the home folder.

    Variables of the environment are left to the shell. Raises ConfigurationError for the home of nobody.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise ConfigurationError(f"{text}: there is no home folder for its ~: write the path out") from None


def real_path(path: Path) -> Path:
    """Return a path that is absolute and leads through no link; of links in a circle one stays.

    `Path.resolve` raises RuntimeError for these before Python 3.13. Whoever opens the path is told of them.
    """
    return Path(os.path.realpath(path))


def public_name(path: str | Path) -> str:
    """Return the name of a file or folder for readers elsewhere; "" for a home folder, whose name is a person's."""
    place = Path(path)
    is_home = place.parent.name in ("home", "Users") or str(place) == os.path.expanduser("~")
    return "" if is_home else place.name


def refuse_no_folder(name: str, folder: Path, *, writable: bool = True) -> None:
    """Raise ConfigurationError where nothing can be written into a folder of this path, there or yet to be made.

    Args:
        name: of the option or key that the path is from.
        writable: whether this user must be allowed to write there.
    """
    for part in (folder.absolute(), *folder.absolute().parents):
        try:
            mode = part.stat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            if part.is_symlink():
                raise ConfigurationError(f"{name} {folder}: {part} is a link to nothing: name a folder") from None
            continue
        except OSError as error:
            raise ConfigurationError(f"{name} {folder}: {error.strerror}: name a folder") from None
        if not stat.S_ISDIR(mode):
            raise ConfigurationError(f"{name} {folder}: {part} is a file: name a folder")
        if writable and not os.access(part, os.W_OK | os.X_OK):
            raise ConfigurationError(f"{name} {folder}: you may not write into {part}: name another folder")
        return
