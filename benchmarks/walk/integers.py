"""Instructions that compute integers and predicates."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.machine_code import Instruction
from benchmarks.walk.interpreter import Walk, executes
from benchmarks.walk.operands import INTEGER, PREDICATE, after, sources, targets, words_written
from benchmarks.walk.threads import ABOVE, LOW, Mask, Unknown


@executes("MOV", "R2UR")
def _move(walk: Walk, instruction: Instruction) -> None:
    walk.put(targets(instruction)[0][0], walk.word(sources(instruction)[0]))


@executes("LDC")
def _load_constant(walk: Walk, instruction: Instruction) -> None:
    (to,), _ = targets(instruction)
    for number in range(words_written(instruction)):
        value = walk.word(instruction.operands[1], number)
        narrow = instruction.bits < 32
        walk.put(after(to, number), value & np.uint32((1 << instruction.bits) - 1) if narrow else value)


@executes("S2R", "S2UR")
def _special(walk: Walk, instruction: Instruction) -> None:
    if instruction.operands[1] not in walk.special:
        raise Unknown
    walk.put(instruction.operands[0], walk.special[instruction.operands[1]])


@executes("CS2R")
def _special_pair(walk: Walk, instruction: Instruction) -> None:
    if instruction.operands[1] != "SRZ":
        raise Unknown
    for number in range(1 if ".32" in instruction.opcode else 2):
        walk.put(after(instruction.operands[0], number), walk.zero)


@executes("IADD3", "VIADD", "IADD")
def _add(walk: Walk, instruction: Instruction) -> None:
    (to,), carries_out = targets(instruction)
    operands = sources(instruction)
    total = np.zeros(walk.size, np.uint64)
    for operand in operands[:3]:
        if PREDICATE.fullmatch(operand):
            break
        value = walk.word(operand)
        total = total + value
        if carries_out and operand.startswith("-") and not INTEGER.fullmatch(operand):
            # Its complement and 1: of zero that is 2^32.
            total = total + np.where(value == 0, np.uint64(2**32), np.uint64(0))
    if ".X" in instruction.opcode:
        for operand in operands[3:]:
            total = total + walk.truth(operand)
    walk.put(to, (total & LOW).astype(np.uint32))
    for number, carry in enumerate(carries_out):
        walk.put_truth(carry, (total >> ABOVE) > number)


@executes("IMAD")
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
        walk.put(to, (total >> ABOVE).astype(np.uint32))
    for carry in carries_out:
        walk.put_truth(carry, carry_out)


@executes("LEA")
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
        shifted = (low | (high.astype(np.uint64) << ABOVE)) >> np.uint64(32 - shift) & LOW
    else:
        shifted = low << np.uint64(shift) & LOW
    total = shifted + walk.word(b)
    if carry_in is not None:
        total = total + walk.truth(carry_in)
    walk.put(to, (total & LOW).astype(np.uint32))
    for carry in carries_out:
        walk.put_truth(carry, total > LOW)


@executes("LOP3")
def _logic(walk: Walk, instruction: Instruction) -> None:
    (to,), nonzero = targets(instruction)
    a, b, c, table = sources(instruction)[:4]
    result = _by_table(int(table, 16), (walk.word(a), walk.word(b), walk.word(c)), walk.zero)
    walk.put(to, result)
    for predicate in nonzero:
        walk.put_truth(predicate, result != 0)


@executes("PLOP3")
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


@executes("P2R")
def _predicates_to_register(walk: Walk, instruction: Instruction) -> None:
    (to,), _ = targets(instruction)
    mask, shift = int(instruction.operands[-1], 16), 8 * int((re.findall(r"\.B(\d)", instruction.opcode) or ["0"])[0])
    value = walk.word(instruction.operands[2]) & np.uint32(~(mask << shift) & 0xFFFFFFFF)
    for number in range(7):
        if mask >> number & 1:
            value = value | walk.truth(f"P{number}").astype(np.uint32) << np.uint32(number + shift)
    walk.put(to, value)


@executes("R2P")
def _register_to_predicates(walk: Walk, instruction: Instruction) -> None:
    source, mask = instruction.operands[1], int(instruction.operands[-1], 16)
    shift = 8 * int((re.findall(r"\.B(\d)", instruction.opcode + source) or ["0"])[0])
    value = walk.word(re.sub(r"\.B\d", "", source))
    for number in range(7):
        if mask >> number & 1:
            walk.put_truth(f"P{number}", (value >> np.uint32(number + shift) & np.uint32(1)) != 0)


@executes("PRMT")
def _permute(walk: Walk, instruction: Instruction) -> None:
    (to,), _ = targets(instruction)
    a, selector, b = sources(instruction)[:3]
    picks = walk.word(selector)
    if INTEGER.fullmatch(selector):
        # A source of which no byte is taken may be unknown.
        used = {int(selector, 16) >> 4 * byte & 4 for byte in range(4)}
        a, b = a if 0 in used else "RZ", b if 4 in used else "RZ"
    both = walk.word(a).astype(np.uint64) | walk.word(b).astype(np.uint64) << ABOVE
    result = walk.zero
    for number in range(4):
        pick = picks >> np.uint32(4 * number)
        byte = both >> (np.uint64(8) * (pick & np.uint32(7)).astype(np.uint64)) & np.uint64(0xFF)
        sign = np.where(byte & np.uint64(0x80), np.uint64(0xFF), np.uint64(0))
        result = result | np.where(pick & np.uint32(8), sign, byte).astype(np.uint32) << np.uint32(8 * number)
    walk.put(to, result)


@executes("SEL", "FSEL")
def _select(walk: Walk, instruction: Instruction) -> None:
    (to,), _ = targets(instruction)
    a, b, condition = sources(instruction)
    floating = instruction.name == "FSEL"
    where = walk.truth(condition)
    walk.put(to, np.where(where, walk.word(a, floating=floating), walk.word(b, floating=floating)))


@executes("SGXT")
def _extend(walk: Walk, instruction: Instruction) -> None:
    (to,), _ = targets(instruction)
    a, width = sources(instruction)[:2]
    bits = int(width, 16)
    value = walk.word(a)
    if ".U32" in instruction.opcode:
        walk.put(to, value & np.uint32((1 << bits) - 1))
    else:
        walk.put(to, ((value << np.uint32(32 - bits)).view(np.int32) >> np.int32(32 - bits)).view(np.uint32))


@executes("IABS")
def _absolute(walk: Walk, instruction: Instruction) -> None:
    walk.put(instruction.operands[0], np.abs(walk.word(instruction.operands[1]).view(np.int32)).view(np.uint32))


@executes("SHF")
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
        both = walk.word(low).astype(np.uint64) | walk.word(high).astype(np.uint64) << ABOVE
        result = (both << by) >> ABOVE
    elif "HI" in parts:
        # The upper word alone.
        top = walk.word(high)
        long = top.view(np.int32).astype(np.int64) if signed else top.astype(np.int64)
        result = (long >> by.astype(np.int64)).view(np.uint64)
    else:
        both = walk.word(low).astype(np.uint64) | walk.word(high).astype(np.uint64) << ABOVE
        result = (both.view(np.int64) >> by.astype(np.int64)).view(np.uint64) if signed else both >> by
    walk.put(to, (result & LOW).astype(np.uint32))


COMPARE: dict[str, Callable[[Any, Any], Mask]] = {
    "LT": np.less, "LE": np.less_equal, "GT": np.greater, "GE": np.greater_equal, "EQ": np.equal, "NE": np.not_equal,
}  # fmt: skip
_JOIN: dict[str, Callable[[Any, Any], Mask]] = {
    "AND": np.logical_and, "OR": np.logical_or, "XOR": np.logical_xor,
}  # fmt: skip


@executes("ISETP")
def _compare(walk: Walk, instruction: Instruction) -> None:
    first, second, a, b, other, *lower = instruction.operands
    parts = instruction.opcode.split(".")
    kind = parts[1]
    x, y = walk.word(a), walk.word(b)
    if "U32" not in parts:
        x, y = x.view(np.int32), y.view(np.int32)
    result = COMPARE[kind](x, y)
    if "EX" in parts:
        # Of the upper words; the lower ones are compared already.
        below = walk.truth(lower[0])
        if kind == "NE":
            result = result | below
        else:
            strict = walk.never if kind == "EQ" else COMPARE[kind[0] + "T"](x, y)
            result = strict | (x == y) & below
    put_truths(walk, instruction, result, other, first, second)


def put_truths(
    walk: Walk, instruction: Instruction, result: Mask, other: str, first: str, second: str
) -> None:  # fmt: skip
    """Write a comparison, joined with another predicate, and its opposite, joined likewise."""
    join = next(_JOIN[part] for part in reversed(instruction.opcode.split(".")) if part in _JOIN)
    others = walk.truth(other)
    walk.put_truth(first, join(result, others))
    walk.put_truth(second, join(~result, others))


@executes("VIMNMX", "IMNMX", "VIADDMNMX")
def _extreme(walk: Walk, instruction: Instruction) -> None:
    (to,), _ = targets(instruction)
    *values, least = sources(instruction)
    words = [walk.word(value) for value in values]
    a, b = (words[0] + words[1], words[2]) if len(words) == 3 else words
    x, y = (a, b) if ".U32" in instruction.opcode else (a.view(np.int32), b.view(np.int32))
    walk.put(to, np.where(walk.truth(least), np.minimum(x, y), np.maximum(x, y)).view(np.uint32))
