"""The compiled losses of SiD and SIM: registration, threads, layouts, sizes.

The formulas are in test_ops_gap_loss.py.
"""

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
LOSSES = {"sid": ops.sid_loss, "sim": ops.sim_loss}


@pytest.fixture(params=LOSSES)
def name(request: pytest.FixtureRequest) -> str:
    chosen: str = request.param
    return chosen


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Any]]:
    """fake, cond, uncond and x0; noise, alpha and sigma."""
    four = [x.requires_grad_() for x in torch.randn(4, *shape).to(dtype)]
    alpha, sigma = torch.rand(2, shape[0]) + 0.3
    return four, [Noise(2**64 - 5, torch.arange(shape[0]) - 1), alpha, sigma]


def loss_and_gradients(name: str, four: list[Tensor], rest: list[Any], **options: Any) -> tuple[Tensor, ...]:
    fake, cond, uncond, x0 = four
    guided = options.pop("guided", True)
    scale = 4.5 if guided else 1.0
    loss = LOSSES[name](fake, cond, uncond if guided else None, x0, *rest, guidance_scale=scale, **options)
    leaves = four if guided else [fake, cond, x0]
    return loss.detach(), *torch.autograd.grad(loss, leaves, torch.linspace(0.5, 2.0, len(loss), dtype=loss.dtype))


@pytest.mark.parametrize(("number", "dtype"), list(enumerate(DTYPES)))
def test_registration(name: str, number: int, dtype: torch.dtype, cpu_backend: Any) -> None:
    (fake, cond, uncond, x0), (noise, alpha, sigma) = inputs(2, 3, 5, 7, dtype=dtype)
    fake, cond, uncond, x0 = (x.detach() for x in (fake, cond, uncond, x0))
    fake = fake.to(memory_format=torch.channels_last)
    saved = [torch.rand(2) for _ in range(2 if name == "sid" else 3)]
    last = (1.2,) if name == "sid" else ()
    forward = getattr(cpu_backend, f"{name}_loss").default
    backward = getattr(cpu_backend, f"{name}_loss_backward").default
    arguments = fake, cond, uncond, x0, noise.samples, -5, 1, alpha, sigma, 4.5, number
    check_registration(forward, *arguments, 1.2)
    check_registration(backward, *saved, *arguments, *last, True, True, True, True)
    arguments = fake, cond, None, x0, torch.randn_like(x0), 0, 0, alpha, sigma, 1.0, 1
    check_registration(backward, *saved, *arguments, *last, True, False, True, False)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_same_bits_for_any_threads(name: str, prediction_type: str) -> None:
    four, rest = inputs(3, 5, 61, 67)
    assert_same_bits_for_any_threads(lambda: loss_and_gradients(name, four, rest, prediction_type=prediction_type))


def test_compiles_once(name: str) -> None:
    def loss(fake: Tensor, cond: Tensor, uncond: Tensor, x0: Tensor, samples: Tensor, a: Tensor, s: Tensor) -> Tensor:
        noise = Noise(2**63 + 1, samples)
        return LOSSES[name](fake, cond, uncond, x0, noise, a, s, guidance_scale=4.5, prediction_type="v_prediction")

    batches = []
    for first in (0, 10, 20):
        four, (_, alpha, sigma) = inputs(2, 4, 8, 8)
        batches.append((*four, torch.arange(first, first + 2), alpha, sigma))
    assert_compiles_once(loss, *batches)


@pytest.mark.parametrize("name", LOSSES)
@given(
    shape=st.lists(st.integers(1, 67), min_size=0, max_size=3),
    batch=st.integers(0, 3),
    prediction_type=st.sampled_from(PREDICTION_TYPES),
    stored=st.booleans(),
    guided=st.booleans(),
)
def test_any_size_agrees_with_the_reference(
    name: str, shape: list[int], batch: int, prediction_type: str, stored: bool, guided: bool
) -> None:
    four, rest = inputs(batch, *shape)
    if stored:
        rest[0] = torch.randn(batch, *shape)
    options: dict[str, Any] = {"prediction_type": prediction_type, "guided": guided}
    actual = loss_and_gradients(name, four, rest, **options)
    with use_backend("reference"):
        expected = loss_and_gradients(name, four, rest, **options)
    for value, oracle in zip(actual, expected, strict=True):
        largest = oracle.abs().max().item() if oracle.numel() else 0.0
        torch.testing.assert_close(value, oracle, rtol=1e-4, atol=1e-4 * largest + 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_as_close_to_float64_as_the_reference(
    name: str, dtype: torch.dtype, prediction_type: str, assert_twice_unfused: Callable[..., None]
) -> None:
    four, rest = inputs(2, 4, 33, 65, dtype=dtype)
    rest[0] = torch.randn_like(four[0])
    wide = [x.detach().double().requires_grad_() for x in four]
    oracle = loss_and_gradients(name, wide, [x.double() for x in rest], prediction_type=prediction_type)
    actual = loss_and_gradients(name, four, rest, prediction_type=prediction_type)
    with use_backend("reference"):
        unfused = loss_and_gradients(name, four, rest, prediction_type=prediction_type)
    torch.testing.assert_close(actual[0].double(), oracle[0], rtol=1e-5, atol=1e-5 * oracle[0].abs().max().item())
    # The target "epsilon" does not move with x0: that gradient is zero.
    moving = 4 if prediction_type == "epsilon" else 5
    for value, plain, correct in zip(actual[1:moving], unfused[1:moving], oracle[1:moving], strict=True):
        assert_twice_unfused(value, plain, correct)
    assert not any(value.any() for value in actual[moving:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_layouts_hold_the_same_numbers(
    name: str, layout: Callable[[Tensor], Tensor], dtype: torch.dtype, prediction_type: str
) -> None:
    four, rest = inputs(2, 5, 9, 31, dtype=dtype)
    moved = [layout(x.detach()).requires_grad_() for x in four]
    expected = loss_and_gradients(name, four, rest, prediction_type=prediction_type)
    actual = loss_and_gradients(name, moved, rest, prediction_type=prediction_type)
    assert [gradient.stride() for gradient in actual[1:]] == [torch.empty_like(x).stride() for x in moved]
    if moved[0].is_contiguous(memory_format=torch.channels_last):
        # It sums in another order.
        for value, same in zip(actual, expected, strict=True):
            torch.testing.assert_close(value, same, rtol=2.0**-7, atol=1e-4 * expected[0].abs().max().item())
    else:
        assert all(torch.equal(value, same) for value, same in zip(actual, expected, strict=True))


def test_video_in_channels_last(name: str) -> None:
    four, rest = inputs(2, 3, 4, 5, 6)
    video = [x.detach().contiguous(memory_format=torch.channels_last_3d).requires_grad_() for x in four]
    actual, expected = (loss_and_gradients(name, x, rest, prediction_type="v_prediction") for x in (video, four))
    for value, same in zip(actual, expected, strict=True):
        torch.testing.assert_close(value, same, rtol=1e-4, atol=1e-4 * expected[0].abs().max().item())
    assert [gradient.stride() for gradient in actual[1:]] == [x.stride() for x in video]


def test_one_gradient_does_not_disturb_another(name: str) -> None:
    four, rest = inputs(2, 3, 9, dtype=torch.bfloat16)
    for prediction_type in PREDICTION_TYPES:
        _, *together = loss_and_gradients(name, four, rest, prediction_type=prediction_type)
        for i, expected in enumerate(together):
            only = [x.detach().requires_grad_(i == j) for j, x in enumerate(four)]
            loss = LOSSES[name](*only, *rest, guidance_scale=4.5, prediction_type=prediction_type)
            (alone,) = torch.autograd.grad(loss, only[i], torch.linspace(0.5, 2.0, 2))
            assert torch.equal(alone, expected)


def test_inputs_are_not_written_and_vectors_may_be_expanded(name: str) -> None:
    four, (noise, *_) = inputs(3, 4, 8, 8)
    before = [x.detach().clone() for x in four]
    half, full = torch.tensor([0.5]).expand(3), torch.full((3,), 0.5)
    expanded, plain = (
        loss_and_gradients(name, four, [noise, v, v], prediction_type="v_prediction") for v in (half, full)
    )
    assert all(torch.equal(a, b) for a, b in zip(expanded, plain, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(four, before, strict=True))


def test_the_binding_itself_refuses_what_it_does_not_serve(name: str, cpu_backend: Any) -> None:
    (fake, cond, uncond, x0), (noise, alpha, sigma) = inputs(2, 3)
    call = getattr(cpu_backend, f"{name}_loss").default
    samples = noise.samples
    for outputs, eps, a, number, message in (
        ((fake.int(), cond, uncond, x0), samples, alpha, 0, "fake must be float32, bfloat16, float16 or float64"),
        ((fake, cond[:1], uncond, x0), samples, alpha, 0, "cond must have the shape of the tensors before it"),
        ((fake, cond, uncond.half(), x0), samples, alpha, 0, "uncond is Half, the tensors before it are Float"),
        ((fake, cond, uncond, x0[:, :2]), samples, alpha, 0, "x0 must have the shape of the tensors before it"),
        ((fake, cond, uncond, x0), samples[:1], alpha, 0, r"samples must have shape \[B\] = \[2\]"),
        ((fake, cond, uncond, x0), samples, alpha[:1], 0, r"alpha must have shape \[B\] = \[2\]"),
        ((fake, cond, uncond, x0), samples, alpha, 4, "unknown prediction type number 4"),
    ):
        with pytest.raises(RuntimeError, match=f"{name}_loss: {message}"):
            call(*outputs, eps, 0, 1, a, sigma, 4.5, number, 1.0)


def test_fakes_beyond_2_to_the_31_elements(name: str, cpu_backend: Any) -> None:
    with torch.device("meta"):
        fake = torch.empty(2, 3, 2**16, 2**15, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
        one, samples = torch.ones(2), torch.empty(2, dtype=torch.int64)
        arguments = fake, fake, None, fake, samples, 0, 1, one, one, 1.0, 0
        loss, *saved = getattr(cpu_backend, f"{name}_loss").default(*arguments, 1.0)
        last = (1.0,) if name == "sid" else ()
        backward = getattr(cpu_backend, f"{name}_loss_backward").default
        gradients = backward(loss, *saved, *arguments, *last, True, True, False, True)
    assert all(value.shape == (2,) and value.dtype == torch.float32 for value in (loss, *saved))
    for i, gradient in enumerate(gradients):
        assert gradient.shape == ((0,) if i == 2 else fake.shape) and gradient.dtype == fake.dtype
        assert i == 2 or gradient.stride() == fake.stride()
