"""Text encoders block by block: the same bits as whole, each block read once for all batches, and little memory."""

from __future__ import annotations

import json
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
from diffpp_fast.networks.families import FAMILIES as FAMILIES_OF_NETWORKS
from diffpp_fast.networks.quantization import is_quantized
from diffpp_fast.networks.quantized_text import saved_bytes
from diffpp_fast.networks.streaming import in_step, load_streamed, repeated_blocks, streaming
from diffpp_fast.networks.text import load_text_model
from diffpp_fast.tensor_files import StoredTensors
from diffpp_fast.training import ConfigurationError, Trainer, load_config
from diffpp_fast.training.build import text
from diffpp_fast.training.checkpoint import read_tensors
from diffpp_fast.training.prompts import open_prompts


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


@pytest.mark.parametrize("build", [tiny_flux.mistral3, tiny_flux.qwen2_5_vl])
def test_encoders_that_also_see_are_streamed_without_their_sight(build: Callable[[], Any], tmp_path: Path) -> None:
    from transformers import AutoModel

    build().save_pretrained(tmp_path)
    whole = AutoModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
    stored = StoredTensors([tmp_path / "model.safetensors"])
    streamed = load_streamed(tmp_path, AutoModel, stored, torch.float32)
    ids = torch.arange(3, 21).reshape(2, 9)
    for ours, theirs in zip(outputs_of(streamed, ids), outputs_of(whole, ids), strict=True):
        assert torch.equal(ours, theirs)
    embeddings = whole.get_input_embeddings().weight.numel()
    held = sum(parameter.numel() for parameter in streamed.parameters())
    assert embeddings < held < embeddings + 100, "the last norm, besides, and nothing that sees"


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


def wide(kind: str) -> Any:
    """Encoders whose layers are large enough."""
    from transformers import CLIPTextConfig, CLIPTextModel, Qwen3Config, Qwen3Model, T5Config, T5EncoderModel

    if kind == "t5":
        settings = {"vocab_size": 30, "d_model": 64, "d_kv": 32, "d_ff": 128, "num_layers": 2, "num_heads": 2}
        return T5EncoderModel(T5Config(**settings, feed_forward_proj="gated-gelu"))
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    if kind == "qwen3":
        return Qwen3Model(Qwen3Config(**sizes, num_attention_heads=2, num_key_value_heads=2, head_dim=32))
    return CLIPTextModel(CLIPTextConfig(**sizes, num_attention_heads=2))


#: By encoder and kind of its weights: the largest relative error of its hidden states.
ERRORS = {
    ("clip", "int8"): 0.05,
    ("clip", "nf4"): 0.4,
    ("clip", "float8"): 0.1,
    ("qwen3", "float8"): 0.06,
    ("t5", "float8"): 0.06,
    ("t5", "nf4"): 0.2,
}


@pytest.mark.parametrize(("kind", "quantization"), ERRORS)
def test_weights_in_fewer_bits_are_the_same_whole_and_streamed(kind: str, quantization: str, tmp_path: Path) -> None:
    if quantization != "float8":
        pytest.importorskip("bitsandbytes", reason="int8 and nf4 are bitsandbytes'")
    model: Any = seeded(lambda: wide(kind))
    loader = type(model).__name__
    model.save_pretrained(tmp_path)
    whole = load_text_model(str(tmp_path), quantization=quantization, loader=loader)
    with streaming():
        streamed = load_text_model(str(tmp_path), quantization=quantization, loader=loader)
    ids = torch.arange(3, 21).reshape(2, 9)
    found, again, exact = outputs_of(whole, ids), outputs_of(streamed, ids), outputs_of(model, ids)
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))
    error = float((found[-1] - exact[-1]).norm() / exact[-1].norm())
    assert 1e-4 < error < ERRORS[kind, quantization]
    few = [name for name, layer in whole.named_modules() if is_quantized(layer)]
    assert len(few) == {"t5": 6, "clip": 6, "qwen3": 7}[kind] * 2
    assert not any(name.endswith(".wo") for name in few)
    assert not any(is_quantized(layer) for layer in streamed.modules()), "nothing stays"
    before, after = (sum(map(block_bytes, repeated_blocks(each))) for each in (model, whole))
    # bitsandbytes describes what it has stored.
    assert 0 <= after - before + saved_bytes(repeated_blocks(model), quantization, 4) <= 100 * len(few)


def block_bytes(block: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in block.state_dict().values())


def test_weights_that_break_in_fewer_bits_are_refused(tmp_path: Path) -> None:
    seeded(t5).save_pretrained(tmp_path)  # type: ignore[operator]
    with pytest.raises(ValueError, match=r"is a t5, which overflows in float16, and int8 takes inputs through it"):
        load_text_model(str(tmp_path), quantization="int8")
    with pytest.raises(ValueError, match=r"has no linear layer of 4096 weights and more for float8"):
        load_text_model(str(tmp_path), quantization="float8")
    seeded(tiny.clip).save_pretrained(tmp_path / "clip")  # type: ignore[operator]
    with pytest.raises(ValueError, match=r"is in float16, in which sums over float8's numbers overflow"):
        load_text_model(str(tmp_path / "clip"), torch.float16, quantization="float8")


def test_embeddings_of_an_encoder_in_fewer_bits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import T5Config, T5EncoderModel

    file, wanted = tiny.write_base(tmp_path, "pixart"), "models.text_encoder.quantization=float8"
    settings = {"vocab_size": 30, "d_model": tiny.TEXT_WIDTH, "d_kv": 128, "d_ff": 256, "num_layers": 2, "num_heads": 2}
    encoder: Any = seeded(lambda: T5EncoderModel(T5Config(**settings)))
    encoder.save_pretrained(tmp_path / "base" / "text_encoder")
    for name, options in (("as it is", []), ("whole", [wanted]), ("streamed", [wanted, "--stream"])):
        assert main(["embed", str(file), "--out", str(tmp_path / name), *options]) == 0
    files = ["null.safetensors", "shard-00000-of-00001.safetensors"]
    exact, whole, streamed = ([(tmp_path / name / each).read_bytes() for each in files] for name in
                              ("as it is", "whole", "streamed"))  # fmt: skip
    assert whole == streamed != exact
    config = load_config(file, [f"prompts.embeddings={tmp_path / 'whole'}"])
    with pytest.raises(ConfigurationError, match=r"made from other inputs: models\.text_encoder\.quantization"):
        text.open_embeddings(config, open_prompts(config.prompts), torch.device("cpu"))
    assert main(["embed", str(file), "--out", str(tmp_path / "no"), wanted.replace("float8", "int8")]) == 2
    assert "int8 takes inputs through it: use quantization float8 or nf4" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["int8", "nf4", "float8"])
def test_a_run_with_an_encoder_in_fewer_bits_is_resumed(
    quantization: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the run as from the disk, its digest is the same at every start, and plans count its bytes."""
    from transformers import CLIPTextConfig, CLIPTextModel

    if quantization != "float8":
        pytest.importorskip("bitsandbytes", reason="int8 and nf4 are bitsandbytes'")
    file = tiny.write_base(tmp_path, "stable_diffusion")
    sizes = {"vocab_size": 54, "hidden_size": tiny.TEXT_WIDTH, "intermediate_size": 256, "num_hidden_layers": 2}
    tokens = {"bos_token_id": 52, "eos_token_id": 53}
    encoder: Any = seeded(lambda: CLIPTextModel(CLIPTextConfig(**sizes, **tokens, num_attention_heads=2)))
    encoder.save_pretrained(tmp_path / "base" / "text_encoder")
    settings = ["training.grid_every=null", f"models.text_encoder.quantization={quantization}"]
    for steps in (1, 2):
        config = load_config(file, [*settings, f"training.steps={steps}", f"output={tmp_path / 'encoded'}"])
        Trainer(config, resume=None if steps == 1 else "latest").run()
    folder = tmp_path / "embeddings"
    assert main(["embed", str(file), "--out", str(folder), *settings]) == 0
    more = [*settings, "training.steps=2", f"output={tmp_path / 'embedded'}", f"prompts.embeddings={folder}"]
    Trainer(load_config(file, more)).run()
    one, other = (tmp_path / run / "checkpoints" / "step_000002" for run in ("encoded", "embedded"))
    for name in sorted(path.name for path in one.glob("*.safetensors")):
        assert_equal(read_tensors(one / name), read_tensors(other / name))
    planned = []
    for kind in ("null", quantization):
        capsys.readouterr()
        assert main(["plan", str(file), "--json", f"models.text_encoder.quantization={kind}"]) == 0
        planned.append(json.loads(capsys.readouterr().out)["memory"]["roles"]["text encoder"]["weights"])
    assert planned[0] - planned[1] == saved_bytes(repeated_blocks(encoder), quantization, 4) > 0


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


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", ["z_image", "qwen_image"])
def test_padding_behind_all_prompts_is_not_encoded(family: str, side: str) -> None:
    pipeline = (tiny_flux if family in tiny_flux.LATENTS else tiny).pipeline(family)
    model, tokenizer = pipeline.text_encoder, pipeline.tokenizer
    model = getattr(model, "model", model)
    tokenizer.padding_side = side
    (known,) = (each for each in FAMILIES_OF_NETWORKS if type(each).__module__.endswith(family))
    encoder = known.text([(model, tokenizer, 288)], {"axes_lens": [512]})
    seen: list[int] = []
    model.register_forward_pre_hook(
        lambda module, inputs, named: seen.append(named["input_ids"].shape[1]), with_kwargs=True
    )
    prompts = ["a red sun", "a green frog and a yellow sun"]
    both = encoder(prompts).tensors
    length = both["encoder_attention_mask"].shape[1]
    assert length == 288 and both["encoder_hidden_states"].shape[1] == 288
    assert (seen[0] < 288) == (side == "right")
    # Of one length they stand beside each other as they would alone, and padding is zeros.
    for place, prompt in enumerate(prompts):
        alone = encoder([prompt]).tensors
        assert torch.equal(both["encoder_attention_mask"][place], alone["encoder_attention_mask"][0])
        torch.testing.assert_close(both["encoder_hidden_states"][place], alone["encoder_hidden_states"][0])
        kept = int(alone["encoder_attention_mask"].sum())
        assert 0 < kept < 288 and not both["encoder_hidden_states"][place, kept:].any()
