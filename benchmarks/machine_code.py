"""Machine code of NVIDIA GPUs: the instructions of cubins, what executes them, constants and parameters.

Instructions are read from cuobjdump, the rest from the ELF file itself.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

#: What executes an instruction, by its name. Each takes a slot of issue; some pipes take fewer than one a cycle.
PIPES = {
    "FMA": "FFMA FMUL FADD FFMA2 FMUL2 FADD2 HFMA2 HADD2 HMUL2 IMAD",
    "ALU": """IADD3 IADD VIADD VIADDMNMX LEA LOP3 PRMT SEL SGXT SHF ISETP FSETP FSEL FSET FMNMX FMNMX3 IMNMX VIMNMX
        VIMNMX3 VABSDIFF MOV IABS PLOP3 P2R R2P CS2R I2FP F2FP FCHK HMNMX2 HSETP2 HSET2 I2IP BMSK IDP""",
    "XU": "MUFU F2I I2F F2F FRND POPC FLO BREV",
    "LSU": """LDG STG LD ST LDS STS LDL STL LDSM STSM LDGSTS LDGDEPBAR DEPBAR ATOM ATOMG ATOMS RED REDG REDS SHFL MATCH
        VOTE MEMBAR CCTL ERRBAR FENCE SYNCS UBLKCP UTMALDG""",
    "FP64": "DFMA DMUL DADD DSETP DMNMX",
    "TENSOR": "HMMA IMMA BMMA DMMA HGMMA IGMMA",
    "control": """BRA BRX JMP CALL RET EXIT BSSY BSYNC BREAK BAR NOP WARPSYNC YIELD NANOSLEEP BMOV RPCMOV BPT KILL
        ENDCOLLECTIVE UCGABAR_ARV UCGABAR_WAIT ELECT""",
}
PIPE_OF = {name: pipe for pipe, names in PIPES.items() for name in names.split()}
#: Where everything else goes: what a warp computes once for all its threads, and constants.
UNIFORM = "uniform"
ALL_PIPES = (*PIPES, UNIFORM)

#: In cuobjdump's text: address, guard, opcode, operands.
_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?PT?\d*)\s+)?([A-Z][\w.]*)\s*([^;]*);", re.MULTILINE)
_FUNCTION = re.compile(r"^\s+Function : (\S+)$", re.MULTILINE)
_ELF_MAGIC = b"\x7fELF"
#: Attributes of a function.
_PARAMETERS_AT, _PARAMETER = 0x0A, 0x17
_LONG = 0x04  # the format of an attribute that is longer than two bytes


class Instruction(NamedTuple):
    address: int
    guard: str  # "", "P0" or "!UP1"
    opcode: str  # "LDG.E.128"
    operands: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def pipe(self) -> str:
        return PIPE_OF.get(self.name, UNIFORM)

    @property
    def bits(self) -> int:
        """The width of what an instruction on memory moves for each thread."""
        for part in self.opcode.split(".")[1:]:
            if part in ("U8", "S8"):
                return 8
            if part in ("U16", "S16"):
                return 16
            if part in ("64", "128", "256"):
                return int(part)
        return 32


def functions(text: str) -> dict[str, list[Instruction]]:
    """Read the output of `cuobjdump -sass`: the code of each function."""
    parts = _FUNCTION.split(text)
    return {name: list(_instructions(body)) for name, body in zip(parts[1::2], parts[2::2], strict=True)}


def _instructions(text: str) -> Iterator[Instruction]:
    for match in _LINE.finditer(text):
        operands = tuple(part.strip() for part in match[4].split(",")) if match[4].strip() else ()
        yield Instruction(int(match[1], 16), match[2] or "", match[3], operands)


@dataclass
class Function:
    """A kernel in a cubin."""

    code: Sequence[Instruction]
    #: Constant banks but for 0, which a launch fills.
    banks: dict[int, bytes] = field(default_factory=dict)
    #: Where in bank 0 parameters begin, and how many bytes they take.
    parameters: tuple[int, int] = (0, 0)
    #: Of each parameter: where it begins among them, and its bytes.
    layout: list[tuple[int, int]] = field(default_factory=list)

    @cached_property
    def number(self) -> dict[int, int]:
        """Addresses as numbers in `code`."""
        return {instruction.address: number for number, instruction in enumerate(self.code)}


def read(cubin: bytes, text: str) -> dict[str, Function]:
    """Return the kernels of a cubin, whose disassembly is `text`."""
    found = {name: Function(code) for name, code in functions(text).items()}
    for name, content in sections(cubin):
        for function, kernel in found.items():
            if name == f".nv.info.{function}":
                _read_info(content, kernel)
            elif match := re.fullmatch(rf"\.nv\.constant([1-9])\.{re.escape(function)}", name):
                kernel.banks[int(match[1])] = content
    return found


def sections(elf: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of each section of an ELF file of 64 bits."""
    if not elf.startswith(_ELF_MAGIC):
        raise ValueError("not an ELF file")
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    size, count, names_at = struct.unpack_from("<3H", elf, 0x3A)
    headers = [struct.unpack_from("<2I4Q", elf, table + number * size) for number in range(count)]
    names = headers[names_at][4]
    for name_at, kind, _, _, offset, length in headers:
        begin = names + name_at
        name = elf[begin : elf.index(b"\0", begin)].decode()
        yield name, b"" if kind == 8 else elf[offset : offset + length]


def _read_info(content: bytes, kernel: Function) -> None:
    at = 0
    while at + 4 <= len(content):
        form, attribute, size = struct.unpack_from("<2BH", content, at)
        at += 4
        if form != _LONG:
            continue
        if attribute == _PARAMETERS_AT:
            _, begin, length = struct.unpack_from("<I2H", content, at)
            kernel.parameters = begin, length
        elif attribute == _PARAMETER:
            _, ordinal, offset, packed = struct.unpack_from("<I2HI", content, at)
            kernel.layout += [(0, 0)] * (ordinal + 1 - len(kernel.layout))
            kernel.layout[ordinal] = offset, packed >> 18
        at += size
