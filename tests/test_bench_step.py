"""`python -m benchmarks step`: gate, search for a batch, phases, what it writes, and its place in gpu-check."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import gpu_check, gpu_session, step, step_tables, tables
from benchmarks.__main__ import main, make_parser
from benchmarks.memory import extrapolated, largest
from benchmarks.reward import TOWERS, NetworkPlan, complaints
from benchmarks.step import COMMON, OWN, StepOutcome, StepResults, StepRun
from benchmarks.step_gate import Oracle
from benchmarks.step_networks import StepNetworks, Trained, resident_bytes, trained_of, twin
from benchmarks.step_providers import (
    PHASES,
    PROVIDERS,
    ROLES,
    WHOLE,
    Fused,
    Marks,
    StepProvider,
    Unfused,
    balanced_scale,
    differentiate,
    no_time,
)
from benchmarks.timing import Timing
from diffpp_fast.methods import Batch

CPU = torch.device("cpu")
#: All that neither compiles nor wants much time.
NAMES = [
    "eager",
    "eager-nhwc",
    "eager-checkpoint",
    "fused",
    "fused-nhwc",
    "fused-checkpoint",
    "fused-batched",
    "fused-shared",
]
MARKS = [f"<!-- python -m benchmarks step, cpu-tiny: {edge} -->" for edge in ("begin", "end")]


@pytest.fixture(autouse=True, scope="module")
def least() -> Iterator[None]:
    """A tower that takes no time."""
    with pytest.MonkeyPatch.context() as patch:
        tower = TOWERS["cpu"]._replace(hidden=32, intermediate=64, layers=1, heads=2, patch=8, size=16)
        patch.setitem(TOWERS, "cpu", tower)
        yield


@pytest.fixture(scope="module")
def networks(least: None) -> StepNetworks:
    networks = StepNetworks("tiny", 8, torch.float32, CPU)
    networks.reward_scale = balanced_scale(networks)
    return networks


def plan(**changes: Any) -> NetworkPlan:
    chosen: dict[str, Any] = {"batch": 2, "dtype": None, "names": None, "compile": False, "rounds": 2}
    return step.plan(model="tiny", device=CPU, **chosen | changes)


def run(out: Path, *arguments: str) -> int:
    options = ["--model", "tiny", "--device", "cpu", "--no-compile", "--rounds", "2", "--out", str(out)]
    return main(["step", *options, *arguments])


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


# The search for a batch


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 7, 8, 24, 100])
def test_the_largest_batch_is_found_to_an_eighth(limit: int) -> None:
    asked: list[int] = []

    def fits(size: int) -> bool:
        asked.append(size)
        return size <= limit

    found = largest(fits)
    assert found <= limit < found + max(2, found // 8 + 1)
    assert found == 0 or found in asked
    assert len(asked) <= 12 and len(set(asked)) == len(asked)


def test_the_search_ends_where_memory_does_not() -> None:
    assert largest(lambda size: True, most=100) >= 88
    assert largest(lambda size: True, most=1) == 1


def test_a_batch_is_extrapolated_from_the_memory_it_takes() -> None:
    assert extrapolated(4, temporary=100, free=250) == 10
    assert extrapolated(4, temporary=100, free=50) == 4  # it has been run


class Limited(Unfused):
    """Has room for so many images."""

    def __init__(self, networks: StepNetworks, most: int) -> None:
        super().__init__(networks)
        self.most = most

    def generator_loss(self, batch: Batch) -> Tensor:
        if len(batch) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate much")
        return super().generator_loss(batch)


def limited(most: int) -> StepProvider:
    return StepProvider(lambda networks: Limited(networks, most))


@pytest.mark.slow
def test_every_provider_is_measured_at_its_own_largest_batch_and_at_the_common_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(PROVIDERS, "eager", limited(2))
    monkeypatch.setitem(PROVIDERS, "fused", limited(5))
    monkeypatch.setitem(PROVIDERS, "fused-nhwc", limited(0))
    filling = replace(plan(names=["eager", "fused", "fused-nhwc"], rounds=1), batch=None)
    *_, results = step.measure(filling)
    records = {record.provider: record for record in results.outcomes}
    assert results.batch == 2
    assert {name: record.own_batch for name, record in records.items()} == {"eager": 2, "fused": 5, "fused-nhwc": None}
    assert {section: run.batch for section, run in records["fused"].runs.items()} == {COMMON: 2, OWN: 5}
    assert records["fused-nhwc"].left_out == "OutOfMemoryError: not even one image fits"
    assert not any(record.wrong for record in results.outcomes)


# The gate


class Spoilt(Fused):
    """Right but for what is done to its losses."""

    def __init__(self, networks: StepNetworks, spoil: Callable[[Tensor, StepNetworks], Tensor]) -> None:
        super().__init__(networks)
        self.spoil, self.networks = spoil, networks

    def generator_loss(self, batch: Batch) -> Tensor:
        return self.spoil(super().generator_loss(batch), self.networks)


class _LoseGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.scale * gradient, None


def without_one_bias(loss: Tensor, networks: StepNetworks) -> Tensor:
    bias: Any = networks.parts.generator.get_parameter("mid_block.resnets.0.conv1.bias")
    return loss - bias_term(bias)


def bias_term(bias: nn.Parameter) -> Tensor:
    """Zero, with a gradient of a tenth."""
    return 0.1 * (bias - bias.detach()).sum()


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda loss, networks: 1.01 * loss, "the generator loss has a relative error of 1.0e-02"),
        pytest.param(
            lambda loss, networks: _LoseGradient.apply(loss, 0.99),
            "the generator gradient has a relative error of 1.0e-02",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            without_one_bias, "the generator gradient at its worst tensor has a relative error", marks=pytest.mark.slow
        ),
    ],
    ids=["loss", "gradient", "one tensor"],
)
def test_the_gate_catches_what_is_wrong(
    spoil: Callable[[Tensor, StepNetworks], Tensor], complaint: str, networks: StepNetworks
) -> None:
    oracle = Oracle(networks, networks.batch(0, 2), torch.float64)
    wrong = Spoilt(networks, spoil)
    errors: dict[str, float] = {}
    for role in ROLES:
        network = getattr(networks.parts, role)
        errors |= oracle.errors(role, oracle.differentiate(wrong, role), network)
        network.zero_grad()
    assert any(sentence.startswith(complaint) for sentence in complaints(errors, oracle.allowed))
    # The teaching assistant's step was not spoilt.
    assert all(sentence.startswith("the generator") for sentence in complaints(errors, oracle.allowed))


@pytest.mark.slow
def test_what_is_wrong_or_fails_is_reported_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoilt = StepProvider(lambda networks: Spoilt(networks, lambda loss, networks: 1.01 * loss))
    monkeypatch.setitem(PROVIDERS, "fused", spoilt)
    monkeypatch.setitem(PROVIDERS, "fused-nhwc", StepProvider(lambda networks: 1 / 0))  # type: ignore[arg-type,return-value]
    monkeypatch.setitem(PROVIDERS, "fused-checkpoint", limited(1))
    assert run(tmp_path, "--providers", "eager,fused,fused-nhwc,fused-checkpoint", "--batch", "2") == 1
    said = capsys.readouterr().out
    assert "fused is wrong: the generator loss has a relative error of 1.0e-02, allowed 1e-04" in said
    assert "fused-nhwc is wrong: ZeroDivisionError: division by zero" in said
    assert "without fused-checkpoint: OutOfMemoryError: CUDA out of memory" in said
    rows = {row["provider"]: row for row in rows_of(tmp_path / "step-cpu-tiny.csv")}
    assert rows["fused"]["median_ms"] == "" and rows["fused"]["status"].startswith("wrong: ")
    assert rows["fused-checkpoint"]["status"].startswith("left out: ")
    assert float(rows["eager"]["median_ms"]) > 0.0


def test_both_terms_of_the_gradient_are_equally_long(networks: StepNetworks) -> None:
    unfused = Unfused(networks)
    unfused.addressed = True
    batch = networks.batch(0, 1)
    draws = unfused.draw(batch)
    with torch.no_grad():
        x0 = unfused.sample(draws, batch)
    reward = networks.reward_scale * unfused.of_reward(x0, batch).norm()
    torch.testing.assert_close(reward, unfused.of_scores(x0, draws, batch).norm())


def test_unfused_code_draws_other_numbers_every_time_unless_it_is_judged(networks: StepNetworks) -> None:
    unfused, batch = Unfused(networks), networks.batch(0, 2)
    assert not torch.equal(unfused.draw(batch).z, unfused.draw(batch).z)
    unfused.addressed = True
    assert torch.equal(unfused.draw(batch).eps, unfused.draw(batch).eps)


# StepNetworks and what trains them


@pytest.mark.parametrize(("model", "unet", "gib"), [("sd15", 859_520_964, 28.6), ("sdxl", 2_567_463_684, 84.0)])
def test_true_sizes(model: str, unet: int, gib: float) -> None:
    true = StepNetworks(model, 64, torch.bfloat16, torch.device("meta"), TOWERS["cuda"])
    for network in (true.parts.generator, true.parts.fake, true.parts.reference):
        assert sum(parameter.numel() for parameter in network.parameters()) == unet
    assert {parameter.dtype for parameter in true.parts.fake.parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in true.parts.reference.parameters()} == {torch.bfloat16}
    # 8 copies of a UNet in float32 and one in bfloat16, the decoder and the tower.
    assert resident_bytes(true) / 2**30 == pytest.approx(gib, rel=0.05)


@pytest.mark.slow
def test_a_true_step_asks_for_the_known_number_of_operations() -> None:
    counted = step.count_operations(replace(plan(), model="sd15", latent=64))
    teraflop = {phase: 1e-12 * number for phase, number in counted["generator"].items()}
    assert sum(teraflop[phase] for phase in ("decode", "decode backward")) == pytest.approx(5.1, rel=0.05)
    networks = sum(teraflop[phase] for phase in ("generator", "fake", "reference", "backward"))
    assert networks == pytest.approx(4.8, rel=0.05)


def test_batches_have_addresses_and_prompts_of_their_own(networks: StepNetworks) -> None:
    first, second = networks.batch(0, 2), networks.batch(1, 2)
    assert first.samples.tolist() == [0, 1] and second.samples.tolist() == [2, 3]
    texts = [batch.conditioning.tensors["encoder_hidden_states"] for batch in (first, second, networks.batch(0, 2))]
    assert not torch.equal(texts[0], texts[1]) and torch.equal(texts[0], texts[2])


def test_sdxl_is_given_its_sizes() -> None:
    batch = StepNetworks("sdxl", 128, torch.bfloat16, torch.device("meta"), TOWERS["cuda"]).batch(0, 3)
    added = batch.conditioning.tensors["added_cond_kwargs"]
    assert added["text_embeds"].shape == (3, 1280) and added["time_ids"].shape == (3, 6)


def test_adapters_are_trained_on_the_references_weights(least: None) -> None:
    networks = StepNetworks("tiny", 8, torch.float32, CPU, lora=4)
    parts = networks.parts
    shared = {weight.data_ptr() for weight in parts.reference.parameters()}
    for part in (parts.generator, parts.fake):
        trained = trained_of(part)
        assert trained and shared <= {weight.data_ptr() for weight in part.parameters()}
        assert not shared & {weight.data_ptr() for weight in trained}
    networks.reward_scale = balanced_scale(networks)
    oracle, calls = Oracle(networks, networks.batch(0, 2), torch.float64), list[int]()
    made = Fused(networks, batched=True, share=True)
    made.method.reference.adapters.network.register_forward_pre_hook(  # type: ignore[attr-defined]
        lambda _, inputs: calls.append(len(inputs[0]))
    )
    for role in ROLES:
        loss = oracle.differentiate(made, role)
        assert complaints(oracle.errors(role, loss, getattr(parts, role)), oracle.allowed) == []
    # One call for the three passes, then the TA's own on the samples at hand.
    assert calls == [6, 2]
    lines = step_tables.kind_of(plan(lora=4, latent=16)), step_tables.kind_of(plan())
    assert lines == ("cpu-tiny-128px-lora", "cpu-tiny")


def test_a_twin_shares_weights_and_nothing_else(networks: StepNetworks) -> None:
    original = networks.parts.generator
    copied = twin(original)
    pairs = list(zip(original.parameters(), copied.parameters(), strict=True))
    assert all(mine is theirs for mine, theirs in pairs)
    assert not set(original.modules()) & set(copied.modules())


def test_an_update_costs_what_it_costs_and_leaves_the_weights(networks: StepNetworks) -> None:
    network = networks.parts.generator
    before = {name: weight.clone() for name, weight in network.state_dict().items()}
    trained = Trained(network, average=True)
    for memory_format in (torch.channels_last, torch.contiguous_format):
        trained.lay_out(memory_format)
        differentiate(Fused(networks), "generator", networks.batch(0, 1), no_time)
        trained.update(ours=memory_format == torch.channels_last)
        assert network.get_parameter("conv_in.weight").is_contiguous(memory_format=memory_format)
        state = trained.optimizer.state[network.get_parameter("conv_in.weight")]
        assert state["exp_avg_sq"].any() and state["exp_avg_sq"].is_contiguous(memory_format=memory_format)
        assert all(parameter.grad is None for parameter in network.parameters())
    assert all(torch.equal(weight, before[name]) for name, weight in network.state_dict().items())


# Phases and tables


@pytest.mark.parametrize("make", [Unfused, Fused])
def test_a_step_tells_all_of_its_phases(make: Callable[[StepNetworks], Any], networks: StepNetworks) -> None:
    ticks = iter(range(1000))
    for role in ROLES:
        _, marks = differentiate(make(networks), role, networks.batch(0, 1), lambda: next(ticks))
        marks.begin("update")
        marks.end()
        spans = marks.spans(lambda start, end: float(end - start))
        whole = spans.pop(WHOLE)
        assert set(spans) == set(PHASES[role]) and min(spans.values()) >= 1.0
        assert sum(spans.values()) == whole
        getattr(networks.parts, role).zero_grad()


def test_marks_add_the_spans_of_a_phase() -> None:
    moments = iter([0.0, 1.0, 3.0, 6.0])
    marks = Marks(lambda: next(moments))
    for phase in ("a", "b", "a"):
        marks.begin(phase)
    marks.end()
    assert marks.spans(lambda start, end: end - start) == {"a": 4.0, "b": 2.0, WHOLE: 6.0}


def measured(milliseconds: float, batch: int = 2) -> StepRun:
    timings = {
        role: {phase: Timing((1e-3 * milliseconds,) * 2, 1) for phase in (*phases, WHOLE)}
        for role, phases in PHASES.items()
    }
    return StepRun(batch, timings, dict.fromkeys(ROLES, 2**20), dict.fromkeys(ROLES, 99))


def results_of(*outcomes: StepOutcome) -> StepResults:
    operations = {role: {WHOLE: 1e9} for role in ROLES}
    return StepResults(outcomes, 2, 2**30, 1e12, operations)


def outcome(name: str, **changes: Any) -> StepOutcome:
    errors = {f"{role} gradient": 1e-6 for role in ROLES}
    return StepOutcome(name, first_call=dict.fromkeys(ROLES, 3.0), errors=errors, **changes)


def test_the_tables_compare_images_per_second_and_say_where_fused_code_loses() -> None:
    results = results_of(
        outcome("eager", runs={COMMON: measured(20.0), OWN: measured(40.0, 4)}),
        outcome("compile", runs={COMMON: measured(8.0)}),
        outcome("fused", runs={COMMON: measured(10.0), OWN: measured(40.0, 8)}),
        StepOutcome("fused-compile", left_out="no compiler"),
    )
    lines = "\n".join(map(tables.text, step_tables.step_tables(results))).splitlines()
    start = lines.index("The generator's update. All at one batch:")
    fused = next(line.split() for line in lines[start:] if line.startswith("fused"))
    # 2 images in 10 ms; 2e9 operations in 10 ms are a fifth of 1e12 a second.
    assert fused == ["fused", "2", "10.0", "0", "200.", "2.00", "0.80", "20.0", "1", "99", "3.0", "slower"]
    start = lines.index("The generator's update. Each at the largest batch that fits:")
    fused = next(line.split() for line in lines[start:] if line.startswith("fused"))
    assert fused[:8] == ["fused", "8", "40.0", "0", "200.", "2.00", "-", "20.0"]
    assert step_tables.doubts(results) == ["without fused-compile: no compiler"]
    start = lines.index("The whole iteration, one update of each. All at one batch:")
    fused = next(line.split() for line in lines[start:] if line.startswith("fused"))
    assert fused[:3] == ["fused", "2", "20.0"] and fused[5:] == ["2.00", "0.80", "slower"]


def test_a_restless_measurement_says_so() -> None:
    restless = measured(20.0)
    for role in ROLES:
        restless.timings[role][WHOLE] = Timing((0.01, 0.02, 0.04), 1)
    results = results_of(outcome("eager", runs={COMMON: restless}), outcome("fused", runs={COMMON: measured(10.0)}))
    (sentence,) = step_tables.doubts(results)
    assert sentence.startswith("1 of 2 rows") and "the machine was busy" in sentence


@pytest.fixture(scope="module")
def written(least: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files of one run, and a page."""
    folder = tmp_path_factory.mktemp("step")
    (folder / "page.md").write_text(f"Before.\n{MARKS[0]}\nold\n{MARKS[1]}\nAfter.\n")
    assert run(folder, "--docs", str(folder / "page.md"), "--batch", "2") == 0
    return folder


def test_a_run_writes_everything(written: Path) -> None:
    rows = rows_of(written / "step-cpu-tiny.csv")
    expected = [(name, role, phase) for name in NAMES for role in ROLES for phase in (WHOLE, *PHASES[role])]
    assert [(row["provider"], row["update"], row["phase"]) for row in rows] == expected
    assert {row["status"] for row in rows} == {"ok"} and {row["batches"] for row in rows} == {COMMON}
    whole = {row["provider"]: row for row in rows if (row["update"], row["phase"]) == ("generator", WHOLE)}
    assert float(whole["eager"]["x_eager"]) == 1.0 and whole["eager"]["x_compile"] == ""
    assert 0.0 < float(whole["fused"]["gradient_error"]) < 1e-4
    assert int(whole["fused"]["peak_bytes"]) < int(whole["eager"]["peak_bytes"])
    assert whole["fused"]["operations"] == whole["eager"]["operations"] and float(whole["fused"]["operations"]) > 0.0
    assert whole["fused"]["torch"] == torch.__version__ and whole["fused"]["launches"] == ""
    text = (written / "page.md").read_text()
    assert text.startswith("Before.") and text.endswith("After.\n") and "| fused-checkpoint |" in text
    assert "old" not in text and "phase by phase, in ms:" in text


def test_bfloat16_passes_the_gate(networks: StepNetworks) -> None:
    half = StepNetworks("tiny", 8, torch.bfloat16, CPU)
    half.reward_scale = balanced_scale(half)
    oracle = Oracle(half, half.batch(0, 2), torch.float64)
    for role in ROLES:
        loss = oracle.differentiate(Fused(half), role)
        assert complaints(oracle.errors(role, loss, getattr(half.parts, role)), oracle.allowed) == []


@pytest.mark.slow
def test_compiled_providers_come_last_and_are_compared(tmp_path: Path) -> None:
    # torch 2.13 compiles an unfused UNet to one with wrong gradients on a CPU, which is said and not timed.
    *earlier, results = step.measure(plan(names=["fused-compile", "eager"], compile=True, rounds=1))
    assert [record.provider for record in earlier[0].outcomes if record.runs] == ["eager"]
    assert all(record.wrong is None and record.left_out is None and record.runs for record in results.outcomes)


def test_only_a_gpu_can_be_filled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "out", "--batch", "fill") == 2
    assert "--batch fill: needs a GPU" in capsys.readouterr().err and not (tmp_path / "out").exists()


# gpu-check


@pytest.mark.parametrize("options", [*gpu_check.STEPS.values(), *gpu_check.REHEARSED_STEPS.values()], ids=" ".join)
def test_what_gpu_check_asks_for_is_understood(options: tuple[str, ...]) -> None:
    chosen = make_parser().parse_args(["step", *options])
    asked = {"model": chosen.model, "names": chosen.providers, "compile": chosen.compile}
    step.plan(device=CPU, batch=1, dtype=None, rounds=5, **asked)


def test_gpu_check_measures_steps_alone_and_keeps_what_is_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[list[str]] = []

    def run_limited(command: list[str], limit: float, environment: Any) -> gpu_session.Ended:
        made.append(command)
        return gpu_session.Ended(0, "the table\nits last line", limit)

    monkeypatch.setattr(gpu_session, "run_limited", run_limited)
    for _ in range(2):
        assert gpu_check.main(["--rehearse", "--steps-only", "--out", str(tmp_path)]) == 0
    (command,) = made
    assert command[1:4] == ["-m", "benchmarks", "step"] and "tiny" in command
    said = capsys.readouterr().out
    assert said.count("the table\n") == 1 and "0 failures, 0 left out" in said


def test_gpu_check_leaves_steps_out_when_the_time_is_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert gpu_check.main(["--rehearse", "--steps-only", "--out", str(tmp_path), "--seconds", "0"]) == 0
    assert "another call goes on from here: whole step, tiny, eager and fused" in capsys.readouterr().out
