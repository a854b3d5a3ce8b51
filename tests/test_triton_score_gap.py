"""The Triton kernels of the score gap, in the interpreter where there is no GPU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from diffpp_fast import Noise, ops, use_backend
from diffpp_fast.ops.score_gap import RewardedScoreGap, ScoreGap
from diffpp_fast.prediction import PREDICTION_TYPES

SEED = 2**64 - 5


def inputs(
    device: torch.device, *shape: int, dtype: torch.dtype = torch.float32, drawn: bool = True
) -> tuple[list[Tensor], dict[str, Any]]:
    """fake, cond, uncond, and what makes the target."""
    *outputs, x0, eps = (x.to(device, dtype) for x in torch.randn(5, *shape))
    alpha, sigma = (x.to(device) for x in torch.rand(2, shape[0]) + 0.1)
    noise = Noise(SEED, torch.arange(shape[0], device=device) - 1, 2**31 + 1)
    return outputs, {"x0": x0, "noise": noise if drawn else eps, "alpha": alpha, "sigma": sigma}


def oracle(outputs: list[Tensor | None], options: dict[str, Any]) -> ScoreGap:
    wide = {name: x.double() if isinstance(x, Tensor) else x for name, x in options.items()}
    with use_backend("reference"):
        fake, cond, uncond = (None if x is None else x.double() for x in outputs)
        assert fake is not None and cond is not None
        return ops.score_gap(fake, cond, uncond, **wide)


def assert_close(actual: ScoreGap, expected: ScoreGap, tolerance: float = 1e-5) -> None:
    gradient = expected.gradient
    torch.testing.assert_close(
        actual.gradient.double(), gradient, rtol=tolerance, atol=tolerance * (1.0 + gradient.abs().mean().item())
    )
    size = expected.gap_sq.max().item() if expected.gap_sq.numel() else 0.0
    for value, correct in zip(actual[1:], expected[1:], strict=True):
        assert (value is None) == (correct is None)
        if value is not None and correct is not None:
            assert value.dtype == torch.float32
            torch.testing.assert_close(value.double(), correct, rtol=3e-6, atol=3e-6 * size)


@pytest.mark.parametrize("drawn", [True, False])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("normalizer", [None, "mean_abs"])
def test_formula(prediction_type: str, normalizer: str | None, drawn: bool, triton_backend: torch.device) -> None:
    for shape, guided, scaled in (((2, 3, 41, 37), True, False), ((3, 7), False, True), ((1,), True, True)):
        (fake, cond, uncond), target = inputs(triton_backend, *shape, drawn=drawn)
        options: dict[str, Any] = {
            "guidance_scale": 4.5 if guided else 1.0,
            "scale": target["sigma"].flip(0) if scaled else -2.0,
            "normalizer": normalizer,
            "prediction_type": prediction_type,
            **target,
        }
        arguments = [fake, cond, uncond if guided else None]
        assert_close(ops.score_gap(*arguments, **options), oracle(arguments, options))


@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize("normalizer", [None, "mean_abs"])
@pytest.mark.parametrize("known", [True, False])
def test_with_a_reward(normalizer: str | None, known: bool, clip: float | None, triton_backend: torch.device) -> None:
    """One of three samples has no finite score; several blocks, one, and less than one."""
    if normalizer and not known:
        return
    for shape, scaled in (((3, 3, 41, 37), True), ((3, 7), False), ((3,), True)):
        (fake, cond, uncond), target = inputs(triton_backend, *shape, drawn=scaled)
        score = torch.randn_like(fake)
        score[1].view(-1)[0] = torch.nan
        options: dict[str, Any] = {
            "guidance_scale": 4.5,
            "scale": target["sigma"].flip(0) if scaled else -2.0,
            "normalizer": normalizer,
            "reward_score": score,
            "reward_scale": target["alpha"].flip(0) if scaled else 0.5,
            "reward_clip": clip,
            **(target if known else {}),
        }
        actual, expected = ops.score_gap(fake, cond, uncond, **options), oracle([fake, cond, uncond], options)
        assert isinstance(actual, RewardedScoreGap) and isinstance(expected, RewardedScoreGap)
        assert_close(ScoreGap(*actual[:4]), ScoreGap(*expected[:4]))
        assert actual.reward_share[1] == 0.0 and actual.reward_sq[1].isnan()
        for value, correct in zip(actual[4:], expected[4:], strict=True):
            torch.testing.assert_close(value.double(), correct, rtol=3e-6, atol=3e-5, equal_nan=True)


@pytest.mark.parametrize("guided", [True, False])
def test_without_a_target(guided: bool, triton_backend: torch.device) -> None:
    (fake, cond, uncond), _ = inputs(triton_backend, 2, 4, 9, 60)
    arguments = [fake, cond, uncond if guided else None]
    options: dict[str, Any] = {
        "guidance_scale": 7.5 if guided else 1.0,
        "scale": torch.tensor([0.5]).to(fake).expand(2),
    }
    actual = ops.score_gap(*arguments, **options)
    assert_close(actual, oracle(arguments, options))
    assert actual.residual_abs is None and actual.gap_dot_residual is None


@pytest.mark.parametrize("normalizer", [None, "mean_abs"])
@pytest.mark.parametrize("drawn", [True, False])
def test_layouts_and_float16(
    layout: Callable[[Tensor], Tensor], drawn: bool, normalizer: str | None, triton_backend: torch.device
) -> None:
    outputs, target = inputs(triton_backend, 2, 4, 9, 60, dtype=torch.float16, drawn=drawn)
    options: dict[str, Any] = {"guidance_scale": 4.5, "normalizer": normalizer, "prediction_type": "v_prediction"}
    moved = [layout(x) for x in outputs]
    elsewhere = {**target, "x0": layout(target["x0"])}
    actual = ops.score_gap(*moved, **options, **elsewhere)
    assert actual.gradient.stride() == torch.empty_like(moved[0]).stride()
    assert_close(actual, oracle(outputs, {**options, **target}), tolerance=1e-3)


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 8, 3, 7), (2, 4, 2, 2, 3)])
def test_noise_in_channels_last(shape: tuple[int, ...], triton_backend: torch.device) -> None:
    """Whole pixels at once, or where channels or pixels do not allow it, element by element."""
    outputs, target = inputs(triton_backend, *shape)
    memory_format = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    options = {"guidance_scale": 4.5, "normalizer": "mean_abs", **target}
    moved = [x.contiguous(memory_format=memory_format) for x in outputs]
    assert_close(ops.score_gap(*moved, **options), oracle(outputs, options))


@pytest.mark.parametrize("normalizer", [None, "mean_abs"])
def test_several_blocks_of_a_program_and_wide_indices(
    normalizer: str | None, monkeypatch: pytest.MonkeyPatch, triton_backend: torch.device
) -> None:
    outputs, target = inputs(triton_backend, 2, 4, 5, 500)
    options = {"guidance_scale": 4.5, "normalizer": normalizer, "prediction_type": "flow_prediction", **target}
    expected = oracle(outputs, options)
    monkeypatch.setattr("diffpp_fast.ops.triton.gap.PROGRAMS", 2)
    monkeypatch.setattr("diffpp_fast.ops.triton.layout.INT32_ELEMENTS", 1)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        moved = [x.contiguous(memory_format=memory_format) for x in outputs]
        assert_close(ops.score_gap(*moved, **options), expected)


def test_the_normaliser_has_a_floor(triton_backend: torch.device) -> None:
    (fake, cond, _), target = inputs(triton_backend, 2, 5, drawn=False)
    target["noise"] = cond.clone()
    target["noise"][1] += 0.5
    actual = ops.score_gap(fake, cond, normalizer="mean_abs", **target)
    divisor = torch.tensor([[1e-6], [0.5]]).to(fake)
    torch.testing.assert_close(actual.gradient, (cond - fake) / divisor)
    torch.testing.assert_close(actual.residual_abs, torch.tensor([0.0, 0.5]).to(fake))


def test_reads_only_what_the_target_holds(triton_backend: torch.device) -> None:
    (fake, cond, _), target = inputs(triton_backend, 2, 9, drawn=False)
    unread = torch.full_like(fake, torch.nan)
    for prediction_type, missing in (("epsilon", "x0"), ("sample", "noise")):
        options = {**target, missing: unread, "prediction_type": prediction_type}
        assert all(value.isfinite().all() for value in ops.score_gap(fake, cond, normalizer="mean_abs", **options))


def test_a_nan_shows_and_stays_in_its_sample(triton_backend: torch.device) -> None:
    (fake, cond, _), target = inputs(triton_backend, 2, 9)
    cond[1, 4] = torch.nan
    actual = ops.score_gap(fake, cond, normalizer="mean_abs", **target)
    assert all(value[0].isfinite().all() and value[1].isnan().all() for value in actual)


def test_empty_batch_with_a_reward(triton_backend: torch.device) -> None:
    (fake, cond, score), _ = inputs(triton_backend, 0, 9)
    actual = ops.score_gap(fake, cond, reward_score=score)
    assert actual.gradient.shape == (0, 9) and actual.reward_share.shape == (0,)


def test_empty_batch(triton_backend: torch.device) -> None:
    (fake, cond, uncond), target = inputs(triton_backend, 0, 9)
    actual = ops.score_gap(fake, cond, uncond, guidance_scale=4.5, normalizer="mean_abs", **target)
    assert actual.gradient.shape == (0, 9) and all(value.shape == (0,) for value in actual[1:])
