"""The static part of an update as a CUDA graph: recorded once for each shape of a micro-batch, and then replayed.

It is what has the most launches and is the same in every step: forward passes, losses and backward passes. What changes
is copied into tensors that stay in place: sample numbers, embeddings, what rewards have looked up of the prompts. Times
and noise follow from the sample numbers, on the device. Gradients stay in place, too, and the engine's own step, a few
launches that depend on the number of the update, is not recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import torch

from diffpp_fast.errors import ConfigurationError
from diffpp_fast.methods import Batch, RewardOutput, StepOutput
from diffpp_fast.rewards.text import HeldPrompts
from diffpp_fast.training.batches import MicroBatch
from diffpp_fast.training.config import Config
from diffpp_fast.training.engines import Engine, PlainEngine

T = TypeVar("T")

#: A function of a batch and its weight, and what takes its result apart: into tensors, and what makes it of them.
Work = tuple[Callable[[Batch, float], Any], Callable[[Any], tuple[list[torch.Tensor], Callable[..., Any]]]]

OFF = "use training.capture=false"
#: Of a batch, besides sample numbers and conditioning: tensors, or None.
CHANGING = ("normalizer", "x0", "steps")


class Tape(Protocol):
    """Records work."""

    def rehearse(self, work: Callable[[], T], *, watch: bool) -> T:
        """Do the work as it is done before a recording; with `watch`, RuntimeError is raised where it waits for the
        device."""

    def record(self, work: Callable[[], T]) -> Callable[[], T]:
        """Record the work without doing it. Return what does it and gives its result, in the same tensors each time."""


class CudaTape:
    """Records into CUDA graphs that share one pool of memory, for they are replayed one after another.

    Args:
        device: of the work.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def rehearse(self, work: Callable[[], T], *, watch: bool) -> T:
        current, before = torch.cuda.current_stream(self.device), torch.cuda.get_sync_debug_mode()
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                if watch:
                    torch.cuda.set_sync_debug_mode("error")
                return work()
        finally:
            torch.cuda.set_sync_debug_mode(before)
            current.wait_stream(self._stream)

    def record(self, work: Callable[[], T]) -> Callable[[], T]:
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as NCCL's watchdog, may call what a capture forbids.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            result = work()

        def replay() -> T:
            graph.replay()
            return result

        return replay


def make_tape(config: Config, device: torch.device, engines: Sequence[Engine]) -> Tape:
    """The tape of a run. Raises ConfigurationError where its updates can't be captured."""
    if device.type != "cuda":
        raise ConfigurationError(f"training.capture records CUDA graphs, and this run computes on {device}: {OFF}")
    for engine in engines:
        if not isinstance(engine, PlainEngine):
            raise ConfigurationError(
                f"training.capture: DeepSpeed spreads the {engine.role}, and its hooks communicate within the backward "
                f"pass, which can't be captured: use distributed.{engine.role}.stage=0, or training.capture=false"
            )
    if config.distributed.reference != "replica":
        raise ConfigurationError(
            "training.capture: the reference is spread and gathers its weights in every call, which can't be captured: "
            "use distributed.reference=replica, or training.capture=false"
        )
    return CudaTape(device)


class StaticInputs:
    """A batch whose tensors stay in place.

    The null conditioning is constant in a run, and stays the caller's.

    Args:
        batch: the first one.
    """

    def __init__(self, batch: Batch) -> None:
        self._prompts = HeldPrompts(batch.conditioning.prompts)
        held = [tensor.clone() for tensor in _tensors(batch)]
        self._tensors = held
        parts = iter(held)
        samples = next(parts)
        conditioning = replace(batch.conditioning.map(lambda _: next(parts)), prompts=self._prompts)
        rest: dict[str, Any] = {name: next(parts) for name in CHANGING if getattr(batch, name) is not None}
        self.batch = replace(batch, samples=samples, conditioning=conditioning, **rest)

    def set(self, batch: Batch) -> None:
        """Bring the tensors up to date."""
        self._prompts.set(batch.conditioning.prompts)
        for held, tensor in zip(self._tensors, _tensors(batch), strict=True):
            held.copy_(tensor)


@dataclass(frozen=True)
class _Recording:
    inputs: StaticInputs
    replay: Callable[[], list[torch.Tensor]]
    rebuild: Callable[[Sequence[torch.Tensor]], Any]


class Captured:
    """Work on micro-batches, by name, each recorded once for every shape that it gets.

    Args:
        tape: what records.
        work: by name.
        quiet: a context in which nothing is timed, for a graph has no parts.
    """

    def __init__(
        self,
        tape: Tape,
        work: Mapping[str, Work],
        quiet: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._tape, self._work, self._quiet = tape, work, quiet
        self._recordings: dict[tuple[Any, ...], _Recording] = {}

    def prepare(self, name: str, part: MicroBatch) -> Any:
        """Record a work for micro-batches of this one's shape. It is done twice before, for caches; returns the result.

        Raises ConfigurationError where it waits for the device, or can't be captured for another reason.
        """
        inputs = StaticInputs(part.batch)
        function, take_apart = self._work[name]
        rebuild: list[Callable[[Sequence[torch.Tensor]], Any]] = []

        def work() -> list[torch.Tensor]:
            with self._quiet():
                tensors, put_together = take_apart(function(inputs.batch, part.weight))
            rebuild[:] = [put_together]
            return tensors

        with _explained(name):
            self._tape.rehearse(work, watch=False)
            result = rebuild[0](self._tape.rehearse(work, watch=True))
            replay = self._tape.record(work)
        self._recordings[_key(name, part)] = _Recording(inputs, replay, rebuild[0])
        return result

    def __call__(self, name: str, part: MicroBatch) -> Any:
        """Do a work on a micro-batch. Raises ConfigurationError where it was not prepared for this shape."""
        recording = self._recordings.get(_key(name, part))
        if recording is None:
            shapes = ", ".join(str(list(tensor.shape)) for tensor in _tensors(part.batch))
            raise ConfigurationError(
                f"training.capture: the {name} got a micro-batch of a shape that no graph was captured for ({shapes}): "
                f"prompts' embeddings must all be of one length. Otherwise {OFF}"
            )
        recording.inputs.set(part.batch)
        # Copies, for the next replay writes into the same tensors.
        return recording.rebuild([tensor.clone() for tensor in recording.replay()])


class StaticGradients:
    """The gradients of a network in tensors that stay in place: those that graphs add to.

    Args:
        engine: of the network, after a backward pass: what got no gradient in it gets none.
    """

    def __init__(self, engine: Engine) -> None:
        self._kept = [(weight, weight.grad) for weight in engine.parameters.values() if weight.grad is not None]
        self.take_off()

    def put_on(self) -> None:
        """Begin an update: every gradient is 0."""
        torch._foreach_zero_([gradient for _, gradient in self._kept])
        for weight, gradient in self._kept:
            weight.grad = gradient

    def take_off(self) -> None:
        """Leave the weights without gradients."""
        for weight, _ in self._kept:
            weight.grad = None

    def spoil(self, factor: torch.Tensor) -> None:
        """Make the whole gradient's norm NaN where the factor is, so that the update is skipped; it is 1 otherwise."""
        self._kept[0][1].add_(factor - 1.0)


def of_step(output: StepOutput) -> tuple[list[torch.Tensor], Callable[[Sequence[torch.Tensor]], StepOutput]]:
    """Take a step's output apart: few tensors, since each is copied after a replay."""
    names, rewards = list(output.metrics), output.rewards
    tensors = [torch.stack([output.metrics[name].detach() for name in names])]
    tensors += [tensor for tensor in (output.x0, output.steps) if tensor is not None]
    tensors += [] if rewards is None else [rewards.values, *rewards.parts.values()]
    about = None if rewards is None else (list(rewards.parts), rewards.differentiable)
    has_x0, has_steps = output.x0 is not None, output.steps is not None

    def put_together(tensors: Sequence[torch.Tensor]) -> StepOutput:
        rest = iter(tensors)
        metrics = dict(zip(names, next(rest).unbind(), strict=True))
        x0 = next(rest) if has_x0 else None
        steps = next(rest) if has_steps else None
        if about is None:
            return StepOutput(metrics["loss"], metrics, None, x0, steps)
        parts, differentiable = about
        values = next(rest)
        return StepOutput(
            metrics["loss"],
            metrics,
            RewardOutput(values, {name: next(rest) for name in parts}, differentiable),
            x0,
            steps,
        )

    return tensors, put_together


def of_tensor(output: torch.Tensor) -> tuple[list[torch.Tensor], Callable[[Sequence[torch.Tensor]], torch.Tensor]]:
    """Take a tensor for what it is."""
    return [output], lambda tensors: tensors[0]


def _tensors(batch: Batch) -> list[torch.Tensor]:
    """The tensors of a batch that change from step to step."""
    found = [batch.samples]

    def note(tensor: torch.Tensor) -> torch.Tensor:
        found.append(tensor)
        return tensor

    batch.conditioning.map(note)
    return found + [tensor for name in CHANGING if (tensor := getattr(batch, name)) is not None]


def _key(name: str, part: MicroBatch) -> tuple[Any, ...]:
    batch = part.batch
    shapes = tuple((tensor.shape, tensor.dtype) for tensor in _tensors(batch))
    return name, part.weight, batch.normalizer is None, batch.x0 is None, shapes


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Say of an error what can't be captured; rewards name themselves."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (ConfigurationError, RuntimeError) as error:
        said = str(error).strip().splitlines()[0].rstrip(".")
        raise ConfigurationError(f"training.capture can't record the {name}: {said}. Otherwise {OFF}") from error
