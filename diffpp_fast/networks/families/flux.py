"""FLUX.1: packed latents with places; T5's hidden states and CLIP's pooled ones; some are told a guidance scale.

As `FluxPipeline` of diffusers computes it: the network is told t / 1000. T5's padding is attended to, and all of its
tokens have place 0. The empty prompt is encoded like any other. FLUX.1-dev was distilled from guided predictions, whose
scale it is told; schnell is told none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from diffpp_fast.networks.conditioning import TEXT
from diffpp_fast.networks.families.base import GUIDANCE, POOLED, EncoderKind, Family, FamilyText, Inputs, times_of
from diffpp_fast.networks.families.packing import PATCH, pack, places, unpack

TIMES = 1000


class Flux(Family):
    """FluxTransformer2DModel of dev and schnell, without pictures among its conditions."""

    kinds = ("FluxTransformer2DModel",)
    pipelines = ("FluxPipeline",)
    name = "FLUX.1"
    encoders = (
        EncoderKind(("clip", "clip_text_model"), "CLIPTextModel", 77),
        EncoderKind(("t5",), "T5EncoderModel", 512),
    )
    times = TIMES
    unguided = "true_cfg_scale=1.0"
    sample_size = 128
    guidance = 3.5
    lora_targets = (*Family.lora_targets, "proj_mlp", "single_transformer_blocks.*.proj_out")

    def inputs(self, facts: Mapping[str, Any]) -> Inputs:
        refuse_more(facts)
        channels = facts["in_channels"] // PATCH**2
        return Inputs(
            width=facts["joint_attention_dim"],
            pooled=facts["pooled_projection_dim"],
            sizes=False,
            channels=channels,
            predicted=channels,
            divisor=PATCH,
        )

    def text(self, models: Sequence[tuple[nn.Module, Any, int] | None], facts: Mapping[str, Any]) -> FamilyText:
        return FluxText([each for each in models if each is not None])

    def text_widths(self, configs: Sequence[Any | None], facts: Mapping[str, Any]) -> tuple[int, int | None]:
        clip, t5 = configs
        assert clip is not None and t5 is not None
        return t5.d_model, clip.hidden_size

    def tokens(self, lengths: Sequence[int]) -> int:
        return lengths[1]

    def call(self, network: nn.Module, x: Tensor, t: Tensor, conditioning: Mapping[str, Any]) -> Tensor:
        height, width = x.shape[2:]
        text = conditioning[TEXT]
        picture = places(height // PATCH, width // PATCH, 3, x.device)
        tokens: Tensor = network(
            hidden_states=pack(x),
            timestep=times_of(t, 1 / TIMES),
            guidance=conditioning.get(GUIDANCE),
            pooled_projections=conditioning[POOLED],
            encoder_hidden_states=text,
            txt_ids=picture.new_zeros(text.shape[1], 3),
            img_ids=picture,
            return_dict=False,
        )[0]
        return unpack(tokens, height, width)


def refuse_more(facts: Mapping[str, Any]) -> None:
    """Raise ValueError for a network of FLUX that takes more than tokens of the latents that it predicts."""
    given, predicted = facts["in_channels"], facts["out_channels"] or facts["in_channels"]
    if facts["patch_size"] != 1:
        raise ValueError(f"with patch_size={facts['patch_size']!r} is not known: latents are packed before")
    if given != predicted:
        raise ValueError(
            f"with in_channels={given!r} and {predicted} channels that it predicts also takes a picture (FLUX.1 Fill, "
            "Canny, Depth), which nothing feeds here: take the text-to-image network"
        )


class FluxText(FamilyText):
    """CLIP's pooled hidden state, and T5's hidden states."""

    def encode(self, prompts: list[str], *, empty: bool = False) -> dict[str, Any]:
        clip, t5 = self.models
        pooled = clip(input_ids=self.ids(0, prompts)).pooler_output
        return {TEXT: t5(input_ids=self.ids(1, prompts)).last_hidden_state.float(), POOLED: pooled.float()}
