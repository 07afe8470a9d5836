"""Read the settings of a library's image processor into a `Preprocess`, and hold the two against each other.

Reading goes by the processor's attributes; what they do not say (a class with rules of its own) shows in
:func:`check`, which compares the pixels of probe images and refuses by name what is not reproduced exactly.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from featurecache.errors import PreprocessingRefused
from featurecache.images.preprocessing import Preprocess

if TYPE_CHECKING:
    from PIL import Image


def from_processor(processor: Any) -> Preprocess:
    """Read the settings of a transformers image processor of the torchvision backend."""
    from transformers.image_utils import pil_torch_interpolation_mapping

    name = type(processor).__name__
    size = dict(getattr(processor, "size", None) or {}) if getattr(processor, "do_resize", False) else {}
    crop = dict(getattr(processor, "crop_size", None) or {}) if getattr(processor, "do_center_crop", False) else None
    mode, resize, crop_to = _geometry(name, size, crop, getattr(processor, "crop_pct", None))
    resample = getattr(processor, "resample", None)
    mode_of = pil_torch_interpolation_mapping.get(2 if resample is None else resample, resample)
    normalise = getattr(processor, "do_normalize", False)
    return Preprocess(
        mode=mode,
        resize=resize,
        crop=crop_to,
        kernel="torchvision",
        interpolation=str(getattr(mode_of, "value", mode_of)),
        antialias=True,
        crop_rounding="down",
        scale=float(processor.rescale_factor) if getattr(processor, "do_rescale", False) else None,
        mean=_three(processor.image_mean) if normalise else None,
        std=_three(processor.image_std) if normalise else None,
        arithmetic="fused",
    )


def _geometry(
    name: str, size: dict[str, int], crop: dict[str, int] | None, crop_pct: float | None
) -> tuple[str, tuple[int, ...], tuple[int, int] | None]:
    """(mode, resize, crop) of a processor's ``size`` and ``crop_size``.

    ConvNeXt's has a rule of its own: below 384 the shortest edge goes to ``size / crop_pct`` and the centre is cut
    out; from 384 on the image is squashed.
    """
    cut = (crop["height"], crop["width"]) if crop else None
    keys = set(size)
    if crop_pct is not None and keys == {"shortest_edge"}:
        n = size["shortest_edge"]
        return ("shortest", (int(n / crop_pct),), (n, n)) if n < 384 else ("squash", (n, n), cut)
    if keys == {"height", "width"}:
        return "squash", (size["height"], size["width"]), cut
    if keys == {"shortest_edge"}:
        return "shortest", (size["shortest_edge"],), cut
    if not keys:
        return "none", (), cut
    raise PreprocessingRefused(f"{name} resizes by {sorted(keys)}; expected height and width, or the shortest edge")


def _three(values: Any) -> tuple[float, float, float]:
    numbers = (values,) * 3 if isinstance(values, (int, float)) else tuple(values)
    if len(numbers) != 3:
        raise PreprocessingRefused(f"normalisation of {len(numbers)} channels; expected the three of an RGB image")
    return float(numbers[0]), float(numbers[1]), float(numbers[2])


def from_transforms(transforms: Any) -> Preprocess:
    """Read a torchvision preset for image classification, as it treats PIL images."""
    if type(transforms).__name__ != "ImageClassification":
        raise PreprocessingRefused(f"torchvision's {type(transforms).__name__} preset is not one for classification")
    (short,), (crop,) = transforms.resize_size, transforms.crop_size
    return Preprocess(
        mode="shortest",
        resize=(short,),
        crop=(crop, crop),
        kernel="pil",
        interpolation=transforms.interpolation.value,
        antialias=True,
        crop_rounding="half even",
        scale=1 / 255,
        mean=_three(transforms.mean),
        std=_three(transforms.std),
        arithmetic="rescale first",
    )


def from_timm(config: dict[str, Any]) -> Preprocess:
    """Read a data config of timm, as its transform for evaluation treats PIL images: ``crop_pct`` is the share of the
    resized image (its shortest edge, or with "squash" both sides) that the crop keeps."""
    _, *size = config["input_size"]
    height, width = (int(side) for side in size)
    whole = tuple(math.floor(side / config["crop_pct"]) for side in (height, width))
    mode = config["crop_mode"]
    if mode not in ("center", "squash") or (mode == "center" and height != width):
        raise PreprocessingRefused(
            f"timm's crop_mode {mode!r} for images of {height}×{width} pixels is not one we can do: only squash, or "
            "center for squares"
        )
    return Preprocess(
        mode="squash" if mode == "squash" else "shortest",
        resize=whole if mode == "squash" else whole[:1],
        crop=None if mode == "squash" and whole == (height, width) else (height, width),
        kernel="pil",
        interpolation=config["interpolation"],
        antialias=True,
        crop_rounding="half even",
        scale=1 / 255,
        mean=_three(config["mean"]),
        std=_three(config["std"]),
        arithmetic="rescale first",
    )


def probe(height: int, width: int) -> np.ndarray:
    """uint8 [H,W,3]: a picture with edges, slopes and detail in every channel, the same on every machine."""
    y, x, c = np.mgrid[0:height, 0:width, 0:3]
    return ((x * 3 + y * 5 + c * 67 + (x * y) % 97 + 120 * ((x // 9 + y // 7) % 2)) % 256).astype(np.uint8)


def check(preprocess: Preprocess, real: Callable[[Image.Image], torch.Tensor], name: str) -> None:
    """Compare with what the library's own processor makes of a small, a wide and a tall picture of odd sizes."""
    from PIL import Image

    height, width = preprocess.size
    for shape in ((37, 53), (height // 2 + 11, width + 55), (height + 75, width // 2 + 10)):
        array = probe(*shape)
        expected = real(Image.fromarray(array))
        image = preprocess.resized(torch.from_numpy(array).permute(2, 0, 1).contiguous())
        got = preprocess.normalised(image[None])[0]
        difference = (got - expected).abs().max().item() if got.shape == expected.shape else float("inf")
        if not difference <= 1e-6:
            raise PreprocessingRefused(
                f"the preprocessing of {name} cannot be reproduced: a {shape[0]}×{shape[1]} image differs by "
                f"{difference:.3g} from what it makes itself; expected at most 1e-6"
            )


def check_processor(preprocess: Preprocess, processor: Any, name: str) -> None:
    """`check` against a transformers image processor."""

    def real(image: Image.Image) -> torch.Tensor:
        pixels = processor(images=image, return_tensors="pt")["pixel_values"]
        return pixels[0]

    check(preprocess, real, name)


def default_processor(kind: str, n: int) -> Any:
    """A family's processor class with its own defaults, but for images of n pixels (resize and crop in their ratio)."""
    import transformers

    cls = getattr(transformers, kind)
    size, crop = dict(cls.size), dict(getattr(cls, "crop_size", None) or {})
    if not getattr(cls, "do_center_crop", None):
        return cls(size=dict.fromkeys(size, n))
    size = {key: round(value * n / crop["height"]) for key, value in size.items()}
    return cls(size=size, crop_size={"height": n, "width": n})


def has_processor(folder: Path) -> bool:
    """Whether a preprocessor_config.json is there, or a processor_config.json that has the image processor in it."""
    if (folder / "preprocessor_config.json").is_file():
        return True
    nested = folder / "processor_config.json"
    return nested.is_file() and "image_processor" in json.loads(nested.read_text(encoding="utf-8"))


def own_processor(folder: Path, title: str) -> Any:
    """The image processor that was saved with a checkpoint; never one that needs code from the repository."""
    import transformers

    try:
        return transformers.AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # bad JSON, unknown classes, settings of wrong types: no common root
        reason = str(error) if len(str(error)) < 200 else f"{str(error)[:200]}…"  # it may list all processors there are
        raise PreprocessingRefused(f"the image processor of {title} cannot be read: {reason}") from error
