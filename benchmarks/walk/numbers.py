"""Instructions that compute numbers, as far as quotients of integers need them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.machine_code import Instruction
from benchmarks.walk.integers import COMPARE, put_truths
from benchmarks.walk.interpreter import Walk, executes
from benchmarks.walk.operands import sources, targets
from benchmarks.walk.threads import Unknown

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


@executes("FADD", "FMUL", "FFMA")
def _arithmetic(walk: Walk, instruction: Instruction) -> None:
    (to,), _ = targets(instruction)
    # An exact product; of a sum in float64 the rounding is off by less than what is asked of it.
    a, b, *c = (walk.number(source).astype(np.float64) for source in sources(instruction)[:3])
    walk.put_number(to, a + b if instruction.name == "FADD" else a * b + c[0] if c else a * b)


@executes("HFMA2")
def _constant_in_halves(walk: Walk, instruction: Instruction) -> None:
    """A constant, made by a pipe that has nothing to do; real arithmetic in halves is not followed."""
    (to,), _ = targets(instruction)
    a, b, *halves = sources(instruction)
    if (a, b) != ("-RZ", "RZ") or len(halves) != 2 or "BF16" in instruction.opcode:
        raise Unknown
    try:
        both = np.array([float(text.replace("INF", "inf")) for text in reversed(halves)], np.float16)
    except ValueError:
        raise Unknown from None
    walk.put(to, walk.constant(int(both.view(np.uint32)[0])))


@executes("MUFU")
def _transcendental(walk: Walk, instruction: Instruction) -> None:
    function = _UNARY.get(instruction.opcode.split(".", 1)[1])
    if function is None:
        raise Unknown
    walk.put_number(instruction.operands[0], function(walk.number(instruction.operands[1]).astype(np.float64)))


@executes("I2F", "I2FP")
def _to_number(walk: Walk, instruction: Instruction) -> None:
    opcode, source = instruction.opcode, instruction.operands[1]
    if "F64" in opcode or "F16" in opcode:
        raise Unknown
    exact: NDArray[Any]
    if "64" in opcode:
        exact = walk.pair(source).view(np.int64) if "S64" in opcode else walk.pair(source)
    else:
        exact = walk.word(source) if "U32" in opcode else walk.word(source).view(np.int32)
    result = exact.astype(np.float32)
    if "RP" in opcode.split("."):  # upwards
        result = np.where(result.astype(np.float64) < exact, np.nextafter(result, np.float32(np.inf)), result)
    walk.put_number(instruction.operands[0], result)


@executes("F2I")
def _to_integer(walk: Walk, instruction: Instruction) -> None:
    parts, to = instruction.opcode.split("."), instruction.operands[0]
    if "F64" in parts:
        raise Unknown
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


@executes("FSETP")
def _compare_numbers(walk: Walk, instruction: Instruction) -> None:
    first, second, a, b, other = instruction.operands[:5]
    x, y = walk.number(a), walk.number(b)
    unordered = np.isnan(x) | np.isnan(y)
    kind = instruction.opcode.split(".")[1]
    if kind in ("NAN", "NUM"):
        result = unordered if kind == "NAN" else ~unordered
    else:
        result = COMPARE[kind[:2]](x, y)
        result = result | unordered if len(kind) == 3 else result & ~unordered
    put_truths(walk, instruction, result, other, first, second)


@executes("FMNMX")
def _extreme_number(walk: Walk, instruction: Instruction) -> None:
    (to,), _ = targets(instruction)
    a, b, least = sources(instruction)
    x, y = walk.number(a), walk.number(b)
    walk.put_number(to, np.where(walk.truth(least), np.fmin(x, y), np.fmax(x, y)))


@executes("FCHK")
def _needs_slow_path(walk: Walk, instruction: Instruction) -> None:
    """Quotients of ordinary numbers don't."""
    walk.put_truth(instruction.operands[0], walk.never)
