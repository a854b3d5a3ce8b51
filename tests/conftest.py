"""What every test starts from, and the two rules they share: one for low precision, one for memory layouts."""

from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import pytest
import torch
from torch import Tensor

from diffpp_fast import use_backend
from diffpp_fast.kernels import dispatch

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


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs every test of an operator's file once on each backend that serves the CPU; one that was not built fails."""
    name: str = request.param
    with use_backend(name):
        yield name


@pytest.fixture
def cpu_backend() -> Iterator[Any]:
    """Runs a test on the compiled CPU kernels. The value is `torch.ops.diffpp_fast`, with every fake registered."""
    with use_backend("cpu"):
        for op, backend in dispatch._kernels:
            if backend == "cpu":
                dispatch.select(op, torch.device("cpu"), torch.float32)
        yield torch.ops.diffpp_fast


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
