"""Terms of the generator's loss that hold it back: a distance to its start, and a denoising loss on users' images.

Both are sums over elements and means over the batch, as the generator's gradient is, and in units of x0: a weight of 1
weighs as much as the gap X_fake - X_guided does under the weighting "x0".
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from diffpp_fast import ops
from diffpp_fast.methods.base import IMAGE_DIFFUSION, Batch, Generator, ImageData, norms
from diffpp_fast.methods.outputs import check_output
from diffpp_fast.precision import widen
from diffpp_fast.schedule import NoiseSchedule


class Term(NamedTuple):
    """The part of a regulariser in the generator's loss.

    Attributes:
        metrics: scalars to log, detached, by name.
        gradient: on each sample [B, ...], without graph.
        loss: a scalar with a graph to the generator's parameters.
    """

    metrics: dict[str, torch.Tensor]
    gradient: torch.Tensor | None = None
    loss: torch.Tensor | None = None


class Regularizer(ABC):
    """A term of the generator's loss besides the method's gradient and the reward.

    Args:
        weight: of it, above 0.
    """

    def __init__(self, weight: float) -> None:
        if not 0.0 < weight < math.inf:
            raise ValueError(f"{type(self).__name__}: weight must be above 0 and finite, got {weight}")
        self.weight = weight

    @abstractmethod
    def __call__(
        self, batch: Batch, x0: torch.Tensor, sample: Callable[[Generator], torch.Tensor], generator: Generator
    ) -> Term:
        """Return the term of a batch.

        Args:
            batch: of the generator's update.
            x0: its samples, without graph.
            sample: another generator -> its samples of the same latents and prompts.
            generator: that is trained.
        """


class KLToStart(Regularizer):
    """weight / 2 |x0 - x0_start|^2 per sample, with x0_start from the initial generator at the same z and prompt.

    Blurred by Gaussian noise of standard deviation b, the two generators' samples of one z and prompt are Gaussians
    whose KL is |x0 - x0_start|^2 / (2 b^2): this with weight = 1 / b^2. Its mean over z bounds the KL between the two
    blurred distributions from above, which forgetting z can only lower. Its gradient on a sample is
    weight (x0 - x0_start).

    Args:
        start: the generator as it was, (z, conditioning) -> x0; called under no_grad.
        weight: 1 / b^2, above 0.
    """

    def __init__(self, start: Generator, weight: float) -> None:
        super().__init__(weight)
        self.start = start

    @torch.no_grad()
    def __call__(
        self, batch: Batch, x0: torch.Tensor, sample: Callable[[Generator], torch.Tensor], generator: Generator
    ) -> Term:
        distance = widen(x0) - sample(self.start)
        lengths = norms(distance)
        metrics = {
            "start_distance": lengths.mean() / math.sqrt(x0[0].numel()),
            "start_gradient_norm": self.weight * lengths.mean(),
        }
        return Term(metrics, gradient=self.weight * distance)


class ImageDenoising(Regularizer):
    """weight / 2 |X - x|^2 per image x, where X is the x0 that the generator's call implies of a x + s eps.

    The call is made at the generator's own time, whose a and s these are. It keeps the generator a denoiser of the
    images there, given their captions: the reference's own training loss at one time, in units of x0.

    Args:
        weight: above 0.
        alpha, sigma: a and s at the time of the generator's call.
        input_scale: the generator feeds its network this times z.
    """

    def __init__(self, weight: float, *, alpha: float, sigma: float, input_scale: float) -> None:
        super().__init__(weight)
        self.alpha, self.sigma, self.input_scale = alpha, sigma, input_scale

    def __call__(
        self, batch: Batch, x0: torch.Tensor, sample: Callable[[Generator], torch.Tensor], generator: Generator
    ) -> Term:
        if batch.images is None or batch.images.latents.shape != x0.shape:
            got = None if batch.images is None else tuple(batch.images.latents.shape)
            raise ValueError(f"ImageDenoising needs Batch.images, {tuple(x0.shape)} latents of images, got {got}")
        latents = batch.images.latents
        denoised = check_output("the generator", self._denoise(batch, batch.images, generator), latents)
        squares = (denoised - widen(latents)).square().flatten(1).sum(1)
        error = (squares.detach() / x0[0].numel()).sqrt().mean()
        return Term({"image_error": error}, loss=0.5 * self.weight * squares.mean())

    def _denoise(self, batch: Batch, images: ImageData, generator: Generator) -> torch.Tensor:
        """Return X, [B, ...]."""
        latents, conditioning = images
        levels = (self.alpha, self.sigma)
        alpha, sigma = (latents.new_full((len(latents),), level, dtype=torch.float32) for level in levels)
        x_t = ops.add_noise(latents, alpha, sigma, batch.noise(IMAGE_DIFFUSION))
        return generator(x_t / self.input_scale, conditioning)


class StepImageDenoising(ImageDenoising):
    """`ImageDenoising` for a generator of several steps: each image is noised to the time of one of its calls.

    That is the call whose x0 the loss sees of the sample that the image comes with, so that those which learn stay
    denoisers.

    Args:
        weight: above 0.
        schedule: gives a and s at the calls' times.
    """

    def __init__(self, weight: float, schedule: NoiseSchedule) -> None:
        Regularizer.__init__(self, weight)
        self.schedule = schedule

    def _denoise(self, batch: Batch, images: ImageData, generator: Any) -> torch.Tensor:
        latents, conditioning = images
        steps = generator.steps(batch.noise, batch.update_noise)
        times = torch.tensor(generator.timesteps, device=steps.device)[steps]
        x_t = ops.add_noise(latents, *self.schedule.coefficients(times), batch.noise(IMAGE_DIFFUSION))
        denoised: torch.Tensor = generator(x_t, conditioning, times=times)
        return denoised
