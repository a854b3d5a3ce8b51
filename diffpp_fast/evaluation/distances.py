"""Distances between the pictures of a model and those of a folder: FID and KID, as torchmetrics computes them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffpp_fast import install
from diffpp_fast.errors import ConfigurationError
from diffpp_fast.evaluation.inception import FEATURES, PREPROCESSING
from diffpp_fast.evaluation.pictures import read_picture

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
#: KID's subsets, of at most so many pictures each, drawn from this seed (arXiv 1801.01401 has 100 of 1000).
SUBSETS, SUBSET_SIZE, SUBSET_SEED = 100, 1000, 0
MEANINGS = {
    "fid": "Fréchet Inception distance (arXiv 1706.08500) to the reference pictures, on Inception's 2048 features; it "
    "is too high by an amount that grows as pictures get fewer, so compare only equal numbers",
    "kid": "kernel Inception distance (arXiv 1801.01401): the unbiased squared MMD with kernel (x.y / 2048 + 1)^3, "
    f"mean over {SUBSETS} subsets of at most {SUBSET_SIZE} pictures; std is the subsets', no confidence interval",
}


class Distances:
    """FID and KID of one model at a time to the same reference pictures.

    Features are computed once for both, in float32, and kept in float64: 16 KiB for a picture. torchmetrics makes
    distances of them, in float64.

    Args:
        names: "fid", "kid" or both.
        features: pictures uint8 [B, 3, H, W] -> [B, F], usually an `Inception`.
        reference: a folder with pictures, also in folders in it; their sizes may differ.
        batch: pictures whose features are computed at a time.
        device: where `features` computes.
        width: F.

    Raises ConfigurationError where torchmetrics is missing, or the folder has no pictures.
    """

    def __init__(
        self,
        names: Sequence[str],
        features: Callable[[Tensor], Tensor],
        reference: Path,
        *,
        batch: int,
        device: torch.device,
        width: int = FEATURES,
    ) -> None:
        self.names = tuple(names)
        self.features = features
        self.reference = reference
        self.device = device
        self.files = _find_pictures(reference)
        self._metrics = _metrics(self.names, width)
        self._counts = {"model": 0, "reference": 0}
        for pictures in _batches(self.files, batch):
            self._add(pictures, real=True)

    def add(self, pictures: Tensor) -> None:
        """Take in pictures of the model, uint8 [B, 3, H, W]."""
        self._add(pictures, real=False)

    def result(self) -> dict[str, dict[str, float]]:
        """Return the distances of the pictures since the last `forget_model`, by name: "value", and for KID "std".

        Raises ConfigurationError for a single picture, which has no spread.
        """
        counts = self._counts
        if min(counts.values()) < 2:
            raise ConfigurationError(
                f"fid and kid need 2 pictures at least on each side: there are {counts['model']} of the model and "
                f"{counts['reference']} in {self.reference}"
            )
        found: dict[str, dict[str, float]] = {}
        for name, metric in self._metrics.items():
            if name == "fid":
                found[name] = {"value": float(metric.compute())}
                continue
            metric.subset_size = min(SUBSET_SIZE, *counts.values())
            with torch.random.fork_rng(devices=[]):  # it draws its subsets from the global generator
                torch.default_generator.manual_seed(SUBSET_SEED)
                mean, std = metric.compute()
            found[name] = {"value": float(mean), "std": float(std), "subset_size": metric.subset_size}
        return {
            name: {**values, "pictures": counts["model"], "reference_pictures": counts["reference"]}
            for name, values in found.items()
        }

    def forget_model(self) -> None:
        """Make room for the next model; the reference stays."""
        self._counts["model"] = 0
        for metric in self._metrics.values():
            metric.reset()

    def facts(self) -> dict[str, dict[str, Any]]:
        """Return facts about each distance, for the record."""
        return {
            name: {
                "meaning": MEANINGS[name],
                "preprocessing": PREPROCESSING,
                "better": "lower",
                "reference": str(self.reference),
            }
            for name in self.names
        }

    @torch.no_grad()
    def _add(self, pictures: Tensor, *, real: bool) -> None:
        features = self.features(pictures.to(self.device)).double().cpu()
        self._counts["reference" if real else "model"] += len(features)
        for metric in self._metrics.values():
            metric.update(features, real=real)


def _metrics(names: Sequence[str], width: int) -> dict[str, Any]:
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
        from torchmetrics.image.kid import KernelInceptionDistance
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "torchmetrics":
            raise
        raise ConfigurationError(
            f"{' and '.join(names)}: torchmetrics is not installed: {install.extra('evaluate')}"
        ) from None

    class Passed(nn.Identity):
        """Takes features in place of pictures: they are computed already."""

        num_features = width

    metrics: dict[str, Any] = {}
    for name in names:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that KID keeps features, which is said above
            if name == "fid":
                metrics[name] = FrechetInceptionDistance(feature=Passed(), reset_real_features=False)
            else:
                metrics[name] = KernelInceptionDistance(feature=Passed(), subsets=SUBSETS, reset_real_features=False)
    return metrics


def _find_pictures(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ConfigurationError(f"--reference-images {folder}: no such folder")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not files:
        raise ConfigurationError(f"--reference-images {folder}: it holds no {', '.join(SUFFIXES)} file")
    return files


def _batches(files: Sequence[Path], batch: int) -> Iterator[Tensor]:
    """Yield pictures of one size that follow each other, at most `batch` at a time."""
    same: list[Tensor] = []
    for file in files:
        picture = read_picture(file)
        if same and (len(same) == batch or picture.shape != same[0].shape):
            yield torch.stack(same)
            same = []
        same.append(picture)
    yield torch.stack(same)
