"""Bad input to rewards: each is refused in a sentence that names the thing and the remedy."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import official_rewards as official
import pytest
import torch
from torch import Tensor

from diffpp_fast import rewards
from diffpp_fast.errors import ConfigurationError
from diffpp_fast.rewards import files

STATE = official.random_state(official.clip_shapes(official.SMALL_CLIP))
IMAGES = torch.zeros(2, 3, 32, 32)
PROMPTS = ("a cat", "a dog")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return official.write_clip_folder(tmp_path / "clip", STATE)


@pytest.mark.parametrize(
    ("images", "prompts", "error", "message"),
    [
        (IMAGES[0], PROMPTS, ValueError, r"shape \[B, 3, H, W\] with pixels, got \[3, 32, 32\]"),
        (IMAGES[:, :1], PROMPTS, ValueError, r"got \[2, 1, 32, 32\]"),
        (IMAGES[:0], (), ValueError, r"got \[0, 3, 32, 32\]"),
        (IMAGES.to(torch.uint8), PROMPTS, TypeError, "floating-point in .-1, 1., got torch.uint8"),
        ([1], PROMPTS, TypeError, "images must be a tensor"),
        (IMAGES, PROMPTS[:1], ValueError, "2 images need 2 prompts, got 1"),
        (IMAGES, "a cat", TypeError, "got a single string"),
        (IMAGES, ("a cat", 3), TypeError, "prompts must be strings, got int"),
        (IMAGES, ("a cat", "a\ud800"), ValueError, "half of a surrogate pair in 'a.ud800'"),
    ],
)
def test_bad_images_and_prompts(images: Any, prompts: Any, error: type, message: str, folder: Path) -> None:
    reward = rewards.clip(str(folder))
    with pytest.raises(error, match=message):
        reward(images, prompts)
    with pytest.raises(error, match=message):
        rewards.Mixture({"clip": (reward, 1.0)}).components(images, prompts)


def test_scoring_for_reading_is_checked(folder: Path) -> None:
    reward = rewards.clip(str(folder))
    images = torch.rand(5, 3, 40, 40, requires_grad=True)
    prompts = [f"{n} cats" for n in range(5)]
    scores = rewards.score(reward, images, prompts, batch_size=2)
    assert not scores.requires_grad
    torch.testing.assert_close(scores, reward(images, prompts).detach())
    torch.testing.assert_close(rewards.score(lambda i, p: i.mean((1, 2, 3)), images, prompts), images.mean((1, 2, 3)))
    broken = images.detach().clone()
    broken[3, 0, 0, 0] = torch.nan
    broken[4, 0, 0, 0] = torch.inf
    with pytest.raises(ValueError, match="2 of 5 images are not finite, the first is number 3"):
        rewards.score(reward, broken, prompts)
    with pytest.raises(ValueError, match=r"not finite for 5 of 5 images, e.g. '0 cats'"):
        rewards.score(lambda i, p: i.mean((1, 2, 3)) / 0, images, prompts)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        rewards.score(reward, images, prompts, batch_size=-1)


class Code:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return eval, ("__import__('builtins').print('unpickled')",)


def head_of(path: Path) -> Any:
    return rewards.aesthetic(str(path), clip="./nowhere")


def test_nothing_is_unpickled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "aesthetic-model.pth"
    torch.save({"state_dict": official.random_state(official.head_shapes(768)), "code": Code()}, path)
    with pytest.raises(ConfigurationError, match=r"aesthetic-model.pth holds more than tensors.*save_file"):
        head_of(path)
    path.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(ConfigurationError, match=r"aesthetic-model.pth"):
        head_of(path)
    assert "unpickled" not in capsys.readouterr().out


def test_files_that_are_no_state_dict(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save([torch.zeros(2)], path)
    with pytest.raises(ConfigurationError, match=r"a.pth holds no state dict: list"):
        head_of(path)
    path.write_bytes(b"not a file of tensors")
    with pytest.raises(ConfigurationError, match=r"a.pth.*"):
        head_of(path)
    torch.save(official.random_state(official.head_shapes(768)), path)
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(ConfigurationError, match=r"a.pth can't be read.*is it whole"):
        head_of(path)
    cut = tmp_path / "a.safetensors"
    cut.write_bytes(b"12345678")
    with pytest.raises(ConfigurationError, match=r"a.safetensors can't be read as safetensors"):
        head_of(cut)


def test_torchscript_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ViT-L-14.pt"
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))
    with pytest.raises(ConfigurationError, match=r"ViT-L-14.pt can't be read.*TorchScript"):
        head_of(path)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"imagereward: no such file or folder: .*/nothing"):
        rewards.imagereward(str(tmp_path / "nothing"))
    (tmp_path / "readme.txt").write_text("")
    with pytest.raises(ConfigurationError, match=r"hpsv2.1: .* has no HPS_v2.1_compressed.pt; it holds readme.txt"):
        rewards.hpsv2(str(tmp_path))
    with pytest.raises(ConfigurationError, match=r"has no HPS_v2_compressed.pt"):
        rewards.hpsv2(str(tmp_path), version="2.0")
    with pytest.raises(ConfigurationError, match=r"version must be 2.0 or 2.1, got '3'"):
        rewards.hpsv2(str(tmp_path), version="3")
    with pytest.raises(ConfigurationError, match=r"pickscore: .* has no config.json"):
        rewards.pickscore(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ConfigurationError, match=r"has no model.safetensors or pytorch_model.bin"):
        rewards.pickscore(str(tmp_path))


def test_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def offline(repository: str, name: str, **_: Any) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("outgoing traffic has been disabled")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(ConfigurationError, match=r"hf download THUDM/ImageReward ImageReward.pt; then give the path"):
        rewards.imagereward()


KINDS = {
    "CLIP in OpenAI's or open_clip's format": STATE,
    "CLIP or BLIP in transformers' format": official.transformers_clip_state(STATE),
    "ImageReward": official.imagereward_shapes(official.SMALL_BLIP),
    "an MLP such as the aesthetic predictor's": official.head_shapes(768),
    "BLIP in its authors' format": {"visual_encoder.blocks.0.norm1.weight": 0},
    "a diffusers autoencoder": {"encoder.down_blocks.0.resnets.0.conv1.weight": 0},
    "a diffusers UNet": {"mid_block.resnets.0.conv1.weight": 0},
    "nothing known (first keys: a, b)": {"a": 0, "b": 0},
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_file_looks_like(kind: str) -> None:
    assert files.kind_of(dict.fromkeys(KINDS[kind], torch.zeros(1))) == kind


def test_a_file_of_another_model_is_named_with_its_first_keys(folder: Path, tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "ImageReward.pt")
    with pytest.raises(ConfigurationError) as caught:
        rewards.imagereward(str(tmp_path / "ImageReward.pt"))
    message = str(caught.value)
    assert f"imagereward: {tmp_path / 'ImageReward.pt'} does not fit" in message
    assert "It looks like CLIP in OpenAI's or open_clip's format" in message
    assert "missing (" in message
    assert "blip.visual_encoder.cls_token" in message
    assert f"unexpected ({len(STATE)}): " in message


def test_single_wrong_keys_are_named(tmp_path: Path) -> None:
    def failing(change: Callable[[dict[str, Tensor]], Any]) -> str:
        head = official.random_state(official.head_shapes(768))
        change(head)
        torch.save(head, tmp_path / "head.pth")
        with pytest.raises(ConfigurationError) as caught:
            head_of(tmp_path / "head.pth")
        return str(caught.value)

    assert "missing (1): layers.4.bias" in failing(lambda head: head.pop("layers.4.bias"))
    assert "unexpected (1): layers.9.bias" in failing(lambda head: head.update({"layers.9.bias": torch.zeros(1)}))
    said = failing(lambda head: head.update({"layers.0.weight": torch.zeros(1024, 512)}))
    assert "shapes (1): layers.0.weight has shape [1024, 512], for a layers.0.weight of [1024, 768]" in said


def test_the_aesthetic_predictor_needs_the_features_it_was_trained_on(tmp_path: Path) -> None:
    sizes = official.SMALL_CLIP._replace(features=512)
    state = official.random_state(official.clip_shapes(sizes))
    folder = official.write_clip_folder(tmp_path / "clip", state, sizes)
    torch.save(official.random_state(official.head_shapes(768)), tmp_path / "aesthetic-model.pth")
    with pytest.raises(ConfigurationError, match="768 features of ViT-L/14, this CLIP gives 512"):
        rewards.aesthetic(str(tmp_path), clip=str(folder))


def test_names_and_dtypes(folder: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"no reward 'beauty'; known: pickscore, hpsv2.1"):
        rewards.load("beauty")
    with pytest.raises(ConfigurationError, match=r"dtype must be one of float32, .*, got 'half'"):
        rewards.load("clip", path=str(folder), dtype="half")
    assert rewards.load("clip", path=str(folder), dtype=torch.float16).clip.dtype == torch.float16
    towers = rewards.load_clip(str(folder), text=False)
    assert towers.text_model is None
    with pytest.raises(ConfigurationError, match="without its text encoder"):
        rewards.clip(towers)(IMAGES, PROMPTS)
