"""`python -m benchmarks kernels`: its cases, its gate, its statistics, and what it writes."""

from __future__ import annotations

import csv
import gc
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import gate as judges
from benchmarks import timing
from benchmarks.__main__ import main
from benchmarks.backends import PREDICTION_TYPES
from benchmarks.cases import Case, Inputs, all_cases, choose, make_inputs
from benchmarks.gate import Gate, Provider, standard_normal
from benchmarks.kernels import KernelOutcome, compare, text_table
from benchmarks.memory import peak_of_released, peak_temporary_bytes
from benchmarks.timing import LEAST_ROUNDS, ROUNDS, Contender, Timing, interleave
from diffpp_fast import backends, provenance

CPU = torch.device("cpu")
SMALL = {
    "reward_pixels": (1, 3, 240, 240),
    "group_norm_silu": (2, 64, 8, 8),
    "geglu": (2, 6, 64),
    "ada_layer_norm": (2, 6, 64),
    "gated_residual_norm": (2, 6, 64),
    "rms_norm_rope": (2, 3, 4, 16),
}


def small(case: Case) -> Case:
    """The same case on little tensors."""
    latents = (2, 4, 6, 6) if len(case.shape) == 4 else (2, 4, 3, 6, 6)
    return case._replace(shape=SMALL.get(case.op, latents))


#: One of each operator, variant, layout, kind of noise and number of dimensions.
KINDS = list({(case.op, case.variant, case.layout, case.noise, len(case.shape)): case for case in all_cases()}.values())
each_kind = pytest.mark.parametrize("case", [small(case) for case in KINDS], ids=lambda case: case.name)


def find(op: str, noise: str, variant: str | None = None) -> Case:
    """The smallest case of this kind, on little tensors."""
    cases = (case for case in all_cases() if case.op == op and case.noise == noise)
    return small(next(case for case in cases if variant in (None, case.variant)))


def gate(case: Case, dtype: torch.dtype = torch.float32) -> Gate:
    return Gate(case, dtype, CPU, make_inputs(case, dtype, CPU))


# Cases


def test_the_cases_cover_every_operator_in_both_selections() -> None:
    assert {case.op for case in choose(None, ["full"])} == set(backends.OPS)
    assert {case.op for case in choose(None, ["quick"])} == set(backends.OPS)
    assert len({case.name for case in all_cases(large=True)}) == len(list(all_cases(large=True)))


def test_large_cases_cover_every_operator_with_tensors_beyond_any_cache() -> None:
    large = choose(None, ["large"])
    assert {case.op for case in large} == set(backends.OPS)
    assert all(math.prod(case.shape) * torch.bfloat16.itemsize >= 256e6 for case in large)
    assert not set(large) & set(choose(None, ["full", "latents", "quick"]))


@each_kind
def test_the_traffic_names_the_inputs_the_gradients_and_their_sizes(case: Case) -> None:
    inputs = make_inputs(case, torch.float32, CPU)
    forward, _, backward = case.traffic.partition(";")
    reads = forward.partition("->")[0].split()
    results = backward.partition("->")[2].split()
    arguments = {**inputs.unfused, **inputs.call.arguments}
    for name in reads:
        assert arguments[name].nbytes == 4 * case.elements(name)
    assert case.bytes_read(4) == sum(arguments[name].nbytes for name in reads)
    large = [name for name in inputs.call.wrt if arguments[name].numel() == case.elements(name)]
    assert results == [f"grad_{name}" for name in large]
    if inputs.call.outer is not None and inputs.call.outer.dim() > 1:
        outer = [name for name in backward.partition("->")[0].split() if name.startswith("grad_")]
        assert outer
        assert all(inputs.call.outer.nbytes == 4 * case.elements(name) for name in outer)


@pytest.mark.parametrize(
    ("case", "tensors"),
    [
        (find("philox", "drawn"), 1),
        (find("add_noise", "drawn"), 4),
        (find("denoising_loss", "stored"), 5),
        (find("denoising_loss", "drawn"), 4),
        (find("score_gap", "none", "plain"), 3),
        (find("score_gap", "stored"), 5),
        (find("score_gap", "drawn"), 4),
        (find("sid_loss", "stored"), 11),
        (find("sim_loss", "drawn"), 9),
        (find("group_norm_silu", "none"), 5),
        (find("geglu", "none"), 4),
        (find("ada_layer_norm", "none"), 5),
        (find("gated_residual_norm", "none"), 10),
        (find("rms_norm_rope", "none"), 5),
    ],
    ids=lambda value: value.name if isinstance(value, Case) else "",
)
def test_bytes_count_tensors_of_the_sample_shape(case: Case, tensors: int) -> None:
    assert case.bytes(2) == 2 * tensors * math.prod(case.shape)


def test_bytes_count_small_pixels_as_small() -> None:
    case = find("reward_pixels", "none")
    assert case.bytes(4) == 4 * 3 * (3 * 240 * 240 + 2 * 224 * 224)


def test_the_flow_target_needs_the_sample_too() -> None:
    stored, drawn, _ = choose(["denoising_loss"], ["video-b1"])
    assert stored.traffic == "prediction x0 eps -> residual; residual -> grad_prediction"
    assert drawn.traffic == "prediction x0 -> residual; residual -> grad_prediction"


def test_cases_with_the_same_unfused_code_are_neighbours() -> None:
    codes = [case.unfused_code for case in all_cases()]
    runs = [code for place, code in enumerate(codes) if place == 0 or codes[place - 1] != code]
    assert len(runs) == len(set(runs))


# Baselines and gate


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_baselines_and_reference_equal_float64(case: Case, dtype: torch.dtype) -> None:
    inputs = make_inputs(case, dtype, CPU)
    judge = Gate(case, dtype, CPU, inputs)
    assert judge.failure(judges.eager(case)) is None
    assert judge.failure(judges.backend(case, inputs, "reference")) is None


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("op", ["denoising_loss", "score_gap", "sid_loss", "sim_loss"])
def test_baselines_know_every_prediction_type(op: str, prediction_type: str) -> None:
    case = find(op, "stored")._replace(prediction_type=prediction_type)
    inputs = make_inputs(case, torch.float32, CPU)
    assert Gate(case, torch.float32, CPU, inputs).failure(judges.eager(case)) is None
    # And the cases tell the types apart.
    for other in set(PREDICTION_TYPES) - {prediction_type}:
        misled = replace(inputs, unfused={**inputs.unfused, "prediction_type": other})
        judge = Gate(case, torch.float32, CPU, misled)
        assert judge.failure(judges.eager(case)) is not None


class Skewed(torch.autograd.Function):
    """The identity with a gradient that is 1 % too large."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 1.01 * grad


def one_element(x: Tensor) -> Tensor:
    mask = torch.zeros_like(x)
    mask.view(-1)[-1] = 0.05
    return x + mask


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda x: 1.001 * x, "output has a relative error"),
        (Skewed.apply, "gradient of x0 has a relative error"),
        (one_element, "output has an element"),
        (lambda x: x / 0.0, "output is not finite"),
        (lambda x: (x, x), "3 results instead of 2"),
    ],
    ids=["scaled", "gradient", "one element", "not finite", "results"],
)
def test_the_gate_catches_a_wrong_provider(damage: Callable[[Tensor], Any], message: str) -> None:
    # Of this many elements, a single wrong one is lost in the norm of the error.
    case = find("add_noise", "drawn")._replace(shape=(2, 4, 400, 400))
    inputs = make_inputs(case, torch.float32, CPU)
    right = judges.backend(case, inputs, "reference")
    damaged = replace(right, forward=lambda **arguments: damage(right.forward(**arguments)))
    failure = Gate(case, torch.float32, CPU, inputs).failure(damaged)
    assert failure is not None
    assert message in failure


@pytest.mark.parametrize("place", range(4))
def test_the_gate_looks_at_every_result(place: int) -> None:
    case = find("score_gap", "stored")
    right = judges.eager(case)

    def forward(**arguments: Any) -> tuple[Tensor, ...]:
        outputs = list(right.forward(**arguments))
        outputs[place] = outputs[place][:1]
        return tuple(outputs)

    failure = gate(case).failure(replace(right, forward=forward))
    assert failure is not None
    names = make_inputs(case, torch.float32, CPU).call.names
    assert failure.startswith(f"{names[place]} has shape [1")


def test_drawn_noise_has_to_be_standard_normal() -> None:
    draws = torch.randn(100_000, dtype=torch.float64)
    assert standard_normal(draws) is None
    assert "mean" in str(standard_normal(draws + 0.03))
    assert "variance" in str(standard_normal(draws * 1.03))
    case = find("philox", "drawn")._replace(shape=(2, 4, 64, 64))
    uniform = Provider("eager", lambda shape, dtype, device: torch.rand(shape), takes_operator_arguments=False)
    assert "mean" in str(gate(case).failure(uniform))


# Statistics


def test_timing_says_median_and_quartiles() -> None:
    timing = Timing((4.0, 1.0, 2.0, 3.0, 10.0), calls=7)
    assert timing.median == 3.0
    assert timing.quartiles == (2.0, 4.0)
    assert timing.spread == pytest.approx(2.0 / 3.0)


class Machine:
    """A pretended clock: every contender takes its own seconds per call."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.now = 0.0
        self.blocks: list[Any] = []
        self.contenders = [Contender(name, self._call(name, cost)) for name, cost in seconds.items()]

    def _call(self, name: str, cost: float) -> Callable[[], None]:
        def call() -> None:
            self.now += cost
            self.called = name

        return call

    def clock(self, work: Callable[[], None]) -> float:
        start = self.now
        work()
        self.blocks.append(self.called)
        return self.now - start


def test_interleaving_rotates_and_calls_fast_contenders_more_often() -> None:
    seconds = {"a": 2.0**-10, "b": 2.0**-13, "c": 2.0**-8}
    machine = Machine(seconds)
    timings = interleave(machine.contenders, min_time=ROUNDS * 2.0**-10, clock=machine.clock)
    assert {name: timing.calls for name, timing in timings.items()} == {"a": 1, "b": 8, "c": 1}
    assert {name: timing.samples for name, timing in timings.items()} == {
        name: (cost,) * ROUNDS for name, cost in seconds.items()
    }
    rounds = machine.blocks[-3 * ROUNDS :]
    assert rounds[:9] == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]
    assert gc.isenabled()


def test_a_slow_contender_shortens_the_measurement() -> None:
    machine = Machine({"fast": 0.001, "slow": 1.0})
    timings = interleave(machine.contenders, min_time=0.1, clock=machine.clock)
    assert {len(timing.samples) for timing in timings.values()} == {LEAST_ROUNDS}


def test_peak_memory_counts_what_is_released_again() -> None:
    # 8 bytes that stay; 100 and 50 alive together; then 120 at an address that had been used before.
    changes = [(1, 8), (2, 100), (3, 50), (2, -100), (3, -50), (2, 120), (2, -120), (3, 30)]
    assert peak_of_released(changes) == 150


def test_peak_memory_of_a_step() -> None:
    x = torch.randn(1000, requires_grad=True)

    def call() -> tuple[Tensor, ...]:
        y = (2.0 * x).sin()  # 2 x is kept for the backward pass
        return y, *torch.autograd.grad(y, x, torch.ones_like(y))

    environment = dict(os.environ)
    # At the peak: 2 x, the outer gradient, the cosine, their product, and a number or two.
    assert 4 * 4000 <= peak_temporary_bytes(call, CPU) < 4 * 4000 + 100
    assert peak_temporary_bytes(lambda: (x.detach() + 1.0,), CPU) < 100
    assert dict(os.environ) == environment


def outcome(provider: str, milliseconds: float | None, **options: Any) -> KernelOutcome:
    timing = None if milliseconds is None else Timing((milliseconds / 1e3,) * 5, 1)
    case = choose(None, ["sd15-b1"])[0]
    return KernelOutcome(provider, case=case, dtype=torch.float32, threads=1, bytes=10**6, timing=timing, **options)


def test_rows_that_lose_to_eager_or_compile_are_marked() -> None:
    base = [outcome("eager", 2.0), outcome("compile", 1.0), outcome("copy", 0.25)]
    (row,) = compare([*base, outcome("cpu", 1.6)])
    assert (row.x_eager, row.x_compile) == (pytest.approx(1.25), pytest.approx(0.625))
    assert row.slower
    (faster,) = compare([*base, outcome("cpu", 0.5)])
    assert not faster.slower
    (absent,) = compare([*base, outcome("cpu", None, left_out="not compiled")])
    assert absent.backend is None
    wrong = outcome("cpu", None, wrong="output is not finite")
    lines = text_table([[*base, outcome("cpu", 1.6)], [*base, outcome("cpu", 0.5)], [*base, wrong]]).splitlines()
    assert [line.endswith("slower") for line in lines] == [False, True, False, False]
    assert lines[2].split()[-6:] == ["cpu", "0.500", "4.00", "2.00", "2.0", "50"]
    assert "wrong" in lines[3]


def test_where_steps_were_captured_graphs_are_compared_and_not_the_host() -> None:
    base = [outcome("eager", 2.0, replay=1e-3), outcome("copy", 0.25, replay=2e-4)]
    (row,) = compare([*base, outcome("triton", 4.0, replay=4e-4)])
    assert row.x_eager == pytest.approx(2.5) and not row.slower
    assert row.backend is not None and row.backend.bandwidth == pytest.approx(1e6 / 4e-4)
    (uncaptured,) = compare([*base, outcome("triton", 4.0)])
    assert uncaptured.x_eager == pytest.approx(0.5)


# The command

QUICK = ["kernels", "--no-compile", "--min-time", "0.001", "--threads", "1"]
PAGE = """# Performance

Before.

<!-- python -m benchmarks kernels, cpu: begin -->
old
<!-- python -m benchmarks kernels, cpu: end -->

After.
"""


def rows_of(folder: Path) -> list[dict[str, str]]:
    (path,) = folder.glob("*.csv")
    with path.open() as file:
        return list(csv.DictReader(file))


def test_a_run_writes_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    threads = torch.get_num_threads()
    arguments = ["--ops", "score_gap", "--sizes", "sd15-b1", "--backends", "reference,cuda"]
    out = tmp_path / "results"
    assert main([*QUICK, *arguments, "--device", "cpu", "--out", str(out), "--docs", str(page)]) == 0

    rows = rows_of(out)
    cases = choose(["score_gap"], ["sd15-b1"])
    assert len(rows) == 4 * len(cases)
    assert {row["provider"] for row in rows} == {"eager", "reference", "cuda", "copy"}
    for eager, reference, cuda, copy in zip(*[iter(rows)] * 4, strict=True):
        assert float(reference["x_eager"]) == pytest.approx(
            float(eager["median_ms"]) / float(reference["median_ms"]), rel=1e-3
        )
        seconds = float(reference["median_ms"]) / 1e3
        assert float(reference["gb_per_s"]) == pytest.approx(int(reference["bytes"]) / seconds / 1e9, rel=1e-3)
        assert float(copy["percent_of_copy"]) == pytest.approx(100)
        assert float(eager["quartile1_ms"]) <= float(eager["median_ms"]) <= float(eager["quartile3_ms"])
        assert int(eager["temporary_bytes"]) > 0
        assert cuda["status"].startswith("left out: ")
        assert cuda["median_ms"] == ""
        assert (eager["torch"], eager["threads"]) == (torch.__version__, "1")

    printed = capsys.readouterr().out
    assert "rows are slower than eager or compile" in printed
    assert "score_gap, float32, without cuda: " in printed
    text = page.read_text()
    assert text.startswith(PAGE.partition("old")[0])
    assert text.endswith(PAGE.partition("old")[2])
    assert "### score_gap" in text
    assert (out / "kernels-cpu-selected.md").read_text().strip() in text
    assert torch.get_num_threads() == threads


def test_a_wrong_provider_is_reported_and_not_timed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = judges.backend

    def wrong(case: Case, inputs: Inputs, name: str) -> Provider:
        right = backend(case, inputs, name)
        return replace(right, forward=lambda **arguments: 1.01 * right.forward(**arguments))

    monkeypatch.setattr(judges, "backend", wrong)
    arguments = ["--ops", "add_noise", "--sizes", "sd15-b1", "--backends", "reference", "--out", str(tmp_path)]
    assert main([*QUICK, *arguments, "--device", "cpu"]) == 1
    printed = capsys.readouterr().out
    assert "reference is wrong: output has a relative error of 1.0e-02" in printed
    eager, reference, _ = rows_of(tmp_path)
    assert reference["status"].startswith("wrong: ")
    assert reference["median_ms"] == ""
    assert float(eager["median_ms"]) > 0.0


def test_a_provider_that_raises_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(case: Case, inputs: Inputs, name: str) -> Provider:
        return Provider(name, lambda **arguments: 1 / 0, takes_operator_arguments=True)

    monkeypatch.setattr(judges, "backend", broken)
    arguments = ["--ops", "philox", "--sizes", "sd15-b1", "--backends", "reference", "--out", str(tmp_path)]
    assert main([*QUICK, *arguments, "--device", "cpu"]) == 1
    assert "reference is wrong: ZeroDivisionError: division by zero" in capsys.readouterr().out


def test_without_matplotlib_the_rest_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([*QUICK, "--ops", "philox", "--sizes", "sd15-b1", "--device", "cpu", "--out", str(tmp_path)]) == 0
    assert "matplotlib is not installed, pip install matplotlib" in capsys.readouterr().out
    assert {path.suffix for path in tmp_path.iterdir()} == {".csv", ".md"}


def test_the_plot_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert main([*QUICK, "--ops", "philox", "--sizes", "sd15-b1", "--device", "cpu", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "kernels-cpu-selected.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ops", "nothing"], "--ops: unknown 'nothing'; known: philox, add_noise"),
        (["--sizes", "huge"], "--sizes: unknown 'huge'; known: quick, latents, full, large, sd15-b1"),
        (["--ops", "reward_pixels", "--sizes", "sdxl-b1"], "for these operators: image-512-b2, image-1024-b1"),
        (["--backends", "auto"], "--backends: unknown 'auto'; known: cpu, triton, cuda, reference"),
        (["--dtypes", "float64"], "--dtypes: unknown 'float64'; known: float32, bfloat16, float16"),
        (["--threads", "0"], "--threads: must be numbers from 1 up or \"all\", got '0'"),
        (["--docs", "missing.md"], "--docs missing.md: No such file"),
        (
            ["--docs", "page.md"],
            "write these two lines where they are to be:\n<!-- python -m benchmarks",
        ),
        (["--out", "page.md"], "--out page.md: it is a file; name a folder"),
    ],
)
def test_what_the_user_can_mend_is_said(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("page.md").write_text("# No place for tables\n")
    assert main(["kernels", "--device", "cpu", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["page.md"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernels", "--device", "cuda"]) == 2
    assert "--device cuda: PyTorch finds no GPU" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--min-time", "0"], ["--ops", ","]])
def test_what_is_no_argument_at_all(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["kernels", *arguments])
    assert exit.value.code == 2


def test_outside_a_checkout_there_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder, arguments in ((tmp_path, ["init", "--quiet"]), (tmp_path / "package", None)):
        folder.mkdir(exist_ok=True)
        if arguments:
            subprocess.run(["git", *arguments], cwd=folder, check=True)
    monkeypatch.setattr(provenance, "PACKAGE", tmp_path / "package")
    found = timing.provenance(CPU)
    assert (found.commit, found.dirty) == ("", "")


@pytest.mark.slow
def test_compile_passes_the_gate_and_leaves_no_trace() -> None:
    import torch._inductor.config

    before = torch._inductor.config.fallback_random, torch._inductor.config.cpp.threads
    with judges.compiler(CPU, 1):
        for case in (find("philox", "drawn"), find("add_noise", "drawn"), find("sid_loss", "stored")):
            assert gate(case).failure(judges.compiled(case)) is None
    assert (torch._inductor.config.fallback_random, torch._inductor.config.cpp.threads) == before
