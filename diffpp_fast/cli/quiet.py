"""The terminal of a run: its log above its own line, and libraries quiet."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from contextlib import suppress

from diffpp_fast.terminal import complain

#: Loggers of libraries whose warnings concern nothing here: bitsandbytes, which diffusers imports, warns of its 4-bit
#: kernels, and transformers of a torchvision without which its image processors work as well.
CHATTY = ("bitsandbytes.backends.cpu.ops", "transformers.utils.import_utils")


class Stderr(logging.Handler):
    """Logs to what `sys.stderr` is at the time: while a live line is shown, that is the place above it.

    A warning is not repeated right after itself, and information never: several networks give the same.
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
    """Keep libraries from warnings that concern their own authors; `python -W default` shows them all the same.

    Call it before they are imported.
    """
    if sys.warnoptions:
        return
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    # diffusers, DeepSpeed and torch warn at every call of names that they are going to change.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(diffusers|deepspeed|torch|transformers|peft)\.")
    # Generator and fake score may have adapters on one network.
    warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute", category=UserWarning)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def open_streams() -> None:
    """Open standard streams that can be written to, whatever the shell has closed."""
    # The next file that is opened would get a closed stream's number, and what libraries print would go into it.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (for the process's life)
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def drop_output() -> None:
    """Drop output that nobody reads any more, or the interpreter would fail at its end."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def show_log() -> None:
    """Show the package's log on stderr, and hide progress bars that would break into the run's own line."""
    logging.basicConfig(format="%(message)s", handlers=[Stderr()])
    hide_loading_bars()
    logging.getLogger("diffpp_fast").setLevel(logging.INFO)


def hide_loading_bars() -> None:
    """Hide the progress bars of reading weights."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
