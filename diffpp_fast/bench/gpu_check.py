"""`make gpu-check`: everything that needs a GPU, in one command with a time limit.

It builds csrc for the GPU at hand, checks every operator on every backend against float64, runs the tests and the
benchmark of the kernels, and ends with one line per operator and backend. Whole training steps are measured in the time
that is left, or, with --steps-only, in all of it. Each check is a process of its own: a kernel
that brings the device down takes nothing else with it. What is done is kept; another call goes on from there.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from diffpp_fast.bench import gpu_gate, providers
from diffpp_fast.bench.cases import Case, all_cases, choose
from diffpp_fast.bench.files import write_results
from diffpp_fast.bench.gpu_gate import Checks, Verdict
from diffpp_fast.bench.gpu_jobs import Ended, Job, State, digest, on_termination, run_jobs
from diffpp_fast.bench.machine import Provenance, provenance
from diffpp_fast.bench.results import Comparison, Group, compare, failures
from diffpp_fast.bench.run import Plan, measure
from diffpp_fast.bench.selftest import small
from diffpp_fast.kernels import dispatch, native
from diffpp_fast.provenance import PACKAGE

ROOT = PACKAGE.parent
#: Seconds for everything, and of those for the report at the end.
SECONDS, REPORT = 460.0, 15.0
#: The part of the time that checks may take before the benchmark begins.
CHECKS = 0.6
#: Seconds in which a check goes beyond all pairs of options, and after which it is stopped.
GATE_SECONDS, GATE_LIMIT = 40.0, 170.0
SANITIZER_LIMIT, TESTS_LIMIT, BUILD_LIMIT, REWARD_LIMIT = 150.0, 170.0, 200.0, 120.0
PLAN_LIMIT = 60.0
#: Of a benchmark of whole steps, by whether it compiles; and the least time in which one is begun.
STEP_LIMITS = {False: 260.0, True: 445.0}
STEP_LEAST = 100.0
#: What `diffpp-fast bench step` is run on, what tells most first. One call has the time to compile one provider.
STEPS = {
    "sd15, eager and fused": ("--model", "sd15", "--no-compile"),
    "sd15, compile": ("--model", "sd15", "--providers", "eager,fused,compile"),
    "sdxl, eager and fused": ("--model", "sdxl", "--no-compile"),
    "sd15, fused and compile": ("--model", "sd15", "--providers", "eager,fused,fused-compile"),
}
STEPS_NEED = ("diffusers", "transformers")
REHEARSED_STEPS = {"tiny, eager and fused": ("--model", "tiny", "--no-compile", "--providers", "eager,fused")}
#: The exit code of compute-sanitizer when it has found errors.
SANITIZER_ERRORS = 86
#: Per provider and case of the benchmark.
MIN_TIME = 0.1
#: Images of a rehearsal: the unfused code takes square ones.
SQUARE = (1, 3, 40, 40)
#: In the order in which they are worth measuring.
BENCH_DTYPES = (torch.bfloat16, torch.float32)
TESTS = ("tests/test_triton_*.py", "tests/test_ops_*.py")


class Session:
    """One call of the command."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.rehearse: bool = arguments.rehearse
        self.steps_only: bool = arguments.steps_only
        self.device = torch.device("cpu" if self.rehearse else "cuda")
        self.began = time.monotonic()
        self.deadline = self.began + arguments.seconds - REPORT * (not self.rehearse)
        self.checks_end = self.began + CHECKS * arguments.seconds
        # Without a GPU the interpreter stands for Triton's kernels, and the CPU's for those of CUDA.
        self.backends = ("triton", "cpu" if self.rehearse else "cuda")
        self.ops = [
            op
            for op in arguments.ops or dispatch.OPS
            if any((op, backend) in dispatch._kernels for backend in self.backends)
        ]
        self.out: Path = arguments.out
        self.out.mkdir(parents=True, exist_ok=True)
        self.origin = provenance(self.device)
        key = digest(self.origin.device_name, self.origin.torch, self.origin.triton)
        self.state = State(self.out / f"gpu-check-{key}.state")
        # A second copy, for the case that the folder of results is emptied between two calls.
        self.spare = ROOT / "build" / "gpu-check" / self.state.path.name
        if self.spare.exists() and not self.state.path.exists() and not self.rehearse:
            shutil.copyfile(self.spare, self.state.path)
        self.log = self.out / "gpu-check.log"

    def say(self, text: str, *, aside: bool = False) -> None:
        """To the log and, unless it is an aside, to the terminal."""
        stamped = f"[{time.monotonic() - self.began:5.0f} s] {text}"
        with self.log.open("a", encoding="utf-8") as file:
            file.write(stamped + "\n")
        if not aside:
            print(stamped, flush=True)

    def run(self, jobs: Sequence[Job], at_once: int, deadline: float) -> Iterable[Ended]:
        for ended in run_jobs(jobs, at_once, deadline):
            self.say(f"----- {ended.job.name}: {' '.join(ended.job.command)}\n{ended.output}", aside=True)
            yield ended

    def worker(self, task: str, *options: str) -> list[str]:
        command = [sys.executable, "-m", "diffpp_fast.bench.gpu_check", "--worker", task]
        command += ["--state", str(self.state.path), *(["--rehearse"] if self.rehearse else [])]
        return [*command, *options]

    @property
    def environment(self) -> dict[str, str | None]:
        """The environment of the workers: whether Triton interprets, and where the package is."""
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        return {
            "TRITON_INTERPRET": "1" if self.rehearse else None,
            "DIFFPP_FAST_BACKEND": None,
            "PYTHONPATH": path,
            "PYTHONUNBUFFERED": "1",
        }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu_check", description=__doc__.partition("\n\n")[0])
    add = parser.add_argument
    out = "for files ($OUT, else benchmarks/results; of a rehearsal build/rehearsal)"
    add("--out", type=Path, default=os.environ.get("OUT") or None, metavar="FOLDER", help=out)
    add("--seconds", type=float, default=SECONDS, metavar="N", help=f"for everything ({SECONDS:.0f})")
    add("--ops", type=lambda text: text.split(","), metavar="NAME,...", help="operators (all)")
    add("--steps-only", action="store_true", help="nothing but whole training steps; goes on where it stopped, too")
    add("--rehearse", action="store_true", help="the same steps without a GPU, on tiny tensors")
    add("--worker", choices=["gate", "bench"], help=argparse.SUPPRESS)
    add("--backend", help=argparse.SUPPRESS)
    add("--state", type=Path, help=argparse.SUPPRESS)
    add("--most", type=int, help=argparse.SUPPRESS)
    add("--sanitized", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    arguments.out = arguments.out or Path("build/rehearsal" if arguments.rehearse else "benchmarks/results")
    unknown = [op for op in arguments.ops or () if op not in dispatch.OPS]
    if unknown:
        parser.error(f"--ops: unknown {', '.join(unknown)}; known: {', '.join(dispatch.OPS)}")
    if not arguments.rehearse and not torch.cuda.is_available():
        print(
            "error: PyTorch finds no GPU; `make gpu-check REHEARSE=1` goes through the steps without", file=sys.stderr
        )
        return 2
    if arguments.worker == "gate":
        return _gate(arguments)
    if arguments.worker == "bench":
        return _bench(arguments)
    session = Session(arguments)

    def interrupt() -> None:
        raise KeyboardInterrupt

    with on_termination(interrupt):
        try:
            session.say(f"{session.origin.device_name}, torch {session.origin.torch}, triton {session.origin.triton}")
            if not session.steps_only:
                _check(session)
                _measure_reward_path(session, "eager and fused", "--no-compile")
                _check_plan(session)
                _measure(session)
                if not session.rehearse:  # the compiler takes minutes without a GPU
                    _measure_reward_path(session, "compiled", "--providers", "eager,compile,fused,fused-compile")
            _measure_steps(session)
        except KeyboardInterrupt:
            session.say("interrupted: what is done is reported")
        with on_termination(lambda: None):
            return _report(session)


# Checks


def _check(session: Session) -> None:
    """Build, correctness, sanitizer, tests; as many at once as there are processors for."""
    # Triton's kernels need no build, so they are checked while csrc is compiled. What takes longest comes first.
    first = [*_build(session), *_gates(session, "triton")]
    second = [*_tests(session), *_sanitizers(session), *_gates(session, session.backends[1])]
    second += _gates(session, "reference")
    at_once = max(1, min(12, (os.cpu_count() or 1) - 2))
    for jobs in (first, second):
        for ended in session.run(jobs, at_once, session.checks_end):
            _note(session, ended)


def _build(session: Session) -> list[Job]:
    if session.rehearse and native.unavailable() is None:
        return []
    if not (ROOT / "setup.py").exists():
        session.say("csrc is not built: there is no setup.py here, the installed library is used")
        return []
    command = ["env", "-C", str(ROOT), sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    if session.rehearse:
        limit = session.checks_end - time.monotonic()
        return [Job("build", command, limit, {**session.environment, "DIFFPP_FAST_CUDA": "0"})]
    # Objects for other GPUs stay apart.
    arch = "{}{}".format(*torch.cuda.get_device_capability())
    folder = ROOT / "build" / f"gpu-check-sm_{arch}"
    environment = {**session.environment, "DIFFPP_FAST_CUDA_ARCHS": arch}
    return [Job("build", [*command, "--build-temp", str(folder)], BUILD_LIMIT, environment)]


def _gates(session: Session, backend: str) -> list[Job]:
    """A job for each operator; in a rehearsal one for all, since starting takes longest."""
    done = session.state.read()
    ops = [op for op in session.ops if (op, backend) in dispatch._kernels and ("gate", op, backend) not in done]
    groups = [ops] if session.rehearse else [[op] for op in ops]
    return [
        Job(
            f"gate {','.join(group)} {backend}",
            session.worker("gate", "--backend", backend, "--ops", ",".join(group)),
            GATE_LIMIT,
            session.environment,
        )
        for group in groups
        if group
    ]


def _sanitizers(session: Session) -> list[Job]:
    """Out-of-bounds and misaligned accesses, on a few combinations of options."""
    if session.rehearse:
        return []
    program = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if program is None:
        session.say("compute-sanitizer is not installed: memory accesses are not checked")
        return []
    # Torch's cache would hide accesses beyond a tensor but within a block of its own.
    environment = {**session.environment, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    prefix = [program, "--tool", "memcheck", "--error-exitcode", str(SANITIZER_ERRORS), "--print-limit", "20"]
    done = session.state.read()
    return [
        Job(
            f"sanitizer {backend}",
            [*prefix, *session.worker("gate", "--backend", backend, "--sanitized", "--ops", ",".join(session.ops))],
            SANITIZER_LIMIT,
            environment,
        )
        for backend in session.backends
        if ("step", f"sanitizer {backend}") not in done
    ]


def _tests(session: Session) -> list[Job]:
    missing = _missing("pytest", "hypothesis")
    if missing or not (ROOT / "tests").is_dir():
        session.say(f"the tests are left out: {' and '.join(missing) or 'tests/'} missing")
        return []
    if session.state.read().get(("step", "tests"), ("", False))[1]:
        return []
    files = sorted(str(path) for pattern in TESTS for path in ROOT.glob(pattern))
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider", "--rootdir", str(ROOT)]
    if importlib.util.find_spec("xdist") is not None and not session.rehearse:
        command += ["-n", "4"]
    command += ["--collect-only", *files[:1]] if session.rehearse else files
    return [Job("tests", ["env", "-C", str(ROOT), *command], TESTS_LIMIT, session.environment)]


def _note(session: Session, ended: Ended) -> None:
    """Says how a job ended and keeps it."""
    kind, *rest = ended.job.name.split(" ")
    stopped = ended.code is None and time.monotonic() >= session.checks_end
    if kind == "gate":
        done = session.state.read()
        for op in rest[0].split(","):
            verdict = done.get(("gate", op, rest[1]))
            if verdict is None and not stopped:
                verdict = Verdict(op, rest[1], 0, 0, 0, [ended.why], fatal=True)
                session.state.add(("gate", op, rest[1]), verdict)
            session.say(f"{op}, {rest[1]}: {'stopped' if verdict is None else _in_words(verdict)}")
        return
    right = ended.code == 0
    errors = [line for line in ended.output.splitlines() if line.startswith("========= ") and "memcheck" not in line]
    why = "; ".join(errors[:3]) if ended.code == SANITIZER_ERRORS else ended.why
    session.say(f"{ended.job.name}: {why}")
    if not stopped:
        session.state.add(("step", ended.job.name), (why, right))


def _in_words(verdict: Verdict) -> str:
    counts = f"{verdict.checked} of {verdict.total} combinations of options, {verdict.wanted} wanted"
    more = f"{verdict.graphs} captured graphs, {verdict.compiled} compiled"
    return f"{verdict.summary} ({counts}; {more})" + "".join(f"\n    {sentence}" for sentence in verdict.wrong)


def _gate(arguments: argparse.Namespace) -> int:
    """The worker: judges operators on one backend and writes the verdicts."""
    state = State(arguments.state)
    device = torch.device("cpu" if arguments.rehearse else "cuda")
    everything = not arguments.rehearse and not arguments.sanitized
    plain = arguments.backend == "reference"
    compiler = "inductor" if everything and not plain else None
    checks = Checks(device, everything and not plain, compiler, None if everything else 3)
    code = 0
    for op in arguments.ops:
        if (op, arguments.backend) not in dispatch._kernels:
            continue
        seconds = 0.0 if plain else GATE_SECONDS
        verdict = gpu_gate.judge(op, arguments.backend, checks, time.monotonic() + seconds)
        if not arguments.sanitized:
            state.add(("gate", op, arguments.backend), verdict)
        print(op, arguments.backend, _in_words(verdict))
        code = code or int(bool(verdict.wrong))
    return code


# Benchmark


def _measure(session: Session) -> None:
    """Runs the worker until every case is measured or the time is over; one that dies is started again."""
    left = _left(session)
    while left and time.monotonic() < session.deadline:
        seconds = session.deadline - time.monotonic()
        command = session.worker("bench", "--ops", ",".join(session.ops))
        session.say(f"benchmark: {len(left)} cases to go")
        for ended in session.run([Job("benchmark", command, seconds, session.environment)], 1, session.deadline):
            begun = session.state.read().get(("begun",))
            if ended.code is not None and begun is not None:
                session.say(f"{begun}: {ended.why}")
                session.state.add(("bench", *begun), None)
            elif ended.code:
                session.say(f"benchmark: {ended.why}")
        before, left = left, _left(session)
        if len(left) == len(before):
            return  # it does not even begin


def _measure_reward_path(session: Session, which: str, *options: str) -> None:
    """`diffpp-fast bench reward`, as long as it may take: its figures are files of their own."""
    missing = _missing("diffusers", "transformers")
    name = f"reward path, {which}"
    if missing:
        session.say(f"{name}: left out, for {' and '.join(missing)} is not installed")
        return
    if session.state.read().get(("step", name), ("", False))[1]:
        return
    model = ("small", "--rounds", "2") if session.rehearse else ("sd15", "--rounds", "10")
    out = session.out / "reward-path" / which.replace(" ", "-")
    command = [
        sys.executable,
        "-m",
        "diffpp_fast",
        "bench",
        "reward",
        "--device",
        session.device.type,
        "--model",
        *model,
    ]
    job = Job(name, [*command, *options, "--out", str(out)], REWARD_LIMIT, session.environment)
    for ended in session.run([job], 1, session.deadline):
        session.say(f"{name}: {ended.why}")
        if ended.code is not None:
            session.state.add(("step", name), (ended.why, ended.code == 0))
        print(ended.output if ended.code == 0 else "", flush=True)


def _check_plan(session: Session) -> None:
    """The bytes that `diffpp-fast plan` says against those that an engine holds."""
    name = "plan"
    missing = _missing("diffusers", "pydantic")
    if missing or session.state.read().get(("step", name), ("", False))[1]:
        session.say(f"{name}: {'left out, for ' + ' and '.join(missing) + ' is not installed' if missing else 'done'}")
        return
    command = [sys.executable, str(ROOT / "tests" / "planning_check.py"), "--device", session.device.type]
    for ended in session.run([Job(name, command, PLAN_LIMIT, session.environment)], 1, session.deadline):
        session.say(f"{name}: {ended.why}")
        if ended.code is not None:
            session.state.add(("step", name), (ended.why, ended.code == 0))
        print(ended.output, flush=True)


def _measure_steps(session: Session) -> None:
    """`diffpp-fast bench step` on what is not measured yet; one that is stopped leaves the files it has written."""
    if missing := _missing(*STEPS_NEED):
        session.say(f"whole steps: left out, for {' and '.join(missing)} is not installed")
        return
    for name, options in _steps_left(session).items():
        if session.deadline - time.monotonic() < STEP_LEAST * (not session.rehearse):
            return
        out = session.out / "whole-step" / name.removeprefix("whole step, ").replace(", ", "-").replace(" ", "-")
        command = [sys.executable, "-m", "diffpp_fast", "bench", "step", "--device", session.device.type, *options]
        command += ["--rounds", "2" if session.rehearse else "5", "--out", str(out)]
        job = Job(name, command, STEP_LIMITS["--no-compile" not in options], session.environment)
        for ended in session.run([job], 1, session.deadline):
            session.say(f"{name}: {ended.why}")
            # An exit code of 2 says that its weights don't fit into this GPU: nothing is wrong, and nothing to be done.
            if ended.code is not None:
                session.state.add(("step", name), (ended.why, ended.code in (0, 2)))
            print(ended.output if ended.code in (0, None) else "", flush=True)


def _steps_left(session: Session) -> dict[str, tuple[str, ...]]:
    """Benchmarks of whole steps that can be run and have not come to their end: name and options."""
    if _missing(*STEPS_NEED):
        return {}
    done = session.state.read()
    steps = {
        f"whole step, {which}": options for which, options in (REHEARSED_STEPS if session.rehearse else STEPS).items()
    }
    return {name: options for name, options in steps.items() if not done.get(("step", name), ("", False))[1]}


def _missing(*packages: str) -> list[str]:
    return [package for package in packages if importlib.util.find_spec(package) is None]


def _left(session: Session) -> list[tuple[Case, torch.dtype]]:
    done = session.state.read()
    return [
        (case, dtype) for case, dtype in _to_measure(session.ops, session.rehearse) if _key(case, dtype) not in done
    ]


def _to_measure(ops: Sequence[str], rehearse: bool) -> list[tuple[Case, torch.dtype]]:
    """Cases and dtypes, what tells most first: every operator at its quick size, then the other sizes."""
    if rehearse:
        cases = {case.op: small(case) for case in all_cases() if case.op in ops}
        if "reward_pixels" in cases:
            cases["reward_pixels"] = cases["reward_pixels"]._replace(shape=SQUARE)
        return [(case, torch.float32) for case in cases.values()]
    quick = choose(ops, ["quick"])
    rest = [case for case in choose(ops, ["full"]) if case not in quick]
    return [(case, dtype) for cases in (quick, rest) for dtype in BENCH_DTYPES for case in cases]


def _key(case: Case, dtype: torch.dtype) -> tuple[str, str, str]:
    return "bench", case.name, str(dtype)


def _bench(arguments: argparse.Namespace) -> int:
    """The worker: measures what is not measured yet, and keeps each group as soon as it is there."""
    state = State(arguments.state)
    device = torch.device("cpu" if arguments.rehearse else "cuda")
    names = ("triton", "cpu" if arguments.rehearse else "cuda")
    done = state.read()
    state.add(("begun",), None)
    for case, dtype in _to_measure(arguments.ops, arguments.rehearse):
        key = _key(case, dtype)
        if key in done:
            continue
        broken = [name for name in names if _fatal(done.get(("gate", case.op, name)))]
        plan = Plan(
            cases=[case],
            backends=[name for name in providers.serving(names, device) if name not in broken],
            dtypes=[dtype],
            threads=[torch.get_num_threads()],
            device=device,
            min_time=0.002 if arguments.rehearse else MIN_TIME,
            compile=not arguments.rehearse,
        )
        state.add(("begun",), key[1:])
        (group,) = measure(plan)
        state.add(key, group)
        state.add(("begun",), None)
        print(*key[1:], *failures(group))
    return 0


def _fatal(verdict: Verdict | None) -> bool:
    return verdict is not None and verdict.fatal


# Report


def _report(session: Session) -> int:
    """Writes the files and prints the table, last. Returns the exit code."""
    done = session.state.read()
    measured = [
        done[key] for key in (_key(*pair) for pair in _to_measure(session.ops, session.rehearse)) if done.get(key)
    ]
    left = _left(session)
    verdicts = {key[1:]: value for key, value in done.items() if key[0] == "gate"}
    steps = {key[1]: value for key, value in done.items() if key[0] == "step"}
    unjudged = [
        f"{op} on {backend}"
        for op in session.ops
        for backend in (*session.backends, "reference")
        if (op, backend) in dispatch._kernels and (op, backend) not in verdicts
    ]
    wrong = [f"{op}, {backend}: {s}" for (op, backend), verdict in verdicts.items() for s in verdict.wrong]
    wrong += [sentence for group in measured for sentence in failures(group)]
    wrong += [f"{name}: {why}" for name, (why, right) in steps.items() if not right]
    wrong += [f"benchmark: {key[1]}, {key[2]}: the process died" for key, value in done.items() if _died(key, value)]
    left_out = [*unjudged, *(f"benchmark of {case.name}, {str(dtype)[6:]}" for case, dtype in left)]
    left_out = [
        *([] if session.steps_only else left_out),
        *(name for name in _steps_left(session) if name not in steps),
    ]
    paths = []
    if measured:
        stem = session.out / f"kernels-{session.device.type}-gpu-check"
        paths = write_results(stem, measured, session.origin, session.device)
    table = _table(session, measured, verdicts)
    page = session.out / "gpu-check.md"
    page.write_text(_markdown(session.origin, table, wrong, left_out, steps), encoding="utf-8")
    if not session.rehearse:
        session.spare.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(session.state.path, session.spare)
    for path in (*paths, page, session.log, session.state.path):
        print(f"written: {path}")
    for sentence in wrong:
        session.say(f"WRONG: {sentence}")
    if left_out:
        session.say(f"left out, the time was over; another call goes on from here: {'; '.join(left_out)}")
    print(f"\n{table}\n")
    print(f"{len(wrong)} failures, {len(left_out)} left out, {time.monotonic() - session.began:.0f} s", flush=True)
    return 1 if wrong else 0


def _died(key: tuple[Any, ...], value: object) -> bool:
    return key[0] == "bench" and value is None


def _table(session: Session, measured: Sequence[Group], verdicts: dict[tuple[Any, ...], Verdict]) -> str:
    """One line per operator and backend; the last three columns are of the case with the most traffic."""
    header = ("op", "backend", "is", "cases", "x eager", "x compile", "GB/s", "% copy", "of")
    rows = [header]
    for op in session.ops:
        for backend in session.backends:
            if (op, backend) not in dispatch._kernels:
                continue
            verdict = verdicts.get((op, backend))
            found = [
                comparison
                for group in measured
                for comparison in compare(group)
                if comparison.backend is not None
                and comparison.backend.timing is not None
                and (comparison.backend.case.op, comparison.backend.provider) == (op, backend)
            ]
            ratios = (
                _mean(comparison.x_eager for comparison in found),
                _mean(comparison.x_compile for comparison in found),
            )
            rows.append(
                (op, backend, verdict.summary if verdict else "unknown", str(len(found)), *ratios, *_peak(found))
            )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _mean(ratios: Iterable[float | None]) -> str:
    known = [ratio for ratio in ratios if ratio is not None]
    return f"{statistics.geometric_mean(known):.2f}" if known else "-"


def _peak(found: Sequence[Comparison]) -> tuple[str, str, str]:
    largest = max(found, key=lambda comparison: comparison.eager.bytes, default=None)
    if largest is None or largest.backend is None:
        return "-", "-", "-"
    rate, copy = largest.backend.bandwidth or math.nan, largest.copy.bandwidth or math.nan
    dtype = str(largest.backend.dtype).removeprefix("torch.")
    return f"{rate * 1e-9:.0f}", f"{100.0 * rate / copy:.0f}", f"{largest.backend.case.size} {dtype}"


def _markdown(
    origin: Provenance, table: str, wrong: Sequence[str], left_out: Sequence[str], steps: dict[str, tuple[str, bool]]
) -> str:
    parts = [
        f"# gpu-check\n\n{origin.device_name}, {origin.date}, commit {origin.commit or 'unknown'}"
        f"{' with changes' if origin.dirty == 'yes' else ''}, torch {origin.torch}, triton {origin.triton or 'none'}, "
        f"Python {origin.python}.\n\nSpeed-ups are geometric means over the cases; the rate is that of the case with "
        f"the most traffic.\n\n```text\n{table}\n```\n"
    ]
    titles = {"Wrong": wrong, "Left out": left_out, "Steps": [f"{name}: {why}" for name, (why, _) in steps.items()]}
    for title, sentences in titles.items():
        if sentences:
            parts.append(f"## {title}\n\n" + "\n".join(f"- {sentence}" for sentence in sentences) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
