"""Weights in other formats than diffusers', recognised by their names, and the way from each to one that loads."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

#: Files by their ending, which no part of the package reads.
FILES = {
    ".gguf": "GGUF, which holds quantised weights: take the model's safetensors in diffusers' format",
    ".onnx": "ONNX, a graph for inference: take the model's safetensors in diffusers' format",
    ".onnx_data": "ONNX, a graph for inference: take the model's safetensors in diffusers' format",
    ".msgpack": "Flax's format: convert it where flax is installed, with from_pretrained(FOLDER, from_flax=True) of a "
    "diffusers before 0.36 and save_pretrained(FOLDER), or take the model's safetensors",
    ".h5": "TensorFlow's format: take the model's safetensors",
    ".engine": "TensorRT's format, a graph for inference: take the model's safetensors in diffusers' format",
}
_PYTHON = 'python -c "import diffusers; {}"'
#: Begins the ways that need no conversion.
_START = "begin with it, by models.generator.initial_lora.path={path}; or "
_LORA = (
    _START
    + "merge it into its base once, and give MERGED as models.base: "
    + _PYTHON.format(
        "p = diffusers.DiffusionPipeline.from_pretrained('BASE'); p.load_lora_weights('{path}'); p.fuse_lora(); "
        "p.unload_lora_weights(); p.save_pretrained('MERGED')"
    )
)
_PEFT = (
    _START.replace("it,", "them,")
    + "merge them into their network once, and give OUT as models.generator.path: "
    + _PYTHON.format(
        "import peft; n = diffusers.AutoModel.from_pretrained('NETWORK'); "
        "peft.PeftModel.from_pretrained(n, '{folder}').merge_and_unload().save_pretrained('OUT')"
    )
)
_SINGLE = "convert it once, and give OUT as models.base (BASE is a pipeline of its family): " + _PYTHON.format(
    "diffusers.{kind}.from_single_file('{{path}}', config='BASE').save_pretrained('OUT')"
)
_PART = "convert it once (BASE is a pipeline of its family): " + _PYTHON.format(
    "diffusers.{kind}.from_single_file('{{path}}', config='BASE', subfolder='{part}').save_pretrained('OUT')"
)
# diffusers looks for the names that the network has in a single file.
_BARE = _PART.format(kind="UNet2DConditionModel", part="unet").replace(
    "diffusers.UNet2DConditionModel.from_single_file('{path}'",
    "import safetensors.torch as s; d = {{'model.diffusion_model.' + k: v for k, v in s.load_file('{path}').items()}}; "
    "diffusers.UNet2DConditionModel.from_single_file(d",
)
_NO_FAMILY = "it is of no family that is trained here: see docs/models.md"
_BESIDE = "it is no denoiser of its own: give the network that it goes with"
_CONFIG = "it needs the config.json that it was made with"


class Kind(NamedTuple):
    """Weights in another format.

    Attributes:
        names: a regular expression for the beginning of one of their tensors' names.
        what: they are.
        way: how to use them; {path} is where they are, {folder} the folder of that file.
    """

    names: str
    what: str
    way: str


#: The most telling first: a kohya LoRA has an LDM's names inside its own.
KINDS = (
    Kind(r"lora_(unet|te|te1|te2|transformer)_|lycoris_", "a LoRA in kohya's names, as LCM-LoRAs are", _LORA),
    Kind(r"base_model\.model\.", "adapters in peft's names", _PEFT),
    Kind(r".*\.(lora_[AB]|lora_(down|up)|lora\.(down|up))\.", "a LoRA in diffusers' names", _LORA),
    Kind(
        r".*\.weight\.(absmax|quant_)|.*\.(scale_weight|qweight|weight_scale)$",
        "quantised weights",
        "take the model's unquantised safetensors",
    ),
    Kind(
        r"conditioner\.embedders\.",
        "a single file of Stable Diffusion XL in LDM's names, as A1111 and ComfyUI have them",
        _SINGLE.format(kind="StableDiffusionXLPipeline"),
    ),
    Kind(r"(model\.)?(diffusion_model\.)?(double|single)_blocks\.", "Flux in its authors' names", _NO_FAMILY),
    Kind(r"(model\.)?(diffusion_model\.)?joint_blocks\.", "Stable Diffusion 3 in its authors' names", _NO_FAMILY),
    Kind(
        r"model\.diffusion_model\.|cond_stage_model\.",
        "a single file in LDM's names, as CompVis, A1111 and ComfyUI have them",
        _SINGLE.format(kind="StableDiffusionPipeline"),
    ),
    Kind(
        r"control_model\.|controlnet_(cond_embedding|down_blocks)\.|zero_convs\.|input_hint_block\.",
        "a ControlNet",
        _BESIDE,
    ),
    Kind(r"adapter\.|body\.\d+\.(in_conv|resnets|block)", "a T2I-Adapter", _BESIDE),
    Kind(r"image_proj(_model)?\.|ip_adapter\.", "an IP-Adapter", _BESIDE),
    Kind(
        r"diffusion_model\.(input_blocks|middle_block|output_blocks)\.\d",
        "a UNet in LDM's names",
        _PART.format(kind="UNet2DConditionModel", part="unet"),
    ),
    Kind(r"(input_blocks|middle_block|output_blocks)\.\d", "a UNet in LDM's names", _BARE),
    Kind(
        r"first_stage_model\.|(encoder|decoder)\.((down|up)\.\d|mid\.(block|attn)_)",
        "an autoencoder in LDM's names",
        _PART.format(kind="AutoencoderKL", part="vae"),
    ),
    Kind(
        r"y_embedder\.|x_embedder\.proj\.",
        "a DiT in its authors' names (PixArt, DiT)",
        "convert it with scripts/convert_pixart_alpha_to_diffusers.py of diffusers' repository",
    ),
    Kind(
        r"time_embedding\.cond_proj\.",
        "an LCM UNet, which is told the guidance scale",
        "nothing feeds that input here: take the network that it was distilled from",
    ),
    Kind(
        r"(encoder|decoder)\.(down_blocks|up_blocks|mid_block|conv_in)\.",
        "an autoencoder",
        "give it as models.decoder.path, in a folder with its config.json",
    ),
    Kind(
        r"text_model\.|encoder\.(block|layers?)\.|shared\.weight|embeddings\.",
        "a text encoder",
        "give it as models.text_encoder.path, in a folder with its config.json",
    ),
    Kind(r"(down|up)_blocks\.|mid_block\.", "another UNet in diffusers' names", _CONFIG),
    Kind(r"(transformer_)?blocks\.\d", "a transformer of another architecture", _CONFIG),
    Kind(r"param_groups|state\.", "an optimizer's state", "give the weights"),
)


def describe(names: Iterable[str], path: str | Path) -> str:
    """Return a clause that says what weights with these names are and what to do; "" where that isn't known."""
    known = list(names)
    for kind in KINDS:
        if any(re.match(kind.names, name) for name in known):
            return f"it looks like {kind.what}: {kind.way.format(path=path, folder=Path(path).parent)}"
    return ""


def misfit(
    names: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]], spare: Iterable[str] = ()
) -> str | None:
    """Return what is wrong with tensors for a network, the first of each kind by name; None where they fit.

    Args:
        names: shapes by name, as they are stored.
        wanted: shapes by name, as the network has them.
        spare: regular expressions of names that may be there without need.
    """
    missing = sorted(wanted.keys() - names.keys())
    unknown = sorted(name for name in names.keys() - wanted.keys() if not any(re.search(p, name) for p in spare))
    shapes = [
        f"{name} has shape {list(names[name])}, the network's {list(wanted[name])}"
        for name in sorted(wanted.keys() & names.keys())
        if tuple(names[name]) != tuple(wanted[name])
    ]
    found = [f"lacks {len(missing)} of {len(wanted)} tensors, e.g. {missing[0]}"] if missing else []
    found += [f"has {len(unknown)} that the network does not know, e.g. {unknown[0]}"] if unknown else []
    found += [f"has {len(shapes)} of another shape, e.g. {shapes[0]}"] if shapes else []
    return " and ".join(found) or None
