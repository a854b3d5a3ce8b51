"""`python -m benchmarks`: everything that is measured, from the command line."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from diffpp_fast import install
from diffpp_fast.errors import UserError
from diffpp_fast.terminal import complain, say
from diffpp_fast.user_paths import user_path

if TYPE_CHECKING:
    import torch

    from benchmarks.results import Group
    from benchmarks.run import Plan

DESCRIPTION = """\
Measures every operator, the reward path and whole training steps on this machine against the code that they replace.
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
#: Lets CUDA's allocator grow its blocks, so that a batch that fits is not kept out by the holes that another has left.
ALLOCATOR = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
#: A spread of the times that casts doubt on a row.
RESTLESS = 0.25
DTYPES = ("float32", "bfloat16", "float16")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure a subject. Returns the exit code: 0, 1 where something is wrong, 2 for a user's error."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] in (["blocks"], ["loops"]):
        own: int = import_module(f"benchmarks.{words[0]}").main(words[1:])
        return own
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=DESCRIPTION)
    subjects = parser.add_subparsers(metavar="SUBJECT", required=True)
    add_subjects(subjects)
    arguments = parser.parse_args(argv)
    try:
        code: int = arguments.run(arguments)
        return code
    except UserError as error:
        complain(f"error: {error}")
    except ModuleNotFoundError as error:
        complain(f"error: {error.name} is not installed: {install.extra('train')}")
    return 2


def add_subjects(subjects: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
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
    add(
        "--out",
        type=user_path,
        default=Path("benchmarks/results"),
        metavar="FOLDER",
        help="for files (benchmarks/results)",
    )
    add("--docs", type=user_path, metavar="PAGE.md", help="also put the tables between the page's markers")
    kernels.set_defaults(run=run)
    reward = subjects.add_parser(
        "reward",
        help="the reward path, phase by phase",
        description=REWARD,
        epilog="How it measures, and how to read the numbers: docs/reward-path.md.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = reward.add_argument
    add("--model", metavar="NAME", help='"small", "sd15" or "sdxl" (sd15 on a GPU, else small)')
    add("--batch", type=_count, metavar="N", help="images (1, 4 and 2)")
    add("--latent", type=_count, metavar="N", help="side of the latents (32, 64 and 128)")
    add("--dtype", choices=DTYPES, help="(bfloat16 on a GPU, else float32)")
    add("--providers", type=_names, metavar="NAME,...", help="of what is compared (all)")
    add("--device", choices=["cpu", "cuda"], help="where to measure (cuda if there is one)")
    add("--rounds", type=_count, default=7, metavar="N", help="in which all are timed by turns (7)")
    add("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    add(
        "--out",
        type=user_path,
        default=Path("benchmarks/results"),
        metavar="FOLDER",
        help="for files (benchmarks/results)",
    )
    add("--docs", type=user_path, metavar="PAGE.md", help="also put the table between the page's markers")
    reward.set_defaults(run=run_reward)
    step = subjects.add_parser(
        "step",
        help="a whole training step, phase by phase",
        description=STEP,
        epilog="How it measures, and how to read the numbers: docs/step.md.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = step.add_argument
    add("--model", metavar="NAME", help='"tiny", "small", "sd15" or "sdxl" (sd15 on a GPU, else small)')
    add(
        "--batch",
        type=_count_or_fill,
        metavar="N",
        help='images, or "fill": as many as fit (fill on a GPU; 2, 1, 4, 1)',
    )
    add("--dtype", choices=DTYPES[:2], help="(bfloat16 on a GPU, else float32)")
    add("--providers", type=_names, metavar="NAME,...", help="of what is compared (all)")
    add("--device", choices=["cpu", "cuda"], help="where to measure (cuda if there is one)")
    add("--rounds", type=_count, default=7, metavar="N", help="in which all are timed by turns (7)")
    add("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    add(
        "--out",
        type=user_path,
        default=Path("benchmarks/results"),
        metavar="FOLDER",
        help="for files (benchmarks/results)",
    )
    add("--docs", type=user_path, metavar="PAGE.md", help="also put the tables between the page's markers")
    step.set_defaults(run=run_step)


def run(arguments: argparse.Namespace) -> int:
    from benchmarks import tables
    from benchmarks.files import write_results
    from benchmarks.machine import provenance
    from benchmarks.results import absences, failures, place
    from benchmarks.run import measure

    plan = _plan(arguments)
    if arguments.docs is not None:
        tables.check_page(arguments.docs, tables.place_of(plan.device, plan.warm))
    _make_folder(arguments.out)
    origin = provenance(plan.device)
    say(f"{origin.device_name}: {len(plan.cases)} cases, backends: {', '.join(plan.backends) or 'none that serves'}")

    groups: list[Group] = []
    total = len(plan.cases) * len(plan.dtypes) * len(plan.threads)
    for group in measure(plan):
        groups.append(group)
        complain(f"{len(groups)}/{total} {place(group[0])}")
        for sentence in failures(group):
            say(sentence)

    for sentence in absences(groups):
        say(sentence)
    stem = arguments.out / f"kernels-{plan.device.type}-{_selection(arguments)}"
    for path in write_results(stem, groups, origin, plan.device, arguments.docs, warm=plan.warm):
        say(f"written: {path}")
    say(f"\n{tables.text_table(groups)}\n")
    for sentence in _verdict(groups):
        say(sentence)
    return 1 if any(failures(group) for group in groups) else 0


def run_reward(arguments: argparse.Namespace) -> int:
    import diffusers  # noqa: F401 - said to be missing before work begins
    import torch
    import transformers  # noqa: F401

    from benchmarks import reward_path, reward_tables, tables
    from benchmarks.machine import provenance

    plan = reward_path.plan(
        arguments.model,
        device=_device(arguments.device),
        batch=arguments.batch,
        latent=arguments.latent,
        dtype=None if arguments.dtype is None else getattr(torch, arguments.dtype),
        names=arguments.providers,
        compile=arguments.compile,
        rounds=arguments.rounds,
    )
    place = reward_tables.place_of(plan)
    if arguments.docs is not None:
        tables.check_page(arguments.docs, place, reward_tables.SUBJECT)
    _make_folder(arguments.out)
    origin = provenance(plan.device)
    say(f"{origin.device_name}: {', '.join(plan.names)}")
    records = reward_path.measure(plan)
    for path in reward_tables.write(arguments.out / f"reward-path-{place}", plan, records, origin, arguments.docs):
        say(f"written: {path}")
    say(f"\n{reward_tables.text_table(records)}\n")
    for sentence in reward_tables.sentences(records):
        say(sentence)
    return 1 if any(record.wrong for record in records) else 0


def run_step(arguments: argparse.Namespace) -> int:
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ.update(ALLOCATOR)

    import diffusers  # noqa: F401 - said to be missing before work begins
    import torch
    import transformers  # noqa: F401

    from benchmarks import step, step_tables, tables
    from benchmarks.machine import provenance
    from benchmarks.step_providers import PROVIDERS

    plan = step.plan(
        arguments.model,
        device=_device(arguments.device),
        batch=arguments.batch,
        dtype=None if arguments.dtype is None else getattr(torch, arguments.dtype),
        names=arguments.providers,
        compile=arguments.compile,
        rounds=arguments.rounds,
    )
    place = step_tables.place_of(plan)
    if arguments.docs is not None:
        tables.check_page(arguments.docs, place, step_tables.SUBJECT)
    step.check_room(plan)
    _make_folder(arguments.out)
    origin = provenance(plan.device)
    say(f"{origin.device_name}: {', '.join(plan.names)}")
    if compiled := [name for name in plan.names if PROVIDERS[name].compiles]:
        say(f"{', '.join(compiled)}: measured last; compiling takes minutes for each, in which nothing is printed")
    busy = _load_sentence()
    for results in step.measure(plan):
        paths = step_tables.write(arguments.out / f"step-{place}", plan, results, origin, arguments.docs)
        complain(f"{sum(bool(record.runs) for record in results.records)} of {len(plan.names)} are measured")
    say(f"\n{step_tables.text(results)}\n")
    for path in paths:
        say(f"written: {path}")
    for sentence in [*step_tables.sentences(results), *busy]:
        say(sentence)
    return 1 if any(record.wrong for record in results.records) else 0


def _load_sentence() -> list[str]:
    """Say that other work was running when the measurement began, if it was."""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load <= cores / 2:
        return []
    return [f"the machine was busy when this began, with a load of {load:.1f} on {cores} cores: measure again"]


def _make_folder(path: Path) -> None:
    from diffpp_fast.errors import ConfigurationError

    if path.exists() and not path.is_dir():
        raise ConfigurationError(f"--out {path}: it is a file; name a folder")
    path.mkdir(parents=True, exist_ok=True)


def _verdict(groups: Sequence[Group]) -> list[str]:
    """What the reader of the table has to know: where the backends lose, and what is not to be trusted."""
    from benchmarks.results import compare, failures

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

    from benchmarks import cases, providers
    from benchmarks.run import Plan
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
    from benchmarks.cases import SELECTIONS

    whole = arguments.ops is None and arguments.backends is None and arguments.compile
    name = arguments.sizes[0] if whole and arguments.sizes in ([name] for name in SELECTIONS) else "selected"
    return f"{name}-warm" if arguments.warm else str(name)


def _names(text: str) -> list[str]:
    names = list(dict.fromkeys(filter(None, (part.strip() for part in text.split(",")))))
    if not names:
        raise argparse.ArgumentTypeError("must be one or more names, separated by commas")
    return names


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a number from 1 up, got {text}")
    return int(text)


def _count_or_fill(text: str) -> int | str:
    return text if text == "fill" else _count(text)


def _seconds(text: str) -> float:
    value = float(text)
    if not 0.0 < value <= 60.0:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 60 seconds, got {text}")
    return value


if __name__ == "__main__":
    sys.exit(main())
