"""Choosing a backend: requests are obeyed or refused with a reason, "auto" takes the best that serves."""

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from diffpp_fast import backends, ops, use_backend
from diffpp_fast.availability import UNLIMITED, Limits

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def only_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """The registry with the reference backend alone, and no request from the environment."""
    sources = {op: {"reference": found["reference"]} for op, found in backends._sources.items()}
    monkeypatch.setattr(backends, "_sources", sources)
    monkeypatch.setattr(backends, "_chosen", {})
    monkeypatch.setattr(backends, "_loaded", {})
    environment(monkeypatch, None)


def environment(monkeypatch: pytest.MonkeyPatch, name: str | None) -> None:
    """Set or unset the variable, as for a process that starts with it."""
    monkeypatch.delenv(backends.ENVIRONMENT, raising=False)
    if name is not None:
        monkeypatch.setenv(backends.ENVIRONMENT, name)
    backends._from_environment.cache_clear()


@pytest.fixture
def definition() -> Any:
    return backends._sources["add_noise"]["reference"]()


@pytest.fixture
def doubled(monkeypatch: pytest.MonkeyPatch, definition: Any) -> SimpleNamespace:
    """A "cpu" backend for add_noise, float32 only, whose gradient is twice too large so that it can be told apart."""
    found = SimpleNamespace(
        forward=definition.forward, backward=lambda *arguments: 2.0 * definition.backward(*arguments)
    )
    limits = Limits(lambda: None, lambda device, dtype: None if dtype == torch.float32 else f"{dtype} is not float32")
    monkeypatch.setitem(backends._sources["add_noise"], "cpu", lambda: found)
    monkeypatch.setitem(backends.LIMITS, "cpu", limits)
    return found


def test_reference_serves_every_operator() -> None:
    for op in backends.OPS:
        assert backends.default_backend(op, CPU) == "reference"
        assert callable(getattr(backends.kernels(op, CPU, torch.float32), "normal" if op == "philox" else "forward"))


def test_auto_takes_the_best_that_serves(doubled: SimpleNamespace, definition: Any) -> None:
    assert backends.kernels("add_noise", CPU, torch.float32) is doubled
    assert backends.kernels("add_noise", CPU, torch.float64) == definition
    with use_backend("reference"):
        assert backends.kernels("add_noise", CPU, torch.float32) == definition


def test_a_request_that_cannot_be_served_says_why(doubled: SimpleNamespace) -> None:
    with use_backend("cpu"):
        assert backends.kernels("add_noise", CPU, torch.float32) is doubled
        with pytest.raises(RuntimeError, match=r"add_noise: backend 'cpu' can't serve: torch\.float64 is"):
            backends.kernels("add_noise", CPU, torch.float64)
        with pytest.raises(RuntimeError, match="score_gap: backend 'cpu' can't serve: it has no kernel"):
            ops.score_gap(torch.zeros(1, 2), torch.zeros(1, 2))


def on_gpus(monkeypatch: pytest.MonkeyPatch, op: str) -> dict[str, SimpleNamespace]:
    """Both backends for GPUs, as if they served tensors of the CPU."""
    found = {name: SimpleNamespace(forward=None) for name in ("triton", "cuda")}
    for name, kernels in found.items():
        monkeypatch.setitem(backends._sources[op], name, lambda kernels=kernels: kernels)
        monkeypatch.setitem(backends.LIMITS, name, UNLIMITED)
    return found


def test_few_elements_prefer_the_backend_with_the_shorter_call(monkeypatch: pytest.MonkeyPatch) -> None:
    found = on_gpus(monkeypatch, "add_noise")
    many = backends.SMALL + 1
    for elements, name in ((None, "triton"), (many, "triton"), (backends.SMALL, "cuda"), (0, "cuda")):
        assert backends.kernels("add_noise", CPU, torch.float32, elements) is found[name]
    assert [backends.default_backend("add_noise", CPU, small=small) for small in (True, False)] == ["cuda", "triton"]
    with use_backend("triton"):
        assert backends.kernels("add_noise", CPU, torch.float32, 0) is found["triton"]
    # A compiled graph costs no host time, whatever the sizes, on which it would have to be guarded.
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert backends.kernels("add_noise", CPU, torch.float32, 0) is found["triton"]


def test_fewer_pixels_of_16_bits_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    found = on_gpus(monkeypatch, "reward_pixels")
    few, more = 2**20, 2**20 + 1
    for dtype, elements, name in (
        (torch.bfloat16, few, "cuda"),
        (torch.bfloat16, more, "triton"),
        (torch.float16, more, "triton"),
        (torch.float32, more, "cuda"),
    ):
        assert backends.kernels("reward_pixels", CPU, dtype, elements) is found[name]


def test_an_unavailable_backend_says_why(monkeypatch: pytest.MonkeyPatch, definition: Any) -> None:
    monkeypatch.setitem(backends._sources["add_noise"], "triton", lambda: 1 / 0)
    monkeypatch.setitem(backends.LIMITS, "triton", Limits(lambda: "there is no GPU", lambda device, dtype: None))
    assert backends.kernels("add_noise", CPU, torch.float32) == definition
    with use_backend("triton"), pytest.raises(RuntimeError, match="backend 'triton' can't serve: there is no GPU"):
        backends.kernels("add_noise", CPU, torch.float32)


def test_requests_nest_and_end() -> None:
    assert backends.requested_backend() == "auto"
    with use_backend("reference"):
        with use_backend("cuda"):
            assert backends.requested_backend() == "cuda"
        assert backends.requested_backend() == "reference"
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert backends.requested_backend() == "auto"


def test_a_request_stays_in_its_thread() -> None:
    seen = []
    with use_backend("cuda"):
        thread = threading.Thread(target=lambda: seen.append(backends.requested_backend()))
        thread.start()
        thread.join()
    assert seen == ["auto"]


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    environment(monkeypatch, "reference")
    assert backends.requested_backend() == "reference"
    with use_backend("auto"):
        assert backends.requested_backend() == "auto"
    environment(monkeypatch, "gpu")
    with pytest.raises(ValueError, match="DIFFPP_FAST_BACKEND: unknown backend 'gpu'; known: auto, cpu"):
        backends.requested_backend()


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="use_backend: unknown backend 'metal'"), use_backend("metal"):
        pass
    with pytest.raises(ValueError, match="unknown operator 'conv'"):
        backends.register("conv", forward=torch.relu)


def test_backward_runs_in_the_backend_of_its_forward(doubled: SimpleNamespace) -> None:
    x0 = torch.randn(2, 3, requires_grad=True)
    one = torch.ones(2)
    with use_backend("cpu"):
        x_t = ops.add_noise(x0, one, one, torch.zeros(2, 3))
    with use_backend("reference"):
        x_t.sum().backward()
    assert torch.equal(x0.grad, torch.full_like(x0, 2.0))


def test_table_lists_every_operator_and_backend(doubled: SimpleNamespace) -> None:
    rows = {(row.op, row.backend): row for row in backends.table(CPU, torch.float64)}
    assert len(rows) == len(backends.OPS) * len(backends.PREFERENCE)
    assert rows["add_noise", "reference"] == ("add_noise", "reference", True, None)
    assert rows["add_noise", "cpu"] == ("add_noise", "cpu", False, "torch.float64 is not float32")
    assert not rows["sid_loss", "cuda"].serves


def test_compiles_into_one_graph() -> None:
    x0, alpha, sigma, eps = torch.randn(2, 3), torch.rand(2), torch.rand(2), torch.randn(2, 3)
    compiled = torch.compile(ops.add_noise, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x0, alpha, sigma, eps), ops.add_noise(x0, alpha, sigma, eps))
