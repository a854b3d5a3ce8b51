"""Whether an operator is right on a device: every option against float64, and what only a GPU can show.

As a program it judges operators in a process of its own (tests/test_gpu.py), which a kernel may bring down.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import backends, variants
from benchmarks.gate import first_line
from benchmarks.gpu_session import State, Verdict
from benchmarks.variants import Variant
from diffpp_fast.noise import Noise
from diffpp_fast.selftest import CPU, ORACLE, SEED, STREAM, Call, Outputs, compare, step

#: On ||error|| / ||oracle||, per dtype of the large tensors: a few roundings, for samples are small.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}
#: Of float64, where noise is stored; noise that is drawn is made in float32.
EXACT, DRAWN = 1e-11, 1e-6
#: What is added to the sample numbers before a graph is replayed.
LATER = 1000
#: Seconds in which the program goes beyond all pairs of options; combinations of one that only goes through the steps.
SECONDS, FEW = 40.0, 3
#: Sentences about one operator that are kept: a broken kernel is wrong everywhere.
MOST_SENTENCES = 8


class Checks(NamedTuple):
    """The checks beyond one eager call."""

    device: torch.device
    graphs: bool = True
    compiler: str | None = "inductor"
    most: int | None = None  # combinations of options


def judge(op: str, backend: str, checks: Checks, deadline: float) -> Verdict:
    """Check combinations of options: all pairs, and then the others until `time.monotonic()` reaches the deadline."""
    on_device = [dtype for dtype in variants.DTYPES if backends.why_not(op, backend, checks.device, dtype) is None]
    if not on_device:
        reason = backends.why_not(op, backend, checks.device, torch.float32)
        return Verdict(op, backend, 0, 0, 0, [f"it can't serve: {reason}"])
    every, pairs = variants.ordered(op, on_device)
    verdict = Verdict(op, backend, 0, min(pairs, checks.most or pairs), len(every), [])
    with _poisoned(), backends.use(backend):
        for variant in every[: checks.most]:
            if verdict.checked >= pairs and time.monotonic() > deadline:
                break
            graph = checks.graphs and verdict.checked < pairs
            verdict = _note(verdict, variant.name, lambda: failure(variant, checks.device, graph))  # noqa: B023
            verdict = verdict._replace(checked=verdict.checked + 1, graphs=verdict.graphs + graph)
            if verdict.fatal:
                return verdict
        # One for each value of the first option: other functions of the operator.
        for variant in {variant.options[0]: variant for variant in reversed(every)}.values():
            verdict = _note(verdict, "an empty batch", lambda: _empty(variant, checks.device))  # noqa: B023
        if checks.device.type == "cuda" and torch.cuda.device_count() > 1:
            other = torch.device("cuda", 1)
            verdict = _note(verdict, "a device that is not current", lambda: failure(every[0], other, False))
        if checks.compiler is not None:
            for variant in to_compile(every):
                if verdict.fatal:
                    break
                name = f"torch.compile of {variant.name}"
                verdict = _note(
                    verdict,
                    name,
                    lambda: _compiled(variant, checks.device, str(checks.compiler)),  # noqa: B023
                )
                verdict = verdict._replace(compiled=verdict.compiled + 1)
    return verdict


def failure(variant: Variant, device: torch.device, graph: bool) -> str | None:
    """Say what is wrong with a step; None if it is right, the same twice, under autocast and in a captured graph.

    Without `graph` the last two are not checked.
    """
    call = variants.make(variant, device)
    before = _clones(call)
    # Triton's launches are those of a plan from the third time on.
    results = [_detached(call.run()) for _ in range(3)]
    if not _same(before, _clones(call)):
        return "an input was overwritten"
    if not all(_same(results[0], later) for later in results[1:]):
        return "a later call gave other bits than the first"
    wrong = _against_oracle(variant, call, results[0]) or _strides(call, results[0])
    if wrong is not None or not graph:
        return wrong
    return under_autocast(call, results[0]) or _replayed(variant, call, results[0])


def _against_oracle(variant: Variant, call: Call, results: Outputs) -> str | None:
    """Compare with the float64 reference on the CPU."""
    with backends.use(ORACLE):
        oracle = _detached(variants.make(variant, CPU).double().run())
    if len(call.names) != len(oracle):
        return f"{len(results)} results instead of {len(call.names)}"
    tolerance = TOLERANCE.get(variant.dtype, DRAWN if variant.drawn else EXACT)
    return compare(call.names, _on_cpu(results), _on_cpu(oracle), tolerance)


def _strides(call: Call, results: Outputs) -> str | None:
    """Say which gradient does not lie in memory as `torch.empty_like` of its argument does; None if all do."""
    grads = results[len(results) - len(call.wrt) :]
    for name, grad in zip(call.wrt, grads, strict=True):
        expected = torch.empty_like(call.arguments[name]).stride()
        # A stride along one element says nothing.
        if any(ours != like for ours, like, size in zip(grad.stride(), expected, grad.shape, strict=True) if size > 1):
            return f"gradient of {name} has strides {grad.stride()} instead of {expected}"
    return None


def under_autocast(call: Call, eager: Outputs) -> str | None:
    """Say whether autocast around both passes changes a bit or a dtype; None if it does not."""
    with torch.autocast(eager[0].device.type, dtype=torch.bfloat16):
        results = _detached(call.run())
    for ours, plain in zip(results, eager, strict=True):
        if ours.dtype != plain.dtype:
            return f"under autocast a result is {ours.dtype} instead of {plain.dtype}"
    return None if _same(results, eager) else "autocast gave other bits than eager"


def _replayed(variant: Variant, call: Call, eager: Outputs) -> str | None:
    """Say whether a captured graph gives other bits than eager, also when the sample numbers have changed since."""

    def run() -> Outputs:
        return _detached(call.fresh().run())

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    graph.replay()
    if not _same(captured, eager):
        return "the replayed graph gave other bits than eager"
    noise = next((value for value in call.arguments.values() if isinstance(value, Noise)), None)
    if noise is None:
        return None
    noise.samples.add_(LATER)
    graph.replay()
    if not _same(captured, run()):
        return "the graph replayed with changed sample numbers gave other bits than eager"
    changes = variant.op == "philox" or "prediction_type" not in dict(variant.options)
    if (changes or variant["prediction_type"] != "sample") and _same(captured, eager):
        return "the graph replayed with changed sample numbers gave the old noise"
    return None


class Traced(NamedTuple):
    """An operator's function, the same under torch.compile, and two sets of arguments that one graph has to serve."""

    plain: Callable[..., Any]
    compiled: Callable[..., Any]
    counter: Any  # of graphs, in `frame_count`
    call: Call
    arguments: list[dict[str, Any]]

    def steps(self, function: Callable[..., Any]) -> Iterator[Outputs]:
        for named in self.arguments:
            yield _detached(step(function, named, self.call.wrt, self.call.outer))


def traced(variant: Variant, device: torch.device, compiler: str) -> Traced:
    """Nothing is compiled before the first call. The two sets differ in their sample numbers, where noise is drawn."""
    import torch._dynamo.testing

    call = variants.make(variant, device)
    forward, arguments = call.forward, dict(call.arguments)
    name = "self" if variant.op == "philox" else "noise"
    samples = arguments.pop(name).samples if isinstance(arguments.get(name), Noise) else None

    def plain(samples: Tensor | None, **others: Any) -> Any:
        if samples is None:
            return forward(**others)
        noise = Noise(SEED, samples, STREAM)
        return forward(noise, **others) if name == "self" else forward(noise=noise, **others)

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend(compiler)
    compiled = torch.compile(plain, fullgraph=True, backend=counter)
    named = [{**arguments, "samples": None if samples is None else samples + later} for later in (0, LATER)]
    return Traced(plain, compiled, counter, call, named)


def _compiled(variant: Variant, device: torch.device, compiler: str) -> str | None:
    """Say what is wrong; None if one graph without breaks serves two sets of sample numbers and equals eager."""
    each = traced(variant, device, compiler)
    for expected, actual in zip(each.steps(each.plain), each.steps(each.compiled), strict=True):
        tolerance = TOLERANCE.get(variant.dtype, DRAWN)
        wrong = compare(each.call.names, _on_cpu(actual), _on_cpu(expected), tolerance)
        if wrong is not None:
            return wrong
    count = each.counter.frame_count
    return None if count == 1 else f"it took {count} graphs instead of one"


def to_compile(every: Sequence[Variant]) -> Iterator[Variant]:
    """Yield one combination that draws noise and one that does not, in two dtypes, with gradients if there are any."""
    for dtype, drawn in ((torch.float32, True), (torch.bfloat16, False)):
        chosen = [
            variant
            for variant in every
            if variant.dtype == dtype
            and variant.drawn == drawn
            and dict(variant.options).get("gradient", True)
            and dict(variant.options).get("wrt") != "none"
        ]
        yield from chosen[:1]


def _empty(variant: Variant, device: torch.device) -> str | None:
    """Say whether a batch of no samples gives results that are not empty; the one operator that refuses it does not."""
    if variant.op == "denoising_loss":
        return None
    call = variants.make(variant, device)
    whole = {
        name: value
        for name, value in call.arguments.items()
        if name in ("weight", "bias") or (name in ("cos", "sin") and value.dim() == 2)
    }
    arguments = {name: _none_of(value) for name, value in call.arguments.items()} | whole
    outer = None if call.outer is None else call.outer[:0]
    results = replace(call, arguments=arguments, outer=outer).run()
    kept = [whole[name].shape for name in call.wrt if name in whole]
    if any(result.numel() and result.shape not in kept for result in results):
        return "the results are not empty"
    return None


def _none_of(value: Any) -> Any:
    if isinstance(value, Noise):
        return Noise(value.seed, value.samples[:0], value.stream)
    if isinstance(value, Tensor):
        return value.detach()[:0].requires_grad_(value.requires_grad)
    return value


def _note(verdict: Verdict, place: str, check: Callable[[], str | None]) -> Verdict:
    """Return the verdict with what the check finds; an error of the device ends everything after it."""
    try:
        wrong = check()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except Exception as error:  # of any kind: it is reported, and the others go on
        wrong = first_line(error)
        verdict = verdict._replace(fatal="CUDA error" in str(error))
    if wrong is None or len(verdict.wrong) >= MOST_SENTENCES:
        return verdict
    return verdict._replace(wrong=[*verdict.wrong, f"{place}: {wrong}"])


@contextmanager
def _poisoned() -> Iterator[None]:
    """Within the block uninitialised memory is NaN, so that an element that is never written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before)


def _clones(call: Call) -> Outputs:
    tensors = [value.samples if isinstance(value, Noise) else value for value in call.arguments.values()]
    return tuple(value.detach().clone() for value in tensors if isinstance(value, Tensor))


def _detached(results: Outputs) -> Outputs:
    return tuple(result.detach() for result in results)


def _on_cpu(results: Outputs) -> Outputs:
    return tuple(result.to(CPU, torch.float64) for result in results)


def _same(first: Outputs, second: Outputs) -> bool:
    """Bit for bit, as far as numbers go; NaN differs from itself."""
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("backend")
    parser.add_argument("ops", type=lambda text: text.split(","))
    parser.add_argument("state", type=Path, help="where verdicts go")
    parser.add_argument("--rehearse", action="store_true", help="a few combinations on the CPU")
    parser.add_argument("--sanitized", action="store_true", help="a few combinations, for whoever watches the process")
    arguments = parser.parse_args()
    few, plain = arguments.rehearse or arguments.sanitized, arguments.backend == ORACLE
    thorough = not few and not plain
    device = torch.device("cpu" if arguments.rehearse else "cuda")
    checks = Checks(device, thorough, "inductor" if thorough else None, FEW if few else None)
    wrong = False
    for op in arguments.ops:
        verdict = judge(op, arguments.backend, checks, time.monotonic() + (0.0 if plain else SECONDS))
        if not arguments.sanitized:
            State(arguments.state).add(("gate", op, arguments.backend), verdict)
        print(op, arguments.backend, verdict.in_words)
        wrong = wrong or bool(verdict.wrong)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
