"""Conditioning of which some samples' prompts are left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from diffpp_fast.methods.base import per_sample
from diffpp_fast.networks.conditioning import Conditioning


def drop_prompts(conditioning: Any, null: Any, dropped: torch.Tensor) -> Any:
    """Return the conditioning of B samples with that of the null prompt where `dropped` says so.

    Args:
        conditioning: a tensor [B, ...], a list or tuple of B things, a mapping of such, or a `Conditioning`, whose
            text stays as it is, since no network reads it.
        null: the same of the null prompt, for B samples.
        dropped: bool [B].

    Raises:
        TypeError: another kind of conditioning.
        ValueError: the two don't fit together.
    """
    if type(conditioning) is not type(null):
        raise ValueError(
            f"prompt_dropout: conditioning is {type(conditioning).__name__}, "
            f"null_conditioning is {type(null).__name__}: give both as one type"
        )
    if isinstance(conditioning, torch.Tensor):
        if conditioning.shape != null.shape or len(conditioning) != len(dropped):
            raise ValueError(
                f"prompt_dropout: conditioning of shape {tuple(conditioning.shape)} and null_conditioning of shape "
                f"{tuple(null.shape)} must be equal in shape, for {len(dropped)} samples"
            )
        return torch.where(per_sample(dropped, conditioning), null, conditioning)
    if isinstance(conditioning, Conditioning):
        return replace(conditioning, tensors=drop_prompts(conditioning.tensors, null.tensors, dropped))
    if isinstance(conditioning, Mapping):
        if conditioning.keys() != null.keys():
            names = ", ".join(sorted(map(str, conditioning.keys() ^ null.keys())))
            raise ValueError(f"prompt_dropout: only one of conditioning and null_conditioning has {names}")
        return {name: drop_prompts(value, null[name], dropped) for name, value in conditioning.items()}
    if isinstance(conditioning, list | tuple) and len(conditioning) == len(null) == len(dropped):
        return [b if drop else a for a, b, drop in zip(conditioning, null, dropped.tolist(), strict=True)]
    raise TypeError(
        f"prompt_dropout: can't leave prompts out of {type(conditioning).__name__}: give a tensor, a list of one "
        "entry per sample, a mapping of these or a Conditioning"
    )
