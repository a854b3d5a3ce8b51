"""The rehearsal at true size, on networks of the same classes that are narrow."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

import benchmarks.full_size as full_size
from diffpp_fast.networks.loading import build_network
from diffpp_fast.training.planning.architectures import KNOWN

NARROW = {
    "_class_name": "UNet2DConditionModel",
    "cross_attention_dim": 768,
    "sample_size": 64,
    "block_out_channels": [32, 32],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
}


@pytest.mark.slow
def test_the_whole_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = replace(KNOWN["sd15"], reference=partial(build_network, NARROW, "narrow"))
    monkeypatch.setattr(full_size, "KNOWN", {**KNOWN, "sd15": narrow})
    (tmp_path / "made").mkdir()
    row = full_size.measure(tmp_path / "made", "sd15", 4)
    assert (row["first_step"], row["second_step"]) == (1, 2) and row["picture"]
    assert abs(row["difference"]) < full_size.ALLOWED
    assert row["second_seconds"] > 0


def test_a_model_that_is_measured_again_replaces_its_row_alone(tmp_path: Path) -> None:
    numbers = {"planned": 2.0**31, "measured": 2.0**31, "difference": 0.0}
    numbers |= {f"{name}_{key}": 1.0 for name in ("first", "second") for key in ("loading", "seconds")}
    for model, difference in (("sdxl", 0.1), ("sd15", -0.05), ("sdxl", 0.2)):
        full_size.report([{"model": model, "side": 256, **numbers, "difference": difference}], tmp_path / "table")
    lines = (tmp_path / "table.md").read_text().splitlines()[-2:]
    assert [line.split(" | ")[0] for line in lines] == ["| sd15", "| sdxl"]
    assert "| -5% |" in lines[0] and "| +20% |" in lines[1]
