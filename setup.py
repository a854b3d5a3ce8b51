"""Builds csrc. What can be declared is in pyproject.toml, but for the licence: setuptools before 77 reads only a form
of it there that later ones drop.

With a C++17 compiler and torch's headers, csrc becomes `diffpp_fast/kernels/native/_library.so`, and with Python's
headers also the host module `_host`; with nvcc the library holds the GPU kernels too. Where one is missing the package
installs without it, says so, and runs on the kernels that are left. CXX, CXXFLAGS, LDFLAGS and CUDA_HOME are honoured;
DIFFPP_FAST_BUILD=0 builds nothing, DIFFPP_FAST_CUDA=0 nothing for GPUs; DIFFPP_FAST_CUDA_ARCHS lists the GPUs to build
for.
"""

import filecmp
import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# pip installs what pyproject.toml asks for, but not with --no-build-isolation. From 70.1 on no `wheel` is needed.
if tuple(map(int, setuptools.__version__.split(".")[:2])) < (70, 1):
    raise SystemExit(
        f"diffpp_fast: building needs setuptools 70.1 or newer, here is {setuptools.__version__}: "
        f"{sys.executable} -m pip install --upgrade setuptools"
    )

CSRC = Path("csrc")
LIBRARY = "diffpp_fast.kernels.native._library"
HOST = "diffpp_fast.kernels.native._host"

# The oldest torch whose stable ABI the library asks for: 2.11.
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"
COMMON = ["-std=c++17", "-fPIC", "-fvisibility=hidden"]
# No flag here changes a result: square roots need no errno, floating-point traps are not used, and fused multiply-adds
# are written out.
KERNEL = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-fopenmp-simd", "-Wno-psabi"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
# The user's, after ours.
CXXFLAGS, LDFLAGS = (shlex.split(os.environ.get(name, "")) for name in ("CXXFLAGS", "LDFLAGS"))
CUDA_ARCHS = ("80", "90", "100")
X86 = platform.machine().lower() in ("x86_64", "amd64")
ISAS = {"baseline": [], "avx2": AVX2, "avx512": AVX512} if X86 else {"baseline": []}
# For nvcc's host compiler.
XCOMPILER = ["-Xcompiler", ",".join(COMMON[1:])]
# Compiled once: they hold no vector code.
PLAIN = ("isa.cpp", "filter.cpp")


def find_compiler():
    """A C++17 compiler that works, or None."""
    for candidate in filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")):
        command = shlex.split(candidate)
        if shutil.which(command[0]) is None:
            continue
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.cpp")
            source.write_text(
                "#include <optional>\nint main() { return std::optional<int>(0).value(); }\n", encoding="utf-8"
            )
            probe = [*command, *COMMON, str(source), "-o", str(Path(folder, "probe"))]
            if subprocess.run(probe, capture_output=True).returncode == 0:
                return command
    return None


def find_nvcc():
    """CUDA's compiler, or None. Whether a GPU is there is not asked: kernels are compiled for all that they serve."""
    home = os.environ.get("CUDA_HOME")
    if home:
        return shutil.which("nvcc", path=str(Path(home, "bin")))
    # Where CUDA installs it, not always on the PATH.
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def find_static_runtime(nvcc):
    """The folder of libcudart_static.a: linked in, so that the library also loads where CUDA is not installed."""
    answer = subprocess.run(
        [nvcc, "--dryrun", "-c", "probe.cu"], capture_output=True, encoding="utf-8", errors="replace"
    ).stderr
    homes = [line.split("=", 1)[1] for line in answer.splitlines() if line.startswith("#$ TOP=")]
    for home in homes:
        for folder in ("lib64", "lib", f"targets/{platform.machine()}-linux/lib"):
            if Path(home, folder, "libcudart_static.a").exists():
                return Path(home, folder)
    raise SystemExit(f"diffpp_fast: no libcudart_static.a beside {nvcc}; install it, or set DIFFPP_FAST_CUDA=0")


def find_torch():
    """The folder of the installed torch, or None.

    pip builds in an isolated environment; sysconfig still names the one that the package is for.
    """
    spec = importlib.util.find_spec("torch")
    places = [Path(spec.origin).parent] if spec and spec.origin else []
    places += [Path(sysconfig.get_path(name), "torch") for name in ("platlib", "purelib")]
    return next((place for place in places if Path(place, "include/torch/csrc/stable/library.h").exists()), None)


def find_python_headers():
    """The folders of Python's and pybind11's headers, or None."""
    include = sysconfig.get_path("include")
    if not Path(include, "Python.h").exists() or importlib.util.find_spec("pybind11") is None:
        return None
    import pybind11

    return [include, pybind11.get_include()]


def find_archs(nvcc):
    """The GPUs to build for: those asked for, else those of CUDA_ARCHS that this nvcc knows."""
    asked = os.environ.get("DIFFPP_FAST_CUDA_ARCHS")
    if asked:
        return asked.split(";")
    known = subprocess.run(
        [nvcc, "--list-gpu-arch"], capture_output=True, encoding="utf-8", errors="replace"
    ).stdout.split()
    archs = [arch for arch in CUDA_ARCHS if f"compute_{arch}" in known]
    if not archs:
        raise SystemExit(f"diffpp_fast: {nvcc} knows none of the GPUs {CUDA_ARCHS}; set DIFFPP_FAST_CUDA=0")
    return archs


def execute(command):
    if subprocess.run(command).returncode != 0:
        switch = "DIFFPP_FAST_CUDA" if command[0] == NVCC else "DIFFPP_FAST_BUILD"
        raise SystemExit(f"diffpp_fast: this command failed: {shlex.join(command)}\n{switch}=0 leaves it out.")


def digest(*parts):
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()


def identity(path):
    """Tells a file from another that took its place."""
    status = path.stat()
    return f" {status.st_size} {status.st_mtime_ns}"


@contextmanager
def replacing(path):
    """Where to write what takes the place of a file in one step; a running process may have the old library mapped."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}")
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def version(compiler):
    return subprocess.run([*compiler, "--version"], capture_output=True, encoding="utf-8", errors="replace").stdout


class BuildExt(build_ext):
    """Compiles csrc with one command per object, in parallel.

    A file is kept while it is what this build would make again: beside each lies a digest of the command, the compiler,
    torch and the sources. A file appears when it is whole; until then, and if a build fails, the old one stays.
    """

    def get_ext_filename(self, fullname):
        # Loaded by torch, not by Python: no name of an interpreter in it.
        if fullname.endswith("_library"):
            return fullname.replace(".", os.sep) + ".so"
        return super().get_ext_filename(fullname)

    def run(self):
        import fcntl

        Path(self.build_temp).mkdir(parents=True, exist_ok=True)
        with Path(self.build_temp, "lock").open("w", encoding="utf-8") as lock:
            # Of two builds at once the second waits, and finds everything made.
            fcntl.flock(lock, fcntl.LOCK_EX)
            super().run()

    def build_extension(self, extension):
        torch = find_torch()
        self._sources = digest(*(f"{path} {path.read_bytes()}" for path in sorted(CSRC.rglob("*.*"))))
        self._versions = {True: version([NVCC]) if NVCC else "", False: version(COMPILER)}
        self._torch = Path(torch, "version.py").read_text(encoding="utf-8")
        kernels = list(self._kernels())
        if extension.name == LIBRARY:
            includes = [f"-I{torch / 'include'}"]
            bindings = [
                (source, f"torch_{source.stem}", ["-O2", TORCH_TARGET, *includes])
                for source in sorted(CSRC.glob("torch/*.cpp"))
            ]
            link = [f"-L{torch / 'lib'}", "-ltorch_cpu"]
            if NVCC is not None:
                bindings = [(source, name, [*flags, "-DDIFFPP_CUDA"]) for source, name, flags in bindings]
                # Machine code for each, and PTX of the last for what comes after it.
                last = f"-gencode=arch=compute_{ARCHS[-1]},code=compute_{ARCHS[-1]}"
                gencode = [*(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHS), last]
                kernels += [(source, f"cuda_{source.stem}", gencode) for source in sorted(CSRC.glob("cuda/*.cu"))]
                link += [f"-L{find_static_runtime(NVCC)}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        else:
            includes = [f"-I{folder}" for folder in find_python_headers()]
            gpus = " ".join(f"sm_{arch}" for arch in ARCHS) or "none"
            facts = [
                f'-DDIFFPP_FLAGS="{" ".join(KERNEL)}"',
                f'-DDIFFPP_ISAS="{" ".join(ISAS)}"',
                f'-DDIFFPP_CUDA_ARCHS="{gpus}"',
            ]
            bindings = [
                (source, f"host_{source.stem}", ["-O2", *facts, *includes]) for source in CSRC.glob("host/*.cpp")
            ]
            link = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            # GPU kernels take longest, then bindings.
            tasks = sorted(bindings + kernels, key=lambda task: (task[0].suffix != ".cu", task[0].parent.name == "cpu"))
            objects = list(pool.map(self._compile, tasks))
        output = Path(self.get_ext_fullpath(extension.name))
        self._make(output, [*COMPILER, "-shared", *map(str, objects), *link, *LDFLAGS], *map(identity, objects))

    def _kernels(self):
        for source in sorted(CSRC.glob("cpu/*.cpp")):
            if source.name in PLAIN:
                yield source, source.stem, ["-O2", "-ffp-contract=off"]
                continue
            for isa, flags in ISAS.items():
                yield source, f"{source.stem}.{isa}", [*KERNEL, *flags, f"-DDIFFPP_ISA={isa}"]

    def _compile(self, task):
        source, name, flags = task
        if source.suffix == ".cu":
            command = [NVCC, "-std=c++17", "-O3", "--expt-relaxed-constexpr", *XCOMPILER, *flags]
        else:
            command = [*COMPILER, *COMMON, *flags, *CXXFLAGS]
        x86 = ["-DDIFFPP_X86"] if X86 else []
        torch = self._torch if TORCH_TARGET in flags else ""
        return self._make(Path(self.build_temp, f"{name}.o"), [*command, *x86, "-c", str(source)], torch)

    def _make(self, output, command, *inputs):
        """Run a command that writes `output`, unless the file is there that it wrote before from the same inputs."""
        made_of = digest(command, self._versions[command[0] == NVCC], self._sources, *inputs)
        mark = Path(self.build_temp, f"{output.name}.made")
        if (
            not self.force
            and output.exists()
            and mark.exists()
            and mark.read_text(encoding="utf-8") == made_of + identity(output)
        ):
            return output
        with replacing(output) as unfinished:
            execute([*command, "-o", str(unfinished)])
        mark.write_text(made_of + identity(output), encoding="utf-8")
        return output

    def copy_extensions_to_source(self):
        """The end of `build_ext --inplace` and of editable installs. setuptools deletes the old file first."""
        for extension in self.extensions:
            name = self.get_ext_filename(extension.name)
            built, place = Path(self.build_lib, name), Path(name)
            if not place.exists() or not filecmp.cmp(built, place, shallow=False):
                with replacing(place) as unfinished:
                    shutil.copy2(built, unfinished)


wanted = os.environ.get("DIFFPP_FAST_BUILD", "1") != "0"
COMPILER = find_compiler() if wanted else None
NVCC = find_nvcc() if os.environ.get("DIFFPP_FAST_CUDA", "1") != "0" else None
ARCHS = find_archs(NVCC) if NVCC and COMPILER else []
extensions = []
requires = []
if COMPILER is None:
    reason = "no working C++17 compiler (c++, g++, clang++ or CXX)" if wanted else "DIFFPP_FAST_BUILD is 0"
    print(f"diffpp_fast: csrc is not built: {reason}. Operators run on the reference kernels.", file=sys.stderr)
elif find_torch() is None:
    # pip fetches it into the build environment and runs this file again.
    requires = ["torch>=2.11"]
else:
    extensions.append(Extension(LIBRARY, []))
    if find_python_headers() is not None:
        extensions.append(Extension(HOST, []))
    else:
        print("diffpp_fast: no headers of Python or pybind11: the host module is not built.", file=sys.stderr)

setup(license="Apache-2.0", ext_modules=extensions, cmdclass={"build_ext": BuildExt}, setup_requires=requires)
