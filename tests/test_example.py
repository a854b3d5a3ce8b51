"""The emoji example: its figures measure what they say; its shipped files are whole, small and fit together."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from diffpp_fast.training import load_config

EMOJI = Path(__file__).parent.parent / "examples" / "emoji"
sys.path.insert(0, str(EMOJI))

from evaluation import kernel_distance  # noqa: E402
from rewards import convolutional, imagenet, sentence_encoder  # noqa: E402

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


@pytest.mark.parametrize("build", [convolutional, imagenet])
def test_rewards_know_the_shipped_generators_subjects(build: object) -> None:
    """Both rewards prefer a one-step picture's own prompt to another's, and the pixels get gradient."""
    from evaluation import generator_images

    from diffpp_fast.training.build import build_sampler

    reward = build().eval().requires_grad_(False)  # type: ignore[operator]
    prompts = PROMPTS[::25]
    sampler = build_sampler(load_config(EMOJI / "align.yaml"), torch.device("cpu"))
    images = generator_images(sampler, prompts).clamp(-1, 1).requires_grad_()
    own = reward(images, prompts)
    assert own.shape == (len(prompts),) and own.max() <= 0
    (gradient,) = torch.autograd.grad(own.sum(), images)
    assert gradient.isfinite().all() and gradient.flatten(1).norm(dim=1).min() > 0
    with torch.no_grad():
        others = reward(images, prompts[1:] + prompts[:1])
    assert (own > others).float().mean() > 0.8 and own.mean() > others.mean() + 1


def test_rewards_are_the_softmax_over_all_captions() -> None:
    """Against the definition: also for a prompt that is no caption, which competes with all 200."""
    reward = convolutional().eval().requires_grad_(False)
    reward.sizes, reward.mirror = (64,), False
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    prompts = [PROMPTS[3], "a purple bicycle"]
    logits = 5.0 * reward.similarities(reward.embed_images(images), [*PROMPTS, "a purple bicycle"]).double()
    expected = [logits[0, :200].log_softmax(0)[3], logits[1].log_softmax(0)[200]]
    torch.testing.assert_close(reward(images, prompts).double(), torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_sentence_encoder_computes_each_prompt_once() -> None:
    encode = sentence_encoder()
    first = encode(["a pear", "a pear", "a plum"])
    assert first.shape == (3, 384) and torch.equal(first[0], first[1])
    torch.testing.assert_close(first.norm(dim=1), torch.ones(3))
    encode.encode = None
    assert torch.equal(encode(["a plum"])[0], first[2])
    sentence_encoder.cache_clear()
