"""Trained networks: against loops written by hand, spread over processes, and through files from any engine to any."""

from __future__ import annotations

import ast
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import engine_worker
import processes
import pytest
import tiny
import torch
from engine_worker import EMA, SETTINGS, UPDATES, Network, Two, make, numbers, samples, train
from safetensors.torch import load_file
from torch import nn

from diffpp_fast.errors import CheckpointError, ConfigurationError
from diffpp_fast.tensor_files import StoredTensors, TensorWriter
from diffpp_fast.training import config
from diffpp_fast.training.distributed import World
from diffpp_fast.training.engines import PlainEngine, zero
from diffpp_fast.training.engines.deepspeed import zero_config
from diffpp_fast.training.engines.optimizers import (
    CHUNK,
    OptimizerState,
    dequantise,
    learning_rate,
    make_optimizer,
    quantise,
    updates_of,
)
from diffpp_fast.training.engines.shards import Fragment, approach, receivers

WORKER = str(Path(__file__).parent / "engine_worker.py")
ALONE = World.alone("cpu")


def by_hand(updates: int, *, skipped: tuple[int, ...] = (), settings: config.Optimizer = SETTINGS) -> dict[str, Any]:
    """The engine's arithmetic in float64 with nothing but tensors: clipping, AdamW, warm-up and cosine, average."""
    network = Network(seed=0).double()
    weights = dict(network.named_parameters())
    mean = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    square = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    average = {name: weight.detach().clone() for name, weight in weights.items()}
    assert settings.betas is not None and settings.eps is not None
    (beta1, beta2), norms, step = settings.betas, [], 0
    for update in range(updates):
        loss = network(samples(update).double()).square().mean()
        gradients = dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))
        norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients.values()))
        if update in skipped:
            norms.append(math.nan)
            continue
        norms.append(norm)
        step += 1
        rate = settings.lr * (update + 1) / settings.warmup_steps
        if update >= settings.warmup_steps:
            share = (update - settings.warmup_steps) / (UPDATES - 1 - settings.warmup_steps)
            low = settings.final_lr * settings.lr
            rate = low + (settings.lr - low) * (1 + math.cos(math.pi * share)) / 2
        decay = min(EMA.decay, (1 + update) / (10 + update))
        for name, weight in weights.items():
            factor = 1 / norm if settings.normalize else min(1.0, settings.clip / norm) if settings.clip else 1.0
            gradient = gradients[name] * factor
            mean[name] = beta1 * mean[name] + (1 - beta1) * gradient
            square[name] = beta2 * square[name] + (1 - beta2) * gradient.square()
            direction = mean[name] / (1 - beta1**step) / ((square[name] / (1 - beta2**step)).sqrt() + settings.eps)
            with torch.no_grad():
                weight -= rate * (direction + settings.weight_decay * weight)
            average[name] = decay * average[name] + (1 - decay) * weight.detach()
    return {
        **{f"weights.{name}": weight.detach() for name, weight in weights.items()},
        **{f"averages.{name}": tensor for name, tensor in average.items()},
        "norms": norms,
    }


def assert_near(actual: Mapping[str, torch.Tensor], expected: Mapping[str, Any], relative: float) -> None:
    """Every tensor's distance, in norms of the expected one."""
    for name, tensor in expected.items():
        if name != "norms":
            distance = (actual[name].double() - tensor.double()).norm() / tensor.double().norm()
            assert distance <= relative, f"{name} is {float(distance):.2e} off"


def assert_same_norms(actual: list[float], expected: list[float]) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert math.isfinite(one) == math.isfinite(other)
        assert not math.isfinite(other) or one == pytest.approx(other, rel=1e-5)


def assert_equal(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def plain(**changes: Any) -> Any:
    return make("plain", ALONE, **{"network": Network(seed=0), **changes})


def test_the_plain_engine_equals_a_loop_written_by_hand() -> None:
    engine, expected = plain(), by_hand(8, skipped=(4,))
    assert_same_norms(train(engine, ALONE, range(8), poisoned=[4]), expected["norms"])
    assert_near(numbers(engine), expected, 1e-6)
    assert (engine.updates, engine.applied) == (8, 7)


def test_normalised_steps_are_those_of_gradients_divided_by_their_norm() -> None:
    settings = SETTINGS.model_copy(update={"clip": None, "normalize": True})
    engine, expected = plain(settings=settings), by_hand(8, skipped=(4,), settings=settings)
    assert_same_norms(train(engine, ALONE, range(8), poisoned=[4]), expected["norms"])
    assert_near(numbers(engine), expected, 1e-6)


@pytest.mark.parametrize("skipped", [0.0, 1.0])
def test_the_average_of_a_gpu_is_lerp_to_the_bit_and_stays_where_an_update_was_skipped(skipped: float) -> None:
    torch.manual_seed(0)
    weights, averages = ([torch.randn(shape) for shape in ((3, 5), (7,), ())] for _ in range(2))
    expected = [
        average if skipped else average.lerp(weight, 0.3) for weight, average in zip(weights, averages, strict=True)
    ]
    approach(averages, weights, 0.3, torch.tensor(skipped))
    assert all(map(torch.equal, averages, expected))


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "lion8bit"])
def test_a_gradient_that_is_not_finite_changes_nothing(name: str) -> None:
    settings = config.Optimizer(name=name, lr=0.05, clip=0.5)
    engine = plain(settings=settings)
    train(engine, ALONE, range(2))
    for trouble in ({"poisoned": [2]}, {"scale": math.inf}, {"scale": 1e30}):
        with engine_worker.unchanged(engine):
            assert not math.isfinite(train(engine, ALONE, [2], **trouble)[0])
    assert engine.updates == 5
    before = numbers(engine)
    assert math.isfinite(train(engine, ALONE, [3])[0])
    assert not torch.equal(numbers(engine)["weights.first.weight"], before["weights.first.weight"])


def test_an_update_by_torch_never_reads_from_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = plain()
    train(engine, ALONE, [0])
    engine.network(samples(1)).square().mean().backward()
    for name in ("item", "__bool__", "__float__", "tolist"):
        monkeypatch.setattr(torch.Tensor, name, lambda self: pytest.fail("a host sync"))
    engine.step()


def test_averages_come_in_and_go_out_to_the_bit() -> None:
    engine = plain()
    train(engine, ALONE, range(3))
    state = engine.full_state(averaged=True)
    weight = engine.network.first.weight
    before, place = weight.detach().clone(), weight.data_ptr()
    with engine_worker.unchanged(engine), pytest.raises(KeyError), engine.averaged():
        assert torch.equal(weight, state["first.weight"]) and not torch.equal(weight, before)
        raise KeyError
    assert torch.equal(weight, before) and weight.data_ptr() == place


def test_without_an_average_the_weights_are_used() -> None:
    network = Network(0)
    engine = PlainEngine("fake", network, dict(network.named_parameters()), SETTINGS, UPDATES, ALONE)
    train(engine, ALONE, [0])
    with engine.averaged():
        assert_equal(engine.full_state(averaged=True), network.state_dict())


def test_the_whole_state_has_the_buffers_and_the_names_of_the_network() -> None:
    engine = plain()
    state = engine.full_state(averaged=False)
    assert list(state) == list(engine.network.state_dict())
    assert_equal(state, engine.network.state_dict())
    train(engine, ALONE, [0])
    assert not torch.equal(state["first.weight"], engine.network.first.weight), "it is no copy"


def test_a_part_of_a_network_is_trained_alone(tmp_path: Path) -> None:
    network = Network(0).requires_grad_(False)
    frozen = network.second.weight.clone()
    parameters = {"first.weight": network.first.weight}
    engine = PlainEngine("fake", network, parameters, SETTINGS, UPDATES, ALONE, EMA)
    train(engine, ALONE, range(2))
    assert torch.equal(network.second.weight, frozen) and network.second.weight.grad is None
    assert list(engine.full_state(averaged=True)) == list(network.state_dict())
    engine.write(tmp_path)
    assert list(load_file(tmp_path / "fake.safetensors")) == ["first.weight"]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_files_hold_whole_tensors_by_name_and_bring_back_every_bit(tmp_path: Path, layout: torch.memory_format) -> None:
    class Convolution(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(5, 4, 3, padding=1).to(memory_format=layout)
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.scale * self.layer(x[:, :, None, None])

    engine, again = plain(network=Convolution()), plain(network=Convolution())
    engine.network.layer.weight.data[0, 0] = -0.0
    train(engine, ALONE, range(3))
    engine.write(tmp_path)
    weights, state = (
        load_file(tmp_path / "generator.safetensors"),
        load_file(tmp_path / "generator_optimizer.safetensors"),
    )
    assert_equal(weights, dict(engine.network.named_parameters()))
    assert state["updates"] == 3 and state["step"] == 3 and state["layer.weight.exp_avg"].shape == (4, 5, 3, 3)
    again.read(tmp_path)
    for one in (engine, again):
        train(one, ALONE, range(3, 6), poisoned=[4])
    assert_equal(numbers(again), numbers(engine))


@pytest.mark.parametrize("name", ["adamw8bit", "lion8bit"])
def test_the_state_of_8_bits_comes_back_to_the_bit(tmp_path: Path, name: str) -> None:
    # Large enough for bitsandbytes to use 8 bits, and no multiple of its blocks.
    settings = config.Optimizer(name=name, lr=0.01)
    engine, again = (plain(settings=settings, network=nn.Linear(5, 1021)) for _ in range(2))
    train(engine, ALONE, range(3))
    engine.write(tmp_path)
    again.read(tmp_path)
    for number, tensor in enumerate(engine.shards.tensors):
        kept, found = engine.optimizer.state[tensor], again.optimizer.state[again.shards.tensors[number]]
        assert all(torch.equal(torch.as_tensor(kept[key]), torch.as_tensor(found[key])) for key in kept)
    assert engine.optimizer.state[engine.shards.tensors[0]]["state1"].dtype == torch.uint8
    for one in (engine, again):
        train(one, ALONE, range(3, 5))
    assert_equal(numbers(again), numbers(engine))


def test_quantisation_undoes_dequantisation_whatever_the_signs() -> None:
    from bitsandbytes import functional

    signed, unsigned = (functional.create_dynamic_map(signed=sign) for sign in (True, False))
    for table in (signed, unsigned):
        codes = torch.randint(0, 256, (CHUNK + 3 * 256 + 5,), dtype=torch.uint8)
        scales = torch.rand(-(-len(codes) // 256)) * 10.0 ** torch.randint(-9, 3, (-(-len(codes) // 256),))
        # As an optimizer leaves them, every block has a number of its full scale: the first, or with a sign the lowest.
        codes[::256] = torch.where(torch.arange(len(scales)) % 2 == 0, 255, 0 if table[0] < 0 else 255).to(torch.uint8)
        codes[1::2] = codes[1::2].clamp(1, 254) if table[0] < 0 else codes[1::2]
        scales[7] = 0.0
        values = dequantise(codes, table, scales)
        assert torch.equal(dequantise(*_swap(quantise(values, table), table)), values)
    fresh = torch.randn(5000)
    back = dequantise(*_swap(quantise(fresh, signed), signed))
    assert (back - fresh).abs().max() < 0.04 * fresh.abs().max()


def _swap(quantised: tuple[torch.Tensor, torch.Tensor], table: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return quantised[0], table, quantised[1]


def test_adamw_reads_what_8_bits_wrote(tmp_path: Path) -> None:
    eight = plain(settings=config.Optimizer(name="adamw8bit", lr=0.01), network=nn.Linear(5, 1021))
    train(eight, ALONE, range(3))
    eight.write(tmp_path)
    full = plain(settings=config.Optimizer(lr=0.01), network=nn.Linear(5, 1021))
    full.read(tmp_path)
    state, kept = OptimizerState(full.optimizer), OptimizerState(eight.optimizer)
    for one, other in zip(full.shards.tensors, eight.shards.tensors, strict=True):
        assert torch.equal(state.get(one, "exp_avg_sq"), kept.get(other, "exp_avg_sq")) and state.get_step(one) == 3


def test_files_that_can_not_be_read_are_named(tmp_path: Path) -> None:
    engine = plain()
    with pytest.raises(CheckpointError, match=r"holds no weights of generator$"):
        engine.read(tmp_path)
    engine.write(tmp_path)
    with pytest.raises(CheckpointError, match=r"generator has first.weight in shape \[7, 5\], not \[3, 3\]"):
        plain(network=_named(nn.Linear(3, 3))).read(tmp_path)
    with pytest.raises(CheckpointError, match=r"generator holds no layer\.weight"):
        plain(network=Two(0)).read(tmp_path)
    (tmp_path / "generator.safetensors").rename(tmp_path / "generator-00002-of-00003.safetensors")
    with pytest.raises(CheckpointError, match="parts of generator are missing, there are only generator-00002"):
        engine.read(tmp_path)
    (tmp_path / "generator.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"generator.safetensors can't be read as safetensors"):
        engine.read(tmp_path)


def _named(layer: nn.Linear) -> nn.Module:
    network = nn.Module()
    network.first = layer
    return network


def test_a_file_is_written_and_read_in_pieces(tmp_path: Path) -> None:
    tensors = {"matrix": torch.randn(7, 3, 2), "vector": torch.randn(11), "number": torch.tensor(5)}
    with TensorWriter(tmp_path / "all.safetensors", [(n, t.dtype, t.shape) for n, t in tensors.items()]) as writer:
        for tensor in tensors.values():
            writer.write(tensor)
    assert_equal(load_file(tmp_path / "all.safetensors"), tensors)
    stored = StoredTensors([tmp_path / "all.safetensors"])
    for start, count in ((0, 42), (5, 1), (6, 6), (7, 23), (41, 1), (3, 0)):
        part = stored.elements("matrix", start, count)
        assert torch.equal(part, tensors["matrix"].flatten()[start : start + count])
    assert torch.equal(stored.elements("vector", 4, 5), tensors["vector"][4:9])


def test_writers_share_the_bytes_in_order() -> None:
    fragments = [Fragment(str(size), torch.Size([size]), 0, size, 0, 0) for size in (10, 10, 5, 5, 10, 100, 1)]
    assert receivers(fragments, 1) == [0] * 7
    assert receivers(fragments, 3) == [0, 0, 0, 0, 0, 0, 2]
    assert receivers(fragments[:4], 3) == [0, 1, 2, 2]
    assert receivers(fragments[:1], 8) == [0]


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2]),
        ("cosine", [0.5, 1.0, 1.0, 0.2 + 0.4 * (1 + 0.5**0.5), 0.6, 0.2 + 0.4 * (1 - 0.5**0.5), 0.2]),
    ],
)
def test_learning_rates_warm_up_and_end_at_the_last_update(schedule: Any, rates: list[float]) -> None:
    low = 0.0 if schedule == "constant" else 0.2
    settings = config.Optimizer(lr=1.0, warmup_steps=2, schedule=schedule, final_lr=low)
    assert [learning_rate(settings, update, 7) for update in range(7)] == pytest.approx(rates)
    assert learning_rate(settings, 50, 7) == pytest.approx(rates[-1])
    assert learning_rate(settings, 2, 3) == pytest.approx(rates[-1])


def test_the_fake_score_has_more_updates() -> None:
    settings = {"training": {"steps": 10, "fake_warmup": 3}, "method": {"fake_rounds": 5}}
    run: Any = type("Run", (), {key: type("Part", (), value) for key, value in settings.items()})
    assert (updates_of("generator", run), updates_of("fake", run)) == (10, 53)


def test_clipping_is_always_written_for_deepspeed() -> None:
    for clip, written in ((None, 0.0), (0.5, 0.5)):
        made = zero_config(config.Zero(), bfloat16=True, clip=clip, nvme_path=None)
        assert made["gradient_clipping"] == written
        assert made["communication_data_type"] == made["data_types"]["grad_accum_dtype"] == "fp32"


def test_several_processes_need_another_engine() -> None:
    with pytest.raises(ConfigurationError, match=r"there are 4: use distributed\.engine=deepspeed, or auto"):
        make("plain", World(1, 4, 1, torch.device("cpu")))


def test_stage_3_wants_the_whole_network() -> None:
    from diffpp_fast.training.engines import DeepSpeedEngine

    network = Network(0)
    few = {"first.weight": network.first.weight}
    with pytest.raises(ConfigurationError, match=r"distributed.fake.stage is 3, but only 1 of .* Use stage 2"):
        DeepSpeedEngine("fake", network, few, SETTINGS, UPDATES, ALONE, zero=config.Zero(stage=3))


def test_a_missing_package_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigurationError, match=r"lion8bit is bitsandbytes': pip install .*\[gpu\]\", or use adamw"):
        make_optimizer(Network(0).parameters(), config.Optimizer(name="lion8bit", lr=1e-3))
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ConfigurationError, match=r"needs DeepSpeed: DS_BUILD_OPS=0 pip install .*\[distributed\]"):
        make(2, ALONE)


def test_lion_takes_its_own_betas() -> None:
    assert make_optimizer(Network(0).parameters(), config.Optimizer(name="lion8bit", lr=1e-3)).defaults["betas"] == (
        0.9,
        0.99,
    )


def check_on_two_processes(folder: Path, kinds: tuple[str, ...]) -> None:
    """Every stage against the loop by hand, and files from one process to two and back."""
    one, middle, end = plain(), by_hand(6, skipped=(4,)), by_hand(8, skipped=(4,))
    train(one, ALONE, range(6), poisoned=[4])
    (folder / "plain").mkdir()
    one.write(folder / "plain")
    processes.run(["-W", "ignore", WORKER, str(folder), ",".join(kinds)], 2)
    norms = json.loads((folder / "norms.of.2.json").read_text())
    for kind in kinds:
        name = f"{kind}.of.2"
        assert_same_norms(norms[kind], middle["norms"])
        found = load_file(folder / f"{name}.middle.safetensors")
        assert_near(found, middle, 1e-6)
        assert_near(load_file(folder / f"{name}.end.safetensors"), end, 1e-6)
        assert_near(load_file(folder / f"{name}.from_plain.safetensors"), end, 1e-6)
        one.read(folder / name)
        assert one.updates == 6
        assert_equal(numbers(one), {key: tensor for key, tensor in found.items() if key != "inside"})
        train(one, ALONE, range(6, 8))
        assert_near(numbers(one), end, 1e-6)
        # What the network computed with its averages is what they give.
        network = Network(0).double()
        for weight_name, weight in network.named_parameters():
            weight.data = middle[f"averages.{weight_name}"]
        expected = network(samples(0).double()).detach()
        torch.testing.assert_close(found["inside"].double(), expected, rtol=1e-5, atol=1e-6)
    generator, fake = plain(), plain(role="fake", network=Two(0))
    engine_worker.in_turns(generator, fake, Two(7), ALONE)
    pairs = list(folder.glob("two.*.fake.safetensors"))
    assert pairs
    for path in pairs:
        assert_near(load_file(path), numbers(fake), 1e-6)
        assert_near(load_file(path.with_name(path.name.replace(".fake", ""))), numbers(generator), 1e-6)


def test_deepspeeds_private_names_are_named_and_are_there() -> None:
    """The one file that uses them lists them all, and a DeepSpeed without one of them is told of in a sentence."""
    source = Path(zero.__file__).read_text()
    listed = {name for names in zero.PRIVATE.values() for name in names}
    used = {
        node.attr
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Attribute | ast.Name)
        and ast.unparse(node.value)
        in ("optimizer", "self._optimizer", "self._engine", "weight", "place", "mapping", "deepspeed.ops")
    }
    public = {"optimizer", "param_groups", "shape"}
    assert used - public == listed - {"all_gather"}
    others = [path for path in Path(zero.__file__).parent.glob("*.py") if path != Path(zero.__file__)]
    assert not re.search(r"_deepspeed\.(optimizer|_)|__compatible_ops__", "".join(path.read_text() for path in others))
    processes.run(["-W", "ignore", WORKER, "private"], 1)


def test_two_processes_equal_one_and_read_each_other(tmp_path: Path) -> None:
    check_on_two_processes(tmp_path, ("0", "1", "2", "2-cpu"))


@pytest.mark.slow
def test_two_processes_equal_one_in_the_other_stages(tmp_path: Path) -> None:
    check_on_two_processes(tmp_path, ("1-cpu", "2", "3", "3-cpu"))


ALONE_SCRIPT = """
import os, sys
from diffpp_fast.cli.main import main

code = main(["train", *sys.argv[1:]])
assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} & os.environ.keys()
sys.exit(code)
"""
OFFLOADED = (
    "distributed.engine=deepspeed",
    "distributed.reference=offload",
    "distributed.generator={stage: 2, offload_optimizer: cpu}",
    "distributed.fake={stage: 3, offload_optimizer: cpu, offload_parameters: cpu}",
)


@pytest.mark.slow
def test_one_process_without_a_launcher_offloads(tmp_path: Path) -> None:
    config = tiny.write(tmp_path)
    short = [str(config), "training.steps=2", "training.grid_every=null", "rewards.held_out=null"]
    # With the usual eps Adam's first updates are sign(g), which magnifies rounding.
    short += ["optimizers.generator.eps=1e-2", "optimizers.fake.eps=1e-2"]
    launched = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in launched}
    for name, settings in (("plain", ()), ("offloaded", OFFLOADED)):
        command = [sys.executable, "-c", ALONE_SCRIPT, *short, f"output={tmp_path / name}", *settings]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    for file in ("generator", "fake", "generator_ema"):
        plain, offloaded = (
            load_file(tmp_path / name / "checkpoints" / "step_000002" / f"{file}.safetensors")
            for name in ("plain", "offloaded")
        )
        # All weights at once, as between numbers of processes: of biases, which begin at 0, there is only the update.
        flat, other = (torch.cat([whole[name].flatten() for name in sorted(plain)]) for whole in (plain, offloaded))
        assert plain.keys() == offloaded.keys() and (flat - other).norm() <= 1e-6 * flat.norm(), file
