"""An estimate of a step's time from counted operations, bytes and a GPU's datasheet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from diffpp_fast.training.planning.gpus import Gpu
from diffpp_fast.training.planning.setup import Setup, Trained
from diffpp_fast.training.planning.step import Counted

#: The share of the peak that matrix products reach over a whole step. Training steps of UNets and diffusion
#: transformers in bfloat16 are usually reported at 0.3 to 0.5 of the dense peak: convolutions with few channels, norms
#: and activations in between, and launches take the rest. Measure yours and pass it.
EFFICIENCY = 0.4
#: The share of the datasheet's bandwidth that long copies reach, of memory and of links.
BANDWIDTH = 0.8
#: GB/s per GPU between machines: a 400 Gbit/s adapter for each two GPUs.
NETWORK = 25.0
#: GB/s of PCIe 4.0 x16, each way, which offloading goes over.
HOST = 32.0
GPUS_OF_A_MACHINE = 8

#: Bytes that an update reads and writes per parameter: gradient, weight, moments.
UPDATE_BYTES = {"adamw": 28, "adamw_fused": 28, "adamw8bit": 16, "paged_adamw8bit": 16, "lion8bit": 14}
#: The average is read and written, and the weight read once more; the gradient is read for its norm.
EMA_BYTES, NORM_BYTES = 12, 4


@dataclass(frozen=True)
class Time:
    """Seconds of a step, one after another, and what they are made of.

    Attributes:
        operations: per GPU, by dtype, of all micro-batches and rounds.
        sent: bytes per GPU to others and, with offloading, to the CPU.
    """

    compute: float
    update: float
    communication: float
    operations: Mapping[torch.dtype, int]
    sent: int

    @property
    def seconds(self) -> float:
        return self.compute + self.update + self.communication


def estimate(setup: Setup, counted: Counted, gpu: Gpu, efficiency: float, network: float) -> Time:
    """A step: `fake_rounds` updates of the fake score and one of the generator."""
    repeats = {"generator": 1, "fake": setup.fake_rounds}
    operations: Counter[torch.dtype] = Counter()
    for phase in counted.phases:
        for dtype, number in phase.operations.items():
            operations[dtype] += repeats[phase.update] * setup.rounds * number
    peaks = {torch.float32: gpu.float32 * 1e12}
    compute = sum(number / peaks.get(dtype, gpu.bfloat16 * 1e12) for dtype, number in operations.items())
    update = sum(
        times * _update_seconds(counted.sizes[role].trained, getattr(setup, role), setup.gpus, gpu)
        for role, times in repeats.items()
    )
    sent = sum(times * _sent(setup, counted, role) for role, times in repeats.items())
    host = sum(times * _to_host(setup, counted, role) for role, times in repeats.items())
    link = gpu.link if setup.gpus <= GPUS_OF_A_MACHINE else min(network, gpu.link)
    return Time(
        compute=compute / efficiency,
        update=update,
        communication=sent / (link * BANDWIDTH * 1e9) + host / (HOST * BANDWIDTH * 1e9),
        operations=operations,
        sent=sent + host,
    )


def _update_seconds(elements: tuple[int, ...], trained: Trained, gpus: int, gpu: Gpu) -> float:
    """The optimizer's pass over memory, on this process's part where it is partitioned."""
    count = sum(elements) / (gpus if _stage(trained) else 1)
    per_parameter = UPDATE_BYTES[trained.optimizer] + NORM_BYTES + (EMA_BYTES if trained.ema else 0)
    return count * per_parameter / (gpu.bandwidth * BANDWIDTH * 1e9)


def _sent(setup: Setup, counted: Counted, role: str) -> int:
    """Bytes that a GPU sends to others in an update of `role`, with ring algorithms."""
    share = (setup.gpus - 1) / setup.gpus
    total = 0
    for other in ("generator", "fake"):
        stage, elements = _stage(getattr(setup, other)), sum(counted.sizes[other].trained)
        weights = elements * setup.dtype.itemsize
        if other == role:
            total += _gradient_traffic(stage, elements, setup.rounds)
            total += weights if stage in (1, 2) else 0
        if stage == 3:
            # Gathered for every forward pass, and once more for a backward pass.
            calls = 2 if other == role else int(other == "generator" or role == "generator")
            total += weights * calls * setup.rounds
    if role == "generator" and setup.reference != "replica":
        width = (setup.reference_dtype or setup.dtype).itemsize
        total += counted.sizes["reference"].elements * width * setup.reference_calls * setup.rounds
    return int(total * share)


def _gradient_traffic(stage: int, elements: int, rounds: int) -> int:
    """Float32 gradients: averaged everywhere once; with stages 2 and 3 every micro-batch, each part on its process."""
    return 4 * elements * (2 if stage < 2 else rounds)


def _to_host(setup: Setup, counted: Counted, role: str) -> int:
    """Bytes that go between a GPU and the CPU in an update of `role`."""
    total, trained = 0, getattr(setup, role)
    part = sum(counted.sizes[role].trained) // setup.gpus
    if trained.zero is not None and trained.zero.offload_optimizer != "none":
        total += part * (4 * setup.rounds + setup.dtype.itemsize)  # gradients there, weights back
    if trained.zero is not None and trained.zero.offload_parameters != "none":
        total += part * setup.dtype.itemsize * 2 * setup.rounds
    if role == "generator" and setup.reference == "offload":
        part = counted.sizes["reference"].elements // setup.gpus
        total += part * (setup.reference_dtype or setup.dtype).itemsize * setup.reference_calls * setup.rounds
    return total


def _stage(trained: Trained) -> int:
    return 0 if trained.zero is None else trained.zero.stage
