"""Who a process is among those that train together, and what they have to agree on."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from diffpp_fast.errors import ConfigurationError
from diffpp_fast.kernels.dispatch import requested_backend, why_not

#: What torchrun, the deepspeed launcher and most schedulers' wrappers set.
LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
#: Rank 0 alone writes exports and grids while the others wait.
TIMEOUT = timedelta(minutes=60)
#: Of an error that is passed on; a longer one is cut.
MESSAGE_BYTES = 4096


@dataclass(frozen=True)
class World:
    """The processes of a run. Alone, every method is trivial and torch.distributed stays untouched.

    Methods marked collective must be called by all processes, in the same order.

    Attributes:
        rank: of this process, from 0.
        size: how many there are.
        local_rank: on this machine, from 0.
        device: where this process computes.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @classmethod
    def join(cls, device: str, environment: Mapping[str, str] = os.environ) -> World:
        """Becomes part of the run that a launcher has started, or a run of its own.

        Args:
            device: "cpu", "cuda", or "auto": the GPU where there is one.
            environment: with RANK, WORLD_SIZE and so on where a launcher has set them.

        Raises ConfigurationError for a device that isn't there and for half a launch environment.
        """
        rank, size, local_rank = _place(environment)
        place = choose_device(device, local_rank)
        if size > 1 and not dist.is_initialized():
            if place.type == "cuda":
                torch.cuda.set_device(place)
            # Flags and counts go through the CPU, so that agreeing on them does not wait for the GPU.
            backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
            dist.init_process_group(backend, rank=rank, world_size=size, timeout=TIMEOUT)
        return cls(rank, size, local_rank, place)

    @classmethod
    def alone(cls, device: torch.device | str) -> World:
        """One process, whatever the environment says."""
        return cls(0, 1, 0, torch.device(device))

    @property
    def is_main(self) -> bool:
        """Whether this process prints, draws and writes what is common to all."""
        return self.rank == 0

    def barrier(self) -> None:
        """Waits for all (collective)."""
        # Through the CPU: NCCL's own barrier would wait for the GPU.
        self.any(False)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process (collective)."""
        if self.size == 1:
            return flag
        flags = torch.tensor([int(flag)])
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        return bool(flags.item())

    def first_error(self, error: BaseException | None) -> str | None:
        """The message of the lowest rank that has an error, in all processes; None where there is none (collective).

        What one process can't do, all must leave: the others would wait for it.
        """
        if self.size == 1:
            return None if error is None else str(error)
        sent = torch.zeros(MESSAGE_BYTES, dtype=torch.uint8)
        text = b"" if error is None else (str(error) or type(error).__name__).encode()[:MESSAGE_BYTES]
        sent[: len(text)] = torch.tensor(list(text), dtype=torch.uint8)
        received = [torch.empty_like(sent) for _ in range(self.size)]
        dist.all_gather(received, sent)
        messages = [bytes(message.tolist()).rstrip(b"\0").decode(errors="replace") for message in received]
        return next(filter(None, messages), None)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over the processes, a new tensor (collective)."""
        if self.size == 1:
            return tensor
        total = tensor.detach().clone()
        dist.all_reduce(total)
        return total

    def share(self, numbers: torch.Tensor) -> torch.Tensor:
        """This process's part of a batch: numbers [B] -> [B / size], consecutive; B must divide."""
        part = len(numbers) // self.size
        return numbers[self.rank * part : (self.rank + 1) * part]

    def close(self) -> None:
        """Leaves the process group."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device of a configuration; "auto" is the GPU where there is one.

    Raises ConfigurationError where "cuda" is asked for and missing, where this machine has too few GPUs, and where the
    backend that DIFFPP_FAST_BACKEND asks for does not serve there.
    """
    device = _find_device(name, local_rank)
    backend = requested_backend()
    reason = None if backend == "auto" else why_not("add_noise", backend, device, torch.float32)
    if reason is not None:
        raise ConfigurationError(
            f"the backend {backend} can't serve on {device}: {reason}. Unset DIFFPP_FAST_BACKEND, or take one that "
            "`diffpp-fast doctor` shows"
        )
    return device


def _find_device(name: str, local_rank: int) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError("device is cuda, but PyTorch sees no CUDA device: use device=cpu or device=auto")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ConfigurationError(
            f"LOCAL_RANK is {local_rank}, but PyTorch sees {torch.cuda.device_count()} GPUs: "
            "start no more processes on a machine than it has GPUs"
        )
    return torch.device("cuda", local_rank)


def _place(environment: Mapping[str, str]) -> tuple[int, int, int]:
    """Rank, size, local rank."""
    given = [name for name in LAUNCH_VARIABLES if name in environment]
    if "RANK" not in given and "WORLD_SIZE" not in given:
        return 0, 1, 0
    missing = [name for name in LAUNCH_VARIABLES if name not in given]
    if missing and environment.get("WORLD_SIZE") != "1":
        raise ConfigurationError(
            f"{' and '.join(given)} are set, but not {' and '.join(missing)}: start the processes with torchrun or "
            "the deepspeed launcher, or unset these variables"
        )
    return int(environment.get("RANK", "0")), int(environment["WORLD_SIZE"]), int(environment.get("LOCAL_RANK", "0"))
