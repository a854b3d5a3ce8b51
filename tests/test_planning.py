"""The plan against what engines hold, what autograd keeps, and what is known of the true architectures."""

from __future__ import annotations

import gc
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import processes
import pytest
import tiny
import torch
from planning_check import measure_states

from diffpp_fast.cli.main import main
from diffpp_fast.errors import ConfigurationError
from diffpp_fast.methods import METHODS
from diffpp_fast.networks import FrozenDecoder, fuse
from diffpp_fast.training.config import Zero
from diffpp_fast.training.loading import load_config, with_keys
from diffpp_fast.training.planning import GPUS, KNOWN, PlannedRun, known_config, make_plan, run_of, savings
from diffpp_fast.training.planning.architectures import Scorer, Towers, on_meta, parameters_of, towers_of
from diffpp_fast.training.planning.counting import Counted, GpuKernels, Ledger, NetworkSize
from diffpp_fast.training.planning.plan import STEP, count_run
from diffpp_fast.training.planning.states import frozen_state, optimizer_bytes, trained_state
from diffpp_fast.training.planning.timing import Gpu, estimate

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
def small(project: Path) -> PlannedRun:
    return run_of(load_config(project, ["rewards.optimised.factory=diffpp_fast.rewards:mixture"]))


def changed(run: PlannedRun, gpus: int = 1, **keys: Any) -> PlannedRun:
    """Return the run with other values for keys, in whose names two underscores stand for a dot."""
    config = with_keys(run.config, {name.replace("__", "."): value for name, value in keys.items()})
    return replace(run, config=config, gpus=gpus)


def by(run: PlannedRun, method: str, **keys: Any) -> PlannedRun:
    """Return the run by another method, which is guided."""
    takes_reward = METHODS[method].takes_reward
    others = {} if takes_reward else {"rewards.optimised": None}
    return replace(
        run, config=with_keys(run.config, {"method": {"name": method, "guidance_scale": 2.0, **keys}, **others})
    )


def known(name: str, **keys: Any) -> PlannedRun:
    return changed(PlannedRun(known_config(name, {}), KNOWN[name]), **keys)


@pytest.fixture(scope="module")
def sd15() -> Counted:
    """One image of Stable Diffusion 1.5 through both updates."""
    reward = {"factory": "diffpp_fast.rewards:pickscore", "scale": 1.0}
    return count_run(known("sd15", training__micro_batch=1, rewards__optimised=reward))


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
        ("zimage", 6_154_908_736, [4_022_468_096]),
        ("sd35", 2_243_171_520, [123_650_304, 694_659_840, 4_762_310_656]),
        ("sana", 1_604_462_752, [2_614_341_888]),
        ("sd3", 2_028_328_000, [123_650_304, 694_659_840, 4_762_310_656]),
        ("sd35-large", 8_056_627_520, [123_650_304, 694_659_840, 4_762_310_656]),
        ("sana-600m", 591_747_872, [2_614_341_888]),
        ("flux", 11_901_408_320, [123_060_480, 4_762_310_656]),
        ("flux2-klein", 3_875_544_576, [4_022_468_096]),
        ("flux2-klein-9b", 9_078_581_248, [7_568_405_504]),
        ("flux2-dev", 32_223_281_152, [23_340_272_640]),
        ("qwen-image", 20_430_401_088, [7_747_169_280]),
    ],
)
def test_known_models_have_their_true_sizes(name: str, denoiser: int, text: list[int]) -> None:
    models = KNOWN[name]
    assert parameters_of(on_meta(models.reference)) == denoiser
    assert [parameters_of(on_meta(recipe)) for recipe, _ in models.text_encoders] == text
    assert models.decoder is not None
    decoders = {"sana": 312_250_275, "flux2": 84_046_115, "qwen": 126_892_531}
    decoders |= dict.fromkeys(("zimage", "sd3", "sd35", "flux"), 83_819_683)
    assert parameters_of(on_meta(models.decoder)) == decoders.get(name.partition("-")[0], 83_653_863)


def test_a_network_that_is_told_its_guidance_is_called_once() -> None:
    guided = {name: known_config(name, {}, side=8) for name in ("flux", "flux2-klein", "sana")}
    assert [config.method.guided for config in guided.values()] == [False, True, True]
    assert [config.models.latent_shape for config in guided.values()] == [(16, 8, 8), (128, 8, 8), (32, 8, 8)]


def test_rewards_have_their_true_sizes(sd15: Counted) -> None:
    # PickScore's CLIP without its one learnt scale, in float32.
    assert sd15.reward_bytes == 4 * (986_109_441 - 1)


def test_what_can_not_be_planned_is_refused(small: PlannedRun) -> None:
    with pytest.raises(ConfigurationError, match="sd15, sdxl, pixart"):
        known_config("sd21", {})
    with pytest.raises(ConfigurationError, match="multiple of 3"):
        replace(small, gpus=3)


# Operations


def test_operations_of_stable_diffusion(sd15: Counted) -> None:
    """4.8 TFLOP for a guided generator step, and 2 % more, for attention's backward pass recomputes its table."""
    step = operations(sd15, "generator", "generator", "fake", "reference", "generator backward")
    assert step == pytest.approx(4.8, rel=0.03)
    assert operations(sd15, "generator", "reference") == pytest.approx(2 * operations(sd15, "generator", "fake"))


def test_a_gradient_of_grouped_weights_costs_what_the_convolution_does() -> None:
    layer = torch.nn.Conv2d(8, 8, 3, padding=1, groups=8, device="meta")
    x = torch.empty(2, 8, 6, 6, device="meta", requires_grad=True)
    with Ledger() as forward:
        y = layer(x).sum()
    with Ledger() as backward:
        y.backward()
    assert sum(backward.operations.values()) == 2 * sum(forward.operations.values()) > 0


def test_the_frozen_decoder_saves_operations(sd15: Counted) -> None:
    """diffusers' decode takes 2.5 TFLOP, and its reward path 5.7 with ViT-H/14 both ways; ours enlarges for less."""
    recipe = KNOWN["sd15"].decoder
    assert recipe is not None
    eager, counting = on_meta(recipe), Ledger()
    with GpuKernels().active(), counting:
        eager.decode(torch.empty(1, 4, 64, 64, device="meta"))
    decode = counting.operations[FLOAT32] / 1e12
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
    counted = count_run(known("sdxl", training__micro_batch=1))
    step = operations(counted, "generator", "generator", "fake", "reference", "generator backward")
    assert step == pytest.approx(40.5, rel=0.03)


# Activations


def kept_on_meta(network: Any, autocast: bool = False) -> tuple[int, int]:
    """Bytes that a forward pass leaves alive, by the ledger and by the saved tensors."""
    ledger, gpu, saved = Ledger(), GpuKernels(), {}
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
    with gpu.active(), ledger, hooks, gpu.autocast(autocast):
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


def test_calls_that_are_known_are_made_again() -> None:
    """As new tensors of the right dtype, counted like the first ones; a number's type is part of the call."""
    counts, weight = torch.ones(4, dtype=torch.int64, device="meta"), torch.empty(4, 4, device="meta")
    with Ledger() as ledger:
        first, second = weight @ weight, weight @ weight
        assert ledger.alive.total() == 2 * weight.nbytes and ledger.operations == {FLOAT32: 2 * 2 * 4**3}
        assert [(counts * factor).dtype for factor in (2, 2.0, 2, 2.0)] == [torch.int64, FLOAT32] * 2
        for _ in range(2):
            assert first.add_(second) is first and first.t().untyped_storage()._cdata == first.untyped_storage()._cdata
            assert (weight.t() @ weight).stride() == (weight @ weight).stride() == (4, 1)
        del first, second
        assert ledger.alive.total() == 0


def test_meta_keeps_what_the_cpu_keeps() -> None:
    from benchmarks.memory import kept_bytes

    vae = tiny.vae()
    latents = torch.zeros(2, *tiny.LATENT)
    kept = kept_bytes(FrozenDecoder(vae), latents, vae)
    decoder, ledger = FrozenDecoder(on_meta(tiny.vae)), Ledger()
    x = torch.empty(latents.shape, device="meta", requires_grad=True)
    with GpuKernels().active(), ledger:
        images = decoder(x)
    assert ledger.alive.total() - images.nbytes == pytest.approx(kept, rel=0.01)


def test_autocast_copies_trained_weights_once_for_the_graph() -> None:
    network: Any = on_meta(tiny.unet)
    matrices = sum(parameter.numel() for parameter in network.parameters() if parameter.dim() > 1)
    trained, _ = kept_on_meta(network, autocast=True)
    network.requires_grad_(False)
    ledger, gpu = Ledger(), GpuKernels()
    x, t = torch.empty(2, *tiny.LATENT, device="meta"), torch.zeros(2, dtype=torch.int64, device="meta")
    with gpu.active(), ledger, gpu.autocast(True):
        network(x, t, torch.empty(2, 8, tiny.TEXT_WIDTH, device="meta"))
    assert ledger.alive.total() == 0
    assert trained > 2 * matrices


@pytest.mark.parametrize("method", ["sid", "sim", "diff_instruct_star"])
def test_methods_that_differentiate_networks_pay_for_two_backward_passes(small: PlannedRun, method: str) -> None:
    """A backward pass by the inputs alone costs a forward pass, and what autograd keeps for it is alive meanwhile."""
    low = changed(small, precision="bfloat16")
    plain, counted = (count_run(by(low, name)) for name in ("dmd2", method))
    for network in ("reference", "fake"):
        once, back = operations(counted, "generator", network), operations(counted, "generator", f"{network} backward")
        assert once == operations(plain, "generator", network) and back == pytest.approx(once, rel=0.05)
    assert operations(counted, "fake", "fake backward") == operations(plain, "fake", "fake backward")
    peaks = [max(phase.peak for phase in each.phases if phase.update == "generator") for each in (plain, counted)]
    assert peaks[1] > 2 * peaks[0]
    checkpointed = count_run(changed(by(low, method), training__activation_checkpointing=True))
    recomputed = [phase for phase in checkpointed.phases if phase.name in ("reference backward", "fake backward")]
    assert len(recomputed) == 3
    for phase in recomputed:
        assert phase.operations[FLOAT32] < 0.02 * phase.operations[BFLOAT16]  # the last layer
    assert operations(checkpointed, "generator", "reference backward") > 1.5 * operations(
        checkpointed, "generator", "reference"
    )


def test_shared_samples_save_one_call_of_the_generator(small: PlannedRun) -> None:
    for rounds in (1, 3):
        runs = [by(small, "dmd2", fake_rounds=rounds, share_samples=share) for share in (False, True)]
        counted = [count_run(run) for run in runs]
        fresh, shared = (
            sum(estimate(run, each, H100, 0.4, 50.0).operations.values()) / 1e12
            for run, each in zip(runs, counted, strict=True)
        )
        call = operations(counted[0], "fake", "generator")
        assert call > 0 and fresh - shared == pytest.approx(call * runs[0].rounds)


def test_every_call_of_a_network_is_counted(small: PlannedRun) -> None:
    calls = {name: count_run(by(small, name, **options)) for name, options in CALLS.items()}
    once = operations(calls["dmd2"], "generator", "reference") / 2
    assert operations(calls["decoupled_dmd"], "generator", "reference") == pytest.approx(3 * once)
    assert by(small, "decoupled_dmd").reference_calls == 3 and small.reference_calls == 2
    for update in ("generator", "fake"):
        assert operations(calls["sid"], update, "fake") == pytest.approx(2 * operations(calls["dmd2"], update, "fake"))
    outside = calls["diff_instruct_star"]
    assert operations(outside, "generator", "reference backward") == pytest.approx(once, rel=0.05)


CALLS: dict[str, dict[str, Any]] = {
    "dmd2": {},
    "decoupled_dmd": {},
    "sid": {"fake_guidance_scale": 2.0},
    "diff_instruct_star": {"guidance": "outside"},
}


def test_a_mean_over_the_update_asks_generator_and_reference_once_more(small: PlannedRun) -> None:
    """But not where one process computes the update in one piece."""
    run = by(small, "dmd2", normalizer="batch")
    parts = changed(run, training__micro_batch=2)
    assert not run.normalizes_apart and parts.normalizes_apart and changed(run, gpus=2).normalizes_apart
    assert parts.reference_calls == 4
    counted, whole = count_run(parts), count_run(run)
    for network in ("generator", "reference"):
        once = operations(counted, "generator", network)
        assert operations(counted, "generator", f"{network} for the normalizer") == once
        assert operations(whole, "generator", network) == pytest.approx(2 * once)
    assert not any("normalizer" in phase.name for phase in whole.phases)


def test_everything_is_freed_between_updates(small: PlannedRun) -> None:
    count_run(small)  # the schedule makes its tables when it is first asked for them, and keeps them
    counted = count_run(changed(small, seed=7))
    first = next(phase for phase in counted.phases if phase.update == "generator")
    assert set(first.at_peak) == {"generator"}


def test_checkpointing_keeps_less_and_computes_more(small: PlannedRun) -> None:
    keys = {"training__activation_checkpointing": True, "models__decoder__checkpoint": True}
    plain, both = count_run(small), count_run(changed(small, **keys))

    def decoder_kept(counted: Counted) -> int:
        phase = next(phase for phase in counted.phases if phase.name == "reward")
        return phase.at_peak["decoder"]

    def generator_kept(counted: Counted) -> int:
        phase = next(phase for phase in counted.phases if phase.name == "reference")
        return phase.at_peak["generator"]

    assert decoder_kept(both) < decoder_kept(plain) and generator_kept(both) < generator_kept(plain)
    for name in ("generator backward", "reward and decoder backward"):
        assert operations(both, "generator", name) > 1.2 * operations(plain, "generator", name)


def test_slices_of_rows_keep_less_and_compute_more(small: PlannedRun) -> None:
    def decoder(**keys: Any) -> tuple[int, int]:
        counted = count_run(changed(small, models__decoder__dtype="float32", **keys))
        phase = next(phase for phase in counted.phases if phase.name == "reward and decoder backward")
        return phase.at_peak["decoder"], sum(phase.operations.values())

    whole, sliced = decoder(), decoder(models__decoder__rows=2)
    least = decoder(models__decoder__rows=2, models__decoder__checkpoint=True)
    assert whole[0] > sliced[0] > least[0] and whole[1] < sliced[1] < least[1]


def test_rows_of_a_decoder_without_slices_are_refused(small: PlannedRun) -> None:
    from diffusers import AutoencoderTiny

    tiny_decoder = replace(small, architectures=replace(small.architectures, decoder=AutoencoderTiny))
    with pytest.raises(ConfigurationError, match=r"models\.decoder.*rows is for AutoencoderKL"):
        count_run(changed(tiny_decoder, models__decoder__rows=2))


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
    size = NetworkSize(tuple(parameter.numel() for parameter in network.parameters()), 0)
    for stage, held in found.items():
        state = trained_state(size, Zero(stage=int(stage), overlap=False), gpus=2, low=True)
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
    size = NetworkSize((7, 4), 0)
    assert trained_state(size, Zero(stage=2), gpus=4, low=True).master == 4 * 4  # 11 to 16
    assert trained_state(size, Zero(stage=3), gpus=4, low=True).master == 4 * (2 + 1)


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
    size = NetworkSize((200_000,) * 50, 0)
    states = [trained_state(size, Zero(stage=stage), gpus=8, low=True, ema=True) for stage in (0, 1, 2, 3)]
    sums = [state.resident + state.gradients for state in states]
    assert sums == sorted(sums, reverse=True) and sums[3] < sums[0] / 6


def test_what_is_offloaded_is_on_the_host() -> None:
    size = NetworkSize((200_000,) * 50, 0)
    here = trained_state(size, Zero(stage=3), gpus=8, low=True, ema=True)
    zero = Zero(stage=3, offload_optimizer="cpu", offload_parameters="cpu")
    away = trained_state(size, zero, gpus=8, low=True, ema=True)
    assert away.resident == 0
    assert away.host == here.resident + here.gradients
    assert frozen_state(1000, 2, "shard", 8).weights == frozen_state(1000, 2, "offload", 8).host == 250


# Plans


def test_the_peak_is_the_fullest_phase(small: PlannedRun) -> None:
    plan = make_plan(small, H100)
    assert plan.total == max(alive for _, alive in plan.phases)
    assert plan.spare == 80 * 2**30 - plan.reserve - plan.total


def test_captured_graphs_keep_gradients_and_their_memory(small: PlannedRun) -> None:
    plan, captured = make_plan(small, H100), make_plan(changed(small, training__capture=True), H100)
    gradients = {role: 4 * sum(plan.counted.sizes[role].trained) for role in ("generator", "fake")}
    fullest = max(sum(phase.at_peak.values()) for phase in plan.counted.phases)
    assert {role: captured.memory[role]["gradients"] for role in gradients} == gradients
    assert plan.total < captured.total <= plan.total + max(gradients.values())
    steps = {phase.update: alive for phase, alive in plan.phases if phase.name == STEP}
    for phase, alive in captured.phases:
        if phase.name == STEP:
            assert alive == steps[phase.update] + fullest + sum(gradients.values()) - gradients[phase.update]


def test_adapters_share_the_backbone(small: PlannedRun) -> None:
    plan = make_plan(changed(small, models__generator__lora={"rank": 4}, models__fake__lora={"rank": 4}), H100)
    full = make_plan(small, H100)
    # The tiny generator's folder is another than the reference's; the fake's is the same.
    assert plan.memory["fake"]["weights"] == 4 * sum(plan.counted.sizes["fake"].trained)
    assert plan.memory["generator"]["weights"] > plan.memory["reference"]["weights"]
    assert plan.memory["generator"]["optimizer"] < full.memory["generator"]["optimizer"] / 4


def test_what_to_change_first_saves_what_it_says(small: PlannedRun) -> None:
    crowded = Gpu("small", make_plan(small, H100).total / 2**30, 1, 1, 1, 1, "none")
    plan = make_plan(small, crowded)
    assert plan.spare < 0
    found = savings(plan)
    assert {"training.micro_batch=2", "training.activation_checkpointing=true"} & {change.keys for change in found}
    assert [change.saves for change in found] == sorted((change.saves for change in found), reverse=True)
    for change in found:
        assert plan.total - make_plan(change.run, crowded).total == change.saves > 0


def test_time_follows_operations_bytes_and_links(small: PlannedRun) -> None:
    one = make_plan(small, H100)
    assert one.time.communication == 0
    assert make_plan(small, H100, efficiency=0.2).time.compute == pytest.approx(2 * one.time.compute)
    rounds = make_plan(changed(small, method__fake_rounds=5), H100)
    assert one.time.compute < rounds.time.compute < 5 * one.time.compute
    elements = sum(sum(one.counted.sizes[role].trained) for role in ("generator", "fake"))

    def sent(stage: int, rounds: int) -> float:
        stages = {"generator": {"stage": stage}, "fake": {"stage": stage}}
        spread = {"training__global_batch": 4 * rounds, "training__micro_batch": 1}
        return make_plan(changed(small, gpus=4, **spread, distributed=stages), H100).time.sent / elements

    # 3 of 4 parts go to others: of float32 gradients, twice where they are all-reduced, and of float32 weights. As
    # counted on a link between two hosts, in tests/test_hosts.py.
    assert sent(1, rounds=1) == sent(1, rounds=2) == sent(2, rounds=1) == pytest.approx(0.75 * (2 * 4 + 4))
    assert sent(2, rounds=2) == pytest.approx(0.75 * (2 * 2 * 4 + 4))
    # Gathered by both roles' updates; the backward pass finds the weights of so small a network still there.
    assert sent(3, rounds=1) == pytest.approx(0.75 * (4 + 2 * 4))
    assert sent(3, rounds=2) == pytest.approx(2 * sent(3, rounds=1))


def test_links_between_machines_carry_a_ring_once(small: PlannedRun) -> None:
    """Whatever the number of GPUs of a machine: its adapters carry together what one GPU sends."""
    batch = {"training__global_batch": 16, "training__micro_batch": 1}
    inside, across = (changed(small, gpus=gpus, **batch) for gpus in (8, 16))
    plan = make_plan(across, H100, network=10.0)
    assert plan.time.communication == pytest.approx(plan.time.sent / (8 * 10e9 * 0.8))
    assert make_plan(across, H100, network=1000.0).time.communication == pytest.approx(plan.time.sent / (450e9 * 0.8))
    assert make_plan(inside, H100, network=10.0).time == make_plan(inside, H100).time


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


def test_a_plan_lets_the_collector_work_again() -> None:
    for before in (gc.disable, gc.enable):
        before()
        was = gc.isenabled()
        try:
            assert main(["plan", "--model", "sd9"]) == 2 and gc.isenabled() == was
        finally:
            gc.enable()


def test_a_plan_is_read_by_people(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(project), "--gpu", "rtx4090"]) == 0
    said = capsys.readouterr().out
    for text in ("generator", "master weights", "an estimate", "fits in 24 GiB (RTX 4090): yes"):
        assert text in said
    assert "\x1b" not in said


#: Of transformers whose blocks are alike: how many, their width, the weights of one in squares of it, and the tokens of
#: picture and prompt that meet them all.
BLOCKS = {
    "sd3": (24, 1536, 12, 4096 + 333),
    "sd35-large": (38, 2432, 12, 4096 + 333),
    "flux": (19 + 38, 3072, 12, 4096 + 512),
    "flux2-klein": (5 + 20, 3072, 13, 4096 + 512),
    "flux2-klein-9b": (8 + 24, 4096, 13, 4096 + 512),
    "flux2-dev": (8 + 48, 6144, 13, 4096 + 512),
    "qwen-image": (60, 3072, 12, 4096 + 1024),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*BLOCKS, "sd35", "sana", "sana-600m", "zimage"])
def test_every_family_is_planned(name: str) -> None:
    """Adapters on one network for all roles, blocks computed again: weights once, and a call's operations by hand."""
    adapters = {f"models__{role}__lora": {"rank": 1} for role in ROLES}
    keys = {"training__activation_checkpointing": True, "models__decoder__checkpoint": True}
    plan = make_plan(known(name, training__global_batch=1, **keys, **adapters), GPUS["h200"])
    assert plan.spare > 0 and plan.memory["reference"]["weights"] >= 2 * plan.counted.sizes["reference"].elements
    called = operations(plan.counted, "generator", "generator")
    if name in BLOCKS:
        blocks, width, squares, tokens = BLOCKS[name]
        by_hand = 2 * tokens * squares * width**2 + 4 * tokens**2 * width
        assert called == pytest.approx(blocks * by_hand / 1e12, rel=0.005)


@pytest.mark.slow
def test_a_decoder_that_knows_no_rows_is_advised_otherwise() -> None:
    crowded = Gpu("small", 4, 1, 1, 1, 1, "none")
    run = PlannedRun(known_config("sana-600m", {}, side=8), KNOWN["sana-600m"])
    found = savings(make_plan(run, crowded))
    assert found and not any("rows" in change.keys for change in found)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "CONFIG.yaml, or --model"),
        (["--model", "sd9"], "sd15, sdxl, pixart"),
        (["--model", "sd15", "--gpu", "tpu"], "a100-40"),
        (["--model", "flux", "--latent", "3"], "--model flux cuts latents into patches of 2: take a multiple, 2 or 4"),
        (["--model", "sd3", "--latent", "1000"], "at most 384"),
        (["--model", "sana", "--optimizer", "sgd"], "error: --model sana: optimizers.generator.name should be 'adamw'"),
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
        run_of(config)


def test_rewards_of_the_package_are_known(project: Path) -> None:
    overrides = [
        "rewards.optimised.factory=diffpp_fast.rewards:mixture",
        "rewards.optimised.arguments={rewards: {clip: {weight: 1}, mine: {weight: 1, reward: 'mine.py:score'}}}",
    ]
    reward = load_config(project, overrides).rewards.optimised
    assert reward is not None
    assert towers_of(reward) == Towers(("clip",), unknown=("mine.py:score",))


@pytest.mark.parametrize(
    "wrong",
    [
        ["rewards.optimised.factory=diffpp_fast.rewards:vqascor"],
        [
            "rewards.optimised.factory=diffpp_fast.rewards:mixture",
            "rewards.optimised.arguments={rewards: {vqascor: {weight: 1}}}",
        ],
        ["rewards.optimised.factory=diffpp_fast.rewards:load", "rewards.optimised.arguments={name: vqascor}"],
    ],
)
def test_a_misspelt_reward_is_refused_by_the_plan(wrong: list[str], project: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"there is no reward 'vqascor'; known: .*vqascore"):
        run_of(load_config(project, wrong))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "path", "parameters"),
    [
        ("hpsv3", "", 7_746_378_240),
        ("vqascore", "path: clip-flant5-xl, ", 3_146_963_968),
        ("vqascore", "", 11_447_223_296),
    ],
)
def test_large_rewards_count_in_their_own_precision_and_in_four_bits(
    name: str, path: str, parameters: int, project: Path
) -> None:
    """bfloat16 by default, whatever the others of a mixture are in."""
    sizes = {}
    for kind in ("null", "nf4"):
        large = f"{{weight: 1, arguments: {{{path}quantization: {kind}}}}}"
        overrides = [
            "rewards.optimised.factory=diffpp_fast.rewards:mixture",
            f"rewards.optimised.arguments={{rewards: {{mps: {{weight: 1}}, {name}: {large}}}}}",
        ]
        reward = load_config(project, overrides).rewards.optimised
        assert reward is not None
        towers = towers_of(reward)
        assert (towers.names, towers.dtype, towers.unknown) == (("mps", name), torch.float32, ())
        sizes[kind] = Scorer(towers).weight_bytes()
    mps = 4 * 1_104_606_720
    assert sizes["null"] == mps + 2 * parameters
    # Half a byte a weight and a scale per 64; embeddings, merger, norms and biases stay.
    assert 0.5 * parameters < sizes["nf4"] - mps < 0.7 * parameters


def test_a_plan_says_that_it_is_for_a_gpu(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(project), "device=cpu", "--gpu", "l40s"]) == 0
    assert "device is cpu, of which nothing is known here: this is the plan for a GPU, L40S." in capsys.readouterr().out


def test_every_part_of_the_run_comes_from_the_configuration(project: Path) -> None:
    overrides = ["training.global_batch=8", "training.micro_batch=2", "precision=bfloat16", "distributed.fake.stage=1"]
    run = run_of(load_config(project, overrides), gpus=2)
    assert (run.rounds, run.micro, run.dtype) == (2, 2, BFLOAT16)
    assert run.architectures.masked and run.averages("generator") and not run.averages("fake")
    assert (run.zero("generator").stage, run.zero("fake").stage) == (2, 1)
    assert {run_of(run.config.model_copy(update={"precision": "float32"})).zero(role).stage for role in ROLES} == {0}


ROLES = ("generator", "fake")


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


def test_passes_of_one_call_are_planned(small: PlannedRun) -> None:
    """The same operations in fewer calls, which hold more at a time."""
    for lora in (None, {"rank": 2}):
        counted = {}
        for batched in (True, False):
            run = changed(
                by(small, "dmd2"),
                training__batched_passes=batched,
                models__fake__lora=lora,
                models__generator__lora=lora,
            )
            counted[batched] = count_run(run)
        phases = {
            batched: {phase.name: phase for phase in found.phases if phase.update == "generator"}
            for batched, found in counted.items()
        }
        total = {key: sum(sum(phase.operations.values()) for phase in found.values()) for key, found in phases.items()}
        assert total[True] == total[False]
        assert ("fake" in phases[True]) == (lora is None) and "fake" in phases[False]
        assert phases[True]["reference"].peak > phases[False]["reference"].peak
        assert counted[True].sizes == counted[False].sizes


def test_a_spread_reference_is_gathered_once_for_both_passes(small: PlannedRun) -> None:
    run = changed(by(small, "dmd2"), distributed__reference="shard")
    assert run.reference_calls == 1
    assert changed(run, training__batched_passes=False).reference_calls == 2
    assert changed(by(small, "decoupled_dmd"), distributed__reference="shard").reference_calls == 2


def test_adapters_that_share_the_reference_are_counted_with_blocks_computed_again(tmp_path: Path) -> None:
    base = tiny.write_base(tmp_path, "stable_diffusion")
    lora = ["models.generator.lora.rank=2", "models.fake.lora.rank=2"]
    plans = [
        make_plan(run_of(load_config(base, [*lora, f"training.activation_checkpointing={again}"])), GPUS["h100"])
        for again in ("false", "true")
    ]
    assert plans[1].memory["fake"]["activations"] <= plans[0].memory["fake"]["activations"]
