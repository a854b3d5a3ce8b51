"""Hugging Face datasets on disk: the prompt in one of the columns."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffpp_fast.errors import ConfigurationError
from diffpp_fast.training.prompts.arrow import ROWS, check_column, check_rows, need, prompts_of
from diffpp_fast.training.prompts.source import Digest, PromptFile

#: Files in a folder that `save_to_disk` has written: of one split, and of several.
DATASET, SPLITS = "state.json", "dataset_dict.json"


class DiskDataset(PromptFile):
    """A folder that `datasets.Dataset.save_to_disk` has written, or an `.arrow` file. Both are mapped, not loaded.

    Every row of the column is checked when it is opened.
    """

    def __init__(self, path: Path, column: str, digest: Digest) -> None:
        self.name = str(path)
        self.column = column
        dataset = self._load(path).with_format("arrow")
        check_column(dataset.data.schema, column, self.name)
        self._dataset = dataset.select_columns([column])
        if not len(self):
            raise ConfigurationError(f"prompts: {path} holds no prompt")
        first = 1
        for rows in self._dataset.iter(ROWS):
            digest.add(check_rows(rows.column(0), self.name, column, first))
            first += rows.num_rows

    def _load(self, path: Path) -> Any:
        datasets = need("datasets", self.name)
        import pyarrow as pa

        if (path / SPLITS).is_file():
            splits = sorted(part.name for part in path.iterdir() if (part / DATASET).is_file())
            raise ConfigurationError(f"prompts: {path} holds the splits {', '.join(splits)}: name one, {path}/SPLIT")
        try:
            return datasets.load_from_disk(str(path)) if path.is_dir() else datasets.Dataset.from_file(str(path))
        except (pa.ArrowException, OSError, ValueError, KeyError) as error:
            raise ConfigurationError(f"prompts: can't read the dataset {path}: {error}") from None

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, indices: Sequence[int]) -> list[str]:
        return prompts_of(self._dataset[indices if isinstance(indices, range) else list(indices)].column(0))
