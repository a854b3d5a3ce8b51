"""The Inception network of FID and KID: the 2015 TensorFlow graph's features, from its converted weights.

Written from torch-fidelity's feature_extractor_inceptionv3.py and interpolate_compat_tensorflow.py and from
mseitzer/pytorch-fid's inception.py, whose file of weights is the same. It differs from torchvision's Inception v3 in
its weights, in average pools that leave padding out, and in a maximum pool in the last block.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffpp_fast.errors import ConfigurationError
from diffpp_fast.rewards.files import fit, read_tensors

FEATURES = 2048
SIDE = 299
FILE = "weights-inception-2015-12-05-6726825d.pth"
WHERE = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{FILE}"
PREPROCESSING = (
    f"the 8-bit picture; bilinear to {SIDE} x {SIDE} as TensorFlow 1 does it (no antialiasing, no half pixels), "
    "whatever its proportions; (x - 128) / 128"
)


class Conv(NamedTuple):
    """A convolution by the name that the file has for it."""

    name: str
    channels: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1


#: Convolutions in a row; a tuple of them at its end are side by side.
Branch = tuple[Conv | tuple[Conv, ...], ...]


def _crossed(name: str, channels: int) -> tuple[Conv, Conv]:
    return Conv(f"{name}a", channels, (1, 3)), Conv(f"{name}b", channels, (3, 1))


def _block_a(pooled: int) -> tuple[Branch, ...]:
    return (
        (Conv("branch1x1", 64),),
        (Conv("branch5x5_1", 48), Conv("branch5x5_2", 64, (5, 5))),
        (Conv("branch3x3dbl_1", 64), Conv("branch3x3dbl_2", 96, (3, 3)), Conv("branch3x3dbl_3", 96, (3, 3))),
        (Conv("branch_pool", pooled),),
    )


def _block_c(inner: int) -> tuple[Branch, ...]:
    double = [Conv(f"branch7x7dbl_{n}", inner, (7, 1) if n % 2 == 0 else (1, 7)) for n in (2, 3, 4)]
    return (
        (Conv("branch1x1", 192),),
        (Conv("branch7x7_1", inner), Conv("branch7x7_2", inner, (1, 7)), Conv("branch7x7_3", 192, (7, 1))),
        (Conv("branch7x7dbl_1", inner), *double, Conv("branch7x7dbl_5", 192, (1, 7))),
        (Conv("branch_pool", 192),),
    )


BLOCK_B: tuple[Branch, ...] = (
    (Conv("branch3x3", 384, (3, 3), 2),),
    (Conv("branch3x3dbl_1", 64), Conv("branch3x3dbl_2", 96, (3, 3)), Conv("branch3x3dbl_3", 96, (3, 3), 2)),
)
BLOCK_D: tuple[Branch, ...] = (
    (Conv("branch3x3_1", 192), Conv("branch3x3_2", 320, (3, 3), 2)),
    (
        Conv("branch7x7x3_1", 192),
        Conv("branch7x7x3_2", 192, (1, 7)),
        Conv("branch7x7x3_3", 192, (7, 1)),
        Conv("branch7x7x3_4", 192, (3, 3), 2),
    ),
)
BLOCK_E: tuple[Branch, ...] = (
    (Conv("branch1x1", 320),),
    (Conv("branch3x3_1", 384), _crossed("branch3x3_2", 384)),
    (Conv("branch3x3dbl_1", 448), Conv("branch3x3dbl_2", 384, (3, 3)), _crossed("branch3x3dbl_3", 384)),
    (Conv("branch_pool", 192),),
)


class FixedNorm(nn.Module):
    """Batch normalisation by the statistics of training. torch's own asks files for the number of training steps."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        mean, variance = self.get_buffer("running_mean"), self.get_buffer("running_var")
        return F.batch_norm(x, mean, variance, self.weight, self.bias, eps=0.001)


class NormalizedConv(nn.Module):
    """Convolution, batch normalisation, ReLU."""

    def __init__(self, channels: int, conv: Conv, *, padded: bool = True) -> None:
        super().__init__()
        height, width = conv.kernel
        padding = (height // 2, width // 2) if padded and conv.stride == 1 else (0, 0)
        self.conv = nn.Conv2d(channels, conv.channels, conv.kernel, conv.stride, padding, bias=False)
        self.bn = FixedNorm(conv.channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Branches side by side, their channels concatenated. A pool comes before the last branch, or is a branch itself.

    Args:
        channels: the input's channels.
        branches: convolutions.
        pool: "average" or "max", at full resolution, before the last branch; None: one branch more, a maximum pool
            that halves the resolution as the other branches do.
    """

    def __init__(self, channels: int, branches: tuple[Branch, ...], pool: str | None) -> None:
        super().__init__()
        self.branches, self.pool = branches, pool
        for branch in branches:
            width = channels
            for parallel in map(_as_tuple, branch):
                for conv in parallel:
                    self.add_module(conv.name, NormalizedConv(width, conv))
                width = sum(conv.channels for conv in parallel)

    def forward(self, x: Tensor) -> Tensor:
        outputs = [self._run(branch, x) for branch in (self.branches if self.pool is None else self.branches[:-1])]
        if self.pool is None:
            outputs.append(F.max_pool2d(x, 3, stride=2))
        elif self.pool == "max":
            outputs.append(self._run(self.branches[-1], F.max_pool2d(x, 3, stride=1, padding=1)))
        else:
            pooled = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
            outputs.append(self._run(self.branches[-1], pooled))
        return torch.cat(outputs, 1)

    def _run(self, branch: Branch, x: Tensor) -> Tensor:
        for parallel in map(_as_tuple, branch):
            x = torch.cat([self.get_submodule(conv.name)(x) for conv in parallel], 1)
        return x


def _as_tuple(convs: Conv | tuple[Conv, ...]) -> tuple[Conv, ...]:
    return (convs,) if isinstance(convs, Conv) else convs


class Inception(nn.Module):
    """The network up to the last average pool: pictures -> 2048 features."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = NormalizedConv(3, Conv("", 32, (3, 3), 2))
        self.Conv2d_2a_3x3 = NormalizedConv(32, Conv("", 32, (3, 3)), padded=False)
        self.Conv2d_2b_3x3 = NormalizedConv(32, Conv("", 64, (3, 3)))
        self.Conv2d_3b_1x1 = NormalizedConv(64, Conv("", 80))
        self.Conv2d_4a_3x3 = NormalizedConv(80, Conv("", 192, (3, 3)), padded=False)
        self.Mixed_5b = Mixed(192, _block_a(32), "average")
        self.Mixed_5c = Mixed(256, _block_a(64), "average")
        self.Mixed_5d = Mixed(288, _block_a(64), "average")
        self.Mixed_6a = Mixed(288, BLOCK_B, None)
        self.Mixed_6b = Mixed(768, _block_c(128), "average")
        self.Mixed_6c = Mixed(768, _block_c(160), "average")
        self.Mixed_6d = Mixed(768, _block_c(160), "average")
        self.Mixed_6e = Mixed(768, _block_c(192), "average")
        self.Mixed_7a = Mixed(768, BLOCK_D, None)
        self.Mixed_7b = Mixed(1280, BLOCK_E, "average")
        self.Mixed_7c = Mixed(2048, BLOCK_E, "max")

    def forward(self, pictures: Tensor) -> Tensor:
        """Return features [B, 2048] of pictures uint8 [B, 3, H, W], in the dtype of the weights."""
        dtype = self.Conv2d_1a_3x3.conv.weight.dtype
        x = (resize(pictures.to(dtype), SIDE) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, stride=2))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        return x.mean((2, 3))


def load_inception(path: Path | None, device: torch.device) -> Inception:
    """Return the network with the weights of a file; None: the file that torch-fidelity keeps, if it is there.

    Raises ConfigurationError where there is no file, with the address to download it from, and for another file.
    """
    if path is None:
        path = Path(torch.hub.get_dir()) / "checkpoints" / FILE
        if not path.is_file():
            raise ConfigurationError(
                f"fid and kid need Inception's weights: download {WHERE} and give --inception FILE"
            )
    if not path.is_file():
        raise ConfigurationError(f"--inception {path}: no such file; download it from {WHERE}")
    with torch.device("meta"):
        network = Inception()
    # The file also has the classifier behind the features, and may have the number of training steps.
    fit(network, read_tensors(path, "inception"), path, "inception", spare=(r"fc\.", r".*\.num_batches_tracked$"))
    return network.eval().requires_grad_(False).to(device)


def resize(x: Tensor, side: int) -> Tensor:
    """Resize x [B, C, H, W] to [B, C, side, side], bilinear as TensorFlow 1: output pixel i is at i * size / side."""
    for dim in (2, 3):
        size = x.shape[dim]
        at = torch.arange(side, dtype=torch.float32, device=x.device) * torch.tensor(size / side, dtype=torch.float32)
        low = at.long()
        share = (at - low).to(x.dtype).view((-1, 1) if dim == 2 else (-1,))
        first = x.index_select(dim, low)
        x = first + (x.index_select(dim, (low + 1).clamp_max(size - 1)) - first) * share
    return x
