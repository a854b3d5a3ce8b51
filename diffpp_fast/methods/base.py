"""The data that methods take and give back: batch, roles as callables, result, injection of a known gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from diffpp_fast.noise import Noise
from diffpp_fast.ops.autograd import by_definition, needs_gradient, refused
from diffpp_fast.precision import widen

#: Which stream of addressed randomness serves what. The adapters' initialise LoRA, where samples are layers.
LATENT, DIFFUSION, TIMESTEP, PROMPT_ORDER, GENERATOR_ADAPTER, FAKE_ADAPTER = 0, 1, 2, 3, 4, 5
#: Of methods that look at a sample at two noise levels, and at real latents.
SECOND_TIMESTEP, SECOND_DIFFUSION, REAL_DIFFUSION = 6, 7, 8
#: Whose prompts the TA's loss does without. `noise.USER_STREAMS` are the users', and the first ones above them are what
#: generators draw themselves (`networks.few_step`).
PROMPT_DROPOUT = 9
#: Which image of a user's a sample comes with, and its noise.
IMAGE_ORDER, IMAGE_DIFFUSION = 2**31 + 16, 2**31 + 17

#: (z [B, *shape], conditioning) -> x0 [B, *shape]; one whose attribute `draws` is true also gets `noise`, a stream's
#: number -> the `Noise` of these samples, and `for_loss=True`; where `draws_by_update` is true, also `update`.
Generator = Callable[..., torch.Tensor]
#: (x_t [B, *shape], t [B] int64, conditioning) -> the raw prediction [B, *shape]
Denoiser = Callable[[torch.Tensor, torch.Tensor, Any], torch.Tensor]
#: (x0 [B, *shape], conditioning) -> one reward per sample [B], alone or with what else there is to say of them
Reward = Callable[[torch.Tensor, Any], "torch.Tensor | RewardOutput"]
#: (x_t [B, *shape], t [B] int64, conditioning) -> one logit per sample [B], high for real latents
Discriminator = Callable[[torch.Tensor, torch.Tensor, Any], torch.Tensor]
#: t [B] int64 -> one weight per sample [B]
TimeFunction = Callable[[torch.Tensor], torch.Tensor]


class ImageData(NamedTuple):
    """Latents of users' images [B, *shape], as diffusion sees them, and the conditioning of their captions."""

    latents: torch.Tensor
    conditioning: Any


@dataclass(frozen=True)
class Batch:
    """One sub-step's inputs as addresses: no picture and no drawn noise.

    Args:
        samples: int64 [B], the numbers of these samples in the run, on the device of the networks.
        conditioning: handed to the networks and the reward as it is.
        seed: the run's seed.
        shape: of one latent, without the batch.
        null_conditioning: the unconditional counterpart, for B samples; needed when a method is guided, and when it
            drops prompts.
        real: real latents [B, *shape] of the same prompts; needed by a discriminator and by nothing else.
        normalizer: a scalar, the mean of `Method.normalizers` over the update of which these samples are a part; None:
            they are all of it. Asked for by methods with `normalizes_update` alone.
        x0: samples of the generator [B, *shape] that a step of its own has made of this conditioning; the TA's loss
            learns on them and calls no generator. None: it draws new ones.
        images: as many images with captions of their own, for the regulariser that takes them.
        first: the first sample number of the update of which these samples are a part, for what is drawn once for all
            of it; None: they are all of it, and the number is read off the device.
        steps: of a generator of several, int64 [B]: whose samples `x0` are, where times follow steps.
    """

    samples: torch.Tensor
    conditioning: Any
    seed: int = 0
    shape: tuple[int, ...] = (4, 64, 64)
    null_conditioning: Any = None
    real: torch.Tensor | None = None
    normalizer: torch.Tensor | None = None
    x0: torch.Tensor | None = None
    images: ImageData | None = None
    first: int | None = None
    steps: torch.Tensor | None = None

    def __len__(self) -> int:
        return self.samples.shape[0]

    def noise(self, stream: int) -> Noise:
        """The addressed randomness of these samples in one of the streams."""
        return Noise(self.seed, self.samples, stream=stream)

    def update_noise(self, stream: int) -> Noise:
        """The addressed randomness of the whole update: that of its first sample, on the CPU."""
        first = int(self.samples[0]) if self.first is None else self.first
        return Noise(self.seed, torch.tensor([first]), stream=stream)


class RewardOutput(NamedTuple):
    """The rewards of a batch, with what a reward may say of them besides.

    Attributes:
        values: [B].
        parts: what they are made of, by name, [B] each.
        differentiable: whether they have a graph that leads to the samples. Values that are constant, for this batch or
            for all, may come with one that is only formal.
    """

    values: torch.Tensor
    parts: Mapping[str, torch.Tensor] = MappingProxyType({})
    differentiable: bool = True


class SampleGradient(NamedTuple):
    """A method's gradient on each sample [B, ...], without graph, what to log of it, and the rewards if any.

    `lengths` [B], float32 or wider, are the gradient's norms where the method knows them.
    """

    gradient: torch.Tensor
    metrics: dict[str, torch.Tensor]
    rewards: RewardOutput | None = None
    lengths: torch.Tensor | None = None


class StepOutput(NamedTuple):
    """A scalar to call `backward()` on, and what to log, detached and on the device.

    Attributes:
        loss: float32, or float64 where the samples are.
        metrics: such scalars, by name.
        rewards: of the batch's samples, float32, in a generator's step of a method that has a reward; else None.
        x0: the generator's samples in a step of its own, without graph; else None.
        steps: int64 [B], of the generator's several, whose samples they are, where times follow steps; else None.
    """

    loss: torch.Tensor
    metrics: Mapping[str, torch.Tensor]
    rewards: RewardOutput | None = None
    x0: torch.Tensor | None = None
    steps: torch.Tensor | None = None


class _InjectGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x0: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gradient)
        ctx.dtype = x0.dtype
        return 0.5 / len(gradient) * gradient.square().sum()

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return (grad_output / len(gradient) * gradient).to(ctx.dtype), None


def inject_gradient(x0: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """A scalar whose derivative by x0 is `gradient` / B, exactly.

    Its value is half the mean squared norm of the gradient. The familiar 0.5 (x0 - stop(x0 - gradient))^2 has the same
    value and derivative, but loses the gradient's small digits in the subtraction. Both are computed in float32 at
    least: only a derivative that enters a low-precision x0 is rounded, once.

    Tangents, transforms and second derivatives see the same derivative, constant in x0.

    Raises:
        ValueError: `gradient` requires gradient itself: it is a constant here.
    """
    if needs_gradient(gradient):
        raise ValueError("inject_gradient: gradient is a constant and gets no gradient: detach it")
    gradient = widen(gradient)
    if by_definition():
        (gradient,) = refused("inject_gradient: gradient is a constant without a derivative: detach it", [gradient])
        slope = (gradient * (x0 - x0.detach())).sum()
        return (0.5 * gradient.square().sum() + slope) / len(gradient)
    return _InjectGradient.apply(x0, gradient)


def input_gradient(values: torch.Tensor, x0: torch.Tensor) -> torch.Tensor:
    """Return the derivative of the sum of `values` [B] by x0 [B, ...]; frees the graph between them.

    Raises ValueError where the values have a graph, but not from x0.
    """
    (gradient,) = torch.autograd.grad(values, x0, torch.ones_like(values), allow_unused=True)
    if gradient is None:
        raise ValueError("a reward's or a network's gradient does not reach the samples: are they detached in it?")
    return gradient


def norms(tensor: torch.Tensor) -> torch.Tensor:
    """Each sample's norm, [B], float32 or wider."""
    return torch.linalg.vector_norm(widen(tensor).flatten(1), dim=1)


def is_finite(values: torch.Tensor) -> torch.Tensor:
    """Whether each number is finite: `isfinite` in half the launches."""
    return values - values == 0


def finite_statistics(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation along the last dimension, over what is finite there; NaN where nothing is."""
    finite = is_finite(values)
    count = finite.sum(-1, keepdim=True)
    mean = values.where(finite, 0.0).sum(-1, keepdim=True) / count
    spread = torch.linalg.vector_norm((values - mean).where(finite, 0.0), dim=-1, keepdim=True) / count.sqrt()
    return mean.squeeze(-1), spread.squeeze(-1)


def per_sample(numbers: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """[B] -> [B, 1, ...], to be multiplied with `like`."""
    return numbers.reshape(-1, *[1] * (like.dim() - 1))


def check_choice(name: str, value: object, known: tuple[str, ...]) -> None:
    """Raises ValueError for what is neither one of the names nor a function of t."""
    if value not in known and not callable(value):
        raise ValueError(f"{name} must be one of {', '.join(known)} or a function of t, got {value!r}")
