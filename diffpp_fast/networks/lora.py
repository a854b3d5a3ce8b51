"""LoRA adapters on a frozen network, several of which share one copy of its weights."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import nn

from diffpp_fast.noise import Noise


def inject(network: nn.Module, name: str, *, rank: int, alpha: float, targets: Sequence[str]) -> dict[str, Any]:
    """Put peft's LoRA layers into a network, in place: into the linear layers and convolutions whose names end so.

    In a target `*` stands for the number of a block. Containers of such a name are passed over.

    Returns all of the network's LoRA layers by path. A network with half-precision weights must run under autocast:
    it casts what a matrix product takes, and peft's own cast of every adapted input to float32, a copy that autocast
    casts back and autograd keeps, is switched off.
    """
    from peft import inject_adapter_in_model
    from peft.tuners.lora.layer import LoraLayer

    chosen = _chosen(network, targets)
    settings = settings_of(rank, alpha, chosen or targets)
    with warnings.catch_warnings():
        # Several adapters on one network are what this is for.
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        inject_adapter_in_model(settings, network, name)
    layers: dict[str, Any] = {path: layer for path, layer in network.named_modules() if isinstance(layer, LoraLayer)}
    for layer in layers.values():
        layer.cast_input_dtype_enabled = False
        if not isinstance(layer, _OnRows):
            layer.__class__ = _on_rows(layer.__class__)
    return layers


class Part(NamedTuple):
    """The first `acted` of the `total` samples of a call."""

    acted: int
    total: int


class _OnRows:
    """A LoRA layer that can leave its adapter out for all but the first samples of a call."""

    #: None: the adapter acts on all.
    part: Part | None = None

    def forward(self: Any, x: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        """x [n total, ...], whose samples have n rows each, one after the other -> the layer's output."""
        if self.part is None or not self._active_adapter:
            whole: torch.Tensor = self._whole(x, *arguments, **options)
            return whole
        output: torch.Tensor = self.base_layer(x, *arguments, **options)
        if len(x) % self.part.total:
            raise RuntimeError(
                f"an adapter on {self.part.acted} of {self.part.total} samples got {len(x)} rows, which these can't "
                "share: ask for the roles in calls of their own"
            )
        rows = len(x) // self.part.total * self.part.acted
        (name,) = self._active_adapter
        if name not in self.lora_A:
            return output
        update = self.lora_B[name](self.lora_A[name](x[:rows])) * self.scaling[name]
        changed = (output[:rows] + update).to(output.dtype)
        if torch.is_grad_enabled():
            return torch.cat([changed, output[rows:]])
        output[:rows] = changed
        return output


@cache
def _on_rows(kind: Any) -> type:
    """Return peft's layer of this kind with the choice of rows."""
    return type(kind.__name__, (_OnRows, kind), {"_whole": kind.forward, "__module__": kind.__module__})


class Adapters:
    """The LoRA adapters of one network, by name. One of them is active at a time, or none: the network as it was.

    Adding one injects peft's layers in place; parameters keep their places, and their names get `base_layer` in them.
    All of the network is frozen but the adapters, whichever is active: an adapter that is not active is not part of
    the graph. A switch changes no tensor.

    Under gradient checkpointing blocks are computed again in the backward pass, which must therefore run while the
    adapter of the forward pass is active.

    Args:
        network: from diffusers; fuse it and set its attention first.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network.requires_grad_(False)
        #: Of the adapters that were added.
        self.names: list[str] = []
        self._layers: dict[str, Any] = {}

    def add(
        self, name: str, *, rank: int, alpha: float, targets: Sequence[str], seed: int, stream: int
    ) -> dict[str, nn.Parameter]:
        """Injects an adapter that changes nothing yet: B = 0, and A normal with standard deviation 1 / rank.

        Args:
            name: of the adapter.
            rank: of every layer's update alpha / rank B A.
            alpha: see there.
            targets: the ends of the names of the linear layers and convolutions that get one.
            seed, stream: of the addressed randomness of A; its sample number counts the layers.

        Returns:
            The adapter's parameters, float32, by their names in the network's `state_dict`.

        Raises:
            ValueError: no layer matches, or one is neither linear nor a convolution.
        """
        # peft initialises from the global generator; what it draws is replaced below.
        with torch.random.fork_rng(devices=[]):
            self._layers = inject(self.network, name, rank=rank, alpha=alpha, targets=targets)
        self._deactivate()
        adapted = {path: layer for path, layer in self._layers.items() if name in layer.lora_A}
        parameters = {}
        for number, (path, layer) in enumerate(adapted.items()):
            down, up = layer.lora_A[name], layer.lora_B[name]
            noise = Noise(seed, torch.tensor([number]), stream=stream).normal(tuple(down.weight.shape))[0]
            down.weight.data = (noise / rank).to(down.weight.device)
            up.weight.data = torch.zeros_like(up.weight, dtype=torch.float32)
            parameters[f"{path}.lora_A.{name}.weight"] = down.weight
            parameters[f"{path}.lora_B.{name}.weight"] = up.weight
        # peft freezes an adapter while another one is active.
        for layer in self._layers.values():
            layer.lora_A.requires_grad_(True)
            layer.lora_B.requires_grad_(True)
        self.names.append(name)
        return parameters

    @classmethod
    def of(cls, network: nn.Module, name: str, layers: dict[str, Any]) -> Adapters:
        """Return those of a network into which one adapter was injected already, as it is initialised."""
        adapters = cls.__new__(cls)
        adapters.network, adapters.names, adapters._layers = network, [name], layers
        adapters._deactivate()
        return adapters

    def _deactivate(self) -> None:
        for layer in self._layers.values():
            layer._active_adapter = []

    @contextmanager
    def active(self, name: str | None, part: Part | None = None) -> Iterator[None]:
        """Inside, the network computes with this adapter; with None, as it did before it had any.

        Args:
            name: of the adapter.
            part: the samples that it acts on, where not on all of a call.
        """
        before = [(layer._active_adapter, layer.part) for layer in self._layers.values()]
        # Not peft's `set_adapter`, which also changes what requires gradient.
        chosen = [] if name is None else [name]
        for layer in self._layers.values():
            layer._active_adapter, layer.part = chosen, part
        try:
            yield
        finally:
            for layer, (active, rows) in zip(self._layers.values(), before, strict=True):
                layer._active_adapter, layer.part = active, rows


def settings_of(rank: int, alpha: float, targets: Sequence[str] | str) -> Any:
    """Return peft's settings of an adapter, on layers whose names end so or match a pattern as a whole."""
    from peft import LoraConfig

    modules = targets if isinstance(targets, str) else list(targets)
    return LoraConfig(r=rank, lora_alpha=alpha, target_modules=modules, bias="none")


def _chosen(network: nn.Module, targets: Sequence[str]) -> str:
    """Return a pattern of the names of the modules that targets mean; empty where there is none.

    Raises ValueError for a convolution in groups.
    """
    ends = "|".join(re.escape(target).replace(r"\*", r"\d+") for target in targets)
    wanted = re.compile(rf"(.*\.)?({ends})")
    containers = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
    found = []
    for name, module in network.named_modules():
        if wanted.fullmatch(name) and not isinstance(module, containers):
            if getattr(module, "groups", 1) != 1:
                raise ValueError(
                    f"{name} is a convolution in groups, for which no product B A is the update: name others as targets"
                )
            found.append(re.escape(name))
    return "|".join(found)


def layers_of(names: Iterable[str], adapter: str) -> dict[str, tuple[str, str]]:
    """Return the names of A and B in an adapter's state, by the weight's name in the network without adapters."""
    ending = f".lora_A.{adapter}.weight"
    downs = [name for name in names if name.endswith(ending)]
    return {
        f"{name.removesuffix(ending)}.weight": (name, name.replace(ending, f".lora_B.{adapter}.weight"))
        for name in downs
    }


def merged_weight(weight: torch.Tensor, down: torch.Tensor, up: torch.Tensor, scale: float) -> torch.Tensor:
    """Return weight + scale B A, computed in float32, of a linear layer or a convolution."""
    update = scale * (up.float().flatten(1) @ down.float().flatten(1))
    return weight.float() + update.view_as(weight)
