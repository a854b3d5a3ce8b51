"""Prompts to what networks are conditioned on, with the text encoders that transformers loads."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffpp_fast import install
from diffpp_fast.networks.conditioning import Conditioning
from diffpp_fast.networks.loading import local_folder, refuse_not_finite, resolve
from diffpp_fast.networks.quantization import refuse_kind
from diffpp_fast.networks.quantized_text import OVERFLOWING, refuse_text_kind
from diffpp_fast.networks.streaming import is_asked_for, load_streamed
from diffpp_fast.networks.tokens import tokenize
from diffpp_fast.networks.weight_files import TRANSFORMERS, open_weights, patterns

logger = logging.getLogger("diffpp_fast")

#: Tensors that a text encoder's hidden states do not depend on: heads, other towers, and buffers that are counted anew.
SPARE = re.compile(
    r"(^|\.)position_ids$|(^|\.)pooler\.|^(text_projection|visual_projection|logit_scale|vision_model|cls|lm_head|decoder)\b"
)


class TextEncoder(nn.Module):
    """A frozen text encoder: prompts -> `Conditioning` for a diffusers network.

    Args:
        model: gives `last_hidden_state` [B, L, D] for `input_ids` and `attention_mask`; frozen and set to eval here.
        tokenizer: the model's, from transformers.
        max_length: tokens per prompt, the special ones included. Longer prompts are cut, with a warning.
        mask_padding: neither the encoder nor the networks attend to padding; these get `encoder_attention_mask`.
            Networks that were trained without it (all of Stable Diffusion) want False.
        lowercase: prompts are stripped and lowered first, as PixArt's pipeline does.
        added: what every prompt is conditioned on besides, by name, tensors [n] for `added_cond_kwargs`.
        zero_empty: `null` is zeros instead of the encoded empty prompt.
        negative_prompt: `null` is this prompt, encoded, whatever `zero_empty` says; None: the empty one.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        max_length: int,
        mask_padding: bool = True,
        *,
        lowercase: bool = False,
        added: Mapping[str, torch.Tensor] | None = None,
        zero_empty: bool = False,
        negative_prompt: str | None = None,
    ) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.mask_padding = mask_padding
        self.lowercase = lowercase
        self.added = dict(added or {})
        self.zero_empty = zero_empty
        self.negative_prompt = negative_prompt
        # Some CLIP encoders were trained to mask what the networks behind them attend to.
        config: Any = model.config
        self.mask_inside = mask_padding or bool(getattr(config, "use_attention_mask", False))

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        max_length: int = 77,
        mask_padding: bool = True,
        *,
        tokenizer: str | Path | None = None,
        dtype: torch.dtype = torch.float32,
        variant: str | None = None,
        **arguments: Any,
    ) -> TextEncoder:
        """From a hub id or a folder with the model (safetensors). Of T5 it takes the encoder.

        Args:
            path, max_length, mask_padding, arguments: as above.
            tokenizer: where the tokenizer is; None: with the model.
            dtype: of the weights.
            variant: which of the folder's weights, e.g. "fp16".

        Raises like `load_text_model` and `load_tokenizer`.
        """
        model = load_text_model(str(path), dtype, variant=variant)
        return cls(model, load_tokenizer(str(tokenizer or path), model), max_length, mask_padding, **arguments)

    @property
    def width(self) -> int:
        """Channels of the hidden states."""
        config: Any = self.model.config
        return int(config.hidden_size)

    @torch.no_grad()
    def forward(self, prompts: Sequence[str]) -> Conditioning:
        """B prompts -> hidden states [B, max_length, D] float32 and, if asked for, their mask [B, max_length] int64."""
        texts = [prompt.lower().strip() for prompt in prompts] if self.lowercase else list(prompts)
        tokens = tokenize(self.tokenizer, texts, self.max_length).to(_device(self.model))
        mask = tokens["attention_mask"]
        hidden = self.model(
            input_ids=tokens["input_ids"], attention_mask=mask if self.mask_inside else None
        ).last_hidden_state
        tensors: dict[str, Any] = {"encoder_hidden_states": hidden.float()}
        if self.mask_padding:
            tensors["encoder_attention_mask"] = mask
        if self.added:
            tensors["added_cond_kwargs"] = _repeat(self.added, hidden)
        return Conditioning(tuple(prompts), tensors)

    def null(self) -> Conditioning:
        """The unconditional counterpart of one prompt, for guidance."""
        if self.negative_prompt is not None:
            return self([self.negative_prompt])
        return _zeroed(self([""]), "encoder_hidden_states") if self.zero_empty else self([""])


class DualTextEncoder(nn.Module):
    """The two frozen text encoders of Stable Diffusion XL: prompts -> `Conditioning`.

    Hidden states are those before the last layer of each encoder, side by side. Networks attend to padding, and so do
    the encoders. The pooled projection is the second encoder's.

    Args:
        first, second: models and tokenizers; `second` gives `text_embeds` [B, P].
        max_length: tokens per prompt, of both. Longer prompts are cut, with a warning.
        time_ids: [6]: height and width of the original, top and left of the crop, height and width of the target.
        zero_empty: `null` is zeros instead of the encoded empty prompt.
        negative_prompt: `null` is this prompt, encoded, whatever `zero_empty` says; None: the empty one.
    """

    def __init__(
        self,
        first: tuple[nn.Module, Any],
        second: tuple[nn.Module, Any],
        max_length: int,
        *,
        time_ids: torch.Tensor,
        zero_empty: bool,
        negative_prompt: str | None = None,
    ) -> None:
        super().__init__()
        self.models = nn.ModuleList([first[0], second[0]]).eval().requires_grad_(False)
        self.tokenizers = first[1], second[1]
        self.max_length = max_length
        self.time_ids = time_ids.float()
        self.zero_empty = zero_empty
        self.negative_prompt = negative_prompt

    @property
    def width(self) -> int:
        """Channels of the hidden states, both encoders' together."""
        configs: list[Any] = [model.config for model in self.models]
        return sum(int(config.hidden_size) for config in configs)

    @property
    def pooled_width(self) -> int:
        """Channels of the pooled projection."""
        config: Any = self.models[1].config
        return int(config.projection_dim)

    @torch.no_grad()
    def forward(self, prompts: Sequence[str]) -> Conditioning:
        """B prompts -> hidden states [B, max_length, D1 + D2], pooled [B, P] and time ids [B, 6], all float32."""
        hidden = []
        for model, tokenizer in zip(self.models, self.tokenizers, strict=True):
            ids = tokenize(tokenizer, list(prompts), self.max_length)["input_ids"].to(_device(model))
            output = model(input_ids=ids, output_hidden_states=True)
            hidden.append(output.hidden_states[-2].float())
        states = torch.cat(hidden, dim=-1)
        added = {"text_embeds": output.text_embeds.float(), **_repeat({"time_ids": self.time_ids}, states)}
        return Conditioning(tuple(prompts), {"encoder_hidden_states": states, "added_cond_kwargs": added})

    def null(self) -> Conditioning:
        """The unconditional counterpart of one prompt, for guidance."""
        if self.negative_prompt is not None:
            return self([self.negative_prompt])
        return _zeroed(self([""]), "encoder_hidden_states", "text_embeds") if self.zero_empty else self([""])


def load_text_model(
    path: str,
    dtype: torch.dtype = torch.float32,
    *,
    projection: bool = False,
    variant: str | None = None,
    loader: str | None = None,
    quantization: str | None = None,
) -> nn.Module:
    """Return a text encoder from safetensors; with `projection` a CLIP that also gives `text_embeds`.

    Args:
        path, dtype, variant: as in `TextEncoder.from_pretrained`.
        projection: see above.
        loader: the class of transformers that it is loaded with; None: what encodes text of its type.
        quantization: "int8", "nf4" or "float8", the weights of its blocks' linear layers; None: as `dtype` says.

    Raises:
        FileNotFoundError: the folder, or its weights, are not there.
        ValueError: they are damaged, are not those of the encoder, or are not finite; float16, where it overflows; a
            `quantization` that does not serve.
    """
    import transformers
    from transformers import AutoConfig

    folder = local_folder(path, ["config.json", *patterns(TRANSFORMERS, variant)])
    kind = AutoConfig.from_pretrained(folder, trust_remote_code=False).model_type
    if dtype == torch.float16 and kind in OVERFLOWING:
        raise ValueError(f"{path}: {kind} overflows in float16; use dtype bfloat16 or float32")
    name = loader or ("CLIPTextModelWithProjection" if projection else "AutoModelForTextEncoding")
    projection = name == "CLIPTextModelWithProjection"
    stored = open_weights(folder, TRANSFORMERS, variant, f"transformers.{name}")
    if quantization is not None:
        refuse_kind(quantization)
        refuse_text_kind(path, quantization, kind, str(dtype).removeprefix("torch."))
    if is_asked_for() or quantization is not None:
        try:
            return load_streamed(
                folder, getattr(transformers, name), stored, dtype, quantization, keep=not is_asked_for()
            )
        except ValueError as error:
            raise ValueError(f"{path} {error}") from None
    model, found = getattr(transformers, name).from_pretrained(
        folder,
        dtype=dtype,
        variant=variant,
        use_safetensors=True,
        trust_remote_code=False,
        ignore_mismatched_sizes=True,  # to name them
        output_loading_info=True,
    )
    _refuse_misfit(path, found, projection)
    refuse_not_finite(path, model)
    return model


def check_tokenizer(path: str) -> None:
    """Check that a tokenizer's folder can be read; of a hub id, nothing.

    A folder may hold SentencePiece's file alone (`spiece.model`), as PixArt's on the hub does. transformers reads it by
    sentencepiece and, where it can't, goes on as if it were tiktoken's.

    Raises ValueError where sentencepiece is missing, and for a damaged file.
    """
    folder = Path(resolve(path))
    files = sorted(folder.glob("*.model"))
    if not folder.is_dir() or not files or (folder / "tokenizer.json").is_file():
        return
    try:
        import google.protobuf  # type: ignore[import-untyped,unused-ignore]  # noqa: F401 - transformers reads the file by both
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise ValueError(
            f"{files[0]} can't be read without sentencepiece and protobuf ({error}): {install.extra('train')}"
        ) from None
    try:
        SentencePieceProcessor(model_file=str(files[0]))
    except (OSError, RuntimeError, TypeError) as error:
        raise ValueError(f"{files[0]} is damaged: {error}") from None


def refuse_stored_text(path: str, variant: str | None) -> None:
    """Raises like `load_text_model` for a folder or hub id whose weights are not there or damaged; none is read."""
    folder = local_folder(path, ["config.json", *patterns(TRANSFORMERS, variant)])
    open_weights(folder, TRANSFORMERS, variant, "transformers.AutoModel")


def load_tokenizer(path: str, model: nn.Module | None = None) -> Any:
    """Return the tokenizer of a folder or hub id.

    Args:
        path: its own, or that of a model that has it.
        model: the encoder that gets its tokens.

    Raises:
        FileNotFoundError: its vocabulary is not there, without which transformers makes a tokenizer of a few tokens.
        ValueError: it is damaged, or not that of the model; and like `check_tokenizer`.
    """
    from transformers import AutoTokenizer

    # As a folder: of a hub id AutoTokenizer wants a config.json, too, which pipelines' tokenizers do without, and
    # behind a cache that was filled on another machine it can't be told that there is none.
    folder = local_folder(path, ["*.json", "*.txt", "*.model", "*.jinja"])
    check_tokenizer(str(folder))
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the tokenizers' library raises nothing more special
        if isinstance(error, ImportError):
            raise
        raise ValueError(f"{path} holds no tokenizer that can be read: {error}") from error
    names = {key: name for key, name in tokenizer.vocab_files_names.items() if isinstance(name, str)}
    whole = names.pop("tokenizer_file", "tokenizer.json")
    if not (folder / whole).is_file() and not (names and all((folder / name).is_file() for name in names.values())):
        wanted = " or ".join(filter(None, (whole, " and ".join(names.values()))))
        raise FileNotFoundError(f"{path} holds no vocabulary of a {type(tokenizer).__name__}: {wanted}")
    if model is not None:
        refuse_other_tokenizer(path, tokenizer, model)
    return tokenizer


def refuse_other_tokenizer(path: str, tokenizer: Any, model: nn.Module) -> None:
    """Raises ValueError for a tokenizer whose tokens are not those of the text encoder."""
    settings: Any = model.config
    settings = getattr(settings, "text_config", settings)
    # Embeddings are padded to a round number; T5 has 28 rows more than tokens.
    least = settings.vocab_size - max(128, settings.vocab_size // 50)
    if not least <= len(tokenizer) <= settings.vocab_size:
        raise ValueError(
            f"the tokenizer in {path} has {len(tokenizer)} tokens, the text encoder {settings.vocab_size}: give the "
            "tokenizer that belongs to it, with all its files"
        )


def _refuse_misfit(path: str, found: Mapping[str, Any], projection: bool) -> None:
    # The projection is what `text_embeds` are made with, and is spare only where nobody asks for them.
    def counts(name: str) -> bool:
        return not SPARE.search(name) or (projection and name.startswith("text_projection"))

    missing = sorted(filter(counts, found["missing_keys"]))
    unknown = sorted(filter(counts, found["unexpected_keys"]))
    shapes = sorted(f"{name} has shape {list(stored)}, the encoder's {list(wanted)}"
                    for name, stored, wanted in found["mismatched_keys"])  # fmt: skip
    said = [f"lacks {len(missing)} tensors, e.g. {missing[0]}"] if missing else []
    said += [f"has {len(unknown)} that the encoder does not know, e.g. {unknown[0]}"] if unknown else []
    said += [f"has {len(shapes)} of another shape, e.g. {shapes[0]}"] if shapes else []
    if said:
        raise ValueError(f"{path} {' and '.join(said)}: it must hold all weights that its config.json asks for")


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _repeat(conditions: Mapping[str, torch.Tensor], like: torch.Tensor) -> dict[str, torch.Tensor]:
    """Tensors [n] -> [B, n], for each sample of `like` and on its device."""
    return {name: tensor.to(like.device).expand(len(like), -1) for name, tensor in conditions.items()}


def _zeroed(conditioning: Conditioning, *names: str) -> Conditioning:
    def zero(tensors: Mapping[str, Any]) -> dict[str, Any]:
        return {
            name: zero(value) if isinstance(value, Mapping) else torch.zeros_like(value) if name in names else value
            for name, value in tensors.items()
        }

    return Conditioning(conditioning.prompts, zero(conditioning.tensors))
