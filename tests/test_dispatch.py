"""Choosing a backend: requests are obeyed or refused with a reason, "auto" takes the best that serves."""

import sys
import threading
from types import ModuleType

import pytest
import torch

from diffpp_fast import ops, use_backend
from diffpp_fast.kernels import dispatch
from diffpp_fast.kernels.reference import add_noise as reference_add_noise

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def only_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """The registry with the reference backend alone, and no request from the environment."""
    reference = {key: kernel for key, kernel in dispatch._kernels.items() if key[1] == "reference"}
    monkeypatch.setattr(dispatch, "_kernels", reference)
    monkeypatch.delenv(dispatch.ENVIRONMENT, raising=False)


@pytest.fixture
def doubled(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A "cpu" backend for add_noise, float32 only, whose gradient is twice too large so that it can be told apart."""
    module = ModuleType("doubled_add_noise")
    module.forward = reference_add_noise.forward  # type: ignore[attr-defined]
    module.backward = lambda *args: 2.0 * reference_add_noise.backward(*args)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.delitem(dispatch._loaded, module.__name__, raising=False)
    dispatch.register(
        "add_noise",
        "cpu",
        module.__name__,
        refuses=lambda device, dtype: None if dtype == torch.float32 else f"{dtype} is not float32",
    )
    return module


def test_reference_serves_every_operator() -> None:
    for op in dispatch.OPS:
        assert dispatch.select(op, CPU, torch.float32).__name__ == f"diffpp_fast.kernels.reference.{op}"


def test_auto_takes_the_best_that_serves(doubled: ModuleType) -> None:
    assert dispatch.select("add_noise", CPU, torch.float32) is doubled
    assert dispatch.select("add_noise", CPU, torch.float64) is reference_add_noise
    with use_backend("reference"):
        assert dispatch.select("add_noise", CPU, torch.float32) is reference_add_noise


def test_a_request_that_cannot_be_served_says_why(doubled: ModuleType) -> None:
    with use_backend("cpu"):
        assert dispatch.select("add_noise", CPU, torch.float32) is doubled
        with pytest.raises(RuntimeError, match=r"add_noise: backend 'cpu' can't serve: torch\.float64 is"):
            dispatch.select("add_noise", CPU, torch.float64)
        with pytest.raises(RuntimeError, match="score_gap: backend 'cpu' can't serve: it has no kernel"):
            ops.score_gap(torch.zeros(1, 2), torch.zeros(1, 2))


def test_an_unavailable_backend_says_why() -> None:
    dispatch.register("add_noise", "triton", "no_such_module", unavailable=lambda: "there is no GPU")
    assert dispatch.select("add_noise", CPU, torch.float32) is reference_add_noise
    with use_backend("triton"), pytest.raises(RuntimeError, match="backend 'triton' can't serve: there is no GPU"):
        dispatch.select("add_noise", CPU, torch.float32)


def test_requests_nest_and_end() -> None:
    assert dispatch.requested_backend() == "auto"
    with use_backend("reference"):
        with use_backend("cuda"):
            assert dispatch.requested_backend() == "cuda"
        assert dispatch.requested_backend() == "reference"
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert dispatch.requested_backend() == "auto"


def test_a_request_stays_in_its_thread() -> None:
    seen = []
    with use_backend("cuda"):
        thread = threading.Thread(target=lambda: seen.append(dispatch.requested_backend()))
        thread.start()
        thread.join()
    assert seen == ["auto"]


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.ENVIRONMENT, "reference")
    assert dispatch.requested_backend() == "reference"
    with use_backend("auto"):
        assert dispatch.requested_backend() == "auto"
    monkeypatch.setenv(dispatch.ENVIRONMENT, "gpu")
    with pytest.raises(ValueError, match="DIFFPP_FAST_BACKEND: unknown backend 'gpu'; known: auto, cpu"):
        dispatch.requested_backend()


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="use_backend: unknown backend 'metal'"), use_backend("metal"):
        pass
    with pytest.raises(ValueError, match="unknown operator 'conv'"):
        dispatch.register("conv", "cpu", "module")
    with pytest.raises(ValueError, match="unknown backend 'auto'"):
        dispatch.register("add_noise", "auto", "module")


def test_backward_runs_in_the_backend_of_its_forward(doubled: ModuleType) -> None:
    x0 = torch.randn(2, 3, requires_grad=True)
    one = torch.ones(2)
    with use_backend("cpu"):
        x_t = ops.add_noise(x0, one, one, torch.zeros(2, 3))
    with use_backend("reference"):
        x_t.sum().backward()
    assert torch.equal(x0.grad, torch.full_like(x0, 2.0))


def test_table_lists_every_operator_and_backend(doubled: ModuleType) -> None:
    rows = {(row.op, row.backend): row for row in dispatch.table(CPU, torch.float64)}
    assert len(rows) == len(dispatch.OPS) * len(dispatch.PREFERENCE)
    assert rows["add_noise", "reference"] == ("add_noise", "reference", True, None)
    assert rows["add_noise", "cpu"] == ("add_noise", "cpu", False, "torch.float64 is not float32")
    assert not rows["sid_loss", "cuda"].serves


def test_compiles_into_one_graph() -> None:
    x0, alpha, sigma, eps = torch.randn(2, 3), torch.rand(2), torch.rand(2), torch.randn(2, 3)
    compiled = torch.compile(ops.add_noise, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x0, alpha, sigma, eps), ops.add_noise(x0, alpha, sigma, eps))
