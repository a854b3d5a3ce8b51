"""Embeddings on the disk: what they are checked against, how writing goes on, and that a run can't tell them apart."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from prompt_files import opened, write_csv, write_text

from diffpp_fast.cli.main import main
from diffpp_fast.evaluation.pictures import read_picture
from diffpp_fast.networks import Conditioning, streaming
from diffpp_fast.training import Config, ConfigurationError, Trainer, load_config
from diffpp_fast.training.build import text
from diffpp_fast.training.build.text import TextFacts, load_text, open_embeddings
from diffpp_fast.training.checkpoint import read_tensors
from diffpp_fast.training.prompts import EmbeddingCache, PromptSource, embed, open_prompts
from diffpp_fast.training.prompts.embeddings import read_manifest

CPU = torch.device("cpu")
GRID = ["a green apple", "a red sun"]
QUIET = ("rewards.held_out=null", f"training.grid_prompts={json.dumps(GRID)}", "training.steps=2")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of a tiny run, with embeddings of its prompts in `embeddings` beside it."""
    config = tiny.write(tmp_path_factory.mktemp("project"))
    assert main(["embed", str(config), f"--out={config.parent / 'embeddings'}", *QUIET]) == 0
    return config


@pytest.fixture
def copy(project: Path, tmp_path: Path) -> Path:
    """The project in a folder of its own, files with their times as they are."""
    shutil.copytree(project.parent, tmp_path / "copy")
    return tmp_path / "copy" / project.name


def cached(file: Path, *overrides: str) -> Config:
    return load_config(file, [f"prompts.embeddings={file.parent / 'embeddings'}", *QUIET, *overrides])


def cache_of(config: Config) -> EmbeddingCache:
    cache = open_embeddings(config, open_prompts(config.prompts), CPU)
    assert cache is not None
    return cache


def assert_equal(one: Any, other: Any) -> None:
    """Nested mappings of tensors, bit for bit."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == other[name].dtype and torch.equal(value, other[name]), name
        else:
            assert_equal(value, other[name])


def rows_of(conditioning: Conditioning) -> dict[str, Any]:
    return {prompt: conditioning[place : place + 1].tensors for place, prompt in enumerate(conditioning.prompts)}


def state(folder: Path) -> dict[str, tuple[int, int]]:
    """Which files there are; one that is written again is another one."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.iterdir()}


def test_conditioning_from_the_disk_is_that_of_the_encoder_to_the_bit(project: Path) -> None:
    """The prompts of the source were encoded together, and those of the grid."""
    cache, (encoder, _) = cache_of(cached(project)), load_text(load_config(project).models)
    encoded = {prompt: row for group in (tiny.PROMPTS, GRID) for prompt, row in rows_of(encoder(group)).items()}
    for prompts in ([*tiny.PROMPTS], [tiny.PROMPTS[2], GRID[1], tiny.PROMPTS[2]]):
        conditioning = cache(prompts)
        assert conditioning.prompts == tuple(prompts)
        for number, prompt in enumerate(prompts):
            assert_equal(conditioning[number : number + 1].tensors, encoded[prompt])
    assert_equal(cache.null().tensors, encoder.null().tensors)
    with pytest.raises(ConfigurationError, match="holds no embedding of 'a blue frog'"):
        cache(["a blue frog"])


def test_a_run_with_embeddings_ends_with_the_same_weights_and_loads_no_encoder(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Trainer(load_config(project, [*QUIET, f"output={tmp_path / 'encoded'}"])).run()

    def refuse(*arguments: Any) -> None:
        raise AssertionError("the text encoder was loaded")

    with monkeypatch.context() as patch:
        patch.setattr(text, "load_text", refuse)
        Trainer(cached(project, f"output={tmp_path / 'cached'}")).run()
    one, other = (tmp_path / run / "checkpoints" / "step_000002" for run in ("encoded", "cached"))
    files = sorted(path.name for path in one.glob("*.safetensors"))
    assert len(files) >= 5
    for name in files:
        assert_equal(read_tensors(one / name), read_tensors(other / name))
    grids = [tmp_path / run / "grids" / "step_000002.png" for run in ("encoded", "cached")]
    assert grids[0].read_bytes() == grids[1].read_bytes()
    # Sampling takes prompts that no cache holds: there the encoder is loaded.
    arguments = ["a yellow whale", "--run", str(tmp_path / "cached"), "--out", str(tmp_path / "picture.png")]
    assert main(["sample", *arguments]) == 0


def test_whatever_a_familys_conditioning_holds_is_kept(tmp_path: Path) -> None:
    file = tiny.write_base(tmp_path, "stable_diffusion_xl")
    quiet = ("training.grid_every=null", *QUIET)
    assert main(["embed", str(file), f"--out={tmp_path / 'embeddings'}", *quiet]) == 0
    config = cached(file)
    cache, (encoder, facts) = cache_of(config), load_text(config.models)
    assert_equal(cache(tiny.PROMPTS).tensors, encoder(tiny.PROMPTS).tensors)
    assert_equal(cache.null().tensors, encoder.null().tensors)
    assert TextFacts.of(cache.null()) == facts
    with pytest.raises(ConfigurationError, match=r"models\.size_conditions\.crop"):
        cache_of(cached(file, "models.size_conditions.crop=[8, 8]"))
    with pytest.raises(ConfigurationError, match=r"models\.empty_prompt"):
        cache_of(cached(file, "models.empty_prompt=encoded"))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("models.text_encoder.max_length=9", r"models\.text_encoder\.max_length"),
        ("models.text_encoder.mask_padding=false", r"models\.text_encoder\.mask_padding"),
        ("models.text_encoder.dtype=bfloat16", r"models\.text_encoder\.dtype"),
        ("models.negative_prompt=a red frog", r"models\.negative_prompt"),
    ],
)
def test_an_encoder_with_other_settings_is_refused(project: Path, override: str, said: str) -> None:
    with pytest.raises(ConfigurationError, match=f"was made from other inputs: {said}"):
        cache_of(cached(project, override))


def test_an_encoder_with_other_weights_or_another_tokenizer_is_refused(copy: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = copy.parent / "weights" / "text" / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(weights).items()}
    next(iter(tensors.values())).view(-1)[0] += 1e-3
    save_file(tensors, weights, {"format": "pt"})
    (weights.parent / "tokenizer_config.json").write_text("{}")
    with pytest.raises(
        ConfigurationError,
        match=r"encoder\.path\.model\.safetensors, models\.text_encoder\.path\.tokenizer_config\.json",
    ):
        cache_of(cached(copy))


@pytest.fixture(scope="module")
def conditioning(project: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the embeddings of a sound cache."""
    cache = cache_of(cached(project))
    return cache([*tiny.PROMPTS]).tensors, cache.null().tensors


def test_a_flipped_bit_is_found_when_its_row_is_read(copy: Path, conditioning: tuple[Any, Any]) -> None:
    draw, found = random.Random(0), 0
    for path in sorted((copy.parent / "embeddings").glob("*.safetensors")):
        content = path.read_bytes()
        for bit in draw.sample(range(8 * len(content)), 40):
            flipped = bytearray(content)
            flipped[bit // 8] ^= 1 << bit % 8
            path.write_bytes(flipped)
            try:
                cache = cache_of(cached(copy))
                assert_equal(cache([*tiny.PROMPTS]).tensors, conditioning[0])
                assert_equal(cache.null().tensors, conditioning[1])
            except ConfigurationError:
                found += 1
        path.write_bytes(content)
    assert found > 60  # the others hit the grid's prompts, or padding
    cache_of(cached(copy))


def test_a_cache_without_checksums_serves_with_a_warning(
    copy: Path, conditioning: tuple[Any, Any], caplog: pytest.LogCaptureFixture
) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    assert cache_of(cached(copy)).digest is not None and not caplog.messages
    for path in (copy.parent / "embeddings").glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            about = file.metadata()
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items() if name != "checksums"}
        save_file(tensors, path, about)
    cache = cache_of(cached(copy))
    assert_equal(cache([*tiny.PROMPTS]).tensors, conditioning[0])
    assert cache.digest is None
    assert "3 files in" in caplog.text and "without checksums: nobody would notice" in caplog.text


def test_a_cache_may_move_with_its_encoder(copy: Path) -> None:
    for file in (copy.parent / "weights" / "text").iterdir():
        os.utime(file, ns=(0, 0))
    cache = cache_of(cached(copy))
    assert len(cache(tiny.PROMPTS)) == len(tiny.PROMPTS)


def test_weights_that_have_not_changed_are_not_read_again(
    project: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Where the copy's files have come to lie is known after this.
    assert main(["embed", str(copy), f"--out={copy.parent / 'embeddings'}", *QUIET]) == 0

    def refuse(file: Any) -> str:
        raise AssertionError(f"{file} was read")

    monkeypatch.setattr(embed, "_sha256", refuse)
    cache_of(cached(project))
    cache_of(cached(copy))


def test_an_encoder_that_is_gone_can_not_be_compared(project: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"models\.text_encoder.*no such folder: /nowhere/text"):
        cache_of(cached(project, "models.text_encoder.path=/nowhere/text"))


@pytest.mark.parametrize(
    "prompts", [tiny.PROMPTS[::-1], [*tiny.PROMPTS[:-1], "a red frog!"], [*tiny.PROMPTS, "a new one"]]
)
def test_other_prompts_are_refused(project: Path, tmp_path: Path, prompts: Sequence[str]) -> None:
    write_text(tmp_path / "prompts.txt", prompts)
    with pytest.raises(ConfigurationError, match=rf"was made of other prompts \(5 there, {len(prompts)} here\)"):
        cache_of(cached(project, f"prompts.path={tmp_path / 'prompts.txt'}"))


def test_the_same_prompts_in_another_format_are_the_same_prompts(project: Path, tmp_path: Path) -> None:
    write_csv(tmp_path / "prompts.csv", tiny.PROMPTS)
    cache_of(cached(project, f"prompts.path={tmp_path / 'prompts.csv'}"))


def test_grid_prompts_are_added_to_a_complete_cache(copy: Path) -> None:
    folder, wanted = copy.parent / "embeddings", "training.grid_prompts=[a green whale]"
    with pytest.raises(ConfigurationError, match=r"holds no embedding of 'a green whale': run `diffpp-fast embed`"):
        cache_of(cached(copy, wanted))
    shards = {name: facts for name, facts in state(folder).items() if name.startswith("shard")}
    assert main(["embed", str(copy), f"--out={folder}", wanted]) == 0
    assert shards.items() <= state(folder).items()
    assert cache_of(cached(copy, wanted)).holds("a green whale")


def test_what_is_not_there_or_damaged_is_named(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copy.parent / "embeddings"
    shard = next(folder.glob("shard-*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ConfigurationError, match=r"shard-00000-of-00001\.safetensors is damaged"):
        cache_of(cached(copy))
    shard.unlink()
    with pytest.raises(ConfigurationError, match="1 of 1 shards are missing"):
        cache_of(cached(copy))
    (folder / "manifest.json").write_text("{}")
    with pytest.raises(ConfigurationError, match=r"manifest\.json is damaged: it has no encoder"):
        cache_of(cached(copy))
    shutil.rmtree(folder)
    with pytest.raises(ConfigurationError, match=r"no embeddings in .*: write them with `diffpp-fast embed`"):
        cache_of(cached(copy))
    assert main(["embed", str(copy)]) == 2
    assert "name a folder with --out FOLDER or prompts.embeddings=FOLDER" in capsys.readouterr().err
    assert main(["embed", str(copy), f"--out={copy}"]) == 2
    assert f"{copy} is a file: name a folder" in capsys.readouterr().err


# The writer by itself, with an encoder that stops.
PROMPTS = [f"prompt {number}" for number in range(23)]


class Encoder:
    """Two kinds of tensors, one of them nested. Once it has been called `last` times it is interrupted."""

    def __init__(self, last: int | None = None) -> None:
        self.calls: list[tuple[str, ...]] = []
        self.last = last

    def __call__(self, prompts: Sequence[str]) -> Conditioning:
        if len(self.calls) == self.last:
            raise KeyboardInterrupt
        self.calls.append(tuple(prompts))
        lengths = torch.tensor([[len(prompt)] for prompt in prompts])
        values = torch.tensor([[sum(prompt.encode()) / 7.0] * 3 for prompt in prompts])
        nested = {"pooled": values.bfloat16().float(), "time_ids": lengths}
        return Conditioning(tuple(prompts), {"encoder_hidden_states": values, "added_cond_kwargs": nested})


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PromptSource:
    monkeypatch.setattr(embed, "SHARD_ROWS", 4)
    write_text(tmp_path / "prompts.txt", PROMPTS)
    return opened(tmp_path / "prompts.txt")


@pytest.fixture
def writer(tmp_path: Path, source: PromptSource) -> Callable[..., embed.EmbeddingWriter]:
    def make(encoder: Encoder, name: str = "embeddings", max_length: int = 8, **settings: Any) -> embed.EmbeddingWriter:
        facts = {
            "encoder": {"text_encoder": {"max_length": max_length}},
            "prompts": {"sha256": source.digest(), "count": len(source)},
            "seen": {},
        }
        return embed.EmbeddingWriter(tmp_path / name, facts, source, encoder, Encoder()([""]), **settings)

    return make


def whole(folder: Path) -> EmbeddingCache:
    manifest = read_manifest(folder)
    assert manifest is not None
    return EmbeddingCache(folder, manifest, CPU)


def test_a_file_in_the_way_is_not_replaced(tmp_path: Path, writer: Callable[..., embed.EmbeddingWriter]) -> None:
    folder = tmp_path / "embeddings"
    folder.mkdir()
    (folder / "null.safetensors").write_text("mine")
    with pytest.raises(ConfigurationError, match=r"embeddings holds null\.safetensors, which belongs to no embeddings"):
        writer(Encoder())
    assert (folder / "null.safetensors").read_text() == "mine"


def test_writing_goes_on_where_it_was_stopped(tmp_path: Path, writer: Callable[..., embed.EmbeddingWriter]) -> None:
    folder = tmp_path / "embeddings"
    with pytest.raises(KeyboardInterrupt):
        list(writer(Encoder(last=11), batch=1).write())
    before = state(folder)
    # The first call tells a prompt's size; ten prompts make two shards and a half.
    assert sum(name.startswith("shard") for name in before) == 2
    with pytest.raises(ConfigurationError, match="4 of 6 shards are missing"):
        whole(folder)
    (folder / ".shard-00002-of-00006.safetensors.0.partial").write_bytes(b"killed in the middle")
    os.truncate(folder / "shard-00001-of-00006.safetensors", 40)
    encoder = Encoder()
    assert list(writer(encoder, batch=1).write()) == [4, 4, 4, 4, 3]
    assert encoder.calls[1:] == [(prompt,) for prompt in PROMPTS[4:]]
    assert state(folder)["shard-00000-of-00006.safetensors"] == before["shard-00000-of-00006.safetensors"]
    assert not list(folder.glob(".*"))
    assert_equal(whole(folder)(PROMPTS[::-1]).tensors, Encoder()(PROMPTS[::-1]).tensors)
    encoder = Encoder()
    assert list(writer(encoder, batch=1).write()) == [] and len(encoder.calls) == 1


def test_processes_split_the_shards_and_need_nothing_of_each_other(
    tmp_path: Path, writer: Callable[..., embed.EmbeddingWriter]
) -> None:
    folder = tmp_path / "embeddings"
    encoders = [Encoder() for _ in range(4)]
    for rank in (3, 1, 0, 2):
        list(writer(encoders[rank], rank=rank, size=4, batch=4).write(["extra"]))
    calls = [call for encoder in encoders for call in encoder.calls[1:]]
    assert sorted(calls) == sorted([tuple(PROMPTS[start : start + 4]) for start in range(0, 23, 4)] + [("extra",)])
    assert_equal(whole(folder)([*PROMPTS, "extra"]).tensors, Encoder()([*PROMPTS, "extra"]).tensors)
    list(writer(Encoder(), "alone", batch=4).write(["extra"]))
    assert sorted(state(folder)) == sorted(state(tmp_path / "alone"))
    for file in folder.iterdir():
        assert file.read_bytes() == (tmp_path / "alone" / file.name).read_bytes(), file.name


def test_what_half_precision_holds_is_stored_in_it(
    tmp_path: Path, writer: Callable[..., embed.EmbeddingWriter]
) -> None:
    list(writer(Encoder()).write())
    stored = read_tensors(tmp_path / "embeddings" / "shard-00000-of-00006.safetensors")
    assert stored["conditioning/added_cond_kwargs/pooled"].dtype == torch.bfloat16
    assert stored["conditioning/encoder_hidden_states"].dtype == torch.float32


def test_a_folder_of_other_embeddings_and_a_disk_that_is_too_small_are_refused(
    tmp_path: Path, writer: Callable[..., embed.EmbeddingWriter], monkeypatch: pytest.MonkeyPatch
) -> None:
    list(writer(Encoder()).write())
    with pytest.raises(ConfigurationError, match=r"was made from other inputs: models\.text_encoder\.max_length"):
        writer(Encoder(), max_length=9)
    full = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    with pytest.raises(ConfigurationError, match=r"take 0\.0 GiB, 0\.0 GiB are free: choose another folder"):
        list(writer(Encoder(), "other").write())
    assert not (tmp_path / "other").exists()


def test_a_shard_of_another_cache_is_refused(tmp_path: Path, writer: Callable[..., embed.EmbeddingWriter]) -> None:
    list(writer(Encoder()).write())
    list(writer(Encoder(), "other", max_length=9).write())
    name = "shard-00002-of-00006.safetensors"
    shutil.copy(tmp_path / "other" / name, tmp_path / "embeddings" / name)
    with pytest.raises(ConfigurationError, match=r"shard-00002-of-00006\.safetensors belongs to another cache"):
        whole(tmp_path / "embeddings")


@pytest.mark.parametrize("launched", [True, False])
def test_processes_write_one_cache(
    launched: bool, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(embed, "SHARD_ROWS", 2)
    folder, said = tmp_path / "embeddings", []
    for rank in (1, 0):
        if launched:
            for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2}.items():
                monkeypatch.setenv(name, str(value))
        part = [] if launched else [f"--shard={rank + 1}/2"]
        assert main(["embed", str(project), f"--out={folder}", *part, *QUIET]) == 0
        said.append(capsys.readouterr().out)
    assert "process 1 of 2: 5 prompts; 0 of 1 shards" in said[0]
    assert "process 0 of 2: 5 prompts; 0 of 2 shards" in said[1]
    assert "2 shards are left to other processes" in said[0] and "Train with" in said[1]
    cache = cache_of(load_config(project, [*QUIET, f"prompts.embeddings={folder}"]))
    assert_equal(cache(tiny.PROMPTS).tensors, cache_of(cached(project))(tiny.PROMPTS).tensors)


def test_half_a_launch_is_refused(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    assert main(["embed", str(project), f"--out={tmp_path}"]) == 2
    assert "WORLD_SIZE is set, but not RANK" in capsys.readouterr().err


def test_shards_in_each_others_places_are_named_and_written_anew(
    tmp_path: Path, writer: Callable[..., embed.EmbeddingWriter], source: PromptSource
) -> None:
    folder = tmp_path / "embeddings"
    list(writer(Encoder()).write())
    sound = {path.name: path.read_bytes() for path in folder.iterdir()}
    first, second, last = (folder / f"shard-0000{number}-of-00006.safetensors" for number in (0, 1, 5))
    manifest = read_manifest(folder)
    assert manifest is not None
    for victim, other, said in ((second, first, "other prompts than its name"), (first, last, "3 rows in place of 4")):
        shutil.copy(other, victim)
        with pytest.raises(ConfigurationError, match=rf"{victim.name} h.*{said}.*Remove it, and `diffpp-fast embed`"):
            EmbeddingCache(folder, manifest, CPU, source)
        again = writer(Encoder())
        assert again.missing == [*again.damaged] and said in again.damaged[again.missing[0]]
        list(again.write())
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == sound


def test_all_that_is_there_is_read_where_it_is_asked_for(
    tmp_path: Path, writer: Callable[..., embed.EmbeddingWriter]
) -> None:
    list(writer(Encoder(), batch=2).write())
    path = tmp_path / "embeddings" / "shard-00003-of-00006.safetensors"
    sound = path.read_bytes()
    path.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    assert not writer(Encoder()).missing
    again = writer(Encoder(), check=True)
    assert again.missing == [3] and "its checksum has changed" in again.damaged[3]
    assert again.batch == 2, "as the folder was begun"
    list(again.write())
    assert path.read_bytes() == sound


#: A process that writes embeddings into a folder, slowly, with the project's own encoder.
SLOW = """
import sys, time
from diffpp_fast.cli.main import main
from diffpp_fast.training.prompts import embed, embeddings
embed.SHARD_ROWS = 2
save = embeddings.save_file
def slow(tensors, path, about):
    save(tensors, path, about)
    whole = path.read_bytes()
    with path.open("wb") as file:
        for start in range(0, len(whole), 64):
            file.write(whole[start : start + 64])
            file.flush()
            time.sleep(0.002)
embeddings.save_file = slow
sys.exit(main(["embed", *sys.argv[1:]]))
"""


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_to_the_same_shards(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embed, "SHARD_ROWS", 2)
    write_text(tmp_path / "prompts.txt", [f"a red {word}" for word in ("apple", "frog", "whale", "sun", "cat")] * 4)
    arguments = [str(project), *QUIET, f"prompts.path={tmp_path / 'prompts.txt'}"]
    assert main(["embed", *arguments, f"--out={tmp_path / 'whole'}", "--batch=2"]) == 0
    sound = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    folder, draw, partial = tmp_path / "killed", random.Random(0), 0
    for _ in range(4):
        command = [sys.executable, "-u", "-c", SLOW, *arguments, f"--out={folder}", "--batch=2"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            while "are there already" not in process.stdout.readline():
                assert process.poll() is None
            time.sleep(draw.uniform(0.0, 0.5))
            process.kill()
        partial += any(folder.glob("*.partial"))
        for path in folder.glob("*.safetensors"):
            assert path.read_bytes() == sound[path.name], "never a part of one"
    assert partial, "it was killed while it wrote"
    # The batch is known to the folder.
    assert main(["embed", *arguments, f"--out={folder}"]) == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == sound


def test_samples_and_scores_do_without_the_whole_encoder(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, pictures = project.parent / "embeddings", {}
    loaded: list[bool] = []
    load = text.load_text

    def noted(models: Any) -> Any:
        loaded.append(streaming.is_asked_for())
        return load(models)

    monkeypatch.setattr(text, "load_text", noted)
    for name, options in (("whole", []), ("streamed", ["--stream"]), ("embedded", [f"--embeddings={folder}"])):
        out = tmp_path / f"{name}.png"
        assert main(["sample", *GRID, "--run", str(project), "--count=2", f"--out={out}", *options]) == 0
        pictures[name] = read_picture(out).int()
    assert loaded == [False, True]
    assert torch.equal(pictures["streamed"], pictures["embedded"]), "prompts are encoded together"
    # Whole, each is encoded with the pictures that are drawn with it.
    assert (pictures["whole"] - pictures["embedded"]).abs().max() <= 1
    assert main(["sample", "a blue frog", "--run", str(project), f"--embeddings={folder}"]) == 2
    assert "holds no embedding of 'a blue frog'" in capsys.readouterr().err
    with pytest.raises(ConfigurationError, match=r"made from other inputs: models\.negative_prompt"):
        text.embeddings_by(load_config(project, ["models.negative_prompt=no"]), folder, CPU)
    write_text(tmp_path / "prompts.txt", GRID)
    scores = []
    for name, options in (("streamed", ["--stream"]), ("embedded", [f"--embeddings={folder}"])):
        arguments = [str(project), f"--prompts={tmp_path / 'prompts.txt'}", f"--output={tmp_path / name}", *options]
        metric = f"{project.parent / 'rewards.py'}:Brightness"
        assert main(["evaluate", *arguments, f"--metrics={metric}", "--no-images"]) == 0
        scores.append((tmp_path / name / "pictures.csv").read_text())
    assert scores[0] == scores[1] and len(loaded) == 3


def test_padding_of_zeros_is_not_stored(tmp_path: Path, source: PromptSource) -> None:
    """Rows of any number of tokens, none among them, and of a -0 behind the last one."""

    def encode(prompts: Sequence[str]) -> Conditioning:
        states, zero = torch.zeros(len(prompts), 40, 8), torch.tensor(-0.0)
        for place, prompt in enumerate(prompts):
            length = sum(prompt.encode()) % 7
            states[place, :length] = torch.arange(1.0, 9.0) * (place + 1) / 3
            states[place, length] = zero
        return Conditioning(tuple(prompts), {"text": states, "mask": (states[..., 0] != 0).long()})

    facts = {"encoder": {}, "prompts": {"sha256": source.digest(), "count": len(source)}, "seen": {}}
    made = embed.EmbeddingWriter(tmp_path / "e", facts, source, encode, Conditioning(("",), {
        "text": torch.zeros(1, 40, 8), "mask": torch.zeros(1, 40).long()}))  # fmt: skip
    assert list(made.write()) == [4, 4, 4, 4, 4, 3]
    cache, manifest = whole(tmp_path / "e"), read_manifest(tmp_path / "e")
    assert manifest is not None
    EmbeddingCache(tmp_path / "e", manifest, CPU, source)
    for first in range(0, len(PROMPTS), 4):
        part = PROMPTS[first : first + 4]
        for name, tensor in encode(part).tensors.items():
            found = cache(part).tensors[name]
            assert found.dtype == tensor.dtype and torch.equal(found, tensor)
            if name == "text":
                assert torch.equal(found.view(torch.int32), tensor.view(torch.int32)), "to the bit"
    assert not cache.null().tensors["text"].any() and cache.null().tensors["text"].shape == (1, 40, 8)
    path = tmp_path / "e" / "shard-00000-of-00006.safetensors"
    assert path.stat().st_size < 4 * 40 * 8 * 4 // 2
    sound = path.read_bytes()
    found_out = 0
    for bit in random.Random(1).sample(range(8 * len(sound)), 60):
        damaged = bytearray(sound)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            assert_equal(whole(tmp_path / "e")(PROMPTS[:4]).tensors, encode(PROMPTS[:4]).tensors)
        except ConfigurationError:
            found_out += 1
    assert found_out > 40
