"""The processes that train together: a process's place among them, and how they agree."""

from __future__ import annotations

import atexit
import logging
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from diffpp_fast.backends import requested_backend, why_not
from diffpp_fast.errors import ConfigurationError
from diffpp_fast.training.launch import ALONE, end_pretence, find_place, launch_variables
from diffpp_fast.training.peers import PeerLostError, PeerWatch

#: Rank 0 alone writes exports and grids while the others wait.
TIMEOUT = timedelta(minutes=60)
#: Processes that don't find each other for this long give up; before that they say whom they wait for.
JOIN_TIMEOUT = timedelta(minutes=10)
JOIN_SECONDS = 20.0
#: Between two looks of rank 0 at who has come.
LOOK_SECONDS = 0.02
#: The most bytes of an error that are passed on.
MESSAGE_BYTES = 4096

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class World:
    """The processes of a run. Alone, every method is trivial and torch.distributed stays untouched.

    Methods marked collective must be called by all processes, in the same order.

    Attributes:
        rank: of this process, from 0.
        size: how many there are.
        local_rank: on this machine, from 0.
        device: where this process computes.
        peers: watches over the others, where it was asked for.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device
    peers: PeerWatch | None = field(default=None, compare=False, repr=False)

    @classmethod
    def join(
        cls, device: str, environment: Mapping[str, str] = os.environ, *, peer_timeout: float | None = None
    ) -> World:
        """Becomes part of the run that a launcher has started, or a run of its own.

        Args:
            device: "cpu", "cuda", or "auto": the GPU where there is one.
            environment: with RANK, WORLD_SIZE and so on where a launcher has set them, or its own names for them.
            peer_timeout: seconds without a sign of life after which a process counts as gone, which ends all others;
                None: they wait for it.

        Raises ConfigurationError for a device that isn't there, for half a launch environment, and where the processes
        don't find each other.
        """
        place = find_place(environment)
        where = choose_device(device, place.local_rank)
        world = cls(place.rank, place.size, place.local_rank, where)
        if place.size > 1 and not dist.is_initialized():
            # Libraries read them, too.
            os.environ.update(launch_variables(place, environment))
            if where.type == "cuda":
                torch.cuda.set_device(where)
            # Flags and counts go through the CPU, so that agreeing on them does not wait for the GPU.
            backend = "cpu:gloo,cuda:nccl" if where.type == "cuda" else "gloo"
            start = _init_process_group(backend, place.rank, place.size)
            if peer_timeout is not None:
                return replace(world, peers=_watch_peers(world, start, peer_timeout))
        return world

    @classmethod
    def alone(cls, device: torch.device | str) -> World:
        """One process, whatever the environment says."""
        return cls(0, 1, 0, torch.device(device))

    @property
    def is_main(self) -> bool:
        """Tell whether this process prints, draws and writes what is common to all."""
        return self.rank == 0

    def barrier(self) -> None:
        """Waits for all (collective)."""
        # Through the CPU: NCCL's own barrier would wait for the GPU.
        self.any(False)

    def any(self, flag: bool) -> bool:
        """Tell whether the flag is set in any process (collective)."""
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

    @contextmanager
    def together(
        self,
        explain: Callable[[str], Exception],
        expected: type[Exception] | tuple[type[Exception], ...] = Exception,
    ) -> Generator[None, None, None]:
        """Raise in all processes what fails inside in one, so that none waits for it (collective).

        Args:
            explain: the message of the first one that failed -> what is raised.
            expected: errors of other classes are raised as they are, in the process that has them.
        """
        error: Exception | None = None
        try:
            yield
        except expected as found:
            error = found
        said = self.first_error(error)
        if said is not None:
            raise explain(said) from error

    @contextmanager
    def explained(self) -> Generator[None, None, None]:
        """Raise PeerLostError, which says who is gone, in place of the error of a call that their end has broken."""
        try:
            yield
        except RuntimeError as error:
            if self.peers is None or not _is_broken_connection(error):
                raise
            raise PeerLostError(self.peers.explain(error)) from error

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
        end_pretence()
        if self.peers is not None:
            self.peers.stop()
        # Where others are gone, it would wait for them.
        if self.size > 1 and dist.is_initialized() and not isinstance(sys.exc_info()[1], PeerLostError):
            dist.destroy_process_group()


def leave(code: int) -> NoReturn:
    """End this process with an exit code as soon as its exit functions have run, past the interpreter's own end.

    Gloo's threads outlive their group while anything refers to it, as DeepSpeed and DTensors do. One that lets go of a
    tensor while the interpreter ends aborts the process, and its launcher takes a finished run for a failed one.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


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


def _init_process_group(backend: str, rank: int, size: int) -> str:
    """`dist.init_process_group` that says what it waits for, and what went wrong; returns the name of this start."""
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    said = (
        f"MASTER_ADDR and MASTER_PORT ({address}) must be those of rank 0's machine, and all {size} processes must be "
        f"started; {ALONE}"
    )
    waiting = threading.Timer(JOIN_SECONDS, lambda: logger.warning("rank %d waits for the others: %s", rank, said))
    waiting.daemon = True
    waiting.start()
    try:
        store, rank, size = next(rendezvous("env://", rank, size, timeout=JOIN_TIMEOUT))
        start = _agree_on_start(store, rank, size)
        store = dist.PrefixStore(start, store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
        return start
    except (dist.DistError, RuntimeError, ValueError) as error:
        if "EADDRINUSE" in str(error):
            raise ConfigurationError(
                f"MASTER_PORT {os.environ['MASTER_PORT']} is in use on this machine, maybe by another run: choose "
                "another one, the same for all processes (torchrun --master-port PORT)"
            ) from None
        raise ConfigurationError(
            f"the processes don't find each other ({str(error).splitlines()[0]}): {said}"
        ) from error
    finally:
        waiting.cancel()


def _agree_on_start(store: dist.Store, rank: int, size: int) -> str:
    """Return a name that the processes of this start share with none of an earlier one (collective).

    torchrun's store outlives the processes that it starts again, and keeps what they left there: one that is ready
    before rank 0 would find, and call, the address of a rank 0 that is gone. How often torchrun has started them does
    not tell, since every machine counts for itself.
    """
    if rank != 0:
        # Nobody had this number before, so the answer to it is of this start's rank 0.
        number = store.add("starts/asked", 1)
        name = store.get(f"starts/answer/{number}").decode()
        store.add(f"{name}/here", 1)
        return name
    name, answered, here = f"starts/{secrets.token_hex(8)}", 0, 0
    until = time.monotonic() + JOIN_TIMEOUT.total_seconds()
    while here < size - 1:
        asked = store.add("starts/asked", 0)
        # Also those of an earlier start, whom nothing reaches any more.
        for number in range(answered + 1, asked + 1):
            store.set(f"starts/answer/{number}", name)
        answered, here = asked, store.add(f"{name}/here", 0)
        if time.monotonic() > until:
            raise dist.DistStoreError(f"{here} of the {size - 1} others came within {JOIN_TIMEOUT.total_seconds():g} s")
        time.sleep(LOOK_SECONDS)
    return name


def _watch_peers(world: World, start: str, timeout: float) -> PeerWatch:
    """Begin to watch over the other processes of a start (collective)."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])

    # A connection of its own: one that waits lets no other call through.
    def connect() -> dist.Store:
        # Where nothing answers, torch's store would say so with pages of C++.
        socket.create_connection((address, port), timeout).close()
        store = dist.TCPStore(address, port, None, False, timedelta(seconds=timeout))
        return dist.PrefixStore(f"{start}/peers", store)

    watch = PeerWatch(connect, world.rank, world.size, timeout, f"{address}:{port}")
    world.barrier()
    watch.start()
    return watch


def _is_broken_connection(error: RuntimeError) -> bool:
    """Tell whether a collective has failed over its connections: of Gloo, of NCCL, or to the store."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()
