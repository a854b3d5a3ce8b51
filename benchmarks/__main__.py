"""`python -m benchmarks`: everything that is measured, from the command line of a clone."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# Lets CUDA's allocator grow its blocks, so that a batch that fits is not kept out by the holes that another has left.
if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
    os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"

import torch

from benchmarks import (
    backends,
    blocks,
    cases,
    decoder,
    frozen,
    host,
    kernels,
    loops,
    passes,
    quantized,
    reward,
    scale,
    static,
    tables,
    updates,
)
from benchmarks.kernels import KernelPlan
from benchmarks.tables import Place
from benchmarks.timing import load_sentence, provenance
from diffpp_fast import install
from diffpp_fast.cli.options import positive
from diffpp_fast.errors import ConfigurationError, UserError
from diffpp_fast.selftest import ORACLE
from diffpp_fast.terminal import complain, say
from diffpp_fast.user_paths import user_path

DESCRIPTION = """\
Measures operators, blocks of networks, the reward path, whole training steps and loops on this machine against the code
that they replace; without a GPU, counts what GPU kernels execute and times what the host does before one is launched.
"""
KERNELS = """\
Times every operator against the same step written in plain torch, eagerly and under torch.compile.

  python -m benchmarks kernels
  python -m benchmarks kernels --ops score_gap,sid_loss --dtypes bfloat16 --threads 1,all
  python -m benchmarks kernels --sizes full --docs docs/performance.md

First every provider is checked against the float64 reference; one that is wrong is reported and not timed, and the
exit code is 1. Into --out go a CSV with everything that was measured, the tables in Markdown, and a plot.
"""
REWARD = """\
Times the reward path phase by phase: decode, pixels, reward model, and the way back; and counts what the decode keeps
for its backward pass. Networks have their true architecture and random weights; needs diffusers and transformers.

  python -m benchmarks reward
  python -m benchmarks reward --model sd15 --latent 32
  python -m benchmarks reward --model sdxl --batch 4 --providers eager,compile,fused

First every provider's images, rewards and gradient are checked; one that is wrong is reported and not timed, and the
exit code is 1. Into --out go a CSV and the table in Markdown.
"""
STEP = """\
Times a whole training step, the generator's update and the teaching assistant's, phase by phase: written in plain torch
with diffusers' modules, the same under torch.compile, and as the package does it. Networks have their true architecture
and random weights; needs diffusers and transformers.

  python -m benchmarks step
  python -m benchmarks step --model sdxl --batch fill --no-compile
  python -m benchmarks step --model sd15 --batch 8 --providers eager,compile,fused

First every provider's losses and gradients are checked; one that is wrong is reported and not timed, and the exit code
is 1. One that fails or has no room is reported too, and the others go on. Into --out go a CSV and the tables in
Markdown; they are written whenever there is more to tell, so that a run that is stopped leaves what it had measured.
"""
DTYPES = ("float32", "bfloat16", "float16")
Run = Callable[[argparse.Namespace, torch.device], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure a subject. Return the exit code: 0, 1 where something is wrong, 2 for a user's error."""
    arguments = make_parser().parse_args(argv)
    busy = load_sentence()
    try:
        chosen = getattr(arguments, "device", None)
        if chosen == "cuda" and not torch.cuda.is_available():
            raise ConfigurationError("--device cuda: PyTorch finds no GPU; `diffpp-fast doctor` shows what it finds")
        device = torch.device(chosen or ("cuda" if torch.cuda.is_available() else "cpu"))
        code: int = arguments.run(arguments, device)
    except UserError as error:
        complain(f"error: {error}")
        return 2
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("diffusers", "transformers"):
            raise
        complain(f"error: {error.name} is not installed: {install.extra('train')}")
        return 2
    for sentence in (
        busy if arguments.run not in (static.run, quantized.run, scale.run) else ()
    ):  # of which nothing depends on it
        say(sentence)
    return code


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=DESCRIPTION)
    subjects = parser.add_subparsers(metavar="SUBJECT", required=True)

    def subject(name: str, run: Run, help: str, description: str | None, page: str) -> Callable[..., Any]:
        own = subjects.add_parser(
            name,
            help=help,
            description=description,
            epilog=f"How it measures, and how to read the numbers: docs/{page}.md.",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        own.set_defaults(run=run)
        return own.add_argument

    add = subject("kernels", run_kernels, "every operator against plain torch", KERNELS, "performance")
    add("--ops", type=_names, metavar="NAME,...", help="operators (all)")
    add("--backends", type=_names, metavar="NAME,...", help="backends (all that serve, but not the reference)")
    sizes = '"quick", "latents", "full", "large" (256 MB and more) or names (quick)'
    add("--sizes", type=_names, default=["quick"], metavar="NAME,...", help=sizes)
    add("--dtypes", type=_names, metavar="NAME,...", help=f"of {', '.join(DTYPES)} (full: two of them; else float32)")
    add("--threads", type=_names, metavar="N,...", help='of the CPU; "all" is one of them (full: 1,all; else all)')
    add("--min-time", type=_seconds, default=0.1, metavar="SECONDS", help="per provider and case (0.1)")
    add("--warm", action="store_true", help="leave the inputs in the cache instead of taking others every time")
    _add_common(add)
    blocks.add_arguments(subject("blocks", blocks.run, "blocks of networks, fused", blocks.__doc__, "fusing"))
    frozen.add_arguments(subject("frozen", frozen.run, "networks that are frozen", frozen.__doc__, "fusing"))
    quantized.add_arguments(subject("quantized", quantized.run, "references in few bits", quantized.__doc__, "models"))
    add = subject("reward", run_reward, "the reward path, phase by phase", REWARD, "reward-path")
    add("--model", metavar="NAME", help='"small", "emoji", "sd15" or "sdxl" (sd15 on a GPU, else small)')
    add("--batch", type=positive, metavar="N", help="images (1, 4 and 2)")
    add("--latent", type=positive, metavar="N", help="side of the latents (32, 64 and 128)")
    add("--dtype", choices=DTYPES, help="(bfloat16 on a GPU, else float32)")
    _add_rounds(add)
    decoder.add_arguments(subject("decoder", decoder.run, "memory of decoding", decoder.__doc__, "reward-path"))
    add = subject("step", run_step, "a whole training step, phase by phase", STEP, "performance")
    add("--model", metavar="NAME", help='"tiny", "small", "emoji", "sd15" or "sdxl" (sd15 on a GPU, else small)')
    add("--latent", type=positive, metavar="N", help="side of the latents (16, 32, 64 and 128)")
    add("--lora", type=positive, metavar="RANK", help="train adapters on the reference's weights (all weights)")
    fill = 'images, or "fill": as many as fit (fill on a GPU; 2, 1, 16, 4, 1)'
    add("--batch", type=lambda text: text if text == "fill" else positive(text), metavar="N", help=fill)
    add("--dtype", choices=DTYPES[:2], help="(bfloat16 on a GPU, else float32)")
    _add_rounds(add)
    host.add_arguments(subject("host", host.run, "host time of a call, without a GPU", host.__doc__, "performance"))
    static.add_arguments(subject("static", static.run, "GPU kernels, counted", static.__doc__, "performance"))
    scale.add_arguments(subject("scale", scale.run, "plans for 8 to 1,024 GPUs", scale.__doc__, "scale"))
    loops.add_arguments(subject("loops", loops.run, "training loops, before and after", loops.__doc__, "embedding"))
    passes.add_arguments(subject("passes", passes.run, "the reference's two passes", passes.__doc__, "performance"))
    updates.add_arguments(subject("updates", updates.run, "launches of updates", updates.__doc__, "performance"))
    return parser


def _add_rounds(add: Callable[..., Any]) -> None:
    add("--providers", type=_names, metavar="NAME,...", help="of what is compared (all)")
    add("--rounds", type=positive, default=7, metavar="N", help="in which all are timed by turns (7)")
    _add_common(add)


def _add_common(add: Callable[..., Any]) -> None:
    add("--device", choices=["cpu", "cuda"], help="where to measure (cuda if there is one)")
    add("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    out = "for files (benchmarks/results)"
    add("--out", type=user_path, default=Path("benchmarks/results"), metavar="FOLDER", help=out)
    add("--docs", type=user_path, metavar="PAGE.md", help="also put the tables between the page's markers")


def run_kernels(arguments: argparse.Namespace, device: torch.device) -> int:
    plan = _kernel_plan(arguments, device)
    stem = arguments.out / f"kernels-{device.type}-{_selection(arguments)}"
    place = Place(stem, arguments.docs, "kernels", f"{device.type}, warm" if plan.warm else device.type)
    place.check()
    origin = provenance(device)
    say(f"{origin.device_name}: {len(plan.cases)} cases, backends: {', '.join(plan.backends) or 'none that serves'}")
    groups: list[kernels.Group] = []
    total = len(plan.cases) * len(plan.dtypes) * len(plan.threads)
    for group in kernels.measure(plan):
        groups.append(group)
        complain(f"{len(groups)}/{total} {kernels.place(group[0])}")
        for sentence in kernels.failures(group):
            say(sentence)
    for sentence in kernels.absences(groups):
        say(sentence)
    for path in kernels.write(place, groups, origin, device):
        say(f"written: {path}")
    say(f"\n{kernels.text_table(groups)}\n")
    for sentence in kernels.verdict(groups):
        say(sentence)
    return int(any(kernels.failures(group) for group in groups))


def run_reward(arguments: argparse.Namespace, device: torch.device) -> int:
    import diffusers  # noqa: F401 - said to be missing before work begins
    import transformers  # noqa: F401

    plan = reward.plan(latent=arguments.latent, **_choices(arguments, device))
    kind = reward.kind_of(plan)
    place = Place(arguments.out / f"reward-path-{kind}", arguments.docs, "reward", kind)
    place.check()
    origin = provenance(device)
    say(f"{origin.device_name}: {', '.join(plan.names)}")
    outcomes = reward.measure(plan)
    for path in reward.write(place, plan, outcomes, origin):
        say(f"written: {path}")
    say(f"\n{tables.text(reward.table(outcomes))}\n")
    for sentence in reward.sentences(outcomes):
        say(sentence)
    return int(any(outcome.wrong for outcome in outcomes))


def run_step(arguments: argparse.Namespace, device: torch.device) -> int:
    import diffusers  # noqa: F401 - said to be missing before work begins
    import transformers  # noqa: F401

    from benchmarks import step, step_tables
    from benchmarks.step_providers import PROVIDERS

    plan = step.plan(latent=arguments.latent, lora=arguments.lora, **_choices(arguments, device))
    kind = step_tables.kind_of(plan)
    place = Place(arguments.out / f"step-{kind}", arguments.docs, "step", kind)
    place.check()
    step.check_room(plan)
    origin = provenance(device)
    say(f"{origin.device_name}: {', '.join(plan.names)}")
    if compiled := [name for name in plan.names if PROVIDERS[name].compiles]:
        say(f"{', '.join(compiled)}: measured last; compiling takes minutes for each, in which nothing is printed")
    for results in step.measure(plan):
        paths = step_tables.write(place, plan, results, origin)
        complain(f"{sum(bool(each.runs) for each in results.outcomes)} of {len(plan.names)} are measured")
    for table in step_tables.step_tables(results):
        say(f"\n{tables.text(table)}")
    say("")
    for path in paths:
        say(f"written: {path}")
    for sentence in step_tables.doubts(results):
        say(sentence)
    return int(any(each.wrong for each in results.outcomes))


def _choices(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    return {
        "model": arguments.model,
        "device": device,
        "batch": arguments.batch,
        "dtype": None if arguments.dtype is None else getattr(torch, arguments.dtype),
        "names": arguments.providers,
        "compile": arguments.compile,
        "rounds": arguments.rounds,
    }


def _kernel_plan(arguments: argparse.Namespace, device: torch.device) -> KernelPlan:
    full = "full" in arguments.sizes
    names = arguments.backends
    if names is None:
        names = [name for name in backends.serving(backends.PREFERENCE, device) if name != ORACLE]
    dtypes = arguments.dtypes or (DTYPES[:2] if full else DTYPES[:1])
    cases.check_known("--backends", names, backends.PREFERENCE)
    cases.check_known("--dtypes", dtypes, DTYPES)
    return KernelPlan(
        cases=cases.choose(arguments.ops, arguments.sizes),
        backends=names,
        dtypes=[getattr(torch, name) for name in dtypes],
        threads=_threads(arguments.threads or (["1", "all"] if full else ["all"]), device),
        device=device,
        min_time=arguments.min_time,
        compile=arguments.compile,
        warm=arguments.warm,
    )


def _threads(texts: Sequence[str], device: torch.device) -> list[int]:
    """Numbers of threads, each once. On a GPU the CPU's threads don't matter: the default number alone."""
    every = torch.get_num_threads()
    counts = []
    for text in texts:
        if text != "all" and not (text.isdecimal() and int(text) > 0):
            raise ConfigurationError(f'--threads: must be numbers from 1 up or "all", got {text!r}')
        counts.append(every if text == "all" else int(text))
    return [every] if device.type == "cuda" else list(dict.fromkeys(counts))


def _selection(arguments: argparse.Namespace) -> str:
    """The part of the file names that keeps a partial run from replacing the results of a whole one."""
    whole = arguments.ops is None and arguments.backends is None and arguments.compile
    name = arguments.sizes[0] if whole and arguments.sizes in ([name] for name in cases.SELECTIONS) else "selected"
    return f"{name}-warm" if arguments.warm else str(name)


def _names(text: str) -> list[str]:
    names = list(dict.fromkeys(filter(None, (part.strip() for part in text.split(",")))))
    if not names:
        raise argparse.ArgumentTypeError("must be one or more names, separated by commas")
    return names


def _seconds(text: str) -> float:
    value = float(text)
    if not 0.0 < value <= 60.0:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 60 seconds, got {text}")
    return value


if __name__ == "__main__":
    sys.exit(main())
