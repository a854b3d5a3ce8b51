"""Whether every Triton kernel compiles for the values of its arguments that Triton makes a case of its own.

An integer that is 1 becomes a constant, one that 16 divides is known to be; tensors that are missing and constants such
as WIDE switch whole branches. The launches come from the public operators, so that a new kernel or argument is met as
it is. Nothing gets further than Triton's first stage, where all of this is decided.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import BoundArguments
from typing import Any

import torch

from benchmarks import variants
from benchmarks.gpu_build import CPU, NamedGpu, launching_by, triton_name
from benchmarks.operators import step

DTYPES = (torch.float32, torch.bfloat16)


def refused(op: str, exhaustive: bool) -> list[str]:
    """The cases of an operator's kernels that do not compile, a sentence each."""
    with lowering(exhaustive) as wrong:
        every, pairs = variants.ordered(op, DTYPES)
        for variant in every[:pairs]:
            inputs = variants.make(variant, CPU)
            step(variants.forward(variant), inputs.fused, inputs.wrt, inputs.outer)
    return wrong


@contextmanager
def lowering(exhaustive: bool) -> Iterator[list[str]]:
    """Within the block, operators on CPU tensors bring the cases of their launches through Triton's first stage.

    The value collects the cases that do not compile, a sentence each.

    Args:
        exhaustive: every combination of constants and missing tensors that launches have, and integers one at a time
            too; else each value of each, and all integers at once.
    """
    wrong: list[str] = []
    seen: set[Any] = set()

    def lower_cases(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        named = {name: options.pop(name) for name in kernel.arg_names if name in options}
        bound = kernel.signature.bind(*arguments, **named)
        switches = _switches(kernel, bound)
        new = {(kernel, tuple(switches))} if exhaustive else {(kernel, switch) for switch in switches}
        if new <= seen:
            return
        seen.update(new)
        for case in cases(kernel, bound, exhaustive):
            try:
                _lower(kernel, [{**bound.arguments, **case}[name] for name in kernel.arg_names], options)
            except Exception as error:  # of any kind: it is reported, and the others go on
                what = ", ".join(f"{name}={value}" for name, value in case.items()) or "a launch as it is"
                wrong.append(f"{triton_name(kernel)} does not compile for {what}: {_innermost(error)}")

    with launching_by(lower_cases, NamedGpu.ANY):
        yield wrong


def cases(kernel: Any, bound: BoundArguments, exhaustive: bool) -> Iterator[dict[str, Any]]:
    """The arguments that other launches of this kernel would have instead."""
    integers = [
        parameter.name
        for parameter in kernel.params
        if not parameter.is_constexpr and type(bound.arguments[parameter.name]) is int
    ]
    yield {}
    yield dict.fromkeys(integers, 1)
    wide = {"WIDE": True} if "WIDE" in bound.arguments else {}
    if wide:
        yield wide
    if exhaustive:
        yield dict.fromkeys(integers, 16)
        yield from ({name: value} for name in integers for value in (1, 16))
        yield from ({**wide, name: 2**33} for name in integers)


def _switches(kernel: Any, bound: BoundArguments) -> list[tuple[str, Any]]:
    """Name what compiled code depends on, but for integers: constants, and whether a tensor is there."""
    return [
        (parameter.name, value if parameter.is_constexpr else value is None)
        for parameter in kernel.params
        for value in [bound.arguments[parameter.name]]
    ]


def _innermost(error: BaseException) -> str:
    """Return the last of Triton's errors, to which each function adds its own place."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line for line in str(error).splitlines() if line.strip(" ^")]
    return f"{type(error).__name__}: {lines[-1].strip() if lines else ''}"


def _lower(kernel: Any, arguments: list[Any], options: dict[str, Any]) -> None:
    """Run Triton's first stage, from Python to its IR, for the case that a launch with these arguments is."""
    from triton._C.libtriton import ir

    _, _, target, backend, binder = kernel.device_caches[NamedGpu.ANY]
    bound, specialization, others = binder(*arguments, **options, debug=False)
    parsed, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialization, others)
    # torch.compile makes a constant of every integer that is 1, also of one that a kernel asks not to specialise.
    for index, (parameter, value) in enumerate(zip(kernel.params, arguments, strict=True)):
        if type(value) is int and value == 1 and not parameter.is_constexpr:
            signature[parameter.name], constants[index,] = "constexpr", 1
    source = kernel.ASTSource(kernel, signature, constants, attributes)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    source.make_ir(target, parsed, backend.get_codegen_implementation(parsed), backend.get_module_map(), context)
