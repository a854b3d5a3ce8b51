"""Prompts: tokens against an independent tokenizer, the cache, and what is said about long prompts."""

from __future__ import annotations

import html
import itertools
import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import official_rewards as official
import pytest
import torch
from torch import Tensor

from diffpp_fast import rewards
from diffpp_fast.errors import ConfigurationError
from diffpp_fast.rewards import text

PROMPTS = [
    "a cat",
    "  A   Cat\tand a DOG's bone, don't!  ",
    "cats &amp;amp; dogs &lt;3",
    "3 cats' 12:30",
    "",
    "a" * 40,
]


def clip_tokens(prompt: str, merges: Sequence[str], length: int) -> list[int]:
    """openai/CLIP clip/simple_tokenizer.py for ASCII: bytes, words, merges in their order of rank."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    order = printable + [byte for byte in range(256) if byte not in printable]
    ranks = {tuple(merge.split()): rank for rank, merge in enumerate(merges)}
    numbers = {chr(byte): number for number, byte in enumerate(order)}
    numbers |= {f"{letter}</w>": 256 + number for letter, number in list(numbers.items())}
    numbers |= {"".join(pair): 512 + rank for pair, rank in ranks.items()}
    start, end = 512 + len(merges), 513 + len(merges)
    cleaned = " ".join(html.unescape(html.unescape(prompt)).split()).lower()
    ids = [start]
    for word in re.findall(r"'s|'t|'re|'ve|'m|'ll|'d|[a-z]+|[0-9]|[^\sa-z0-9]+", cleaned):
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            rank, place = min((ranks.get(pair, 10**9), i) for i, pair in enumerate(itertools.pairwise(pieces)))
            if rank == 10**9:
                break
            pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]
        ids += [numbers[piece] for piece in pieces]
    ids.append(end)
    if len(ids) > length:
        ids = [*ids[: length - 1], end]
    return ids


@pytest.mark.parametrize("prompt", PROMPTS)
def test_clip_tokens_are_those_of_its_algorithm(prompt: str, tmp_path: Path) -> None:
    tokenizer = text.load_clip_tokenizer(official.write_clip_tokenizer(tmp_path))
    assert (len(tokenizer), tokenizer.model_max_length) == (518, 77)
    tokenize = text.PromptTokenizer(tokenizer, 16, "clip", text.clean_like_clip)
    ids, mask = tokenize([prompt])
    expected = clip_tokens(prompt, official.MERGES, 16)
    assert ids.shape == mask.shape == (1, 16)
    assert ids[0, : len(expected)].tolist() == expected
    assert mask[0].tolist() == [1] * len(expected) + [0] * (16 - len(expected))
    # The first of the highest numbers is the end of the prompt, whatever the padding.
    assert int(ids[0].argmax()) == len(expected) - 1


def test_a_gzipped_vocabulary_is_read_too(tmp_path: Path) -> None:
    import gzip

    path = official.write_clip_tokenizer(tmp_path)
    zipped = tmp_path / "bpe.txt.gz"
    zipped.write_bytes(gzip.compress(path.read_bytes()))
    assert text.read_clip_vocabulary(zipped) == text.read_clip_vocabulary(path)
    assert len(text.read_clip_vocabulary(path, merges=2)[1]) == 2
    with pytest.raises(ConfigurationError, match="no such file"):
        text.read_clip_vocabulary(tmp_path / "other.txt")


def test_imagereward_tokens(tmp_path: Path) -> None:
    """BERT's, 35 of them with padding 0, in ImageReward's vocabulary of two more."""
    tokenizer = text.load_bert_tokenizer(official.write_bert_vocabulary(tmp_path))
    assert len(tokenizer) == 14
    assert tokenizer.convert_tokens_to_ids(["[DEC]", "[ENC]"]) == [12, 13]
    tokenize = text.PromptTokenizer(tokenizer, 35, "imagereward")
    ids, mask = tokenize(["The RED cats, a bird", "dog " * 50])
    assert ids[0].tolist() == [2, 10, 6, 7, 9, 11, 5, 1, 3] + [0] * 26
    assert mask[0].tolist() == [1] * 9 + [0] * 26
    assert ids[1].tolist() == [2, *[8] * 33, 3]


class Encoder:
    """Prompts -> [B, 2]: their length, and how many prompts have been encoded."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, ...]] = []

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        self.calls.append(tuple(prompts))
        count = sum(map(len, self.calls))
        return torch.tensor([[float(len(prompt)), float(count)] for prompt in prompts])


def test_the_cache_encodes_each_prompt_once_and_forgets_the_oldest() -> None:
    encode = Encoder()
    cache = text.PromptCache(3)
    assert cache(["aa", "b", "aa"], encode)[:, 0].tolist() == [2, 1, 2]
    assert cache(["b", "ccc", "aa"], encode)[:, 0].tolist() == [1, 3, 2]
    assert encode.calls == [("aa", "b"), ("ccc",)]
    cache(["dddd"], encode)  # forgets b, the one asked for longest ago
    assert len(cache) == 3
    cache(["aa", "ccc", "dddd"], encode)
    assert len(encode.calls) == 3
    assert cache(["b"], encode)[:, 0].tolist() == [1]
    assert encode.calls[3:] == [("b",)]


def test_a_batch_may_be_larger_than_the_cache_and_than_a_chunk() -> None:
    encode = Encoder()
    with pytest.raises(ValueError, match="gave 1 rows for 2 prompts"):
        text.PromptCache(3)(("a", "b"), lambda prompts: torch.zeros(1, 2))
    cache = text.PromptCache(5)
    prompts = ["p" * length for length in range(300)]
    assert cache(prompts, encode)[:, 0].tolist() == list(range(300))
    assert [len(call) for call in encode.calls] == [128, 128, 44]
    assert len(cache) == 5


def test_features_cached_under_inference_mode_serve_training(tmp_path: Path) -> None:
    state = official.random_state(official.clip_shapes(official.SMALL_CLIP))
    reward = rewards.clip(str(official.write_clip_folder(tmp_path / "clip", state)))
    images = torch.rand(1, 3, 32, 32)
    with torch.inference_mode():
        reward(images, ("a cat",))
    images.requires_grad_()
    reward(images, ("a cat",)).sum().backward()
    assert images.grad is not None


def test_the_cache_follows_the_weights(tmp_path: Path) -> None:
    state = official.random_state(official.clip_shapes(official.SMALL_CLIP))
    reward = rewards.clip(str(official.write_clip_folder(tmp_path / "clip", state)))
    before = reward.clip.text_features(["a cat"])
    assert len(reward.clip.cache) == 1
    reward.double()
    assert len(reward.clip.cache) == 0
    assert reward.clip.text_features(["a cat"]).dtype == torch.float64
    reward.float()
    after = {name: value.flip(0) if "text" in name else value for name, value in reward.state_dict().items()}
    reward.clip.text_features(["a cat"])
    reward.load_state_dict(after)
    assert not torch.allclose(reward.clip.text_features(["a cat"]), before)
    reward.clip.clear_cache()
    assert len(reward.clip.cache) == 0


def test_long_prompts_are_cut_and_told_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = text.load_clip_tokenizer(official.write_clip_tokenizer(tmp_path))
    tokenize = text.PromptTokenizer(tokenizer, 8, "clip")
    with caplog.at_level(logging.WARNING, logger="diffpp_fast"):
        tokenize(["a cat", "a dog"])
        assert caplog.messages == []
        tokenize(["a cat", "cat " * 20, "dog " * 20])
        assert len(caplog.messages) == 1
        assert "clip: 2 of the 5 prompts encoded so far are longer than 8 tokens" in caplog.messages[0]
        assert "cat cat" in caplog.messages[0]
        for _ in range(17):
            tokenize(["dog " * 20])
        assert len(caplog.messages) == 1
        tokenize(["dog " * 20])
    assert len(caplog.messages) == 2
    assert "20 of the 23 prompts" in caplog.messages[1]


def test_prompts_are_cleaned_as_openai_does() -> None:
    assert text.clean_like_clip(" caf\u00e9 &amp;amp; bar ") == "caf\u00e9 & bar"
    assert text.clean_like_clip("a \u201cquoted\u201d \ufb01sh, schÃ¶n") == 'a "quoted" fish, schön'


@pytest.mark.parametrize("load", [lambda: rewards.hpsv2("nowhere"), lambda: rewards.clip("nowhere")])
def test_without_ftfy_no_scorer_that_needs_it_is_loaded(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "ftfy", raising=False)
    monkeypatch.setattr(text, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"ftfy, with which CLIP cleans .*: pip install .*\[train\]"):
        load()


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    state = official.random_state(official.clip_shapes(official.SMALL_CLIP))
    folder = official.write_clip_folder(tmp_path / "clip", state)
    other: Any = tmp_path / "other.txt"
    other.write_text("#version: 0.2\nc a\n")
    with pytest.raises(ConfigurationError, match=r"ends prompts with token 514, the text encoder expects 517"):
        rewards.clip(str(folder), tokenizer=str(other))
    with pytest.raises(ConfigurationError, match=r"gives no CLIPTokenizer|no such file"):
        rewards.clip(str(folder), tokenizer=str(tmp_path / "nowhere"))
