"""Bytes that a trained network holds from step to step: weights, gradients, optimizer, average; whole or partitioned.

The partitioned sizes follow DeepSpeed 0.19, set to add gradients up in float32: `runtime/zero/stage_1_and_2.py` and
`runtime/bf16_optimizer.py` flatten all trained parameters into one buffer whose length is a multiple of twice the
number of processes; `runtime/zero/partition_parameters.py` pads each parameter to a multiple of that number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from diffpp_fast.errors import ConfigurationError
from diffpp_fast.training.build.networks import compute_dtype, start_is_copied, stored_weights
from diffpp_fast.training.build.run import batches_passes
from diffpp_fast.training.config import Config, Zero
from diffpp_fast.training.planning.architectures import Architectures
from diffpp_fast.training.planning.counting import Counted, NetworkSize
from diffpp_fast.training.prompts.encoder import CAPACITY

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
class PlannedRun:
    """A run of a configuration on so many GPUs, one process each; raises ConfigurationError where they can't share it.

    Attributes:
        architectures: of the configuration's networks.
    """

    config: Config
    architectures: Architectures
    gpus: int = 1

    def __post_init__(self) -> None:
        batch = self.config.training.global_batch
        if batch % self.gpus:
            raise ConfigurationError(
                f"training.global_batch is {batch}, which the {self.gpus} GPUs can't share equally: "
                f"choose a multiple of {self.gpus}"
            )

    @property
    def micro(self) -> int:
        """Samples that a GPU computes at a time."""
        training = self.config.training
        return min(training.micro_batch or training.global_batch, training.global_batch // self.gpus)

    @property
    def rounds(self) -> int:
        """Micro-batches of an update on a GPU."""
        return math.ceil(self.config.training.global_batch / self.gpus / self.micro)

    @property
    def normalizes_apart(self) -> bool:
        """Whether generator and reference are called once more for the mean that divides a whole update's gradients."""
        in_parts = self.micro < self.config.training.global_batch
        return in_parts and getattr(self.config.method, "normalizer", "sample") == "batch"

    @property
    def generator_calls(self) -> float:
        """Calls of the generator's network that make a sample of a loss, on the average."""
        generator = self.config.models.generator
        count = len(generator.times)
        return (count + 1) / 2 if generator.gradient_step == "random_exit" else count

    @property
    def reference_calls(self) -> float:
        """Calls of the reference in a generator's update, for each micro-batch, on the average."""
        method = self.config.method
        # Decoupled DMD asks for the output with the prompt at both of its noise levels. A spread reference is asked for
        # both outputs of a level in one call.
        guided = (method.guidance_scale != 1.0) * (2 if method.name == "decoupled_dmd" else 1)
        if guided and batches_passes(self.config):
            guided -= 1
        models = self.config.models
        as_start = method.pulled_to_start and models.generator.lora is None and not start_is_copied(models)
        return (1 + guided) * (1 + self.normalizes_apart) + as_start * self.generator_calls

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that networks compute in."""
        return compute_dtype("auto", self.config)

    @property
    def reference_width(self) -> int:
        """Bytes of an element of frozen weights."""
        return compute_dtype(self.config.models.reference.dtype, self.config).itemsize

    @property
    def is_spread(self) -> bool:
        """Whether DeepSpeed is the engine."""
        distributed = self.config.distributed
        return distributed.engine == "deepspeed" or distributed.needs_deepspeed or self.gpus > 1

    def zero(self, role: str) -> Zero:
        """Return how a trained network is spread: with stage 0 not at all."""
        zero: Zero = getattr(self.config.distributed, role)
        return zero if self.is_spread else Zero(stage=0)

    def optimizer(self, role: str) -> str:
        name: str = getattr(self.config.optimizers, role).name
        return name

    def averages(self, role: str) -> bool:
        """Return whether there is a moving average of the role's weights."""
        return role == "generator" and self.config.ema is not None


@dataclass(frozen=True)
class NetworkState:
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
        """The bytes that are there all the time."""
        return self.weights + self.master + self.optimizer + self.ema


def states_of(run: PlannedRun, counted: Counted) -> dict[str, NetworkState]:
    """Return the states of all roles on one GPU."""
    config, sizes, width = run.config, counted.sizes, run.reference_width
    states: dict[str, NetworkState] = {}
    held = {stored_weights(config.models, "reference")}  # frozen weights
    for role in ("generator", "fake"):
        backbone = None
        if getattr(config.models, role).lora is not None:
            # Adapters on weights that another role holds already add nothing but themselves.
            stored = stored_weights(config.models, role)
            backbone = 0 if stored in held else width * sizes[role].frozen
            held.add(stored)
        states[role] = trained_state(
            sizes[role],
            run.zero(role),
            run.gpus,
            low=config.precision == "bfloat16",
            optimizer=run.optimizer(role),
            ema=run.averages(role),
            backbone=backbone,
        )
    if config.models.reference.quantization is None:
        states["reference"] = frozen_state(sizes["reference"].elements, width, config.distributed.reference, run.gpus)
    else:
        states["reference"] = NetworkState(weights=sizes["reference"].frozen_bytes(width))
    if config.method.pulled_to_start and start_is_copied(config.models):
        reference = states["reference"]
        copied = reference.weights + width * sizes["generator"].elements
        states["reference"] = replace(reference, weights=copied)
    initial = config.models.generator.initial_lora
    if config.method.pulled_to_start and initial is not None and initial.keep:
        reference = states["reference"]
        states["reference"] = replace(reference, weights=reference.weights + FLOAT32 * sum(sizes["generator"].trained))
    if config.prompts.embeddings is None:
        states["text encoder"] = NetworkState(weights=counted.text_bytes, kept=CAPACITY)
    if config.models.decoder is not None:
        decoder = compute_dtype(config.models.decoder.dtype, config).itemsize * sizes["decoder"].elements
        states["decoder"] = NetworkState(weights=decoder)
    return states | {"reward": NetworkState(weights=counted.reward_bytes)}


def trained_state(
    size: NetworkSize,
    zero: Zero,
    gpus: int,
    *,
    low: bool,
    optimizer: str = "adamw",
    ema: bool = False,
    backbone: int | None = None,
) -> NetworkState:
    """Return the state of a role's network.

    Args:
        zero: with stage 0 every process has float32 weights, computed with under autocast in bfloat16.
        low: the run computes in bfloat16.
        optimizer, ema: its name, and whether there is an average.
        backbone: bytes of what is not trained; None: float32, as the few buffers of networks without adapters are.
    """
    backbone = FLOAT32 * size.frozen if backbone is None else backbone
    paged, elements = optimizer.startswith("paged"), sum(size.trained)
    if zero.stage == 0:
        moments = optimizer_bytes(optimizer, size.trained)
        return NetworkState(
            weights=FLOAT32 * elements + backbone,
            gradients=FLOAT32 * elements,
            optimizer=0 if paged else moments,
            ema=FLOAT32 * elements * ema,
            update=min(FLOAT32 * elements, REDUCED_AT_A_TIME) if gpus > 1 else 0,
            host=moments * paged,
        )
    if zero.stage == 3:
        partition = sum(math.ceil(count / gpus) for count in size.trained)
        padded = partition * gpus
        persistent = sum(count for count in size.trained if count <= LARGEST_PERSISTENT)
        gathered = min(MOST_WHOLE, elements - persistent)
    else:
        padded = math.ceil(elements / (ALIGNMENT * gpus)) * ALIGNMENT * gpus
        partition, persistent, gathered = padded // gpus, 0, 0
    width, part = 2 if low else FLOAT32, FLOAT32 * partition
    weights = width * (partition if zero.stage == 3 else padded)
    # Gradients are added up in float32. Stage 1 keeps all of them.
    gradients = FLOAT32 * padded if zero.stage == 1 else part
    moments, average = optimizer_bytes(optimizer, [partition]), part * ema
    updated_here, weights_here = zero.offload_optimizer == "none", zero.offload_parameters == "none"
    moments_here = updated_here and not paged
    return NetworkState(
        weights=weights * weights_here + width * persistent + backbone,
        master=part * updated_here,
        gradients=gradients * updated_here,
        optimizer=moments * moments_here,
        ema=average * updated_here,
        communication=_buckets(zero, low) + width * gathered,
        update=part if updated_here and not (low and zero.stage < 3) else 0,
        host=weights * (not weights_here)
        + (part + gradients + average) * (not updated_here)
        + moments * (not moments_here),
    )


def frozen_state(elements: int, width: int, place: str, gpus: int) -> NetworkState:
    """Return the state of an untrained network: whole, or a part on each GPU or in each process's host memory."""
    if place == "replica":
        return NetworkState(weights=width * elements)
    part, gathered = width * math.ceil(elements / gpus), width * min(elements, MOST_WHOLE)
    if place == "shard":
        return NetworkState(weights=part, communication=gathered)
    return NetworkState(communication=gathered, host=part)


def optimizer_bytes(name: str, elements: Sequence[int]) -> int:
    """Return the bytes of moments for tensors of these sizes. torch's AdamW has a float32 counter per tensor."""
    if name in ("adamw", "adamw_fused"):
        return sum(2 * FLOAT32 * count + FLOAT32 for count in elements)
    moments = 1 if name == "lion8bit" else 2
    small = sum(FLOAT32 * count for count in elements if count < SMALLEST_8BIT)
    large = [count for count in elements if count >= SMALLEST_8BIT]
    scaled = sum(count + FLOAT32 * math.ceil(count / BLOCK) for count in large)
    # A codebook of float32 per moment, common to all tensors.
    return moments * (small + scaled + (FLOAT32 * CODEBOOK if large else 0))


def _buckets(zero: Zero, low: bool) -> int:
    """Bytes of the buffers in which gradients are reduced, in float32 whatever the weights are."""
    if zero.stage == 1 and low:  # DeepSpeed's BF16_Optimizer reduces where gradients are added up
        return 0
    if zero.stage == 3:
        return FLOAT32 * zero.reduce_bucket_size
    # One fills while the other is sent; bfloat16 ones are sent as float32 copies.
    filled = zero.reduce_bucket_size * (2 if zero.overlap else 1)
    return 2 * filled + FLOAT32 * zero.reduce_bucket_size if low else FLOAT32 * filled
