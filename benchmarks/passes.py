"""`python -m benchmarks passes`: a frozen reference's two passes, with the prompts and the empty one.

Two calls; two calls, of which the second finds the empty prompt's projections kept; and one call of twice the batch.
Networks are UNets of true architecture, or scaled down, and PixArt with two of its 28 blocks; all at random weights.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.cases import check_known
from benchmarks.step_networks import MODELS, twin
from benchmarks.tables import Table, markdown
from benchmarks.timing import clock_of, turns
from diffpp_fast.networks import Denoiser, fuse
from diffpp_fast.networks.kept_text import keep_text

PIXART = "pixart"
WAYS = ("two calls", "kept", "one call")
WARM_UPS = 1


def network_of(model: str, latent: int) -> tuple[Any, int, int]:
    """Return a network, and tokens and width of its text."""
    from diffusers import PixArtTransformer2DModel, UNet2DConditionModel

    if model == PIXART:
        network = PixArtTransformer2DModel(caption_channels=4096, sample_size=64, num_layers=2)
        return network, 120, 4096
    facts = MODELS[model]
    return (
        UNet2DConditionModel(**{"sample_size": latent, **facts.unet}),
        facts.tokens,
        facts.unet["cross_attention_dim"],
    )


def ways_of(model: str, latent: int, batch: int, device: torch.device) -> dict[str, Callable[[], Any]]:
    """Return how to ask for both predictions, by name; each gives them as one tensor [2 batch, ...]."""
    with torch.random.fork_rng(), device:
        torch.manual_seed(0)
        network, tokens, width = network_of(model, latent)
        x, t = torch.randn(batch, 4, latent, latent), torch.randint(0, 1000, (batch,))
        prompts, empty = torch.randn(batch, tokens, width), torch.randn(1, tokens, width).expand(batch, -1, -1)
    fuse(network.eval().requires_grad_(False))
    keeping: nn.Module = twin(network)
    keep_text(keeping)
    plain, kept = Denoiser(network), Denoiser(keeping)
    return {
        "two calls": lambda: torch.cat([plain(x, t, prompts), plain(x, t, empty)]),
        "kept": lambda: torch.cat([kept(x, t, prompts), kept(x, t, empty)]),
        "one call": lambda: plain(torch.cat([x, x]), torch.cat([t, t]), torch.cat([prompts, empty])),
    }


@torch.no_grad()
def measure(model: str, latent: int, batch: int, rounds: int, device: torch.device) -> list[str]:
    """Return a row: the median time of two calls, and how much faster the others are."""
    ways = ways_of(model, latent, batch, device)
    # On the CPU time of the process, to which other processes add little.
    clock = clock_of(device) if device.type == "cuda" else _processor_time
    samples: dict[str, list[float]] = {way: [] for way in WAYS}
    for turn, way in turns(WAYS, rounds, WARM_UPS):
        seconds = clock(ways[way])
        if turn >= 0:
            samples[way].append(seconds)
    two = samples[WAYS[0]]
    ratios = (statistics.median(a / b for a, b in zip(two, samples[way], strict=True)) for way in WAYS[1:])
    milliseconds = f"{1e3 * statistics.median(two):.1f}"
    return [model, str(latent), str(batch), milliseconds, *(f"{ratio:.3f}" for ratio in ratios)]


def _processor_time(call: Callable[[], Any]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def add_arguments(add: Callable[..., Any]) -> None:
    add("--model", default="small", metavar="NAME", help=f"of {', '.join(MODELS)}, {PIXART} (small)")
    add("--latent", type=int, default=32, metavar="N", help="side of the latents (32)")
    add("--batch", type=int, nargs="+", default=[1, 2, 4], metavar="N", help="images (1 2 4)")
    add("--rounds", type=int, default=9, metavar="N", help="in which all are timed by turns (9)")


def run(arguments: argparse.Namespace, device: torch.device) -> int:
    check_known("--model", [arguments.model], (*MODELS, PIXART))
    header = ["model", "latents", "batch", "two calls ms", "x kept", "x one call"]
    rows = [measure(arguments.model, arguments.latent, batch, arguments.rounds, device) for batch in arguments.batch]
    print(markdown(Table([header, *rows])), end="")
    return 0
