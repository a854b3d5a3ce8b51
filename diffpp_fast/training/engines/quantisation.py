"""Optimizer state of 8 bits: numbers of a table of 256, scaled block by block."""

from __future__ import annotations

import torch

#: Numbers that share a scale, in bitsandbytes' optimizers.
BLOCK = 256
#: Numbers that are worked on at a time, so that the intermediate results stay small.
CHUNK = 2**14 * BLOCK


def dequantise(codes: torch.Tensor, table: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The numbers behind uint8 codes: their entries in `table` [256] times the scale [ceil(n / 256)] of their block.

    Returns float32, of the shape of the codes.
    """
    values = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    parts = zip(codes.reshape(-1).split(CHUNK), scales.split(CHUNK // BLOCK), values.view(-1).split(CHUNK), strict=True)
    for part, scale, result in parts:
        result.copy_((_blocks(table[part.int()]) * scale[:, None]).reshape(-1)[: len(part)])
    return values


def quantise(values: torch.Tensor, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest codes, and the scales: such that what came out of `dequantise` comes out of it again, to the bit.

    A block's scale is its largest magnitude where that is a positive number. The table's ends are not symmetric (1
    and about -0.993), so that the scale of a block whose largest number is negative lies above it; without this the
    state would shrink a little with every save.

    Returns uint8 codes of the shape of `values`, and float32 scales [ceil(n / 256)].
    """
    parts = [_quantise_blocks(_blocks(part.float()), table) for part in values.reshape(-1).split(CHUNK)]
    codes = torch.cat([codes.reshape(-1) for codes, _ in parts])
    return codes[: values.numel()].view(values.shape), torch.cat([scales for _, scales in parts])


def _quantise_blocks(blocks: torch.Tensor, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 codes [blocks, 256] and scales [blocks]."""
    largest = blocks.abs().amax(dim=1)
    scales = largest.clone()
    codes = _nearest(blocks, table, scales)
    if table[0] < 0:
        # The quotient is rounded, and so was the product that it undoes: it is one place off at most.
        quotient = largest / -table[0]
        for candidate in (quotient, quotient.nextafter(largest), quotient.nextafter(2 * quotient)):
            rows = ((table[codes.int()] * scales[:, None]) != blocks).any(dim=1).nonzero().squeeze(1)
            tried = _nearest(blocks[rows], table, candidate[rows])
            exact = ((table[tried.int()] * candidate[rows, None]) == blocks[rows]).all(dim=1)
            codes[rows[exact]], scales[rows[exact]] = tried[exact], candidate[rows[exact]]
    return codes, scales


def _nearest(blocks: torch.Tensor, table: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The codes of the nearest entries of the ascending table, uint8 [blocks, 256]."""
    shares = blocks / torch.where(scales > 0, scales, 1.0)[:, None]
    return torch.bucketize(shares, (table[1:] + table[:-1]) / 2).to(torch.uint8)


def _blocks(values: torch.Tensor) -> torch.Tensor:
    """[n] -> [ceil(n / 256), 256], with zeros at the end."""
    return torch.nn.functional.pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK)
