"""Rewards by name, from a hub id or a local path; what the configuration of a run calls as a factory."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffpp_fast.arguments import number
from diffpp_fast.errors import ConfigurationError
from diffpp_fast.few_bits import need_bitsandbytes, quantize_linears
from diffpp_fast.ops.reward_pixels import CLAMPS
from diffpp_fast.rewards.base import Preprocessing, Reward, Scorer
from diffpp_fast.rewards.clip_model import Clip, load_open_clip, load_transformers_clip
from diffpp_fast.rewards.combine import Margin, Mixture, Normalized
from diffpp_fast.rewards.files import locate
from diffpp_fast.rewards.hpsv3_model import HPSv3, load_hpsv3
from diffpp_fast.rewards.mps_model import MPS, OVERALL, load_mps
from diffpp_fast.rewards.qwen2vl import Qwen2VL
from diffpp_fast.rewards.scores import AestheticReward, CosineReward, ImageReward, load_head, load_imagereward
from diffpp_fast.rewards.text import (
    clean_like_clip,
    load_bert_tokenizer,
    load_clip_tokenizer,
    load_qwen_tokenizer,
    load_t5_tokenizer,
    need_ftfy,
)
from diffpp_fast.rewards.user_code import call_factory
from diffpp_fast.rewards.vqascore_model import FILES, VQAScore, load_vqascore
from diffpp_fast.user_paths import real_path

CLIP_L_14 = "openai/clip-vit-large-patch14"
CLIP_H_14 = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
_HPS_FILES = {"2.0": "HPS_v2_compressed.pt", "2.1": "HPS_v2.1_compressed.pt"}

Device = torch.device | str | None
Dtype = torch.dtype | str


def pickscore(
    path: str = "yuvalkirstain/PickScore_v1",
    *,
    tokenizer: str | None = None,
    device: Device = None,
    dtype: Dtype = "float32",
    clamp: str = "hard",
    checkpoint: bool = False,
) -> CosineReward:
    """PickScore v1 (arXiv 2305.01569): exp(logit_scale) cos(image, text) of a CLIP ViT-H/14; near 20, more is better.

    Source: README.md of yuvalkirstain/PickScore, and transformers' `CLIPModel`.

    Args:
        path: hub id, or a folder with config.json, model.safetensors and the tokenizer.
        tokenizer: hub id or folder, where `path` holds none.
        device: where it is put; None: the CPU.
        dtype: of the weights, "float32", "bfloat16", "float16", "float64" or torch's own; the towers compute in it.
        clamp: of pixels outside [-1, 1]: "hard" has no gradient there, "straight_through" lets it through.
        checkpoint: keep one tensor per layer for the backward pass, and compute the layers again in it.

    Raises ConfigurationError, naming the file, where something is missing or does not fit.
    """
    what, dtype = "pickscore", _options(dtype, clamp)
    model, scale = load_transformers_clip(path, what, dtype)
    towers = Clip(model, load_clip_tokenizer(tokenizer or path), scale=scale, name=what, checkpoint=checkpoint)
    return _placed(CosineReward(towers, scale, Preprocessing(towers.image_size, clamp=clamp), what), device)


def hpsv2(
    path: str = "xswu/HPSv2",
    *,
    version: str = "2.1",
    tokenizer: str = CLIP_L_14,
    device: Device = None,
    dtype: Dtype = "float32",
    clamp: str = "hard",
    checkpoint: bool = False,
    antialias: bool = True,
) -> CosineReward:
    """HPSv2 (arXiv 2306.09341): cos(image, text) of a CLIP ViT-H/14; near 0.3, more is better.

    Source: hpsv2/img_score.py and utils.py of tgxs002/HPSv2, src/open_clip/transform.py in copies of it, and
    open_clip's ViT-H-14.json.

    Args:
        path: hub id, the file HPS_v2.1_compressed.pt, or a folder that holds it; open_clip's keys are converted.
        version: "2.1" or "2.0", which file is taken from a hub id or a folder.
        tokenizer: hub id, folder or OpenAI's `bpe_simple_vocab_16e6.txt.gz`; all have the same tokens.
        antialias: the official code resizes a float tensor with torchvision's default, which antialiases since
            version 0.17; False is what older versions do.

    The rest is as for `pickscore`.
    """
    what, dtype = f"hpsv{version}", _options(dtype, clamp)
    if version not in _HPS_FILES:
        raise ConfigurationError(f"hpsv2: version must be 2.0 or 2.1, got {version!r}")
    need_ftfy(what)
    model, scale = load_open_clip(path, (_HPS_FILES[version],), what, dtype)
    words = load_clip_tokenizer(tokenizer)
    towers = Clip(model, words, scale=scale, name=what, clean=clean_like_clip, checkpoint=checkpoint)
    preprocessing = Preprocessing(towers.image_size, fit="pad", antialias=antialias, clamp=clamp)
    return _placed(CosineReward(towers, 1.0, preprocessing, what), device)


def clip(
    path: str | Clip = CLIP_L_14,
    *,
    tokenizer: str | None = None,
    device: Device = None,
    dtype: Dtype = "float32",
    clamp: str = "hard",
    checkpoint: bool = False,
) -> CosineReward:
    """CLIP score: cos(image, text), of ViT-L/14 unless `path` names another CLIP; near 0.25, more is better.

    It is neither multiplied by 2.5 nor cut at 0, as CLIPScore's paper (arXiv 2104.08718) has it, nor multiplied by 100.
    Source: ImageReward/models/CLIPScore.py of THUDM/ImageReward; clip/clip.py and clip/model.py of openai/CLIP.

    Args:
        path: hub id, a folder in transformers' format, or a `Clip`, e.g. that of another reward, to share it.

    The rest is as for `pickscore`; with a `Clip` only `clamp` is read.
    """
    dtype = _options(dtype, clamp)
    towers = (
        path if isinstance(path, Clip) else load_clip(path, tokenizer=tokenizer, dtype=dtype, checkpoint=checkpoint)
    )
    return _placed(CosineReward(towers, 1.0, Preprocessing(towers.image_size, clamp=clamp), "clip"), device)


def aesthetic(
    path: str = "trl-lib/ddpo-aesthetic-predictor",
    *,
    clip: str | Clip = CLIP_L_14,
    device: Device = None,
    dtype: Dtype = "float32",
    clamp: str = "hard",
    checkpoint: bool = False,
) -> AestheticReward:
    """LAION's improved aesthetic predictor: about 1 to 10, more is better; prompts are ignored.

    Source: simple_inference.py of christophschuhmann/improved-aesthetic-predictor.

    Args:
        path: the file sac+logos+ava1-l14-linearMSE.pth, a folder that holds it (also as aesthetic-model.pth), or a
            hub id.
        clip: CLIP ViT-L/14: hub id, folder, or the `Clip` of another reward, to share it.

    The rest is as for `pickscore`.
    """
    what, dtype = "aesthetic", _options(dtype, clamp)
    file = locate(path, ("aesthetic-model.pth", "sac+logos+ava1-l14-linearMSE.pth", "model.safetensors"), what)
    head = load_head(file, what, dtype)
    towers = clip if isinstance(clip, Clip) else load_clip(clip, dtype=dtype, checkpoint=checkpoint, text=False)
    width = towers.visual_projection.weight.shape[0]
    if width != 768:
        raise ConfigurationError(f"aesthetic: the predictor takes 768 features of ViT-L/14, this CLIP gives {width}")
    return _placed(AestheticReward(towers, head, Preprocessing(towers.image_size, clamp=clamp)), device)


def imagereward(
    path: str = "THUDM/ImageReward",
    *,
    tokenizer: str = "google-bert/bert-base-uncased",
    device: Device = None,
    dtype: Dtype = "float32",
    clamp: str = "hard",
    checkpoint: bool = False,
) -> ImageReward:
    """ImageReward v1.0 (arXiv 2304.05977): about -2.3 to 2, near standard normal, more is better.

    Source: ImageReward/ImageReward.py and train/src/models of THUDM/ImageReward, models/vit.py and med.py of
    salesforce/BLIP.

    Args:
        path: hub id, the file ImageReward.pt, or a folder that holds it.
        tokenizer: hub id, folder or vocab.txt of BERT, uncased.

    The rest is as for `pickscore`.
    """
    what, dtype = "imagereward", _options(dtype, clamp)
    vision, text, head = load_imagereward(locate(path, ("ImageReward.pt",), what), what, dtype)
    preprocessing = Preprocessing(vision.config.image_size, clamp=clamp)
    words = load_bert_tokenizer(tokenizer)
    return _placed(ImageReward(vision, text, head, words, preprocessing, checkpoint=checkpoint), device)


def mps(
    path: str = "MPS_overall_checkpoint.safetensors",
    *,
    tokenizer: str = CLIP_H_14,
    condition: str = OVERALL,
    device: Device = None,
    dtype: Dtype = "float32",
    clamp: str = "hard",
    checkpoint: bool = False,
) -> MPS:
    """MPS (CVPR 2024): exp(logit_scale) cos of a CLIP ViT-H/14 whose image tokens attend to the prompt's.

    Source: README.md, trainer/models/clip_model.py and cross_modeling.py of Kwai-Kolors/MPS.

    Args:
        path: the state dict of the released model as safetensors or with tensors alone. The release is a pickle of
            whole objects: save `torch.load(release).state_dict()` where you trust it.
        tokenizer: hub id, folder or OpenAI's `bpe_simple_vocab_16e6.txt.gz`.
        condition: what is asked for; the default is that of the released checkpoint.

    The rest is as for `pickscore`.
    """
    what, dtype = "mps", _options(dtype, clamp)
    file = locate(path, ("MPS_overall_checkpoint.safetensors", "model.safetensors"), what)
    model, cross, scale = load_mps(file, what, dtype)
    preprocessing = Preprocessing(model.config.vision_config.image_size, clamp=clamp)
    words = load_clip_tokenizer(tokenizer)
    made = MPS(
        *(model, cross, words),
        scale=scale,
        condition=condition,
        preprocessing=preprocessing,
        checkpoint=checkpoint,
    )
    return _placed(made, device)


def hpsv3(
    path: str = "MizzenAI/HPSv3",
    *,
    tokenizer: str = "Qwen/Qwen2-VL-7B-Instruct",
    length: int = 128,
    quantization: str | None = None,
    device: Device = None,
    dtype: Dtype = "bfloat16",
    clamp: str = "hard",
    checkpoint: bool = True,
) -> HPSv3:
    """HPSv3 (arXiv 2508.03789): the mean of a reward head on Qwen2-VL 7B, more is better.

    Source: hpsv3/inference.py, train.py and dataset/data_collator_qwen.py of MizzenAI/HPSv3.

    Args:
        path: hub id, the file HPSv3.safetensors, or a folder that holds it.
        tokenizer: hub id or folder of Qwen2-VL's.
        length: tokens of a prompt; a longer one loses its end. The official code cuts none.
        quantization: "nf4" or "int8": how the blocks' linear layers are stored; None: in `dtype`.
        checkpoint: keep one tensor per block for the backward pass, and compute the blocks again in it.

    The rest is as for `pickscore`.
    """
    what, dtype = "hpsv3", _options(dtype, clamp)
    _refuse_large(what, length, quantization)
    file = locate(path, ("HPSv3.safetensors",), what)
    words = load_qwen_tokenizer(tokenizer)
    model, head = load_hpsv3(file, what, dtype)
    network = Qwen2VL(model, checkpoint)
    reward = HPSv3(network, head, words, clamp=clamp, length=length)
    _quantize((network.visual.blocks, network.language_model.layers), quantization, device)
    return _placed(reward, device)


def vqascore(
    path: str = "zhiqiulin/clip-flant5-xxl",
    *,
    tokenizer: str = "google/flan-t5-xxl",
    length: int = 128,
    quantization: str | None = None,
    device: Device = None,
    dtype: Dtype = "bfloat16",
    clamp: str = "hard",
    checkpoint: bool = True,
) -> VQAScore:
    """VQAScore (arXiv 2404.01291) of CLIP-FlanT5: how likely "Yes" is where it is asked whether the image shows the
    prompt; in [0, 1], more is better.

    It is the geometric mean of the probabilities of "Yes" and of the end after it, as in the official code.
    Source: clip_t5_model.py, mm_utils.py and clip_t5 of linzhiqiu/t2v_metrics before 3.1.

    Args:
        path: hub id (`zhiqiulin/clip-flant5-xl` has fewer parameters), a folder with pytorch_model.bin.index.json and
            the files that it lists, or one file; of pickles the tensors alone are read. T5's sizes are those of the
            file.
        tokenizer: hub id or folder of T5's; those of XL and XXL are alike.
        length: tokens of a prompt; a longer one loses its end. The official code cuts at 2048 with all around it.
        quantization: "nf4" or "int8": how the blocks' linear layers are stored, T5's `wo` among them; None: in `dtype`.
        dtype: "float16", which T5's activations leave, is refused.
        checkpoint: keep one tensor per block for the backward pass, and compute the blocks again in it.

    The rest is as for `pickscore`.
    """
    what, dtype = "vqascore", _options(dtype, clamp)
    if dtype == torch.float16:
        raise ConfigurationError(f"{what}: T5's activations leave float16's range: give bfloat16 or float32 as dtype")
    _refuse_large(what, length, quantization)
    locate(path, FILES, what)  # what is missing is said before the tokenizer is fetched
    words = load_t5_tokenizer(tokenizer)
    network = load_vqascore(path, what, dtype, checkpoint)
    preprocessing = Preprocessing(network.vision.config.image_size, clamp=clamp)
    reward = VQAScore(network, words, preprocessing, length=length)
    _quantize(network.blocks(), quantization, device)
    return _placed(reward, device)


def load_clip(
    path: str,
    *,
    tokenizer: str | None = None,
    dtype: Dtype = "float32",
    checkpoint: bool = False,
    text: bool = True,
) -> Clip:
    """CLIP's towers, for rewards to share: `clip(towers)`, `aesthetic(..., clip=towers)`.

    Args:
        path: hub id, or a folder with config.json, model.safetensors and the tokenizer.
        text: False leaves the text encoder out, which the aesthetic predictor does not need.

    The rest is as for `pickscore`.
    """
    if text:
        need_ftfy("clip")
    model, scale = load_transformers_clip(path, "clip", _options(dtype), text=text)
    words = load_clip_tokenizer(tokenizer or path) if text else None
    return Clip(model, words, scale=scale, clean=clean_like_clip, checkpoint=checkpoint)


def mixture(rewards: Mapping[str, Mapping[str, Any]], *, folder: str = ".", device: Device = None) -> Mixture:
    """A `Mixture` from plain data, for configurations.

    Args:
        rewards: name -> {weight, reward, arguments, normalize: [mean, std], margin}. `weight` is required. `reward` is
            a name that `load` knows, by default the key itself, or `file.py:name` or `module:name` of a factory. Text
            in `arguments` that begins with ./ or ../ is a path. `normalize` comes before `margin`.
        folder: what such paths are relative to, also those of a mixture among the rewards.
        device: where the rewards are put; None: the CPU.

    Rewards "clip" (by `path`) and "aesthetic" (by `clip`) with the same CLIP, dtype and recomputation share its towers.

    Raises ConfigurationError where an entry is not of this form.
    """
    if not isinstance(rewards, Mapping) or not rewards:
        raise ConfigurationError("mixture: rewards must map names to {weight: ..., ...}")
    entries = {name: _entry(name, entry) for name, entry in rewards.items()}
    kinds = {name: entry.get("reward", name) for name, entry in entries.items()}
    arguments = {
        name: {key: _path(value, Path(folder)) for key, value in (entry.get("arguments") or {}).items()}
        for name, entry in entries.items()
    }
    # Towers whose text encoder is wanted, and its tokenizer.
    texts = {
        _towers(kind, arguments[name]): arguments[name].get("tokenizer")
        for name, kind in kinds.items()
        if kind == "clip"
    }
    towers: dict[Hashable, Clip] = {}
    parts: dict[str, tuple[Scorer, float]] = {}
    try:
        for name, kind in kinds.items():
            entry, given = entries[name], arguments[name]
            if kind in _CLIP_ARGUMENT:
                given[_CLIP_ARGUMENT[kind]] = _load_once(kind, given, texts, towers)
            if kind == "mixture":
                given.setdefault("folder", folder)
            part = _make(name, kind, given, Path(folder))
            if entry.get("normalize") is not None:
                part = Normalized(part, *entry["normalize"])
            if entry.get("margin") is not None:
                part = Margin(part, entry["margin"])
            parts[name] = (part, entry["weight"])
        return _placed(Mixture(parts), device)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"mixture: {error}") from error


FACTORIES: dict[str, Callable[..., Reward]] = {
    "pickscore": pickscore,
    "hpsv2.1": hpsv2,
    "hpsv2": hpsv2,
    "imagereward": imagereward,
    "clip": clip,
    "aesthetic": aesthetic,
    "mps": mps,
    "hpsv3": hpsv3,
    "vqascore": vqascore,
    "mixture": mixture,
}


def load(name: str, **arguments: Any) -> Reward:
    """A reward by its name: a key of `FACTORIES`, "pickscore" say.

    Args:
        arguments: of the function of that name: path=, device=, dtype=, ...

    Raises ConfigurationError for another name, and what the function raises.
    """
    if name not in FACTORIES:
        raise ConfigurationError(f"there is no reward {name!r}; known: {', '.join(FACTORIES)}")
    return FACTORIES[name](**arguments)


def _options(dtype: Dtype, clamp: str = "hard") -> torch.dtype:
    """The dtype of these names; raises ConfigurationError for others before any weights are read."""
    if clamp not in CLAMPS:
        raise ConfigurationError(f"clamp must be one of {', '.join(CLAMPS)}, got {clamp!r}")
    known = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if known is None or known not in _DTYPES.values():
        raise ConfigurationError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    return known


def _refuse_large(what: str, length: int, quantization: str | None) -> None:
    """Raise ConfigurationError for what a large reward can't do, before its weights are read."""
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise ConfigurationError(f"{what}: length must be an integer of at least 1, got {length!r}")
    if quantization not in (None, "nf4", "int8"):
        raise ConfigurationError(f"{what}: quantization must be nf4, int8 or null, got {quantization!r}")
    if quantization is not None:
        try:
            need_bitsandbytes(quantization)
        except ValueError as error:
            raise ConfigurationError(f"{what}: {error}") from None


def _quantize(lists: Iterable[nn.Module], quantization: str | None, device: Device) -> None:
    if quantization is not None:
        for blocks in lists:
            quantize_linears(blocks, quantization, device)


def _placed(reward: Any, device: Device) -> Any:
    return reward if device is None else reward.to(device)


def _entry(name: str, entry: Any) -> Mapping[str, Any]:
    known = {"weight", "reward", "arguments", "normalize", "margin"}
    if not isinstance(name, str):
        raise ConfigurationError(f"mixture: the name of a reward must be text, got {name!r}")
    if not isinstance(entry, Mapping) or "weight" not in entry or set(entry) - known:
        raise ConfigurationError(
            f"mixture: {name} must have weight and may have {', '.join(sorted(known - {'weight'}))}"
        )
    if not isinstance(entry.get("reward", name), str):
        raise ConfigurationError(f"mixture: reward of {name} must be text, got {entry['reward']!r}")
    if not isinstance(entry.get("arguments") or {}, Mapping):
        raise ConfigurationError(f"mixture: the arguments of {name} must be a mapping")
    normalize = entry.get("normalize")
    if normalize is not None and (not isinstance(normalize, list | tuple) or len(normalize) != 2):
        raise ConfigurationError(f"mixture: normalize of {name} must be [mean, std], got {normalize!r}")
    given = {"weight": entry["weight"], "margin": entry.get("margin")}
    given |= dict(zip(("the mean of normalize", "the std of normalize"), normalize or (), strict=False))
    for what, value in given.items():
        try:
            if value is not None or what != "margin":
                number("mixture", f"{what} of {name}", value)
        except (TypeError, ValueError) as error:
            raise ConfigurationError(str(error)) from None
    return entry


def _path(value: Any, folder: Path) -> Any:
    is_path = isinstance(value, str) and value.startswith(("./", "../"))
    return str(real_path(folder / value)) if is_path else value


#: Which argument of a reward is the CLIP that it may share.
_CLIP_ARGUMENT = {"clip": "path", "aesthetic": "clip"}


def _towers(kind: str, arguments: Mapping[str, Any]) -> Hashable:
    """Return what tells the towers of one CLIP from those of another."""
    options = (str(arguments.get("dtype", "float32")), bool(arguments.get("checkpoint", False)))
    place = arguments.get(_CLIP_ARGUMENT[kind], CLIP_L_14)
    if not isinstance(place, str | Path | Clip):
        raise ConfigurationError(f"{kind}: {_CLIP_ARGUMENT[kind]} must be text, got {place!r}")
    return place, *options


def _load_once(
    kind: str, arguments: Mapping[str, Any], texts: Mapping[Hashable, str | None], towers: dict[Hashable, Clip]
) -> Clip:
    """The towers that a reward asks for, loaded for the first reward that does."""
    place, path = _towers(kind, arguments), arguments.get(_CLIP_ARGUMENT[kind], CLIP_L_14)
    if isinstance(path, Clip):
        return path
    if place not in towers:
        options = {name: arguments[name] for name in ("dtype", "checkpoint") if name in arguments}
        towers[place] = load_clip(path, tokenizer=texts.get(place), text=place in texts, **options)
    return towers[place]


def _make(name: str, kind: str, arguments: dict[str, Any], folder: Path) -> Scorer:
    if kind in FACTORIES:
        return load(kind, **arguments)
    if ":" not in kind:
        raise ConfigurationError(
            f"mixture: there is no reward {kind!r} for {name}; known: {', '.join(FACTORIES)}, file.py:name, module:name"
        )
    scorer: Scorer = call_factory(kind, arguments, f"mixture: {name}", folder)
    return scorer
