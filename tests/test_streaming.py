"""Text encoders block by block: the same bits as whole, each block read once for all batches, and little memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_flux
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from diffpp_fast.cli.main import main
from diffpp_fast.networks.streaming import in_step, load_streamed, repeated_blocks, streaming
from diffpp_fast.networks.text import load_text_model
from diffpp_fast.tensor_files import StoredTensors
from diffpp_fast.training import Trainer, load_config
from diffpp_fast.training.build import text
from diffpp_fast.training.checkpoint import read_tensors


def seeded(build: Callable[[], Any]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        network: nn.Module = build().eval()
        return network


def t5() -> Any:
    from transformers import T5Config, T5EncoderModel

    settings = {"vocab_size": 30, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 3, "num_heads": 2}
    return T5EncoderModel(T5Config(**settings, feed_forward_proj="gated-gelu"))


def qwen3() -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    settings = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=30, head_dim=8, num_key_value_heads=1, **settings))


def gemma2() -> Any:
    from transformers import Gemma2Config, Gemma2Model

    settings = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return Gemma2Model(Gemma2Config(vocab_size=30, head_dim=8, num_key_value_heads=1, **settings))


ENCODERS: dict[str, Callable[[], Any]] = {
    "t5": t5,
    "qwen3": qwen3,
    "gemma2": gemma2,
    "clip": tiny.clip,
    "projection": lambda: tiny.clip(projection=True),
}


def outputs_of(model: nn.Module, ids: torch.Tensor) -> list[torch.Tensor]:
    with torch.no_grad():
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True)
    return [tensor for tensor in (*output.hidden_states, output.last_hidden_state) if tensor is not None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ENCODERS)
def test_block_by_block_it_gives_the_same_bits(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model: Any = seeded(ENCODERS[kind]).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    projection = kind == "projection"
    if kind in ("qwen3", "gemma2"):  # language models, of which these are the decoder's states
        from transformers import AutoModel

        whole = AutoModel.from_pretrained(tmp_path, dtype=dtype).eval()
        streamed = load_streamed(tmp_path, AutoModel, StoredTensors([tmp_path / "model.safetensors"]), dtype)
    else:
        whole = load_text_model(str(tmp_path), dtype, projection=projection).eval()
        with streaming():
            streamed = load_text_model(str(tmp_path), dtype, projection=projection)
    blocks = repeated_blocks(streamed)
    batches = [torch.arange(12).reshape(2, 6), torch.arange(3, 21).reshape(3, 6)]
    for ids in batches:
        for ours, theirs in zip(outputs_of(streamed, ids), outputs_of(whole, ids), strict=True):
            assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype == dtype
    together = in_step([lambda ids=ids: outputs_of(streamed, ids) for ids in batches])  # type: ignore[misc]
    for ids, found in zip(batches, together, strict=True):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, outputs_of(whole, ids), strict=True))
    assert len(blocks) >= 2
    assert all(parameter.numel() == 0 for block in blocks for parameter in block.parameters()), "nothing stays"
    held = sum(parameter.numel() for parameter in streamed.parameters())
    inside = sum(parameter.numel() for block in repeated_blocks(whole) for parameter in block.parameters())
    assert held == sum(parameter.numel() for parameter in whole.parameters()) - inside


def test_a_block_is_read_once_for_all_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seeded(t5).save_pretrained(tmp_path)  # type: ignore[operator]
    with streaming():
        model = load_text_model(str(tmp_path))
    reads: list[str] = []
    elements = StoredTensors.elements

    def noted(self: StoredTensors, name: str, *place: int) -> torch.Tensor:
        reads.append(name)
        return elements(self, name, *place)

    monkeypatch.setattr(StoredTensors, "elements", noted)
    ids = torch.arange(12).reshape(2, 6)
    in_step([lambda: outputs_of(model, ids)] * 5)
    assert len(reads) == len(set(reads)) == sum(1 for block in repeated_blocks(model) for _ in block.parameters())


def test_what_a_call_raises_is_raised_and_ends_the_others(tmp_path: Path) -> None:
    import threading

    seeded(t5).save_pretrained(tmp_path)  # type: ignore[operator]
    with streaming():
        model = load_text_model(str(tmp_path))
    good, bad = torch.arange(6)[None], torch.full((1, 6), 99)
    before = threading.active_count()
    with pytest.raises(IndexError):
        in_step([lambda: outputs_of(model, good), lambda: outputs_of(model, bad)])
    assert threading.active_count() == before


@pytest.mark.parametrize("fault", ["lacks 1 tensors", "has shape", "NaN or infinite"])
def test_weights_that_are_not_the_encoders_are_named(fault: str, tmp_path: Path) -> None:
    seeded(t5).save_pretrained(tmp_path)  # type: ignore[operator]
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = "encoder.block.1.layer.1.DenseReluDense.wo.weight"
    changed = {"lacks 1 tensors": None, "has shape": torch.zeros(3), "NaN or infinite": tensors[name] * torch.nan}
    value = changed[fault]
    tensors = {key: tensor for key, tensor in tensors.items() if key != name} | ({} if value is None else {name: value})
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=fault) as error, streaming():
        outputs_of(load_text_model(str(tmp_path)), torch.arange(6)[None])
    assert name in str(error.value)


#: Every family, and what its tiny pipeline needs said; those without "slow" have encoders of all kinds among them.
FAMILIES: dict[str, list[str]] = {
    "pixart": [],
    "stable_diffusion_3": [],
    "qwen_image": [],
    "stable_diffusion": [],
    "stable_diffusion_xl": [],
    "z_image": [f"models.latent_shape={list(tiny.LATENT)}"],
    "sana": [],
    "flux": [],
    "flux_2": [],
}
QUICK = ("pixart", "stable_diffusion_3", "qwen_image")


def write_family(folder: Path, family: str) -> Path:
    return (tiny_flux if family in tiny_flux.LATENTS else tiny).write_base(folder, family)


def assert_equal(one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == other[name].dtype and torch.equal(value, other[name]), name
        else:
            assert_equal(value, other[name])


@pytest.mark.parametrize(
    "family", [pytest.param(each, marks=[] if each in QUICK else pytest.mark.slow) for each in FAMILIES]
)
def test_embeddings_are_those_of_the_whole_encoder(family: str, tmp_path: Path) -> None:
    file, settings = write_family(tmp_path, family), FAMILIES[family]
    for name, options in (("whole", []), ("streamed", ["--stream"])):
        assert main(["embed", str(file), "--out", str(tmp_path / name), "--batch", "2", *options, *settings]) == 0
    files = sorted(path.name for path in (tmp_path / "whole").glob("*.safetensors"))
    assert len(files) >= 2
    for name in files:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "streamed" / name).read_bytes()
    # Begun in one way, they are gone on with in the other.
    (tmp_path / "streamed" / files[0]).unlink()
    assert main(["embed", str(file), "--out", str(tmp_path / "streamed"), "--batch", "2", *settings]) == 0
    assert (tmp_path / "whole" / files[0]).read_bytes() == (tmp_path / "streamed" / files[0]).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_on_streamed_embeddings_is_the_run_with_its_encoders(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, folder = write_family(tmp_path, family), tmp_path / "embeddings"
    quiet = ["training.grid_every=null", "training.steps=2", *FAMILIES[family]]
    assert main(["embed", str(file), "--out", str(folder), "--stream", *quiet]) == 0
    Trainer(load_config(file, [*quiet, f"output={tmp_path / 'encoded'}"])).run()
    # The encoders are not even there for the run, but for the digests of their files.
    monkeypatch.setattr(text, "load_text", lambda models: pytest.fail("the text encoder was loaded"))
    Trainer(load_config(file, [*quiet, f"output={tmp_path / 'embedded'}", f"prompts.embeddings={folder}"])).run()
    one, other = (tmp_path / run / "checkpoints" / "step_000002" for run in ("encoded", "embedded"))
    files = sorted(path.name for path in one.glob("*.safetensors"))
    assert len(files) >= 4
    for name in files:
        assert_equal(read_tensors(one / name), read_tensors(other / name))
