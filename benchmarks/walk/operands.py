"""Text of machine code: the operands of an instruction, and which of them it writes."""

from __future__ import annotations

import re

import numpy as np

from benchmarks.machine_code import Instruction

PREDICATE = re.compile(r"!?U?P(?:\d+|T)")
REGISTER = re.compile(r"([-~])?(\|)?(U?R)(\d+|Z)\|?")
CONSTANT = re.compile(r"([-~])?(\|)?c\[0x([0-9a-f]+)\]\[(?:(U?R\w+)\+?)?(?:0x([0-9a-f]+))?\]\|?")
INTEGER = re.compile(r"-?0x[0-9a-f]+")
_ONLY_PREDICATES = {"ISETP", "FSETP", "DSETP", "HSETP2", "PLOP3", "FCHK"}


def after(name: str, count: int) -> str:
    """Return the register `count` behind another."""
    match = REGISTER.fullmatch(name)
    assert match is not None, name
    return name if match[4] == "Z" else f"{match[3]}{int(match[4]) + count}"


def targets(instruction: Instruction) -> tuple[list[str], list[str]]:
    """Return the register (the first of several) and the predicates that an instruction writes."""
    operands = [operand.removesuffix(".reuse") for operand in instruction.operands]
    predicates = []
    if instruction.name.removeprefix("U") in _ONLY_PREDICATES:
        return [], [operand for operand in operands[:2] if PREDICATE.fullmatch(operand)]
    while operands and PREDICATE.fullmatch(operands[0]):
        predicates.append(operands.pop(0))
    registers = operands[:1]
    if not registers or not re.fullmatch(r"U?R(\d+|Z)", registers[0]):
        return [], predicates
    for operand in operands[1:]:
        if not PREDICATE.fullmatch(operand):
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


def bits_of(text: str) -> int | None:
    """Return the bits of a number as it stands in the text."""
    text = text.replace("QNAN", "nan").replace("SNAN", "nan").replace("INF", "inf").replace("|", "").replace(" ", "")
    try:
        return int(np.float32(float(text)).view(np.uint32))
    except ValueError:
        return None


def place_of(instruction: Instruction) -> str:
    """Return the operand that is an address."""
    return [operand for operand in instruction.operands if "[" in operand][-1]
