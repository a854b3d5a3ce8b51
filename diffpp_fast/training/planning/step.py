"""A training step on meta: the method itself runs on networks without numbers, and bytes and operations are counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffpp_fast.methods import METHODS, Batch, Method
from diffpp_fast.networks import Denoiser, FrozenDecoder, OneStepGenerator, fuse
from diffpp_fast.networks.lora import inject
from diffpp_fast.training.planning.gpu_semantics import GpuSemantics
from diffpp_fast.training.planning.ledger import Ledger
from diffpp_fast.training.planning.models import conditioning, on_meta, parameters_of
from diffpp_fast.training.planning.operations import Operations
from diffpp_fast.training.planning.rewards import Scorer
from diffpp_fast.training.planning.setup import Lora, Setup, Trained


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
class Size:
    """A network's tensors, in elements.

    Attributes:
        trained: of every parameter that is trained.
        frozen: elements of the others and of buffers.
    """

    trained: tuple[int, ...]
    frozen: int

    @property
    def elements(self) -> int:
        return sum(self.trained) + self.frozen


@dataclass(frozen=True)
class Counted:
    """What a step was found to need, and the sizes of its networks."""

    phases: tuple[Phase, ...]
    sizes: Mapping[str, Size]
    #: Of the weights of text encoders and of rewards, whose dtypes are their own.
    text_bytes: int
    reward_bytes: int


def count(setup: Setup) -> Counted:
    """Builds the networks on meta and runs one micro-batch of both updates."""
    networks = _Networks(setup)
    book = _Book()
    method = networks.method(book)
    updates: dict[str, Callable[[Batch], Any]] = {"fake": method.fake_loss, "generator": method.generator_loss}
    with book.semantics.active(), book.operations, book.ledger:
        for update, loss_of in updates.items():
            book.begin(update)
            loss = loss_of(networks.batch()).loss
            book.enter(f"{update} backward", update)
            with book.semantics.autocast(setup.dtype == torch.bfloat16, cached=False):
                loss.backward()
            del loss
            book.enter("", update)
    return Counted(tuple(book.phases), networks.sizes(), networks.text_bytes(), networks.reward_bytes())


class _Book:
    """The phases as they go by."""

    def __init__(self) -> None:
        self.ledger = Ledger()
        self.operations = Operations()
        self.semantics = GpuSemantics()
        self.phases: list[Phase] = []
        self._update = self._name = ""
        self._before: Counter[torch.dtype] = Counter()

    def begin(self, update: str) -> None:
        self._update = update
        self.enter("", update)

    def enter(self, name: str, owner: str, *, recomputed: bool = False) -> None:
        """What comes now is the phase `name`; what it allocates is `owner`'s. Without a name it belongs to no phase.

        Args:
            recomputed: autocast, for what a backward pass computes again.
        """
        total = Counter(self.operations.by_dtype)
        if self._name:
            at_peak = {role: size for role, size in self.ledger.at_peak.items() if size}
            self.phases.append(Phase(self._update, self._name, dict(total - self._before), at_peak))
        self._name, self._before = name, total
        self.ledger.owner = owner
        self.ledger.restart()
        self.semantics.recompute(recomputed)

    def network(self, name: str, owner: str, call: Callable[..., Tensor], autocast: bool) -> Callable[..., Tensor]:
        """A network whose calls are a phase; arithmetic between them goes to the phase before and to the update.

        So is its backward pass, where it has one of its own before the update's.
        """
        backward = f"{name} backward"

        def differentiated(_: Tensor) -> None:
            if self._name != backward:
                self.enter(backward, owner, recomputed=autocast)

        def called(*inputs: Any) -> Tensor:
            if self._name != name:
                self.enter(name, owner)
            self.ledger.owner = owner
            with self.semantics.autocast(autocast):
                result = call(*inputs)
            self.ledger.owner = self._update
            if result.requires_grad and name in ("fake", "reference"):
                result.register_hook(differentiated)
            return result

        return called


class _Networks:
    """Everything on meta, as the trainer puts it together."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        models = setup.models
        self.generator = self._trained("generator")
        self.fake = self._trained("fake")
        self.reference = _cast(self._denoiser(models.reference), _counted(setup.reference_dtype or setup.dtype))
        self.decoder = None
        if models.decoder is not None:
            self.decoder = _cast(on_meta(models.decoder), _counted(setup.decoder_dtype or setup.dtype))
        self.text = [(on_meta(recipe), width) for recipe, width in models.text_encoders]
        self.scorer = None if setup.rewards is None else Scorer(setup.rewards)
        self.held_out = None if setup.held_out is None else Scorer(setup.held_out)
        self.schedule = models.schedule()

    def batch(self) -> Batch:
        setup = self.setup
        return Batch(
            samples=torch.zeros(setup.micro, dtype=torch.int64, device="meta"),
            conditioning=conditioning(self.reference, setup.models, setup.micro),
            shape=setup.models.latent_shape,
            null_conditioning=conditioning(self.reference, setup.models, setup.micro),
        )

    def method(self, book: _Book) -> Method:
        setup = self.setup
        head = OneStepGenerator(Denoiser(self.generator), self.schedule, timestep=setup.models.timestep)
        generator = book.network("generator", "generator", head, _low(self._backbone(setup.generator)))
        fake = book.network("fake", "fake", Denoiser(self.fake), _low(self._backbone(setup.fake)))
        reference = book.network("reference", "reference", Denoiser(self.reference), _low(self.reference.dtype))
        of = METHODS[setup.method]
        arguments: dict[str, Any] = {"guidance_scale": 2.0 if setup.guided else 1.0}
        if setup.method in ("diff_instruct", "diff_instruct_pp", "sim", "diff_instruct_star"):
            # Of the weightings one that no schedule can make infinite: all cost the same.
            arguments["weighting"] = "score" if of.differentiates_networks else "unit"
        if setup.fake_guided:
            arguments["fake_guidance_scale"] = 2.0
        if setup.guidance_outside:
            arguments["guidance"] = "outside"
        if self.scorer is None or self.decoder is None or not of.takes_reward:
            return of(generator, fake, reference, self.schedule, **arguments)
        frozen = FrozenDecoder(self.decoder, checkpoint=setup.decoder_checkpoint)
        decode = book.network("decoder", "decoder", frozen, _low(self.decoder.dtype))
        score = book.network("reward", "reward", self.scorer, autocast=False)

        def reward(x0: Tensor, _: Any) -> Tensor:
            rewards = score(decode(x0))
            book.enter("reward and decoder backward", "decoder")
            return rewards

        arguments |= {"reward": reward, "reward_scale": 1.0}
        return of(generator, fake, reference, self.schedule, **arguments)

    def sizes(self) -> dict[str, Size]:
        sizes = {"generator": size_of(self.generator), "fake": size_of(self.fake), "reference": size_of(self.reference)}
        sizes["decoder"] = Size((), 0 if self.decoder is None else parameters_of(self.decoder))
        return sizes

    def text_bytes(self) -> int:
        return sum(width * parameters_of(network) for network, width in self.text)

    def reward_bytes(self) -> int:
        scorers = [scorer for scorer in (self.scorer, self.held_out) if scorer is not None]
        return sum(parameter.nbytes for scorer in scorers for parameter in scorer.parameters())

    def _denoiser(self, recipe: Callable[[], nn.Module]) -> Any:
        network = on_meta(recipe)
        if self.setup.fuse:
            fuse(network)
        if self.setup.activation_checkpointing:
            network.enable_gradient_checkpointing()
        return network

    def _backbone(self, trained: Trained) -> torch.dtype:
        """That a trained role is computed in; with adapters, what the frozen reference is."""
        setup = self.setup
        return _counted((setup.reference_dtype or setup.dtype) if trained.lora is not None else setup.dtype)

    def _trained(self, role: str) -> Any:
        network = self._denoiser(getattr(self.setup.models, role))
        trained = getattr(self.setup, role)
        if trained.lora is not None:
            _cast(network, self._backbone(trained))
            _add_adapters(network, trained.lora)
        elif trained.zero is not None and trained.zero.stage > 0:
            _cast(network, self.setup.dtype).requires_grad_(True)
        for parameter in network.parameters():
            if parameter.requires_grad:
                # The engine's gradients are counted by themselves.
                parameter.register_post_accumulate_grad_hook(_drop)
        return network


def _low(dtype: torch.dtype) -> bool:
    return dtype == torch.bfloat16


def _counted(dtype: torch.dtype) -> torch.dtype:
    """float16 counts as bfloat16, which takes as much."""
    return torch.bfloat16 if dtype == torch.float16 else dtype


def _cast(network: Any, dtype: torch.dtype) -> Any:
    """Frozen, in another dtype; diffusers' own `to` warns of weights that want to stay float32."""
    return nn.Module.to(network, dtype).requires_grad_(False)


def _add_adapters(network: nn.Module, lora: Lora) -> None:
    with torch.device("meta"):
        inject(network, "planned", rank=lora.rank, alpha=lora.rank, targets=lora.targets)
    for name, parameter in network.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()


def _drop(parameter: Tensor) -> None:
    parameter.grad = None


def size_of(network: nn.Module) -> Size:
    """Return the size of a network whose trained parameters require a gradient."""
    trained = tuple(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    others = (parameter for parameter in network.parameters() if not parameter.requires_grad)
    return Size(trained, sum(tensor.numel() for tensor in (*others, *network.buffers())))
