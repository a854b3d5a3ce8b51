"""The results of `pip install` on the sources, with and without a compiler."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NATIVE = "diffpp_fast/native/"


def run(*command: str, cwd: Path, **environment: str) -> str:
    # The tests' own process interprets Triton's kernels, and then they serve the CPU.
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        command, cwd=cwd, env={**inherited, **environment}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def checkout(folder: Path) -> Path:
    """The tracked and new files of the working tree, without what was built in it."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for name in filter(None, listed.split("\0")):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).exists():
            target.write_bytes((ROOT / name).read_bytes())
    return folder


def wheel(source: Path, folder: Path, **environment: str) -> tuple[Path, str]:
    """The wheel of a source tree and what pip said."""
    command = (sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation", "-w", str(folder), ".")
    said = run(*command, cwd=source, DIFFPP_FAST_CUDA="0", **environment)
    (built,) = folder.glob("*.whl")
    return built, said


def try_out(built: Path, folder: Path) -> str:
    with zipfile.ZipFile(built) as archive:
        archive.extractall(folder)
    # On the package that PYTHONPATH names, away from the checkout.
    return run(sys.executable, "-P", str(ROOT / "tests/installed.py"), cwd=folder, PYTHONPATH=str(folder)).strip()


@pytest.mark.slow
def test_the_sdist_makes_a_wheel_that_works(tmp_path: Path) -> None:
    source = checkout(tmp_path / "source")
    run(sys.executable, "-c", "import setuptools.build_meta as b; b.build_sdist('dist')", cwd=source)
    (sdist,) = (source / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    built, _ = wheel(unpacked, tmp_path / "wheel")
    with zipfile.ZipFile(built) as archive:
        names = archive.namelist()
    for name in (NATIVE + "_library.so", "diffpp_fast/py.typed", "diffpp_fast/report/page.html.jinja"):
        assert name in names
    assert any(name.startswith(NATIVE + "_host.") for name in names)
    assert not [name for name in names if name.startswith(("tests/", "csrc/", "examples/", "benchmarks/"))]
    assert "linux" not in sys.platform or "none-any" not in built.name
    assert try_out(built, tmp_path / "installed") == "cpu None"


def test_the_wheel_holds_the_package_alone(tmp_path: Path) -> None:
    built, _ = wheel(checkout(tmp_path / "source"), tmp_path / "wheel", DIFFPP_FAST_BUILD="0")
    with zipfile.ZipFile(built) as archive:
        rooms = {name.split("/")[0] for name in archive.namelist()}
    assert {room.partition("-")[0] for room in rooms} == {"diffpp_fast"}, rooms


@pytest.mark.slow
def test_without_a_compiler_the_reference_serves(tmp_path: Path) -> None:
    source = checkout(tmp_path / "source")
    # A folder with Python alone in it: no c++, no nvcc.
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "python").symlink_to(sys.executable)
    built, said = wheel(source, tmp_path / "wheel", PATH=str(tools), CXX="")
    assert "csrc is not built: no working C++17 compiler" in said
    assert built.name.endswith("py3-none-any.whl")
    served, _, reason = try_out(built, tmp_path / "installed").partition(" ")
    assert served == "reference"
    assert reason.startswith("csrc was not compiled when the package was installed")
