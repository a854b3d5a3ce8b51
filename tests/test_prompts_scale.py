"""Millions of prompts: they are there in seconds, and never all in memory."""

from __future__ import annotations

import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from prompt_files import opened, write_csv, write_json_lines, write_parquet, write_shard, write_text

from diffpp_fast.training import ConfigurationError
from diffpp_fast.training.prompts import PromptOrder, indexed

PEAK = """
import sys
from prompt_files import opened

def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

opened(sys.argv[1])  # what is imported on the way
before = peak()
source = opened(sys.argv[2])
for start in range(0, len(source), 1 << 17):
    source[range(start, min(start + (1 << 16), len(source)))]
print(len(source), peak() - before)
"""


def kept_by_prompts() -> int:
    """Bytes that are traced as allocated by the package's code of prompts, whatever else a process does meanwhile."""
    only = tracemalloc.Filter(True, "*/diffpp_fast/training/prompts/*")
    traced = tracemalloc.take_snapshot().filter_traces([only]).statistics("filename")
    return sum(entry.size for entry in traced)


def caption(number: int) -> str:
    return f"a photograph of {number} red apples on a wooden table, soft light, {number % 97} degrees"


def test_a_million_lines_start_in_seconds(tmp_path: Path) -> None:
    count, path = 1_000_000, tmp_path / "prompts.txt"
    path.write_text("".join(f"{caption(number)}\n" for number in range(count)))
    start = time.process_time()
    source = opened(path)
    assert time.process_time() - start < 5  # half a second on a core of its own
    assert len(source) == count
    indices = PromptOrder(0, count)(torch.arange(256)).tolist()
    assert source[indices] == [caption(index) for index in indices]


def test_a_text_file_costs_eight_bytes_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count, path = 200_000, tmp_path / "prompts.txt"
    path.write_text("".join(f"{caption(number)}\n" for number in range(count)))
    monkeypatch.setattr(indexed, "CHUNK", 1 << 16)
    tracemalloc.start()
    source = opened(path)
    kept, peak = kept_by_prompts(), tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # The text has 15 MB. While it is read, the index is there twice, and the lines of one chunk.
    assert len(source) == count and 8 * count <= kept < 8.1 * count and peak < 16 * count + 2**20


@pytest.mark.parametrize("name", ["p.jsonl", "p.csv", "p.tar"])
def test_other_formats_keep_an_index_alone(tmp_path: Path, name: str) -> None:
    write = {"p.jsonl": write_json_lines, "p.csv": write_csv, "p.tar": write_shard}[name]
    count, bytes_each = 20_000 if name != "p.tar" else 1_000, 16 if name == "p.tar" else 8
    write(tmp_path / name, [caption(number) for number in range(count)])
    tracemalloc.start()
    source = opened(tmp_path / name)
    kept = kept_by_prompts()
    tracemalloc.stop()
    # An array grows in steps of an eighth.
    assert len(source) == count and bytes_each * count <= kept < 1.2 * bytes_each * count + 20_000


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
    environment = {"PYTHONPATH": f"{Path(__file__).parent}:{Path(__file__).parent.parent}"}
    found, peak = map(int, subprocess.run(script, check=True, capture_output=True, env=environment).stdout.split())
    # The text alone has 400 MB; of Parquet up to 256 MiB stay decoded.
    assert found == count and peak < (480 if name == "p.parquet" else 160) * 2**20
