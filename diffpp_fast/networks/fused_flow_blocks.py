"""The classes that `fuse` gives to blocks of FLUX.2, Qwen-Image, Z-Image and Sana: other forwards alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import rms_norm

from diffpp_fast import ops, transforms
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


def _in_dtype_of(weight: Tensor | None, values: Tensor) -> Tensor:
    """Values as diffusers' RMS norm returns them, which rounds to weights of 16 bits and to no others."""
    half = weight is not None and weight.dtype in (torch.float16, torch.bfloat16)
    return values.to(weight.dtype) if weight is not None and half else values


class RmsNormForward(Fused):
    """diffusers' `RMSNorm`, torch's kernel in place of seven; behind a gated residual with its modulation, one."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        scale: Tensor | None = None,
        residual: Tensor | None = None,
        gate: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """hidden_states [B, N, D], scale and gate [B, 1, D] -> norm (1 + scale).

        With a residual [B, N, D]: h = residual + gate hidden_states, and its norm (1 + scale).
        """
        weight = self.weight
        if residual is not None:
            options = {"norm": "rms", "weight": weight, "eps": self.eps}
            hidden, normed = ops.gated_residual_norm(residual, hidden_states, gate, scale, **options)
            return hidden, _in_dtype_of(weight, normed)
        if weight is None or transforms.active():
            normed = super().forward(hidden_states)
        else:
            wide = torch.promote_types(hidden_states.dtype, weight.dtype)
            normed = rms_norm(hidden_states.to(wide), weight.shape, weight.to(wide), self.eps)
            normed = _in_dtype_of(weight, normed)
        return normed if scale is None else normed * (1.0 + scale)


class RotatedNormForward(Fused):
    """diffusers' `RMSNorm` of queries or keys with their rotary embedding, of neighbours, in one operator."""

    def forward(self: Any, hidden_states: Tensor, cos: Tensor | None = None, sin: Tensor | None = None) -> Tensor:
        """hidden_states [B, T, H, D], cos and sin [B, T, D] -> the same shape."""
        if cos is None or sin is None:
            unfused: Tensor = super().forward(hidden_states)
            return unfused
        rotated = ops.rms_norm_rope(hidden_states, cos, sin, self.weight, eps=self.eps)
        return _in_dtype_of(self.weight, rotated)


#: What rotates a Z-Image network's queries and keys: complex factors [B, T, D / 2], and cosines and sines [B, T, D],
#: which all fused blocks share.
Turns = tuple[Tensor, Tensor, Tensor]


def turns_of(factors: Tensor) -> Turns:
    """Complex factors [B, T, D / 2] -> themselves, and the cosines and sines of both elements of a pair."""
    return factors, factors.real.repeat_interleave(2, -1), factors.imag.repeat_interleave(2, -1)


class ZImageAttentionForward(Fused):
    """`Attention` of Z-Image with its own processor: norms with rotary embeddings."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        freqs_cis: Tensor | Turns | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """hidden_states [B, N, D] -> the same shape; a mask [B, N] is true where tokens are attended to."""
        plain = type(self.processor).__name__ in PROCESSORS and not kwargs
        if not plain or freqs_cis is None or encoder_hidden_states is not None:
            unfused: Tensor = super().forward(
                hidden_states, encoder_hidden_states, attention_mask, freqs_cis=factors_of(freqs_cis), **kwargs
            )
            return unfused
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        _, cos, sin = freqs_cis if isinstance(freqs_cis, tuple) else turns_of(freqs_cis)
        query, key, value = (
            project(hidden_states).unflatten(-1, (self.heads, -1)) for project in (self.to_q, self.to_k, self.to_v)
        )
        if attention_mask is not None and attention_mask.dim() == 2:
            attention_mask = attention_mask[:, None, None, :]
        attended = dispatch_attention_fn(
            self.norm_q(query, cos, sin),
            self.norm_k(key, cos, sin),
            value,
            attn_mask=attention_mask,
            backend=self.processor._attention_backend,
            parallel_config=self.processor._parallel_config,
        )
        output = attended.flatten(2, 3)
        for layer in self.to_out:
            output = layer(output)
        return output


def factors_of(turns: Tensor | Turns | None) -> Tensor | None:
    """Return the complex factors, which blocks that are not fused take."""
    return turns[0] if isinstance(turns, tuple) else turns


class ZImageForward(Fused):
    """`ZImageTransformerBlock`: its first residual with the modulated norm behind it."""

    def forward(
        self: Any,
        x: Tensor,
        attn_mask: Tensor | None,
        freqs_cis: Tensor | Turns,
        adaln_input: Tensor | None = None,
        noise_mask: Tensor | None = None,
        adaln_noisy: Tensor | None = None,
        adaln_clean: Tensor | None = None,
    ) -> Tensor:
        """x [B, N, D], adaln_input [B, E] -> the same shape."""
        if noise_mask is not None:  # a modulation for each token
            unfused: Tensor = super().forward(
                x, attn_mask, factors_of(freqs_cis), adaln_input, noise_mask, adaln_noisy, adaln_clean
            )
            return unfused
        scale = gate = ff_scale = ff_gate = None
        if self.modulation:
            scale, gate, ff_scale, ff_gate = self.adaLN_modulation(adaln_input)[:, None].chunk(4, dim=2)
            gate, ff_gate = gate.tanh(), ff_gate.tanh()
        rotates = isinstance(self.attention, ZImageAttentionForward)
        turns = freqs_cis if rotates else factors_of(freqs_cis)
        attended = self.attention(self.attention_norm1(x, scale), attention_mask=attn_mask, freqs_cis=turns)
        x, normed = self.ffn_norm1(self.attention_norm2(attended), ff_scale, residual=x, gate=gate)
        fed = self.ffn_norm2(self.feed_forward(normed))
        return x + fed if ff_gate is None else torch.addcmul(x, ff_gate, fed)


class ZImageLastForward(Fused):
    """The last layer of Z-Image, with its norm and the scale of it as one operator."""

    def forward(
        self: Any, x: Tensor, c: Tensor | None = None, noise_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """x [B, N, D], c [B, E] -> [B, N, C]."""
        if c is None or noise_mask is not None:
            unfused: Tensor = super().forward(x, c, noise_mask, **kwargs)
            return unfused
        scale = self.adaLN_modulation(c)
        output: Tensor = self.linear(self.norm_final(x, scale, torch.zeros_like(scale)))
        return output


class SanaForward(Fused):
    """`SanaTransformerBlock`: its norms with their modulation, the second with the residual before it."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> Tensor:
        """hidden_states [B, N, D], timestep [B, 6 D], N = height width -> the same shape."""
        assert timestep is not None
        # As in PixArt, the patch embedding is a transposed view.
        hidden_states = hidden_states.contiguous()
        table = self.scale_shift_table[None] + timestep.reshape(len(hidden_states), 6, -1)
        shift, scale, gate, ff_shift, ff_scale, ff_gate = table.chunk(6, dim=1)
        normed = self.norm1(hidden_states, scale, shift).to(hidden_states.dtype)
        hidden_states = torch.addcmul(hidden_states, gate, self.attn1(normed))
        attended = self.attn2(
            hidden_states, encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask
        )
        hidden_states, normed = self.norm2.behind(hidden_states, attended, ff_scale, ff_shift)
        fed = self.ff(normed.unflatten(1, (height, width)).permute(0, 3, 1, 2))
        return torch.addcmul(hidden_states, ff_gate, fed.flatten(2).transpose(1, 2))


class SanaLastForward(Fused):
    """`SanaModulatedNorm` as one operator."""

    def forward(self: Any, hidden_states: Tensor, temb: Tensor, scale_shift_table: Tensor) -> Tensor:
        """hidden_states [B, N, D], temb [B, D], scale_shift_table [2, D] -> the same shape."""
        shift, scale = (scale_shift_table[None] + temb[:, None]).chunk(2, dim=1)
        normed: Tensor = self.norm(hidden_states, scale, shift)
        return normed
