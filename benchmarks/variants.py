"""Every option of every operator, on small tensors: what is compiled ahead of time and checked on a GPU."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.backends import PREDICTION_TYPES
from diffpp_fast import selftest
from diffpp_fast.selftest import Call

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LAYOUTS = ("contiguous", "channels_last", "strided", "misaligned")
#: Samples that vector and block lengths divide, and that they don't; the even ones need several blocks. Here and below
#: a "one" has as many sizes of 1 as can be: Triton makes a constant of an argument that is 1.
LATENTS = {"even": (2, 4, 48, 64), "odd": (3, 5, 7, 9), "video": (2, 4, 3, 6, 8), "one": (1, 1, 1, 1)}
#: More and fewer pixels than the 24 x 24 that they become; of the last,
#: one pixel in channels_last is more than csrc's tile on GPUs.
IMAGES = {"shrink": (2, 3, 61, 43), "enlarge": (1, 3, 15, 19), "one": (1, 3, 1, 1), "channels": (1, 260, 3, 4)}
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

#: [B, T, H, D]: heads that fill tiles and that don't, long rows.
HEADS = {"even": (2, 9, 24, 128), "odd": (3, 5, 7, 90), "long": (2, 3, 2, 1024), "one": (1, 1, 1, 2)}

SHAPES: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    # A large one, from 2^20 elements on, is drawn by larger blocks.
    "philox": {**LATENTS, "large": (1, 4, 513, 512)},
    "reward_pixels": IMAGES,
    "group_norm_silu": ACTIVATIONS,
    "geglu": TOKENS,
    "ada_layer_norm": TOKENS,
    "gated_residual_norm": {**TOKENS, "long": (2, 3, 6144)},
    "rms_norm_rope": HEADS,
}

#: Their rows lie along the last dimension: channels_last means nothing to them.
TOKEN_OPS = ("geglu", "ada_layer_norm", "gated_residual_norm", "rms_norm_rope")
NOISES = ("drawn", "stored")
TARGET = {"noise": NOISES, "prediction_type": PREDICTION_TYPES}
LOSS = {**TARGET, "uncond": (True, False), "wrt": ("fake", "outputs", "all"), "shape": (*LATENTS,)}
#: The values that each option takes. dtype and layout come on top.
OPTIONS: Mapping[str, Mapping[str, Sequence[Any]]] = {
    "philox": {"draws": ("normal", "uniform", "integers"), "shape": (*LATENTS, "large")},
    "add_noise": {"noise": NOISES, "gradient": (True, False), "shape": (*LATENTS,)},
    "denoising_loss": {**TARGET, "weight": (False, True), "gradient": (True, False), "shape": (*LATENTS,)},
    "score_gap": {
        "noise": ("none", *NOISES),
        "prediction_type": PREDICTION_TYPES,
        "uncond": (True, False),
        "normalizer": (None, "mean_abs"),
        "scale": ("number", "tensor"),
        "reward": ("none", "whole", "clipped"),
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
        "added": ("nothing", "residual", "offset"),
        "wrt": ("x", "parameters", "all", "none"),
        "shape": (*ACTIVATIONS,),
    },
    "geglu": {"gradient": (True, False), "shape": (*TOKENS,)},
    "ada_layer_norm": {
        "wrt": ("x", "modulation", "all", "none"),
        "modulation": ("rows", "chunks", "float32"),
        "shape": (*TOKENS,),
    },
    "gated_residual_norm": {
        "norm": ("layer", "rms"),
        "wrt": ("inputs", "modulation", "all", "none"),
        "modulation": ("rows", "tokens", "float32", "scale"),
        "affine": (False, True),
        "shape": (*TOKENS,),
    },
    "rms_norm_rope": {
        "interleaved": (True, False),
        "sequence_dim": (1, 2),
        "affine": (True, False),
        "wrt": ("x", "weight", "all", "none"),
        "positions": ("shared", "own"),
        "shape": (*HEADS,),
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
    """Yield all combinations of all options that make sense."""
    factors: dict[str, Sequence[Any]] = {**OPTIONS[op], "dtype": dtypes, "layout": LAYOUTS}
    for values in itertools.product(*factors.values()):
        variant = Variant(op, tuple(zip(factors, values, strict=True)))
        if _makes_sense(variant):
            yield variant


def ordered(op: str, dtypes: Sequence[torch.dtype] = DTYPES) -> tuple[list[Variant], int]:
    """Return all combinations, and how many of the first hold every pair of values that occurs in any.

    Faults of a kernel lie in one option or in two together far more often than in three.
    """
    rest = list(every(op, dtypes))
    pairs = {variant: {*itertools.combinations(variant.options, 2), *_three(variant)} for variant in rest}
    missing = set().union(*pairs.values())
    chosen: list[Variant] = []
    while missing:
        best = max(rest, key=lambda variant: len(pairs[variant] & missing))
        missing -= pairs[best]
        chosen.append(best)
        rest.remove(best)
    return chosen + rest, len(chosen)


def _three(variant: Variant) -> Iterator[tuple[Any, ...]]:
    """Yield what goes a way of its own only together.

    Noise drawn in channels_last goes by whole Philox blocks, the gradient of large groups by clusters, by layout, and a
    score gap's normaliser by packs where there is no reward.
    """
    options = dict(variant.options)
    if "activation" in options and options["wrt"] == "x" and options["layout"] in ("contiguous", "channels_last"):
        yield "clusters", variant.dtype, options["layout"], options["shape"], options["activation"]
    if [options.get(name) for name in ("noise", "layout", "shape")] == ["drawn", "channels_last", "even"]:
        yield "tiles", variant.dtype
    if [options.get(name) for name in ("normalizer", "reward", "layout", "shape")] == [
        "mean_abs",
        "none",
        "contiguous",
        "even",
    ]:
        yield "packs", variant.dtype


def make(variant: Variant, device: torch.device) -> Call:
    """Return its call; the values do not depend on the device."""
    options = dict(variant.options)
    place: dict[str, Any] = {"dtype": options.pop("dtype"), "layout": options.pop("layout"), "device": device}
    name = options.pop("shape")
    shape: tuple[int, ...] = SHAPES.get(variant.op, LATENTS)[name]
    if variant.op == "geglu":
        shape = (*shape[:2], max(shape[2], 2))  # two halves
    elif variant.op == "group_norm_silu":
        options["groups"] = GROUPS[name]
    return selftest.make(variant.op, shape, seed=variant.name, **place, **options)


def _makes_sense(variant: Variant) -> bool:
    options = dict(variant.options)
    if variant.op == "philox":
        return options["layout"] == "contiguous" and (
            options["draws"] == "normal" or (options["shape"], options["dtype"]) == ("even", torch.float32)
        )
    if options["layout"] == "channels_last" and (options["shape"] == "video" or variant.op in TOKEN_OPS):
        return False
    if variant.op == "score_gap" and options["reward"] != "none" and options["prediction_type"] == "v_prediction":
        return False  # A target is made before the reward is looked at: those of the other types are enough.
    if variant.op == "score_gap" and options["noise"] == "none":
        return options["normalizer"] is None and options["prediction_type"] == "epsilon"
    if variant.op == "group_norm_silu":
        # Of a group's only channel the norm takes any offset away: its gradient is rounding.
        alone = options["added"] == "offset" and SHAPES[variant.op][options["shape"]][1] == GROUPS[options["shape"]]
        return not alone and (options["affine"], options["wrt"]) != ("none", "parameters")
    if variant.op == "rms_norm_rope" and not options["affine"]:
        return options["wrt"] != "weight"
    return True
