"""The Triton kernels of gated_residual_norm, in the interpreter where there is no GPU."""

from typing import Any

import pytest
import torch
from test_ops_gated_residual_norm import NAMES, SUBSETS, arguments, formula, with_gradients
from torch import Tensor

from diffpp_fast import ops, use_backend
from diffpp_fast.ops.triton import modulated_norm

#: The interpreter truncates casts to bfloat16 instead of rounding them.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3}


def assert_agrees(tensors: dict[str, Any], **options: Any) -> None:
    """Values and gradients are those of the definition in float64."""
    actual = with_gradients(ops.gated_residual_norm, tensors, **options)
    with use_backend("reference"):
        wide = {name: value.detach().double().requires_grad_() for name, value in tensors.items()}
        oracles = with_gradients(ops.gated_residual_norm, wide, **options)
    for value, oracle in zip(actual, oracles, strict=True):
        tolerance = max(TOLERANCE[value.dtype], TOLERANCE[actual[0].dtype])
        scale = float(oracle.abs().max()) if oracle.numel() else 1.0
        torch.testing.assert_close(value.double(), oracle, rtol=tolerance, atol=tolerance * scale)


def on(device: torch.device, tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {name: value.detach().to(device).requires_grad_() for name, value in tensors.items()}


# One row, one sum of rows, several; rows of one element, of few, of two blocks that are full and that are not.
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("tokens", [False, True], ids=["samples", "tokens"])
@pytest.mark.parametrize("shape", [(2, 1, 7), (1, 5, 1), (2, 19, 40), (1, 3, 1152), (0, 3, 4)])
def test_values_and_gradients(shape: tuple[int, ...], tokens: bool, norm: str, triton_backend: torch.device) -> None:
    every = on(triton_backend, arguments(*shape, tokens=tokens, dtype=torch.float32))
    for names in SUBSETS if shape[1] == 19 else SUBSETS[:1]:
        assert_agrees({name: every[name] for name in names}, norm=norm, eps=1e-2)


def test_16_bits_beside_32(triton_backend: torch.device) -> None:
    low = on(triton_backend, arguments(2, 9, 40, dtype=torch.float16))
    assert_agrees(low)
    assert_agrees({**low, "scale": low["scale"].detach().float().requires_grad_()}, norm="rms")


@pytest.mark.parametrize("tokens", [False, True], ids=["samples", "tokens"])
@pytest.mark.parametrize("name", NAMES)
def test_each_gradient_only_where_needed(name: str, tokens: bool, triton_backend: torch.device) -> None:
    every = on(triton_backend, arguments(2, 11, 5, tokens=tokens, dtype=torch.float32))
    whole = dict(zip(("", " ", *NAMES), with_gradients(ops.gated_residual_norm, every), strict=True))
    some = {each: value if each == name else value.detach() for each, value in every.items()}
    outputs = ops.gated_residual_norm(**some)
    generator = torch.Generator(triton_backend).manual_seed(1)
    outer = [torch.randn(y.shape, generator=generator, dtype=torch.float64, device=y.device).float() for y in outputs]
    needs = [(y, g) for y, g in zip(outputs, outer, strict=True) if y.requires_grad]
    (alone,) = torch.autograd.grad([y for y, _ in needs], every[name], [g for _, g in needs])
    assert torch.equal(alone, whole[name])


def test_many_partial_sums(triton_backend: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modulated_norm, "LEAST_ROWS", 1)
    assert_agrees(on(triton_backend, arguments(2, modulated_norm.SUM_ROWS + 3, 70, dtype=torch.float32)))


def test_modulation_is_read_where_it_lies(triton_backend: torch.device) -> None:
    """Parts of one tensor, as networks have them; a row for all samples; columns that are not beside each other."""
    every = on(triton_backend, arguments(3, 4, 6, dtype=torch.float32))
    gate, scale, *_ = torch.randn(3, 6, 6, device=triton_backend).chunk(6, dim=1)
    row, transposed = torch.randn(1, 6, device=triton_backend).expand(3, 6), torch.randn(6, 3, device=triton_backend).mT
    for modulation in ((gate, scale, row), (row, transposed, gate)):
        actual = ops.gated_residual_norm(every["residual"], every["branch"], *modulation)
        wide = [each.double().reshape(3, 1, 6) for each in modulation]
        expected = formula(every["residual"].double(), every["branch"].double(), *wide)
        for value, oracle in zip(actual, expected, strict=True):
            torch.testing.assert_close(value.double(), oracle, rtol=1e-5, atol=1e-5)


def test_rows_too_wide_are_refused_by_name(triton_backend: torch.device) -> None:
    x = torch.zeros(1, 1, modulated_norm.MOST_COLUMNS_OF_RESIDUALS + 1, device=triton_backend)
    with pytest.raises(
        ValueError, match=r"gated_residual_norm: backend 'triton' serves rows of up to 6144 elements, residual has 6145"
    ):
        ops.gated_residual_norm(x, x)
