"""Correctness before speed: every output and gradient of a provider against the float64 reference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.operators import Inputs, Outputs, fused, result_names, step
from benchmarks.providers import ORACLE, Provider, draws_as_torch
from diffpp_fast.kernels import dispatch

#: On ||error|| / ||oracle||, per dtype of the large tensors: some ten roundings.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}
#: A single element may be off by this many tolerances, of itself and of the root mean square.
ELEMENT = 4.0
#: The standard errors by which the moments of drawn noise may be off.
STANDARD_ERRORS = 6.0
SEED = 1


class Gate:
    """Judges the providers of one case, dtype and device on one set of inputs."""

    def __init__(self, case: Case, dtype: torch.dtype, device: torch.device, inputs: Inputs) -> None:
        self._case, self._device, self._inputs = case, device, inputs
        self._tolerance = TOLERANCE[dtype]
        self._oracles: dict[bool, Outputs] = {}

    def failure(self, provider: Provider) -> str | None:
        """None if the provider is right, else what is wrong."""
        with torch.random.fork_rng([self._device] if self._device.type == "cuda" else []):
            torch.manual_seed(SEED)
            with provider.context():
                actual = provider.step(self._inputs)
            names, expected = result_names(self._case), self._oracle(provider.takes_operator_arguments)
        if len(actual) != len(expected):
            return f"{len(actual)} results instead of {len(expected)}"
        if self._draws_unknown(provider):
            return standard_normal(self._drawn(actual[0])) or compare(
                names[1:], actual[1:], expected[1:], self._tolerance
            )
        return compare(names, actual, expected, self._tolerance)

    def _oracle(self, takes_operator_arguments: bool) -> Outputs:
        """The reference's float64 step on the same inputs, with the noise that the provider takes or draws."""
        if takes_operator_arguments not in self._oracles:
            inputs = self._inputs.double()
            arguments = inputs.fused
            if not takes_operator_arguments and self._case.noise == "drawn" and self._case.op != "philox":
                arguments = {**arguments, "noise": self._noise_of_unfused(inputs)}
            with dispatch.use_backend(ORACLE):
                results = step(fused(self._case), arguments, inputs.wrt, inputs.outer)
            self._oracles[takes_operator_arguments] = tuple(result.detach() for result in results)
        return self._oracles[takes_operator_arguments]

    def _noise_of_unfused(self, inputs: Inputs) -> Tensor:
        """Float64: the stored tensor, or what the unfused code draws first after the seed."""
        if self._case.op != "add_noise":
            stored: Tensor = inputs.unfused["eps"]
            return stored
        torch.manual_seed(SEED)
        return torch.randn_like(self._inputs.unfused["x0"]).double()

    def _draws_unknown(self, provider: Provider) -> bool:
        """Whether the provider draws numbers that the oracle can't draw again; their distribution is then checked."""
        if provider.takes_operator_arguments or self._case.noise != "drawn":
            return False
        return self._case.op == "philox" or (
            self._case.op == "add_noise" and not draws_as_torch(provider, self._device)
        )

    def _drawn(self, output: Tensor) -> Tensor:
        """The noise in the output, float64."""
        output = output.detach().double()
        if self._case.op == "philox":
            return output
        arguments: dict[str, Any] = self._inputs.double().unfused
        alpha, sigma = (arguments[name].reshape(-1, *[1] * (output.dim() - 1)) for name in ("alpha", "sigma"))
        return (output - alpha * arguments["x0"].detach()) / sigma


def compare(names: Sequence[str], actual: Outputs, oracle: Outputs, tolerance: float) -> str | None:
    """None if every result is within the tolerance of the oracle, as a whole and element by element."""
    for name, result, expected in zip(names, actual, oracle, strict=True):
        if result.shape != expected.shape:
            return f"{name} has shape {list(result.shape)} instead of {list(expected.shape)}"
        error = (result.detach().double() - expected).abs()
        if not torch.isfinite(error).all():
            return f"{name} is not finite"
        if not error.any():
            continue  # what is all zeros, or empty, has no relative error
        relative = float(error.norm() / expected.norm())
        if not relative <= tolerance:
            return f"{name} has a relative error of {relative:.1e}, allowed {tolerance:.0e}"
        root_mean_square = expected.square().mean().sqrt()
        element = float((error / (expected.abs() + root_mean_square)).max())
        if not element <= ELEMENT * tolerance:
            return f"{name} has an element with an error of {element:.1e}, allowed {ELEMENT * tolerance:.0e}"
    return None


def standard_normal(values: Tensor) -> str | None:
    """None if the mean and the variance of the values are those of standard normals."""
    count = values.numel()
    mean, variance = float(values.mean()), float(values.var())
    if not abs(mean) <= STANDARD_ERRORS / math.sqrt(count):
        return f"the drawn noise has mean {mean:.4f}"
    if not abs(variance - 1.0) <= STANDARD_ERRORS * math.sqrt(2.0 / count):
        return f"the drawn noise has variance {variance:.4f}"
    return None
