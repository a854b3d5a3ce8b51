"""Text encoders layer by layer: of the repeated blocks one is in memory at a time, and all batches pass it in turn.

A model is built without its weights. What lies outside of its blocks (embeddings, last norms) is read once; a block's
weights are read before it is called and dropped after it. Inside `in_step` several calls of the model run as threads
that take turns: all of them stop in front of the same block, which is then read once for all of them. Every call
computes what it would alone, to the bit.
"""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from diffpp_fast.few_bits import SMALLEST
from diffpp_fast.networks.conditioning import Conditioning
from diffpp_fast.networks.quantization import quantized_layer
from diffpp_fast.networks.quantized_text import few_bit_layers
from diffpp_fast.tensor_files import first_not_finite, shapes_of

T = TypeVar("T")

#: Towers and heads in an encoder's files that are none of its hidden states'.
OTHER_TOWERS = re.compile(r"(^|\.)(vision_\w+|visual|multi_modal_\w+|decoder|lm_head|audio_\w+)\.")
_asked: ContextVar[bool] = ContextVar("streaming", default=False)
_turn = threading.local()


@contextmanager
def streaming() -> Iterator[None]:
    """Inside, text encoders are loaded to be streamed."""
    token = _asked.set(True)
    try:
        yield
    finally:
        _asked.reset(token)


def is_asked_for() -> bool:
    """Return whether the code runs inside of `streaming`."""
    return _asked.get()


@contextmanager
def without_weights() -> Iterator[None]:
    """Inside, modules are built with parameters on meta; buffers, which hold what their code computes, are real."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def load_streamed(
    folder: Path,
    loader: Any,
    stored: Mapping[str, Tensor],
    dtype: torch.dtype,
    quantization: str | None = None,
    *,
    keep: bool = False,
) -> nn.Module:
    """Return a model of transformers whose blocks are read when they are called; raises like `stream`.

    Args:
        folder: with its `config.json`.
        loader: a class of transformers, or one of its `Auto...` classes.
        stored, dtype, quantization, keep: as in `stream`.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with without_weights(), torch.random.fork_rng(devices=[]):
        # Of a class of its own, `from_config` is a private name.
        build = loader.from_config if hasattr(loader, "from_config") else loader._from_config
        model: nn.Module = build(config, dtype=dtype)
    stream(model.eval(), stored, dtype, quantization, keep=keep)
    return model


def stream(
    model: nn.Module,
    stored: Mapping[str, Tensor],
    dtype: torch.dtype,
    quantization: str | None = None,
    *,
    keep: bool = False,
) -> int:
    """Make a model read its blocks when they are called; return how many blocks it has.

    Args:
        model: built inside of `without_weights`.
        stored: its tensors, each read when it is asked for; they may be named from a larger model on.
        dtype: of the weights.
        quantization: kind of the weights of the blocks' linear layers in fewer bits, made anew whenever a block is
            read; None: as `dtype` says.
        keep: read all blocks now, one after the other, and keep them.

    Raises ValueError for weights that are missing, misshapen or not finite, and for a model without repeated blocks, or
    without layers for few bits.
    """
    _forget_other_towers(model, dtype)
    blocks = [block for block in repeated_blocks(model) if any(each.is_meta for each in block.parameters())]
    if not blocks:
        raise ValueError(f"a {type(model).__name__} has no repeated blocks: it can't be streamed")
    if quantization is not None and not any(map(few_bit_layers, blocks)):
        raise ValueError(f"has no linear layer of {SMALLEST} weights and more for {quantization}")
    places = _places(model, stored)
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta and id(parameter) not in inside:
            value = nn.Parameter(_read(stored, places[name], dtype), requires_grad=False)
            _replace(model, parameter, value)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for block in blocks:
        held = {places[names[id(parameter)]]: parameter for parameter in block.parameters()}
        shapes = {place: tuple(parameter.shape) for place, parameter in held.items()}
        few_bits = {} if quantization is None else few_bit_layers(block)
        empty = {id(each): nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False) for each in held.values()}
        for parameter in held.values():
            _replace(block, parameter, empty[id(parameter)])
        parameters = {place: empty[id(each)] for place, each in held.items()}
        streamed = _StreamedBlock(block, stored, parameters, shapes, dtype, few_bits, quantization)
        if keep:
            streamed.load()
    return len(blocks)


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the modules of a model's lists of several, outermost first, that hold most of its weights."""
    found: list[nn.Module] = []

    def visit(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(child, nn.ModuleList) and len(child) > 0 and any(True for _ in child.parameters()):
                found.extend(child)
            else:
                visit(child)

    visit(model)
    return found


def in_step(calls: Sequence[Callable[[], T]]) -> list[T]:
    """Return what calls return, each run so far as the next streamed block, then the others: a block is read once.

    Raises what the first of them raises.
    """
    threads = [_Turn(call) for call in calls]
    try:
        while any(not each.ended for each in threads):
            wanted = Counter(each.waits_for for each in threads if not each.ended and each.waits_for is not None)
            block = wanted.most_common(1)[0][0] if wanted else None
            if block is not None:
                block.load()
            for each in threads:
                if not each.ended and each.waits_for is block:
                    each.go_on()
            if block is not None:
                block.drop()
    finally:
        for each in threads:
            each.give_up()
    return [each.result() for each in threads]


def encode_in_step(
    encode: Callable[[Sequence[str]], Conditioning], prompts: Sequence[str], *, batch: int = 16, at_once: int = 64
) -> Iterator[Conditioning]:
    """Yield the conditioning of prompts on the CPU, batch by batch, by encoders that may be streamed.

    Args:
        encode: B prompts -> their conditioning.
        prompts: any number of them.
        batch: prompts that are encoded together.
        at_once: prompts for which blocks are read once; so many encodings are in memory.
    """
    for start in range(0, len(prompts), at_once):
        part = prompts[start : start + at_once]
        batches = [part[first : first + batch] for first in range(0, len(part), batch)]
        yield from in_step([lambda texts=texts: encode(texts).to("cpu") for texts in batches])  # type: ignore[misc]


class _StreamedBlock:
    """A module whose weights are in memory while it is called."""

    def __init__(
        self,
        module: nn.Module,
        stored: Mapping[str, Tensor],
        parameters: Mapping[str, nn.Parameter],
        shapes: Mapping[str, tuple[int, ...]],
        dtype: torch.dtype,
        few_bits: Mapping[str, nn.Linear],
        quantization: str | None,
    ) -> None:
        self.module = module
        self.stored, self.parameters, self.shapes, self.dtype = stored, parameters, shapes, dtype
        #: Layers whose weights are stored in fewer bits, by path, and as which kind.
        self.few_bits, self.quantization = few_bits, quantization
        self.kept = False
        self.checked = False
        module.register_forward_pre_hook(self._before)
        module.register_forward_hook(self._after, always_call=True)

    def load(self) -> None:
        """Read the weights, which then stay until they are dropped."""
        self._read()
        self.kept = True

    def drop(self) -> None:
        """Forget the weights."""
        for name, layer in self.few_bits.items():
            _put(self.module, name, layer)
        for parameter in self.parameters.values():
            parameter.data = torch.empty(0, dtype=self.dtype, device=parameter.device)
        self.kept = False

    def _read(self) -> None:
        for name, parameter in self.parameters.items():
            tensor = self.stored[name].to(self.dtype)
            if not self.checked:
                _refuse_not_finite(name, tensor)
            parameter.data = tensor.to(parameter.device)
        self.checked = True
        for name, layer in self.few_bits.items():
            assert self.quantization is not None
            _put(self.module, name, quantized_layer(layer, self.quantization))
            layer.weight.data = torch.empty(0, dtype=self.dtype, device=layer.weight.device)

    def _before(self, module: nn.Module, inputs: Any) -> None:
        turn = getattr(_turn, "mine", None)
        if turn is not None:
            turn.wait_for(self)
        if not self.kept:
            self._read()

    def _after(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if not self.kept:
            self.drop()


class _Turn:
    """A call in a thread of its own, which computes only while it is this call's turn."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call = call
        self._mine, self._others = threading.Semaphore(0), threading.Semaphore(0)
        self._outcome: Any = None
        self._error: BaseException | None = None
        self._given_up = False
        self.ended = False
        #: The block that it stands in front of; None before it has begun.
        self.waits_for: _StreamedBlock | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def go_on(self) -> None:
        """Let it compute up to the next block, or to its end; raises what it raises."""
        self._mine.release()
        self._others.acquire()
        if self._error is not None:
            raise self._error

    def give_up(self) -> None:
        """End its thread, wherever it is."""
        self._given_up = True
        self._mine.release()
        self._thread.join()

    def result(self) -> Any:
        return self._outcome

    def wait_for(self, block: _StreamedBlock) -> None:
        """Called in the thread: stand in front of a block until it is this call's turn."""
        self.waits_for = block
        self._others.release()
        self._mine.acquire()
        if self._given_up:
            raise SystemExit

    def _run(self) -> None:
        _turn.mine = self
        self._mine.acquire()
        try:
            if not self._given_up:
                self._outcome = self._call()
        except SystemExit:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self.ended = True
            self._others.release()


def _places(model: nn.Module, stored: Mapping[str, Tensor]) -> dict[str, str]:
    """The names in the files of all parameters on meta; tied ones have several names, of which the files have one."""
    shapes = shapes_of(stored)
    known = [name for name in shapes if not OTHER_TOWERS.search(name)]
    ends: dict[str, list[str]] = {}
    for name in known:
        parts = name.split(".")
        for start in range(len(parts)):
            ends.setdefault(".".join(parts[start:]), []).append(name)
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    wanted = {name: parameter for name, parameter in model.named_parameters() if parameter.is_meta}
    found = {
        name: next((place for alias in aliases[id(parameter)] if (place := _place(alias, shapes, ends))), None)
        for name, parameter in wanted.items()
    }
    if not any(found.values()):
        found |= _moved(wanted, ends)
    places, missing = {}, []
    for name, parameter in wanted.items():
        place = found[name]
        if place is None:
            missing.append(name)
        elif shapes[place] != tuple(parameter.shape):
            raise ValueError(f"{place} has shape {list(shapes[place])}, the encoder's {list(parameter.shape)}")
        else:
            places[name] = place
    if missing:
        raise ValueError(f"lacks {len(missing)} tensors, e.g. {missing[0]}: it must hold all of the encoder's weights")
    return places


def _place(name: str, shapes: Mapping[str, Any], ends: Mapping[str, Sequence[str]]) -> str | None:
    """The file's name of a parameter: the same, one in a larger model, or one in a part of the model."""
    if name in shapes:
        return name
    parts = name.split(".")
    for start in range(len(parts)):
        end = ".".join(parts[start:])
        found = [end] if end in shapes and start > 0 else ends.get(end, []) if start == 0 else []
        if len(found) == 1:
            return found[0]
        if len(found) > 1:
            raise ValueError(f"{name} may be {' or '.join(sorted(found)[:3])} of the file: it can't be streamed")
    return None


def _moved(names: Iterable[str], ends: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """The file's names where all have another beginning there, as "model." for "language_model."; {} if not."""
    beginnings: set[tuple[str, str]] | None = None
    for name in names:
        parts = name.split(".")
        tails = [".".join(parts[start:]) for start in range(1, len(parts))]
        pairs = {(name.removesuffix(end), place.removesuffix(end)) for end in tails for place in ends.get(end, ())}
        beginnings = pairs if beginnings is None else beginnings & pairs
    if beginnings is None or len(beginnings) != 1:
        return {}
    ((ours, theirs),) = beginnings
    return {name: theirs + name.removeprefix(ours) for name in names}


def _forget_other_towers(model: nn.Module, dtype: torch.dtype) -> None:
    """Empty the parameters that a prompt does not pass, as those that see pictures."""
    for name, parameter in list(model.named_parameters()):
        if OTHER_TOWERS.search(name):
            _replace(model, parameter, nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False))


def _read(stored: Mapping[str, Tensor], name: str, dtype: torch.dtype) -> Tensor:
    tensor = stored[name].to(dtype)
    _refuse_not_finite(name, tensor)
    return tensor


def _refuse_not_finite(name: str, tensor: Tensor) -> None:
    if first_not_finite({name: tensor}) is not None:
        raise ValueError(f"{name} holds values that are NaN or infinite")


def _put(module: nn.Module, name: str, layer: nn.Module) -> None:
    """Make a layer the submodule at a path."""
    parent, _, own = name.rpartition(".")
    setattr(module.get_submodule(parent), own, layer)


def _replace(model: nn.Module, old: Tensor, new: nn.Parameter) -> None:
    """Put a parameter in the place of another one, wherever in a model it stands."""
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is old:
                module._parameters[name] = new
