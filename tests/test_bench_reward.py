"""`python -m benchmarks reward`: its gate, its phases, what it counts and what it writes."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import decoder, gpu_check, gpu_session, reward
from benchmarks.__main__ import main
from benchmarks.memory import kept_bytes
from benchmarks.reward import MODELS, PHASES, PROVIDERS, TOWERS, PathNetworks, RewardPath, run_phases

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def least(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks that take no time."""
    small = MODELS["small"]._replace(channels=(32, 32), layers=1, latent=8)
    monkeypatch.setitem(MODELS, "small", small)
    tower = TOWERS["cpu"]._replace(hidden=32, intermediate=64, layers=1, heads=2, patch=8, size=16)
    monkeypatch.setitem(TOWERS, "cpu", tower)


def plan(**changes: Any) -> reward.NetworkPlan:
    chosen: dict[str, Any] = {"batch": 2, "latent": None, "dtype": None, "names": None, "compile": False, "rounds": 2}
    return reward.plan(model="small", device=CPU, **chosen | changes)


def run(out: Path, *arguments: str) -> int:
    return main(["reward", "--model", "small", "--no-compile", "--rounds", "2", "--out", str(out), *arguments])


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_phases_give_the_gradient_of_the_whole() -> None:
    networks = PathNetworks(plan(dtype=torch.float64))
    for name in ("eager", "eager-checkpoint", "fused", "fused-checkpoint"):
        path = PROVIDERS[name](networks)
        latents = networks.latents.clone().requires_grad_()
        (expected,) = torch.autograd.grad(path.reward(path.pixels(path.decode(latents))).sum(), latents)
        seconds, gradient = run_phases(path, networks.latents)
        torch.testing.assert_close(gradient, expected)
        assert tuple(seconds) == PHASES and min(seconds.values()) > 0.0


def test_a_run_writes_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    marks = [f"<!-- python -m benchmarks reward, cpu-small: {edge} -->" for edge in ("begin", "end")]
    page.write_text(f"Before.\n{marks[0]}\nold\n{marks[1]}\nAfter.\n")
    assert run(tmp_path / "out", "--device", "cpu", "--docs", str(page)) == 0
    rows = rows_of(tmp_path / "out" / "reward-path-cpu-small.csv")
    names = [name for name in PROVIDERS if "compile" not in name]
    assert [(row["provider"], row["phase"]) for row in rows] == [
        (name, phase) for name in names for phase in (*PHASES, "whole")
    ]
    decode = {row["provider"]: row for row in rows if row["phase"] == "decode"}
    whole = {row["provider"]: row for row in rows if row["phase"] == "whole"}
    assert int(decode["fused"]["kept_bytes"]) < 0.36 * int(decode["eager"]["kept_bytes"])
    # Full size is that of the run here, for one image.
    for row in decode.values():
        assert int(row["kept_bytes"]) == pytest.approx(int(row["kept_bytes_full_size"]), rel=0.01)
    assert float(whole["eager"]["x_eager"]) == 1.0 and int(whole["fused"]["peak_bytes"]) > 0
    assert whole["fused"]["torch"] == torch.__version__ and whole["fused"]["tower"] == TOWERS["cpu"].name
    text = page.read_text()
    assert text.startswith("Before.") and text.endswith("After.\n") and "| fused-checkpoint |" in text
    assert "fused-checkpoint" in capsys.readouterr().out


def test_a_wrong_provider_is_reported_and_not_timed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoilt(decode: Callable[[Tensor], Tensor]) -> Callable[[PathNetworks], RewardPath]:
        return lambda networks: PROVIDERS["eager"](networks)._replace(decode=decode)

    right = PROVIDERS["fused"]
    # The image is right, its gradient is not.
    monkeypatch.setitem(PROVIDERS, "fused", lambda networks: spoilt(_Halved(right(networks).decode))(networks))
    monkeypatch.setitem(PROVIDERS, "fused-nchw", spoilt(lambda latents: 1 / 0))  # type: ignore[arg-type,return-value]
    assert run(tmp_path) == 1
    printed = capsys.readouterr().out
    assert "fused is wrong: the gradient has a relative error of 5.0e-01" in printed
    assert "fused-nchw is wrong: ZeroDivisionError" in printed
    rows = {row["provider"]: row for row in rows_of(tmp_path / "reward-path-cpu-small.csv") if row["phase"] == "whole"}
    assert rows["fused"]["median_ms"] == "" and rows["fused"]["status"].startswith("wrong: ")
    assert float(rows["eager"]["median_ms"]) > 0.0


def test_the_decoders_options_are_counted_as_they_are_measured() -> None:
    measured = decoder.measured("small", 512, torch.float32, rows=8, rounds=1)
    with torch.device("meta"):
        vae, latents = reward._autoencoder(MODELS["small"]), torch.empty(1, 4, 64, 64)
    counts = {name: decoder.count(make(vae), latents) for name, make in decoder.options(8).items()}
    for row, own in zip(measured, counts.values(), strict=True):
        assert max(row["image_error"], row["gradient_error"]) <= 1e-5
        # What convolutions take for themselves does not grow with the image, and is not counted.
        assert 0.85 < own.peak / row["measured_peak_bytes"] < 1.05
    assert counts["rows=8"].kept < counts["whole"].kept < counts["eager"].kept
    assert counts["rows=8"].operations > counts["whole"].operations


class _Halved(nn.Module):
    def __init__(self, decode: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.decode = decode

    def forward(self, latents: Tensor) -> Tensor:
        return self.decode(0.5 * latents + 0.5 * latents.detach())


def test_kept_bytes_count_storages_once_and_leave_networks_out() -> None:
    layer = nn.Linear(8, 8, bias=False)
    x = torch.randn(4, 8)
    # exp keeps its result, the product both factors, and one of them is that result; the linear map the weight alone.
    layer.weight.requires_grad_(False)

    def forward(x: Tensor) -> Tensor:
        y = layer(x).exp()
        return y * y[:, :4].repeat(1, 2)

    assert kept_bytes(forward, x, layer) == 2 * 4 * 8 * 4
    assert kept_bytes(forward, x) == 2 * 4 * 8 * 4 + 8 * 8 * 4
    assert kept_bytes(lambda x: x * x, x) == 0


@pytest.mark.parametrize("subject", ["reward", "step"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "sd3"], "--model: unknown 'sd3'; known: tiny, small, emoji, sd15, sdxl"),
        (["--providers", "eager,nothing"], "--providers: unknown 'nothing'"),
        (["--providers", "fused"], "eager is what the others are measured against"),
        (["--docs", "missing.md"], "--docs missing.md"),
    ],
)
def test_what_the_user_can_mend_is_said(
    subject: str, arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([subject, "--device", "cpu", "--no-compile", "--out", str(tmp_path / "out"), *arguments]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_gpu_check_leaves_the_reward_path_out_without_its_packages(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "_missing", lambda *packages: [name for name in packages if name == "diffusers"])
    session = gpu_session.Session(rehearse=True, ops=["add_noise"], out=tmp_path)
    gpu_check._measure_reward_path(session, "eager and fused")
    assert "reward path, eager and fused: left out, for diffusers is not installed" in capsys.readouterr().out
