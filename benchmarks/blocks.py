"""`python -m benchmarks blocks`: blocks of diffusers' networks, unfused against fused.

Each block is one of the network's at random weights, all trained. Printed are the seconds of a forward and backward
pass, and the bytes that autograd keeps in between beyond the parameters.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.memory import saved_bytes
from benchmarks.tables import Table, dtype_name, dtypes, markdown
from benchmarks.timing import Contender, clock_of, interleave, intra_op_threads
from diffpp_fast import networks


class BlockCase(NamedTuple):
    """A block and the shapes of its floating-point inputs by position and name."""

    name: str
    make: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]
    named: Mapping[str, tuple[int, ...]] = MappingProxyType({})


def cases() -> list[BlockCase]:
    """At a batch of one: SD1.5 and PixArt at 512 x 512, with their decoder's last block."""
    from diffusers.models.activations import GEGLU
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.resnet import ResnetBlock2D

    def resnet(channels: int, **options: Any) -> Callable[[], nn.Module]:
        return lambda: ResnetBlock2D(in_channels=channels, out_channels=channels, **options)

    def pixart() -> nn.Module:
        options = {"norm_type": "ada_norm_single", "norm_elementwise_affine": False, "norm_eps": 1e-6}
        return BasicTransformerBlock(
            1152, 16, 72, cross_attention_dim=1152, activation_fn="gelu-approximate", attention_bias=True, **options
        )

    context = {"encoder_hidden_states": (1, 120, 1152), "timestep": (1, 6 * 1152)}
    return [
        BlockCase("SD1.5 ResnetBlock2D 320x64x64", resnet(320, temb_channels=1280), ((1, 320, 64, 64), (1, 1280))),
        BlockCase("SD1.5 ResnetBlock2D 1280x16x16", resnet(1280, temb_channels=1280), ((1, 1280, 16, 16), (1, 1280))),
        BlockCase(
            "ResnetBlock2D 320x64x64, scale_shift",
            resnet(320, temb_channels=1280, time_embedding_norm="scale_shift"),
            ((1, 320, 64, 64), (1, 1280)),
        ),
        BlockCase("VAE ResnetBlock2D 128x256x256", resnet(128, temb_channels=None, eps=1e-6), ((1, 128, 256, 256), ())),
        BlockCase("SD1.5 GEGLU 4096x320", lambda: GEGLU(320, 1280), ((1, 4096, 320),)),
        BlockCase("PixArt BasicTransformerBlock 1024x1152", pixart, ((1, 1024, 1152),), context),
    ]


class BlockRow(NamedTuple):
    """The measures of one block, unfused and fused."""

    name: str
    dtype: str
    seconds: tuple[float, float]
    saved: tuple[int, int]


def measure(case: BlockCase, dtype: torch.dtype, device: torch.device, min_time: float) -> BlockRow:
    """One block; raises AssertionError if fusing changes its output by more than rounding."""
    torch.manual_seed(0)
    unfused = case.make().to(device, dtype)
    fused = copy.deepcopy(unfused)
    networks.fuse(fused)

    def tensor(shape: tuple[int, ...]) -> Tensor | None:
        return torch.randn(shape, device=device).to(dtype).requires_grad_() if shape else None

    inputs = [tensor(shape) for shape in case.shapes]
    named = {name: tensor(shape) for name, shape in case.named.items()}
    outputs = [module(*inputs, **named) for module in (unfused, fused)]
    probe = torch.randn_like(outputs[0])
    error = (outputs[0] - outputs[1]).double().norm() / outputs[0].double().norm()
    assert error <= 4.0 * torch.finfo(dtype).eps, f"{case.name}: fusing changes the output by {error:.1e}"
    del outputs

    def step(module: nn.Module) -> object:
        leaves = [value for value in (*inputs, *named.values()) if value is not None]
        wanted = [*leaves, *module.parameters()]
        return torch.autograd.grad(module(*inputs, **named), wanted, probe, allow_unused=True)

    contenders = [Contender("unfused", partial(step, unfused)), Contender("fused", partial(step, fused))]
    timings = interleave(contenders, min_time, clock_of(device))
    seconds = timings["unfused"].median, timings["fused"].median
    saved = [saved_bytes(partial(module, *inputs, **named), module) for module in (unfused, fused)]
    return BlockRow(case.name, dtype_name(dtype), seconds, (saved[0], saved[1]))


def table(rows: Sequence[BlockRow]) -> Table:
    header = ("block", "dtype", "unfused ms", "fused ms", "faster", "kept MB", "fused MB", "kept")
    return Table(
        [
            header,
            *(
                (
                    *(row.name, row.dtype),
                    *(f"{1e3 * seconds:.1f}" for seconds in row.seconds),
                    f"{row.seconds[0] / row.seconds[1]:.2f} x",
                    *(f"{1e-6 * size:.2f}" for size in row.saved),
                    f"{100 * row.saved[1] / row.saved[0]:.0f} %",
                )
                for row in rows
            ),
        ]
    )


def add_arguments(add: Callable[..., Any]) -> None:
    add("--device", choices=["cpu", "cuda"], help="where to measure (cuda if there is one)")
    add("--dtypes", type=dtypes, default=[torch.float32], metavar="NAME,...", help="(float32)")
    add("--threads", type=int, default=torch.get_num_threads(), metavar="N", help="of the CPU (all)")
    add("--min-time", type=float, default=1.0, metavar="SECONDS", help="per block and version (1)")


def run(arguments: argparse.Namespace, device: torch.device) -> int:
    with intra_op_threads(arguments.threads):
        rows = [measure(case, dtype, device, arguments.min_time) for case in cases() for dtype in arguments.dtypes]
    print(markdown(table(rows)), end="")
    return 0
