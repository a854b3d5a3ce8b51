"""One of several processes that train small networks by every engine; tests/test_engines.py starts it and reads on.

python engine_worker.py FOLDER KINDS
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffpp_fast.training import config
from diffpp_fast.training.distributed import World, leave
from diffpp_fast.training.engines import DeepSpeedEngine, Engine, PlainEngine, ReplicatedEngine

#: With an eps of this size Adam's first updates don't magnify the rounding of small gradients.
SETTINGS = config.Optimizer(
    lr=0.05,
    betas=(0.5, 0.9),
    eps=1e-3,
    weight_decay=0.01,
    clip=0.5,
    warmup_steps=2,
    schedule="cosine",
    final_lr=0.1,
)
EMA = config.EmaSection(decay=0.8, warmup=True)
UPDATES, SAMPLES, MICRO_BATCH = 10, 8, 2
#: Small enough that every stage fills several.
BUCKETS: dict[str, Any] = {"reduce_bucket_size": 64, "allgather_bucket_size": 64, "prefetch_bucket_size": 64}


class Network(nn.Module):
    """Two layers whose sizes two processes don't share evenly, and a buffer."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.first, self.second = nn.Linear(5, 7), nn.Linear(7, 3)
        self.register_buffer("table", torch.arange(2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def make(
    kind: int | str,
    world: World,
    *,
    role: str = "generator",
    settings: config.Optimizer = SETTINGS,
    network: nn.Module | None = None,
    bfloat16: bool = False,
    **zero: Any,
) -> Any:
    """An engine: "plain", or of a ZeRO stage. Processes begin with other weights: rank 0's have to win."""
    network = network or Network(seed=world.rank + 10 * (role == "fake"))
    common = (role, network, dict(network.named_parameters()), settings, UPDATES, world, EMA)
    if kind == "plain":
        return PlainEngine(*common)
    if kind == 0:
        return ReplicatedEngine(*common)
    return DeepSpeedEngine(*common, zero=config.Zero(stage=kind, **BUCKETS, **zero), bfloat16=bfloat16)


def samples(update: int) -> torch.Tensor:
    """All processes' samples of an update, [SAMPLES, 5]."""
    return torch.randn(SAMPLES, 5, generator=torch.Generator().manual_seed(update))


def train(
    engine: Engine, world: World, updates: Sequence[int], *, poisoned: Sequence[int] = (), scale: float = 1.0
) -> list[float]:
    """Updates on this process's share of the samples, in micro-batches; the norms.

    The last sample of a poisoned update, which the last process has, makes the gradient infinite or NaN.
    """
    norms = []
    dtype = next(iter(engine.parameters.values())).dtype
    for update in updates:
        mine = world.share(torch.arange(SAMPLES))
        for part in mine.split(MICRO_BATCH):
            x = samples(update)[part].to(dtype)
            if update in poisoned and SAMPLES - 1 in part.tolist():
                x[-1] *= torch.nan
            loss = scale * engine.network(x).float().square().mean()
            engine.backward(loss * len(part) / len(mine), last=part[-1] == mine[-1])
        norms.append(float(engine.step()))
    return norms


def numbers(engine: Any) -> dict[str, torch.Tensor]:
    """Whole weights and averages, on rank 0."""
    weights, averages = engine.full_state(averaged=False), engine.full_state(averaged=True)
    return {
        **{f"weights.{name}": tensor for name, tensor in (weights or {}).items()},
        **{f"averages.{name}": tensor for name, tensor in (averages or {}).items()},
    }


def save(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    from safetensors.torch import save_file

    if tensors:
        save_file(dict(tensors), path)


@contextmanager
def unchanged(engine: Any) -> Iterator[None]:
    """Fails where the context changes what this process updates, the optimizer's state or the average."""

    def everything() -> list[torch.Tensor]:
        state = engine.optimizer_state
        return [
            part.detach().clone()
            for number, tensor in enumerate(engine.shards.tensors)
            for part in (tensor, engine.average.averages[number], *(state.get(tensor, name) for name in state.names))
        ] + [torch.tensor(engine.optimizer_state.get_step(tensor)) for tensor in engine.shards.tensors]

    before = everything()
    yield
    assert all(torch.equal(one, other) for one, other in zip(before, everything(), strict=True))


def stages(world: World, folder: Path, kinds: Sequence[str]) -> None:
    """Trains by each stage, skips one update, saves, and goes on: from memory and from the files, to the same bits.

    Then it reads what one process has written, goes on from there, and reads what the stage before has written.
    """
    from safetensors.torch import load_file

    norms = {}
    before = "plain"
    for kind in kinds:
        stage, _, offload = kind.partition("-")
        zero: dict[str, Any] = {"offload_optimizer": "cpu"} if offload else {}
        if offload and stage == "3":
            zero["offload_parameters"] = "cpu"
        name = f"{kind}.of.{world.size}"
        engine = make(int(stage), world, **zero)
        norms[kind] = train(engine, world, range(4))
        with unchanged(engine):
            norms[kind] += train(engine, world, [4], poisoned=[4])
        norms[kind] += train(engine, world, [5])
        probe = samples(0)
        with torch.no_grad():
            outside = engine.network(probe)
            with unchanged(engine), engine.averaged():
                pass
            with engine.averaged():
                inside = engine.network(probe)
            assert torch.equal(engine.network(probe), outside) and not torch.equal(inside, outside)
        save(
            folder / f"{name}.middle.safetensors",
            {**numbers(engine), "inside": inside} if world.is_main else numbers(engine),
        )
        (folder / name).mkdir(exist_ok=True)
        world.barrier()
        engine.write(folder / name)
        again = make(int(stage), world, **zero)
        again.read(folder / name)
        assert again.updates == 6 and again.applied == 5
        for one in (engine, again):
            train(one, world, range(6, 8))
        end, end_again = numbers(engine), numbers(again)
        assert all(torch.equal(end[key], end_again[key]) for key in end)
        save(folder / f"{name}.end.safetensors", end)
        again.read(folder / "plain")
        train(again, world, range(6, 8))
        save(folder / f"{name}.from_plain.safetensors", numbers(again))
        again.read(folder / before)
        state = again.full_state(averaged=True)
        if world.is_main and before != "plain":
            written = load_file(folder / f"{before}.middle.safetensors")
            assert all(torch.equal(state[key], written[f"averages.{key}"]) for key in state)
        before = name
    if world.is_main:
        (folder / f"norms.of.{world.size}.json").write_text(json.dumps(norms))


def masters(world: World, kinds: Sequence[int]) -> None:
    """bfloat16 weights, float32 masters: updates too small for bfloat16 add up."""
    small = SETTINGS.model_copy(update={"lr": 1e-5, "warmup_steps": 0, "schedule": "constant", "final_lr": 0.0})
    for kind in kinds:
        exact = Network(seed=0)
        for offload in ("none", "cpu"):
            engine = make(kind, world, settings=small, bfloat16=True, offload_optimizer=offload)
            state = engine.full_state(averaged=False)
            if world.is_main:
                for name, weight in exact.named_parameters():
                    assert torch.equal(state[name], weight.detach()), "the masters start rounded"
            assert next(iter(engine.parameters.values())).dtype == torch.bfloat16
            train(engine, world, [0], poisoned=[0])
            train(engine, world, range(1, 4))
            assert engine.optimizer_state.get_step(engine.shards.tensors[0]) == 3
            state = engine.full_state(averaged=False)
            if world.is_main:
                plain = make("plain", World.alone("cpu"), settings=small, network=Network(seed=0))
                train(plain, World.alone("cpu"), [0], poisoned=[0])
                train(plain, World.alone("cpu"), range(1, 4))
                expected = plain.full_state(averaged=False)
                moved = sum((expected[n] - w.detach()).square().sum() for n, w in exact.named_parameters()) ** 0.5
                off = sum((expected[n] - state[n]).square().sum() for n, _ in exact.named_parameters()) ** 0.5
                print(f"stage {kind}, {offload}: {float(off / moved):.3f} of the way off")
                assert off < 0.1 * moved


def normalized(world: World, kinds: Sequence[int]) -> None:
    """Gradients of norm 1, also where they are short, as in one process; norms are those before."""
    settings = SETTINGS.model_copy(update={"clip": None, "normalize": True})
    alone = World.alone("cpu")
    plain = make("plain", alone, settings=settings, network=Network(seed=0))
    norms = [norm for scale in (1.0, 1e-3) for norm in train(plain, alone, range(3), scale=scale)]
    expected = plain.full_state(averaged=False)
    for kind in kinds:
        engine = make(kind, world, settings=settings)
        mine = [norm for scale in (1.0, 1e-3) for norm in train(engine, world, range(3), scale=scale)]
        torch.testing.assert_close(mine, norms, rtol=1e-4, atol=0.0)
        state = engine.full_state(averaged=False)
        if world.is_main:
            torch.testing.assert_close(state, expected, rtol=1e-5, atol=1e-6)


def two_networks(world: World, kinds: Sequence[tuple[int, int]], folder: Path) -> None:
    """Two trained networks in turns, the second on what the first one makes, and a frozen one spread over all."""
    from diffpp_fast.training.engines import place_reference

    for number, (first, second) in enumerate(kinds):
        generator, fake = make(first, world), make(second, world, role="fake", network=Two(world.rank))
        where: Any = ("replica", "shard", "offload")[number % 3]
        reference = place_reference(Two(7), config.Distributed(reference=where), world)
        in_turns(generator, fake, reference, world)
        save(folder / f"two.{first}.{second}.safetensors", numbers(generator))
        save(folder / f"two.{first}.{second}.fake.safetensors", numbers(fake))


class Two(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layer = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def in_turns(generator: Any, fake: Any, reference: nn.Module, world: World) -> None:
    """Diff-Instruct's structure: the fake learns on samples, the generator from a gradient of both under no_grad."""
    for update in range(3):
        mine = world.share(torch.arange(SAMPLES))
        for _ in range(2):
            for part in mine.split(MICRO_BATCH):
                with torch.no_grad():
                    x0 = generator.network(samples(update)[part])
                loss = (fake.network(x0) - x0).square().mean()
                fake.backward(loss * len(part) / len(mine), last=part[-1] == mine[-1])
            fake.step()
        for part in mine.split(MICRO_BATCH):
            x0 = generator.network(samples(update)[part])
            with torch.no_grad():
                gradient = reference(x0) - fake.network(x0)
            generator.backward((gradient * x0).mean() * len(part) / len(mine), last=part[-1] == mine[-1])
        generator.step()


def private_names(world: World) -> None:
    """DeepSpeed as it is, without this package's engines, which would fail on the first missing name."""
    from diffpp_fast.training.engines.deepspeed import import_deepspeed, zero_config
    from diffpp_fast.training.engines.zero import PRIVATE

    deepspeed = import_deepspeed(world)
    made = {}
    for stage in (1, 2, 3):
        layer = nn.Linear(3, 3)
        written = zero_config(config.Zero(stage=stage), bfloat16=False, clip=None, nvme_path=None)
        optimizer = torch.optim.AdamW(layer.parameters())
        engine, *_ = deepspeed.initialize(model=layer, optimizer=optimizer, config=written, dist_init_required=False)
        made[stage] = engine, engine.optimizer, layer.weight
    owners: dict[str, list[Any]] = {
        "deepspeed.ops": [deepspeed.ops],
        "the engine": [engine for engine, _, _ in made.values()],
        "the optimizer of stages 1 and 2": [made[1][1], made[2][1]],
        "a weight of stages 1 and 2": [made[1][2], made[2][2]],
        "a weight's mapping": [getattr(made[stage][2], "_hp_mapping", None) for stage in (1, 2)],
        "the optimizer of stage 2": [made[2][1]],
        "the optimizer of stage 3": [made[3][1]],
        "a weight of stage 3": [made[3][2]],
    }
    missing = [
        f"{name} of {owner}"
        for owner, names in PRIVATE.items()
        for name in names
        if not all(hasattr(found, name) for found in owners[owner])
    ]
    assert not missing, (
        f"DeepSpeed {deepspeed.__version__} has no {', '.join(missing)}, which diffpp_fast/training/engines/zero.py "
        "uses: change that file, and nothing else"
    )


def main() -> None:
    if sys.argv[1] == "private":
        world = World.join("cpu")
        private_names(world)
        world.close()
        return
    folder, kinds = Path(sys.argv[1]), sys.argv[2].split(",")
    world = World.join("cpu")
    torch.set_num_threads(1)
    stages(world, folder, kinds)
    numbered = sorted({int(kind[0]) for kind in kinds} - {0})
    masters(world, numbered)
    normalized(world, numbered)
    two_networks(world, [(numbered[-1], numbered[0]), (numbered[0], 0), (numbered[-1], numbered[-1])], folder)
    world.close()


if __name__ == "__main__":
    main()
    leave(0)
