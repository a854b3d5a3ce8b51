"""Whether an operator is right on a device: every option against float64, and what only a GPU can show."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import variants
from benchmarks.gate import compare
from benchmarks.operators import Inputs, Outputs, step
from benchmarks.providers import ORACLE
from benchmarks.variants import SEED, STREAM, Variant
from diffpp_fast.kernels import dispatch
from diffpp_fast.noise import Noise

CPU = torch.device("cpu")
#: On ||error|| / ||oracle||, per dtype of the large tensors: a few roundings, for samples are small.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}
#: Of float64, where noise is stored; noise that is drawn is made in float32.
EXACT, DRAWN = 1e-11, 1e-6
#: What is added to the sample numbers before a graph is replayed.
LATER = 1000
#: Sentences about one operator that are kept: a broken kernel is wrong everywhere.
MOST_SENTENCES = 8


class Verdict(NamedTuple):
    """What was found about one operator on one backend."""

    op: str
    backend: str
    checked: int  # combinations of options
    wanted: int  # as many hold every pair of options, if no fewer were asked for
    total: int
    wrong: list[str]
    graphs: int = 0  # captured and replayed
    compiled: int = 0  # by torch.compile, in one graph
    fatal: bool = False  # the device can't be used any more, or the process died

    @property
    def summary(self) -> str:
        """In a few words."""
        if self.wrong:
            return "CRASHED" if self.fatal else "WRONG"
        return "right" if self.checked >= self.wanted else "unfinished"


class Checks(NamedTuple):
    """What to check beyond one eager call."""

    device: torch.device
    graphs: bool = True
    compiler: str | None = "inductor"
    most: int | None = None  # combinations of options


def judge(op: str, backend: str, checks: Checks, deadline: float) -> Verdict:
    """Checks combinations of options: all pairs, and then the others until `time.monotonic()` reaches the deadline."""
    on_device = [dtype for dtype in variants.DTYPES if _serves(op, backend, checks.device, dtype)]
    if not on_device:
        reason = dispatch.why_not(op, backend, checks.device, torch.float32)
        return Verdict(op, backend, 0, 0, 0, [f"it can't serve: {reason}"])
    every, pairs = variants.ordered(op, on_device)
    verdict = Verdict(op, backend, 0, min(pairs, checks.most or pairs), len(every), [])
    with _poisoned(), dispatch.use_backend(backend):
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
    """None if a step is right, the same twice, under autocast and in a captured graph, else what is wrong.

    With `graph` the last two are checked, too.
    """
    forward = variants.forward(variant)
    inputs = variants.make(variant, device)
    before = _clones(inputs)
    results = [_detached(step(forward, inputs.fused, inputs.wrt, inputs.outer)) for _ in range(2)]
    if not _same(before, _clones(inputs)):
        return "an input was overwritten"
    if not _same(*results):
        return "the second call gave other bits than the first"
    wrong = _against_oracle(variant, inputs, results[0]) or _strides(inputs, results[0])
    if wrong is not None or not graph:
        return wrong
    return under_autocast(variant, inputs, results[0]) or _replayed(variant, inputs, results[0])


def _against_oracle(variant: Variant, inputs: Inputs, results: Outputs) -> str | None:
    """Compared with the float64 reference on the CPU."""
    exact = variants.make(variant, CPU).double()
    with dispatch.use_backend(ORACLE):
        oracle = _detached(step(variants.forward(variant), exact.fused, exact.wrt, exact.outer))
    names = variants.names(variant, inputs)
    if len(results) != len(oracle) or len(names) != len(oracle):
        return f"{len(results)} results instead of {len(oracle)}"
    tolerance = TOLERANCE.get(variant.dtype, DRAWN if variant.drawn else EXACT)
    return compare(names, _on_cpu(results), _on_cpu(oracle), tolerance)


def _strides(inputs: Inputs, results: Outputs) -> str | None:
    """None if every gradient lies in memory as `torch.empty_like` of its argument does."""
    grads = results[len(results) - len(inputs.wrt) :]
    for name, grad in zip(inputs.wrt, grads, strict=True):
        expected = torch.empty_like(inputs.fused[name]).stride()
        # A stride along one element says nothing.
        if any(ours != like for ours, like, size in zip(grad.stride(), expected, grad.shape, strict=True) if size > 1):
            return f"gradient of {name} has strides {grad.stride()} instead of {expected}"
    return None


def under_autocast(variant: Variant, inputs: Inputs, eager: Outputs) -> str | None:
    """None if autocast around both passes changes neither a bit nor a dtype."""
    with torch.autocast(eager[0].device.type, dtype=torch.bfloat16):
        results = _detached(step(variants.forward(variant), inputs.fused, inputs.wrt, inputs.outer))
    for ours, plain in zip(results, eager, strict=True):
        if ours.dtype != plain.dtype:
            return f"under autocast a result is {ours.dtype} instead of {plain.dtype}"
    return None if _same(results, eager) else "autocast gave other bits than eager"


def _replayed(variant: Variant, inputs: Inputs, eager: Outputs) -> str | None:
    """None if a captured graph gives eager's bits, also when the sample numbers have changed since."""
    forward = variants.forward(variant)

    def run() -> Outputs:
        return _detached(step(forward, inputs.fresh().fused, inputs.wrt, inputs.outer))

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
    noise = next((value for value in inputs.fused.values() if isinstance(value, Noise)), None)
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
    """An operator's call, the same under torch.compile, and two sets of arguments that one graph has to serve."""

    call: Callable[..., Any]
    compiled: Callable[..., Any]
    counter: Any  # of graphs, in `frame_count`
    inputs: Inputs
    arguments: list[dict[str, Any]]


def traced(variant: Variant, device: torch.device, compiler: str) -> Traced:
    """Nothing is compiled before the first call. The two sets differ in their sample numbers, where noise is drawn."""
    import torch._dynamo.testing

    forward, inputs = variants.forward(variant), variants.make(variant, device)
    name = "self" if variant.op == "philox" else "noise"
    drawn = isinstance(inputs.fused.get(name), Noise)
    arguments = dict(inputs.fused)
    samples = arguments.pop(name).samples if drawn else None

    def call(samples: Tensor | None, **others: Any) -> Any:
        if samples is None:
            return forward(**others)
        noise = Noise(SEED, samples, STREAM)
        return forward(noise, **others) if name == "self" else forward(noise=noise, **others)

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend(compiler)
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    named = [{**arguments, "samples": None if samples is None else samples + later} for later in (0, LATER)]
    return Traced(call, compiled, counter, inputs, named)


def _compiled(variant: Variant, device: torch.device, compiler: str) -> str | None:
    """None if one graph without breaks serves two sets of sample numbers and equals eager, else what is wrong."""
    call, compiled, counter, inputs, arguments = traced(variant, device, compiler)
    for named in arguments:
        expected, actual = (_detached(step(each, named, inputs.wrt, inputs.outer)) for each in (call, compiled))
        tolerance = TOLERANCE.get(variant.dtype, DRAWN)
        wrong = compare(variants.names(variant, inputs), _on_cpu(actual), _on_cpu(expected), tolerance)
        if wrong is not None:
            return wrong
    return None if counter.frame_count == 1 else f"it took {counter.frame_count} graphs instead of one"


def to_compile(every: Sequence[Variant]) -> Iterator[Variant]:
    """One combination that draws noise and one that does not, in two dtypes, with gradients where there are any."""
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
    """None if a batch of no samples gives empty results; the one operator that refuses it has no such number."""
    if variant.op == "denoising_loss":
        return None
    inputs = variants.make(variant, device)
    arguments = {name: _none_of(value) for name, value in inputs.fused.items()}
    for name in ("weight", "bias"):
        if name in arguments:
            arguments[name] = inputs.fused[name]
    outer = None if inputs.outer is None else inputs.outer[:0]
    results = step(variants.forward(variant), arguments, inputs.wrt, outer)
    kept = [inputs.fused[name].shape for name in inputs.wrt if name in ("weight", "bias")]
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
    """The verdict with what the check finds; an error of the device ends everything after it."""
    try:
        wrong = check()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except Exception as error:  # of any kind: it is reported, and the others go on
        wrong = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        verdict = verdict._replace(fatal="CUDA error" in str(error))
    if wrong is None or len(verdict.wrong) >= MOST_SENTENCES:
        return verdict
    return verdict._replace(wrong=[*verdict.wrong, f"{place}: {wrong}"])


def _serves(op: str, backend: str, device: torch.device, dtype: torch.dtype) -> bool:
    # Noise is made in float32 and then cast.
    return dispatch.why_not(op, backend, device, torch.float32 if op == "philox" else dtype) is None


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


def _clones(inputs: Inputs) -> Outputs:
    tensors = [value.samples if isinstance(value, Noise) else value for value in inputs.fused.values()]
    return tuple(value.detach().clone() for value in tensors if isinstance(value, Tensor))


def _detached(results: Outputs) -> Outputs:
    return tuple(result.detach() for result in results)


def _on_cpu(results: Outputs) -> Outputs:
    return tuple(result.to(CPU, torch.float64) for result in results)


def _same(first: Outputs, second: Outputs) -> bool:
    """Bit for bit, as far as numbers go; NaN differs from itself."""
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
