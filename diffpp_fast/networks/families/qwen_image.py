"""Qwen-Image: packed latents with the picture's shape; hidden states of Qwen2.5-VL, which reads the prompt in a chat.

As `QwenImagePipeline` of diffusers computes it: the network is told t / 1000. The first 34 tokens of the chat, which
asks for a description, are dropped. Attention leaves padding out. The empty prompt is a chat like any other. The
pipeline scales a guided prediction to the norm of that with the prompt, token by token; here guidance is what
`method.guidance_scale` and `guidance_rescale` say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from diffpp_fast.networks.conditioning import TEXT, TEXT_MASK
from diffpp_fast.networks.families.base import EncoderKind, Family, FamilyText, Inputs, device_of, times_of
from diffpp_fast.networks.families.chat import in_front
from diffpp_fast.networks.families.packing import PATCH, pack, unpack
from diffpp_fast.networks.tokens import tokenize, without_padding

TIMES = 1000
#: What surrounds a prompt, and how many of its tokens come before the prompt.
CHAT = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
BEFORE = 34
#: Settings of networks that take more than latents, a time and text, with what it is.
MORE = {
    "guidance_embeds": "a guidance scale, which diffusers' own network has no layer for",
    "zero_cond_t": "pictures that are edited",
    "use_additional_t_cond": "layers of a picture",
    "use_layer3d_rope": "layers of a picture",
}


class QwenImage(Family):
    """QwenImageTransformer2DModel without pictures among its conditions."""

    kinds = ("QwenImageTransformer2DModel",)
    pipelines = ("QwenImagePipeline",)
    name = "Qwen-Image"
    encoders = (EncoderKind(("qwen2_5_vl",), "AutoModel", 1024),)
    masked = True
    times = TIMES
    unguided = "true_cfg_scale=1.0"
    sample_size = 128

    def inputs(self, facts: Mapping[str, Any]) -> Inputs:
        for key, what in MORE.items():
            if facts.get(key):
                raise ValueError(f"with {key}={facts[key]!r} takes {what}: nothing feeds them here")
        channels = facts["in_channels"] // PATCH**2
        if facts["patch_size"] != PATCH:
            raise ValueError(f"with patch_size={facts['patch_size']!r} is not known: latents are packed by 2 x 2")
        return Inputs(
            width=facts["joint_attention_dim"],
            pooled=None,
            sizes=False,
            channels=channels,
            predicted=facts["out_channels"] or facts["in_channels"],
            divisor=PATCH,
        )

    def text(self, models: Sequence[tuple[nn.Module, Any, int] | None], facts: Mapping[str, Any]) -> FamilyText:
        return QwenImageText([each for each in models if each is not None])

    def text_widths(self, configs: Sequence[Any | None], facts: Mapping[str, Any]) -> tuple[int, int | None]:
        (config,) = configs
        assert config is not None
        return config.hidden_size, None

    def call(self, network: nn.Module, x: Tensor, t: Tensor, conditioning: Mapping[str, Any]) -> Tensor:
        height, width = x.shape[2:]
        tokens: Tensor = network(
            hidden_states=pack(x),
            timestep=times_of(t, 1 / TIMES),
            encoder_hidden_states=conditioning[TEXT],
            encoder_hidden_states_mask=conditioning.get(TEXT_MASK),
            img_shapes=[[(1, height // PATCH, width // PATCH)]] * len(x),
            return_dict=False,
        )[0]
        return unpack(tokens, height, width)


class QwenImageText(FamilyText):
    """Hidden states of the last layer behind a chat's first tokens, and their mask."""

    def encode(self, prompts: list[str], *, empty: bool = False) -> dict[str, Any]:
        (model,), (tokenizer,), (length,) = self.models, self.tokenizers, self.lengths
        chats = [CHAT.format(prompt) for prompt in prompts]
        tokens = without_padding(tokenize(tokenizer, chats, length + BEFORE))
        ids, mask = (tokens[name].to(device_of(model)) for name in ("input_ids", "attention_mask"))
        hidden = model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        made = in_front(hidden.float(), mask, length + BEFORE)
        return {name: tensor[:, BEFORE:] for name, tensor in made.items()}
