"""Prompts as reward models take them: cleaned, tokenised, cut with a word about it, and encoded once."""

from __future__ import annotations

import gzip
import html
import logging
import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffpp_fast import install
from diffpp_fast.errors import ConfigurationError

logger = logging.getLogger("diffpp_fast")

#: Merges of OpenAI's file that CLIP's vocabulary has: 49152 tokens - 2 x 256 bytes - 2 special ones.
CLIP_MERGES = 49152 - 256 - 2


#: Where it finds no vocabulary, transformers makes a tokenizer of a few special tokens, which takes every word for one.
FEWEST_TOKENS = 10


class CutReport:
    """Log lines about prompts that were cut: of the first one, and each time that their number is tenfold.

    Args:
        name: of the reward.
        most: what a prompt may have, in words.
    """

    def __init__(self, name: str, most: str) -> None:
        self.name, self.most = name, most
        self._seen = self._cut = 0
        self._next_report = 1

    def __call__(self, count: int, cut: Sequence[str]) -> None:
        """Take in so many prompts, of which some were cut."""
        self._seen += count
        self._cut += len(cut)
        if self._cut >= self._next_report:
            logger.warning(
                "%s: %d of the %d prompts encoded so far are longer than %s and were cut, e.g. %r",
                *(self.name, self._cut, self._seen, self.most, cut[0]),
            )
            self._next_report = 10 * self._cut  # prompts come batch by batch: not a line for each


class PromptTokenizer:
    """Prompts -> token ids and attention mask, padded to one length. What is cut is logged.

    Args:
        tokenizer: from transformers.
        length: tokens per prompt, special ones included. A longer prompt loses its end, but not the last special token.
        name: of the reward, for the log.
        clean: applied to a prompt first.
    """

    def __init__(self, tokenizer: Any, length: int, name: str, clean: Callable[[str], str] | None = None) -> None:
        self.tokenizer = tokenizer
        self.length = length
        self.name = name
        self.clean = clean
        self._report = CutReport(name, f"{length} tokens")

    def __call__(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """B prompts -> ids and mask, each [B, length] int64 on the CPU."""
        texts = [self.clean(prompt) for prompt in prompts] if self.clean else list(prompts)
        self._report_cuts(prompts, self.tokenizer(texts, verbose=False)["input_ids"])
        tokens = self.tokenizer(
            texts, padding="max_length", truncation=True, max_length=self.length, return_tensors="pt"
        )
        return tokens["input_ids"], tokens["attention_mask"]

    def _report_cuts(self, prompts: Sequence[str], whole: Sequence[Sequence[int]]) -> None:
        cut = [prompt for prompt, ids in zip(prompts, whole, strict=True) if len(ids) > self.length]
        self._report(len(prompts), cut)


class PromptCache:
    """The results of an encoder for the prompts asked for last, also in steps that are captured as CUDA graphs.

    Args:
        capacity: prompts whose results are kept.
    """

    #: Prompts that are encoded at a time.
    CHUNK = 128

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._known: OrderedDict[str, Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._known)

    def __call__(self, prompts: Sequence[str], encode: Callable[[Sequence[str]], Tensor]) -> Tensor:
        """B prompts -> [B, ...], without gradient; `encode` gives it for those that are not known, some at a time.

        Raises ValueError where `encode` does not give one row per prompt.
        """
        if isinstance(prompts, HeldPrompts):
            return prompts.look_up(self, encode)
        rows = {prompt: self._known.get(prompt) for prompt in prompts}
        missing = [prompt for prompt, row in rows.items() if row is None]
        with torch.no_grad():
            for start in range(0, len(missing), self.CHUNK):
                part = missing[start : start + self.CHUNK]
                results = encode(part)
                if len(results) != len(part):
                    raise ValueError(f"an encoder of prompts gave {len(results)} rows for {len(part)} prompts")
                # Clones: a view would keep its whole chunk alive.
                rows.update((prompt, row.clone()) for prompt, row in zip(part, results, strict=True))
        for prompt, row in rows.items():
            assert row is not None
            self._known[prompt] = row
            self._known.move_to_end(prompt)
        while len(self._known) > self.capacity:
            self._known.popitem(last=False)
        return torch.stack([row for prompt in prompts if (row := rows[prompt]) is not None])

    def clear(self) -> None:
        self._known.clear()


class HeldPrompts(Sequence[str]):
    """The prompts of a step that is captured in a graph, of which every replay has others.

    Nobody can read them, for a graph holds no text. What a `PromptCache` has given for them stays in place, and is
    brought up to date with them.

    Args:
        prompts: the first ones.
    """

    def __init__(self, prompts: Sequence[str]) -> None:
        self._prompts = tuple(prompts)
        self._results: dict[int, tuple[PromptCache, Callable[[Sequence[str]], Tensor], Tensor]] = {}

    def __len__(self) -> int:
        return len(self._prompts)

    def __getitem__(self, place: Any) -> Any:
        raise TypeError("it reads its prompts as text, of which a captured graph would see the first ones for ever")

    def look_up(self, cache: PromptCache, encode: Callable[[Sequence[str]], Tensor]) -> Tensor:
        """Return what a cache gives for these prompts, the same tensor each time."""
        if id(cache) not in self._results:
            self._results[id(cache)] = cache, encode, cache(self._prompts, encode)
        return self._results[id(cache)][2]

    def set(self, prompts: Sequence[str]) -> None:
        """Take other prompts, as many."""
        self._prompts = tuple(prompts)
        for cache, encode, result in self._results.values():
            result.copy_(cache(self._prompts, encode))


def clean_like_clip(prompt: str) -> str:
    """Do what OpenAI's and open_clip's tokenizers do before what transformers' does too (lower case, white space).

    Source: `basic_clean` in openai/CLIP clip/simple_tokenizer.py: ftfy, then HTML entities twice, then strip. Raises
    ConfigurationError where ftfy is not installed.
    """
    need_ftfy("CLIP's tokenizer")
    import ftfy

    return html.unescape(html.unescape(ftfy.fix_text(prompt))).strip()


def need_ftfy(what: str) -> None:
    """Raise ConfigurationError, naming what needs it, where ftfy is not installed."""
    if "ftfy" not in sys.modules and find_spec("ftfy") is None:
        raise ConfigurationError(
            f"{what}: ftfy, with which CLIP cleans prompts, is not installed, and prompts with typographic quotes, "
            f"ligatures or broken encodings would be scored as others: {install.extra('train')}"
        )


def load_clip_tokenizer(path: str | Path) -> Any:
    """CLIP's tokenizer from a hub id, a folder, or OpenAI's `bpe_simple_vocab_16e6.txt.gz` (also part of open_clip)."""
    from transformers import CLIPTokenizer

    if str(path).endswith((".txt", ".txt.gz")):
        vocabulary, merges = read_clip_vocabulary(Path(path).expanduser())
        return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)
    return _from_pretrained(CLIPTokenizer, path)


def read_clip_vocabulary(path: Path, merges: int = CLIP_MERGES) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Token numbers and merges of a file of merges, in the order of openai/CLIP clip/simple_tokenizer.py."""
    if not path.is_file():
        raise ConfigurationError(f"CLIP's tokenizer: no such file: {path}")
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    lines = content.decode("utf-8").split("\n")[1 : merges + 1]
    pairs = [(left, right) for left, _, right in (line.partition(" ") for line in lines if line)]
    letters = _byte_letters()
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *(left + right for left, right in pairs)]
    return {token: number for number, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}, pairs


def _byte_letters() -> list[str]:
    """A printable letter for every byte, printable bytes first, as GPT-2's tokenizer orders them."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + n) for n in range(len(others))]


def load_bert_tokenizer(path: str | Path) -> Any:
    """BLIP's tokenizer: BERT's from a hub id, a folder or a vocab.txt, and the two tokens that BLIP adds to it."""
    from transformers import BertTokenizer

    if str(path).endswith(".txt"):
        file = Path(path).expanduser()
        if not file.is_file():
            raise ConfigurationError(f"BERT's tokenizer: no such file: {file}")
        words = file.read_text(encoding="utf-8").split("\n")
        tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(words) if word})
    else:
        tokenizer = _from_pretrained(BertTokenizer, path)
    tokenizer.add_special_tokens({"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]})
    return tokenizer


def load_qwen_tokenizer(path: str | Path) -> Any:
    """Qwen2-VL's tokenizer from a hub id or a folder."""
    from transformers import Qwen2Tokenizer

    return _from_pretrained(Qwen2Tokenizer, path)


def load_t5_tokenizer(path: str | Path) -> Any:
    """T5's tokenizer from a hub id or a folder."""
    from transformers import T5Tokenizer

    return _from_pretrained(T5Tokenizer, path)


def _from_pretrained(kind: Any, path: str | Path) -> Any:
    try:
        tokenizer = kind.from_pretrained(str(path), trust_remote_code=False)
    except (OSError, ValueError, TypeError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigurationError(f"tokenizer: {path} gives no {kind.__name__}: {reason}") from error
    if len(tokenizer) < FEWEST_TOKENS:
        raise ConfigurationError(
            f"tokenizer: {path} holds no vocabulary of a {kind.__name__}: tokenizer.json, or "
            f"{' and '.join(kind.vocab_files_names.values())}"
        )
    return tokenizer
