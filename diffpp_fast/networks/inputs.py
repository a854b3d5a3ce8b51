"""The inputs of a denoiser, read off its `config.json`; networks that ask for more are refused by name."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

from diffpp_fast.networks.families import Inputs, family_named
from diffpp_fast.networks.loading import diffusers_class

#: Inputs of `forward` that are fed, or that change nothing where they are left out and the configuration is as below.
HARMLESS = {
    "added_cond_kwargs", "attention_kwargs", "attention_mask", "class_labels", "controlnet_block_samples",
    "cross_attention_kwargs", "down_block_additional_residuals", "down_intrablock_additional_residuals",
    "encoder_attention_mask", "encoder_hidden_states", "guidance", "hidden_states", "joint_attention_kwargs",
    "mid_block_additional_residual", "return_dict", "sample", "timestep", "timestep_cond",
}  # fmt: skip
#: Transformers that were trained by flow matching alone.
FLOW = ("AuraFlowTransformer2DModel", "Lumina2Transformer2DModel", "PRXTransformer2DModel", "SanaTransformer2DModel")
#: The networks that have more channels going in than coming out.
EXTRA_CHANNELS = {
    9: "inpainting: it also takes a mask and the masked picture",
    8: "InstructPix2Pix: it also takes the picture that is edited",
    7: "an upscaler: it also takes the small picture",
    5: "depth to image: it also takes a depth map",
}


def inputs_of(config: Mapping[str, Any], path: str) -> Inputs:
    """Return what a denoiser's configuration asks for.

    Args:
        config: the content of its `config.json`; what that leaves open is the default of the class.
        path: of the network, for messages.

    Raises ValueError for a network that asks for anything that is not fed here, and for what is no such network.
    """
    kind = diffusers_class(config, path, "ModelMixin")
    facts = with_defaults(config, kind)
    family = family_named(kind.__name__)
    if family is not None:
        try:
            return family.inputs(facts)
        except ValueError as error:
            raise ValueError(f"{path}: {kind.__name__} {error}") from None
    said = _foreign(kind) or _unfed(kind.__name__, facts)
    if said is not None:
        raise ValueError(f"{path}: {kind.__name__} {said}")
    pooled = None
    if facts.get("addition_embed_type") == "text_time":
        pooled = facts["projection_class_embeddings_input_dim"] - 6 * facts["addition_time_embed_dim"]
    channels: int = facts["in_channels"]
    return Inputs(
        width=_width(facts),
        pooled=pooled,
        sizes=wants_sizes(config),
        channels=channels,
        predicted=facts.get("out_channels") or channels,
        divisor=facts.get("patch_size") or 1,
        patches=facts.get("pos_embed_max_size") if kind.__name__ == "AuraFlowTransformer2DModel" else None,
    )


def with_defaults(config: Mapping[str, Any], kind: Any) -> dict[str, Any]:
    """Return a configuration with the defaults of its class where it leaves a key open."""
    parameters = inspect.signature(kind.__init__).parameters.values()
    return {each.name: each.default for each in parameters if each.default is not each.empty} | dict(config)


def is_pixart(config: Mapping[str, Any]) -> bool:
    """Return whether a network is PixArt's, whose folders were written before diffusers gave it a class of its own."""
    return config.get("_class_name") in ("PixArtTransformer2DModel", "Transformer2DModel")


def wants_sizes(config: Mapping[str, Any]) -> bool:
    """Return whether a network is told resolution and aspect ratio, as PixArt's at 1024 are."""
    wanted = config.get("use_additional_conditions")
    return is_pixart(config) and bool(config.get("sample_size") == 128 if wanted is None else wanted)


def _foreign(kind: Any) -> str | None:
    """Say what makes a class none that is called with latents, time and hidden states of text."""
    taken = [name for name in inspect.signature(kind.forward).parameters if name != "self"]
    if not {"timestep", "encoder_hidden_states"} <= set(taken) or not {"sample", "hidden_states"} & set(taken):
        return "is no denoiser that takes latents, a time and hidden states of text"
    if re.search(r"[13]D|Motion|Spatio", kind.__name__):
        return "is a network for video or sound: latents are [B, C, H, W] here"
    more = [name for name in taken if name not in HARMLESS]
    return f"takes {' and '.join(more)}, which nothing feeds here" if more else None


def _unfed(name: str, facts: Mapping[str, Any]) -> str | None:
    def stated(key: str) -> str:
        return f"with {key}={facts[key]!r}"

    if facts.get("time_cond_proj_dim") is not None:
        return (
            f"{stated('time_cond_proj_dim')} is told the guidance scale, as LCM's UNets are, which nothing feeds here: "
            "take the network that it was distilled from, or merge an LCM-LoRA into it"
        )
    for key in ("guidance_embeds", "guidance_embed"):
        if facts.get(key):
            return f"{stated(key)} is told the guidance scale, which nothing feeds here: take one without it"
    for key in ("class_embed_type", "num_class_embeds"):
        if facts.get(key) is not None:
            return f"{stated(key)} takes class labels (or noise levels), which nothing feeds here"
    if facts.get("addition_embed_type") not in (None, "text", "text_time"):
        return f"{stated('addition_embed_type')} takes conditions that nothing feeds here: known is text_time"
    if facts.get("encoder_hid_dim_type") not in (None, "text_proj"):
        return (
            f"{stated('encoder_hid_dim_type')} takes pictures' embeddings (IP-Adapter, Kandinsky): nothing feeds them"
        )
    if name == "Transformer2DModel" and (facts.get("norm_type") != "ada_norm_single" or not facts.get("patch_size")):
        return f"{stated('norm_type')} is no PixArt: it takes class labels, or codes in place of latents"
    channels, predicted = facts.get("in_channels"), facts.get("out_channels")
    if channels != predicted and predicted == 4 and channels in EXTRA_CHANNELS:
        return f"{stated('in_channels')} is one for {EXTRA_CHANNELS[channels]}, which nothing feeds here"
    return None


def _width(facts: Mapping[str, Any]) -> int | None:
    for key in ("encoder_hid_dim", "caption_channels", "cross_attention_dim"):
        if isinstance(facts.get(key), int):
            return int(facts[key])
    # One for each block, of which diffusers' own pipelines feed all with the same text.
    widths = facts.get("cross_attention_dim")
    return widths[0] if isinstance(widths, (list, tuple)) and len(set(widths)) == 1 else None
