"""Whatever a scorer does, it changes neither what others see nor the run; how samples are cut changes memory only."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffpp_fast import rewards
from diffpp_fast.cli.main import main
from diffpp_fast.errors import ConfigurationError
from diffpp_fast.methods import Batch
from diffpp_fast.methods.base import SampleGradient
from diffpp_fast.methods.reward_term import RewardTerm
from diffpp_fast.networks import Conditioning
from diffpp_fast.training import Trainer, config, load_config
from diffpp_fast.training.baseline import Baseline
from diffpp_fast.training.checkpoint import read_tensors
from diffpp_fast.training.distributed import World
from diffpp_fast.training.faults import RewardWatch
from diffpp_fast.training.rewards import LatentReward, load_scorer, modules_of, sources_of, tensors_of

# A large eps: with the usual one Adam's first updates are sign(g), which magnifies rounding.
QUIET = (
    "logging.tensorboard=false",
    "training.steps=2",
    "training.baseline_steps=null",
    "optimizers.generator.eps=1",
    "optimizers.fake.eps=1",
)
NO_GRID = ("training.grid_every=null", "rewards.held_out=null")
PROMPTS = ("a cat", "a dog")


@pytest.fixture
def train(project: Path, tmp_path: Path) -> Callable[..., tuple[dict[str, Tensor], list[dict[str, Any]]]]:
    """Trains on a scorer of tiny.REWARDS; the generator's weights, and the lines of metrics.jsonl."""

    def run(name: str, *overrides: str, output: str = "run") -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        scorer = [f"rewards.optimised.factory={project.parent}/rewards.py:{name}", "rewards.optimised.arguments={}"]
        Trainer(load_config(project, [f"output={tmp_path / output}", *scorer, *QUIET, *overrides])).run()
        lines = (tmp_path / output / "metrics.jsonl").read_text().splitlines()
        weights = tmp_path / output / "checkpoints" / "step_000002" / "generator.safetensors"
        return read_tensors(weights), [json.loads(line) for line in lines]

    return run


def images(count: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return 1.5 * torch.randn(count, 3, 4, 4, generator=generator)


def in_place(images: Tensor, prompts: object) -> Tensor:
    return images.clamp_(-1, 1).mul_(0.5)[:, 0].mean((1, 2))


def latent_reward(scorer: Any) -> LatentReward:
    return LatentReward("mine", scorer, lambda latents: latents)


# -- micro-batches -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arguments"), [("defined_for_some", {"word": "whale"}), ("undefined_for", {"word": "frog"})]
)
def test_micro_batches_change_memory_only(train, name: str, arguments: dict[str, str]) -> None:  # type: ignore[no-untyped-def]
    given = [*NO_GRID, f"rewards.optimised.arguments={json.dumps(arguments)}"]
    runs = [train(name, *given, f"training.micro_batch={size}", output=size) for size in ("null", "2", "1")]
    weights, lines = runs[0]
    logged = {name for line in lines for name in line if name.startswith(("generator/", "fake/"))}
    assert {"generator/x0_std", "generator/reward_std", "generator/reward_undefined"} <= logged
    for others, other_lines in runs[1:]:
        for name, tensor in weights.items():
            assert (tensor - others[name]).norm() <= 1e-3 * tensor.norm(), name
        for line, other in zip(lines, other_lines, strict=True):
            assert line.get("message") == other.get("message")
            for name in logged & line.keys():
                assert line[name] == pytest.approx(other[name], rel=1e-3, abs=1e-5), name


def test_a_constant_reward_has_gradient_0_and_is_noticed() -> None:
    x0 = images().requires_grad_()
    reward = latent_reward(lambda images, prompts: torch.zeros(len(images)))
    (gradient,) = torch.autograd.grad(reward(x0, Conditioning(PROMPTS, {})).values.sum(), x0)
    assert not gradient.any() and not reward(x0, Conditioning(PROMPTS, {})).differentiable
    reward.scorer = in_place
    output = reward(x0, Conditioning(PROMPTS, {}))
    assert output.values.requires_grad and output.differentiable


# -- what is not finite ------------------------------------------------------------------------------------------------


def test_the_reward_gradient_of_a_sample_that_has_none_is_left_out() -> None:
    x0, gradient = images(3), torch.ones(3, 3, 4, 4)
    batch = Batch(torch.arange(3), None)

    def undefined(x0: Tensor, conditioning: object) -> Tensor:
        # Sample 0 is not finite; sample 1 is, but its gradient is not.
        return (
            x0.mean((1, 2, 3)) * torch.tensor([math.nan, 1.0, 1.0]) + (x0[:, 0, 0, 0] * torch.tensor([1, 0, 1])).sqrt()
        )

    term = RewardTerm(undefined, 2.0, clip=1e9)
    got, metrics, told, *_ = term.subtract(SampleGradient(gradient, {}), term.evaluate(batch, x0.abs()))
    assert told is not None and told.values.isfinite().tolist() == [False, True, True]
    assert torch.equal(got[:2], gradient[:2]) and got.isfinite().all() and not torch.equal(got[2], gradient[2])
    assert metrics["reward_undefined"] == pytest.approx(2 / 3)
    assert all(value.isfinite() for value in metrics.values())
    term = RewardTerm(undefined, 2.0)
    alone = term.subtract(SampleGradient(gradient, {}), term.evaluate(batch, x0.abs())).gradient
    torch.testing.assert_close(got, alone)


def test_samples_without_a_finite_score_are_told_and_are_in_no_mean(project: Path, train) -> None:  # type: ignore[no-untyped-def]
    held_out = f"rewards.held_out={{factory: {project.parent}/rewards.py:undefined_for, arguments: {{word: whale}}}}"
    mixture = "rewards: {clear: {weight: 1.0, reward: ./rewards.py:redness}, odd: {weight: 0.5, reward: "
    mixture += "./rewards.py:undefined_for, arguments: {word: frog}}}"
    _, lines = train(
        "redness",
        held_out,
        "rewards.optimised.factory=diffpp_fast.rewards:mixture",
        f"rewards.optimised.arguments={{folder: {project.parent}, {mixture}}}",
    )
    _, whole = train("redness", f"rewards.held_out.factory={project.parent}/rewards.py:Brightness", output="whole")
    first = next(line for line in lines if "generator/reward" in line)
    clear = next(line for line in whole if "generator/reward" in line)
    assert math.isfinite(first["generator/reward/odd"]) and math.isfinite(first["generator/reward"])
    assert first["generator/reward/clear"] == pytest.approx(clear["generator/reward"])
    assert first["generator/reward_undefined"] == 0.75
    warnings = [line for line in lines if "warning" in line]
    grids = [line["message"] for line in warnings if line["warning"] == "grid-undefined"]
    assert any("undefined_for) is not finite for 1 of the grid's 3 prompts: 'a blue whale'" in said for said in grids)
    told = [line["message"] for line in warnings if line["warning"] == "reward-undefined"]
    assert any(
        "odd is not finite for 3 of the last 4 samples, 3 so far: sample 4 'a green frog'" in said for said in told
    )
    assert all(math.isfinite(line["grid/held_out"]) for line in lines if "grid/held_out" in line)


def test_the_watch_names_samples_again_when_they_are_ten_times_as_many() -> None:
    said: list[str] = []

    def watch(before: dict[str, Any]) -> RewardWatch:
        prompts_of = lambda numbers: [f"prompt {number}" for number in numbers.tolist()]  # noqa: E731
        return RewardWatch("mine", True, World.alone("cpu"), prompts_of, lambda _, text: said.append(text), before)

    def log(watch: RewardWatch, *given: list[float], share: float = 0.0, differentiable: bool = True) -> str:
        said.clear()
        for first in range(len(given)):
            watch.note(8 * (first + 1), differentiable)
        watch.judge("generator/reward", torch.tensor(given))
        watch.judge_log({"generator/reward_undefined": share}, 1, first=True, enough=False)
        return " ".join(said)

    one = watch({})
    # The reward is fine, its gradient is not; and so far nobody has seen a graph.
    text = log(one, [1.0, 2.0], share=0.5, differentiable=False)
    assert "the gradient of mine is not finite for 50.00% of the last samples" in text
    assert "mine has no gradient by the images for any sample so far" in text
    text = log(one, [1.0, math.nan], [math.inf, 2.0], share=0.5)
    assert text.startswith("mine is not finite for 2 of the last 4 samples, 2 so far: sample 9 'prompt 9', sample 16 ")
    again = watch(json.loads(json.dumps(one.record())))
    assert log(again, [math.nan] * 9) == log(again, [math.nan] * 8) == ""
    assert "for 1 of the last 1 samples, 20 so far: sample 8" in log(again, [math.nan])
    with pytest.raises(ConfigurationError, match="mine has no gradient by the images"):
        watch({}).judge_gradient(1, first=False, enough=True)


def test_the_references_samples_that_are_not_finite_are_left_out() -> None:
    latents = torch.randn(3, 4, 8, 8)
    expected = Baseline.of(latents[:2])
    latents[2, 0, 0, 0] = math.nan
    assert Baseline.of(latents) == Baseline(expected.x0_mean, expected.x0_std, undefined=1)
    assert math.isnan(Baseline.of(latents[2:]).x0_std)


# -- in place ----------------------------------------------------------------------------------------------------------


def test_a_scorer_in_place_changes_neither_pictures_nor_figures_nor_weights(train, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (weights, lines), (others, other_lines) = (train(name, output=name) for name in ("in_place", "out_of_place"))
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, others[name], rtol=1e-4, atol=1e-6)
    grids = [(tmp_path / name / "grids" / "step_000000.png").read_bytes() for name in ("in_place", "out_of_place")]
    assert grids[0] == grids[1]
    assert lines[0]["grid/held_out"] == other_lines[0]["grid/held_out"]


def test_parts_of_a_mixture_see_their_own_images() -> None:
    plain = rewards.Mixture({"red": (lambda images, prompts: images[:, 0].mean((1, 2)), 1.0)})
    mixture = rewards.Mixture({"changing": (in_place, 0.0), "first": (in_place, 2.0), "red": (plain["red"], 1.0)})
    given = images().requires_grad_()
    before = given.detach().clone()
    components = mixture.components(given, PROMPTS)
    components["total"].sum().backward()
    assert torch.equal(given, before)
    assert torch.equal(components["red"], plain(before, PROMPTS))
    inside = (before.abs() <= 1).float()
    expected = torch.zeros_like(before)
    expected[:, 0] = (1 + inside[:, 0]) / 16
    torch.testing.assert_close(given.grad, expected)


def test_a_reward_of_this_packages_kind_that_works_in_place_is_named() -> None:
    class Careless(rewards.Reward):
        def score(self, batch: rewards.ImageBatch, prompts: tuple[str, ...]) -> Tensor:
            return batch.images.mul_(2.0).mean((1, 2, 3))

    mixture = rewards.Mixture({"careless": (Careless(), 1.0), "red": (in_place, 1.0)})
    with pytest.raises(ConfigurationError, match=r"careless works in place .*\.clone\(\)"):
        mixture(images(), PROMPTS)


def test_a_scorer_may_use_its_result_again() -> None:
    result = torch.zeros(2)

    def score(images: Tensor, prompts: object) -> Tensor:
        return result.copy_(images.mean((1, 2, 3)))

    parts = images(4).split(2)
    expected = [part.mean((1, 2, 3)) for part in parts]
    for scorer in (score, rewards.Mixture({"part": (score, 1.0)})):
        term = RewardTerm(latent_reward(scorer), 0.0)
        none = SampleGradient(torch.zeros(2, 3, 4, 4), {})
        batches = [Batch(torch.arange(2), Conditioning(PROMPTS, {})) for _ in parts]
        given = [
            term.subtract(none, term.evaluate(batch, part)).rewards for batch, part in zip(batches, parts, strict=True)
        ]
        for output, values in zip(given, expected, strict=True):
            assert output is not None and torch.equal(output.values, values)
            assert all(torch.equal(part, values) for part in output.parts.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int64])
def test_scores_of_any_dtype_and_expanded_ones_serve(dtype: torch.dtype) -> None:
    x0 = images().requires_grad_()
    for scorer in (lambda i, p: i.mean((1, 2, 3)).to(dtype), lambda i, p: i.mean().to(dtype).expand(len(p))):
        reward = latent_reward(scorer)
        values = reward(x0, Conditioning(PROMPTS, {})).values
        (gradient,) = torch.autograd.grad(values.sum(), x0)
        assert gradient.isfinite().all() and gradient.any() == dtype.is_floating_point
        term = RewardTerm(reward, 1.0)
        batch = Batch(torch.arange(2), Conditioning(PROMPTS, {}))
        told = term.subtract(SampleGradient(torch.zeros(2, 3, 4, 4), {}), term.evaluate(batch, x0)).rewards
        assert told is not None and told.values.dtype == torch.float32


def test_a_scorer_that_fails_is_a_sentence_without_control_characters(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = """
def make():
    def score(images, prompts):
        raise KeyError('\\x1b[31m' + prompts[0])
    return score
"""
    (project.parent / "failing.py").write_text(code)
    factory = f"rewards.optimised={{factory: {project.parent}/failing.py:make, scale: 1}}"
    assert main(["train", str(project), *NO_GRID, factory, f"output={project.parent / 'failing'}"]) == 2
    said = capsys.readouterr().err
    assert "failing.py:make): KeyError: " in said and "failing.py, line 4)" in said
    assert "Traceback" not in said and "\x1b" not in said


# -- the rest of the process -------------------------------------------------------------------------------------------


def test_what_a_scorer_changes_for_the_whole_process_is_put_back(caplog: pytest.LogCaptureFixture) -> None:
    def rude(images: Tensor, prompts: object) -> Tensor:
        torch.set_grad_enabled(False)
        torch.set_default_dtype(torch.float64)
        torch.set_num_threads(torch.get_num_threads() + 1)
        return images.mean((1, 2, 3))

    threads = torch.get_num_threads()
    mixture = rewards.Mixture({"rude": (rude, 1.0), "polite": (lambda i, p: i.square().mean((1, 2, 3)), 1.0)})
    for scorer in (rude, mixture):
        assert latent_reward(scorer)(images().requires_grad_(), Conditioning(PROMPTS, {})).values.requires_grad
        assert torch.is_grad_enabled() and torch.get_default_dtype() == torch.float32
        assert torch.get_num_threads() == threads
    assert "mine changes PyTorch's default dtype, which has been put back" in caplog.text


def test_a_scorer_that_seeds_the_global_generator_changes_nothing(train, caplog: pytest.LogCaptureFixture) -> None:  # type: ignore[no-untyped-def]
    with torch.random.fork_rng(devices=[]):
        (weights, _), (others, _) = (train(name, *NO_GRID, output=name) for name in ("redness", "seeding"))
    for name, tensor in weights.items():
        assert torch.equal(tensor, others[name]), name
    assert "seeding) draws from PyTorch's global generator, or seeds it" in caplog.text
    assert "redness) draws" not in caplog.text


class Dropping(nn.Module):
    """A scorer with dropout; `training` is what it sets itself to."""

    def __init__(self, training: bool) -> None:
        super().__init__()
        self.drop, self.sets = nn.Dropout(0.5), training

    def forward(self, images: Tensor, prompts: object) -> Tensor:
        self.train(self.sets)
        return self.drop(images).mean((1, 2, 3))


def test_a_network_in_train_mode_is_refused_wherever_it_is() -> None:
    latent_reward(Dropping(False)).score(images(), PROMPTS)
    dropping = Dropping(True)
    for scorer in (dropping, lambda images, prompts: dropping(images, prompts)):
        with pytest.raises(ConfigurationError, match="mine puts a network into train mode"):
            latent_reward(scorer).score(images(), PROMPTS)


def test_networks_in_any_callable_are_found_and_frozen(tmp_path: Path) -> None:
    code = """
import torch
HEAD = torch.nn.Sequential(torch.nn.Linear(3, 1), torch.nn.Dropout(0.5))

def make():
    def score(images, prompts):
        return helper(images)
    return score

def helper(images):
    return HEAD(images.mean((2, 3)))[:, 0]
"""
    (tmp_path / "closure.py").write_text(code)
    scorer = load_scorer("key", config.RewardSection(factory=f"{tmp_path}/closure.py:make"), torch.device("cpu"))
    (head,) = modules_of(scorer)
    assert not head.training and not any(weight.requires_grad for weight in head.parameters())
    assert sorted(tensors_of(scorer)) == ["0.0.bias", "0.0.weight"]
    assert sources_of(scorer) == [tmp_path / "closure.py"]

    class Bound:
        def __init__(self) -> None:
            self.parts, self.mean = {"inner": [Dropping(False)]}, torch.ones(3)

        def score(self, images: Tensor, prompts: object) -> Tensor:
            return self.parts["inner"][0](images, prompts)

    for bound in (Bound().score, functools.partial(Bound().score), rewards.Mixture({"a": (Bound().score, 1.0)})):
        assert any(isinstance(module, Dropping | rewards.Mixture) for module in modules_of(bound))
        assert any(tensor.shape == (3,) for tensor in tensors_of(bound).values())
        assert Path(__file__) in sources_of(bound)
