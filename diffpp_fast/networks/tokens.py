"""Prompts to tokens of one length."""

from __future__ import annotations

import logging
from typing import Any

logger = logging.getLogger("diffpp_fast")


def tokenize(tokenizer: Any, prompts: list[str], max_length: int, **options: Any) -> Any:
    """B prompts -> `input_ids` and `attention_mask` [B, max_length], cut or padded; a warning says what is cut."""
    whole = tokenizer(prompts, verbose=False, **options)["input_ids"]
    cut = [prompt for prompt, tokens in zip(prompts, whole, strict=True) if len(tokens) > max_length]
    if cut:
        logger.warning("%d of %d prompts cut to %d tokens, e.g. %r", len(cut), len(prompts), max_length, cut[0])
    options = {"padding": "max_length", "truncation": True, "return_tensors": "pt", **options}
    return tokenizer(prompts, max_length=max_length, **options)
