"""Passes over memory between a backward pass and the next forward one, by engine: clip, optimizer and average.

`python -m benchmarks updates` prints them. The engines themselves run on the CPU in one process, over one large weight,
and the bytes are counted that each operator reads and writes, in the bytes of the float32 weights: AdamW alone reads
gradient, weight and two moments and writes three of them, 7. What processes send to each other is not among them.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.tables import Table
from diffpp_fast.errors import ConfigurationError
from diffpp_fast.training import config
from diffpp_fast.training.distributed import World
from diffpp_fast.training.engines import DeepSpeedEngine, Engine, PlainEngine

ELEMENTS = 2**16
CLIP = 1e-3  # below the gradient's norm
#: Of ATen: they write their first argument without reading it.
FILLS = ("copy_", "zero_", "fill_")
#: They give a tensor that nobody has written yet.
EMPTY = ("empty", "empty_like", "empty_strided", "new_empty")


class Traffic(TorchDispatchMode):
    """Counts the bytes that operators read and write, as long as it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.read = self.written = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        schema, options = function._schema, options or {}
        name = schema.name.partition("::")[2]
        result = function(*arguments, **options)
        if function.is_view or name in EMPTY or not schema.name.startswith("aten::"):
            return result
        mutated = set()
        for place, declared in enumerate(schema.arguments):
            given = options.get(declared.name, arguments[place] if place < len(arguments) else None)
            tensors = [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]
            writes = declared.alias_info is not None and declared.alias_info.is_write
            # The fused optimizer writes gradients only where it scales them.
            writes = writes and not (declared.name == "grads" and options.get("grad_scale") is None)
            if writes:
                self.written += _bytes(tensors)
                mutated |= {id(tensor) for tensor in tensors}
            if not (writes and name.removeprefix("_foreach_") in FILLS):
                self.read += _bytes(tensors)
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and id(leaf) not in mutated]
        self.written += _bytes(made)
        return result


def _bytes(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class _OneWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(ELEMENTS))

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight * x).sum()


def engines() -> Iterator[tuple[str, Engine]]:
    """Yield engines by what is told of them; DeepSpeed's where it is installed."""
    settings, ema, world = config.Optimizer(lr=1e-3, clip=CLIP), config.EmaSection(decay=0.9), World.alone("cpu")

    def with_network(make: Any, **options: Any) -> Engine:
        network = _OneWeight()
        with contextlib.redirect_stdout(io.StringIO()):
            made: Engine = make(
                "generator", network, dict(network.named_parameters()), settings, 9, world, ema, **options
            )
        return made

    yield "plain, float32 or bfloat16", with_network(PlainEngine)
    try:
        for stage in (1, 2, 3):
            for low in (False, True):
                name = f"DeepSpeed, stage {stage}, {'bfloat16' if low else 'float32'}"
                yield name, with_network(DeepSpeedEngine, zero=config.Zero(stage=stage), bfloat16=low)
    except ConfigurationError:
        return
    finally:
        world.close()


def count(engine: Engine) -> tuple[float, float]:
    """Return passes that read and that write, of an engine's step."""
    for _ in range(2):  # the first makes what is kept
        weight = next(iter(engine.parameters.values()))
        engine.backward(engine.network(torch.ones((), dtype=weight.dtype)).float(), last=True)
        with Traffic() as traffic:
            engine.step()
    passes = 4 * ELEMENTS
    return traffic.read / passes, traffic.written / passes


def table() -> Table:
    rows = [(name, *(f"{passes:.1f}" for passes in count(engine))) for name, engine in engines()]
    return Table([("engine", "read", "written"), *rows], "Passes over the weights between backward and forward:")
