"""What a plan is made for: the networks and all settings that change memory or time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from diffpp_fast.errors import ConfigurationError
from diffpp_fast.training.planning.models import Models
from diffpp_fast.training.planning.rewards import Towers

Place = Literal["none", "cpu", "nvme"]
Spread = Literal["replica", "shard", "offload"]
OPTIMIZERS = ("adamw", "adamw_fused", "adamw8bit", "paged_adamw8bit", "lion8bit")


@dataclass(frozen=True)
class Zero:
    """How a trained network is spread over processes.

    Attributes:
        stage: 0 to 3.
        offload_optimizer, offload_parameters: where this process's part lies.
        overlap: reduce while computing.
        reduce_bucket: elements of gradients that are reduced at a time.
    """

    stage: int
    offload_optimizer: Place = "none"
    offload_parameters: Place = "none"
    overlap: bool = True
    reduce_bucket: int = 50_000_000


@dataclass(frozen=True)
class Lora:
    rank: int
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")


@dataclass(frozen=True)
class Trained:
    """How a role is trained. Without `zero`, or with stage 0: float32 weights in every process, computed with under
    autocast in bfloat16."""

    optimizer: str = "adamw"
    ema: bool = False
    lora: Lora | None = None
    zero: Zero | None = None


@dataclass(frozen=True)
class Setup:
    """A run.

    Attributes:
        generator, fake: how they are trained.
        gpus: processes, one GPU each.
        global_batch, micro_batch: samples of an update, and of them those that a GPU computes at a time.
        reference: "replica" on every GPU, "shard" among them, or "offload" to the CPU between its uses.
        reference_dtype, decoder_dtype: of weights and of what is computed with them; None: the run's precision.
        text_resident: the text encoders stay on the GPU; False where embeddings are read from files.
        rewards: what scores the images; None without a reward. `held_out` scores those of the sample grids.
        method: its name in a configuration.
        guided: the reference is called with the prompt and without.
        fake_guided: the fake score, too, in both updates.
        guidance_outside: of Diff-Instruct*, the call without prompt needs no gradient.
    """

    models: Models
    generator: Trained = Trained(ema=True)
    fake: Trained = Trained()
    gpus: int = 1
    global_batch: int = 8
    micro_batch: int | None = None
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    reference: Spread = "replica"
    reference_dtype: torch.dtype | None = None
    decoder_dtype: torch.dtype | None = None
    activation_checkpointing: bool = False
    fuse: bool = True
    decoder_checkpoint: bool = False
    text_resident: bool = True
    rewards: Towers | None = None
    held_out: Towers | None = None
    method: str = "diff_instruct_pp"
    guided: bool = True
    fake_guided: bool = False
    guidance_outside: bool = False
    fake_rounds: int = 1

    def __post_init__(self) -> None:
        if self.gpus < 1 or self.global_batch < 1 or (self.micro_batch or 1) < 1:
            raise ConfigurationError("a plan needs at least one GPU and one sample")
        if self.global_batch % self.gpus:
            raise ConfigurationError(
                f"training.global_batch is {self.global_batch}, which the {self.gpus} GPUs can't share equally: "
                f"choose a multiple of {self.gpus}"
            )
        for role, trained in (("generator", self.generator), ("fake", self.fake)):
            if trained.optimizer not in OPTIMIZERS:
                raise ConfigurationError(
                    f"optimizers.{role}.name: unknown {trained.optimizer!r}; known: {', '.join(OPTIMIZERS)}"
                )
            if trained.zero is not None and trained.zero.stage not in (0, 1, 2, 3):
                raise ConfigurationError(f"distributed.{role}.stage must be 0, 1, 2 or 3, got {trained.zero.stage}")

    @property
    def dtype(self) -> torch.dtype:
        """That networks are computed in."""
        return torch.bfloat16 if self.precision == "bfloat16" else torch.float32

    @property
    def reference_calls(self) -> int:
        """In a generator's update, for each micro-batch."""
        # Decoupled DMD asks for the output with the prompt at both of its noise levels.
        return 1 + self.guided * (2 if self.method == "decoupled_dmd" else 1)

    @property
    def micro(self) -> int:
        """Samples that a GPU computes at a time."""
        return min(self.micro_batch or self.global_batch, self.global_batch // self.gpus)

    @property
    def rounds(self) -> int:
        """Micro-batches of an update on a GPU."""
        return math.ceil(self.global_batch / self.gpus / self.micro)
