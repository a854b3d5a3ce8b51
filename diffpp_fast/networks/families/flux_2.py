"""FLUX.2: latents of patches that its autoencoder has normalised; hidden states of three layers of a language model.

As `Flux2KleinPipeline` and `Flux2Pipeline` of diffusers compute it: the network is told t / 1000. A picture's token is
one latent of 128 channels; the places of its row and column are the second and third of four numbers, and a word's
place is the last. Padding of the prompt, which is attended to, and the empty prompt are those of a chat: klein's Qwen3
reads it without thinking, dev's Mistral behind the pipeline's instruction. Dev was distilled from guided predictions,
whose scale it is told.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from diffpp_fast.networks.conditioning import TEXT
from diffpp_fast.networks.families.base import (
    ATTENTION,
    GUIDANCE,
    JOINT_ATTENTION,
    EncoderKind,
    Family,
    FamilyText,
    Inputs,
    times_of,
)
from diffpp_fast.networks.families.chat import ChatText
from diffpp_fast.networks.families.flux import refuse_more
from diffpp_fast.networks.families.packing import places

TIMES = 1000
#: The layers whose hidden states stand side by side, by the kind of the language model.
LAYERS = {"qwen3": (9, 18, 27), "mistral": (10, 20, 30)}


class Flux2(Family):
    """Flux2Transformer2DModel of klein and dev, without pictures among its conditions."""

    kinds = ("Flux2Transformer2DModel",)
    pipelines = ("Flux2KleinPipeline", "Flux2Pipeline")
    name = "FLUX.2"
    encoders = (EncoderKind(("mistral3", "qwen3"), "AutoModel", 512),)
    times = TIMES
    sample_size = 64
    guidance = 4.0
    lora_targets = (*ATTENTION, *JOINT_ATTENTION, "linear_in", "linear_out", "to_qkv_mlp_proj", "to_out")

    def inputs(self, facts: Mapping[str, Any]) -> Inputs:
        refuse_more(facts)
        return Inputs(
            width=facts["joint_attention_dim"],
            pooled=None,
            sizes=False,
            channels=facts["in_channels"],
            predicted=facts["in_channels"],
            divisor=1,
        )

    def text(self, models: Sequence[tuple[nn.Module, Any, int] | None], facts: Mapping[str, Any]) -> FamilyText:
        parts = [each for each in models if each is not None]
        model: Any = parts[0][0]
        return Flux2Text(parts) if model.config.model_type == "qwen3" else Flux2DevText(parts)

    def text_widths(self, configs: Sequence[Any | None], facts: Mapping[str, Any]) -> tuple[int, int | None]:
        (config,) = configs
        assert config is not None
        layers = LAYERS[config.model_type]
        if config.num_hidden_layers < max(layers):
            raise ValueError(f"it has {config.num_hidden_layers} layers, and FLUX.2 takes those after {layers}")
        return len(layers) * config.hidden_size, None

    def call(self, network: nn.Module, x: Tensor, t: Tensor, conditioning: Mapping[str, Any]) -> Tensor:
        height, width = x.shape[2:]
        text = conditioning[TEXT]
        words = torch.arange(text.shape[1], device=x.device, dtype=torch.float32)[:, None]
        tokens: Tensor = network(
            hidden_states=x.flatten(2).transpose(1, 2),
            timestep=times_of(t, 1 / TIMES),
            guidance=conditioning.get(GUIDANCE),
            encoder_hidden_states=text,
            txt_ids=pad(words, (3, 0)),
            img_ids=places(height, width, 4, x.device),
            return_dict=False,
        )[0]
        return tokens.transpose(1, 2).unflatten(2, (height, width))


class Flux2Text(ChatText):
    """Hidden states after some layers of Qwen3, side by side."""

    thinks = False
    layers = LAYERS["qwen3"]

    def encode(self, prompts: list[str], *, empty: bool = False) -> dict[str, Any]:
        states, _ = self.read(prompts)
        return {TEXT: torch.cat([states[layer].float() for layer in self.layers], dim=-1)}


class Flux2DevText(Flux2Text):
    """The same of Mistral's, which reads an instruction before the prompt."""

    layers = LAYERS["mistral"]

    def chat(self, prompt: str) -> str:
        from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE

        said = {"system": SYSTEM_MESSAGE, "user": prompt.replace("[IMG]", "")}
        messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in said.items()]
        text: str = self.tokenizers[0].apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
        return text
