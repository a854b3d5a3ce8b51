"""Millions of prompts: they are there in seconds, and never all in memory."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from prompt_files import opened, write_csv, write_json_lines, write_parquet, write_text

from diffpp_fast.training import ConfigurationError
from diffpp_fast.training.prompts import PromptOrder

PEAK = """
import sys
from prompt_files import opened

def own():
    # Without pages of mapped files, which are the kernel's to take back.
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))

opened(sys.argv[1])  # what is imported on the way
before, most = own(), 0
source = opened(sys.argv[2])
for start in range(0, len(source), 1 << 16):
    source[range(start, min(start + (1 << 16), len(source)))]
    most = max(most, own())
print(len(source), most - before)
"""


def caption(number: int) -> str:
    return f"a photograph of {number} red apples on a wooden table, soft light, {number % 97} degrees"


def test_a_million_lines_start_in_seconds(tmp_path: Path) -> None:
    count, path = 1_000_000, tmp_path / "prompts.txt"
    path.write_text("".join(f"{caption(number)}\n" for number in range(count)))
    for seconds in (5, 2):  # a second and a third of one, on a core of its own
        start = time.process_time()
        source = opened(path)
        assert time.process_time() - start < seconds
    assert len(source) == count
    indices = PromptOrder(0, count)(torch.arange(256)).tolist()
    assert source[indices] == [caption(index) for index in indices]


def test_a_bad_line_far_down_is_named(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    line = b"a photograph of an apple\n\n"
    path.write_bytes(line * 250_000 + b"a caf\xe9\n" + line)
    with pytest.raises(ConfigurationError, match=r"line 500001, column 6: not UTF-8"):
        opened(path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "seconds"), [("p.txt", 4.0), ("p.jsonl", 20.0), ("p.csv", 20.0), ("p.parquet", 6.0)]
)  # fmt: skip
def test_five_million_prompts_start_in_seconds_and_are_never_all_in_memory(
    tmp_path: Path, name: str, seconds: float
) -> None:
    """Times are those of a process that has a core to itself."""
    count, small = 5_000_000, tmp_path / f"small{name[1:]}"
    write = {"p.txt": write_text, "p.jsonl": write_json_lines, "p.csv": write_csv, "p.parquet": write_parquet}[name]
    write(small, [caption(number) for number in range(100)])
    if name == "p.parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pa.table({"prompt": [caption(number) for number in range(count)]})
        pq.write_table(table, tmp_path / name, row_group_size=4096)
    else:
        write(tmp_path / name, [caption(number) for number in range(count)])
    start = time.process_time()
    source = opened(tmp_path / name)
    assert time.process_time() - start < 4 * seconds
    indices = np.random.default_rng(0).integers(0, count, 64).tolist()
    assert source[indices] == [caption(index) for index in indices]
    script = [sys.executable, "-c", PEAK, str(small), str(tmp_path / name)]
    os.utime(tmp_path / name)  # so that it is read once more
    environment = os.environ | {"PYTHONPATH": f"{Path(__file__).parent}:{Path(__file__).parent.parent}"}
    found, peak = map(int, subprocess.run(script, check=True, capture_output=True, env=environment).stdout.split())
    # The text alone has 400 MB.
    assert found == count and peak < 160 * 2**20
