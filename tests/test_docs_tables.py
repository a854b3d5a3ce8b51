"""Launches and bytes of every operator, counted anew: the file that holds them, and the rows that a page shows."""

import csv
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from traffic import Traffic, cuda_launches, triton_traffic

from benchmarks import cases
from benchmarks.cases import FAMILIES, Case, make_inputs, unfused
from diffpp_fast import use_backend
from diffpp_fast.selftest import Call

ROOT = Path(__file__).parent.parent

# The rows are the benchmark's cases, on tensors small enough for the interpreter.
#: Samples, tokens, channels.
TOKENS = (2, 64, 512)
LATENTS, IMAGES, LARGE_GROUPS, SMALL_GROUPS = (2, 4, 16, 32), (1, 3, 128, 128), (1, 4, 64, 72), (1, 4, 16, 32)
#: To 7/16, as 512 to 224.
PIXELS = 56
#: Of one channel each; those of `LARGE_GROUPS` are beyond what a program then keeps in registers.
GROUPS, MOST_IN_ONE = 4, 4096
#: Of csrc: the folder and the functions that launch, where they are not the operator's `forward` and `backward`.
HOSTS = {
    "philox": ("noise", "draw_normals", None),
    "score_gap": ("score_gap", "launch", None),
    "reward_pixels": ("reward_pixels", "launch", "launch"),
}
SHAPES = {
    "reward_pixels": [IMAGES],
    "group_norm_silu": [LARGE_GROUPS, SMALL_GROUPS],
    "geglu": [TOKENS],
    "ada_layer_norm": [TOKENS],
    "gated_residual_norm": [TOKENS],
    "rms_norm_rope": [(2, 16, 8, 128)],
}
#: Launched for the gradients of weight and bias alone.
FOR_PARAMETERS = "parameter_gradients"


class Row(NamedTuple):
    """The cells of a table, as text: launches eager, Triton and CUDA; bytes per element eager and Triton."""

    op: str
    case: str
    direction: str
    counts: tuple[str, ...]


def rows_of_file() -> list[Row]:
    with (ROOT / "benchmarks/results/launches-and-bytes.csv").open(newline="") as file:
        # The last column, of CUDA's bytes, can't be counted without a GPU.
        return [
            Row(op, case, direction, tuple(counts[:5])) for op, case, direction, *counts in list(csv.reader(file))[1:]
        ]


def rows_of_page() -> Iterator[Row]:
    """The rows of the page's table, whose cells hold the forward and then the backward pass."""
    for line in (ROOT / "docs/operators.md").read_text().splitlines():
        row = re.match(r"\| `(?:ops\.)?(\w+)`: ([\w ,]+) \|(.*)\|$", line)
        if row is not None:
            cells = [cell.strip().split("; ") for cell in row[3].split("|")]
            for direction, counts in zip(("forward", "backward"), zip(*cells, strict=True), strict=False):
                yield Row({"Noise": "philox"}.get(row[1], row[1]), row[2], direction, counts)


def table_cases() -> Iterator[tuple[str, Case]]:
    """The names that the tables have for cases, and the cases."""
    for family in FAMILIES:
        shapes = SHAPES.get(family.op, [LATENTS])
        for shape in shapes:
            small = shape == SMALL_GROUPS
            # The layout changes nothing about a resize, nor about groups that are done in one launch.
            for layout in ("contiguous",) if small or family.op == "reward_pixels" else family.layouts:
                for noise in family.noise:
                    parts = [family.variant, f"{noise} noise" if noise != "none" and family.op != "philox" else ""]
                    parts += ["small groups" if small else "", "" if layout == "contiguous" else layout]
                    name = ", ".join(filter(None, parts)) or "any"
                    yield name, Case(family.op, family.variant, name, shape, layout, noise, "epsilon", "")


def counted(
    forward: Callable[..., Any], call: Call, arguments: dict[str, Any],
    counting: Callable[[Traffic], AbstractContextManager[None]],
) -> list[Traffic]:  # fmt: skip
    """Return the traffic of the forward and, if there is one, of the backward pass."""
    passes = [Traffic()]
    with counting(passes[0]), passes[0]:
        result = forward(**arguments)
    if call.wrt:
        results = (result,) if isinstance(result, torch.Tensor) else tuple(result)
        outer = torch.ones_like(results[0]) if call.outer is None else call.outer
        passes.append(Traffic())
        with counting(passes[1]), passes[1]:
            torch.autograd.grad(results, [arguments[name] for name in call.wrt], [outer] * len(results))
    return passes


def cuda_column(case: Case, direction: int) -> str:
    host = HOSTS.get(case.op, (case.op, "forward", "backward"))
    launched = cuda_launches(host[0], host[1 + direction])
    if launched is None:
        return "-"
    return str(len([kernel for kernel in launched if case.variant == "trained" or kernel != FOR_PARAMETERS]))


def rows_of_case(name: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> Iterator[Row]:
    elements = torch.Size(case.shape).numel()
    eager, fused = [], []
    for dtype in (torch.float32, torch.bfloat16):
        inputs = make_inputs(case, dtype, torch.device("cpu"))
        call = inputs.call
        eager.append(counted(unfused(case), call, inputs.unfused, lambda _: nullcontext()))
        with use_backend("triton"):
            if case.op == "reward_pixels":  # its first call makes tables that are kept
                call.run()
            fused.append(
                counted(call.forward, call, call.arguments, lambda traffic: triton_traffic(traffic, monkeypatch))
            )
    for direction, passes in enumerate(zip(*eager, *fused, strict=True)):
        launches = [str(traffic.launches) for traffic in passes]
        nbytes = [f"{traffic.bytes / elements:.0f}" for traffic in passes]
        both = [value if value == other else f"{value} / {other}"
                for column in (launches, nbytes) for value, other in (column[:2], column[2:])]  # fmt: skip
        counts = (both[0], both[1], cuda_column(case, direction), both[2], both[3])
        yield Row(case.op, name, ("forward", "backward")[direction], counts)


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's launches are counted in its interpreter")
@pytest.mark.parametrize(("name", "case"), [pytest.param(*c, id=f"{c[1].op} {c[0]}") for c in table_cases()])
def test_table_of_launches_and_bytes(name: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffpp_fast.ops.triton import group_norm_silu, reward_pixels

    monkeypatch.setattr(group_norm_silu, "MOST_IN_ONE", MOST_IN_ONE)
    # Few programs: the interpreter runs them one by one.
    monkeypatch.setattr(reward_pixels, "ROWS_TILE", (64, 128))
    monkeypatch.setattr(reward_pixels, "COLUMNS_TILE", (64, 128))
    monkeypatch.setattr(cases, "REWARD_SIZE", PIXELS)
    monkeypatch.setattr(cases, "GROUPS", GROUPS)
    in_file = [row for row in rows_of_file() if (row.op, row.case) == (case.op, name)]
    assert in_file == list(rows_of_case(name, case, monkeypatch))


def test_tables_hold_no_other_case() -> None:
    assert {(row.op, row.case) for row in rows_of_file()} == {(case.op, name) for name, case in table_cases()}


def test_the_page_shows_what_the_file_holds() -> None:
    shown = list(rows_of_page())
    assert set(shown) <= set(rows_of_file())
    assert {row.op for row in shown} == {row.op for row in rows_of_file()}
