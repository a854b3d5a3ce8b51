"""Coefficients, and what the scale k means for every prediction type."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from diffpp_fast import NoiseSchedule

TIMESTEPS = torch.tensor([0, 1, 17, 998, 999])


def variance_preserving() -> tuple[Tensor, Tensor]:
    angle = torch.linspace(0.02, 1.5, 1000, dtype=torch.float64)
    return angle.cos(), angle.sin()


def straight() -> tuple[Tensor, Tensor]:
    sigmas = torch.arange(1000, dtype=torch.float64) / 1000
    return 1 - sigmas, sigmas


IMPLIED_X0 = {
    "epsilon": lambda x_t, o, a, s: (x_t - s * o) / a,
    "v_prediction": lambda x_t, o, a, s: a * x_t - s * o,
    "flow_prediction": lambda x_t, o, a, s: x_t - s * o,
    "sample": lambda x_t, o, a, s: o,
}


@pytest.mark.parametrize("prediction_type", IMPLIED_X0)
def test_gap_scale_turns_output_gaps_into_x0_gaps(prediction_type: str) -> None:
    alphas, sigmas = straight() if prediction_type == "flow_prediction" else variance_preserving()
    schedule = NoiseSchedule(alphas, sigmas, prediction_type)
    a, s = alphas[TIMESTEPS], sigmas[TIMESTEPS]
    x_t, guided, fake = torch.randn(3, len(TIMESTEPS), dtype=torch.float64)
    implied = IMPLIED_X0[prediction_type]
    expected = implied(x_t, fake, a, s) - implied(x_t, guided, a, s)
    actual = schedule.gap_scale(TIMESTEPS).double() * (guided - fake)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def test_coefficients_are_the_tables_in_float32() -> None:
    alphas, sigmas = variance_preserving()
    schedule = NoiseSchedule(alphas, sigmas)
    assert len(schedule) == 1000
    assert schedule.alphas.dtype == schedule.sigmas.dtype == torch.float64
    alpha, sigma = schedule.coefficients(TIMESTEPS)
    assert torch.equal(alpha, alphas[TIMESTEPS].float())
    assert torch.equal(sigma, sigmas[TIMESTEPS].float())
    assert schedule.coefficients(TIMESTEPS[:0])[0].shape == (0,)


def test_tables_are_copied() -> None:
    alphas, sigmas = variance_preserving()
    schedule = NoiseSchedule(alphas, sigmas)
    expected = alphas[17].float()
    alphas.zero_()
    assert schedule.alphas[17] != 0
    assert copy.deepcopy(schedule).coefficients(torch.tensor([17]))[0] == expected


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_diffusers_schedulers_with_cumulative_products(name: str, prediction_type: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = getattr(diffusers, name)(beta_schedule="scaled_linear", prediction_type=prediction_type)
    schedule = NoiseSchedule.from_diffusers(scheduler)
    assert schedule.prediction_type == prediction_type
    alpha, sigma = schedule.coefficients(TIMESTEPS)
    products = scheduler.alphas_cumprod[TIMESTEPS]
    torch.testing.assert_close(alpha, products.sqrt(), rtol=1e-6, atol=0.0)
    torch.testing.assert_close(sigma, (1 - products).sqrt(), rtol=1e-6, atol=0.0)


def test_diffusers_ddpm_adds_the_same_noise() -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler()
    alpha, sigma = NoiseSchedule.from_diffusers(scheduler).coefficients(TIMESTEPS)
    x0, eps = torch.randn(2, len(TIMESTEPS), 3)
    expected = scheduler.add_noise(x0, eps, TIMESTEPS)
    torch.testing.assert_close(alpha[:, None] * x0 + sigma[:, None] * eps, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_diffusers_flow_matching(shift: float) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    schedule = NoiseSchedule.from_diffusers(scheduler)
    assert schedule.prediction_type == "flow_prediction"
    alpha, sigma = schedule.coefficients(TIMESTEPS)
    expected = TIMESTEPS.double() / 1000
    assert torch.equal(sigma, expected.float())
    assert torch.equal(alpha, (1 - expected).float())
    # The scheduler's own pairs obey the same relation, whatever its shift.
    torch.testing.assert_close(scheduler.timesteps, 1000 * scheduler.sigmas)


def test_diffusers_flow_prediction_of_a_general_solver() -> None:
    diffusers = pytest.importorskip("diffusers")
    solver = diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    schedule = NoiseSchedule.from_diffusers(solver)
    torch.testing.assert_close(schedule.alphas + schedule.sigmas, torch.ones(1000, dtype=torch.float64))


def test_schedulers_are_duck_typed() -> None:
    products = torch.linspace(0.99, 0.01, 10)
    scheduler = SimpleNamespace(alphas_cumprod=products, config=SimpleNamespace(prediction_type="v_prediction"))
    schedule = NoiseSchedule.from_diffusers(scheduler)
    assert (len(schedule), schedule.prediction_type) == (10, "v_prediction")


def test_schedulers_that_are_refused() -> None:
    angles = SimpleNamespace(config=SimpleNamespace(prediction_type="trigflow"))
    with pytest.raises(ValueError, match="counts time in angles"):
        NoiseSchedule.from_diffusers(angles)
    with pytest.raises(ValueError, match="SimpleNamespace has no alphas_cumprod"):
        NoiseSchedule.from_diffusers(SimpleNamespace(config=SimpleNamespace(prediction_type="epsilon")))
    upside_down = SimpleNamespace(shift=1.0, num_train_timesteps=1000, invert_sigmas=True)
    with pytest.raises(ValueError, match="invert_sigmas"):
        NoiseSchedule.from_diffusers(SimpleNamespace(config=upside_down))
    strange = SimpleNamespace(alphas_cumprod=torch.ones(3) / 2, config=SimpleNamespace(prediction_type="score"))
    with pytest.raises(ValueError, match="unknown prediction type 'score'; known: epsilon, v_prediction"):
        NoiseSchedule.from_diffusers(strange)


def test_errors_name_what_is_wrong() -> None:
    alphas, sigmas = variance_preserving()
    with pytest.raises(ValueError, match=r"one length, got shapes \[1000\] and \[999\]"):
        NoiseSchedule(alphas, sigmas[1:])
    with pytest.raises(ValueError, match="non-empty"):
        NoiseSchedule(alphas[:0], sigmas[:0])
    schedule = NoiseSchedule(alphas, sigmas)
    for t in (torch.tensor([1000]), torch.tensor([0, -1])):
        with pytest.raises(ValueError, match=r"t must be in \[0, 1000\)"):
            schedule.coefficients(t)
    for t in (torch.tensor([1.0]), torch.tensor(1), torch.tensor([1], dtype=torch.int32), 1):
        with pytest.raises(ValueError, match=r"t must be an int64 tensor of shape \[B\]"):
            schedule.gap_scale(t)


@pytest.mark.parametrize(
    ("prediction_type", "tables"), [("v_prediction", straight()), ("flow_prediction", variance_preserving())]
)
def test_tables_that_break_the_prediction_type_are_refused(prediction_type: str, tables: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(ValueError, match=f"{prediction_type} takes alpha.*which these tables break: it is .* at t = "):
        NoiseSchedule(*tables, prediction_type)


@pytest.mark.parametrize(
    ("alphas", "sigmas", "message"),
    [
        ([0.9, float("nan")], [0.1, 0.9], r"alphas must be finite and not negative, got nan at t = 1"),
        ([0.9, 0.1], [-0.1, 0.9], r"sigmas must be finite and not negative, got -0\.1"),
        ([1.0, 1.0], [1.0, float("inf")], r"sigmas must be finite and not negative, got inf at t = 1"),
        ([0.9, 0.0], [0.1, 0.0], r"alpha and sigma are both 0 at t = 1"),
        ([0.1, 0.9], [0.9, 0.1], r"sigma / alpha falls from t = 0 to 1: noise must grow with t"),
        ([0.0, 0.1], [1.0, 0.9], r"sigma / alpha falls from t = 0 to 1"),
    ],
)
def test_tables_that_are_no_noise_process_are_refused(alphas: list, sigmas: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NoiseSchedule(torch.tensor(alphas), torch.tensor(sigmas))


def test_tables_of_a_variance_exploding_process_and_with_zeros_at_their_ends_are_taken() -> None:
    NoiseSchedule(torch.ones(5), torch.logspace(-2, 2, 5))
    NoiseSchedule(torch.tensor([1.0, 0.5, 0.0]), torch.tensor([0.0, 0.5, 1.0]), "flow_prediction")


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler"])
def test_betas_rescaled_to_zero_terminal_snr_are_read_as_such(name: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    make = getattr(diffusers, name)
    plain, rescaled = (
        NoiseSchedule.from_diffusers(make(beta_schedule="scaled_linear", rescale_betas_zero_snr=rescale))
        for rescale in (False, True)
    )
    assert plain.alphas[-1] > 0.02 and rescaled.alphas[-1] < 3e-4


@pytest.mark.parametrize("change", ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"])
def test_what_a_sampler_visits_changes_no_noise_level(change: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("scipy")
    plain, other = (
        NoiseSchedule.from_diffusers(diffusers.DPMSolverMultistepScheduler(**options))
        for options in ({}, {change: True})
    )
    assert torch.equal(plain.alphas, other.alphas)


def test_schedulers_whose_noise_is_not_the_networks_are_refused() -> None:
    diffusers = pytest.importorskip("diffusers")
    with pytest.raises(ValueError, match="use_flow_sigmas=True and prediction_type 'epsilon'"):
        NoiseSchedule.from_diffusers(diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True))
    with pytest.raises(ValueError, match="num_train_timesteps=1000, but 3 alphas_cumprod"):
        NoiseSchedule.from_diffusers(diffusers.DDPMScheduler(trained_betas=[0.1, 0.2, 0.3]))
    with pytest.raises(ValueError, match="SimpleNamespace has no num_train_timesteps"):
        NoiseSchedule.from_diffusers(SimpleNamespace(config=SimpleNamespace(shift=3.0)))
    with pytest.raises(ValueError, match="EDMEulerScheduler has no alphas_cumprod"):
        NoiseSchedule.from_diffusers(diffusers.EDMEulerScheduler())
