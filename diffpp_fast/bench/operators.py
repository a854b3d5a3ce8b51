"""One step of every operator: its inputs, and how the operator and its baseline are called on them."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from diffpp_fast import ops
from diffpp_fast.bench import baselines
from diffpp_fast.bench.cases import REWARD_SIZE, Case
from diffpp_fast.noise import Noise
from diffpp_fast.prediction import gap_scale

Outputs = tuple[Tensor, ...]
Forward = Callable[..., Any]  # returns a tensor or a tuple of tensors and None

SEED = 0
GUIDANCE_SCALE = 7.5
#: A network's output is the noise with an error of this standard deviation.
NETWORK_ERROR = 0.3
#: CLIP's.
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
GROUPS, GROUP_EPS = 32, 1e-6
LAYER_EPS = 1e-6
ADA_LAYER_NORM_WRT = ("x", "scale", "shift")
#: sid_alpha and huber_c of the two losses.
SID_ALPHA, HUBER_C = 1.0, 1.0


@dataclass(frozen=True)
class Inputs:
    """One set of arguments, by name, for the baseline and for the operator; most tensors are in both."""

    unfused: dict[str, Any]
    fused: dict[str, Any]
    wrt: tuple[str, ...]  # the arguments that get gradients
    outer: Tensor | None  # the gradient of the first output; None where that is a scalar, or nothing gets a gradient

    @property
    def nbytes(self) -> int:
        """The bytes of all its tensors."""
        values = (*self.unfused.values(), *self.fused.values(), self.outer)
        tensors = {id(value): value for value in values if isinstance(value, Tensor)}
        return sum(tensor.nbytes for tensor in tensors.values())

    def fresh(self) -> Inputs:
        """The same tensors with leaves of their own.

        A leaf may remember the stream on which it was first used, and then can't be used in a captured graph.
        """
        leaves = {name: self.fused[name].detach().requires_grad_() for name in self.wrt}
        return replace(self, unfused={**self.unfused, **leaves}, fused={**self.fused, **leaves})

    def double(self) -> Inputs:
        """The same values in float64, with their own graph."""
        return Inputs(
            {name: _double(value) for name, value in self.unfused.items()},
            {name: _double(value) for name, value in self.fused.items()},
            self.wrt,
            None if self.outer is None else self.outer.double(),
        )


def unfused(case: Case) -> Forward:
    """The baseline, to be called with `Inputs.unfused`."""
    if case.op == "philox":
        return baselines.normal
    if case.op == "score_gap" and case.noise != "none":
        return baselines.score_gap_mean_abs
    if case.variant == "weighted":
        return baselines.weighted_denoising_loss
    baseline: Forward = getattr(baselines, case.op)
    return baseline


def fused(case: Case) -> Forward:
    """The public operator, to be called with `Inputs.fused`."""
    if case.op == "philox":
        return Noise.normal
    operator: Forward = getattr(ops, case.op)
    return operator


def step(forward: Forward, arguments: dict[str, Any], wrt: Sequence[str], outer: Tensor | None) -> Outputs:
    """The outputs that are tensors, then the gradients of `wrt`: one forward and backward as user code has it."""
    result = forward(**arguments)
    outputs = (result,) if isinstance(result, Tensor) else tuple(value for value in result if value is not None)
    if not wrt:
        return outputs
    return outputs + torch.autograd.grad(outputs[0], [arguments[name] for name in wrt], outer)


def result_names(case: Case) -> tuple[str, ...]:
    """What `step` returns, for messages."""
    if case.op == "score_gap":
        names = ("gradient", "gap_sq", "residual_abs", "gap_dot_residual")
        return names if case.noise != "none" else names[:2]
    wrt = {
        "philox": (),
        "add_noise": ("x0",),
        "denoising_loss": ("prediction",),
        "reward_pixels": ("images",),
        "group_norm_silu": _group_norm_wrt(case),
        "geglu": ("x",),
        "ada_layer_norm": ADA_LAYER_NORM_WRT,
    }.get(case.op, ("fake", "cond", "uncond"))
    return ("output", *(f"gradient of {name}" for name in wrt))


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, index: int = 0) -> Inputs:
    """Set number `index` of a case. The values depend on the kind of device: they are drawn there."""
    draw = _Draw(case, dtype, device, index)
    if case.op == "reward_pixels":
        return _reward_pixels(draw)
    if case.op == "group_norm_silu":
        return _group_norm_silu(draw)
    if case.op == "geglu":
        return _geglu(draw)
    if case.op == "ada_layer_norm":
        return _ada_layer_norm(draw)
    return _latents(draw)


class _Draw:
    """Random tensors of one input set."""

    def __init__(self, case: Case, dtype: torch.dtype, device: torch.device, index: int) -> None:
        self.case, self.dtype, self.device, self.index = case, dtype, device, index
        # On a GPU drawing on the CPU would take longer than measuring.
        self._generator = torch.Generator(device).manual_seed(zlib.crc32(case.name.encode()) + index)

    def normal(self, shape: Sequence[int] | None = None, *, mean: Tensor | None = None, scale: float = 1.0) -> Tensor:
        """In the case's layout, dtype and device; float32 until the last cast."""
        shape = self.case.shape if shape is None else shape
        values = torch.randn(shape, generator=self._generator, device=self.device) * scale
        return self.place(values if mean is None else values + mean.to(self.device, torch.float32))

    def place(self, values: Tensor) -> Tensor:
        last = self.case.layout == "channels_last" and values.dim() == 4
        memory_format = torch.channels_last if last else torch.contiguous_format
        return values.to(self.device, self.dtype, memory_format=memory_format)

    def coefficients(self) -> tuple[Tensor, Tensor]:
        """alpha and sigma, float32 [B], of a process that suits the prediction type."""
        alpha = torch.rand(self.case.shape[0], generator=self._generator, device=self.device) * 0.6 + 0.3
        sigma = 1.0 - alpha if self.case.prediction_type == "flow_prediction" else (1.0 - alpha.square()).sqrt()
        return alpha, sigma

    def address(self) -> Noise:
        batch = self.case.shape[0]
        first = self.index * batch
        return Noise(SEED, torch.arange(first, first + batch, device=self.device))


def _latents(draw: _Draw) -> Inputs:
    case = draw.case
    if case.op == "philox":
        return Inputs(
            {"shape": case.shape, "dtype": draw.dtype, "device": draw.device},
            {"self": draw.address(), "shape": case.shape[1:], "dtype": draw.dtype},
            (),
            None,
        )
    alpha, sigma = draw.coefficients()
    x0 = draw.normal()
    if case.op == "add_noise":
        arguments: dict[str, Any] = {"x0": x0.requires_grad_(), "alpha": alpha, "sigma": sigma}
        return Inputs(arguments, {**arguments, "noise": draw.address()}, ("x0",), draw.normal())
    eps = draw.normal()
    noise = eps if case.noise == "stored" else draw.address()
    process = {"x0": x0, "alpha": alpha, "sigma": sigma}
    if case.op == "denoising_loss":
        prediction = draw.normal(mean=eps, scale=NETWORK_ERROR).requires_grad_()
        arguments = {"prediction": prediction, **process, "prediction_type": case.prediction_type}
        if case.variant == "weighted":
            arguments["weight"] = (alpha / sigma).square().clamp(max=5.0)  # by the signal-to-noise ratio
        return Inputs({**arguments, "eps": eps}, {**arguments, "noise": noise}, ("prediction",), None)
    fake, cond, uncond = (draw.normal(mean=eps, scale=NETWORK_ERROR) for _ in range(3))
    outputs: dict[str, Any] = {"fake": fake, "cond": cond, "uncond": uncond, "guidance_scale": GUIDANCE_SCALE}
    if case.op == "score_gap":
        scale = gap_scale(case.prediction_type, alpha, sigma)
        if case.noise == "none":
            if case.variant == "plain":
                outputs.update(uncond=None, guidance_scale=1.0)
            arguments = {**outputs, "scale": scale}
            return Inputs(arguments, arguments, (), None)
        arguments = {**outputs, **process, "scale": scale, "prediction_type": case.prediction_type}
        return Inputs({**arguments, "eps": eps}, {**arguments, "noise": noise, "normalizer": "mean_abs"}, (), None)
    for tensor in (fake, cond, uncond):
        tensor.requires_grad_()
    option = {"sid_alpha": SID_ALPHA} if case.op == "sid_loss" else {"huber_c": HUBER_C}
    arguments = {**outputs, **process, **option, "prediction_type": case.prediction_type}
    outer = torch.full_like(alpha, 1.0 / len(alpha))  # that of a mean over the batch
    return Inputs({**arguments, "eps": eps}, {**arguments, "noise": noise}, ("fake", "cond", "uncond"), outer)


def _reward_pixels(draw: _Draw) -> Inputs:
    images = draw.normal(scale=0.5)
    # Where the clamp begins, a rounding decides whether a pixel gets a gradient, and float64 may decide otherwise.
    images = draw.place(images.masked_fill((images.abs() - 1.0).abs() < 0.01, 0.0)).requires_grad_()
    mean, std = _per_channel(draw.device)
    outer = draw.normal((*images.shape[:2], REWARD_SIZE, REWARD_SIZE))
    return Inputs(
        {"images": images, "mean": mean, "std": std, "size": REWARD_SIZE},
        {"images": images, "mean": PIXEL_MEAN, "std": PIXEL_STD, "size": REWARD_SIZE},
        ("images",),
        outer,
    )


@functools.cache
def _per_channel(device: torch.device) -> tuple[Tensor, Tensor]:
    mean, std = (torch.tensor(values, device=device).reshape(3, 1, 1) for values in (PIXEL_MEAN, PIXEL_STD))
    return mean, std


def _group_norm_silu(draw: _Draw) -> Inputs:
    channels = draw.case.shape[1]
    wrt = _group_norm_wrt(draw.case)
    arguments: dict[str, Any] = {
        "x": draw.normal(),
        "weight": draw.normal((channels,), mean=torch.ones(channels), scale=0.1),
        "bias": draw.normal((channels,), scale=0.1),
        "num_groups": GROUPS,
        "eps": GROUP_EPS,
    }
    for name in wrt:
        arguments[name].requires_grad_()
    return Inputs(arguments, arguments, wrt, draw.normal())


def _group_norm_wrt(case: Case) -> tuple[str, ...]:
    return ("x", "weight", "bias") if case.variant == "trained" else ("x",)


def _geglu(draw: _Draw) -> Inputs:
    batch, tokens, width = draw.case.shape
    arguments = {"x": draw.normal().requires_grad_()}
    return Inputs(arguments, arguments, ("x",), draw.normal((batch, tokens, width // 2)))


def _ada_layer_norm(draw: _Draw) -> Inputs:
    batch, _, width = draw.case.shape
    arguments: dict[str, Any] = {
        "x": draw.normal().requires_grad_(),
        "scale": draw.normal((batch, 1, width), scale=0.3).requires_grad_(),
        "shift": draw.normal((batch, 1, width), scale=0.3).requires_grad_(),
        "eps": LAYER_EPS,
    }
    return Inputs(arguments, arguments, ADA_LAYER_NORM_WRT, draw.normal())


def _double(value: Any) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return torch.float64 if isinstance(value, torch.dtype) else value
    return value.detach().double().requires_grad_(value.requires_grad)
