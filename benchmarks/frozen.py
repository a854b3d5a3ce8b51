"""`python -m benchmarks frozen`: networks that are differentiated by their input alone, frozen and not.

Each is the true network at random weights that require no gradient. Printed are the bytes alive between the forward and
the backward pass by the sample, at full size, and the time of both passes beside eager's, on smaller latents; versions
take turns on one copy of the weights. torch.compile compiles the transformer blocks, each by itself as diffusers'
`compile_repeated_blocks` does; the share that it keeps is measured on the latents that are timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from statistics import median
from time import perf_counter, process_time
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from benchmarks.memory import alive_bytes, kept_bytes
from benchmarks.step_networks import MODELS
from benchmarks.tables import Table, markdown
from benchmarks.timing import intra_op_threads
from diffpp_fast import networks
from diffpp_fast.networks.freezing import RECOMPUTE

#: Sides of the latents of a picture of full size, and the widths of the text.
SIDES = {"sd15": 64, "sdxl": 128, "pixart": 64}
#: The version that torch.compile makes; it can't be counted with fake tensors.
COMPILED = "compile, blocks"
#: Of a gradient beside eager's, as a share of its norm.
TOLERANCE = 1e-5


class FrozenRow(NamedTuple):
    """The measures of one version of one network, beside eager's."""

    network: str
    version: str
    kept: int | None  # bytes; None of compiled ones
    share: float | None  # of eager's
    time: float | None


def build(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A network, and what it is called with beside the sample, at a batch of one."""
    from diffusers import PixArtTransformer2DModel, UNet2DConditionModel

    if name == "pixart":
        network: nn.Module = PixArtTransformer2DModel(
            sample_size=SIDES[name], cross_attention_dim=1152, caption_channels=4096
        )
        extra: dict[str, Any] = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
        text = torch.randn(1, 120, 4096)
    else:
        settings: Mapping[str, Any] = MODELS[name].unet
        network, extra = UNet2DConditionModel(**settings), {}
        text = torch.randn(1, 77, settings["cross_attention_dim"])
        if "addition_embed_type" in settings:
            extra["added_cond_kwargs"] = {"text_embeds": torch.randn(1, 1280), "time_ids": torch.zeros(1, 6)}
    return network.eval().requires_grad_(False), {
        "timestep": torch.tensor([400]),
        "encoder_hidden_states": text,
        "return_dict": False,
        **extra,
    }


def versions() -> dict[str, Callable[[Any], Callable[[], object]]]:
    """How a network becomes each version, and how that is undone."""

    def fused(network: nn.Module) -> Callable[[], object]:
        networks.fuse(network)
        return lambda: networks.unfuse(network)

    def checkpointed(network: Any) -> Callable[[], object]:
        network.enable_gradient_checkpointing()
        network.train()
        return lambda: (network.disable_gradient_checkpointing(), network.eval())

    def frozen(recompute: str) -> Callable[[nn.Module], Callable[[], object]]:
        def freeze(network: nn.Module) -> Callable[[], object]:
            networks.freeze(network, recompute=recompute)
            return lambda: networks.unfreeze(network)

        return freeze

    def compiled(network: Any) -> Callable[[], object]:
        blocks = [part for part in network.modules() if type(part).__name__ == "BasicTransformerBlock"]
        for block in blocks:
            block.compile()

        def undo() -> None:
            for block in blocks:
                block._compiled_call_impl = None

        return undo

    return {
        "eager": lambda network: lambda: None,
        COMPILED: compiled,
        "checkpointing": checkpointed,
        "fuse": fused,
        **{f"freeze, {recompute}": frozen(recompute) for recompute in RECOMPUTE},
    }


@contextmanager
def turned(network: nn.Module, make: Callable[[Any], Callable[[], object]]) -> Iterator[None]:
    undo = make(network)
    try:
        yield
    finally:
        undo()


def count(name: str) -> dict[str, int]:
    """The bytes that every version keeps at full size, with fake tensors."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        network, inputs = build(name)
        x = torch.empty(1, 4, SIDES[name], SIDES[name])
        kept = {}
        for version, make in versions().items():
            if version == COMPILED:
                continue
            with turned(network, make):
                kept[version] = alive_bytes(lambda x: network(x, **inputs)[0], x, network)
        return kept


class Clocked(NamedTuple):
    """Median times of a forward and backward pass of every version, as shares of eager's in the same round."""

    times: Mapping[str, float]
    compiled: float  # the share of eager's bytes that the compiled version keeps


def clock(name: str, side: int, rounds: int, device: torch.device) -> Clocked:
    """Time every version of one network on latents of `side`.

    Raises AssertionError if a version's gradient is not eager's.
    """
    torch.manual_seed(0)
    network, inputs = build(name)
    network.to(device)
    inputs = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in inputs.items()}
    x = torch.randn(1, 4, side, side, device=device, requires_grad=True)
    probe = torch.randn_like(network(x, **inputs)[0])
    now = perf_counter if device.type == "cuda" else process_time
    times: dict[str, list[float]] = {version: [] for version in versions()}
    kept: dict[str, int] = {}
    expected = None
    for number in range(rounds + 1):  # the first warms up
        for version, make in versions().items():
            with turned(network, make):
                begin = now()
                (gradient,) = torch.autograd.grad(network(x, **inputs)[0], x, probe)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                times[version].append(now() - begin)
                if number == 0 and version in ("eager", COMPILED):
                    kept[version] = kept_bytes(lambda x: network(x, **inputs)[0], x, network)
            expected = gradient if expected is None else expected
            error = float((gradient - expected).norm() / expected.norm())
            assert error <= TOLERANCE, f"{name}, {version}: the gradient is off by {error:.1e}"
    eager = times["eager"][1:]
    shares = {
        version: median(own / base for own, base in zip(each[1:], eager, strict=True))
        for version, each in times.items()
    }
    return Clocked(shares, kept[COMPILED] / kept["eager"])


def measure(name: str, side: int | None, rounds: int, device: torch.device) -> list[FrozenRow]:
    """Every version of one network; without a side nothing is computed, bytes are counted."""
    kept = count(name)
    rows = [FrozenRow(name, each, size, size / kept["eager"], None) for each, size in kept.items()]
    if side is None:
        return rows
    clocked = clock(name, side, rounds, device)
    rows.insert(1, FrozenRow(name, COMPILED, None, clocked.compiled, None))
    return [row._replace(time=clocked.times[row.version]) for row in rows]


def table(rows: list[FrozenRow]) -> Table:
    header = ("network", "version", "kept MiB", "kept", "time")
    return Table(
        [
            header,
            *(
                (
                    *(row.network, row.version),
                    "" if row.kept is None else f"{row.kept / 2**20:.0f}",
                    "" if row.share is None else f"{100 * row.share:.0f} %",
                    "" if row.time is None else f"{row.time:.2f} x",
                )
                for row in rows
            ),
        ]
    )


def add_arguments(add: Callable[..., Any]) -> None:
    add("--device", choices=["cpu", "cuda"], help="where to measure (cuda if there is one)")
    add("--models", type=lambda text: text.split(","), default=list(SIDES), help="of sd15, sdxl, pixart")
    add("--side", type=int, metavar="N", help="of the latents that times are measured with; none: bytes alone")
    add("--rounds", type=int, default=5, metavar="N")
    add("--threads", type=int, default=torch.get_num_threads(), metavar="N")


def run(arguments: argparse.Namespace, device: torch.device) -> int:
    with intra_op_threads(arguments.threads):
        rows = [row for name in arguments.models for row in measure(name, arguments.side, arguments.rounds, device)]
    print(markdown(table(rows)), end="")
    return 0
