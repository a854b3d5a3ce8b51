"""Says what of csrc is built; csrc/compilation.py builds it. What can be declared is in pyproject.toml, but for the
licence: setuptools before 77 reads only a form of it there that later ones drop.

With a C++17 compiler and torch's headers, csrc becomes `diffpp_fast/native/_library.so`, and with Python's
headers also the host module `_host`; with nvcc the library holds the GPU kernels too. Where one is missing the package
installs without it, says so, and runs on the kernels that are left. CXX, CXXFLAGS, LDFLAGS and CUDA_HOME are honoured;
DIFFPP_FAST_BUILD=0 builds nothing, `library` no host module, DIFFPP_FAST_CUDA=0 nothing for GPUs;
DIFFPP_FAST_CUDA_ARCHS lists the GPUs to build for.
"""

import sys
from pathlib import Path

import setuptools
from setuptools import Extension, setup

# Before csrc's modules, which an older Python can't read.
if sys.version_info < (3, 10):  # noqa: UP036 - setuptools runs this before anybody reads requires-python
    raise SystemExit(f"diffpp_fast: needs Python 3.10 or newer; {sys.executable} is {sys.version.split()[0]}")

# Builds do not look for modules where setup.py is.
sys.path.insert(0, str(Path(__file__).resolve().parent / "csrc"))
from compilation import HOST, LIBRARY, BuildExt
from toolchain import find_python_headers, find_toolchain, find_torch, setting

# pip installs what pyproject.toml asks for, but not with --no-build-isolation. From 70.1 on no `wheel` is needed.
if tuple(map(int, setuptools.__version__.split(".")[:2])) < (70, 1):
    raise SystemExit(
        f"diffpp_fast: building needs setuptools 70.1 or newer, here is {setuptools.__version__}: "
        f"{sys.executable} -m pip install --upgrade setuptools"
    )

parts = setting("DIFFPP_FAST_BUILD", "0", "1", "library")
extensions = []
requires = []
if parts == "0" or find_toolchain() is None:
    reason = "DIFFPP_FAST_BUILD is 0" if parts == "0" else "no working C++17 compiler (c++, g++, clang++ or CXX)"
    print(f"diffpp_fast: csrc is not built: {reason}. Operators run on the reference kernels.", file=sys.stderr)
elif find_torch() is None:
    # pip fetches it into the build environment and runs this file again.
    requires = ["torch>=2.11"]
else:
    extensions.append(Extension(LIBRARY, []))
    if parts != "library":
        if find_python_headers() is not None:
            extensions.append(Extension(HOST, []))
        else:
            print("diffpp_fast: no headers of Python or pybind11: the host module is not built.", file=sys.stderr)

setup(license="Apache-2.0", ext_modules=extensions, cmdclass={"build_ext": BuildExt}, setup_requires=requires)
