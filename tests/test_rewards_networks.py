"""Reward networks: official files load key by key; scores and gradients are those of an independent float64."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import official_rewards as official
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from diffpp_fast import ops, rewards
from diffpp_fast.rewards import clip_model, factories, files, scores
from diffpp_fast.rewards.base import CLIP_MEAN, CLIP_STD
from diffpp_fast.rewards.towers import recompute

PROMPTS = ("a cat", "the dogs", "a cat")
IMAGES = (2.4 * torch.rand(3, 3, 44, 56, generator=torch.Generator().manual_seed(5)) - 1.2).double()
STATE = official.random_state(official.clip_shapes(official.SMALL_CLIP))
BLIP_STATE = official.random_state(official.imagereward_shapes(official.SMALL_BLIP), seed=1)
HEAD = official.random_state(official.head_shapes(768), seed=2)
#: MPS's CLIP has few features, for its cross attention is wide.
MPS_CLIP = official.SMALL_CLIP._replace(features=64)
T5_STATE = official.random_state(official.t5_shapes(official.SMALL_T5, official.SMALL_CLIP.vision), seed=9)
CHAT = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: ",
    '\nDoes this figure show "{}"? Please answer yes or no. ASSISTANT: ',
)
MPS_STATE = official.random_state(official.clip_shapes(MPS_CLIP) | official.cross_shapes(64), seed=3)


# Letters have numbers 0.., and 256.. at the end of a word; then merges, start 516, end 517.
END = 256
LETTERS = {letter: number for number, letter in enumerate(map(chr, range(ord("!"), ord("~") + 1)))}
A_CAT = [516, END + LETTERS["a"], 513, 517]
THE_DOGS = [516, LETTERS["t"], LETTERS["h"], END + LETTERS["e"], 514, LETTERS["g"], END + LETTERS["s"], 517]
SENTENCES = (A_CAT, THE_DOGS, A_CAT)

QUESTIONS = [[*official.t5_ids(CHAT[0]), -200, *official.t5_ids(CHAT[1].format(prompt))] for prompt in PROMPTS]


def ids_of(*sentences: list[int]) -> Tensor:
    """Padded by the end, as CLIP's tokenizer does."""
    return torch.tensor([sentence + [517] * (12 - len(sentence)) for sentence in sentences])


def pixels(images: Tensor, fit: str = "crop") -> Tensor:
    return ops.reward_pixels(images, 32, mean=CLIP_MEAN, std=CLIP_STD, fit=fit)


def oracle(name: str, images: Tensor) -> Tensor:
    """The score in float64, from images that may want a gradient."""
    state = official.double(STATE)
    if name == "imagereward":
        ids = torch.tensor([[2, 5, 7, 3], [2, 10, 8, 9], [2, 5, 7, 3]])
        ids = torch.cat((ids, torch.zeros(3, 31, dtype=torch.int64)), 1)
        ids[1, 4] = 3
        return official.imagereward_score(
            official.double(BLIP_STATE), official.SMALL_BLIP, pixels(images), ids, (ids != 0).long()
        )
    if name == "vqascore":
        parts = state, official.SMALL_CLIP, official.double(T5_STATE), official.SMALL_T5
        return official.vqascore(*parts, official.vqascore_pixels(images, 32), QUESTIONS, official.t5_ids("Yes"))
    if name == "mps":
        state = official.double(MPS_STATE)
        return official.mps_score(
            state, MPS_CLIP, pixels(images), ids_of(*SENTENCES), ids_of([516, END + LETTERS["a"], 515, 517])[0]
        )
    quick = name in ("clip", "aesthetic")
    image = official.clip_image(
        state, official.SMALL_CLIP, pixels(images, "pad" if name == "hpsv2.1" else "crop"), quick=quick
    )
    if name == "aesthetic":
        return official.head_score(official.double(HEAD), image)
    cosine = (image * official.clip_text(state, official.SMALL_CLIP, ids_of(*SENTENCES), quick=quick)).sum(1)
    return cosine * (float(STATE["logit_scale"].double().exp()) if name == "pickscore" else 1.0)


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., rewards.Reward]:
    """`rewards.load` of a small network that a file of the official format holds."""
    monkeypatch.setattr(
        factories,
        "load_open_clip",
        partial(factories.load_open_clip, architecture=official.clip_architecture(official.SMALL_CLIP, "gelu")),
    )
    monkeypatch.setattr(
        factories,
        "load_imagereward",
        partial(factories.load_imagereward, architecture=official.blip_architecture(official.SMALL_BLIP)),
    )
    monkeypatch.setattr(
        factories,
        "load_mps",
        partial(factories.load_mps, architecture=official.clip_architecture(MPS_CLIP, "gelu")),
    )
    tower = official.clip_architecture(official.SMALL_CLIP, "quick_gelu")["vision_config"]
    monkeypatch.setattr(factories, "load_vqascore", partial(factories.load_vqascore, architecture=tower))
    official.write_clip_t5(official.write_t5_tokenizer(tmp_path / "t5"), official.clip_t5_state(STATE, T5_STATE))
    folder = official.write_clip_folder(tmp_path / "clip", STATE)
    towers = {f"model.{name}": value for name, value in official.transformers_clip_state(MPS_STATE).items()}
    crossing = {name: value for name, value in MPS_STATE.items() if name.startswith("cross_model.")}
    save_file(towers | crossing | official.mps_buffers(64), tmp_path / "MPS_overall_checkpoint.safetensors")
    exact = official.write_clip_folder(tmp_path / "pickscore", STATE, activation="gelu")
    hps = {"epoch": 3, "state_dict": {f"module.{name}": value for name, value in STATE.items()}}
    torch.save(hps, tmp_path / "HPS_v2.1_compressed.pt")
    extra = {"blip.vision_proj.weight": torch.zeros(2, 2), "blip.text_encoder.embeddings.position_ids": torch.arange(3)}
    torch.save({**BLIP_STATE, **extra}, tmp_path / "ImageReward.pt")
    torch.save(HEAD, tmp_path / "sac+logos+ava1-l14-linearMSE.pth")
    arguments: dict[str, dict[str, Any]] = {
        "clip": {"path": str(folder)},
        "pickscore": {"path": str(exact)},
        "hpsv2.1": {"path": str(tmp_path), "tokenizer": str(folder / "bpe.txt")},
        "imagereward": {"path": str(tmp_path), "tokenizer": str(official.write_bert_vocabulary(tmp_path))},
        "aesthetic": {"path": str(tmp_path), "clip": str(folder)},
        "mps": {"path": str(tmp_path), "tokenizer": str(folder), "condition": "a dog"},
        "vqascore": {"path": str(tmp_path / "t5"), "tokenizer": str(tmp_path / "t5")},
    }
    return lambda name, **more: rewards.load(name, **arguments[name], **more)


NAMES = ("clip", "pickscore", "hpsv2.1", "imagereward", "aesthetic", "mps", "vqascore")


@pytest.mark.parametrize("checkpoint", [False, True], ids=["", "checkpoint"])
@pytest.mark.parametrize("name", NAMES)
def test_score_and_gradient_equal_an_independent_float64(
    name: str, checkpoint: bool, load: Callable[..., rewards.Reward]
) -> None:
    reward = load(name, dtype="float64", checkpoint=checkpoint)
    images, expected_images = (IMAGES.clone().requires_grad_() for _ in range(2))
    values, expected = reward(images, PROMPTS), oracle(name, expected_images)
    assert values.dtype == torch.float64
    assert values.shape == (3,)
    torch.testing.assert_close(values, expected, rtol=1e-10, atol=1e-10)
    weights = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    (gradient,) = torch.autograd.grad((weights * values).sum(), images)
    (expected_gradient,) = torch.autograd.grad((weights * expected).sum(), expected_images)
    assert expected_gradient.norm() > 1e-3
    torch.testing.assert_close(
        gradient, expected_gradient, rtol=1e-8, atol=1e-10 * float(expected_gradient.abs().max())
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.05)])
@pytest.mark.parametrize("name", NAMES)
def test_lower_precisions(name: str, dtype: str, tolerance: float, load: Callable[..., rewards.Reward]) -> None:
    reward = load(name, dtype=dtype)
    images = IMAGES.float().requires_grad_()
    values = reward(images, PROMPTS)
    expected = oracle(name, IMAGES)
    factor = float(STATE["logit_scale"].exp()) if name in ("pickscore", "mps") else 1.0
    if name == "vqascore":  # of some 100 tokens one is right
        factor = 0.05
    assert values.dtype == torch.float32
    torch.testing.assert_close(values.double(), expected, rtol=0, atol=tolerance * factor)
    (gradient,) = torch.autograd.grad(values.sum(), images)
    assert gradient.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(reward(IMAGES.float(), PROMPTS), values, rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_but_the_images_gets_a_gradient(name: str, load: Callable[..., rewards.Reward]) -> None:
    reward = load(name)
    images = IMAGES.float().requires_grad_()
    reward(images, PROMPTS).sum().backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0
    assert not any(weight.requires_grad for weight in reward.parameters())
    assert all(weight.grad is None for weight in reward.parameters())
    assert not reward.training


@pytest.mark.parametrize("name", NAMES)
def test_nan_reaches_the_score_of_its_image_alone(name: str, load: Callable[..., rewards.Reward]) -> None:
    images = IMAGES.float()
    images[1, 2, 20, 20] = torch.nan
    assert load(name)(images, PROMPTS).isnan().tolist() == [False, True, False]


@pytest.mark.parametrize(("name", "cleaned"), [("clip", True), ("hpsv2.1", True), ("pickscore", False)])
def test_whose_tokenizer_cleans_prompts(name: str, cleaned: bool, load: Callable[..., rewards.Reward]) -> None:
    """OpenAI's and open_clip's do, transformers' does not."""
    reward, images = load(name), IMAGES[:1].float()
    same = torch.equal(reward(images, ("cats &amp; dogs",)), reward(images, ("cats & dogs",)))
    assert same == cleaned


@pytest.mark.parametrize("clamp", ["hard", "straight_through"])
def test_clamp_decides_on_the_gradient_outside(clamp: str, load: Callable[..., rewards.Reward]) -> None:
    images = IMAGES.float().requires_grad_()
    load("clip", clamp=clamp)(images, PROMPTS).sum().backward()
    assert images.grad is not None
    outside = images.detach().abs() > 1
    assert bool(images.grad[outside].any()) == (clamp == "straight_through")


# -- what autograd keeps -----------------------------------------------------------------------------------------------


def kept_bytes(network: nn.Module, run: Callable[[], Tensor]) -> int:
    """Bytes of distinct storages that the backward pass keeps, weights not counted."""
    weights = {value.untyped_storage().data_ptr() for value in (*network.parameters(), *network.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = run()
    assert value.requires_grad  # and the graph is alive until here, so that no storage was counted twice
    return sum(kept.values())


@pytest.mark.parametrize("name", ["clip", "pickscore", "imagereward"])
def test_a_layer_keeps_ten_widths_per_token_and_one_if_recomputed(
    name: str, load: Callable[..., rewards.Reward]
) -> None:
    """Two norms' inputs, query, key, value, context, and four for the activation's input; no linear layer's input."""
    tower, batch = official.SMALL_CLIP.vision, 3
    pixels = torch.randn(batch, 3, 32, 32, requires_grad=True)
    tokens = batch * ((tower.image // tower.patch) ** 2 + 1)
    unit = 4 * tokens * tower.width
    statistics = 4 * tokens * (4 + tower.heads)  # two means, two deviations, the attention's sums
    # Outside of the layers: what the patches are made of, and the inputs of up to three norms.
    outside = 4 * pixels.numel() + 3 * unit + statistics

    def kept(checkpoint: bool) -> int:
        reward: Any = load(name, checkpoint=checkpoint)
        network = reward.vision if name == "imagereward" else reward.clip.vision_model
        return kept_bytes(network, lambda: network(pixel_values=pixels).last_hidden_state)

    assert kept(False) <= tower.layers * (10 * unit + statistics) + outside
    assert kept(True) <= tower.layers * unit + outside


def test_no_table_of_attention_weights_is_kept(load: Callable[..., rewards.Reward]) -> None:
    shapes = []

    def pack(tensor: Tensor) -> Tensor:
        shapes.append(tuple(tensor.shape))
        return tensor

    reward = load("imagereward")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        reward(IMAGES.float().requires_grad_(), PROMPTS)
    patches, words = 17, 35
    heads = official.SMALL_BLIP[1].heads
    assert len(shapes) > 50
    assert not {(3, heads, *table) for table in ((patches, patches), (words, words), (words, patches))} & set(shapes)


# -- official files ----------------------------------------------------------------------------------------------------


def test_true_sizes_have_the_official_keys_shapes_and_numbers_of_parameters() -> None:
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel, CLIPConfig, CLIPModel

    def empty(shapes: official.Shapes) -> official.State:
        return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}

    def count(state: official.State) -> int:
        return sum(value.numel() for value in state.values())

    with torch.device("meta"):
        huge = CLIPModel(CLIPConfig(**clip_model.VIT_H_14))
        parts = nn.Module()
        parts.vision = BlipVisionModel(BlipVisionConfig(**scores.IMAGEREWARD["vision"]))
        parts.text = BlipTextModel(
            BlipTextConfig(**scores.IMAGEREWARD["text"], is_decoder=True), add_pooling_layer=False
        )
        parts.head, head = scores.Head(), scores.Head()
    here = Path("here")
    state = empty(official.clip_shapes(official.VIT_H_14))
    assert count(state) == 986_109_441
    files.fit(huge, state, here, "hpsv2", source=clip_model._from_open_clip)
    state = empty(official.imagereward_shapes(official.BLIP_L))
    assert count(state) == 446_206_689
    files.fit(parts, state, here, "imagereward", source=scores._from_blip)
    state = empty(official.head_shapes(768))
    assert count(state) == 927_969
    files.fit(head, state, here, "aesthetic")
    # PickScore, in transformers' format.
    with torch.device("meta"):
        picked = CLIPModel(CLIPConfig(**clip_model.VIT_H_14))
        converted = official.transformers_clip_state(empty(official.clip_shapes(official.VIT_H_14)))
    ids = {f"{part}_model.embeddings.position_ids": torch.empty(1, 2, device="meta") for part in ("text", "vision")}
    files.fit(picked, {**converted, **ids}, here, "pickscore")


def test_position_ids_are_counted_where_a_network_has_them() -> None:
    reward = official.SMALL_CLIP
    from transformers import CLIPConfig, CLIPModel

    with torch.device("meta"):
        model = CLIPModel(CLIPConfig(**official.clip_architecture(reward, "gelu")))
    files.fit(model, official.transformers_clip_state(STATE), Path("here"), "clip")
    assert model.text_model.embeddings.position_ids.tolist() == [list(range(12))]
    assert not any(value.is_meta for value in (*model.parameters(), *model.buffers()))


def test_the_scale_is_read_before_it_is_rounded(load: Callable[..., rewards.Reward]) -> None:
    reward: Any = load("pickscore", dtype="bfloat16")
    assert reward.factor == pytest.approx(float(STATE["logit_scale"].double().exp()), rel=1e-6)


@pytest.mark.parametrize(("name", "state", "prefix"), [("imagereward", BLIP_STATE, "mlp."), ("aesthetic", HEAD, "")])
def test_heads_are_not_rounded(
    name: str, state: official.State, prefix: str, load: Callable[..., rewards.Reward]
) -> None:
    reward: Any = load(name, dtype="bfloat16")
    for key, value in reward.head.state_dict().items():
        torch.testing.assert_close(value, state[prefix + key], rtol=0, atol=0)


def test_formats_hold_the_same_network(tmp_path: Path) -> None:
    """open_clip's keys in safetensors, in torch.save's format, and old formats without a zip archive."""
    small = official.clip_architecture(official.SMALL_CLIP, "gelu")
    save_file(STATE, tmp_path / "a.safetensors")
    torch.save(STATE, tmp_path / "b.pt")
    torch.save({"model": STATE}, tmp_path / "c.pt", _use_new_zipfile_serialization=False)
    half = {name: value.half() for name, value in STATE.items()}
    torch.save({"state_dict": {**half, "input_resolution": torch.tensor(32)}}, tmp_path / "d.pt")
    loaded = {
        path.name: clip_model.load_open_clip(str(path), (), "clip", torch.float32, small)[0].state_dict()
        for path in sorted(tmp_path.iterdir())
    }
    for name, state in loaded.items():
        tolerance = 1e-3 if name == "d.pt" else 0.0
        for key, value in official.transformers_clip_state(STATE).items():
            assert state[key].dtype == torch.float32
            torch.testing.assert_close(state[key], value, rtol=tolerance, atol=tolerance)


class NothingFromTheHost(TorchFunctionMode):
    """Refuses what a CUDA graph can't record: tensors made of the host's numbers, and numbers of tensors."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        refused = torch.tensor, torch.as_tensor, Tensor.new_tensor, Tensor.item, Tensor.tolist, Tensor.__bool__
        assert function not in refused, f"{function} in a captured step"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", NAMES)
def test_a_step_copies_nothing_from_or_to_the_host(name: str, load: Callable[..., rewards.Reward]) -> None:
    reward, images = load(name, checkpoint=True), IMAGES.float().requires_grad_()
    reward(images, PROMPTS)
    with NothingFromTheHost():
        torch.autograd.grad(reward(images, PROMPTS).sum(), images)


@pytest.mark.parametrize("name", NAMES)
def test_a_reward_that_is_dropped_is_freed_at_once(name: str, load: Callable[..., rewards.Reward]) -> None:
    """No reference cycle holds gigabytes until the garbage collector comes."""
    reward = load(name, checkpoint=True)
    reward(IMAGES.float(), PROMPTS)
    weights = weakref.ref(next(reward.parameters()))
    gc.disable()
    try:
        del reward
        assert weights() is None
    finally:
        gc.enable()


@pytest.mark.slow
def test_true_size_imagereward_runs_forward_and_backward(tmp_path: Path) -> None:
    """1.8 GB on disk and in memory."""
    torch.save(
        {name: 0.02 * torch.randn(shape) for name, shape in official.imagereward_shapes(official.BLIP_L).items()},
        tmp_path / "ImageReward.pt",
    )
    vocabulary = official.write_bert_vocabulary(tmp_path)
    reward = rewards.imagereward(str(tmp_path), tokenizer=str(vocabulary), checkpoint=True)
    assert sum(weight.numel() for weight in reward.parameters()) == 446_206_689
    images = torch.rand(1, 3, 256, 256, requires_grad=True)
    reward(images, ("a red cat",)).sum().backward()
    assert images.grad is not None
    assert images.grad.isfinite().all()


@pytest.mark.slow
def test_true_size_hpsv2_runs_forward_and_backward(tmp_path: Path) -> None:
    """2 GB on disk and in memory."""
    torch.save(
        {
            "state_dict": {
                name: 0.02 * torch.randn(shape, dtype=torch.bfloat16)
                for name, shape in official.clip_shapes(official.VIT_H_14).items()
            }
        },
        tmp_path / "HPS_v2.1_compressed.pt",
    )
    model, _ = clip_model.load_open_clip(str(tmp_path), ("HPS_v2.1_compressed.pt",), "hpsv2", torch.bfloat16)
    towers = rewards.Clip(model, FakeTokenizer(), scale=1.0, checkpoint=True)
    reward = scores.CosineReward(towers, 1.0, rewards.Preprocessing(224, fit="pad"), "hpsv2.1")
    images = torch.rand(1, 3, 256, 192, requires_grad=True)
    reward(images, ("a red cat",)).sum().backward()
    assert images.grad is not None
    assert images.grad.isfinite().all()


class FakeTokenizer:
    """Every prompt is start, end, padding."""

    eos_token_id = 49407

    def __len__(self) -> int:
        return 49408

    def __call__(self, texts: list[str], **options: Any) -> dict[str, Any]:
        ids = [[49406, 49407]] * len(texts)
        if options.get("return_tensors"):
            tensor = torch.tensor(ids)
            tensor = torch.cat((tensor, torch.full((len(texts), 75), 49407)), 1)
            return {"input_ids": tensor, "attention_mask": tensor}
        return {"input_ids": ids}


def test_recomputed_layers_have_tangents() -> None:
    layer = nn.Sequential(nn.Linear(3, 3), nn.GELU()).double()
    x, tangent = torch.randn(2, 2, 3, dtype=torch.float64).unbind()
    expected = torch.func.jvp(layer, (x,), (tangent,))
    recompute([layer])
    torch.testing.assert_close(torch.func.jvp(layer, (x,), (tangent,)), expected)
    torch.testing.assert_close(torch.func.vmap(layer)(x[:, None])[:, 0], expected[0])
