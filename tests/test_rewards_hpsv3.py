"""HPSv3 on a tiny Qwen2-VL, against transformers' own forward pass and processor on Pillow's pictures."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from test_rewards_networks import NothingFromTheHost
from torch import Tensor

from diffpp_fast import rewards
from diffpp_fast.errors import ConfigurationError
from diffpp_fast.rewards import ImageBatch, factories, hpsv3_model
from diffpp_fast.rewards.hpsv3_model import AFTER, BEFORE, ENDING, HPSv3, make_head
from diffpp_fast.rewards.qwen2vl import Qwen2VL, resized, smart_size
from diffpp_fast.rewards.text import HeldPrompts, _byte_letters

PROMPTS = ("a cat", "the dogs.", "a cat")
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
SIZES: dict[str, Any] = {
    "text_config": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "vocab_size": 320,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
    },
    "vision_config": {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2},
}
#: Shorter than the official instruction.
SHORT = "<|vision_end|>\nTextual prompt - "


def tokenizer() -> Any:
    """Bytes, and Qwen2-VL's special tokens."""
    from transformers import Qwen2Tokenizer

    made = Qwen2Tokenizer(vocab={letter: number for number, letter in enumerate(_byte_letters())}, merges=[])
    made.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    return made


def network(seed: int = 0, sizes: dict[str, Any] = SIZES) -> tuple[Any, torch.nn.Module]:
    from transformers import Qwen2VLConfig, Qwen2VLModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, head = Qwen2VLModel(Qwen2VLConfig(**sizes)), make_head(sizes["text_config"]["hidden_size"])
        for name, weight in (*model.named_parameters(), *head.named_parameters()):
            if weight.dim() > 1:
                torch.nn.init.normal_(weight, std=weight[0].numel() ** -0.5 if "embed_tokens" not in name else 1.0)
            elif "bias" in name:
                torch.nn.init.normal_(weight, std=0.1)
    return model.eval(), head.eval()


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hpsv3_model, "AFTER", SHORT)


def make(dtype: torch.dtype = torch.float64, *, checkpoint: bool = False, **options: Any) -> HPSv3:
    model, head = network()
    made = HPSv3(Qwen2VL(model, checkpoint), head, tokenizer(), squares=16, **options)
    return made.to(dtype)


def pictures(height: int = 112, width: int = 112) -> list[Image.Image]:
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)) for _ in PROMPTS]


def decoded(images: list[Image.Image]) -> Tensor:
    stacked = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)
    return stacked.double() / 127.5 - 1


def official(images: list[Image.Image], prompts: tuple[str, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    """The official inference: Pillow's picture, the processor's patches, one chat, padded; mean and spread."""
    from transformers import Qwen2VLImageProcessorPil

    model, head = network()
    model, head, words = model.to(dtype), head.to(dtype), tokenizer()
    words.add_special_tokens({"additional_special_tokens": ["<|Reward|>"]})
    patches = Qwen2VLImageProcessorPil()(images=images, return_tensors="pt")
    counts = (patches["image_grid_thw"].prod(1) // 4).tolist()
    chats = [
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
        f"{'<|image_pad|>' * count}{hpsv3_model.AFTER}{prompt}\n\n\n\n"
        "Please provide the overall ratings of this image: <|Reward|>\n\nEND\n<|im_end|>\n<|im_start|>assistant\n"
        for count, prompt in zip(counts, prompts, strict=True)
    ]
    rows = [words(chat, add_special_tokens=False)["input_ids"] for chat in chats]
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    embedded = model.get_input_embeddings()(ids)
    image = model.visual(patches["pixel_values"].to(dtype), grid_thw=patches["image_grid_thw"]).pooler_output
    places = (ids == words.convert_tokens_to_ids("<|image_pad|>"))[..., None].expand_as(embedded)
    embedded = embedded.masked_scatter(places, image)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    hidden = model.language_model(inputs_embeds=embedded, attention_mask=mask, position_ids=positions).last_hidden_state
    return head(hidden[ids == words.convert_tokens_to_ids("<|Reward|>")])


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("checkpoint", [False, True])
def test_scores_are_those_of_the_official_inference(checkpoint: bool) -> None:
    images = pictures()
    values = make(checkpoint=checkpoint)(decoded(images), PROMPTS)
    expected = official(images, PROMPTS)[:, 0]
    assert expected.std() > 1e-3
    torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-6)  # the official pixels are float32


@pytest.mark.usefixtures("short")
def test_the_gradient_is_that_of_finite_differences_recomputed_or_not() -> None:
    images = decoded(pictures()).mul(0.9).requires_grad_()
    gradients = []
    for checkpoint in (False, True):
        (gradient,) = torch.autograd.grad(make(checkpoint=checkpoint)(images, PROMPTS).sum(), images)
        gradients.append(gradient)
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-14)
    reward, step = make(), 1e-5
    direction = torch.randn(images.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        forward, back = (reward(images + sign * step * direction, PROMPTS).sum() for sign in (1, -1))
    torch.testing.assert_close((gradients[0] * direction).sum(), (forward - back) / (2 * step), rtol=1e-6, atol=1e-9)
    assert not any(weight.requires_grad for weight in reward.parameters())


@pytest.mark.parametrize(
    ("height", "width"), [(512, 512), (1024, 1024), (832, 1216), (300, 449), (448, 448), (20, 700)]
)
def test_sizes_and_pixels_are_those_of_the_official_preprocessing(height: int, width: int) -> None:
    """Two 8-bit roundings of Pillow apart, as in test_rewards_preprocessing.py."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    pixels = 256 * 28 * 28
    size = smart_size(height, width, 28, pixels, pixels)
    assert size == smart_resize(max(height, 28), width, 28, pixels, pixels) or height < 28
    rows, columns = np.mgrid[:height, :width]
    waves = [np.sin(rows / 9 + c) * np.cos(columns / 13 - c) for c in range(3)]
    picture = np.round(127.5 + 90 * np.stack(waves, 2)).astype(np.uint8)
    resampled = Image.fromarray(picture).resize(size[::-1], Image.Resampling.BICUBIC)
    expected = torch.from_numpy(np.asarray(resampled).copy()).permute(2, 0, 1).double() / 255
    images = torch.from_numpy(picture).permute(2, 0, 1)[None].double() / 127.5 - 1
    found = resized(ImageBatch(images), size, "hard", torch.float64)[0]
    mean, std = (
        torch.tensor(values, dtype=torch.float64).view(3, 1, 1)
        for values in (rewards.base.CLIP_MEAN, rewards.base.CLIP_STD)
    )
    assert ((found * std + mean - expected) * 255).abs().max() <= 0.5 * 1.25 + 0.5 + 0.01


def test_patches_are_the_processors() -> None:
    from transformers import Qwen2VLImageProcessorPil

    images = pictures(56, 84)
    expected = Qwen2VLImageProcessorPil()(images=images, return_tensors="pt")["pixel_values"]
    pixels = resized(ImageBatch(decoded(images)), (56, 84), "hard", torch.float64)
    found = Qwen2VL(network()[0], False)._patches(pixels).flatten(0, 1)
    torch.testing.assert_close(found.float(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("short")
def test_a_prompts_score_does_not_depend_on_its_neighbours_and_long_ones_lose_their_end(
    caplog: pytest.LogCaptureFixture,
) -> None:
    reward, images = make(length=12), decoded(pictures())
    together = reward(images, ("a cat", "x" * 40, "a cat"))
    assert "longer than 12 tokens and were cut" in caplog.text
    torch.testing.assert_close(reward(images[:1], ("a cat",)), together[:1], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(reward(images[1:2], ("x" * 12,)), together[1:2], rtol=1e-12, atol=1e-14)
    held = HeldPrompts(("a cat", "a cat", "a cat"))
    first = reward(images, held)
    held.set(PROMPTS)
    assert not torch.equal(first, reward(images, held))


@pytest.mark.usefixtures("short")
def test_a_step_copies_nothing_from_or_to_the_host() -> None:
    reward, images = make(torch.float32), decoded(pictures(56, 84)).float()
    reward(images, PROMPTS)
    with NothingFromTheHost():
        reward(images, PROMPTS)


def test_the_official_instruction_is_around_the_prompt() -> None:
    assert BEFORE.endswith("<|im_start|>user\n<|vision_start|>") and ENDING.endswith(": <|Reward|>")
    assert AFTER.startswith("<|vision_end|>\nYou are tasked with") and AFTER.endswith("description.\nTextual prompt - ")
    assert (AFTER.count("\n- **"), AFTER.count("  \n"), AFTER.count(". \n")) == (10, 2, 2)


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., HPSv3]:
    """`rewards.load` of a file with keys of older or newer transformers; its embedding has fewer rows than Qwen's."""
    monkeypatch.setattr(factories, "load_hpsv3", partial(factories.load_hpsv3, architecture=SIZES))
    monkeypatch.setattr(factories, "load_qwen_tokenizer", lambda path: tokenizer())
    monkeypatch.setattr(hpsv3_model, "AFTER", SHORT)
    monkeypatch.setattr(hpsv3_model, "SQUARES", 16)
    model, head = network()
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    state |= {f"rm_head.{name}": value for name, value in head.state_dict().items()}
    state["model.language_model.embed_tokens.weight"] = model.language_model.embed_tokens.weight[:300].clone()
    state["lm_head.weight"] = torch.zeros(300, 32)
    older = {
        name.replace("model.visual.", "visual.").replace("model.language_model.", "model."): value
        for name, value in state.items()
    }

    def made(layout: str = "newer", **arguments: Any) -> HPSv3:
        save_file(state if layout == "newer" else older, tmp_path / "HPSv3.safetensors")
        reward = rewards.load("hpsv3", path=str(tmp_path), **arguments)
        assert isinstance(reward, HPSv3)
        return reward

    return made


@pytest.mark.parametrize("layout", ["newer", "older"])
def test_files_of_both_layouts_load(layout: str, load: Callable[..., HPSv3]) -> None:
    reward = load(layout, dtype="float32")
    images = decoded(pictures()).float()
    assert len(reward.network.language_model.embed_tokens.weight) == 300
    reward.pixels = make().pixels
    torch.testing.assert_close(reward(images, PROMPTS), make(torch.float32)(images, PROMPTS))
    assert reward.network.checkpoint


def test_low_precision_keeps_the_head_in_float32(load: Callable[..., HPSv3]) -> None:
    reward = load()
    assert reward.network.dtype == torch.bfloat16 and next(reward.head.parameters()).dtype == torch.float32
    reward.pixels = make().pixels
    images = decoded(pictures()).float().requires_grad_()
    values = reward(images, PROMPTS)
    torch.testing.assert_close(values, make(torch.float32)(images, PROMPTS), rtol=0.1, atol=0.1)
    values.sum().backward()
    assert images.grad is not None and bool(images.grad.isfinite().all()) and images.grad.norm() > 0


def test_what_does_not_fit_is_refused_by_name(load: Callable[..., HPSv3], monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments, said in (
        ({"quantization": "int4"}, "quantization must be nf4, int8 or null"),
        ({"length": "3"}, "length must be an integer of at least 1, got '3'"),
        ({"dtype": "int8"}, "dtype must be one of"),
    ):
        with pytest.raises(ConfigurationError, match=said):
            load(**arguments)
    words = tokenizer()
    words.add_tokens([f"word{number}" for number in range(99)])
    monkeypatch.setattr(factories, "load_qwen_tokenizer", lambda path: words)
    with pytest.raises(ConfigurationError, match=r"besides <\|Reward\|>, the network 300 in all"):
        load()


def test_four_bits_of_a_configuration_store_the_blocks_and_pass_the_gradient(
    load: Callable[..., HPSv3], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("bitsandbytes")
    from diffpp_fast import few_bits

    monkeypatch.setattr(few_bits, "SMALLEST", 1024)
    whole = load(dtype="float32")
    arguments = {"path": "./HPSv3.safetensors", "quantization": "nf4", "dtype": "float32"}
    mixture = rewards.mixture({"hpsv3": {"weight": 0.5, "arguments": arguments}}, folder=str(tmp_path))
    stored: Any = mixture["hpsv3"]
    for network in (whole.network, stored.network):
        lists = network.visual.blocks, network.language_model.layers
        assert [bool(few_bits.linears_of(blocks)) for blocks in lists] == [network is whole.network] * 2
    whole.pixels = stored.pixels = make().pixels
    images = decoded(pictures()).float().requires_grad_()
    values = mixture(images, PROMPTS)
    values.sum().backward()
    assert 0 < (2 * values - whole(images, PROMPTS)).abs().max() < 1.0
    assert images.grad is not None and images.grad.norm() > 0
