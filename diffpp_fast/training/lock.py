"""One writer for a folder, on one machine or on several that share a file system.

The lock is a file that names its holder: host, process, when it began. A file system needs no locks of its own for it,
which network shares often lack. A holder that was killed leaves its file; whoever comes next finds out that it is gone,
by the process table of the same machine, or, where the job is the same or the machine was started again, by the missing
heartbeat. What can't be found out is left to the user.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import shlex
import socket
import sys
import threading
import time
import weakref
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from diffpp_fast.errors import CheckpointError, ConfigurationError
from diffpp_fast.training.launch import is_launched, job_of
from diffpp_fast.user_paths import refuse_no_folder

LOCK = ".lock"
#: A holder shows that it is alive so often; one that has not done so for the second time is gone.
BEAT_SECONDS = 5.0
SILENCE_SECONDS = 20.0
#: The keys of a lock's file.
KEYS = {"host", "boot", "processes", "pid", "start", "launcher", "job", "began", "command", "token", "beat"}
#: Bytes of the command that are shown.
COMMAND = 200

logger = logging.getLogger(__name__)


class FolderLock:
    """Makes this process the only writer of a folder until `release`, or until it ends.

    In the same process a later lock replaces an earlier one, which then is no longer held.

    Args:
        folder: is made.
        name: of the lock's file in it.
        unlock: replace a lock whose holder may be alive elsewhere; None: the command has no such option.
        other: how another folder is chosen.

    Raises ConfigurationError where another process holds it, or may hold it, and where the folder can't be written to.
    """

    def __init__(
        self, folder: Path, *, name: str = LOCK, unlock: bool | None = False, other: str = "output=FOLDER"
    ) -> None:
        refuse_no_folder("folder", folder)
        self.folder = folder
        self.path = folder / name
        self._other = other
        self._record = {**_identity(), "token": secrets.token_hex(8), "beat": 0}
        self._made = not folder.exists()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            while not self._create():
                self._clear(bool(unlock), "start again with --unlock, or " if unlock is not None else "")
        except OSError as error:
            raise ConfigurationError(f"can't write to {folder}: {error.strerror or error}") from None
        stop = threading.Event()
        beating = threading.Thread(target=_beat, args=(self.path, self._record, stop), name="lock", daemon=True)
        beating.start()
        # Also when the interpreter ends.
        self._finalizer = weakref.finalize(self, _release, self.path, self._record, stop, self._made)

    def check(self) -> None:
        """Raise CheckpointError where another process has taken the folder over, so that this one must not write."""
        holder = _read(self.path)
        if holder is None:
            with suppress(OSError):  # somebody has removed the file; a file system may fail for a moment
                self._create()
        elif holder["token"] != self._record["token"]:
            raise CheckpointError(
                f"{self.folder} has been taken over by {_describe(holder)}: this one saves nothing more"
            )

    def release(self) -> None:
        """Remove the lock, and the folder if it was made for it and nothing is in it."""
        self._finalizer()

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def _create(self) -> bool:
        try:
            descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            return False
        try:
            os.write(descriptor, _text(self._record))
        except OSError:
            self.path.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)
        return True

    def _clear(self, unlock: bool, option: str) -> None:
        """Remove the lock that is there, or raise ConfigurationError."""
        holder = _read(self.path) or _patient_read(self.path)
        if holder is None:
            try:
                self.path.read_bytes()
            except FileNotFoundError:
                return
            logger.warning(
                "%s: an unreadable lock, which no writer leaves that is alive: taking the folder over", self.path
            )
        elif _is(holder, self._record):
            pass  # of this process
        elif _same_kernel(holder, self._record):
            if _start_of(holder["pid"]) in (holder["start"], ""):
                raise ConfigurationError(
                    f"{self.folder} is being written by {_describe(holder)}. {self._remedy(holder)}"
                )
            logger.warning("%s: taking over from %s, which is gone", self.folder, _describe(holder))
        elif not unlock:
            self._clear_elsewhere(holder, option)
        else:
            logger.warning("%s: taking over from %s, as asked for", self.folder, _describe(holder))
        self._remove(holder)

    def _clear_elsewhere(self, holder: dict[str, Any], option: str) -> None:
        """Return where a holder that the process table here does not show is known to be gone."""
        known = holder["host"] == self._record["host"] or (holder["job"] and holder["job"] == self._record["job"])
        if known and _is_silent(self.path, holder):
            logger.warning("%s: taking over from %s, which gives no sign of life", self.folder, _describe(holder))
            return
        alive = "it is alive" if known else f"whether it is alive can't be told from {self._record['host']}"
        raise ConfigurationError(
            f"{self.folder} is being written by {_describe(holder)}; {alive}. Wait for it or stop it there, or "
            f"choose another {self._other}. If it is gone, {option}remove {self.path}"
        )

    def _remedy(self, holder: dict[str, Any]) -> str:
        stop = f"kill {holder['pid']}"
        if holder["launcher"] is not None and _parent_of(holder["pid"]) != holder["launcher"]:
            return (
                "Its launcher is gone: it is left over from an earlier start. "
                f"Stop it ({stop}) and the processes beside it"
            )
        return f"Wait for it or stop it ({stop}), or choose another {self._other}"

    def _remove(self, holder: dict[str, Any] | None) -> None:
        # Another process may have found the same lock, removed it and made its own: that one must stay.
        aside = self.path.with_name(f"{self.path.name}.{self._record['token']}")
        try:
            self.path.rename(aside)
        except FileNotFoundError:
            return
        except OSError:  # no file system for renaming
            self.path.unlink(missing_ok=True)
            return
        found = _read(aside)
        if found is not None and (holder is None or found["token"] != holder["token"]):
            aside.rename(self.path)
            return
        aside.unlink(missing_ok=True)


def _identity() -> dict[str, Any]:
    """Return what tells this process from every other one, and people which one it is."""
    return {
        "host": socket.gethostname(),
        "boot": _line("/proc/sys/kernel/random/boot_id"),
        "processes": _link("/proc/self/ns/pid"),
        "pid": os.getpid(),
        "start": _start_of(os.getpid()),
        "launcher": os.getppid() if is_launched() else None,
        "job": job_of(os.environ),
        "began": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": _command(sys.argv)[:COMMAND],
    }


def _command(argv: list[str]) -> str:
    """The command line as it is typed, also where `python -m diffpp_fast` or a launcher has put a path in front."""
    program = Path(argv[0])
    own = program.name == "diffpp-fast" or program.parts[-2:] == ("diffpp_fast", "__main__.py")
    return shlex.join(["diffpp-fast" if own else argv[0], *argv[1:]])


def _text(record: dict[str, Any]) -> bytes:
    # Always of the same length, so that it can be written over in place.
    return (json.dumps({**record, "beat": f"{record['beat']:012d}"}) + "\n").encode()


def _read(path: Path) -> dict[str, Any] | None:
    """A lock's record; None where it isn't there or is none."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return record if record.keys() >= KEYS else None
    except (OSError, ValueError, AttributeError):
        return None


def _patient_read(path: Path) -> dict[str, Any] | None:
    """Return the record of a file that another process may just be writing."""
    time.sleep(1.0)
    return _read(path)


def _beat(path: Path, record: dict[str, Any], stop: threading.Event) -> None:
    while not stop.wait(BEAT_SECONDS):
        found = _read(path)
        if found is None or found["token"] != record["token"]:
            continue
        record["beat"] += 1
        with suppress(OSError), path.open("r+b") as file:
            file.write(_text(record))


def _release(path: Path, record: dict[str, Any], stop: threading.Event, made: bool) -> None:
    if record["pid"] != os.getpid():  # a fork's
        return
    stop.set()
    found = _read(path)
    with suppress(OSError):
        if found is not None and found["token"] == record["token"]:
            path.unlink()
        if made:
            path.parent.rmdir()


def _same_kernel(holder: dict[str, Any], record: dict[str, Any]) -> bool:
    """Tell whether the holder's process number means here what it meant there."""
    if holder["boot"] is None or record["boot"] is None:  # no Linux
        return bool(holder["host"] == record["host"])
    return bool((holder["boot"], holder["processes"]) == (record["boot"], record["processes"]))


def _is(holder: dict[str, Any], record: dict[str, Any]) -> bool:
    return _same_kernel(holder, record) and (holder["pid"], holder["start"]) == (record["pid"], record["start"])


def _is_silent(path: Path, holder: dict[str, Any]) -> bool:
    """Tell whether the holder's heartbeat stands still."""
    logger.info("%s: waiting %.0f s for a sign of life of %s", path.parent, SILENCE_SECONDS, _describe(holder))
    end = time.monotonic() + SILENCE_SECONDS
    while time.monotonic() < end:
        time.sleep(min(1.0, SILENCE_SECONDS / 4))
        found = _read(path)
        if found is not None and (found["token"], found["beat"]) != (holder["token"], holder["beat"]):
            return False
    return True


def _describe(holder: dict[str, Any]) -> str:
    return f"process {holder['pid']} on {holder['host']} (`{holder['command']}`, since {holder['began']})"


def _start_of(pid: int) -> str | None:
    """When a process began, in ticks since the machine did; "" where that can't be known, None where there is none."""
    stat = _stat_of(pid)
    if stat is not None:
        return None if stat[0] == "Z" else stat[19]
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:  # another user's
        pass
    return ""


def _parent_of(pid: int) -> int | None:
    stat = _stat_of(pid)
    return None if stat is None else int(stat[1])


def _stat_of(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat from the state on; the command before it may hold anything."""
    text = _line(f"/proc/{pid}/stat")
    return None if text is None else text.rpartition(")")[2].split()


def _line(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def _link(path: str) -> str | None:
    try:
        return os.readlink(path)
    except OSError:
        return None
