"""A trained network with its optimizer and its average, and the files that all engines write and read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from diffpp_fast.errors import CheckpointError
from diffpp_fast.tensor_files import StoredTensors, TensorWriter
from diffpp_fast.training import config
from diffpp_fast.training.checkpoint import open_role
from diffpp_fast.training.distributed import World
from diffpp_fast.training.engines.optimizers import OptimizerState, learning_rate
from diffpp_fast.training.engines.shards import Fragment, MovingAverage, Shards, receivers

#: With `optimizers.X.normalize` a gradient is divided by its norm, or by this where that is smaller. A power of two, so
#: that gradients can be multiplied by its inverse without rounding.
NORM_FLOOR = 2.0**-20


@dataclass(frozen=True)
class FileColumn:
    """One float32 number for each element of the weights, as a checkpoint's file holds it.

    Attributes:
        suffix: of the weight's name, in the file.
        get: (number of the tensor, tensor) -> its numbers, in its shape.
        set: (number of the tensor, tensor, numbers) takes them over.
    """

    suffix: str
    get: Callable[[int, torch.Tensor], torch.Tensor]
    set: Callable[[int, torch.Tensor, torch.Tensor], object]


@dataclass(eq=False, repr=False)
class Engine(ABC):
    """A trained network with its optimizer and its average, in one process or spread over many.

    Its float32 weights are updated as `shards`; subclasses say how. Methods marked collective must be called by all
    processes, in the same order. `updates` counts those that were asked for so far, skipped ones included.

    Args:
        role: "generator" or "fake".
        network: the module that is called; what an engine has to do before and after is hooked to it in place.
        parameters: those that are trained, by their name in its state.
        settings: of the optimizer, the clipping and the learning rate.
        updates_in_all: that the run asks for; the learning rate's schedule ends there.
        world: the processes.
        ema: keep a moving average of the weights.
    """

    role: str
    network: nn.Module
    parameters: Mapping[str, nn.Parameter]
    settings: config.Optimizer
    updates_in_all: int
    world: World
    ema: config.EmaSection | None = None

    def __post_init__(self) -> None:
        self.shards, self.optimizer = self._spread()
        self.optimizer_state = OptimizerState(self.optimizer)
        for group in self.shards.groups:
            with self.shards.held(group) as tensors:
                for tensor in tensors:
                    self.optimizer_state.begin(tensor)
        self.average = None if self.ema is None else MovingAverage(self.shards, self.ema.decay, self.ema.warmup)
        self.updates = 0

    @abstractmethod
    def _spread(self) -> tuple[Shards, torch.optim.Optimizer]:
        """Makes the parameters trainable; returns what this process updates of them, and its optimizer (collective)."""

    @abstractmethod
    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Adds a micro-batch's gradient (collective).

        Args:
            loss: this micro-batch's share of the process's mean loss: its mean times its part of the samples.
                Gradients are averaged over the processes.
            last: whether it is the update's last micro-batch.
        """

    @abstractmethod
    def step(self) -> torch.Tensor:
        """Clips or normalises the gradient, updates weights and average, and drops it (collective).

        Returns the norm of the whole gradient before that: float32, a scalar on the device, the same in all
        processes. If it is infinite or NaN, weights, optimizer and average are as they were, and only then.
        """

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next update."""
        return learning_rate(self.settings, self.updates, self.updates_in_all)

    @property
    def applied(self) -> int:
        """Updates so far that were not skipped, those before a resume included; waits for the device (collective)."""
        with self.shards.held(self.shards.groups[0]) as tensors:
            # A weight that no loss reaches has been updated less often than the others, or never.
            return max(map(self.optimizer_state.get_step, tensors))

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the network computes with the averages, where they are kept (collective)."""
        if self.average is None:
            yield
            return
        self.average.exchange()
        self.shards.publish()
        try:
            yield
        finally:
            self.average.exchange()
            self.shards.publish()

    @torch.no_grad()
    def write(self, folder: Path) -> None:
        """Writes `ROLE.safetensors`, `ROLE_optimizer.safetensors` and `ROLE_ema.safetensors` (collective).

        Whole float32 tensors by the weights' names, with `.exp_avg` and so on behind them in the optimizer's file,
        which also has the number of updates and of those that were not skipped. Each of several processes writes its
        part.

        Raises OSError in all processes if one can't.
        """
        counts = {"updates": torch.tensor(self.updates), "step": torch.tensor(self.applied)}
        for stem, columns in self._columns().items():
            self._write(folder, f"{self.role}{stem}", columns, counts if stem == "_optimizer" else {})

    @torch.no_grad()
    def read(self, folder: Path) -> None:
        """Goes back to what any engine has written, in whatever number of processes (collective).

        Raises CheckpointError in all processes if one can't.
        """
        with self.world.together(CheckpointError, (CheckpointError, OSError, ValueError)):
            for stem, columns in self._columns().items():
                self._read(open_role(folder, f"{self.role}{stem}"), f"{folder}: {self.role}{stem}", columns)
            counts = open_role(folder, f"{self.role}_optimizer")
            self.updates = int(counts["updates"])
            for group in self.shards.groups:
                with self.shards.held(group) as tensors:
                    for tensor in tensors:
                        self.optimizer_state.set_step(tensor, int(counts["step"]))
        self.shards.publish()

    @torch.no_grad()
    def full_state(self, averaged: bool) -> dict[str, torch.Tensor] | None:
        """`network.state_dict()` with whole float32 weights, or their averages, on the CPU; None except on rank 0
        (collective)."""
        columns = self._columns()
        column = columns.get("_ema" if averaged else "", columns[""])[0]
        whole: dict[str, torch.Tensor] = {}
        for fragment, numbers, _ in self._each([column]):
            gathered = self.shards.gather(fragment, numbers, receiver=0)
            if gathered is not None:
                whole[fragment.name] = gathered.to("cpu", copy=True)
        if not self.world.is_main:
            return None
        state = self.network.state_dict()
        return {
            name: whole[name] if name in whole else tensor.detach().to("cpu", copy=True)
            for name, tensor in state.items()
        }

    def _set_learning_rate(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate

    def _columns(self) -> dict[str, list[FileColumn]]:
        """Return the columns of each file, by the end of its name."""
        state = self.optimizer_state
        columns = {
            "": [FileColumn("", lambda _, tensor: tensor, lambda _, tensor, values: tensor.copy_(values))],
            "_optimizer": [
                FileColumn(f".{name}", partial(_get_state, state, name), partial(_set_state, state, name))
                for name in state.names
            ],
        }
        if self.average is not None:
            averages = self.average.averages
            columns["_ema"] = [
                FileColumn(
                    "", lambda number, _: averages[number], lambda number, _, values: averages[number].copy_(values)
                )
            ]
        return columns

    def _each(self, columns: Sequence[FileColumn]) -> Iterator[tuple[Fragment, torch.Tensor, FileColumn]]:
        """Every weight's fragment in every column, with the numbers of the tensor that it lies in."""
        for group, fragments in self._groups():
            with self.shards.held(group) as tensors:
                for column in columns:
                    last, numbers = -1, torch.empty(0)
                    for fragment in fragments:
                        if fragment.tensor != last:
                            last = fragment.tensor
                            numbers = column.get(last, tensors[last - group.start])
                        yield fragment, numbers, column

    def _groups(self) -> Iterator[tuple[range, list[Fragment]]]:
        for group in self.shards.groups:
            yield group, [fragment for fragment in self.shards.fragments if fragment.tensor in group]

    def _write(
        self, folder: Path, stem: str, columns: Sequence[FileColumn], counts: Mapping[str, torch.Tensor]
    ) -> None:
        rank, size = self.world.rank, self.world.size
        receiver = dict(zip(self.shards.fragments, receivers(self.shards.fragments, size), strict=True))
        announced = [
            (fragment.name + column.suffix, torch.float32, fragment.shape)
            for _, fragments in self._groups()
            for column in columns
            for fragment in fragments
            if receiver[fragment] == rank
        ]
        mine = counts if self.world.is_main else {}
        part = f"-{rank + 1:05d}-of-{size:05d}" if size > 1 else ""
        announced += [(name, count.dtype, count.shape) for name, count in mine.items()]
        # Who can't write goes on to take part in what the others do, and says so at the end.
        error: OSError | None = None
        with ExitStack() as stack:
            writer: TensorWriter | None = None
            try:
                writer = stack.enter_context(TensorWriter(folder / f"{stem}{part}.safetensors", announced))
            except OSError as trouble:
                error = trouble
            for fragment, numbers, _ in self._each(columns):
                whole = self.shards.gather(fragment, numbers, receiver[fragment])
                if whole is not None and writer is not None and error is None:
                    try:
                        writer.write(whole)
                    except OSError as trouble:
                        error = trouble
            if writer is not None and error is None:
                for count in mine.values():
                    writer.write(count)
        message = self.world.first_error(error)
        if message is not None:
            raise error or OSError(message)

    def _read(self, stored: StoredTensors, where: str, columns: Sequence[FileColumn]) -> None:
        for group, fragments in self._groups():
            with self.shards.held(group) as tensors:
                for column in columns:
                    for number, tensor in zip(group, tensors, strict=True):
                        values = torch.zeros_like(tensor)
                        for fragment in fragments:
                            if fragment.tensor == number and fragment.count:
                                part = fragment.of(values)
                                part.copy_(_elements(stored, where, fragment, column.suffix).view(part.shape))
                        column.set(number, tensor, values)


def _get_state(state: OptimizerState, name: str, _: int, tensor: torch.Tensor) -> torch.Tensor:
    return state.get(tensor, name)


def _set_state(state: OptimizerState, name: str, _: int, tensor: torch.Tensor, values: torch.Tensor) -> None:
    state.set(tensor, name, values)


def _elements(stored: StoredTensors, where: str, fragment: Fragment, suffix: str) -> torch.Tensor:
    """A fragment's numbers from a checkpoint; raises CheckpointError where they are missing or of another shape."""
    name = fragment.name + suffix
    if name not in stored:
        raise CheckpointError(f"{where} holds no {name}")
    found = stored.places[name].shape
    if found != tuple(fragment.shape):
        raise CheckpointError(f"{where} has {name} in shape {list(found)}, not {list(fragment.shape)}")
    return stored.elements(name, fragment.start, fragment.count)
