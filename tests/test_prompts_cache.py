"""The cache of prompts: files are read once, and a cache that is damaged or out of reach costs time alone."""

from __future__ import annotations

import ast
import os
import random
import socket
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import pytest
from prompt_files import WRITERS, opened, write_text

from diffpp_fast.training import ConfigurationError
from diffpp_fast.training.prompts import cache

PROMPTS = [f"prompt {number} café" for number in range(300)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / cache.FOLDER


@pytest.fixture
def readings(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that are read."""
    found: list[Path] = []
    read = cache.read

    def noting(path: Path, format: str, column: str | None) -> object:
        found.append(path)
        return read(path, format, column)

    monkeypatch.setattr(cache, "read", noting)
    return found


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_is_read_once_until_it_changes(tmp_path: Path, folder: Path, readings: list[Path], name: str) -> None:
    WRITERS[name](tmp_path / name, PROMPTS)
    first, second = opened(tmp_path / name), opened(tmp_path / name)
    assert readings == [tmp_path / name]
    assert list(first) == list(second) == PROMPTS and first.digest() == second.digest()
    WRITERS[name](tmp_path / name, PROMPTS[::-1])
    assert list(opened(tmp_path / name)) == PROMPTS[::-1]
    assert len(readings) == 2
    assert not list(folder.glob("*.partial"))


def test_columns_are_kept_apart(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"a": "a cat", "b": "a dog"}\n')
    assert [list(opened(tmp_path / "p.jsonl", column=column)) for column in "aba"] == [["a cat"], ["a dog"], ["a cat"]]


def test_a_damaged_cache_is_never_believed(tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_text(tmp_path / "p.txt", PROMPTS)
    opened(tmp_path / "p.txt")
    draw = random.Random(0)
    for file in sorted(folder.glob("*.arrow")) + sorted(folder.glob("*.json")):
        content = file.read_bytes()
        for bit in draw.sample(range(8 * len(content)), 60):
            flipped = bytearray(content)
            flipped[bit // 8] ^= 1 << bit % 8
            file.write_bytes(flipped)
            assert list(opened(tmp_path / "p.txt")) == PROMPTS
        for length in (0, len(content) // 2):
            os.truncate(file, length)
            assert list(opened(tmp_path / "p.txt")) == PROMPTS
            assert file.read_bytes() == content
    assert "is damaged: the prompts are read anew" in caplog.text


def test_a_malformed_file_leaves_nothing_behind(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "p.txt").write_bytes(b"a cat\n" * 50_000 + b"\xff\n")
    for _ in range(2):
        with pytest.raises(ConfigurationError, match="line 50001"):
            opened(tmp_path / "p.txt")
    assert [path.suffix for path in folder.iterdir()] == [".lock"]


def test_a_cache_that_can_not_be_written_costs_time_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file" / "cache")
    write_text(tmp_path / "p.txt", PROMPTS)
    assert list(opened(tmp_path / "p.txt")) == PROMPTS
    assert "can't be written (Not a directory)" in caplog.text and "HF_DATASETS_CACHE" in caplog.text
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file" / "none"))
    with pytest.raises(ConfigurationError, match="no place for what was read"):
        opened(tmp_path / "p.txt")


def test_those_who_start_together_read_once_and_ask_no_network(
    tmp_path: Path, folder: Path, readings: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lock on a file keeps threads apart as it does processes."""

    def refuse(*arguments: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    write_text(tmp_path / "p.txt", PROMPTS * 300)
    with ThreadPoolExecutor(4) as pool:
        digests = {source.digest() for source in pool.map(opened, [tmp_path / "p.txt"] * 4)}
    assert len(digests) == 1 and readings == [tmp_path / "p.txt"]


def test_nothing_is_imported_before_prompts_are_read() -> None:
    late = {"datasets", "pyarrow", "pandas", "cache", "readers"}
    for path in Path(cache.__file__).parent.glob("*.py"):
        if path.stem not in late:
            top = [node for node in ast.parse(path.read_text()).body if isinstance(node, (ast.Import, ast.ImportFrom))]
            modules = {getattr(node, "module", None) or node.names[0].name for node in top}
            assert not {part for module in modules for part in module.split(".")} & late, path.name
