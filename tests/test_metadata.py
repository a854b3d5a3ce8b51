"""The metadata in pyproject.toml against the code and the pages: extras, versions, Pythons."""

from __future__ import annotations

import ast
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pages
import pytest
from pages import ROOT

from diffpp_fast import availability
from diffpp_fast.cli import doctor
from diffpp_fast.version import __version__

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
#: Where a package is imported by another name than it is installed by.
INSTALLED_AS = {"PIL": "pillow", "yaml": "pyyaml", "google": "protobuf", "flash_attn": "flash-attn"}
#: Imported from what another package can't do without.
BROUGHT = {"pydantic_core": "pydantic", "typing_extensions": "torch"}
PACKAGE = sorted((ROOT / "diffpp_fast").rglob("*.py"))


def name_of(requirement: str) -> str:
    return re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")  # type: ignore[index]


def imports(path: Path) -> set[str]:
    """The packages that a file imports, or looks for, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("find_spec", "import_module"):
                found.add(str(node.args[0].value))
    return {name.split(".")[0] for name in found} - sys.stdlib_module_names - {"diffpp_fast"}


def test_every_import_belongs_to_the_package_or_to_an_extra() -> None:
    needed = {name_of(each) for each in PROJECT["dependencies"]}
    users = {name: extra for name, extra in EXTRAS.items() if name not in ("dev", "docs", "demo")}
    declared = needed | {name_of(each) for extra in users.values() for each in extra}
    found = set().union(*map(imports, PACKAGE))
    assert {"torch", "diffusers", "xformers", "wandb"} <= found
    for name in found:
        name = BROUGHT.get(name, INSTALLED_AS.get(name, name)).lower().replace("_", "-")
        assert name in declared, f"{name} is in no extra of pyproject.toml"


def test_extras_that_are_named_exist() -> None:
    named: dict[str, str] = {}
    for page in pages.PAGES:
        text = (ROOT / page).read_text()
        for pattern in (r"pip install [^\n`]*\[([\w,]+)\]\"", r"extras? `(\w+)`"):
            named |= {extra: page for each in re.findall(pattern, text) for extra in each.split(",")}
    for path in PACKAGE:
        named |= dict.fromkeys(re.findall(r"install\.extra\([\"'](\w+)", path.read_text()), path.name)
    assert {"train", "distributed", "gpu", "lora", "wandb", "evaluate"} <= named.keys()
    assert {extra: place for extra, place in named.items() if extra not in EXTRAS} == {}


def test_the_page_lists_every_extra() -> None:
    _, table = (ROOT / "docs/install.md").read_text().split("| extra | brings |\n")
    rows = re.findall(r"^\|([^|]+)\|", table, re.MULTILINE)
    assert sorted(extra for row in rows for extra in re.findall(r"`(\w+)`", row)) == sorted(EXTRAS)


def test_doctor_names_the_extra_that_brings_a_package() -> None:
    for package, extra in doctor.PACKAGES.items():
        assert package in map(name_of, EXTRAS[extra] if extra else PROJECT["dependencies"]), package


def test_messages_name_extras_and_not_their_packages() -> None:
    """So that the version which pyproject.toml asks for is installed."""
    optional = {name_of(each) for extra in EXTRAS.values() for each in extra}
    for path in PACKAGE:
        for packages in re.findall(r"pip install ((?:[\w-]+[ \"',:;]*)+)", path.read_text()):
            wrong = set(re.findall(r"[\w-]+", packages)) & optional
            assert not wrong, f"{path.name}: install.extra(...) names the extra that brings {wrong}"


def test_pythons_agree() -> None:
    listed = [each.rsplit(" ", 1)[1] for each in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d+$", each)]
    oldest = listed[0]
    assert PROJECT["requires-python"] == f">={oldest}"
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    assert tools["ruff"]["target-version"] == f"py{oldest.replace('.', '')}"
    assert f"sys.version_info < ({oldest.replace('.', ', ')})" in (ROOT / "setup.py").read_text()
    makefile, wheels = (ROOT / "Makefile").read_text(), (ROOT / "csrc/wheels.py").read_text()
    assert f"MATRIX_PYTHONS ?= {' '.join(listed)}\n" in makefile
    assert f'"cp{oldest.replace(".", "")}"' in wheels
    for text in ((ROOT / "csrc/wheels_check.py").read_text(), (ROOT / ".github/workflows/ci.yml").read_text()):
        assert "[" + ", ".join(f'"{each}"' for each in listed) + "]" in text


def test_versions_agree() -> None:
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert "version" in PROJECT["dynamic"] and tools["dynamic"]["version"] == {
        "attr": "diffpp_fast.version.__version__"
    }
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert re.search(rf"^## \[.*{re.escape(__version__)}", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


def test_the_oldest_torch_is_the_same_everywhere() -> None:
    major, minor = availability.OLDEST_TORCH
    oldest = f"torch>={major}.{minor}"
    assert oldest in PROJECT["dependencies"]
    assert f'["{oldest}"]' in (ROOT / "setup.py").read_text()
    assert f"0x{major:02x}{minor:02x}000000000000" in (ROOT / "csrc/compilation.py").read_text()
    assert f"needs torch {major}.{minor} or newer" in Path(availability.__file__).read_text()


def test_a_wheel_states_its_version_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """0.1.0+cpu in the code of which the metadata are read; the tree keeps 0.1.0."""
    monkeypatch.syspath_prepend(ROOT / "csrc")
    monkeypatch.chdir(ROOT)
    to = tmp_path / "with a space"
    runpy.run_path(str(ROOT / "csrc/wheels.py"))["copy_sources"](to, "cu130")
    assert f'__version__ = "{__version__}+cu130"\n' in (to / "diffpp_fast/version.py").read_text()
    assert f'"{__version__}"' in (ROOT / "diffpp_fast/version.py").read_text()
    assert not list(to.rglob("*.so")) and (to / "csrc/noise/cpu.cpp").is_file()
