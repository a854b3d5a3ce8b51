"""Prompts to tokens of one length."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

logger = logging.getLogger("diffpp_fast")


def without_padding(tokens: Mapping[str, Any]) -> dict[str, Any]:
    """Cut tokens [B, N] behind the longest prompt; where padding stands in front, nothing is cut.

    Whoever masks padding makes the same of the others, up to rounding, in less time.
    """
    mask = tokens["attention_mask"]
    longest = int(mask.sum(1).max())
    if mask[:, longest:].any():
        return dict(tokens)
    return {name: tensor[:, :longest] for name, tensor in tokens.items()}


def tokenize(tokenizer: Any, prompts: list[str], max_length: int) -> Any:
    """B prompts -> `input_ids` and `attention_mask` [B, max_length], cut or padded; a warning says what is cut."""
    whole = tokenizer(prompts, verbose=False)["input_ids"]
    cut = [prompt for prompt, tokens in zip(prompts, whole, strict=True) if len(tokens) > max_length]
    if cut:
        logger.warning("%d of %d prompts cut to %d tokens, e.g. %r", len(cut), len(prompts), max_length, cut[0])
    return tokenizer(prompts, padding="max_length", truncation=True, max_length=max_length, return_tensors="pt")
