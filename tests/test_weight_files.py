"""Folders and files of weights: whole and the network's own, or refused by name with the way out."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from diffpp_fast.cli.main import main
from diffpp_fast.networks import load_decoder, load_denoiser
from diffpp_fast.networks.loading import find_file, load_scheduler, read_file
from diffpp_fast.networks.text import load_text_model, load_tokenizer
from diffpp_fast.rewards.text import load_clip_tokenizer
from diffpp_fast.tensor_files import Planned, StoredTensors, read_tensors, write_tensors
from diffpp_fast.training import ConfigurationError, load_config
from diffpp_fast.training.build import build_sampler

ROOT = Path(__file__).parent.parent
STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
LOADERS: dict[str, Callable[..., Any]] = {"unet": load_denoiser, "vae": load_decoder, "text_encoder": load_text_model}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_base(tmp_path_factory.mktemp("whole"), "stable_diffusion").parent / "base"


@pytest.fixture
def part(pipeline: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of one of the pipeline's parts."""

    def copy(name: str) -> Path:
        shutil.copytree(pipeline / name, tmp_path / name)
        return tmp_path / name

    return copy


def change(folder: Path, stem: str, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    file = folder / f"{stem}.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, {"format": "pt"})


def shard(folder: Path, stem: str, variant: str = "") -> dict[str, str]:
    """Cuts a folder's weights into two files and an index; returns its map."""
    file = folder / f"{stem}.safetensors"
    tensors = load_file(file)
    names: dict[str, str] = {}
    file.unlink()
    for number, keys in enumerate((list(tensors)[::2], list(tensors)[1::2]), 1):
        name = f"{stem}{variant}-0000{number}-of-00002.safetensors"
        save_file({key: tensors[key] for key in keys}, folder / name, {"format": "pt"})
        names |= dict.fromkeys(keys, name)
    (folder / f"{stem}.safetensors.index{variant}.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return names


@pytest.mark.parametrize("name", STEMS)
@pytest.mark.parametrize("fault", ["lacks", "does not know", "another shape", "NaN or infinite"])
def test_tensors_that_are_not_the_networks_are_named(part, name: str, fault: str) -> None:  # type: ignore[no-untyped-def]
    folder, stem = part(name), STEMS[name]
    victim = sorted(key for key in load_file(folder / f"{stem}.safetensors") if key.endswith("weight"))[0]
    edits: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
        "lacks": lambda tensors: tensors.pop(victim),
        "does not know": lambda tensors: tensors.update({victim + "_more": torch.zeros(1)}),
        "another shape": lambda tensors: tensors.update({victim: torch.zeros(3)}),
        "NaN or infinite": lambda tensors: tensors[victim].view(-1)[-1:].fill_(torch.inf),
    }
    LOADERS[name](str(folder))
    change(folder, stem, edits[fault])
    with pytest.raises(ValueError, match=fault) as error:
        LOADERS[name](str(folder))
    assert victim in str(error.value)


@pytest.mark.parametrize("name", STEMS)
def test_what_nobody_needs_may_be_there(part, name: str) -> None:  # type: ignore[no-untyped-def]
    """Buffers that are counted anew, heads and other towers of text encoders; attention's old names in decoders."""
    if name == "unet":
        return
    folder = part(name)
    if name == "text_encoder":
        spare = {"embeddings.position_ids": torch.arange(77), "text_projection.weight": torch.zeros(2, 2)}
        change(folder, "model", lambda tensors: tensors.update(spare))
    else:
        old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

        def rename(tensors: dict[str, torch.Tensor]) -> None:
            for key in [key for key in tensors if ".attentions." in key]:
                new = key
                for now, then in old.items():
                    new = new.replace(f".{now}.", f".{then}.")
                tensors[new] = tensors.pop(key)

        change(folder, STEMS[name], rename)
        assert any(".query." in key for key in load_file(folder / "diffusion_pytorch_model.safetensors"))
    LOADERS[name](str(folder))


def test_shards_are_those_of_their_index(part) -> None:  # type: ignore[no-untyped-def]
    for name, stem in STEMS.items():
        folder = part(name)
        names = shard(folder, stem)
        LOADERS[name](str(folder))
        index, first = folder / f"{stem}.safetensors.index.json", sorted(names)[0]
        index.write_text(json.dumps({"weight_map": {key: file for key, file in names.items() if key != first}}))
        with pytest.raises(ValueError, match=f"is not that of the files beside it: .*{first} besides"):
            LOADERS[name](str(folder))
        index.write_text(json.dumps({"weight_map": names | {"more": names[first]}}))
        with pytest.raises(ValueError, match="does not hold more"):
            LOADERS[name](str(folder))
        index.write_text(json.dumps({"weight_map": names | {first: "gone.safetensors"}}))
        with pytest.raises(FileNotFoundError, match=r"lists gone\.safetensors, which is not there"):
            LOADERS[name](str(folder))
        for bad in ("{", "[]", '{"weight_map": {"a": "../up"}}'):
            index.write_text(bad)
            with pytest.raises(ValueError, match="is damaged"):
                LOADERS[name](str(folder))
        index.unlink()
        with pytest.raises(FileNotFoundError, match=r"without .*index\.json"):
            LOADERS[name](str(folder))


def test_files_that_are_not_what_they_should_be(part) -> None:  # type: ignore[no-untyped-def]
    folder = part("unet")
    file = folder / "diffusion_pytorch_model.safetensors"
    content = file.read_bytes()
    for data, said in (
        (b"", "is empty"),
        (content[:5], "Is it whole"),
        (content[:-7], "Is it whole"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        (b"<!DOCTYPE html>" + bytes(100), "is a web page"),
        (b"GGUF" + bytes(100), "is GGUF"),
    ):
        file.write_bytes(data)
        with pytest.raises(ValueError, match=said):
            load_denoiser(str(folder))
    file.unlink()
    file.mkdir()
    with pytest.raises(FileNotFoundError, match=r"holds no diffusion_pytorch_model\.safetensors; it"):
        load_denoiser(str(folder))


def test_variants_are_chosen_by_name(part) -> None:  # type: ignore[no-untyped-def]
    for name, stem in STEMS.items():
        for sharded in (False, True):
            folder = part(name)
            file = folder / f"{stem}.safetensors"
            if sharded:
                shard(folder, stem, ".fp16")
            else:
                file.rename(folder / f"{stem}.fp16.safetensors")
            with pytest.raises(FileNotFoundError, match=r"only as the variant fp16: set the key variant .* to fp16"):
                LOADERS[name](str(folder))
            LOADERS[name](str(folder), variant="fp16")
            with pytest.raises(FileNotFoundError, match="only as the variant fp16"):
                LOADERS[name](str(folder), variant="bf16")
            shutil.rmtree(folder)


def test_a_variant_of_the_base_serves_all_its_parts(pipeline: Path, tmp_path: Path) -> None:
    config = tiny.write_base(tmp_path, "stable_diffusion")
    for name, stem in STEMS.items():
        file = tmp_path / "base" / name / f"{stem}.safetensors"
        file.rename(file.with_suffix(".fp16.safetensors"))
    build_sampler(load_config(config, ["models.variant=fp16"]), torch.device("cpu"))
    with pytest.raises(ConfigurationError, match=r"models\.reference.*only as the variant fp16"):
        build_sampler(load_config(config), torch.device("cpu"))


def test_pickles_are_converted_by_the_command_that_is_named(part) -> None:  # type: ignore[no-untyped-def]
    folder = part("unet")
    file = folder / "diffusion_pytorch_model.safetensors"
    before = load_file(file)
    torch.save(before, file.with_suffix(".bin"))
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"only as pickles") as error:
        load_denoiser(str(folder))
    command = str(error.value).partition('python -c "')[2].partition('"')[0]
    exec(command, {})
    after = load_denoiser(str(folder)).network.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.x"], "StableDiffusionPipeline.from"),
        (["model.diffusion_model.input_blocks.0.0.weight", "conditioner.embedders.0.x"], "StableDiffusionXLPipeline"),
        (["first_stage_model.encoder.down.0.block.0.norm1.weight"], "AutoencoderKL.from_single_file"),
        (["input_blocks.0.0.weight", "output_blocks.0.0.weight"], "UNet2DConditionModel.from_single_file"),
        (["lora_unet_down_blocks_0_attn1_to_q.lora_down.weight"], "a LoRA in kohya's names.*fuse_lora"),
        (["unet.down_blocks.0.attn1.to_q.lora_A.weight"], "a LoRA in diffusers' names.*fuse_lora"),
        (["base_model.model.down_blocks.0.to_q.lora_B.weight"], "adapters in peft's names.*merge_and_unload"),
        (["double_blocks.0.img_attn.qkv.weight"], "Flux in its authors' names"),
        (["model.diffusion_model.joint_blocks.0.x"], "Stable Diffusion 3"),
        (["controlnet_cond_embedding.conv_in.weight"], "a ControlNet"),
        (["ip_adapter.1.to_k_ip.weight"], "an IP-Adapter"),
        (["blocks.0.attn.qkv.weight", "y_embedder.y_embedding"], "convert_pixart_alpha"),
        (["down_blocks.0.weight.absmax"], "quantised"),
        (["decoder.up_blocks.0.resnets.0.norm1.weight"], "an autoencoder"),
        (["text_model.embeddings.token_embedding.weight"], "a text encoder"),
    ],
)  # fmt: skip
def test_other_formats_are_recognised_by_their_names(
    pipeline: Path, tmp_path: Path, names: list[str], said: str
) -> None:
    save_file({name: torch.zeros(1) for name in names}, tmp_path / "file.safetensors")
    with pytest.raises(ValueError, match=rf"lacks .*; it looks like .*{said}|it looks like {said}"):
        load_denoiser(str(tmp_path / "file.safetensors"), configuration=str(pipeline / "unet"))


def test_an_lcm_network_in_a_file_is_recognised(pipeline: Path, tmp_path: Path) -> None:
    tensors = load_file(pipeline / "unet" / "diffusion_pytorch_model.safetensors")
    save_file({**tensors, "time_embedding.cond_proj.weight": torch.zeros(1)}, tmp_path / "lcm.safetensors")
    with pytest.raises(ValueError, match="an LCM UNet, which is told the guidance scale"):
        load_denoiser(str(tmp_path / "lcm.safetensors"), configuration=str(pipeline / "unet"))


@pytest.mark.parametrize("name", ["a.gguf", "a.onnx", "diffusion_flax_model.msgpack", "tf_model.h5", "A.GGUF"])
def test_other_formats_are_recognised_by_their_endings(pipeline: Path, part, name: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match="take the model's safetensors"):
        load_denoiser(f"/somewhere/{name}", configuration=str(pipeline / "unet"))
    folder = part("unet")
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    (folder / name.lower()).write_bytes(b"1")
    with pytest.raises(FileNotFoundError, match=f"holds {name.lower()}: that is"):
        load_denoiser(str(folder))


def test_a_folder_of_adapters_is_recognised(tmp_path: Path) -> None:
    for name, said in (("pytorch_lora_weights", "a LoRA.*load_lora_weights"), ("adapter_model", "adapters.*PeftModel")):
        name += ".safetensors"
        (tmp_path / name).write_bytes(b"1")
        with pytest.raises(FileNotFoundError, match=rf"holds no config\.json: it looks like {said}"):
            load_denoiser(str(tmp_path))
        (tmp_path / name).unlink()


TENSORS = {"conv_in.weight": torch.ones(2, 2), "down.0.bias": torch.zeros(3)}


@pytest.mark.parametrize(
    "prefix",
    ["", "module.", "_orig_mod.", "unet.", "model.", "network.", "generator.", "module._orig_mod.", "transformer.",
     "model.unet._orig_mod.", "_fsdp_wrapped_module."],
)  # fmt: skip
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_names_of_wrappers_are_taken_off(tmp_path: Path, prefix: str, suffix: str) -> None:
    file, named = tmp_path / f"file{suffix}", {prefix + name: tensor for name, tensor in TENSORS.items()}
    if prefix == "_fsdp_wrapped_module.":
        named = {"down._fsdp_wrapped_module.0._checkpoint_wrapped_module.bias": TENSORS["down.0.bias"],
                 "_fsdp_wrapped_module.conv_in.weight": TENSORS["conv_in.weight"]}  # fmt: skip
    if suffix == ".pt":
        torch.save(named, file)
    else:
        save_file(named, file)
    found = read_tensors(file)
    assert found.keys() == TENSORS.keys() and all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)


OPTIMIZER = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1.0}]}


@pytest.mark.parametrize(
    ("content", "wanted", "said"),
    [
        ({"state_dict": TENSORS, "epoch": 3}, None, None),
        ({"model": {"module": TENSORS}, "optimizer": OPTIMIZER, "step": torch.tensor(3)}, None, None),
        ({"generator_ema": TENSORS, "optimizer_states": {"a": TENSORS}}, None, None),
        ({"ema": TENSORS, "model": TENSORS}, None, "several state dicts: choose one of ema, model with the key"),
        ({"ema": TENSORS, "model": {"x": torch.ones(1)}}, "ema", None),
        ({"a": {"ema": TENSORS}, "model": {"x": torch.ones(1)}}, "a.ema", None),
        ({"ema": TENSORS, "model": TENSORS}, "student", "holds no state dict student; it holds ema, model"),
        ({f"{role}.{name}": value for role in ("generator", "fake") for name, value in TENSORS.items()}, "fake", None),
        ({"epoch": 3}, None, "holds no state dict"),
        ([torch.ones(1)], None, "holds no state dict"),
        (OPTIMIZER, None, "holds no state dict|exp_avg"),
    ],
)  # fmt: skip
def test_the_state_dict_of_a_checkpoint(tmp_path: Path, content: Any, wanted: str | None, said: str | None) -> None:
    torch.save(content, tmp_path / "checkpoint.pt")
    if said is not None:
        with pytest.raises(ValueError, match=said):
            read_tensors(tmp_path / "checkpoint.pt", wanted)
    else:
        assert read_tensors(tmp_path / "checkpoint.pt", wanted).keys() == TENSORS.keys()


def test_one_of_a_files_networks_is_found_or_chosen(pipeline: Path, tmp_path: Path) -> None:
    tensors = load_file(pipeline / "unet" / "diffusion_pytorch_model.safetensors")
    whole = {f"student.net.{name}": tensor for name, tensor in tensors.items()}
    whole["loss.head.weight"] = torch.zeros(1)
    save_file(whole, tmp_path / "one.safetensors")
    found = load_denoiser(str(tmp_path / "one.safetensors"), configuration=str(pipeline / "unet"))
    assert torch.equal(found.network.state_dict()["conv_in.weight"], tensors["conv_in.weight"])
    more = {f"fake.net.{name}": tensor + 1 for name, tensor in tensors.items()}
    save_file({**whole, **more}, tmp_path / "two.safetensors")
    arguments = {"configuration": str(pipeline / "unet")}
    with pytest.raises(ValueError, match=r"choose one of fake\.net, student\.net with the key state_dict"):
        load_denoiser(str(tmp_path / "two.safetensors"), **arguments)
    chosen = load_denoiser(str(tmp_path / "two.safetensors"), state_dict="fake.net", **arguments)
    assert torch.equal(chosen.network.state_dict()["conv_in.weight"], tensors["conv_in.weight"] + 1)


def test_damaged_pickles_are_a_sentence(tmp_path: Path) -> None:
    file = tmp_path / "weights.bin"
    for legacy in (False, True):
        torch.save(TENSORS, file, _use_new_zipfile_serialization=not legacy)
        content = file.read_bytes()
        for cut in range(0, len(content), max(1, len(content) // 40)):
            file.write_bytes(content[:cut])
            with pytest.raises(ValueError, match=r"weights\.bin (is empty|can't be read|holds)"):
                read_file(str(file))
        for place in range(2, min(len(content), 400), 7):
            file.write_bytes(content[:place] + bytes([content[place] ^ 0x55]) + content[place + 1 :])
            try:
                read_file(str(file))
            except ValueError as error:
                assert "weights.bin" in str(error)
    with pytest.raises(ValueError, match="is a folder, not a file"):
        read_tensors(tmp_path)


def test_a_stream_is_what_safetensors_writes_and_keeps_one_tensor(tmp_path: Path) -> None:
    import weakref

    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.uint8)
    tensors = {f"t{n}": torch.arange(n + 1).to(dtype) for n, dtype in enumerate(dtypes)}
    tensors |= {"empty": torch.empty(0, 3), "scalar": torch.tensor(2.0), "strided": torch.ones(4, 6).t()}
    made: list[weakref.ref[torch.Tensor]] = []

    def make(name: str) -> torch.Tensor:
        assert all(other() is None for other in made), "an earlier tensor is still there"
        copy = tensors[name].clone()
        made.append(weakref.ref(copy))
        return copy

    planned = {
        name: Planned(tensor.dtype, tuple(tensor.shape), lambda name=name: make(name))
        for name, tensor in tensors.items()
    }
    write_tensors(tmp_path / "a.safetensors", planned)
    read = load_file(tmp_path / "a.safetensors")
    assert len(made) == len(tensors) and read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor)
    assert dict(StoredTensors([tmp_path / "a.safetensors"])).keys() == tensors.keys()
    with pytest.raises(ValueError, match="planned as"):
        write_tensors(tmp_path / "b.safetensors", {"a": Planned(torch.float32, (3,), lambda: torch.ones(2))})


@pytest.mark.parametrize("family", ["stable_diffusion", "pixart"])
def test_a_tokenizer_without_its_vocabulary_is_refused(family: str, tmp_path: Path) -> None:
    """transformers makes one of the special tokens alone, without a word."""
    tokenizer = tiny.clip_tokenizer() if family == "stable_diffusion" else tiny.t5_tokenizer()
    model = tiny.clip() if family == "stable_diffusion" else tiny.t5()
    tokenizer.save_pretrained(tmp_path)
    load_tokenizer(str(tmp_path), model)
    model.config.vocab_size = 5000
    with pytest.raises(ValueError, match="tokens, the text encoder 5000"):
        load_tokenizer(str(tmp_path), model)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no vocabulary of a \w+: tokenizer\.json or"):
        load_tokenizer(str(tmp_path))
    if family == "stable_diffusion":
        with pytest.raises(ConfigurationError, match="holds no vocabulary of a CLIPTokenizer"):
            load_clip_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version":')
    with pytest.raises(ValueError, match="holds no tokenizer that can be read"):
        load_tokenizer(str(tmp_path))


def test_no_code_of_a_folder_is_run(tmp_path: Path) -> None:
    """transformers would import it where it is trusted, and ask at the terminal where nothing is said."""
    tiny.clip().save_pretrained(tmp_path)
    tiny.clip_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    for name, classes in (
        ("config.json", {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil", "AutoModelForTextEncoding": "evil.Evil"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}),
    ):
        facts = json.loads((tmp_path / name).read_text())
        strange = {"model_type": "evil"} if name == "config.json" else {"tokenizer_class": "Evil"}
        for more in ({}, strange):
            (tmp_path / name).write_text(json.dumps({**facts, **more, "auto_map": classes}))
            for load in (load_text_model, load_tokenizer):
                with suppress(ValueError):
                    load(str(tmp_path))
        (tmp_path / name).write_text(json.dumps(facts))
    assert not (tmp_path / "ran").exists()
    for file in (ROOT / "diffpp_fast").rglob("*.py"):
        for call in re.findall(r"(?<!diffusers\.)Auto\w+\.from_pretrained\((.*?)\)\n", file.read_text(), re.DOTALL):
            assert "trust_remote_code=False" in call, file


def test_a_scheduler_says_its_noise_levels(pipeline: Path, tmp_path: Path) -> None:
    facts = json.loads((pipeline / "scheduler" / "scheduler_config.json").read_text())
    for key in ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end"):
        left = {name: value for name, value in facts.items() if name != key}
        (tmp_path / "scheduler_config.json").write_text(json.dumps(left))
        with pytest.raises(ValueError, match=f"lacks {key}"):
            load_scheduler(str(tmp_path))
    (tmp_path / "scheduler_config.json").write_text(json.dumps({**facts, "_class_name": "AutoencoderKL"}))
    with pytest.raises(ValueError, match="AutoencoderKL is no scheduler of diffusers"):
        load_scheduler(str(tmp_path))
    for text in ("{", "[1]", '"text"'):
        (tmp_path / "scheduler_config.json").write_text(text)
        with pytest.raises(ValueError, match="is damaged"):
            load_scheduler(str(tmp_path))


def test_paths_say_what_is_there(pipeline: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for path, said in (
        (tmp_path / "file", "is a file, where a folder is wanted"),
        (tmp_path / "file" / "unet", "file is a file"),
        (tmp_path / "link", r"is a link to .*gone, which is not there"),
        (tmp_path / "link" / "unet", r"is a link to .*gone, which is not there"),
        (tmp_path / "nothing", "no such folder"),
        (pipeline, r"whole pipeline, to be named in models\.base"),
        (pipeline / "text_encoder", "is a clip_text_model of transformers"),
        (tmp_path / ("x" * 300), "too long"),
        ("", "the path is empty"),
    ):
        with pytest.raises((ValueError, OSError), match=said):
            load_denoiser(str(path))


def test_a_hub_that_gives_nothing_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(Exception):
        """An error that an HTTP library may raise: no OSError."""

    def fail(*_: Any, **__: Any) -> str:
        raise Broken("no route to host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    for load in (load_denoiser, load_text_model, load_tokenizer):
        said = r"no folder a/b/unet here.* gave no a/b \(no route to host\).*hf download a/b --include 'unet/\*';"
        with pytest.raises(FileNotFoundError, match=said):
            load("a/b/unet")
    monkeypatch.setattr("diffpp_fast.networks.loading.hub_file", fail)
    with pytest.raises(FileNotFoundError, match=r"no file a/b/c\.bin.*hf download a/b c\.bin; .* the file's path"):
        find_file("a/b/c.bin")


def test_a_bad_reference_is_blamed_on_itself(
    pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny.write_base(tmp_path, "stable_diffusion")
    change(tmp_path / "base" / "unet", STEMS["unet"], lambda tensors: tensors.pop("conv_in.weight"))
    with pytest.raises(
        ConfigurationError, match=r"^models\.reference: .*lacks 1 of \d+ tensors, e\.g\. conv_in\.weight"
    ):
        build_sampler(load_config(config), torch.device("cpu"))
    assert main(["train", str(config), f"output={tmp_path / 'run'}", 'models.reference.path=""']) == 2
    assert "models.reference.path should have at least 1 character" in capsys.readouterr().err
