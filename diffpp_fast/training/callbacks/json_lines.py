"""metrics.jsonl: everything that a run says in numbers, one JSON object per line."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffpp_fast.training.callbacks.base import Callback
from diffpp_fast.training.durable import write_whole


class JsonLines(Callback):
    """One line per log and per warning in a file; lines from beyond the step where a run resumes are dropped."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_start(self, step: int, steps: int) -> None:
        kept = [json.dumps(record) + "\n" for record in read_records(self.path) if record["step"] <= step]
        write_whole(self.path, "".join(kept))

    def on_log(self, step: int, scalars: Mapping[str, float]) -> None:
        # JSON has no NaN.
        self._write(step, {name: value if math.isfinite(value) else None for name, value in scalars.items()})

    def on_warning(self, step: int, name: str, message: str) -> None:
        self._write(step, {"warning": name, "message": message})

    def _write(self, step: int, values: Mapping[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")


def read_records(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl as far as they are whole: a kill leaves an unfinished one; no file, no lines."""
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if line.endswith("\n") and isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records
