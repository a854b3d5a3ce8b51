"""SiD's loss, against its definition in implied x0 and autograd's gradient of it, in float64."""

from collections.abc import Callable

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


def formula(
    fake: Tensor,
    cond: Tensor,
    uncond: Tensor | None,
    x0: Tensor,
    eps: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    w: float,
    prediction_type: str,
    sid_alpha: float,
) -> Tensor:
    shape = (-1, *[1] * (x0.dim() - 1))
    guided = cond if uncond is None else uncond + w * (cond - uncond)
    k, r = RESIDUALS[prediction_type](guided, x0, eps, alpha.reshape(shape), sigma.reshape(shape))
    gap_x0 = k * (guided - fake)
    residual_x0 = k * r
    normalizer = residual_x0.detach().abs().flatten(1).mean(1)
    return ((gap_x0 * residual_x0).flatten(1).sum(1) - sid_alpha * gap_x0.square().flatten(1).sum(1)) / normalizer


def arguments(*shape: int, dtype: torch.dtype = F64, flow: bool = False) -> tuple[list[Tensor], list[Tensor]]:
    """The differentiable arguments, and eps, alpha, sigma."""
    *four, eps = torch.randn(5, *shape, dtype=dtype)
    angle = 0.2 + torch.rand(shape[0], dtype=F64)
    alpha, sigma = (1 - angle / 2, angle / 2) if flow else (angle.cos(), angle.sin())
    coefficients = [c if dtype == F64 else c.float() for c in (alpha, sigma)]
    return [x.requires_grad_() for x in four], [eps, *coefficients]


@pytest.mark.parametrize("prediction_type", RESIDUALS)
@pytest.mark.parametrize("shape", [(3, 5), (2, 4, 3, 7), (1, 1)])
@pytest.mark.parametrize("sid_alpha", [1.0, 1.2])
def test_formula_and_gradients(prediction_type: str, shape: tuple[int, ...], sid_alpha: float) -> None:
    four, rest = arguments(*shape, flow=prediction_type == "flow_prediction")
    loss = ops.sid_loss(*four, *rest, guidance_scale=4.5, prediction_type=prediction_type, sid_alpha=sid_alpha)
    oracle = formula(*four, *rest, 4.5, prediction_type, sid_alpha)
    torch.testing.assert_close(loss, oracle)
    outer = torch.randn_like(loss)
    grads = torch.autograd.grad(loss, four, outer, allow_unused=True, materialize_grads=True)
    expected = torch.autograd.grad(oracle, four, outer, allow_unused=True, materialize_grads=True)
    for name, grad, correct in zip(NAMES, grads, expected, strict=True):
        torch.testing.assert_close(grad, correct, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "flow_prediction"])
def test_residual_is_that_of_the_implied_x0(prediction_type: str) -> None:
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


def test_without_uncond() -> None:
    (fake, cond, _, x0), rest = arguments(2, 6)
    outer = torch.randn(2, dtype=F64)
    loss = ops.sid_loss(fake, cond, None, x0, *rest, guidance_scale=1.0)
    oracle = formula(fake, cond, None, x0, *rest, 1.0, "epsilon", 1.0)
    for grad, correct in zip(
        torch.autograd.grad(loss, (fake, cond), outer), torch.autograd.grad(oracle, (fake, cond), outer), strict=True
    ):
        torch.testing.assert_close(grad, correct)


def test_only_what_needs_gradient_gets_it() -> None:
    (fake, cond, uncond, x0), rest = arguments(2, 6)
    ops.sid_loss(fake, cond.detach(), uncond.detach(), x0.detach(), *rest, guidance_scale=3.0).sum().backward()
    assert fake.grad is not None
    assert cond.grad is None and uncond.grad is None and x0.grad is None


def test_noise_is_drawn_from_its_address() -> None:
    four, (_, alpha, sigma) = arguments(2, 4, 5, dtype=torch.float32)
    noise = Noise(3, torch.tensor([4, 9]))
    drawn, stored = (
        ops.sid_loss(*four, eps, alpha, sigma, guidance_scale=2.0, prediction_type="v_prediction")
        for eps in (noise, noise.normal((4, 5)))
    )
    assert torch.equal(drawn, stored)
    for a, b in zip(torch.autograd.grad(drawn.sum(), four), torch.autograd.grad(stored.sum(), four), strict=True):
        assert torch.equal(a, b)


def test_overwritten_sample_numbers_are_noticed() -> None:
    four, (_, alpha, sigma) = arguments(2, 4, dtype=torch.float32)
    noise = Noise(3, torch.tensor([4, 9]))
    loss = ops.sid_loss(*four, noise, alpha, sigma, guidance_scale=2.0)
    noise.samples.add_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype, assert_twice_unfused: Callable[..., None]) -> None:
    four, rest = arguments(4, 4, 16, 16, dtype=dtype)
    loss = ops.sid_loss(*four, *rest, guidance_scale=4.5)
    assert loss.dtype == torch.float32
    wide = [x.detach().double().requires_grad_() for x in four]
    oracle = formula(*wide, *(x.double() for x in rest), 4.5, "epsilon", 1.0)
    torch.testing.assert_close(loss.double(), oracle, rtol=1e-4, atol=1e-3)
    unfused = formula(*four, *(x.to(dtype) for x in rest), 4.5, "epsilon", 1.0)
    for i in range(3):
        assert_twice_unfused(
            *(
                torch.autograd.grad(value.sum(), x[i], retain_graph=True)[0]
                for value, x in ((loss, four), (unfused, four))
            ),
            torch.autograd.grad(oracle.sum(), wide[i], retain_graph=True)[0],
        )


def test_layouts(layout: Callable[[Tensor], Tensor]) -> None:
    four, rest = arguments(2, 4, 5, 7, dtype=torch.float32)
    options = {"guidance_scale": 3.0, "prediction_type": "v_prediction"}
    expected = ops.sid_loss(*four, *rest, **options)
    laid_out = [layout(x.detach()).requires_grad_() for x in four]
    loss = ops.sid_loss(*laid_out, *rest, **options)
    torch.testing.assert_close(loss, expected)
    for x, grad, correct in zip(
        laid_out, torch.autograd.grad(loss.sum(), laid_out), torch.autograd.grad(expected.sum(), four), strict=True
    ):
        torch.testing.assert_close(grad, correct)
        assert grad.stride() == torch.empty_like(x).stride()


def test_empty_batch_and_exact_reference() -> None:
    four, rest = arguments(0, 3)
    loss = ops.sid_loss(*four, *rest, guidance_scale=2.0)
    assert loss.shape == (0,)
    loss.sum().backward()
    (fake, _, _, x0), (eps, alpha, sigma) = arguments(2, 3)
    at_target = ops.sid_loss(fake, eps, None, x0, eps, alpha, sigma, guidance_scale=1.0)
    assert torch.isfinite(at_target).all()


def test_errors_name_what_is_wrong() -> None:
    (fake, cond, uncond, x0), (eps, alpha, sigma) = arguments(2, 3)
    with pytest.raises(ValueError, match=r"sid_loss: guidance_scale 2\.0 needs uncond"):
        ops.sid_loss(fake, cond, None, x0, eps, alpha, sigma, guidance_scale=2.0)
    with pytest.raises(ValueError, match="sid_loss: unknown prediction type 'x0'"):
        ops.sid_loss(fake, cond, uncond, x0, eps, alpha, sigma, guidance_scale=2.0, prediction_type="x0")
    with pytest.raises(ValueError, match=r"sid_loss: x0 has shape \[2, 1\], fake has \[2, 3\]"):
        ops.sid_loss(fake, cond, uncond, x0[:, :1], eps, alpha, sigma, guidance_scale=2.0)
    with pytest.raises(ValueError, match="sid_loss: a sample of fake has no elements"):
        ops.sid_loss(*(x[:, :0] for x in (fake, cond, uncond, x0, eps)), alpha, sigma, guidance_scale=2.0)
