"""How often a launch executes each instruction of its machine code, and which bytes it asks for: `Walk`.

Some programs of a launch are walked, all their threads in lockstep, with the arguments that the launch has: integers,
predicates and addresses are computed as the GPU would, so that every loop turns as often as it would there. Numbers
that are read from tensors, and what follows from them, are unknown and are not asked for: only a branch can depend on
them, and it is then taken as ordinary numbers would have it (`Walk._ordinary`).
"""

from __future__ import annotations

import re
import struct
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.machine_code import Function, Instruction

WARP = 32
#: A loop that turns more often than this is taken for one that has no end.
MOST_STEPS = 1_000_000
#: How many instructions of a path tell whether it is for rare numbers.
FAR = 40

#: Words of a program's shared memory, and the bits of an address in it; those above tell the program in its cluster.
MOST_SHARED = 2**16
_WINDOW = np.uint64(2**24 - 1)

Words = NDArray[np.uint32]
Mask = NDArray[np.bool_]
#: Where a value is known: everywhere, nowhere, or by thread.
Known = bool | Mask

_PREDICATE = re.compile(r"!?U?P(?:\d+|T)")
_REGISTER = re.compile(r"([-~])?(\|)?(U?R)(\d+|Z)\|?")
_CONSTANT = re.compile(r"([-~])?(\|)?c\[0x([0-9a-f]+)\]\[(?:(U?R\w+)\+?)?(?:0x([0-9a-f]+))?\]\|?")
_INTEGER = re.compile(r"-?0x[0-9a-f]+")
_LOW = np.uint64(0xFFFFFFFF)
_ABOVE = np.uint64(32)
_NOWHERE = np.uint64(2**64 - 1)


class WalkError(Exception):
    """A launch can't be followed."""


class _Unknown(Exception):
    """A source is unknown, and so is what an instruction writes."""


class Region(NamedTuple):
    """The memory of a tensor."""

    name: str
    begin: int
    size: int  # bytes
    content: NDArray[np.uint8] | None = None  # where its values are known


class Memory:
    """The tensors of a launch."""

    def __init__(self, regions: Sequence[Region]) -> None:
        self.regions = sorted(regions, key=lambda region: (region.begin, region.size))
        self._begins = np.array([region.begin for region in self.regions], dtype=np.uint64)
        self._ends = np.array([region.begin + region.size for region in self.regions], dtype=np.uint64)

    def find(self, addresses: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Return the number of the region that holds each address, -1 where none does."""
        if not self.regions:
            return np.full(addresses.shape, -1)
        at = np.searchsorted(self._begins, addresses, side="right").astype(np.int64) - 1
        return np.where((at >= 0) & (addresses < self._ends[np.maximum(at, 0)]), at, -1)

    def read(self, addresses: NDArray[np.uint64], words: int, bits: int) -> list[Words] | None:
        """Return what lies at each address, as words; None where it isn't known."""
        at = self.find(addresses)
        if (at != at[0]).any() or at[0] < 0:
            return None
        _, begin, size, content = self.regions[at[0]]
        offsets = (addresses - np.uint64(begin)).astype(np.int64)
        nbytes = min(bits // 8, 4)
        if content is None or int(offsets.max()) + bits // 8 > size:
            return None
        found = []
        for word in range(words):
            value = np.zeros(len(addresses), np.uint32)
            for byte in range(nbytes):
                value |= content[offsets + 4 * word + byte].astype(np.uint32) << np.uint32(8 * byte)
            found.append(value)
        return found


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


@dataclass
class Counts:
    """Counts of all programs that were walked."""

    executed: Counter[int] = field(default_factory=Counter)  # address of an instruction -> warps
    #: (number of the region, "read" or "written") -> bytes; an address counts once in a warp's instruction.
    moved: Counter[tuple[int, str]] = field(default_factory=Counter)
    #: What was guessed or could not be followed.
    doubts: set[str] = field(default_factory=set)


def chosen_programs(total: int, most: int) -> list[int]:
    """Return the programs that stand for all: every one of few, else some that no period of the grid lines up with."""
    if total <= most:
        return list(range(total))
    golden = (5**0.5 - 1) / 2
    return sorted({int((number + 0.5) * golden % 1.0 * total) for number in range(most)})


def walk(kernel: Function, bank: bytes, shape: Shape, memory: Memory, programs: Sequence[int]) -> Counts:
    """Follow some programs of a launch.

    Args:
        kernel: what is launched.
        bank: constant bank 0, as the driver fills it.
        shape: of block and grid.
        memory: its tensors.
        programs: their numbers in the grid.

    Raises:
        WalkError: a loop or an address of code depends on numbers that are not known.
    """
    walker = Walk(kernel, {0: bank, **kernel.banks}, shape, memory, programs)
    with np.errstate(all="ignore"):
        walker.run()
    return walker.counts


class _Threads:
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
        if match := _REGISTER.fullmatch(text):
            value = self._register(match[3], match[4], high)
            return _changed(value, match[1], match[2], floating) if match[1] or match[2] else value
        if match := _CONSTANT.fullmatch(text):
            value = self._from_bank(int(match[3], 16), match[4], int(match[5] or "0", 16) + 4 * high)
            return _changed(value, match[1], match[2], floating) if match[1] or match[2] else value
        if _INTEGER.fullmatch(text):
            number = int(text, 16)
            return self.constant((number >> 32 if high else number) & 0xFFFFFFFF)
        if floating and (bits := _bits(text)) is not None:
            return self.constant(bits)
        raise _Unknown

    def pair(self, text: str) -> NDArray[np.uint64]:
        """Read two registers as a number of 64 bits."""
        negative = text.startswith("-") and not _INTEGER.fullmatch(text)
        low, high = (
            self.word(text.lstrip("-") if negative else text),
            self.word(text.lstrip("-") if negative else text, 1),
        )
        both = low.astype(np.uint64) | (high.astype(np.uint64) << _ABOVE)
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
                raise _Unknown
            return self.constant(struct.unpack_from("<I", content, offset)[0])
        at = self.word(register).astype(np.int64) + offset
        if not content or int(at.max()) + 4 > len(content):
            raise _Unknown
        table = np.frombuffer(content[: len(content) // 4 * 4], np.uint32)
        return table[at // 4]

    def _note(self, known: Known) -> None:
        if known is False:
            raise _Unknown
        if known is not True:
            self.known = known if self.known is True else self.known & known

    # Writing, where the instruction takes part

    def put(self, name: str, value: Words) -> None:
        self._put(name, value, self.known)

    def put_pair(self, name: str, value: NDArray[np.uint64]) -> None:
        self.put(name, (value & _LOW).astype(np.uint32))
        self.put(after(name, 1), (value >> _ABOVE).astype(np.uint32))

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


class Walk(_Threads):
    """Executes a kernel. A thread has a program counter of its own; those that are furthest behind go first."""

    def __init__(
        self, kernel: Function, banks: Mapping[int, bytes], shape: Shape, memory: Memory, programs: Sequence[int]
    ) -> None:
        super().__init__(banks, shape, programs)
        self.kernel, self.memory, self.counts = kernel, memory, Counts()
        self.active = self.exists
        # Words of shared memory, program after program, and whether any of them was ever known.
        self.program = np.arange(self.size) // (self.size // len(programs)) * MOST_SHARED
        self.shared: Words = np.zeros(MOST_SHARED * len(programs), np.uint32)
        self.shared_known: Mask = np.zeros(MOST_SHARED * len(programs), bool)
        self.shared_used = False

    def run(self) -> None:
        code, executed = self.kernel.code, self.counts.executed
        at = np.zeros(self.size, np.int64)  # numbers of instructions
        alive = self.exists.copy()
        here, together = 0, True
        everyone, warps = bool(alive.all()), _warps(alive)
        for _ in range(MOST_STEPS):
            if not together:
                here = int(at[alive].min())
                self.active = alive & (at == here)
                together = np.array_equal(self.active, alive)
            if together:
                self.active = alive
            instruction = code[here]
            executed[instruction.address] += warps if together else _warps(self.active)
            if instruction.name in _JUMPS:
                taken, to = self._jump(instruction, here)
                if instruction.name == "EXIT":
                    alive = alive & ~taken
                    if not alive.any():
                        return
                    everyone, warps, to = False, _warps(alive), here + 1
                    taken = self.never
                if together and isinstance(to, int) and (not taken.any() or np.array_equal(taken, alive)):
                    here = to if taken.any() else here + 1
                else:
                    at[self.active] = here + 1
                    at[taken] = to[taken] if isinstance(to, np.ndarray) else to
                    together = False
                continue
            self._execute(instruction, None if together and everyone else self.active)
            if together:
                here += 1
            else:
                at[self.active] = here + 1
            if together and here == len(code):
                return
        raise WalkError(f"more than {MOST_STEPS} steps")

    def _execute(self, instruction: Instruction, mask: Mask | None) -> None:
        if instruction.name in _WITHOUT_RESULT:
            return
        self.mask, self.known = mask, True
        if instruction.guard:
            value, known = self.guard(instruction.guard)
            if (unknown := self._unknown(known, mask)) is not None:
                # Threads whose guard isn't known take part, and their result is not known.
                value, self.known = value | unknown, ~unknown
            self.mask = value if mask is None else value & mask
        function = _FUNCTIONS.get(instruction.name) or _FUNCTIONS.get(instruction.name.removeprefix("U"))
        try:
            if function is None:
                raise _Unknown
            function(self, instruction)
        except _Unknown:
            self._forget(instruction)

    def _unknown(self, known: Known, among: Mask | None) -> Mask | None:
        """Return the threads for which something isn't known; None if there are none."""
        if known is True:
            return None
        unknown = ~known if isinstance(known, np.ndarray) else self.always
        unknown = unknown if among is None else unknown & among
        return unknown if unknown.any() else None

    def _forget(self, instruction: Instruction) -> None:
        """Make what an instruction writes unknown."""
        registers, predicates = targets(instruction)
        for name in predicates:
            self.forget_truth(name)
        for name in registers:
            self.forget(name, words_written(instruction))

    # Control flow

    def _jump(self, instruction: Instruction, here: int) -> tuple[Mask, Any]:
        """Return the threads that jump, and where to: one number, or one for each thread."""
        if ".DIV" in instruction.opcode:  # of warps that have come apart
            return self.never, here
        taken: Mask = self.active
        known: Known = True
        conditions = [instruction.guard] if instruction.guard else []
        conditions += [text for text in instruction.operands[:-1] if _PREDICATE.fullmatch(text)]
        for condition in conditions:
            value, certain = self.guard(condition)
            taken = taken & value
            known = certain if known is True else known if certain is True else known & certain
        unknown = self._unknown(known, self.active)
        if instruction.name == "EXIT":
            if unknown is not None:
                self.counts.doubts.add(f"an exit at {instruction.address:#x} depends on data and is not taken")
                taken = taken & ~unknown
            return taken, here
        if instruction.name in ("RET", "BRX"):
            return taken, self._computed(instruction, here)
        to = self.kernel.number[int(instruction.operands[-1].split()[-1].strip("`()"), 16)]
        if unknown is not None:
            taken = taken & ~unknown | (unknown if self._ordinary(here, to) else self.never)
        return taken, to

    def _computed(self, instruction: Instruction, here: int) -> NDArray[np.int64]:
        register, offset = instruction.operands[-1].split() if len(instruction.operands) == 1 else instruction.operands
        self.known = True
        try:
            addresses = self.word(register.removesuffix(".64")).astype(np.int64)
        except _Unknown:
            raise WalkError(f"where {instruction.name} at {instruction.address:#x} goes depends on data") from None
        base = int(offset, 16)
        if instruction.name == "BRX":
            base += self.kernel.code[here + 1].address
        to = np.zeros(self.size, np.int64)
        for address in np.unique(addresses[self.active]):
            to[addresses == address] = self.kernel.number[int(address) + base & 0xFFFFFFFF]
        return to

    def _ordinary(self, here: int, to: int) -> bool:
        """Say whether a branch that depends on data is taken for ordinary numbers.

        They stay away from the slow path of a quotient or a root, which calls a function, and from what is jumped over.
        """
        if to <= here:
            raise WalkError(f"a loop at {self.kernel.code[here].address:#x} depends on data")
        slow = self._slow(here + 1, to), self._slow(to, to + FAR)
        if slow[0] != slow[1]:
            return slow[0]
        self.counts.doubts.add(f"a branch at {self.kernel.code[here].address:#x} depends on data and is not taken")
        return False

    def _slow(self, begin: int, end: int) -> bool:
        """Say whether a path is for rare numbers: before joining others it calls, loops or uses the stack."""
        for number, instruction in enumerate(self.kernel.code[begin:end], begin):
            if instruction.name in ("CALL", "STL", "LDL"):
                return True
            if instruction.name == "BRA":
                return self.kernel.number[int(instruction.operands[-1].strip("`()"), 16)] <= number
            if instruction.name in ("EXIT", "RET", "BSYNC"):
                return False
        return False

    # Memory

    def shared_at(self, instruction: Instruction) -> tuple[NDArray[np.int64], Mask]:
        """Return where in `shared` each thread accesses the memory of its program, and which threads do."""
        active = self.active if self.mask is None else self.mask & self.active
        addresses = self.address(_place(instruction))
        if self._unknown(self.known, active) is not None:
            raise _Unknown
        return np.where(active, (addresses & _WINDOW).astype(np.int64) // 4 % MOST_SHARED, 0) + self.program, active

    def address(self, text: str) -> NDArray[np.uint64]:
        total = np.zeros(self.size, np.uint64)
        for part in text[text.rindex("[") + 1 : -1].split("+"):
            if part.endswith(".64"):
                total = total + self.pair(part.removesuffix(".64"))
            elif _INTEGER.fullmatch(part):
                total = total + np.uint64(int(part, 16) & (2**64 - 1))
            else:
                # An offset to a pair.
                total = total + self.word(re.sub(r"\.(U32|S32|X\d+)", "", part)).astype(np.uint64)
        return total

    def move(self, instruction: Instruction, how: str, place: str) -> NDArray[np.uint64] | None:
        """Count what a load or store moves. Return the addresses, None where they are not known."""
        active = self.active if self.mask is None else self.mask & self.active
        nbytes = instruction.bits // 8
        try:
            addresses = self.address(place)
            unknown = self._unknown(self.known, active)
        except _Unknown:
            addresses, unknown = np.zeros(self.size, np.uint64), active
        if unknown is not None and active.any():
            self.counts.doubts.add(f"an address at {instruction.address:#x} depends on data")
            self.counts.moved[-1, how] += int(active.sum()) * nbytes
            return None
        if active.any():
            shown = np.sort(np.where(active, addresses, _NOWHERE).reshape(-1, WARP), axis=1)
            first = shown != _NOWHERE
            first[:, 1:] &= shown[:, 1:] != shown[:, :-1]
            for region, number in zip(*np.unique(self.memory.find(shown[first]), return_counts=True), strict=True):
                self.counts.moved[int(region), how] += int(number) * nbytes
        return np.where(active, addresses, addresses[int(np.argmax(active))])


def _warps(active: Mask) -> int:
    return int(np.count_nonzero(active.reshape(-1, WARP).any(1)))


def after(name: str, count: int) -> str:
    """Return the register `count` behind another."""
    match = _REGISTER.fullmatch(name)
    assert match is not None, name
    return name if match[4] == "Z" else f"{match[3]}{int(match[4]) + count}"


def targets(instruction: Instruction) -> tuple[list[str], list[str]]:
    """Return the register (the first of several) and the predicates that an instruction writes."""
    operands = [operand.removesuffix(".reuse") for operand in instruction.operands]
    predicates = []
    if instruction.name.removeprefix("U") in _ONLY_PREDICATES:
        return [], [operand for operand in operands[:2] if _PREDICATE.fullmatch(operand)]
    while operands and _PREDICATE.fullmatch(operands[0]):
        predicates.append(operands.pop(0))
    registers = operands[:1]
    if not registers or not re.fullmatch(r"U?R(\d+|Z)", registers[0]):
        return [], predicates
    for operand in operands[1:]:
        if not _PREDICATE.fullmatch(operand):
            break
        predicates.append(operand)
    return registers, predicates


def sources(instruction: Instruction) -> list[str]:
    """Return the operands behind those that are written."""
    registers, predicates = targets(instruction)
    return [operand.removesuffix(".reuse") for operand in instruction.operands[len(registers) + len(predicates) :]]


def words_written(instruction: Instruction) -> int:
    """Return the number of registers that an instruction writes."""
    opcode = instruction.opcode
    if instruction.name in ("LDG", "LD", "LDS", "LDL", "LDC", "ULDC"):
        return max(1, instruction.bits // 32)
    if instruction.name == "LDSM":
        return next((int(part) for part in opcode.split(".") if part in ("2", "4")), 1)
    if instruction.name in ("DADD", "DMUL", "DFMA") or ".WIDE" in opcode or ".F64." in opcode.removeprefix("F2F.F32"):
        return 2
    wide = (instruction.name == "CS2R" and ".32" not in opcode) or (instruction.name == "F2I" and "64" in opcode)
    return 2 if wide else 1


def _changed(value: Words, sign: str | None, bar: str | None, floating: bool) -> Words:
    """-, ~ and | | in front of or around an operand."""
    if bar:
        value = value & np.uint32(0x7FFFFFFF) if floating else np.abs(value.view(np.int32)).view(np.uint32)
    if sign == "-":
        return value ^ np.uint32(0x80000000) if floating else ~value + np.uint32(1)
    return ~value if sign == "~" else value


def _bits(text: str) -> int | None:
    """Return the bits of a number as it stands in the text."""
    text = text.replace("QNAN", "nan").replace("SNAN", "nan").replace("INF", "inf").replace("|", "").replace(" ", "")
    try:
        return int(np.float32(float(text)).view(np.uint32))
    except ValueError:
        return None


# Instructions: integers and predicates

Step = Callable[[Walk, Instruction], None]
_FUNCTIONS: dict[str, Step] = {}


def _executes(*names: str) -> Callable[[Step], Step]:
    def add(function: Step) -> Step:
        _FUNCTIONS.update(dict.fromkeys(names, function))
        return function

    return add


@_executes("MOV", "R2UR")
def _move(walk: Walk, instruction: Instruction) -> None:
    walk.put(targets(instruction)[0][0], walk.word(sources(instruction)[0]))


@_executes("LDC")
def _load_constant(walk: Walk, instruction: Instruction) -> None:
    (to,), _ = targets(instruction)
    for number in range(words_written(instruction)):
        value = walk.word(instruction.operands[1], number)
        narrow = instruction.bits < 32
        walk.put(after(to, number), value & np.uint32((1 << instruction.bits) - 1) if narrow else value)


@_executes("S2R", "S2UR")
def _special(walk: Walk, instruction: Instruction) -> None:
    if instruction.operands[1] not in walk.special:
        raise _Unknown
    walk.put(instruction.operands[0], walk.special[instruction.operands[1]])


@_executes("CS2R")
def _special_pair(walk: Walk, instruction: Instruction) -> None:
    if instruction.operands[1] != "SRZ":
        raise _Unknown
    for number in range(1 if ".32" in instruction.opcode else 2):
        walk.put(after(instruction.operands[0], number), walk.zero)


@_executes("IADD3", "VIADD", "IADD")
def _add(walk: Walk, instruction: Instruction) -> None:
    (to,), carries_out = targets(instruction)
    operands = sources(instruction)
    total = np.zeros(walk.size, np.uint64)
    for operand in operands[:3]:
        if _PREDICATE.fullmatch(operand):
            break
        value = walk.word(operand)
        total = total + value
        if carries_out and operand.startswith("-") and not _INTEGER.fullmatch(operand):
            # Its complement and 1: of zero that is 2^32.
            total = total + np.where(value == 0, np.uint64(2**32), np.uint64(0))
    if ".X" in instruction.opcode:
        for operand in operands[3:]:
            total = total + walk.truth(operand)
    walk.put(to, (total & _LOW).astype(np.uint32))
    for number, carry in enumerate(carries_out):
        walk.put_truth(carry, (total >> _ABOVE) > number)


@_executes("IMAD")
def _multiply_add(walk: Walk, instruction: Instruction) -> None:
    (to,), carries_out = targets(instruction)
    a, b, c, *carry_in = sources(instruction)
    parts = instruction.opcode.split(".")
    if "WIDE" not in parts and "HI" not in parts:
        result = walk.word(a) * walk.word(b) + walk.word(c)
        if "X" in parts:
            result = result + walk.truth(carry_in[0]).astype(np.uint32)
        walk.put(to, result)
        for carry in carries_out:
            walk.forget_truth(carry)
        return
    left, right, added = walk.word(a), walk.word(b), walk.pair(c)
    if "U32" in parts:
        product = left.astype(np.uint64) * right
    else:
        product = (left.view(np.int32).astype(np.int64) * right.view(np.int32)).view(np.uint64)
    total = product + added
    carry_out = total < added
    if "X" in parts:
        total = total + walk.truth(carry_in[0])
    if "WIDE" in parts:
        walk.put_pair(to, total)
    else:
        walk.put(to, (total >> _ABOVE).astype(np.uint32))
    for carry in carries_out:
        walk.put_truth(carry, carry_out)


@_executes("LEA")
def _load_address(walk: Walk, instruction: Instruction) -> None:
    (to,), carries_out = targets(instruction)
    a, b, *rest = sources(instruction)
    parts = instruction.opcode.split(".")
    carry_in = rest.pop() if "X" in parts else None
    shift = int(rest.pop(), 16)
    low = walk.word(a).astype(np.uint64)
    if "HI" in parts:
        if "SX32" in parts:
            high = (walk.word(a).view(np.int32) >> np.int32(31)).view(np.uint32)
        else:
            high = walk.word(rest[0]) if rest else walk.zero
        shifted = (low | (high.astype(np.uint64) << _ABOVE)) >> np.uint64(32 - shift) & _LOW
    else:
        shifted = low << np.uint64(shift) & _LOW
    total = shifted + walk.word(b)
    if carry_in is not None:
        total = total + walk.truth(carry_in)
    walk.put(to, (total & _LOW).astype(np.uint32))
    for carry in carries_out:
        walk.put_truth(carry, total > _LOW)


@_executes("LOP3")
def _logic(walk: Walk, instruction: Instruction) -> None:
    (to,), nonzero = targets(instruction)
    a, b, c, table = sources(instruction)[:4]
    result = _by_table(int(table, 16), (walk.word(a), walk.word(b), walk.word(c)), walk.zero)
    walk.put(to, result)
    for predicate in nonzero:
        walk.put_truth(predicate, result != 0)


@_executes("PLOP3")
def _logic_of_predicates(walk: Walk, instruction: Instruction) -> None:
    terms = [walk.truth(text) for text in instruction.operands[2:5]]
    for predicate, table in zip(instruction.operands[:2], instruction.operands[5:7], strict=False):
        walk.put_truth(predicate, _by_table(int(table, 16), terms, walk.never))


def _by_table(table: int, terms: Sequence[NDArray[Any]], nothing: NDArray[Any]) -> NDArray[Any]:
    """Return any function of three bits: bit 4 a + 2 b + c of the table."""
    a, b, c = terms
    common = {0xC0: lambda: a & b, 0xFC: lambda: a | b, 0x3C: lambda: a ^ b, 0x96: lambda: a ^ b ^ c, 0x33: lambda: ~b}
    if table in common:
        return common[table]()
    result = nothing
    for index in range(8):
        if table >> index & 1:
            result = result | (a if index & 4 else ~a) & (b if index & 2 else ~b) & (c if index & 1 else ~c)
    return result


@_executes("P2R")
def _predicates_to_register(walk: Walk, instruction: Instruction) -> None:
    (to,), _ = targets(instruction)
    mask, shift = int(instruction.operands[-1], 16), 8 * int((re.findall(r"\.B(\d)", instruction.opcode) or ["0"])[0])
    value = walk.word(instruction.operands[2]) & np.uint32(~(mask << shift) & 0xFFFFFFFF)
    for number in range(7):
        if mask >> number & 1:
            value = value | walk.truth(f"P{number}").astype(np.uint32) << np.uint32(number + shift)
    walk.put(to, value)


@_executes("R2P")
def _register_to_predicates(walk: Walk, instruction: Instruction) -> None:
    source, mask = instruction.operands[1], int(instruction.operands[-1], 16)
    shift = 8 * int((re.findall(r"\.B(\d)", instruction.opcode + source) or ["0"])[0])
    value = walk.word(re.sub(r"\.B\d", "", source))
    for number in range(7):
        if mask >> number & 1:
            walk.put_truth(f"P{number}", (value >> np.uint32(number + shift) & np.uint32(1)) != 0)


@_executes("PRMT")
def _permute(walk: Walk, instruction: Instruction) -> None:
    (to,), _ = targets(instruction)
    a, selector, b = sources(instruction)[:3]
    picks = walk.word(selector)
    if _INTEGER.fullmatch(selector):
        # A source of which no byte is taken may be unknown.
        used = {int(selector, 16) >> 4 * byte & 4 for byte in range(4)}
        a, b = a if 0 in used else "RZ", b if 4 in used else "RZ"
    both = walk.word(a).astype(np.uint64) | walk.word(b).astype(np.uint64) << _ABOVE
    result = walk.zero
    for number in range(4):
        pick = picks >> np.uint32(4 * number)
        byte = both >> (np.uint64(8) * (pick & np.uint32(7)).astype(np.uint64)) & np.uint64(0xFF)
        sign = np.where(byte & np.uint64(0x80), np.uint64(0xFF), np.uint64(0))
        result = result | np.where(pick & np.uint32(8), sign, byte).astype(np.uint32) << np.uint32(8 * number)
    walk.put(to, result)


@_executes("SEL", "FSEL")
def _select(walk: Walk, instruction: Instruction) -> None:
    (to,), _ = targets(instruction)
    a, b, condition = sources(instruction)
    floating = instruction.name == "FSEL"
    where = walk.truth(condition)
    walk.put(to, np.where(where, walk.word(a, floating=floating), walk.word(b, floating=floating)))


@_executes("SGXT")
def _extend(walk: Walk, instruction: Instruction) -> None:
    (to,), _ = targets(instruction)
    a, width = sources(instruction)[:2]
    bits = int(width, 16)
    value = walk.word(a)
    if ".U32" in instruction.opcode:
        walk.put(to, value & np.uint32((1 << bits) - 1))
    else:
        walk.put(to, ((value << np.uint32(32 - bits)).view(np.int32) >> np.int32(32 - bits)).view(np.uint32))


@_executes("IABS")
def _absolute(walk: Walk, instruction: Instruction) -> None:
    walk.put(instruction.operands[0], np.abs(walk.word(instruction.operands[1]).view(np.int32)).view(np.uint32))


@_executes("SHF")
def _shift(walk: Walk, instruction: Instruction) -> None:
    (to,), _ = targets(instruction)
    low, amount, high = sources(instruction)[:3]
    parts = instruction.opcode.split(".")
    wide, signed = "U64" in parts or "S64" in parts, "S32" in parts or "S64" in parts
    most = 63 if wide else 31
    count = walk.word(amount)
    by = (count & np.uint32(most) if "W" in parts else np.minimum(count, np.uint32(63))).astype(np.uint64)
    if "L" in parts and "HI" not in parts:
        result = np.where(by < 32, walk.word(low).astype(np.uint64) << np.minimum(by, np.uint64(31)), np.uint64(0))
    elif "L" in parts:
        both = walk.word(low).astype(np.uint64) | walk.word(high).astype(np.uint64) << _ABOVE
        result = (both << by) >> _ABOVE
    elif "HI" in parts:
        # The upper word alone.
        top = walk.word(high)
        long = top.view(np.int32).astype(np.int64) if signed else top.astype(np.int64)
        result = (long >> by.astype(np.int64)).view(np.uint64)
    else:
        both = walk.word(low).astype(np.uint64) | walk.word(high).astype(np.uint64) << _ABOVE
        result = (both.view(np.int64) >> by.astype(np.int64)).view(np.uint64) if signed else both >> by
    walk.put(to, (result & _LOW).astype(np.uint32))


_COMPARE: dict[str, Callable[[Any, Any], Mask]] = {
    "LT": np.less, "LE": np.less_equal, "GT": np.greater, "GE": np.greater_equal, "EQ": np.equal, "NE": np.not_equal,
}  # fmt: skip
_JOIN: dict[str, Callable[[Any, Any], Mask]] = {
    "AND": np.logical_and, "OR": np.logical_or, "XOR": np.logical_xor,
}  # fmt: skip


@_executes("ISETP")
def _compare(walk: Walk, instruction: Instruction) -> None:
    first, second, a, b, other, *lower = instruction.operands
    parts = instruction.opcode.split(".")
    kind = parts[1]
    x, y = walk.word(a), walk.word(b)
    if "U32" not in parts:
        x, y = x.view(np.int32), y.view(np.int32)
    result = _COMPARE[kind](x, y)
    if "EX" in parts:
        # Of the upper words; the lower ones are compared already.
        below = walk.truth(lower[0])
        if kind == "NE":
            result = result | below
        else:
            strict = walk.never if kind == "EQ" else _COMPARE[kind[0] + "T"](x, y)
            result = strict | (x == y) & below
    _put_truths(walk, instruction, result, other, first, second)


def _put_truths(
    walk: Walk, instruction: Instruction, result: Mask, other: str, first: str, second: str
) -> None:  # fmt: skip
    """Write a comparison, joined with another predicate, and its opposite, joined likewise."""
    join = next(_JOIN[part] for part in reversed(instruction.opcode.split(".")) if part in _JOIN)
    others = walk.truth(other)
    walk.put_truth(first, join(result, others))
    walk.put_truth(second, join(~result, others))


@_executes("VIMNMX", "IMNMX", "VIADDMNMX")
def _extreme(walk: Walk, instruction: Instruction) -> None:
    (to,), _ = targets(instruction)
    *values, least = sources(instruction)
    words = [walk.word(value) for value in values]
    a, b = (words[0] + words[1], words[2]) if len(words) == 3 else words
    x, y = (a, b) if ".U32" in instruction.opcode else (a.view(np.int32), b.view(np.int32))
    walk.put(to, np.where(walk.truth(least), np.minimum(x, y), np.maximum(x, y)).view(np.uint32))


# Instructions: numbers, as far as quotients of integers need them

_UNARY: dict[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {
    "RCP": lambda x: 1.0 / x,
    "RSQ": lambda x: 1.0 / np.sqrt(x),
    "SQRT": np.sqrt,
    "EX2": np.exp2,
    "LG2": np.log2,
    "SIN": lambda x: np.sin(2.0 * np.pi * x),
    "COS": lambda x: np.cos(2.0 * np.pi * x),
    "TANH": np.tanh,
}


@_executes("FADD", "FMUL", "FFMA")
def _arithmetic(walk: Walk, instruction: Instruction) -> None:
    (to,), _ = targets(instruction)
    # An exact product; of a sum in float64 the rounding is off by less than what is asked of it.
    a, b, *c = (walk.number(source).astype(np.float64) for source in sources(instruction)[:3])
    walk.put_number(to, a + b if instruction.name == "FADD" else a * b + c[0] if c else a * b)


@_executes("HFMA2")
def _constant_in_halves(walk: Walk, instruction: Instruction) -> None:
    """A constant, made by a pipe that has nothing to do; real arithmetic in halves is not followed."""
    (to,), _ = targets(instruction)
    a, b, *halves = sources(instruction)
    if (a, b) != ("-RZ", "RZ") or len(halves) != 2 or "BF16" in instruction.opcode:
        raise _Unknown
    try:
        both = np.array([float(text.replace("INF", "inf")) for text in reversed(halves)], np.float16)
    except ValueError:
        raise _Unknown from None
    walk.put(to, walk.constant(int(both.view(np.uint32)[0])))


@_executes("MUFU")
def _transcendental(walk: Walk, instruction: Instruction) -> None:
    function = _UNARY.get(instruction.opcode.split(".", 1)[1])
    if function is None:
        raise _Unknown
    walk.put_number(instruction.operands[0], function(walk.number(instruction.operands[1]).astype(np.float64)))


@_executes("I2F", "I2FP")
def _to_number(walk: Walk, instruction: Instruction) -> None:
    opcode, source = instruction.opcode, instruction.operands[1]
    if "F64" in opcode or "F16" in opcode:
        raise _Unknown
    exact: NDArray[Any]
    if "64" in opcode:
        exact = walk.pair(source).view(np.int64) if "S64" in opcode else walk.pair(source)
    else:
        exact = walk.word(source) if "U32" in opcode else walk.word(source).view(np.int32)
    result = exact.astype(np.float32)
    if "RP" in opcode.split("."):  # upwards
        result = np.where(result.astype(np.float64) < exact, np.nextafter(result, np.float32(np.inf)), result)
    walk.put_number(instruction.operands[0], result)


@_executes("F2I")
def _to_integer(walk: Walk, instruction: Instruction) -> None:
    parts, to = instruction.opcode.split("."), instruction.operands[0]
    if "F64" in parts:
        raise _Unknown
    number = walk.number(instruction.operands[1]).astype(np.float64)
    rounding = next((_ROUND[part] for part in parts if part in _ROUND), np.rint)
    number = np.nan_to_num(rounding(number))
    if "U64" in parts:
        walk.put_pair(to, np.clip(number, 0.0, 2.0**64 - 2048.0).astype(np.uint64))
    elif "S64" in parts:
        walk.put_pair(to, np.clip(number, -(2.0**63), 2.0**63 - 1024.0).astype(np.int64).view(np.uint64))
    elif "U32" in parts:
        walk.put(to, np.clip(number, 0.0, 2.0**32 - 1.0).astype(np.uint32))
    else:
        walk.put(to, np.clip(number, -(2.0**31), 2.0**31 - 1.0).astype(np.int32).view(np.uint32))


_ROUND: dict[str, Callable[[Any], Any]] = {"TRUNC": np.trunc, "FLOOR": np.floor, "CEIL": np.ceil}


@_executes("FSETP")
def _compare_numbers(walk: Walk, instruction: Instruction) -> None:
    first, second, a, b, other = instruction.operands[:5]
    x, y = walk.number(a), walk.number(b)
    unordered = np.isnan(x) | np.isnan(y)
    kind = instruction.opcode.split(".")[1]
    if kind in ("NAN", "NUM"):
        result = unordered if kind == "NAN" else ~unordered
    else:
        result = _COMPARE[kind[:2]](x, y)
        result = result | unordered if len(kind) == 3 else result & ~unordered
    _put_truths(walk, instruction, result, other, first, second)


@_executes("FMNMX")
def _extreme_number(walk: Walk, instruction: Instruction) -> None:
    (to,), _ = targets(instruction)
    a, b, least = sources(instruction)
    x, y = walk.number(a), walk.number(b)
    walk.put_number(to, np.where(walk.truth(least), np.fmin(x, y), np.fmax(x, y)))


@_executes("FCHK")
def _needs_slow_path(walk: Walk, instruction: Instruction) -> None:
    """Quotients of ordinary numbers don't."""
    walk.put_truth(instruction.operands[0], walk.never)


# Instructions: memory


def _place(instruction: Instruction) -> str:
    return [operand for operand in instruction.operands if "[" in operand][-1]


@_executes("LDG", "LD")
def _load(walk: Walk, instruction: Instruction) -> None:
    (to,), _ = targets(instruction)
    addresses = walk.move(instruction, "read", _place(instruction))
    count = words_written(instruction)
    words = None if addresses is None else walk.memory.read(addresses, count, instruction.bits)
    if words is None:
        raise _Unknown
    for number, word in enumerate(words):
        walk.put(after(to, number), word)


@_executes("STS")
def _store_shared(walk: Walk, instruction: Instruction) -> None:
    at, active = walk.shared_at(instruction)
    for number in range(max(1, instruction.bits // 32)):
        walk.known = True
        try:
            if instruction.bits < 32:
                raise _Unknown
            value, known = walk.word(instruction.operands[1], number), walk.known
        except _Unknown:
            value, known = walk.zero, False
        if known is not False or walk.shared_used:
            walk.shared_used = True
            walk.shared[at[active] + number] = value[active]
            walk.shared_known[at[active] + number] = known[active] if isinstance(known, np.ndarray) else known


@_executes("LDS")
def _load_shared(walk: Walk, instruction: Instruction) -> None:
    if not walk.shared_used or instruction.bits < 32:
        raise _Unknown
    (to,), _ = targets(instruction)
    at, active = walk.shared_at(instruction)
    for number in range(words_written(instruction)):
        known = walk.shared_known[at + number] | ~active
        if not known[active].any():
            walk.forget(after(to, number))
            continue
        walk.known = True if known.all() else known
        walk.put(after(to, number), walk.shared[at + number])


@_executes("LDGSTS")
def _load_to_shared(walk: Walk, instruction: Instruction) -> None:
    walk.move(instruction, "read", _place(instruction))


@_executes("STG", "ST")
def _store(walk: Walk, instruction: Instruction) -> None:
    walk.move(instruction, "written", _place(instruction))


@_executes("RED", "REDG", "ATOM", "ATOMG")
def _atomic(walk: Walk, instruction: Instruction) -> None:
    walk.move(instruction, "written", _place(instruction))
    raise _Unknown


#: Control flow.
_JUMPS = {"BRA", "BRX", "CALL", "RET", "EXIT"}
_ONLY_PREDICATES = {"ISETP", "FSETP", "DSETP", "HSETP2", "PLOP3", "FCHK"}
#: They write no register that is followed. Threads that wait for each other change nothing about what is counted.
_WITHOUT_RESULT = frozenset(
    (
        "NOP",
        "BSSY",
        "BSYNC",
        "BREAK",
        "BAR",
        "WARPSYNC",
        "YIELD",
        "NANOSLEEP",
        "STL",
        "STSM",
        "MEMBAR",
        "DEPBAR",
        "LDGDEPBAR",
        "ERRBAR",
        "CCTL",
        "FENCE",
        "BMOV",
        "UCGABAR_ARV",
        "UCGABAR_WAIT",
        "SYNCS",
        "ENDCOLLECTIVE",
        "RPCMOV",
    )
)
