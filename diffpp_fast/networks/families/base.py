"""A family of denoisers: how its network is called, what it is conditioned on, and what its text encoders make."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffpp_fast.networks.conditioning import TEXT, TEXT_MASK, Conditioning
from diffpp_fast.networks.tokens import tokenize

#: The argument for pooled text, by the name that flow transformers of diffusers have for it.
POOLED = "pooled_projections"
#: The argument for the guidance scale that a network is told, where it was distilled from guided predictions.
GUIDANCE = "guidance"
#: Projections of attention, and those of text that is attended to together with the picture.
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
JOINT_ATTENTION = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


class Inputs(NamedTuple):
    """The inputs of a network besides latents and time.

    Attributes:
        width: channels of text.
        pooled: channels of pooled text; None: there is none.
        sizes: whether it is told resolution and aspect ratio, as PixArt's at 1024 are.
        channels: of the latents.
        predicted: channels that come out; twice as many where a variance is predicted, too.
        divisor: of height and width of the latents.
        patches: the most that it has positions for; None: any number.
        side: the most patches along a side; None: any number.
    """

    width: int | None
    pooled: int | None
    sizes: bool
    channels: int
    predicted: int
    divisor: int
    patches: int | None = None
    side: int | None = None


class EncoderKind(NamedTuple):
    """A text encoder that a family takes.

    Attributes:
        model_types: by transformers' names, any of them.
        loader: the class of transformers that loads it.
        length: tokens of a prompt where the configuration leaves them open.
        optional: a pipeline may do without it.
    """

    model_types: tuple[str, ...]
    loader: str
    length: int
    optional: bool = False


class Family(ABC):
    """The differences of one family from networks that are called with latents, a time and hidden states of text alone.

    Attributes:
        kinds: classes of diffusers' networks.
        pipelines: classes of diffusers' pipelines whose networks they are.
        name: for messages.
        encoders: the text encoders, in the order of `models.text_encoder`, `text_encoder_2` and `text_encoder_3`.
        masked: networks are given a mask of text.
        times: of the schedule that a call takes for granted; None: any number.
        sample_size: height and width of latents where a network's `config.json` has none.
        guidance: the guidance scale that networks with an embedding of it are told where nothing else is said, as by
            the pipeline; None: no network of the family has one.
        unguided: the arguments of a pipeline's call without guidance.
        last_layer: the path of the layer that predicts; None: where `last_layer` finds it.
        lora_targets: the ends of the names of the layers that get adapters where nothing else is said: all projections
            of attention and feed-forward layers. What embeds, modulates and predicts is left: it serves all blocks, or
            depends on the time alone.
    """

    kinds: tuple[str, ...]
    pipelines: tuple[str, ...]
    name: str
    encoders: tuple[EncoderKind, ...]
    masked: bool = False
    times: int | None = None
    sample_size: int | None = None
    guidance: float | None = None
    unguided: str = "guidance_scale=1.0"
    last_layer: str | None = None
    lora_targets: tuple[str, ...] = (*ATTENTION, *JOINT_ATTENTION, "net.0.proj", "net.2")

    @abstractmethod
    def inputs(self, facts: Mapping[str, Any]) -> Inputs:
        """Return what a network asks for.

        Args:
            facts: its configuration, with the defaults of its class.

        Raises ValueError, as the rest of a sentence about the network, for one that nothing here feeds.
        """

    @abstractmethod
    def text(self, models: Sequence[tuple[nn.Module, Any, int] | None], facts: Mapping[str, Any]) -> FamilyText:
        """Return what makes prompts a conditioning.

        Args:
            models: of each of `encoders` model, tokenizer and tokens per prompt; None for an optional one that is not
                there.
            facts: the configuration of the network, with the defaults of its class.
        """

    @abstractmethod
    def text_widths(self, configs: Sequence[Any | None], facts: Mapping[str, Any]) -> tuple[int, int | None]:
        """Return the channels of hidden states and of pooled text that encoders of these configurations make."""

    def tokens(self, lengths: Sequence[int]) -> int:
        """Return how many hidden states a prompt has, of the tokens that each encoder gets."""
        return lengths[0]

    def told(self, facts: Any) -> float | None:
        """Return the guidance scale that a network is told where nothing else is said; None: it is told none."""
        return self.guidance if facts.get("guidance_embeds") else None

    def prepare(self, network: nn.Module) -> None:  # noqa: B027 - most change nothing
        """Change a network in place, so that it is called with tensors [B, ...] alone; repeated, nothing happens."""

    def call(self, network: nn.Module, x: Tensor, t: Tensor, conditioning: Mapping[str, Any]) -> Tensor:
        """Return a network's prediction by our convention, eps - x0 of a flow: [B, C', H, W].

        Args:
            network: from diffusers.
            x: latents [B, C, H, W].
            t: times of the schedule, int64 [B].
            conditioning: tensors [B, ...] by name, as `text` makes them.
        """
        prediction: Tensor = network(x, timestep=t, return_dict=False, **conditioning)[0]
        return prediction

    def shapes(self, inputs: Inputs, tokens: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return shape and dtype of each tensor of a prompt's conditioning, for plans."""
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {TEXT: ((tokens, inputs.width or 0), torch.float32)}
        if self.masked:
            shapes[TEXT_MASK] = (tokens,), torch.int64
        if inputs.pooled is not None:
            shapes[POOLED] = (inputs.pooled,), torch.float32
        return shapes


class FamilyText(nn.Module, ABC):
    """A family's frozen text encoders: prompts -> `Conditioning`.

    Args:
        models: of each encoder model, tokenizer and tokens per prompt.

    Attributes:
        negative_prompt: `null` is this prompt, encoded, in place of the empty one; None: the empty one.
        zero_empty: `null` is zeros where there is no negative prompt.
    """

    def __init__(self, models: Sequence[tuple[nn.Module, Any, int]]) -> None:
        super().__init__()
        self.models = nn.ModuleList(model for model, _, _ in models).eval().requires_grad_(False)
        self.tokenizers = tuple(tokenizer for _, tokenizer, _ in models)
        self.lengths = tuple(length for _, _, length in models)
        self.negative_prompt: str | None = None
        self.zero_empty = False

    @abstractmethod
    def encode(self, prompts: list[str], *, empty: bool = False) -> dict[str, Any]:
        """Return tensors [B, ...] by the names of the network's arguments, float32 but for masks.

        Args:
            prompts: B of them.
            empty: they are what guidance leads away from, for families that encode it in another way.
        """

    def ids(self, number: int, prompts: list[str]) -> Tensor:
        """Return the tokens of prompts for the encoder of this number, where that is."""
        found = tokenize(self.tokenizers[number], prompts, self.lengths[number])
        ids: Tensor = found["input_ids"].to(device_of(self.models[number]))
        return ids

    @torch.no_grad()
    def forward(self, prompts: Sequence[str]) -> Conditioning:
        """B prompts -> their conditioning."""
        return Conditioning(tuple(prompts), self.encode(list(prompts)))

    @torch.no_grad()
    def null(self) -> Conditioning:
        """The unconditional counterpart of one prompt, for guidance."""
        prompt = self.negative_prompt or ""
        found = Conditioning((prompt,), self.encode([prompt], empty=True))
        if self.negative_prompt is None and self.zero_empty:
            return found.map(lambda tensor: torch.zeros_like(tensor) if tensor.is_floating_point() else tensor)
        return found


def run_block(network: Any, block: nn.Module, *inputs: Any) -> Any:
    """Call a block of a network as diffusers' networks do: by their checkpointing, where that is on."""
    if torch.is_grad_enabled() and network.gradient_checkpointing:
        return network._gradient_checkpointing_func(block, *inputs)
    return block(*inputs)


def device_of(model: nn.Module) -> torch.device:
    """Return where a model is."""
    return next(model.parameters()).device


def times_of(t: Tensor, scale: float) -> Tensor:
    """Return times of the schedule, int64 [B], as float32 multiples of `scale`."""
    return t.to(torch.float32) * scale
