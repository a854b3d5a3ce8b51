"""A whole pipeline whose generator makes four calls: trained and resumed, drawn, scored, exported, run by diffusers."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from typing import Any

import family_runs
import pytest
import tiny
import tiny_flux
import torch

from diffpp_fast import Noise
from diffpp_fast.cli.main import main
from diffpp_fast.evaluation.models import find_source
from diffpp_fast.evaluation.pictures import draw
from diffpp_fast.networks.few_step import RENOISE
from diffpp_fast.tensor_files import read_tensors
from diffpp_fast.training import Trainer
from diffpp_fast.training.schedulers import pipeline_call

PROMPT, SEED, SAMPLE = "a red apple", 5, 4
#: What is tried besides, by family, renoise and gradient_step.
CASES: dict[tuple[str, str, str], tuple[str, ...]] = {
    ("z_image", "fresh", "random"): ("training.activation_checkpointing=true", "training.batched_passes=true"),
    ("flux", "ddim", "last"): ("models.generator.lora={rank: 2}", "models.fake.lora={rank: 2}"),
    ("flux", "fresh", "random"): ("training.compile=regional", "method.share_samples=true"),
    ("stable_diffusion", "ddim", "random"): ("training.compile=whole", "training.fake_warmup=1"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_four_calls_from_training_to_a_pipeline(
    case: tuple[str, str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import DiffusionPipeline
    from diffusers.schedulers import scheduling_flow_match_euler_discrete as flow

    family, renoise, gradient_step = case
    file = family_runs.write_base(tmp_path, family)
    call = f"{{timestep: null, timesteps: [999, 749, 499, 249], renoise: {renoise}, gradient_step: {gradient_step}}}"
    config = family_runs.load(file, family, f"output={tmp_path / 'run'}", f"models.generator={call}", *CASES[case])
    assert Trainer(config).run().step == 2
    last = tmp_path / "run" / "checkpoints" / "step_000002"
    shutil.move(last, tmp_path / "whole")
    assert Trainer(config, resume="latest").run().step == 2
    for stored in (tmp_path / "whole").glob("*.safetensors"):
        ours, theirs = read_tensors(last / stored.name), read_tensors(stored)
        assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items()), stored.name

    model = find_source(tmp_path / "run").load(torch.device("cpu"))
    expected = draw(model, [PROMPT], [SAMPLE], seed=SEED)
    output = tmp_path / "scores"
    arguments = ["--prompts", str(file.parent / "prompts.txt"), "--metrics", f"{file.parent / 'rewards.py'}:redness"]
    assert main(["evaluate", str(tmp_path / "run"), *arguments, "--output", str(output), "--device", "cpu"]) == 0
    with next(output.glob("*.csv")).open() as table:
        assert list(csv.DictReader(table))

    assert main(["export", str(tmp_path / "run"), "--pipeline", "--out", str(tmp_path / "pipeline")]) == 0
    shape = tuple(tiny_flux.LATENTS.get(family, tiny.LATENT))
    samples, streams = torch.tensor([SAMPLE]), iter(range(RENOISE, 2**32))

    def packed(latents: torch.Tensor) -> torch.Tensor:
        from diffusers import FluxPipeline

        return FluxPipeline._pack_latents(latents, *latents.shape) if family == "flux" else latents

    monkeypatch.setattr(
        flow, "randn_tensor", lambda *_, **__: packed(Noise(SEED, samples, next(streams)).normal(shape))
    )
    z = Noise(SEED, samples, stream=0).normal(shape)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    given: dict[str, Any] = {"latents": packed(z), **eval(f"dict({pipeline_call(config)})", {"z": packed(z)})}
    given |= {} if family != "flux" else {"max_sequence_length": 24}
    size = {"height": 16, "width": 16, "output_type": "pt"}
    drawn = pipeline(PROMPT, **given, **size).images
    torch.testing.assert_close(drawn, expected / 255, rtol=0.0, atol=1.5 / 255)
