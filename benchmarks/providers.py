"""Who is measured: the unfused code eagerly and compiled, and every backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.cases import Case
from benchmarks.operators import Forward, Inputs, Outputs, fused, step, unfused
from diffpp_fast.kernels import dispatch

EAGER, COMPILE = "eager", "compile"
#: The definition of the operators: an oracle, measured only on request.
ORACLE = "reference"
#: Of one function: more than there are dtypes times numbers of threads.
RECOMPILE_LIMIT = 64


@dataclass(frozen=True)
class Provider:
    """A way to compute a case's step."""

    name: str
    forward: Forward
    takes_operator_arguments: bool  # Inputs.fused; else Inputs.unfused
    #: Entered around many steps, so that its cost is nobody's.
    context: Callable[[], AbstractContextManager[object]] = field(default=nullcontext)

    def arguments(self, inputs: Inputs) -> dict[str, Any]:
        return inputs.fused if self.takes_operator_arguments else inputs.unfused

    def step(self, inputs: Inputs) -> Outputs:
        """The outputs, then the gradients."""
        return step(self.forward, self.arguments(inputs), inputs.wrt, inputs.outer)


def eager(case: Case) -> Provider:
    return Provider(EAGER, unfused(case), takes_operator_arguments=False)


def compiled(case: Case) -> Provider:
    """The unfused code under torch.compile, specialised on the shape and without graph breaks."""
    return Provider(COMPILE, torch.compile(unfused(case), dynamic=False, fullgraph=True), False)


def backend(case: Case, name: str) -> Provider:
    """The public operator on backend `name`."""
    return Provider(name, fused(case), True, lambda: dispatch.use_backend(name))


def why_not(case: Case, name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """None if backend `name` serves the case, else the reason."""
    # Noise is made in float32 and then cast.
    return dispatch.why_not(case.op, name, device, torch.float32 if case.op == "philox" else dtype)


def serving(names: Sequence[str], device: torch.device) -> list[str]:
    """Those backends that serve any operator on `device`."""
    return [name for name in names if any(row.backend == name and row.serves for row in dispatch.table(device))]


def draws_as_torch(provider: Provider, device: torch.device) -> bool:
    """Whether the unfused code, run by this provider, draws torch.randn's own numbers from the seed."""
    return provider.name == EAGER or device.type == "cpu"


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


def forget_compiled() -> None:
    """Frees compiled code: each case needs its own, and none of it again."""
    torch._dynamo.reset()
