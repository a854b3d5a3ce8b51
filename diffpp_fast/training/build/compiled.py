"""Whether torch.compile's gradients of a network are those of the network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from diffpp_fast.errors import ConfigurationError
from diffpp_fast.methods.base import DIFFUSION, LATENT
from diffpp_fast.noise import Noise

#: What rounding may change in a gradient, as a share of its norm, by the dtype that is computed in. Wrong gradients
#: have been off by half of it and more.
TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 1e-1}
#: Gradients shorter than this share of the longest are rounding errors themselves, as that of a bias before a norm.
NEGLIGIBLE = 1e-3


def refuse_known_faults(network: Any, *, fused: bool, device: torch.device) -> None:
    """Raises ConfigurationError where torch.compile is known to give wrong gradients.

    Inductor's code for the CPU in torch 2.13: the gradient of diffusers' UNets by everything before their upsampling is
    wrong, and loss and output are right. With fused blocks it is not.
    """
    upsamples = any(type(part).__name__ == "Upsample2D" for part in network.modules())
    if device.type == "cpu" and torch.__version__.startswith("2.13.") and upsamples and not fused:
        raise ConfigurationError(
            f"training.compile: on a CPU torch {torch.__version__} compiles a {type(network).__name__} without fused "
            "blocks to one with wrong gradients: use training.fuse=true, or training.compile=false"
        )


def check_gradients(
    role: str,
    denoise: Callable[..., torch.Tensor],
    weights: Mapping[str, torch.Tensor],
    conditioning: Any,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Compares a compiled network's gradients with those of the same network in eager mode, once.

    It runs both forward and backward on one batch; what is compiled for it serves the run. Two gradients of the weights
    are in memory meanwhile.

    Args:
        role: of the network, for the message.
        denoise: (x_t, t, conditioning) -> prediction, of a network that was compiled by `nn.Module.compile`.
        weights: what is differentiated, by name; empty: the samples are.
        conditioning: of B samples.
        shape: of a sample.
        dtype: that the network computes in.
        device: of the network.

    Raises ConfigurationError where they differ by more than rounding.
    """
    numbers = torch.arange(len(conditioning), device=device)
    x, direction = (Noise(0, numbers, stream=stream).normal(shape) for stream in (LATENT, DIFFUSION))
    t = torch.full((len(conditioning),), 500, dtype=torch.int64, device=device)

    def gradients() -> dict[str, torch.Tensor]:
        leaves = dict(weights) or {"the samples": x.detach().requires_grad_()}
        with torch.enable_grad():
            product = (denoise(leaves.get("the samples", x), t, conditioning) * direction).sum()
        found = torch.autograd.grad(product, list(leaves.values()), allow_unused=True, materialize_grads=True)
        return dict(zip(leaves, found, strict=True))

    with torch.compiler.set_stance("force_eager"):
        exact = gradients()
    compiled = gradients()
    floor = NEGLIGIBLE * max(float(gradient.norm()) for gradient in exact.values())
    off = {}
    for name, gradient in exact.items():
        error = float((compiled[name] - gradient).norm()) / max(float(gradient.norm()), floor)
        if not error <= TOLERANCE[dtype]:
            off[name] = error
    if off:
        worst = max(off, key=lambda name: off[name])
        raise ConfigurationError(
            f"training.compile: as torch {torch.__version__} compiles the {role}, its gradients are wrong: {len(off)} "
            f"of {len(exact)} tensors differ from eager's, {worst} by {off[worst]:.0%}. Use training.compile=false"
        )
