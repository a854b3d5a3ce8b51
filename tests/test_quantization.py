"""Frozen networks in 8 or 4 bits: which layers, how many bytes, gradients through them, and runs on a reference."""

from __future__ import annotations

import copy
import csv
import re
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from rich.console import Console
from torch import Tensor, nn

from benchmarks import quantized
from benchmarks.__main__ import main as benchmark
from benchmarks.memory import alive_bytes
from diffpp_fast import networks
from diffpp_fast.cli.main import main
from diffpp_fast.networks.lora import Adapters
from diffpp_fast.networks.quantization import KINDS, is_quantized, stored_bytes
from diffpp_fast.training import Config, ConfigurationError, Trainer, load_config
from diffpp_fast.training.build import build_run, build_sampler
from diffpp_fast.training.checkpoint import read_tensors
from diffpp_fast.training.distributed import World
from diffpp_fast.training.loading import dump_config
from diffpp_fast.training.phases import Phases
from diffpp_fast.training.planning.plan import count_run, make_plan, run_of
from diffpp_fast.training.planning.report import print_plan
from diffpp_fast.training.planning.states import states_of
from diffpp_fast.training.planning.timing import GPUS

pytest.importorskip("bitsandbytes")
every_kind = pytest.mark.parametrize("kind", KINDS)
#: Wide enough for layers that are worth it.
WIDE: dict[str, Any] = {"block_out_channels": (32, 64), "attention_head_dim": 16, "norm_num_groups": 8}
#: Rounding of a weight is at most this share of its row's largest; bitsandbytes' int8 rounds to float16 before.
STEP = {"int8": 0.55 / 127, "nf4": 0.16, "float8": 0.036}


def frozen_unet() -> Any:
    return tiny.unet(**WIDE).eval().requires_grad_(False)


def called(network: Any, x: Tensor) -> Tensor:
    text = torch.ones(2, 5, tiny.TEXT_WIDTH, dtype=x.dtype)
    output: Tensor = network(x, timestep=torch.tensor([3, 900]), encoder_hidden_states=text, return_dict=False)[0]
    return output


def latents(dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, *tiny.LATENT, generator=generator).to(dtype).requires_grad_()


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.detach().double() - wanted.detach().double()).norm() / wanted.detach().double().norm())


def held_bytes(network: nn.Module) -> int:
    """Bytes of all that a network's layers hold, scales of bitsandbytes included."""
    tensors: dict[int, Tensor] = {}
    for layer in network.modules():
        own: list[Tensor | None] = [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]
        weight, state = vars(layer)["_parameters"].get("weight"), vars(layer).get("state")
        own += [getattr(weight, "SCB", None), getattr(state, "SCB", None)]
        quant_state = getattr(weight, "quant_state", None)
        own += [] if quant_state is None else [quant_state.absmax, quant_state.code]
        tensors |= {tensor.data_ptr(): tensor for tensor in own if tensor is not None}
    return sum(tensor.nbytes for tensor in tensors.values())


@every_kind
def test_the_layers_of_blocks_are_quantised_and_all_else_is_left(kind: str) -> None:
    network = frozen_unet()
    plain = {name: part for name, part in network.named_modules() if isinstance(part, (nn.Linear, nn.Conv2d))}
    before = {name: layer.weight.clone() for name, layer in plain.items()}
    random = torch.get_rng_state()
    count = networks.quantize(network, kind)
    assert torch.equal(torch.get_rng_state(), random)
    assert networks.quantize(network, kind) == 0
    rows = networks.quantization_report(network, kind)
    assert count == sum(row.quantized for row in rows) > 20
    for row in rows:
        layer: Any = network.get_submodule(row.name)
        inside = "transformer_blocks" in row.name or (kind == "float8" and "resnets" in row.name)
        left = not inside or "time_emb" in row.name or plain[row.name].weight.numel() < 4096
        assert row.quantized == (not left) == is_quantized(layer) == (row.reason is None)
        if left:
            assert layer is plain[row.name] and torch.equal(layer.weight, before[row.name])


@every_kind
def test_a_layer_is_the_product_with_its_rounded_weight(kind: str) -> None:
    layer = nn.Linear(64, 96)
    blocks: Any = nn.Module()
    blocks.transformer_blocks = nn.Sequential(copy.deepcopy(layer))
    assert networks.quantize(blocks.requires_grad_(False), kind) == 1
    quantized = blocks.transformer_blocks[0]
    x = torch.randn(40, 64, requires_grad=True)
    y = quantized(x)
    rows = torch.stack([torch.autograd.grad(y[0, row], x, retain_graph=True)[0][0] for row in range(96)])
    rounded = (rows - layer.weight.detach()).abs().amax(1) / layer.weight.detach().abs().amax(1)
    assert 0.0 < float(rounded.max()) <= STEP[kind]
    # int8 rounds its input as well.
    assert error(y.detach(), x.detach() @ rows.T + layer.bias) < (0.01 if kind == "int8" else 1e-5)


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_and_input_gradients_are_near_those_of_the_whole_weights(kind: str, dtype: torch.dtype) -> None:
    whole = frozen_unet()
    network = nn.Module.to(copy.deepcopy(whole), dtype)
    networks.quantize(network, kind)
    networks.fuse(network)
    x = latents()
    exact = called(whole, x)
    (exact_gradient,) = torch.autograd.grad(exact.square().sum(), x)
    for freeze in (False, True):
        if freeze:
            networks.freeze(network)
        low = latents(dtype)
        output = called(network, low)
        (gradient,) = torch.autograd.grad(output.float().square().sum(), low)
        assert 0 < error(output.detach(), exact.detach()) < 0.1
        assert 0 < error(gradient, exact_gradient) < 0.15


def test_freezing_says_that_quantised_convolutions_keep_nothing() -> None:
    network = frozen_unet()
    networks.quantize(network, "float8")
    networks.freeze(network)
    left = {row.name: row.reason or "" for row in networks.freezing_report(network) if not row.frozen}
    assert left and all(is_quantized(network.get_submodule(name)) for name in left)
    assert all("keeps nothing" in reason for reason in left.values())


@every_kind
def test_no_quantised_layer_keeps_its_input(kind: str) -> None:
    layers = [nn.Linear(64, 64, bias=False) for _ in range(4)]
    blocks: Any = nn.Sequential()
    blocks.transformer_blocks = nn.Sequential(*layers)
    networks.quantize(blocks.requires_grad_(False), kind)
    x = torch.randn(256, 64)
    kept = alive_bytes(blocks.transformer_blocks, x, blocks)
    assert kept <= x.nbytes * 1.1, "the result alone, and scales"


@every_kind
def test_the_same_weights_give_the_same_bits(kind: str) -> None:
    first, second = frozen_unet(), frozen_unet()
    for network in (first, second):
        networks.quantize(network, kind)
    x = latents().detach()
    assert torch.equal(called(first, x), called(second, x))
    assert torch.equal(called(first, x), called(copy.deepcopy(first), x))


@every_kind
def test_a_quantised_layer_is_traced_whole(kind: str) -> None:
    network: Any = nn.Module()
    network.transformer_blocks = nn.Sequential(nn.Linear(64, 64))
    network.resnets = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1))
    networks.quantize(network.requires_grad_(False), kind)
    for layer, shape in ((network.transformer_blocks, (8, 64)), (network.resnets, (1, 16, 4, 4))):
        x = torch.randn(shape, requires_grad=True)
        traced = torch.compile(layer, backend="aot_eager", fullgraph=True)
        for found, wanted in zip(gradient_of(traced, x), gradient_of(layer, x), strict=True):
            assert torch.allclose(found, wanted, atol=1e-6)


def gradient_of(layer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    output = layer(x)
    return output.detach(), torch.autograd.grad(output.square().sum(), x)[0]


@every_kind
def test_adapters_train_on_a_quantised_network(kind: str) -> None:
    network = frozen_unet()
    networks.quantize(network, kind)
    x = latents().detach()
    plain = called(network, x)
    adapters = Adapters(network)
    parameters = adapters.add("fake", rank=2, alpha=2, targets=["to_q", "ff.net.0.proj"], seed=7, stream=4)
    with adapters.active("fake"):
        assert torch.equal(called(network, x), plain)
        called(network, x).square().sum().backward()
    grads = {name: weight.grad for name, weight in parameters.items()}
    assert all(grad is not None and grad.dtype == torch.float32 for grad in grads.values())
    assert all(bool(grad.any()) for name, grad in grads.items() if ".lora_B." in name and grad is not None)


def test_refusals_name_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    network = frozen_unet()
    with pytest.raises(ValueError, match="'int4' is unknown; known: int8, nf4, float8"):
        networks.quantize(network, "int4")
    trained: Any = tiny.unet(**WIDE)
    trained.conv_in.weight.grad = torch.zeros_like(trained.conv_in.weight)
    with pytest.raises(ValueError, match=r"is trained: conv_in.weight holds a gradient.*train adapters"):
        networks.quantize(trained, "nf4")
    frozen = frozen_unet()
    networks.freeze(frozen)
    with pytest.raises(ValueError, match=r"call networks\.unfreeze"):
        networks.quantize(frozen, "nf4")
    with pytest.raises(ValueError, match=r"float16.*bfloat16"):
        networks.quantize(nn.Module.to(frozen_unet(), torch.float16), "float8")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match=r"nf4 is bitsandbytes', .*\[gpu\].* or use float8"):
        networks.quantize(network, "nf4")
    assert not any(is_quantized(part) for part in network.modules())


# Runs.


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_base(tmp_path_factory.mktemp("base"), "stable_diffusion", **WIDE)


@pytest.fixture
def config_of(base: Path, tmp_path: Path):  # type: ignore[no-untyped-def]
    def load(kind: str, *overrides: str, output: str = "run") -> Config:
        return load_config(base, [f"output={tmp_path / output}", f"models.reference.quantization={kind}", *overrides])

    return load


BOTH = ("models.generator.lora.rank=2", "models.fake.lora.rank=2")


@pytest.mark.parametrize("kind", ["nf4", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("int8", "float8"))])
def test_a_run_on_a_quantised_reference_resumes_to_the_same_bits(kind: str, config_of) -> None:  # type: ignore[no-untyped-def]
    whole = Trainer(config_of(kind, *BOTH, "training.steps=2", output="straight"))
    whole.run()
    assert whole.generator.network is whole.fake.network, "roles share the quantised copy"
    assert any(is_quantized(part) for part in whole.generator.network.modules())
    Trainer(config_of(kind, *BOTH, output="cut")).run()
    resumed = Trainer(config_of(kind, *BOTH, "training.steps=2", output="cut"), resume="latest")
    resumed.run()
    for name, weight in resumed.generator.parameters.items():
        assert torch.equal(weight, whole.generator.parameters[name]), name
    # Exported are the weights as they are stored, with the adapters' update.
    exported = read_tensors(Path(resumed.config.output) / "generator" / "diffusion_pytorch_model.safetensors")
    source = tiny.unet(**WIDE).state_dict()
    assert exported.keys() == source.keys()
    same = {name: torch.equal(tensor, source[name]) for name, tensor in exported.items()}
    assert all(
        equal != ("attn" in name and name.endswith(("q.weight", "k.weight", "v.weight", "0.weight")))
        for name, equal in same.items()
    )


@pytest.mark.parametrize(
    ("method", "kind"),
    [("sid", "int8"), *(pytest.param("didr", kind, marks=pytest.mark.slow) for kind in KINDS)],
)
def test_methods_that_differentiate_the_reference_train_through_it(kind: str, method: str, config_of) -> None:  # type: ignore[no-untyped-def]
    reward = ["rewards.optimised=null"] if method == "sid" else []
    trainer = Trainer(config_of(kind, f"method.name={method}", *reward))
    trainer.run()
    assert all(not is_quantized(part) for part in trainer.generator.network.modules()), "trained weights stay whole"


@pytest.mark.parametrize(("kind", "dtype"), [("int8", "float32"), ("nf4", "bfloat16"), ("float8", "bfloat16")])
def test_the_plan_has_the_bytes_of_the_quantised_reference(kind: str, dtype: str, config_of) -> None:  # type: ignore[no-untyped-def]
    config = config_of(kind, f"models.reference.dtype={dtype}")
    run = run_of(config)
    planned = states_of(run, count_run(run))["reference"].weights
    built = build_run(config, World.alone("cpu"), Phases(torch.device("cpu")))
    # Tensors of a few numbers, such as the tables of steps, are in both.
    assert planned == pytest.approx(held_bytes(built.reference), rel=0.01)
    console = Console(width=120, record=True, file=StringIO())
    print_plan(make_plan(run, GPUS["h100"]), [], console)
    assert f"reference replica in {kind}" in console.export_text()
    whole = run_of(config_of("null", f"models.reference.dtype={dtype}"))
    assert planned < states_of(whole, count_run(whole))["reference"].weights


def test_bytes_of_a_weight() -> None:
    assert stored_bytes(torch.Size([64, 128]), "int8") == 64 * 128 + 4 * 64
    assert stored_bytes(torch.Size([64, 16, 3, 3]), "float8") == 64 * 144 + 4 * 64
    assert stored_bytes(torch.Size([64, 128]), "nf4") == 64 * 64 + 4 * 128 + 64


@pytest.mark.parametrize(
    ("kind", "override", "said"),
    [
        ("int4", "", "models.reference.quantization should be 'int8', 'nf4' or 'float8'"),
        ("nf4", "distributed.reference=shard", "use distributed.reference=replica"),
        ("float8", "models.reference.dtype=float16", "overflow in float16"),
        ("null", "models.generator.quantization=nf4", "models.reference.quantization"),
    ],
)
def test_configurations_that_do_not_serve_are_refused(kind: str, override: str, said: str, config_of) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigurationError, match=said):
        config_of(kind, *filter(None, [override]))


def test_bitsandbytes_is_missed_before_work_begins_and_where_it_is_needed(  # type: ignore[no-untyped-def]
    config_of, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of("nf4")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    said = r"models\.reference\.quantization: .*bitsandbytes.*\[gpu\]"
    with pytest.raises(ConfigurationError, match=said):
        build_run(config, World.alone("cpu"), Phases(torch.device("cpu")))
    file = Path(config.output).parent / "nf4.yaml"
    file.write_text(dump_config(config))
    assert main(["train", str(file), "--dry-run"]) == 2
    assert re.search(said, capsys.readouterr().err)
    build_sampler(config, torch.device("cpu"))  # which has no reference
    with pytest.raises(ConfigurationError, match=said):
        build_sampler(config_of("nf4", "models.generator.lora.rank=2"), torch.device("cpu"))


def test_a_reference_without_layers_for_it_is_refused(tmp_path: Path) -> None:
    config = load_config(
        tiny.write_base(tmp_path / "base", "stable_diffusion"),
        [f"output={tmp_path / 'run'}", "models.reference.quantization=nf4"],
    )
    with pytest.raises(ConfigurationError, match=r"models\.reference\.quantization: nf4 finds no layer"):
        build_run(config, World.alone("cpu"), Phases(torch.device("cpu")))


def test_the_command_that_measures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def tiny_network(name: str) -> tuple[Any, dict[str, Any]]:
        return frozen_unet(), {"encoder_hidden_states": torch.randn(1, 5, tiny.TEXT_WIDTH)}

    monkeypatch.setattr(quantized, "_network", tiny_network)
    monkeypatch.setattr(quantized, "SIDE", tiny.LATENT[1])
    threads = str(torch.get_num_threads())
    assert benchmark(["quantized", "--models", "small", "--threads", threads, "--out", str(tmp_path / "out.csv")]) == 0
    assert "\n| small | nf4 | " in capsys.readouterr().out
    with (tmp_path / "out.csv").open(newline="") as file:
        rows = {row["reference"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["bfloat16", *KINDS]
    errors = {name: float(row["error_w1"]) for name, row in rows.items()}
    assert 0 < errors["int8"] < errors["nf4"] < 1 and errors["int8"] < errors["float8"]
    assert all(int(rows[kind]["weights_bytes"]) < int(rows["bfloat16"]["weights_bytes"]) for kind in KINDS)
