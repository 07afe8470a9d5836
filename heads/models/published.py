"""Small networks that are trained from pixels: the baselines of published comparisons, built to their parameter counts.

Each maps normalised images float32 [B,3,h,w] to logits [B,C]. What Grad-CAM looks at is told by ``cam_layer``, the
module whose output it takes, and ``cam_grid``: None where that output is a map [B,D,h,w], and (P, h, w) where it is P
tokens before those of h·w patches.

Notation: B batch, C classes, D width or channels, T = P + h·w tokens.
"""

from __future__ import annotations

import torch
from torch import nn

from featurecache.errors import BadOption
from featurecache.images.preprocessing import Preprocess

Grid = tuple[int, int, int]


class Normalised(nn.Module):
    """A network on pixels as they are stored: [B,3,h,w] with values 0 to 255, of any dtype, -> logits [B,C].

    Scale, mean and std are constants of ``preprocess``: no parameters, and not in the state dict."""

    def __init__(self, preprocess: Preprocess, network: nn.Module, *, channels_last: bool = False) -> None:
        super().__init__()
        self.preprocess, self.network, self.channels_last = preprocess, network, channels_last

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x = self.preprocess.normalised(pixels)
        if self.channels_last:  # the activations alone: weights stay as they are saved
            x = x.contiguous(memory_format=torch.channels_last)
        return self.network(x)

    @property
    def cam_layer(self) -> nn.Module:
        """The module whose output Grad-CAM takes."""
        return self.network.cam_layer  # type: ignore[return-value]

    @property
    def cam_grid(self) -> Grid | None:
        return self.network.cam_grid  # type: ignore[return-value]  # a module's attributes are typed as modules


def _block(before: int, after: int, *, bias: bool = True) -> nn.Sequential:
    """Conv3×3 (pad 1), BatchNorm, ReLU: [B,before,h,w] -> [B,after,h,w]."""
    return nn.Sequential(nn.Conv2d(before, after, 3, padding=1, bias=bias), nn.BatchNorm2d(after), nn.ReLU())


class _Blocks(nn.Module):
    """Blocks with a pooling behind each, their map averaged to side×side, then ``classifier``."""

    cam_grid = None

    def __init__(self, blocks: list[nn.Sequential], side: int, classifier: nn.Sequential) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.pool, self.average = nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(side)
        self.classifier = classifier

    @property
    def cam_layer(self) -> nn.Module:
        return self.blocks[-1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = self.pool(block(x))
        return self.classifier(self.average(x).flatten(1))


class MindlinaCnn(_Blocks):
    """A stand-in for the article's three-block CNN on 256×256 pixels, whose layers are not published: hers has 348,050
    parameters, this one 348,230 with C = 2. Conv3×3–BatchNorm–ReLU–MaxPool, 3→16→32→64, averaged to 4×4, 1024→316→C."""

    def __init__(self, image_size: int, classes: int, dropout: float = 0.0) -> None:
        _at_least(image_size, "cnn-mindlina")
        super().__init__(
            [_block(a, b, bias=False) for a, b in ((3, 16), (16, 32), (32, 64))], 4,
            nn.Sequential(nn.Linear(64 * 4 * 4, 316), nn.ReLU(), nn.Dropout(dropout), nn.Linear(316, classes)),
        )  # fmt: skip


class MedicalMnistCnn(_Blocks):
    """Three blocks Conv3×3–BatchNorm–ReLU–MaxPool, 3→32→64→128, averaged to 7×7, then 6272→512→256→C with dropout:
    3,438,342 parameters with C = 6."""

    def __init__(self, image_size: int, classes: int, dropout: float = 0.5) -> None:
        _at_least(image_size, "cnn-medical-mnist")
        super().__init__(
            [_block(3, 32), _block(32, 64), _block(64, 128)], 7,
            nn.Sequential(
                nn.Linear(128 * 7 * 7, 512), nn.ReLU(), nn.Dropout(dropout),
                nn.Linear(512, 256), nn.ReLU(), nn.Dropout(dropout),
                nn.Linear(256, classes),
            ),
        )  # fmt: skip


class Residual(nn.Module):
    """The basic block of He et al. 2016 (arXiv:1512.03385): [B,before,h,w] -> [B,after,h/stride,w/stride]; a 1×1
    convolution and BatchNorm on the shortcut where the shape changes."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(after)
        self.shortcut = nn.Sequential()
        if stride != 1 or before != after:
            self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inside = self.norm1(self.conv1(x)).relu()
        return (self.norm2(self.conv2(inside)) + self.shortcut(x)).relu()


class CifarCnn(nn.Module):
    """Conv3×3 3→16, two residual blocks each at 16, 32 and 64 channels, average, Linear: 174,608 + 65 C parameters."""

    cam_grid = None

    def __init__(self, image_size: int, classes: int) -> None:
        super().__init__()
        _at_least(image_size, "cnn-cifar")
        self.stem = _block(3, 16, bias=False)
        self.blocks = nn.Sequential(
            Residual(16, 16, 1), Residual(16, 16, 1), Residual(16, 32, 2), Residual(32, 32, 1), Residual(32, 64, 2),
            Residual(64, 64, 1),
        )  # fmt: skip
        self.classifier = nn.Linear(64, classes)

    @property
    def cam_layer(self) -> nn.Module:
        return self.blocks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.blocks(self.stem(x)).mean((2, 3)))


class CifarVit(nn.Module):
    """8×8 patches and a class token (T = 65), D = 128, six pre-norm blocks of 8 heads and an MLP of 512 with ReLU, no
    norm at the end, a Linear on the class token; dropout after the positions and in the blocks. Class token and
    positions begin at zero.

    1,204,352 + 129 C parameters at 32 pixels, 1,222,784 + 129 C at 64. The blocks begin different: torch's
    ``TransformerEncoder`` would begin with six copies of one."""

    def __init__(self, image_size: int, classes: int, dropout: float = 0.1) -> None:
        super().__init__()
        if image_size < 8 or image_size % 8:
            raise BadOption(f"--image-size {image_size}: vit-cifar has 8×8 patches; take a multiple of 8, such as 32.")
        patch = image_size // 8
        self.patches = nn.Conv2d(3, 128, patch, stride=patch)
        self.token = nn.Parameter(torch.zeros(1, 1, 128))
        self.positions = nn.Parameter(torch.zeros(1, 65, 128))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(128, 8, 512, dropout, "relu", batch_first=True, norm_first=True)
            for _ in range(6)
        )
        self.classifier = nn.Linear(128, classes)
        self.cam_grid: Grid = (1, 8, 8)

    @property
    def cam_layer(self) -> nn.Module:
        """The last block's first norm: of what comes after it, the head sees the class token alone."""
        return self.blocks[-1].norm1  # type: ignore[return-value]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = self.dropout(torch.cat([self.token.expand(len(x), -1, -1), tokens], 1) + self.positions)
        for block in self.blocks:
            tokens = block(tokens)
        return self.classifier(tokens[:, 0])


def _at_least(image_size: int, name: str) -> None:
    if image_size < 8:
        raise BadOption(f"--image-size {image_size}: {name} halves its sides three times and needs at least 8 pixels.")
