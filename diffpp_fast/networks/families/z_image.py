"""Z-Image: Qwen3's hidden states of a chat, as many as a prompt has tokens; time and sign run the other way.

As `ZImagePipeline` of diffusers computes it: the network is told 1 - t / 1000, which is 0 at pure noise, and predicts
x0 - eps. Text are the hidden states before Qwen3's last layer. The empty prompt is a chat like any other. The
pipeline's `guidance_scale` counts from 0: its s is our 1 + s.

diffusers calls the network with a list of samples, each with text of its own length. Here it is called with tensors
[B, ...] and a mask, and nothing waits for the device to know a length: text of any length takes the places of the
longest, and attention leaves out what the lists would not have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from diffpp_fast.networks.conditioning import TEXT, TEXT_MASK
from diffpp_fast.networks.families.base import EncoderKind, Family, FamilyText, Inputs
from diffpp_fast.networks.families.chat import ChatText, in_front

#: Text and picture are each filled up to a multiple of so many tokens, with learned ones that are attended to.
LOT = 32
#: The patch of the released networks, and the only one that the pipeline asks for.
PATCH = 2
TIMES = 1000


class ZImage(Family):
    """ZImageTransformer2DModel without pictures among its conditions."""

    kinds = ("ZImageTransformer2DModel",)
    pipelines = ("ZImagePipeline",)
    name = "Z-Image"
    encoders = (EncoderKind(("qwen3",), "AutoModel", 512),)
    masked = True
    times = TIMES
    sample_size = 128
    unguided = "guidance_scale=0.0"
    last_layer = f"all_final_layer.{PATCH}-1.linear"

    def inputs(self, facts: Mapping[str, Any]) -> Inputs:
        if facts["siglip_feat_dim"] is not None:
            raise ValueError(
                f"with siglip_feat_dim={facts['siglip_feat_dim']!r} takes pictures' embeddings, which nothing feeds "
                "here: take the text-to-image network"
            )
        if (PATCH, 1) not in zip(facts["all_patch_size"], facts["all_f_patch_size"], strict=False):
            raise ValueError(f"with all_patch_size={facts['all_patch_size']!r} has no patches of {PATCH} x {PATCH}")
        return Inputs(
            width=facts["cap_feat_dim"],
            pooled=None,
            sizes=False,
            channels=facts["in_channels"],
            predicted=facts["in_channels"],
            divisor=PATCH,
            side=min(facts["axes_lens"][1:]),
        )

    def text(self, models: Sequence[tuple[nn.Module, Any, int] | None], facts: Mapping[str, Any]) -> FamilyText:
        parts = [each for each in models if each is not None]
        places, length = facts["axes_lens"][0], parts[0][2]
        if length + -length % LOT + 1 >= places:
            raise ValueError(f"max_length is {length}, and the network has places for fewer than {places} tokens")
        return ZImageText(parts)

    def text_widths(self, configs: Sequence[Any | None], facts: Mapping[str, Any]) -> tuple[int, int | None]:
        (config,) = configs
        assert config is not None
        return config.hidden_size, None

    def prepare(self, network: nn.Module) -> None:
        kind: Any = type(network)
        if not issubclass(kind, _Batched):
            network.__class__ = _batched(kind)

    def call(self, network: nn.Module, x: Tensor, t: Tensor, conditioning: Mapping[str, Any]) -> Tensor:
        time = (TIMES - t.to(torch.float32)) / TIMES
        prediction: Tensor = network(x, time, conditioning[TEXT], cap_mask=conditioning.get(TEXT_MASK))
        return -prediction


class ZImageText(ChatText):
    """Hidden states before the last layer, and their mask."""

    thinks = True

    def encode(self, prompts: list[str], *, empty: bool = False) -> dict[str, Any]:
        states, mask = self.read(prompts, padded=False)
        return in_front(states[-2].float(), mask, self.lengths[0])


class _Batched(nn.Module):
    """Z-Image's network, called with a batch; a list goes the way of diffusers."""

    def forward(self: Any, x: Any, t: Tensor, cap_feats: Any, *args: Any, **kwargs: Any) -> Any:
        """x [B, C, H, W], t [B] in [0, 1], text [B, N, D], `cap_mask` [B, N] -> x0 - eps, [B, C, H, W]."""
        if isinstance(x, list):
            return self._listed(x, t, cap_feats, *args, **kwargs)
        mask = kwargs["cap_mask"]
        batch, channels, height, width = x.shape
        rows, columns = height // PATCH, width // PATCH
        count = rows * columns
        time = self.t_embedder(t * self.t_scale).type_as(x)

        # The picture begins behind the text's last place, the filled up ones included.
        lengths = cap_feats.new_full((batch,), cap_feats.shape[1], dtype=torch.int64) if mask is None else mask.sum(1)
        filled = (lengths + LOT - 1) // LOT * LOT
        patches = (
            x.view(batch, channels, rows, PATCH, columns, PATCH).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        )
        picture = self.all_x_embedder[f"{PATCH}-1"](patches)
        missing = -count % LOT
        picture = torch.cat([picture, self.x_pad_token.to(picture.dtype).expand(batch, missing, -1)], dim=1)
        picture_turns = self._turns(_places_of_picture(filled + 1, rows, columns, missing))
        for layer in self.noise_refiner:
            picture = _run(self, layer, picture, None, picture_turns, time)

        text = self.cap_embedder(pad(cap_feats, (0, 0, 0, -cap_feats.shape[1] % LOT)))
        places = torch.arange(text.shape[1], device=x.device)
        text = torch.where((places < lengths[:, None])[:, :, None], text, self.cap_pad_token.to(text.dtype))
        seen = places < filled[:, None]
        text_turns = self._turns(torch.stack([places + 1, 0 * places, 0 * places], dim=1).expand(batch, -1, -1))
        for layer in self.context_refiner:
            text = _run(self, layer, text, seen, text_turns)

        both = torch.cat([picture, text], dim=1)
        turns = torch.cat([picture_turns, text_turns], dim=1)
        seen = pad(seen, (picture.shape[1], 0), value=True)
        for layer in self.layers:
            both = _run(self, layer, both, seen, turns, time)
        made = self.all_final_layer[f"{PATCH}-1"](both[:, :count], c=time)
        made = made.view(batch, rows, columns, PATCH, PATCH, self.out_channels).permute(0, 5, 1, 3, 2, 4)
        return made.reshape(batch, self.out_channels, height, width)

    def _turns(self: Any, places: Tensor) -> Tensor:
        """Rotary factors [B, N, D / 2] of places [B, N, 3]."""
        factors: Tensor = self.rope_embedder(places.flatten(0, 1)).unflatten(0, places.shape[:2])
        return factors


def _places_of_picture(first: Tensor, rows: int, columns: int, missing: int) -> Tensor:
    """Places [B, N, 3] of patches: the text's next one [B], row, column; (0, 0, 0) of those that fill up."""
    row, column = torch.meshgrid(
        torch.arange(rows, device=first.device), torch.arange(columns, device=first.device), indexing="ij"
    )
    grid = torch.stack([row.flatten(), column.flatten()], dim=1).expand(len(first), -1, -1)
    return pad(torch.cat([first[:, None, None].expand(-1, grid.shape[1], 1), grid], dim=2), (0, 0, 0, missing))


def _run(network: Any, layer: nn.Module, *inputs: Any) -> Any:
    if torch.is_grad_enabled() and network.gradient_checkpointing:
        return network._gradient_checkpointing_func(layer, *inputs)
    return layer(*inputs)


@cache
def _batched(kind: Any) -> type:
    """Return the class of a network with the batched call."""
    return type(kind.__name__, (_Batched, kind), {"_listed": kind.forward, "__module__": kind.__module__})
