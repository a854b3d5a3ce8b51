"""The emoji example: its figures measure what they say; its shipped files are whole, small and fit together."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from diffpp_fast.training import load_config
from diffpp_fast.training.build import build_sampler

EMOJI = Path(__file__).parent.parent / "examples" / "emoji"
sys.path.insert(0, str(EMOJI))

from evaluation import (  # noqa: E402
    Measured,
    edge_energy,
    generator_images,
    kernel_distance,
    paired_difference,
    saturation,
    win_rate,
)
from frontier import as_markdown, groups, read_csv  # noqa: E402
from pairs import FAULTS, OTHER_FAULTS, apply_fault, field  # noqa: E402
from preference import judge, second_judge  # noqa: E402
from rewards import imagenet, sentence_encoder  # noqa: E402

PROMPTS = (EMOJI / "prompts.txt").read_text().splitlines()


def test_there_are_200_different_captions_and_each_names_an_emoji() -> None:
    from data import characters, name_of
    from rewards import captions

    assert captions() == PROMPTS
    assert len(PROMPTS) == len(set(PROMPTS)) == 200
    assert {name_of(caption) for caption in PROMPTS} <= set(characters())


@pytest.mark.parametrize("name", ["distil.yaml", "align.yaml"])
def test_configurations_load_and_what_they_name_is_there(name: str) -> None:
    config = load_config(EMOJI / name)
    assert Path(config.prompts.path).is_file()
    for role in ("scheduler", "reference", "generator", "decoder"):
        assert Path(getattr(config.models, role).path).is_dir(), role


def test_shipped_weights_are_small_and_of_half_precision() -> None:
    from safetensors.torch import load_file

    files = [path for path in (EMOJI / "weights").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 15_000_000
    tensors = [tensor for path in files if path.suffix == ".safetensors" for tensor in load_file(path).values()]
    assert len(tensors) > 100
    assert all(tensor.dtype == torch.float16 and tensor.isfinite().all() for tensor in tensors)


def test_kernel_distance_is_unbiased_at_zero_and_grows_with_a_shift() -> None:
    generator = torch.Generator().manual_seed(0)
    base = [torch.randn(200, 32, generator=generator) for _ in range(40)]
    same = torch.tensor([kernel_distance(a, b) for a, b in zip(base[::2], base[1::2], strict=True)])
    assert same.mean().abs() < 3 * same.std() / len(same) ** 0.5
    shifted = [kernel_distance(base[0], base[1] + shift) for shift in (0.0, 0.5, 1.0)]
    assert shifted[0] < shifted[1] < shifted[2]


def pictures(prompts: list[str]) -> torch.Tensor:
    """One picture of the shipped generator for each prompt."""
    sampler = build_sampler(load_config(EMOJI / "align.yaml"), torch.device("cpu"))
    return generator_images(sampler, prompts).clamp(-1, 1)


@pytest.mark.parametrize("build", [judge, second_judge, imagenet])
def test_rewards_know_the_shipped_generators_subjects(build: Callable[[], torch.nn.Module]) -> None:
    """Every reward prefers a one-step picture's own prompt to another's, and the pixels get gradient."""
    reward = build().eval().requires_grad_(False)
    prompts = PROMPTS[::25]
    images = pictures(prompts).requires_grad_()
    own = reward(images, prompts)
    assert own.shape == (len(prompts),)
    (gradient,) = torch.autograd.grad(own.sum(), images)
    assert gradient.isfinite().all() and gradient.flatten(1).norm(dim=1).min() > 0
    with torch.no_grad():
        others = reward(images, prompts[1:] + prompts[:1])
    assert (own > others).float().mean() > 0.8 and own.mean() > others.mean() + 0.5


@torch.no_grad()
@pytest.mark.parametrize("build", [judge, second_judge])
def test_judges_dislike_faults_also_those_of_the_other_one(build: Callable[[], torch.nn.Module]) -> None:
    reward = build().eval()
    prompts = PROMPTS[::13]
    images = pictures(prompts)
    draw = torch.Generator().manual_seed(0)
    before = reward(images, prompts)
    for fault in (FAULTS["blurred"], FAULTS["flat"], FAULTS["blotched"], OTHER_FAULTS["faded"], OTHER_FAULTS["shrunk"]):
        (worse,) = apply_fault(fault, images, [torch.full((len(prompts),), 0.8)], draw)
        assert (reward(worse, prompts) < before).float().mean() > 0.7, fault.__name__


@pytest.mark.parametrize("name", sorted(FAULTS | OTHER_FAULTS))
def test_a_fault_grows_with_its_degree_and_is_none_at_0(name: str) -> None:
    draw = torch.Generator().manual_seed(1)
    images = (field(4, 3, 8, draw) * 0.4).clamp(-1, 0.8)
    degrees = [torch.full((4,), degree) for degree in (0.0, 0.3, 0.9)]
    none, little, much = apply_fault((FAULTS | OTHER_FAULTS)[name], images, degrees, draw)
    assert torch.equal(none, images)
    changes = [(faulty - images).abs().mean() for faulty in (little, much)]
    assert 0 < changes[0] < changes[1]
    assert all(faulty.shape == images.shape and faulty.abs().max() <= 1 for faulty in (little, much))


def test_faults_of_the_two_judges_are_different_ones() -> None:
    assert FAULTS and OTHER_FAULTS and not FAULTS.keys() & OTHER_FAULTS.keys()


def measured(held_out: torch.Tensor) -> Measured:
    return Measured({"held_out": held_out}, None, 0.0, torch.zeros(0))


def test_intervals_count_a_caption_once_whatever_its_latents() -> None:
    """Four equal latents say no more than one; the half-width is that of the captions' means."""
    values = torch.randn(1, 50, generator=torch.Generator().manual_seed(0))
    other = measured(torch.zeros(4, 50))
    one, four = (paired_difference(measured(found), other, "held_out") for found in (values, values.expand(4, 50)))
    assert one == pytest.approx(four)
    assert one.half == pytest.approx(1.96 * values.std().item() / 50**0.5)


def test_win_rate_counts_draws_half_and_only_the_chosen_captions() -> None:
    found = measured(torch.tensor([[1.0, -1.0, 0.0, 2.0]]))
    none = measured(torch.zeros(1, 4))
    assert win_rate(found, none).mean == pytest.approx(0.625)
    assert win_rate(found, none, [0, 3]) == (1.0, 0.0)


def test_edges_count_inside_the_subject_only() -> None:
    """A flat subject on white has no edges, stripes in it have; grey has no saturation, red has 2."""
    flat = torch.ones(1, 3, 64, 64)
    flat[..., 16:48, 16:48] = -0.5
    assert edge_energy(flat).item() == 0.0 and saturation(flat).item() == 0.0
    striped = flat.clone()
    striped[..., 16:48, 16:48:2] = 0.5
    assert edge_energy(striped).item() == pytest.approx(0.5, rel=0.05)
    red = flat.clone()
    red[:, 0, 16:48, 16:48], red[:, 1:, 16:48, 16:48] = 1.0, -1.0
    assert saturation(red).item() == 2.0


def test_names_are_the_softmax_over_all_captions() -> None:
    """Against the definition: also for a prompt that is no caption, which competes with all 200."""
    reward = imagenet().eval().requires_grad_(False)
    reward.sizes, reward.mirror = (64,), False
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    prompts = [PROMPTS[3], "a purple bicycle"]
    logits = 5.0 * reward.similarities(reward.embed_images(images), [*PROMPTS, "a purple bicycle"]).double()
    expected = [logits[0, :200].log_softmax(0)[3], logits[1].log_softmax(0)[200]]
    torch.testing.assert_close(reward(images, prompts).double(), torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_the_readme_shows_the_committed_frontier() -> None:
    """The example's table is what its CSV file says, of five scales and DIDR."""
    rows = read_csv(EMOJI / "frontier" / "frontier.csv")
    found = groups(rows)
    assert sum(method == "diff_instruct_pp" for method, _ in found) >= 5
    assert any(method == "didr" for method, _ in found)
    assert as_markdown(rows) in (EMOJI / "README.md").read_text(encoding="utf-8")
    assert all((EMOJI / "frontier" / f"{name}.png").is_file() for name in ("frontier", "frontier_pictures"))


def test_sentence_encoder_computes_each_prompt_once() -> None:
    encode = sentence_encoder()
    first = encode(["a pear", "a pear", "a plum"])
    assert first.shape == (3, 384) and torch.equal(first[0], first[1])
    torch.testing.assert_close(first.norm(dim=1), torch.ones(3))
    encode.encode = None
    assert torch.equal(encode(["a plum"])[0], first[2])
    sentence_encoder.cache_clear()
