"""VQAScore of CLIP-FlanT5: how likely "Yes" is where T5, shown an image's patches, is asked whether they show a text.

Source: t2v_metrics/models/vqascore_models of linzhiqiu/t2v_metrics (clip_t5_model.py, mm_utils.py and clip_t5 in it,
which its version 3.1 no longer has). The question is part of the format: the network was trained on such tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffpp_fast.errors import ConfigurationError
from diffpp_fast.precision import widen
from diffpp_fast.rewards.base import ImageBatch, Preprocessing, Reward, per_channel
from diffpp_fast.rewards.files import fit, read_parts
from diffpp_fast.rewards.flan_t5 import PAD, FlanT5, sizes_of
from diffpp_fast.rewards.text import CutReport, PromptCache
from diffpp_fast.rewards.towers import QuickGelu, recompute
from diffpp_fast.tensor_files import shapes_of

#: CLIP ViT-L/14 at 336 pixels (config.json of openai/clip-vit-large-patch14-336). The last but one layer is read.
VIT_L_14_336: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "image_size": 336,
    "hidden_act": "quick_gelu",
}
#: What comes before the image, and after it around the prompt. Each of the two parts ends with T5's end token.
BEFORE = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: "
)
QUESTION = '\nDoes this figure show "{}"? Please answer yes or no. ASSISTANT: '
ANSWER = "Yes"
#: The files of a folder or repository, in the order in which they are looked for.
FILES = ("pytorch_model.bin.index.json", "pytorch_model.bin", "model.safetensors.index.json", "model.safetensors")


class ClipFlanT5(nn.Module):
    """An image tower, what takes its patches to T5's width, and T5, frozen.

    Args:
        vision: a CLIP's, without its last layer.
        projector: patches' features -> T5's embeddings.
        t5: both of its stacks.
        checkpoint: compute each layer of the image tower again in the backward pass.
    """

    def __init__(self, vision: Any, projector: nn.Module, t5: FlanT5, checkpoint: bool) -> None:
        super().__init__()
        self.vision, self.projector, self.t5 = vision, projector, t5
        for layer in vision.encoder.layers:
            if vision.config.hidden_act == "quick_gelu":
                layer.mlp.activation_fn = QuickGelu()
        if checkpoint:
            recompute(vision.encoder.layers)

    def blocks(self) -> tuple[nn.ModuleList, ...]:
        """The lists of blocks that hold nearly all weights."""
        return self.vision.encoder.layers, self.t5.encoder.block, self.t5.decoder.block

    def image_tokens(self, pixels: Tensor) -> Tensor:
        """pixels [B, 3, size, size], normalised -> [B, patches, D] of T5."""
        patches = self.vision(pixel_values=pixels).last_hidden_state[:, 1:]
        tokens: Tensor = self.projector(patches)
        return tokens

    def forward(self, image: Tensor, before: Tensor, after: Tensor, answer: Tensor) -> Tensor:
        """Tokens of an image [B, P, D], and the ids [B, *] of what stands before it, after it and in the answer -> the
        mean of the logarithms of the answer's probabilities, [B]. Padding is not attended to."""
        embedded = torch.cat((self.t5.embed(before), image, self.t5.embed(after)), 1)
        shown = before.new_ones(image.shape[:2], dtype=torch.bool)
        seen = torch.cat((before != PAD, shown, after != PAD), 1)
        logits = widen(self.t5.decode(answer, self.t5.encode(embedded, seen), seen))
        return logits.log_softmax(2).gather(2, answer[:, :, None]).mean((1, 2))


class VQAScore(Reward):
    """exp of the mean logarithm of the probabilities of "Yes" and the end after it, as the official code has it.

    Of a prompt only the tokens are cached: in T5's encoder text and image attend to each other.

    Args:
        network: all three parts.
        tokenizer: T5's.
        preprocessing: of square images; others are padded first.
        length: tokens of a prompt; a longer one loses its end.
        capacity: prompts whose tokens are kept.
    """

    name = "vqascore"
    before: Tensor
    answer: Tensor

    def __init__(
        self,
        network: ClipFlanT5,
        tokenizer: Any,
        preprocessing: Preprocessing,
        *,
        length: int = 128,
        capacity: int = 65536,
    ) -> None:
        super().__init__()
        self.network, self.tokenizer, self.preprocessing = network, tokenizer, preprocessing
        self._refuse_tokenizer()
        # On the weights' device: a captured step copies nothing there.
        for part, text in (("before", BEFORE), ("answer", ANSWER)):
            ids = torch.tensor([self._ids(text)], device=network.t5.shared.weight.device)
            self.register_buffer(part, ids, persistent=False)
        #: Of the question.
        self.length = len(self._ids(QUESTION.format(""))) + length
        self.report = CutReport(self.name, f"{length} tokens")
        self.cache = PromptCache(capacity)
        self.freeze()

    def score(self, batch: ImageBatch, prompts: tuple[str, ...]) -> Tensor:
        image = self.network.image_tokens(self._pixels(batch))
        rows = self.cache(prompts, self._rows)
        before, answer = (ids.expand(len(batch), -1) for ids in (self.before, self.answer))
        likely: Tensor = self.network(image, before, rows, answer)
        return likely.exp()

    def _pixels(self, batch: ImageBatch) -> Tensor:
        dtype = self.network.t5.dtype
        if batch.images.shape[2] == batch.images.shape[3]:
            return batch.pixels(self.preprocessing, dtype)
        key = "padded to squares", self.preprocessing, dtype
        return batch.once(key, lambda: self.preprocessing(squared(batch.images, self.preprocessing.mean), dtype))

    def _rows(self, prompts: Sequence[str]) -> Tensor:
        """[B, length] int64: tokens of the question, padded."""
        rows = [self._ids(QUESTION.format(prompt)) for prompt in prompts]
        cut = [prompt for prompt, row in zip(prompts, rows, strict=True) if len(row) > self.length]
        self.report(len(prompts), cut)
        rows = [
            row if len(row) <= self.length else self._beginning(prompt)
            for prompt, row in zip(prompts, rows, strict=True)
        ]
        padded = [[*row, *[PAD] * (self.length - len(row))] for row in rows]
        return torch.tensor(padded, device=self.network.t5.shared.weight.device)

    def _beginning(self, prompt: str) -> list[int]:
        """Tokens of the question with as many of the prompt's first characters as it has room for."""
        fits, too_many = self._ids(QUESTION.format("")), len(prompt)
        least = 0
        while too_many - least > 1:
            middle = (least + too_many) // 2
            ids = self._ids(QUESTION.format(prompt[:middle]))
            if len(ids) <= self.length:
                least, fits = middle, ids
            else:
                too_many = middle
        return fits

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, verbose=False)["input_ids"]
        return ids

    def _refuse_tokenizer(self) -> None:
        words, rows = self.tokenizer, self.network.t5.shared.weight.shape[0]
        if words.pad_token_id != PAD or words.eos_token_id is None or self._ids(ANSWER)[-1] != words.eos_token_id:
            raise ConfigurationError(
                f"{self.name}: the tokenizer does not pad with {PAD} and end a text with a token of its own, as T5's "
                "does: give that of google/flan-t5-xxl"
            )
        if len(words) > rows:
            raise ConfigurationError(
                f"{self.name}: the tokenizer has {len(words)} tokens, the network {rows}: give the tokenizer that "
                "belongs to it"
            )

    def _apply(self, fn: Any, recurse: bool = True) -> VQAScore:
        self.cache.clear()
        super()._apply(fn, recurse)
        return self


def squared(images: Tensor, mean: Sequence[float]) -> Tensor:
    """Images [B, 3, H, W] in [-1, 1], centred on squares of the mean colour, of which 255 levels are left."""
    height, width = images.shape[2:]
    side, images = max(height, width), widen(images)
    colour = per_channel([int(255 * value) / 127.5 - 1 for value in mean], images)
    axis, rest = (2, side - height) if height < width else (3, side - width)
    bars = []
    for thickness in (rest // 2, rest - rest // 2):
        shape = [len(images), 3, *images.shape[2:]]
        shape[axis] = thickness
        bars.append(colour.expand(shape))
    return torch.cat((bars[0], images, bars[1]), axis)


def build_vqascore(t5: Mapping[str, Any], vision: Mapping[str, Any] = VIT_L_14_336) -> nn.ModuleDict:
    """CLIP's tower, projector and T5 without weights, on the device that is the default."""
    from transformers import CLIPConfig, CLIPModel, T5Config, T5ForConditionalGeneration

    # The text tower is dropped: one of a single layer.
    tower = {**vision, "num_hidden_layers": vision["num_hidden_layers"] - 1}
    text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    seen = CLIPModel(CLIPConfig(vision_config=tower, text_config=text)).vision_model
    model: Any = T5ForConditionalGeneration(T5Config(**t5))
    width = model.config.d_model
    model.lm_head = nn.Linear(width, model.config.vocab_size, bias=False)  # newer transformers ties it to `shared`
    projector = nn.Sequential(nn.Linear(vision["hidden_size"], width), nn.GELU(), nn.Linear(width, width))
    return nn.ModuleDict({"vision": seen, "projector": projector, "t5": FlanT5(model, False)})


def load_vqascore(
    path: str | Path,
    what: str,
    dtype: torch.dtype,
    checkpoint: bool,
    architecture: Mapping[str, Any] = VIT_L_14_336,
) -> ClipFlanT5:
    """The network of a file, or of several with an index, with the official `CLIPT5ForConditionalGeneration`'s keys.

    T5's sizes are those of the file.
    """
    file, tensors = read_parts(path, FILES, what)
    with torch.device("meta"):
        whole: Any = build_vqascore(sizes_of(shapes_of(tensors)), architecture)
    last = architecture["num_hidden_layers"] - 1
    spare = (
        r"^((encoder|decoder)\.)?embed_tokens\.weight$",
        rf"^vision_tower\.vision_tower\.vision_model\.encoder\.layers\.{last}\.",
        # Older files of T5 hold it, and no version of the network reads it.
        r"^decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight$",
    )
    fit(whole, tensors, file, what, source=_source, spare=spare, dtype=dtype)
    whole["t5"].checkpoint = checkpoint
    return ClipFlanT5(whole["vision"], whole["projector"], whole["t5"], checkpoint)


def _source(key: str) -> tuple[str, Callable[[Tensor], Tensor]]:
    """Where a key of ours stands in the file."""
    part, _, name = key.partition(".")
    before = {"vision": "vision_tower.vision_tower.vision_model.", "projector": "mm_projector.", "t5": ""}
    return before[part] + name, lambda value: value
