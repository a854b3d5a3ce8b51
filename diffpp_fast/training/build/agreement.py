"""Whether the parts of a run fit together, by their configurations alone: before anything is loaded, and in plans."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from diffpp_fast import install
from diffpp_fast.errors import ConfigurationError
from diffpp_fast.networks.conditioning import Conditioning
from diffpp_fast.networks.decoder.checks import BY_ROWS
from diffpp_fast.networks.decoder.frozen import STAGES
from diffpp_fast.networks.decoder.latents import NORMED, PATCHED, channels_of
from diffpp_fast.networks.families import POOLED, Family, family_named
from diffpp_fast.networks.inputs import FLOW, Inputs, inputs_of, is_pixart, wants_sizes, with_defaults
from diffpp_fast.networks.loading import diffusers_class, is_file, load_schedule, local_folder, read_config
from diffpp_fast.networks.quantized_text import refuse_text_kind
from diffpp_fast.training.config import Config, Models, SizeConditions, TextEncoderSection


def agree(role: str, what: str, number: int, other: str, expected: int) -> None:
    """Raise ConfigurationError where two networks don't fit together."""
    if number != expected:
        raise ConfigurationError(f"{role} has {number} {what}, {other} has {expected}")


@contextmanager
def naming(key: str, path: str | None = None) -> Iterator[None]:
    """Name the configuration's key in the errors that come up inside."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name != "peft":
            raise
        raise ConfigurationError(f"{key}: peft is not installed: {install.extra('lora')}") from None
    except ConfigurationError:
        raise
    except (ValueError, OSError, RuntimeError) as error:
        where = f"{key} ({path})" if path and path not in str(error) else key
        hint = "; it was taken for a hub id, for there is no such folder" if _is_hub_id(path) else ""
        raise ConfigurationError(f"{where}: {error}{hint}") from error


def _is_hub_id(path: str | None) -> bool:
    # Folders are absolute in a loaded configuration.
    return path is not None and not path.startswith(("/", "package:"))


#: A prompt's length in tokens, as the families' pipelines have it.
CLIP_LENGTH, PIXART_LENGTH = 77, 120
TEXT_KEYS = ("models.text_encoder", "models.text_encoder_2", "models.text_encoder_3")
#: Text encoders that keep their first positions for padding.
PADDED_POSITIONS = ("camembert", "data2vec-text", "ibert", "longformer", "roberta", "xlm-roberta", "xlm-roberta-xl")


class TextFacts(NamedTuple):
    """Channels of hidden states, and of the pooled projection where there is one."""

    width: int
    pooled_width: int | None = None

    @classmethod
    def of(cls, conditioning: Conditioning) -> TextFacts:
        """Return those of what an encoder has given."""
        pooled = conditioning.tensors.get("added_cond_kwargs", {}).get("text_embeds")
        pooled = conditioning.tensors.get(POOLED, pooled)
        width = conditioning.tensors["encoder_hidden_states"].shape[-1]
        return cls(width, None if pooled is None else pooled.shape[-1])


def refuse_misfits(config: Config, text: TextFacts | None = None) -> None:
    """Compare the networks, the decoder, the latents, the scheduler and the text encoders of a run.

    Args:
        config: of the run.
        text: of embeddings, which take the place of text encoders; None: the encoders' configurations are read.

    Raises ConfigurationError, naming the keys, for parts that can't be read or don't fit together.
    """
    models = config.models
    inputs = refuse_denoisers(config)
    _refuse_idle_guidance(models)
    if models.size_conditions != SizeConditions() and not _is_told_sizes(models):
        raise ConfigurationError(
            f"models.size_conditions has no effect: the network in models.reference ({models.reference.path}) is not "
            "told sizes as those of Stable Diffusion XL and of PixArt at 1024 are. Remove it"
        )
    if models.decoder is not None:
        _check_decoder(config)
    with naming("models.scheduler", models.scheduler.path):
        schedule = load_schedule(models.scheduler.path)
    name = facts_of("models.reference", models.reference.path)["_class_name"]
    family = family_named(name)
    if (name in FLOW or family is not None) and schedule.prediction_type != "flow_prediction":
        raise ConfigurationError(
            f"models.scheduler ({models.scheduler.path}) has {schedule.prediction_type}, but models.reference is a "
            f"{name}, which was trained by flow matching: give its own scheduler"
        )
    if family is not None and family.times not in (None, len(schedule)):
        raise ConfigurationError(
            f"models.scheduler ({models.scheduler.path}) has {len(schedule)} times, but {family.name} takes "
            f"{family.times} for granted: give its own scheduler"
        )
    if text is None:
        text = text_facts(config.models)
    for key, wanted in inputs.items():
        if wanted.width is not None:
            agree(key, "channels of text", wanted.width, "models.text_encoder", text.width)
        if wanted.pooled is not None:
            agree(key, "channels of pooled text", wanted.pooled, "models.text_encoder_2", text.pooled_width or 0)


def idle_keys(config: Config) -> list[str]:
    """Return the keys, and sections, that change nothing in a run of the other keys."""
    told_sizes = _is_told_sizes(config.models)
    return [*_idle_without_guidance(config), *([] if told_sizes else ["models.size_conditions"])]


def idle_sentences(config: Config) -> list[str]:
    """Return a sentence for each key of guidance, and of several steps, that a configuration gives without effect."""
    given = {
        "models.negative_prompt": config.models.negative_prompt is not None,
        "models.empty_prompt": config.models.empty_prompt != "auto",
        "method.guidance_rescale": config.method.guidance_rescale != 0.0,
    }
    idle = [f"{key} has no effect: {why}" for key, why in _idle_without_guidance(config).items() if given[key]]
    generator = config.models.generator
    steps = {"renoise": generator.renoise != "fresh", "gradient_step": generator.gradient_step != "random"}
    if len(generator.times) == 1:
        why = "the generator makes one call; models.generator.timesteps are those of several"
        idle += [f"models.generator.{key} has no effect: {why}" for key, changed in steps.items() if changed]
    return idle


def _idle_without_guidance(config: Config) -> dict[str, str]:
    """The keys that nothing reads for lack of guidance, each with the reason."""
    idle = {}
    if not config.method.guided:
        why = "nothing is computed without prompt, for method.guidance_scale is 1 and method.prompt_dropout 0"
        idle = {"models.negative_prompt": why, "models.empty_prompt": why}
    if config.method.guidance_scale == 1.0:
        idle["method.guidance_rescale"] = "method.guidance_scale is 1, so there is no guided output"
    return idle


def _is_told_sizes(models: Models) -> bool:
    facts = facts_of("models.reference", models.reference.path)
    return facts.get("addition_embed_type") == "text_time" or wants_sizes(facts)


def refuse_denoisers(config: Config) -> dict[str, Inputs]:
    """Return what the denoisers are given, by key of the configuration; raises like `refuse_misfits`."""
    models = config.models
    reference = models.reference.path
    if is_file(reference):
        raise ConfigurationError(f"models.reference.path must be a folder or a hub id, got the file {reference}")
    paths = {"models.generator": models.generator.path, "models.fake": models.fake.path, "models.reference": reference}
    inputs = {}
    for key, path in paths.items():
        # A single file has the reference's architecture.
        if path is not None and not is_file(path):
            with naming(key, path):
                inputs[key] = inputs_of(read_config(path), path)
            check_latents(key, inputs[key], models.latent_shape)
    kinds = {key: facts_of(key, str(paths[key]))["_class_name"] for key in inputs}
    for key, found in inputs.items():
        if family_named(kinds[key]) is not family_named(kinds["models.reference"]):
            raise ConfigurationError(
                f"{key} is a {kinds[key]} and models.reference a {kinds['models.reference']}: they are called in "
                "different ways"
            )
        for condition in ("pooled", "sizes"):
            if getattr(found, condition) != getattr(inputs["models.reference"], condition):
                raise ConfigurationError(
                    f"{key} and models.reference are of two families: one takes "
                    f"{'pooled text and sizes' if condition == 'pooled' else 'resolution and aspect ratio'} as the "
                    "other does not"
                )
    return inputs


def _refuse_idle_guidance(models: Models) -> None:
    """Raise ConfigurationError for a guidance scale that no network is told."""
    for role in ("generator", "fake", "reference"):
        section = getattr(models, role)
        stored = models.reference.path if section.path is None or is_file(section.path) else section.path
        facts = facts_of(f"models.{role}", stored)
        family = family_named(facts["_class_name"])
        whole = with_defaults(facts, diffusers_class(facts, stored, "ModelMixin"))
        if section.guidance_embedding is not None and (family is None or family.told(whole) is None):
            raise ConfigurationError(
                f"models.{role}.guidance_embedding has no effect: the network ({stored}) has no embedding of a "
                "guidance scale, as FLUX.1-dev's has. Classifier-free guidance is method.guidance_scale"
            )


def takes_two_encoders(models: Models, facts: Mapping[str, Any]) -> bool:
    """Return whether a network takes two text encoders; raises ConfigurationError for one too many or too few."""
    two = facts.get("addition_embed_type") == "text_time"
    if two and models.text_encoder_2 is None:
        raise ConfigurationError(
            "models.reference is a Stable Diffusion XL network: it needs models.text_encoder_2 for its pooled text"
        )
    if not two and models.text_encoder_2 is not None:
        raise ConfigurationError("models.reference takes one text encoder: remove models.text_encoder_2")
    if models.text_encoder_3 is not None:
        raise ConfigurationError(f"models.reference takes {1 + two} text encoders: remove models.text_encoder_3")
    return two


def family_sections(family: Family, models: Models) -> list[TextEncoderSection | None]:
    """Return the sections of a family's text encoders, None for an optional one that is left out.

    Raises ConfigurationError for one too many or too few, and for settings that the family leaves no choice of.
    """
    given = [models.text_encoder, models.text_encoder_2, models.text_encoder_3]
    for number, (key, section) in enumerate(zip(TEXT_KEYS, given, strict=True)):
        if number >= len(family.encoders) and section is not None:
            takes = "one text encoder" if len(family.encoders) == 1 else f"{len(family.encoders)} text encoders"
            raise ConfigurationError(f"models.reference takes {takes}, as {family.name} does: remove {key}")
        if number < len(family.encoders) and section is None and not family.encoders[number].optional:
            raise ConfigurationError(f"models.reference is a network of {family.name}: it needs {key}")
        if section is not None and section.mask_padding is not None:
            raise ConfigurationError(f"{key}.mask_padding has no effect for {family.name}: remove it")
    return given[: len(family.encoders)]


def family_lengths(family: Family, models: Models) -> list[int]:
    """Return the tokens of a prompt, of each encoder that is there."""
    sections = zip(family.encoders, family_sections(family, models), strict=True)
    return [section.max_length or kind.length for kind, section in sections if section is not None]


def text_length(section: TextEncoderSection, pixart: bool) -> int:
    """Return how many tokens a prompt has."""
    return section.max_length or (PIXART_LENGTH if pixart else CLIP_LENGTH)


def facts_of(key: str, path: str) -> dict[str, Any]:
    """Return the `config.json` of a network; raises ConfigurationError, naming the key, where it can't be read."""
    with naming(key, path):
        return read_config(path)


def text_config(key: str, section: TextEncoderSection) -> Any:
    """Return transformers' configuration of a text encoder; raises like `facts_of`."""
    from transformers import AutoConfig

    with naming(key, section.path):
        facts = read_config(section.path)
        if "_class_name" in facts or "model_type" not in facts:
            raise ValueError(
                f"it is no text encoder of transformers but a {facts.get('_class_name', 'file of others')}"
            )
        config = AutoConfig.from_pretrained(local_folder(section.path, ["config.json"]), trust_remote_code=False)
        if section.quantization is not None:
            refuse_text_kind(section.path, section.quantization, config.model_type, section.dtype)
        return config


def check_latents(key: str, inputs: Inputs, latent_shape: tuple[int, int, int]) -> None:
    """Raise ConfigurationError, naming the network by `key`, for latents that it does not take."""
    channels, height, width = latent_shape
    agree(key, "input channels", inputs.channels, "models.latent_shape", channels)
    if inputs.predicted != 2 * channels:  # else it predicts a variance too, which is cut off
        agree(key, "output channels", inputs.predicted, "models.latent_shape", channels)
    for side, size in (("height", height), ("width", width)):
        if size % inputs.divisor:
            raise ConfigurationError(
                f"models.latent_shape: the {side} is {size}, but {key} cuts latents into patches of {inputs.divisor}: "
                f"take a multiple, {size - size % inputs.divisor} or {size + -size % inputs.divisor}"
            )
    patches = height * width // inputs.divisor**2
    if inputs.patches is not None and patches > inputs.patches:
        raise ConfigurationError(
            f"models.latent_shape: it makes {patches} patches, but {key} has positions for {inputs.patches}"
        )
    if inputs.side is not None and max(height, width) > inputs.side * inputs.divisor:
        raise ConfigurationError(
            f"models.latent_shape: {key} has positions for {inputs.side} patches of {inputs.divisor} along a side: "
            f"height and width are at most {inputs.side * inputs.divisor}"
        )


def _check_decoder(config: Config) -> None:
    section = config.models.decoder
    assert section is not None
    facts = facts_of("models.decoder", section.path)
    with naming("models.decoder", section.path):
        kind = diffusers_class(facts, section.path, "ModelMixin")
    if kind.__name__ not in STAGES:
        raise ConfigurationError(
            f"models.decoder ({section.path}) is a {kind.__name__}; a decoder is one of {', '.join(STAGES)}"
        )
    if section.rows is not None and kind.__name__ not in BY_ROWS:
        raise ConfigurationError(
            f"models.decoder.rows is for {' and '.join(BY_ROWS)}, and {section.path} is a {kind.__name__}: leave it out"
        )
    facts = with_defaults(facts, kind)
    channels = config.models.latent_shape[0]
    agree("models.decoder", "latent channels", channels_of(kind.__name__, facts), "models.latent_shape", channels)
    if kind.__name__ not in (NORMED, PATCHED) and not facts.get("scaling_factor"):
        raise ConfigurationError(
            f"models.decoder ({section.path}): config.json has no scaling_factor, by which latents are "
            "divided: write the one that the network was trained with"
        )
    _check_scaling(config, section.path, kind.__name__, facts)


def _check_scaling(config: Config, path: str, name: str, facts: Mapping[str, Any]) -> None:
    """A decoder in place of the base's must unscale the latents as that one does."""
    base = config.models.base
    if base is None or path == f"{base}/vae":
        return
    own = facts_of("models.base", f"{base}/vae")
    if own.get("_class_name") != name:
        return
    own = with_defaults(own, diffusers_class(own, base, "ModelMixin"))
    for key in ("scaling_factor", "shift_factor", "latents_mean", "latents_std"):
        if facts.get(key) != own.get(key):
            raise ConfigurationError(
                f"models.decoder ({path}) has {key} {facts.get(key)}, the vae of models.base has {own.get(key)}: it is "
                "the decoder of other latents"
            )


def text_facts(models: Models) -> TextFacts:
    """Return what the text encoders give, by their configurations.

    Raises ConfigurationError for one too many or too few, for what is no text encoder of the reference's family, and
    for prompts of more tokens than it has positions.
    """
    facts = facts_of("models.reference", models.reference.path)
    family = family_named(facts["_class_name"])
    if family is not None:
        return _family_text_facts(family, models, facts)
    if takes_two_encoders(models, facts):
        assert models.text_encoder_2 is not None
        first = _text_settings("models.text_encoder", models.text_encoder, two=True)
        second = _text_settings("models.text_encoder_2", models.text_encoder_2, two=True)
        return TextFacts(first.hidden_size + second.hidden_size, second.projection_dim)
    key = "models.text_encoder"
    return TextFacts(_text_settings(key, models.text_encoder, pixart=is_pixart(facts)).hidden_size)


def _text_settings(key: str, section: TextEncoderSection, *, two: bool = False, pixart: bool = False) -> Any:
    """The configuration of a text encoder, of which class and length are as they should be."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES as KNOWN

    found = text_config(key, section)
    clip = found.model_type in ("clip", "clip_text_model")
    classes = found.architectures or []
    if two and not clip:
        raise ConfigurationError(f"{key} ({section.path}) is a {found.model_type}; Stable Diffusion XL has two CLIPs")
    if key.endswith("_2") and classes and "CLIPTextModelWithProjection" not in classes and "CLIPModel" not in classes:
        raise ConfigurationError(
            f"{key} ({section.path}) is a {classes[0]}: Stable Diffusion XL's second text encoder is a "
            "CLIPTextModelWithProjection, which gives the pooled text"
        )
    if not clip and found.model_type not in KNOWN:
        raise ConfigurationError(f"{key} ({section.path}) is a {found.model_type}, which encodes no text")
    settings = getattr(found, "text_config", None) or found
    _check_length(key, section, found.model_type, settings, text_length(section, pixart))
    return settings


def _family_text_facts(family: Family, models: Models, facts: Mapping[str, Any]) -> TextFacts:
    """Return the channels that a family's text encoders give."""
    configs: list[Any | None] = []
    for key, kind, section in zip(TEXT_KEYS, family.encoders, family_sections(family, models), strict=False):
        if section is None:
            configs.append(None)
            continue
        found = text_config(key, section)
        if found.model_type not in kind.model_types:
            raise ConfigurationError(
                f"{key} ({section.path}) is a {found.model_type}; {family.name} takes a {kind.model_types[-1]} there"
            )
        settings = getattr(found, "text_config", None) or found
        _check_length(key, section, found.model_type, settings, section.max_length or kind.length)
        configs.append(settings)
    whole = with_defaults(facts, diffusers_class(facts, models.reference.path, "ModelMixin"))
    with naming(TEXT_KEYS[0], models.text_encoder.path):
        return TextFacts(*family.text_widths(configs, whole))


def _check_length(key: str, section: TextEncoderSection, model_type: str, settings: Any, length: int) -> None:
    """Raise ConfigurationError for prompts of more tokens than a text encoder has positions."""
    positions = getattr(settings, "max_position_embeddings", None)
    if positions is not None and model_type in PADDED_POSITIONS:
        positions -= (settings.pad_token_id or 0) + 1
    if positions is not None and length > positions:
        stated = f"{key}.max_length" if section.max_length else f"{key}.max_length is left open, which"
        raise ConfigurationError(
            f"{stated} is {length}, but the text encoder in {section.path} has {positions} positions: set it to at "
            f"most {positions}"
        )
