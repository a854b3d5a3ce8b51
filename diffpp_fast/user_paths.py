"""Paths as people write them."""

from __future__ import annotations

import os
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
