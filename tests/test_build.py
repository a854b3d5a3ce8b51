"""How csrc is built (setup.py): what is kept, what is made anew, and what a failed or foreign build leaves."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
#: Stands for a compiler: notes what it was called for. Fails where a source says so.
COMPILER = """#!/bin/sh
to= ; what=
while [ $# -gt 0 ]; do
  case "$1" in
    --version) echo "${COMPILER_VERSION:-1}"; exit ;;
    -o) to=$2; shift ;;
    -c) what=$2; shift ;;
    -shared) what=link ;;
  esac
  shift
done
[ -n "$what" ] || exit 0
echo "${what##*/}" >> "$CALLS"
echo "$what $$" > "$to"
[ "$what" = link ] || ! grep -q broken "$what"
"""


class Tree:
    """A tree with two sources, a torch without code and a compiler that only takes notes."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.calls = folder, folder / "calls"
        for name in ("csrc/torch/a.cpp", "csrc/cpu/isa.cpp", "torch/include/torch/csrc/stable/library.h"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("")
        (folder / "torch/__init__.py").write_text("")
        (folder / "torch/version.py").write_text("__version__ = '2.11'")
        (folder / "setup.py").write_text((ROOT / "setup.py").read_text())
        (folder / "compiler").write_text(COMPILER)
        (folder / "compiler").chmod(0o755)
        self.library = folder / "diffpp_fast/kernels/native/_library.so"

    def build(self, **environment: str) -> list[str]:
        """The files that were made."""
        self.calls.write_text("")
        self.last = subprocess.run(
            [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace", "--build-temp", "objects"],
            cwd=self.folder,
            env={
                **os.environ,
                "CXX": str(self.folder / "compiler"),
                "CALLS": str(self.calls),
                "DIFFPP_FAST_CUDA": "0",
                "PYTHONPATH": str(self.folder),
                **environment,
            },
            capture_output=True,
            text=True,
        )
        return sorted(self.calls.read_text().split())


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    tree = Tree(tmp_path)
    made = tree.build()
    assert {"a.cpp", "isa.cpp", "link"} <= set(made) and tree.last.returncode == 0, tree.last.stderr
    return tree


def test_what_has_not_changed_is_kept(tree: Tree) -> None:
    before = tree.library.stat().st_mtime_ns
    assert tree.build() == []
    assert tree.library.stat().st_mtime_ns == before


def test_what_has_changed_is_made_anew(tree: Tree) -> None:
    assert "isa.cpp" in tree.build(CXXFLAGS="-g")
    assert {"isa.cpp", "link"} <= set(tree.build())
    assert "isa.cpp" in tree.build(COMPILER_VERSION="2")
    tree.build()
    # Another torch: what is compiled against it, and no kernel.
    (tree.folder / "torch/version.py").write_text("__version__ = '2.13'")
    made = tree.build()
    assert "a.cpp" in made and "isa.cpp" not in made
    # An older source, as git or a copy may bring it.
    os.utime(tree.folder / "csrc/cpu/isa.cpp", (0, 0))
    (tree.folder / "csrc/cpu/isa.cpp").write_text("// other")
    os.utime(tree.folder / "csrc/cpu/isa.cpp", (1, 1))
    assert "isa.cpp" in tree.build()
    # Another library in its place, as one that was built for another Python.
    tree.library.write_text("another")
    assert tree.build() == [] and tree.library.read_text() != "another"
    # An object that was cut off.
    (tree.folder / "objects/isa.o").write_text("")
    assert "isa.cpp" in tree.build()


def test_a_build_that_fails_leaves_what_worked(tree: Tree) -> None:
    before = tree.library.read_bytes()
    (tree.folder / "csrc/torch/a.cpp").write_text("broken")
    tree.build()
    assert tree.last.returncode != 0 and "DIFFPP_FAST_BUILD=0 leaves it out" in tree.last.stderr
    assert tree.library.read_bytes() == before
    assert not [path for path in tree.library.parent.iterdir() if path.name.startswith(".")]
    # And is no whole object to the next.
    tree.build()
    assert tree.last.returncode != 0
    (tree.folder / "csrc/torch/a.cpp").write_text("mended")
    assert {"a.cpp", "link"} <= set(tree.build()) and tree.last.returncode == 0


def test_old_setuptools_are_refused_in_a_sentence(tree: Tree) -> None:
    (tree.folder / "sitecustomize.py").write_text("import setuptools; setuptools.__version__ = '65.5.0'")
    tree.build()
    assert tree.last.returncode != 0
    assert "building needs setuptools 70.1 or newer, here is 65.5.0" in tree.last.stderr
