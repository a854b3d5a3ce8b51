"""The classes that `fuse` gives to blocks of diffusers' networks: the same parameters, another forward.

A norm is fused with what follows it through its own call, `norm(x, activation="silu")`, never by reading its
parameters from outside: under ZeRO-3 and FSDP they are whole only while the norm's forward runs. Called without the
extra arguments, a fused norm is the norm that it was.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from diffpp_fast import ops


class Fused(nn.Module):
    """The base of every fused class: knows the class that it took the place of."""

    unfused_class: ClassVar[type[nn.Module]]


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
        """input [B, N, D], scale and shift [B, 1, D] -> norm (1 + scale) + shift, in the dtype common to all."""
        if scale is None or shift is None:
            return super().forward(input)
        return ops.ada_layer_norm(input.to(torch.promote_types(input.dtype, scale.dtype)), scale, shift, self.eps)


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
            # Contiguous in training, as diffusers has it: DDP warns of gradients with other strides.
            input_tensor = self.conv_shortcut(input_tensor.contiguous() if self.training else input_tensor)
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
    """`BasicTransformerBlock` of PixArt, with norms and their modulation as one operator each, gates with residuals."""

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
        normed = self.norm1(hidden_states, scale, shift)
        if self.pos_embed is not None:
            normed = self.pos_embed(normed)
        context = encoder_hidden_states if self.only_cross_attention else None
        attended = self.attn1(normed, encoder_hidden_states=context, attention_mask=attention_mask, **attention)
        hidden_states = torch.addcmul(hidden_states, gate, attended)
        if self.attn2 is not None:
            hidden_states = hidden_states + self.attn2(
                hidden_states,
                encoder_hidden_states=encoder_hidden_states,
                attention_mask=encoder_attention_mask,
                **attention,
            )
        return torch.addcmul(hidden_states, ff_gate, self.ff(self.norm2(hidden_states, ff_scale, ff_shift)))


_made: dict[tuple[type[Fused], type[nn.Module]], type[nn.Module]] = {}


def fused_class(forward: type[Fused], base: type[nn.Module]) -> type[nn.Module]:
    """`base` with the forward of another class; made when it is first needed, for diffusers is imported late."""
    if (forward, base) not in _made:
        facts = {"unfused_class": base, "__module__": __name__, "__doc__": forward.__doc__}
        _made[forward, base] = type(f"Fused{base.__name__}", (forward, base), facts)
    return _made[forward, base]
