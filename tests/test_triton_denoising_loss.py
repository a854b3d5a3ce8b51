"""The Triton kernels of the denoising loss, in the interpreter where there is no GPU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from diffpp_fast import Noise, ops, use_backend
from diffpp_fast.ops.triton import denoising_loss
from diffpp_fast.prediction import PREDICTION_TYPES

SEED = 2**64 - 5


def inputs(
    device: torch.device, *shape: int, dtype: torch.dtype = torch.float32, drawn: bool = True
) -> tuple[Tensor, Tensor, Noise | Tensor, Tensor, Tensor]:
    """prediction, x0, noise, alpha, sigma."""
    prediction, x0, eps = (x.to(device, dtype) for x in torch.randn(3, *shape))
    alpha, sigma = (x.to(device) for x in torch.rand(2, shape[0]))
    noise = Noise(SEED, torch.arange(shape[0], device=device) - 1, 2**31 + 1)
    return prediction, x0, noise if drawn else eps, alpha, sigma


def loss_and_gradient(prediction: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
    leaf = prediction.detach().requires_grad_()
    loss = ops.denoising_loss(leaf, *arguments, **options)
    (gradient,) = torch.autograd.grad(loss, leaf, loss.new_tensor(0.75))
    return loss.detach(), gradient


def oracle(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
    with use_backend("reference"):
        return loss_and_gradient(*(x.double() if isinstance(x, Tensor) else x for x in arguments), **options)


@pytest.mark.parametrize("drawn", [True, False])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("shape", [(2, 3, 41, 37), (3, 7), (1,)])
def test_formula(shape: tuple[int, ...], prediction_type: str, drawn: bool, triton_backend: torch.device) -> None:
    arguments = inputs(triton_backend, *shape, drawn=drawn)
    for weight in (None, arguments[3].flip(0)):
        options: dict[str, Any] = {"prediction_type": prediction_type, "weight": weight}
        loss, gradient = loss_and_gradient(*arguments, **options)
        expected, slope = oracle(*arguments, **options)
        torch.testing.assert_close(loss.double(), expected, rtol=2e-6, atol=1e-7)
        torch.testing.assert_close(gradient.double(), slope, rtol=1e-5, atol=4e-6 * slope.abs().max().item())
        assert torch.equal(ops.denoising_loss(*arguments, **options), loss)


@pytest.mark.parametrize("drawn", [True, False])
def test_layouts_and_float16(layout: Callable[[Tensor], Tensor], drawn: bool, triton_backend: torch.device) -> None:
    prediction, x0, noise, alpha, sigma = inputs(triton_backend, 2, 4, 9, 60, dtype=torch.float16, drawn=drawn)
    moved = layout(prediction)
    eps = layout(noise) if isinstance(noise, Tensor) else noise
    loss, gradient = loss_and_gradient(moved, layout(x0), eps, alpha, sigma, prediction_type="v_prediction")
    expected, slope = oracle(prediction, x0, noise, alpha, sigma, prediction_type="v_prediction")
    assert gradient.stride() == torch.empty_like(moved).stride() and gradient.dtype == torch.float16
    torch.testing.assert_close(loss.double(), expected, rtol=2e-6, atol=0.0)
    torch.testing.assert_close(gradient.double(), slope, rtol=2e-3, atol=1e-7)


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 8, 3, 7), (2, 4, 2, 2, 3)])
def test_noise_in_channels_last(shape: tuple[int, ...], triton_backend: torch.device) -> None:
    """Whole pixels at once, or where channels or pixels do not allow it, element by element."""
    prediction, *rest = inputs(triton_backend, *shape)
    memory_format = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    moved = prediction.contiguous(memory_format=memory_format)
    actual, expected = loss_and_gradient(moved, *rest), oracle(prediction, *rest)
    for value, correct in zip(actual, expected, strict=True):
        torch.testing.assert_close(value.double(), correct, rtol=1e-5, atol=1e-6)


def test_several_blocks_of_a_program_and_wide_indices(
    monkeypatch: pytest.MonkeyPatch, triton_backend: torch.device
) -> None:
    prediction, *rest = inputs(triton_backend, 3, 4, 5, 500)
    options: dict[str, Any] = {"prediction_type": "flow_prediction", "weight": rest[-1]}
    expected = oracle(prediction, *rest, **options)
    monkeypatch.setattr(denoising_loss, "PROGRAMS", 6)
    monkeypatch.setattr("diffpp_fast.ops.triton.layout.INT32_ELEMENTS", 1)
    for moved in (prediction, prediction.contiguous(memory_format=torch.channels_last)):
        loss, gradient = loss_and_gradient(moved, *rest, **options)
        torch.testing.assert_close(loss.double(), expected[0], rtol=2e-6, atol=0.0)
        torch.testing.assert_close(gradient.double(), expected[1], rtol=1e-5, atol=1e-8)


def test_reads_only_what_the_target_holds(triton_backend: torch.device) -> None:
    prediction, x0, eps, alpha, sigma = inputs(triton_backend, 2, 9, drawn=False)
    unread = torch.full_like(prediction, torch.nan)
    for prediction_type, known, noise in (("epsilon", unread, eps), ("sample", x0, unread)):
        loss = ops.denoising_loss(prediction, known, noise, alpha, sigma, prediction_type=prediction_type)
        assert loss.isfinite()


def test_more_samples_than_programs(monkeypatch: pytest.MonkeyPatch, triton_backend: torch.device) -> None:
    arguments = inputs(triton_backend, 9, 5)
    monkeypatch.setattr(denoising_loss, "_PROGRAMS", type(denoising_loss._PROGRAMS)(4))
    monkeypatch.setattr(denoising_loss, "PROGRAMS", 4)
    torch.testing.assert_close(ops.denoising_loss(*arguments).double(), oracle(*arguments)[0], rtol=2e-6, atol=0.0)
