"""The Makefile in a folder whose name has spaces, with stand-ins for what it runs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
#: Those that run nothing of an environment, or need what npm fetches.
LEFT_OUT = {"help", "docs", "clean"}
(TARGETS,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
#: Notes how it was called; as `python -m venv` it makes an environment of its like.
STAND_IN = """#!/bin/sh
echo "$(basename "$0") $*" >> "$CALLS"
if [ "$1 $2" = "-m venv" ]; then
  mkdir -p "$3/bin"
  for program in python pytest ruff mypy diffpp-fast; do cp "$0" "$3/bin/$program"; done
fi
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("make") / "a clone's place"
    for name in ("tests", "benchmarks", "examples", "docs", "my tools"):
        (folder / name).mkdir(parents=True)
        (folder / name / "kept.txt").touch()
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy2(ROOT / name, folder)
    for name in ("python", "python3.10"):
        (folder / "my tools" / name).write_text(STAND_IN)
        (folder / "my tools" / name).chmod(0o755)
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)
    return folder


@pytest.mark.parametrize("target", [each for each in TARGETS.split() if each not in LEFT_OUT])
def test_a_folder_may_have_spaces_in_its_name(tree: Path, target: str) -> None:
    python, calls = tree / "my tools/python", tree / f"{target}.calls"
    given = [f"{name}={python}" for name in ("PYTHON", "PYTHON_3_10", "PYTHON_3_12")]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    # No Python but the stand-in is found for the matrix.
    environment |= {"CALLS": str(calls), "HOME": str(tree), "PATH": f"{python.parent}:{environment['PATH']}"}
    command = ["make", "--silent", target, "MATRIX_PYTHONS=3.10", *given]
    made = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    # A machine without the sanitizers' libraries says so, and goes on.
    said = [line for line in made.stderr.splitlines() if "ld.so" not in line]
    assert (made.returncode, said) == (0, [])
    assert calls.exists()
