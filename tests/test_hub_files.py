"""The hub of Hugging Face: it is asked after all that is here was looked at, and once where it does not answer."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hub_stand_in
import pytest
import tiny
import yaml

from diffpp_fast import hub_files
from diffpp_fast.cli.main import main
from diffpp_fast.hub_files import hub_file, hub_folder

COMMIT = "0a1b" * 10


@pytest.fixture(autouse=True)
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache as huggingface_hub fills it, and no answer from any hub."""
    from huggingface_hub import constants

    repository = tmp_path / "cache" / "models--owner--name"
    for folder in (repository / "snapshots" / COMMIT / "unet", repository / "refs"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "snapshots" / COMMIT / "unet" / "config.json").write_text("{}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: pytest.fail("it asks again"))
    for known in (hub_files._silence, hub_files._tell):
        known.cache_clear()
    yield repository / "snapshots" / COMMIT
    for known in (hub_files._silence, hub_files._tell):
        known.cache_clear()


def test_a_hub_that_does_not_answer_is_asked_once(hub_cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "diffpp_fast.hub_files"):
        assert hub_file("owner/name", "config.json", "unet") == hub_cache / "unet" / "config.json"
        assert hub_folder("owner/name", ["unet/*.json"]) == hub_cache
    (said,) = (record.message for record in caplog.records)
    assert said.startswith("http://127.0.0.1:9 can't be reached (") and "from its cache" in said
    for missing in (lambda: hub_file("owner/name", "model_index.json"), lambda: hub_folder("owner/other", ["*"])):
        with pytest.raises(FileNotFoundError, match=r"127.0.0.1:9 can't be reached \(.*\), and its cache here has no"):
            missing()


def test_whoever_forbids_to_ask_is_reminded(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub_file("owner/name", "unet/config.json") == hub_cache / "unet" / "config.json"
    with pytest.raises(FileNotFoundError, match="HF_HUB_OFFLINE is set, and its cache here has no such file"):
        hub_file("owner/other", "config.json")


def test_a_hub_that_answers_is_left_to_its_client(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    asked = []

    def download(*arguments: Any, **more: Any) -> str:
        asked.append((arguments, more))
        return "there"

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with hub_stand_in.hub() as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.endpoint)
        assert hub_file("owner/name", "config.json") == Path("there")
    assert hub_file("owner/name", "config.json") == Path("there"), "it is not asked again"
    assert asked == 2 * [(("owner/name", "config.json"), {"subfolder": None})]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("prompts=none.txt", "none.txt: No such file"),
        ("prompts=empty.txt", "empty.txt holds no prompt"),
        ("prompts.embeddings=none", "no embeddings in"),
        ("rewards.optimised.factory=none.py:f", "rewards.optimised.factory: no such file: "),
        ("method.regularizers={images: {path: none, weight: 1.0}}", "method.regularizers.images: can't read"),
        ("output=prompts.txt/run", "prompts.txt is a file: name a folder"),
        ("training.stps=3", "unknown key training.stps: did you mean training.steps?"),
        ("training.steps=many", "training.steps should be"),
        ("models.generator.timestp=3", "unknown key models.generator.timestp"),
        ("method.name=did", "method.name should be "),
    ],
)
def test_what_is_here_is_looked_at_before_the_hub_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], override: str, said: str
) -> None:
    monkeypatch.setattr("diffpp_fast.networks.loading.hub_file", lambda *_: pytest.fail("the hub is asked"))
    monkeypatch.chdir(tmp_path)
    config = {**tiny.settings(), "models": {"base": "owner/name", "generator": {"timestep": 625}}}
    Path("align.yaml").write_text(yaml.safe_dump(config))
    Path("rewards.py").write_text(tiny.REWARDS)
    Path("prompts.txt").write_text("a red apple\n")
    Path("empty.txt").write_text("\n")
    assert main(["train", "align.yaml", override]) == 2
    assert said in capsys.readouterr().err
