"""The plan against what engines hold, what autograd keeps, and what is known of the true architectures."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import processes
import pytest
import tiny
import torch

from diffpp_fast.cli.main import main
from diffpp_fast.errors import ConfigurationError
from diffpp_fast.networks import FrozenDecoder, fuse
from diffpp_fast.training.loading import load_config
from diffpp_fast.training.planning import Lora, Setup, Trained, Zero, make_plan
from diffpp_fast.training.planning.check import measure_states
from diffpp_fast.training.planning.from_config import setup_of
from diffpp_fast.training.planning.gpu_semantics import GpuSemantics
from diffpp_fast.training.planning.gpus import GPUS, Gpu
from diffpp_fast.training.planning.ledger import Ledger
from diffpp_fast.training.planning.models import KNOWN, Models, known, on_meta, parameters_of
from diffpp_fast.training.planning.operations import Operations
from diffpp_fast.training.planning.rewards import Towers
from diffpp_fast.training.planning.states import frozen_state, optimizer_bytes, trained_state
from diffpp_fast.training.planning.step import Counted, Size, count

H100 = GPUS["h100"]
BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's inputs without one byte of weights; returns the configuration."""
    config = tiny.write(tmp_path_factory.mktemp("project"))
    for weights in config.parent.rglob("*.safetensors"):
        weights.unlink()
    return config


@pytest.fixture(scope="module")
def small(project: Path) -> Setup:
    return replace(setup_of(load_config(project)), rewards=Towers())


@pytest.fixture(scope="module")
def sd15() -> Counted:
    """One image of Stable Diffusion 1.5 through both updates."""
    return count(Setup(known("sd15"), micro_batch=1, rewards=Towers(("pickscore",))))


def operations(counted: Counted, update: str, *names: str) -> float:
    """TFLOP of an update's phases."""
    chosen = [phase for phase in counted.phases if phase.update == update and phase.name in names]
    assert len(chosen) == len(names)
    return sum(sum(phase.operations.values()) for phase in chosen) / 1e12


# Networks


@pytest.mark.parametrize(
    ("name", "denoiser", "text"),
    [
        ("sd15", 859_520_964, [123_060_480]),
        ("sdxl", 2_567_463_684, [123_060_480, 694_659_840]),
        ("pixart", 610_856_096, [4_762_310_656]),
    ],
)
def test_known_models_have_their_true_sizes(name: str, denoiser: int, text: list[int]) -> None:
    models = known(name)
    assert parameters_of(on_meta(models.reference)) == denoiser
    assert [parameters_of(on_meta(recipe)) for recipe, _ in models.text_encoders] == text
    assert models.decoder is not None
    assert parameters_of(on_meta(models.decoder)) == 83_653_863


def test_rewards_have_their_true_sizes(sd15: Counted) -> None:
    # PickScore's CLIP without its one learnt scale, in float32.
    assert sd15.reward_bytes == 4 * (986_109_441 - 1)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="sd15, sdxl, pixart"):
        known("sd21")
    with pytest.raises(ConfigurationError, match="known: pickscore"):
        Towers(("beauty",))
    with pytest.raises(ConfigurationError, match="multiple of 3"):
        Setup(KNOWN["sd15"], gpus=3, global_batch=8)


# Operations


def test_operations_of_stable_diffusion(sd15: Counted) -> None:
    """4.8 TFLOP for a guided generator step, and 2 % more, for attention's backward pass recomputes its table."""
    step = operations(sd15, "generator", "generator", "fake", "reference", "generator backward")
    assert step == pytest.approx(4.8, rel=0.03)
    assert operations(sd15, "generator", "reference") == pytest.approx(2 * operations(sd15, "generator", "fake"))


def test_the_frozen_decoder_saves_operations(sd15: Counted) -> None:
    """diffusers' decode takes 2.5 TFLOP, and its reward path 5.7 with ViT-H/14 both ways; ours enlarges for less."""
    recipe = KNOWN["sd15"].decoder
    assert recipe is not None
    eager, counting = on_meta(recipe), Operations()
    with GpuSemantics().active(), counting:
        eager.decode(torch.empty(1, 4, 64, 64, device="meta"))
    decode = counting.by_dtype[FLOAT32] / 1e12
    assert decode == pytest.approx(2.5, abs=0.05)
    tower = 2 * operations(sd15, "generator", "reward")
    assert 2 * decode + tower == pytest.approx(5.7, abs=0.1)
    ours = operations(sd15, "generator", "decoder", "reward", "reward and decoder backward")
    assert 2 * operations(sd15, "generator", "decoder") + tower == pytest.approx(ours, rel=0.02)
    assert ours < 0.9 * (2 * decode + tower)


def test_operations_know_their_dtype(sd15: Counted) -> None:
    phases = {(phase.update, phase.name): phase.operations for phase in sd15.phases}
    # The last layer: 2 * 64^2 * 9 * 320 * 4 operations of a sample.
    share = phases["generator", "fake"][FLOAT32] / phases["generator", "fake"][BFLOAT16]
    assert 1e-4 < share < 2e-4
    # Rewards compute in float32 unless they are told otherwise.
    assert phases["generator", "reward"][FLOAT32] > 0.99 * sum(phases["generator", "reward"].values())


@pytest.mark.slow
def test_operations_of_stable_diffusion_xl() -> None:
    counted = count(Setup(known("sdxl"), micro_batch=1, rewards=Towers(("hpsv2.1",))))
    step = operations(counted, "generator", "generator", "fake", "reference", "generator backward")
    assert step == pytest.approx(40.5, rel=0.03)


# Activations


def kept_on_meta(network: Any, autocast: bool = False) -> tuple[int, int]:
    """Bytes that a forward pass leaves alive, by the ledger and by the saved tensors."""
    ledger, semantics, saved = Ledger(), GpuSemantics(), {}
    own = {p.untyped_storage()._cdata for p in (*network.parameters(), *network.buffers())}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage
        return tensor

    x = torch.empty(2, *tiny.LATENT, device="meta")
    t = torch.zeros(2, dtype=torch.int64, device="meta")
    text = torch.empty(2, 8, tiny.TEXT_WIDTH, device="meta")
    inputs = {x.untyped_storage()._cdata, t.untyped_storage()._cdata, text.untyped_storage()._cdata}
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with semantics.active(), ledger, hooks, semantics.autocast(autocast):
        prediction = network(x, t, text, return_dict=False)[0]
    by_hooks = sum(storage.nbytes() for key, storage in saved.items() if key not in inputs)
    return ledger.alive.total() - prediction.nbytes, by_hooks


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_what_is_alive_is_what_autograd_saved(fused: bool, autocast: bool) -> None:
    network: Any = on_meta(tiny.unet)
    if fused:
        assert fuse(network)
    alive, saved = kept_on_meta(network, autocast)
    assert alive == pytest.approx(saved, rel=0.01)


def test_meta_keeps_what_the_cpu_keeps() -> None:
    from diffpp_fast.bench.memory import kept_bytes

    vae = tiny.vae()
    latents = torch.zeros(2, *tiny.LATENT)
    kept = kept_bytes(FrozenDecoder(vae), latents, vae)
    decoder, ledger = FrozenDecoder(on_meta(tiny.vae)), Ledger()
    x = torch.empty(latents.shape, device="meta", requires_grad=True)
    with GpuSemantics().active(), ledger:
        images = decoder(x)
    assert ledger.alive.total() - images.nbytes == pytest.approx(kept, rel=0.01)


def test_autocast_copies_trained_weights_once_for_the_graph() -> None:
    network: Any = on_meta(tiny.unet)
    matrices = sum(parameter.numel() for parameter in network.parameters() if parameter.dim() > 1)
    trained, _ = kept_on_meta(network, autocast=True)
    network.requires_grad_(False)
    ledger, semantics = Ledger(), GpuSemantics()
    x, t = torch.empty(2, *tiny.LATENT, device="meta"), torch.zeros(2, dtype=torch.int64, device="meta")
    with semantics.active(), ledger, semantics.autocast(True):
        network(x, t, torch.empty(2, 8, tiny.TEXT_WIDTH, device="meta"))
    assert ledger.alive.total() == 0
    assert trained > 2 * matrices


@pytest.mark.parametrize("method", ["sid", "sim", "diff_instruct_star"])
def test_methods_that_differentiate_networks_pay_for_two_backward_passes(small: Setup, method: str) -> None:
    """A backward pass by the inputs alone costs a forward pass, and what autograd keeps for it is alive meanwhile."""
    low = replace(small, precision="bfloat16", reference_dtype=None, decoder_dtype=None)
    plain, counted = (count(replace(low, method=name)) for name in ("dmd2", method))
    for network in ("reference", "fake"):
        once, back = operations(counted, "generator", network), operations(counted, "generator", f"{network} backward")
        assert once == operations(plain, "generator", network) and back == pytest.approx(once, rel=0.05)
    assert operations(counted, "fake", "fake backward") == operations(plain, "fake", "fake backward")
    peaks = [max(phase.peak for phase in each.phases if phase.update == "generator") for each in (plain, counted)]
    assert peaks[1] > 2 * peaks[0]
    checkpointed = count(replace(low, method=method, activation_checkpointing=True))
    recomputed = [phase for phase in checkpointed.phases if phase.name in ("reference backward", "fake backward")]
    assert len(recomputed) == 3
    for phase in recomputed:
        assert phase.operations[FLOAT32] < 0.02 * phase.operations[BFLOAT16]  # the last layer
    assert operations(checkpointed, "generator", "reference backward") > 1.5 * operations(
        checkpointed, "generator", "reference"
    )


def test_every_call_of_a_network_is_counted(small: Setup) -> None:
    calls = {name: count(replace(small, method=name, **options)) for name, options in CALLS.items()}
    once = operations(calls["dmd2"], "generator", "reference") / 2
    assert operations(calls["decoupled_dmd"], "generator", "reference") == pytest.approx(3 * once)
    assert replace(small, method="decoupled_dmd").reference_calls == 3 and small.reference_calls == 2
    for update in ("generator", "fake"):
        assert operations(calls["sid"], update, "fake") == pytest.approx(2 * operations(calls["dmd2"], update, "fake"))
    outside = calls["diff_instruct_star"]
    assert operations(outside, "generator", "reference backward") == pytest.approx(once, rel=0.05)


CALLS: dict[str, dict[str, Any]] = {
    "dmd2": {},
    "decoupled_dmd": {},
    "sid": {"fake_guided": True},
    "diff_instruct_star": {"guidance_outside": True},
}


def test_everything_is_freed_between_updates(small: Setup) -> None:
    count(small)  # the schedule makes its tables when it is first asked for them, and keeps them
    counted = count(small)
    first = next(phase for phase in counted.phases if phase.update == "generator")
    assert set(first.at_peak) == {"generator"}


def test_checkpointing_keeps_less_and_computes_more(small: Setup) -> None:
    plain, both = count(small), count(replace(small, activation_checkpointing=True, decoder_checkpoint=True))

    def decoder_kept(counted: Counted) -> int:
        phase = next(phase for phase in counted.phases if phase.name == "reward")
        return phase.at_peak["decoder"]

    def generator_kept(counted: Counted) -> int:
        phase = next(phase for phase in counted.phases if phase.name == "reference")
        return phase.at_peak["generator"]

    assert decoder_kept(both) < decoder_kept(plain) and generator_kept(both) < generator_kept(plain)
    for name in ("generator backward", "reward and decoder backward"):
        assert operations(both, "generator", name) > 1.2 * operations(plain, "generator", name)


# States


def test_the_plain_engine_holds_what_is_planned() -> None:
    rows = measure_states(torch.device("cpu"), small=True)
    assert {row.what for row in rows} == {"gradients", "weights", "optimizer", "EMA"}
    for row in rows:
        assert row.measured == row.planned > 0, row


def test_zero_holds_what_is_planned(tmp_path: Path) -> None:
    """DeepSpeed's stages 1, 2 and 3 on two processes; no tensor of the UNet has an odd size, so nothing is padded."""
    script = Path(__file__).parent / "planning_zero_worker.py"
    output, _ = processes.run([str(script)], size=2)
    found = json.loads(output.partition("SIZES ")[2].splitlines()[0])
    network = tiny.unet()
    size = Size(tuple(parameter.numel() for parameter in network.parameters()), 0)
    for stage, held in found.items():
        state = trained_state(size, Trained(zero=Zero(int(stage), overlap=False)), gpus=2, low=True)
        # Nothing is whole all the time there, and everything is small enough to be so here.
        persistent = 2 * sum(size.trained) if stage == "3" else 0
        planned = {
            "weights": state.weights - persistent,
            "master": state.master,
            "gradients": state.gradients,
            "optimizer": state.optimizer,
        }
        assert held == planned, f"stage {stage}"


def test_partitions_are_padded() -> None:
    zero = Trained(zero=Zero(2))
    assert trained_state(Size((7, 4), 0), zero, gpus=4, low=True).master == 4 * 4  # 11 to 16
    assert trained_state(Size((7, 4), 0), Trained(zero=Zero(3)), gpus=4, low=True).master == 4 * (2 + 1)


@pytest.mark.parametrize("name", ["AdamW8bit", "Lion8bit"])
def test_eight_bit_moments(name: str) -> None:
    optim = pytest.importorskip("bitsandbytes").optim
    weights = [torch.nn.Parameter(torch.zeros(count)) for count in (100, 5000, 4096)]
    optimizer = getattr(optim, name)(weights)
    tensors: dict[int, torch.Tensor] = {}
    for number, weight in enumerate(weights):
        optimizer.init_state(optimizer.param_groups[0], weight, 0, number)
        # Codebooks are common to all.
        tensors.update({t.data_ptr(): t for t in optimizer.state[weight].values() if isinstance(t, torch.Tensor)})
    held = sum(tensor.nbytes for tensor in tensors.values())
    assert optimizer_bytes(name.lower(), [100, 5000, 4096]) == held


def test_more_stages_hold_less() -> None:
    size = Size((200_000,) * 50, 0)
    states = [trained_state(size, Trained(ema=True, zero=Zero(stage)), gpus=8, low=True) for stage in range(4)]
    sums = [state.resident + state.gradients for state in states]
    assert sums == sorted(sums, reverse=True) and sums[3] < sums[0] / 6


def test_what_is_offloaded_is_on_the_host() -> None:
    size = Size((200_000,) * 50, 0)
    here = trained_state(size, Trained(ema=True, zero=Zero(3)), gpus=8, low=True)
    away = trained_state(size, Trained(ema=True, zero=Zero(3, "cpu", "cpu")), gpus=8, low=True)
    assert away.resident == 0
    assert away.host == here.resident + here.gradients
    assert frozen_state(1000, 2, "shard", 8).weights == frozen_state(1000, 2, "offload", 8).host == 250


# Plans


def test_the_peak_is_the_fullest_phase(small: Setup) -> None:
    plan = make_plan(small, H100)
    assert plan.total == max(alive for _, alive in plan.phases)
    assert plan.spare == 80 * 2**30 - plan.reserve - plan.total


def test_adapters_share_the_backbone(small: Setup) -> None:
    lora = Trained(lora=Lora(4))
    plan = make_plan(replace(small, generator=lora, fake=lora), H100)
    full = make_plan(small, H100)
    # The tiny generator's folder is another than the reference's; the fake's is the same.
    assert plan.memory["fake"]["weights"] == 4 * sum(plan.counted.sizes["fake"].trained)
    assert plan.memory["generator"]["weights"] > plan.memory["reference"]["weights"]
    assert plan.memory["generator"]["optimizer"] < full.memory["generator"]["optimizer"] / 4


def test_what_to_change_first_saves_what_it_says(small: Setup) -> None:
    from diffpp_fast.training.planning.advice import changes

    crowded = Gpu("small", make_plan(small, H100).total / 2**30, 1, 1, 1, 1, "none")
    plan = make_plan(small, crowded)
    assert plan.spare < 0
    found = changes(plan)
    assert {"training.micro_batch=2", "training.activation_checkpointing=true"} & {change.keys for change in found}
    assert [change.saves for change in found] == sorted((change.saves for change in found), reverse=True)
    for change in found:
        assert plan.total - make_plan(change.setup, crowded).total == change.saves > 0


def test_time_follows_operations_bytes_and_links(small: Setup) -> None:
    one = make_plan(small, H100)
    assert one.time.communication == 0
    assert make_plan(small, H100, efficiency=0.2).time.compute == pytest.approx(2 * one.time.compute)
    rounds = make_plan(replace(small, fake_rounds=5), H100)
    assert one.time.compute < rounds.time.compute < 5 * one.time.compute
    spread = {"gpus": 4, "global_batch": 4, "micro_batch": 1}
    stages = [
        make_plan(replace(small, **spread, generator=Trained(zero=Zero(s)), fake=Trained(zero=Zero(s))), H100)
        for s in (2, 3)
    ]
    elements = sum(sum(one.counted.sizes[role].trained) for role in ("generator", "fake"))
    # Float32 gradients are scattered, float32 weights gathered, by 3 of 4 processes.
    assert stages[0].time.sent == pytest.approx(0.75 * (4 + 4) * elements, abs=2)
    assert stages[1].time.sent > stages[0].time.sent


# From a configuration, and from the command line


def test_a_plan_reads_no_weights(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(project), "--dry-run", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    elements = parameters_of(tiny.unet())
    assert data["parameters"]["generator"] == {"trained": elements, "frozen": 0}
    assert data["memory"]["roles"]["generator"]["EMA"] == 4 * elements
    assert data["memory"]["total"] == sum(sum(kinds.values()) for kinds in data["memory"]["roles"].values())
    assert any("rewards.py:redness" in sentence for sentence in data["assumptions"])
    assert main(["plan", str(project), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == data
    assert not (project.parent / "run").exists()


def test_a_plan_is_read_by_people(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(project), "--gpu", "rtx4090"]) == 0
    said = capsys.readouterr().out
    for text in ("generator", "master weights", "an estimate", "fits in 24 GiB (RTX 4090): yes"):
        assert text in said
    assert "\x1b" not in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "CONFIG.yaml, or --model"),
        (["--model", "sd9"], "sd15, sdxl, pixart"),
        (["--model", "sd15", "--gpu", "tpu"], "a100-40"),
        (["CONFIG", "--batch", "4"], "--batch belongs to --model"),
        (["CONFIG", "--model", "sd15"], "either"),
    ],
)
def test_wrong_options_are_sentences(
    project: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(project) if word == "CONFIG" else word for word in arguments]
    assert main(["plan", *given]) == 2
    assert said in capsys.readouterr().err


def test_a_folder_without_configuration_is_named(project: Path) -> None:
    config = load_config(project, [f"models.reference.path={project.parent}/nowhere"])
    with pytest.raises(ConfigurationError, match=r"models\.reference"):
        setup_of(config)


def test_rewards_of_the_package_are_known(project: Path) -> None:
    overrides = [
        "rewards.optimised.factory=diffpp_fast.rewards:mixture",
        "rewards.optimised.arguments={rewards: {clip: {weight: 1}, mine: {weight: 1, reward: 'mine.py:score'}}}",
    ]
    towers = setup_of(load_config(project, overrides)).rewards
    assert towers == Towers(("clip",), unknown=("mine.py:score",))


def test_every_part_of_the_setup_comes_from_the_configuration(project: Path) -> None:
    overrides = ["training.global_batch=8", "training.micro_batch=2", "method.fake_rounds=3", "precision=bfloat16"]
    setup = setup_of(load_config(project, [*overrides, "models.decoder.checkpoint=true"]), gpus=2)
    assert (setup.rounds, setup.micro, setup.fake_rounds, setup.precision) == (2, 2, 3, "bfloat16")
    assert setup.decoder_checkpoint and setup.guided and setup.generator.ema and not setup.fake.ema
    assert isinstance(setup.models, Models) and setup.models.masked
    assert setup.method == "diff_instruct_pp" and not setup.fake_guided and not setup.guidance_outside
    sid = ["method.name=sid", "method.fake_guidance_scale=2", "rewards.optimised=null"]
    setup = setup_of(load_config(project, sid))
    assert (setup.method, setup.fake_guided, setup.fake_rounds) == ("sid", True, 1)
    star = setup_of(load_config(project, ["method.name=diff_instruct_star", "method.guidance=outside"]))
    assert star.method == "diff_instruct_star" and star.guidance_outside


@pytest.mark.slow
def test_the_example_of_the_docs_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    root = Path(__file__).parents[1]
    page = (root / "docs/planning.md").read_text()
    (found,) = re.findall(r"```bash\ndiffpp-fast (plan [^\n]*)\n```\n\n```text\n(.*?)\n```", page, flags=re.DOTALL)
    command, shown = found
    assert main(command.split()) == 0
    printed = [line.rstrip() for line in capsys.readouterr().out.strip().splitlines()]
    assert printed == (root / "benchmarks/results/plan-sd15-8x-a100-80.txt").read_text().splitlines()
    assert printed[: len(shown.splitlines())] == shown.splitlines()
