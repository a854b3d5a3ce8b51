"""`python -m benchmarks decoder`: memory of the decoder's options, counted at any size, measured at small ones.

Counted are bytes and operations of one image's decode and its backward pass on tensors without numbers, alone and with
the reward model ViT-H/14 behind it. With --pixels both are measured at such a size on the CPU: the time beside that of
whole tensors, and the errors. Networks have their true architecture and random weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.memory import peak_temporary_bytes
from benchmarks.reward import MODELS, ROWS, _autoencoder, default_dtype
from benchmarks.tables import Place, Table, dtype_name, text
from benchmarks.timing import intra_op_threads, provenance
from diffpp_fast.networks import FrozenDecoder
from diffpp_fast.terminal import say
from diffpp_fast.training.planning.architectures import Scorer, Towers
from diffpp_fast.training.planning.counting import GpuKernels, Ledger
from diffpp_fast.user_paths import user_path

Decode = Callable[[Tensor], Tensor]
COLUMNS = (
    *("pixels", "dtype", "option", "reward", "weights_bytes", "kept_bytes", "peak_bytes", "operations"),
    *("measured_peak_bytes", "x_whole", "image_error", "gradient_error"),
)
#: The one that others are compared with.
WHOLE = "whole"


class Count(NamedTuple):
    """Bytes that are alive behind the forward pass and at the peak, beyond weights, and operations of both passes."""

    kept: int
    peak: int
    operations: int


def options(rows: int) -> dict[str, Callable[[Any], Decode]]:
    """Return the ways to decode, by name."""
    return {
        "eager": lambda vae: lambda latents: vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0],
        WHOLE: FrozenDecoder,
        "checkpoint": lambda vae: FrozenDecoder(vae, checkpoint=True),
        f"rows={rows}": lambda vae: FrozenDecoder(vae, rows=rows),
        f"rows={rows}, checkpoint": lambda vae: FrozenDecoder(vae, checkpoint=True, rows=rows),
    }


def count(decode: Decode, latents: Tensor, score: Decode | None = None) -> Count:
    """Count a decode with its backward pass, of rewards if `score` gives any; all of it on meta."""
    ledger = Ledger()
    with GpuKernels().active(), ledger:
        latents = torch.empty_like(latents).requires_grad_()
        before = sum(ledger.alive.values())
        result = decode(latents)
        result = result if score is None else score(result)
        kept = sum(ledger.alive.values()) - before
        torch.autograd.grad(result, latents, torch.ones_like(result))
    return Count(kept, ledger.peak, sum(ledger.operations.values()))


def counted(model: str, pixels: int, dtype: torch.dtype, rows: int) -> list[dict[str, Any]]:
    """Return a row for every option, without and with a reward."""
    with torch.device("meta"), default_dtype(dtype):
        vae, latents = _autoencoder(MODELS[model]), torch.empty(1, 4, pixels // 8, pixels // 8)
    tower = Scorer(Towers(names=("hpsv2.1",), checkpoint=True))
    found = []
    for reward, score in ((None, None), ("ViT-H/14", tower)):
        weights = _bytes(vae) + (0 if score is None else _bytes(score))
        for name, make in options(rows).items():
            counts = count(make(vae), latents, score)
            found.append(
                {
                    **{"pixels": pixels, "dtype": dtype_name(dtype), "option": name, "reward": reward or ""},
                    **{"weights_bytes": weights, "kept_bytes": counts.kept, "peak_bytes": counts.peak},
                    "operations": counts.operations,
                }
            )
    return found


def measured(model: str, pixels: int, dtype: torch.dtype, rows: int, rounds: int) -> list[dict[str, Any]]:
    """Return for every option the peak, the median time beside that of whole tensors, and the errors beside them."""
    torch.manual_seed(0)
    with default_dtype(dtype):
        vae, latents = _autoencoder(MODELS[model]), torch.randn(1, 4, pixels // 8, pixels // 8)
    decoders = {name: make(vae) for name, make in options(rows).items()}
    times: dict[str, list[float]] = {name: [] for name in decoders}
    results: dict[str, tuple[Tensor, Tensor]] = {}
    for _ in range(rounds + 1):  # the first warms up
        for name, decode in decoders.items():
            begin = process_time()
            results[name] = _pass(decode, latents)
            times[name].append(process_time() - begin)
    found = []
    for name, decode in decoders.items():
        errors = [
            float((own.double() - whole.double()).norm() / whole.double().norm())
            for own, whole in zip(results[name], results[WHOLE], strict=True)
        ]
        shares = [own / whole for own, whole in zip(times[name][1:], times[WHOLE][1:], strict=True)]
        found.append(
            {
                "measured_peak_bytes": peak_temporary_bytes(partial(_pass, decode, latents), latents.device),
                **{"x_whole": median(shares), "image_error": errors[0], "gradient_error": errors[1]},
            }
        )
    return found


def _pass(decode: Decode, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Return the image, and the gradient of its sum."""
    latents = latents.detach().requires_grad_()
    image = decode(latents)
    (gradient,) = torch.autograd.grad(image, latents, torch.ones_like(image))
    return image.detach(), gradient


def _bytes(network: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in network.parameters())


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """Return bytes in MiB, operations in 10^12."""
    header = ("pixels", "dtype", "option", "reward", "weights", "kept", "peak", "sum", "TFLOP", "measured", "x whole")
    lines = [
        (
            *(str(row["pixels"]), row["dtype"], row["option"], row["reward"] or "-"),
            *(f"{row[f'{what}_bytes'] / 2**20:.0f}" for what in ("weights", "kept", "peak")),
            f"{(row['weights_bytes'] + row['peak_bytes']) / 2**20:.0f}",
            f"{row['operations'] / 1e12:.1f}",
            f"{row['measured_peak_bytes'] / 2**20:.0f}" if "measured_peak_bytes" in row else "-",
            f"{row['x_whole']:.2f}" if "x_whole" in row else "-",
        )
        for row in rows
    ]
    return Table([header, *lines])


def add_arguments(add: Callable[..., Any]) -> None:
    add("--model", choices=list(MODELS), default="sdxl", help="(sdxl)")
    add("--counted", type=int, default=1024, metavar="N", help="pixels of a side, to count at (1024)")
    add("--pixels", type=int, metavar="N", help="pixels of a side, to measure at; none: counts alone")
    add("--rows", type=int, default=ROWS, metavar="N", help=f"of a slice ({ROWS})")
    add("--rounds", type=int, default=3, metavar="N", help="in which all are timed by turns (3)")
    add("--threads", type=int, default=torch.get_num_threads(), metavar="N")
    add("--out", type=user_path, default=Path("benchmarks/results"), metavar="FOLDER", help="(benchmarks/results)")


def run(arguments: argparse.Namespace, device: torch.device) -> int:
    place = Place(arguments.out / f"decoder-{arguments.model}", None, "decoder", arguments.model)
    place.check()
    origin = provenance(torch.device("cpu"))
    chosen = arguments.model, arguments.rows
    rows: list[dict[str, Any]] = []
    if arguments.pixels is not None:
        with intra_op_threads(arguments.threads):
            small = measured(chosen[0], arguments.pixels, torch.float32, chosen[1], arguments.rounds)
        counts = counted(chosen[0], arguments.pixels, torch.float32, chosen[1])
        rows += [one | other for one, other in zip(counts, small, strict=False)]
    for dtype in (torch.float32, torch.bfloat16):
        rows += counted(chosen[0], arguments.counted, dtype, chosen[1])
    made = table(rows)
    for path in place.write(rows, COLUMNS, ["MiB of one image; `sum` is weights and peak.\n", made], origin):
        say(f"written: {path}")
    say(f"\n{text(made)}")
    return 0
