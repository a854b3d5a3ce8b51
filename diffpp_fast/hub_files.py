"""Files of the Hugging Face hub: from its cache at once where the hub can't be reached, which is asked once.

Its own client asks again for each file, five times over half a minute, before it looks into its cache.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


def hub_file(repository: str, name: str, subfolder: str | None = None) -> Path:
    """Return a file of a repository; raises OSError with the reason, or what the client raises, where there is none."""
    from huggingface_hub import hf_hub_download

    return _get(hf_hub_download, repository, name, subfolder=subfolder)


def hub_folder(repository: str, patterns: Sequence[str]) -> Path:
    """Return a folder with a repository's files of these names or patterns; raises like `hub_file`."""
    from huggingface_hub import snapshot_download

    return _get(snapshot_download, repository, allow_patterns=[*patterns])


def _get(download: Any, *arguments: Any, **more: Any) -> Path:
    from huggingface_hub import constants

    offline = constants.is_offline_mode()
    reason = "HF_HUB_OFFLINE is set" if offline else _silence(str(constants.ENDPOINT))
    if reason is None:
        return Path(download(*arguments, **more))
    try:
        found = Path(download(*arguments, **more, local_files_only=True))
    except OSError as error:
        raise FileNotFoundError(f"{reason}, and its cache here has no such file") from error
    if not offline:
        _tell(reason)
    return found


@cache
def _silence(endpoint: str) -> str | None:
    """Say that an address gives no answer, and why; None where it gives one, whichever."""
    from huggingface_hub import constants, errors
    from huggingface_hub.utils import get_session

    try:
        get_session().head(endpoint, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    # Of whichever client this version of the package has.
    except (errors.HTTPError, OSError) as error:
        return f"{endpoint} can't be reached ({(str(error).strip() or type(error).__name__).splitlines()[0]})"
    return None


@cache
def _tell(reason: str) -> None:
    logger.warning("%s: files are taken from its cache as they are. With HF_HUB_OFFLINE=1 it is not asked", reason)
