"""Ctrl-C, SIGTERM and what schedulers send as a wish to stop after the current step, in all processes of a run."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

import torch

from diffpp_fast.training.distributed import World
from diffpp_fast.training.launch import is_launched

#: A terminal that is closed sends SIGHUP; schedulers send SIGUSR1, SIGUSR2 or SIGXCPU before the time is up.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
#: Launchers pass a signal on to processes that may have got it already: within so many seconds it is the same one.
ECHO_SECONDS = 5.0


class Interrupt:
    """Inside this context the first of `SIGNALS` is only noted; a second one acts as it would outside.

    Outside the main thread, where no handler can be set, it does nothing. A SIGHUP that `nohup` has told the process to
    ignore stays ignored.

    Args:
        world: the processes, of which any may get the signal.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        #: The signal that came, if one did: in this process, and once `agree` has told, in any.
        self.signal: int | None = None
        # A terminal sends a second Ctrl-C only when it is pressed again.
        self._echo_seconds = ECHO_SECONDS if is_launched() else 0.0
        self._came: float | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                before = signal.getsignal(number)
                # None: not Python's, and could not be put back.
                if before is not None and (number, before) != (signal.SIGHUP, signal.SIG_IGN):
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def agree(self) -> int | None:
        """The signal that any process has got, the same in all; None if none has (collective, once per step)."""
        own = self.signal
        if not self.world.any(own is not None):
            return None
        # By number, so that processes that got different ones agree, too.
        told = torch.tensor([int(own == number) for number in SIGNALS])
        self.signal = next(n for n, count in zip(SIGNALS, self.world.sum(told).tolist(), strict=True) if count)
        if own is None and self.world.is_main:
            self._say(f"{signal.Signals(self.signal).name} in another process: saving a checkpoint")
        return self.signal

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._came is None:
            self._came = time.monotonic()
            self.signal = self.signal or number
            if self.world.is_main:
                again = f"again after {self._echo_seconds:.0f} s" if self._echo_seconds else "again"
                name = signal.Signals(number).name
                self._say(f"{name}: finishing this step and saving a checkpoint; {again} to stop at once")
        elif time.monotonic() - self._came >= self._echo_seconds:
            self._restore()
            signal.raise_signal(number)

    def _say(self, sentence: str) -> None:
        # Not through sys.stderr: a handler may run in the middle of a print, and a second one then fails.
        with suppress(OSError):  # the terminal may be closed
            os.write(2, f"\n{sentence}\n".encode())

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
