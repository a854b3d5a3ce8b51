"""Correctness before speed: every output and gradient of a provider against the float64 reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks import backends
from benchmarks.cases import Case, Inputs, unfused
from diffpp_fast.selftest import ORACLE, Outputs, compare, step

EAGER, COMPILE = "eager", "compile"
#: Recompilations of one function: more than there are dtypes times numbers of threads.
RECOMPILE_LIMIT = 64
#: On ||error|| / ||oracle||, per dtype of the large tensors: some ten roundings.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}
#: The standard errors by which the moments of drawn noise may be off.
STANDARD_ERRORS = 6.0
SEED = 1


@dataclass(frozen=True)
class Provider:
    """A way to compute a case's step."""

    name: str
    forward: Callable[..., Any]
    takes_operator_arguments: bool  # those of `Inputs.call`; else `Inputs.unfused`
    #: Entered around many steps, so that its cost is nobody's.
    context: Callable[[], AbstractContextManager[object]] = field(default=nullcontext)

    def step(self, inputs: Inputs) -> Outputs:
        """Return the outputs, then the gradients."""
        if not self.takes_operator_arguments:
            return inputs.step_unfused(self.forward)
        return step(self.forward, inputs.call.arguments, inputs.call.wrt, inputs.call.outer)


def eager(case: Case) -> Provider:
    return Provider(EAGER, unfused(case), takes_operator_arguments=False)


def compiled(case: Case) -> Provider:
    """Return the unfused code under torch.compile, specialised on the shape and without graph breaks."""
    return Provider(COMPILE, torch.compile(unfused(case), dynamic=False, fullgraph=True), False)


def backend(case: Case, inputs: Inputs, name: str) -> Provider:
    """Return the public operator on backend `name`."""
    return Provider(name, inputs.call.forward, True, lambda: backends.use(name))


def first_line(error: Exception) -> str:
    """Return the error's type and the first line of what it says, for a table."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


@contextmanager
def compiler(device: torch.device, threads: int) -> Iterator[None]:
    """torch.compile in its best form, and as it was before on the way out."""
    import torch._dynamo.config
    import torch._inductor.config

    best: dict[str, Any] = {"cpp.threads": threads}
    if device.type == "cpu":
        # Inductor's own generator is many times slower on the CPU than the call of torch's that this leaves in.
        best["fallback_random"] = True
    with torch._inductor.config.patch(best), torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
        yield


class Gate:
    """Judges the providers of one case, dtype and device on one set of inputs."""

    def __init__(self, case: Case, dtype: torch.dtype, device: torch.device, inputs: Inputs) -> None:
        self._case, self._device, self._inputs = case, device, inputs
        self._tolerance = TOLERANCE[dtype]
        self._oracles: dict[bool, Outputs] = {}

    def failure(self, provider: Provider) -> str | None:
        """Say what is wrong with the provider; None if it is right."""
        with torch.random.fork_rng([self._device] if self._device.type == "cuda" else []):
            torch.manual_seed(SEED)
            with provider.context():
                actual = provider.step(self._inputs)
            names, expected = self._inputs.call.names, self._oracle(provider.takes_operator_arguments)
        if not self._draws_unknown(provider) or len(actual) != len(expected):
            return compare(names, actual, expected, self._tolerance)
        noise = standard_normal(self._drawn(actual[0]))
        return noise or compare(names[1:], actual[1:], expected[1:], self._tolerance)

    def _oracle(self, takes_operator_arguments: bool) -> Outputs:
        """Return the reference's float64 step on the same inputs, with the noise that the provider takes or draws."""
        if takes_operator_arguments not in self._oracles:
            call = self._inputs.call.double()
            arguments = call.arguments
            if not takes_operator_arguments and self._case.noise == "drawn" and self._case.op != "philox":
                arguments = {**arguments, "noise": self._noise_of_unfused()}
            with backends.use(ORACLE):
                results = step(call.forward, arguments, call.wrt, call.outer)
            self._oracles[takes_operator_arguments] = tuple(result.detach() for result in results)
        return self._oracles[takes_operator_arguments]

    def _noise_of_unfused(self) -> Tensor:
        """Return, in float64, the stored tensor, or what the unfused code draws first after the seed."""
        if self._case.op == "add_noise":
            torch.manual_seed(SEED)
            return torch.randn_like(self._inputs.unfused["x0"]).double()
        stored: Tensor = self._inputs.unfused["eps"].double()
        return stored

    def _draws_unknown(self, provider: Provider) -> bool:
        """Whether the provider draws numbers that the oracle can't draw again; their distribution is then checked."""
        if provider.takes_operator_arguments or self._case.noise != "drawn":
            return False
        as_torch = provider.name == EAGER or self._device.type == "cpu"
        return self._case.op == "philox" or (self._case.op == "add_noise" and not as_torch)

    def _drawn(self, output: Tensor) -> Tensor:
        """Return the noise in the output, float64."""
        output = output.detach().double()
        if self._case.op == "philox":
            return output
        alpha, sigma, x0 = (self._inputs.unfused[name].detach().double() for name in ("alpha", "sigma", "x0"))
        alpha, sigma = (values.reshape(-1, *[1] * (output.dim() - 1)) for values in (alpha, sigma))
        return (output - alpha * x0) / sigma


def standard_normal(values: Tensor) -> str | None:
    """Say whether the mean or the variance of the values is not that of standard normals; None if both are."""
    count = values.numel()
    mean, variance = float(values.mean()), float(values.var())
    if not abs(mean) <= STANDARD_ERRORS / math.sqrt(count):
        return f"the drawn noise has mean {mean:.4f}"
    if not abs(variance - 1.0) <= STANDARD_ERRORS * math.sqrt(2.0 / count):
        return f"the drawn noise has variance {variance:.4f}"
    return None
