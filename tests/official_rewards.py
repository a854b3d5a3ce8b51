"""Reward models as their authors wrote them: keys and shapes of their files, and their scores in float64.

Written from openai/CLIP clip/model.py, open_clip model_configs/ViT-H-14.json, salesforce/BLIP models/vit.py and med.py,
THUDM/ImageReward ImageReward.py, christophschuhmann/improved-aesthetic-predictor simple_inference.py,
Kwai-Kolors/MPS trainer/models/clip_model.py and cross_modeling.py, linzhiqiu/t2v_metrics clip_t5_model.py, mm_utils.py
and clip_t5, and transformers modeling_t5.py.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

#: Of OpenAI's CLIP.
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
Shapes = dict[str, tuple[int, ...]]
State = dict[str, Tensor]


class Tower(NamedTuple):
    width: int
    layers: int
    heads: int
    patch: int = 0
    image: int = 0
    vocabulary: int = 0
    length: int = 0


class ClipSizes(NamedTuple):
    vision: Tower
    text: Tower
    features: int


class T5Sizes(NamedTuple):
    width: int
    wide: int
    heads: int
    head: int
    layers: int
    vocabulary: int


VIT_H_14 = ClipSizes(Tower(1280, 32, 16, 14, 224), Tower(1024, 24, 16, vocabulary=49408, length=77), 1024)
VIT_L_14 = ClipSizes(Tower(1024, 24, 16, 14, 224), Tower(768, 12, 12, vocabulary=49408, length=77), 768)
#: Of a CLIP that runs in milliseconds; the vocabulary is that of `write_clip_tokenizer`.
SMALL_CLIP = ClipSizes(Tower(48, 3, 4, 8, 32), Tower(32, 2, 4, vocabulary=518, length=12), 768)

BLIP_L = (Tower(1024, 24, 16, 16, 224), Tower(768, 12, 12, vocabulary=30524, length=512))
SMALL_BLIP = (Tower(48, 3, 4, 8, 32), Tower(32, 2, 4, vocabulary=14, length=40))

VIT_L_14_336 = VIT_L_14._replace(vision=Tower(1024, 24, 16, 14, 336))
FLAN_T5_XL = T5Sizes(2048, 5120, 32, 64, 24, 32128)
FLAN_T5_XXL = T5Sizes(4096, 10240, 64, 64, 24, 32128)
#: The vocabulary has room for more than that of `write_t5_tokenizer`, as T5's has.
SMALL_T5 = T5Sizes(32, 48, 4, 6, 2, 112)


# -- keys and shapes ---------------------------------------------------------------------------------------------------


def clip_shapes(sizes: ClipSizes) -> Shapes:
    """Return the shapes of a CLIP's state dict in OpenAI's and open_clip's format."""
    vision, text, features = sizes
    shapes: Shapes = {
        "positional_embedding": (text.length, text.width),
        "text_projection": (text.width, features),
        "logit_scale": (),
        "visual.class_embedding": (vision.width,),
        "visual.positional_embedding": ((vision.image // vision.patch) ** 2 + 1, vision.width),
        "visual.proj": (vision.width, features),
        "visual.conv1.weight": (vision.width, 3, vision.patch, vision.patch),
        "token_embedding.weight": (text.vocabulary, text.width),
        **_affine("visual.ln_pre", vision.width),
        **_affine("visual.ln_post", vision.width),
        **_affine("ln_final", text.width),
    }
    for prefix, tower in (("visual.transformer", vision), ("transformer", text)):
        for layer in range(tower.layers):
            block, width = f"{prefix}.resblocks.{layer}", tower.width
            shapes |= {
                **_affine(f"{block}.ln_1", width),
                f"{block}.attn.in_proj_weight": (3 * width, width),
                f"{block}.attn.in_proj_bias": (3 * width,),
                **_linear(f"{block}.attn.out_proj", width, width),
                **_affine(f"{block}.ln_2", width),
                **_linear(f"{block}.mlp.c_fc", width, 4 * width),
                **_linear(f"{block}.mlp.c_proj", 4 * width, width),
            }
    return shapes


def imagereward_shapes(towers: tuple[Tower, Tower]) -> Shapes:
    vision, text = towers
    visual, encoder = "blip.visual_encoder", "blip.text_encoder"
    shapes: Shapes = {
        f"{visual}.cls_token": (1, 1, vision.width),
        f"{visual}.pos_embed": (1, (vision.image // vision.patch) ** 2 + 1, vision.width),
        f"{visual}.patch_embed.proj.weight": (vision.width, 3, vision.patch, vision.patch),
        f"{visual}.patch_embed.proj.bias": (vision.width,),
        **_affine(f"{visual}.norm", vision.width),
        f"{encoder}.embeddings.word_embeddings.weight": (text.vocabulary, text.width),
        f"{encoder}.embeddings.position_embeddings.weight": (text.length, text.width),
        **_affine(f"{encoder}.embeddings.LayerNorm", text.width),
    }
    for layer in range(vision.layers):
        block, width = f"{visual}.blocks.{layer}", vision.width
        shapes |= {
            **_affine(f"{block}.norm1", width),
            **_linear(f"{block}.attn.qkv", width, 3 * width),
            **_linear(f"{block}.attn.proj", width, width),
            **_affine(f"{block}.norm2", width),
            **_linear(f"{block}.mlp.fc1", width, 4 * width),
            **_linear(f"{block}.mlp.fc2", 4 * width, width),
        }
    for layer in range(text.layers):
        block, width = f"{encoder}.encoder.layer.{layer}", text.width
        for attention, source in (("attention", width), ("crossattention", vision.width)):
            shapes |= {
                **_linear(f"{block}.{attention}.self.query", width, width),
                **_linear(f"{block}.{attention}.self.key", source, width),
                **_linear(f"{block}.{attention}.self.value", source, width),
                **_linear(f"{block}.{attention}.output.dense", width, width),
                **_affine(f"{block}.{attention}.output.LayerNorm", width),
            }
        shapes |= {
            **_linear(f"{block}.intermediate.dense", width, 4 * width),
            **_linear(f"{block}.output.dense", 4 * width, width),
            **_affine(f"{block}.output.LayerNorm", width),
        }
    return shapes | {f"mlp.{name}": shape for name, shape in head_shapes(text.width).items()}


def head_shapes(width: int) -> Shapes:
    sizes = (width, 1024, 128, 64, 16, 1)
    shapes: Shapes = {}
    for place, inputs, outputs in zip((0, 2, 4, 6, 7), sizes, sizes[1:], strict=False):
        shapes |= _linear(f"layers.{place}", inputs, outputs)
    return shapes


def cross_shapes(width: int) -> Shapes:
    """Return the shapes of MPS's cross attention: 4 layers, 16 heads of 64, one head of keys and values."""
    shapes: Shapes = {}
    for layer in range(4):
        cross, block = (f"cross_model.layers.{layer}.{part}.fn" for part in (0, 1))
        shapes |= {
            f"{cross}.norm.weight": (width,),
            f"{cross}.to_q.weight": (1024, width),
            f"{cross}.to_kv.weight": (128, width),
            f"{cross}.to_out.weight": (width, 1024),
            f"{cross}.ff.0.weight": (8 * width, width),
            f"{cross}.ff.2.weight": (width, 4 * width),
            f"{block}.norm.weight": (width,),
            f"{block}.fused_attn_ff_proj.weight": (1024 + 64 + 64 + 8 * width, width),
            f"{block}.attn_out.weight": (width, 1024),
            f"{block}.ff_out.1.weight": (width, 4 * width),
        }
    return shapes


def clip_t5_state(clip: State, t5: State) -> State:
    """The state dict that CLIP-FlanT5's authors saved: CLIP's image tower, the projector and T5."""
    vision = {
        f"vision_tower.vision_tower.{name}": value
        for name, value in transformers_clip_state(clip).items()
        if name.startswith("vision_model.")
    }
    # The same tensor by the names of all that hold it.
    tied = {f"{holder}embed_tokens.weight": t5["shared.weight"] for holder in ("", "encoder.", "decoder.")}
    return vision | t5 | tied


def t5_shapes(sizes: T5Sizes, vision: Tower) -> Shapes:
    """Return the shapes of an untied T5 with gated feedforward parts, and of a projector of two layers."""
    width, inner = sizes.width, sizes.heads * sizes.head
    shapes: Shapes = {
        "shared.weight": (sizes.vocabulary, width),
        "lm_head.weight": (sizes.vocabulary, width),
        **_linear("mm_projector.0", vision.width, width),
        **_linear("mm_projector.2", width, width),
    }
    for stack, attentions in (("encoder", ("SelfAttention",)), ("decoder", ("SelfAttention", "EncDecAttention"))):
        shapes[f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = (32, sizes.heads)
        shapes[f"{stack}.final_layer_norm.weight"] = (width,)
        for layer in range(sizes.layers):
            block = f"{stack}.block.{layer}.layer"
            for place, attention in enumerate(attentions):
                shapes |= {f"{block}.{place}.{attention}.{letter}.weight": (inner, width) for letter in "qkv"}
                shapes[f"{block}.{place}.{attention}.o.weight"] = (width, inner)
                shapes[f"{block}.{place}.layer_norm.weight"] = (width,)
            last = f"{block}.{len(attentions)}"
            shapes |= {
                f"{last}.DenseReluDense.wi_0.weight": (sizes.wide, width),
                f"{last}.DenseReluDense.wi_1.weight": (sizes.wide, width),
                f"{last}.DenseReluDense.wo.weight": (width, sizes.wide),
                f"{last}.layer_norm.weight": (width,),
            }
    return shapes


def mps_buffers(width: int) -> State:
    """Tensors that a saved MPS holds besides its weights."""
    buffers: State = {}
    for layer in range(4):
        buffers |= {f"cross_model.layers.{layer}.{part}.fn.norm.bias": torch.zeros(width) for part in (0, 1)}
        buffers[f"cross_model.layers.{layer}.1.fn.rotary_emb.inv_freq"] = torch.ones(32)
    return buffers


def _linear(name: str, inputs: int, outputs: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _affine(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def random_state(shapes: Shapes, seed: int = 0) -> State:
    """Weights at which features and gradients are of order 1."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        value = torch.randn(shape, generator=generator)
        if re.search(r"(ln_\w+|norm\d?|LayerNorm)\.weight$", name):
            value = 1 + 0.2 * value
        elif len(shape) > 1 and "embed" not in name and "token" not in name:
            value = value / math.sqrt(math.prod(shape[1:]))
        state[name] = value if name == "logit_scale" else value * (0.1 if name.endswith("bias") else 1.0)
    if "logit_scale" in state:
        state["logit_scale"] = torch.tensor(4.6052)
    return state


def transformers_clip_state(state: State) -> State:
    """The same weights under the keys of transformers' CLIPModel."""
    converted = {
        "logit_scale": state["logit_scale"],
        "text_projection.weight": state["text_projection"].T.contiguous(),
        "visual_projection.weight": state["visual.proj"].T.contiguous(),
        "text_model.embeddings.token_embedding.weight": state["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": state["positional_embedding"],
        "vision_model.embeddings.class_embedding": state["visual.class_embedding"],
        "vision_model.embeddings.position_embedding.weight": state["visual.positional_embedding"],
        "vision_model.embeddings.patch_embedding.weight": state["visual.conv1.weight"],
    }
    norms = {"visual.ln_pre": "vision_model.pre_layrnorm", "visual.ln_post": "vision_model.post_layernorm"}
    for ours, theirs in {**norms, "ln_final": "text_model.final_layer_norm"}.items():
        for part in ("weight", "bias"):
            converted[f"{theirs}.{part}"] = state[f"{ours}.{part}"]
    for prefix, model in (("visual.transformer", "vision_model"), ("transformer", "text_model")):
        for layer in range(sum(name.startswith(prefix) and name.endswith("ln_1.bias") for name in state)):
            old, new = f"{prefix}.resblocks.{layer}", f"{model}.encoder.layers.{layer}"
            for part in ("weight", "bias"):
                width = state[f"{old}.ln_1.bias"].numel()
                packed = state[f"{old}.attn.in_proj_{part}"]
                for index, letter in enumerate("qkv"):
                    rows = packed[index * width : (index + 1) * width].clone()
                    converted[f"{new}.self_attn.{letter}_proj.{part}"] = rows
                for ours, theirs in (
                    ("attn.out_proj", "self_attn.out_proj"),
                    ("ln_1", "layer_norm1"),
                    ("ln_2", "layer_norm2"),
                    ("mlp.c_fc", "mlp.fc1"),
                    ("mlp.c_proj", "mlp.fc2"),
                ):
                    converted[f"{new}.{theirs}.{part}"] = state[f"{old}.{ours}.{part}"]
    return converted


# -- forward passes, float64 -------------------------------------------------------------------------------------------


def _attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores + mask
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def _norm(x: Tensor, state: State, name: str, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]


def _affine_map(x: Tensor, state: State, name: str) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def _gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def _clip_tower(x: Tensor, state: State, prefix: str, tower: Tower, quick: bool, mask: Tensor | None) -> Tensor:
    for layer in range(tower.layers):
        block = f"{prefix}.resblocks.{layer}"
        packed = _norm(x, state, f"{block}.ln_1", 1e-5) @ state[f"{block}.attn.in_proj_weight"].T
        q, k, v = (packed + state[f"{block}.attn.in_proj_bias"]).chunk(3, -1)
        x = x + _affine_map(_attend(q, k, v, tower.heads, mask), state, f"{block}.attn.out_proj")
        hidden = _affine_map(_norm(x, state, f"{block}.ln_2", 1e-5), state, f"{block}.mlp.c_fc")
        hidden = hidden * torch.sigmoid(1.702 * hidden) if quick else _gelu(hidden)
        x = x + _affine_map(hidden, state, f"{block}.mlp.c_proj")
    return x


def double(state: State) -> State:
    return {name: value.double() for name, value in state.items()}


def clip_image(state: State, sizes: ClipSizes, pixels: Tensor, *, quick: bool) -> Tensor:
    """Unit image features [B, D] of pixels [B, 3, size, size], float64."""
    x = _image_tokens(state, sizes, pixels, quick=quick)
    features = _norm(x[:, 0], state, "visual.ln_post", 1e-5) @ state["visual.proj"]
    return features / features.norm(dim=1, keepdim=True)


def _image_tokens(state: State, sizes: ClipSizes, pixels: Tensor, *, quick: bool) -> Tensor:
    tower = sizes.vision
    x = F.conv2d(pixels.double(), state["visual.conv1.weight"], stride=tower.patch).flatten(2).transpose(1, 2)
    x = torch.cat((state["visual.class_embedding"].expand(len(x), 1, -1), x), 1) + state["visual.positional_embedding"]
    return _clip_tower(_norm(x, state, "visual.ln_pre", 1e-5), state, "visual.transformer", tower, quick, None)


def clip_text(state: State, sizes: ClipSizes, ids: Tensor, *, quick: bool) -> Tensor:
    """Unit text features [B, D] of ids [B, L] whose highest number ends the prompt, float64."""
    x = _text_tokens(state, sizes, ids, quick=quick)
    features = x[torch.arange(len(ids)), ids.argmax(1)] @ state["text_projection"]
    return features / features.norm(dim=1, keepdim=True)


def _text_tokens(state: State, sizes: ClipSizes, ids: Tensor, *, quick: bool) -> Tensor:
    length = ids.shape[1]
    mask = torch.full((length, length), -torch.inf, dtype=torch.float64).triu(1)
    x = state["token_embedding.weight"][ids] + state["positional_embedding"][:length]
    return _norm(_clip_tower(x, state, "transformer", sizes.text, quick, mask), state, "ln_final", 1e-5)


def mps_score(state: State, sizes: ClipSizes, pixels: Tensor, ids: Tensor, condition: Tensor) -> Tensor:
    """MPS for each image and prompt by itself, as its published example calls it."""
    scores = []
    for picture, prompt in zip(pixels, ids, strict=True):
        image = _image_tokens(state, sizes, picture[None], quick=False) @ state["visual.proj"]
        text, asked = (
            _text_tokens(state, sizes, each[None], quick=False) @ state["text_projection"]
            for each in (prompt, condition)
        )
        likeness = torch.einsum("bid,bjd->bji", text, asked).max(1, keepdim=True).values
        likeness = likeness / likeness.max()
        mask = torch.where(likeness > 0.01, 0.0, -torch.inf).double()[:, None]
        for layer in range(4):
            image = _cross_layer(state, f"cross_model.layers.{layer}", image, text, mask)
        first, end = image[0, 0], text[0, prompt.argmax()]
        scores.append(state["logit_scale"].exp() * (first / first.norm() @ (end / end.norm())))
    return torch.stack(scores)


def _cross_layer(state: State, name: str, image: Tensor, text: Tensor, mask: Tensor) -> Tensor:
    cross, block = (f"{name}.{part}.fn" for part in (0, 1))

    def normed(x: Tensor, part: str) -> Tensor:
        return _norm(x, {**state, f"{part}.norm.bias": torch.zeros(())}, f"{part}.norm", 1e-5)

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | float) -> Tensor:
        q = q.unflatten(2, (16, 64)).transpose(1, 2)
        weights = (torch.einsum("bhid,bjd->bhij", q / 8.0, k) + mask).softmax(-1)
        return torch.einsum("bhij,bjd->bhid", weights, v).transpose(1, 2).flatten(2)

    def gated(x: Tensor) -> Tensor:
        value, gate = x.chunk(2, -1)
        return gate / (1 + (-gate).exp()) * value

    def turned(x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[-2])[:, None] / 10000.0 ** (torch.arange(0, 64, 2).double() / 64)
        z = torch.complex(x[..., :32], x[..., 32:]) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat((z.real, z.imag), -1)

    x = normed(image, cross)
    k, v = (text @ state[f"{cross}.to_kv.weight"].T).chunk(2, -1)
    out = attend(x @ state[f"{cross}.to_q.weight"].T, k, v, mask) @ state[f"{cross}.to_out.weight"].T
    image = image + out + gated(x @ state[f"{cross}.ff.0.weight"].T) @ state[f"{cross}.ff.2.weight"].T
    parts = normed(image, block) @ state[f"{block}.fused_attn_ff_proj.weight"].T
    q, k, v, wide = parts.split((1024, 64, 64, parts.shape[-1] - 1152), -1)
    q = turned(q.unflatten(2, (16, 64)).transpose(1, 2)).transpose(1, 2).flatten(2)
    out = attend(q, turned(k), v, 0.0) @ state[f"{block}.attn_out.weight"].T
    return image + out + gated(wide) @ state[f"{block}.ff_out.1.weight"].T


def vqascore_pixels(images: Tensor, size: int) -> Tensor:
    """Pixels of images in [-1, 1]: on squares of the mean colour in whole levels, resized and normalised."""
    mean, std = (torch.tensor(values, dtype=images.dtype).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    height, width = images.shape[2:]
    side = max(height, width)
    canvas = ((255 * mean).floor() / 255).expand(len(images), 3, side, side).clone()
    top, left = (side - height) // 2, (side - width) // 2
    canvas[:, :, top : top + height, left : left + width] = (images / 2 + 0.5).clamp(0, 1)
    return (F.interpolate(canvas, (size, size), mode="bicubic", antialias=True) - mean) / std


def vqascore(
    clip: State,
    vision: ClipSizes,
    t5: State,
    sizes: T5Sizes,
    pixels: Tensor,
    questions: list[list[int]],
    answer: list[int],
) -> Tensor:
    """exp of minus the answer's mean cross entropy, for each image by itself; -200 in a question is the image."""
    tower = vision.vision
    scores = []
    for picture, question in zip(pixels, questions, strict=True):
        weights = clip["visual.conv1.weight"]
        x = F.conv2d(picture[None].double(), weights, stride=tower.patch).flatten(2).transpose(1, 2)
        x = torch.cat((clip["visual.class_embedding"].expand(1, 1, -1), x), 1) + clip["visual.positional_embedding"]
        x = _norm(x, clip, "visual.ln_pre", 1e-5)
        # The hidden state before the last layer.
        short = tower._replace(layers=tower.layers - 1)
        x = _clip_tower(x, clip, "visual.transformer", short, True, None)[:, 1:]
        image = _affine_map(_gelu(_affine_map(x, t5, "mm_projector.0")), t5, "mm_projector.2")[0]
        place = question.index(-200)
        before, after = (torch.tensor(ids) for ids in (question[:place], question[place + 1 :]))
        embedded = torch.cat((t5["shared.weight"][before], image, t5["shared.weight"][after]))
        memory = _t5_stack(t5, "encoder", sizes, embedded, None)
        hidden = _t5_stack(t5, "decoder", sizes, t5["shared.weight"][torch.tensor([0, *answer[:-1]])], memory)
        scores.append((-F.cross_entropy(hidden @ t5["lm_head.weight"].T, torch.tensor(answer))).exp())
    return torch.stack(scores)


def _t5_stack(state: State, stack: str, sizes: T5Sizes, x: Tensor, memory: Tensor | None) -> Tensor:
    """x [L, D] -> [L, D]; the decoder's, which attends to `memory`, is causal."""

    def normed(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * state[f"{name}.weight"]

    def attend(x: Tensor, source: Tensor, name: str, added: Tensor | float) -> Tensor:
        q, k, v = (
            (states @ state[f"{name}.{letter}.weight"].T).unflatten(1, (sizes.heads, -1))
            for letter, states in (("q", x), ("k", source), ("v", source))
        )
        weights = (torch.einsum("ihd,jhd->hij", q, k) + added).softmax(2)
        return torch.einsum("hij,jhd->ihd", weights, v).flatten(1) @ state[f"{name}.o.weight"].T

    table = state[f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    places = torch.arange(len(x))
    by_distance = torch.tensor([_t5_bucket(away, memory is None) for away in range(1 - len(x), len(x))])
    position = table[by_distance[places - places[:, None] + len(x) - 1]].permute(2, 0, 1)
    if memory is not None:
        position = position + torch.full(position.shape[1:], -torch.inf, dtype=x.dtype).triu(1)
    for layer in range(sizes.layers):
        part = f"{stack}.block.{layer}.layer"
        y = normed(x, f"{part}.0.layer_norm")
        x = x + attend(y, y, f"{part}.0.SelfAttention", position)
        last = 1
        if memory is not None:
            x = x + attend(normed(x, f"{part}.1.layer_norm"), memory, f"{part}.1.EncDecAttention", 0.0)
            last = 2
        y = normed(x, f"{part}.{last}.layer_norm")
        gate, value = (y @ state[f"{part}.{last}.DenseReluDense.wi_{n}.weight"].T for n in (0, 1))
        gate = 0.5 * gate * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
        x = x + (gate * value) @ state[f"{part}.{last}.DenseReluDense.wo.weight"].T
    return normed(x, f"{stack}.final_layer_norm")


def _t5_bucket(distance: int, both_ways: bool) -> int:
    """The row of T5's table of 32 for a token that lies so far behind the one that attends to it."""
    first, rows = (16 if distance > 0 else 0, 16) if both_ways else (0, 32)
    away = abs(distance) if both_ways else max(-distance, 0)
    if away < rows // 2:
        return first + away
    farther = math.log(away / (rows // 2)) / math.log(128 / (rows // 2)) * (rows // 2)
    return first + min(rows // 2 + int(farther), rows - 1)


def head_score(state: State, features: Tensor, prefix: str = "") -> Tensor:
    for place in (0, 2, 4, 6, 7):
        features = _affine_map(features, state, f"{prefix}layers.{place}")
    return features.squeeze(1)


def imagereward_score(state: State, towers: tuple[Tower, Tower], pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    vision, text = towers
    root = "blip.visual_encoder"
    weight, bias = state[f"{root}.patch_embed.proj.weight"], state[f"{root}.patch_embed.proj.bias"]
    x = F.conv2d(pixels.double(), weight, bias, stride=vision.patch).flatten(2).transpose(1, 2)
    x = torch.cat((state[f"{root}.cls_token"].expand(len(x), -1, -1), x), 1) + state[f"{root}.pos_embed"]
    for layer in range(vision.layers):
        block = f"{root}.blocks.{layer}"
        q, k, v = _affine_map(_norm(x, state, f"{block}.norm1", 1e-6), state, f"{block}.attn.qkv").chunk(3, -1)
        x = x + _affine_map(_attend(q, k, v, vision.heads), state, f"{block}.attn.proj")
        hidden = _gelu(_affine_map(_norm(x, state, f"{block}.norm2", 1e-6), state, f"{block}.mlp.fc1"))
        x = x + _affine_map(hidden, state, f"{block}.mlp.fc2")
    image = _norm(x, state, f"{root}.norm", 1e-6)

    root = "blip.text_encoder"
    y = state[f"{root}.embeddings.word_embeddings.weight"][ids]
    y = y + state[f"{root}.embeddings.position_embeddings.weight"][: ids.shape[1]]
    y = _norm(y, state, f"{root}.embeddings.LayerNorm", 1e-12)
    padding = (1.0 - mask.double())[:, None, None] * -1e9
    for layer in range(text.layers):
        block = f"{root}.encoder.layer.{layer}"
        for name, source, forbidden in (("attention", None, padding), ("crossattention", image, None)):
            part = f"{block}.{name}"
            states = y if source is None else source
            q = _affine_map(y, state, f"{part}.self.query")
            k, v = (_affine_map(states, state, f"{part}.self.{which}") for which in ("key", "value"))
            out = _affine_map(_attend(q, k, v, text.heads, forbidden), state, f"{part}.output.dense")
            y = _norm(out + y, state, f"{part}.output.LayerNorm", 1e-12)
        hidden = _gelu(_affine_map(y, state, f"{block}.intermediate.dense"))
        y = _norm(_affine_map(hidden, state, f"{block}.output.dense") + y, state, f"{block}.output.LayerNorm", 1e-12)
    return (head_score(state, y[:, 0], "mlp.") - 0.16717362830052426) / 1.0333394966054072


# -- files -------------------------------------------------------------------------------------------------------------

MERGES = ("c a", "ca t</w>", "d o", "do g</w>")
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "cat", "dog", "##s", "the", ",", "[DEC]", "[ENC]")


def write_clip_tokenizer(folder: Path) -> Path:
    """A file of merges as OpenAI's, of 4 merges: 256 letters, 256 with </w>, the merges, start, end: 518 tokens."""
    path = folder / "bpe.txt"
    path.write_text("\n".join(("#version: 0.2", *MERGES, "")), encoding="utf-8")
    return path


def write_bert_vocabulary(folder: Path) -> Path:
    """12 words; BLIP's two tokens come after them."""
    path = folder / "vocab.txt"
    path.write_text("\n".join(WORDS[:12]) + "\n")
    return path


def write_t5_tokenizer(folder: Path) -> Path:
    """T5's tokenizer with a token for each printable letter, and for "Yes": 100 tokens."""
    from transformers import T5Tokenizer

    letters = ["<pad>", "</s>", "<unk>", "\u2581", "\u2581Yes", *map(chr, range(ord("!"), ord("~") + 1))]
    vocabulary = [(letter, 0.0 if len(letter) > 3 else -1.0) for letter in letters]
    T5Tokenizer(vocab=vocabulary, extra_ids=1).save_pretrained(folder)
    return folder


def t5_ids(text: str) -> list[int]:
    """Tokens by that vocabulary: of each word its beginning and its letters, and the end."""
    words = ([4] if word == "Yes" else [3, *(5 + ord(letter) - ord("!") for letter in word)] for word in text.split())
    return [*(number for word in words for number in word), 1]


def write_clip_t5(folder: Path, state: State, parts: int = 3) -> Path:
    """Pickles of tensors, and the index that says which of them holds what."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"pytorch_model-{part + 1:05}-of-{parts:05}.bin" for part in range(parts)]
    held = {name: names[place % parts] for place, name in enumerate(state)}
    for file in names:
        torch.save({name: value for name, value in state.items() if held[name] == file}, folder / file)
    size = sum(value.nbytes for value in state.values())
    index = {"metadata": {"total_size": size}, "weight_map": held}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


def transformer_sizes(tower: Tower) -> dict[str, int]:
    """Sizes of a tower by the names of transformers' configurations."""
    return {
        "hidden_size": tower.width,
        "intermediate_size": 4 * tower.width,
        "num_hidden_layers": tower.layers,
        "num_attention_heads": tower.heads,
    }


def clip_architecture(sizes: ClipSizes, activation: str) -> dict[str, Any]:
    """Arguments of transformers' CLIPConfig."""
    vision, text, features = sizes
    return {
        "vision_config": {
            **transformer_sizes(vision),
            "patch_size": vision.patch,
            "image_size": vision.image,
            "hidden_act": activation,
            "projection_dim": features,
        },
        "text_config": {
            **transformer_sizes(text),
            "vocab_size": text.vocabulary,
            "max_position_embeddings": text.length,
            "hidden_act": activation,
            "eos_token_id": text.vocabulary - 1,
            "projection_dim": features,
        },
        "projection_dim": features,
    }


def blip_architecture(towers: tuple[Tower, Tower]) -> dict[str, Any]:
    from diffpp_fast.rewards.scores import IMAGEREWARD

    vision, text = towers
    return {
        "vision": {
            **IMAGEREWARD["vision"],
            **transformer_sizes(vision),
            "patch_size": vision.patch,
            "image_size": vision.image,
        },
        "text": {
            **IMAGEREWARD["text"],
            "vocab_size": text.vocabulary,
            **transformer_sizes(text),
            "encoder_hidden_size": vision.width,
            "max_position_embeddings": text.length,
        },
    }


def write_clip_folder(
    folder: Path, state: State, sizes: ClipSizes = SMALL_CLIP, activation: str = "quick_gelu"
) -> Path:
    """A CLIP in transformers' format, with its tokenizer."""
    from safetensors.torch import save_file
    from transformers import CLIPConfig

    from diffpp_fast.rewards.text import load_clip_tokenizer

    folder.mkdir(parents=True)
    CLIPConfig(**clip_architecture(sizes, activation)).save_pretrained(folder)
    save_file(transformers_clip_state(state), folder / "model.safetensors")
    load_clip_tokenizer(write_clip_tokenizer(folder)).save_pretrained(folder)
    return folder
