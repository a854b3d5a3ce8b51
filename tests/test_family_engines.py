"""Every family where engines and compilers meet it: ZeRO in two processes, torch.compile, and weights in few bits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import family_runs
import processes
import pytest
import torch
from family_networks import FAMILIES, inputs, network
from safetensors.torch import load_file
from torch import nn

from diffpp_fast.networks import Denoiser, fuse, quantize
from diffpp_fast.networks.quantization import quantization_report
from diffpp_fast.training.build.compiling import compile_network, repeated_blocks
from diffpp_fast.training.checkpoint import read_role

WORKER = str(Path(__file__).parent / "family_runs.py")
#: ||difference|| / ||update||: what the run itself has changed.
TOLERANCE = 1e-4


def families(*quick: str) -> list[Any]:
    """All of them; those that are not named are slow."""
    return [pytest.param(each, marks=() if each in quick else pytest.mark.slow) for each in FAMILIES]


@contextmanager
def whole_in_calls_alone(module: nn.Module) -> Iterator[None]:
    """As in ZeRO's stage 3, a module's own weights are there only while it is called."""
    handles: list[Any] = []
    for part in module.modules():
        own = dict(part.named_parameters(recurse=False))
        whole = {name: weight.data for name, weight in own.items()}

        def gather(*_: Any, own: Any = own, whole: Any = whole) -> None:
            for name, weight in own.items():
                weight.data = whole[name]

        def drop(*_: Any, own: Any = own) -> None:
            for weight in own.values():
                weight.data = weight.data.new_full((0,), torch.nan)

        drop()
        handles += [part.register_forward_pre_hook(gather), part.register_forward_hook(drop)]
    yield
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("family", families("z_image", "qwen_image"))
def test_no_weight_is_read_outside_its_modules_call(family: str) -> None:
    made = network(family)
    fuse(made)
    denoise, given = Denoiser(made), inputs(family, 2)
    with torch.no_grad():
        expected = denoise(*given)
        with whole_in_calls_alone(made):
            assert torch.equal(denoise(*given), expected)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes the folder with a family's runs."""

    def folder(family: str) -> Path:
        made = tmp_path_factory.mktemp("runs")
        (made / family).mkdir()
        family_runs.write_base(made / family, family)
        return made

    return folder


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_zero_is_the_plain_run_for_every_family(bases: Callable[[str], Path], family: str) -> None:
    """Weights, averages and export; resumed in the middle to the bit, which the worker checks."""
    folder = bases(family)
    kinds = {"whole": "123", "lora": "12", "sid": "2"}
    processes.run(["-W", "ignore", WORKER, str(folder), ",".join(f"{family}:plain:{kind}" for kind in kinds)], 1)
    jobs = [f"{family}:{stage}:{kind}" for kind, stages in kinds.items() for stage in stages]
    processes.run(["-W", "ignore", WORKER, str(folder), ",".join([*jobs, f"{family}:3:bfloat16"])], 2, timeout=600)
    for job in jobs:
        _, stage, kind = job.split(":")
        plain, spread = folder / family / f"plain-{kind}", folder / family / f"{stage}-{kind}"
        for role in ("generator", "fake", "generator_ema"):
            before, theirs, mine = (
                read_role(run / "checkpoints" / step, role)
                for run, step in ((plain, "step_000001"), (plain, "step_000002"), (spread, "step_000002"))
            )
            assert mine.keys() == theirs.keys()
            start, expected, found = (
                torch.cat([each[name].flatten() for name in theirs]) for each in (before, theirs, mine)
            )
            assert (found - expected).norm() <= TOLERANCE * (expected - start).norm(), (job, role)
        for file in (plain / "generator").rglob("*.safetensors"):
            exported = load_file(spread / file.relative_to(plain))
            for name, tensor in load_file(file).items():
                torch.testing.assert_close(exported[name], tensor, rtol=1e-4, atol=1e-5)


#: More blocks than kinds of them.
DEEPER: dict[str, dict[str, Any]] = {
    "stable_diffusion": {"transformer_layers_per_block": 3},
    "stable_diffusion_xl": {},
    "pixart": {"num_layers": 5},
    "z_image": {"n_layers": 4, "n_refiner_layers": 2},
    "stable_diffusion_3": {"num_layers": 5},
    "sana": {"num_layers": 5},
    "flux": {"num_layers": 4, "num_single_layers": 4},
    "flux_2": {"num_layers": 4, "num_single_layers": 4},
    "qwen_image": {"num_layers": 4},
}
#: Graphs of the blocks: one for each kind, and of PixArt's and Sana's first block, whose input has other strides.
GRAPHS = {"pixart": 2, "z_image": 3, "stable_diffusion_3": 3, "sana": 2, "flux": 3, "flux_2": 2}


@pytest.mark.parametrize("family", families("flux_2", "qwen_image"))
def test_every_familys_blocks_are_compiled_for_themselves(family: str) -> None:
    made = network(family)
    lists = ("transformer_blocks", "single_transformer_blocks", "layers", "noise_refiner", "context_refiner")
    blocks = [block for name, part in made.named_modules() if name.split(".")[-1] in lists for block in part.children()]
    assert blocks and set(blocks) == set(repeated_blocks(made))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["regional", "whole"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_compiled_network_is_the_eager_one(family: str, mode: Any) -> None:
    """Inductor's outputs and gradients; no break in a graph, and nothing that later steps compile anew."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    made: Any = network(family, **DEEPER[family])
    fuse(made)
    denoise = Denoiser(made)

    def results(seed: int) -> list[torch.Tensor]:
        x, t, text = inputs(family, 2, seed)
        x.requires_grad_()
        prediction = denoise(x, t, text)
        product = (prediction * torch.linspace(-1, 1, prediction.numel()).view(prediction.shape)).sum()
        leaves = [x, *made.parameters()]
        return [prediction, *torch.autograd.grad(product, leaves, allow_unused=True, materialize_grads=True)]

    expected = [results(seed) for seed in range(3)]
    compile_network(made, mode)
    graphs = GRAPHS.get(family, 1) if mode == "regional" else 1
    for seed in range(3):
        mine = results(seed)
        largest = max(float(each.norm()) for each in expected[seed])
        for one, other in zip(mine, expected[seed], strict=True):
            assert (one - other).norm() <= 1e-4 * max(float(other.norm()), 1e-3 * largest)
        assert counters["stats"]["unique_graphs"] == graphs and not counters["graph_break"]
    torch._dynamo.reset()


#: Where layers of blocks are left whole, and why.
MODULATES = "it modulates a norm"


@pytest.mark.parametrize("family", families("sana", "qwen_image")[4:])
def test_the_layers_of_a_familys_blocks_are_quantised_or_named(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Modulation stays, whatever it is called; so do the layers in front of blocks and behind them."""
    monkeypatch.setattr("diffpp_fast.networks.quantization.SMALLEST", 1)
    made, given = network(family), inputs(family, 2)
    denoise = Denoiser(made)
    with torch.no_grad():
        before = denoise(*given)
        count = quantize(made, "float8")
        after = denoise(*given)
    assert (after - before).norm() <= 0.2 * before.norm()
    rows = quantization_report(made, "float8")
    taken = [row for row in rows if row.quantized]
    assert len(taken) == count and all("blocks" in row.name for row in taken)
    left = Counter(row.reason for row in rows if not row.quantized and "blocks" in row.name)
    # Sana and FLUX.2 have tables in place of layers, or layers that all blocks share.
    assert set(left) == ({MODULATES} if family in ("stable_diffusion_3", "flux", "qwen_image") else set())
    assert not any("mod" in row.name for row in taken)
