"""The place of each prompt's picture in a sample grid."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch


def columns_of(count: int) -> int:
    """Return how many columns make a grid as square as it gets, rather wide than high."""
    return math.isqrt(count - 1) + 1


def cells_of(pixels: torch.Tensor, count: int) -> Iterator[torch.Tensor]:
    """Yield the `count` pictures of a grid [H, W, 3], row by row."""
    columns = columns_of(count)
    rows = -(-count // columns)
    height, width = pixels.shape[0] // rows, pixels.shape[1] // columns
    for number in range(count):
        top, left = number // columns * height, number % columns * width
        yield pixels[top : top + height, left : left + width]
