"""A checkpoint's image processor as a `Preprocess`: its settings read, and its pixels compared.

Of transformers, torchvision's presets and timm's data configs. Reading goes by the processor's attributes; what they do
not say (a class with rules of its own) shows in `check_preprocess`, which compares the pixels of probe images and
refuses by name what is not reproduced exactly. What is read here is hashed into fingerprints.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from featurecache.backbones.aliases import Alias
from featurecache.backbones.weights import library_errors
from featurecache.errors import PreprocessingRefused
from featurecache.images.preprocessing import Preprocess

if TYPE_CHECKING:
    from PIL import Image


def from_processor(processor: Any, channels: int = 3, fit: str = "model") -> Preprocess:
    """Read the settings of a transformers image processor of the torchvision backend, for a network of ``channels``.
    ``fit``: one that pads behind its normalisation (SAM's) is read only where images shall be made to fit otherwise.
    """
    from transformers.image_utils import pil_torch_interpolation_mapping

    if channels == 1 and getattr(processor, "do_convert_rgb", False):
        raise PreprocessingRefused(
            "the network takes grey images, of 1 channel, and its processor makes RGB of them; if it was fed grey, "
            'write "do_convert_rgb": false in preprocessor_config.json'
        )
    mode, resize, crop = _geometry(processor, fit)
    resample = getattr(processor, "resample", None)
    interpolation = pil_torch_interpolation_mapping.get(2 if resample is None else resample, resample)
    constants: Any = ((0.0,), (1.0,)) if channels == 1 else (None, None)  # one number each says grey, also unnormalised
    if getattr(processor, "do_normalize", False):
        constants = [_constants(values, channels) for values in (processor.image_mean, processor.image_std)]
    return Preprocess(
        mode=mode,
        resize=resize,
        crop=crop,
        kernel="torchvision",
        interpolation=str(getattr(interpolation, "value", interpolation)),
        antialias=True,
        crop_rounding="down",
        scale=float(processor.rescale_factor) if getattr(processor, "do_rescale", False) else None,
        mean=constants[0],
        std=constants[1],
        arithmetic="fused",
    )


def _geometry(processor: Any, fit: str) -> tuple[str, tuple[int, ...], tuple[int, int] | None]:
    """(mode, resize, crop) of a processor's ``size`` and ``crop_size``.

    ConvNeXt's has a rule of its own: below 384 the shortest edge goes to ``size / crop_pct`` and the centre is cut
    out; from 384 on the image is squashed.
    """
    size = dict(getattr(processor, "size", None) or {}) if getattr(processor, "do_resize", False) else {}
    crop = dict(getattr(processor, "crop_size", None) or {}) if getattr(processor, "do_center_crop", False) else None
    cut = (crop["height"], crop["width"]) if crop else None
    crop_pct, keys = getattr(processor, "crop_pct", None), set(size)
    if crop_pct is not None and keys == {"shortest_edge"}:
        n = size["shortest_edge"]
        return ("shortest", (int(n / crop_pct),), (n, n)) if n < 384 else ("squash", (n, n), cut)
    if keys == {"height", "width"}:
        return "squash", (size["height"], size["width"]), cut
    if keys == {"shortest_edge"}:
        return "shortest", (size["shortest_edge"],), cut
    if not keys:
        return "none", (), cut
    kind, pad = type(processor).__name__, dict(getattr(processor, "pad_size", None) or {})
    if pads_behind(processor) and {*pad.values()} == {*size.values()}:
        if fit != "model":
            return "squash", (pad["height"], pad["width"]), cut
        raise PreprocessingRefused(
            f"{kind} resizes the longest edge to {size['longest_edge']} pixels and pads right and below with what is 0 "
            "behind its normalisation, which is not done here; say --fit squash, or --fit pad (black, all around)"
        )
    raise PreprocessingRefused(f"{kind} resizes by {sorted(keys)}; expected height and width, or the shortest edge")


def pads_behind(processor: Any) -> bool:
    """Whether a processor resizes by the longest edge and pads: squares alone come out as if they were squashed."""
    size = dict(getattr(processor, "size", None) or {})
    return bool({*size} == {"longest_edge"} and processor.do_resize and getattr(processor, "do_pad", False))


def channel_constants(values: Any) -> tuple[float, ...]:
    """A mean or std as numbers, one a channel."""
    return tuple(map(float, (values,) if isinstance(values, int | float) else values))


def _constants(values: Any, channels: int = 3) -> tuple[float, ...]:
    numbers = channel_constants((values,) * channels if isinstance(values, int | float) else values)
    if len(numbers) != channels:
        expected = "the three of an RGB image" if channels == 3 else "the one of the grey images that the network takes"
        raise PreprocessingRefused(f"normalisation of {len(numbers)} channels; expected {expected}")
    return numbers


def from_transforms(transforms: Any) -> Preprocess:
    """Read a torchvision preset for image classification, as it treats PIL images."""
    if type(transforms).__name__ != "ImageClassification":
        raise PreprocessingRefused(f"torchvision's {type(transforms).__name__} preset is not one for classification")
    (short,), (crop,) = transforms.resize_size, transforms.crop_size
    constants = (_constants(transforms.mean), _constants(transforms.std))
    return pil_preprocess("shortest", (short,), (crop, crop), transforms.interpolation.value, *constants)


_PIL: dict[str, Any] = {"kernel": "pil", "antialias": True, "crop_rounding": "half even"}
_PIL |= {"scale": 1 / 255, "arithmetic": "rescale first"}


def pil_preprocess(
    mode: str, resize: tuple[int, ...], crop: tuple[int, int] | None, interpolation: str, mean: Any, std: Any
) -> Preprocess:
    """As torchvision's Resize, CenterCrop, ToTensor and Normalize treat a PIL image."""
    return Preprocess(mode, resize, crop, interpolation=interpolation, mean=mean, std=std, **_PIL)


def from_timm(config: dict[str, Any]) -> Preprocess:
    """Read a data config of timm, as its transform for evaluation treats PIL images: ``crop_pct`` is the share of the
    resized image (its shortest edge, or with "squash" both sides) that the crop keeps."""
    channels, *size = config["input_size"]
    height, width = (int(side) for side in size)
    whole = tuple(math.floor(side / config["crop_pct"]) for side in (height, width))
    mode = config["crop_mode"]
    if mode not in ("center", "squash") or (mode == "center" and height != width):
        raise PreprocessingRefused(
            f"timm's crop_mode {mode!r} for images of {height}×{width} pixels is not one we can do: only squash, or "
            "center for squares"
        )
    crop, constants = (height, width), [_constants(config[key], channels) for key in ("mean", "std")]
    if mode == "squash":
        return pil_preprocess(mode, whole, None if whole == crop else crop, config["interpolation"], *constants)
    return pil_preprocess("shortest", whole[:1], crop, config["interpolation"], *constants)


def probe(height: int, width: int) -> np.ndarray:
    """uint8 [H,W,3]: a picture with edges, slopes and detail in every channel, the same on every machine."""
    y, x, c = np.mgrid[0:height, 0:width, 0:3]
    return ((x * 3 + y * 5 + c * 67 + (x * y) % 97 + 120 * ((x // 9 + y // 7) % 2)) % 256).astype(np.uint8)


def check_preprocess(
    preprocess: Preprocess, real: Callable[[Image.Image], torch.Tensor], name: str, squares: bool = False
) -> None:
    """Compare with what the library's own processor makes of a small, a wide and a tall picture of odd sizes: in
    colour, or for a network of grey images as Pillow's "L" of it. ``squares``: of square ones only."""
    from PIL import Image

    height, width = preprocess.size
    shapes = ((37, 53), (height // 2 + 11, width + 55), (height + 75, width // 2 + 10))
    for shape in ((min(shape), min(shape)) for shape in shapes) if squares else shapes:
        array = probe(*shape)
        with library_errors(f"the preprocessing of {name} fails on an image", PreprocessingRefused):
            expected = real(Image.fromarray(array).convert("L" if preprocess.channels == 1 else "RGB"))
        image = preprocess.resized(torch.from_numpy(array).permute(2, 0, 1).contiguous())
        got = preprocess.normalised(image[None])[0]
        difference = (got - expected).abs().max().item() if got.shape == expected.shape else float("inf")
        if not difference <= 1e-6:
            raise PreprocessingRefused(
                f"the preprocessing of {name} cannot be reproduced: a {shape[0]}×{shape[1]} image differs by "
                f"{difference:.3g} from what it makes itself; expected at most 1e-6"
            )


def check_processor(preprocess: Preprocess, processor: Any, name: str) -> None:
    """`check_preprocess` against a transformers image processor."""
    real = lambda image: processor(images=image, return_tensors="pt")["pixel_values"][0]  # noqa: E731
    check_preprocess(preprocess, real, name, squares=pads_behind(processor))


def choose_processor(
    folder: Path | None, title: str, published: Alias | None, default: tuple[str, int] | None
) -> tuple[Any, str]:
    """(image processor of transformers, where it comes from): the one saved in ``folder``, else that of a published
    alias, else (class, pixels) of a model type, which goes with untrained weights only. Raises PreprocessingRefused."""
    import transformers

    if folder is not None and has_processor(folder):
        return _saved_processor(folder, title), "the checkpoint's own processor"
    if published is not None:
        settings = dict(published.processor)
        processor = getattr(transformers, settings.pop("image_processor_type"))(**settings)
        return processor, "as published with its weights" if published.id else "its own settings"
    if default is not None:
        return default_processor(*default), "the default of its model type"
    raise PreprocessingRefused(
        f"{title} has no preprocessor_config.json, so how its images were prepared is not known; expected "
        "the file that belongs to the weights (processor.save_pretrained writes it)"
    )


def has_processor(folder: Path) -> bool:
    """Whether a preprocessor_config.json is there, or a processor_config.json that has the image processor in it."""
    nested = folder / "processor_config.json"
    return (folder / "preprocessor_config.json").is_file() or (
        nested.is_file() and "image_processor" in json.loads(nested.read_text(encoding="utf-8"))
    )


def _saved_processor(folder: Path, title: str) -> Any:
    """Never one that needs code from the repository."""
    import transformers

    try:
        return transformers.AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # bad JSON, unknown classes, settings of wrong types: no common root
        reason = str(error) if len(str(error)) < 200 else f"{str(error)[:200]}…"  # it may list all processors there are
        raise PreprocessingRefused(f"the image processor of {title} cannot be read: {reason}") from error


def default_processor(kind: str, n: int) -> Any:
    """A family's processor class with its own defaults, but for images of n pixels (resize and crop in their ratio)."""
    import transformers

    cls = getattr(transformers, kind)
    size, crop = dict(cls.size), dict(getattr(cls, "crop_size", None) or {})
    if not getattr(cls, "do_center_crop", None):
        return cls(size=dict.fromkeys(size, n))
    size = {key: round(value * n / crop["height"]) for key, value in size.items()}
    return cls(size=size, crop_size={"height": n, "width": n})
