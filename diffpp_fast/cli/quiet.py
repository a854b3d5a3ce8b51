"""Quiet for what is said beside a run's own line on the terminal."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from contextlib import suppress

from diffpp_fast.terminal import complain

#: Loggers of libraries that warn of what is not used here: bitsandbytes, which diffusers imports, of its 4-bit kernels,
#: and transformers of a torchvision without which its image processors work as well.
CHATTY = ("bitsandbytes.backends.cpu.ops", "transformers.utils.import_utils")


class Stderr(logging.Handler):
    """Logs to what `sys.stderr` is at the time: while a live line is shown, that is the place above it.

    A sentence that was just said is not said again, and one that only informs, of another network say, never.
    """

    def __init__(self) -> None:
        super().__init__()
        self._last: str | None = None
        self._informed: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        said = self.format(record)
        if said != self._last and said not in self._informed:
            complain(said)
        self._last = said
        if record.levelno <= logging.INFO:
            self._informed.add(said)


def silence_libraries() -> None:
    """Keep libraries from saying what concerns their own authors; `python -W default` shows it all the same.

    To be called before they are imported.
    """
    if sys.warnoptions:
        return
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    # Names that diffusers, DeepSpeed and torch are going to change between them, said at every call.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(diffusers|deepspeed|torch|transformers|peft)\.")
    # Generator and fake score may have adapters on one network.
    warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute", category=UserWarning)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def open_streams() -> None:
    """Make standard streams that can be written to, whatever the shell has closed."""
    # The next file that is opened would get a closed stream's number, and what libraries print would go into it.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (for the process's life)
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def drop_output() -> None:
    """Let what is still to be printed go nowhere if there is no reader, or the interpreter would fail at its end."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def hide_loading_bars() -> None:
    """No progress bars for reading weights, which would break into the run's own line."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
