"""The classes that `fuse` gives to blocks of FLUX.2 and Qwen-Image: the same parameters, another forward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffpp_fast.networks.fused_blocks import PROCESSORS, Fused, FusedLayerNorm

#: The largest number of float16, at which diffusers cuts streams off.
LARGEST = 65504


def _modulations(table: Tensor, count: int) -> tuple[Tensor, ...]:
    """[B, count D] or [B, 1, count D] -> `count` of [B, 1, D]."""
    return (table[:, None] if table.dim() == 2 else table).chunk(count, dim=-1)


def _second_half(
    norm: FusedLayerNorm, layers: Any, hidden: Tensor, attended: Tensor, gate: Tensor, modulation: Sequence[Tensor]
) -> Tensor:
    """The feed-forward half of a stream: residual, norm, feed-forward layers, residual."""
    shift, scale, ff_gate = modulation
    hidden, normed = norm.behind(hidden, attended, scale, shift, gate)
    return _cut_off(torch.addcmul(hidden, ff_gate, layers(normed)))


def _cut_off(hidden: Tensor) -> Tensor:
    return hidden.clip(-LARGEST, LARGEST) if hidden.dtype == torch.float16 else hidden


class Flux2Forward(Fused):
    """`Flux2TransformerBlock`: each residual with the modulated norm behind it."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb_mod_img: Tensor,
        temb_mod_txt: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """hidden_states [B, N, D], encoder_hidden_states [B, M, D], modulations [B, 6 D] -> text and picture."""
        if temb_mod_img.dim() == 3 and temb_mod_img.shape[1] > 1:  # a modulation for each token
            unfused: tuple[Tensor, Tensor] = super().forward(
                hidden_states, encoder_hidden_states, temb_mod_img, temb_mod_txt, image_rotary_emb,
                joint_attention_kwargs,
            )  # fmt: skip
            return unfused
        shift, scale, gate, *modulation = _modulations(temb_mod_img, 6)
        text_shift, text_scale, text_gate, *text_modulation = _modulations(temb_mod_txt, 6)
        attended, text_attended = self.attn(
            hidden_states=self.norm1(hidden_states, scale, shift),
            encoder_hidden_states=self.norm1_context(encoder_hidden_states, text_scale, text_shift),
            image_rotary_emb=image_rotary_emb,
            **(joint_attention_kwargs or {}),
        )
        text = _second_half(
            self.norm2_context, self.ff_context, encoder_hidden_states, text_attended, text_gate, text_modulation
        )
        return text, _second_half(self.norm2, self.ff, hidden_states, attended, gate, modulation)


class Flux2SingleForward(Fused):
    """`Flux2SingleTransformerBlock` with its modulated norm as one operator."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None,
        temb_mod: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        split_hidden_states: bool = False,
        text_seq_len: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """hidden_states [B, M + N, D], temb_mod [B, 3 D] -> the same shape."""
        many = temb_mod.dim() == 3 and temb_mod.shape[1] > 1
        if many or encoder_hidden_states is not None or split_hidden_states:
            unfused: Tensor | tuple[Tensor, Tensor] = super().forward(
                hidden_states, encoder_hidden_states, temb_mod, image_rotary_emb, joint_attention_kwargs,
                split_hidden_states, text_seq_len,
            )  # fmt: skip
            return unfused
        shift, scale, gate = _modulations(temb_mod, 3)
        attended = self.attn(
            hidden_states=self.norm(hidden_states, scale, shift),
            image_rotary_emb=image_rotary_emb,
            **(joint_attention_kwargs or {}),
        )
        return _cut_off(torch.addcmul(hidden_states, gate, attended))


class Flux2ParallelForward(Fused):
    """`Flux2ParallelSelfAttention` with its own processor: norms with rotary embeddings."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """hidden_states [B, N, D], two of [N, D'] -> [B, N, D]."""
        if type(self.processor).__name__ not in PROCESSORS or image_rotary_emb is None or kwargs:
            unfused: Tensor = super().forward(hidden_states, attention_mask, image_rotary_emb, **kwargs)
            return unfused
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        made = self.to_qkv_mlp_proj(hidden_states)
        both, fed = made.split([3 * self.inner_dim, made.shape[-1] - 3 * self.inner_dim], dim=-1)
        query, key, value = (part.unflatten(-1, (-1, self.head_dim)) for part in both.chunk(3, dim=-1))
        attended = dispatch_attention_fn(
            self.norm_q(query, *image_rotary_emb),
            self.norm_k(key, *image_rotary_emb),
            value,
            attn_mask=attention_mask,
            backend=self.processor._attention_backend,
            parallel_config=self.processor._parallel_config,
        )
        output: Tensor = self.to_out(torch.cat([attended.flatten(2, 3).to(made.dtype), self.mlp_act_fn(fed)], dim=-1))
        return output


class QwenImageForward(Fused):
    """`QwenImageTransformerBlock`: each residual with the modulated norm behind it."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor | None,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        modulate_index: Any = None,
    ) -> tuple[Tensor, Tensor]:
        """hidden_states [B, N, D], encoder_hidden_states [B, M, D], temb [B, D] -> text and picture, as they came."""
        if self.zero_cond_t or modulate_index is not None:
            unfused: tuple[Tensor, Tensor] = super().forward(
                hidden_states, encoder_hidden_states, encoder_hidden_states_mask, temb, image_rotary_emb,
                joint_attention_kwargs, modulate_index,
            )  # fmt: skip
            return unfused
        shift, scale, gate, *modulation = _modulations(self.img_mod(temb), 6)
        text_shift, text_scale, text_gate, *text_modulation = _modulations(self.txt_mod(temb), 6)
        attended, text_attended = self.attn(
            hidden_states=self.img_norm1(hidden_states, scale, shift),
            encoder_hidden_states=self.txt_norm1(encoder_hidden_states, text_scale, text_shift),
            encoder_hidden_states_mask=encoder_hidden_states_mask,
            image_rotary_emb=image_rotary_emb,
            **(joint_attention_kwargs or {}),
        )
        text = _second_half(
            self.txt_norm2, self.txt_mlp, encoder_hidden_states, text_attended, text_gate, text_modulation
        )
        return text, _second_half(self.img_norm2, self.img_mlp, hidden_states, attended, gate, modulation)
