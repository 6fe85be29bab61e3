"""Inception v3 (Szegedy et al., arXiv 1512.00567) as the Fréchet Inception distance uses it, from weights on disk.

Published FIDs use one TensorFlow network of 5 December 2015 with 1,008 classes. Its weights are available in two files:
the state dict pt_inception-2015-12-05-6726825d.pth and the TorchScript module inception-2015-12-05.pt. Only the tensors
of the latter are read; its program, which could do anything, does not run. The network differs from the paper's and
from those of other libraries: average pools do not count the padding, and the last block uses a max pool.

pytorch-fid, and with it U-ViT's evaluation on MS-COCO, reads the former file and resizes images in another way, which
changes the FID: its reference statistics are for images that are resized so.

Not tested with the original weights, which are not shipped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from haste.errors import UserError, in_one_line
from haste.weights import load_weights

CLASSES = 1008
FEATURES = 2048
SPATIAL_CHANNELS = 7  # of Mixed_6d.branch1x1
INPUT_SIZE = 299

Resizing = Literal["tensorflow", "pytorch-fid"]
"""How images become INPUT_SIZE pixels wide; "pytorch-fid" samples position (i + ½)·H/size − ½, without antialiasing,
and maps 0 … 255 to −1 … 1."""


class Convolution(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size, stride=1, padding=0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


def row(in_channels: int, out_channels: int, length: int = 7) -> Convolution:
    """A 1 × length convolution that keeps the size."""
    return Convolution(in_channels, out_channels, (1, length), padding=(0, length // 2))


def column(in_channels: int, out_channels: int, length: int = 7) -> Convolution:
    """A length × 1 convolution that keeps the size."""
    return Convolution(in_channels, out_channels, (length, 1), padding=(length // 2, 0))


def average_pool(x: Tensor) -> Tensor:
    """A 3 × 3 average pool that keeps the size and does not count the padding."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class BlockA(nn.Module):
    """35 × 35: figure 5 of the paper, the 5 × 5 kept (Mixed_5b to Mixed_5d)."""

    def __init__(self, channels: int, pool_channels: int) -> None:
        super().__init__()
        self.branch1x1 = Convolution(channels, 64, 1)
        self.branch5x5_1 = Convolution(channels, 48, 1)
        self.branch5x5_2 = Convolution(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = Convolution(channels, 64, 1)
        self.branch3x3dbl_2 = Convolution(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Convolution(96, 96, 3, padding=1)
        self.branch_pool = Convolution(channels, pool_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        five = self.branch5x5_2(self.branch5x5_1(x))
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, double, self.branch_pool(average_pool(x))], dim=1)


class BlockB(nn.Module):
    """35 × 35 to 17 × 17: figure 10 (Mixed_6a)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch3x3 = Convolution(channels, 384, 3, stride=2)
        self.branch3x3dbl_1 = Convolution(channels, 64, 1)
        self.branch3x3dbl_2 = Convolution(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Convolution(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, stride=2)], dim=1)


class BlockC(nn.Module):
    """17 × 17: figure 6, n = 7 (Mixed_6b to Mixed_6e)."""

    def __init__(self, width: int, channels: int = 768) -> None:
        super().__init__()
        self.branch1x1 = Convolution(channels, 192, 1)
        self.branch7x7_1 = Convolution(channels, width, 1)
        self.branch7x7_2 = row(width, width)
        self.branch7x7_3 = column(width, 192)
        self.branch7x7dbl_1 = Convolution(channels, width, 1)
        self.branch7x7dbl_2 = column(width, width)
        self.branch7x7dbl_3 = row(width, width)
        self.branch7x7dbl_4 = column(width, width)
        self.branch7x7dbl_5 = row(width, 192)
        self.branch_pool = Convolution(channels, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), seven, double, self.branch_pool(average_pool(x))], dim=1)


class BlockD(nn.Module):
    """17 × 17 to 8 × 8 (Mixed_7a)."""

    def __init__(self, channels: int = 768) -> None:
        super().__init__()
        self.branch3x3_1 = Convolution(channels, 192, 1)
        self.branch3x3_2 = Convolution(192, 320, 3, stride=2)
        self.branch7x7x3_1 = Convolution(channels, 192, 1)
        self.branch7x7x3_2 = row(192, 192)
        self.branch7x7x3_3 = column(192, 192)
        self.branch7x7x3_4 = Convolution(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_2(self.branch3x3_1(x))
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([three, seven, F.max_pool2d(x, 3, stride=2)], dim=1)


class BlockE(nn.Module):
    """8 × 8: figure 7 (Mixed_7b, Mixed_7c). pool: of the last branch, "average" or "maximum"."""

    def __init__(self, channels: int, pool: str) -> None:
        super().__init__()
        self.pool = pool
        self.branch1x1 = Convolution(channels, 320, 1)
        self.branch3x3_1 = Convolution(channels, 384, 1)
        self.branch3x3_2a = row(384, 384, 3)
        self.branch3x3_2b = column(384, 384, 3)
        self.branch3x3dbl_1 = Convolution(channels, 448, 1)
        self.branch3x3dbl_2 = Convolution(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = row(384, 384, 3)
        self.branch3x3dbl_3b = column(384, 384, 3)
        self.branch_pool = Convolution(channels, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = average_pool(x) if self.pool == "average" else F.max_pool2d(x, 3, stride=1, padding=1)
        return torch.cat(
            [
                self.branch1x1(x),
                self.branch3x3_2a(three), self.branch3x3_2b(three),
                self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double),
                self.branch_pool(pooled),
            ],
            dim=1,
        )  # fmt: skip


class Inception(nn.Module):
    """The network, with the parameter names of the public state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Convolution(32, 32, 3)
        self.Conv2d_2b_3x3 = Convolution(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Convolution(64, 80, 1)
        self.Conv2d_4a_3x3 = Convolution(80, 192, 3)
        self.Mixed_5b = BlockA(192, pool_channels=32)
        self.Mixed_5c = BlockA(256, pool_channels=64)
        self.Mixed_5d = BlockA(288, pool_channels=64)
        self.Mixed_6a = BlockB(288)
        self.Mixed_6b = BlockC(128)
        self.Mixed_6c = BlockC(160)
        self.Mixed_6d = BlockC(160)
        self.Mixed_6e = BlockC(192)
        self.Mixed_7a = BlockD()
        self.Mixed_7b = BlockE(1280, pool="average")
        self.Mixed_7c = BlockE(2048, pool="maximum")
        self.fc = nn.Linear(FEATURES, CLASSES)

    def forward(self, images: Tensor, resized: Resizing = "tensorflow") -> tuple[Tensor, Tensor, Tensor]:
        """Compute features (B, 2048), spatial features (B, 2023) and class probabilities (B, 1008), float32, of images
        (B, 3, H, W) uint8.

        The probabilities omit the last layer's bias, as in the published Inception score.
        """
        pixels = images.float()
        if resized == "pytorch-fid":
            size = (INPUT_SIZE, INPUT_SIZE)
            x = 2 * F.interpolate(pixels / 255, size, mode="bilinear", align_corners=False) - 1
        else:
            x = normalise(resize(pixels))
        features, spatial = self.features(x)
        return features, spatial, F.linear(features, self.fc.weight).softmax(dim=1)

    def features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, 299, 299) in [−1, 1] to (B, 2048), the mean over the last 8 × 8, and the spatial features (B, 2023).

        These are sFID's (Nash et al., arXiv 2103.03841), as ADM's evaluator takes them: the first 7 channels of
        `mixed_6/conv`, 17 × 17. TensorFlow's mixed_6 is the third block of that size after its first, Mixed_6d, and its
        conv is the 1 × 1 branch after the ReLU. Channels come last, as in TensorFlow, so that mu_s and sigma_s fit.
        """
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6a(x)
        x = self.Mixed_6c(self.Mixed_6b(x))
        x = self.Mixed_6d(x)
        spatial = x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)  # the block's first channels are branch1x1's
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))
        return x.mean(dim=(2, 3)), spatial


def resize(images: Tensor, size: int = INPUT_SIZE) -> Tensor:
    """Resize (B, C, H, W) float to (B, C, size, size), bilinear as in TensorFlow 1.

    Pixel i samples position i·H/size, without antialiasing. F.interpolate samples (i + ½)·H/size − ½, which changes the
    FID.
    """

    def along(x: Tensor, dim: int) -> Tensor:
        old = x.shape[dim]
        place = torch.arange(size, dtype=torch.float64) * old / size
        low = place.long()
        high = (low + 1).clamp(max=old - 1)
        shape = [1] * x.dim()
        shape[dim] = size
        weight = (place - low).to(x).view(shape)
        low, high = (x.index_select(dim, index.to(x.device)) for index in (low, high))
        return low + (high - low) * weight

    return along(along(images, 2), 3)


def normalise(pixels: Tensor) -> Tensor:
    """(x − 128) / 128, as in the network's training: 0 … 255 to −1 … 0.992."""
    return (pixels - 128.0) / 128.0


def load_inception(path: Path) -> Inception:
    """Load the weights of either file, or of a state dict in safetensors, in eval mode. Raises UserError."""
    wanted = "--features inception must be inception-2015-12-05.pt or pt_inception-2015-12-05-6726825d.pth"
    if not path.is_file():
        raise UserError(f"{wanted}, got {path}, which is no file")
    state = load_weights(path, "--features inception")
    if not isinstance(state, dict):
        raise UserError(f"{wanted}, got {path}, which holds a {type(state).__name__}")
    if "layers.conv.weight" in state:
        state = by_own_names(state)
    network = Inception()
    try:
        network.load_state_dict(dict(state))  # a plain dict, as old files have no num_batches_tracked
    except (RuntimeError, AttributeError, TypeError) as error:
        raise UserError(f"{wanted}, got {path}: {in_one_line(error)}") from error
    return network.eval()


# ---- the names of the TorchScript module, which are TensorFlow's ----


def _numbered(name: str, targets: list[str]) -> dict[str, str]:
    """Map name, name_1, name_2, ... to the names here."""
    return {f"{name}_{index}" if index else name: target for index, target in enumerate(targets)}


_STEM = ["Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "Conv2d_3b_1x1", "Conv2d_4a_3x3"]
_BLOCKS = {
    "A": {
        "conv": "branch1x1",
        **_numbered("tower.conv", ["branch5x5_1", "branch5x5_2"]),
        **_numbered("tower_1.conv", ["branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"]),
        "tower_2.conv": "branch_pool",
    },
    "B": {
        "conv": "branch3x3",
        **_numbered("tower.conv", ["branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"]),
    },
    "C": {
        "conv": "branch1x1",
        **_numbered("tower.conv", ["branch7x7_1", "branch7x7_2", "branch7x7_3"]),
        **_numbered("tower_1.conv", [f"branch7x7dbl_{number}" for number in range(1, 6)]),
        "tower_2.conv": "branch_pool",
    },
    "D": {
        **_numbered("tower.conv", ["branch3x3_1", "branch3x3_2"]),
        **_numbered("tower_1.conv", [f"branch7x7x3_{number}" for number in range(1, 5)]),
    },
    "E": {
        "conv": "branch1x1",
        "tower_conv": "branch3x3_1",
        **_numbered("tower_mixed_conv", ["branch3x3_2a", "branch3x3_2b"]),
        **_numbered("tower_1_conv", ["branch3x3dbl_1", "branch3x3dbl_2"]),
        **_numbered("tower_1_mixed_conv", ["branch3x3dbl_3a", "branch3x3dbl_3b"]),
        "tower_2_conv": "branch_pool",
    },
}
_MIXED = {"5b": "A", "5c": "A", "5d": "A", "6a": "B", "6b": "C", "6c": "C", "6d": "C", "6e": "C", "7a": "D", "7b": "E",
          "7c": "E"}  # fmt: skip
_PARTS = {"weight": "conv.weight", "beta": "bn.bias", "mean": "bn.running_mean", "var": "bn.running_var"}


def convolution_names() -> dict[str, str]:
    """Map each convolution of the TorchScript module to its name here."""
    names = {f"layers.{theirs}": ours for theirs, ours in _numbered("conv", _STEM).items()}
    for theirs, place in _numbered("mixed", list(_MIXED)).items():
        names |= {f"layers.{theirs}.{inner}": f"Mixed_{place}.{ours}" for inner, ours in _BLOCKS[_MIXED[place]].items()}
    return names


def by_own_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of `Inception` from the tensors of the TorchScript module, whose batch norms have no scale (1)."""
    names = {"output.weight": "fc.weight", "output.bias": "fc.bias"}
    state = {}
    for theirs, ours in convolution_names().items():
        names |= {f"{theirs}.{part}": f"{ours}.{own}" for part, own in _PARTS.items()}
        if f"{theirs}.beta" in tensors:
            state[f"{ours}.bn.weight"] = torch.ones_like(tensors[f"{theirs}.beta"])
    return state | {names.get(name, name): tensor for name, tensor in tensors.items()}
