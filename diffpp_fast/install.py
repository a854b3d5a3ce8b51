"""Hints on how to install what is missing. The package is on no index: a hint names the place it came from."""

from __future__ import annotations

import json
import re
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

NAME = "diffpp-fast"


def extra(name: str) -> str:
    """Return the command that installs one of the package's extras.

    It names the checkout that the package is run from, or the folder, archive or repository that it was installed from;
    where that is gone or unknown, what the extra consists of.
    """
    checkout = Path(__file__).parents[1]
    if (checkout / "setup.py").is_file() and (checkout / "pyproject.toml").is_file():
        return f'pip install --editable "{checkout}[{name}]"'
    try:
        installed = distribution(NAME)
    except PackageNotFoundError:
        return f"install the extra {name} of {NAME} from where you have it"
    record = _record(installed)
    url = str(record.get("url", ""))
    place = urlsplit(url)
    if place.scheme == "file" and Path(unquote(place.path)).exists():
        return f'pip install "{unquote(place.path)}[{name}]"'
    if place.scheme not in ("", "file"):
        vcs = record.get("vcs_info")
        source = f"{vcs['vcs']}+{url}@{vcs['commit_id']}" if vcs else url
        return f'pip install "{NAME}[{name}] @ {source}"'
    wanted = [
        re.match(r"[\w.-]+", line) for line in installed.requires or [] if re.search(rf"extra == ['\"]{name}", line)
    ]
    return f"pip install {' '.join(match[0] for match in wanted if match)}"


def _record(installed: Distribution) -> dict[str, Any]:
    """PEP 610's record of where a distribution was installed from; empty where there is none."""
    try:
        record = json.loads(installed.read_text("direct_url.json") or "{}")
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}
