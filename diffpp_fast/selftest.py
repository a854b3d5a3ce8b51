"""Operators on small tensors against their float64 reference: what `diffpp-fast doctor` runs."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from diffpp_fast import backends, ops
from diffpp_fast.noise import Noise

Outputs = tuple[Tensor, ...]
CPU = torch.device("cpu")
#: The backend that defines the operators.
ORACLE = "reference"
#: On ||error|| / ||oracle|| in float32.
TOLERANCE = 1e-4
#: A single element may be off by this many tolerances, of itself and of the root mean square.
ELEMENT = 4.0

SEED, STREAM = 2**64 - 3, 2**31 + 5
GUIDANCE_SCALE = 4.5
#: CLIP's.
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)

#: Sides that no vector or block length divides; other operators take `SHAPE`.
SHAPES = {
    "reward_pixels": (1, 3, 37, 53),
    "group_norm_silu": (2, 64, 7, 9),
    "geglu": (2, 5, 46),
    "ada_layer_norm": (2, 5, 23),
    "gated_residual_norm": (2, 5, 23),
    "rms_norm_rope": (2, 5, 3, 22),
}
SHAPE = (2, 4, 13, 17)
FLOW = {"prediction_type": "flow_prediction"}
LAYOUTS = ({"layout": "contiguous"}, {"layout": "channels_last"})
#: The options of the calls that are checked, by operator; one without options where nothing is said.
CHECKED: dict[str, Sequence[dict[str, Any]]] = {
    "denoising_loss": ({"noise": "stored"}, {"noise": "stored", "weight": True}, {"noise": "drawn"}, FLOW),
    "score_gap": (
        {"noise": "none", "uncond": False},
        {"noise": "none"},
        {"noise": "stored", "normalizer": "mean_abs"},
        {"noise": "drawn", "normalizer": "mean_abs"},
        {"normalizer": "mean_abs", **FLOW},
        {"noise": "none", "reward": "whole"},
        {"noise": "stored", "normalizer": "mean_abs", "reward": "clipped"},
    ),
    "sid_loss": ({"noise": "stored"}, {"noise": "drawn"}, FLOW),
    "sim_loss": ({"noise": "stored"}, {"noise": "drawn"}, FLOW),
    "reward_pixels": LAYOUTS,
    "group_norm_silu": [
        {"wrt": wrt, "added": added, **layout}
        for wrt, added in (("x", "nothing"), ("all", "nothing"), ("x", "residual"), ("all", "offset"))
        for layout in LAYOUTS
    ],
    "gated_residual_norm": ({}, {"norm": "rms", "modulation": "tokens", "affine": True}),
    "rms_norm_rope": ({}, {"interleaved": False, "sequence_dim": 2}),
}


@dataclass(frozen=True)
class Call:
    """An operator with its arguments by name, and what its backward pass is asked for."""

    op: str
    arguments: dict[str, Any]
    wrt: tuple[str, ...]  # the arguments that get gradients
    outer: Tensor | None  # the gradient of each output; None where that is a scalar, or nothing gets a gradient

    @property
    def forward(self) -> Callable[..., Any]:
        """The public operator."""
        if self.op == "philox":
            draw = next(name for name, key in _DRAWS.items() if key in self.arguments or key is None)
            method: Callable[..., Any] = getattr(Noise, draw)
            return method
        operator: Callable[..., Any] = getattr(ops, self.op)
        return operator

    @property
    def names(self) -> list[str]:
        """Names of what `run` returns, for messages."""
        outputs = ["output", "sum"] if "residual" in self.arguments else ["output"]
        if self.op == "score_gap":
            outputs = ["gradient", "gap_sq", "residual_abs", "gap_dot_residual"]
            del outputs[len(outputs) if "noise" in self.arguments else 2 :]
            if "reward_score" in self.arguments:
                outputs += ["reward_sq", "gap_dot_reward", "reward_share"]
        elif self.op == "gated_residual_norm":
            outputs = ["hidden", "modulated"]
        return [*outputs, *(f"gradient of {name}" for name in self.wrt)]

    def run(self) -> Outputs:
        """One forward and backward pass as user code has it."""
        return step(self.forward, self.arguments, self.wrt, self.outer)

    def fresh(self) -> Call:
        """Return the same call with leaves of its own.

        A leaf may remember the stream on which it was first used, and then can't be used in a captured graph.
        """
        leaves = {name: self.arguments[name].detach().requires_grad_() for name in self.wrt}
        return replace(self, arguments={**self.arguments, **leaves})

    def double(self) -> Call:
        """Return the call with the same values in float64."""
        arguments = {name: _double(value) for name, value in self.arguments.items()}
        return replace(self, arguments=arguments, outer=None if self.outer is None else self.outer.double())


#: Noise's methods by the argument that tells them apart.
_DRAWS = {"normal": "shape", "integers": "low", "uniform": None}


def failure(op: str, backend: str, device: torch.device) -> str | None:
    """Say what is wrong with an operator's forward or backward pass in float32; None if nothing is."""
    for options in CHECKED.get(op, ({},)):
        call = make(op, SHAPES.get(op, SHAPE), device=device, **options)
        try:
            with backends.use_backend(backend):
                actual = call.run()
            with backends.use_backend(ORACLE):
                expected = call.double().run()
            wrong = compare(call.names, actual, expected, TOLERANCE)
        except Exception as error:  # of any kind: it is reported, and the other backends go on
            wrong = f"{type(error).__name__}: {error}"
        if wrong is not None:
            chosen = ", ".join(f"{name}={value}" for name, value in options.items())
            return f"{op}({chosen}): {wrong}"
    return None


def step(forward: Callable[..., Any], arguments: dict[str, Any], wrt: Sequence[str], outer: Tensor | None) -> Outputs:
    """Return the outputs that are tensors, then the gradients of `wrt`."""
    result = forward(**arguments)
    outputs = (result,) if isinstance(result, Tensor) else tuple(value for value in result if value is not None)
    if not wrt:
        return outputs
    differentiable = [output for output in outputs if output.requires_grad]
    outers = None if outer is None else [outer] * len(differentiable)
    return outputs + torch.autograd.grad(differentiable, [arguments[name] for name in wrt], outers)


def compare(names: Sequence[str], actual: Outputs, oracle: Outputs, tolerance: float) -> str | None:
    """Say which result is beyond the tolerance, as a whole or in an element; None if none is."""
    if len(actual) != len(oracle):
        return f"{len(actual)} results instead of {len(oracle)}"
    for name, result, expected in zip(names, actual, oracle, strict=True):
        if result.shape != expected.shape:
            return f"{name} has shape {list(result.shape)} instead of {list(expected.shape)}"
        expected = expected.detach()
        error = (result.detach().double() - expected).abs()
        if not torch.isfinite(error).all():
            return f"{name} is not finite"
        if not error.any():
            continue  # what is all zeros, or empty, has no relative error
        relative = float(error.norm() / expected.norm())
        if not relative <= tolerance:
            return f"{name} has a relative error of {relative:.1e}, allowed {tolerance:.0e}"
        root_mean_square = expected.square().mean().sqrt()
        element = float((error / (expected.abs() + root_mean_square)).max())
        if not element <= ELEMENT * tolerance:
            return f"{name} has an element with an error of {element:.1e}, allowed {ELEMENT * tolerance:.0e}"
    return None


def make(
    op: str,
    shape: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    device: torch.device = CPU,
    drawn_on: torch.device = CPU,
    seed: str = "",
    **options: Any,
) -> Call:
    """Return a call on random tensors.

    Args:
        op: "philox" or a function of `diffpp_fast.ops`.
        shape: of its large tensors.
        dtype: of its large tensors.
        layout: "contiguous", "channels_last", "strided" or "misaligned" in memory.
        device: where the tensors are.
        drawn_on: where they are drawn. The values depend on the type of this device alone.
        seed: other values for every text.
        options: what the makers below take, by operator.
    """
    draw = _Draw(tuple(shape), dtype, layout, device, drawn_on, f"{op} {seed}")
    return _MAKERS.get(op, _latents)(draw, op, **options)


class _Draw:
    """Random tensors of one call."""

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        layout: str,
        device: torch.device,
        drawn_on: torch.device,
        seed: str,
    ) -> None:
        self.shape, self.dtype, self.layout, self.device, self.drawn_on = shape, dtype, layout, device, drawn_on
        self._generator = torch.Generator(drawn_on).manual_seed(zlib.crc32(seed.encode()))

    def normal(self, shape: Sequence[int] | None = None, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        shape = self.shape if shape is None else shape
        return self.place(torch.randn(shape, generator=self._generator, device=self.drawn_on) * scale + mean)

    def place(self, values: Tensor) -> Tensor:
        """In the dtype and layout, on the device."""
        values = values.to(self.device, self.dtype)
        if self.layout == "channels_last" and values.dim() == 4:
            return values.contiguous(memory_format=torch.channels_last)
        if self.layout == "strided" and values.dim() > 1:
            return values.repeat_interleave(2, dim=-1)[..., ::2]
        if self.layout == "misaligned":
            return torch.cat((values.new_zeros(1), values.flatten()))[1:].view(values.shape)
        return values

    def per_sample(self, low: float, high: float) -> Tensor:
        """float32 [B], float64 for float64."""
        values = torch.rand(self.shape[0], generator=self._generator, device=self.drawn_on) * (high - low) + low
        return values.to(self.device, torch.promote_types(self.dtype, torch.float32))

    def address(self, batch: int | None = None) -> Noise:
        # Below and above 2^32 and, as unsigned numbers, above 2^63.
        samples = torch.arange(batch or self.shape[0], device=self.device) * (2**33 + 1) - 1
        return Noise(SEED, samples, STREAM)


def _philox(draw: _Draw, op: str, *, draws: str = "normal") -> Call:
    # More samples than one block of the kernels that give one number for each.
    arguments: dict[str, Any] = {"self": draw.address(None if draws == "normal" else 300)}
    if draws == "normal":
        arguments |= {"shape": draw.shape[1:], "dtype": draw.dtype}
    elif draws == "integers":
        arguments |= {"low": -5, "high": 2**31}
    return Call(op, arguments, (), None)


def _latents(
    draw: _Draw,
    op: str,
    *,
    noise: str = "drawn",
    prediction_type: str = "epsilon",
    weight: bool = False,
    gradient: bool = True,
    uncond: bool = True,
    normalizer: str | None = None,
    scale: str = "tensor",
    reward: str = "none",
    wrt: str = "outputs",
) -> Call:
    alpha = draw.per_sample(0.3, 0.9)
    sigma = 1.0 - alpha if prediction_type == "flow_prediction" else (1.0 - alpha.square()).sqrt()
    # A single noisy value or residual must be no small difference of others, whose rounding would be magnified.
    alone = op in ("add_noise", "denoising_loss") and math.prod(draw.shape[1:]) == 1
    x0_mean, prediction_mean = (16.0, 64.0) if alone else (0.0, 0.0)
    process = {"x0": draw.normal(mean=x0_mean), "noise": draw.address() if noise == "drawn" else draw.normal()}
    process |= {"alpha": alpha, "sigma": sigma}
    if op == "add_noise":
        return _with_gradients(op, process, ("x0",) if gradient else (), draw.normal())
    arguments: dict[str, Any] = {} if noise == "none" else process
    arguments["prediction_type"] = prediction_type
    if op == "denoising_loss":
        arguments |= {
            "prediction": draw.normal(mean=prediction_mean),
            "weight": draw.per_sample(0.5, 2.0) if weight else None,
        }
        return _with_gradients(op, arguments, ("prediction",) if gradient else (), None)
    outputs = {"fake": draw.normal(), "cond": draw.normal(), "uncond": draw.normal() if uncond else None}
    arguments = {**outputs, "guidance_scale": GUIDANCE_SCALE if uncond else 1.0, **arguments}
    if op == "score_gap":
        factor = 0.7 if scale == "number" else draw.per_sample(0.5, 2.0)
        arguments |= {"scale": factor, "normalizer": normalizer}
        if reward != "none":
            arguments |= {"reward_score": draw.normal(scale=0.5), "reward_clip": 0.05 if reward == "clipped" else None}
            arguments["reward_scale"] = 0.3 if scale == "number" else draw.per_sample(0.5, 2.0)
        return Call(op, arguments, (), None)
    wanted = ("fake",) if wrt == "fake" else tuple(name for name, value in outputs.items() if value is not None)
    # The target of "epsilon" holds no x0.
    if wrt == "all" and prediction_type != "epsilon":
        wanted += ("x0",)
    return _with_gradients(op, arguments, wanted, draw.per_sample(0.5, 1.5))


def _reward_pixels(
    draw: _Draw, op: str, *, size: int = 24, output: str = "same", gradient: bool = True, **options: Any
) -> Call:
    images = draw.normal(scale=0.5)
    # Where the clamp begins, a rounding decides whether a pixel gets a gradient, and float64 may decide otherwise.
    images = draw.place(images.masked_fill((images.abs() - 1.0).abs() < 0.02, 0.0))
    outer = draw.normal((*draw.shape[:2], size, size))
    mean, std = ([values[c % 3] for c in range(draw.shape[1])] for values in (PIXEL_MEAN, PIXEL_STD))
    arguments = {"images": images, "size": size, "mean": mean, "std": std, **options}
    if output == "float32" and draw.dtype != torch.float64:
        arguments["dtype"], outer = torch.float32, outer.float()
    return _with_gradients(op, arguments, ("images",) if gradient else (), outer)


def _group_norm_silu(
    draw: _Draw,
    op: str,
    *,
    groups: int = 32,
    activation: str = "silu",
    affine: str = "both",
    wrt: str = "x",
    added: str = "nothing",
) -> Call:
    names = {"both": ("weight", "bias"), "weight": ("weight",), "none": ()}[affine]
    arguments: dict[str, Any] = {"x": draw.normal(mean=0.5), "num_groups": groups}
    arguments |= {"eps": 1e-5, "activation": activation}
    for name in names:
        arguments[name] = draw.normal(draw.shape[1:2], scale=0.2, mean=1.0 if name == "weight" else 0.0)
    inputs: tuple[str, ...] = ("x",)
    if added != "nothing":
        arguments[added] = draw.normal(None if added == "residual" else draw.shape[:2])
        if added == "residual":
            # In sixteenths, whose sum no dtype rounds: the oracle, in float64, rounds none.
            arguments |= {name: draw.place((16 * arguments[name]).round() / 16) for name in ("x", added)}
        inputs = ("x", added)
    wanted = {"x": inputs, "parameters": names, "all": (*inputs, *names), "none": ()}[wrt]
    return _with_gradients(op, arguments, wanted, draw.normal())


def _geglu(draw: _Draw, op: str, *, gradient: bool = True) -> Call:
    *rows, width = draw.shape
    outer = draw.normal((*rows, width // 2))
    return _with_gradients(op, {"x": draw.normal()}, ("x",) if gradient else (), outer)


def _ada_layer_norm(draw: _Draw, op: str, *, wrt: str = "all", modulation: str = "rows") -> Call:
    batch, _, width = draw.shape
    scale, shift = (draw.normal((batch, 1, width), scale=0.3) for _ in range(2))
    if modulation == "chunks":
        # As networks have them: parts of one tensor.
        scale, shift = torch.cat((scale, shift), dim=1).chunk(2, dim=1)
    elif modulation == "float32" and draw.dtype != torch.float64:
        scale, shift = scale.float().flatten(1), shift.float().flatten(1)
    wanted = {"x": ("x",), "modulation": ("scale", "shift"), "all": ("x", "scale", "shift"), "none": ()}[wrt]
    arguments = {"x": draw.normal(mean=0.5), "scale": scale, "shift": shift}
    return _with_gradients(op, arguments, wanted, draw.normal())


def _gated_residual_norm(
    draw: _Draw, op: str, *, wrt: str = "all", modulation: str = "rows", norm: str = "layer", affine: bool = False
) -> Call:
    names: tuple[str, ...] = ("gate", "scale", "shift")
    batch, count, width = draw.shape
    arguments: dict[str, Any] = {"residual": draw.normal(mean=0.5), "branch": draw.normal(), "norm": norm}
    if modulation == "tokens":
        modulated = tuple(draw.normal((batch, count, width), scale=0.3) for _ in names)
    else:
        # As networks have them: parts of one tensor.
        modulated = draw.normal((batch, 3, width), scale=0.3).chunk(3, dim=1)
    arguments |= dict(zip(names, modulated, strict=True))
    if modulation == "float32" and draw.dtype != torch.float64:
        arguments |= {name: arguments[name].float().flatten(1) for name in names}
    elif modulation == "scale":
        arguments |= {"gate": None, "shift": None}
        names = ("scale",)
    if affine:
        arguments["weight"] = draw.normal((width,), scale=0.2, mean=1.0)
        names = (*names, "weight")
    inputs = ("residual", "branch")
    wanted = {"inputs": inputs, "modulation": names, "all": (*inputs, *names), "none": ()}[wrt]
    return _with_gradients(op, arguments, wanted, draw.normal())


def _rms_norm_rope(
    draw: _Draw,
    op: str,
    *,
    interleaved: bool = True,
    sequence_dim: int = 1,
    affine: bool = True,
    wrt: str = "all",
    positions: str = "shared",
) -> Call:
    batch, width = draw.shape[0], draw.shape[3]
    shape = (draw.shape[sequence_dim], width) if positions == "shared" else (batch, draw.shape[sequence_dim], width)
    # Angles that differ within a pair, which networks do not have: an operator that mixes them up shows.
    angle = draw.normal(shape, scale=2.0).to(torch.promote_types(draw.dtype, torch.float32))
    arguments: dict[str, Any] = {"x": draw.normal(), "cos": angle.cos(), "sin": angle.sin()}
    arguments |= {"interleaved": interleaved, "sequence_dim": sequence_dim}
    if affine:
        arguments["weight"] = draw.normal((width,), scale=0.2, mean=1.0)
    parameters = ("weight",) if affine else ()
    wanted = {"x": ("x",), "weight": parameters, "all": ("x", *parameters), "none": ()}[wrt]
    return _with_gradients(op, arguments, wanted, draw.normal())


_MAKERS: dict[str, Callable[..., Call]] = {
    "philox": _philox,
    "reward_pixels": _reward_pixels,
    "group_norm_silu": _group_norm_silu,
    "geglu": _geglu,
    "ada_layer_norm": _ada_layer_norm,
    "gated_residual_norm": _gated_residual_norm,
    "rms_norm_rope": _rms_norm_rope,
}


def _with_gradients(op: str, arguments: dict[str, Any], wrt: tuple[str, ...], outer: Tensor | None) -> Call:
    arguments = {**arguments, **{name: arguments[name].detach().requires_grad_() for name in wrt}}
    return Call(op, arguments, wrt, outer if wrt else None)


def _double(value: Any) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return torch.float64 if isinstance(value, torch.dtype) else value
    return value.detach().double().requires_grad_(value.requires_grad)
