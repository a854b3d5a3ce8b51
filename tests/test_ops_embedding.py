"""The operators inside other people's loops: autocast, checkpointing, FSDP2, and that none waits for the device.

What else a loop may do with them has its own tests: a tensor as noise and one drawn from its address, with all pairs
of options, in test_gpu_check.py (and `test_noise_is_drawn_from_its_address` of every operator); torch.compile with
fullgraph=True in test_native_*.py for the CPU and test_triton_device.py for Triton; replay of a captured CUDA graph,
and autocast on a GPU, for all pairs of options in `make gpu-check` (gpu_gate.py).
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsdp_worker
import processes
import pytest
import torch
from gpu_gate import under_autocast
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint

from benchmarks import variants
from benchmarks.variants import Variant
from diffpp_fast import Noise, NoiseSchedule, backends, ops, use_backend
from diffpp_fast.selftest import step

PACKAGE = Path(backends.__file__).parent
#: Names whose call makes the host wait for the device, or reads a tensor's values.
READS_VALUES = {"item", "tolist", "cpu", "numpy", "synchronize", "nonzero", "masked_select", "unique"}


def representative(op: str, dtype: torch.dtype, drawn: bool) -> Variant:
    """With every gradient that the operator has; with all three outputs where there are three."""
    wanted = {"layout": "contiguous", "gradient": True, "wrt": "all", "uncond": True, "normalizer": "mean_abs"}
    noise = {"noise": "drawn" if drawn else "stored", "prediction_type": "v_prediction", "scale": "tensor"}

    def matches(variant: Variant) -> bool:
        return all(value == {**wanted, **noise}.get(name, value) for name, value in variant.options)

    return next(filter(matches, variants.every(op, (dtype,))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("op", backends.OPS)
def test_autocast_changes_no_bit(op: str, dtype: torch.dtype, backend: str) -> None:
    call = variants.make(representative(op, dtype, drawn=True), torch.empty(0).device)
    plain = call.run()
    assert len(plain) >= 1 + len(call.wrt)
    assert under_autocast(call, plain) is None


def test_what_autocast_changes_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    variant = representative("ada_layer_norm", torch.float32, drawn=False)
    call = variants.make(variant, torch.device("cpu"))
    for spoiled, message in (
        (lambda x, scale, shift: x @ torch.eye(x.shape[-1]), "is torch.bfloat16 instead of torch.float32"),
        (lambda x, scale, shift: (x @ torch.eye(x.shape[-1])).float() + scale + shift, "other bits than eager"),
    ):
        monkeypatch.setattr(ops, "ada_layer_norm", spoiled)
        partial = dataclasses.replace(call, wrt=(), outer=None)
        assert message in str(under_autocast(partial, partial.run()))


def test_a_step_under_autocast_has_the_gradients_of_one_that_casts_by_hand(backend: str) -> None:
    network = torch.nn.Conv2d(4, 4, 3, padding=1)
    x0, alpha, sigma = torch.randn(2, 4, 8, 8), torch.tensor([0.8, 0.6]), torch.tensor([0.6, 0.8])
    noise = Noise(0, torch.arange(2))
    with torch.autocast(x0.device.type, dtype=torch.bfloat16):
        prediction = network(ops.add_noise(x0, alpha, sigma, noise))
        loss = ops.denoising_loss(prediction, x0, noise, alpha, sigma)
    loss.backward()
    assert prediction.dtype == torch.bfloat16 and loss.dtype == torch.float32
    by_hand = (prediction.detach().float() - noise.normal(x0.shape[1:])).square().mean()
    torch.testing.assert_close(loss.detach(), by_hand, rtol=1e-2, atol=0.0)
    assert network.weight.grad is not None and network.weight.grad.dtype == torch.float32
    # The same in float32: what remains is the rounding of bfloat16.
    exact = torch.nn.functional.mse_loss(network(ops.add_noise(x0, alpha, sigma, noise)), noise.normal(x0.shape[1:]))
    (grad,) = torch.autograd.grad(exact, network.weight)
    assert (network.weight.grad - grad).norm() <= 0.02 * grad.norm()


@pytest.mark.parametrize("op", [op for op in backends.OPS if op not in ("philox", "score_gap")])  # without a gradient
def test_recomputed_in_the_backward_pass_it_is_the_same(op: str, backend: str) -> None:
    variant = representative(op, torch.float32, drawn=True)
    call = variants.make(variant, torch.empty(0).device)

    def recomputed(**arguments: Any) -> Any:
        return checkpoint(call.forward, use_reentrant=False, **arguments)

    plain, again = (step(each, call.arguments, call.wrt, call.outer) for each in (call.forward, recomputed))
    assert all(torch.equal(*pair) for pair in zip(plain, again, strict=True))


@pytest.mark.parametrize(
    ("op", "drawn"),
    [(op, drawn) for op in backends.OPS for drawn in (True, False) if drawn or "noise" in variants.OPTIONS[op]],
)
def test_no_value_is_read_back_from_the_device(op: str, drawn: bool) -> None:
    # Tensors on meta have no values: whatever asks for one raises.
    variant = representative(op, torch.bfloat16, drawn)
    on_cpu, on_meta = (variants.make(variant, torch.device(device)) for device in ("cpu", "meta"))
    with use_backend("reference"):
        expected, actual = on_cpu.run(), on_meta.run()
    for ours, plain in zip(actual, expected, strict=True):
        assert ours.is_meta and (ours.shape, ours.dtype, ours.stride()) == (plain.shape, plain.dtype, plain.stride())


def test_the_schedule_reads_no_value_back_either() -> None:
    schedule = NoiseSchedule(torch.linspace(0.99, 0.1, 10), torch.linspace(0.1, 0.99, 10), prediction_type="epsilon")
    t = torch.zeros(3, dtype=torch.int64, device="meta")
    assert all(each.is_meta and each.shape == (3,) for each in (*schedule.coefficients(t), schedule.gap_scale(t)))


def calls_that_read_values(path: Path) -> Iterator[str]:
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in READS_VALUES:
            yield f"{path.relative_to(PACKAGE)}: {ast.unparse(node)}"


def test_nothing_on_the_way_to_a_kernel_waits_for_the_device() -> None:
    folders = ("ops", "ops/triton")
    files = [PACKAGE / f"{name}.py" for name in ("noise", "philox", "plain", "prediction")]
    files += [file for folder in folders for file in (PACKAGE / folder).glob("*.py")]
    assert len(files) > 25
    # Those that there are look at tensors on the CPU only; test_no_value_is_read_back_from_the_device shows it.
    found = [call for file in files for call in calls_that_read_values(file)]
    assert found == ["ops/checks.py: tensor.tolist()"] * 2


def test_two_processes_under_fsdp2_train_as_one(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    processes.run([str(processes.TESTS / "fsdp_worker.py"), str(file)], 2)
    before = {f"{role}.{name}": weight
              for seed, role in ((1, "generator"), (2, "fake"))
              for name, weight in fsdp_worker.network(seed).named_parameters()}  # fmt: skip
    alone, sharded = fsdp_worker.train(0, 1), load_file(file)
    assert alone.keys() == sharded.keys() == before.keys()
    for name, weight in alone.items():
        moved = (weight - before[name]).norm()
        assert moved > 1e-3, name
        assert (sharded[name] - weight).norm() <= 1e-3 * moved, name
