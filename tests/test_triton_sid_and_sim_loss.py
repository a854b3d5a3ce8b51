"""The Triton kernels of the losses of SiD and SIM, in the interpreter where there is no GPU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from diffpp_fast import Noise, ops, use_backend
from diffpp_fast.prediction import PREDICTION_TYPES

SEED = 2**64 - 5
LOSSES = {"sid": (ops.sid_loss, {"sid_alpha": 1.2}), "sim": (ops.sim_loss, {"huber_c": 0.7})}


@pytest.fixture(params=LOSSES)
def name(request: pytest.FixtureRequest) -> str:
    chosen: str = request.param
    return chosen


def inputs(
    device: torch.device, *shape: int, dtype: torch.dtype = torch.float32, drawn: bool = True
) -> tuple[list[Tensor], list[Any]]:
    """fake, cond, uncond and x0; noise, alpha and sigma."""
    *four, eps = (x.to(device, dtype) for x in torch.randn(5, *shape))
    alpha, sigma = (x.to(device) for x in torch.rand(2, shape[0]) + 0.3)
    return four, [Noise(SEED, torch.arange(shape[0], device=device) - 1, 2**31 + 1) if drawn else eps, alpha, sigma]


def loss_and_gradients(
    name: str, four: list[Tensor], rest: list[Any], prediction_type: str, guided: bool = True, needs: Any = (True,) * 4
) -> list[Tensor | None]:
    """The loss and four gradients, None where not needed."""
    loss, options = LOSSES[name]
    leaves = [x.detach().requires_grad_(needed) for x, needed in zip(four, needs, strict=True)]
    fake, cond, uncond, x0 = leaves
    value = loss(
        fake,
        cond,
        uncond if guided else None,
        x0,
        *rest,
        guidance_scale=4.5 if guided else 1.0,
        prediction_type=prediction_type,
        **options,
    )
    value.backward(torch.linspace(0.5, 2.0, len(value)).to(value))
    return [value.detach(), *(leaf.grad for leaf in leaves)]


def assert_matches_float64(
    name: str,
    four: list[Tensor],
    rest: list[Any],
    actual: list[Tensor | None],
    *options: Any,
    tolerance: float = 2e-5,
) -> None:
    wide = [x.double() if isinstance(x, Tensor) else x for x in rest]
    with use_backend("reference"):
        expected = loss_and_gradients(name, [x.double() for x in four], wide, *options)
    # Parts of a gradient may cancel: what is left is compared with the largest there is.
    largest = max(correct.abs().max().item() for correct in expected if correct is not None)
    for value, correct in zip(actual, expected, strict=True):
        assert (value is None) == (correct is None)
        if value is not None and correct is not None:
            torch.testing.assert_close(value.double(), correct, rtol=tolerance, atol=tolerance * largest)


@pytest.mark.parametrize("drawn", [True, False])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_formula(name: str, prediction_type: str, drawn: bool, triton_backend: torch.device) -> None:
    for shape, guided in (((2, 3, 41, 37), True), ((3, 7), False), ((1,), True)):
        four, rest = inputs(triton_backend, *shape, drawn=drawn)
        actual = loss_and_gradients(name, four, rest, prediction_type, guided)
        assert_matches_float64(name, four, rest, actual, prediction_type, guided)


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (3,), (0, 3)])
def test_only_needed_gradients(name: str, needed: tuple[int, ...], triton_backend: torch.device) -> None:
    four, rest = inputs(triton_backend, 2, 9)
    needs = tuple(i in needed for i in range(4))
    actual = loss_and_gradients(name, four, rest, "v_prediction", True, needs)
    assert_matches_float64(name, four, rest, actual, "v_prediction", True, needs)


@pytest.mark.parametrize("drawn", [True, False])
def test_layouts_and_float16(
    name: str, layout: Callable[[Tensor], Tensor], drawn: bool, triton_backend: torch.device
) -> None:
    four, rest = inputs(triton_backend, 2, 4, 9, 60, dtype=torch.float16, drawn=drawn)
    moved = [layout(x) for x in four]
    actual = loss_and_gradients(name, moved, rest, "v_prediction")
    for gradient, like in zip(actual[1:], moved, strict=True):
        assert gradient is not None and gradient.stride() == torch.empty_like(like).stride()
    assert_matches_float64(name, four, rest, actual, "v_prediction", tolerance=1e-3)


def test_several_blocks_of_a_program_and_wide_indices(
    name: str, monkeypatch: pytest.MonkeyPatch, triton_backend: torch.device
) -> None:
    four, rest = inputs(triton_backend, 2, 4, 5, 500)
    monkeypatch.setattr("diffpp_fast.ops.triton.gap.PROGRAMS", 2)
    monkeypatch.setattr("diffpp_fast.ops.triton.layout.INT32_ELEMENTS", 1)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        moved = [x.contiguous(memory_format=memory_format) for x in four]
        actual = loss_and_gradients(name, moved, rest, "flow_prediction")
        assert_matches_float64(name, four, rest, actual, "flow_prediction")


def test_a_residual_of_zero_is_divided_by_the_floor(triton_backend: torch.device) -> None:
    (fake, _, uncond, x0), (eps, alpha, sigma) = inputs(triton_backend, 2, 5, drawn=False)
    four, rest = [fake, eps, uncond, x0], [eps, alpha, sigma]
    actual = loss_and_gradients("sid", four, rest, "epsilon", False)
    assert_matches_float64("sid", four, rest, actual, "epsilon", False)
    assert all(value is None or value.isfinite().all() for value in actual)


def test_empty_batch(name: str, triton_backend: torch.device) -> None:
    four, rest = inputs(triton_backend, 0, 5)
    loss, *gradients = loss_and_gradients(name, four, rest, "flow_prediction")
    assert loss is not None and loss.shape == (0,)
    assert all(gradient is not None and gradient.shape == (0, 5) for gradient in gradients)
