"""SIM's loss, against its definition in scores and autograd's gradient of it, in float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from diffpp_fast import Noise, ops

pytestmark = pytest.mark.usefixtures("backend")

F64 = torch.float64
NAMES = ("fake", "cond", "uncond", "x0")
# The score that an output implies at x_t. Its part in x_t drops out of score differences at one x_t.
SCORES = {
    "epsilon": lambda o, x_t, a, s: -o / s,
    "v_prediction": lambda o, x_t, a, s: -(a * o + s * x_t) / s,
    "flow_prediction": lambda o, x_t, a, s: -(x_t + (1 - s) * o) / s,
    "sample": lambda o, x_t, a, s: (a * o - x_t) / s**2,
}
TARGETS = {
    "epsilon": lambda x0, eps, a, s: eps,
    "v_prediction": lambda x0, eps, a, s: a * eps - s * x0,
    "flow_prediction": lambda x0, eps, a, s: eps - x0,
    "sample": lambda x0, eps, a, s: x0,
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
    c: float,
) -> Tensor:
    shape = (-1, *[1] * (x0.dim() - 1))
    a, s = alpha.reshape(shape), sigma.reshape(shape)
    x_t = (a * x0 + s * eps).detach()
    guided = cond if uncond is None else uncond + w * (cond - uncond)
    true = TARGETS[prediction_type](x0, eps, a, s)
    score_guided, score_fake, score_true = (SCORES[prediction_type](o, x_t, a, s) for o in (guided, fake, true))
    difference = (score_guided - score_fake).flatten(1)
    norm = (difference.square().sum(1) + c**2).sqrt()
    return (difference * (score_fake - score_true).flatten(1)).sum(1) / norm


def arguments(*shape: int, dtype: torch.dtype = F64, flow: bool = False) -> tuple[list[Tensor], list[Tensor]]:
    """The differentiable arguments, and eps, alpha, sigma."""
    *four, eps = torch.randn(5, *shape, dtype=dtype)
    angle = 0.2 + torch.rand(shape[0], dtype=F64)
    alpha, sigma = (1 - angle / 2, angle / 2) if flow else (angle.cos(), angle.sin())
    coefficients = [c if dtype == F64 else c.float() for c in (alpha, sigma)]
    return [x.requires_grad_() for x in four], [eps, *coefficients]


@pytest.mark.parametrize("prediction_type", SCORES)
@pytest.mark.parametrize("shape", [(3, 5), (2, 4, 3, 7), (1, 1)])
@pytest.mark.parametrize("c", [0.03, 3.0])
def test_formula_and_gradients(prediction_type: str, shape: tuple[int, ...], c: float) -> None:
    four, rest = arguments(*shape, flow=prediction_type == "flow_prediction")
    loss = ops.sim_loss(*four, *rest, guidance_scale=4.5, prediction_type=prediction_type, huber_c=c)
    oracle = formula(*four, *rest, 4.5, prediction_type, c)
    torch.testing.assert_close(loss, oracle)
    outer = torch.randn_like(loss)
    grads = torch.autograd.grad(loss, four, outer, allow_unused=True, materialize_grads=True)
    expected = torch.autograd.grad(oracle, four, outer, allow_unused=True, materialize_grads=True)
    for name, grad, correct in zip(NAMES, grads, expected, strict=True):
        torch.testing.assert_close(grad, correct, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("prediction_type", SCORES)
def test_gradcheck(prediction_type: str) -> None:
    four, rest = arguments(2, 3)
    torch.autograd.gradcheck(
        lambda *x: ops.sim_loss(*x, *rest, guidance_scale=2.0, prediction_type=prediction_type, huber_c=0.5), four
    )


def test_closed_form_for_epsilon() -> None:
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


def test_only_what_needs_gradient_gets_it() -> None:
    (fake, cond, uncond, x0), rest = arguments(2, 6)
    ops.sim_loss(fake.detach(), cond, uncond.detach(), x0.detach(), *rest, guidance_scale=3.0).sum().backward()
    assert cond.grad is not None
    assert fake.grad is None and uncond.grad is None and x0.grad is None


def test_noise_is_drawn_from_its_address() -> None:
    four, (_, alpha, sigma) = arguments(2, 4, 5, dtype=torch.float32)
    noise = Noise(3, torch.tensor([4, 9]))
    drawn, stored = (
        ops.sim_loss(*four, eps, alpha, sigma, guidance_scale=2.0, prediction_type="v_prediction")
        for eps in (noise, noise.normal((4, 5)))
    )
    assert torch.equal(drawn, stored)
    for a, b in zip(torch.autograd.grad(drawn.sum(), four), torch.autograd.grad(stored.sum(), four), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(dtype: torch.dtype, assert_twice_unfused: Callable[..., None]) -> None:
    four, rest = arguments(4, 4, 16, 16, dtype=dtype)
    loss = ops.sim_loss(*four, *rest, guidance_scale=4.5)
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
    expected = ops.sim_loss(*four, *rest, **options)
    laid_out = [layout(x.detach()).requires_grad_() for x in four]
    loss = ops.sim_loss(*laid_out, *rest, **options)
    torch.testing.assert_close(loss, expected)
    for x, grad, correct in zip(
        laid_out, torch.autograd.grad(loss.sum(), laid_out), torch.autograd.grad(expected.sum(), four), strict=True
    ):
        torch.testing.assert_close(grad, correct)
        assert grad.stride() == torch.empty_like(x).stride()


def test_empty_batch() -> None:
    four, rest = arguments(0, 3)
    loss = ops.sim_loss(*four, *rest, guidance_scale=2.0)
    assert loss.shape == (0,)
    loss.sum().backward()


def test_errors_name_what_is_wrong() -> None:
    four, rest = arguments(2, 3)
    for c in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="sim_loss: huber_c must be positive"):
            ops.sim_loss(*four, *rest, guidance_scale=2.0, huber_c=c)
    with pytest.raises(ValueError, match="sim_loss: unknown prediction type 'x0'"):
        ops.sim_loss(*four, *rest, guidance_scale=2.0, prediction_type="x0")
    with pytest.raises(ValueError, match=r"sim_loss: alpha must have shape \[B\] = \[2\]"):
        ops.sim_loss(*four, rest[0], rest[1][:1], rest[2], guidance_scale=2.0)
