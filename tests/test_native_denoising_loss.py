"""The compiled denoising loss: registration, threads, layouts, sizes. The formula is in test_ops_denoising_loss.py."""

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from native import assert_compiles_once, assert_same_bits_for_any_threads, check_registration
from torch import Tensor

from diffpp_fast import Noise, ops, use_backend
from diffpp_fast.prediction import PREDICTION_TYPES

pytestmark = pytest.mark.usefixtures("cpu_backend")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Noise, Tensor, Tensor]:
    """prediction, x0, noise, alpha, sigma."""
    prediction, x0 = torch.randn(2, *shape).to(dtype)
    alpha, sigma = torch.rand(2, shape[0])
    return prediction.requires_grad_(), x0, Noise(2**64 - 5, torch.arange(shape[0]) - 1), alpha, sigma


def loss_and_gradient(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
    loss = ops.denoising_loss(*arguments, **options)
    return loss.detach(), torch.autograd.grad(loss, arguments[0])[0]


@pytest.mark.parametrize(("number", "dtype"), list(enumerate(DTYPES)))
def test_registration(number: int, dtype: torch.dtype, cpu_backend: Any) -> None:
    prediction, x0, noise, alpha, sigma = inputs(2, 3, 5, 7, dtype=dtype)
    prediction = prediction.detach().to(memory_format=torch.channels_last)
    forward, backward = cpu_backend.denoising_loss.default, cpu_backend.denoising_loss_backward.default
    weight = torch.rand(2)
    check_registration(forward, prediction, x0, noise.samples, -5, 1, alpha, sigma, number, weight, True)
    check_registration(forward, prediction, x0, torch.randn_like(x0), 0, 0, alpha, sigma, 1, None, False)
    check_registration(backward, torch.tensor(0.5), prediction, weight)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_same_bits_for_any_threads(prediction_type: str) -> None:
    arguments = inputs(3, 5, 61, 67)
    assert_same_bits_for_any_threads(lambda: loss_and_gradient(*arguments, prediction_type=prediction_type))


def test_compiles_once() -> None:
    def loss(prediction: Tensor, x0: Tensor, samples: Tensor, alpha: Tensor, sigma: Tensor, weight: Tensor) -> Tensor:
        noise = Noise(2**63 + 1, samples)
        return ops.denoising_loss(prediction, x0, noise, alpha, sigma, prediction_type="v_prediction", weight=weight)

    batches = []
    for first in (0, 10, 20):
        prediction, x0, _, alpha, sigma = inputs(2, 4, 8, 8)
        batches.append((prediction, x0, torch.arange(first, first + 2), alpha, sigma, torch.rand(2)))
    assert_compiles_once(loss, *batches)


@given(
    shape=st.lists(st.integers(1, 67), min_size=0, max_size=3),
    batch=st.integers(1, 3),
    prediction_type=st.sampled_from(PREDICTION_TYPES),
    stored=st.booleans(),
)
def test_any_size_agrees_with_the_reference(shape: list[int], batch: int, prediction_type: str, stored: bool) -> None:
    prediction, x0, noise, alpha, sigma = inputs(batch, *shape)
    eps = torch.randn(batch, *shape) if stored else noise
    arguments = prediction, x0, eps, alpha, sigma
    actual = loss_and_gradient(*arguments, prediction_type=prediction_type, weight=alpha)
    with use_backend("reference"):
        expected = loss_and_gradient(*arguments, prediction_type=prediction_type, weight=alpha)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=3e-6)


def test_sums_are_as_close_to_float64_as_the_reference() -> None:
    prediction, x0, *_, alpha, sigma = inputs(2, 300_007)
    eps = torch.randn_like(x0)
    oracle = (prediction.double() - eps.double()).square().mean()
    errors = []
    for backend in ("cpu", "reference"):
        with use_backend(backend):
            errors.append((ops.denoising_loss(prediction, x0, eps, alpha, sigma).double() - oracle).abs() / oracle)
    assert errors[0] <= max(errors[1].item(), 2.0**-24)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_layouts_hold_the_same_numbers(
    layout: Callable[[Tensor], Tensor], dtype: torch.dtype, prediction_type: str
) -> None:
    prediction, x0, noise, alpha, sigma = inputs(2, 5, 9, 31, dtype=dtype)
    other = layout(prediction.detach()).requires_grad_()
    eps = torch.randn_like(x0)
    for first, second in ((noise, noise), (eps, layout(eps))):
        loss, gradient = loss_and_gradient(prediction, x0, first, alpha, sigma, prediction_type=prediction_type)
        same, moved = loss_and_gradient(other, layout(x0), second, alpha, sigma, prediction_type=prediction_type)
        # channels_last sums in another order.
        torch.testing.assert_close(same, loss)
        assert torch.equal(moved, gradient)
        if not other.is_contiguous(memory_format=torch.channels_last):
            assert torch.equal(same, loss)


@pytest.mark.parametrize("channels", [3, 4])
def test_video_in_channels_last(channels: int) -> None:
    prediction, x0, noise, alpha, sigma = inputs(2, channels, 4, 5, 6)
    video = prediction.detach().contiguous(memory_format=torch.channels_last_3d).requires_grad_()
    loss, gradient = loss_and_gradient(prediction, x0, noise, alpha, sigma, prediction_type="flow_prediction")
    same, moved = loss_and_gradient(video, x0, noise, alpha, sigma, prediction_type="flow_prediction")
    torch.testing.assert_close(same, loss)
    assert torch.equal(moved, gradient) and moved.stride() == video.stride()


def test_reads_only_what_the_target_holds() -> None:
    prediction, x0, _, alpha, sigma = inputs(2, 3, 5)
    unread = torch.full_like(x0, torch.nan)
    for prediction_type, known, eps in (("epsilon", unread, x0), ("sample", x0, unread)):
        loss, gradient = loss_and_gradient(prediction, known, eps, alpha, sigma, prediction_type=prediction_type)
        assert loss.isfinite() and gradient.isfinite().all()


def test_inputs_are_not_written_and_vectors_may_be_expanded() -> None:
    prediction, x0, noise, *_ = inputs(3, 4, 8, 8)
    before = prediction.detach().clone(), x0.clone()
    half, full = torch.tensor([0.5]).expand(3), torch.full((3,), 0.5)
    expanded, plain = (
        loss_and_gradient(prediction, x0, noise, v, v, prediction_type="v_prediction", weight=v) for v in (half, full)
    )
    assert torch.equal(expanded[0], plain[0]) and torch.equal(expanded[1], plain[1])
    assert torch.equal(prediction, before[0]) and torch.equal(x0, before[1])


def test_backward_twice_gives_the_same() -> None:
    prediction, *rest = inputs(2, 4, 8, 8)
    loss = ops.denoising_loss(prediction, *rest)
    first, second = (torch.autograd.grad(loss, prediction, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_the_binding_itself_refuses_what_it_does_not_serve(cpu_backend: Any) -> None:
    prediction, x0, noise, alpha, sigma = inputs(2, 3)
    samples = noise.samples
    call = cpu_backend.denoising_loss.default
    for arguments, message in (
        ((prediction.int(), x0, samples, alpha, 0, None), "denoising_loss: prediction must be float32, bfloat16"),
        ((prediction, x0[:1], samples, alpha, 0, None), "denoising_loss: x0 must have the shape of the tensors before"),
        ((prediction, x0.double(), samples, alpha, 0, None), "denoising_loss: x0 is Double, the tensors before it are"),
        ((prediction, x0, samples[:1], alpha, 0, None), r"denoising_loss: samples must have shape \[B\] = \[2\]"),
        ((prediction, x0, torch.randn(2, 4), alpha, 0, None), "denoising_loss: noise must have the shape"),
        ((prediction, x0, samples, alpha[:1], 0, None), r"denoising_loss: alpha must have shape \[B\] = \[2\]"),
        ((prediction, x0, samples, alpha, 0, alpha[:1]), r"denoising_loss: weight must have shape \[B\] = \[2\]"),
        ((prediction, x0, samples, alpha, 4, None), "denoising_loss: unknown prediction type number 4"),
    ):
        *large, a, number, weight = arguments
        with pytest.raises(RuntimeError, match=message):
            call(*large, 0, 1, a, sigma, number, weight, True)
    with pytest.raises(RuntimeError, match="denoising_loss_backward: grad_output must be a scalar"):
        cpu_backend.denoising_loss_backward.default(torch.ones(2), x0, None)


def test_fakes_beyond_2_to_the_31_elements(cpu_backend: Any) -> None:
    with torch.device("meta"):
        x0 = torch.empty(2, 3, 2**16, 2**15, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
        one, samples = torch.ones(2), torch.empty(2, dtype=torch.int64)
        loss, residual = cpu_backend.denoising_loss.default(x0, x0, samples, 0, 1, one, one, 0, None, True)
        gradient = cpu_backend.denoising_loss_backward.default(loss, residual, None)
    assert loss.shape == () and loss.dtype == torch.float32
    for value in (residual, gradient):
        assert value.shape == x0.shape and value.stride() == x0.stride() and value.dtype == x0.dtype
