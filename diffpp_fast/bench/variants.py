"""Every option of every operator, on small tensors: what is compiled ahead of time and checked on a GPU."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffpp_fast import ops
from diffpp_fast.bench.operators import PIXEL_MEAN, PIXEL_STD, Forward, Inputs
from diffpp_fast.noise import Noise
from diffpp_fast.prediction import PREDICTION_TYPES

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LAYOUTS = ("contiguous", "channels_last", "strided", "misaligned")
#: Samples that vector and block lengths divide, and that they don't; the even ones need several blocks. Here and below
#: a "one" has as many sizes of 1 as can be: Triton makes a constant of an argument that is 1.
LATENTS = {"even": (2, 4, 48, 64), "odd": (3, 5, 7, 9), "video": (2, 4, 3, 6, 8), "one": (1, 1, 1, 1)}
#: More and fewer pixels than `REWARD_SIZE`; of the last, one pixel in channels_last is more than csrc's tile on GPUs.
IMAGES = {"shrink": (2, 3, 61, 43), "enlarge": (1, 3, 15, 19), "one": (1, 3, 1, 1), "channels": (1, 260, 3, 4)}
REWARD_SIZE = 24
#: Groups that fit into one program of Triton's, then those that are cut into chunks of pixels: several channels to a
#: group, and of the last a single one. None has a single value, whose gradient is zero, or two, where it is rounding.
ACTIVATIONS = {
    "even": (2, 32, 16, 16),
    "odd": (3, 6, 7, 9),
    "long": (1, 8, 96, 64),
    "one": (2, 32, 1, 1),
    "chunks": (1, 4, 96, 96),
    "channels": (1, 2, 100, 100),
}
GROUPS = {"even": 8, "odd": 3, "long": 8, "one": 4, "chunks": 2, "channels": 2}
#: [B, N, D]: rows that block lengths divide and that they don't, short ones in numbers, long ones.
TOKENS = {"even": (2, 40, 256), "odd": (3, 7, 90), "short": (2, 300, 16), "long": (2, 3, 8192), "one": (1, 1, 1)}

SEED, STREAM = 2**64 - 3, 2**31 + 5
GUIDANCE_SCALE = 4.5

#: Their rows lie along the last dimension: channels_last means nothing to them.
TOKEN_OPS = ("geglu", "ada_layer_norm")
NOISES = ("drawn", "stored")
TARGET = {"noise": NOISES, "prediction_type": PREDICTION_TYPES}
LOSS = {**TARGET, "uncond": (True, False), "wrt": ("fake", "outputs", "all"), "shape": (*LATENTS,)}
#: The values that each option takes. dtype and layout come on top.
OPTIONS: Mapping[str, Mapping[str, Sequence[Any]]] = {
    "philox": {"draws": ("normal", "uniform", "integers"), "shape": (*LATENTS,)},
    "add_noise": {"noise": NOISES, "gradient": (True, False), "shape": (*LATENTS,)},
    "denoising_loss": {**TARGET, "weight": (False, True), "gradient": (True, False), "shape": (*LATENTS,)},
    "score_gap": {
        "noise": ("none", *NOISES),
        "prediction_type": PREDICTION_TYPES,
        "uncond": (True, False),
        "normalizer": (None, "mean_abs"),
        "scale": ("number", "tensor"),
        "shape": (*LATENTS,),
    },
    "sid_loss": LOSS,
    "sim_loss": LOSS,
    "reward_pixels": {
        "filter": ("bicubic", "bilinear"),
        "antialias": (True, False),
        "fit": ("crop", "pad", "stretch"),
        "clamp": ("hard", "straight_through", "none"),
        "output": ("same", "float32"),
        "gradient": (True, False),
        "shape": (*IMAGES,),
    },
    "group_norm_silu": {
        "activation": ("silu", "identity"),
        "affine": ("both", "weight", "none"),
        "wrt": ("x", "parameters", "all", "none"),
        "shape": (*ACTIVATIONS,),
    },
    "geglu": {"gradient": (True, False), "shape": (*TOKENS,)},
    "ada_layer_norm": {
        "wrt": ("x", "modulation", "all", "none"),
        "modulation": ("rows", "chunks", "float32"),
        "shape": (*TOKENS,),
    },
}


@dataclass(frozen=True)
class Variant:
    """One operator with one value of every option."""

    op: str
    options: tuple[tuple[str, Any], ...]

    def __getitem__(self, name: str) -> Any:
        return dict(self.options)[name]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the large tensors."""
        dtype: torch.dtype = self["dtype"]
        return dtype

    @property
    def name(self) -> str:
        """For people, unique."""
        values = (f"{name}={str(value).removeprefix('torch.')}" for name, value in self.options)
        return f"{self.op}({', '.join(values)})"

    @property
    def drawn(self) -> bool:
        """Whether it draws addressed noise."""
        return self.op == "philox" or dict(self.options).get("noise") == "drawn"


def every(op: str, dtypes: Sequence[torch.dtype] = DTYPES) -> Iterator[Variant]:
    """All combinations of all options that make sense."""
    factors: dict[str, Sequence[Any]] = {**OPTIONS[op], "dtype": dtypes, "layout": LAYOUTS}
    for values in itertools.product(*factors.values()):
        variant = Variant(op, tuple(zip(factors, values, strict=True)))
        if _makes_sense(variant):
            yield variant


def ordered(op: str, dtypes: Sequence[torch.dtype] = DTYPES) -> tuple[list[Variant], int]:
    """All combinations, and how many of the first hold every pair of values that occurs in any.

    Faults of a kernel lie in one option or in two together far more often than in three.
    """
    rest = list(every(op, dtypes))
    pairs = {variant: set(itertools.combinations(variant.options, 2)) for variant in rest}
    missing = set().union(*pairs.values())
    chosen: list[Variant] = []
    while missing:
        best = max(rest, key=lambda variant: len(pairs[variant] & missing))
        missing -= pairs[best]
        chosen.append(best)
        rest.remove(best)
    return chosen + rest, len(chosen)


def forward(variant: Variant) -> Forward:
    """The public operator, to be called with `Inputs.fused`."""
    if variant.op == "philox":
        draws: Forward = getattr(Noise, variant["draws"])
        return draws
    operator: Forward = getattr(ops, variant.op)
    return operator


def make(variant: Variant, device: torch.device) -> Inputs:
    """Its inputs; the values do not depend on the device. Those of the unfused code are left out."""
    draw = _Draw(variant, device)
    if variant.op == "philox":
        return _philox(draw)
    if variant.op == "reward_pixels":
        return _reward_pixels(draw)
    if variant.op == "group_norm_silu":
        return _group_norm_silu(draw)
    if variant.op == "geglu":
        return _geglu(draw)
    return _ada_layer_norm(draw) if variant.op == "ada_layer_norm" else _latents(draw)


def names(variant: Variant, inputs: Inputs) -> list[str]:
    """What the step returns, for messages."""
    statistics = ["gap_sq", "residual_abs", "gap_dot_residual"] if variant.op == "score_gap" else []
    if variant.op == "score_gap" and variant["noise"] == "none":
        del statistics[1:]
    return ["output", *statistics, *(f"gradient of {name}" for name in inputs.wrt)]


def _makes_sense(variant: Variant) -> bool:
    options = dict(variant.options)
    if variant.op == "philox":
        return options["layout"] == "contiguous" and (
            options["draws"] == "normal" or (options["shape"], options["dtype"]) == ("even", torch.float32)
        )
    if options["layout"] == "channels_last" and (options["shape"] == "video" or variant.op in TOKEN_OPS):
        return False
    if variant.op == "score_gap" and options["noise"] == "none":
        return options["normalizer"] is None and options["prediction_type"] == "epsilon"
    if variant.op == "group_norm_silu" and options["affine"] == "none":
        return options["wrt"] != "parameters"
    return True


class _Draw:
    """Random tensors of one variant."""

    def __init__(self, variant: Variant, device: torch.device) -> None:
        self.variant, self.device = variant, device
        self._generator = torch.Generator().manual_seed(zlib.crc32(variant.name.encode()))

    def normal(self, shape: Sequence[int], scale: float = 1.0, mean: float | Tensor = 0.0) -> Tensor:
        values = torch.randn(shape, generator=self._generator) * scale
        return self.place(values + (mean.cpu().float() if isinstance(mean, Tensor) else mean))

    def place(self, values: Tensor) -> Tensor:
        """In the variant's dtype and layout, on the device."""
        values = values.to(self.device, self.variant.dtype)
        layout = self.variant["layout"]
        if layout == "channels_last" and values.dim() == 4:
            return values.contiguous(memory_format=torch.channels_last)
        if layout == "strided" and values.dim() > 1:
            return values.repeat_interleave(2, dim=-1)[..., ::2]
        if layout == "misaligned":
            return torch.cat((values.new_zeros(1), values.flatten()))[1:].view(values.shape)
        return values

    def per_sample(self, batch: int, low: float, high: float) -> Tensor:
        """float32 [B], float64 for float64."""
        values = torch.rand(batch, generator=self._generator) * (high - low) + low
        return values.to(self.device, torch.promote_types(self.variant.dtype, torch.float32))

    def address(self, batch: int) -> Noise:
        # Below and above 2^32 and, as unsigned numbers, above 2^63.
        samples = torch.arange(batch, device=self.device) * (2**33 + 1) - 1
        return Noise(SEED, samples, STREAM)


def _philox(draw: _Draw) -> Inputs:
    shape = LATENTS[draw.variant["shape"]]
    # More samples than one block of the kernels that give one number for each.
    arguments: dict[str, Any] = {"self": draw.address(shape[0] if draw.variant["draws"] == "normal" else 300)}
    if draw.variant["draws"] == "normal":
        arguments.update(shape=shape[1:], dtype=draw.variant.dtype)
    elif draw.variant["draws"] == "integers":
        arguments.update(low=-5, high=2**31)
    return Inputs({}, arguments, (), None)


def _latents(draw: _Draw) -> Inputs:
    op, options = draw.variant.op, dict(draw.variant.options)
    shape = LATENTS[options["shape"]]
    batch = shape[0]
    alpha = draw.per_sample(batch, 0.3, 0.9)
    sigma = (1.0 - alpha.square()).sqrt()
    x0, eps = draw.normal(shape), draw.normal(shape)
    noise = draw.address(batch) if options["noise"] == "drawn" else eps
    process = {"x0": x0, "noise": noise, "alpha": alpha, "sigma": sigma}
    wrt: tuple[str, ...] = ()
    arguments: dict[str, Any]
    if op == "add_noise":
        arguments, outer = process, draw.normal(shape)
        wrt = ("x0",) if options["gradient"] else ()
    elif op == "denoising_loss":
        prediction, outer = draw.normal(shape), None
        weight = draw.per_sample(batch, 0.5, 2.0) if options["weight"] else None
        arguments = {"prediction": prediction, **process, "weight": weight}
        wrt = ("prediction",) if options["gradient"] else ()
    else:
        uncond = draw.normal(shape) if options["uncond"] else None
        arguments = {"fake": draw.normal(shape), "cond": draw.normal(shape), "uncond": uncond}
        arguments["guidance_scale"] = GUIDANCE_SCALE if options["uncond"] else 1.0
        outer = None
        if op == "score_gap":
            arguments["scale"] = 0.7 if options["scale"] == "number" else draw.per_sample(batch, 0.5, 2.0)
            arguments["normalizer"] = options["normalizer"]
        else:
            outer = draw.per_sample(batch, 0.5, 1.5)
            wrt = ("fake",)
            if options["wrt"] != "fake":
                wrt += ("cond", "uncond") if options["uncond"] else ("cond",)
            # The target of "epsilon" holds no x0.
            if options["wrt"] == "all" and options["prediction_type"] != "epsilon":
                wrt += ("x0",)
        if options["noise"] != "none":
            arguments.update(process)
    if op != "add_noise":
        arguments["prediction_type"] = options["prediction_type"]
    return _with_gradients(arguments, wrt, outer)


def _reward_pixels(draw: _Draw) -> Inputs:
    options = dict(draw.variant.options)
    shape = IMAGES[options["shape"]]
    images = draw.normal(shape, scale=0.5)
    # Where the clamp begins, a rounding decides whether a pixel gets a gradient, and float64 may decide otherwise.
    images = draw.place(images.masked_fill((images.abs() - 1.0).abs() < 0.02, 0.0))
    outer = draw.normal((*shape[:2], REWARD_SIZE, REWARD_SIZE))
    mean, std = ([values[c % 3] for c in range(shape[1])] for values in (PIXEL_MEAN, PIXEL_STD))
    arguments = {"images": images, "size": REWARD_SIZE, "mean": mean, "std": std}
    arguments |= {name: options[name] for name in ("filter", "antialias", "fit", "clamp")}
    if options["output"] == "float32" and draw.variant.dtype != torch.float64:
        arguments["dtype"] = torch.float32
        outer = outer.float()
    return _with_gradients(arguments, ("images",) if options["gradient"] else (), outer)


def _group_norm_silu(draw: _Draw) -> Inputs:
    options = dict(draw.variant.options)
    shape, channels = ACTIVATIONS[options["shape"]], ACTIVATIONS[options["shape"]][1]
    affine = {"both": ("weight", "bias"), "weight": ("weight",), "none": ()}[options["affine"]]
    arguments: dict[str, Any] = {
        "x": draw.normal(shape, mean=0.5),
        "num_groups": GROUPS[options["shape"]],
        "eps": 1e-5,
        "activation": options["activation"],
    }
    for name in affine:
        arguments[name] = draw.normal((channels,), scale=0.2, mean=1.0 if name == "weight" else 0.0)
    wrt = {"x": ("x",), "parameters": affine, "all": ("x", *affine), "none": ()}[options["wrt"]]
    return _with_gradients(arguments, wrt, draw.normal(shape))


def _geglu(draw: _Draw) -> Inputs:
    batch, tokens, width = TOKENS[draw.variant["shape"]]
    width = max(width, 2)  # two halves
    arguments: dict[str, Any] = {"x": draw.normal((batch, tokens, width))}
    wrt = ("x",) if draw.variant["gradient"] else ()
    return _with_gradients(arguments, wrt, draw.normal((batch, tokens, width // 2)))


def _ada_layer_norm(draw: _Draw) -> Inputs:
    options = dict(draw.variant.options)
    shape = batch, _, width = TOKENS[options["shape"]]
    scale, shift = (draw.normal((batch, 1, width), scale=0.3) for _ in range(2))
    if options["modulation"] == "chunks":
        # As networks have them: parts of one tensor.
        scale, shift = torch.cat((scale, shift), dim=1).chunk(2, dim=1)
    elif options["modulation"] == "float32" and draw.variant.dtype != torch.float64:
        scale, shift = scale.float().flatten(1), shift.float().flatten(1)
    arguments: dict[str, Any] = {"x": draw.normal(shape, mean=0.5), "scale": scale, "shift": shift}
    modulation = ("scale", "shift")
    wrt = {"x": ("x",), "modulation": modulation, "all": ("x", *modulation), "none": ()}[options["wrt"]]
    return _with_gradients(arguments, wrt, draw.normal(shape))


def _with_gradients(arguments: dict[str, Any], wrt: tuple[str, ...], outer: Tensor | None) -> Inputs:
    for name in wrt:
        arguments[name] = arguments[name].detach().requires_grad_()
    return Inputs({}, arguments, wrt, outer if wrt else None)
