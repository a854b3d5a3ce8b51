"""The table of cases that are measured, with the traffic of each beside it, and their inputs."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import backends, baselines
from diffpp_fast import selftest
from diffpp_fast.errors import ConfigurationError
from diffpp_fast.noise import Noise
from diffpp_fast.selftest import PIXEL_MEAN, PIXEL_STD, SHAPE, SHAPES, Call, Outputs, step

#: Side of a reward model's input, in pixels.
REWARD_SIZE = 224
#: Of the group norms of autoencoder and U-Net.
GROUPS = 32


class Size(NamedTuple):
    """A shape that occurs in training; `quick` marks those of `--sizes quick`.

    The large ones occur nowhere: a bfloat16 tensor of theirs has 256 MB or more, so that a GPU's caches and launches
    count for nothing. They belong to `--sizes large` alone.
    """

    shape: tuple[int, ...]
    quick: bool = False
    prediction_type: str = "epsilon"
    large: bool = False


#: [B, C, H, W] at the sample sizes of Stable Diffusion 1.5 and XL, [B, C, T, H, W] of a 480p video autoencoder.
LATENTS = {
    "sd15-b1": Size((1, 4, 64, 64)),
    "sd15-b16": Size((16, 4, 64, 64), quick=True),
    "sdxl-b1": Size((1, 4, 128, 128)),
    "sdxl-b4": Size((4, 4, 128, 128)),
    "video-b1": Size((1, 16, 21, 60, 104), prediction_type="flow_prediction"),
    "latents-256mb": Size((128, 16, 256, 256), large=True),
}
#: [B, 3, H, W], a decoder's images before the reward model.
IMAGES = {
    "image-512-b2": Size((2, 3, 512, 512), quick=True),
    "image-1024-b1": Size((1, 3, 1024, 1024)),
    "image-256mb": Size((43, 3, 1024, 1024), large=True),
}
#: [B, C, H, W] before the group norms of Stable Diffusion's autoencoder when it decodes 512 x 512.
VAE = {
    "vae-512x64": Size((1, 512, 64, 64), quick=True),
    "vae-512x128": Size((1, 512, 128, 128)),
    "vae-256x256": Size((1, 256, 256, 256)),
    "vae-128x256": Size((1, 128, 256, 256)),
    "vae-128x512": Size((1, 128, 512, 512)),
    "vae-256mb": Size((4, 128, 512, 512), large=True),
}
#: [B, C, H, W] before the first group norms of its U-Net, which is trained: the affine parameters get gradients too.
UNET = {"unet-320x64-b4": Size((4, 320, 64, 64))}
#: [B, N, 2 D] in the feed-forward layers of the same U-Net at 512 x 512 and of SDXL's at 1024 x 1024.
FEED_FORWARD = {
    "sd15-ff-4096": Size((1, 4096, 2560), quick=True),
    "sdxl-ff-1024-b4": Size((4, 1024, 10240)),
    "sdxl-ff-256mb": Size((13, 1024, 10240), large=True),
}
#: [B, N, D] in PixArt's blocks at 512 x 512 and 1024 x 1024.
TOKENS = {
    "pixart-1024": Size((1, 1024, 1152), quick=True),
    "pixart-4096-b4": Size((4, 4096, 1152)),
    "pixart-256mb": Size((28, 4096, 1152), large=True),
}
#: The same in the blocks of Stable Diffusion 3 and FLUX at 1024 x 1024.
WIDE_TOKENS = {
    "sd3-4096": Size((1, 4096, 1536), quick=True),
    "flux-4096": Size((1, 4096, 3072)),
    "flux-256mb": Size((11, 4096, 3072), large=True),
}
#: [B, T, H, D], the queries of FLUX at 1024 x 1024.
QUERIES = {
    "flux-heads-4096": Size((1, 4096, 24, 128), quick=True),
    "flux-heads-256mb": Size((11, 4096, 24, 128), large=True),
}

#: Those that work on samples, and take or draw noise.
LATENT_OPS = ("add_noise", "denoising_loss", "score_gap", "sid_loss", "sim_loss")

SIZES = {**LATENTS, **IMAGES, **VAE, **UNET, **FEED_FORWARD, **TOKENS, **WIDE_TOKENS, **QUERIES}
SELECTIONS = ("quick", "latents", "full", "large")


class Family(NamedTuple):
    """One operator in one variant, at several sizes.

    `traffic` is the least that memory has to carry, as "forward; backward", each "tensors read -> tensors written": a
    pass reads what it depends on once and writes its results once. Per-sample and per-channel values are too small
    to count. "target" stands for what the regression target is made of; noise that is drawn costs nothing.
    """

    op: str
    variant: str
    noise: tuple[str, ...]  # "stored": a tensor is given; "drawn": an address is given, or torch draws; "none"
    traffic: str
    sizes: dict[str, Size]
    layouts: tuple[str, ...] = ("contiguous",)


BOTH = ("stored", "drawn")
LAYOUTS = ("contiguous", "channels_last")
DENOISING = "prediction target -> residual; residual -> grad_prediction"
PIXELS = "images -> pixels; images grad_pixels -> grad_images"
OUTPUTS = "fake cond uncond target"
GATED = "residual branch -> hidden modulated; hidden branch grad_hidden grad_modulated -> grad_residual grad_branch"
FAMILIES = (
    Family("philox", "normal", ("drawn",), "-> eps", LATENTS),
    Family("add_noise", "", ("drawn",), "x0 -> x_t; grad_x_t -> grad_x0", LATENTS),
    Family("denoising_loss", "", BOTH, DENOISING, LATENTS),
    Family("denoising_loss", "weighted", ("stored",), DENOISING, LATENTS),
    Family("score_gap", "plain", ("none",), "fake cond -> gradient", LATENTS),
    Family("score_gap", "guided", ("none",), "fake cond uncond -> gradient", LATENTS),
    Family("score_gap", "guided mean_abs", BOTH, f"{OUTPUTS} -> gradient", LATENTS),
    Family("score_gap", "guided with reward", ("none",), "fake cond uncond reward_score -> gradient", LATENTS),
    Family("score_gap", "guided mean_abs with reward", ("stored",), f"{OUTPUTS} reward_score -> gradient", LATENTS),
    Family("sid_loss", "guided", BOTH, f"{OUTPUTS} ->; {OUTPUTS} -> grad_fake grad_cond grad_uncond", LATENTS),
    Family("sim_loss", "guided", BOTH, f"{OUTPUTS} ->; {OUTPUTS} -> grad_fake grad_cond grad_uncond", LATENTS),
    Family("reward_pixels", "bicubic", ("none",), PIXELS, IMAGES, LAYOUTS),
    Family("group_norm_silu", "frozen", ("none",), "x -> y; x grad_y -> grad_x", VAE, LAYOUTS),
    Family("group_norm_silu", "trained", ("none",), "x -> y; x grad_y -> grad_x", UNET, LAYOUTS),
    Family("geglu", "", ("none",), "x -> y; x grad_y -> grad_x", FEED_FORWARD),
    Family("ada_layer_norm", "", ("none",), "x -> y; x grad_y -> grad_x", TOKENS),
    Family("gated_residual_norm", "", ("none",), GATED, WIDE_TOKENS),
    Family("rms_norm_rope", "", ("none",), "x -> y; x grad_y -> grad_x", QUERIES),
)


class Case(NamedTuple):
    """One operator, variant, size, layout and kind of noise. dtype and number of threads are chosen at run time."""

    op: str
    variant: str
    size: str
    shape: tuple[int, ...]
    layout: str  # "contiguous" (NCHW) or "channels_last"
    noise: str  # "stored", "drawn" or "none"
    prediction_type: str
    traffic: str  # as in `Family`, with the target spelled out

    @property
    def name(self) -> str:
        """For people, unique among the cases."""
        noise = "" if self.noise == "none" or self.op == "philox" else f"{self.noise} noise"
        layout = "" if self.layout == "contiguous" else self.layout
        return " ".join(filter(None, (self.op, self.variant, noise, self.size, layout)))

    @property
    def unfused_code(self) -> tuple[str, ...]:
        """Equal for cases that torch.compile serves with the same code."""
        return self.op, self.variant, self.size, self.layout

    def elements(self, tensor: str) -> int:
        """Return the number of elements of a tensor named in `traffic`."""
        if tensor.removeprefix("grad_") == "pixels":
            return math.prod(self.shape[:2]) * REWARD_SIZE**2
        if self.op == "geglu" and tensor.removeprefix("grad_") == "y":
            return math.prod(self.shape) // 2
        return math.prod(self.shape)

    def bytes(self, itemsize: int) -> int:
        """The traffic of forward and backward, with `itemsize` bytes per element."""
        tensors = self.traffic.replace("->", " ").replace(";", " ").split()
        return itemsize * sum(self.elements(tensor) for tensor in tensors)

    def bytes_read(self, itemsize: int) -> int:
        """The traffic of the forward pass's reads: how much of a cache one set of inputs takes."""
        reads = self.traffic.partition("->")[0]
        return itemsize * sum(self.elements(tensor) for tensor in reads.split())


def all_cases(*, large: bool = False) -> Iterator[Case]:
    """Every case, of the large ones only where asked for; those that share `unfused_code` are neighbours."""
    for family in FAMILIES:
        for name, size in family.sizes.items():
            if size.large and not large:
                continue
            for layout in family.layouts:
                for noise in family.noise:
                    traffic = family.traffic.replace("target", _target(size.prediction_type, noise))
                    yield Case(
                        family.op, family.variant, name, size.shape, layout, noise, size.prediction_type, traffic
                    )


def small(case: Case) -> Case:
    """The same case on small tensors."""
    return case._replace(size="small", shape=SHAPES.get(case.op, SHAPE))


def choose(ops: Sequence[str] | None, sizes: Sequence[str]) -> list[Case]:
    """Return the cases of these operators (None for all) at these sizes: names of `SIZES` or `SELECTIONS`.

    Raises:
        ConfigurationError: an unknown operator or size, or no case has both.
    """
    check_known("--ops", ops or (), backends.OPS)
    check_known("--sizes", sizes, (*SELECTIONS, *SIZES))
    fitting = [case for case in all_cases(large=True) if not ops or case.op in ops]
    chosen = [case for case in fitting if _selected(case, sizes)]
    if not chosen:
        names = dict.fromkeys(case.size for case in fitting)
        raise ConfigurationError(f"--sizes: none of {', '.join(sizes)} fits; for these operators: {', '.join(names)}")
    return chosen


def _selected(case: Case, sizes: Sequence[str]) -> bool:
    size = SIZES[case.size]
    chosen = {"full": True, "latents": case.size in LATENTS, "quick": size.quick}
    if size.large:
        chosen = {"large": True}
    return case.size in sizes or any(chosen.get(selection, False) for selection in sizes)


def check_known(option: str, names: Sequence[str], known: Sequence[str]) -> None:
    """Raise ConfigurationError for the first name that is not known."""
    for name in names:
        if name not in known:
            raise ConfigurationError(f"{option}: unknown {name!r}; known: {', '.join(known)}")


def _target(prediction_type: str, noise: str) -> str:
    """Name the tensors that the regression target is made of."""
    tensors = {"epsilon": ["eps"], "sample": ["x0"]}.get(prediction_type, ["x0", "eps"])
    return " ".join(tensor for tensor in tensors if tensor != "eps" or noise == "stored")


# Inputs


@dataclass(frozen=True)
class Inputs:
    """One set of arguments: the operator's call, and the baseline's arguments by name; most tensors are in both."""

    call: Call
    unfused: dict[str, Any]

    @property
    def nbytes(self) -> int:
        """The bytes of all its tensors."""
        values = (*self.unfused.values(), *self.call.arguments.values(), self.call.outer)
        return sum(value.nbytes for value in {id(v): v for v in values if isinstance(v, Tensor)}.values())

    def fresh(self) -> Inputs:
        """The same tensors with leaves of their own."""
        call = self.call.fresh()
        return Inputs(call, {**self.unfused, **{name: call.arguments[name] for name in call.wrt}})

    def step_unfused(self, forward: Callable[..., Any]) -> Outputs:
        """Return the baseline's outputs and gradients."""
        return step(forward, self.unfused, self.call.wrt, self.call.outer)


def unfused(case: Case) -> Callable[..., Any]:
    """Return the baseline, to be called with `Inputs.unfused`."""
    names = {
        "philox": "normal",
        "score_gap": {
            "guided mean_abs": "score_gap_mean_abs",
            "guided with reward": "score_gap_with_reward",
            "guided mean_abs with reward": "score_gap_mean_abs_with_reward",
        }.get(case.variant, "score_gap"),
        "denoising_loss": "weighted_denoising_loss" if case.variant == "weighted" else "denoising_loss",
    }
    baseline: Callable[..., Any] = getattr(baselines, names.get(case.op, case.op))
    return baseline


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, index: int = 0) -> Inputs:
    """Return set number `index` of a case. On a GPU it is drawn there: on the CPU that takes longer than measuring."""
    options: dict[str, Any] = {}
    if case.op == "reward_pixels":
        options["size"] = REWARD_SIZE
    elif case.op == "group_norm_silu":
        options["groups"] = min(GROUPS, case.shape[1])
        options["wrt"] = "all" if case.variant == "trained" else "x"
    elif case.op in LATENT_OPS:
        options = {"prediction_type": case.prediction_type, "noise": "none" if case.noise == "none" else "stored"}
        options |= {"weight": case.variant == "weighted", "uncond": case.variant != "plain"}
        options["normalizer"] = "mean_abs" if case.op == "score_gap" and case.noise != "none" else None
        options["reward"] = "whole" if case.variant.endswith("with reward") else "none"
    place: dict[str, Any] = {"dtype": dtype, "layout": case.layout, "device": device, "drawn_on": device}
    call = selftest.make(case.op, case.shape, seed=f"{case.name} {index}", **place, **options)
    given = {**call.arguments, "dtype": dtype, "device": device}
    if case.op == "philox":
        given["shape"] = case.shape
    elif case.op == "reward_pixels":
        given |= {name: _per_channel(values, device) for name, values in (("mean", PIXEL_MEAN), ("std", PIXEL_STD))}
    elif "noise" in given:
        given["eps"] = given["noise"]
        if case.noise == "drawn":
            drawn = Noise(selftest.SEED, torch.arange(case.shape[0], device=device))
            call = replace(call, arguments={**call.arguments, "noise": drawn})
    names = inspect.signature(unfused(case)).parameters
    return Inputs(call, {name: value for name, value in given.items() if name in names})


def _per_channel(values: Sequence[float], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device).reshape(3, 1, 1)
