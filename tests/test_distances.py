"""FID and KID: the Inception network that they look through, and their formulas in float64."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from diffpp_fast.cli.main import main
from diffpp_fast.errors import ConfigurationError
from diffpp_fast.evaluation.distances import Distances
from diffpp_fast.evaluation.inception import Inception, load_inception, resize
from diffpp_fast.evaluation.pictures import read_picture

pytest.importorskip("torchmetrics")

CPU = torch.device("cpu")
WIDTH = 7


def frechet(a: Tensor, b: Tensor) -> float:
    """FID of features [N, F] and [M, F] in float64, by the symmetric root: tr (A B)^1/2 = tr (A^1/2 B A^1/2)^1/2."""
    a, b = a.double(), b.double()
    values, vectors = torch.linalg.eigh(torch.cov(a.T))
    root = vectors @ torch.diag(values.clamp_min(0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ torch.cov(b.T) @ root).clamp_min(0).sqrt().sum()
    gap = (a.mean(0) - b.mean(0)).square().sum()
    return float(gap + torch.cov(a.T).trace() + torch.cov(b.T).trace() - 2 * cross)


def kernel(a: Tensor, b: Tensor) -> float:
    """The unbiased squared MMD of features [N, F], by sums over pairs."""
    a, b = a.double(), b.double()

    def mean(x: Tensor, y: Tensor, same: bool) -> float:
        k = (x @ y.T / x.shape[1] + 1) ** 3
        return float((k.sum() - k.diagonal().sum()) / (len(x) * (len(x) - 1)) if same else k.mean())

    return mean(a, a, True) + mean(b, b, True) - 2 * mean(a, b, False)


def features(pictures: Tensor) -> Tensor:
    """A fixed projection of pixels to 7 numbers, the same for every size."""
    projection = torch.randn(12, WIDTH, generator=torch.Generator().manual_seed(3))
    quarters = torch.nn.functional.adaptive_avg_pool2d(pictures.float() / 255, 2)
    return quarters.flatten(1) @ projection


def pictures(count: int, seed: int, size: tuple[int, int] = (12, 10)) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    bright = torch.rand(count, 3, 1, 1, generator=generator)
    return (255 * bright * torch.rand(count, 3, *size, generator=generator)).to(torch.uint8)


def write(folder: Path, images: Tensor) -> Path:
    folder.mkdir(parents=True)
    for number, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{number:04d}.png")
    return folder


def distances(reference: Path, *, batch: int = 5, names: tuple[str, ...] = ("fid", "kid")) -> Distances:
    return Distances(names, features, reference, batch=batch, device=CPU, width=WIDTH)


def test_both_are_those_of_the_formulas_in_float64(tmp_path: Path) -> None:
    real, drawn = pictures(24, 0), pictures(24, 1) // 2
    found = distances(write(tmp_path / "real", real))
    for part in drawn.split(7):
        found.add(part)
    result = found.result()
    # Every subset is the whole set, so that the mean over subsets is the distance itself.
    assert result["kid"]["value"] == pytest.approx(kernel(features(drawn), features(real)), rel=1e-6)
    assert result["kid"]["std"] < 1e-12 and result["kid"]["subset_size"] == 24
    assert result["fid"]["value"] == pytest.approx(frechet(features(drawn), features(real)), rel=1e-6)
    assert result["fid"]["pictures"] == result["fid"]["reference_pictures"] == 24


def test_a_model_does_not_remember_the_one_before_it_and_batches_do_not_matter(tmp_path: Path) -> None:
    folder = write(tmp_path / "real", pictures(20, 0))
    first, second = pictures(20, 1), pictures(20, 2) // 3
    found = distances(folder)
    found.add(first)
    before = found.result()
    found.forget_model()
    found.add(second)
    after = found.result()
    alone = distances(folder, batch=1)
    alone.add(second)
    assert after["fid"]["value"] == pytest.approx(alone.result()["fid"]["value"], rel=1e-6)
    assert after["kid"]["value"] == pytest.approx(alone.result()["kid"]["value"], rel=1e-6)
    assert after["fid"]["value"] > 2 * before["fid"]["value"]


def test_subsets_leave_the_global_generator_alone_and_are_always_the_same(tmp_path: Path) -> None:
    found = distances(write(tmp_path / "real", pictures(30, 0)), names=("kid",))
    found.add(pictures(12, 1))
    state = torch.get_rng_state()
    first = found.result()["kid"]
    assert torch.equal(torch.get_rng_state(), state)
    assert found.result()["kid"] == first and first["subset_size"] == 12 and first["std"] > 0


def test_a_picture_is_at_no_distance_from_itself(tmp_path: Path) -> None:
    same = pictures(16, 0)
    found = distances(write(tmp_path / "real", same))
    found.add(same)
    assert abs(found.result()["fid"]["value"]) < 1e-6


def test_reference_pictures_may_have_different_sizes_and_lie_in_folders(tmp_path: Path) -> None:
    small, large = pictures(3, 0), pictures(3, 1, (20, 30))
    write(tmp_path / "real" / "a", small)
    write(tmp_path / "real" / "b", large)
    (tmp_path / "real" / "notes.txt").write_text("no picture")
    found = distances(tmp_path / "real")
    found.add(pictures(6, 2))
    expected = frechet(features(pictures(6, 2)), torch.cat([features(small), features(large)]))
    assert found.result()["fid"]["value"] == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_what_has_no_distance_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no such folder"):
        distances(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigurationError, match=r"it holds no \.png"):
        distances(tmp_path / "empty")
    found = distances(write(tmp_path / "real", pictures(4, 0)))
    found.add(pictures(1, 1))
    with pytest.raises(
        ConfigurationError, match="need 2 pictures at least on each side: there are 1 of the model and 4"
    ):
        found.result()


# -- Inception ---------------------------------------------------------------------------------------------------------


def random_inception(seed: int = 0) -> Inception:
    """Weights with which no activation dies or grows through the layers."""
    generator = torch.Generator().manual_seed(seed)
    network = Inception().requires_grad_(False).eval()
    for name, tensor in network.state_dict().items():
        if name.endswith("conv.weight"):
            tensor.normal_(0.0, (2 / tensor[0].numel()) ** 0.5, generator=generator)
        elif name.endswith(("running_mean", "bias")):
            tensor.normal_(0.0, 0.1, generator=generator)
        else:
            tensor.uniform_(0.7, 1.3, generator=generator)
    return network


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file like the published one, with the classifier that features have no use for."""
    state = random_inception().state_dict()
    state["fc.weight"], state["fc.bias"] = torch.zeros(1008, 2048), torch.zeros(1008)
    state["Mixed_5b.branch1x1.bn.num_batches_tracked"] = torch.tensor(0)
    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    torch.save(state, path)
    return path


def test_inception_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        network = Inception()
    channels = sum(len(tensor) for name, tensor in network.state_dict().items() if name.endswith("running_var"))
    # Keras counts 21,802,784 without the classifier: convolutions, shifts, means and variances, but no scales.
    assert sum(weight.numel() for weight in network.parameters()) - 2 * channels == 21_802_784 - 3 * channels


def test_resize_is_tensorflow_1s() -> None:
    x = torch.rand(2, 3, 5, 8, generator=torch.Generator().manual_seed(0)).double()
    expected = torch.empty(2, 3, 7, 7, dtype=torch.float64)
    for row in range(7):
        for column in range(7):
            y, z = row * 5 / 7, column * 8 / 7
            top, left = int(y), int(z)
            bottom, right = min(top + 1, 4), min(left + 1, 7)
            upper = x[:, :, top, left] * (1 - (z - left)) + x[:, :, top, right] * (z - left)
            lower = x[:, :, bottom, left] * (1 - (z - left)) + x[:, :, bottom, right] * (z - left)
            expected[:, :, row, column] = upper * (1 - (y - top)) + lower * (y - top)
    torch.testing.assert_close(resize(x, 7), expected, rtol=0, atol=1e-6)
    picture = torch.rand(1, 3, 299, 299)
    assert torch.equal(resize(picture, 299), picture)


def test_weights_are_read_from_both_formats_and_other_files_are_named(weights: Path, tmp_path: Path) -> None:
    network = load_inception(weights, CPU)
    with torch.no_grad():
        found = network(pictures(1, 0, (20, 31)))
        assert found.shape == (1, 2048) and found.isfinite().all() and found.std() > 0.01
    save_file(network.state_dict(), tmp_path / "inception.safetensors")
    again = load_inception(tmp_path / "inception.safetensors", CPU).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in network.state_dict().items())
    torch.save({"down_blocks.0.weight": torch.zeros(1)}, tmp_path / "unet.pth")
    with pytest.raises(ConfigurationError, match=r"does not fit\. It looks like a diffusers UNet"):
        load_inception(tmp_path / "unet.pth", CPU)


# The eigenvalues of FID's 2048 x 2048 matrix take most of a minute on a processor.
@pytest.mark.parametrize("metric", ["kid", pytest.param("fid", marks=pytest.mark.slow)])
def test_the_command_compares_with_a_folder(
    metric: str, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.write_base(tmp_path, "stable_diffusion")
    write(tmp_path / "real", pictures(2, 0, (16, 16)))
    arguments = ["--prompts", "prompts.txt", "--limit", "2", "--reference-images", "real", "--inception", str(weights)]
    assert main(["evaluate", "align.yaml", "--metrics", metric, *arguments, "--output", "out"]) == 0
    (model,) = json.loads((tmp_path / "out" / "summary.json").read_text())["models"]
    network = load_inception(weights, CPU)
    with torch.no_grad():
        drawn, real = (
            network(torch.stack([read_picture(file) for file in sorted(folder.iterdir())])).double()
            for folder in (tmp_path / "out" / "images" / "align", tmp_path / "real")
        )
    expected = kernel(drawn, real) if metric == "kid" else frechet(drawn, real)
    assert model["scores"] == {}
    assert model["distances"][metric]["value"] == pytest.approx(expected, rel=1e-4)
