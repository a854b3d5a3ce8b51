"""Stable Diffusion 3 and 3.5: two CLIPs and T5 behind each other, pooled projections; the time is T sigma.

As `StableDiffusion3Pipeline` of diffusers computes it: hidden states before the last layer of both CLIPs side by side,
filled up with zeros to T5's width, then T5's along the tokens. T5's padding is attended to. The empty prompt is encoded
like any other. Without T5 there are zeros in its place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad

from diffpp_fast.networks.conditioning import TEXT
from diffpp_fast.networks.families.base import POOLED, EncoderKind, Family, FamilyText, Inputs

#: Tokens of T5 where the pipeline is told nothing else.
T5_LENGTH = 256


class StableDiffusion3(Family):
    """SD3Transformer2DModel, of 3 and of 3.5."""

    kinds = ("SD3Transformer2DModel",)
    pipelines = ("StableDiffusion3Pipeline",)
    name = "Stable Diffusion 3"
    encoders = (
        EncoderKind(("clip", "clip_text_model"), "CLIPTextModelWithProjection", 77),
        EncoderKind(("clip", "clip_text_model"), "CLIPTextModelWithProjection", 77),
        EncoderKind(("t5",), "T5EncoderModel", T5_LENGTH, optional=True),
    )

    def inputs(self, facts: Mapping[str, Any]) -> Inputs:
        return Inputs(
            width=facts["joint_attention_dim"],
            pooled=facts["pooled_projection_dim"],
            sizes=False,
            channels=facts["in_channels"],
            predicted=facts["out_channels"] or facts["in_channels"],
            divisor=facts["patch_size"],
            side=facts["pos_embed_max_size"],
        )

    def text(self, models: Sequence[tuple[nn.Module, Any, int] | None], facts: Mapping[str, Any]) -> FamilyText:
        return JointText([each for each in models if each is not None], facts["joint_attention_dim"])

    def text_widths(self, configs: Sequence[Any | None], facts: Mapping[str, Any]) -> tuple[int, int | None]:
        first, second, third = configs
        assert first is not None and second is not None
        width = facts["joint_attention_dim"] if third is None else third.d_model
        both = first.hidden_size + second.hidden_size
        return max(width, both), first.projection_dim + second.projection_dim

    def tokens(self, lengths: Sequence[int]) -> int:
        # T5's are there as zeros where T5 is not.
        return lengths[0] + (lengths[2] if len(lengths) > 2 else T5_LENGTH)


class JointText(FamilyText):
    """Two CLIPs, and T5 or zeros of its width."""

    def __init__(self, models: Sequence[tuple[nn.Module, Any, int]], width: int) -> None:
        super().__init__(models)
        self.width = width

    def encode(self, prompts: list[str], *, empty: bool = False) -> dict[str, Any]:
        hidden, pooled = [], []
        for number in range(2):
            output = self.models[number](input_ids=self.ids(number, prompts), output_hidden_states=True)
            hidden.append(output.hidden_states[-2].float())
            pooled.append(output.text_embeds.float())
        states = torch.cat(hidden, dim=-1)
        if len(self.models) > 2:
            third = self.models[2](input_ids=self.ids(2, prompts)).last_hidden_state.float()
        else:
            third = states.new_zeros(len(prompts), T5_LENGTH, self.width)
        states = pad(states, (0, third.shape[-1] - states.shape[-1]))
        return {TEXT: torch.cat([states, third], dim=1), POOLED: torch.cat(pooled, dim=-1)}
