"""What is measured: the table of cases, with the traffic of each beside it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from diffpp_fast.errors import ConfigurationError
from diffpp_fast.kernels import dispatch

#: Side of a reward model's input, in pixels.
REWARD_SIZE = 224


class Size(NamedTuple):
    """A shape that occurs in training; `quick` marks those of `--sizes quick`."""

    shape: tuple[int, ...]
    quick: bool = False
    prediction_type: str = "epsilon"


#: [B, C, H, W] at the sample sizes of Stable Diffusion 1.5 and XL, [B, C, T, H, W] of a 480p video autoencoder.
LATENTS = {
    "sd15-b1": Size((1, 4, 64, 64)),
    "sd15-b16": Size((16, 4, 64, 64), quick=True),
    "sdxl-b1": Size((1, 4, 128, 128)),
    "sdxl-b4": Size((4, 4, 128, 128)),
    "video-b1": Size((1, 16, 21, 60, 104), prediction_type="flow_prediction"),
}
#: [B, 3, H, W], a decoder's images before the reward model.
IMAGES = {
    "image-512-b2": Size((2, 3, 512, 512), quick=True),
    "image-1024-b1": Size((1, 3, 1024, 1024)),
}
#: [B, C, H, W] before the group norms of Stable Diffusion's autoencoder when it decodes 512 x 512.
VAE = {
    "vae-512x64": Size((1, 512, 64, 64), quick=True),
    "vae-512x128": Size((1, 512, 128, 128)),
    "vae-256x256": Size((1, 256, 256, 256)),
    "vae-128x256": Size((1, 128, 256, 256)),
    "vae-128x512": Size((1, 128, 512, 512)),
}
#: [B, C, H, W] before the first group norms of its U-Net, which is trained: the affine parameters get gradients too.
UNET = {"unet-320x64-b4": Size((4, 320, 64, 64))}
#: [B, N, 2 D] in the feed-forward layers of the same U-Net at 512 x 512 and of SDXL's at 1024 x 1024.
FEED_FORWARD = {
    "sd15-ff-4096": Size((1, 4096, 2560), quick=True),
    "sdxl-ff-1024-b4": Size((4, 1024, 10240)),
}
#: [B, N, D] in PixArt's blocks at 512 x 512 and 1024 x 1024.
TOKENS = {
    "pixart-1024": Size((1, 1024, 1152), quick=True),
    "pixart-4096-b4": Size((4, 4096, 1152)),
}

SIZES = {**LATENTS, **IMAGES, **VAE, **UNET, **FEED_FORWARD, **TOKENS}
SELECTIONS = ("quick", "latents", "full")


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
OUTPUTS = "fake cond uncond target"
FAMILIES = (
    Family("philox", "normal", ("drawn",), "-> eps", LATENTS),
    Family("add_noise", "", ("drawn",), "x0 -> x_t; grad_x_t -> grad_x0", LATENTS),
    Family("denoising_loss", "", BOTH, DENOISING, LATENTS),
    Family("denoising_loss", "weighted", ("stored",), DENOISING, LATENTS),
    Family("score_gap", "plain", ("none",), "fake cond -> gradient", LATENTS),
    Family("score_gap", "guided", ("none",), "fake cond uncond -> gradient", LATENTS),
    Family("score_gap", "guided mean_abs", BOTH, f"{OUTPUTS} -> gradient", LATENTS),
    Family("sid_loss", "guided", BOTH, f"{OUTPUTS} ->; {OUTPUTS} -> grad_fake grad_cond grad_uncond", LATENTS),
    Family("sim_loss", "guided", BOTH, f"{OUTPUTS} ->; {OUTPUTS} -> grad_fake grad_cond grad_uncond", LATENTS),
    Family(
        "reward_pixels",
        "bicubic",
        ("none",),
        "images -> pixels; images grad_pixels -> grad_images",
        IMAGES,
        LAYOUTS,
    ),
    Family("group_norm_silu", "frozen", ("none",), "x -> y; x grad_y -> grad_x", VAE, LAYOUTS),
    Family("group_norm_silu", "trained", ("none",), "x -> y; x grad_y -> grad_x", UNET, LAYOUTS),
    Family("geglu", "", ("none",), "x -> y; x grad_y -> grad_x", FEED_FORWARD),
    Family("ada_layer_norm", "", ("none",), "x -> y; x grad_y -> grad_x", TOKENS),
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
        """What the forward pass reads: how much of a cache one set of inputs takes."""
        reads = self.traffic.partition("->")[0]
        return itemsize * sum(self.elements(tensor) for tensor in reads.split())


def all_cases() -> Iterator[Case]:
    """Every case; those that share `unfused_code` are neighbours."""
    for family in FAMILIES:
        for name, size in family.sizes.items():
            for layout in family.layouts:
                for noise in family.noise:
                    traffic = family.traffic.replace("target", _target(size.prediction_type, noise))
                    yield Case(
                        family.op, family.variant, name, size.shape, layout, noise, size.prediction_type, traffic
                    )


#: Sides that no vector or block length divides; other operators take `SMALL_SHAPE`.
SMALL_SHAPES = {
    "reward_pixels": (1, 3, 37, 53),
    "group_norm_silu": (2, 64, 7, 9),
    "geglu": (2, 5, 46),
    "ada_layer_norm": (2, 5, 23),
}
SMALL_SHAPE = (2, 4, 13, 17)


def small(case: Case) -> Case:
    """The same case on small tensors."""
    return case._replace(size="small", shape=SMALL_SHAPES.get(case.op, SMALL_SHAPE))


def choose(ops: Sequence[str] | None, sizes: Sequence[str]) -> list[Case]:
    """The cases of these operators (None for all) at these sizes: names of `SIZES` or `SELECTIONS`.

    Raises:
        ConfigurationError: an unknown operator or size, or no case has both.
    """
    check_known("--ops", ops or (), dispatch.OPS)
    check_known("--sizes", sizes, (*SELECTIONS, *SIZES))
    chosen = [case for case in all_cases() if (not ops or case.op in ops) and _selected(case, sizes)]
    if not chosen:
        fitting = dict.fromkeys(case.size for case in all_cases() if not ops or case.op in ops)
        raise ConfigurationError(f"--sizes: none of {', '.join(sizes)} fits; for these operators: {', '.join(fitting)}")
    return chosen


def _selected(case: Case, sizes: Sequence[str]) -> bool:
    if case.size in sizes or "full" in sizes:
        return True
    return ("quick" in sizes and SIZES[case.size].quick) or ("latents" in sizes and case.size in LATENTS)


def check_known(option: str, names: Sequence[str], known: Sequence[str]) -> None:
    """Raises ConfigurationError for the first name that is not known."""
    for name in names:
        if name not in known:
            raise ConfigurationError(f"{option}: unknown {name!r}; known: {', '.join(known)}")


def _target(prediction_type: str, noise: str) -> str:
    """The tensors that the regression target is made of."""
    tensors = {"epsilon": ["eps"], "sample": ["x0"]}.get(prediction_type, ["x0", "eps"])
    return " ".join(tensor for tensor in tensors if tensor != "eps" or noise == "stored")
