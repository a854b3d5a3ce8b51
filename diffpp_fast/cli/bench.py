"""`diffpp-fast bench`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from diffpp_fast.bench.results import Group
    from diffpp_fast.bench.run import Plan

DESCRIPTION = """\
Measures every operator on this machine against the code that it replaces.
"""
KERNELS = """\
Times every operator against the same step written in plain torch, eagerly and under torch.compile.

  diffpp-fast bench kernels
  diffpp-fast bench kernels --ops score_gap,sid_loss --dtypes bfloat16 --threads 1,all
  diffpp-fast bench kernels --sizes full --docs docs/performance.md

First every provider is checked against the float64 reference; one that is wrong is reported and not timed, and the
exit code is 1. Into --out go a CSV with everything that was measured, the tables in Markdown, and a plot.
"""
#: A spread of the times that casts doubt on a row.
RESTLESS = 0.25
DTYPES = ("float32", "bfloat16", "float16")


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("bench", help="measure the operators on this machine", description=DESCRIPTION)
    subjects = parser.add_subparsers(metavar="SUBJECT", required=True)
    kernels = subjects.add_parser(
        "kernels",
        help="every operator against plain torch",
        description=KERNELS,
        epilog="How it measures, and how to read the numbers: docs/performance.md.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = kernels.add_argument
    add("--ops", type=_names, metavar="NAME,...", help="operators (all)")
    add("--backends", type=_names, metavar="NAME,...", help="backends (all that serve, but not the reference)")
    add(
        "--sizes",
        type=_names,
        default=["quick"],
        metavar="NAME,...",
        help='"quick", "latents", "full" or names (quick)',
    )
    add("--dtypes", type=_names, metavar="NAME,...", help=f"of {', '.join(DTYPES)} (full: two of them; else float32)")
    add("--threads", type=_names, metavar="N,...", help='of the CPU; "all" is one of them (full: 1,all; else all)')
    add("--device", choices=["cpu", "cuda"], help="where to measure (cuda if there is one)")
    add("--min-time", type=_seconds, default=0.1, metavar="SECONDS", help="per provider and case (0.1)")
    add("--warm", action="store_true", help="leave the inputs in the cache instead of taking others every time")
    add("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    add("--out", type=Path, default=Path("benchmarks/results"), metavar="FOLDER", help="for files (benchmarks/results)")
    add("--docs", type=Path, metavar="PAGE.md", help="also put the tables between the page's markers")
    kernels.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from diffpp_fast.bench import tables
    from diffpp_fast.bench.files import write_results
    from diffpp_fast.bench.machine import provenance
    from diffpp_fast.bench.results import absences, failures, place
    from diffpp_fast.bench.run import measure
    from diffpp_fast.errors import ConfigurationError

    plan = _plan(arguments)
    if arguments.docs is not None:
        tables.check_page(arguments.docs, tables.place_of(plan.device, plan.warm))
    if arguments.out.exists() and not arguments.out.is_dir():
        raise ConfigurationError(f"--out {arguments.out}: it is a file; name a folder")
    arguments.out.mkdir(parents=True, exist_ok=True)
    origin = provenance(plan.device)
    print(f"{origin.device_name}: {len(plan.cases)} cases, backends: {', '.join(plan.backends) or 'none that serves'}")

    groups: list[Group] = []
    total = len(plan.cases) * len(plan.dtypes) * len(plan.threads)
    for group in measure(plan):
        groups.append(group)
        print(f"{len(groups)}/{total} {place(group[0])}", file=sys.stderr)
        for sentence in failures(group):
            print(sentence)

    for sentence in absences(groups):
        print(sentence)
    stem = arguments.out / f"kernels-{plan.device.type}-{_selection(arguments)}"
    for path in write_results(stem, groups, origin, plan.device, arguments.docs, warm=plan.warm):
        print(f"written: {path}")
    print(f"\n{tables.text_table(groups)}\n")
    for sentence in _verdict(groups):
        print(sentence)
    return 1 if any(failures(group) for group in groups) else 0


def _verdict(groups: Sequence[Group]) -> list[str]:
    """What the reader of the table has to know: where the backends lose, and what is not to be trusted."""
    from diffpp_fast.bench.results import compare, failures

    comparisons = [comparison for group in groups for comparison in compare(group)]
    backed = [comparison for comparison in comparisons if comparison.backend is not None]
    sentences = []
    if backed:
        slower = sum(comparison.slower for comparison in backed)
        sentences.append(f"{slower} of {len(backed)} rows are slower than eager or compile")
    restless = sum(comparison.spread > RESTLESS for comparison in comparisons)
    if restless:
        sentences.append(
            f"{restless} of {len(comparisons)} rows have an interquartile range above {RESTLESS:.0%} of the median: "
            "the machine was busy, measure again"
        )
    wrong = sum(len(failures(group)) for group in groups)
    if wrong:
        sentences.append(f"{wrong} results are wrong, and their providers were not timed: see above")
    return sentences


def _plan(arguments: argparse.Namespace) -> Plan:
    import torch

    from diffpp_fast.bench import cases, providers
    from diffpp_fast.bench.run import Plan
    from diffpp_fast.kernels import dispatch

    full = "full" in arguments.sizes
    device = _device(arguments.device)
    backends = arguments.backends
    if backends is None:
        backends = [name for name in providers.serving(dispatch.PREFERENCE, device) if name != providers.ORACLE]
    dtypes = arguments.dtypes or (DTYPES[:2] if full else DTYPES[:1])
    cases.check_known("--backends", backends, dispatch.PREFERENCE)
    cases.check_known("--dtypes", dtypes, DTYPES)
    return Plan(
        cases=cases.choose(arguments.ops, arguments.sizes),
        backends=backends,
        dtypes=[getattr(torch, name) for name in dtypes],
        threads=_threads(arguments.threads or (["1", "all"] if full else ["all"]), device),
        device=device,
        min_time=arguments.min_time,
        compile=arguments.compile,
        warm=arguments.warm,
    )


def _device(name: str | None) -> torch.device:
    import torch

    from diffpp_fast.errors import ConfigurationError

    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError("--device cuda: PyTorch finds no GPU; `diffpp-fast doctor` shows what it finds")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def _threads(texts: Sequence[str], device: torch.device) -> list[int]:
    """Numbers of threads, each once. On a GPU the CPU's threads don't matter: the default number alone."""
    import torch

    from diffpp_fast.errors import ConfigurationError

    every = torch.get_num_threads()
    counts = []
    for text in texts:
        if text != "all" and not (text.isdecimal() and int(text) > 0):
            raise ConfigurationError(f'--threads: must be numbers from 1 up or "all", got {text!r}')
        counts.append(every if text == "all" else int(text))
    return [every] if device.type == "cuda" else list(dict.fromkeys(counts))


def _selection(arguments: argparse.Namespace) -> str:
    """The part of the file names that keeps a partial run from replacing the results of a whole one."""
    from diffpp_fast.bench.cases import SELECTIONS

    whole = arguments.ops is None and arguments.backends is None and arguments.compile
    name = arguments.sizes[0] if whole and arguments.sizes in ([name] for name in SELECTIONS) else "selected"
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
