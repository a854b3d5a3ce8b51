"""Machine code of NVIDIA GPUs (SASS), read from cuobjdump, and how often a launch executes each of its instructions.

`Walk` runs the code of some programs of a launch, all their threads in lockstep: integers, predicates and addresses are
computed from the launch's own arguments, so that every loop turns as often as it would on the GPU. What is read from
tensors of floating-point numbers is unknown and stays so. No value is asked of it; control flow and addresses are.
"""

from __future__ import annotations

import re
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

#: Threads of a warp.
WARP = 32
#: Where parameters begin in constant bank 0.
PARAMETERS = {80: 0x160, 86: 0x160, 89: 0x160, 90: 0x210, 100: 0x380, 120: 0x380}
SECTOR = 32

#: What executes an instruction. Each takes one issue slot; the slots are the limit that is reckoned with.
PIPES = {
    "FMA": "FFMA FMUL FADD FFMA2 FMUL2 FADD2 IMAD HFMA2 HFMA2.MMA UIMAD",
    "ALU": "IADD3 IADD VIADD VIADDMNMX LEA LOP3 LOP PRMT SEL SGXT SHF SHL SHR ISETP FSETP FSEL FMNMX FMNMX3 IMNMX VIMNMX VIMNMX3 MOV "
    "IABS PLOP3 P2R R2P CS2R I2FP F2FP FCHK HADD2 HMUL2 HMNMX2 HSETP2 HSET2 IDP I2IP LOP32I BMSK FSET VOTE VOTEU DADD",
    "XU": "MUFU F2I I2F F2F FRND POPC FLO BREV",
    "LSU": "LDG STG LDS STS LD ST LDL STL LDSM STSM ATOM ATOMG ATOMS RED REDG REDS LDGSTS LDGDEPBAR DEPBAR SHFL MATCH MEMBAR CCTL",
    "FP64": "DFMA DMUL DADD DSETP DMNMX",
    "control": "BRA BRX JMP CALL RET EXIT BSSY BSYNC BREAK BAR NOP WARPSYNC YIELD NANOSLEEP RPCMOV BMOV ERRBAR BPT KILL",
    "uniform": "",
    "TENSOR": "HMMA IMMA BMMA HGMMA",
}
PIPE = {name: pipe for pipe, names in PIPES.items() for name in names.split()}


class Instruction(NamedTuple):
    address: int
    guard: str  # "" or "@P0", "@!UP1"
    opcode: str  # "LDG.E.128"
    operands: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def pipe(self) -> str:
        if self.name in PIPE:
            return PIPE[self.name]
        # U...: of the warp as a whole, as R2UR, S2UR, S2R and constants are.
        return "uniform"

    @property
    def bits(self) -> int:
        """Width of what a memory instruction moves for each thread."""
        for part in self.opcode.split(".")[1:]:
            if part in ("U8", "S8"):
                return 8
            if part in ("U16", "S16"):
                return 16
            if part in ("64", "128", "256"):
                return int(part)
        return 32


LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?PT?\d*)\s+)?([A-Z][\w.]*)\s*([^;]*);")


def functions(text: str) -> dict[str, list[Instruction]]:
    """Read the output of `cuobjdump -sass`: the code of each function."""
    found: dict[str, list[Instruction]] = {}
    code: list[Instruction] = []
    for line in text.splitlines():
        if match := re.match(r"\s+Function : (\S+)", line):
            code = found.setdefault(match[1], [])
        elif match := LINE.match(line):
            operands = tuple(part.strip() for part in match[4].split(",")) if match[4].strip() else ()
            code.append(Instruction(int(match[1], 16), match[2] or "", match[3], operands))
    return found


class Tensors:
    """Where the arguments of a launch lie in memory, and which of them holds integers, whose values are known."""

    def __init__(self, regions: Sequence[tuple[int, int, np.ndarray | None]]) -> None:
        """Args: regions: address, bytes and, of integers, the memory itself as bytes."""
        self.regions = sorted(regions, key=lambda region: region[0])
        self.begins = np.array([region[0] for region in self.regions] or [0], dtype=np.uint64)
        self.ends = np.array([region[0] + region[1] for region in self.regions] or [0], dtype=np.uint64)

    def find(self, addresses: np.ndarray) -> np.ndarray:
        """Return the number of the region of each address, -1 outside all."""
        at = np.searchsorted(self.begins, addresses, side="right").astype(np.int64) - 1
        inside = (at >= 0) & (addresses < self.ends[np.maximum(at, 0)])
        return np.where(inside, at, -1)

    def read(self, addresses: np.ndarray, nbytes: int) -> np.ndarray | None:
        """Return the integers there; None where they are not known."""
        where = self.find(addresses)
        if where.size == 0 or (where != where[0]).any() or where[0] < 0 or self.regions[where[0]][2] is None:
            return None
        begin, size, memory = self.regions[where[0]]
        assert memory is not None
        offsets = (addresses - np.uint64(begin)).astype(np.int64)
        if (offsets + nbytes > size).any():
            return None
        return np.stack([memory[offsets + i] for i in range(nbytes)], axis=-1)


@dataclass
class Counts:
    """What the programs that were walked executed, summed over warps."""

    executed: Counter[int] = field(default_factory=Counter)  # by address
    moved: Counter[tuple[int, str]] = field(default_factory=Counter)  # (region, "read" or "written") -> bytes
    sectors: int = 0
    unknown_addresses: int = 0
    outside: int = 0
    doubts: set[str] = field(default_factory=set)
    unmodelled: set[str] = field(default_factory=set)


class Unknown(Exception):
    """The walk can't go on."""


Value = tuple[np.ndarray, Any]  # uint32 a thread, and where it is known: True, False or a bool a thread
_MOST_STEPS = 2_000_000


def _and(*known: Any) -> Any:
    result: Any = True
    for each in known:
        if each is False:
            return False
        if each is not True:
            result = each if result is True else result & each
    return result


class Walk:
    """Some programs of a launch, thread by thread."""

    def __init__(
        self,
        code: Sequence[Instruction],
        constants: Mapping[int, bytes],
        block: tuple[int, int, int],
        grid: tuple[int, int, int],
        programs: Sequence[int],
        tensors: Tensors,
    ) -> None:
        self.code = code
        self.index = {instruction.address: number for number, instruction in enumerate(code)}
        self.constants = constants
        self.tensors = tensors
        self.counts = Counts()
        threads = block[0] * block[1] * block[2]
        padded = -(-threads // WARP) * WARP
        self.size = padded * len(programs)
        thread = np.tile(np.arange(padded, dtype=np.uint32), len(programs))
        program = np.repeat(np.array(programs, dtype=np.int64), padded)
        self.live = thread < threads
        self.program = program
        self.special = {
            "SR_TID.X": thread % block[0],
            "SR_TID.Y": thread // block[0] % block[1],
            "SR_TID.Z": thread // (block[0] * block[1]),
            "SR_CTAID.X": (program % grid[0]).astype(np.uint32),
            "SR_CTAID.Y": (program // grid[0] % grid[1]).astype(np.uint32),
            "SR_CTAID.Z": (program // (grid[0] * grid[1])).astype(np.uint32),
            "SR_LANEID": thread % WARP,
            "SR_CgaCtaId": np.zeros(self.size, np.uint32),
            "SRZ": np.zeros(self.size, np.uint32),
        }
        self.zero = np.zeros(self.size, np.uint32)
        self.one = np.ones(self.size, bool)
        self.registers: dict[str, Value] = {}
        self.predicates: dict[str, tuple[np.ndarray, Any]] = {}
        self._mask: np.ndarray | None = None
        self._shown: dict[str, np.ndarray] = {}

    # Running

    def run(self) -> Counts:
        with np.errstate(all="ignore"):
            self._run()
        return self.counts

    def _run(self) -> None:
        pcs = np.zeros(self.size, np.int64)  # numbers of instructions
        live = self.live.copy()
        here, converged, steps = 0, True, 0
        warps = self._warps(live)
        executed = self.counts.executed
        while live.any():
            steps += 1
            if steps > _MOST_STEPS:
                raise Unknown(f"more than {_MOST_STEPS} steps")
            if converged:
                active, count = live, warps
            else:
                here = int(pcs[live].min())
                active = live & (pcs == here)
                count = self._warps(active)
                if count == warps and bool((active == live).all()):
                    converged = True
            instruction = self.code[here]
            executed[instruction.address] += count
            name = instruction.name
            guard, certain = self._guard(instruction.guard)
            if guard is not None and certain is not True:
                # Data that isn't known is taken to be such as lets threads take part.
                guard = guard | ~certain if certain is not False else None
            self.active = active
            if name in ("BRA", "EXIT", "CALL", "RET", "BRX", "JMP", "BREAK"):
                if name == "BREAK":
                    taken, goes = np.zeros(self.size, bool), here
                else:
                    taken, goes = self._branch(instruction, here, active, guard, certain)
                if name == "EXIT":
                    live &= ~taken
                    warps = self._warps(live)
                    if converged:
                        here += 1
                    else:
                        pcs[active & ~taken] = here + 1
                    continue
                if isinstance(goes, np.ndarray):
                    pcs[active] = here + 1
                    pcs[taken] = goes[taken]
                    first = pcs[live]
                    converged = bool((first == first[0]).all())
                    if converged:
                        here = int(first[0])
                    continue
                if converged:
                    if taken.any():
                        if (taken == active).all():
                            here = goes
                            continue
                        pcs[:] = here + 1
                        pcs[taken] = goes
                        converged = False
                    else:
                        here += 1
                else:
                    pcs[active] = here + 1
                    pcs[taken] = goes
                continue
            everywhere = converged and bool(live.all())
            mask = None if everywhere else active
            if guard is not None:
                mask = guard if mask is None else mask & guard
            self._mask = mask
            self._certain = certain
            self._execute(instruction)
            if converged:
                here += 1
            else:
                pcs[active] = here + 1

    def _warps(self, active: np.ndarray) -> int:
        return int(active.reshape(-1, WARP).any(1).sum())

    def _guard(self, text: str) -> tuple[np.ndarray | None, Any]:
        if not text:
            return None, True
        return self._predicate(text)

    def _branch(
        self, instruction: Instruction, here: int, active: np.ndarray, guard: np.ndarray | None, certain: Any
    ) -> tuple[np.ndarray, Any]:
        taken = active if guard is None else active & guard
        if instruction.name == "EXIT":
            if certain is not True:
                # Threads that leave early for a reason that isn't known are taken to stay.
                self.counts.doubts.add(f"exit at {instruction.address:#x}")
                taken = taken & certain if certain is not False else np.zeros_like(taken)
            return taken, 0
        condition = next((part for part in instruction.operands[:-1] if re.fullmatch(r"!?U?PT?\d*", part)), None)
        if condition is not None:
            value, known = self._predicate(condition)
            taken, certain = taken & value, _and(certain, known)
        if ".DIV" in instruction.opcode:
            return np.zeros(self.size, bool), here
        if instruction.name == "RET":
            low, known = self._source(instruction.operands[0].split()[0].replace(".64", ""))
            if known is False:
                raise Unknown(f"an unknown return at {instruction.address:#x}")
            base = int(instruction.operands[-1].split()[-1], 16) if "REL" in instruction.opcode else 0
            # Relative to the function, which begins at 0.
            place = np.zeros(self.size, np.int64)
            for address in np.unique(low[taken]):
                to = (int(address) + base) & 0xFFFFFFFF
                place[low == address] = self.index[to if to in self.index else int(address)]
            return taken, place
        to = self.index[int(instruction.operands[-1].split()[-1].strip("`()"), 16)]
        if certain is not True:
            self.counts.doubts.add(f"branch at {instruction.address:#x}")
            choice = self._likely(here, to)
            taken = active.copy() if choice else np.zeros_like(active)
        return taken, to

    def _likely(self, here: int, to: int) -> bool:
        """Guess a branch that depends on data: slow paths, which call a function, are for rare values."""
        def calls(begin: int) -> bool:
            for instruction in self.code[begin : begin + 12]:
                if instruction.name == "CALL":
                    return True
                if instruction.name in ("BRA", "EXIT", "BSYNC"):
                    return False
            return False

        if to <= here:
            raise Unknown(f"a loop at {self.code[here].address:#x} depends on data")
        if calls(here + 1) != calls(to):
            return calls(here + 1)
        return False

    # Operands

    def _register(self, name: str) -> Value:
        if name in ("RZ", "URZ"):
            return self.zero, True
        return self.registers.get(name, (self.zero, True))

    def _plus(self, name: str, offset: int) -> str:
        match = re.fullmatch(r"(U?R)(\d+)", name)
        if match is None:
            return name  # RZ
        return f"{match[1]}{int(match[2]) + offset}"

    def _predicate(self, text: str) -> tuple[np.ndarray, Any]:
        negated, name = text.startswith("!"), text.lstrip("!")
        value, known = (self.one, True) if name in ("PT", "UPT") else self.predicates.get(name, (~self.one, True))
        return (~value if negated else value), known

    def _source(self, text: str, floating: bool = False, high: int = 0) -> Value:
        """Read an operand as 32 bits; `high` 1 is the upper half of a pair."""
        text = text.replace(".reuse", "")
        if match := _REGISTER.fullmatch(text):
            sign, bar, name = match[1], match[2], match[3]
            value, known = self._register(self._plus(name, high) if high else name)
            if known is False:
                return value, False
            if bar:
                value = value & np.uint32(0x7FFFFFFF) if floating else np.abs(value.view(np.int32)).view(np.uint32)
            if sign == "-":
                value = value ^ np.uint32(0x80000000) if floating else (~value + np.uint32(1))
            elif sign == "~":
                value = ~value
            return value, known
        if match := re.fullmatch(r"(-|~)?(\|)?c\[0x([0-9a-f]+)\]\[0x([0-9a-f]+)\]\|?", text):
            bank, offset = int(match[3], 16), int(match[4], 16) + 4 * high
            stored = self.constants.get(bank)
            if stored is None or offset + 4 > len(stored):
                return self.zero, False
            number = struct.unpack_from("<I", stored, offset)[0]
            if match[2]:
                number &= 0x7FFFFFFF
            if match[1] == "-":
                number = number ^ 0x80000000 if floating else -number & 0xFFFFFFFF
            elif match[1] == "~":
                number = ~number & 0xFFFFFFFF
            return self._constant(number), True
        if re.fullmatch(r"-?0x[0-9a-f]+", text):
            number = int(text, 16)
            return self._constant((number >> 32 if high else number) & 0xFFFFFFFF), True
        if floating:
            number = struct.unpack("<I", np.float32(_float(text)).tobytes())[0]
            return self._constant(number), True
        return self.zero, False

    def _constant(self, number: int) -> np.ndarray:
        found = self._shown.get(str(number))
        if found is None:
            found = self._shown[str(number)] = np.full(self.size, number, np.uint32)
        return found

    def _wide(self, text: str) -> tuple[np.ndarray, Any]:
        """Read a pair of registers as 64 bits."""
        low, known = self._source(text)
        high, also = self._source(text, high=1)
        return low.astype(np.uint64) | (high.astype(np.uint64) << np.uint64(32)), _and(known, also)

    def _set(self, name: str, value: np.ndarray | None, known: Any = True) -> None:
        name = name.replace(".reuse", "")
        if name in ("RZ", "URZ") or not _REGISTER.fullmatch(name):
            return
        if value is None:
            value, known = self.zero, False
        known = _and(known, self._certain) if self._certain is not True else known
        if self._mask is not None:
            old, old_known = self._register(name)
            value = np.where(self._mask, value, old)
            if known is not old_known or (known is not True and known is not False):
                known = np.where(self._mask, known, old_known)
                known = True if known.all() else False if not known.any() else known
        elif isinstance(known, np.ndarray):
            known = True if known.all() else False if not known.any() else known
        self.registers[name] = value.astype(np.uint32, copy=False), known

    def _set_wide(self, name: str, value: np.ndarray | None, known: Any = True) -> None:
        name = name.replace(".reuse", "")
        if value is None or known is False:
            self._set(name, None)
            self._set(self._plus(name, 1), None)
            return
        value = value.astype(np.uint64, copy=False)
        self._set(name, (value & np.uint64(0xFFFFFFFF)).astype(np.uint32), known)
        self._set(self._plus(name, 1), (value >> np.uint64(32)).astype(np.uint32), known)

    def _set_predicate(self, name: str, value: np.ndarray | None, known: Any = True) -> None:
        if name in ("PT", "UPT") or not re.fullmatch(r"U?P\d", name):
            return
        if value is None:
            value, known = ~self.one, False
        known = _and(known, self._certain)
        if self._mask is not None:
            old, old_known = self.predicates.get(name, (~self.one, True))
            value = np.where(self._mask, value, old)
            if known is not old_known or isinstance(known, np.ndarray):
                known = np.where(self._mask, known, old_known)
        if isinstance(known, np.ndarray):
            known = True if known.all() else False if not known.any() else known
        self.predicates[name] = value, known

    # Instructions

    def _execute(self, instruction: Instruction) -> None:
        name = instruction.name
        if name in _NOTHING:
            return
        # Instructions of the warp as a whole do the same.
        method: Callable[[Instruction], None] | None = getattr(self, f"_do_{name.lower()}", None)
        if method is None and name[0] == "U":
            method = getattr(self, f"_do_{name[1:].lower()}", None)
        if method is not None:
            method(instruction)
        else:
            self.counts.unmodelled.add(name)
            self._forget(instruction)

    def _forget(self, instruction: Instruction) -> None:
        """Of an instruction that isn't modelled: what it writes is not known."""
        for operand in instruction.operands[:2]:
            if re.fullmatch(r"U?P\d", operand):
                self._set_predicate(operand, None)
        for operand in instruction.operands[:2]:
            if re.fullmatch(r"U?R\d+(\.64)?", operand):
                count = max(1, instruction.bits // 32) if instruction.pipe == "LSU" else 2 if ".64" in instruction.opcode or instruction.name[0] == "D" else 1
                for i in range(count):
                    self._set(self._plus(operand.replace(".64", ""), i), None)
                return

    def _split(self, instruction: Instruction) -> tuple[list[str], list[str], list[str]]:
        """Return registers and predicates written, and sources, of an integer instruction."""
        operands = list(instruction.operands)
        predicates: list[str] = []
        if re.fullmatch(r"U?PT?\d*", operands[0]):  # LOP3 and the like may write a predicate first
            predicates.append(operands.pop(0))
        target = operands.pop(0)
        while operands and re.fullmatch(r"U?PT?\d*", operands[0]):
            predicates.append(operands.pop(0))
        return [target], predicates, operands

    def _do_mov(self, instruction: Instruction) -> None:
        self._set(instruction.operands[0], *self._source(instruction.operands[1]))

    def _do_ldc(self, instruction: Instruction) -> None:
        to, source = instruction.operands[0], instruction.operands[1]
        for i in range(max(1, instruction.bits // 32)):
            value, known = self._source(source, high=i)
            if instruction.bits < 32 and known is not False:
                value = value & np.uint32((1 << instruction.bits) - 1)
            self._set(self._plus(to, i), value, known)

    _do_uldc = _do_ldc

    def _do_s2r(self, instruction: Instruction) -> None:
        value = self.special.get(instruction.operands[1])
        self._set(instruction.operands[0], value)

    _do_s2ur = _do_s2r

    def _do_cs2r(self, instruction: Instruction) -> None:
        if instruction.operands[1] == "SRZ":
            self._set(instruction.operands[0], self.zero)
            if ".32" not in instruction.opcode:
                self._set(self._plus(instruction.operands[0], 1), self.zero)
        else:
            self._forget(instruction)

    def _do_r2ur(self, instruction: Instruction) -> None:
        self._set(instruction.operands[-2], *self._source(instruction.operands[-1]))

    def _carry(self, text: str) -> tuple[np.ndarray, Any]:
        return self._predicate(text)

    def _do_iadd3(self, instruction: Instruction) -> None:
        (to,), predicates, sources = self._split(instruction)
        carries = [s for s in sources[3:]]
        sources = sources[:3]
        total = np.zeros(self.size, np.uint64)
        known: Any = True
        for source in sources:
            value, k = self._source(source)
            known = _and(known, k)
            if known is False:
                break
            # In a sum with carries a negative operand is its complement plus 1.
            total = total + value.astype(np.uint64)
            if source.startswith("-") and predicates and value is not self.zero:
                total = total + np.where(value == 0, np.uint64(1 << 32), np.uint64(0))
        if ".X" in instruction.opcode and known is not False:
            for carry in carries or []:
                value, k = self._carry(carry)
                known = _and(known, k)
                total = total + value.astype(np.uint64)
        if known is False:
            self._set(to, None)
            for predicate in predicates:
                self._set_predicate(predicate, None)
            return
        self._set(to, (total & np.uint64(0xFFFFFFFF)).astype(np.uint32), known)
        over = total >> np.uint64(32)
        for number, predicate in enumerate(predicates):
            self._set_predicate(predicate, over > number, known)

    def _do_viadd(self, instruction: Instruction) -> None:
        a, ka = self._source(instruction.operands[1])
        b, kb = self._source(instruction.operands[2])
        self._set(instruction.operands[0], a + b, _and(ka, kb))

    def _do_iabs(self, instruction: Instruction) -> None:
        a, known = self._source(instruction.operands[1])
        self._set(instruction.operands[0], np.abs(a.view(np.int32)).view(np.uint32), known)

    def _do_imad(self, instruction: Instruction) -> None:
        (to,), predicates, sources = self._split(instruction)
        opcode = instruction.opcode
        signed = ".U32" not in opcode
        a, ka = self._source(sources[0])
        b, kb = self._source(sources[1])
        for zero, other in ((sources[0], sources[1]), (sources[1], sources[0])):
            if zero in ("RZ", "URZ"):
                ka = kb = True
        if ".WIDE" in opcode or ".HI" in opcode:
            c, kc = self._wide(sources[2])
            known = _and(ka, kb, kc)
            if known is False:
                (self._set_wide if ".WIDE" in opcode else self._set)(to, None)
                for predicate in predicates:
                    self._set_predicate(predicate, None)
                return
            if signed:
                product = (a.view(np.int32).astype(np.int64) * b.view(np.int32).astype(np.int64)).view(np.uint64)
            else:
                product = a.astype(np.uint64) * b.astype(np.uint64)
            total = product + c
            carry = total < c
            if ".X" in opcode:
                value, k = self._predicate(sources[3])
                total, known = total + value.astype(np.uint64), _and(known, k)
            if ".WIDE" in opcode:
                self._set_wide(to, total, known)
            else:
                self._set(to, (total >> np.uint64(32)).astype(np.uint32), known)
            for predicate in predicates:
                self._set_predicate(predicate, carry, known)
            return
        c, kc = self._source(sources[2])
        known = _and(ka, kb, kc)
        if known is False:
            self._set(to, None)
            for predicate in predicates:
                self._set_predicate(predicate, None)
            return
        if ".X" in opcode:
            value, k = self._predicate(sources[3])
            known = _and(known, k)
            c = c + value.astype(np.uint32)
        self._set(to, a * b + c, known)
        for predicate in predicates:
            self._set_predicate(predicate, None)

    def _do_lea(self, instruction: Instruction) -> None:
        (to,), predicates, sources = self._split(instruction)
        parts = instruction.opcode.split(".")
        a, ka = self._source(sources[0])
        b, kb = self._source(sources[1])
        rest = sources[2:]
        carry = None
        if "X" in parts:
            carry = rest.pop()
        shift = int(rest.pop(), 16)
        known = _and(ka, kb)
        if "HI" in parts:
            if "SX32" in parts:
                high, kh = (a.view(np.int32) >> np.int32(31)).view(np.uint32), True
            else:
                high, kh = self._source(rest[0]) if rest else (self.zero, True)
            known = _and(known, kh)
            if known is False:
                self._set(to, None)
                for predicate in predicates:
                    self._set_predicate(predicate, None)
                return
            both = a.astype(np.uint64) | (high.astype(np.uint64) << np.uint64(32))
            shifted = (both >> np.uint64(32 - shift)) & np.uint64(0xFFFFFFFF)
        else:
            if known is False:
                self._set(to, None)
                for predicate in predicates:
                    self._set_predicate(predicate, None)
                return
            shifted = (a.astype(np.uint64) << np.uint64(shift)) & np.uint64(0xFFFFFFFF)
        total = shifted + b.astype(np.uint64)
        if carry is not None:
            value, k = self._predicate(carry)
            total, known = total + value.astype(np.uint64), _and(known, k)
        self._set(to, (total & np.uint64(0xFFFFFFFF)).astype(np.uint32), known)
        for predicate in predicates:
            self._set_predicate(predicate, total > np.uint64(0xFFFFFFFF), known)

    def _do_lop3(self, instruction: Instruction) -> None:
        (to,), predicates, sources = self._split(instruction)
        a, ka = self._source(sources[0])
        b, kb = self._source(sources[1])
        c, kc = self._source(sources[2])
        table = int(sources[3], 16)
        known = _and(ka, kb, kc)
        if known is False:
            self._set(to, None)
            for predicate in predicates:
                self._set_predicate(predicate, None)
            return
        if table == 0xC0:
            result = a & b
        elif table == 0xFC:
            result = a | b
        elif table == 0x3C:
            result = a ^ b
        elif table == 0x96:
            result = a ^ b ^ c
        elif table == 0x33:
            result = ~b
        else:
            result = np.zeros(self.size, np.uint32)
            for bit in range(8):
                if table >> bit & 1:
                    result |= (a if bit & 4 else ~a) & (b if bit & 2 else ~b) & (c if bit & 1 else ~c)
        self._set(to, result, known)
        for predicate in predicates:
            self._set_predicate(predicate, result != 0, known)

    def _do_plop3(self, instruction: Instruction) -> None:
        operands = list(instruction.operands)
        targets, sources = operands[:2], operands[2:5]
        values = [self._predicate(source) for source in sources]
        known = _and(*(k for _, k in values))
        for target, table in zip(targets, operands[5:7], strict=False):
            code = int(table, 16)
            if known is False:
                self._set_predicate(target, None)
                continue
            result = np.zeros(self.size, bool)
            for bit in range(8):
                if code >> bit & 1:
                    term = self.one
                    for (value, _), which in zip(values, (4, 2, 1), strict=True):
                        term = term & (value if bit & which else ~value)
                    result = result | term
            self._set_predicate(target, result, known)

    def _do_p2r(self, instruction: Instruction) -> None:
        mask = int(instruction.operands[-1], 16) if instruction.operands[-1].startswith("0x") else 0x7F
        base, known = self._source(instruction.operands[2])
        shift = {"B1": 8, "B2": 16, "B3": 24}.get(instruction.opcode.partition(".")[2], 0)
        value = np.zeros(self.size, np.uint32)
        for i in range(7):
            if mask >> i & 1:
                p, k = self._predicate(f"P{i}")
                known = _and(known, k)
                value = value | (p.astype(np.uint32) << np.uint32(i))
        if known is False:
            self._set(instruction.operands[0], None)
            return
        kept = base & ~np.uint32(mask << shift & 0xFFFFFFFF)
        self._set(instruction.operands[0], kept | (value << np.uint32(shift)), known)

    def _do_r2p(self, instruction: Instruction) -> None:
        source = instruction.operands[1]
        mask = int(instruction.operands[-1], 16)
        shift = next((8 * i for i in range(4) if f".B{i}" in source + instruction.opcode), 0)
        value, known = self._source(re.sub(r"\.B\d", "", source))
        for i in range(7):
            if mask >> i & 1:
                self._set_predicate(f"P{i}", (value >> np.uint32(i + shift) & np.uint32(1)) != 0, known)

    def _do_prmt(self, instruction: Instruction) -> None:
        to, a, selector, b = instruction.operands[:4]
        va, ka = self._source(a)
        vb, kb = self._source(b)
        vs, ks = self._source(selector)
        if ks is True and selector.startswith("0x"):
            code = int(selector, 16)
            uses = {(code >> 4 * i & 7) // 4 for i in range(4)}
            ka, kb = ka if 0 in uses else True, kb if 1 in uses else True
        known = _and(ka, kb, ks)
        if known is False:
            self._set(to, None)
            return
        both = va.astype(np.uint64) | (vb.astype(np.uint64) << np.uint64(32))
        result = np.zeros(self.size, np.uint32)
        for i in range(4):
            pick = (vs >> np.uint32(4 * i)) & np.uint32(0xF)
            byte = (both >> (np.uint64(8) * (pick & np.uint32(7)).astype(np.uint64))) & np.uint64(0xFF)
            signed = np.where(byte & np.uint64(0x80), np.uint64(0xFF), np.uint64(0))
            byte = np.where(pick & np.uint32(8), signed, byte)
            result |= byte.astype(np.uint32) << np.uint32(8 * i)
        self._set(to, result, known)

    def _do_sel(self, instruction: Instruction) -> None:
        to, a, b, condition = instruction.operands
        p, kp = self._predicate(condition)
        va, ka = self._source(a, instruction.name == "FSEL")
        vb, kb = self._source(b, instruction.name == "FSEL")
        if kp is False:
            self._set(to, None)
            return
        known = True if ka is kb is kp is True else np.where(p, ka, kb) & kp
        self._set(to, np.where(p, va, vb), known)

    _do_fsel = _do_sel

    def _do_sgxt(self, instruction: Instruction) -> None:
        a, known = self._source(instruction.operands[1])
        n = int(instruction.operands[2], 16)
        if ".U32" in instruction.opcode:
            result = a & np.uint32((1 << n) - 1)
        else:
            result = ((a << np.uint32(32 - n)).view(np.int32) >> np.int32(32 - n)).view(np.uint32)
        self._set(instruction.operands[0], result, known)

    def _do_shf(self, instruction: Instruction) -> None:
        to, low, amount, high = instruction.operands[:4]
        parts = instruction.opcode.split(".")
        vl, kl = self._source(low)
        vs, ks = self._source(amount)
        vh, kh = self._source(high)
        if low == "RZ":
            kl = True
        if "HI" not in parts and "U64" not in parts and "S64" not in parts and "L" in parts:
            kh = True  # a plain shift to the left
        known = _and(kl, ks, kh)
        if known is False:
            self._set(to, None)
            return
        wide = "U64" in parts or "S64" in parts
        most = 63 if wide else 31
        signed = "S32" in parts or "S64" in parts
        shift = vs & np.uint32(most) if "W" in parts else np.minimum(vs, np.uint32(most + 1))
        both = vl.astype(np.uint64) | (vh.astype(np.uint64) << np.uint64(32))
        shift64 = shift.astype(np.uint64)
        if "L" in parts:
            if "HI" in parts:
                result = (both << np.minimum(shift64, np.uint64(63))) >> np.uint64(32)
            else:
                result = np.where(shift64 < 32, vl.astype(np.uint64) << np.minimum(shift64, np.uint64(31)), 0)
        elif "HI" in parts:
            # The high word, shifted to the right by itself.
            top = vh.view(np.int32).astype(np.int64) if signed else vh.astype(np.int64)
            result = (top >> np.minimum(shift64, np.uint64(63)).astype(np.int64)).view(np.uint64)
        else:
            pair = both.view(np.int64) if signed else both
            count = np.minimum(shift64, np.uint64(63))
            result = (pair >> (count.astype(np.int64) if signed else count)).astype(np.uint64)
        self._set(to, (result & np.uint64(0xFFFFFFFF)).astype(np.uint32), known)

    def _compare(self, parts: Sequence[str], a: np.ndarray, b: np.ndarray) -> np.ndarray:
        result: np.ndarray = {
            "LT": np.less, "LE": np.less_equal, "GT": np.greater, "GE": np.greater_equal,
            "EQ": np.equal, "NE": np.not_equal,
        }[parts[1]](a, b)  # fmt: skip
        return result

    def _do_isetp(self, instruction: Instruction) -> None:
        parts = instruction.opcode.split(".")
        first, second, a, b, other, *extra = instruction.operands
        va, ka = self._source(a)
        vb, kb = self._source(b)
        po, ko = self._predicate(other)
        known = _and(ka, kb, ko)
        extended = "EX" in parts
        if extended:
            pe, ke = self._predicate(extra[0])
            known = _and(known, ke)
        if known is False:
            # An operand may settle it alone.
            for target in (first, second):
                self._set_predicate(target, None)
            return
        x, y = (va, vb) if "U32" in parts else (va.view(np.int32), vb.view(np.int32))
        if extended:
            # `pe` is the comparison of the lower words.
            if parts[1] in ("EQ",):
                result = (x == y) & pe
            elif parts[1] == "NE":
                result = (x != y) | pe
            else:
                strict = np.less(x, y) if parts[1] in ("LT", "LE") else np.greater(x, y)
                result = strict | ((x == y) & pe)
        else:
            result = self._compare(parts, x, y)
        combine = np.logical_and if "AND" in parts else np.logical_or if "OR" in parts else np.logical_xor
        self._set_predicate(first, combine(result, po), known)
        self._set_predicate(second, combine(~result, po), known)

    def _do_vimnmx(self, instruction: Instruction) -> None:
        to, a, b, which = (*instruction.operands[:3], instruction.operands[-1])
        va, ka = self._source(a)
        vb, kb = self._source(b)
        p, kp = self._predicate(which)
        known = _and(ka, kb, kp)
        if known is False:
            self._set(to, None)
            return
        if ".U32" not in instruction.opcode:
            va, vb = va.view(np.int32), vb.view(np.int32)
        self._set(to, np.where(p, np.minimum(va, vb), np.maximum(va, vb)).astype(va.dtype).view(np.uint32), known)

    _do_imnmx = _do_vimnmx

    def _do_viaddmnmx(self, instruction: Instruction) -> None:
        to, a, b, c, which = instruction.operands
        va, ka = self._source(a)
        vb, kb = self._source(b)
        vc, kc = self._source(c)
        p, kp = self._predicate(which)
        known = _and(ka, kb, kc, kp)
        if known is False:
            self._set(to, None)
            return
        total = va + vb
        if ".U32" not in instruction.opcode:
            total, vc = total.view(np.int32), vc.view(np.int32)
        self._set(to, np.where(p, np.minimum(total, vc), np.maximum(total, vc)).view(np.uint32), known)

    # Floating-point numbers: only of known ones, as in divisions of integers

    def _floats(self, sources: Sequence[str]) -> tuple[list[np.ndarray], Any]:
        values, known = [], True
        for source in sources:
            value, k = self._source(source, floating=True)
            known = _and(known, k)
            if known is False:
                return [], False
            values.append(value.view(np.float32))
        return values, known

    def _set_float(self, to: str, value: np.ndarray, known: Any) -> None:
        self._set(to, value.astype(np.float32).view(np.uint32), known)

    def _do_fadd(self, instruction: Instruction) -> None:
        values, known = self._floats(instruction.operands[1:3])
        if known is False:
            return self._set(instruction.operands[0], None)
        self._set_float(instruction.operands[0], values[0] + values[1], known)

    def _do_fmul(self, instruction: Instruction) -> None:
        values, known = self._floats(instruction.operands[1:3])
        if known is False:
            return self._set(instruction.operands[0], None)
        self._set_float(instruction.operands[0], values[0] * values[1], known)

    def _do_ffma(self, instruction: Instruction) -> None:
        values, known = self._floats(instruction.operands[1:4])
        if known is False:
            return self._set(instruction.operands[0], None)
        product = values[0].astype(np.float64) * values[1].astype(np.float64)
        self._set_float(instruction.operands[0], product + values[2].astype(np.float64), known)

    def _do_hfma2(self, instruction: Instruction) -> None:
        to, *sources = instruction.operands
        # A constant in two halves, on a pipe that is free.
        if sources[0] == "-RZ" and sources[1] == "RZ" and len(sources) == 4 and "BF16" not in instruction.opcode:
            halves = np.array([_float(sources[3]), _float(sources[2])], dtype=np.float16)
            self._set(to, self._constant(int(halves.view(np.uint32)[0])), True)
        else:
            self._forget(instruction)

    def _do_mufu(self, instruction: Instruction) -> None:
        values, known = self._floats(instruction.operands[1:2])
        if known is False or "64H" in instruction.opcode:
            return self._set(instruction.operands[0], None)
        x = values[0].astype(np.float64)
        which = instruction.opcode.split(".")[1]
        function = _MUFU.get(which)
        if function is None:
            return self._set(instruction.operands[0], None)
        self._set_float(instruction.operands[0], function(x), known)

    def _do_i2f(self, instruction: Instruction) -> None:
        opcode = instruction.opcode
        if "F64" in opcode or "F16" in opcode:
            return self._forget(instruction)
        if "64" in opcode:
            value, known = self._wide(instruction.operands[1])
            number = value.view(np.int64) if "S64" in opcode else value
        else:
            small, known = self._source(instruction.operands[1])
            number = small if ".U32" in opcode or ".RP" in opcode else small.view(np.int32)
        if known is False:
            return self._set(instruction.operands[0], None)
        result = number.astype(np.float32)
        if ".RP" in opcode:
            short = result.astype(np.float64) < number.astype(np.float64)
            result = np.where(short, np.nextafter(result, np.float32(np.inf)), result)
        self._set_float(instruction.operands[0], result, known)

    def _do_i2fp(self, instruction: Instruction) -> None:
        value, known = self._source(instruction.operands[1])
        if known is False:
            return self._set(instruction.operands[0], None)
        self._set_float(instruction.operands[0], value.astype(np.float32) if ".U32" in instruction.opcode else value.view(np.int32).astype(np.float32), known)

    def _do_f2i(self, instruction: Instruction) -> None:
        opcode = instruction.opcode
        values, known = self._floats(instruction.operands[1:2])
        if known is False or "F64" in opcode:
            return self._forget(instruction)
        x = values[0].astype(np.float64)
        x = np.trunc(x) if "TRUNC" in opcode else np.floor(x) if "FLOOR" in opcode else np.ceil(x) if "CEIL" in opcode else np.rint(x)
        x = np.nan_to_num(x)
        if ".U64" in opcode:
            self._set_wide(instruction.operands[0], np.clip(x, 0, 1.8446744073709550e19).astype(np.uint64), known)
        elif ".S64" in opcode or ".64" in opcode:
            self._set_wide(instruction.operands[0], np.clip(x, -9.2e18, 9.2e18).astype(np.int64).view(np.uint64), known)
        elif ".U32" in opcode:
            self._set(instruction.operands[0], np.clip(x, 0, 2**32 - 1).astype(np.uint32), known)
        else:
            self._set(instruction.operands[0], np.clip(x, -(2**31), 2**31 - 1).astype(np.int32).view(np.uint32), known)

    def _do_fsetp(self, instruction: Instruction) -> None:
        parts = instruction.opcode.split(".")
        first, second, a, b, other = instruction.operands[:5]
        values, known = self._floats((a, b))
        po, ko = self._predicate(other)
        known = _and(known, ko)
        if known is False:
            self._set_predicate(first, None)
            self._set_predicate(second, None)
            return
        x, y = values
        unordered = np.isnan(x) | np.isnan(y)
        kind = parts[1]
        if kind in ("NUM", "NAN"):
            result = ~unordered if kind == "NUM" else unordered
        else:
            result = self._compare(("", kind.removesuffix("U") if kind not in ("LTU",) else "LT"), x, y)
            result = result | unordered if kind.endswith("U") else result & ~unordered
        combine = np.logical_and if "AND" in parts else np.logical_or if "OR" in parts else np.logical_xor
        self._set_predicate(first, combine(result, po), known)
        self._set_predicate(second, combine(~result, po), known)

    def _do_fmnmx(self, instruction: Instruction) -> None:
        values, known = self._floats(instruction.operands[1:3])
        p, kp = self._predicate(instruction.operands[-1])
        known = _and(known, kp)
        if known is False:
            return self._set(instruction.operands[0], None)
        self._set_float(instruction.operands[0], np.where(p, np.fmin(*values), np.fmax(*values)), known)

    def _do_fchk(self, instruction: Instruction) -> None:
        """Whether a quotient needs the slow path: of ordinary numbers it doesn't."""
        self._set_predicate(instruction.operands[0], ~self.one, True)

    # Memory

    def _address(self, text: str) -> tuple[np.ndarray, Any]:
        inner = text[text.rindex("[") + 1 : -1]
        total, known = np.zeros(self.size, np.uint64), True
        for part in inner.split("+"):
            part = part.strip()
            if part.endswith(".64"):
                value, k = self._wide(part[:-3])
            elif part.startswith(("0x", "-0x")):
                value, k = self._constant64(int(part, 16)), True
            else:
                small, k = self._source(re.sub(r"\.(U32|X\d+)", "", part))
                value = small.astype(np.uint64)
            known = _and(known, k)
            if known is False:
                return total, False
            total = total + value
        return total, known

    def _constant64(self, number: int) -> np.ndarray:
        return np.full(self.size, number & 0xFFFFFFFFFFFFFFFF, np.uint64)

    def _active(self) -> np.ndarray:
        return self.active if self._mask is None else self._mask & self.active

    def _global(self, instruction: Instruction, place: str, how: str) -> tuple[np.ndarray, Any]:
        address, known = self._address(place)
        active = self._active()
        nbytes = instruction.bits // 8
        if known is not True:
            self.counts.unknown_addresses += 1
            self.counts.moved[-1, how] += int(active.sum()) * nbytes
            return address, known
        if not active.any():
            return address, known
        shown = np.where(active, address, np.uint64(2**64 - 1)).reshape(-1, WARP)
        ordered = np.sort(shown, axis=1)
        fresh = np.ones(ordered.shape, bool)
        fresh[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
        fresh &= ordered != np.uint64(2**64 - 1)
        distinct = ordered[fresh]
        regions, numbers = np.unique(self.tensors.find(distinct), return_counts=True)
        for region, number in zip(regions, numbers, strict=True):
            self.counts.moved[int(region), how] += int(number) * nbytes
            if region < 0:
                self.counts.outside += int(number)
        return address, known

    def _do_ldg(self, instruction: Instruction) -> None:
        targets = [operand for operand in instruction.operands if "[" not in operand]
        place = next(operand for operand in instruction.operands if "[" in operand)
        address, known = self._global(instruction, place, "read")
        to = targets[-1] if len(targets) == 1 else next(t for t in targets if re.fullmatch(r"U?R\w+", t))
        values = None
        if known is True:
            active = self._active()
            if active.any():
                safe = np.where(active, address, address[int(np.argmax(active))])
                values = self.tensors.read(safe, instruction.bits // 8)
        words = max(1, instruction.bits // 32)
        for i in range(words):
            if values is None:
                self._set(self._plus(to, i), None)
                continue
            some = values[:, 4 * i : 4 * i + 4].astype(np.uint32)
            word = np.zeros(self.size, np.uint32)
            for j in range(some.shape[1]):
                word |= some[:, j] << np.uint32(8 * j)
            if instruction.bits < 32 and ".S" in instruction.opcode:
                shift = np.int32(32 - instruction.bits)
                word = ((word << np.uint32(shift)).view(np.int32) >> shift).view(np.uint32)
            self._set(self._plus(to, i), word, True)

    _do_ld = _do_ldg

    def _do_stg(self, instruction: Instruction) -> None:
        self._global(instruction, next(operand for operand in instruction.operands if "[" in operand), "written")

    _do_st = _do_stg

    def _do_red(self, instruction: Instruction) -> None:
        self._do_stg(instruction)

    def _do_redg(self, instruction: Instruction) -> None:
        self._do_stg(instruction)

    def _do_atomg(self, instruction: Instruction) -> None:
        self._do_stg(instruction)
        self._forget(instruction)

    def _do_lds(self, instruction: Instruction) -> None:
        self._forget(instruction)

    def _do_ldsm(self, instruction: Instruction) -> None:
        count = int(next((p for p in instruction.opcode.split(".") if p in ("1", "2", "4")), "1"))
        for i in range(count):
            self._set(self._plus(instruction.operands[0], i), None)

    def _do_shfl(self, instruction: Instruction) -> None:
        targets = instruction.operands
        self._set_predicate(targets[0], None)
        self._set(targets[1], None)


_REGISTER = re.compile(r"(-|~)?(\|)?(U?R(?:\d+|Z))\|?")
_NOTHING = {
    "NOP", "BSSY", "BSYNC", "BAR", "WARPSYNC", "STS", "MEMBAR", "DEPBAR", "LDGDEPBAR", "ERRBAR", "CCTL", "YIELD", "STSM", "STL", "RPCMOV", "BMOV", "NANOSLEEP",
}  # fmt: skip
_MUFU: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "RCP": lambda x: 1.0 / x,
    "RSQ": lambda x: 1.0 / np.sqrt(x),
    "SQRT": np.sqrt,
    "EX2": np.exp2,
    "LG2": np.log2,
    "SIN": lambda x: np.sin(x * 2 * np.pi),
    "COS": lambda x: np.cos(x * 2 * np.pi),
    "TANH": np.tanh,
}


def _float(text: str) -> float:
    sign = -1.0 if text.startswith("-") else 1.0
    body = text.lstrip("+-|").rstrip("|")
    if body.startswith("QNAN") or body.startswith("SNAN") or body == "NAN":
        return float("nan")
    if body.startswith("INF"):
        return sign * float("inf")
    try:
        return sign * float(body)
    except ValueError:
        return float("nan")


def chosen_programs(total: int, most: int) -> list[int]:
    """Return the programs that stand for all: every one if there are few, else some that no period of the grid aligns."""
    if total <= most:
        return list(range(total))
    golden = 0.6180339887498949
    picked = {int((number + 0.5) * golden % 1.0 * total) for number in range(most)}
    return sorted(picked)
