"""Prompts to `encoder_hidden_states`, with any text encoder that transformers loads."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffpp_fast.networks.conditioning import Conditioning

logger = logging.getLogger("diffpp_fast")


class TextEncoder(nn.Module):
    """A frozen text encoder: prompts -> `Conditioning` for a diffusers network.

    Args:
        model: gives `last_hidden_state` [B, L, D] for `input_ids` and `attention_mask`; frozen and set to eval here.
        tokenizer: the model's, from transformers.
        max_length: tokens per prompt, the special ones included. Longer prompts are cut, with a warning.
        mask_padding: hand `encoder_attention_mask` on, so that networks do not attend to padding. Networks that were
            trained without it (Stable Diffusion 1.5) want False.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, max_length: int, mask_padding: bool = True) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.mask_padding = mask_padding

    @classmethod
    def from_pretrained(cls, path: str | Path, max_length: int = 77, mask_padding: bool = True) -> TextEncoder:
        """From a hub id or a folder with the model (safetensors) and its tokenizer. Of T5 it takes the encoder."""
        from transformers import AutoModelForTextEncoding, AutoTokenizer

        model = AutoModelForTextEncoding.from_pretrained(path, use_safetensors=True)
        return cls(model, AutoTokenizer.from_pretrained(path), max_length, mask_padding)

    @torch.no_grad()
    def forward(self, prompts: Sequence[str]) -> Conditioning:
        """B prompts -> hidden states [B, max_length, D] float32 and, if asked for, their mask [B, max_length] int64."""
        device = next(self.model.parameters()).device
        self._warn_of_cuts(prompts)
        tokens = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=self.max_length, return_tensors="pt"
        ).to(device)
        hidden = self.model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).last_hidden_state
        tensors = {"encoder_hidden_states": hidden.float()}
        if self.mask_padding:
            tensors["encoder_attention_mask"] = tokens["attention_mask"]
        return Conditioning(tuple(prompts), tensors)

    def _warn_of_cuts(self, prompts: Sequence[str]) -> None:
        whole = self.tokenizer(list(prompts), verbose=False)["input_ids"]
        cut = [prompt for prompt, tokens in zip(prompts, whole, strict=True) if len(tokens) > self.max_length]
        if cut:
            logger.warning(
                "%d of %d prompts cut to %d tokens, e.g. %r", len(cut), len(prompts), self.max_length, cut[0]
            )
