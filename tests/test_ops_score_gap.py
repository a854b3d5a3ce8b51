"""The score gap, its normaliser and its statistics, against the formulas in float64."""

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from prediction_targets import TARGETS
from torch import Tensor

from diffpp_fast import Noise, NoiseSchedule, ops

pytestmark = pytest.mark.usefixtures("backend")

F64 = torch.float64


def outputs(*shape: int, dtype: torch.dtype = F64) -> tuple[Tensor, ...]:
    return tuple(torch.randn(3, *shape, dtype=dtype))


def behind(*shape: int, dtype: torch.dtype = F64) -> dict[str, Any]:
    x0, noise = torch.randn(2, *shape, dtype=dtype)
    alpha, sigma = torch.rand(2, shape[0], dtype=F64 if dtype == F64 else torch.float32) + 0.1
    return {"x0": x0, "noise": noise, "alpha": alpha, "sigma": sigma}


def formula(
    outputs: tuple[Tensor, ...], w: float, scale: Tensor, mean_abs: bool, known: dict[str, Tensor], prediction_type: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    fake, cond, uncond = outputs
    shape = (-1, *[1] * (fake.dim() - 1))
    a, s = known["alpha"].reshape(shape), known["sigma"].reshape(shape)
    guided = uncond + w * (cond - uncond)
    d = guided - fake
    r = guided - TARGETS[prediction_type](known["x0"], known["noise"], a, s)
    residual_abs = r.abs().flatten(1).mean(1)
    normalizer = residual_abs.reshape(shape) if mean_abs else 1.0
    return scale.reshape(shape) * d / normalizer, d.square().flatten(1).sum(1), residual_abs, (d * r).flatten(1).sum(1)


@pytest.mark.parametrize("prediction_type", TARGETS)
@pytest.mark.parametrize("normalizer", [None, "mean_abs"])
def test_formula(prediction_type: str, normalizer: str | None) -> None:
    for shape in ((3, 5), (2, 4, 3, 7), (1, 1)):
        three, known, scale = outputs(*shape), behind(*shape), torch.randn(shape[0], dtype=F64)
        actual = ops.score_gap(
            *three, guidance_scale=7.5, scale=scale, normalizer=normalizer, prediction_type=prediction_type, **known
        )
        expected = formula(three, 7.5, scale, normalizer == "mean_abs", known, prediction_type)
        for value, oracle in zip(actual, expected, strict=True):
            torch.testing.assert_close(value, oracle)


@given(shape=st.lists(st.integers(1, 5), min_size=1, max_size=4), batch=st.integers(0, 3))
def test_shapes(shape: list[int], batch: int) -> None:
    fake, cond, _ = outputs(batch, *shape)
    gap = ops.score_gap(fake, cond, scale=-2.0)
    torch.testing.assert_close(gap.gradient, -2.0 * (cond - fake))
    torch.testing.assert_close(gap.gap_sq, (cond - fake).square().flatten(1).sum(1))
    assert gap.residual_abs is None and gap.gap_dot_residual is None


def test_noise_is_drawn_from_its_address() -> None:
    three, known = outputs(2, 4, 5, dtype=torch.float32), behind(2, 4, 5, dtype=torch.float32)
    noise = Noise(3, torch.tensor([4, 9]))
    drawn, stored = (
        ops.score_gap(*three, guidance_scale=2.0, normalizer="mean_abs", **{**known, "noise": eps})
        for eps in (noise, noise.normal((4, 5)))
    )
    assert all(torch.equal(a, b) for a, b in zip(drawn, stored, strict=True))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_is_the_difference_of_implied_x0(prediction_type: str) -> None:
    """With scale k: X_fake - X_guided. With scale sign(k) and "mean_abs": that over mean|x0 - X_guided|."""
    angle = torch.linspace(0.1, 1.4, 10, dtype=F64)
    schedule = NoiseSchedule(angle.cos(), angle.sin(), prediction_type)
    t = torch.tensor([1, 8])
    alpha, sigma = schedule.alphas[t], schedule.sigmas[t]
    (fake, guided, _), x0, eps = outputs(2, 5), *torch.randn(2, 2, 5, dtype=F64)
    a, s = alpha[:, None], sigma[:, None]
    x_t = a * x0 + s * eps

    def implied(output: Tensor) -> Tensor:
        return {"epsilon": (x_t - s * output) / a, "v_prediction": a * x_t - s * output, "sample": output}[
            prediction_type
        ]

    k = schedule.gap_scale(t).double()
    difference = implied(fake) - implied(guided)
    gradient = ops.score_gap(fake, guided, scale=k).gradient
    torch.testing.assert_close(gradient, difference, rtol=1e-6, atol=1e-6)
    dmd = ops.score_gap(
        fake,
        guided,
        scale=k.sign(),
        normalizer="mean_abs",
        x0=x0,
        noise=eps,
        alpha=alpha,
        sigma=sigma,
        prediction_type=prediction_type,
    ).gradient
    torch.testing.assert_close(dmd, difference / (x0 - implied(guided)).abs().mean(1, keepdim=True))


def test_no_normaliser_is_infinite() -> None:
    known = behind(2, 6, dtype=torch.float32)
    fake = known["noise"] + 1.0
    gap = ops.score_gap(fake, known["noise"], normalizer="mean_abs", **known)
    assert torch.equal(gap.residual_abs, torch.zeros(2))
    assert torch.isfinite(gap.gradient).all()
    same = ops.score_gap(known["noise"], known["noise"], normalizer="mean_abs", **known)
    assert torch.equal(same.gradient, torch.zeros(2, 6))


def test_nan_is_not_hidden() -> None:
    known = behind(1, 6, dtype=torch.float32)
    cond = torch.full((1, 6), torch.nan)
    assert torch.isnan(ops.score_gap(known["x0"], cond, normalizer="mean_abs", **known).gradient).all()


def rewarded_formula(
    three: tuple[Tensor, ...], w: float, scale: Tensor, known: dict[str, Tensor] | None, reward: dict[str, Any]
) -> tuple[Tensor | None, ...]:
    """Sample by sample, with vectors and norms as the definition says them."""
    fake, cond, uncond = three
    rows: list[tuple[Tensor, ...]] = []
    for b in range(len(fake)):
        d = uncond[b] + w * (cond[b] - uncond[b]) - fake[b]
        score, toward = reward["reward_score"][b], reward["reward_scale"][b]
        given, term = scale[b] * d, toward * score
        share = term.new_ones(())
        if not term.norm().isfinite():
            share, term = share * 0.0, torch.zeros_like(term)
        elif reward["reward_clip"] is not None and term.norm() > reward["reward_clip"] * given.norm():
            share = reward["reward_clip"] * given.norm() / term.norm()
        divisor: Tensor | float = 1.0
        if known is not None:
            target = TARGETS["flow_prediction"](known["x0"][b], known["noise"][b], known["alpha"][b], known["sigma"][b])
            divisor = (d + fake[b] - target).abs().mean()
        rows.append(((given - share * term) / divisor, score.square().sum(), (d * score).sum(), share))
    return tuple(torch.stack(column) for column in zip(*rows, strict=True))


@pytest.mark.parametrize("normalizer", [None, "mean_abs"])
@pytest.mark.parametrize("clip", [None, 0.7])
def test_formula_with_a_reward(normalizer: str | None, clip: float | None) -> None:
    for shape in ((4, 5), (4, 4, 3, 7), (4,)):
        three, known, scale = outputs(*shape), behind(*shape), torch.randn(4, dtype=F64)
        target = {**known, "prediction_type": "flow_prediction"} if normalizer else {}
        score, toward = torch.randn(shape, dtype=F64), torch.tensor([-2.0, 0.01, 1.0, 1.0], dtype=F64)
        # One sample has a score that is not finite, another a factor that is not.
        score[2].view(-1)[-1], toward[3] = torch.inf, torch.nan
        reward = {"reward_score": score, "reward_scale": toward, "reward_clip": clip}
        options: dict[str, Any] = {"guidance_scale": 7.5, "scale": scale, "normalizer": normalizer, **target}
        actual: Any = ops.score_gap(*three, **options, **reward)
        plain = ops.score_gap(*three, **options)
        gradient, *statistics = rewarded_formula(three, 7.5, scale, known if normalizer else None, reward)
        torch.testing.assert_close(actual.gradient, gradient)
        torch.testing.assert_close(actual.gradient[2:], plain.gradient[2:])
        for value, oracle in zip(actual[1:4], plain[1:], strict=True):
            assert (value is None and oracle is None) or torch.equal(value, oracle)
        for value, oracle in zip(actual[4:], statistics, strict=True):
            torch.testing.assert_close(value, oracle)
        assert actual.reward_share.tolist()[2:] == [0.0, 0.0]


def test_numbers_and_layouts_with_a_reward(layout: Callable[[Tensor], Tensor]) -> None:
    three, score = outputs(2, 4, 5, 7, dtype=torch.float32), torch.randn(2, 4, 5, 7)
    expected = ops.score_gap(*three, guidance_scale=3.0, scale=-0.5)
    for clip in (None, 0.2):
        actual = ops.score_gap(
            layout(three[0]), *three[1:], guidance_scale=3.0, scale=-0.5,
            reward_score=layout(score), reward_scale=2.0, reward_clip=clip,
        )  # fmt: skip
        term = actual.reward_share.view(2, 1, 1, 1) * 2.0 * score
        torch.testing.assert_close(actual.gradient, expected.gradient - term)
        assert actual.gradient.stride() == torch.empty_like(layout(three[0])).stride()
        assert (actual.reward_share < 1.0).all() == (clip is not None)
    assert torch.equal(ops.score_gap(*three, guidance_scale=3.0, reward_score=score).reward_share, torch.ones(2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_with_a_reward(dtype: torch.dtype, assert_twice_unfused: Callable[..., None]) -> None:
    shape = (4, 4, 16, 16)
    three, scale, toward = outputs(*shape, dtype=dtype), torch.rand(4), torch.rand(4)
    score = torch.randn(shape, dtype=dtype)
    gap = ops.score_gap(*three, guidance_scale=7.5, scale=scale, reward_score=score, reward_scale=toward)
    assert gap.gradient.dtype == dtype and gap.reward_sq.dtype == torch.float32

    def by_hand(dtype: torch.dtype) -> Tensor:
        fake, cond, uncond, s = (x.to(dtype) for x in (*three, score))
        h, c = (x.to(dtype).view(4, 1, 1, 1) for x in (scale, toward))
        return h * (uncond + 7.5 * (cond - uncond) - fake) - c * s

    assert_twice_unfused(gap.gradient, by_hand(dtype), by_hand(F64))


def test_a_nan_of_an_output_shows_with_a_reward() -> None:
    (fake, cond, _), score = outputs(2, 6, dtype=torch.float32), torch.randn(2, 6)
    fake[1, 2] = torch.nan
    gap = ops.score_gap(fake, cond, reward_score=score, reward_clip=0.5)
    assert gap.gradient[0].isfinite().all() and gap.gradient[1, 2].isnan()


def test_errors_of_a_reward_name_what_is_wrong() -> None:
    (fake, cond, score), ones = outputs(2, 3), torch.ones(2)
    for options, message in (
        ({"reward_scale": 2.0}, "score_gap: reward_scale is given without reward_score"),
        ({"reward_clip": 0.5}, "score_gap: reward_clip is given without reward_score"),
        ({"reward_score": score[:1]}, r"score_gap: reward_score has shape \[1, 3\], fake has \[2, 3\]"),
        ({"reward_score": score, "reward_scale": torch.ones(3)}, r"reward_scale must have shape \[B\] = \[2\], got"),
        ({"reward_score": score, "reward_scale": torch.nan}, "score_gap: reward_scale must be finite, got nan"),
        ({"reward_score": score, "reward_clip": 0.0}, "score_gap: reward_clip must be above 0, or None, got 0"),
        ({"reward_score": score, "reward_clip": torch.inf}, "score_gap: reward_clip must be finite, got inf"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.score_gap(fake, cond, **options)
    for options, message in (
        ({"reward_score": score.int()}, "score_gap: reward_score must be float32, bfloat16, float16 or float64"),
        ({"reward_score": score, "reward_scale": ones.int()}, "score_gap: reward_scale must be float32, bfloat16"),
    ):
        with pytest.raises(TypeError, match=message):
            ops.score_gap(fake, cond, **options)
    assert not ops.score_gap(fake, cond, reward_score=score.requires_grad_()).gradient.requires_grad


def test_carries_no_graph() -> None:
    three, known = outputs(2, 3), behind(2, 3)
    gap = ops.score_gap(*(output.requires_grad_() for output in three), guidance_scale=2.0, **known)
    assert not any(value.requires_grad for value in gap)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype, assert_twice_unfused: Callable[..., None]) -> None:
    shape = (4, 4, 16, 16)
    three, known, scale = outputs(*shape, dtype=dtype), behind(*shape, dtype=dtype), torch.rand(4)
    gap = ops.score_gap(*three, guidance_scale=7.5, scale=scale, normalizer="mean_abs", **known)
    wide = {name: value.double() for name, value in known.items()}
    oracle = formula(tuple(output.double() for output in three), 7.5, scale.double(), True, wide, "epsilon")
    low = {name: value.to(dtype) for name, value in known.items()}
    unfused = formula(three, 7.5, scale.to(dtype), True, low, "epsilon")
    assert_twice_unfused(gap.gradient, unfused[0], oracle[0])
    for value, expected in zip(gap[1:], oracle[1:], strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-4 * oracle[1].max().item())


def test_layouts(layout: Callable[[Tensor], Tensor]) -> None:
    shape = (2, 4, 5, 7)
    three, known = outputs(*shape, dtype=torch.float32), behind(*shape, dtype=torch.float32)
    expected = ops.score_gap(*three, guidance_scale=3.0, normalizer="mean_abs", **known)
    laid_out = {**known, "x0": layout(known["x0"]), "noise": layout(known["noise"])}
    for fake in (three[0], layout(three[0])):
        actual = ops.score_gap(
            fake, layout(three[1]), layout(three[2]), guidance_scale=3.0, normalizer="mean_abs", **laid_out
        )
        for value, oracle in zip(actual, expected, strict=True):
            torch.testing.assert_close(value, oracle)
        assert actual.gradient.stride() == torch.empty_like(fake).stride()


def test_errors_name_what_is_wrong() -> None:
    (fake, cond, uncond), known = outputs(2, 3), behind(2, 3)
    with pytest.raises(ValueError, match=r"score_gap: guidance_scale 2\.0 needs uncond"):
        ops.score_gap(fake, cond, guidance_scale=2.0)
    with pytest.raises(ValueError, match="score_gap: unknown normalizer 'max'; known: None, mean_abs"):
        ops.score_gap(fake, cond, normalizer="max")
    with pytest.raises(ValueError, match=r"score_gap: the target needs .* missing: x0, noise, alpha, sigma"):
        ops.score_gap(fake, cond, normalizer="mean_abs")
    with pytest.raises(ValueError, match=r"score_gap: the target needs .* missing: noise, alpha, sigma"):
        ops.score_gap(fake, cond, x0=known["x0"])
    with pytest.raises(ValueError, match="score_gap: unknown prediction type 'v'"):
        ops.score_gap(fake, cond, prediction_type="v")
    with pytest.raises(ValueError, match=r"score_gap: uncond has shape \[1, 3\], fake has \[2, 3\]"):
        ops.score_gap(fake, cond, uncond[:1], guidance_scale=2.0)
    with pytest.raises(ValueError, match=r"score_gap: scale must have shape \[B\] = \[2\], got \[3\]"):
        ops.score_gap(fake, cond, scale=torch.ones(3))
    with pytest.raises(ValueError, match="score_gap: a sample of fake has no elements"):
        ops.score_gap(fake[:, :0], cond[:, :0])
    with pytest.raises(TypeError, match="score_gap: cond must be float32, bfloat16, float16 or float64"):
        ops.score_gap(fake, cond.int())
