"""The compiled host module: csrc/host/module.cpp."""

def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Four 32-bit words of the block with this counter and key."""

def axis_table(
    in_size: int, other_in_size: int, size: int, fit: str, filter: str, antialias: bool
) -> tuple[list[int], list[int], list[list[float]]]:
    """(first, count, weights) of the rows of a resize: row o sums weights[o][k] times pixel first[o] + k.

    The axis has `in_size` pixels, the image's other side `other_in_size`; fit and filter are those of
    `ops.reward_pixels`.

    Raises:
        ValueError: an unknown fit or filter, or a size below 1.
    """
