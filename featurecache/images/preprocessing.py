"""What the weights' own image processor does, as data: decoded image in, pixels of the network out.

Two families of processors are reproduced to the last bit, and each rounds in its own places:

* transformers (its torchvision backend): resize on uint8 by torchvision's v2 functional, the crop's offset rounded
  down, then ``x * scale`` and ``(x - mean) / std`` fused into ``(x - mean / scale) / (std / scale)``;
* torchvision's presets, given a PIL image as in its own training and evaluation scripts: resize by Pillow, the crop's
  offset rounded half to even, then ``x / 255`` and ``(x - mean) / std``. (Given a tensor the same preset resizes in
  float: up to 20/255 away in bicubic, and not what the published accuracies were measured with.)

Which of them, every size and every constant are fields of :class:`Preprocess`, which goes into the spec of a store.
Nothing is trusted: :mod:`featurecache.backbones.processors` reads the settings and compares with the real processor on
probe images; a difference is an error.

A network of grey images has one mean and one std: it is fed one channel, Pillow's "L" of the decoded image before it is
resized, as both libraries' own loaders do. On the way pixels have three channels, which then are equal.

Axis letters: B batch, H and W height and width in pixels, C channels, 3 or 1; sizes are (height, width).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from featurecache.errors import BadOption, PreprocessingRefused, UnreadableImage
from featurecache.images.headers import MAX_PIXELS, pillow_image

if TYPE_CHECKING:
    import torch

FITS = ("model", "squash", "pad")
_MODES = ("squash", "shortest", "pad", "none")
_KERNELS = {  # kernel -> the interpolations it can do
    "torchvision": ("nearest-exact", "bilinear", "bicubic", "lanczos"),
    "pil": ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"),
}
_ARITHMETIC = ("fused", "rescale first")
_ROUNDING = ("down", "half even")


@dataclass(frozen=True)
class Preprocess:
    """Resize, crop or pad on uint8, then scale and normalise to float32. All sizes in pixels."""

    mode: str  # "squash" to resize = (h, w); "shortest" edge to resize = (n,); "pad" into resize = (h, w); "none"
    resize: tuple[int, ...]
    crop: tuple[int, int] | None  # the centre; what is missing is filled with black
    kernel: str
    interpolation: str
    antialias: bool
    crop_rounding: str
    scale: float | None
    mean: tuple[float, ...] | None  # of three channels, RGB, or of one, grey; so std
    std: tuple[float, ...] | None
    arithmetic: str

    def __post_init__(self) -> None:
        if self.mode not in _MODES:
            raise PreprocessingRefused(f'resizing "{self.mode}" is not one of {", ".join(_MODES)}')
        if self.kernel not in _KERNELS or self.interpolation not in _KERNELS[self.kernel]:
            raise PreprocessingRefused(f'interpolation "{self.interpolation}" by "{self.kernel}" is not one we can do')
        if self.arithmetic not in _ARITHMETIC or self.crop_rounding not in _ROUNDING:
            raise PreprocessingRefused(f"{self.arithmetic!r} with {self.crop_rounding!r} is not an arithmetic we know")
        lengths = {"squash": 2, "pad": 2, "shortest": 1, "none": 0}
        sizes = (*self.resize, *(self.crop or ()))
        if len(self.resize) != lengths[self.mode] or any(not isinstance(n, int) or n < 1 for n in sizes):
            raise PreprocessingRefused(f"sizes {sizes} do not go with resizing {self.mode!r}")
        if self.crop is None and self.mode in ("shortest", "none"):
            raise PreprocessingRefused(
                "this processor neither squashes nor crops, so its images keep different sizes; expected one size"
            )
        constants = (*(self.mean or ()), *(self.std or ()))
        if len(constants) not in (0, 2, 6) or not all(isinstance(c, float) and math.isfinite(c) for c in constants):
            raise PreprocessingRefused(
                f"mean {self.mean} and std {self.std} are not three numbers each, of RGB, or one, of grey; such as 0.5"
            )
        if len(self.mean or ()) != len(self.std or ()) or any(s <= 0 for s in self.std or ()):
            raise PreprocessingRefused(f"mean {self.mean} and std {self.std} do not normalise the channels of an image")
        if self.scale is not None and not self.scale > 0:
            raise PreprocessingRefused(f"a scale of {self.scale} leaves nothing of an image")

    def to_dict(self) -> dict[str, Any]:
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Preprocess:
        fields: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in data.items()}
        return cls(**fields)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of what comes out."""
        height, width = self.crop or self.resize
        return height, width

    @property
    def channels(self) -> int:
        """C of what the network sees: 3, RGB, or 1, grey."""
        return len(self.mean or "RGB")

    def resized(self, image: torch.Tensor) -> torch.Tensor:
        """uint8 [3,H,W] of any size -> uint8 [3,h,w], ``h, w = self.size``; of grey three equal channels."""
        target = self._target(image.shape[-2], image.shape[-1])
        if target[0] * target[1] > MAX_PIXELS:
            shape = f"{image.shape[-1]:,}×{image.shape[-2]:,}"
            raise UnreadableImage(f"{shape} pixels are too long a strip to be resized by the shortest edge")
        image = _luma(image) if self.channels == 1 else image
        if tuple(image.shape[-2:]) != target:
            image = self._resize(image, target)
        if self.mode == "pad" or self.crop is not None:
            image = self._centre(image)
        return image.contiguous()

    def _target(self, height: int, width: int) -> tuple[int, int]:
        """The size to resize a height × width image to, before cropping or padding."""
        if self.mode == "shortest":
            short = self.resize[0]
            return (int(short * height / width), short) if width <= height else (short, int(short * width / height))
        if self.mode == "pad":
            ratio = min(self.resize[0] / height, self.resize[1] / width)
            return max(1, round(height * ratio)), max(1, round(width * ratio))
        return (self.resize[0], self.resize[1]) if self.mode == "squash" else (height, width)

    def _resize(self, image: torch.Tensor, target: tuple[int, int]) -> torch.Tensor:
        """uint8 [3,H,W] -> uint8 [3,*target]; Pillow always antialiases."""
        if self.kernel == "torchvision":
            from torchvision.transforms import InterpolationMode
            from torchvision.transforms.v2 import functional

            interpolation = InterpolationMode(self.interpolation)
            return functional.resize(image, list(target), interpolation=interpolation, antialias=self.antialias)
        import torch

        Image = pillow_image()
        picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
        picture = picture.resize((target[1], target[0]), Image.Resampling[self.interpolation.upper()])
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)

    def _centre(self, image: torch.Tensor) -> torch.Tensor:
        """[3,H,W] -> [3,*size]: the centre; black where the image is smaller, the odd pixel of it right and below."""
        import torch

        for axis, n in zip((-2, -1), self.size, strict=True):
            have = image.shape[axis]
            if have < n:
                before = (n - have) // 2
                sides = (0, 0, before, n - have - before) if axis == -2 else (before, n - have - before)
                image = torch.nn.functional.pad(image, sides)
            elif have > n:
                start = round((have - n) / 2) if self.crop_rounding == "half even" else (have - n) // 2
                image = image.narrow(axis, start, n)
        return image

    def normalised(self, batch: torch.Tensor) -> torch.Tensor:
        """uint8 [B,3,h,w] on any device -> float32 [B,C,h,w], in the processor's own order of operations."""
        import torch

        pixels = batch[:, : self.channels].to(torch.float32, copy=True)
        if self.arithmetic == "rescale first":
            pixels = pixels.div_(round(1 / self.scale)) if self.scale else pixels
            factor = 1.0
        else:
            if self.mean is None:
                return pixels.mul_(self.scale) if self.scale else pixels
            factor = 1.0 / self.scale if self.scale else 1.0
        if self.mean is None or self.std is None:
            return pixels
        mean = torch.tensor(self.mean, device=batch.device) * factor
        std = torch.tensor(self.std, device=batch.device) * factor
        return pixels.sub_(mean.view(-1, 1, 1)).div_(std.view(-1, 1, 1))

    def fitted(self, fit: str) -> Preprocess:
        """The same pixels out, but the whole image in: squashed to the square, or padded with black to it."""
        if fit not in FITS:
            raise BadOption(f'--fit "{fit}" is not one of {", ".join(FITS)}')
        return self if fit == "model" else replace(self, mode=fit, resize=self.size, crop=None)

    def scaled(self, image_size: int, patch: int = 1) -> Preprocess:
        """``image_size`` pixels out, resize and crop in their old ratio."""
        height, width = self.size
        if image_size < 1 or image_size % patch:
            below, above = image_size // patch * patch, (image_size // patch + 1) * patch
            near = f"{below} or {above}" if below > 0 else str(above)
            raise BadOption(f"--image-size {image_size} is not a multiple of the patch of {patch} pixels; try {near}")
        if height != width:
            raise BadOption(f"--image-size is for square images; this processor makes {height}×{width}")
        resize = tuple(round(n * image_size / height) for n in self.resize)
        return replace(self, resize=resize, crop=(image_size, image_size) if self.crop else None)

    def line(self) -> str:
        """One line for people: what the network sees of an image."""
        height, width = self.size
        how = {
            "squash": "squashed" + (f" to {'×'.join(map(str, self.resize))}, centre crop" if self.crop else ""),
            "shortest": f"from the centre, shortest edge resized to {self.resize[0] if self.resize else ''}",
            "pad": "padded with black",
            "none": "cut from the centre without resizing",
        }[self.mode]
        kernel = "" if self.mode == "none" else f", {self.interpolation}"
        norm = "" if self.mean is None else f", mean {_numbers(self.mean)}, std {_numbers(self.std or ())}"
        return f"{height}×{width} {how}{kernel}{', grey' * (self.channels == 1)}{norm}"


def _luma(image: torch.Tensor) -> torch.Tensor:
    """uint8 [3,H,W] -> three times Pillow's "L" (ITU-R 601-2, in its own integers); grey stays as it is."""
    import torch

    red, green, blue = image.to(torch.int32)
    grey = (19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16
    return grey.to(torch.uint8).expand(3, -1, -1)


def _numbers(values: tuple[float, ...]) -> str:
    short = [f"{v:.4g}" for v in values]
    return short[0] if len(set(short)) == 1 else " ".join(short)
