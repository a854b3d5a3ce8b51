"""The members of a tar archive and where they lie, without reading what is in them."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

BLOCK = tarfile.BLOCKSIZE
END = bytes(BLOCK)
#: Types of members: files, and headers that give the next member a longer name or size.
FILES = (tarfile.REGTYPE, tarfile.AREGTYPE)
LONG_NAME, PAX = tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE


#: Bytes of a header that gives a longer name or size; more is damage.
LONGEST_HEADER = 1 << 20


class Member(NamedTuple):
    name: str
    #: Of its content, in bytes from the archive's beginning.
    offset: int
    size: int


def members(file: BinaryIO, length: int) -> Iterator[Member]:
    """The files in an uncompressed archive of `length` bytes, in order; `file` then stands at their content.

    `tarfile` does the same and takes several times as long, for it makes an object of every member and keeps it.

    Raises ValueError for what is damaged or cut off.
    """
    position = 0
    long_name, pax = None, dict[str, str]()
    while True:
        file.seek(position)
        header = file.read(BLOCK)
        if header == END:
            return
        if len(header) < BLOCK:
            raise ValueError(f"ends at byte {length} without an end mark: it is truncated")
        name, size, kind = _read_header(header, position)
        size = _decimal(pax["size"]) if "size" in pax else size
        offset, position = position + BLOCK, position + BLOCK + -(-size // BLOCK) * BLOCK
        if offset + size > length:
            raise ValueError(f"ends at byte {length}, within {name}: it is truncated")
        if kind in (LONG_NAME, PAX) and size > LONGEST_HEADER:
            raise ValueError(f"has a header of {size} bytes at byte {offset}: it is damaged")
        if kind == LONG_NAME:
            long_name = _text(file.read(size))
        elif kind == PAX:
            pax = _pax_records(file.read(size))
        else:
            if kind in FILES:
                yield Member(pax.get("path") or long_name or name, offset, size)
            long_name, pax = None, {}


def _read_header(header: bytes, position: int) -> tuple[str, int, bytes]:
    """Name, size and type."""
    try:
        # The checksum counts its own eight bytes as spaces.
        right = _number(header[148:156]) == sum(header) - sum(header[148:156]) + 8 * ord(" ")
        size = _number(header[124:136])
    except ValueError:
        right, size = False, 0
    if not right or size < 0:
        raise ValueError(f"has no tar header at byte {position}: it is damaged, compressed or no tar archive")
    name = _text(header[:100])
    # In the older GNU format there is something else behind the name's prefix.
    if header[257:263] == b"ustar\0" and header[345]:
        name = f"{_text(header[345:500])}/{name}"
    return name, size, header[156:157]


def _number(field: bytes) -> int:
    """Octal digits, or beyond 8 GiB a binary number whose first bit is set."""
    if field[0] & 0x80:
        return int.from_bytes(field, "big") - (0x80 << 8 * (len(field) - 1))
    digits = field.strip(b" \0") or b"0"
    if not digits.isdigit():
        raise ValueError(f"{digits!r} is no octal number")
    return int(digits, 8)


def _decimal(text: str | bytes) -> int:
    """A pax record's number: digits, no sign and no more of them than a file's size has."""
    if not text.isdigit() or len(text) > 20:
        raise ValueError(f"has a pax header with the number {text[:20]!r}: it is damaged")
    return int(text)


def _text(data: bytes) -> str:
    return data.partition(b"\0")[0].decode("utf-8", "replace")


def _pax_records(data: bytes) -> dict[str, str]:
    """`LENGTH KEY=VALUE` lines, as POSIX has them; LENGTH is that of the whole line."""
    records = {}
    while data.strip(b"\0"):
        digits, space, _ = data.partition(b" ")
        length = _decimal(digits)
        if not space or not len(digits) + 1 < length <= len(data) or data[length - 1 : length] != b"\n":
            raise ValueError(f"has a pax header with a record of {length} bytes: it is damaged")
        key, _, value = data[len(digits) + 1 : length - 1].decode("utf-8", "replace").partition("=")
        records[key] = value
        data = data[length:]
    return records
