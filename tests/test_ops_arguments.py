"""Wrong arguments of every operator: an error that names operator and argument, never a traceback out of torch."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffpp_fast import Noise, ops

X, Y = torch.randn(2, 2, 4, 2, 2).unbind()
ROWS = torch.randn(2, 2, 6)
VECTOR = torch.rand(2) + 0.5
TARGET = {"x0": Y, "noise": Y, "alpha": VECTOR, "sigma": VECTOR}
OUTPUTS = {"fake": X, "cond": Y, "uncond": Y, "guidance_scale": 2.0, **TARGET}
OPS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "add_noise": (ops.add_noise, {**TARGET, "x0": X}),
    "denoising_loss": (ops.denoising_loss, {"prediction": X, **TARGET, "weight": VECTOR}),
    "score_gap": (ops.score_gap, {**OUTPUTS, "scale": VECTOR}),
    "score_gap, rewarded": (ops.score_gap, {"fake": X, "cond": Y, "reward_score": Y, "reward_scale": 0.5}),
    "sid_loss": (ops.sid_loss, OUTPUTS),
    "sim_loss": (ops.sim_loss, OUTPUTS),
    "reward_pixels": (ops.reward_pixels, {"images": X, "size": 3, "mean": [0.5] * 4, "std": [0.5] * 4}),
    "group_norm_silu": (ops.group_norm_silu, {"x": X, "num_groups": 2, "weight": torch.ones(4), "bias": torch.ones(4)}),
    "group_norm_silu, of a sum": (ops.group_norm_silu, {"x": X, "num_groups": 2, "residual": Y}),
    "group_norm_silu, offset": (ops.group_norm_silu, {"x": X, "num_groups": 2, "offset": Y[:, :, 0, 0]}),
    "geglu": (ops.geglu, {"x": ROWS}),
    "ada_layer_norm": (ops.ada_layer_norm, {"x": ROWS, "scale": ROWS[:, 0], "shift": ROWS[:, 1]}),
    "gated_residual_norm": (
        ops.gated_residual_norm,
        {"residual": ROWS, "branch": ROWS, "gate": ROWS, "scale": ROWS, "shift": ROWS, "weight": torch.ones(6)},
    ),
    "rms_norm_rope": (
        ops.rms_norm_rope,
        {"x": X, "cos": Y[0, 0], "sin": Y[0, 0], "weight": torch.ones(2), "sequence_dim": 2},
    ),
}
NO_NUMBERS = (math.nan, math.inf, "1", True, 1j, torch.tensor(1.0), 10**400)
NO_NAMES = (3, torch.zeros(2), ["silu"], "nothing")
WRONG: dict[tuple[str, str], tuple[Any, ...]] = {
    ("denoising_loss", "prediction_type"): (*NO_NAMES, None),
    ("score_gap", "prediction_type"): (*NO_NAMES, None),
    ("score_gap", "normalizer"): NO_NAMES,
    ("score_gap", "guidance_scale"): NO_NUMBERS,
    ("score_gap", "scale"): (math.nan, math.inf, "1", True, [1.0, 1.0], None),
    ("score_gap, rewarded", "reward_scale"): (math.nan, math.inf, "1", True, [1.0, 1.0]),
    ("score_gap, rewarded", "reward_clip"): (*NO_NUMBERS, 0.0, -1.0),
    ("sid_loss", "guidance_scale"): (*NO_NUMBERS, None),
    ("sid_loss", "sid_alpha"): (*NO_NUMBERS, None),
    ("sim_loss", "guidance_scale"): (*NO_NUMBERS, None),
    ("sim_loss", "huber_c"): (*NO_NUMBERS, None, 0.0, -1.0),
    ("group_norm_silu", "num_groups"): (0, -2, 3, 2.0, True, "2", None),
    ("group_norm_silu", "eps"): (*NO_NUMBERS, None, -1e-5),
    ("group_norm_silu", "activation"): (*NO_NAMES, None),
    ("ada_layer_norm", "eps"): (*NO_NUMBERS, None, -1e-5),
    ("gated_residual_norm", "eps"): (*NO_NUMBERS, None, -1e-5),
    ("gated_residual_norm", "norm"): (*NO_NAMES, None),
    ("rms_norm_rope", "eps"): (*NO_NUMBERS, None, -1e-5),
    ("rms_norm_rope", "sequence_dim"): (0, 3, -1, 1.0, True, "1", None),
    ("reward_pixels", "size"): (0, -1, 3.0, (3, 3), True, "3", None, torch.tensor([3, 3])),
    ("reward_pixels", "mean"): (0.5, None, "abcd", ["a"] * 4, [0.5], [math.nan] * 4, [1j] * 4, torch.zeros(4, 2)),
    ("reward_pixels", "std"): (0.5, [0.5] * 3, [0.0] * 4, [-0.5] * 4, [math.inf] * 4),
    ("reward_pixels", "value_range"): ((1.0, -1.0), (0.0, 0.0), (0.0,), (0.0, math.inf), None, "01", 1.0, (0, 1, 2)),
    ("reward_pixels", "filter"): (*NO_NAMES, None, "BICUBIC"),
    ("reward_pixels", "fit"): (*NO_NAMES, None),
    ("reward_pixels", "clamp"): (*NO_NAMES, None, True),
    ("reward_pixels", "antialias"): (None, "no", 1),
    ("rms_norm_rope", "interleaved"): (None, "no", 1),
    ("reward_pixels", "dtype"): ("float32", torch.int32, torch.complex64, float),
}


def no_tensors(tensor: Tensor) -> Iterator[Any]:
    yield from (tensor.tolist(), tensor.numpy(), 1.0, "x", torch.tensor(1.0))
    yield from (tensor.int(), tensor > 0, tensor.to(torch.complex64), tensor.to(torch.float8_e4m3fn))
    yield from (tensor.to_sparse(), torch.nested.nested_tensor([tensor[0], tensor[1]]))


def refused(op: str, argument: str, value: Any) -> None:
    function, arguments = OPS[op]
    with pytest.raises((TypeError, ValueError)) as caught:
        function(**{**arguments, argument: value})
    message = str(caught.value)
    assert message.startswith(f"{op.partition(',')[0]}: "), message
    assert argument.replace("_", " ") in message.replace("_", " "), message


def optional(function: Callable[..., Any]) -> set[str]:
    """The arguments of which None is one value."""
    parameters = inspect.signature(function).parameters.values()
    return {parameter.name for parameter in parameters if parameter.default is None}


@pytest.mark.parametrize("op", OPS)
def test_what_is_no_dense_floating_tensor(op: str) -> None:
    function, arguments = OPS[op]
    function(**arguments)
    for argument, value in arguments.items():
        if isinstance(value, Tensor) and (op, argument) != ("score_gap", "scale"):
            for wrong in no_tensors(value):
                refused(op, argument, wrong)
            if argument not in ("weight", "bias", "uncond", *TARGET, *optional(function)):
                refused(op, argument, None)


@pytest.mark.parametrize(("op", "argument"), WRONG)
def test_wrong_numbers_and_names(op: str, argument: str) -> None:
    for wrong in WRONG[op, argument]:
        refused(op, argument, wrong)


@pytest.mark.parametrize("shape", [(2, 8, 8, 3), (2, 1, 8, 8), (2, 4, 8, 8), (3, 8, 8)])
def test_images_of_another_layout_are_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"reward_pixels: .*images .*\[B, C, H, W\].* got \[" + str(shape[0])):
        ops.reward_pixels(torch.rand(shape), 4, mean=[0.5] * 3, std=[0.5] * 3)


def test_numpys_numbers_do() -> None:
    by_numpy = ops.reward_pixels(X, np.int64(3), mean=np.full(4, 0.5, np.float32), std=torch.full((4,), 0.5))
    assert torch.equal(by_numpy, ops.reward_pixels(**OPS["reward_pixels"][1]))
    by_numpy = ops.group_norm_silu(X, np.int32(2), eps=np.float64(1e-5))  # type: ignore[call-overload]
    assert torch.equal(by_numpy, ops.group_norm_silu(X, 2))


def test_guidance_that_is_not_stated_is_refused() -> None:
    with pytest.raises(ValueError, match="score_gap: uncond is given without guidance_scale: state the scale"):
        ops.score_gap(X, Y, X)
    unguided = ops.score_gap(X, Y)
    assert torch.equal(ops.score_gap(X, Y, X, guidance_scale=1).gradient, unguided.gradient)


@pytest.mark.parametrize(
    ("wrong", "argument"),
    [
        (lambda noise: Noise(1.0, noise.samples), "seed"),
        (lambda noise: Noise(True, noise.samples), "seed"),
        (lambda noise: Noise(1, noise.samples, stream="1"), "stream"),
        (lambda noise: Noise(1, noise.samples.to_sparse()), "samples"),
        (lambda noise: Noise(1, noise.samples.numpy()), "samples"),
        (lambda noise: noise.normal(4), "shape"),
        (lambda noise: noise.normal((4.0,)), "shape"),
        (lambda noise: noise.normal((4,), dtype="float32"), "dtype"),
        (lambda noise: noise.normal((4,), dtype=torch.float8_e4m3fn), "dtype"),
        (lambda noise: noise.integers(0.5, 2), "low"),
        (lambda noise: noise.integers(0, None), "high"),
    ],
)
def test_addresses(wrong: Callable[[Noise], Any], argument: str) -> None:
    with pytest.raises(TypeError, match=rf"Noise.*: {argument} must be"):
        wrong(Noise(1, torch.arange(2)))
