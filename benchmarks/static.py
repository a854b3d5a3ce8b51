"""`python -m benchmarks static`: what every GPU kernel executes and moves, counted in its machine code, without a GPU.

The public operators run on tensors of the CPU; their launches are compiled for the GPU that is named and walked
(`walk`), not launched. Instructions are those of threads, divided by the elements of the operator's tensor: every
instruction takes a warp's slot of issue, also where a thread takes no part. The cap is the share of the copy bandwidth
that issuing them leaves possible. Latency, occupancy, conflicts of banks and what the caches hold are not seen.
"""

from __future__ import annotations

import argparse
import math
import os
import pickle
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import backends, csrc_launches, inductor, launches, tables
from benchmarks.cases import SELECTIONS, Case, choose, make_inputs, unfused
from benchmarks.launches import Count, Launch
from benchmarks.machine_code import ALL_PIPES
from benchmarks.static_worker import LIBRARY
from benchmarks.tables import Place, Table
from benchmarks.timing import provenance
from benchmarks.walk import WARP, WalkError
from diffpp_fast.errors import ConfigurationError
from diffpp_fast.selftest import CPU
from diffpp_fast.user_paths import user_path


class Gpu(NamedTuple):
    """A GPU as the caps reckon with it."""

    arch: int
    multiprocessors: int
    clock: float  # Hz that it holds under load
    slots: int  # instructions of warps that a multiprocessor issues in a cycle
    copy: float  # bytes per second that a copy reads and writes
    cache: int  # bytes of the last level

    @property
    def per_byte(self) -> float:
        """Instructions of threads to a byte beyond which issuing them limits, and not memory."""
        return WARP * self.multiprocessors * self.slots * self.clock / self.copy


GPUS = {"H200": Gpu(90, 132, 1.755e9, 4, 4.3e12, 50 * 2**20)}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
BACKENDS = ("triton", "cuda", "compile")
DIRECTIONS = ("forward", "backward")
#: With drawn noise the unfused code still reads a tensor: it is the same code.
READ_STORED = ("denoising_loss", "score_gap", "sid_loss", "sim_loss")
#: torch.compile calls a kernel of torch's own, of which there is no code without a GPU.
NOT_INDUCTORS = ("reward_pixels",)
#: What the budget counts for.
BUDGET_GPU = "H200"
#: Cases of the budget: a size of each operator, and of group norm one beyond and one below the cache.
BUDGET_SIZES = ("quick", "vae-128x512", "unet-320x64-b4")
BUDGET_DTYPES = ("bfloat16", "float32")


class Task(NamedTuple):
    """An operator on a backend: the work of one process."""

    backend: str
    op: str
    sizes: tuple[str, ...]
    dtypes: tuple[str, ...]
    gpu: str


class Pass(NamedTuple):
    """The launches of a case's forward or backward pass."""

    case: Case
    dtype: str
    backend: str
    direction: str
    counts: tuple[Count, ...]
    failure: str = ""

    @property
    def elements(self) -> int:
        """Elements of the tensor that the operator works on."""
        return self.case.elements("y" if self.case.op == "geglu" else "x")

    @property
    def instructions(self) -> float:
        """Per element."""
        return sum(count.instructions for count in self.counts) / self.elements

    @property
    def bytes(self) -> float:
        """Per element, from and to memory."""
        return sum(count.moved for count in self.counts) / self.elements

    def cap(self, gpu: Gpu) -> float | None:
        """The share of the copy bandwidth that issuing the instructions leaves possible."""
        return self.bytes * gpu.per_byte / self.instructions if self.counts else None


# Counting


def counted(task: Task) -> list[Pass]:
    """Count the cases of a task, in this process."""
    found: list[Pass] = []
    for case in choose([task.op], task.sizes):
        if task.backend == "compile" and case.noise == "drawn" and task.op in READ_STORED:
            continue
        for dtype in task.dtypes:
            if task.backend == "triton" and not backends.triton_takes(case.op, DTYPES[dtype]):
                continue
            try:
                passes = _passes(case, DTYPES[dtype], task)
            except WalkError as error:
                found.append(Pass(case, dtype, task.backend, DIRECTIONS[0], (), str(error)))
                continue
            found += [
                Pass(case, dtype, task.backend, direction, tuple(counts))
                for direction, counts in zip(DIRECTIONS, passes, strict=False)
            ]
    return found


def _passes(case: Case, dtype: torch.dtype, task: Task) -> list[list[Count]]:
    """Return the launches of the forward and, if there is one, of the backward pass."""
    gpu = GPUS[task.gpu]
    inputs = make_inputs(case, dtype, CPU)
    call = inputs.call
    passes: list[list[Count]] = [[]]

    def launched(launch: Launch) -> None:
        passes[-1].append(launches.count(launch, gpu.cache))

    if task.backend == "compile":

        def choose_one(choices: Sequence[Launch]) -> None:
            passes[-1].append(min((launches.count(each, gpu.cache) for each in choices), key=lambda c: c.instructions))

        with inductor.compiling(gpu.arch, gpu.multiprocessors, choose_one) as compiled:
            result = compiled(unfused(case))(**inputs.unfused)
            if call.wrt:
                passes.append([])
                first = result if isinstance(result, Tensor) else result[0]
                torch.autograd.grad(first, [inputs.unfused[name] for name in call.wrt], call.outer)
        return passes
    if task.backend == "triton":
        context = launches.triton_launches(gpu.arch, launched)
    else:
        known = [(name, value) for name, value in call.arguments.items() if isinstance(value, Tensor)]
        known += [("grad_output", call.outer)] if call.outer is not None else []
        context = csrc_launches.csrc_launches(Path(os.environ[LIBRARY]), gpu.arch, case.op, known, launched)
    with context:
        result = call.forward(**call.arguments)
        if call.wrt:
            passes.append([])
            first = result if isinstance(result, Tensor) else result[0]
            torch.autograd.grad(first, [call.arguments[name] for name in call.wrt], call.outer)
    return passes


def collect(tasks: Sequence[Task], jobs: int) -> Iterator[Pass]:
    """Count in processes of their own, as many at a time as `jobs`; yield in the order of the tasks."""
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(jobs) as pool:
        folder = Path(name)
        library = csrc_launches.build(folder) if any(task.backend == "cuda" for task in tasks) else None
        for passes in pool.map(lambda each: _in_process(each[0], each[1], folder, library), enumerate(tasks)):
            yield from passes


def _in_process(number: int, task: Task, folder: Path, library: Path | None) -> list[Pass]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    if task.backend == "cuda":
        environment |= {LIBRARY: str(library), "LD_PRELOAD": str(folder / csrc_launches.REMEMBERED)}
    output = folder / f"{number}.pickle"
    command = [sys.executable, "-m", "benchmarks.static_worker", str(output)]
    done = subprocess.run(command, env=environment, input=pickle.dumps(task), capture_output=True)
    if done.returncode != 0:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        (case, *_) = choose([task.op], task.sizes)
        return [Pass(case, task.dtypes[0], task.backend, DIRECTIONS[0], (), f"{task.op}: {last[0]}")]
    passes: list[Pass] = pickle.loads(output.read_bytes())
    return passes


def tasks_of(
    ops: Sequence[str] | None, sizes: Sequence[str], dtypes: Sequence[str], names: Sequence[str], gpu: str
) -> list[Task]:
    """Return a task for each operator and backend that has kernels for it, the longest first."""
    chosen = list(dict.fromkeys(case.op for case in choose(ops, sizes)))
    order = sorted(chosen, key=lambda op: op not in ("group_norm_silu", "reward_pixels", "score_gap"))
    return [
        Task(name, op, tuple(sizes), tuple(dtypes), gpu)
        for name in names
        for op in order
        if (op not in NOT_INDUCTORS if name == "compile" else backends.has_kernel(op, name))
    ]


# Rows and tables

PER_ELEMENT = ("instructions", *(pipe.lower() for pipe in ALL_PIPES), "bytes", "asked_bytes")
OF_LAUNCH = ("load_bits", "store_bits", "registers", "shared", "spilled", "programs", "warps", "cap_percent")
COLUMNS = (
    "case", "op", "dtype", "backend", "direction", "launch", "kernel", "launches", *PER_ELEMENT,
    "load_bits", "store_bits", "registers", "shared", "spilled", "programs", "warps", "cap_percent", "doubts", "gpu",
)  # fmt: skip


def rows(passes: Iterable[Pass], gpu: str) -> Iterator[dict[str, Any]]:
    """Yield a row for each launch and one for each pass as a whole."""
    for each in passes:
        common = {"case": each.case.name, "op": each.case.op, "dtype": each.dtype, "backend": each.backend,
                  "direction": each.direction, "gpu": gpu}  # fmt: skip
        if each.failure:
            yield {**common, "kernel": "", "doubts": each.failure}
            continue
        for number, count in enumerate(each.counts, 1):
            yield {**common, **_of_launch(count, each.elements, GPUS[gpu]), "launch": number}
        cap = each.cap(GPUS[gpu])
        yield {
            **common, "launch": "all", "kernel": "", "launches": len(each.counts),
            "instructions": f"{each.instructions:.2f}", "bytes": f"{each.bytes:.2f}",
            "cap_percent": "" if cap is None else f"{100 * cap:.0f}",
        }  # fmt: skip


def _of_launch(count: Count, elements: int, gpu: Gpu) -> dict[str, Any]:
    pipes = {pipe.lower(): f"{count.pipes[pipe] * WARP / elements:.2f}" for pipe in ALL_PIPES}
    return {
        "kernel": count.kernel, "launches": 1, "instructions": f"{count.instructions / elements:.2f}", **pipes,
        "bytes": f"{count.moved / elements:.2f}", "asked_bytes": f"{count.asked / elements:.2f}",
        "load_bits": _widths(count.loads), "store_bits": _widths(count.stores), "registers": count.registers,
        "shared": count.shared, "spilled": count.spilled, "programs": count.programs, "warps": count.warps,
        "cap_percent": f"{100 * count.moved * gpu.per_byte / count.instructions:.0f}",
        "doubts": "; ".join(count.doubts),
    }  # fmt: skip


def _widths(widths: Counter[int]) -> str:
    """Return the shares of the widths in bits: "128 80 %, 32 20 %"."""
    total = sum(widths.values())
    return ", ".join(f"{bits} {100 * number / total:.0f} %" for bits, number in sorted(widths.items(), reverse=True))


def launches_table(passes: Sequence[Pass], gpu: Gpu) -> Table:
    """Every launch, and every pass as a whole."""
    names = ("kernel", *PER_ELEMENT, *OF_LAUNCH)
    body: list[tuple[str, ...]] = []
    for each in passes:
        place = each.case.name, each.dtype
        for count in each.counts:
            row = _of_launch(count, each.elements, gpu)
            body.append((*place, *(str(row[name]) for name in names)))
        cap = each.cap(gpu)
        total = {
            "kernel": f"= {each.backend} {each.direction}: {len(each.counts)} launches",
            "instructions": f"{each.instructions:.2f}",
            "bytes": f"{each.bytes:.2f}",
            "cap_percent": "-" if cap is None else f"{100 * cap:.0f}",
        }
        body.append((*place, *(total.get(name, "") for name in names)))
    return Table([("case", "dtype", *names), *body])


#: What is left out of the short table, for another of its rows is nearly the same.
ALIKE = {
    *(("score_gap", variant) for variant in ("plain", "guided", "guided with reward", "guided mean_abs with reward")),
    ("denoising_loss", "weighted"),
    *((op, "guided") for op in ("sid_loss", "sim_loss")),
}


def short_table(written: Iterable[Mapping[str, Any]]) -> Table:
    """A row for most operators in bfloat16 at their largest size: launches, bytes, instructions, cap, pass by pass."""
    cases = {case.name: case for case in choose(None, ["full"]) if (case.op, case.variant) not in ALIKE}
    largest: dict[tuple[str, str], int] = {}
    for case in cases.values():
        key = case.op, case.variant
        largest[key] = max(largest.get(key, 0), math.prod(case.shape))
    cells: dict[str, dict[str, list[str]]] = {}
    for row in written:
        if row["case"] not in cases:
            continue
        case = cases[row["case"]]
        is_largest = math.prod(case.shape) == largest[case.op, case.variant]
        if is_largest and row["dtype"] == "bfloat16" and row.get("launch") == "all":
            numbers = (f"{float(row[name]):.1f}" for name in ("bytes", "instructions"))
            cell = "/".join([str(row["launches"]), *numbers, f"{row['cap_percent']}%"])
            cells.setdefault(case.name, {}).setdefault(row["backend"], []).append(cell)
    names = [name for name in BACKENDS if any(name in row for row in cells.values())]
    body = [(case, *("; ".join(row.get(name, "-")) for name in names)) for case, row in cells.items()]
    return Table([("case", *names), *body])


def doubts(passes: Iterable[Pass]) -> list[str]:
    """Say what could not be counted, and where the loads and stores of a large tensor don't add up to its bytes."""
    sentences = []
    for each in passes:
        place = f"{each.case.name}, {each.dtype}, {each.backend} {each.direction}"
        if each.failure:
            sentences.append(f"{place}: {each.failure}")
        for count in each.counts:
            # A resize and torch.compile read some tensors more often; small launches read but a part.
            if each.backend == "compile" or each.case.op == "reward_pixels" or count.asked < each.elements:
                continue
            for tensor, share in count.covered.items():
                if not 1 - COVERED <= share <= 1 + READ_TWICE.get(count.kernel, MORE_THAN_ONCE):
                    sentences.append(f"{place}: {count.kernel} asks for {share:.2f} of the bytes of {tensor}")
    return sentences


#: How far what loads and stores of a large tensor ask for may be from its bytes. The group norm's statistics ask for
#: their first tile twice, the second time of the first-level cache: a program of two tiles asks for one and a half.
COVERED, MORE_THAN_ONCE = 0.05, 0.15
READ_TWICE = {"triton.group_norm_silu.statistics": 0.65}


# The budget


def amounts(passes: Iterable[Pass], arch: int) -> Iterator[tuple[str, str, dict[str, float]]]:
    """Yield what the budget limits: kernel and case, GPU, and launches, instructions and bytes per element."""
    for each in passes:
        kernels: dict[str, list[Count]] = {}
        for count in each.counts:
            kernels.setdefault(count.kernel, []).append(count)
        for kernel, counts in kernels.items():
            yield (
                f"{kernel}: {each.case.name}, {each.dtype}, {each.direction}",
                f"sm_{arch}",
                {
                    "launches": len(counts),
                    "instructions": math.ceil(100 * sum(count.instructions for count in counts) / each.elements) / 100,
                    "bytes": math.ceil(100 * sum(count.moved for count in counts) / each.elements) / 100,
                },
            )


# The command


def add_arguments(add: Callable[..., Any]) -> None:
    add("--ops", type=_names, metavar="NAME,...", help="operators (all)")
    add("--backends", type=_names, default=[*BACKENDS], metavar="NAME,...", help="triton,cuda,compile (all)")
    sizes = f"{', '.join(SELECTIONS)} or names (full)"
    add("--sizes", type=_names, default=["full"], metavar="NAME,...", help=sizes)
    add("--dtypes", type=_names, default=[*DTYPES], metavar="NAME,...", help=f"of {', '.join(DTYPES)} (all)")
    add("--gpu", default="H200", choices=[*GPUS], help="the GPU (H200)")
    add("--no-inductor", dest="inductor", action="store_false", help="leave torch.compile's code out")
    add("--opcodes", action="store_true", help="print the opcodes of each launch, too")
    add("--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (as many as processors)")
    add("--out", type=user_path, metavar="FOLDER", help="write CSV and the short table there")
    add("--docs", type=user_path, metavar="PAGE.md", help="also put the short table between the page's markers")


def run(arguments: argparse.Namespace, device: torch.device) -> int:
    """Print every launch, or write files. Return 1 if something could not be counted."""
    if backends.triton_interprets():
        raise ConfigurationError("TRITON_INTERPRET is set, and what is interpreted is not compiled: unset it")
    gpu = GPUS[arguments.gpu]
    dtypes = [SHORT.get(name, name) for name in arguments.dtypes]
    names = [name for name in arguments.backends if name != "compile" or arguments.inductor]
    for option, given, known in (("--dtypes", dtypes, DTYPES), ("--backends", names, BACKENDS)):
        if unknown := [name for name in given if name not in known]:
            raise ConfigurationError(f"{option}: unknown {unknown[0]!r}; known: {', '.join(known)}")
    tasks = tasks_of(arguments.ops, arguments.sizes, dtypes, names, arguments.gpu)
    place = Place(
        (arguments.out or Path("benchmarks/results")) / f"static-{arguments.gpu.lower()}", arguments.docs, "static",
        arguments.gpu,
    )  # fmt: skip
    if arguments.out is not None:
        place.check()
    origin = provenance(CPU)
    passes = list(collect(tasks, arguments.jobs))
    if arguments.out is None:
        print(tables.text(launches_table(passes, gpu)))
        if arguments.opcodes:
            for each in passes:
                for count in each.counts:
                    shares = {name: round(n * WARP / each.elements, 3) for name, n in count.opcodes.most_common(40)}
                    print(f"{each.case.name}, {each.dtype}, {count.kernel}: {shares}")
    else:
        written = list(rows(passes, arguments.gpu))
        table = short_table(written)
        for path in place.write(written, COLUMNS, [table], origin):
            print(f"written: {path}")
        print(tables.text(table))
    wrong = doubts(passes)
    for sentence in wrong:
        print(sentence)
    return int(bool(wrong))


#: What helps to type.
SHORT = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
