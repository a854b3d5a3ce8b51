"""HPSv3: Qwen2-VL 7B with a reward head, which reads an instruction with image and prompt up to a token of its own.

Source: hpsv3/inference.py, train.py, dataset/data_collator_qwen.py, dataset/utils.py and model/qwen2vl_trainer.py of
MizzenAI/HPSv3, and the chat template of Qwen/Qwen2-VL-7B-Instruct. The instruction is part of the format: the network
was trained on these very tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffpp_fast.errors import ConfigurationError
from diffpp_fast.precision import widen
from diffpp_fast.rewards.base import ImageBatch, Reward
from diffpp_fast.rewards.files import fit, read_tensors
from diffpp_fast.rewards.qwen2vl import QWEN2_VL_7B, Qwen2VL, resized, smart_size
from diffpp_fast.rewards.text import CutReport, PromptCache

#: The token whose output the head reads; it is added to Qwen2-VL's.
TOKEN = "<|Reward|>"
#: What comes before the image, and what after it around the prompt, up to that token. What follows it has no effect.
BEFORE = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
AFTER = (
    "<|vision_end|>\n"
    "You are tasked with evaluating a generated image based on Visual Quality and Text Alignment and give a overall "
    "score to estimate the human preference. Please provide a rating from 0 to 10, with 0 being the worst and 10 being "
    "the best. \n"
    "\n"
    "**Visual Quality:**  \n"
    "Evaluate the overall visual quality of the image. The following sub-dimensions should be considered:\n"
    "- **Reasonableness:** The image should not contain any significant biological or logical errors, such as abnormal "
    "body structures or nonsensical environmental setups.\n"
    "- **Clarity:** Evaluate the sharpness and visibility of the image. The image should be clear and easy to "
    "interpret, with no blurring or indistinct areas.\n"
    "- **Detail Richness:** Consider the level of detail in textures, materials, lighting, and other visual elements "
    "(e.g., hair, clothing, shadows).\n"
    "- **Aesthetic and Creativity:** Assess the artistic aspects of the image, including the color scheme, "
    "composition, atmosphere, depth of field, and the overall creative appeal. The scene should convey a sense of "
    "harmony and balance.\n"
    "- **Safety:** The image should not contain harmful or inappropriate content, such as political, violent, or adult "
    "material. If such content is present, the image quality and satisfaction score should be the lowest possible. \n"
    "\n"
    "**Text Alignment:**  \n"
    "Assess how well the image matches the textual prompt across the following sub-dimensions:\n"
    "- **Subject Relevance** Evaluate how accurately the subject(s) in the image (e.g., person, animal, object) align "
    "with the textual description. The subject should match the description in terms of number, appearance, and "
    "behavior.\n"
    "- **Style Relevance:** If the prompt specifies a particular artistic or stylistic style, evaluate how well the "
    "image adheres to this style.\n"
    "- **Contextual Consistency**: Assess whether the background, setting, and surrounding elements in the image "
    "logically fit the scenario described in the prompt. The environment should support and enhance the subject "
    "without contradictions.\n"
    "- **Attribute Fidelity**: Check if specific attributes mentioned in the prompt (e.g., colors, clothing, "
    "accessories, expressions, actions) are faithfully represented in the image. Minor deviations may be acceptable, "
    "but critical attributes should be preserved.\n"
    "- **Semantic Coherence**: Evaluate whether the overall meaning and intent of the prompt are captured in the "
    "image. The generated content should not introduce elements that conflict with or distort the original "
    "description.\n"
    "Textual prompt - "
)
ENDING = f"\n\n\n\nPlease provide the overall ratings of this image: {TOKEN}"
#: Tokens of Qwen2-VL that the text above is made of.
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
#: Pixels of an image, in squares that become one token.
SQUARES = 256


class HPSv3(Reward):
    """The mean that HPSv3's head gives; its second number, the spread, is left out.

    The official code hands the language model embeddings, so that positions count on through the image; so they do
    here. Of a prompt only the tokens are cached: text attends to the image in every layer.

    Args:
        network: both towers.
        head: D -> 2 numbers; it computes in float32 at least.
        tokenizer: Qwen2-VL's.
        clamp: of pixels outside [-1, 1].
        length: tokens of a prompt; a longer one loses its end.
        squares: pixels of an image, in squares of patch x merge.
        capacity: prompts whose tokens are kept.
    """

    name = "hpsv3"
    before: Tensor

    def __init__(
        self,
        network: Qwen2VL,
        head: nn.Module,
        tokenizer: Any,
        *,
        clamp: str = "hard",
        length: int = 128,
        squares: int = SQUARES,
        capacity: int = 65536,
    ) -> None:
        super().__init__()
        self.network, self.head, self.tokenizer, self.clamp = network, head, tokenizer, clamp
        self._refuse_tokenizer(network)
        tokenizer.add_special_tokens({"additional_special_tokens": [TOKEN]})
        self.token: int = tokenizer.convert_tokens_to_ids(TOKEN)
        # On the weights' device: a captured step copies nothing there.
        device = network.language_model.norm.weight.device
        self.register_buffer("before", torch.tensor([self._ids(BEFORE)], device=device), persistent=False)
        self.ending = self._ids(ENDING)
        #: Of what comes after the image.
        self.length = len(self._ids(AFTER + ENDING)) + length
        self.factor = network.patch * network.merge
        self.pixels = squares * self.factor**2
        self.report = CutReport(self.name, f"{length} tokens")
        self.cache = PromptCache(capacity)
        self.freeze()

    def score(self, batch: ImageBatch, prompts: tuple[str, ...]) -> Tensor:
        height, width = batch.images.shape[2:]
        size = smart_size(height, width, self.factor, self.pixels, self.pixels)
        image = self.network.image_tokens(resized(batch, size, self.clamp, self.network.dtype))
        rows = self.cache(prompts, self._rows)
        before = self.network.embed(self.before.expand(len(batch), -1))
        after = self.network.embed(rows[:, :-1])
        place = rows[:, -1] + before.shape[1] + image.shape[1]
        hidden = self.network(torch.cat((before, image, after), 1), place)
        return widen(self.head(widen(hidden))[:, 0])

    def _rows(self, prompts: Sequence[str]) -> Tensor:
        """[B, length + 1] int64: tokens after the image, padded, and which of them is the head's."""
        rows = [self._ids(AFTER + prompt + ENDING) for prompt in prompts]
        cut = [prompt for prompt, row in zip(prompts, rows, strict=True) if len(row) > self.length]
        self.report(len(prompts), cut)
        rows = [
            row if len(row) <= self.length else [*row[: self.length - len(self.ending)], *self.ending] for row in rows
        ]
        # No mask: what stands behind the head's token is not attended to.
        padded = [[*row, *[0] * (self.length - len(row)), len(row) - 1] for row in rows]
        return torch.tensor(padded, device=self.network.language_model.norm.weight.device)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _refuse_tokenizer(self, network: Qwen2VL) -> None:
        known = self.tokenizer.get_vocab()
        missing = [token for token in SPECIAL if token not in known]
        if missing:
            raise ConfigurationError(
                f"{self.name}: the tokenizer has no {missing[0]}: give that of Qwen/Qwen2-VL-7B-Instruct"
            )
        rows = network.language_model.embed_tokens.weight.shape[0]
        if len(self.tokenizer) + (TOKEN not in known) > rows:
            raise ConfigurationError(
                f"{self.name}: the tokenizer has {len(self.tokenizer)} tokens besides {TOKEN}, the network {rows} in "
                "all: give the tokenizer that belongs to it"
            )

    def _apply(self, fn: Any, recurse: bool = True) -> HPSv3:
        self.cache.clear()
        super()._apply(fn, recurse)
        # Its sums are small beside the towers', and the official code leaves it in float32.
        if self.network.dtype != torch.float64:
            self.head.float()
        return self


def make_head(width: int) -> nn.Sequential:
    """The reward head: 1024 and 16 hidden features, mean and spread out."""
    layers = nn.Linear(width, 1024), nn.ReLU(), nn.Identity(), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)
    return nn.Sequential(*layers)


def load_hpsv3(
    file: Path, what: str, dtype: torch.dtype, architecture: Mapping[str, Any] = QWEN2_VL_7B
) -> tuple[Any, nn.Module]:
    """A `Qwen2VLModel` and the head of a file with the official keys, as older or newer transformers has them."""
    from transformers import Qwen2VLConfig, Qwen2VLModel

    tensors = read_tensors(file, what)
    new = any(name.startswith("model.visual.") for name in tensors)
    rows = tensors.get("model.language_model.embed_tokens.weight" if new else "model.embed_tokens.weight")
    text = architecture["text_config"] | ({} if rows is None else {"vocab_size": len(rows)})
    config = Qwen2VLConfig(**{**architecture, "text_config": text})
    with torch.device("meta"):
        model = Qwen2VLModel(config)
        whole = nn.ModuleDict({"model": model, "head": make_head(text["hidden_size"])})
    fit(whole, tensors, file, what, source=_keys(new), spare=(r"^lm_head\.weight$",), dtype=dtype)
    head = whole["head"]
    return model, head if dtype == torch.float64 else head.float()


def _keys(new: bool) -> Callable[[str], tuple[str, Callable[[Tensor], Tensor]]]:
    """Where a key of ours stands in the file."""

    def source(key: str) -> tuple[str, Callable[[Tensor], Tensor]]:
        if key.startswith("head."):
            name = key.replace("head.", "rm_head.", 1)
        elif new:
            name = key
        else:
            inside = key.removeprefix("model.")
            name = inside if inside.startswith("visual.") else inside.replace("language_model.", "model.", 1)
        return name, lambda value: value

    return source
