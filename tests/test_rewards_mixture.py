"""Rewards made of rewards: what they share, their values, normalisation, margins, and construction from plain data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import official_rewards as official
import pytest
import tiny
import torch
import yaml
from torch import Tensor, nn

from diffpp_fast import backends, rewards
from diffpp_fast.errors import ConfigurationError
from diffpp_fast.rewards import Margin, Mixture, Normalized
from diffpp_fast.training import Callback, Trainer, config, load_config
from diffpp_fast.training.rewards import LatentReward, load_scorer

PROMPTS = ("a cat", "the dogs")
IMAGES = 2 * torch.rand(2, 3, 40, 40, generator=torch.Generator().manual_seed(0)) - 1


def red(images: Tensor, prompts: tuple[str, ...]) -> Tensor:
    return images[:, 0].mean((1, 2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """clip/, other/ and the aesthetic predictor's file, all small."""
    folder = tmp_path_factory.mktemp("weights")
    for seed, name in enumerate(("clip", "other")):
        state = official.random_state(official.clip_shapes(official.SMALL_CLIP), seed)
        official.write_clip_folder(folder / name, state)
    torch.save(official.random_state(official.head_shapes(768)), folder / "aesthetic-model.pth")
    return folder


class Calls:
    """Counts the calls of a module, or of the pixel operator."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.passes = 0
        kernels = backends.kernels("reward_pixels", torch.device("cpu"), torch.float32)
        forward = kernels.forward

        def counted(*arguments: Any) -> Tensor:
            self.passes += 1
            return forward(*arguments)

        monkeypatch.setattr(kernels, "forward", counted)

    @staticmethod
    def of(module: nn.Module) -> list[int]:
        calls: list[int] = []
        module.register_forward_hook(lambda *_: calls.append(1))
        return calls


def test_what_agrees_is_computed_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    towers, others = (rewards.load_clip(str(folder / name)) for name in ("clip", "other"))
    calls = Calls(monkeypatch)
    first, second = (Calls.of(clip.vision_model) for clip in (towers, others))
    mixture = Mixture(
        {
            "clip": (rewards.clip(towers), 1.0),
            "aesthetic": (rewards.aesthetic(str(folder), clip=towers), 0.1),
            "other": (rewards.clip(others), 0.5),
            "soft": (rewards.clip(others, clamp="straight_through"), 0.5),
        }
    )
    images = IMAGES.clone().requires_grad_()
    mixture(images, PROMPTS).sum().backward()
    # One pixel pass for three rewards and one for the other clamp; one image tower for the first two, which share it.
    assert calls.passes == 2
    assert (len(first), len(second)) == (1, 2)


def test_sum_components_and_gradient(folder: Path) -> None:
    towers = rewards.load_clip(str(folder / "clip"))
    parts = {"clip": rewards.clip(towers), "aesthetic": rewards.aesthetic(str(folder), clip=towers), "red": red}
    weights = {"clip": 2.0, "aesthetic": -0.25, "red": 3.0}
    mixture = Mixture({name: (part, weights[name]) for name, part in parts.items()})
    images, separate = (IMAGES.clone().requires_grad_() for _ in range(2))
    values = mixture(images, PROMPTS)
    expected = sum(weights[name] * part(separate, PROMPTS) for name, part in parts.items())
    torch.testing.assert_close(values, expected)
    (gradient,) = torch.autograd.grad(values.sum(), images)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), separate)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-7)
    components = mixture.components(images, PROMPTS)
    assert list(components) == ["clip", "aesthetic", "red", "total"]
    assert components["red"].requires_grad
    torch.testing.assert_close(components["red"], red(IMAGES, PROMPTS))
    torch.testing.assert_close(components["total"], values)


def test_weight_zero_is_logged_without_gradient_and_spoils_no_sharing(folder: Path) -> None:
    towers = rewards.load_clip(str(folder / "clip"))
    calls = Calls.of(towers.vision_model)
    head = rewards.aesthetic(str(folder), clip=towers)
    mixture = Mixture({"aesthetic": (head, 0.0), "clip": (rewards.clip(towers), 1.0)})
    images = IMAGES.clone().requires_grad_()
    components = mixture.components(images, PROMPTS)
    assert not components["aesthetic"].requires_grad
    assert len(calls) == 1
    (gradient,) = torch.autograd.grad(components["total"].sum(), images)
    alone = IMAGES.clone().requires_grad_()
    rewards.clip(towers)(alone, PROMPTS).sum().backward()
    torch.testing.assert_close(gradient, alone.grad)


def test_a_result_without_graph_is_not_handed_to_one_who_needs_it() -> None:
    batch = rewards.ImageBatch(IMAGES.clone().requires_grad_())
    plain = rewards.Preprocessing(16)
    with torch.no_grad():
        first = batch.pixels(plain, torch.float32)
    second = batch.pixels(plain, torch.float32)
    assert (first.requires_grad, second.requires_grad) == (False, True)
    with torch.no_grad():
        assert batch.pixels(plain, torch.float32) is second


def test_normalisation_and_margin() -> None:
    images = IMAGES.clone().requires_grad_()
    raw = red(IMAGES, PROMPTS)
    normal = (raw - 0.25) / 2.0
    margin = float(normal.mean())  # between the two
    reward = Margin(Normalized(red, mean=0.25, std=2.0), margin)
    penalty = torch.tensor([min(0.0, float(value) - margin) for value in normal])
    values = reward(images, PROMPTS)
    torch.testing.assert_close(values, penalty)
    assert sorted((values < 0).tolist()) == [False, True]
    (gradient,) = torch.autograd.grad(values.sum(), images)
    slope = torch.where(normal < margin, 1 / (2.0 * 40 * 40), 0.0)
    torch.testing.assert_close(gradient[:, 0], slope[:, None, None].expand(2, 40, 40))
    components = Mixture({"red": (reward, 2.0)}).components(images, PROMPTS)
    assert list(components) == ["red", "red/normalized", "red/margin", "total"]
    torch.testing.assert_close(components["red"], raw)
    torch.testing.assert_close(components["red/normalized"], normal)
    torch.testing.assert_close(components["total"], 2 * penalty)
    twice = Mixture({"red": (Normalized(Normalized(red, 0, 2), 0, 2), 1.0)}).components(images, PROMPTS)
    torch.testing.assert_close(twice["red/normalized'"], raw / 4)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.0), (0.0, -1.0), (float("nan"), 1.0), (0.0, float("inf"))])
def test_impossible_normalisation_is_refused(mean: float, std: float) -> None:
    with pytest.raises(ValueError, match="std positive"):
        Normalized(red, mean, std)


def test_impossible_mixtures_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        Mixture({})
    with pytest.raises(ValueError, match="weight of red must be finite"):
        Mixture({"red": (red, float("nan"))})
    with pytest.raises(ValueError, match="dot or a slash"):
        Mixture({"a/b": (red, 1.0)})
    with pytest.raises(TypeError, match="callable"):
        Mixture({"red": (3, 1.0)})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="margin must be finite"):
        Margin(red, float("inf"))
    tensor = Mixture({"wave": (lambda images, prompts: torch.fft.fft(images).mean((1, 2, 3)), 1.0)})
    with pytest.raises(TypeError, match=r"must give real numbers, got torch.complex64"):
        tensor(IMAGES, PROMPTS)
    wrong = Mixture({"wrong": (lambda images, prompts: images.mean((1, 2, 3))[:, None], 1.0)})
    with pytest.raises(ValueError, match=r"one number per image, shape \[2\], got shape \[2, 1\]"):
        wrong(IMAGES, PROMPTS)


def test_modules_of_users_are_frozen_and_moved() -> None:
    class Bias(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(3, 1, 1))

        def forward(self, images: Tensor, prompts: tuple[str, ...]) -> Tensor:
            return (images + self.bias).mean((1, 2, 3))

    module = Bias()
    mixture = Mixture({"type": (module, 1.0)})  # a name that ModuleDict itself would not take
    assert not module.bias.requires_grad
    mixture.double()
    assert module.bias.dtype == torch.float64
    assert mixture["type"].scorer is module


# -- from plain data ------------------------------------------------------------------------------------------------


def entries() -> dict[str, Any]:
    return {
        "aesthetic": {"weight": 0.1, "arguments": {"path": "./aesthetic-model.pth", "clip": "./clip"}},
        "clip": {"weight": 1.0, "arguments": {"path": "./clip"}, "normalize": [0.2, 0.05], "margin": 1.5},
        "second": {"reward": "clip", "weight": 0.0, "arguments": {"path": "./other", "dtype": "bfloat16"}},
        "mine": {"reward": "mine.py:make", "weight": 2, "arguments": {"channel": 1}},
    }


def test_mixture_from_a_configuration(folder: Path) -> None:
    (folder / "mine.py").write_text(
        "def make(channel):\n    return lambda images, prompts: images[:, channel].mean((1, 2))\n"
    )
    settings = config.RewardSection(
        factory="diffpp_fast.rewards:mixture", arguments={"rewards": entries(), "folder": str(folder)}
    )
    scorer: Any = load_scorer("rewards.optimised", settings, torch.device("cpu"))
    # The aesthetic predictor comes first and needs no text encoder; the CLIP score that shares its towers does.
    assert scorer["aesthetic"].clip is scorer["clip"].reward.reward.clip
    assert scorer["second"].clip.dtype == torch.bfloat16
    reward = LatentReward("mixture", scorer, lambda latents: latents)

    class Conditioning:
        prompts = PROMPTS

    x0 = IMAGES.clone().requires_grad_()
    output = reward(x0, Conditioning())
    values = output.values
    values.sum().backward()
    assert x0.grad is not None
    clip, head = rewards.clip(str(folder / "clip")), rewards.aesthetic(str(folder), clip=str(folder / "clip"))
    penalty = ((clip(IMAGES, PROMPTS) - 0.2) / 0.05 - 1.5).clamp(max=0)
    expected = 0.1 * head(IMAGES, PROMPTS) + penalty + 2 * IMAGES[:, 1].mean((1, 2))
    torch.testing.assert_close(values.detach(), expected)
    assert set(output.parts) == {"aesthetic", "clip", "clip/normalized", "clip/margin", "second", "mine"}
    assert not any(part.requires_grad for part in output.parts.values())


def test_a_mixture_in_a_mixture_finds_its_files_in_the_same_folder(folder: Path) -> None:
    inner = {"clip": {"weight": 3.0, "arguments": {"path": "./clip"}}}
    outer = {"both": {"weight": -2.0, "reward": "mixture", "arguments": {"rewards": inner}}}
    values = rewards.mixture(outer, folder=str(folder))(IMAGES, PROMPTS)
    torch.testing.assert_close(values, -6 * rewards.clip(str(folder / "clip"))(IMAGES, PROMPTS))


def test_a_run_trains_on_a_mixture(folder: Path, tmp_path: Path) -> None:
    arguments = {"folder": str(folder), "rewards": {name: entries()[name] for name in ("aesthetic", "clip")}}
    path = tiny.write(tmp_path)
    settings = tiny.settings()
    settings["rewards"]["optimised"] = {"factory": "diffpp_fast.rewards:mixture", "arguments": arguments, "scale": 1.0}
    held_out = {"path": str(folder / "other"), "dtype": "bfloat16"}
    settings["rewards"]["held_out"] = {"factory": "diffpp_fast.rewards:clip", "arguments": held_out}
    path.write_text(yaml.safe_dump(settings))
    logs: list[dict[str, float]] = []

    class Log(Callback):
        def on_log(self, step: int, scalars: Any) -> None:
            logs.append(dict(scalars))

    run = load_config(path, [f"output={tmp_path / 'run'}", "training.steps=1", "training.grid_every=1"])
    assert Trainer(run, callbacks=[Log()]).run().step == 1
    assert any(scalars.get("generator/reward_gradient_norm", 0) > 0 for scalars in logs)
    assert any("grid/held_out" in scalars for scalars in logs)
    (trained,) = (scalars for scalars in logs if "generator/reward" in scalars)
    weights = {name: entries()[name]["weight"] for name in ("aesthetic", "clip")}
    # What is weighted of "clip" is its margin.
    parts = {"aesthetic": trained["generator/reward/aesthetic"], "clip": trained["generator/reward/clip/margin"]}
    total = sum(weights[name] * part for name, part in parts.items())
    assert trained["generator/reward"] == pytest.approx(total, rel=1e-5) and "generator/reward/total" not in trained


@pytest.mark.parametrize("name", ["clip", "pickscore"])
def test_a_single_reward_from_a_configuration(name: str, folder: Path) -> None:
    settings = config.RewardSection(factory=f"diffpp_fast.rewards:{name}", arguments={"path": str(folder / "clip")})
    scorer = load_scorer("rewards.optimised", settings, torch.device("cpu"))
    assert scorer(IMAGES, PROMPTS).shape == (2,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clip": {"arguments": {}}}, "clip must have weight"),
        ({"clip": {"weight": 1.0, "scale": 2.0}}, "clip must have weight and may have"),
        ({"clip": {"weight": 1.0, "normalize": [1.0]}}, r"normalize of clip must be \[mean, std\]"),
        ({"clip": {"weight": 1.0, "arguments": [1]}}, "arguments of clip must be a mapping"),
        ({"beauty": {"weight": 1.0}}, "no reward 'beauty' for beauty; known: pickscore"),
        ({"mine": {"weight": 1.0, "reward": "nothing.py:make"}}, "no such file: .*nothing.py"),
        ({"mine": {"weight": 1.0, "reward": "no_such_module:make"}}, "mine.factory: there is no module no_such_module"),
        ({"mine": {"weight": 1.0, "reward": "torch:nothing"}}, "torch has no function nothing"),
        ({"clip": {"weight": 1.0, "arguments": {"path": "./clip", "color": 1}}}, "color"),
        ({"clip": {"weight": float("nan"), "arguments": {"path": "./clip"}}}, "weight of clip must be finite"),
        ({"clip": {"weight": "2"}}, "weight of clip must be a number, got str '2'"),
        ({"clip": {"weight": True}}, "weight of clip must be a number, got bool True"),
        ({"clip": {"weight": 10**400}}, "weight of clip must be finite"),
        ({"clip": {"weight": 1, "normalize": [0, "1"]}}, "the std of normalize of clip must be a number, got str '1'"),
        (
            {"clip": {"weight": 1, "normalize": [None, 1]}},
            "the mean of normalize of clip must be a number",
        ),
        ({"clip": {"weight": 1, "margin": [1]}}, r"margin of clip must be a number, got list \[1\]"),
        ({"clip": {"weight": 1, "reward": ["clip"]}}, r"reward of clip must be text, got \['clip'\]"),
        ({"clip": {"weight": 1, "arguments": {"path": ["clip"]}}}, r"clip: path must be text, got \['clip'\]"),
        ({"clip": {"weight": 1, "arguments": {"path": "./clip", "clamp": "soft"}}}, "clamp must be one of hard, str"),
        ({1: {"weight": 1}}, "the name of a reward must be text, got 1"),
        ({"total": {"weight": 1, "reward": "clip", "arguments": {"path": "./clip"}}}, "can't be total"),
        ({}, "must map names"),
    ],
)
def test_bad_mixtures_are_explained(changes: dict[str, Any], message: str, folder: Path) -> None:
    with pytest.raises(ConfigurationError, match=message):
        rewards.mixture(changes, folder=str(folder))
