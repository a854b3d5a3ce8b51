"""An estimate of a step's time from counted operations, bytes and a GPU's datasheet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from diffpp_fast.errors import ConfigurationError
from diffpp_fast.training.planning.counting import Counted
from diffpp_fast.training.planning.states import PlannedRun


class Gpu(NamedTuple):
    """One GPU. Peaks are dense: datasheets that state them with sparsity are halved."""

    name: str
    memory: float  # GiB
    bfloat16: float  # TFLOP/s, tensor cores with float32 sums
    float32: float  # TFLOP/s, without tensor cores: what torch computes matrix products in unless TF32 is allowed
    bandwidth: float  # GB/s, of its memory
    link: float  # GB/s each way to GPUs of the same machine: half of what is stated for both ways
    source: str


GPUS = {
    "a100-40": Gpu("A100 SXM 40 GB", 40, 312, 19.5, 1555, 300, "NVIDIA A100 datasheet: NVLink 600 GB/s"),
    "a100-80": Gpu("A100 SXM 80 GB", 80, 312, 19.5, 2039, 300, "NVIDIA A100 datasheet: NVLink 600 GB/s"),
    "h100": Gpu("H100 SXM", 80, 989, 67, 3350, 450, "NVIDIA H100 datasheet: 1,979 with sparsity, NVLink 900 GB/s"),
    "h200": Gpu("H200 SXM", 141, 989, 67, 4800, 450, "NVIDIA H200 datasheet: 1,979 with sparsity, NVLink 900 GB/s"),
    "l40s": Gpu("L40S", 48, 362, 91.6, 864, 32, "NVIDIA L40S datasheet: 733 with sparsity, PCIe 4.0 x16 64 GB/s"),
    "rtx4090": Gpu("RTX 4090", 24, 165, 82.6, 1008, 32, "NVIDIA Ada architecture white paper, appendix A; PCIe 4.0"),
    "b200": Gpu("B200", 180, 2250, 75, 8000, 900, "NVIDIA HGX B200: 36 PFLOP/s with sparsity, 1.44 TB, for eight"),
}


def gpu_named(name: str) -> Gpu:
    """Return a GPU by its name; raises ConfigurationError for another one."""
    if name not in GPUS:
        raise ConfigurationError(f"--gpu: there is no {name!r}; known: {', '.join(GPUS)}")
    return GPUS[name]


#: The share of the peak that matrix products reach over a whole step. Training steps of UNets and diffusion
#: transformers in bfloat16 are usually reported at 0.3 to 0.5 of the dense peak: convolutions with few channels, norms
#: and activations in between, and launches take the rest. Measure yours and pass it.
EFFICIENCY = 0.4
#: The share of the datasheet's bandwidth that long copies reach, of memory and of links.
BANDWIDTH = 0.8
#: GB/s per GPU between machines: a 400 Gbit/s adapter for each two GPUs.
NETWORK = 25.0
#: Elements within which DeepSpeed's stage 3 keeps a gathered weight that is used again.
REUSED = 1_000_000_000
#: GB/s of PCIe 4.0 x16, each way, which offloading goes over.
HOST = 32.0
GPUS_OF_A_MACHINE = 8

#: Bytes that an update reads and writes per parameter: gradient, weight, moments.
UPDATE_BYTES = {"adamw": 28, "adamw_fused": 28, "adamw8bit": 16, "paged_adamw8bit": 16, "lion8bit": 14}
#: The average is read and written, and the weight read once more; the gradient is read for its norm.
EMA_BYTES, NORM_BYTES = 12, 4


@dataclass(frozen=True)
class StepTime:
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


def estimate(run: PlannedRun, counted: Counted, gpu: Gpu, efficiency: float, network: float) -> StepTime:
    """Return the time of a step: `fake_rounds` updates of the fake score and one of the generator."""
    repeats = {"generator": 1, "fake": run.config.method.fake_rounds}
    operations: Counter[torch.dtype] = Counter()
    for phase in counted.phases:
        times = repeats[phase.update]
        if run.config.method.share_samples and (phase.update, phase.name) == ("fake", "generator"):
            times -= 1
        for dtype, number in phase.operations.items():
            operations[dtype] += times * run.rounds * number
    peaks = {torch.float32: gpu.float32 * 1e12}
    compute = sum(number / peaks.get(dtype, gpu.bfloat16 * 1e12) for dtype, number in operations.items())
    sent = sum(times * _sent(run, counted, role) for role, times in repeats.items())
    host = sum(times * _to_host(run, counted, role) for role, times in repeats.items())
    # A ring goes through all GPUs of a machine before it leaves for the next one, over the adapters of all of them.
    link = gpu.link if run.gpus <= GPUS_OF_A_MACHINE else min(network * GPUS_OF_A_MACHINE, gpu.link)
    return StepTime(
        compute=compute / efficiency,
        update=sum(times * _update_seconds(run, counted, role, gpu) for role, times in repeats.items()),
        communication=sent / (link * BANDWIDTH * 1e9) + host / (HOST * BANDWIDTH * 1e9),
        operations=operations,
        sent=sent + host,
    )


def _update_seconds(run: PlannedRun, counted: Counted, role: str, gpu: Gpu) -> float:
    """The optimizer's pass over memory, on this process's part where it is partitioned."""
    count = sum(counted.sizes[role].trained) / (run.gpus if run.zero(role).stage else 1)
    per_parameter = UPDATE_BYTES[run.optimizer(role)] + NORM_BYTES + (EMA_BYTES if run.averages(role) else 0)
    return count * per_parameter / (gpu.bandwidth * BANDWIDTH * 1e9)


def _sent(run: PlannedRun, counted: Counted, role: str) -> int:
    """Bytes that a GPU sends to others in an update of `role`, with ring algorithms."""
    total = 0.0
    for other in ("generator", "fake"):
        stage, elements = run.zero(other).stage, sum(counted.sizes[other].trained)
        weights = elements * run.dtype.itemsize
        if other == role:
            # Float32 gradients. All-reduced once; with stage 2 in every micro-batch, though a process keeps but a part
            # of the sum; with stage 3 in every micro-batch, each part to its process alone.
            total += 4 * elements * {2: 2 * run.rounds, 3: run.rounds}.get(stage, 2)
            total += weights if stage in (1, 2) else 0
        if stage == 3:
            # Gathered for every forward pass, and in a backward pass those that were not used shortly before.
            calls: float = 1 if other == role else int(other == "generator" or role == "generator")
            calls += run.normalizes_apart * (role == other == "generator")
            calls *= run.generator_calls if other == "generator" else 1
            calls += run.config.method.images is not None and role == other == "generator"
            again = max(elements - REUSED // 2, 0) * run.dtype.itemsize if other == role else 0
            total += (weights * calls + again) * run.rounds
    if role == "generator" and run.config.distributed.reference != "replica":
        total += counted.sizes["reference"].elements * run.reference_width * run.reference_calls * run.rounds
    return int(total * (run.gpus - 1) / run.gpus)


def _to_host(run: PlannedRun, counted: Counted, role: str) -> int:
    """Bytes that go between a GPU and the CPU in an update of `role`."""
    total, zero = 0.0, run.zero(role)
    part = sum(counted.sizes[role].trained) // run.gpus
    if zero.offload_optimizer != "none":
        total += part * (4 * run.rounds + run.dtype.itemsize)  # gradients there, weights back
    if zero.offload_parameters != "none":
        total += part * run.dtype.itemsize * 2 * run.rounds
    if role == "generator" and run.config.distributed.reference == "offload":
        part = counted.sizes["reference"].elements // run.gpus
        total += part * run.reference_width * run.reference_calls * run.rounds
    return int(total)
