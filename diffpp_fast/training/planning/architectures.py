"""Networks on meta, from their configurations alone: those of a run's folders, or of known models."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffpp_fast import rewards
from diffpp_fast.errors import ConfigurationError
from diffpp_fast.few_bits import linears_of
from diffpp_fast.networks.conditioning import Conditioning
from diffpp_fast.networks.families import family_named, family_of
from diffpp_fast.networks.inputs import inputs_of, is_pixart, with_defaults
from diffpp_fast.networks.loading import build_network, is_file
from diffpp_fast.networks.quantization import stored_bytes
from diffpp_fast.networks.text import check_tokenizer
from diffpp_fast.rewards.base import ImageBatch, Preprocessing
from diffpp_fast.rewards.clip_model import VIT_H_14, Clip
from diffpp_fast.rewards.factories import FACTORIES
from diffpp_fast.rewards.flan_t5 import known_sizes
from diffpp_fast.rewards.hpsv3_model import AFTER, BEFORE, ENDING, SQUARES
from diffpp_fast.rewards.mps_model import LAYERS, CrossLayer
from diffpp_fast.rewards.qwen2vl import QWEN2_VL_7B, Qwen2VL, resized, smart_size
from diffpp_fast.rewards.scores import IMAGEREWARD
from diffpp_fast.rewards.text import need_ftfy
from diffpp_fast.rewards.towers import SelfAttention, TextAttention, recompute
from diffpp_fast.rewards.vqascore_model import BEFORE as VQASCORE_BEFORE
from diffpp_fast.rewards.vqascore_model import QUESTION, ClipFlanT5, build_vqascore
from diffpp_fast.schedule import NoiseSchedule
from diffpp_fast.training.build.agreement import (
    TEXT_KEYS,
    check_latents,
    facts_of,
    family_lengths,
    naming,
    refuse_misfits,
    text_config,
    text_length,
)
from diffpp_fast.training.build.run import load_checked_schedule
from diffpp_fast.training.config import Config, RewardSection, TextEncoderSection
from diffpp_fast.training.loading import make_config, with_keys
from diffpp_fast.training.yaml_files import read_yaml

#: Makes a network, in float32; to be called where meta is the default device.
Recipe = Callable[[], nn.Module]


@dataclass(frozen=True)
class Architectures:
    """The networks of a run as recipes.

    Attributes:
        name: for the plan's heading.
        text_encoders: with the bytes of an element of their weights.
        tokens: of a prompt; `masked`: networks do not attend to padding.
    """

    name: str
    reference: Recipe
    generator: Recipe
    fake: Recipe
    decoder: Recipe | None
    text_encoders: tuple[tuple[Recipe, int], ...]
    schedule: Callable[[], NoiseSchedule]
    tokens: int
    masked: bool = False


def architectures_of(config: Config) -> Architectures:
    """Read the configurations of a run's networks, and no weights.

    Raises ConfigurationError for a folder without configuration, for networks that don't fit together or can't be
    planned, and for settings that the noise schedule does not serve.
    """
    refuse_misfits(config)
    for reward in (config.rewards.optimised, config.rewards.held_out):
        for name in () if reward is None else towers_of(reward).names:
            if name in ("clip", "hpsv2", "hpsv2.1"):
                need_ftfy(name)
    models = config.models
    reference = models.reference.path
    schedule = load_checked_schedule(config)
    family = family_named(facts_of("models.reference", reference)["_class_name"])
    text = dict(zip(TEXT_KEYS, (models.text_encoder, models.text_encoder_2, models.text_encoder_3), strict=True))
    loaders = {} if family is None else dict(zip(TEXT_KEYS, (each.loader for each in family.encoders), strict=False))
    encoders = {
        key: _text_encoder(key, section, loaders.get(key)) for key, section in text.items() if section is not None
    }
    first, masked = models.text_encoder, models.text_encoder.mask_padding
    tokens = text_length(first, is_pixart(facts_of("models.reference", reference)))
    if family is not None:
        tokens, masked = family.tokens(family_lengths(family, models)), family.masked

    def network(key: str, path: str | None) -> Recipe:
        # A single file has the reference's architecture.
        path = reference if path is None or is_file(path) else path
        return partial(build_network, facts_of(key, path), path)

    return Architectures(
        name=models.base or reference,
        reference=network("models.reference", reference),
        generator=network("models.generator", models.generator.path),
        fake=network("models.fake", models.fake.path),
        decoder=None if models.decoder is None else network("models.decoder", models.decoder.path),
        text_encoders=tuple((recipe, width) for recipe, width, _ in encoders.values()),
        schedule=lambda: schedule,
        tokens=tokens,
        masked=not encoders["models.text_encoder"][2].startswith("clip") if masked is None else masked,
    )


def _text_encoder(key: str, section: TextEncoderSection, loader: str | None = None) -> tuple[Recipe, int, str]:
    """A text encoder in transformers' format, the bytes of an element of its weights, and what kind it is."""
    import transformers

    with naming(f"{key}.tokenizer", section.tokenizer or section.path):
        check_tokenizer(section.tokenizer or section.path)
    facts = text_config(key, section)
    name = loader or ("CLIPTextModelWithProjection" if key == "models.text_encoder_2" else "AutoModelForTextEncoding")
    kind = getattr(transformers, name)
    return (
        partial(getattr(kind, "from_config", kind), facts),
        4 if section.dtype in ("auto", "float32") else 2,
        facts.model_type,
    )


def on_meta(recipe: Recipe) -> Any:
    """Builds a network without numbers, in eval mode."""
    with torch.device("meta"):
        return recipe().eval()


def parameters_of(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def conditioning(network: Any, architectures: Architectures, samples: int) -> Conditioning:
    """Return, on meta, what a text encoder would hand to this network.

    Raises ConfigurationError for a network whose conditions are not known.
    """
    family = family_of(network)
    if family is not None:
        shapes = family.shapes(family.inputs(with_defaults(network.config, type(network))), architectures.tokens)
        return Conditioning(
            ("",) * samples,
            {name: torch.empty(samples, *shape, dtype=dtype, device="meta") for name, (shape, dtype) in shapes.items()},
        )
    facts = network.config
    width = getattr(facts, "caption_channels", None) or getattr(facts, "cross_attention_dim", None)
    if not isinstance(width, int):
        raise ConfigurationError(f"{type(network).__name__} takes no text hidden states: it can't be planned")

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(samples, *shape, dtype=dtype, device="meta")

    tensors: dict[str, Any] = {"encoder_hidden_states": empty(architectures.tokens, width)}
    if architectures.masked:
        tensors["encoder_attention_mask"] = empty(architectures.tokens, dtype=torch.int64)
    if getattr(facts, "addition_embed_type", None) == "text_time":
        pooled = facts.projection_class_embeddings_input_dim - 6 * facts.addition_time_embed_dim
        tensors["added_cond_kwargs"] = {"text_embeds": empty(pooled), "time_ids": empty(6)}
    elif getattr(network, "use_additional_conditions", False):
        tensors["added_cond_kwargs"] = {"resolution": empty(2), "aspect_ratio": empty(1)}
    return Conditioning(("",) * samples, tensors)


_STORED: dict[str, Any] = read_yaml(Path(__file__).with_name("known.yaml"))


def _known(facts: Mapping[str, Any]) -> Architectures:
    denoiser = partial(build_network, facts["denoiser"], facts["name"])
    return Architectures(
        facts["name"],
        reference=denoiser,
        generator=denoiser,
        fake=denoiser,
        decoder=partial(build_network, facts["decoder"], facts["name"]),
        text_encoders=tuple((partial(_build_text, text), facts["text_bytes"]) for text in facts["text_encoders"]),
        schedule=partial(_build_schedule, facts["schedule"]),
        tokens=facts["tokens"],
        masked=facts.get("masked", False),
    )


def _build_text(facts: Mapping[str, Any]) -> nn.Module:
    import transformers

    (name,) = facts["architectures"]
    network: nn.Module = getattr(transformers, name)(transformers.AutoConfig.for_model(**facts))
    return network


def _build_schedule(facts: Mapping[str, Any]) -> NoiseSchedule:
    from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

    settings = {key: value for key, value in facts.items() if key != "flow"}
    kind = FlowMatchEulerDiscreteScheduler if facts.get("flow") else DDPMScheduler
    return NoiseSchedule.from_diffusers(kind(**settings))


#: By the names that `--model` takes.
KNOWN = {name: _known(facts) for name, facts in _STORED["models"].items()}


def known_config(name: str, changes: Mapping[str, Any], *, side: int | None = None) -> Config:
    """Return the configuration of Diff-Instruct++ on a known model, which is nowhere on the disk.

    Args:
        changes: values of other keys than its own, by dotted key.
        side: of the latents; None: the model's.

    Raises ConfigurationError for another name, for latents that the model does not take, and like `make_config`.
    """
    if name not in KNOWN:
        raise ConfigurationError(f"--model: there is no {name!r}; known: {', '.join(KNOWN)}, or give a configuration")
    facts = _STORED["models"][name]
    shape = facts.get("channels", 4), side or facts["side"], side or facts["side"]
    check_latents(f"--model {name}", inputs_of(facts["denoiser"], name), shape)
    # What a network is told takes the place of guidance.
    guided = not facts["denoiser"].get("guidance_embeds")
    folders = {key: {"path": f"{name}/{key}"} for key in ("text_encoder", "scheduler", "reference", "decoder")}
    data = {
        "output": "runs/plan",
        "precision": "bfloat16",
        "prompts": {"path": "prompts.txt"},
        "models": {
            **folders,
            "latent_shape": shape,
            "generator": {"timestep": facts["timestep"]},
        },
        # Of the weightings one that no schedule can make infinite: all cost the same.
        "method": {"name": "diff_instruct_pp", "guidance_scale": 2.0 if guided else 1.0, "weighting": "unit"},
        "rewards": {"optimised": {"factory": "diffpp_fast.rewards:hpsv2", "scale": 1.0}},
        "optimizers": {"generator": {"lr": 1e-6}, "fake": {"lr": 1e-6}},
        "training": {"steps": 1, "global_batch": 8},
    }
    family = family_named(facts["denoiser"].get("_class_name"))
    if family is not None:
        changes = {key: _with_targets(key, value, family.lora_targets) for key, value in changes.items()}
    return with_keys(make_config(data, f"--model {name}"), changes, f"--model {name}")


def _with_targets(key: str, value: Any, targets: Sequence[str]) -> Any:
    """Return the value of a key, with a family's targets where it is adapters without."""
    is_adapters = key.endswith(".lora") and isinstance(value, Mapping)
    return {"targets": list(targets), **value} if is_adapters else value


# Reward models, by the names of `diffpp_fast.rewards`.

#: By reward: what scores. Rewards with the same towers share them where `diffpp_fast.rewards.mixture` does.
TOWERS = {
    "pickscore": "PickScore's ViT-H/14",
    "hpsv2": "HPSv2's ViT-H/14",
    "hpsv2.1": "HPSv2's ViT-H/14",
    "clip": "CLIP ViT-L/14",
    "aesthetic": "CLIP ViT-L/14",
    "imagereward": "ImageReward's BLIP",
    "mps": "MPS's ViT-H/14 and cross attention",
    "hpsv3": "HPSv3's Qwen2-VL 7B",
    "vqascore": "VQAScore's CLIP-FlanT5",
}
#: Tokens of HPSv3's instruction: five characters of English are about one.
HPSV3_TOKENS = len(BEFORE + AFTER + ENDING) // 5
#: Tokens around the prompt in VQAScore's question.
VQASCORE_TOKENS = len(VQASCORE_BEFORE) // 5, len(QUESTION) // 5
#: Tokens of a prompt that ImageReward reads.
IMAGEREWARD_TOKENS = 35


@dataclass(frozen=True)
class Towers:
    """The networks that score images.

    Attributes:
        names: of `TOWERS`; none where the reward's own network is not known.
        dtype: of the weights, in which the towers compute, all but those of `OWN`.
        checkpoint: the towers compute their layers again in the backward pass.
        unknown: rewards that can't be planned, for the plan to say so.
        own: the arguments of the rewards of `OWN`, by name.
    """

    names: tuple[str, ...] = ()
    dtype: torch.dtype = torch.float32
    checkpoint: bool = False
    unknown: tuple[str, ...] = ()
    own: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def towers_of(reward: RewardSection) -> Towers:
    """Return what a reward computes with, if it is one of the package's; others are told of and left out.

    Raises ConfigurationError for a name that the package does not have.
    """
    source, _, name = reward.factory.rpartition(":")
    arguments: Mapping[str, Any] = reward.arguments
    if source not in ("diffpp_fast.rewards", "diffpp_fast.rewards.factories"):
        return Towers(unknown=(reward.factory,))
    entries = [(name, arguments)]
    if name == "load":
        entries = [(arguments.get("name", ""), arguments)]
    if entries[0][0] == "mixture":
        mixed = arguments.get("rewards") or {}
        entries = [(entry.get("reward", key), entry.get("arguments") or {}) for key, entry in mixed.items()]
    for kind, _ in entries:
        if ":" not in kind and kind not in FACTORIES and not hasattr(rewards, kind):
            raise ConfigurationError(f"{reward.factory}: there is no reward {kind!r}; known: {', '.join(FACTORIES)}")
    others = [given for kind, given in entries if kind not in OWN]
    dtypes = {given.get("dtype", "float32") for given in others}
    return Towers(
        names=tuple(kind for kind, _ in entries if kind in TOWERS),
        # Of several dtypes the widest: a mixture may have some in each.
        dtype=torch.float32 if "float32" in dtypes else torch.bfloat16,
        checkpoint=all(given.get("checkpoint", False) for given in others),
        unknown=tuple(kind for kind, _ in entries if kind not in TOWERS),
        own={kind: given for kind, given in entries if kind in OWN},
    )


class Scorer(nn.Module):
    """The towers on meta: images [B, 3, H, W] -> [B]. A reward that is not known scores by the mean of the image."""

    def __init__(self, towers: Towers) -> None:
        super().__init__()
        kinds = dict.fromkeys(TOWERS[name] for name in towers.names)
        makers: dict[str, Callable[[bool], nn.Module]] = {
            TOWERS["pickscore"]: lambda checkpoint: _ClipScore(VIT_H_14, checkpoint),
            TOWERS["hpsv2"]: lambda checkpoint: _ClipScore(VIT_H_14, checkpoint),
            TOWERS["clip"]: lambda checkpoint: _ClipScore(_STORED["vit_l_14"], checkpoint),
            TOWERS["imagereward"]: _ImageReward,
            TOWERS["mps"]: _MpsScore,
        }
        with torch.device("meta"):
            self.scores = nn.ModuleList(makers[kind](towers.checkpoint) for kind in kinds if kind in makers)
            self.to(towers.dtype)
            self.scores.extend(OWN[name](given) for name, given in towers.own.items())
        self.eval().requires_grad_(False)

    def weight_bytes(self) -> int:
        """Return the bytes of all weights, as they are stored."""
        saved = sum(score.saved_bytes for score in self.scores if isinstance(score, _Hpsv3Score | _VqaScore))
        return sum(parameter.nbytes for parameter in self.parameters()) - saved

    def forward(self, images: Tensor) -> Tensor:
        images = images.float()
        batch = ImageBatch(images)
        total = images.mean((1, 2, 3)) if not len(self.scores) else images.new_zeros(len(images))
        for score in self.scores:
            total = total + score(batch)
        return total


class _ClipScore(nn.Module):
    """Image features of a CLIP. Its text tower is there, and idle: prompts are encoded once."""

    def __init__(self, architecture: dict[str, Any], checkpoint: bool) -> None:
        super().__init__()
        from transformers import CLIPConfig, CLIPModel

        model = CLIPModel(CLIPConfig(**architecture))
        self.idle = nn.ModuleList((model.text_model, model.text_projection))
        del model.text_model, model.text_projection
        self.clip = Clip(model, None, scale=1.0, checkpoint=checkpoint)
        self.preprocessing = Preprocessing(self.clip.image_size)

    def forward(self, batch: ImageBatch) -> Tensor:
        return self.clip.image_features(batch, self.preprocessing).square().sum(1).float()


class _ImageReward(nn.Module):
    def __init__(self, checkpoint: bool) -> None:
        super().__init__()
        from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

        self.vision: Any = BlipVisionModel(BlipVisionConfig(**IMAGEREWARD["vision"]))
        text = BlipTextConfig(**IMAGEREWARD["text"], is_decoder=True)
        self.text: Any = BlipTextModel(text, add_pooling_layer=False)
        for layer in self.vision.encoder.layers:
            layer.self_attn = SelfAttention(layer.self_attn)
        for layer in self.text.encoder.layer:
            for attention in (layer.attention, layer.crossattention):
                attention.self = TextAttention(attention.self)
        if checkpoint:
            recompute([*self.vision.encoder.layers, *self.text.encoder.layer])
        self.preprocessing = Preprocessing(self.vision.config.image_size)

    def forward(self, batch: ImageBatch) -> Tensor:
        pixels = batch.pixels(self.preprocessing, self.vision.post_layernorm.weight.dtype)
        ids = torch.zeros(len(batch), IMAGEREWARD_TOKENS, dtype=torch.int64, device=pixels.device)
        hidden = self.text(
            input_ids=ids,
            attention_mask=ids.bool()[:, None, None],
            encoder_hidden_states=self.vision(pixel_values=pixels).last_hidden_state,
            is_decoder=False,
        ).last_hidden_state
        return hidden[:, 0].float().square().sum(1)


class _MpsScore(nn.Module):
    """Image tokens of a CLIP and MPS's cross attention; its text tower is idle, too."""

    def __init__(self, checkpoint: bool) -> None:
        super().__init__()
        from transformers import CLIPConfig, CLIPModel

        model = CLIPModel(CLIPConfig(**VIT_H_14))
        self.idle = nn.ModuleList((model.text_model, model.text_projection))
        self.vision_model, self.visual_projection = model.vision_model, model.visual_projection
        self.cross = nn.ModuleList(CrossLayer(VIT_H_14["projection_dim"]) for _ in range(LAYERS))
        self.length: int = model.config.text_config.max_position_embeddings
        self.preprocessing = Preprocessing(model.config.vision_config.image_size)
        if checkpoint:
            recompute([*self.vision_model.encoder.layers, *self.cross])

    def forward(self, batch: ImageBatch) -> Tensor:
        pixels = batch.pixels(self.preprocessing, self.visual_projection.weight.dtype)
        image = self.visual_projection(self.vision_model(pixel_values=pixels).last_hidden_state)
        text = image.new_zeros(len(image), self.length, image.shape[2])
        chosen = text.new_zeros(len(image), 1, 1, self.length, dtype=torch.bool)
        for layer in self.cross:
            image = layer(image, text, chosen)
        return image[:, 0].float().square().sum(1)


class _Hpsv3Score(nn.Module):
    """Both towers of Qwen2-VL 7B, with the arguments of `diffpp_fast.rewards.hpsv3`.

    Attributes:
        saved_bytes: by which the blocks' weights are smaller in 8 or 4 bits than in the towers' dtype.
    """

    def __init__(self, given: Mapping[str, Any]) -> None:
        super().__init__()
        from transformers import Qwen2VLConfig, Qwen2VLModel

        self.network = Qwen2VL(Qwen2VLModel(Qwen2VLConfig(**QWEN2_VL_7B)), given.get("checkpoint", True))
        self.network.to(torch.float32 if given.get("dtype") == "float32" else torch.bfloat16)
        self.tokens = HPSV3_TOKENS + given.get("length", 128)
        self.saved_bytes = _saved((self.network.visual.blocks, self.network.language_model.layers), given)

    def forward(self, batch: ImageBatch) -> Tensor:
        factor = self.network.patch * self.network.merge
        height, width = batch.images.shape[2:]
        size = smart_size(height, width, factor, SQUARES * factor**2, SQUARES * factor**2)
        image = self.network.image_tokens(resized(batch, size, "hard", self.network.dtype))
        text = image.new_zeros(len(image), self.tokens, image.shape[2])
        place = torch.zeros(len(image), dtype=torch.int64, device=image.device)
        return self.network(torch.cat((image, text), 1), place).float().square().sum(1)


class _VqaScore(nn.Module):
    """CLIP's image tower and T5, with the arguments of `diffpp_fast.rewards.vqascore`; XXL where no name says XL.

    Attributes:
        saved_bytes: as of `_Hpsv3Score`.
    """

    def __init__(self, given: Mapping[str, Any]) -> None:
        super().__init__()
        is_small = re.search(r"(?<!x)xl", Path(given.get("path", "")).name.lower()) is not None
        whole: Any = build_vqascore(known_sizes("xl" if is_small else "xxl"))
        whole["t5"].checkpoint = given.get("checkpoint", True)
        self.network = ClipFlanT5(whole["vision"], whole["projector"], whole["t5"], whole["t5"].checkpoint)
        self.network.to(torch.float32 if given.get("dtype") == "float32" else torch.bfloat16)
        self.preprocessing = Preprocessing(whole["vision"].config.image_size)
        before, after = VQASCORE_TOKENS
        self.tokens = before, after + given.get("length", 128)
        self.saved_bytes = _saved(self.network.blocks(), given)

    def forward(self, batch: ImageBatch) -> Tensor:
        image = self.network.image_tokens(batch.pixels(self.preprocessing, self.network.t5.dtype))
        ids = (torch.zeros(len(image), count, dtype=torch.int64, device=image.device) for count in (*self.tokens, 2))
        return self.network(image, *ids).exp()


def _saved(lists: Iterable[nn.Module], given: Mapping[str, Any]) -> int:
    """By how many bytes the linear layers of blocks are smaller with the arguments of their reward."""
    kind = given.get("quantization")
    if kind is None:
        return 0
    weights = [layer.weight for blocks in lists for layer in linears_of(blocks).values()]
    return sum(weight.nbytes - stored_bytes(weight.shape, kind) for weight in weights)


#: Rewards that have arguments and a size of their own.
OWN: dict[str, Callable[[Mapping[str, Any]], nn.Module]] = {"hpsv3": _Hpsv3Score, "vqascore": _VqaScore}
