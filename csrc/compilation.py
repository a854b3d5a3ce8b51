"""Compiles csrc: says with what each file is compiled, and compiles those that have changed.

A file's name tells its part. `*/cpu.cpp` holds kernels, compiled once for each instruction set, `*/cuda.cu` kernels for
GPUs, `*/binding.cpp` what torch calls, `host/*.cpp` the host module. Every other `*/*.cpp` is compiled once, without
vector code.
"""

import filecmp
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from setuptools.command.build_ext import build_ext
from toolchain import (
    DIALECT,
    cuda_release,
    find_python_headers,
    find_static_runtime,
    find_toolchain,
    find_torch,
    version,
    words,
)

CSRC = Path("csrc")
SUFFIXES = (".cpp", ".h", ".cu", ".cuh")
LIBRARY = "diffpp_fast.native._library"
HOST = "diffpp_fast.native._host"

# The oldest torch whose stable ABI the library asks for: 2.11.
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"
# No flag here changes a result: square roots need no errno, floating-point traps are not used, and fused multiply-adds
# are written out.
KERNEL = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-fopenmp-simd", "-Wno-psabi"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
X86 = platform.machine().lower() in ("x86_64", "amd64")
ISAS = {"baseline": [], "avx2": AVX2, "avx512": AVX512} if X86 else {"baseline": []}
NVCC = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
# The user's, after ours.
CXXFLAGS, LDFLAGS = words("CXXFLAGS"), words("LDFLAGS")


class Task(NamedTuple):
    """An object to compile."""

    source: Path
    name: str
    flags: list[str]
    #: What else it is made of than the command and the files of csrc that it includes.
    made_of: str = ""


def digest(*parts):
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()


def identity(path):
    """Return what tells a file from another that took its place."""
    status = path.stat()
    return f" {status.st_size} {status.st_mtime_ns}"


@contextmanager
def replacing(path):
    """Yield where to write what then replaces a file in one step; a running process may have the old library mapped."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}")
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def included(depfile):
    """Return the files that a compiler read, as it wrote them down; None where it wrote nothing."""
    if not depfile.exists():
        return None
    _, _, rule = depfile.read_text(encoding="utf-8").partition(": ")
    return {os.path.relpath(name) for name in shlex.split(rule.replace("\\\n", " "))}


class BuildExt(build_ext):
    """Compiles csrc with one command per object, in parallel.

    A file is kept while it is what this build would make again: beside each lies a digest of the command, the compiler,
    torch and, of csrc, what the compiler read. A file appears when it is whole; until then, and if a build fails, the
    old one stays.
    """

    def get_ext_filename(self, fullname):
        # Loaded by torch, not by Python: no name of an interpreter in it.
        if fullname.endswith("_library"):
            return fullname.replace(".", os.sep) + ".so"
        return super().get_ext_filename(fullname)

    def run(self):
        with self._locked():
            super().run()

    @contextmanager
    def _locked(self):
        import fcntl

        Path(self.build_temp).mkdir(parents=True, exist_ok=True)
        with Path(self.build_temp, "lock").open("w", encoding="utf-8") as lock:
            # Of two builds at once the second waits, and finds everything made.
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def build_extension(self, extension):
        self._look_around()
        tasks, link = self._library() if extension.name == LIBRARY else self._host()
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            # GPU kernels take longest, then bindings.
            tasks.sort(key=lambda task: (task.source.suffix != ".cu", task.source.stem == "cpu"))
            objects = list(pool.map(self._compile, tasks))
        output = Path(self.get_ext_fullpath(extension.name))
        command = [*self._compiler, "-shared", *map(str, objects), *link, *LDFLAGS]
        self._make(output, command, *map(identity, objects))

    def kernels(self):
        """Return the compiler and the objects of `_cpu_tasks`: those of the last build where nothing has changed."""
        with self._locked():
            self._look_around()
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                return self._compiler, list(pool.map(self._compile, self._cpu_tasks()))

    def _look_around(self):
        """Note the compilers, and csrc as it is: what changes from now on is compiled again by the next build."""
        self._compiler, self._nvcc, self._archs = find_toolchain()
        self._versions = {True: version([self._nvcc]) if self._nvcc else "", False: version(self._compiler)}
        files = (path for path in sorted(CSRC.glob("*/*")) if path.suffix in SUFFIXES)
        self._contents = {str(path): digest(path.read_bytes()) for path in files}

    def _library(self):
        """Return the objects of the library that torch loads, and how they are linked."""
        torch = find_torch()
        release = Path(torch, "version.py").read_text(encoding="utf-8")
        flags = ["-O2", *torch_flags(torch), *(["-DDIFFPP_CUDA"] if self._nvcc else [])]
        tasks = [Task(source, named(source), flags, release) for source in sorted(CSRC.glob("*/binding.cpp"))]
        link = [f"-L{torch / 'lib'}", "-ltorch_cpu"]
        if self._nvcc is not None:
            # Machine code for each, and PTX of the last for what comes after it.
            codes = [(arch, f"sm_{arch}") for arch in self._archs] + [(self._archs[-1], f"compute_{self._archs[-1]}")]
            gencode = [f"-gencode=arch=compute_{arch},code={code}" for arch, code in codes]
            tasks += [Task(source, named(source), gencode) for source in sorted(CSRC.glob("*/cuda.cu"))]
            link += [f"-L{find_static_runtime(self._nvcc)}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        return tasks + list(self._cpu_tasks()), link

    def _host(self):
        """Return the objects of the module that Python imports, and how they are linked."""
        includes = [f"-I{folder}" for folder in find_python_headers()]
        tasks = [Task(source, named(source), ["-O2", *includes]) for source in CSRC.glob("host/*.cpp")]
        link = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
        return tasks + list(self._cpu_tasks()), link

    def _cpu_tasks(self):
        """Yield what the library and the host module share: the kernels for the CPU, and what is compiled once."""
        gpus = " ".join(f"sm_{arch}" for arch in self._archs) or "none"
        facts = {"FLAGS": " ".join(KERNEL), "ISAS": " ".join(ISAS), "CUDA_ARCHS": gpus}
        facts["CUDA_RELEASE"] = cuda_release(self._nvcc) if self._nvcc else "none"
        defined = [f'-DDIFFPP_{name}="{fact}"' for name, fact in facts.items()]
        for source in sorted(CSRC.glob("*/*.cpp")):
            if source.name == "cpu.cpp":
                for isa, flags in ISAS.items():
                    yield Task(source, f"{named(source)}.{isa}", [*KERNEL, *flags, f"-DDIFFPP_ISA={isa}"])
            elif source.name != "binding.cpp" and source.parent.name != "host":
                yield Task(source, named(source), ["-O2", "-ffp-contract=off", *defined])

    def _compile(self, task):
        if task.source.suffix == ".cu":
            command = [self._nvcc, *NVCC, *task.flags]
        else:
            command = [*self._compiler, *DIALECT, *task.flags, *CXXFLAGS]
        output = Path(self.build_temp, f"{task.name}.o")
        depfile = output.with_suffix(".d")
        x86 = ["-DDIFFPP_X86"] if X86 else []
        command += [*x86, "-MMD", "-MF", str(depfile), "-c", str(task.source)]
        return self._make(output, command, task.made_of, depfile=depfile)

    def _make(self, output, command, *inputs, depfile=None):
        """Run a command that writes `output`, unless the file is there that it wrote before from the same inputs."""
        made_of = digest(command, self._versions[command[0] == self._nvcc], *inputs)
        mark = Path(self.build_temp, f"{output.name}.made")

        def state():
            read = included(depfile) if depfile is not None else ()
            # Without a list of what was read, it may be anything.
            files = self._contents if read is None else sorted(self._contents.keys() & read)
            return digest(made_of, identity(output), *(f"{name} {self._contents[name]}" for name in files))

        if not self.force and output.exists() and mark.exists() and mark.read_text(encoding="utf-8") == state():
            return output
        with replacing(output) as unfinished:
            self._execute([*command, "-o", str(unfinished)])
        mark.write_text(state(), encoding="utf-8")
        return output

    def _execute(self, command):
        if subprocess.run(command).returncode != 0:
            switch = "DIFFPP_FAST_CUDA" if command[0] == self._nvcc else "DIFFPP_FAST_BUILD"
            raise SystemExit(f"diffpp_fast: this command failed: {shlex.join(command)}\n{switch}=0 leaves it out.")

    def copy_extensions_to_source(self):
        """Put the libraries in place, for `--inplace` and editable installs. setuptools deletes the old ones first."""
        for extension in self.extensions:
            name = self.get_ext_filename(extension.name)
            built, place = Path(self.build_lib, name), Path(name)
            if not place.exists() or not filecmp.cmp(built, place, shallow=False):
                with replacing(place) as unfinished:
                    shutil.copy2(built, unfinished)


def torch_flags(torch):
    """Return the flags for what includes torch's headers; the folder they lie in here is in no message of theirs."""
    return [TORCH_TARGET, f"-I{torch / 'include'}", f"-ffile-prefix-map={torch}=torch"]


def named(source):
    return f"{source.parent.name}_{source.stem}"
