"""Hints at what to install: they name the place that the package came from."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from diffpp_fast import install

ROOT = Path(install.__file__).parents[1]
GIT = {"url": "https://host/owner/repo.git", "vcs_info": {"vcs": "git", "commit_id": "abc123"}}
REQUIRES = ["torch>=2.11", 'pyarrow>=17; extra == "data"', "datasets>=3.0; extra == 'data'", 'peft; extra == "lora"']


class Installed:
    requires = REQUIRES

    def __init__(self, record: Any) -> None:
        self.record = record

    def read_text(self, name: str) -> str | None:
        assert name == "direct_url.json"
        return self.record if self.record is None or isinstance(self.record, str) else json.dumps(self.record)


def test_a_checkout_is_named() -> None:
    assert install.extra("train") == f'pip install --editable "{ROOT}[train]"'


@pytest.mark.parametrize(
    ("record", "command"),
    [
        (GIT, 'pip install "diffpp-fast[data] @ git+https://host/owner/repo.git@abc123"'),
        ({"url": "https://host/a.whl", "archive_info": {}}, 'pip install "diffpp-fast[data] @ https://host/a.whl"'),
        ({"url": "file:///is/gone", "dir_info": {}}, "pip install pyarrow datasets"),
        (None, "pip install pyarrow datasets"),
        ("damaged", "pip install pyarrow datasets"),
        ([], "pip install pyarrow datasets"),
    ],
)
def test_the_place_is_what_pip_recorded(
    record: Any, command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(install, "__file__", str(tmp_path / "site-packages" / "diffpp_fast" / "install.py"))
    monkeypatch.setattr(install, "distribution", lambda name: Installed(record))
    assert install.extra("data") == command


def test_a_folder_that_is_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clone = tmp_path / "a clone"
    clone.mkdir()
    monkeypatch.setattr(install, "__file__", str(tmp_path / "site-packages" / "diffpp_fast" / "install.py"))
    monkeypatch.setattr(install, "distribution", lambda name: Installed({"url": clone.as_uri(), "dir_info": {}}))
    assert install.extra("data") == f'pip install "{clone}[data]"'


def test_a_wheel_that_is_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wheel = tmp_path / "diffpp_fast-0.1.0+cu130-cp310-abi3-manylinux_2_28_x86_64.whl"
    wheel.touch()
    monkeypatch.setattr(install, "__file__", str(tmp_path / "site-packages" / "diffpp_fast" / "install.py"))
    monkeypatch.setattr(install, "distribution", lambda name: Installed({"url": wheel.as_uri(), "archive_info": {}}))
    assert install.extra("data") == f'pip install "{wheel}[data]"'


def test_no_message_names_an_index_that_lacks_the_package() -> None:
    folders = (ROOT / "diffpp_fast", ROOT / "docs")
    texts = [path for folder in folders for path in folder.rglob("*") if path.suffix in (".py", ".md")]
    wrong = [path.name for path in texts if 'pip install "diffpp-fast[' in path.read_text(encoding="utf-8")]
    assert wrong == [] and len(texts) > 100


@pytest.mark.slow
def test_libraries_say_nothing_of_their_own_affairs(tmp_path: Path) -> None:
    """Not what importing diffusers brings, nor warnings about names that others are going to change."""
    code = """
import contextlib, logging, warnings
from diffpp_fast.cli.main import main
with contextlib.suppress(SystemExit):
    main(["train", "--help"])
from diffusers import UNet2DConditionModel
logging.getLogger("bitsandbytes.backends.cpu.ops").warning("kernels-community")
for module in ("diffusers.utils.deprecation_utils", "torch.distributed.c10d_logger", "deepspeed.comm.comm"):
    warnings.warn_explicit("a new name", FutureWarning, "file.py", 1, module=module)
warnings.warn_explicit("ours", FutureWarning, "file.py", 1, module="diffpp_fast.noise")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == "file.py:1: FutureWarning: ours"
