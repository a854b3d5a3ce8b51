"""Exports without the paths of who made them, in whatever file one could be."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from diffpp_fast.tensor_files import metadata_of
from diffpp_fast.training import Config, load_config
from diffpp_fast.training.build import build_sampler
from diffpp_fast.training.export import LoraSource, export_generator, export_lora, export_pipeline
from diffpp_fast.training.exported import Exported
from diffpp_fast.training.private_paths import PATH, remove_private_paths
from diffpp_fast.user_paths import public_name

PLACES = {
    "_name_or_path": "/scratch/anna/secret",
    "name_or_path": "../anna/secret/sd",
    "special_tokens_map_file": "~/secret/tokens.json",
    "of_windows": "C:\\Users\\anna\\secret",
    "inside": {"cache_dir": "/home/anna/.cache/secret"},
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run in a person's home folder, with networks in another folder of theirs; all settings name places."""
    home, scratch = (tmp_path_factory.mktemp("machine") / name / "anna" for name in ("home", "scratch"))
    home.mkdir(parents=True)
    align = tiny.write_base(home, "stable_diffusion")
    shutil.move(home / "base", scratch / "sd")
    base = scratch / "sd"
    settings = [*base.rglob("*config.json"), base / "model_index.json"]
    assert len(settings) >= 5
    for file in settings:
        file.write_text(json.dumps({**json.loads(file.read_text()), **PLACES}))
    for file in base.rglob("*.safetensors"):
        recipe = {"format": "pt", "recipe": '{"from": "/scratch/anna/secret/a.safetensors"}', "title": "a/b"}
        save_file(load_file(file), file, recipe)
    shutil.copytree(base / "unet", scratch / "unet")
    changes = ["models.generator.lora={rank: 2, targets: [to_q]}", f"models.reference.path={scratch / 'unet'}"]
    return load_config(align, [f"models.base={base}", f"output={home}", *changes])


@pytest.mark.parametrize("form", ["pipeline", "network", "diffusers", "comfyui"])
def test_no_file_of_an_export_holds_a_path(config: Config, tmp_path: Path, form: str) -> None:
    trained = build_sampler(config, torch.device("cpu")).trained
    out = tmp_path / "out"
    if form == "pipeline":
        export_pipeline(out, config, trained)
    elif form == "network":
        export_generator(out, config, trained)
    else:
        export_lora(out, config, trained, LoraSource(Exported(config, trained), form))  # type: ignore[arg-type]
    files = [path for path in out.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"README.md", "generator.json", "scheduler_config.json"}
    for path in files:
        content = path.read_bytes()
        assert not [word for word in (b"anna", b"secret") if word in content], path.name
    for path in out.rglob("*.safetensors"):
        assert load_file(path) and metadata_of(path)["format"] == "pt"
    if form == "pipeline":
        from diffusers import DiffusionPipeline

        DiffusionPipeline.from_pretrained(out)
        assert metadata_of(out / "vae/diffusion_pytorch_model.safetensors") == {"format": "pt", "title": "a/b"}
        text = json.loads((out / "text_encoder/config.json").read_text())
        assert text["inside"] == {} and text["hidden_size"] == tiny.TEXT_WIDTH


def test_settings_without_paths_keep_every_byte(tmp_path: Path) -> None:
    content = b'{"_name_or_path": "openai/clip", "act":"gelu" , "template": "/a/b\\n", "_x": ""}'
    (tmp_path / "config.json").write_bytes(content)
    (tmp_path / "tokenizer_config.json").write_bytes(b'{"damaged": \xff')
    remove_private_paths(tmp_path)
    assert (tmp_path / "config.json").read_bytes() == content
    assert (tmp_path / "tokenizer_config.json").read_bytes() == b'{"damaged": \xff'


@pytest.mark.parametrize(
    "text", ["https://host/a/b", "openai/clip", "a/b/c", "/", "</w>", "1/2", "^down_blocks.0", "~"]
)
def test_what_is_no_path(text: str) -> None:
    assert PATH.search(text) is None


@pytest.mark.parametrize("text", ["/a/b", "made of /a/b", '{"x":"/a/b"}', "~/a", "~anna/a", "D:\\a\\b", "file:///a/b"])
def test_what_is_a_path(text: str) -> None:
    assert PATH.search(text) is not None


@pytest.mark.parametrize(
    ("path", "name"), [("/home/anna", ""), ("/Users/anna", ""), ("/home/anna/sd", "sd"), ("/x/sd.pt", "sd.pt")]
)
def test_the_name_of_a_home_folder_is_a_persons(path: str, name: str) -> None:
    assert public_name(path) == name
    assert public_name(Path.home()) == ""
