"""What is said beside a run's own line on the terminal."""

from __future__ import annotations

import logging
import sys


class Stderr(logging.Handler):
    """Logs to what `sys.stderr` is at the time: while a live line is shown, that is the place above it."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


def hide_loading_bars() -> None:
    """No progress bars for reading weights, which would break into the run's own line."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
