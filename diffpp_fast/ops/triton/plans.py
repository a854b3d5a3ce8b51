"""Plans of calls: what host code did for arguments of a kind, done again without asking it or Triton.

Triton takes 5 to 10 us to find the compiled kernel of a launch, and host code as long for grids and strides. All of it
follows from the kind of the arguments: a tensor's dtype, shape, strides and alignment, and every other value. So the
first call of a kind runs as it is written, which compiles kernels and fills caches; the second is recorded; from the
third on the recorded calls of torch and launches are repeated in their order, with the tensors at hand.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from functools import partial
from operator import itemgetter
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode
from triton import knobs
from triton.runtime import JITFunction, driver

#: The kinds that a function has plans for, at most: beyond it they are made anew.
MOST_PLANS = 256


#: Does a call again: takes the device and the arguments.
Plan = Callable[[int, Sequence[Any]], Any]
#: A function's plans by device and kind of arguments; None after the first call.
Known = dict[tuple[Any, ...], Plan | None]


def kind(device: int, arguments: Sequence[Any]) -> tuple[Any, ...]:
    """Return all that host code and Triton's compiler may look at, the alignment as the address modulo 16."""
    found: list[Any] = [device]
    for value in arguments:
        if isinstance(value, Tensor):
            found += value.dtype, value.shape, value.stride(), value.data_ptr() & 15, value.is_neg()
        else:
            # The type, for 1, 1.0 and True are equal, and three kernels to Triton.
            found += value.__class__, value
    return tuple(found)


class _Name:
    """A value's place among those of a call, which is known when all constants are."""

    def __init__(self) -> None:
        self.place = -1


class _Recorder(TorchFunctionMode):
    """Writes down torch's functions that return a tensor, and Triton's launches, as long as it is entered."""

    def __init__(self, arguments: Sequence[Any]) -> None:
        super().__init__()
        self.stream = _Name()
        self.arguments = [_Name() for _ in arguments]
        self.constants: list[tuple[Any, _Name]] = []
        self.steps: list[tuple[Callable[..., Any], list[_Name], _Name, bool]] = []
        self.refused = False
        # By identity; the tensors are kept, for a later one could get the address of one that is gone.
        self._names = {id(value): name for value, name in zip(arguments, self.arguments, strict=True)}
        self._kept: list[Any] = list(arguments)

    def __torch_function__(
        self, function: Any, types: Any, arguments: Sequence[Any] = (), options: dict[str, Any] | None = None
    ) -> Any:
        options = options or {}
        result = function(*arguments, **options)
        name = getattr(function, "__name__", "")
        in_place = name.endswith("_") and not name.endswith("__")
        if isinstance(result, Tensor) and (in_place or id(result) not in self._names):
            self._called(function, arguments, options, result, in_place)
        elif isinstance(result, (tuple, list)) and any(isinstance(each, Tensor) for each in result):
            self.refused = True
        return result

    def _called(
        self, function: Any, arguments: Sequence[Any], options: dict[str, Any], result: Tensor, in_place: bool
    ) -> None:
        nested = [value for value in arguments if isinstance(value, (tuple, list))]
        inner = [value for each in nested for value in each]
        if any(isinstance(value, Tensor) for value in (*inner, *options.values())):
            self.refused = True
        names = [self._name(value) for value in arguments]
        self.steps.append((partial(function, **options) if options else function, names, self._new(result), in_place))

    def launched(self, compiled: Any, grid: Sequence[int], arguments: Sequence[Any]) -> None:
        """Note a launch of Triton's."""
        head = (*grid, *(1,) * (3 - len(grid)))
        before = [self._constant(size) for size in head]
        after = [self._constant(value) for value in (compiled.function, compiled.packed_metadata, None, None, None)]
        names = [*before, self.stream, *after, *map(self._name, arguments)]
        self.steps.append((compiled.run, names, _Name(), True))

    def _name(self, value: Any) -> _Name:
        """Name a value: a tensor that no step made is a constant, such as a table that a cache holds."""
        known = self._names.get(id(value)) if isinstance(value, Tensor) else None
        return self._constant(value) if known is None else known

    def _constant(self, value: Any) -> _Name:
        self.constants.append((value, _Name()))
        return self.constants[-1][1]

    def _new(self, value: Tensor) -> _Name:
        self._kept.append(value)
        return self._names.setdefault(id(value), _Name())

    def plan(self, result: Any, stream: Callable[[int], int]) -> Plan | None:
        """Return the plan of a call with this result; None where something can't be repeated.

        The values of a call are the stream, the arguments, constants, then the result of each step.
        """
        if self.refused:
            return None
        several = isinstance(result, tuple)
        results = [self._name(value) for value in (result if several else (result,))]
        steps = self._needed(results)
        for place, name in enumerate((self.stream, *self.arguments, *(name for _, name in self.constants))):
            name.place = place
        first = 1 + len(self.arguments) + len(self.constants)
        for number, (_, _, made, _) in enumerate(steps):
            if made.place < 0:  # else a step in place, whose result has a name already
                made.place = first + number
        picked = [(function, _picker(names)) for function, names, _, _ in steps]
        constants = [value for value, _ in self.constants]
        whole = _picker(results) if several else itemgetter(results[0].place)

        def again(device: int, arguments: Sequence[Any]) -> Any:
            values = [stream(device), *arguments, *constants]
            for function, pick in picked:
                values.append(function(*pick(values)))
            return whole(values)

        return again

    def _needed(self, results: Sequence[_Name]) -> list[tuple[Callable[..., Any], list[_Name], _Name, bool]]:
        """Leave out the steps that nothing comes of, such as a tensor that was made for its strides."""
        used, needed = set(results), []
        for step in reversed(self.steps):
            _, names, made, effect = step
            if effect or made in used:
                used.update(names)
                needed.append(step)
        return needed[::-1]


def _picker(names: Sequence[_Name]) -> Callable[[Sequence[Any]], Sequence[Any]]:
    """Return a function that takes the named values out of those of a call, as a tuple or list."""
    places = [name.place for name in names]
    if len(places) > 1:
        return itemgetter(*places)
    # With one index it would return the value alone.
    return itemgetter(slice(places[0], places[0] + 1) if places else slice(0))


_recorders = threading.local()
_recording = threading.RLock()


@contextmanager
def _recorded(recorder: _Recorder) -> Any:
    """Within the block, launches of this thread are told to the recorder too."""

    def run(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = launch(kernel, *arguments, grid=grid, warmup=warmup, **options)
        if getattr(_recorders, "current", None) is recorder:
            named = {name: value for name, value in options.items() if name in kernel.signature.parameters}
            bound = kernel.signature.bind(*arguments, **named)
            bound.apply_defaults()
            recorder.launched(compiled, grid, tuple(bound.arguments.values()))
        return compiled

    with _recording:
        # Triton's class for a moment, and not each kernel: a launch that is overlooked would be missing from the plan.
        launch, JITFunction.run = JITFunction.run, run
        _recorders.current = recorder
        try:
            with recorder:
                yield
        finally:
            JITFunction.run, _recorders.current = launch, None


def run(
    function: Callable[..., Any], known: Known, device: int, arguments: Sequence[Any], options: dict[str, Any]
) -> Any:
    """Call a function that launches on the current device: by its plan for arguments of this kind, if there is one."""
    if options or hooked():
        return function(*arguments, **options)
    key = kind(device, arguments)
    plan = known.get(key)
    if plan is not None:
        return plan(device, arguments)
    if key in known:
        result, plan = _record(function, arguments)
        known[key] = plan or (lambda device, arguments: function(*arguments))
        return result
    if len(known) >= MOST_PLANS:
        known.clear()
    known[key] = None
    return function(*arguments)


def _record(function: Callable[..., Any], arguments: Sequence[Any]) -> tuple[Any, Plan | None]:
    # Each a tensor of its own, also where a caller gave one twice: the next may give two.
    own = [value.detach() if isinstance(value, Tensor) else value for value in arguments]
    recorder = _Recorder(own)
    with _recorded(recorder):
        result = function(*own)
    return result, recorder.plan(result, driver.active.get_current_stream)


def hooked() -> bool:
    """Say whether a profiler has hooks around Triton's launches, which only Triton's own way of launching calls."""
    runtime = knobs.runtime
    before, after = runtime.launch_enter_hook, runtime.launch_exit_hook
    # Each is a chain of functions, or one, or None.
    return bool(getattr(before, "calls", before) or getattr(after, "calls", after))
