"""A configuration's `factory` names code of its own file or package, which may import its neighbours."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from diffpp_fast import rewards
from diffpp_fast.errors import ConfigurationError
from diffpp_fast.rewards.user_code import call_factory

MAKE = "def make(**arguments):\n    return lambda images, prompts: ({value})\n"
DATACLASS = """
from __future__ import annotations
from dataclasses import dataclass

@dataclass
class Settings:
    value: float = 1.0

def make():
    return lambda images, prompts: Settings().value
"""


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def made(factory: str, **arguments: Any) -> Any:
    return call_factory(factory, arguments, "rewards.optimised")(None, ())


@pytest.mark.parametrize(
    ("factory", "said"),
    [
        ("os:system", "os is Python's own"),
        ("subprocess:run", "subprocess is Python's own"),
        ("builtins:eval", "builtins is Python's own"),
        ("importlib.util:module_from_spec", "importlib.util is Python's own"),
        ("diffpp_fast.rewards.user_code:sys.exit", "has no function sys.exit"),
        ("diffpp_fast.rewards.user_code:contextmanager", "does not define contextmanager, which is contextlib's"),
        ("FILE:system", "does not define system, which is (posix|os|nt)'s"),
        ("FILE:partial_system", "does not define partial_system, which is functools's"),
        ("FILE:value", "has no function value; it has make"),
    ],
)
def test_a_factory_is_what_its_module_defines(tmp_path: Path, factory: str, said: str) -> None:
    text = "from functools import partial\nfrom os import system\npartial_system = partial(system, 'true')\nvalue = 1\n"
    file = write(tmp_path / "mine.py", text + MAKE.format(value=1))
    with pytest.raises(ConfigurationError, match=said):
        made(factory.replace("FILE", str(file)))


def test_a_package_may_offer_what_its_modules_define(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a_package_of_rewards/inner.py", MAKE.format(value=5))
    write(
        tmp_path / "a_package_of_rewards/__init__.py",
        "from a_package_of_rewards.inner import make\nfrom os import system\n",
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert made("a_package_of_rewards:make") == 5
    with pytest.raises(ConfigurationError, match="does not define system"):
        made("a_package_of_rewards:system")


def test_a_file_imports_its_neighbours_and_no_other_files(tmp_path: Path) -> None:
    """Files of one name, with neighbours of one name, in two folders."""
    before = list(sys.path)
    for value in (1, 2):
        folder = tmp_path / str(value)
        write(folder / "a_neighbour.py", f"VALUE = {value}\n")
        write(folder / "a_package_beside/__init__.py", "from a_neighbour import VALUE\n")
        text = "import a_neighbour\nfrom a_package_beside import VALUE\n"
        write(folder / "mine.py", text + MAKE.format(value="a_neighbour.VALUE, VALUE"))
    scorers = [call_factory(str(tmp_path / str(value) / "mine.py:make"), {}, "rewards.optimised") for value in (1, 2)]
    assert [scorer(None, ()) for scorer in scorers] == [(1, 1), (2, 2)]
    assert sys.path == before


@pytest.mark.parametrize("loader", ["run", "mixture"])
def test_dataclasses_with_annotations_as_text(tmp_path: Path, loader: str) -> None:
    file = write(tmp_path / "mine.py", DATACLASS)
    if loader == "run":
        assert made(f"{file}:make") == 1.0
    else:
        rewards.mixture({"mine": {"weight": 1.0, "reward": "mine.py:make"}}, folder=str(tmp_path))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def make(:\n", r"mine\.py, line 1: "),
        (
            "import a_package_that_is_not_there\n",
            r"No module named 'a_package_that_is_not_there' \(.*mine\.py, line 1\)",
        ),
        ("def make(value):\n    return {}['key']\n", r"KeyError: 'key' \(.*mine\.py, line 2\)"),
        ("def make(other):\n    pass\n", r"rewards\.optimised\.arguments do not fit make\(other\): missing a required"),
    ],
)
def test_code_that_fails_is_named_by_its_line(tmp_path: Path, text: str, said: str) -> None:
    file = write(tmp_path / "mine.py", text)
    with pytest.raises(ConfigurationError, match=said):
        made(f"{file}:make", **({"value": 1} if "value" in text else {}))
