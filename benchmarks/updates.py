"""`python -m benchmarks updates`: launches around the networks in one update of each, counted without a GPU.

The trainer's own code runs on the CPU: method, reward term, metrics, clipping, AdamW and moving average. Networks,
decoder and reward model are stand-ins, of which neither pass counts. By hand is the same in plain torch, with the noise
of torch's generator and the fused AdamW; once alone, and once with the same metrics and guards.

Counted are calls of operators that compute, ours and ATen's; views and allocations don't. Where GPUs take another way,
it is theirs that runs: the moving average's. What works on all weights at once counts as one call; how many launches
that is depends on the weights and is told for Stable Diffusion 1.5's. Passes over the weights' memory at the end of an
update follow, by engine.
"""

from __future__ import annotations

import argparse
import linecache
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import tables, weight_passes
from benchmarks.step_networks import MODELS
from benchmarks.tables import Place, Table
from benchmarks.timing import provenance
from diffpp_fast import NoiseSchedule
from diffpp_fast.methods import Batch, DiffInstructPP
from diffpp_fast.training import config
from diffpp_fast.training.batches import MicroBatch
from diffpp_fast.training.distributed import World
from diffpp_fast.training.engines import PlainEngine
from diffpp_fast.training.engines.shards import approach
from diffpp_fast.training.faults import SkippedUpdates
from diffpp_fast.training.metrics import Means
from diffpp_fast.training.trainer import Trainer
from diffpp_fast.user_paths import user_path

ROLES = ("generator", "fake")
SHAPE = (4, 8, 8)
SAMPLES = 2
GUIDANCE_SCALE, REWARD_SCALE = 7.5, 100.0
CLIP, DECAY = 1e3, 0.999
COLUMNS = ("update", "code", "kind", "operator", "calls")
OPERATORS, ARITHMETIC, METRICS, GUARDS, WEIGHTS = KINDS = ("operators", "arithmetic", "metrics", "guards", "weights")
TITLES = ("our operators", "noise, score, loss", "metrics", "guards", "clip, optimizer, average")
#: What calls of ATen serve by the function of the package that makes them, and by what is in the line where that does
#: several things; the innermost that is listed decides, and all others are arithmetic.
PLACES = {
    "is_finite": GUARDS,
    "_one_or_nan": GUARDS,
    "_update share =": GUARDS,
    "_update loss = loss *": GUARDS,
    "_update_fused skipped =": GUARDS,
    "subtract defined": GUARDS,
    "subtract product =": METRICS,
    "subtract lengths, given_lengths =": METRICS,
    "generator_loss torch.std_mean": METRICS,
    "_score_gradient ": METRICS,
    "_gap_metrics": METRICS,
    "metrics": METRICS,
    "finite_statistics": METRICS,
    "_note_rewards": METRICS,
    "add": METRICS,
    "step": WEIGHTS,
    "approach": WEIGHTS,
}
#: They give a tensor without computing one.
NOTHING = {
    *("empty", "empty_like", "empty_strided", "new_empty", "detach", "alias", "lift_fresh", "_unsafe_view"),
    *("promote_types", "scalar_tensor"),
}
#: Of torch's multi_tensor_apply: elements of a block, and by toolkit the blocks of a launch and its tensors, where it
#: goes over one list of them, two, ...
CHUNK = 65536
MOST = {"CUDA 12": (320, (110, 64, 48, 36)), "CUDA 13": (2240, (770, 448, 336, 252))}
#: What works on all weights, over how many lists, and whether these are of one number for each weight. A norm ends with
#: one more launch.
OVER_WEIGHTS = {
    "norm": (1, False),
    "AdamW": (4, False),
    "its count of steps": (1, True),
    "taking back skipped ones": (2, True),
    "moving average": (2, False),
}


def kind_here() -> str:
    """Return what the running call of ATen serves."""
    frame = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        if "/diffpp_fast/" in file:
            line = linecache.getline(file, frame.f_lineno)
            for place, kind in PLACES.items():
                if _is_at(place, frame.f_code.co_name, line):
                    return kind
        frame = frame.f_back  # type: ignore[assignment]
    return ARITHMETIC


def _is_at(place: str, function: str, line: str) -> bool:
    name, _, text = place.partition(" ")
    return name == function and text in line


class Calls(TorchDispatchMode):
    """Counts the operators that compute, by kind and name, as long as it is entered and not paused."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[tuple[str, str]] = Counter()
        self.paused = False
        self.kind: str | None = None  # of code by hand

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        library, _, name = function._schema.name.partition("::")
        if not (self.paused or function.is_view or name in NOTHING) and library in ("aten", "diffpp_fast"):
            kind = OPERATORS if library == "diffpp_fast" else self.kind or kind_here()
            self.counts[kind, name] += 1
        return function(*arguments, **(options or {}))

    @contextmanager
    def of(self, kind: str) -> Iterator[None]:
        """Inside, calls are of this kind."""
        before, self.kind = self.kind, kind
        try:
            yield
        finally:
            self.kind = before

    def outside(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function whose operators don't count."""
        before, self.paused = self.paused, True
        try:
            return function(*arguments)
        finally:
            self.paused = before


class _StandIn(Function):
    """weights[0] times the input, which is all that a network has to be here; nothing of either pass counts."""

    @staticmethod
    def forward(ctx: Any, calls: Calls, x: Tensor, *weights: Tensor) -> Tensor:
        ctx.calls = calls
        ctx.save_for_backward(x, *weights)
        result: Tensor = calls.outside(lambda: x * weights[0])
        return result

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        x, *weights = ctx.saved_tensors
        (gradient,) = grad_outputs

        def gradients() -> list[Tensor]:
            return [
                gradient * weights[0],
                (gradient * x).sum().view(1),
                *(torch.ones_like(each) for each in weights[1:]),
            ]

        return None, *ctx.calls.outside(gradients)


class StandIn(nn.Module):
    """A network of three weights. With more, the update has as many calls: they take all at once."""

    def __init__(self, calls: Calls, trained: bool) -> None:
        super().__init__()
        self.calls = calls
        self.weights = nn.ParameterList([torch.full((1,), 0.5), torch.ones(2, 2), torch.ones(3)]).requires_grad_(
            trained
        )

    def forward(self, x: Tensor, *others: Any) -> Tensor:
        result: Tensor = _StandIn.apply(self.calls, x, *self.weights)
        return result


class Scores(nn.Module):
    """A decoder and a reward model: one number for each sample."""

    def __init__(self, calls: Calls) -> None:
        super().__init__()
        self.calls = calls

    def forward(self, x0: Tensor, conditioning: Any) -> Tensor:
        result: Tensor = _Reward.apply(self.calls, x0)
        return result


class _Reward(Function):
    @staticmethod
    def forward(ctx: Any, calls: Calls, x0: Tensor) -> Tensor:
        ctx.calls, ctx.like = calls, torch.empty_like(x0)
        result: Tensor = calls.outside(lambda: x0.flatten(1).mean(1))
        return result

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        return None, ctx.calls.outside(torch.ones_like, ctx.like)


class Setting:
    """The networks of both codes, and the samples of an update."""

    def __init__(self, calls: Calls) -> None:
        self.calls = calls
        self.networks = {role: StandIn(calls, trained=True) for role in ROLES}
        self.reference = StandIn(calls, trained=False)
        self.reward = Scores(calls)
        alphas = torch.linspace(0.99, 0.1, 1000, dtype=torch.float64)
        self.schedule = NoiseSchedule(alphas, (1.0 - alphas.square()).sqrt())
        self.batch = Batch(torch.arange(SAMPLES), None, shape=SHAPE, null_conditioning=())


class Ours:
    """`Trainer._update` with a method and engines of its own, and without a run around them."""

    def __init__(self, setting: Setting) -> None:
        world = World.alone("cpu")
        method = DiffInstructPP(
            setting.networks["generator"],
            setting.networks["fake"],
            setting.reference,
            setting.schedule,
            reward=setting.reward,
            reward_scale=REWARD_SCALE,
            guidance_scale=GUIDANCE_SCALE,
        )
        self.losses = {"generator": method.generator_loss, "fake": method.fake_loss}
        method.reward_term.describes = False  # as in a run
        settings, ema = config.Optimizer(lr=1e-5, clip=CLIP), config.EmaSection(decay=DECAY)
        self.engines = {
            role: PlainEngine(
                *(role, network, dict(network.named_parameters()), settings, 1000, world),
                ema=ema if role == "generator" else None,
            )
            for role, network in setting.networks.items()
        }
        average: Any = self.engines["generator"].average
        average.update = lambda _, skipped: approach(
            average.averages, [*setting.networks["generator"].parameters()], 1.0 - DECAY, skipped
        )
        batches: Any = SimpleNamespace(size=SAMPLES, is_whole=True, world=world)
        self.trainer: Any = object.__new__(Trainer)
        self.trainer.__dict__.update(
            world=world,
            batches=batches,
            generator=self.engines["generator"],
            parts=SimpleNamespace(method=method, trained=lambda role: SimpleNamespace(active=nullcontext)),
            position=SimpleNamespace(samples=0),
            phases=lambda name: nullcontext(),
            _micro_batches=lambda engine, first: [MicroBatch(setting.batch, 1.0, last=True)],
            _count=lambda engine, shared: None,
            _means=Means(),
            _captured=None,
            _skips={role: SkippedUpdates(role, batches) for role in ROLES},
            _reward_watch=SimpleNamespace(note=lambda *noted: None),
        )

    def update(self, role: str) -> None:
        self.trainer._update(self.engines[role], self.losses[role])


class ByHand:
    """The same updates as one writes them without this package."""

    guarded = False

    def __init__(self, setting: Setting) -> None:
        self.setting, self.calls = setting, setting.calls
        self.alpha, self.sigma = (table.float() for table in (setting.schedule.alphas, setting.schedule.sigmas))
        self.weights = {role: list(network.parameters()) for role, network in setting.networks.items()}
        self.optimizers = {
            role: torch.optim.AdamW(weights, lr=1e-5, weight_decay=0.0, fused=True)
            for role, weights in self.weights.items()
        }
        self.average = [weight.detach().clone() for weight in self.weights["generator"]]
        self.sums: dict[str, tuple[Tensor, Tensor]] = {}

    def update(self, role: str) -> None:
        with self.calls.of(ARITHMETIC):
            loss, metrics = self.generator_loss() if role == "generator" else self.fake_loss()
            loss.backward()
        with self.calls.of(WEIGHTS):
            norm = nn.utils.clip_grad_norm_(self.weights[role], CLIP, foreach=True)
            with self.calls.of(GUARDS):
                skipped = self.guarded and not norm.isfinite()
            if not skipped:
                self.optimizers[role].step()
                if role == "generator":
                    torch._foreach_lerp_(self.average, [weight.detach() for weight in self.weights[role]], 1.0 - DECAY)
            self.optimizers[role].zero_grad()
        if self.guarded:
            with self.calls.of(METRICS):
                self.add(role, [*metrics, loss.detach(), norm])

    def add(self, role: str, metrics: Sequence[Tensor]) -> None:
        """Adds up what is finite, and how often it is."""
        values = torch.stack(list(metrics))
        with self.calls.of(GUARDS):
            finite = values.isfinite()
            values = values.where(finite, 0.0)
        sums, counts = self.sums.get(role, (torch.zeros_like(values), torch.zeros_like(values)))
        self.sums[role] = sums + values, counts + finite

    def draw(self, x0: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        t = torch.randint(0, len(self.alpha), (SAMPLES,))
        eps = torch.randn_like(x0)
        alpha, sigma = (table[t].reshape(-1, 1, 1, 1) for table in (self.alpha, self.sigma))
        return alpha * x0 + sigma * eps, t, eps, alpha, sigma

    def sample(self) -> Tensor:
        x0: Tensor = self.setting.networks["generator"](torch.randn(SAMPLES, *SHAPE))
        return x0

    def fake_loss(self) -> tuple[Tensor, Sequence[Tensor]]:
        with torch.no_grad():
            x_t, t, eps, _, _ = self.draw(self.sample())
        return F.mse_loss(self.setting.networks["fake"](x_t, t), eps), []

    def generator_loss(self) -> tuple[Tensor, Sequence[Tensor]]:
        x0 = self.sample()
        with torch.no_grad():
            x_t, t, _, alpha, sigma = self.draw(x0)
            fake = self.setting.networks["fake"](x_t, t)
            cond, uncond = self.setting.reference(x_t, t), self.setting.reference(x_t, t)
            gap = uncond + GUIDANCE_SCALE * (cond - uncond) - fake
            gradient = sigma / alpha * gap
        x = x0.detach().requires_grad_()
        rewards = self.setting.reward(x, None)
        term = REWARD_SCALE * torch.autograd.grad(rewards.sum(), x)[0]
        metrics: Sequence[Tensor] = []
        if self.guarded:
            term, metrics = self.look(gap, gradient, term, rewards.detach(), x0.detach())
        target = (x0 - (gradient - term)).detach()
        return 0.5 * F.mse_loss(x0, target, reduction="sum") / SAMPLES, metrics

    def look(
        self, gap: Tensor, gradient: Tensor, term: Tensor, rewards: Tensor, x0: Tensor
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """Leaves out what is not finite of the reward's term; returns it and the metrics. Rewards wait for a log."""
        with self.calls.of(METRICS):
            lengths = term.flatten(1).norm(dim=1)
        with self.calls.of(GUARDS):
            defined = (lengths + rewards).isfinite()
            term, lengths = term.where(defined.reshape(-1, 1, 1, 1), 0.0), lengths.where(defined, 0.0)
            # Without any there is no update.
            term = term + torch.where(defined.any(), 0.0, torch.nan)
        with self.calls.of(METRICS):
            return term, [
                gap.square().flatten(1).mean(1).sqrt().mean(),
                gradient.flatten(1).norm(dim=1).mean(),
                1.0 - defined.float().mean(),
                lengths.mean(),
                -F.cosine_similarity(gradient.flatten(1), term.flatten(1)).mean(),
                *torch.std_mean(x0, correction=0),
            ]


class ByHandGuarded(ByHand):
    """The same with what our code logs and looks after."""

    guarded = True


CODES: dict[str, Callable[[Setting], Any]] = {
    "by hand": ByHand,
    "by hand, with metrics and guards": ByHandGuarded,
    "ours": Ours,
}
Found = dict[tuple[str, str], Counter[tuple[str, str]]]


def count(role: str, code: str) -> Counter[tuple[str, str]]:
    """Return the calls of one update by kind and operator; those before it made the optimizer's state and the sums."""
    calls = Calls()
    updates = CODES[code](Setting(calls))
    for _ in range(2):
        updates.update(role)
    with calls:
        updates.update(role)
    return calls.counts


def of_kind(counts: Counter[tuple[str, str]], kind: str) -> int:
    return sum(number for (of, _), number in counts.items() if of == kind)


def launches(sizes: Sequence[int], lists: int, toolkit: str) -> int:
    """How many launches torch's multi_tensor_apply takes for tensors of these sizes, in so many lists."""
    most_blocks, most_tensors = MOST[toolkit]
    done = tensors = blocks = 0
    for size in sizes:
        tensors += 1
        chunks = -(-size // CHUNK)
        for chunk in range(chunks):
            blocks += 1
            last = chunk == chunks - 1
            if blocks == most_blocks or (last and tensors == most_tensors[lists - 1]):
                # What a tensor has left goes into the next launch.
                done, blocks, tensors = done + 1, 0, 0 if last else 1
    return done + (blocks > 0)


def weights_of(model: str) -> list[int]:
    """Return the sizes of a UNet's weights."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        network: Any = UNet2DConditionModel(**MODELS[model].unet)
    return [weight.numel() for weight in network.parameters()]


def table(found: Found) -> Table:
    body = [
        (role, code, *(str(of_kind(counts, kind)) for kind in KINDS), str(counts.total()))
        for (role, code), counts in found.items()
    ]
    return Table([("of", "", *TITLES, "all"), *body])


def csv_rows(found: Found) -> list[dict[str, Any]]:
    return [
        {"update": role, "code": code, "kind": kind, "operator": name, "calls": calls}
        for (role, code), counts in found.items()
        for (kind, name), calls in sorted(counts.items())
    ]


def weights_table(sizes: Sequence[int]) -> Table:
    rows = []
    for toolkit in MOST:
        counts = [
            launches([1] * len(sizes) if counters else sizes, lists, toolkit) + (name == "norm")
            for name, (lists, counters) in OVER_WEIGHTS.items()
        ]
        rows.append((toolkit, *map(str, counts), str(sum(counts))))
    return Table([("", *OVER_WEIGHTS, "all"), *rows], f"Launches over Stable Diffusion 1.5's {len(sizes)} weights:")


def add_arguments(add: Callable[..., Any]) -> None:
    add("--out", type=user_path, default=Path("benchmarks/results"), metavar="FOLDER", help="(benchmarks/results)")


def run(arguments: argparse.Namespace, device: torch.device) -> int:
    place = Place(arguments.out / "updates", None, "updates", "cpu")
    place.check()
    found = {(role, code): count(role, code) for role in ROLES for code in CODES}
    parts = [table(found), weights_table(weights_of("sd15")), weight_passes.table()]
    print("\n\n".join(map(tables.text, parts)))
    for path in place.write(csv_rows(found), COLUMNS, parts, provenance(torch.device("cpu"))):
        print(f"written: {path}")
    return 0
