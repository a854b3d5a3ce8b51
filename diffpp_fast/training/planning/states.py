"""Bytes that a trained network holds from step to step: weights, gradients, optimizer, average; whole or partitioned.

The partitioned sizes follow DeepSpeed 0.19, set to add gradients up in float32: `runtime/zero/stage_1_and_2.py` and
`runtime/bf16_optimizer.py` flatten all trained parameters into one buffer whose length is a multiple of twice the
number of processes; `runtime/zero/partition_parameters.py` pads each parameter to a multiple of that number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from diffpp_fast.training.planning.setup import Trained, Zero
from diffpp_fast.training.planning.step import Size

FLOAT32 = 4
#: bitsandbytes: tensors below so many elements keep float32 moments; others are scaled by blocks.
SMALLEST_8BIT, BLOCK, CODEBOOK = 4096, 256, 256
#: Elements that a part of stages 1 and 2 is a multiple of (`nccl_start_alignment_factor`).
ALIGNMENT = 2
#: Stage 3, DeepSpeed's defaults: elements of a weight that stays whole in every process, and of all that are whole at
#: once (`param_persistence_threshold`, `max_live_parameters`).
LARGEST_PERSISTENT, MOST_WHOLE = 100_000, 1_000_000_000
#: Stage 0: bytes of gradients that are averaged at a time.
REDUCED_AT_A_TIME = 2**28


@dataclass(frozen=True)
class State:
    """Bytes of one role on one GPU.

    Attributes:
        weights: as the network computes with them, frozen ones and buffers included; with stage 3 this process's part.
        master: float32 copies of them that the optimizer updates.
        gradients: at the end of the backward pass.
        optimizer: moments.
        ema: the moving average.
        communication: buckets, and whole parameters of stage 3, while the role computes.
        update: what the optimizer's step takes for itself.
        kept: the most that a text encoder's kept encodings take.
        host: what lies in the CPU's memory instead, or on disk.
    """

    weights: int = 0
    master: int = 0
    gradients: int = 0
    optimizer: int = 0
    ema: int = 0
    communication: int = 0
    update: int = 0
    kept: int = 0
    host: int = 0

    @property
    def resident(self) -> int:
        """What is there all the time."""
        return self.weights + self.master + self.optimizer + self.ema


def trained_state(
    size: Size, trained: Trained, gpus: int, low: bool, *, frozen: int | None = None, frozen_width: int = FLOAT32
) -> State:
    """Return the state of a role's network.

    Args:
        size: of the network.
        low: the run computes in bfloat16.
        frozen: elements that are not trained and that no other role holds; None: all that the network has.
        frozen_width: bytes of one of them under adapters.
    """
    spare = size.frozen if frozen is None else frozen
    # The few buffers of networks without adapters are float32.
    backbone = spare * (frozen_width if trained.lora is not None else FLOAT32)
    zero = trained.zero
    if zero is None or zero.stage == 0:
        return _replicated(size.trained, trained, backbone, gpus)
    parts = _Parts.of(size.trained, zero, gpus)
    width = 2 if low else FLOAT32
    away = _Away()
    optimizer_away, weights_away = zero.offload_optimizer != "none", zero.offload_parameters != "none"
    moments = optimizer_bytes(trained.optimizer, [parts.partition])
    return State(
        weights=away.unless(weights_away, width * parts.weights) + width * parts.persistent + backbone,
        master=away.unless(optimizer_away, FLOAT32 * parts.partition),
        # Gradients are added up in float32. Stage 1 keeps all of them.
        gradients=away.unless(optimizer_away, FLOAT32 * (parts.padded if zero.stage == 1 else parts.partition)),
        optimizer=away.unless(optimizer_away or trained.optimizer.startswith("paged"), moments),
        ema=away.unless(optimizer_away, FLOAT32 * parts.partition if trained.ema else 0),
        communication=_buckets(zero, low) + width * parts.gathered,
        update=0 if optimizer_away or (low and zero.stage < 3) else FLOAT32 * parts.partition,
        host=away.bytes,
    )


def _replicated(trained: Sequence[int], how: Trained, backbone: int, gpus: int) -> State:
    elements, moments = sum(trained), optimizer_bytes(how.optimizer, trained)
    paged = how.optimizer.startswith("paged")
    return State(
        weights=FLOAT32 * elements + backbone,
        gradients=FLOAT32 * elements,
        optimizer=0 if paged else moments,
        ema=FLOAT32 * elements if how.ema else 0,
        update=min(FLOAT32 * elements, REDUCED_AT_A_TIME) if gpus > 1 else 0,
        host=moments if paged else 0,
    )


def optimizer_bytes(name: str, elements: Sequence[int]) -> int:
    """Moments for tensors of these sizes. torch's AdamW has a float32 counter per tensor."""
    if name in ("adamw", "adamw_fused"):
        return sum(2 * FLOAT32 * count + FLOAT32 for count in elements)
    moments = 1 if name == "lion8bit" else 2
    small = sum(FLOAT32 * count for count in elements if count < SMALLEST_8BIT)
    large = [count for count in elements if count >= SMALLEST_8BIT]
    scaled = sum(count + FLOAT32 * math.ceil(count / BLOCK) for count in large)
    # A codebook of float32 per moment, common to all tensors.
    return moments * (small + scaled + (FLOAT32 * CODEBOOK if large else 0))


def frozen_state(elements: int, width: int, place: str, gpus: int) -> State:
    """Return the state of an untrained network: whole, or a part on each GPU or in each process's host memory."""
    if place == "replica":
        return State(weights=width * elements)
    part, gathered = width * math.ceil(elements / gpus), width * min(elements, MOST_WHOLE)
    if place == "shard":
        return State(weights=part, communication=gathered)
    return State(communication=gathered, host=part)


@dataclass
class _Away:
    """Adds up what is not on the GPU."""

    bytes: int = 0

    def unless(self, away: bool, size: int) -> int:
        self.bytes += size if away else 0
        return 0 if away else size


@dataclass(frozen=True)
class _Parts:
    """Elements of a network of which every process updates a part.

    Attributes:
        weights: that a process holds all the time.
        partition: its part.
        padded: all, with what makes the parts equal.
        gathered: that are whole for a time, at most.
        persistent: small ones that are whole all the time.
    """

    weights: int
    partition: int
    padded: int
    gathered: int = 0
    persistent: int = 0

    @classmethod
    def of(cls, trained: Sequence[int], zero: Zero, gpus: int) -> _Parts:
        if zero.stage < 3:
            padded = math.ceil(sum(trained) / (ALIGNMENT * gpus)) * ALIGNMENT * gpus
            return cls(padded, padded // gpus, padded)
        partition = sum(math.ceil(count / gpus) for count in trained)
        persistent = sum(count for count in trained if count <= LARGEST_PERSISTENT)
        gathered = min(MOST_WHOLE, sum(trained) - persistent)
        return cls(partition, partition, partition * gpus, gathered, persistent)


def _buckets(zero: Zero, low: bool) -> int:
    """Bytes of the buffers in which gradients are reduced, in float32 whatever the weights are."""
    if zero.stage == 1 and low:  # DeepSpeed's BF16_Optimizer reduces where gradients are added up
        return 0
    if zero.stage == 3:
        return FLOAT32 * zero.reduce_bucket
    # One fills while the other is sent; bfloat16 ones are sent as float32 copies.
    filled = zero.reduce_bucket * (2 if zero.overlap else 1)
    return 2 * filled + FLOAT32 * zero.reduce_bucket if low else FLOAT32 * filled
