"""The classes that `fuse` gives to blocks of diffusers' networks: the same parameters, another forward.

A norm is fused with what follows it through its own call, `norm(x, activation="silu")`, never by reading its
parameters from outside: under ZeRO-3 and FSDP they are whole only while the norm's forward runs. Called without the
extra arguments, a fused norm is the norm that it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from diffpp_fast import ops, transforms


class Fused(nn.Module):
    """The base of every fused class: knows the class that it took the place of."""

    unfused_class: ClassVar[type[nn.Module]]


class FusedEntrance(Fused, nn.Conv2d):
    """The first convolution of a small network, which computes in channels_last on a CPU.

    There oneDNN's convolutions read their input as it is, which in the other layout they rearrange, and its result,
    and attention's tokens are views. On a GPU the caller's layout stays.
    """

    unfused_class = nn.Conv2d

    def forward(self, input: Tensor) -> Tensor:
        """input [B, C, H, W] -> [B, C', H', W']."""
        if input.is_cpu and not transforms.functional():  # which hides the layout
            input = input.contiguous(memory_format=torch.channels_last)
        return super().forward(input)


class Transformer2DForward(Fused):
    """`Transformer2DModel` whose tokens go back to pixels in the layout of its input, without a copy of their own."""

    def _get_output_for_continuous_inputs(
        self: Any, hidden_states: Tensor, residual: Tensor, batch_size: int, height: int, width: int, inner_dim: int
    ) -> Tensor:
        """hidden_states [B, N, D], residual [B, C, H, W] -> [B, C, H, W]."""
        if not residual.is_contiguous(memory_format=torch.channels_last):
            plain: Tensor = super()._get_output_for_continuous_inputs(  # type: ignore[misc]
                hidden_states, residual, batch_size, height, width, inner_dim
            )
            return plain
        if self.use_linear_projection:
            hidden_states = self.proj_out(hidden_states)
        pixels = hidden_states.unflatten(1, (height, width)).permute(0, 3, 1, 2)
        return (pixels if self.use_linear_projection else self.proj_out(pixels)) + residual


class FusedGroupNorm(Fused, nn.GroupNorm):
    """Group norm, per-sample scale and shift and activation in one operator that keeps only its input."""

    unfused_class = nn.GroupNorm

    def forward(
        self,
        input: Tensor,
        activation: str = "identity",
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        offset: Tensor | None = None,
    ) -> Tensor:
        """input [B, C, ...] -> the same shape; with scale and shift [B, C], activation(norm (1 + scale) + shift).

        Without them an offset [B, C] is added to the input first.
        """
        if scale is None or shift is None:
            affine = self.weight, self.bias
            return ops.group_norm_silu(input, self.num_groups, *affine, self.eps, activation, offset=offset)
        if len(input) == 0 or not input.is_contiguous():
            y = ops.group_norm_silu(input, self.num_groups, self.weight, self.bias, self.eps, "identity")
            pixels = [1] * (input.dim() - 2)
            y = y * (1 + scale.reshape(*scale.shape, *pixels)) + shift.reshape(*shift.shape, *pixels)
            return nn.functional.silu(y) if activation == "silu" else y
        # A sample with its own scale and shift is as a group of channels with its own weight and bias.
        wide = torch.promote_types(input.dtype, torch.float32)
        weight, bias = 1 + scale.to(wide), shift.to(wide)
        if self.bias is not None:
            bias = bias + weight * self.bias.to(wide)
        if self.weight is not None:
            weight = weight * self.weight.to(wide)
        y = ops.group_norm_silu(
            input.flatten(0, 1)[None],
            self.num_groups * len(input),
            weight.flatten(),
            bias.flatten(),
            self.eps,
            activation,
        )
        return y.reshape(input.shape)


class FusedGroupNormSiLU(FusedGroupNorm):
    """Group norm with the SiLU that the network calls next and that is an `AbsorbedSiLU`."""

    unfused_class = nn.GroupNorm

    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(input, "silu")


class AbsorbedSiLU(Fused, nn.SiLU):
    """A SiLU that the norm before it has done."""

    unfused_class = nn.SiLU

    def forward(self, input: Tensor) -> Tensor:
        return input


class FusedLayerNorm(Fused, nn.LayerNorm):
    """Layer norm without parameters and its modulation in one operator that keeps only its input."""

    unfused_class = nn.LayerNorm

    def forward(self, input: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        """input [B, N, D], scale and shift [B, 1, D] or [B, D] -> norm (1 + scale) + shift, in their common dtype."""
        if scale is None or shift is None:
            return super().forward(input)
        return ops.ada_layer_norm(input.to(torch.promote_types(input.dtype, scale.dtype)), scale, shift, self.eps)

    def behind(
        self, residual: Tensor, branch: Tensor, scale: Tensor, shift: Tensor, gate: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return residual + gate branch and its modulated norm, in the dtype common to all.

        It reads no parameter, so it need not be the module's call.
        """
        residual = residual.to(torch.promote_types(residual.dtype, scale.dtype))
        return ops.gated_residual_norm(residual, branch, gate, scale, shift, eps=self.eps)


class ResnetForward(Fused):
    """`ResnetBlock2D` with its two pairs of norm and activation as one operator each."""

    def forward(self: Any, input_tensor: Tensor, temb: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        """input_tensor [B, C, H, W], temb [B, E] or None -> [B, C', H', W']."""
        if args or kwargs or (temb is None) != (self.time_emb_proj is None):
            # Unusual: the norms know how to be what they were.
            unfused: Tensor = super().forward(input_tensor, temb, *args, **kwargs)
            return unfused
        hidden: Tensor = self.norm1(input_tensor, activation="silu")
        resample = self.upsample or self.downsample
        if resample is not None:
            if self.upsample is not None and len(hidden) >= 64:
                # Where diffusers does, for the sake of an upsampling kernel that fails on large channels_last batches.
                input_tensor, hidden = input_tensor.contiguous(), hidden.contiguous()
            input_tensor, hidden = resample(input_tensor), resample(hidden)
        hidden = self.conv1(hidden)
        if temb is None:
            hidden = self.norm2(hidden, activation="silu")
        else:
            temb = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))
            if self.time_embedding_norm == "scale_shift":
                scale, shift = temb.chunk(2, dim=1)
                hidden = self.norm2(hidden, activation="silu", scale=scale, shift=shift)
            elif temb.dtype == hidden.dtype:
                hidden = self.norm2(hidden, activation="silu", offset=temb)
            else:
                hidden = self.norm2(hidden + temb[:, :, None, None], activation="silu")
        hidden = self.conv2(self.dropout(hidden))
        if self.conv_shortcut is not None:
            # Contiguous in training, as diffusers has it: DDP warns of gradients with other strides. CPUs keep theirs.
            rearranged = self.training and not input_tensor.is_cpu
            input_tensor = self.conv_shortcut(input_tensor.contiguous() if rearranged else input_tensor)
        output = input_tensor + hidden
        return output if self.output_scale_factor == 1.0 else output / self.output_scale_factor


class GegluForward(Fused):
    """`GEGLU` with its gate as one operator, which keeps the output of the projection only."""

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """hidden_states [..., D] -> [..., D']."""
        if args or kwargs:
            unfused: Tensor = super().forward(hidden_states, *args, **kwargs)
            return unfused
        return ops.geglu(self.proj(hidden_states))


class AdaNormSingleForward(Fused):
    """`BasicTransformerBlock` of PixArt: norms with their modulation, the second with the residual before it."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """hidden_states [B, N, D], timestep [B, 6 D] -> [B, N, D]."""
        attention = dict(cross_attention_kwargs or {})
        if timestep is None or self._chunk_size is not None or attention.get("gligen") is not None:
            unfused: Tensor = super().forward(
                hidden_states,
                attention_mask,
                encoder_hidden_states,
                encoder_attention_mask,
                timestep,
                cross_attention_kwargs,
                class_labels,
                added_cond_kwargs,
            )
            return unfused
        attention.pop("gligen", None)
        # The patch embedding is a transposed view; sums keep their first operand's strides, and every projection of
        # every block that follows would take the slow path.
        hidden_states = hidden_states.contiguous()
        table = self.scale_shift_table[None] + timestep.reshape(len(hidden_states), 6, -1)
        shift, scale, gate, ff_shift, ff_scale, ff_gate = table.chunk(6, dim=1)
        context = encoder_hidden_states if self.only_cross_attention else None
        attended = self.attend(
            hidden_states, scale, shift, encoder_hidden_states=context, attention_mask=attention_mask, **attention
        )
        if self.attn2 is None:
            hidden_states, fed = self.feed_forward(hidden_states, attended, ff_scale, ff_shift, gate)
        else:
            hidden_states = torch.addcmul(hidden_states, gate, attended)
            attended = self.attend_across(
                hidden_states,
                encoder_hidden_states=encoder_hidden_states,
                attention_mask=encoder_attention_mask,
                **attention,
            )
            hidden_states, fed = self.feed_forward(hidden_states, attended, ff_scale, ff_shift)
        return torch.addcmul(hidden_states, ff_gate, fed)

    def attend(self: Any, hidden: Tensor, scale: Tensor, shift: Tensor, **attention: Any) -> Tensor:
        """Return the self-attention of the modulated norm of hidden [B, N, D]."""
        normed = self.norm1(hidden, scale, shift)
        if self.pos_embed is not None:
            normed = self.pos_embed(normed)
        attended: Tensor = self.attn1(normed, **attention)
        return attended

    def attend_across(self: Any, hidden: Tensor, **attention: Any) -> Tensor:
        """Return the cross-attention of hidden [B, N, D]."""
        attended: Tensor = self.attn2(hidden, **attention)
        return attended

    def feed_forward(
        self: Any, hidden: Tensor, attended: Tensor, scale: Tensor, shift: Tensor, gate: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return hidden + gate attended, and the feed-forward layers of its modulated norm."""
        hidden, normed = self.norm2.behind(hidden, attended, scale, shift, gate)
        return hidden, self.ff(normed)


class FusedRMSNorm(Fused, nn.RMSNorm):
    """RMS norm of queries or keys with their rotary embedding, of neighbours, in one operator."""

    unfused_class = nn.RMSNorm

    def forward(self, x: Tensor, cos: Tensor | None = None, sin: Tensor | None = None) -> Tensor:
        """x [B, T, H, D], cos and sin [T, D] -> the same shape."""
        if cos is None or sin is None:
            return super().forward(x)
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        return ops.rms_norm_rope(x, cos, sin, self.weight, eps=eps)


#: Processors of FLUX's and Z-Image's attention that compute what the fused forwards do.
PROCESSORS = (
    "FluxAttnProcessor", "Flux2AttnProcessor", "Flux2ParallelSelfAttnProcessor", "ZSingleStreamAttnProcessor",
)  # fmt: skip


class FluxAttentionForward(Fused):
    """`FluxAttention` and `Flux2Attention` with their own processor: norms with rotary embeddings."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """hidden_states [B, N, D], encoder_hidden_states [B, M, D] or None, two of [M + N, D'] -> as they came."""
        has_text = encoder_hidden_states is not None
        plain = type(self.processor).__name__ in PROCESSORS and not self.fused_projections and not kwargs
        if not plain or image_rotary_emb is None or has_text != (self.added_kv_proj_dim is not None):
            unfused: Tensor | tuple[Tensor, Tensor] = super().forward(
                hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb, **kwargs
            )
            return unfused
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        words = encoder_hidden_states.shape[1] if encoder_hidden_states is not None else 0
        text_angles, angles = zip(*((each[:words], each[words:]) for each in image_rotary_emb), strict=True)
        query, key, value = (
            project(hidden_states).unflatten(-1, (-1, self.head_dim)) for project in (self.to_q, self.to_k, self.to_v)
        )
        query, key = self.norm_q(query, *angles), self.norm_k(key, *angles)
        if has_text:
            text_query, text_key, text_value = (
                project(encoder_hidden_states).unflatten(-1, (-1, self.head_dim))
                for project in (self.add_q_proj, self.add_k_proj, self.add_v_proj)
            )
            query = torch.cat((self.norm_added_q(text_query, *text_angles), query), dim=1)
            key = torch.cat((self.norm_added_k(text_key, *text_angles), key), dim=1)
            value = torch.cat((text_value, value), dim=1)
        attended = dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=attention_mask,
            backend=self.processor._attention_backend,
            parallel_config=self.processor._parallel_config,
        )
        attended = attended.flatten(2, 3).to(query.dtype)
        if not has_text:
            return attended
        text, image = attended[:, :words], attended[:, words:]
        for layer in self.to_out:
            image = layer(image.contiguous())
        return image, self.to_add_out(text.contiguous())


class AdaZeroForward(Fused):
    """`AdaLayerNormZero` of Stable Diffusion 3 and FLUX, with the norm and its modulation as one operator."""

    def forward(
        self: Any,
        x: Tensor,
        timestep: Tensor | None = None,
        class_labels: Tensor | None = None,
        hidden_dtype: torch.dtype | None = None,
        emb: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """x [B, N, D], emb [B, E] -> the modulated norm; gate, shift, scale and gate of what follows, [B, D]."""
        if self.emb is not None:
            emb = self.emb(timestep, class_labels, hidden_dtype=hidden_dtype)
        shift, scale, *others = self.linear(self.silu(emb)).chunk(6, dim=1)
        return self.norm(x, scale, shift), *others


class AdaZeroTwiceForward(Fused):
    """`SD35AdaLayerNormZeroX`, with each of its two modulated norms as one operator."""

    def forward(self: Any, hidden_states: Tensor, emb: Tensor | None = None) -> tuple[Tensor, ...]:
        """hidden_states [B, N, D], emb [B, E] -> a norm, four modulations of what follows, another norm, its gate."""
        shift, scale, *others, shift2, scale2, gate2 = self.linear(self.silu(emb)).chunk(9, dim=1)
        return self.norm(hidden_states, scale, shift), *others, self.norm(hidden_states, scale2, shift2), gate2


class AdaZeroSingleForward(Fused):
    """`AdaLayerNormZeroSingle` of FLUX, with the norm and its modulation as one operator."""

    def forward(self: Any, x: Tensor, emb: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x [B, N, D], emb [B, E] -> the modulated norm and the gate of what follows, [B, D]."""
        shift, scale, gate = self.linear(self.silu(emb)).chunk(3, dim=1)
        return self.norm(x, scale, shift), gate


def _feed_forward(
    norm: FusedLayerNorm,
    layers: nn.Module,
    hidden: Tensor,
    attended: Tensor,
    gate: Tensor,
    modulation: Sequence[Tensor],
) -> Tensor:
    """The second half of a stream of a joint block: residual, norm, feed-forward layers, residual."""
    shift, scale, ff_gate = modulation
    hidden, normed = norm.behind(hidden, attended, scale, shift, gate)
    return torch.addcmul(hidden, ff_gate[:, None], layers(normed))


class JointForward(Fused):
    """`JointTransformerBlock` of Stable Diffusion 3: each residual with the modulated norm behind it."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor | None, Tensor]:
        """hidden_states [B, N, D], encoder_hidden_states [B, M, D], temb [B, D] -> both, the text's None at the end."""
        if self._chunk_size is not None:
            unfused: tuple[Tensor | None, Tensor] = super().forward(
                hidden_states, encoder_hidden_states, temb, joint_attention_kwargs
            )
            return unfused
        attention = joint_attention_kwargs or {}
        # As in PixArt, the patch embedding may be a transposed view.
        hidden_states = hidden_states.contiguous()
        normed, gate, *modulation = self.norm1(hidden_states, emb=temb)
        if self.context_pre_only:
            normed_text = self.norm1_context(encoder_hidden_states, temb)
        else:
            normed_text, text_gate, *text_modulation = self.norm1_context(encoder_hidden_states, emb=temb)
        attended, text_attended = self.attn(hidden_states=normed, encoder_hidden_states=normed_text, **attention)
        if self.use_dual_attention:
            *modulation, normed, gate2 = modulation
            hidden_states = torch.addcmul(hidden_states, gate[:, None], attended)
            attended, gate = self.attn2(hidden_states=normed, **attention), gate2
        hidden_states = _feed_forward(self.norm2, self.ff, hidden_states, attended, gate, modulation)
        if self.context_pre_only:
            return None, hidden_states
        return (
            _feed_forward(
                self.norm2_context, self.ff_context, encoder_hidden_states, text_attended, text_gate, text_modulation
            ),
            hidden_states,
        )


class FluxForward(Fused):
    """`FluxTransformerBlock`: each residual with the modulated norm behind it."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """hidden_states [B, N, D], encoder_hidden_states [B, M, D], temb [B, D] -> text and image, as they came."""
        normed, gate, *modulation = self.norm1(hidden_states, emb=temb)
        normed_text, text_gate, *text_modulation = self.norm1_context(encoder_hidden_states, emb=temb)
        attended, text_attended, *adapted = self.attn(
            hidden_states=normed,
            encoder_hidden_states=normed_text,
            image_rotary_emb=image_rotary_emb,
            **(joint_attention_kwargs or {}),
        )
        hidden_states = _feed_forward(self.norm2, self.ff, hidden_states, attended, gate, modulation)
        for each in adapted:  # an IP adapter's
            hidden_states = hidden_states + each
        text = _feed_forward(
            self.norm2_context, self.ff_context, encoder_hidden_states, text_attended, text_gate, text_modulation
        )
        return text.clip(-65504, 65504) if text.dtype == torch.float16 else text, hidden_states


_made: dict[tuple[type[Fused], type[nn.Module]], type[nn.Module]] = {}


def fused_class(forward: type[Fused], base: type[nn.Module]) -> type[nn.Module]:
    """`base` with the forward of another class; made when it is first needed, for diffusers is imported late."""
    if (forward, base) not in _made:
        facts = {"unfused_class": base, "__module__": __name__, "__doc__": forward.__doc__}
        _made[forward, base] = type(f"Fused{base.__name__}", (forward, base), facts)
    return _made[forward, base]
