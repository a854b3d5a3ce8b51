"""VQAScore of CLIP-FlanT5: its files, its question, four bits; its score is held in test_rewards_networks.py."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import official_rewards as official
import pytest
import torch
from PIL import Image
from torch import Tensor

from diffpp_fast import rewards
from diffpp_fast.errors import ConfigurationError
from diffpp_fast.rewards import factories, files
from diffpp_fast.rewards.base import CLIP_MEAN, CLIP_STD, ImageBatch, Preprocessing
from diffpp_fast.rewards.flan_t5 import buckets, known_sizes, sizes_of
from diffpp_fast.rewards.text import HeldPrompts
from diffpp_fast.rewards.vqascore_model import VIT_L_14_336, VQAScore, _source, build_vqascore, squared

#: Wide enough for layers that are stored in 4 bits.
T5 = official.SMALL_T5._replace(width=64, wide=64, heads=4, head=16)
CLIP = official.SMALL_CLIP._replace(vision=official.SMALL_CLIP.vision._replace(width=64))
STATE = official.clip_t5_state(
    official.random_state(official.clip_shapes(CLIP)),
    official.random_state(official.t5_shapes(T5, CLIP.vision), seed=9),
)
PROMPTS = ("a cat", "the dogs", "a cat")
IMAGES = 1.8 * torch.rand(3, 3, 40, 40, generator=torch.Generator().manual_seed(5)) - 0.9
INDEX = "pytorch_model.bin.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return official.write_clip_t5(official.write_t5_tokenizer(tmp_path), STATE)


@pytest.fixture
def load(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., VQAScore]:
    tower = official.clip_architecture(CLIP, "quick_gelu")["vision_config"]
    monkeypatch.setattr(factories, "load_vqascore", partial(factories.load_vqascore, architecture=tower))

    def made(**arguments: Any) -> VQAScore:
        arguments = {"path": str(folder), "tokenizer": str(folder), "dtype": "float32", **arguments}
        reward = rewards.load("vqascore", **arguments)
        assert isinstance(reward, VQAScore)
        return reward

    return made


@pytest.mark.parametrize(
    ("name", "sizes", "parameters"),
    [
        ("xl", official.FLAN_T5_XL, 2_849_757_184),
        ("xxl", official.FLAN_T5_XXL, 11_135_332_352),
    ],
)
def test_true_sizes_have_the_official_keys_and_numbers_of_parameters(
    name: str, sizes: official.T5Sizes, parameters: int
) -> None:
    """The last layer of the image tower is not read."""
    shapes = official.t5_shapes(sizes, official.VIT_L_14_336.vision)
    assert known_sizes(name).items() <= sizes_of(shapes).items()
    with torch.device("meta"):
        whole: Any = build_vqascore(known_sizes(name))
        vision = official.clip_shapes(official.VIT_L_14_336)
        state = official.clip_t5_state(
            {key: torch.empty(shape) for key, shape in vision.items()},
            {key: torch.empty(shape) for key, shape in shapes.items()},
        )
    assert sum(weight.numel() for weight in whole["t5"].parameters()) == parameters
    spare = (r"embed_tokens\.weight$", r".*vision_model\.encoder\.layers\.23\.")
    files.fit(whole, state, Path("here"), "vqascore", source=_source, spare=spare)
    assert whole["vision"].config.image_size == VIT_L_14_336["image_size"]


def test_positions_are_those_of_transformers() -> None:
    from transformers.models.t5.modeling_t5 import T5Attention

    distance = torch.arange(-700, 701)
    for both_ways in (True, False):
        expected = T5Attention._relative_position_bucket(distance, both_ways)
        assert torch.equal(buckets(distance, 32, 128, both_ways), expected)


@pytest.mark.parametrize(("height", "width"), [(336, 336), (300, 449), (832, 640)])
def test_pixels_are_those_of_the_official_preprocessing(height: int, width: int) -> None:
    """Two 8-bit roundings of Pillow apart, as in test_rewards_preprocessing.py."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    rows, columns = np.mgrid[:height, :width]
    waves = [np.sin(rows / 9 + c) * np.cos(columns / 13 - c) for c in range(3)]
    picture = np.round(127.5 + 60 * np.stack(waves, 2)).astype(np.uint8)
    side = max(height, width)
    canvas = Image.new("RGB", (side, side), tuple(int(255 * value) for value in CLIP_MEAN))
    canvas.paste(Image.fromarray(picture), ((side - width) // 2, (side - height) // 2))
    size = {"shortest_edge": 336}
    processor = CLIPImageProcessorPil(size=size, crop_size={"height": 336, "width": 336})
    expected = processor(images=[canvas], return_tensors="pt")["pixel_values"][0]
    images = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 127.5 - 1
    found = Preprocessing(336)(squared(images, CLIP_MEAN), torch.float32)[0]
    assert ((found - expected) * torch.tensor(CLIP_STD).view(3, 1, 1) * 255).abs().max() <= 0.5 * 1.25 + 0.5 + 0.01


def test_a_prompts_score_does_not_depend_on_its_neighbours_and_long_ones_lose_their_end(
    load: Callable[..., VQAScore], caplog: pytest.LogCaptureFixture
) -> None:
    reward = load(length=12, dtype="float64")
    images = IMAGES.double()
    together = reward(images, ("a cat", "x" * 40, ""))
    assert "longer than 12 tokens and were cut" in caplog.text
    torch.testing.assert_close(reward(images[:1], ("a cat",)), together[:1], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(reward(images[1:2], ("x" * 12,)), together[1:2], rtol=1e-12, atol=1e-14)
    held = HeldPrompts(("", "", ""))
    first = reward(images, held)
    held.set(PROMPTS)
    assert not torch.equal(first, reward(images, held))


def test_a_square_image_shares_its_pixels_with_other_rewards(load: Callable[..., VQAScore]) -> None:
    reward, batch = load(), ImageBatch(IMAGES)
    shared = batch.pixels(reward.preprocessing, torch.float32)
    assert reward._pixels(batch) is shared


def test_four_bits_store_all_blocks_and_pass_the_gradient(load: Callable[..., VQAScore]) -> None:
    """`wo` too, which transformers would cast to the type that 4 bits are stored in."""
    pytest.importorskip("bitsandbytes")
    from diffpp_fast.few_bits import linears_of

    whole, stored = load(), load(quantization="nf4")
    for blocks, before in zip(stored.network.blocks(), whole.network.blocks(), strict=True):
        assert linears_of(before) and not linears_of(blocks)
    from bitsandbytes.functional import dequantize_4bit

    layers: dict[str, Any] = {name: each for name, each in stored.named_modules() if hasattr(each, "quantized_as")}
    assert "network.t5.encoder.block.0.layer.1.DenseReluDense.wo" in layers
    for name, layer in layers.items():
        linear: Any = whole.get_submodule(name)
        linear.weight.copy_(dequantize_4bit(layer.weight, layer.weight.quant_state))
    found = []
    for reward in (whole, stored):
        images = IMAGES.clone().requires_grad_()
        scores = reward(images, PROMPTS)
        found.append((scores, *torch.autograd.grad(scores.log().sum(), images)))
    for expected, values in zip(*found, strict=True):
        torch.testing.assert_close(values, expected, rtol=1e-3, atol=1e-4 * float(expected.detach().abs().max()))


@pytest.mark.parametrize(
    ("parts", "offline"), [(True, False), (False, False), (False, True)], ids=["an index", "one file", "its cache"]
)
def test_a_repository_of_the_hub_has_an_index_or_one_file(
    parts: bool,
    offline: bool,
    folder: Path,
    load: Callable[..., VQAScore],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError

    if not parts:
        (folder / INDEX).unlink()
        torch.save(STATE, folder / "pytorch_model.bin")
    asked = []

    def download(repository: str, name: str, **_: object) -> str:
        asked.append(name)
        if not (folder / name).is_file():
            raise LocalEntryNotFoundError(name) if offline else RemoteEntryNotFoundError(name, response=Mock())
        # One by one, as the hub's cache would have them beside each other.
        (tmp_path / "cache").mkdir(exist_ok=True)
        return str(shutil.copy(str(folder / name), str(tmp_path / "cache")))

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("diffpp_fast.hub_files._silence", lambda endpoint: "no network" if offline else None)
    reward = load(path="zhiqiulin/clip-flant5-xl")
    torch.testing.assert_close(reward.network.t5.lm_head.weight, STATE["lm_head.weight"])
    parted = {f"pytorch_model-0000{part}-of-00003.bin" for part in (1, 2, 3)}
    assert set(asked) == {INDEX} | (parted if parts else {"pytorch_model.bin"})


def rewrite(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def remove_part(folder: Path) -> None:
    (folder / "pytorch_model-00002-of-00003.bin").unlink()


def add_name(folder: Path) -> None:
    rewrite(folder, lambda held: held.update(more="pytorch_model-00001-of-00003.bin"))


def drop_name(folder: Path) -> None:
    rewrite(folder, lambda held: held.pop("lm_head.weight"))


def leave_folder(folder: Path) -> None:
    rewrite(folder, lambda held: held.update(more="../other.bin"))


def another_network(folder: Path) -> None:
    t5: dict[str, Tensor] = {name: value for name, value in STATE.items() if not name.startswith("vision_tower")}
    official.write_clip_t5(folder, t5)


def more_than_tensors(folder: Path) -> None:
    torch.save({"lm_head.weight": Path("here")}, folder / "pytorch_model-00001-of-00003.bin")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (remove_part, "has no pytorch_model-00002-of-00003.bin"),
        (add_name, "is not that of the files beside it: pytorch_model-00001-of-00003.bin does not hold more"),
        (drop_name, "holds lm_head.weight besides"),
        (leave_folder, "is damaged: it should map names of tensors to files beside it"),
        (another_network, r"looks like a LLaVA or a CLIP-T5. missing \(\d+\): vision_tower.vision_tower.vision_model."),
        (more_than_tensors, "holds more than tensors, and nothing else is unpickled"),
    ],
)
def test_files_that_are_not_the_official_ones_are_refused(
    spoil: Callable[[Path], None], said: str, folder: Path, load: Callable[..., VQAScore]
) -> None:
    spoil(folder)
    with pytest.raises(ConfigurationError, match=said):
        load()


def test_what_does_not_fit_is_refused_by_name(folder: Path, load: Callable[..., VQAScore]) -> None:
    words = official.write_bert_vocabulary(folder).parent
    for arguments, said in (
        ({"dtype": "float16"}, "T5's activations leave float16's range"),
        ({"quantization": "int4"}, "quantization must be nf4, int8 or null"),
        ({"length": 0}, "length must be an integer of at least 1, got 0"),
        ({"tokenizer": str(words / "nowhere")}, "gives no T5Tokenizer"),
    ):
        with pytest.raises(ConfigurationError, match=said):
            load(**arguments)
    from transformers import T5Tokenizer

    letters = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"word{number}", -1.0) for number in range(200))]
    T5Tokenizer(vocab=letters, extra_ids=1).save_pretrained(folder)
    with pytest.raises(ConfigurationError, match=r"the tokenizer has 204 tokens, the network 112"):
        load()
