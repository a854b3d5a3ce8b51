"""The way of an export to the Hugging Face hub: what can be known beforehand is asked before any work."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffpp_fast.errors import ConfigurationError


def refuse_name(name: str) -> None:
    """Raise ConfigurationError for what can't be a repository's name; the hub is not asked."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    said = f"--push {name}: a repository's name is OWNER/NAME"
    if name.count("/") != 1:
        raise ConfigurationError(said)
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise ConfigurationError(
            f"{said}, in letters, digits, - _ and ., at most 96 of them, with no - or . at either end, none of "
            "them twice in a row (-- or ..), and no .git at the end"
        ) from None


class HubRepository:
    """A repository that an export will be pushed to.

    Args:
        name: OWNER/NAME, which `refuse_name` has let pass.
        private: of a repository that is not there yet.

    Raises ConfigurationError where the hub can't be reached, does not know who asks, or has a repository of this name
    that they may not write into; nothing is made there.
    """

    def __init__(self, name: str, *, private: bool) -> None:
        from huggingface_hub import HfApi, constants, get_token

        self.name, self.private = name, private
        self._where = f"--push {name}"
        if constants.is_offline_mode():
            raise ConfigurationError(
                f"{self._where}: HF_HUB_OFFLINE is set, so the hub is not asked: unset it, or export without --push "
                f"and later run: {_command(name)}"
            )
        if get_token() is None:
            raise ConfigurationError(
                f"{self._where}: nobody has logged in to the hub here: run `hf auth login`, or set HF_TOKEN to a token "
                "that may write"
            )
        self._api: Any = HfApi()
        with self._asking():
            who = self._api.whoami()
        role = ((who.get("auth") or {}).get("accessToken") or {}).get("role")
        if role == "read":
            raise ConfigurationError(
                f"{self._where}: the token of {who.get('name')} may only read: log in with one that may write"
            )
        with self._asking():
            self._refuse_others()

    def upload(self, folder: Path, message: str) -> str:
        """Make the repository, where it is not there, and upload all files of an export as one commit.

        Returns the repository's address. Raises ConfigurationError where that fails; the export stays where it is.
        """
        with self._asking(f" The export is whole in {folder}; to push it later: {_command(self.name, folder)}"):
            self._api.create_repo(self.name, private=self.private, exist_ok=True)
            self._api.upload_folder(repo_id=self.name, folder_path=str(folder), commit_message=message)
        return f"{self._api.endpoint}/{self.name}"

    def _refuse_others(self) -> None:
        """Raise the hub's error for a repository that is there and not open to these changes; 404 is one to be made."""
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        place = f"{self._api.endpoint}/api/models/{self.name}/auth-check/write"
        answer = get_session().get(place, headers=build_hf_headers())
        if answer.status_code != 404:
            hf_raise_for_status(answer)

    @contextmanager
    def _asking(self, then: str = "") -> Iterator[None]:
        from huggingface_hub import errors

        try:
            yield
        except errors.HfHubHTTPError as error:
            status = error.response.status_code
            reason = {401: "the token is not valid", 403: "the token may not write there", 409: "the name is taken"}
            said = reason.get(status, _first_line(error))
            raise ConfigurationError(f"{self._where}: the hub refuses: {said} (HTTP {status}).{then}") from error
        # Of whichever client this version of the package has; and what its uploader raises of its own.
        except (errors.HTTPError, OSError, RuntimeError, ValueError) as error:
            if then:
                raise ConfigurationError(f"{self._where}: the upload failed: {_first_line(error)}.{then}") from error
            raise ConfigurationError(
                f"{self._where}: {self._api.endpoint} can't be reached ({_first_line(error)}). Export without --push, "
                f"and when there is a network run: {_command(self.name)}"
            ) from error


def _command(name: str, folder: Path | None = None) -> str:
    return f"hf upload {name} {'FOLDER' if folder is None else shlex.quote(str(folder))} ."


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
