"""Execution of a launch, instruction by instruction: control flow, and what loads and stores move."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.machine_code import Function, Instruction
from benchmarks.walk.memory import Memory, Words
from benchmarks.walk.operands import INTEGER, PREDICATE, place_of, targets, words_written
from benchmarks.walk.threads import WARP, Known, Mask, Shape, Threads, Unknown

#: A loop that turns more often than this is taken for one that has no end.
MOST_STEPS = 1_000_000
#: How many instructions of a path tell whether it is for rare numbers.
FAR = 40

#: Words of a program's shared memory, and the bits of an address in it; those above tell the program in its cluster.
MOST_SHARED = 2**16
_WINDOW = np.uint64(2**24 - 1)
_NOWHERE = np.uint64(2**64 - 1)
#: Control flow.
_JUMPS = {"BRA", "BRX", "CALL", "RET", "EXIT"}
#: They write no register that is followed. Threads that wait for each other change nothing about what is counted.
_WITHOUT_RESULT = {
    "NOP", "BSSY", "BSYNC", "BREAK", "BAR", "WARPSYNC", "YIELD", "NANOSLEEP", "STL", "STSM", "MEMBAR", "DEPBAR",
    "LDGDEPBAR", "ERRBAR", "CCTL", "FENCE", "BMOV", "UCGABAR_ARV", "UCGABAR_WAIT", "SYNCS", "ENDCOLLECTIVE",
    "RPCMOV",
}  # fmt: skip


class WalkError(Exception):
    """A launch can't be followed."""


class Walk(Threads):
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
        function = FUNCTIONS.get(instruction.name) or FUNCTIONS.get(instruction.name.removeprefix("U"))
        try:
            if function is None:
                raise Unknown
            function(self, instruction)
        except Unknown:
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
        conditions += [text for text in instruction.operands[:-1] if PREDICATE.fullmatch(text)]
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
        except Unknown:
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
        addresses = self.address(place_of(instruction))
        if self._unknown(self.known, active) is not None:
            raise Unknown
        return np.where(active, (addresses & _WINDOW).astype(np.int64) // 4 % MOST_SHARED, 0) + self.program, active

    def address(self, text: str) -> NDArray[np.uint64]:
        total = np.zeros(self.size, np.uint64)
        for part in text[text.rindex("[") + 1 : -1].split("+"):
            if part.endswith(".64"):
                total = total + self.pair(part.removesuffix(".64"))
            elif INTEGER.fullmatch(part):
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
        except Unknown:
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


@dataclass
class Counts:
    """Counts of all programs that were walked."""

    executed: Counter[int] = field(default_factory=Counter)  # address of an instruction -> warps
    #: (number of the region, "read" or "written") -> bytes; an address counts once in a warp's instruction.
    moved: Counter[tuple[int, str]] = field(default_factory=Counter)
    #: What was guessed or could not be followed.
    doubts: set[str] = field(default_factory=set)


#: Executes an instruction whose guard holds; raises `Unknown` where a source is not known.
Step = Callable[[Walk, Instruction], None]
FUNCTIONS: dict[str, Step] = {}


def executes(*names: str) -> Callable[[Step], Step]:
    """Enter a function as the one that executes the instructions of these names."""

    def add(function: Step) -> Step:
        FUNCTIONS.update(dict.fromkeys(names, function))
        return function

    return add
