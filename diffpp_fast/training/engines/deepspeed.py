"""Networks spread over processes by DeepSpeed's ZeRO: trained ones, stages 1 to 3, and the frozen reference."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from diffpp_fast import install
from diffpp_fast.errors import ConfigurationError
from diffpp_fast.training import config
from diffpp_fast.training.distributed import World
from diffpp_fast.training.engines.base import NORM_FLOOR, Engine
from diffpp_fast.training.engines.optimizers import make_optimizer
from diffpp_fast.training.engines.shards import Shards, start_together
from diffpp_fast.training.engines.zero import Zero3Shards, Zero12Shards, compile_nothing
from diffpp_fast.training.launch import ProcessPlace, pretend_launch


def import_deepspeed(world: World) -> Any:
    """DeepSpeed, ready for these processes; raises ConfigurationError where it is not installed.

    It logs warnings only, and compiles nothing: its own collectives for the CPU would take minutes. In one process that
    no launcher has started it gets a process group and variables of its own, the latter until `World.close`.
    """
    if world.device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # it reads this once, when it is imported
    os.environ.setdefault("DS_LOG_LEVEL", "warning")
    try:
        import deepspeed
    except ImportError as error:
        raise ConfigurationError(
            f"this run needs DeepSpeed: DS_BUILD_OPS=0 {install.extra('distributed')} ({error}). In one process that "
            "offloads nothing, distributed.engine=plain does without"
        ) from None
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    compile_nothing(deepspeed)
    pretend_launch(ProcessPlace(world.rank, world.size, world.local_rank))
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=world.rank, world_size=world.size)
    return deepspeed


def zero_config(zero: config.Zero, *, bfloat16: bool, clip: float | None, nvme_path: str | None) -> dict[str, Any]:
    """DeepSpeed's configuration of one trained network."""
    stage: dict[str, Any] = {
        "stage": zero.stage,
        "overlap_comm": zero.overlap,
        "contiguous_gradients": True,
        "reduce_bucket_size": zero.reduce_bucket_size,
    }
    if zero.stage == 3:
        stage["stage3_prefetch_bucket_size"] = zero.prefetch_bucket_size
    else:
        stage["allgather_bucket_size"] = zero.allgather_bucket_size
    for key, device in (("offload_optimizer", zero.offload_optimizer), ("offload_param", zero.offload_parameters)):
        if device != "none":
            stage[key] = {"device": device, "pin_memory": torch.cuda.is_available()}
            if device == "nvme":
                stage[key]["nvme_path"] = nvme_path
    return {
        # The trainer says what a micro-batch is, and which is an update's last.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # Where this is not written, DeepSpeed clips at 1.
        "gradient_clipping": clip or 0.0,
        "zero_allow_untested_optimizer": True,
        # torch's fused AdamW updates on the CPU, too, and needs no compiler.
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": bfloat16},
        # Whatever the weights are, gradients are added up in float32: over micro-batches and over processes.
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": stage,
    }


@dataclass(eq=False, repr=False, kw_only=True)
class DeepSpeedEngine(Engine):
    """A trained network whose float32 weights, optimizer state and average are spread over the processes.

    With bfloat16 the network computes with a bfloat16 copy of the weights; they start as they were in float32. At the
    start the weights of rank 0 are everyone's. A weight that a loss does not reach is treated as having gradient 0,
    so that weight decay shrinks it.

    Args: see `Engine`, and
        zero: stage, offloading and buckets.
        bfloat16: compute in bfloat16.
        nvme_path: a folder for what is offloaded to nvme.

    Raises ConfigurationError where DeepSpeed is missing, and for stage 3 on a part of a network.
    """

    zero: config.Zero
    bfloat16: bool = False
    nvme_path: str | None = None

    def __post_init__(self) -> None:
        trained = set(map(id, self.parameters.values()))
        if self.zero.stage == 3 and {id(weight) for weight in self.network.parameters()} != trained:
            raise ConfigurationError(
                f"distributed.{self.role}.stage is 3, but only {len(self.parameters)} of the network's weights are "
                "trained: stage 3 spreads whole networks, and the rest of this one may serve another role. Use stage "
                "2; the weights that are trained are few"
            )
        # DeepSpeed shortens gradients and never lengthens them: those to be of norm 1 come to it long, and are clipped.
        self._raise = 1.0 / NORM_FLOOR if self.settings.normalize else 1.0
        clip = 1.0 if self.settings.normalize else self.settings.clip
        self._config = zero_config(self.zero, bfloat16=self.bfloat16, clip=clip, nvme_path=self.nvme_path)
        super().__post_init__()

    def _spread(self) -> tuple[Shards, torch.optim.Optimizer]:
        deepspeed = import_deepspeed(self.world)
        start_together(self.parameters, self.world)
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        exact = {name: parameter.detach().to("cpu", copy=True) for name, parameter in self.parameters.items()}
        # Stage 3 gathers a module's weights when it is called; the other stages need to know of the weights only.
        module = self.network if self.zero.stage == 3 else _Weights(self.parameters)
        optimizer = make_optimizer(module.parameters(), self.settings)
        # Its bfloat16 optimizer prints how much memory it takes.
        with redirect_stdout(StringIO()):
            self._deepspeed, *_ = deepspeed.initialize(
                model=module, optimizer=optimizer, config=self._config, dist_init_required=False
            )
        self._zero: Zero3Shards | Zero12Shards
        if self.zero.stage == 3:
            self._zero = Zero3Shards(self._deepspeed, self.parameters, self.world)
        else:
            self._zero = Zero12Shards(self._deepspeed, optimizer, self.parameters, self.world)
        _restore(self._zero, exact)
        return self._zero, optimizer

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Adds a micro-batch's gradient; see `Engine.backward`."""
        # The network is not called through DeepSpeed's engine: with LoRA it serves other roles, too.
        loss = self._zero.watch(loss * self._raise)
        self._deepspeed.set_gradient_accumulation_boundary(last)
        self._deepspeed.backward(loss)

    def step(self) -> torch.Tensor:
        """Clips or normalises the gradient, updates weights and average, and drops it; see `Engine.step`."""
        self._set_learning_rate()
        # It looks at the norm of all processes' gradients, and changes nothing where that is not finite.
        self._deepspeed.step()
        norm = torch.as_tensor(self._deepspeed.get_global_grad_norm(), dtype=torch.float32, device=self.world.device)
        norm = norm / self._raise
        if not self._deepspeed.was_step_applied():
            self._zero.forget_gradients()
        elif self.average is not None:
            self.average.update(self.updates)
        self.updates += 1
        return norm


def place_reference(network: nn.Module, settings: config.Distributed, world: World) -> nn.Module:
    """Freezes a network and spreads it as `distributed.reference` says; it is called as before, under no_grad.

    "replica" leaves a whole network in every process. "shard" keeps an equal part of each weight per process (ZeRO-3)
    and gathers a module's weights while it computes; "offload" keeps these parts in host memory. All processes have to
    call a spread network together, and its `state_dict()` is empty.

    Args:
        network: in the dtype that it computes in, on its device; it is changed in place.
        settings: the section `distributed`.
        world: the processes.

    Returns the network. Raises ConfigurationError where DeepSpeed is needed and missing.
    """
    network.requires_grad_(False)
    if settings.reference == "replica":
        return network
    deepspeed = import_deepspeed(world)
    zero: dict[str, Any] = {"stage": 3}
    if settings.reference == "offload":
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    dtype = next(network.parameters()).dtype
    deepspeed.initialize(
        model=network,
        config={
            "train_micro_batch_size_per_gpu": 1,
            "bf16": {"enabled": dtype == torch.bfloat16},
            "zero_optimization": zero,
        },
        dist_init_required=False,
    )
    # The hooks that gather and drop weights are on the network itself.
    return network


class _Weights(nn.Module):
    """Weights of a network as the module that DeepSpeed wants; called with a loss, it gives it back."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        for number, parameter in enumerate(parameters.values()):
            self.register_parameter(str(number), parameter)

    def forward(self, loss: torch.Tensor) -> torch.Tensor:
        return loss


@torch.no_grad()
def _restore(shards: Shards, weights: Mapping[str, torch.Tensor]) -> None:
    """Takes the weights over as they were before DeepSpeed rounded them; the network's own stay rounded."""
    for group in shards.groups:
        with shards.held(group) as tensors:
            for fragment in shards.fragments:
                if fragment.tensor in group and fragment.count:
                    part = fragment.of(tensors[fragment.tensor - group.start])
                    flat = weights[fragment.name].reshape(-1)
                    part.copy_(flat[fragment.start : fragment.start + fragment.count].view(part.shape))
