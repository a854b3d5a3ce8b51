"""`python -m benchmarks quantized`: what a reference in few bits costs in the gap, against a float64 oracle.

The reference is a true network at random weights; the teaching assistant (TA) is the same with every weight moved at
random. The gap d = guided reference - TA is computed in float64, and then with the reference as a run in bfloat16
computes it: whole, and quantised. The TA stays in float64, so that the error is the reference's alone.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.frozen import build
from benchmarks.step_networks import MODELS
from benchmarks.tables import Table, markdown, write_csv
from benchmarks.timing import intra_op_threads, provenance
from diffpp_fast import networks
from diffpp_fast.networks import Denoiser
from diffpp_fast.networks.quantization import KINDS, quantized_size
from diffpp_fast.terminal import complain, say
from diffpp_fast.user_paths import user_path

NETWORKS = ("small", "sd15", "pixart")
#: Side of the latents; the times; and the guidance scales that gaps are computed with.
SIDE, TIMES, GUIDANCE = 16, (50, 400, 800), (1.0, 4.5)
#: How far each weight of the TA is from the reference's, as a share of the tensor's root mean square.
DISTANCE = 0.03
#: The reference that is not quantised.
WHOLE = "bfloat16"


class QuantizedRow(NamedTuple):
    """The measures of one version of a reference; errors and gaps by guidance scale."""

    network: str
    version: str
    weights: int  # bytes
    gap: tuple[float, ...]  # the norm of d as a share of that of the reference's output
    error: tuple[float, ...]  # of d as a share of its norm


def measure(name: str) -> list[QuantizedRow]:
    """Every version of one network."""
    torch.manual_seed(0)
    network, inputs = _network(name)
    text = torch.cat([inputs["encoder_hidden_states"], torch.randn_like(inputs["encoder_hidden_states"])])
    inputs = {**inputs, "encoder_hidden_states": text}
    x = torch.randn(1, 4, SIDE, SIDE)
    versions = {WHOLE: _low(network)} | {kind: _low(network, kind) for kind in KINDS}
    found = {version: _outputs(each, x, inputs, torch.bfloat16) for version, (each, _) in versions.items()}
    sizes = {version: size for version, (_, size) in versions.items()}
    del versions
    network.double()
    exact = _outputs(network, x, inputs, torch.float64)
    _move(network)
    fake = _outputs(network, x, inputs, torch.float64)[0]
    gaps = [_guided(exact, scale) - fake for scale in GUIDANCE]
    size = exact[0].norm()
    return [
        QuantizedRow(
            name,
            version,
            sizes[version],
            tuple(float(gap.norm() / size) for gap in gaps),
            tuple(
                float((_guided(each, scale) - fake - gap).norm() / gap.norm())
                for scale, gap in zip(GUIDANCE, gaps, strict=True)
            ),
        )
        for version, each in found.items()
    ]


def _network(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A network in float32, and what it is called with beside the sample and the time."""
    if name != "small":
        network, inputs = build(name)
        return network, {key: value for key, value in inputs.items() if key not in ("timestep", "return_dict")}
    from diffusers import UNet2DConditionModel

    settings: Mapping[str, Any] = MODELS[name].unet
    small: nn.Module = UNet2DConditionModel(**settings)
    return small.eval().requires_grad_(False), {
        "encoder_hidden_states": torch.randn(1, 77, settings["cross_attention_dim"])
    }


def _low(network: nn.Module, kind: str | None = None) -> tuple[nn.Module, int]:
    """A copy as a run in bfloat16 has it, and the bytes of its weights."""
    low = nn.Module.to(copy.deepcopy(network), torch.bfloat16)
    count = sum(weight.numel() for weight in low.parameters())
    stored, elements = (0, 0) if kind is None else quantized_size(low, kind)
    if kind is not None:
        networks.quantize(low, kind)
    return low, 2 * (count - elements) + stored


def _outputs(network: nn.Module, x: Tensor, inputs: Mapping[str, Any], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The predictions at all times, with prompt and without."""
    denoise = Denoiser(network, dtype=dtype if dtype == torch.bfloat16 else None)
    found = []
    with torch.no_grad():
        for text in inputs["encoder_hidden_states"].to(dtype).split(1):
            given = {**inputs, "encoder_hidden_states": text}
            found.append(torch.cat([denoise(x.to(dtype), torch.tensor([t]), given) for t in TIMES]).double())
    return found[0], found[1]


def _move(network: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for weight in network.parameters():
        noise = torch.randn(weight.shape, generator=generator)
        weight.add_(noise.to(weight.dtype) * (DISTANCE * weight.square().mean().sqrt()))


def _guided(outputs: tuple[Tensor, Tensor], scale: float) -> Tensor:
    cond, uncond = outputs
    return uncond + scale * (cond - uncond)


def table(rows: list[QuantizedRow]) -> Table:
    """The rows as they are printed."""
    header = ("network", "reference", "weights MB", *(f"error of d, w = {scale:g}" for scale in GUIDANCE))
    return Table(
        [
            header,
            *(
                (row.network, row.version, f"{row.weights / 1e6:.0f}", *(f"{100 * each:.1f} %" for each in row.error))
                for row in rows
            ),
        ]
    )


def add_arguments(add: Callable[..., Any]) -> None:
    add("--models", type=lambda text: text.split(","), default=list(NETWORKS), help=f"of {', '.join(NETWORKS)}")
    add("--threads", type=int, default=torch.get_num_threads(), metavar="N")
    add("--out", type=user_path, metavar="FILE.csv", help="also write a table with all digits")


def run(arguments: argparse.Namespace, device: torch.device) -> int:
    rows: list[QuantizedRow] = []
    with intra_op_threads(arguments.threads):
        for name in arguments.models:
            rows += measure(name)
            complain(f"{name}: measured")
    say(markdown(table(rows)))
    if arguments.out is not None:
        _write(arguments.out, rows)
    return 0


def _write(path: Path, rows: list[QuantizedRow]) -> None:
    scales = [f"{scale:g}" for scale in GUIDANCE]
    columns = ["network", "reference", "weights_bytes"]
    columns += [f"gap_w{scale}" for scale in scales] + [f"error_w{scale}" for scale in scales]
    figures = [[*row[:3], *(f"{each:.6g}" for each in (*row.gap, *row.error))] for row in rows]
    found = [dict(zip(columns, each, strict=True)) for each in figures]
    write_csv(path, found, columns, provenance(torch.device("cpu")))
