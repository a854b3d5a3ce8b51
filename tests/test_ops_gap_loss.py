"""SiD's and SIM's losses, against their definitions in implied x0 and in scores, and autograd's gradients."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from diffpp_fast import Noise, ops

pytestmark = pytest.mark.usefixtures("backend")

F64 = torch.float64
NAMES = ("fake", "cond", "uncond", "x0")
# k and the residual r = o - target. x0 counts where the target holds it; x_t does not appear (see below).
RESIDUALS = {
    "epsilon": lambda o, x0, eps, a, s: (s / a, o - eps),
    "v_prediction": lambda o, x0, eps, a, s: (s, o - (a * eps - s * x0)),
    "flow_prediction": lambda o, x0, eps, a, s: (s, o - (eps - x0)),
    "sample": lambda o, x0, eps, a, s: (-torch.ones_like(s), o - x0),
}
# The score that an output implies at x_t. Its part in x_t drops out of score differences at one x_t.
SCORES = {
    "epsilon": lambda o, x_t, a, s: -o / s,
    "v_prediction": lambda o, x_t, a, s: -(a * o + s * x_t) / s,
    "flow_prediction": lambda o, x_t, a, s: -(x_t + (1 - s) * o) / s,
    "sample": lambda o, x_t, a, s: (a * o - x_t) / s**2,
}


class Point(NamedTuple):
    """The reference's guided output, the teaching assistant's, and what made x_t."""

    guided: Tensor
    fake: Tensor
    x0: Tensor
    eps: Tensor
    alpha: Tensor  # [B, 1, ...], as sigma
    sigma: Tensor
    prediction_type: str


def sid(at: Point, sid_alpha: float) -> Tensor:
    k, r = RESIDUALS[at.prediction_type](at.guided, at.x0, at.eps, at.alpha, at.sigma)
    gap_x0 = k * (at.guided - at.fake)
    residual_x0 = k * r
    normalizer = residual_x0.detach().abs().flatten(1).mean(1)
    return ((gap_x0 * residual_x0).flatten(1).sum(1) - sid_alpha * gap_x0.square().flatten(1).sum(1)) / normalizer


def sim(at: Point, huber_c: float) -> Tensor:
    _, residual = RESIDUALS[at.prediction_type](at.guided, at.x0, at.eps, at.alpha, at.sigma)
    true = at.guided - residual
    x_t = (at.alpha * at.x0 + at.sigma * at.eps).detach()
    score = SCORES[at.prediction_type]
    guided, fake, true = (score(o, x_t, at.alpha, at.sigma) for o in (at.guided, at.fake, true))
    difference = (guided - fake).flatten(1)
    norm = (difference.square().sum(1) + huber_c**2).sqrt()
    return (difference * (fake - true).flatten(1)).sum(1) / norm


class Loss(NamedTuple):
    """An operator, its definition, and their own argument with the values at which it is tried, the default first."""

    operator: Callable[..., Tensor]
    definition: Callable[[Point, float], Tensor]
    option: str
    values: tuple[float, ...]

    def defined(
        self, four: list[Tensor | None], rest: list[Tensor], w: float, prediction_type: str, value: float
    ) -> Tensor:
        fake, cond, uncond, x0 = four
        eps, *coefficients = rest
        alpha, sigma = (each.reshape(-1, *[1] * (x0.dim() - 1)) for each in coefficients)
        guided = cond if uncond is None else uncond + w * (cond - uncond)
        return self.definition(Point(guided, fake, x0, eps, alpha, sigma, prediction_type), value)


LOSSES = {
    "sid_loss": Loss(ops.sid_loss, sid, "sid_alpha", (1.0, 1.2)),
    "sim_loss": Loss(ops.sim_loss, sim, "huber_c", (1.0, 0.03, 3.0)),
}
each_loss = pytest.mark.parametrize("name", LOSSES)


def arguments(*shape: int, dtype: torch.dtype = F64, flow: bool = False) -> tuple[list[Tensor], list[Tensor]]:
    """The differentiable arguments, and eps, alpha, sigma."""
    *four, eps = torch.randn(5, *shape, dtype=dtype)
    angle = 0.2 + torch.rand(shape[0], dtype=F64)
    alpha, sigma = (1 - angle / 2, angle / 2) if flow else (angle.cos(), angle.sin())
    coefficients = [c if dtype == F64 else c.float() for c in (alpha, sigma)]
    return [x.requires_grad_() for x in four], [eps, *coefficients]


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, loss in LOSSES.items() for value in loss.values])
@pytest.mark.parametrize("prediction_type", SCORES)
@pytest.mark.parametrize("shape", [(3, 5), (2, 4, 3, 7), (1, 1)])
def test_formula_and_gradients(name: str, value: float, prediction_type: str, shape: tuple[int, ...]) -> None:
    four, rest = arguments(*shape, flow=prediction_type == "flow_prediction")
    options = {"prediction_type": prediction_type, LOSSES[name].option: value}
    loss = LOSSES[name].operator(*four, *rest, guidance_scale=4.5, **options)
    oracle = LOSSES[name].defined(four, rest, 4.5, prediction_type, value)
    torch.testing.assert_close(loss, oracle)
    outer = torch.randn_like(loss)
    grads = torch.autograd.grad(loss, four, outer, allow_unused=True, materialize_grads=True)
    expected = torch.autograd.grad(oracle, four, outer, allow_unused=True, materialize_grads=True)
    for argument, grad, correct in zip(NAMES, grads, expected, strict=True):
        torch.testing.assert_close(grad, correct, msg=lambda text, argument=argument: f"{argument}: {text}")


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "flow_prediction"])
def test_sids_residual_is_that_of_the_implied_x0(prediction_type: str) -> None:
    """X_guided - x0 = -k r and X_fake - X_guided = k d, with X read from x_t: no x_t is left in the loss."""
    flow = prediction_type == "flow_prediction"
    (fake, guided, _, x0), (eps, alpha, sigma) = arguments(2, 5, flow=flow)
    a, s = alpha[:, None], sigma[:, None]
    x_t = a * x0 + s * eps
    implied = {
        "epsilon": lambda o: (x_t - s * o) / a,
        "v_prediction": lambda o: a * x_t - s * o,
        "flow_prediction": lambda o: x_t - s * o,
    }[prediction_type]
    gap, residual = implied(guided) - implied(fake), implied(guided) - x0
    expected = ((gap * residual).sum(1) - 1.2 * gap.square().sum(1)) / residual.abs().mean(1)
    loss = ops.sid_loss(
        fake, guided, None, x0, eps, alpha, sigma, guidance_scale=1.0, prediction_type=prediction_type, sid_alpha=1.2
    )
    torch.testing.assert_close(loss, expected)


# SiD's normalizer is a constant, to which finite differences are blind.
@pytest.mark.parametrize("prediction_type", SCORES)
def test_sims_gradient_by_differences(prediction_type: str) -> None:
    four, rest = arguments(2, 3)
    torch.autograd.gradcheck(
        lambda *x: ops.sim_loss(*x, *rest, guidance_scale=2.0, prediction_type=prediction_type, huber_c=0.5), four
    )


def test_sims_closed_form_for_epsilon() -> None:
    """dL/do_g = L_d + L_r and dL/dfake = -L_d with L_d = kappa ((r - 2d)/n - Q d/(s^2 n^3)), L_r = kappa d/n."""
    (fake, guided, _, x0), (eps, alpha, sigma) = arguments(2, 6)
    s = sigma[:, None]
    d, r = guided - fake, guided - eps
    kappa, n = 1 / s**2, (d.square().sum(1, keepdim=True) / s**2 + 0.25).sqrt()
    q = (d * (r - d)).sum(1, keepdim=True)
    l_d, l_r = kappa * ((r - 2 * d) / n - q * d / (s**2 * n**3)), kappa * d / n
    loss = ops.sim_loss(fake, guided, None, x0, eps, alpha, sigma, guidance_scale=1.0, huber_c=0.5)
    torch.testing.assert_close(loss, (kappa * q / n).squeeze(1))
    grad_fake, grad_guided = torch.autograd.grad(loss.sum(), (fake, guided))
    torch.testing.assert_close(grad_fake, -l_d)
    torch.testing.assert_close(grad_guided, l_d + l_r)


@each_loss
def test_without_uncond(name: str) -> None:
    (fake, cond, _, x0), rest = arguments(2, 6)
    outer = torch.randn(2, dtype=F64)
    loss = LOSSES[name].operator(fake, cond, None, x0, *rest, guidance_scale=1.0)
    oracle = LOSSES[name].defined([fake, cond, None, x0], rest, 1.0, "epsilon", 1.0)
    for grad, correct in zip(
        torch.autograd.grad(loss, (fake, cond), outer), torch.autograd.grad(oracle, (fake, cond), outer), strict=True
    ):
        torch.testing.assert_close(grad, correct)


@each_loss
@pytest.mark.parametrize("wanted", ["fake", "cond"])
def test_only_what_needs_gradient_gets_it(name: str, wanted: str) -> None:
    four, rest = arguments(2, 6)
    given = [x if argument == wanted else x.detach() for argument, x in zip(NAMES, four, strict=True)]
    LOSSES[name].operator(*given, *rest, guidance_scale=3.0).sum().backward()
    assert [argument for argument, x in zip(NAMES, four, strict=True) if x.grad is not None] == [wanted]


@each_loss
def test_noise_is_drawn_from_its_address(name: str) -> None:
    four, (_, alpha, sigma) = arguments(2, 4, 5, dtype=torch.float32)
    noise = Noise(3, torch.tensor([4, 9]))
    drawn, stored = (
        LOSSES[name].operator(*four, eps, alpha, sigma, guidance_scale=2.0, prediction_type="v_prediction")
        for eps in (noise, noise.normal((4, 5)))
    )
    assert torch.equal(drawn, stored)
    for a, b in zip(torch.autograd.grad(drawn.sum(), four), torch.autograd.grad(stored.sum(), four), strict=True):
        assert torch.equal(a, b)


@each_loss
def test_overwritten_sample_numbers_are_noticed(name: str) -> None:
    four, (_, alpha, sigma) = arguments(2, 4, dtype=torch.float32)
    noise = Noise(3, torch.tensor([4, 9]))
    loss = LOSSES[name].operator(*four, noise, alpha, sigma, guidance_scale=2.0)
    noise.samples.add_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()


@each_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision(name: str, dtype: torch.dtype, assert_twice_unfused: Callable[..., None]) -> None:
    four, rest = arguments(4, 4, 16, 16, dtype=dtype)
    loss = LOSSES[name].operator(*four, *rest, guidance_scale=4.5)
    assert loss.dtype == torch.float32
    wide = [x.detach().double().requires_grad_() for x in four]
    oracle = LOSSES[name].defined(wide, [x.double() for x in rest], 4.5, "epsilon", 1.0)
    torch.testing.assert_close(loss.double(), oracle, rtol=1e-4, atol=1e-3)
    unfused = LOSSES[name].defined(four, [x.to(dtype) for x in rest], 4.5, "epsilon", 1.0)
    for i in range(3):
        assert_twice_unfused(
            *(
                torch.autograd.grad(value.sum(), x[i], retain_graph=True)[0]
                for value, x in ((loss, four), (unfused, four))
            ),
            torch.autograd.grad(oracle.sum(), wide[i], retain_graph=True)[0],
        )


@each_loss
def test_layouts(name: str, layout: Callable[[Tensor], Tensor]) -> None:
    four, rest = arguments(2, 4, 5, 7, dtype=torch.float32)
    options = {"guidance_scale": 3.0, "prediction_type": "v_prediction"}
    expected = LOSSES[name].operator(*four, *rest, **options)
    laid_out = [layout(x.detach()).requires_grad_() for x in four]
    loss = LOSSES[name].operator(*laid_out, *rest, **options)
    torch.testing.assert_close(loss, expected)
    for x, grad, correct in zip(
        laid_out, torch.autograd.grad(loss.sum(), laid_out), torch.autograd.grad(expected.sum(), four), strict=True
    ):
        torch.testing.assert_close(grad, correct)
        assert grad.stride() == torch.empty_like(x).stride()


@each_loss
def test_empty_batch_and_exact_reference(name: str) -> None:
    four, rest = arguments(0, 3)
    loss = LOSSES[name].operator(*four, *rest, guidance_scale=2.0)
    assert loss.shape == (0,)
    loss.sum().backward()
    (fake, _, _, x0), (eps, alpha, sigma) = arguments(2, 3)
    at_target = LOSSES[name].operator(fake, eps, None, x0, eps, alpha, sigma, guidance_scale=1.0)
    assert torch.isfinite(at_target).all()


@each_loss
def test_errors_name_what_is_wrong(name: str) -> None:
    loss = LOSSES[name].operator
    (fake, cond, uncond, x0), (eps, alpha, sigma) = arguments(2, 3)
    with pytest.raises(ValueError, match=rf"{name}: guidance_scale 2\.0 needs uncond"):
        loss(fake, cond, None, x0, eps, alpha, sigma, guidance_scale=2.0)
    with pytest.raises(ValueError, match=f"{name}: unknown prediction type 'x0'"):
        loss(fake, cond, uncond, x0, eps, alpha, sigma, guidance_scale=2.0, prediction_type="x0")
    with pytest.raises(ValueError, match=rf"{name}: x0 has shape \[2, 1\], fake has \[2, 3\]"):
        loss(fake, cond, uncond, x0[:, :1], eps, alpha, sigma, guidance_scale=2.0)
    with pytest.raises(ValueError, match=rf"{name}: alpha must have shape \[B\] = \[2\]"):
        loss(fake, cond, uncond, x0, eps, alpha[:1], sigma, guidance_scale=2.0)
    with pytest.raises(ValueError, match=f"{name}: a sample of fake has no elements"):
        loss(*(x[:, :0] for x in (fake, cond, uncond, x0, eps)), alpha, sigma, guidance_scale=2.0)
    for c in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="sim_loss: huber_c must be positive"):
            ops.sim_loss(fake, cond, uncond, x0, eps, alpha, sigma, guidance_scale=2.0, huber_c=c)
