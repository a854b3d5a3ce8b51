"""GPUs by name: what their datasheets say."""

from __future__ import annotations

from typing import NamedTuple

from diffpp_fast.errors import ConfigurationError


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
    "rtx4090": Gpu(
        "RTX 4090", 24, 165, 82.6, 1008, 32, "NVIDIA Ada GPU architecture white paper, appendix A; PCIe 4.0"
    ),
    "b200": Gpu("B200", 180, 2250, 75, 8000, 900, "NVIDIA HGX B200: 36 PFLOP/s with sparsity, 1.44 TB, for eight"),
}


def gpu(name: str) -> Gpu:
    """Raises ConfigurationError for another name."""
    if name not in GPUS:
        raise ConfigurationError(f"--gpu: there is no {name!r}; known: {', '.join(GPUS)}")
    return GPUS[name]
