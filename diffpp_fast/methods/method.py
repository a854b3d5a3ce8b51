"""The base of all methods: the roles, the samples and their noise levels, and the teaching assistant's loss."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple, TypedDict, get_args

import torch

from diffpp_fast import ops
from diffpp_fast.methods.base import (
    DIFFUSION,
    LATENT,
    PROMPT_DROPOUT,
    TIMESTEP,
    Batch,
    Denoiser,
    Generator,
    SampleGradient,
    StepOutput,
    TimeFunction,
    check_choice,
    inject_gradient,
    input_gradient,
    norms,
)
from diffpp_fast.methods.dropout import drop_prompts
from diffpp_fast.methods.guidance import Guided, guide
from diffpp_fast.methods.outputs import check_differentiable, check_output
from diffpp_fast.methods.passes import Pass, predict
from diffpp_fast.methods.regularizers import Regularizer
from diffpp_fast.methods.times import StepTimes, TimeDistribution, TimeIntervals, Times
from diffpp_fast.networks.few_step import draw_options
from diffpp_fast.noise import Noise
from diffpp_fast.prediction import MEAN_ABS_FLOOR
from diffpp_fast.schedule import LARGEST_GAP_SCALE, NoiseSchedule

#: A sum of samples of which one weighs so much holds nothing of the others in float32.
LARGEST_WEIGHT = 1e8
#: Elements of a batch from which its diffusion noise, which x_t and the loss both need, is drawn once on the CPU and
#: kept: from 2^16 on that takes .8 of the time, at 2^14 as long, below longer. On GPUs it is drawn again, in about 30
#: instructions an element; 4 bytes to write and 8 to read take longer on an H200, and so does a launch more.
LEAST_KEPT_NOISE = 2**15

FakeWeighting = Literal["prediction", "x0", "score"]


class Noised(NamedTuple):
    """Samples at a drawn noise level: x_t [B, ...], t, alpha, sigma and k [B], and the noise by its address or kept."""

    x_t: torch.Tensor
    t: torch.Tensor
    alpha: torch.Tensor
    sigma: torch.Tensor
    k: torch.Tensor
    noise: Noise | torch.Tensor


class Options(TypedDict, total=False):
    """Arguments of `Method` that no method gives a default of its own."""

    share_samples: bool
    batched_passes: bool | None
    fake_t_range: tuple[int, int] | None
    time_distribution: TimeDistribution | None
    fake_time_distribution: TimeDistribution | None
    time_intervals: TimeIntervals
    guidance_rescale: float
    prompt_dropout: float
    regularizers: Sequence[Regularizer] | None


@dataclass(eq=False, repr=False)
class Method(ABC):
    """Moves a generator of one step, or a few, by a gradient on its samples, and keeps a teaching assistant on them.

    A method says what that gradient is, in `_sample_gradient`; everything else is the same for all. A subclass is a
    dataclass, too: it adds arguments as fields and checks them in `__post_init__`.

    Args:
        generator: (z, conditioning) -> x0; gets gradient in `generator_loss` only. One that draws is handed the
            batch's addresses (`networks.FewStepGenerator`); both losses then see the x0 of the step that it draws.
        fake: the teaching assistant (TA), (x_t, t, conditioning) -> prediction; gets gradient in `fake_loss` only.
        reference: the frozen model, called like `fake`; never gets gradient.
        schedule: noise levels and the prediction type that `fake` and `reference` share.
        guidance_scale: w of classifier-free guidance of the reference, in diffusers' convention: 1 is none. Authors who
            call 0 none mean w - 1. Anything but 1 needs `Batch.null_conditioning` and costs one more reference call.
        t_range: diffusion times [low, high) to draw from; None is the whole schedule.
        fake_rounds: TA updates per generator update. The method does not act on it: its caller does.
        share_samples: the last of these updates learns on the samples of the generator's own step, after it, as DMD2's
            published loop does: one call of the generator less. The method does not act on it, either.
        batched_passes: the reference's two passes, with the prompt and without, are one call of twice the batch; with
            the TA's where it is LoRA on the reference's `Denoiser` and nothing is differentiated. Equal up to rounding.
            False: a call each. None: one call where it is small, see `methods.passes`.
        fake_weighting: lambda(t) of the TA's denoising loss: of the prediction itself (1), of the x0 that it implies
            (k^2), of the score (k^2 alpha^2 / sigma^4); or a function of t.
        fake_t_range: diffusion times of the TA's loss; None is `t_range`.
        time_distribution: how often each time of `t_range` is drawn, from `methods.times`; None is uniform.
        fake_time_distribution: the same of `fake_t_range`; None is `time_distribution`.
        time_intervals: which times all losses draw for a sample of one of the generator's several steps, by the step:
            see `methods.times.TimeIntervals`.
        guidance_rescale: in [0, 1]: how much the guided output's spread is brought back to that of the output with the
            prompt, see `methods.guidance.guide`.
        prompt_dropout: the share of the samples in the TA's loss that generator and TA see with
            `Batch.null_conditioning` instead of their prompt.
        regularizers: from `methods.regularizers`, added to the generator's loss.

    Raises ValueError for an option that is not known or out of range, and for times at which the loss is not finite.
    """

    #: Whether the arguments reward, reward_scale and reward_clip are there.
    takes_reward: ClassVar[bool] = False
    #: Which of "fake" and "reference" the generator's loss is differentiated through; the others are under no_grad.
    differentiates: ClassVar[tuple[str, ...]] = ()

    generator: Generator
    fake: Denoiser
    reference: Denoiser
    schedule: NoiseSchedule
    _: KW_ONLY
    guidance_scale: float = 1.0
    t_range: tuple[int, int] | None = None
    fake_rounds: int = 1
    share_samples: bool = False
    batched_passes: bool | None = None
    fake_weighting: FakeWeighting | TimeFunction = "prediction"
    fake_t_range: tuple[int, int] | None = None
    time_distribution: TimeDistribution | None = None
    fake_time_distribution: TimeDistribution | None = None
    time_intervals: TimeIntervals = "whole"
    guidance_rescale: float = 0.0
    prompt_dropout: float = 0.0
    regularizers: Sequence[Regularizer] | None = None

    def __post_init__(self) -> None:
        check_choice("fake_weighting", self.fake_weighting, get_args(FakeWeighting))
        if self.fake_rounds < 1:
            raise ValueError(f"fake_rounds must be at least 1, got {self.fake_rounds}")
        if not math.isfinite(self.guidance_scale):
            raise ValueError(f"guidance_scale must be finite, got {self.guidance_scale}")
        if not 0.0 <= self.guidance_rescale <= 1.0:
            raise ValueError(f"guidance_rescale must lie in [0, 1], got {self.guidance_rescale}")
        if not 0.0 <= self.prompt_dropout < 1.0:
            raise ValueError(f"prompt_dropout must lie in [0, 1), got {self.prompt_dropout}")
        if self.batched_passes not in (True, False, None):
            raise ValueError(f"batched_passes must be True, False or None, got {self.batched_passes!r}")
        if self.share_samples and self.prompt_dropout > 0.0:
            raise ValueError(
                f"prompt_dropout is {self.prompt_dropout}: it makes samples without their prompt, and those that "
                "share_samples takes were made with it: leave one of them out"
            )
        if self.time_intervals not in get_args(TimeIntervals):
            known = ", ".join(get_args(TimeIntervals))
            raise ValueError(f"time_intervals must be one of {known}, got {self.time_intervals!r}")
        if self.time_intervals != "whole" and len(getattr(self.generator, "timesteps", ())) < 2:
            raise ValueError(
                f"time_intervals {self.time_intervals!r} are those of a generator's several timesteps, and this one "
                "makes a single call: leave it 'whole'"
            )
        #: (losses [B], x0) -> d sum of losses / dx0, through the networks; a trainer that times the pass wraps it.
        self.differentiate = input_gradient
        self.times = self._times("t_range", self.t_range, self.time_distribution)
        self.fake_times = (
            self.times
            if self.fake_t_range is None and self.fake_time_distribution is None
            else self._times(
                "t_range" if self.fake_t_range is None else "fake_t_range",
                self.t_range if self.fake_t_range is None else self.fake_t_range,
                self.fake_time_distribution or self.time_distribution,
            )
        )
        self.t_range, self.fake_t_range = self.times.range, self.fake_times.range
        self._refuse_pure_noise(self.times)
        self._check_weighting("fake_weighting", self.fake_weighting, self._fake_weight, self.fake_times)
        if self.fake_weighting == "x0":
            self._refuse_large_gap_scale("fake_weighting 'x0'", self.fake_times)

    def fake_loss(self, batch: Batch) -> StepOutput:
        """Denoising score matching of the TA on fresh samples of the generator (scalar; gradient to the TA only)."""
        if self.prompt_dropout > 0.0:
            null = self._null(batch, "prompt_dropout", self.prompt_dropout)
            dropped = batch.noise(PROMPT_DROPOUT).uniform() < self.prompt_dropout
            batch = replace(batch, conditioning=drop_prompts(batch.conditioning, null, dropped))
        return self._fake_loss(batch)

    def _fake_loss(self, batch: Batch) -> StepOutput:
        loss = self._denoising_loss(batch, self._fake_samples(batch))
        return StepOutput(loss, {"loss": loss.detach()})

    def generator_loss(self, batch: Batch) -> StepOutput:
        """A scalar whose gradient by x0[b] is the method's gradient on that sample / B (to the generator only).

        Its value is half the mean squared norm of these gradients, see `inject_gradient`, and what regularisers add.
        """
        x0 = self._sample(batch)
        check_differentiable("the generator", x0, "its parameters")
        found = self._sample_gradient(batch, x0.detach())
        gradient, metrics, losses = found.gradient, dict(found.metrics), []
        for regularizer in self.regularizers or ():
            term = regularizer(batch, x0.detach(), partial(self._sample, batch), self.generator)
            metrics |= term.metrics
            gradient = gradient if term.gradient is None else gradient + term.gradient
            losses += [] if term.loss is None else [term.loss]
        loss = sum(losses, inject_gradient(x0, gradient))
        samples = x0.detach()
        std, mean = torch.std_mean(samples, correction=0)
        about = {"loss": loss.detach(), "x0_mean": mean, "x0_std": std}
        return StepOutput(loss, {**metrics, **about}, found.rewards, samples, self._steps(batch))

    @property
    def normalizes_update(self) -> bool:
        """Whether the gradient on a sample is divided by a mean over all samples of the update."""
        return False

    def normalizers(self, batch: Batch) -> torch.Tensor:
        """Return the numbers [B] whose mean over an update divides its gradients, where `normalizes_update` is true."""
        raise NotImplementedError(f"{type(self).__name__} takes no mean over an update")

    @abstractmethod
    def _sample_gradient(self, batch: Batch, x0: torch.Tensor) -> SampleGradient:
        """Return the gradient on each sample, summed over elements and without graph, and what to log of it."""

    @torch.no_grad()
    def _fake_samples(self, batch: Batch) -> torch.Tensor:
        """Return the samples that the TA learns on."""
        if batch.x0 is None:
            return self._sample(batch)
        if batch.x0.shape != (len(batch), *batch.shape):
            raise ValueError(f"Batch.x0 must have shape {(len(batch), *batch.shape)}, got {tuple(batch.x0.shape)}")
        return batch.x0.detach()

    def _sample(self, batch: Batch, generator: Generator | None = None) -> torch.Tensor:
        """Return the samples of the generator, or of another one at the same latents and prompts."""
        z = batch.noise(LATENT).normal(batch.shape)
        generator = generator or self.generator
        drawn = draw_options(generator, batch.noise, batch.update_noise, for_loss=True)
        return check_output("the generator", generator(z, batch.conditioning, **drawn), z)

    def _times(self, name: str, t_range: tuple[int, int] | None, distribution: TimeDistribution | None = None) -> Times:
        """Return the times that a loss draws."""
        if self.time_intervals == "whole":
            return Times(name, self.schedule, t_range, distribution)
        of: Any = self.generator
        nested = self.time_intervals == "nested"
        return StepTimes(name, self.schedule, t_range, distribution, of.timesteps, of.loss_steps, nested=nested)

    def _steps(self, batch: Batch) -> torch.Tensor | None:
        """Return the generator's steps [B] whose samples the losses of a batch see, where times follow them."""
        if self.time_intervals == "whole":
            return None
        if batch.x0 is None:
            of: Any = self.generator
            steps: torch.Tensor = of.steps(batch.noise, batch.update_noise)
            return steps
        if batch.steps is None:
            raise ValueError(
                f"time_intervals {self.time_intervals!r} needs Batch.steps beside Batch.x0: those of the StepOutput "
                "that has given it"
            )
        return batch.steps

    def _noised(
        self,
        batch: Batch,
        x0: torch.Tensor,
        *,
        times: Times | None = None,
        streams: tuple[int, int] = (TIMESTEP, DIFFUSION),
    ) -> Noised:
        """x0 at times (those of the generator's loss, if None), drawn with the noise from these two streams."""
        timestep, diffusion = streams
        t = (times or self.times).draw(batch.noise(timestep), self._steps(batch))
        alpha, sigma, k = self.schedule.lookup(t)
        noise = _kept_if_faster(batch.noise(diffusion), x0)
        return Noised(ops.add_noise(x0, alpha, sigma, noise), t, alpha, sigma, k, noise)

    def _target(self, x0: torch.Tensor, at: Noised) -> dict[str, Any]:
        """The arguments of operators that say what the network was to predict."""
        prediction_type = self.schedule.prediction_type
        return {"x0": x0, "noise": at.noise, "alpha": at.alpha, "sigma": at.sigma, "prediction_type": prediction_type}

    def _denoising_loss(self, batch: Batch, x0: torch.Tensor) -> torch.Tensor:
        at = self._noised(batch, x0, times=self.fake_times)
        prediction = self._ask_fake(batch, at)
        check_differentiable("the fake score", prediction, "its parameters")
        weight = self._fake_weight(at.t, at.alpha, at.sigma, at.k)
        return ops.denoising_loss(prediction, **self._target(x0, at), weight=weight)

    def _ask(self, batch: Batch, at: Noised) -> tuple[torch.Tensor, Guided]:
        """The TA's output and the reference's."""
        fake, reference = self._fake_passes(batch, at), self._reference_passes(batch, at)
        outputs = predict([*fake, *reference], self.batched_passes)
        return self._guided_fake(outputs[: len(fake)]), self._guided(outputs[len(fake) :])

    def _ask_fake(self, batch: Batch, at: Noised) -> torch.Tensor:
        return self._guided_fake(predict(self._fake_passes(batch, at), self.batched_passes))

    def _ask_reference(self, batch: Batch, at: Noised) -> Guided:
        """The reference's outputs with the prompt and, if guided, without; rescaled they are one."""
        return self._guided(predict(self._reference_passes(batch, at), self.batched_passes))

    def _fake_passes(self, batch: Batch, at: Noised) -> list[Pass]:
        return [self._pass_of("fake", at, batch.conditioning)]

    def _guided_fake(self, outputs: Sequence[torch.Tensor]) -> torch.Tensor:
        return outputs[0]

    def _reference_passes(self, batch: Batch, at: Noised) -> list[Pass]:
        passes = [self._pass_of("reference", at, batch.conditioning)]
        if self.guidance_scale != 1.0:
            null = self._null(batch, "guidance_scale", self.guidance_scale)
            passes.append(self._pass_of("reference", at, null))
        return passes

    def _guided(self, outputs: Sequence[torch.Tensor]) -> Guided:
        if len(outputs) == 1:
            return Guided(outputs[0], None, 1.0)
        cond, uncond = outputs
        if self.guidance_rescale == 0.0:
            return Guided(cond, uncond, self.guidance_scale)
        return Guided(guide(cond, uncond, self.guidance_scale, self.guidance_rescale), None, 1.0)

    def _pass_of(self, role: Literal["fake", "reference"], at: Noised, conditioning: Any) -> Pass:
        who, network = ("the fake score", self.fake) if role == "fake" else ("the reference", self.reference)
        return Pass(who, network, at.x_t, at.t, conditioning)

    def _null(self, batch: Batch, name: str, scale: float) -> Any:
        """The unconditional conditioning, which an option with this value needs."""
        if batch.null_conditioning is None:
            raise ValueError(f"{name} {scale} needs Batch.null_conditioning, which is None")
        return batch.null_conditioning

    def _gap_metrics(
        self, gap_sq: torch.Tensor, gradient: torch.Tensor, lengths: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """The root mean square of d, and the norm of the gradient that is made of it, which is read without lengths."""
        elements = gradient[0].numel()
        lengths = norms(gradient) if lengths is None else lengths
        return {
            "score_gap": (gap_sq / elements).sqrt().mean(),
            "score_gradient_norm": lengths.mean(),
        }

    def _refuse_pure_noise(self, times: Times) -> None:
        """Refuse times of the generator's loss at which an epsilon prediction holds nothing of x0."""
        if self.schedule.prediction_type == "epsilon":
            t = times.possible()
            alpha, _ = self.schedule.coefficients(t)
            _refuse(times, t, alpha == 0.0, "alpha is 0, where an epsilon prediction says nothing of x0,")

    def _refuse_large_gap_scale(self, who: str, times: Times) -> None:
        """Refuse times at which the x0 of an epsilon prediction is the prediction's error, magnified."""
        t = times.possible()
        k = self.schedule.gap_scale(t)
        magnified = f"whose error sigma / alpha multiplies over {LARGEST_GAP_SCALE:.0f}-fold"
        bad = ~(k.abs() <= LARGEST_GAP_SCALE) & (self.schedule.prediction_type == "epsilon")
        _refuse(times, t, bad, f"{who} reads x0 off an epsilon prediction, {magnified},")

    def _check_weighting(
        self,
        name: str,
        choice: str | TimeFunction,
        weights_of: Callable[..., torch.Tensor | None],
        times: Times,
    ) -> None:
        """Refuse a function of t that gives no weights, and times at which what becomes of it can't be used.

        Args:
            name, choice: of the option.
            weights_of: (t, alpha, sigma, k) -> [n], what the loss is multiplied by, or None for 1.
            times: of the loss.
        """
        if callable(choice):
            t = times.possible()
            try:
                given = choice(t)
            except RuntimeError:  # of tensors on another device: the first call will tell
                return
            if not isinstance(given, torch.Tensor) or given.shape != t.shape or not given.is_floating_point():
                got = f"{given.dtype} {list(given.shape)}" if isinstance(given, torch.Tensor) else type(given).__name__
                raise ValueError(f"{name} must turn t [B] into floating-point weights [B], got {got}")
            if given.device != t.device:
                return
            _refuse(times, t, given < 0.0, f"{name} is negative")
        self._refuse_beyond_use(name if callable(choice) else f"{name} {choice!r}", weights_of, times)

    def _refuse_beyond_use(self, what: str, weights_of: Callable[..., torch.Tensor | None], times: Times) -> None:
        """Refuse times at which a factor of the loss is not finite or too large: many divide by alpha or sigma."""
        t = times.possible()
        weights = weights_of(t, *self.schedule.lookup(t))
        if weights is not None:
            _refuse(times, t, ~weights.isfinite(), f"{what} is not finite")
            _refuse(times, t, weights.abs() > LARGEST_WEIGHT, f"{what} is above {LARGEST_WEIGHT:.0e}")

    def _fake_weight(
        self, t: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor, k: torch.Tensor
    ) -> torch.Tensor | None:
        if callable(self.fake_weighting):
            return self.fake_weighting(t)
        if self.fake_weighting == "prediction":
            return None
        return k.square() if self.fake_weighting == "x0" else k.square() * alpha.square() / sigma**4


def mean_abs_lengths(scale: torch.Tensor, gap: ops.ScoreGap) -> torch.Tensor:
    """Return the norms [B] of the gradient scale d / mean|r|, from the sums that were taken with it."""
    assert gap.residual_abs is not None  # the target was given
    return scale.abs() / gap.residual_abs.clamp(min=MEAN_ABS_FLOOR) * gap.gap_sq.sqrt()


def _kept_if_faster(noise: Noise, x0: torch.Tensor) -> Noise | torch.Tensor:
    """The noise of samples that is needed twice: its normals in their layout, or its address. The bits are the same."""
    if x0.device.type != "cpu" or x0.numel() < LEAST_KEPT_NOISE:
        return noise
    eps = noise.normal(x0.shape[1:], x0.dtype)
    return eps if eps.stride() == x0.stride() else torch.empty_like(x0).copy_(eps)


def _refuse(times: Times, t: torch.Tensor, bad: torch.Tensor, what: str) -> None:
    """Raise ValueError if something is wrong at one of the times, and say which others would do."""
    if not bad.any():
        return
    shown = ", ".join(map(str, t[bad][:4].tolist())) + (", ..." if int(bad.sum()) > 4 else "")
    good = t[~bad]
    remedy = f", e.g. [{int(good[0])}, {int(good[-1]) + 1}]" if len(good) else ""
    raise ValueError(f"{what} at t = {shown}: leave such times out by {times.name}{remedy}")
