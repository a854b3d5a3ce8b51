"""Flan-T5 as a frozen function of embeddings: both stacks in batches, without its tables of attention weights.

Source: modeling_t5.py of transformers. There the last layer of a feedforward part, `wo`, may be float32 beside 16-bit
others; here all weights are of one dtype, and `wo` may be stored in 8 or 4 bits like the rest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffpp_fast.rewards.towers import rms_normed, run_block

#: Flan-T5 XXL and XL (config.json of google/flan-t5-xxl and google/flan-t5-xl).
FLAN_T5: dict[str, dict[str, Any]] = {
    "xxl": {"d_model": 4096, "d_ff": 10240, "num_heads": 64, "num_layers": 24, "vocab_size": 32128},
    "xl": {"d_model": 2048, "d_ff": 5120, "num_heads": 32, "num_layers": 24, "vocab_size": 32128},
}
#: What they have in common, and no shape in a file tells.
_COMMON = {"feed_forward_proj": "gated-gelu", "relative_attention_max_distance": 128, "tie_word_embeddings": False}
#: What decoding begins with, which is also what sequences are padded with.
PAD = 0


class FlanT5(nn.Module):
    """Encoder and decoder of a `T5ForConditionalGeneration`, frozen.

    Attention is not scaled; a table of relative positions, which the first block of each stack has, is added instead.

    Args:
        model: transformers'; its submodules are called, its own forward is not.
        checkpoint: compute each block again in the backward pass, and keep its input alone.
    """

    def __init__(self, model: Any, checkpoint: bool) -> None:
        super().__init__()
        self.shared, self.encoder, self.decoder, self.lm_head = (
            model.shared,
            model.encoder,
            model.decoder,
            model.lm_head,
        )
        for stack in (self.encoder, self.decoder):
            stack._modules.pop("embed_tokens", None)  # it is `shared`
        self.checkpoint = checkpoint
        self.heads: int = model.config.num_heads
        self.farthest: int = model.config.relative_attention_max_distance

    @property
    def dtype(self) -> torch.dtype:
        weight: Tensor = self.shared.weight
        return weight.dtype

    def embed(self, ids: Tensor) -> Tensor:
        """ids [B, L] -> [B, L, D], without gradient."""
        tokens: Tensor = self.shared(ids)
        return tokens

    def encode(self, x: Tensor, seen: Tensor) -> Tensor:
        """Embeddings [B, L, D], and whether each is attended to, [B, L] bool -> [B, L, D]."""
        table = self._table(self.encoder, x.shape[1], both_ways=True)
        bias = table.masked_fill(~seen[:, None, None], -math.inf)
        for block in self.encoder.block:
            x = run_block(self._encoder_block, block, x, bias, checkpoint=self.checkpoint)
        return rms_normed(self.encoder.final_layer_norm, x)

    def decode(self, ids: Tensor, memory: Tensor, seen: Tensor) -> Tensor:
        """Tokens [B, N] of an answer, and what `encode` gave of the question -> their logits [B, N, V], each after the
        tokens before it."""
        x = self.embed(F.pad(ids[:, :-1], (1, 0), value=PAD))
        table = self._table(self.decoder, x.shape[1], both_ways=False)
        later = torch.ones(table.shape[2:], dtype=torch.bool, device=x.device).triu(1)
        bias = table.masked_fill(later, -math.inf)
        for block in self.decoder.block:
            given = block, x, memory, bias, seen[:, None, None]
            x = run_block(self._decoder_block, *given, checkpoint=self.checkpoint)
        logits: Tensor = self.lm_head(rms_normed(self.decoder.final_layer_norm, x))
        return logits

    def _encoder_block(self, block: Any, x: Tensor, bias: Tensor) -> Tensor:
        attention, feedforward = block.layer
        normed = rms_normed(attention.layer_norm, x)
        x = x + self._attend(attention.SelfAttention, normed, normed, bias)
        return x + _fed(feedforward, x)

    def _decoder_block(self, block: Any, x: Tensor, memory: Tensor, bias: Tensor, seen: Tensor) -> Tensor:
        attention, cross, feedforward = block.layer
        normed = rms_normed(attention.layer_norm, x)
        x = x + self._attend(attention.SelfAttention, normed, normed, bias)
        x = x + self._attend(cross.EncDecAttention, rms_normed(cross.layer_norm, x), memory, seen)
        return x + _fed(feedforward, x)

    def _attend(self, attention: Any, x: Tensor, source: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (
            layer(states).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for layer, states in ((attention.q, x), (attention.k, source), (attention.v, source))
        )
        context = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)
        attended: Tensor = attention.o(context.transpose(1, 2).flatten(2))
        return attended

    def _table(self, stack: Any, length: int, both_ways: bool) -> Tensor:
        """Numbers that are added to the attention's logits, [1, heads, L, L]."""
        weights = stack.block[0].layer[0].SelfAttention.relative_attention_bias.weight
        place = torch.arange(length, device=weights.device)
        found = buckets(place - place[:, None], len(weights), self.farthest, both_ways)
        return F.embedding(found, weights).permute(2, 0, 1)[None]


def buckets(distance: Tensor, count: int, farthest: int, both_ways: bool) -> Tensor:
    """The rows of T5's table for distances from a token to the one that it attends to, int64.

    Half of the rows are for one distance each, the others for ranges that grow with it, up to `farthest`. A decoder's
    are all for tokens before; an encoder's are half for those after.
    """
    after = torch.zeros_like(distance)
    if both_ways:
        count //= 2
        after, distance = count * (distance > 0), distance.abs()
    else:
        distance = (-distance).clamp(min=0)
    single = count // 2
    grown = (distance.clamp(min=1).float() / single).log() / math.log(farthest / single) * (count - single)
    return after + torch.where(distance < single, distance, (single + grown.long()).clamp(max=count - 1))


def sizes_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Arguments of transformers' `T5Config` for weights of these shapes, by the names of its state dict.

    Where the names are others, the sizes of Flan-T5 XL, so that fitting them says what is missing.
    """
    first = "encoder.block.0.layer"
    keys = (
        "shared.weight",
        f"{first}.0.SelfAttention.relative_attention_bias.weight",
        f"{first}.0.SelfAttention.q.weight",
        f"{first}.1.DenseReluDense.wi_0.weight",
    )
    if any(len(shapes.get(key, ())) != 2 for key in keys):
        return FLAN_T5["xl"] | _COMMON
    (rows, width), (positions, heads), (inner, _), (wide, _) = (shapes[key] for key in keys)
    layers, decoder = (
        len({name.split(".")[2] for name in shapes if name.startswith(f"{stack}.block.")})
        for stack in ("encoder", "decoder")
    )
    return _COMMON | {
        **{"vocab_size": rows, "d_model": width, "d_ff": wide, "d_kv": inner // heads, "num_heads": heads},
        **{"num_layers": layers, "num_decoder_layers": decoder, "relative_attention_num_buckets": positions},
    }


def known_sizes(name: str) -> dict[str, Any]:
    """Arguments of `T5Config` for "xxl" or "xl"."""
    return FLAN_T5[name] | _COMMON


def _fed(part: Any, x: Tensor) -> Tensor:
    layers, normed = part.DenseReluDense, rms_normed(part.layer_norm, x)
    output: Tensor = layers.wo(F.gelu(layers.wi_0(normed), approximate="tanh") * layers.wi_1(normed))
    return output
