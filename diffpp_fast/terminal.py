"""Text from files as a terminal is shown it: nothing that a terminal would obey."""

from __future__ import annotations

import re
import sys
from contextlib import suppress

#: Control characters but for tab and line feed, and those that turn the direction of writing or end a line elsewhere.
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def is_unicode(text: str) -> bool:
    """Return whether a text has bytes in UTF-8: halves of surrogate pairs, which JSON can name, have none."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def printable(text: str) -> str:
    """Return a text in which escape sequences and the like stand as what they are written as, `\\x1b`."""
    return _OBEYED.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode(), text)


def say(text: str) -> None:
    """Print what may hold text from files: prompts, names, values; nothing happens where nobody reads it any more."""
    with suppress(OSError):
        print(printable(text), flush=True)


def complain(text: str) -> None:
    """Print it to stderr."""
    with suppress(OSError):
        print(printable(text), file=sys.stderr, flush=True)
