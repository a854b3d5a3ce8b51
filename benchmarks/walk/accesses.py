"""Instructions that load and store."""

from __future__ import annotations

import numpy as np

from benchmarks.machine_code import Instruction
from benchmarks.walk.interpreter import Walk, executes
from benchmarks.walk.operands import after, place_of, targets, words_written
from benchmarks.walk.threads import Unknown


@executes("LDG", "LD")
def _load(walk: Walk, instruction: Instruction) -> None:
    (to,), _ = targets(instruction)
    addresses = walk.move(instruction, "read", place_of(instruction))
    count = words_written(instruction)
    words = None if addresses is None else walk.memory.read(addresses, count, instruction.bits)
    if words is None:
        raise Unknown
    for number, word in enumerate(words):
        walk.put(after(to, number), word)


@executes("STS")
def _store_shared(walk: Walk, instruction: Instruction) -> None:
    at, active = walk.shared_at(instruction)
    for number in range(max(1, instruction.bits // 32)):
        walk.known = True
        try:
            if instruction.bits < 32:
                raise Unknown
            value, known = walk.word(instruction.operands[1], number), walk.known
        except Unknown:
            value, known = walk.zero, False
        if known is not False or walk.shared_used:
            walk.shared_used = True
            walk.shared[at[active] + number] = value[active]
            walk.shared_known[at[active] + number] = known[active] if isinstance(known, np.ndarray) else known


@executes("LDS")
def _load_shared(walk: Walk, instruction: Instruction) -> None:
    if not walk.shared_used or instruction.bits < 32:
        raise Unknown
    (to,), _ = targets(instruction)
    at, active = walk.shared_at(instruction)
    for number in range(words_written(instruction)):
        known = walk.shared_known[at + number] | ~active
        if not known[active].any():
            walk.forget(after(to, number))
            continue
        walk.known = True if known.all() else known
        walk.put(after(to, number), walk.shared[at + number])


@executes("LDGSTS")
def _load_to_shared(walk: Walk, instruction: Instruction) -> None:
    walk.move(instruction, "read", place_of(instruction))


@executes("STG", "ST")
def _store(walk: Walk, instruction: Instruction) -> None:
    walk.move(instruction, "written", place_of(instruction))


@executes("RED", "REDG", "ATOM", "ATOMG")
def _atomic(walk: Walk, instruction: Instruction) -> None:
    walk.move(instruction, "written", place_of(instruction))
    raise Unknown
