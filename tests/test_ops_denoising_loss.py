"""The weighted denoising loss, against the formula in float64 and autograd's gradient of it."""

from collections.abc import Callable

import pytest
import torch
from prediction_targets import TARGETS
from torch import Tensor

from diffpp_fast import Noise, ops

pytestmark = pytest.mark.usefixtures("backend")

F64 = torch.float64


def formula(
    prediction: Tensor, x0: Tensor, eps: Tensor, a: Tensor, s: Tensor, prediction_type: str, weight: Tensor | None
) -> Tensor:
    shape = (-1, *[1] * (x0.dim() - 1))
    target = TARGETS[prediction_type](x0, eps, a.reshape(shape), s.reshape(shape))
    per_sample = (prediction - target).square().flatten(1).mean(dim=1)
    return (per_sample if weight is None else weight * per_sample).mean()


def arguments(*shape: int, dtype: torch.dtype = F64) -> tuple[Tensor, ...]:
    prediction, x0, eps = torch.randn(3, *shape, dtype=dtype)
    alpha, sigma, weight = torch.rand(3, shape[0], dtype=F64 if dtype == F64 else torch.float32)
    return prediction.requires_grad_(), x0, eps, alpha, sigma, weight


@pytest.mark.parametrize("prediction_type", TARGETS)
@pytest.mark.parametrize("shape", [(3, 5), (2, 4, 3, 7), (1, 1)])
def test_formula_and_gradient(prediction_type: str, shape: tuple[int, ...]) -> None:
    *args, weight = arguments(*shape)
    for w in (None, weight):
        loss = ops.denoising_loss(*args, prediction_type=prediction_type, weight=w)
        oracle = formula(*args, prediction_type, w)
        torch.testing.assert_close(loss, oracle)
        (grad,) = torch.autograd.grad(3.0 * loss, args[0])
        (expected,) = torch.autograd.grad(3.0 * oracle, args[0])
        torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("prediction_type", TARGETS)
def test_gradcheck(prediction_type: str) -> None:
    prediction, *rest, weight = arguments(2, 3, 3)
    torch.autograd.gradcheck(
        lambda p: ops.denoising_loss(p, *rest, prediction_type=prediction_type, weight=weight), (prediction,)
    )


@pytest.mark.parametrize("prediction_type", TARGETS)
def test_noise_is_drawn_from_its_address(prediction_type: str) -> None:
    prediction, x0, _, alpha, sigma, weight = arguments(3, 4, 5, dtype=torch.float32)
    noise = Noise(5, torch.tensor([1, 8, 2**33]))
    for dtype in (torch.float32, torch.bfloat16):
        p, x = prediction.to(dtype), x0.to(dtype)
        drawn, stored = (
            ops.denoising_loss(p, x, eps, alpha, sigma, prediction_type=prediction_type, weight=weight)
            for eps in (noise, noise.normal((4, 5)))
        )
        assert torch.equal(drawn, stored)


def test_keeps_only_the_residual() -> None:
    prediction, x0, _, alpha, sigma, weight = arguments(2, 4, 8, 8, dtype=torch.bfloat16)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.denoising_loss(prediction, x0, Noise(0, torch.arange(2)), alpha, sigma, weight=weight)
    large = [t for t in kept if t.numel() >= x0.numel()]
    assert [(t.shape, t.dtype) for t in large] == [(x0.shape, torch.bfloat16)]
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.denoising_loss(prediction.detach(), x0, Noise(0, torch.arange(2)), alpha, sigma)
    assert kept == []


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype, prediction_type: str, assert_twice_unfused: Callable[..., None]) -> None:
    *args, weight = arguments(4, 4, 16, 16, dtype=dtype)
    loss = ops.denoising_loss(*args, prediction_type=prediction_type, weight=weight)
    assert loss.dtype == torch.float32
    wide = [argument.detach().double().requires_grad_() for argument in args]
    oracle = formula(*wide, prediction_type, weight.double())
    torch.testing.assert_close(loss.double(), oracle, rtol=1e-5, atol=0.0)
    # float16 is trained with a scaled loss: unscaled, the unfused gradient underflows.
    scale = 4096.0
    unfused = formula(*args[:3], *(a.to(dtype) for a in args[3:]), prediction_type, weight.to(dtype))
    grads = (
        torch.autograd.grad(scale * value, x[0])[0] for value, x in ((loss, args), (unfused, args), (oracle, wide))
    )
    assert_twice_unfused(*grads)


def test_float16_gradient_survives_a_small_scale() -> None:
    prediction, x0, eps, alpha, sigma, _ = arguments(4, 4, 64, 64, dtype=torch.float16)
    loss = ops.denoising_loss(prediction, x0, eps, alpha, sigma)
    (grad,) = torch.autograd.grad(65536.0 * loss, prediction)
    oracle = 65536.0 * 2.0 * (prediction - eps).double() / x0.numel()
    assert (grad.double() - oracle).norm() < 1e-3 * oracle.norm()


def test_layouts(layout: Callable[[Tensor], Tensor]) -> None:
    prediction, x0, eps, alpha, sigma, weight = arguments(2, 4, 5, 7, dtype=torch.float32)
    expected = ops.denoising_loss(prediction, x0, eps, alpha, sigma, prediction_type="v_prediction", weight=weight)
    (expected_grad,) = torch.autograd.grad(expected, prediction)
    laid_out = layout(prediction.detach()).requires_grad_()
    for x in (x0, layout(x0)):
        loss = ops.denoising_loss(laid_out, x, layout(eps), alpha, sigma, prediction_type="v_prediction", weight=weight)
        torch.testing.assert_close(loss, expected)
        (grad,) = torch.autograd.grad(loss, laid_out)
        torch.testing.assert_close(grad, expected_grad)
        assert grad.stride() == torch.empty_like(laid_out).stride()


def test_mixed_dtypes_lose_nothing() -> None:
    prediction, x0, eps, alpha, sigma, _ = arguments(2, 4, 9, dtype=torch.float32)
    low = prediction.detach().bfloat16().requires_grad_()
    loss = ops.denoising_loss(low, x0, eps, alpha, sigma, prediction_type="sample")
    assert torch.equal(loss, ops.denoising_loss(low.float(), x0, eps, alpha, sigma, prediction_type="sample"))
    assert torch.autograd.grad(loss, low)[0].dtype == torch.bfloat16


def test_errors_name_what_is_wrong() -> None:
    prediction, x0, eps, alpha, sigma, weight = arguments(2, 3)
    with pytest.raises(ValueError, match="denoising_loss: unknown prediction type 'eps'; known: epsilon, v_prediction"):
        ops.denoising_loss(prediction, x0, eps, alpha, sigma, prediction_type="eps")
    with pytest.raises(ValueError, match=r"denoising_loss: x0 has shape \[2, 2\], prediction has \[2, 3\]"):
        ops.denoising_loss(prediction, x0[:, :2], eps, alpha, sigma)
    with pytest.raises(ValueError, match=r"denoising_loss: weight must have shape \[B\] = \[2\]"):
        ops.denoising_loss(prediction, x0, eps, alpha, sigma, weight=weight[:1])
    for empty in (torch.empty(0, 3), torch.empty(2, 0)):
        with pytest.raises(ValueError, match="denoising_loss: the mean over an empty batch"):
            ops.denoising_loss(empty, empty, empty, empty.new_ones(len(empty)), empty.new_ones(len(empty)))
    with pytest.raises(TypeError, match="denoising_loss: weight must be a tensor, got float"):
        ops.denoising_loss(prediction, x0, eps, alpha, sigma, weight=2.0)
