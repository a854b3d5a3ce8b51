"""The addressed order of prompts, and the encodings that are kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from diffpp_fast.networks import Conditioning
from diffpp_fast.training.prompts import PromptEncoder, PromptOrder


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 16, 17, 200, 1000])
def test_every_epoch_is_a_permutation_of_its_own(count: int) -> None:
    epochs = PromptOrder(3, count)(torch.arange(4 * count)).view(4, count)
    assert torch.equal(epochs.sort().values, torch.arange(count).expand(4, count))
    if count >= 16:
        assert len({tuple(epoch.tolist()) for epoch in epochs}) == 4


def test_the_order_is_a_function_of_seed_and_sample_number() -> None:
    order = PromptOrder(3, 1000)
    whole = order(torch.arange(3000))
    assert torch.equal(order(torch.tensor([2999, 5, 1234])), whole[[2999, 5, 1234]])
    assert not torch.equal(PromptOrder(4, 1000)(torch.arange(3000)), whole)


def test_positions_are_spread_evenly() -> None:
    """Where prompt 0 comes in an epoch: chi-squared with 9 degrees of freedom is above 33 once in 10,000 times."""
    order = PromptOrder(0, 10)(torch.arange(10 * 5000)).view(5000, 10)
    places = (order == 0).nonzero()[:, 1].bincount(minlength=10).double()
    assert ((places - 500) ** 2 / 500).sum() < 33


def test_neighbours_are_independent() -> None:
    """How often prompt b follows prompt a: chi-squared over 56 pairs is above 110 once in 30,000 times."""
    order = PromptOrder(1, 8)(torch.arange(8 * 4000)).view(4000, 8)
    pairs = (order[:, :-1] * 8 + order[:, 1:]).flatten().bincount(minlength=64).view(8, 8).double()
    off_diagonal = pairs[~torch.eye(8, dtype=torch.bool)]
    expected = 4000 * 7 / 56
    assert ((off_diagonal - expected) ** 2 / expected).sum() < 110


def test_an_order_of_billions_costs_no_memory() -> None:
    indices = PromptOrder(0, 3_000_000_000)(torch.arange(2**40, 2**40 + 64))
    assert len(indices.unique()) == 64 and int(indices.max()) < 3_000_000_000


class CountingEncoder:
    def __init__(self) -> None:
        self.calls: list[tuple[str, ...]] = []

    def __call__(self, prompts: Sequence[str]) -> Conditioning:
        self.calls.append(tuple(prompts))
        lengths = torch.tensor([[float(len(prompt))] for prompt in prompts])
        tensors = {"encoder_hidden_states": lengths, "added_cond_kwargs": {"pooled": -lengths}}
        return Conditioning(tuple(prompts), tensors)


class Source(list[str]):
    """Prompts in memory, read as `PromptSource` is."""

    def __getitem__(self, indices: Any) -> Any:
        return [list.__getitem__(self, index) for index in indices]


def encoder_of(*prompts: str, **settings: Any) -> tuple[CountingEncoder, PromptEncoder]:
    inner = CountingEncoder()
    return inner, PromptEncoder(inner, Source(prompts), **settings)  # type: ignore[arg-type]


def test_a_small_source_is_encoded_once_in_groups_of_its_own_order() -> None:
    inner, encode = encoder_of("aa", "b", "ccc", "b", "dddd", batch=2)
    conditioning = encode(["ccc", "aa", "ccc"])
    assert conditioning.prompts == ("ccc", "aa", "ccc")
    assert conditioning.tensors["encoder_hidden_states"].tolist() == [[3.0], [2.0], [3.0]]
    assert conditioning.tensors["added_cond_kwargs"]["pooled"].tolist() == [[-3.0], [-2.0], [-3.0]]
    encode(["b", "dddd"])
    # Whatever is asked for first, a prompt has the same neighbours: those of its first place in the source.
    assert inner.calls == [("ccc", "b"), ("aa", "b"), ("dddd",)]
    encode(["aa", "b", "ccc", "dddd"])
    assert len(inner.calls) == 3


def test_other_prompts_are_encoded_with_those_that_they_are_asked_for_with() -> None:
    inner, encode = encoder_of("aa", batch=2)
    encode(["x", "aa", "y", "x", "z"])
    encode(["x"])
    assert inner.calls == [("aa",), ("x", "y"), ("z",), ("x",)]


def test_a_source_too_large_to_keep_is_encoded_by_the_batch() -> None:
    """A resumed run, which has encoded nothing yet, does exactly the same."""
    inner, encode = encoder_of("a", "b", "c", batch=2, capacity=2 * 8)  # an encoding is two float32
    for _ in range(2):
        inner.calls.clear()
        encode(["a", "c", "b"])
    assert inner.calls == [("a", "c"), ("b",)]
