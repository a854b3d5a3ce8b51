"""Who is measured on a whole step, phase by phase: the step written by hand in plain torch, the
same compiled, and the package's.

Both losses are those of Diff-Instruct++ with guidance and a reward. In bfloat16, trained networks run under autocast on
float32 weights and frozen ones have bfloat16 weights, as in the trainer.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import reward
from benchmarks.reward import PathNetworks, RewardPath
from benchmarks.step_networks import Parts, StepNetworks, map_tensors
from diffpp_fast import networks as package
from diffpp_fast import ops
from diffpp_fast.methods import Batch, DiffInstructPP
from diffpp_fast.methods.base import DIFFUSION, LATENT, TIMESTEP
from diffpp_fast.networks.lora import Adapters
from diffpp_fast.selftest import PIXEL_MEAN, PIXEL_STD

GUIDANCE_SCALE = 7.5
NOISE_AND_SCORES = "noise and scores"
#: In the order in which a step begins them. What lies between networks is `NOISE_AND_SCORES`.
GENERATOR_PHASES = (
    "generator",
    "fake",
    "reference",
    NOISE_AND_SCORES,
    "decode",
    "reward",
    "reward backward",
    "decode backward",
    "backward",
    "update",
)
FAKE_PHASES = ("generator", "fake", NOISE_AND_SCORES, "backward", "update")
#: By the network that the step updates.
PHASES = {"generator": GENERATOR_PHASES, "fake": FAKE_PHASES}
ROLES = tuple(PHASES)
WHOLE = "whole"

#: A moment: seconds, an event on the device, operations so far; and the amount between two of them.
Now = Callable[[], Any]
Between = Callable[[Any, Any], float]


def no_time() -> None:
    """Where nothing is measured."""


class Marks:
    """Begins phases, each of which ends where the next one begins.

    Args:
        now: what a moment is.
    """

    def __init__(self, now: Now = no_time) -> None:
        self._now = now
        self._marks: list[tuple[str, Any]] = []

    def begin(self, phase: str) -> None:
        self._marks.append((phase, self._now()))

    def end(self) -> None:
        self.begin("")

    def spans(self, between: Between) -> dict[str, float]:
        """The sum of every phase's spans, and that of all."""
        spans = dict.fromkeys((phase for phase, _ in self._marks[:-1]), 0.0)
        for (phase, start), (_, end) in itertools.pairwise(self._marks):
            spans[phase] += between(start, end)
        return {**spans, WHOLE: between(self._marks[0][1], self._marks[-1][1])}


def seconds(device: torch.device) -> tuple[Now, Between]:
    """Time as the device sees it. On CUDA nothing waits before `between` is asked, after a synchronisation."""
    if device.type != "cuda":
        return time.perf_counter, lambda start, end: float(end - start)
    return _recorded, lambda start, end: float(start.elapsed_time(end)) * 1e-3


def operations(total: Callable[[], int]) -> tuple[Now, Between]:
    """Operations counted so far."""
    return total, lambda start, end: float(end - start)


def _recorded() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


# Providers

Network = Callable[[Tensor, Tensor, Any], Tensor]  # (x_t, t, conditioning) -> prediction


class Step(Protocol):
    """The two losses of a provider. Both say to `marks` what they are at."""

    marks: Marks
    addressed: bool  # draw what the package draws from the batch's addresses, so that all compute the same

    def generator_loss(self, batch: Batch) -> Tensor: ...

    def fake_loss(self, batch: Batch) -> Tensor: ...


class StepDraws(NamedTuple):
    """The random numbers of one loss."""

    z: Tensor  # [B, C, H, W], standard normal
    t: Tensor  # [B] int64
    eps: Tensor  # as z


class Unfused:
    """The step as one writes it without this package.

    Noise comes from torch's global generator, in one call per tensor; networks are diffusers' own; the arithmetic
    between them is plain torch; frozen networks run in their own dtype, without autocast. The generator's loss is
    written as DMD2's and others' code has it, which spares the graph through x_t.

    Args:
        networks: whose numbers are used.
        path: the way from latents to rewards; None: diffusers' decode with autograd.
        compile: every network, every part of the path and the arithmetic under torch.compile.
    """

    def __init__(self, networks: StepNetworks, path: RewardPath | None = None, compile: bool = False) -> None:
        parts, dtype = networks.parts, networks.dtype
        schedule = networks.schedule
        self.marks = Marks()
        self.addressed = False
        self.schedule = schedule
        self.reward_scale = networks.reward_scale
        self.wide = torch.promote_types(dtype, torch.float32)
        self.timestep = networks.model.timestep
        alpha, sigma = schedule.coefficients(torch.tensor([self.timestep]))
        self.alpha, self.sigma = float(alpha), float(sigma)
        self.input_scale = networks.model.input_scale or self.sigma
        maybe_compiled: Callable[[Any], Any] = compiled if compile else lambda function: function
        self.generator: Network = maybe_compiled(Autocast(Plain(parts.generator), dtype, networks.device))
        self.fake: Network = maybe_compiled(Autocast(Plain(parts.fake), dtype, networks.device))
        self.reference: Network = maybe_compiled(Plain(parts.reference, dtype))
        path = path or reward.eager(parts.path)
        # On the CPU torch 2.13 compiles diffusers' decoder to a gradient of zero (docs/reward-path.md).
        decode = path.decode if networks.device.type == "cpu" else maybe_compiled(path.decode)
        self.path = RewardPath(
            lambda latents: decode(latents.to(dtype)), maybe_compiled(path.pixels), maybe_compiled(path.reward)
        )
        self.add_noise = maybe_compiled(_add_noise)
        self.score_gradient = maybe_compiled(_score_gradient)
        self.denoising_loss = maybe_compiled(_denoising_loss)
        self.one_step = maybe_compiled(_one_step)

    def fake_loss(self, batch: Batch) -> Tensor:
        self.marks.begin(NOISE_AND_SCORES)
        draws = self.draw(batch)
        with torch.no_grad():
            x0 = self.sample(draws, batch)
        alpha, sigma = self.schedule.coefficients(draws.t)
        x_t = self.add_noise(x0, draws.eps, alpha, sigma)
        self.marks.begin("fake")
        prediction = self.fake(x_t, draws.t, batch.conditioning)
        self.marks.begin(NOISE_AND_SCORES)
        loss: Tensor = self.denoising_loss(prediction, draws.eps)
        return loss

    def generator_loss(self, batch: Batch) -> Tensor:
        self.marks.begin(NOISE_AND_SCORES)
        draws = self.draw(batch)
        x0 = self.sample(draws, batch)
        gradient = self.of_scores(x0.detach(), draws, batch)
        gradient = gradient - self.reward_scale * self.of_reward(x0.detach(), batch)
        return 0.5 * F.mse_loss(x0, (x0 - gradient).detach(), reduction="sum") / len(batch)

    def sample(self, draws: StepDraws, batch: Batch) -> Tensor:
        """x0 [B, C, H, W]."""
        x = self.input_scale * draws.z
        t = torch.full_like(draws.t, self.timestep)
        self.marks.begin("generator")
        prediction = self.generator(x, t, batch.conditioning)
        self.marks.begin(NOISE_AND_SCORES)
        x0: Tensor = self.one_step(x, prediction, self.alpha, self.sigma)
        return x0

    @torch.no_grad()
    def of_scores(self, x0: Tensor, draws: StepDraws, batch: Batch) -> Tensor:
        """h d [B, C, H, W] with h = k: the x0 that the TA implies minus the one that the guided reference implies."""
        alpha, sigma = self.schedule.coefficients(draws.t)
        x_t = self.add_noise(x0, draws.eps, alpha, sigma)
        self.marks.begin("fake")
        fake = self.fake(x_t, draws.t, batch.conditioning)
        self.marks.begin("reference")
        cond = self.reference(x_t, draws.t, batch.conditioning)
        uncond = self.reference(x_t, draws.t, batch.null_conditioning)
        self.marks.begin(NOISE_AND_SCORES)
        gradient: Tensor = self.score_gradient(fake, cond, uncond, sigma / alpha)
        return gradient

    def of_reward(self, x0: Tensor, batch: Batch) -> Tensor:
        """dr/dx0 [B, C, H, W]."""
        x0 = x0.requires_grad_()
        (gradient,) = torch.autograd.grad(watched_reward(self, self.path)(x0, None).sum(), x0)
        return gradient

    def draw(self, batch: Batch) -> StepDraws:
        if self.addressed:
            z, eps = (batch.noise(stream).normal(batch.shape, dtype=self.wide) for stream in (LATENT, DIFFUSION))
            return StepDraws(z, batch.noise(TIMESTEP).integers(0, len(self.schedule)), eps)
        z = torch.randn(len(batch), *batch.shape, device=batch.samples.device)
        t = torch.randint(0, len(self.schedule), (len(batch),), device=batch.samples.device)
        return StepDraws(z, t, torch.randn_like(z))


class Fused:
    """The step as the package does it: `DiffInstructPP` with addressed noise, fused blocks and the frozen decoder.

    What ends the update, clip, AdamW and average, is the trainer's for it, and plain torch for the others.

    Args:
        networks: whose numbers are used. Its modules are not changed.
        checkpoint: the frozen decoder computes one resolution at a time again.
        compile: every network and every part of the path under torch.compile.
        batched: as in the methods.
        share: the TA learns on the samples of the generator's update before, as `share_samples` has it: "fused-shared"
            has both.
    """

    def __init__(
        self,
        networks: StepNetworks,
        checkpoint: bool = False,
        compile: bool = False,
        batched: bool | None = None,
        share: bool = False,
    ) -> None:
        self.marks = Marks()
        self.share = share
        self.made: Tensor | None = None
        #: The phase after one of a network, where it is another network's.
        self.after: dict[str, str] = {}
        self.addressed = True
        parts = networks.parts.twin()
        unets = parts.generator, parts.fake, parts.reference
        for unet in unets:
            package.fuse(unet)
        maybe_compiled: Callable[[Any], Any] = compiled if compile else lambda function: function
        # Autocast around all of them, as diffpp_fast/training/build.py has it.
        low = networks.dtype if networks.dtype == torch.bfloat16 else None
        generator, fake, reference = map(maybe_compiled, _denoisers(parts, low))
        decoder = package.FrozenDecoder(parts.path.vae, checkpoint=checkpoint)
        decode = maybe_compiled(Autocast(decoder, networks.dtype, networks.device))
        path = RewardPath(
            decode, maybe_compiled(_pixels(parts.path, networks.dtype)), maybe_compiled(parts.path.reward)
        )
        scale = networks.model.input_scale
        one_step = package.OneStepGenerator(
            generator,
            networks.schedule,
            timestep=networks.model.timestep,
            input_scale="sigma" if scale is None else scale,
        )
        self.method = DiffInstructPP(
            self._watched("generator", one_step),
            self._watched("fake", fake),
            self._watched("reference", reference),
            networks.schedule,
            reward=watched_reward(self, path),
            reward_scale=networks.reward_scale,
            guidance_scale=GUIDANCE_SCALE,
            batched_passes=batched,
        )
        self.method.reward_term.describes = False  # as in a run

    def generator_loss(self, batch: Batch) -> Tensor:
        self._begin("fake")  # which may have no call of its own
        self.after = {"fake": "reference"}  # whose inputs are joined there
        output = self.method.generator_loss(batch)
        self.made = output.x0
        return output.loss

    def fake_loss(self, batch: Batch) -> Tensor:
        self.after = {}
        if self.share and self.made is not None and len(self.made) == len(batch):
            self._begin("generator")
            return self.method.fake_loss(replace(batch, x0=self.made)).loss
        self.marks.begin(NOISE_AND_SCORES)
        return self.method.fake_loss(batch).loss

    def _begin(self, empty: str) -> None:
        """Begin a step in which a phase may be empty."""
        self.marks.begin(empty)
        self.marks.begin(NOISE_AND_SCORES)

    def _watched(self, phase: str, call: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*arguments: Any, **options: Any) -> Tensor:
            self.marks.begin(phase)
            result = call(*arguments, **options)
            self.marks.begin(self.after.get(phase, NOISE_AND_SCORES))
            return result

        for name in ("adapters", "adapter", "dtype", "joins"):
            if hasattr(call, name):
                setattr(run, name, getattr(call, name))
        return run


def _denoisers(parts: Parts, dtype: torch.dtype | None) -> tuple[nn.Module, nn.Module, nn.Module]:
    """The three roles; TA and reference on one module where their weights are the same, as the trainer has them."""
    layers = {path: layer for path, layer in parts.fake.named_modules() if hasattr(layer, "lora_A")}
    generator = package.Denoiser(parts.generator, dtype=dtype)
    if not layers:
        return generator, package.Denoiser(parts.fake, dtype=dtype), package.Denoiser(parts.reference, dtype=dtype)
    adapters = Adapters.of(parts.fake, "fake", layers)
    fake = package.Denoiser(parts.fake, dtype=dtype, adapters=adapters, adapter="fake")
    return generator, fake, package.Denoiser(parts.fake, dtype=dtype, adapters=adapters)


def watched_reward(step: Step, path: RewardPath) -> Callable[[Tensor, Any], Tensor]:
    """(x0, conditioning) -> [B], which says what it is at, forward and backward."""

    def at(phase: str) -> Callable[[Tensor], None]:
        return lambda gradient: step.marks.begin(phase)

    def reward(x0: Tensor, conditioning: Any) -> Tensor:
        step.marks.begin("decode")
        # A hook on a leaf would not see a gradient that `autograd.grad` takes.
        x0 = x0.view_as(x0)
        images = path.decode(x0)
        step.marks.begin("reward")
        values = path.reward(path.pixels(images))
        step.marks.begin(NOISE_AND_SCORES)
        values.register_hook(at("reward backward"))
        images.register_hook(at("decode backward"))
        x0.register_hook(at(NOISE_AND_SCORES))
        return values

    return reward


class StepProvider(NamedTuple):
    """How to make a provider's step, and the order in memory of its weights."""

    make: Callable[[StepNetworks], Step]
    memory_format: torch.memory_format = torch.contiguous_format
    compiles: bool = False


def _checkpointed(networks: StepNetworks) -> Step:
    return Unfused(networks, reward.eager_checkpoint(networks.parts.path))


PROVIDERS: dict[str, StepProvider] = {
    "eager": StepProvider(Unfused),
    "eager-nhwc": StepProvider(Unfused, torch.channels_last),
    "eager-checkpoint": StepProvider(_checkpointed),
    "fused": StepProvider(Fused),
    "fused-nhwc": StepProvider(Fused, torch.channels_last),
    "fused-checkpoint": StepProvider(lambda networks: Fused(networks, checkpoint=True)),
    "fused-batched": StepProvider(lambda networks: Fused(networks, batched=True)),
    "fused-shared": StepProvider(lambda networks: Fused(networks, batched=True, share=True)),
    "compile": StepProvider(lambda networks: Unfused(networks, compile=True), compiles=True),
    "fused-compile": StepProvider(lambda networks: Fused(networks, compile=True), compiles=True),
}


def loss_of(step: Step, role: str) -> Callable[[Batch], Tensor]:
    """Return the loss of the network that a step updates."""
    return step.generator_loss if role == "generator" else step.fake_loss


def differentiate(step: Step, role: str, batch: Batch, now: Now) -> tuple[Tensor, Marks]:
    """A loss and its backward pass. Returns the loss, detached, and marks in whose last phase the caller now is."""
    marks = step.marks = Marks(now)
    loss = loss_of(step, role)(batch)
    marks.begin("backward")
    loss.backward()
    return loss.detach(), marks


def balanced_scale(networks: StepNetworks) -> float:
    """The scale of the reward that makes its gradient as long as the score's, so that an error in either shows."""
    step, batch = Unfused(networks), networks.batch(0, 1)
    step.addressed = True
    draws = step.draw(batch)
    with torch.no_grad():
        x0 = step.sample(draws, batch)
    return float(step.of_scores(x0, draws, batch).norm() / step.of_reward(x0, batch).norm())


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)


class Autocast(nn.Module):
    """A network under bfloat16 autocast; in any other dtype as it is."""

    def __init__(self, network: Callable[..., Tensor], dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.network = network
        self.dtype, self.device = dtype, device

    def forward(self, *arguments: Any) -> Tensor:
        lowered = self.dtype == torch.bfloat16
        with torch.autocast(self.device.type, dtype=self.dtype) if lowered else nullcontext():
            return self.network(*arguments)


class Plain(nn.Module):
    """diffusers' network as it is called without this package; with a dtype, everything that it takes is cast."""

    def __init__(self, network: nn.Module, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.network, self.dtype = network, dtype

    def forward(self, x: Tensor, t: Tensor, conditioning: Any) -> Tensor:
        arguments = conditioning.tensors
        if self.dtype is not None:
            x, arguments = x.to(self.dtype), map_tensors(lambda tensor: tensor.to(self.dtype), arguments)
        prediction: Tensor = self.network(x, t, return_dict=False, **arguments)[0]
        return prediction


def _pixels(networks: PathNetworks, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """As `LatentReward` and the rewards have it: images in float32, pixels in the dtype of the tower."""
    size = networks.tower.size
    return lambda images: ops.reward_pixels(images.float(), size, mean=PIXEL_MEAN, std=PIXEL_STD, dtype=dtype)


def _one_step(x: Tensor, prediction: Tensor, alpha: float, sigma: float) -> Tensor:
    return (x - sigma * prediction) / alpha


def _add_noise(x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    alpha, sigma = (values.to(x0.dtype).reshape(-1, 1, 1, 1) for values in (alpha, sigma))
    return alpha * x0 + sigma * eps


def _score_gradient(fake: Tensor, cond: Tensor, uncond: Tensor, scale: Tensor) -> Tensor:
    wide = torch.promote_types(fake.dtype, torch.float32)
    guided = uncond.to(wide) + GUIDANCE_SCALE * (cond.to(wide) - uncond.to(wide))
    return scale.to(wide).reshape(-1, 1, 1, 1) * (guided - fake.to(wide))


def _denoising_loss(prediction: Tensor, eps: Tensor) -> Tensor:
    return F.mse_loss(prediction.to(eps.dtype), eps)
