"""Compares the launches that plans repeat with those that Triton makes, without a GPU: prints what differs.

A process of its own, in which Triton is a compiler and not the interpreter. Nothing is compiled or launched: what
stands for a compiled kernel is named by all that Triton specialises it on, and writes down its arguments.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from triton.runtime import JITFunction, driver

from benchmarks import backends, variants
from benchmarks.gpu_build import CPU, NamedGpu
from diffpp_fast import Noise, ops
from diffpp_fast.ops.triton import device

Launch = tuple[Any, ...]
launches: list[Launch] = []
entered: list[str] = []


class Gpu(NamedGpu):
    def get_current_device(self) -> int:
        return -1


def compiled(kernel: Any, key: str, *rest: Any) -> Any:
    """A compiled kernel as Triton keeps it, which tells what it is launched with."""

    def run(*arguments: Any) -> None:
        *head, function, _packed, _metadata, _enter, _exit = arguments[:9]
        launches.append((function, *head, *map(shown, arguments[9:])))

    found = SimpleNamespace(run=run, function=key, packed_metadata=(), launch_metadata=lambda *arguments: None)
    kernel.device_caches[-1][0][key] = found
    return found


def shown(value: Any) -> Any:
    """A tensor by what a kernel sees of it, but for where the allocator put it."""
    if not isinstance(value, torch.Tensor):
        return type(value), value
    return value.dtype, value.shape, value.stride(), value.data_ptr() % 16, given.get(value.data_ptr())


@contextmanager
def counted() -> Iterator[None]:
    run = JITFunction.run

    def counting(kernel: Any, *arguments: Any, **options: Any) -> Any:
        entered.append(kernel.__name__)
        return run(kernel, *arguments, **options)

    with mock.patch.object(JITFunction, "run", counting):
        yield


def made(call: Any, planned: bool) -> list[Launch]:
    """The launches of a call."""
    launches.clear()
    with mock.patch.object(device, "everywhere", planned), counted():
        entered.clear()
        call()
    return list(launches)


#: The arguments' numbers by address.
given: dict[int, int] = {}


def check(name: str, call: Any, tensors: Any) -> None:
    """Print a sentence where a call's third launch differs from the one without plans."""
    given.clear()
    given.update((value.data_ptr(), i) for i, value in enumerate(tensors) if isinstance(value, torch.Tensor))
    expected = made(call, planned=False)
    for _ in range(2):
        if made(call, planned=True) != expected:
            print(f"{name}: the launches on the way to a plan differ")
    if made(call, planned=True) != expected:
        print(f"{name}: the plan's launches differ")
    if entered:
        print(f"{name}: Triton was asked again for {', '.join(entered)}")


def alternations() -> Iterator[tuple[str, Any, list[torch.Tensor]]]:
    """Calls of one operator whose arguments differ in one thing that Triton, or host code, looks at."""
    alpha = torch.rand(4)
    base = torch.randn(4, 4, 8, 8)
    misaligned = torch.randn(base.numel() + 1)[1:].view(base.shape)
    for name, x, noise, a in (
        ("aligned", base, base, alpha),
        ("misaligned", misaligned, base, alpha),
        ("noise misaligned", base, misaligned, alpha),
        ("two tensors", base, base.clone(), alpha),
        ("expanded coefficients", base, base, alpha[:1].expand(4)),
        ("a stride of 16", base, base, torch.rand(64)[::16]),
        ("channels_last", base.contiguous(memory_format=torch.channels_last), base, alpha),
        ("a sample of one element", base[:, :1, :1, :1], base[:, :1, :1, :1].clone(), alpha),
        ("another shape", base[:, :, :3], base[:, :, :3], alpha),
        ("bfloat16", base.bfloat16(), base.bfloat16(), alpha),
        ("transposed", base.transpose(2, 3), base, alpha),
    ):
        yield f"add_noise, {name}", partial(ops.add_noise, x, a, alpha, noise), [x, noise, a, alpha]

    samples = torch.arange(4)
    for seed in (0, 1, 5, 2**31 - 1, 2**31, 2**40, 2**63):
        for stream in (0, 1, 2**31):
            drawn = Noise(seed, samples, stream)
            yield f"add_noise, {drawn}", partial(ops.add_noise, base, alpha, alpha, drawn), [base, alpha, samples]
    for groups, eps, activation in ((8, 1e-5, "silu"), (16, 1e-5, "silu"), (16, 1.0, "silu"), (16, 1.0, "identity")):
        x = torch.randn(1, 16, 7, 7)
        norm = partial(ops.group_norm_silu, x, groups, eps=eps, activation=activation)
        yield f"group_norm_silu, {groups}, {eps}, {activation}", norm, [x]


def main() -> None:
    driver.set_active(Gpu(90))
    with (
        mock.patch.object(torch.cuda, "current_device", lambda: -1),
        mock.patch.object(JITFunction, "_do_compile", compiled),
        backends.triton_on_cpu_tensors(),
    ):
        cases = list(alternations())
        for name, call, tensors in (*cases, *reversed(cases)):
            check(name, call, tensors)
        for op in sys.argv[1:] or backends.OPS:
            every, pairs = variants.ordered(op, (torch.float32, torch.bfloat16))
            for variant in every[:pairs]:
                call = variants.make(variant, CPU)
                check(str(variant), call.run, call.arguments.values())


if __name__ == "__main__":
    main()
