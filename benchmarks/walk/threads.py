"""Registers and predicates of the threads that are walked: values where they are known."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.walk.memory import Words
from benchmarks.walk.operands import CONSTANT, INTEGER, REGISTER, after, bits_of

WARP = 32

Mask = NDArray[np.bool_]
#: Where a value is known: everywhere, nowhere, or by thread.
Known = bool | Mask
LOW = np.uint64(0xFFFFFFFF)
ABOVE = np.uint64(32)


class Unknown(Exception):
    """A source is unknown, and so is what an instruction writes."""


class Shape(NamedTuple):
    """Threads of a block, and programs (blocks) of a grid and of a cluster."""

    block: tuple[int, int, int]
    grid: tuple[int, int, int]
    cluster: tuple[int, int, int] = (1, 1, 1)

    @property
    def programs(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def threads(self) -> int:
        return self.block[0] * self.block[1] * self.block[2]


class Threads:
    """Registers and predicates of all threads, and how an instruction reads and writes them."""

    def __init__(self, banks: Mapping[int, bytes], shape: Shape, programs: Sequence[int]) -> None:
        self.banks = banks
        padded = -(-shape.threads // WARP) * WARP
        self.size = padded * len(programs)
        thread = np.tile(np.arange(padded, dtype=np.uint32), len(programs))
        program = np.repeat(np.array(programs, dtype=np.uint32), padded)
        self.exists: Mask = thread < shape.threads
        x, y, z = (program % shape.grid[0], program // shape.grid[0] % shape.grid[1],
                   program // (shape.grid[0] * shape.grid[1]))  # fmt: skip
        width, height, depth = shape.cluster
        self.special: dict[str, Words] = {
            "SR_TID.X": thread % np.uint32(shape.block[0]),
            "SR_TID.Y": thread // np.uint32(shape.block[0]) % np.uint32(shape.block[1]),
            "SR_TID.Z": thread // np.uint32(shape.block[0] * shape.block[1]),
            "SR_CTAID.X": x,
            "SR_CTAID.Y": y,
            "SR_CTAID.Z": z,
            "SR_LANEID": thread % np.uint32(WARP),
            "SR_CgaCtaId": x % np.uint32(width) + width * (y % np.uint32(height) + height * (z % np.uint32(depth))),
            "SRZ": np.zeros(self.size, np.uint32),
        }
        self.zero = self.special["SRZ"]
        self.never: Mask = np.zeros(self.size, bool)
        self.always: Mask = ~self.never
        self._registers: dict[str, tuple[Words, Known]] = {}
        self._predicates: dict[str, tuple[Mask, Known]] = {"PT": (self.always, True), "UPT": (self.always, True)}
        self._constants: dict[int, Words] = {}
        # Of the instruction that is executed: the threads that take part, and where its sources are known.
        self.mask: Mask | None = None
        self.known: Known = True

    # Reading. Each adds to `known`.

    def word(self, text: str, high: int = 0, floating: bool = False) -> Words:
        """Read an operand; `high` for the upper half of a pair."""
        text = text.removesuffix(".reuse")
        if match := REGISTER.fullmatch(text):
            value = self._register(match[3], match[4], high)
            return changed(value, match[1], match[2], floating) if match[1] or match[2] else value
        if match := CONSTANT.fullmatch(text):
            value = self._from_bank(int(match[3], 16), match[4], int(match[5] or "0", 16) + 4 * high)
            return changed(value, match[1], match[2], floating) if match[1] or match[2] else value
        if INTEGER.fullmatch(text):
            number = int(text, 16)
            return self.constant((number >> 32 if high else number) & 0xFFFFFFFF)
        if floating and (bits := bits_of(text)) is not None:
            return self.constant(bits)
        raise Unknown

    def pair(self, text: str) -> NDArray[np.uint64]:
        """Read two registers as a number of 64 bits."""
        negative = text.startswith("-") and not INTEGER.fullmatch(text)
        low, high = (
            self.word(text.lstrip("-") if negative else text),
            self.word(text.lstrip("-") if negative else text, 1),
        )
        both = low.astype(np.uint64) | (high.astype(np.uint64) << ABOVE)
        return ~both + np.uint64(1) if negative else both

    def number(self, text: str) -> NDArray[np.float32]:
        return self.word(text, floating=True).view(np.float32)

    def truth(self, text: str) -> Mask:
        value, known = self._predicates.get(text.lstrip("!"), (self.never, True))
        self._note(known)
        return ~value if text.startswith("!") else value

    def guard(self, text: str) -> tuple[Mask, Known]:
        """Return a predicate that may be unknown."""
        value, known = self._predicates.get(text.lstrip("!"), (self.never, True))
        return (~value if text.startswith("!") else value), known

    def constant(self, number: int) -> Words:
        if number not in self._constants:
            self._constants[number] = np.full(self.size, number, np.uint32)
        return self._constants[number]

    def _register(self, kind: str, number: str, high: int) -> Words:
        if number == "Z":
            return self.zero
        value, known = self._registers.get(f"{kind}{int(number) + high}", (self.zero, True))
        self._note(known)
        return value

    def _from_bank(self, bank: int, register: str | None, offset: int) -> Words:
        content = self.banks.get(bank, b"")
        if register is None:
            if offset + 4 > len(content):
                raise Unknown
            return self.constant(struct.unpack_from("<I", content, offset)[0])
        at = self.word(register).astype(np.int64) + offset
        if not content or int(at.max()) + 4 > len(content):
            raise Unknown
        table = np.frombuffer(content[: len(content) // 4 * 4], np.uint32)
        return table[at // 4]

    def _note(self, known: Known) -> None:
        if known is False:
            raise Unknown
        if known is not True:
            self.known = known if self.known is True else self.known & known

    # Writing, where the instruction takes part

    def put(self, name: str, value: Words) -> None:
        self._put(name, value, self.known)

    def put_pair(self, name: str, value: NDArray[np.uint64]) -> None:
        self.put(name, (value & LOW).astype(np.uint32))
        self.put(after(name, 1), (value >> ABOVE).astype(np.uint32))

    def put_number(self, name: str, value: NDArray[Any]) -> None:
        self.put(name, value.astype(np.float32).view(np.uint32))

    def put_truth(self, name: str, value: Mask) -> None:
        self._put_truth(name, value, self.known)

    def forget(self, name: str, count: int = 1) -> None:
        """Make registers from `name` on unknown."""
        for number in range(count):
            self._put(after(name, number), self.zero, False)

    def forget_truth(self, name: str) -> None:
        self._put_truth(name, self.never, False)

    def _put(self, name: str, value: Words, known: Known) -> None:
        if name.endswith("Z"):
            return
        if self.mask is not None:
            old, old_known = self._registers.get(name, (self.zero, True))
            value = np.where(self.mask, value, old)
            known = self._mixed(known, old_known)
        self._registers[name] = value, known

    def _put_truth(self, name: str, value: Mask, known: Known) -> None:
        if name.endswith("T"):
            return
        if self.mask is not None:
            old, old_known = self._predicates.get(name, (self.never, True))
            value = np.where(self.mask, value, old)
            known = self._mixed(known, old_known)
        self._predicates[name] = value, known

    def _mixed(self, new: Known, old: Known) -> Known:
        if new is old and isinstance(new, bool):
            return new
        assert self.mask is not None
        known: Mask = np.where(self.mask, new, old)
        return True if known.all() else known if known.any() else False


def changed(value: Words, sign: str | None, bar: str | None, floating: bool) -> Words:
    """-, ~ and | | in front of or around an operand."""
    if bar:
        value = value & np.uint32(0x7FFFFFFF) if floating else np.abs(value.view(np.int32)).view(np.uint32)
    if sign == "-":
        return value ^ np.uint32(0x80000000) if floating else ~value + np.uint32(1)
    return ~value if sign == "~" else value
