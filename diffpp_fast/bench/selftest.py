"""A backend's operator on small tensors against the float64 reference: what `diffpp-fast doctor` runs."""

from __future__ import annotations

import torch

from diffpp_fast.bench import providers
from diffpp_fast.bench.cases import Case, all_cases
from diffpp_fast.bench.gate import Gate
from diffpp_fast.bench.operators import make_inputs

#: Sides that no vector or block length divides; other operators take `SHAPE`.
SHAPES = {
    "reward_pixels": (1, 3, 37, 53),
    "group_norm_silu": (2, 64, 7, 9),
    "geglu": (2, 5, 46),
    "ada_layer_norm": (2, 5, 23),
}
SHAPE = (2, 4, 13, 17)


def failure(op: str, backend: str, device: torch.device) -> str | None:
    """None if every variant and layout of `op`, forward and gradients, is right in float32, else what is wrong."""
    for case in _cases(op):
        inputs = make_inputs(case, torch.float32, device)
        try:
            wrong = Gate(case, torch.float32, device, inputs).failure(providers.backend(case, backend))
        except Exception as error:  # of any kind: it is reported, and the other backends go on
            wrong = f"{type(error).__name__}: {error}"
        if wrong is not None:
            return f"{case.name}: {wrong}"
    return None


def _cases(op: str) -> set[Case]:
    """The benchmark's variants, layouts and kinds of noise, each once."""
    return {small(case) for case in all_cases() if case.op == op}


def small(case: Case) -> Case:
    """The same case on small tensors."""
    return case._replace(size="small", shape=SHAPES.get(case.op, SHAPE))
