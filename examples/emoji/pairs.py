"""Pairs of pictures of which one is better, and why: what the preference judges learn from.

A fault is a function (images [B, 3, 64, 64] in [-1, 1], degrees: a sequence of [B] in [0, 1], generator) -> one tensor
of images for each of the degrees. What is random in it is drawn once, so that two degrees differ in nothing else. The
judge held out sees FAULTS, the one to optimise sees OTHER_FAULTS: none is in both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

Degrees = Sequence[torch.Tensor]
Fault = Callable[[torch.Tensor, Degrees, torch.Generator], list[torch.Tensor]]

LUMINANCE = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)


def per_picture(values: torch.Tensor) -> torch.Tensor:
    return values.view(-1, 1, 1, 1)


def blend(images: torch.Tensor, other: torch.Tensor, degrees: Degrees) -> list[torch.Tensor]:
    return [torch.lerp(images, other.expand_as(images), per_picture(degree)) for degree in degrees]


def grey(images: torch.Tensor) -> torch.Tensor:
    return (images * LUMINANCE).sum(1, keepdim=True)


def field(batch: int, channels: int, cells: int, generator: torch.Generator, size: int = 64) -> torch.Tensor:
    """Return smooth normal noise: [batch, channels, size, size], drawn on cells x cells."""
    coarse = torch.randn(batch, channels, cells, cells, generator=generator)
    return F.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=False)


def uniform(batch: int, low: float, high: float, generator: torch.Generator) -> torch.Tensor:
    return low + (high - low) * torch.rand(batch, generator=generator)


def blurred(images: torch.Tensor, degrees: Degrees, generator: torch.Generator) -> list[torch.Tensor]:
    """A Gaussian blur of up to 2.5 pixels."""
    offsets = torch.arange(-6, 7).float()
    found = []
    for degree in degrees:
        kernels = torch.exp(-0.5 * (offsets / (0.2 + 2.3 * degree).unsqueeze(1)) ** 2)
        kernels = (kernels / kernels.sum(1, keepdim=True)).repeat_interleave(3, 0)
        planes = F.pad(images, (6, 6, 6, 6), mode="replicate").flatten(0, 1).unsqueeze(0)
        planes = F.conv2d(planes, kernels.view(-1, 1, 1, 13), groups=len(kernels))
        planes = F.conv2d(planes, kernels.view(-1, 1, 13, 1), groups=len(kernels))
        found.append(planes.view_as(images))
    return found


def streaked(images: torch.Tensor, degrees: Degrees, generator: torch.Generator) -> list[torch.Tensor]:
    """Smeared along a line of up to 12 pixels of any direction."""
    angle = uniform(len(images), 0, math.pi, generator).view(-1, 1, 1, 1)
    way = torch.cat([angle.cos(), angle.sin()], 3) / 32
    identity = F.affine_grid(torch.eye(2, 3).expand(len(images), 2, 3), list(images.shape), align_corners=False)
    return [
        torch.stack(
            [
                F.grid_sample(
                    images,
                    identity + place * degree.view(-1, 1, 1, 1) * way,
                    padding_mode="border",
                    align_corners=False,
                )
                for place in (-6, -4.5, -3, -1.5, 0, 1.5, 3, 4.5, 6)
            ]
        ).mean(0)
        for degree in degrees
    ]


def pale(images: torch.Tensor, degrees: Degrees, generator: torch.Generator) -> list[torch.Tensor]:
    """Up to 90 % of the colour gone."""
    return blend(images, grey(images), [0.9 * degree for degree in degrees])


def turned_hue(images: torch.Tensor, degrees: Degrees, generator: torch.Generator) -> list[torch.Tensor]:
    """Hues turned by up to 150 degrees, either way."""
    way = torch.randint(0, 2, (len(images),), generator=generator) * 2.0 - 1
    axis = torch.ones(3) / math.sqrt(3)
    cross = torch.tensor([[0.0, -axis[2], axis[1]], [axis[2], 0.0, -axis[0]], [-axis[1], axis[0], 0.0]])
    found = []
    for degree in degrees:
        angle = (way * degree * math.radians(150)).view(-1, 1, 1)
        turn = angle.cos() * torch.eye(3) + angle.sin() * cross + (1 - angle.cos()) * torch.outer(axis, axis)
        found.append((turn @ images.flatten(2)).view_as(images))
    return found


def flat(images: torch.Tensor, degrees: Degrees, generator: torch.Generator) -> list[torch.Tensor]:
    """Contrast lost to one grey, up to 70 %."""
    ground = per_picture(uniform(len(images), -0.4, 0.9, generator))
    return blend(images, ground, [0.7 * degree for degree in degrees])


def holed(images: torch.Tensor, degrees: Degrees, generator: torch.Generator) -> list[torch.Tensor]:
    """White holes of any shape over up to 45 % of the picture."""
    mask = field(len(images), 1, 7, generator)
    found = []
    for degree in degrees:
        level = torch.stack([values.quantile(1 - 0.45 * share) for values, share in zip(mask, degree, strict=True)])
        opacity = ((mask - per_picture(level)) * 6).clamp(0, 1)
        found.append(torch.lerp(images, torch.ones_like(images), opacity))
    return found


def grainy(images: torch.Tensor, degrees: Degrees, generator: torch.Generator) -> list[torch.Tensor]:
    """Normal noise of up to 0.35, fine or of two pixels."""
    fine = torch.randn(images.shape, generator=generator)
    wide = field(len(images), 3, 32, generator)
    noise = torch.where(per_picture(torch.rand(len(images), generator=generator) < 0.5), fine, wide)
    return [images + per_picture(0.35 * degree) * noise for degree in degrees]


def blotched(images: torch.Tensor, degrees: Degrees, generator: torch.Generator) -> list[torch.Tensor]:
    """Smooth blotches of colour on the subject."""
    noise = field(len(images), 3, 9, generator)
    subject = (images.amin(1, keepdim=True) < 0.9).float()
    return [images + per_picture(0.7 * degree) * noise * subject for degree in degrees]


def bent(images: torch.Tensor, degrees: Degrees, generator: torch.Generator) -> list[torch.Tensor]:
    """Outlines bent by a smooth displacement of up to a dozen pixels."""
    shift = field(len(images), 2, 7, generator).permute(0, 2, 3, 1)
    identity = F.affine_grid(torch.eye(2, 3).expand(len(images), 2, 3), list(images.shape), align_corners=False)
    return [
        F.grid_sample(
            images, identity + 0.17 * degree.view(-1, 1, 1, 1) * shift, padding_mode="border", align_corners=False
        )
        for degree in degrees
    ]


def oversharpened(images: torch.Tensor, degrees: Degrees, generator: torch.Generator) -> list[torch.Tensor]:
    """Edges exaggerated up to fourfold, with seams: what a reward for crispness alone would end in."""
    soft = F.avg_pool2d(F.pad(images, (2, 2, 2, 2), mode="replicate"), 5, stride=1)
    return [images + per_picture(4 * degree) * (images - soft) for degree in degrees]


def textured(images: torch.Tensor, degrees: Degrees, generator: torch.Generator) -> list[torch.Tensor]:
    """A texture of strokes, 3 to 6 pixels wide, on the subject."""
    noise = field(len(images), 3, 18, generator) - field(len(images), 3, 9, generator)
    grey_too = torch.rand(len(images), generator=generator) < 0.5
    noise = torch.where(per_picture(grey_too), noise[:, :1].expand_as(noise), noise)
    inside = (images.amin(1, keepdim=True) < 0.9).float()
    return [images + per_picture(0.7 * degree) * noise * inside for degree in degrees]


def garish(images: torch.Tensor, degrees: Degrees, generator: torch.Generator) -> list[torch.Tensor]:
    """Colour up to 3.5 times as strong."""
    return [grey(images) + per_picture(1 + 2.5 * degree) * (images - grey(images)) for degree in degrees]


def shrunk(images: torch.Tensor, degrees: Degrees, generator: torch.Generator) -> list[torch.Tensor]:
    """Detail lost to as little as a fifth of the size."""
    found = []
    for degree in degrees:
        parts = []
        for image, share in zip(images.split(1), degree.tolist(), strict=True):
            small = F.interpolate(image, size=round(64 / (1 + 4 * share)), mode="area")
            parts.append(F.interpolate(small, size=64, mode="bilinear", align_corners=False))
        found.append(torch.cat(parts))
    return found


def faded(images: torch.Tensor, degrees: Degrees, generator: torch.Generator) -> list[torch.Tensor]:
    """Faded towards white, up to 75 %, and less where it is bright already."""
    return [1 - (1 - images) * per_picture(1 - 0.75 * degree) for degree in degrees]


def dirty(images: torch.Tensor, degrees: Degrees, generator: torch.Generator) -> list[torch.Tensor]:
    """The subject's colour mixed with its own mean: muddy."""
    subject = (images.amin(1, keepdim=True) < 0.9).float()
    mean = (images * subject).sum((2, 3), keepdim=True) / subject.sum((2, 3), keepdim=True).clamp(min=1)
    return [torch.lerp(images, mean.expand_as(images), per_picture(0.8 * degree) * subject) for degree in degrees]


def tinted(images: torch.Tensor, degrees: Degrees, generator: torch.Generator) -> list[torch.Tensor]:
    """Colours mixed with those of two swapped channels."""
    orders = torch.tensor([[1, 0, 2], [2, 1, 0], [0, 2, 1], [1, 2, 0], [2, 0, 1]])
    chosen = orders[torch.randint(len(orders), (len(images),), generator=generator)]
    swapped = images.gather(1, chosen.view(-1, 3, 1, 1).expand_as(images))
    return blend(images, swapped, degrees)


def cut(images: torch.Tensor, degrees: Degrees, generator: torch.Generator) -> list[torch.Tensor]:
    """Up to six white rectangles."""
    batch = len(images)
    places = torch.rand(batch, 6, 4, generator=generator)
    grid = torch.arange(64).float() / 64
    found = []
    for degree in degrees:
        size = 0.1 + 0.25 * degree.view(-1, 1, 1) * places[..., 2:].add(0.4)
        begin = places[..., :2] * (1 - size)
        inside = [
            (grid >= begin[..., axis : axis + 1]) & (grid < begin[..., axis : axis + 1] + size[..., axis : axis + 1])
            for axis in (0, 1)
        ]
        used = torch.arange(6) < (6 * degree).ceil().unsqueeze(1)
        hole = (inside[0].unsqueeze(3) & inside[1].unsqueeze(2) & used.view(batch, 6, 1, 1)).any(1, keepdim=True)
        found.append(images.masked_fill(hole, 1.0))
    return found


def speckled(images: torch.Tensor, degrees: Degrees, generator: torch.Generator) -> list[torch.Tensor]:
    """Up to a fifth of the pixels replaced by any colour."""
    chance = torch.rand(len(images), 1, 64, 64, generator=generator)
    colours = torch.rand(images.shape, generator=generator) * 2 - 1
    return [torch.where(chance < per_picture(0.2 * degree), colours, images) for degree in degrees]


def smeared(images: torch.Tensor, degrees: Degrees, generator: torch.Generator) -> list[torch.Tensor]:
    """Tiles of 8 pixels moved by up to 6, each on its own."""
    shift = torch.randn(len(images), 2, 8, 8, generator=generator)
    shift = F.interpolate(shift, size=64, mode="nearest").permute(0, 2, 3, 1)
    identity = F.affine_grid(torch.eye(2, 3).expand(len(images), 2, 3), list(images.shape), align_corners=False)
    return [
        F.grid_sample(
            images, identity + 0.12 * degree.view(-1, 1, 1, 1) * shift, padding_mode="border", align_corners=False
        )
        for degree in degrees
    ]


FAULTS: dict[str, Fault] = {
    fault.__name__: fault
    for fault in (
        blurred,
        streaked,
        pale,
        turned_hue,
        flat,
        holed,
        grainy,
        blotched,
        bent,
        oversharpened,
        textured,
        garish,
    )
}
OTHER_FAULTS: dict[str, Fault] = {
    fault.__name__: fault for fault in (shrunk, faded, dirty, tinted, cut, speckled, smeared)
}


def two_degrees(batch: int, generator: torch.Generator) -> list[torch.Tensor]:
    """Return a smaller and a larger degree for each of `batch` pictures, at least 0.2 apart; the smaller is often 0."""
    low = (uniform(batch, -0.6, 0.7, generator)).clamp(min=0)
    high = low + 0.2 + (0.8 - low) * torch.rand(batch, generator=generator)
    return [low, high]


def apply_fault(fault: Fault, images: torch.Tensor, degrees: Degrees, generator: torch.Generator) -> list[torch.Tensor]:
    """Return the pictures with that fault, in [-1, 1]; a degree of 0 leaves them as they are."""
    found = fault(images, degrees, generator)
    return [
        torch.where(per_picture(degree > 0), faulty, images).clamp(-1, 1)
        for degree, faulty in zip(degrees, found, strict=True)
    ]
