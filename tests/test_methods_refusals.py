"""Methods refuse wrong arguments when they are built, and wrong outputs of networks when these answer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from method_cases import SCHEDULES, Convolution, batch_of, quadratic_reward

from diffpp_fast import NoiseSchedule
from diffpp_fast.methods import METHODS

#: Ten times, the first without noise and the last without signal.
ANGLE = torch.linspace(0, torch.pi / 2, 10, dtype=torch.float64)
ROUND = ANGLE.cos().clamp(min=0.0) * (torch.arange(10) < 9), ANGLE.sin()
STRAIGHT = 1 - torch.linspace(0, 1, 10, dtype=torch.float64), torch.linspace(0, 1, 10, dtype=torch.float64)
#: Weightings of the classes that take one.
WEIGHTINGS: dict[str, list[dict[str, Any]]] = {
    "diff_instruct": [{"weighting": name} for name in ("x0", "score", "unit", "mean_abs")],
    "diff_instruct_pp": [{"weighting": lambda t: 1.0 + t.float()}],
    "dmd2": [{}, {"normalizer": "batch"}, {"normalizer_floor": 1e-3}],
    "decoupled_dmd": [{}, {"guidance_t_range": (0, 10), "t_range": (1, 9)}],
    "sid": [{"fake_guidance_scale": 2.0}],
    "sim": [{"weighting": "x0"}, {"weighting": "score"}, {"weighting": lambda t: 1.0 + t.float()}],
    "diff_instruct_star": [{"guidance": guidance} for guidance in ("inside", "outside")],
    "didr": [{"weighting": "mean_abs"}, {"weighting": "score", "denoising_steps": 2}],
}
CASES = [
    pytest.param(
        name,
        prediction_type,
        {**options, "fake_weighting": fake_weighting},
        id=f"{name}-{number}-{prediction_type}-{fake_weighting}",
    )
    for name, choices in WEIGHTINGS.items()
    for number, options in enumerate(choices)
    for prediction_type in ("epsilon", "v_prediction", "flow_prediction", "sample")
    for fake_weighting in ("prediction", "x0", "score")
]


@pytest.mark.parametrize(("name", "prediction_type", "options"), CASES)
def test_what_is_built_is_finite_at_all_of_its_times(name: str, prediction_type: str, options: dict[str, Any]) -> None:
    """Either the whole schedule is refused by name, or no update at any of its times is infinite or NaN. Between the
    ends every method is built."""
    schedule = NoiseSchedule(*(STRAIGHT if prediction_type == "flow_prediction" else ROUND), prediction_type)
    reward = {"reward": quadratic_reward, "reward_scale": 0.3} if METHODS[name].takes_reward else {}
    networks = Convolution(0), Convolution(1), Convolution(2)

    def build(**changes: Any) -> Any:
        return METHODS[name](*networks, schedule, **{"guidance_scale": 2.0, **reward, **options, **changes})

    inner = {key: (1, 9) for key in ("t_range", "guidance_t_range") if key in {"t_range", *options}}
    methods = [build(**inner)]
    try:
        methods.append(build())
    except ValueError as error:
        assert "at t = " in str(error) and "t_range, e.g. [" in str(error)
    for method in methods:
        batch = batch_of(64)
        assert set(method.times.draw(batch.noise(2)).tolist()) == set(range(*method.t_range))
        for loss in (method.fake_loss, method.generator_loss):
            for network in networks:
                network.weight.grad = None
            loss(batch).loss.backward()
            assert all(n.weight.grad is None or n.weight.grad.isfinite().all() for n in networks)


@pytest.mark.parametrize(
    ("name", "prediction_type", "said"),
    [
        (
            "diff_instruct",
            "epsilon",
            r"alpha is 0, where an epsilon prediction says nothing of x0, at t = 9: .*\[0, 9\]",
        ),
        ("dmd2", "epsilon", r"alpha is 0, where an epsilon prediction says nothing of x0, at t = 9"),
        ("sid", "epsilon", r"alpha is 0"),
        (
            "sim",
            "flow_prediction",
            r"weighting 'x0' is not finite at t = 9: leave such times out by t_range, e\.g\. \[0, 9\]",
        ),
        ("sim", "v_prediction", r"weighting 'x0' is not finite at t = 9"),
        ("diff_instruct_star", "sample", r"weighting 'x0' is not finite at t = 9"),
    ],
)
def test_ends_without_signal_are_refused_by_name(name: str, prediction_type: str, said: str) -> None:
    schedule = NoiseSchedule(*(STRAIGHT if prediction_type == "flow_prediction" else ROUND), prediction_type)
    with pytest.raises(ValueError, match=said):
        METHODS[name](Convolution(0), Convolution(1), Convolution(2), schedule)


@pytest.mark.parametrize("name", ["sim", "diff_instruct_star"])
def test_time_0_of_a_flow_is_refused_where_scores_are_compared(name: str) -> None:
    sigmas = torch.arange(1000, dtype=torch.float64) / 1000
    schedule = NoiseSchedule(1 - sigmas, sigmas, "flow_prediction")
    networks = Convolution(0), Convolution(1), Convolution(2)
    with pytest.raises(ValueError, match=r"the loss of \w+ is not finite at t = 0: .* by t_range, e\.g\. \[1, 1000\]"):
        METHODS[name](*networks, schedule)
    METHODS[name](*networks, schedule, t_range=(1, 1000))


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("diff_instruct", {}, "weighting 'x0' reads x0 off an epsilon prediction"),
        ("sid", {}, "SiD's loss reads x0 off"),
        ("dmd2", {"normalizer": "batch"}, "the normalizer reads x0 off"),
        ("diff_instruct", {"weighting": "unit", "fake_weighting": "x0"}, "fake_weighting 'x0' reads x0 off"),
    ],
)
def test_nearly_pure_noise_is_refused_where_x0_is_read_off_epsilon(
    name: str, options: dict[str, Any], said: str
) -> None:
    """As where a scheduler puts 2^-24 in the place of zero terminal signal-to-noise."""
    products = torch.tensor([0.9, 0.5, 2.0**-24], dtype=torch.float64)
    schedule = NoiseSchedule(products.sqrt(), (1 - products).sqrt())
    networks = Convolution(0), Convolution(1), Convolution(2)
    with pytest.raises(ValueError, match=f"{said}.* at t = 2: "):
        METHODS[name](*networks, schedule, **options)
    METHODS["dmd2"](*networks, schedule)  # its normaliser cancels it


def test_weights_that_float32_can_not_add_up_are_refused() -> None:
    schedule = NoiseSchedule(torch.tensor([1.0, 0.5]), torch.tensor([1e-6, 1.0]), "sample")
    with pytest.raises(ValueError, match=r"weighting 'score' is above 1e\+08 at t = 0"):
        METHODS["diff_instruct"](Convolution(0), Convolution(1), Convolution(2), schedule, weighting="score")


GIVEN: list[tuple[Any, str]] = [
    (lambda x: (x,), "got tuple of 1: return its first element"),
    (lambda x: [x, x], "got list of 2: return its first element"),
    (lambda x: SimpleNamespace(sample=x), r"got SimpleNamespace: return its \.sample"),
    (lambda x: x.detach().numpy(), "got a NumPy array"),
    (lambda x: None, "got NoneType: did it return nothing?"),
    (lambda x: x[:1], r"of shape \(4, 2, 3, 3\), got shape \(1, 2, 3, 3\)"),
    (lambda x: torch.cat([x, x], 1), r"got shape \(4, 4, 3, 3\): it predicts a variance, too"),
    (lambda x: x.long(), "of a floating-point dtype, got torch.int64"),
    (lambda x: x.to("meta"), "gave a tensor on meta, its inputs are on cpu"),
]


@pytest.mark.parametrize("role", ["generator", "fake score", "reference"])
@pytest.mark.parametrize(("change", "said"), GIVEN)
def test_what_no_network_should_give_is_named(role: str, change: Any, said: str) -> None:
    networks: dict[str, Any] = {
        name: Convolution(seed) for seed, name in enumerate(("generator", "fake score", "reference"))
    }
    right = networks[role]
    networks[role] = lambda *inputs: change(right(*inputs))
    for name in ("diff_instruct", "decoupled_dmd", "sid"):
        method = METHODS[name](*networks.values(), SCHEDULES["epsilon"])
        with pytest.raises((TypeError, ValueError), match=f"^the {role} .*{said}"):
            method.generator_loss(batch_of())


@pytest.mark.parametrize(
    ("role", "loss", "said"),
    [
        (0, "generator_loss", "the generator has no gradient by its parameters: is it detached"),
        (1, "fake_loss", "the fake score has no gradient by its parameters"),
        (1, "generator_loss", "the fake score has no gradient by x_t"),
        (2, "generator_loss", "the reference has no gradient by x_t"),
    ],
)
def test_outputs_without_the_gradient_that_is_asked_of_them_are_named(role: int, loss: str, said: str) -> None:
    networks: list[Any] = [Convolution(0), Convolution(1), Convolution(2)]
    networks[role] = torch.no_grad()(networks[role].forward)
    method = METHODS["sid"](*networks, SCHEDULES["epsilon"])
    with pytest.raises(ValueError, match=said):
        getattr(method, loss)(batch_of())
    with torch.no_grad():  # where nobody asks for one, there may be none
        METHODS["diff_instruct"](*networks, SCHEDULES["epsilon"]).generator_loss(batch_of())
