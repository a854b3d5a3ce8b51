"""`make gpu-check`: everything that needs a GPU, in one command with a time limit.

pytest runs what is right (tests/test_gpu.py), this package what is fast: the kernels, the reward path, and whole steps
in the time that is left, or, with --steps-only, in all of it. It ends with one line per operator and backend. What is
done is kept; another call goes on from there.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import backends, gpu_session, kernels, tables
from benchmarks.cases import Case, all_cases, choose, small
from benchmarks.gpu_session import ROOT, SECONDS, Session, State
from benchmarks.kernels import KernelPlan, compare, failures, mean, measure
from benchmarks.tables import Place, Table, dtype_name

REWARD_LIMIT = 120.0
#: Of a benchmark of whole steps, by whether it compiles; and the least time in which one is begun.
STEP_LIMITS = {False: 260.0, True: 445.0}
STEP_LEAST = 100.0
#: The options of `python -m benchmarks step`, what tells most first. One call has the time to compile one provider.
STEPS: dict[str, tuple[str, ...]] = {
    "sd15, eager and fused": ("--model", "sd15", "--no-compile"),
    "sd15, compile": ("--model", "sd15", "--providers", "eager,fused,compile"),
    "sdxl, eager and fused": ("--model", "sdxl", "--no-compile"),
    "sd15, fused and compile": ("--model", "sd15", "--providers", "eager,fused,fused-compile"),
}
REHEARSED_STEPS: dict[str, tuple[str, ...]] = {
    "tiny, eager and fused": ("--model", "tiny", "--no-compile", "--providers", "eager,fused")
}
NETWORKS = ("diffusers", "transformers")
#: Per provider and case of the benchmark.
MIN_TIME = 0.1
#: Images of a rehearsal: the unfused code takes square ones.
SQUARE = (1, 3, 40, 40)
#: In the order in which they are worth measuring.
DTYPES = (torch.bfloat16, torch.float32)
WITHOUT_PYTEST = (
    "error: pytest is not installed, and runs the checks. Without a network, carry it: `pip install --target FOLDER "
    "pytest` where there is one, then `PYTHONPATH=FOLDER make gpu-check`"
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu_check", description=__doc__.partition("\n\n")[0])
    add = parser.add_argument
    out = "for files ($OUT, else benchmarks/results; of a rehearsal build/rehearsal)"
    add("--out", type=Path, metavar="FOLDER", help=out)
    add("--seconds", type=float, default=SECONDS, metavar="N", help=f"for everything ({SECONDS:.0f})")
    add("--ops", type=lambda text: text.split(","), metavar="NAME,...", help="operators (all)")
    add("--steps-only", action="store_true", help="nothing but whole training steps; goes on where it stopped, too")
    add("--rehearse", action="store_true", help="the same steps without a GPU, on tiny tensors")
    add("--measure-into", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    unknown = [op for op in arguments.ops or () if op not in backends.OPS]
    if unknown:
        parser.error(f"--ops: unknown {', '.join(unknown)}; known: {', '.join(backends.OPS)}")
    if arguments.measure_into is not None:
        return _measure_kernels(State(arguments.measure_into), arguments.ops, arguments.rehearse)
    if not arguments.rehearse and not torch.cuda.is_available():
        print(
            "error: PyTorch finds no GPU; `make gpu-check REHEARSE=1` goes through the steps without", file=sys.stderr
        )
        return 2
    if _missing("pytest"):
        print(WITHOUT_PYTEST, file=sys.stderr)
        return 2
    session = Session(rehearse=arguments.rehearse, seconds=arguments.seconds, ops=arguments.ops, out=arguments.out)
    code = 0
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        session.say(f"{session.origin.device_name}, torch {session.origin.torch}, triton {session.origin.triton}")
        if not arguments.steps_only:
            code = _check(session)
            _measure_reward_path(session, "eager and fused", "--no-compile")
            _measure(session)
            if not session.rehearse:  # the compiler takes minutes without a GPU
                _measure_reward_path(session, "compiled", "--providers", "eager,compile,fused,fused-compile")
        _measure_steps(session)
    except KeyboardInterrupt:
        session.say("interrupted: what is done is reported")
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        return _report(session, arguments.steps_only) or code
    finally:
        signal.signal(signal.SIGTERM, before)


def _check(session: Session) -> int:
    """Run pytest in this process, whose tests only wait for others. Return 1 where one failed for another reason."""
    import pytest

    gpu_session.current = session
    options = ["-q", "-s", "--tb=line", "-m", "gpu", "-p", "no:cacheprovider", "-p", "no:xdist", "--rootdir", str(ROOT)]
    code = pytest.main([*options, str(ROOT / "tests/test_gpu.py")])
    if code == pytest.ExitCode.INTERRUPTED:
        raise KeyboardInterrupt
    return int(code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED))


# Speed


def _measure(session: Session) -> None:
    """Run the worker until every case is measured or the time is over; one that dies is started again."""
    left = _left(session)
    while left and time.monotonic() < session.deadline:
        session.say(f"benchmark: {len(left)} cases to go")
        command = [sys.executable, "-m", "benchmarks.gpu_check", "--measure-into", str(session.state.path)]
        command += ["--ops", ",".join(session.ops), *(["--rehearse"] if session.rehearse else [])]
        ended = session.run("benchmark", command, math.inf, session.deadline)
        begun = session.state.read().get(("begun",))
        if ended.code is not None and begun is not None:
            session.say(f"{begun}: {ended.why}")
            session.state.add(("bench", *begun), None)
        elif ended.code:
            session.say(f"benchmark: {ended.why}")
        before, left = left, _left(session)
        if len(left) == len(before):
            return  # it does not even begin


def _measure_kernels(state: State, ops: Sequence[str], rehearse: bool) -> int:
    """Measure what is not measured yet, and keep each group as soon as it is there: the worker."""
    device = torch.device("cpu" if rehearse else "cuda")
    names = ("triton", "cpu" if rehearse else "cuda")
    done = state.read()
    state.add(("begun",), None)
    for case, dtype in _to_measure(ops, rehearse):
        key = _key(case, dtype)
        if key in done:
            continue
        plan = KernelPlan(
            cases=[case],
            backends=[name for name in backends.serving(names, device) if not _is_fatal(done, case.op, name)],
            dtypes=[dtype],
            threads=[torch.get_num_threads()],
            device=device,
            min_time=0.002 if rehearse else MIN_TIME,
            compile=not rehearse,
        )
        state.add(("begun",), key[1:])
        (group,) = measure(plan)
        state.add(key, group)
        state.add(("begun",), None)
        print(*key[1:], *failures(group))
    return 0


def _is_fatal(done: dict[tuple[Any, ...], Any], op: str, backend: str) -> bool:
    """Whether the operator brought its process down when it was checked."""
    verdict = done.get(("gate", op, backend))
    return verdict is not None and bool(verdict.fatal)


def _measure_reward_path(session: Session, which: str, *options: str) -> None:
    """Run `python -m benchmarks reward`, as long as it may take: its figures are files of their own."""
    model = ("small", "--rounds", "2") if session.rehearse else ("sd15", "--rounds", "10")
    _measure_subject(session, "reward", f"reward path, {which}", REWARD_LIMIT, "--model", *model, *options)


def _measure_steps(session: Session) -> None:
    """Run `python -m benchmarks step` on what is not measured yet; one that is stopped leaves the files it has."""
    for which, options in _steps(session).items():
        if session.deadline - time.monotonic() < STEP_LEAST * (not session.rehearse):
            return
        rounds = "2" if session.rehearse else "5"
        limit = STEP_LIMITS["--no-compile" not in options]
        _measure_subject(session, "step", f"whole step, {which}", limit, *options, "--rounds", rounds)


def _measure_subject(session: Session, subject: str, name: str, limit: float, *options: str) -> None:
    if missing := _missing(*NETWORKS):
        session.say(f"{name}: left out, for {' and '.join(missing)} is not installed")
        return
    if session.is_done(name) or time.monotonic() >= session.deadline:
        return
    folder, _, which = name.partition(", ")
    out = session.out / folder.replace(" ", "-") / which.replace(", ", "-").replace(" ", "-")
    command = [sys.executable, "-m", "benchmarks", subject, "--device", session.device.type, *options]
    ended = session.run(name, [*command, "--out", str(out)], limit, session.deadline)
    session.say(f"{name}: {ended.why}")
    # An exit code of 2 says that a step's weights don't fit into this GPU: nothing is wrong, and nothing to be done.
    if ended.code is not None:
        session.state.add(("step", name), (ended.why, ended.code == 0 or (ended.code, subject) == (2, "step")))
    print(ended.output if ended.code in (0, None) else "", flush=True)


def _steps(session: Session) -> dict[str, tuple[str, ...]]:
    return REHEARSED_STEPS if session.rehearse else STEPS


def _missing(*packages: str) -> list[str]:
    return [package for package in packages if importlib.util.find_spec(package) is None]


def _left(session: Session) -> list[tuple[Case, torch.dtype]]:
    done = session.state.read()
    return [pair for pair in _to_measure(session.ops, session.rehearse) if _key(*pair) not in done]


def _to_measure(ops: Sequence[str], rehearse: bool) -> list[tuple[Case, torch.dtype]]:
    """Return cases and dtypes, what tells most first: every operator at its quick size, at 256 MB, then the others."""
    if rehearse:
        cases = {case.op: small(case) for case in all_cases() if case.op in ops}
        if "reward_pixels" in cases:
            cases["reward_pixels"] = cases["reward_pixels"]._replace(shape=SQUARE)
        return [(case, torch.float32) for case in cases.values()]
    quick, large = choose(ops, ["quick"]), choose(ops, ["large"])
    rest = [case for case in choose(ops, ["full"]) if case not in quick]
    order = [(quick, DTYPES), (large, DTYPES[:1]), (rest, DTYPES)]
    return [(case, dtype) for cases, dtypes in order for dtype in dtypes for case in cases]


def _key(case: Case, dtype: torch.dtype) -> tuple[str, str, str]:
    return "bench", case.name, str(dtype)


# Report


def _report(session: Session, steps_only: bool) -> int:
    """Write the files and print the table, last. Return the exit code."""
    done = session.state.read()
    measured = [done[key] for pair in _to_measure(session.ops, session.rehearse) if done.get(key := _key(*pair))]
    steps = {key[1]: value for key, value in done.items() if key[0] == "step"}
    verdicts = [value for key, value in done.items() if key[0] == "gate"]
    wrong = [f"{each.op}, {each.backend}: {sentence}" for each in verdicts for sentence in each.wrong]
    wrong += [sentence for group in measured for sentence in failures(group)]
    wrong += [f"{name}: {why}" for name, (why, right) in steps.items() if not right]
    wrong += [
        f"benchmark: {key[1]}, {key[2]}: the process died"
        for key, value in done.items()
        if key[0] == "bench" and value is None
    ]
    table = _table(session, measured)
    paths: list[Path] = []
    if measured:
        place = Place(session.out / f"kernels-{session.device.type}-gpu-check", None, "kernels", session.device.type)
        paths += kernels.write(place, measured, session.origin, session.device)
    left_out = _left_out(session, steps_only)
    paths.append(session.out / "gpu-check.md")
    titles = {"Wrong": wrong, "Left out": left_out, "Steps": [f"{name}: {why}" for name, (why, _) in steps.items()]}
    parts = [
        f"# gpu-check\n\n{session.origin}\nSpeed-ups are geometric means over the cases; the rate is that of the case "
        f"with the most traffic.\n\n```text\n{table}\n```\n",
        *(f"## {title}\n\n{tables.bullets(sentences)}" for title, sentences in titles.items() if sentences),
    ]
    paths[-1].write_text("\n".join(parts), encoding="utf-8")
    session.keep()
    for path in (*paths, session.log, session.state.path):
        print(f"written: {path}")
    for sentence in wrong:
        session.say(f"WRONG: {sentence}")
    if left_out:
        session.say(f"left out, the time was over; another call goes on from here: {'; '.join(left_out)}")
    print(f"\n{table}\n")
    print(f"{len(wrong)} failures, {len(left_out)} left out, {time.monotonic() - session.began:.0f} s", flush=True)
    return 1 if wrong else 0


def _left_out(session: Session, steps_only: bool) -> list[str]:
    unjudged = [
        f"{op} on {backend}"
        for op in session.ops
        for backend in (*session.backends, "reference")
        if backends.has_kernel(op, backend) and session.verdict(op, backend) is None
    ]
    unmeasured = [f"benchmark of {case.name}, {dtype_name(dtype)}" for case, dtype in _left(session)]
    steps = [] if _missing(*NETWORKS) else [f"whole step, {which}" for which in _steps(session)]
    left = [name for name in steps if session.step(name) is None]
    return left if steps_only else [*unjudged, *unmeasured, *left]


def _table(session: Session, measured: Sequence[kernels.Group]) -> str:
    """One line per operator and backend; the last three columns are of the case with the most traffic."""
    rows: list[Sequence[str]] = [("op", "backend", "is", "cases", "x eager", "x compile", "GB/s", "% copy", "of")]
    comparisons = [comparison for group in measured for comparison in compare(group)]
    for op in session.ops:
        for backend in session.backends:
            if not backends.has_kernel(op, backend):
                continue
            verdict = session.verdict(op, backend)
            found = [
                (each, each.backend)
                for each in comparisons
                if each.backend is not None and each.backend.timing is not None
                if (each.backend.case.op, each.backend.provider) == (op, backend)
            ]
            ratios = mean([each.x_eager for each, _ in found]), mean([each.x_compile for each, _ in found])
            peak = ("-", "-", "-")
            if found:
                largest, own = max(found, key=lambda pair: pair[1].bytes)
                rate, copy = own.bandwidth or math.nan, largest.copy.bandwidth or math.nan
                peak = f"{rate * 1e-9:.0f}", f"{100.0 * rate / copy:.0f}", f"{own.case.size} {dtype_name(own.dtype)}"
            rows.append((op, backend, verdict.summary if verdict else "unknown", str(len(found)), *ratios, *peak))
    return tables.text(Table(rows))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # One module for this process and its tests.
    from benchmarks import gpu_check

    sys.exit(gpu_check.main())
