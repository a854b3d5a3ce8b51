"""Text encoders that are language models, to which a prompt is a user's message in a chat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from diffpp_fast.networks.conditioning import TEXT, TEXT_MASK
from diffpp_fast.networks.families.base import FamilyText, device_of
from diffpp_fast.networks.tokens import tokenize, without_padding


class ChatText(FamilyText):
    """The base of families' text from one language model and its tokenizer's chat template.

    Attributes:
        thinks: what the template is told of `enable_thinking`.

    Raises ValueError for a tokenizer without a template.
    """

    thinks: bool

    def __init__(self, models: Sequence[tuple[nn.Module, Any, int]]) -> None:
        super().__init__(models)
        if not getattr(self.tokenizers[0], "chat_template", None):
            raise ValueError(f"its tokenizer, a {type(self.tokenizers[0]).__name__}, has no chat template")

    def read(self, prompts: list[str], *, padded: bool = True) -> tuple[Sequence[Tensor], Tensor]:
        """B prompts -> hidden states [B, N, C] after the embedding and after each layer, and their mask [B, N].

        Args:
            prompts: B of them.
            padded: False leaves out padding behind the longest prompt.
        """
        (model,), (tokenizer,), (length,) = self.models, self.tokenizers, self.lengths
        chats = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}],
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=self.thinks,
            )
            for prompt in prompts
        ]
        tokens: Mapping[str, Tensor] = tokenize(tokenizer, chats, length)
        if not padded:
            tokens = without_padding(tokens)
        ids, mask = (tokens[name].to(device_of(model)) for name in ("input_ids", "attention_mask"))
        output = model(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
        return output.hidden_states, mask


def in_front(hidden: Tensor, mask: Tensor, length: int) -> dict[str, Any]:
    """Return hidden states [B, N, C] and their mask [B, N], tokens before padding, which are zeros up to `length`."""
    order = mask.argsort(dim=1, descending=True, stable=True)
    mask = mask.gather(1, order)
    hidden = hidden.gather(1, order[:, :, None].expand_as(hidden))
    missing = length - mask.shape[1]
    hidden = torch.where(mask[:, :, None].bool(), hidden, 0.0)
    return {TEXT: pad(hidden, (0, 0, 0, missing)), TEXT_MASK: pad(mask, (0, missing))}
