"""The same prompts in every format."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

from diffpp_fast.training.config import Prompts
from diffpp_fast.training.prompts import PromptSource, open_prompts


def write_text(path: Path, prompts: Sequence[str]) -> None:
    path.write_text("".join(f"{prompt}\n" for prompt in prompts), encoding="utf-8")


def write_json_lines(path: Path, prompts: Sequence[str]) -> None:
    lines = [json.dumps({"id": number, "prompt": prompt}) for number, prompt in enumerate(prompts)]
    write_text(path, lines)


def write_csv(path: Path, prompts: Sequence[str]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writerow(["id", "prompt"])
        writer.writerows(enumerate(prompts))


def write_parquet(path: Path, prompts: Sequence[str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"id": range(len(prompts)), "prompt": list(prompts)})
    pq.write_table(table, path, row_group_size=3)


def write_dataset(path: Path, prompts: Sequence[str]) -> None:
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"id": list(range(len(prompts))), "prompt": list(prompts)}).save_to_disk(str(path))


def write_tar(path: Path, members: Sequence[tuple[str, bytes]], format: int = tarfile.PAX_FORMAT) -> None:
    with tarfile.open(path, "w", format=format) as archive:
        for name, content in members:
            facts = tarfile.TarInfo(name)
            facts.size = len(content)
            archive.addfile(facts, io.BytesIO(content))


def write_shard(path: Path, prompts: Sequence[str]) -> None:
    """Pictures and captions, as img2dataset writes them."""
    members = []
    for number, prompt in enumerate(prompts):
        facts = json.dumps({"caption": prompt, "width": 512})
        members += [(f"{number:05d}.jpg", b"\xff\xd8" * 400), (f"{number:05d}.json", facts.encode())]
        members += [(f"{number:05d}.txt", prompt.encode())]
    write_tar(path, members)


#: By file name. `auto` tells their formats apart.
WRITERS: dict[str, Callable[[Path, Sequence[str]], None]] = {
    "prompts.txt": write_text,
    "prompts.jsonl": write_json_lines,
    "prompts.csv": write_csv,
    "prompts.tsv": write_csv,
    "prompts.parquet": write_parquet,
    "dataset": write_dataset,
    "prompts.tar": write_shard,
}


def opened(path: Path | str, **settings: str) -> PromptSource:
    return open_prompts(Prompts.model_validate({"path": str(path), **settings}))
