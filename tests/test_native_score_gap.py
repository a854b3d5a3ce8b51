"""The compiled score gap: registration, threads, layouts, sizes. The formula is in test_ops_score_gap.py."""

import math
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


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], dict[str, Any]]:
    """fake, cond, uncond, and what makes the target."""
    *outputs, x0 = torch.randn(4, *shape).to(dtype)
    alpha, sigma = torch.rand(2, shape[0]) + 0.1
    noise = Noise(2**64 - 5, torch.arange(shape[0]) - 1)
    return outputs, {"x0": x0, "noise": noise, "alpha": alpha, "sigma": sigma}


def assert_close(actual: tuple[Any, ...], expected: tuple[Any, ...], **tolerances: float) -> None:
    for value, oracle in zip(actual, expected, strict=True):
        assert (value is None) == (oracle is None)
        if value is not None:
            torch.testing.assert_close(value, oracle, **tolerances)


@pytest.mark.parametrize(("number", "dtype"), list(enumerate(DTYPES)))
def test_registration(number: int, dtype: torch.dtype, cpu_backend: Any) -> None:
    (fake, cond, uncond), target = inputs(2, 3, 5, 7, dtype=dtype)
    x0, noise, alpha, sigma = target.values()
    fake = fake.to(memory_format=torch.channels_last)
    call = cpu_backend.score_gap.default
    of_target = x0, noise.samples, -5, 1, alpha, sigma, number
    check_registration(call, fake, cond, uncond, 7.5, 1.0, alpha, True, *of_target)
    check_registration(call, fake, cond, uncond, 7.5, -2.0, None, False, None, None, 0, 0, None, None, 0)
    call = cpu_backend.score_gap_with_reward.default
    check_registration(call, fake, cond, uncond, 7.5, 1.0, alpha, True, *of_target, x0, 0.5, sigma, 0.3)
    check_registration(
        call, fake, cond, None, 1.0, 2.0, None, False, None, None, 0, 0, None, None, 0, x0, 0.5, None, math.inf
    )


@pytest.mark.parametrize("normalizer", [None, "mean_abs"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 3, 4])
def test_same_bits_for_any_threads(batch: int, dtype: torch.dtype, normalizer: str | None) -> None:
    """Also where some numbers of threads take whole samples and others chunks."""
    three, target = inputs(batch, 5, 61, 67, dtype=dtype)
    assert_same_bits_for_any_threads(lambda: ops.score_gap(*three, guidance_scale=4.5, normalizer=normalizer, **target))


@pytest.mark.parametrize("normalizer", [None, "mean_abs"])
@pytest.mark.parametrize("batch", [3, 4])
def test_same_bits_for_any_threads_with_a_reward(batch: int, normalizer: str | None) -> None:
    """The first pass settles some of the samples; one is clipped, and one has no reward term."""
    three, target = inputs(batch, 5, 61, 67)
    reward = {"reward_score": torch.randn_like(target["x0"]), "reward_clip": 0.5}
    reward["reward_scale"] = torch.tensor([0.1, 100.0, torch.nan, 0.1])[:batch]
    options = {"guidance_scale": 4.5, "normalizer": normalizer, **target, **reward}
    assert_same_bits_for_any_threads(lambda: ops.score_gap(*three, **options))
    share = ops.score_gap(*three, **options).reward_share
    assert [share[0].item(), share[2].item()] == [1.0, 0.0] and 0.0 < share[1] < 0.1


def test_compiles_once_with_a_reward() -> None:
    def gradient(fake: Tensor, cond: Tensor, score: Tensor, a: Tensor) -> Tensor:
        gap = ops.score_gap(fake, cond, scale=a, reward_score=score, reward_scale=a, reward_clip=0.5)
        return gap.gradient + gap.reward_sq.sum() + gap.gap_dot_reward.sum() + gap.reward_share.sum()

    batches = [(*inputs(2, 4, 8, 8)[0], torch.rand(2) + 0.1) for _ in range(3)]
    assert_compiles_once(gradient, *batches)


def test_compiles_once() -> None:
    def gradient(fake: Tensor, cond: Tensor, uncond: Tensor, x0: Tensor, samples: Tensor, a: Tensor) -> Tensor:
        gap = ops.score_gap(
            fake,
            cond,
            uncond,
            guidance_scale=4.5,
            scale=a,
            normalizer="mean_abs",
            x0=x0,
            noise=Noise(2**63 + 1, samples),
            alpha=a,
            sigma=a,
        )
        return gap.gradient + gap.gap_sq.sum() + gap.residual_abs.sum() + gap.gap_dot_residual.sum()

    batches = []
    for first in (0, 10, 20):
        three, target = inputs(2, 4, 8, 8)
        batches.append((*three, target["x0"], torch.arange(first, first + 2), target["alpha"]))
    assert_compiles_once(gradient, *batches)


@given(
    shape=st.lists(st.integers(1, 67), min_size=0, max_size=3),
    batch=st.integers(0, 3),
    prediction_type=st.sampled_from(PREDICTION_TYPES),
    normalizer=st.sampled_from([None, "mean_abs"]),
    guided=st.booleans(),
    known=st.booleans(),
    scale=st.sampled_from([-2.0, None]),
    reward=st.sampled_from([None, 0.3, torch.inf]),
)
def test_any_size_agrees_with_the_reference(
    shape: list[int],
    batch: int,
    prediction_type: str,
    normalizer: str | None,
    guided: bool,
    known: bool,
    scale: float | None,
    reward: float | None,
) -> None:
    (fake, cond, uncond), target = inputs(batch, *shape)
    options = {
        "guidance_scale": 4.5 if guided else 1.0,
        "scale": target["alpha"] if scale is None else scale,
        "normalizer": normalizer if known else None,
        "prediction_type": prediction_type,
        **(target if known else {}),
    }
    if reward is not None:
        options |= {"reward_score": torch.randn_like(fake), "reward_scale": -0.5 if scale is None else target["sigma"]}
        options["reward_clip"] = None if math.isinf(reward) else reward
    arguments = fake, cond, uncond if guided else None
    actual = ops.score_gap(*arguments, **options)
    with use_backend("reference"):
        expected = ops.score_gap(*arguments, **options)
    assert_close(actual, expected, rtol=1e-4, atol=1e-5 * max(1.0, fake[:1].numel()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_are_as_close_to_float64_as_the_reference(dtype: torch.dtype) -> None:
    three, target = inputs(2, 4, 100_003, dtype=dtype)
    target["noise"] = torch.randn_like(target["x0"])
    wide = {name: value.double() for name, value in target.items()}
    options: dict[str, Any] = {"guidance_scale": 4.5, "prediction_type": "v_prediction"}
    oracle = ops.score_gap(*(output.double() for output in three), **options, **wide)
    errors = []
    for backend in ("cpu", "reference"):
        with use_backend(backend):
            actual = ops.score_gap(*three, **options, **target)
            errors.append([(a - b).abs().max() / b.abs().max() for a, b in zip(actual[1:], oracle[1:], strict=True)])
    for fused, unfused in zip(*errors, strict=True):
        assert fused <= max(2.0 * unfused.item(), 2.0**-23)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_layouts_hold_the_same_numbers(
    layout: Callable[[Tensor], Tensor], dtype: torch.dtype, prediction_type: str
) -> None:
    three, target = inputs(2, 5, 9, 31, dtype=dtype)
    moved = {**target, "x0": layout(target["x0"])}
    options: dict[str, Any] = {"guidance_scale": 4.5, "prediction_type": prediction_type}
    laid_out = [layout(output) for output in three]
    expected = ops.score_gap(*three, **options, **target)
    actual = ops.score_gap(*laid_out, **options, **moved)
    assert torch.equal(actual.gradient, expected.gradient)
    assert actual.gradient.stride() == torch.empty_like(laid_out[0]).stride()
    # channels_last sums in another order.
    assert_close(actual, expected, rtol=1e-4, atol=1e-4 * expected.gap_sq.max().item())
    if not laid_out[0].is_contiguous(memory_format=torch.channels_last):
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("channels", [3, 4])
def test_video_in_channels_last(channels: int) -> None:
    three, target = inputs(2, channels, 4, 5, 6)
    video = three[0].contiguous(memory_format=torch.channels_last_3d)
    expected = ops.score_gap(*three, guidance_scale=4.5, normalizer="mean_abs", **target)
    actual = ops.score_gap(video, *three[1:], guidance_scale=4.5, normalizer="mean_abs", **target)
    assert_close(actual, expected)
    assert actual.gradient.stride() == video.stride()


def test_reads_only_what_the_target_holds() -> None:
    (fake, cond, _), target = inputs(2, 3, 5)
    unread = torch.full_like(fake, torch.nan)
    for prediction_type, known, eps in (("epsilon", unread, fake), ("sample", fake, unread)):
        of_target = {**target, "x0": known, "noise": eps}
        gap = ops.score_gap(fake, cond, normalizer="mean_abs", prediction_type=prediction_type, **of_target)
        assert all(value.isfinite().all() for value in gap)


def test_inputs_are_not_written_and_vectors_may_be_expanded() -> None:
    three, target = inputs(3, 4, 8, 8)
    before = [output.clone() for output in three]
    half, full = torch.tensor([0.5]).expand(3), torch.full((3,), 0.5)
    expanded, plain = (
        ops.score_gap(
            *three,
            guidance_scale=4.5,
            scale=v,
            normalizer="mean_abs",
            prediction_type="v_prediction",
            **{**target, "alpha": v, "sigma": v},
        )
        for v in (half, full)
    )
    assert all(torch.equal(a, b) for a, b in zip(expanded, plain, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(three, before, strict=True))


def test_the_binding_itself_refuses_what_it_does_not_serve(cpu_backend: Any) -> None:
    (fake, cond, uncond), target = inputs(2, 3)
    x0, noise, alpha, sigma = target.values()
    known = x0, noise.samples, 0, 1, alpha, sigma, 0
    unknown = None, None, 0, 0, None, None, 0
    for arguments, message in (
        ((fake.int(), cond, None, 1.0, 1.0, None, False, *unknown), "score_gap: fake must be float32, bfloat16"),
        ((fake, cond.double(), None, 1.0, 1.0, None, False, *unknown), "score_gap: cond is Double, the tensors before"),
        (
            (fake[:, :0], cond[:, :0], None, 1.0, 1.0, None, False, *unknown),
            "score_gap: a sample of fake has no elements",
        ),
        ((fake, cond, uncond[:1], 1.0, 1.0, None, False, *unknown), "score_gap: uncond must have the shape"),
        ((fake, cond, None, 1.0, 1.0, alpha[:1], False, *unknown), r"score_gap: scales must have shape \[B\] = \[2\]"),
        ((fake, cond, None, 1.0, 1.0, None, True, *unknown), "score_gap: mean_abs needs the target"),
        (
            (fake, cond, None, 1.0, 1.0, None, False, x0, *unknown[1:]),
            "score_gap: x0, noise, alpha and sigma are given",
        ),
        ((fake, cond, None, 1.0, 1.0, None, True, *known[:-1], -1), "score_gap: unknown prediction type number -1"),
        ((fake, cond, None, 1.0, 1.0, None, True, x0[:, :1], *known[1:]), "score_gap: x0 must have the shape"),
    ):
        with pytest.raises(RuntimeError, match=message):
            cpu_backend.score_gap.default(*arguments)


def test_errors_of_the_registered_operator_with_a_reward(cpu_backend: Any) -> None:
    (fake, cond, score), _ = inputs(2, 3)
    plain = fake, cond, None, 1.0, 1.0, None, False, None, None, 0, 0, None, None, 0
    for reward, message in (
        ((score[:, :1], 1.0, None, 1.0), "score_gap: reward_score must have the shape"),
        ((score.double(), 1.0, None, 1.0), "score_gap: reward_score is Double, the tensors before"),
        ((score, 1.0, torch.ones(3), 1.0), r"score_gap: reward_scales must have shape \[B\] = \[2\]"),
    ):
        with pytest.raises(RuntimeError, match=message):
            cpu_backend.score_gap_with_reward.default(*plain, *reward)


def test_fakes_beyond_2_to_the_31_elements(cpu_backend: Any) -> None:
    with torch.device("meta"):
        fake = torch.empty(2, 3, 2**16, 2**15, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
        one, samples = torch.ones(2), torch.empty(2, dtype=torch.int64)
        target = fake, samples, 0, 1, one, one, 0
        gradient, *statistics = cpu_backend.score_gap.default(fake, fake, None, 1.0, 1.0, None, True, *target)
    assert gradient.shape == fake.shape and gradient.stride() == fake.stride() and gradient.dtype == fake.dtype
    assert all(value.shape == (2,) and value.dtype == torch.float32 for value in statistics)
