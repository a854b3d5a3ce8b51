"""Sana: Gemma 2's hidden states of an instruction with the prompt behind it; the time is T sigma.

As `SanaPipeline` of diffusers computes it: prompts are stripped and lowered and stand behind the pipeline's
instruction. Of all hidden states the first is kept, and the last ones, so many that a prompt has its tokens. The empty
prompt, or the negative one, is encoded without the instruction. Networks do not attend to padding. The pipeline's
cleaning of captions (HTML, links) is not done.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffpp_fast.networks.conditioning import TEXT, TEXT_MASK
from diffpp_fast.networks.families.base import ATTENTION, EncoderKind, Family, FamilyText, Inputs, device_of
from diffpp_fast.networks.tokens import tokenize


class Sana(Family):
    """SanaTransformer2DModel without guidance embedding."""

    kinds = ("SanaTransformer2DModel",)
    pipelines = ("SanaPipeline",)
    name = "Sana"
    encoders = (EncoderKind(("gemma2",), "AutoModel", 300),)
    masked = True
    lora_targets = (*ATTENTION, "conv_inverted", "conv_point")

    def inputs(self, facts: Mapping[str, Any]) -> Inputs:
        if facts["guidance_embeds"]:
            raise ValueError(
                "with guidance_embeds=True is told the guidance scale, as Sana-Sprint is, which nothing feeds here: "
                "take the network that it was distilled from"
            )
        return Inputs(
            width=facts["caption_channels"],
            pooled=None,
            sizes=False,
            channels=facts["in_channels"],
            predicted=facts["out_channels"] or facts["in_channels"],
            divisor=facts["patch_size"],
        )

    def text(self, models: Sequence[tuple[nn.Module, Any, int] | None], facts: Mapping[str, Any]) -> FamilyText:
        return SanaText([each for each in models if each is not None])

    def text_widths(self, configs: Sequence[Any | None], facts: Mapping[str, Any]) -> tuple[int, int | None]:
        (config,) = configs
        assert config is not None
        return config.hidden_size, None

    def call(self, network: Any, x: Tensor, t: Tensor, conditioning: Mapping[str, Any]) -> Tensor:
        scale = network.config.timestep_scale
        return super().call(network, x, t if scale == 1.0 else t.to(torch.float32) * scale, conditioning)


class SanaText(FamilyText):
    """Hidden states of Gemma 2, and their mask."""

    def __init__(self, models: Sequence[tuple[nn.Module, Any, int]]) -> None:
        super().__init__(models)
        self.tokenizers[0].padding_side = "right"
        self.instruction = _instruction()

    def encode(self, prompts: list[str], *, empty: bool = False) -> dict[str, Any]:
        (model,), (tokenizer,), (length,) = self.models, self.tokenizers, self.lengths
        before, whole = "" if empty else self.instruction, length
        if before:
            # Less the first token, and less one of the instruction's, which has none behind it here.
            whole += len(tokenizer.encode(before)) - 2
        texts = [before + prompt.lower().strip() for prompt in prompts]
        tokens = tokenize(tokenizer, texts, whole).to(device_of(model))
        mask = tokens["attention_mask"]
        hidden = model(input_ids=tokens["input_ids"], attention_mask=mask, use_cache=False).last_hidden_state.float()
        kept = [0, *range(whole - length + 1, whole)]
        return {TEXT: hidden[:, kept], TEXT_MASK: mask[:, kept]}


def _instruction() -> str:
    """Return what diffusers' pipeline puts in front of a prompt where it is told nothing else."""
    from diffusers import SanaPipeline

    lines = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    return "\n".join(lines)
