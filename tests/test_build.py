"""How csrc is built (csrc/compilation.py): what is kept and what made anew, what a failed or foreign build leaves."""

from __future__ import annotations

import os
import platform
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
#: Stands for a compiler: notes what it was called for, and of a source what it includes. Fails where a source says so.
COMPILER = r"""#!/bin/sh
to= ; what= ; deps= ; isa=
while [ $# -gt 0 ]; do
  case "$1" in
    --version) echo "release 13.0, V${COMPILER_VERSION:-1}"; exit ;;
    --list-gpu-arch) echo compute_90; exit ;;
    --dryrun) echo "#$ TOP=$CUDA" >&2; exit ;;
    -o) to=$2; shift ;;
    -c) what=$2; shift ;;
    -MF) deps=$2; shift ;;
    -DDIFFPP_ISA=*) isa=.${1#*=} ;;
    -shared) what=link ;;
  esac
  shift
done
[ -n "$what" ] || exit 0
echo "${what#csrc/}$isa" >> "$CALLS"
echo "$what $$" > "$to"
[ "$what" = link ] && exit
[ -n "$NO_LIST" ] || c++ -MM -MG -x c++ "$what" > "$deps"
! grep -q broken "$what"
"""


class Tree:
    """A tree with two sources, a torch without code and a compiler that only takes notes."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.calls = folder, folder / "calls"
        for name in ("csrc/a/binding.cpp", "csrc/common/isa.cpp", "torch/include/torch/csrc/stable/library.h"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("")
        (folder / "torch/__init__.py").write_text("")
        (folder / "torch/version.py").write_text("__version__ = '2.11'")
        for name in ("setup.py", "csrc/compilation.py", "csrc/toolchain.py"):
            (folder / name).write_text((ROOT / name).read_text())
        (folder / "compiler").write_text(COMPILER)
        (folder / "compiler").chmod(0o755)
        self.library = folder / "diffpp_fast/native/_library.so"

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


def make_cuda(tree: Tree) -> Path:
    """A CUDA whose nvcc only takes notes, too."""
    cuda = tree.folder / "cuda"
    (cuda / "bin").mkdir(parents=True)
    (cuda / "bin/nvcc").symlink_to(tree.folder / "compiler")
    (cuda / "lib64").mkdir()
    (cuda / "lib64/libcudart_static.a").touch()
    return cuda


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    tree = Tree(tmp_path)
    made = tree.build()
    assert {"a/binding.cpp", "common/isa.cpp", "link"} <= set(made) and tree.last.returncode == 0, tree.last.stderr
    return tree


def test_what_has_not_changed_is_kept(tree: Tree) -> None:
    before = tree.library.stat().st_mtime_ns
    assert tree.build() == []
    assert tree.library.stat().st_mtime_ns == before


def test_what_has_changed_is_made_anew(tree: Tree) -> None:
    assert "common/isa.cpp" in tree.build(CXXFLAGS="-g")
    assert {"common/isa.cpp", "link"} <= set(tree.build())
    assert "common/isa.cpp" in tree.build(COMPILER_VERSION="2")
    tree.build()
    # Another torch: what is compiled against it, and no kernel.
    (tree.folder / "torch/version.py").write_text("__version__ = '2.13'")
    made = tree.build()
    assert "a/binding.cpp" in made and "common/isa.cpp" not in made
    # An older source, as git or a copy may bring it.
    os.utime(tree.folder / "csrc/common/isa.cpp", (0, 0))
    (tree.folder / "csrc/common/isa.cpp").write_text("// other")
    os.utime(tree.folder / "csrc/common/isa.cpp", (1, 1))
    assert "common/isa.cpp" in tree.build()
    # Another library in its place, as one that was built for another Python.
    tree.library.write_text("another")
    assert tree.build() == [] and tree.library.read_text() != "another"
    # An object that was cut off.
    (tree.folder / "objects/common_isa.o").write_text("")
    assert "common/isa.cpp" in tree.build()


def test_a_build_that_fails_leaves_what_worked(tree: Tree) -> None:
    before = tree.library.read_bytes()
    (tree.folder / "csrc/a/binding.cpp").write_text("broken")
    tree.build()
    assert tree.last.returncode != 0 and "DIFFPP_FAST_BUILD=0 leaves it out" in tree.last.stderr
    assert tree.library.read_bytes() == before
    assert not [path for path in tree.library.parent.iterdir() if path.name.startswith(".")]
    # And is no whole object to the next.
    tree.build()
    assert tree.last.returncode != 0
    (tree.folder / "csrc/a/binding.cpp").write_text("works")
    assert {"a/binding.cpp", "link"} <= set(tree.build()) and tree.last.returncode == 0


ISAS = (".baseline", ".avx2", ".avx512")


def kernels(*operators: str) -> set[str]:
    return {f"{operator}/cpu.cpp{isa}" for operator in operators for isa in ISAS}


def bindings(*operators: str) -> set[str]:
    return {f"{operator}/binding.cpp" for operator in operators}


def on_gpus(*operators: str) -> set[str]:
    return {f"{operator}/cuda.cu" for operator in operators}


DRAWN = ("noise", "add_noise", "denoising_loss", "score_gap", "gap_loss")
PLAIN = ("geglu", "ada_layer_norm", "group_norm_silu", "reward_pixels")
GPU = ("noise", "add_noise", "denoising_loss", "score_gap", "group_norm_silu", "reward_pixels")
#: A file of csrc, and what is compiled anew when it has changed.
INCLUDED_BY = {
    "score_gap/cpu.cpp": kernels("score_gap"),
    "score_gap/arguments.h": kernels("score_gap") | bindings("score_gap") | on_gpus("score_gap"),
    "reward_pixels/tables.h": {"reward_pixels/tables.cpp", "host/module.cpp"} | on_gpus("reward_pixels"),
    "common/cpu_noise.h": kernels(*DRAWN),
    "common/cuda.cuh": on_gpus(*GPU),
    "common/binding.h": bindings(*DRAWN, *PLAIN),
}


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="other processors have one instruction set")
def test_a_change_recompiles_what_includes_it(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    shutil.rmtree(tmp_path / "csrc")
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    toolkit = str(make_cuda(tree))
    cuda = {"DIFFPP_FAST_CUDA": "1", "CUDA_HOME": toolkit, "CUDA": toolkit}
    everything = set(tree.build(**cuda))
    assert set.union(*INCLUDED_BY.values()) < everything, tree.last.stderr
    for name, expected in INCLUDED_BY.items():
        path = tmp_path / "csrc" / name
        path.write_text(path.read_text() + "// changed\n")
        assert set(tree.build(**cuda)) - {"link"} == expected, name
    assert tree.build(**cuda) == []


def test_without_a_list_of_what_is_included_everything_counts(tree: Tree) -> None:
    """Another file of csrc may be included: a compiler that does not say so must not leave an old object."""
    (tree.folder / "objects/common_isa.d").unlink()
    tree.build(NO_LIST="1")
    (tree.folder / "csrc/a/binding.cpp").write_text("// other")
    assert {"a/binding.cpp", "common/isa.cpp"} <= set(tree.build(NO_LIST="1"))


def test_the_compiler_itself_lists_what_is_included(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    for name, text in {"common/isa.cpp": '#include "../b c/other.h"\n', "b c/other.h": "int one();\n"}.items():
        (tmp_path / "csrc" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "csrc" / name).write_text(text)
    built = tmp_path / "objects/common_isa.o"

    def build() -> int:
        # The library needs torch, which is not in this tree: its objects are made, and linking fails.
        tree.build(CXX="c++")
        return built.stat().st_mtime_ns

    first = build()
    assert build() == first
    (tmp_path / "csrc/b c/other.h").write_text("int two();\n")
    assert build() != first


def test_old_setuptools_are_refused_in_a_sentence(tree: Tree) -> None:
    (tree.folder / "sitecustomize.py").write_text("import setuptools; setuptools.__version__ = '65.5.0'")
    tree.build()
    assert tree.last.returncode != 0
    assert "building needs setuptools 70.1 or newer, here is 65.5.0" in tree.last.stderr


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"DIFFPP_FAST_BUILD": "no"}, "DIFFPP_FAST_BUILD is 'no': known are 0, 1, library, or unset"),
        ({"DIFFPP_FAST_CUDA": "on"}, "DIFFPP_FAST_CUDA is 'on': known are 0, 1, or unset"),
        ({"DIFFPP_FAST_CUDA": "1", "CUDA_HOME": "/none"}, "DIFFPP_FAST_CUDA is 1, and there is no nvcc in CUDA_HOME"),
        ({"DIFFPP_FAST_CUDA": "1", "CXX": "none", "PATH": "/none"}, "is 1, and there is no C++17 compiler"),
        ({"DIFFPP_FAST_CUDA_ARCHS": "9.0"}, "ARCHS is '9.0': for compute capabilities 8.0 and 9.0 it is 80;90, and"),
        ({"DIFFPP_FAST_CUDA_ARCHS": "70;90"}, "bin/nvcc knows 90"),
        ({"DIFFPP_FAST_CUDA_ARCHS": ";"}, "DIFFPP_FAST_CUDA_ARCHS is ';'"),
        ({"DIFFPP_FAST_CUDA_ARCHS": "90aa"}, "DIFFPP_FAST_CUDA_ARCHS is '90aa'"),
        ({"CXX": "c++ '"}, 'CXX is "c++ \'": No closing quotation'),
        ({"CXXFLAGS": "-DA='"}, 'CXXFLAGS is "-DA=\'": No closing quotation'),
    ],
)
def test_a_variable_that_is_wrong_is_named(tree: Tree, variables: dict[str, str], said: str) -> None:
    cuda = {"DIFFPP_FAST_CUDA": "1", "CUDA_HOME": str(make_cuda(tree))} if "DIFFPP_FAST_CUDA_ARCHS" in variables else {}
    before = tree.library.read_bytes()
    assert tree.build(**{**cuda, **variables}) == []
    assert tree.last.returncode != 0 and said in tree.last.stderr, tree.last.stderr
    assert "Traceback" not in tree.last.stderr and tree.library.read_bytes() == before


@pytest.mark.parametrize("archs", ["90a", "90, 90a", "90;90a;"])
def test_archs_are_a_list(tree: Tree, archs: str) -> None:
    (tree.folder / "csrc/a/cuda.cu").write_text("")
    cuda = make_cuda(tree)
    tree.build(DIFFPP_FAST_CUDA="1", CUDA_HOME=str(cuda), CUDA=str(cuda), DIFFPP_FAST_CUDA_ARCHS=archs)
    assert tree.last.returncode == 0 and "a/cuda.cu" in tree.calls.read_text(), tree.last.stderr


def test_an_old_python_is_named_before_a_module_is_read(tree: Tree) -> None:
    (tree.folder / "sitecustomize.py").write_text("import sys; sys.version_info = (3, 9, 18)")
    tree.build()
    assert tree.last.returncode != 0 and "needs Python 3.10 or newer; " in tree.last.stderr


@pytest.mark.skipif(platform.machine() != "x86_64" or sys.platform != "linux", reason="wheels are for Linux on x86-64")
def test_stubs_bind_a_library_to_old_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Symbols that newer libraries have moved or added are asked for as manylinux_2_28 has them, or named."""
    monkeypatch.syspath_prepend(ROOT / "csrc")
    wheels = runpy.run_path(str(ROOT / "csrc/wheels.py"))
    source, library = tmp_path / "source.cpp", tmp_path / "library.so"
    source.write_text(
        "#include <cmath>\n#include <dlfcn.h>\n#include <pthread.h>\n#include <sstream>\n"
        'double f(double x) { std::ostringstream text; text << std::exp(x); return dlopen("", 1) != nullptr; }\n'
        "int g(pthread_mutex_t* lock) { return pthread_mutex_trylock(lock); }\n"
    )

    def link(*files: Path) -> list[str]:
        compiled = ["c++", "-std=c++17", "-O2", "-fPIC", "-shared", "-fno-builtin", str(source), *map(str, files)]
        subprocess.run([*compiled, "-o", str(library)], check=True)
        return wheels["too_new"](library)

    plain = link()
    assert link(*wheels["stubs"](tmp_path)) == [], plain
    wheels["NEWEST"]["GLIBC"] = (2, 2, 4)
    assert "exp@GLIBC_2.2.5" in wheels["too_new"](library)
    assert wheels["foreign"](library) == []
