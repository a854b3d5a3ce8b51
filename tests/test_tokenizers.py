"""Tokenizers of SentencePiece alone, as PixArt's folder on the hub has it."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
import tiny
import yaml

from diffpp_fast.cli.main import main
from diffpp_fast.networks.text import load_tokenizer

PROMPTS = ["a red apple", "a green frog\u2019s \ufb01sh", "the blue whale"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`spiece.model` and what says that it is T5's."""
    from sentencepiece import SentencePieceTrainer

    path, model = tmp_path_factory.mktemp("tokenizer"), io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(tiny.PROMPTS * 20),
        model_writer=model,
        vocab_size=40,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (path / "spiece.model").write_bytes(model.getvalue())
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer", "extra_ids": 0}))
    return path


def test_its_tokens_are_sentencepieces(folder: Path) -> None:
    from sentencepiece import SentencePieceProcessor

    pieces = SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    tokens = load_tokenizer(str(folder))(PROMPTS)["input_ids"]
    assert tokens == [[*pieces.encode(prompt), pieces.eos_id()] for prompt in PROMPTS]


@pytest.mark.parametrize("missing", ["sentencepiece", "google.protobuf"])
def test_without_the_packages_it_is_refused(folder: Path, missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ValueError, match=r"spiece\.model can't be read without .*: pip install .*\[train\]"):
        load_tokenizer(str(folder))


def test_a_dry_run_says_it_and_names_the_key(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny.write(tmp_path)
    settings = tiny.settings()
    settings["models"]["text_encoder"]["tokenizer"] = str(tmp_path / "tokenizer")
    settings["rewards"]["optimised"] = {"factory": "diffpp_fast.rewards:hpsv2", "scale": 1.0}
    config.write_text(yaml.safe_dump(settings))
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "spiece.model").write_bytes(b"damaged")
    assert main(["train", str(config), "--dry-run"]) == 2
    said = capsys.readouterr().err
    assert "models.text_encoder.tokenizer" in said and "spiece.model is damaged" in said
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    assert main(["train", str(config), "--dry-run"]) == 2
    assert '[train]"' in capsys.readouterr().err
    (tmp_path / "tokenizer" / "spiece.model").unlink()
    monkeypatch.setitem(sys.modules, "ftfy", None)
    monkeypatch.delitem(sys.modules, "ftfy")
    monkeypatch.setattr("diffpp_fast.rewards.text.find_spec", lambda name: None)
    assert main(["train", str(config), "--dry-run"]) == 2
    assert "hpsv2: ftfy" in capsys.readouterr().err
