"""A training step on meta: the method itself runs on networks without numbers, and bytes and operations are counted."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from diffpp_fast.methods import METHODS, Batch, Method
from diffpp_fast.methods.base import ImageData
from diffpp_fast.networks import Denoiser, FewStepGenerator, FrozenDecoder, fuse
from diffpp_fast.networks.last_layer import WideConv2d, WideLinear
from diffpp_fast.networks.lora import Adapters, inject
from diffpp_fast.networks.quantization import quantized_size
from diffpp_fast.networks.quantized_text import saved_bytes
from diffpp_fast.networks.streaming import repeated_blocks
from diffpp_fast.schedule import NoiseSchedule
from diffpp_fast.training.build.agreement import naming
from diffpp_fast.training.build.networks import compute_dtype, stored_weights
from diffpp_fast.training.build.run import make_generator, make_method
from diffpp_fast.training.config import Config, Lora
from diffpp_fast.training.planning.architectures import (
    Architectures,
    Scorer,
    conditioning,
    on_meta,
    parameters_of,
    towers_of,
)

#: What CUDA's autocast computes in low precision and in float32, as far as layers of networks meet it
#: (aten/src/ATen/autocast_mode.h).
LOWER = ("linear", "conv1d", "conv2d", "conv3d", "conv_transpose2d.input")
FLOAT32 = ("layer_norm", "group_norm", "softmax.int", "log_softmax.int")
#: The name of a role's adapters.
ADAPTER = "planned"


@dataclass(frozen=True)
class Phase:
    """A part of an update, for one micro-batch.

    Attributes:
        update: whose weights are updated, "generator" or "fake".
        name: what is done.
        operations: multiplications and additions of matrix products, convolutions and attention, by dtype.
        at_peak: bytes alive at the phase's peak beyond weights, gradients and optimizer, by the role that made them.
    """

    update: str
    name: str
    operations: Mapping[torch.dtype, int]
    at_peak: Mapping[str, int]

    @property
    def peak(self) -> int:
        return sum(self.at_peak.values())


@dataclass(frozen=True)
class NetworkSize:
    """A network's tensors, in elements.

    Attributes:
        trained: of every parameter that is trained.
        frozen: elements of the others and of buffers.
    """

    trained: tuple[int, ...]
    frozen: int
    #: Bytes that the quantised layers' weights take, and their elements, which are among the frozen ones.
    quantized: tuple[int, int] = (0, 0)

    @classmethod
    def of(cls, network: nn.Module) -> NetworkSize:
        """Return the size of a network whose trained parameters require a gradient."""
        trained = tuple(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
        others = (parameter for parameter in network.parameters() if not parameter.requires_grad)
        return cls(trained, sum(tensor.numel() for tensor in (*others, *network.buffers())))

    @property
    def elements(self) -> int:
        return sum(self.trained) + self.frozen

    def frozen_bytes(self, width: int) -> int:
        """Return the bytes of what is not trained, at so many bytes an element."""
        stored, elements = self.quantized
        return stored + width * (self.frozen - elements)


@dataclass(frozen=True)
class Counted:
    """The phases of a step, and the sizes of its networks.

    Attributes:
        text_bytes, reward_bytes: of the weights of text encoders and rewards, whose dtypes are their own.
    """

    phases: tuple[Phase, ...]
    sizes: Mapping[str, NetworkSize]
    text_bytes: int
    reward_bytes: int


def count(config: Config, architectures: Architectures, *, low_weights: tuple[str, ...] = ()) -> Counted:
    """Build the networks on meta and run one micro-batch of both updates.

    Args:
        config: of the run; `training.micro_batch` samples are computed.
        low_weights: which of "generator" and "fake" compute with weights of the run's precision, as ZeRO's stages 1 to
            3 have them, instead of float32 ones under autocast.
    """
    networks = _MetaNetworks(config, architectures, low_weights)
    book = _Book()
    method = networks.method(book)
    low = config.precision == "bfloat16"
    with book.gpu.active(), book.ledger:
        book.begin("fake")
        with networks.as_fake():  # blocks that the backward pass computes again have the adapter of then
            _backward(book, method.fake_loss(networks.batch()).loss, low)
        book.begin("generator")
        if method.normalizes_update and (config.training.micro_batch or 0) < config.training.global_batch:
            book.suffix = " for the normalizer"
            method.normalizers(networks.batch())
            book.suffix = ""
        _backward(book, method.generator_loss(networks.batch()).loss, low)
    return Counted(tuple(book.phases), networks.sizes(), networks.text_bytes(), networks.reward_bytes())


def _backward(book: _Book, loss: Tensor, low: bool) -> None:
    book.enter(f"{book.update} backward", book.update)
    with book.gpu.autocast(low, cached=False):
        loss.backward()
    del loss
    book.enter("", book.update)


class Ledger(TorchDispatchMode):
    """Counts the bytes alive and the operations of all that is computed on meta while the mode is on.

    Storages count once and whole, however many tensors lie in them. What was there before, such as parameters, does
    not count, and neither does a view of it. Tensors on meta live and die as they would on a device: autograd keeps
    them, checkpointing drops and remakes them, and a freed graph frees them.

    Operations are those of torch's formulas, two for each multiplication and addition of matrix products, convolutions
    and attention; `FlopCounterMode`'s hooks on modules do not go with `torch.autograd.grad`. Norms, activations, noise
    and optimizers are not counted: memory, not arithmetic, is their measure.

    Attributes:
        owner: whom new storages belong to.
        alive: bytes alive by owner.
        peak: the most bytes alive at once since `restart`.
        at_peak: `alive` at that moment.
        operations: by the dtype of what they multiply.
    """

    def __init__(self) -> None:
        super().__init__()
        self.owner = ""
        self.alive: Counter[str] = Counter()
        self.peak = 0
        self.at_peak: dict[str, int] = {}
        self.operations: Counter[torch.dtype] = Counter()
        self._total = 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._calls: dict[Any, _Call] = {}

    def restart(self) -> None:
        """Forget the peak; what is alive now is the least that the next one can be."""
        self.peak, self.at_peak = self._total, dict(self.alive)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.is_view:
            return func(*args, **kwargs)
        call = func, _layout(args), _layout((*kwargs.items(),))
        counted, given = self._calls.get(call), set[int]()
        if counted is not None and counted.result is not None:
            result = _like(counted.result)
        else:
            result, given = func(*args, **kwargs), {_key(tensor) for tensor in _tensors((*args, *kwargs.values()))}
            if counted is None:
                counted = self._calls[call] = _Call.of(func, args, kwargs, result, given)
        if counted.operations:
            self.operations[counted.dtype] += counted.operations
        for tensor in _tensors((result,)):
            if tensor.is_meta and (key := _key(tensor)) not in self._known and key not in given:
                self._born(tensor.untyped_storage(), key)
        return result

    def _born(self, storage: torch.UntypedStorage, key: int) -> None:
        owner, size = self.owner, storage.nbytes()
        self._known[key] = weakref.ref(storage, lambda _: self._died(key, owner, size))
        self.alive[owner] += size
        self._total += size
        if self._total > self.peak:
            self.restart()

    def _died(self, key: int, owner: str, size: int) -> None:
        del self._known[key]
        self.alive[owner] -= size
        self._total -= size


class _Call(NamedTuple):
    """The count of an operator's calls with the same layouts and numbers, which networks repeat layer after layer.

    torch finds most results' layouts in Python, in up to milliseconds.

    Attributes:
        result: the layout of a new result; None where it is no new one, or not a tensor on meta.
        dtype, operations: as `Ledger` counts them.
    """

    result: Any
    dtype: torch.dtype
    operations: int

    @classmethod
    def of(cls, func: Any, args: Any, kwargs: Mapping[str, Any], result: Any, given: set[int]) -> _Call:
        formula = flop_registry.get(func._overloadpacket)
        dtype = next((tensor.dtype for tensor in _tensors((*args, *kwargs.values()))), torch.float32)
        operations = 0 if formula is None else int(formula(*args, **kwargs, out_val=result))
        if (
            formula is not None
            and func._overloadpacket is torch.ops.aten.convolution_backward
            and args[9] > 1
            and args[10][1]
        ):
            # torch counts a weight's gradient as if every channel met all others, and not those of its group alone.
            of_weight = int(formula(*args[:10], [False, True, False], out_val=result))
            operations -= of_weight - of_weight // args[9]
        made = list(_tensors((result,)))
        is_new = isinstance(result, Tensor | tuple) and len({*map(_key, made)} - given) == len(made) > 0
        return cls(_layout(result) if is_new and all(map(_is_whole, made)) else None, dtype, operations)


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


class _Layout(NamedTuple):
    """A tensor without its numbers."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def _layout(value: Any) -> Any:
    """Return tensors as layouts, in tuples, and numbers with their types: for operators 1, 1.0 and True differ."""
    if isinstance(value, Tensor):
        return _Layout(value.shape, value.stride(), value.dtype, value.device)
    if isinstance(value, list | tuple):
        return tuple(map(_layout, value))
    return value if value is None else (type(value), value)


def _like(layout: Any) -> Any:
    """Return new tensors of layouts in tuples, None for None."""
    if isinstance(layout, _Layout):
        return torch.empty_strided(layout.shape, layout.strides, dtype=layout.dtype, device=layout.device)
    return layout if layout is None else tuple(map(_like, layout))


def _is_whole(tensor: Tensor) -> bool:
    """Return whether a tensor on meta lies in a storage of just its size."""
    size = tensor.untyped_storage().nbytes()
    return tensor.is_meta and _like(_layout(tensor)).untyped_storage().nbytes() == size


class GpuKernels:
    """Kernels for meta as a GPU has them: fused attention, which keeps no table of weights, and autocast.

    torch has no autocast for meta, and takes the unfused attention there. While `active`, these operators have kernels
    for meta that do as on a GPU, also where a backward pass recomputes.
    """

    def __init__(self) -> None:
        self._autocast = False
        self._copies: dict[int, Tensor] | None = None

    @contextmanager
    def active(self) -> Iterator[None]:
        with torch.library._scoped_library("aten", "IMPL") as library:
            library.impl("scaled_dot_product_attention", self._attention, "AutogradMeta")
            for names, cast in ((LOWER, self._lowered), (FLOAT32, self._raised)):
                for name in names:
                    packet, _, overload = name.partition(".")
                    operator = getattr(getattr(torch.ops.aten, packet), overload or "default")
                    library.impl(name, self._under_autocast(operator, cast), "AutogradMeta")
            yield

    @contextmanager
    def autocast(self, enabled: bool, *, cached: bool = True) -> Iterator[None]:
        """Inside, operators take the dtype that bfloat16 autocast on CUDA gives them, if `enabled`.

        Args:
            cached: keep the copies of weights to the end, as torch does for leaves that require a gradient. What is
                recomputed in a backward pass has short caches of its own.
        """
        before = self._autocast, self._copies
        self._autocast, self._copies = enabled, {} if cached else None
        try:
            yield
        finally:
            self._autocast, self._copies = before

    def recompute(self, enabled: bool) -> None:
        """From here on, outside of `autocast`, operators do as inside it, without a cache, if `enabled`."""
        self._autocast, self._copies = enabled, None

    def leave_out(self, layer: nn.Module) -> None:
        """Let a layer compute as if there were no autocast."""
        before: list[tuple[bool, dict[int, Tensor] | None]] = []

        def enter(*_: Any) -> None:
            before.append((self._autocast, self._copies))
            self.recompute(False)

        def leave(*_: Any) -> None:
            self._autocast, self._copies = before.pop()

        layer.register_forward_pre_hook(enter)
        layer.register_forward_hook(leave)

    def _under_autocast(self, operator: Any, cast: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
        def kernel(*args: Any, **kwargs: Any) -> Any:
            if self._autocast:
                args = tuple(cast(value) if isinstance(value, Tensor) else value for value in args)
                kwargs = {name: cast(value) if isinstance(value, Tensor) else value for name, value in kwargs.items()}
            return operator.decompose(*args, **kwargs)

        return kernel

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Keeps q, k, v, the output and a number per row. The efficient kernel serves every head dimension and mask."""
        if attn_mask is not None:
            attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
        inputs = [query, key, value] if attn_mask is None else [query, key, value, attn_mask]
        if self._autocast:
            inputs = [self._lowered(tensor) for tensor in inputs]
        query, key, value, *mask = inputs
        attended: Tensor = torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, mask[0] if mask else None, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale
        )[0]
        return attended

    def _lowered(self, tensor: Tensor) -> Tensor:
        if tensor.dtype != torch.float32:
            return tensor
        if self._copies is None or not (tensor.is_leaf and tensor.requires_grad):
            return tensor.to(torch.bfloat16)
        if id(tensor) not in self._copies:
            self._copies[id(tensor)] = tensor.to(torch.bfloat16)
        return self._copies[id(tensor)]

    def _raised(self, tensor: Tensor) -> Tensor:
        return tensor.float() if tensor.dtype == torch.bfloat16 else tensor


class _Book:
    """The phases as they go by.

    Attributes:
        update: the one that is under way.
        suffix: of the names of phases.
    """

    def __init__(self) -> None:
        self.ledger = Ledger()
        self.gpu = GpuKernels()
        self.phases: list[Phase] = []
        self.update = self.suffix = self._name = ""
        self._before: Counter[torch.dtype] = Counter()

    def begin(self, update: str) -> None:
        self.update = update
        self.enter("", update)

    def enter(self, name: str, owner: str, *, recomputed: bool = False) -> None:
        """Begin the phase `name`, whose allocations are `owner`'s. What follows an empty name belongs to no phase.

        Args:
            recomputed: autocast, for what a backward pass computes again.
        """
        total = Counter(self.ledger.operations)
        if self._name:
            at_peak = {role: size for role, size in self.ledger.at_peak.items() if size}
            self.phases.append(Phase(self.update, self._name, dict(total - self._before), at_peak))
        self._name, self._before = name, total
        self.ledger.owner = owner
        self.ledger.restart()
        self.gpu.recompute(recomputed)

    def network(self, role: str, call: nn.Module, autocast: bool) -> Callable[..., Tensor]:
        """Return a network whose calls are a phase; arithmetic between them goes to the phase before and to the update.

        So is its backward pass, where it has one of its own before the update's.
        """
        backward = f"{role} backward"

        def differentiated(_: Tensor) -> None:
            if self._name != backward:
                self.enter(backward, role, recomputed=autocast)

        def called(*inputs: Any, **options: Any) -> Tensor:
            if self._name != role + self.suffix:
                self.enter(role + self.suffix, role)
            self.ledger.owner = role
            with self.gpu.autocast(autocast):
                result: Tensor = call(*inputs, **options)
            self.ledger.owner = self.update
            if result.requires_grad and role in ("fake", "reference"):
                result.register_hook(differentiated)
            return result

        if isinstance(call, FewStepGenerator):
            for name in ("draws", "draws_by_update", "timesteps", "loss_steps", "steps"):
                setattr(called, name, getattr(call, name))
        if isinstance(call, Denoiser):
            for name in ("adapters", "adapter", "dtype", "guidance", "joins"):
                setattr(called, name, getattr(call, name))
        return called


class _MetaNetworks:
    """All of a run's networks on meta, as the trainer puts them together."""

    def __init__(self, config: Config, architectures: Architectures, low_weights: tuple[str, ...]) -> None:
        self.config, self.architectures = config, architectures
        models = config.models
        self.dtype = compute_dtype("auto", config)
        self.reference_dtype = _counted(compute_dtype(models.reference.dtype, config))
        #: Of a fake score on the reference's weights.
        self.adapters: Adapters | None = None
        self.generator, self.fake = (self._trained(role, role in low_weights) for role in ("generator", "fake"))
        self.reference = _cast(self._network("reference"), self.reference_dtype)
        self.decoder: FrozenDecoder | None = None
        if architectures.decoder is not None and models.decoder is not None:
            vae = _cast(on_meta(architectures.decoder), _counted(compute_dtype(models.decoder.dtype, config)))
            with naming("models.decoder"):
                self.decoder = FrozenDecoder(vae, checkpoint=models.decoder.checkpoint, rows=models.decoder.rows)
        self.text = [(on_meta(recipe), width) for recipe, width in architectures.text_encoders]
        rewards = config.rewards.optimised, config.rewards.held_out
        self.scorer, self.held_out = (None if reward is None else Scorer(towers_of(reward)) for reward in rewards)

    def as_fake(self) -> AbstractContextManager[None]:
        """Inside, the network that fake score and reference share computes as the fake score."""
        return nullcontext() if self.adapters is None else self.adapters.active(ADAPTER)

    def batch(self) -> Batch:
        samples = self.config.training.micro_batch or self.config.training.global_batch
        return Batch(
            samples=torch.zeros(samples, dtype=torch.int64, device="meta"),
            conditioning=conditioning(self.reference, self.architectures, samples),
            shape=self.config.models.latent_shape,
            null_conditioning=conditioning(self.reference, self.architectures, samples),
            images=self._images(samples),
        )

    def _images(self, samples: int) -> ImageData | None:
        if self.config.method.images is None:
            return None
        latents = torch.empty(samples, *self.config.models.latent_shape, device="meta")
        return ImageData(latents, conditioning(self.reference, self.architectures, samples))

    def method(self, book: _Book) -> Method:
        schedule = self.architectures.schedule()
        denoisers = {role: Denoiser(getattr(self, role)) for role in ("generator", "fake", "reference")}
        if self.adapters is not None:
            # One network as both roles, which may be asked in one call.
            denoisers["fake"] = Denoiser(self.fake, adapters=self.adapters, adapter=ADAPTER)
            denoisers["reference"] = Denoiser(self.fake, adapters=self.adapters)
        for denoiser in denoisers.values():
            for layer in denoiser.modules():
                if isinstance(layer, WideConv2d | WideLinear):
                    book.gpu.leave_out(layer)
        low = torch.bfloat16
        generator = make_generator(self.config, denoisers["generator"], schedule)
        return make_method(
            self.config,
            book.network("generator", generator, self._computes_in("generator") == low),
            book.network("fake", denoisers["fake"], self._computes_in("fake") == low),
            book.network("reference", denoisers["reference"], self.reference_dtype == low),
            schedule,
            self._reward(book),
            self._start(book, schedule),
        )

    def _start(self, book: _Book, schedule: NoiseSchedule) -> Callable[..., Tensor] | None:
        """The generator as it was: its weights, of which a copy counts as the reference's, at the cost of a call."""
        if not self.config.method.pulled_to_start:
            return None
        generator = make_generator(self.config, Denoiser(self.reference), schedule)
        return book.network("reference", generator, self.reference_dtype == torch.bfloat16)

    def _reward(self, book: _Book) -> Callable[[Tensor, Any], Tensor] | None:
        if self.scorer is None or self.decoder is None or not METHODS[self.config.method.name].takes_reward:
            return None
        decode = book.network("decoder", self.decoder, self.decoder.vae.dtype == torch.bfloat16)
        score = book.network("reward", self.scorer, autocast=False)

        def reward(x0: Tensor, _: Any) -> Tensor:
            rewards = score(decode(x0))
            book.enter("reward and decoder backward", "decoder")
            return rewards

        return reward

    def sizes(self) -> dict[str, NetworkSize]:
        sizes = {role: NetworkSize.of(getattr(self, role)) for role in ("generator", "fake", "reference")}
        kind = self.config.models.reference.quantization
        if kind is not None:
            sizes["reference"] = replace(sizes["reference"], quantized=quantized_size(self.reference, kind))
        sizes["decoder"] = NetworkSize((), 0 if self.decoder is None else parameters_of(self.decoder))
        return sizes

    def text_bytes(self) -> int:
        models = self.config.models
        encoders = filter(None, (models.text_encoder, models.text_encoder_2, models.text_encoder_3))
        total = sum(width * parameters_of(network) for network, width in self.text)
        # A known model has encoders that its configuration does not list.
        for encoder, (network, width) in zip(encoders, self.text, strict=False):
            if encoder.quantization is not None:
                total -= saved_bytes(repeated_blocks(network), encoder.quantization, width)
        return total

    def reward_bytes(self) -> int:
        scorers = [scorer for scorer in (self.scorer, self.held_out) if scorer is not None]
        return sum(scorer.weight_bytes() for scorer in scorers)

    def _network(self, role: str) -> Any:
        network = on_meta(getattr(self.architectures, role))
        if self.config.training.fuse:
            fuse(network)
        if self.config.training.activation_checkpointing:
            network.enable_gradient_checkpointing()
        return network

    def _computes_in(self, role: str) -> torch.dtype:
        """Return the dtype that a trained role computes in; with adapters, that of the frozen reference."""
        return self.dtype if getattr(self.config.models, role).lora is None else self.reference_dtype

    def _trained(self, role: str, low: bool) -> Any:
        network, lora = self._network(role), getattr(self.config.models, role).lora
        if lora is not None:
            layers = _add_adapters(_cast(network, self.reference_dtype), lora)
            models = self.config.models
            if role == "fake" and stored_weights(models, role) == stored_weights(models, "reference"):
                self.adapters = Adapters.of(network, ADAPTER, layers)
        elif low:
            _cast(network, self.dtype).requires_grad_(True)
        for parameter in network.parameters():
            if parameter.requires_grad:
                # The engine's gradients are counted by themselves.
                parameter.register_post_accumulate_grad_hook(_drop)
        return network


def _counted(dtype: torch.dtype) -> torch.dtype:
    """float16 counts as bfloat16, which takes as much."""
    return torch.bfloat16 if dtype == torch.float16 else dtype


def _cast(network: Any, dtype: torch.dtype) -> Any:
    """Frozen, in another dtype; diffusers' own `to` warns of weights that want to stay float32."""
    return nn.Module.to(network, dtype).requires_grad_(False)


def _add_adapters(network: nn.Module, lora: Lora) -> dict[str, Any]:
    with torch.device("meta"):
        layers = inject(network, ADAPTER, rank=lora.rank, alpha=lora.rank, targets=lora.targets)
    for name, parameter in network.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()
    return layers


def _drop(parameter: Tensor) -> None:
    parameter.grad = None
