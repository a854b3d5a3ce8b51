"""Measures the host time of a call: all that happens on the CPU until a kernel is handed to the GPU, without a GPU.

Triton launches by its own code, compiled C included, through a CUDA driver that does nothing (`stub_cuda.c`), on
tensors of a network's size. Eager and the compiled binding (`cpu`, the same dispatcher and host code as `cuda`) do
their work on tensors so tiny that computing takes next to nothing; on a GPU each of eager's kernels costs a launch
more, and so does each of ours. Times are the process's own, medians of interleaved rounds, in microseconds.
"""

from __future__ import annotations

import argparse
import ctypes
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from benchmarks import backends, tables
from benchmarks.cases import Case, Inputs, make_inputs, unfused
from benchmarks.gpu_build import NamedGpu
from benchmarks.tables import Place, Table
from benchmarks.timing import Contender, Timing, interleave, intra_op_threads, provenance, restless_sentence
from diffpp_fast.errors import ConfigurationError
from diffpp_fast.user_paths import user_path

STUB = Path(__file__).with_name("stub_cuda.c")
PROVIDERS = ("eager", "cpu", "triton")
#: Of eager and the compiled binding; of Triton.
TINY, LATENT = (1, 4, 4, 4), (1, 4, 64, 64)
CPU = torch.device("cpu")
#: Before any is timed: two until a plan is there, and some that find their way into the processor's caches.
FIRST_CALLS = 50
COLUMNS = ("op", "case", "pass", "dtype", "provider", "median_us", "quartile1_us", "quartile3_us", "rounds", "of_eager")


class Subject(NamedTuple):
    """One operator, with the sizes at which it is called."""

    op: str
    variant: str = ""
    noise: str = "none"
    tiny: tuple[int, ...] = TINY
    size: tuple[int, ...] = LATENT
    prediction_type: str = "epsilon"

    @property
    def name(self) -> str:
        noise = "" if self.noise == "none" else f"{self.noise} noise"
        return " ".join(filter(None, (self.variant, noise, str(list(self.size)))))

    def inputs(self, tiny: bool, dtype: torch.dtype) -> Inputs:
        shape = self.tiny if tiny else self.size
        case = Case(self.op, self.variant, "host", shape, "contiguous", self.noise, self.prediction_type, "")
        inputs = make_inputs(case, dtype, CPU)
        if self.unfused is add_stored_noise:
            inputs = replace(inputs, unfused={**inputs.unfused, "eps": inputs.call.arguments["noise"]})
        return inputs

    @property
    def unfused(self) -> Callable[..., Any]:
        if (self.op, self.noise) == ("add_noise", "stored"):
            return add_stored_noise
        return unfused(Case(self.op, self.variant, "host", self.tiny, "contiguous", self.noise, "epsilon", ""))


def add_stored_noise(x0: Tensor, alpha: Tensor, sigma: Tensor, eps: Tensor) -> Tensor:
    """x_t of a noise that is given, as diffusers' schedulers have it."""
    column = (-1, *[1] * (x0.dim() - 1))
    return alpha.to(x0.dtype).view(column) * x0 + sigma.to(x0.dtype).view(column) * eps


SUBJECTS = (
    Subject("add_noise", noise="drawn"),
    Subject("add_noise", noise="stored"),
    Subject("denoising_loss", "weighted", "stored"),
    Subject("denoising_loss", "weighted", "drawn"),
    Subject("score_gap", "guided"),
    Subject("score_gap", "guided mean_abs", "stored"),
    Subject("sid_loss", "guided", "stored"),
    Subject("sim_loss", "guided", "stored"),
    Subject("group_norm_silu", "trained", tiny=(1, 2, 1, 2), size=(1, 320, 64, 64)),
    Subject("group_norm_silu", "frozen", tiny=(1, 2, 1, 2), size=(1, 320, 64, 64)),
    Subject("group_norm_silu", "trained", tiny=(1, 2, 1, 2), size=(1, 1280, 8, 8)),
    Subject("geglu", tiny=(1, 4, 8), size=(1, 1024, 2560)),
    Subject("ada_layer_norm", tiny=(1, 4, 8), size=(1, 1024, 1152)),
    Subject("gated_residual_norm", tiny=(1, 4, 8), size=(1, 4096, 3072)),
    Subject("rms_norm_rope", tiny=(1, 2, 2, 8), size=(1, 4096, 24, 128)),
)


class StubGpu(NamedGpu):
    """A Triton driver whose tensors are on the CPU, and whose kernels are loaded and launched by the stub."""

    def __init__(self, folder: str) -> None:
        from triton import knobs

        super().__init__(90)
        library = Path(folder, "libcuda.so.1")
        # Under the name by which Triton's compiled code asks for CUDA's.
        flags = ["-O2", "-w", "-shared", "-fPIC", f"-Wl,-soname,{library.name}"]
        try:
            subprocess.run(["cc", *flags, "-o", str(library), str(STUB)], check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise ConfigurationError(f"{STUB.name} needs a C compiler: {getattr(error, 'stderr', error)}") from error
        self.library = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        with mock.patch.object(knobs.nvidia, "libcuda_path", folder):
            from triton.backends.nvidia.driver import CudaLauncher, CudaUtils

            self.utils, self.launcher_cls = CudaUtils(), CudaLauncher

    @property
    def launches(self) -> int:
        return ctypes.c_longlong.in_dll(self.library, "stub_launches").value

    def get_current_device(self) -> int:
        """Return what a tensor on the CPU calls its device."""
        return -1


@contextmanager
def stubbed() -> Iterator[StubGpu]:
    """Within the block, CPU tensors may be handed to Triton, whose launches end in the stub."""
    from triton.runtime import driver

    from diffpp_fast.ops.triton import device

    _keep_memory()
    with ExitStack() as stack:
        gpu = StubGpu(stack.enter_context(tempfile.TemporaryDirectory()))
        # For the rest of the process: without a GPU there is no driver to go back to.
        driver.set_active(gpu)
        stack.enter_context(mock.patch.object(torch.cuda, "current_device", gpu.get_current_device))
        stack.enter_context(mock.patch.object(device, "everywhere", True))
        stack.enter_context(backends.triton_on_cpu_tensors())
        yield gpu


def _keep_memory() -> None:
    """Let malloc keep what is freed, as the allocator for GPUs does, instead of asking the system for it again."""
    allocator = ctypes.CDLL(None)
    for parameter, value in ((-1, 2**30), (-2, 2**28), (-3, 2**25)):  # M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD
        allocator.mallopt(parameter, value)


def calls(subject: Subject, dtype: torch.dtype, backward: bool) -> dict[str, Callable[[], object]]:
    """Return one call for each provider."""
    tiny, full = (subject.inputs(each, dtype) for each in (True, False))
    if not backward:
        tiny, full = _without_gradients(tiny), _without_gradients(full)
    return {
        "eager": partial(tiny.step_unfused, subject.unfused),
        "cpu": tiny.call.run,
        "triton": full.call.run,
    }


def _without_gradients(inputs: Inputs) -> Inputs:
    def constant(value: Any) -> Any:
        return value.detach() if isinstance(value, Tensor) else value

    call = inputs.call
    arguments = {name: constant(value) for name, value in call.arguments.items()}
    plain = {name: constant(value) for name, value in inputs.unfused.items()}
    return Inputs(replace(call, arguments=arguments, wrt=(), outer=None), plain)


class Row(NamedTuple):
    subject: Subject
    backward: bool
    dtype: torch.dtype
    timings: dict[str, Timing]

    def ratio(self, provider: str) -> float:
        """Times eager's host time."""
        return self.timings[provider].median / self.timings["eager"].median

    @property
    def passes(self) -> str:
        return "forward + backward" if self.backward else "forward"


def measure(subject: Subject, dtype: torch.dtype, backward: bool, min_time: float) -> Row:
    """Time one operator; within `stubbed`."""
    contenders = [
        Contender(name, call, partial(backends.use, "cpu" if name == "eager" else name))
        for name, call in calls(subject, dtype, backward).items()
    ]
    # The first calls compile, and would pass for slow ones, of which a round holds few.
    for contender in contenders:
        with contender.context():
            for _ in range(FIRST_CALLS):
                contender.call()
    return Row(subject, backward, dtype, interleave(contenders, min_time, process_clock))


def process_clock(work: Callable[[], None]) -> float:
    """Seconds of this process's own: other work on the machine does not count."""
    start = time.process_time()
    work()
    return time.process_time() - start


def rows(subjects: Sequence[Subject], dtypes: Sequence[torch.dtype], min_time: float) -> Iterator[Row]:
    with intra_op_threads(1), stubbed():
        for subject in subjects:
            for dtype in dtypes:
                differentiable = bool(subject.inputs(True, dtype).call.wrt)
                for backward in (False, True)[: 1 + differentiable]:
                    yield measure(subject, dtype, backward, min_time)


def table(found: Sequence[Row]) -> Table:
    header = ("op", "case", "dtype", "of", *(f"{name} us" for name in PROVIDERS), "cpu / eager", "triton / eager")
    body = [
        (
            *(row.subject.op, row.subject.name, tables.dtype_name(row.dtype), row.passes),
            *(f"{1e6 * row.timings[name].median:.1f}" for name in PROVIDERS),
            *(f"{row.ratio(name):.2f}" for name in PROVIDERS[1:]),
        )
        for row in found
    ]
    return Table([header, *body])


def csv_rows(found: Sequence[Row]) -> Iterator[dict[str, Any]]:
    for row in found:
        for provider, timing in row.timings.items():
            low, high = (tables.figure(value, 1e6) for value in timing.quartiles)
            yield {
                **{"op": row.subject.op, "case": row.subject.name, "pass": row.passes},
                **{"dtype": tables.dtype_name(row.dtype), "provider": provider},
                **{"median_us": tables.figure(timing.median, 1e6), "quartile1_us": low, "quartile3_us": high},
                **{"rounds": len(timing.samples), "of_eager": tables.figure(row.ratio(provider))},
            }


def add_arguments(add: Callable[..., Any]) -> None:
    add("--ops", type=lambda text: text.split(","), metavar="NAME,...", help="operators (all but reward_pixels)")
    add("--dtypes", type=tables.dtypes, default=[torch.bfloat16], metavar="NAME,...", help="(bfloat16)")
    add("--min-time", type=float, default=0.5, metavar="SECONDS", help="per provider and case (0.5)")
    out = "for files (benchmarks/results)"
    add("--out", type=user_path, default=Path("benchmarks/results"), metavar="FOLDER", help=out)
    add("--docs", type=user_path, metavar="PAGE.md", help="also put the table between the page's markers")


def run(arguments: argparse.Namespace, device: torch.device) -> int:
    known = {subject.op for subject in SUBJECTS}
    if unknown := sorted(set(arguments.ops or ()) - known):
        raise ConfigurationError(f"--ops: unknown {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    if backends.triton_interprets():
        raise ConfigurationError("TRITON_INTERPRET is set, and what is interpreted is not launched: unset it")
    chosen = [subject for subject in SUBJECTS if not arguments.ops or subject.op in arguments.ops]
    place = Place(arguments.out / "host", arguments.docs, "host", "cpu")
    place.check()
    origin = provenance(CPU)
    found = list(rows(chosen, arguments.dtypes, arguments.min_time))
    print(tables.text(table(found)))
    for path in place.write(list(csv_rows(found)), COLUMNS, [table(found)], origin):
        print(f"written: {path}")
    spreads = [timing.spread for row in found for timing in row.timings.values()]
    for sentence in restless_sentence(spreads, "times"):
        print(sentence)
    return 0
