"""The start of every test, and the two rules that tests share: one for low precision, one for memory layouts."""

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    # Triton reads this when it is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Not the user's; `datasets` reads this when it is imported, in started processes, too.
_cache = tempfile.TemporaryDirectory(prefix="diffpp_fast-tests-")
os.environ.setdefault("HF_DATASETS_CACHE", _cache.name)

# `benchmarks` is not installed with the package. Last, so that the package under test stays the one that is.
ROOT = str(Path(__file__).parent.parent)
sys.path.append(ROOT)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), ROOT)))

import pytest
from torch import Tensor

from diffpp_fast import backends, use_backend

# The checks on a GPU do without it.
with suppress(ImportError):
    import hypothesis

    hypothesis.settings.register_profile("suite", max_examples=20, deadline=None, derandomize=True)
    hypothesis.settings.load_profile("suite")

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.clone(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "strided": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
    "permuted": lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),
    "misaligned": lambda x: torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape),
}


@pytest.fixture(autouse=True)
def reproducible() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    # Also fills uninitialised memory with NaN, so that an element that is never written shows.
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration file of a tiny run with all that it needs."""
    import tiny

    return tiny.write(tmp_path_factory.mktemp("project"))


#: Where there is a GPU, the operators' tests also run there, on tensors that are made there by default.
ON_GPU = ("triton", "cuda") if torch.cuda.is_available() else ()


@pytest.fixture(params=["reference", "cpu", *(pytest.param(name, marks=pytest.mark.gpu) for name in ON_GPU)])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs every test of an operator's file once on each backend that serves the CPU; one that was not built fails."""
    name: str = request.param
    with use_backend(name), torch.device("cuda") if name in ON_GPU else nullcontext():
        yield name


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark the tests of Triton's kernels, which run where the GPU is."""
    if ON_GPU and "triton_backend" in getattr(item, "fixturenames", ()):
        item.add_marker(pytest.mark.gpu)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Skips a test on a GPU where it asks for what the backend says that it does not serve."""
    try:
        yield
    except RuntimeError as error:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        if parameters.get("backend") not in ON_GPU or "can't serve" not in str(error):
            raise
        pytest.skip(str(error))


@pytest.fixture
def cpu_backend() -> Iterator[Any]:
    """Runs a test on the compiled CPU kernels. The value is `torch.ops.diffpp_fast`, with every fake registered."""
    with use_backend("cpu"):
        for op in backends.OPS:
            backends.kernels(op, torch.device("cpu"), torch.float32)
        yield torch.ops.diffpp_fast


@pytest.fixture
def triton_backend() -> Iterator[torch.device]:
    """Runs a test on the Triton kernels: on a GPU, else in the interpreter. The value is where tensors belong."""
    with use_backend("triton"):
        yield torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> Callable[[Tensor], Tensor]:
    """Turns a [B, C, H, W] tensor into an equal one of another memory layout."""
    return LAYOUTS[request.param]


@pytest.fixture
def assert_twice_unfused() -> Callable[[Tensor, Tensor, Tensor], None]:
    """The error against float64 is at most twice that of the same formula written unfused in the same dtype."""

    def check(actual: Tensor, unfused: Tensor, oracle: Tensor) -> None:
        assert actual.dtype == unfused.dtype
        assert oracle.dtype == torch.float64
        error = actual.double() - oracle
        # Per-sample statistics are float32 in every version: their rounding is not the operator's error.
        allowed = 2.0 * (unfused.double() - oracle).norm() + 4.0 * 2.0**-24 * oracle.norm()
        assert error.norm() <= allowed, f"error {error.norm():.3e}, allowed {allowed:.3e}"
        cosine = torch.nn.functional.cosine_similarity(actual.double().flatten(), oracle.flatten(), dim=0)
        assert cosine > 0.9999
        assert error.mean().abs() <= 4.0 * oracle.abs().mean() * torch.finfo(actual.dtype).eps

    return check
