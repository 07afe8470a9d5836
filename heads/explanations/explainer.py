"""Saliency maps of one run over images, each with its control; the images of a run read back from their source.

Features of images that are in the view of the run are read from it, found by digest; those of new images go through the
same backbone, precision and rounding as the store has (`featurecache.extraction.canary`). A run on pixels has no
backbone: its own network is asked, by Grad-CAM and by occlusion of squares. Images are read by id, and only the very
ones a run was computed with are shown: in a page small, newly encoded, without metadata.
"""

from __future__ import annotations

import base64
import contextlib
import copy
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from featurecache.errors import BadOption, FeatureCacheError, NotInCache
from featurecache.images.headers import READING, EncodedImage
from featurecache.images.preprocessing import Preprocess
from heads.explanations import contributions
from heads.explanations.maps import SaliencyMap, class_margin_weights, margin_unit, with_shuffled_weights
from heads.explanations.methods import EndToEnd, Transformer, attention_maps, check_extra, grad_cam_maps, layer_of
from heads.inference import store_of
from heads.runs.run import Run, is_pixels, preprocess_of

if TYPE_CHECKING:
    from featurecache.backbones.base import Backbone
    from featurecache.extraction.canary import StoreBackbone
    from featurecache.store.view import View

SQUARES = 14  # squares a side that a network on pixels is occluded with; of images below 112 pixels 8
AT_ONCE = 2**23  # numbers of occluded pixels in memory at once


class Explainer:
    """Maps of one run. ``device``, ``weights``, ``trust_code``: of its backbone or network, as for predict."""

    def __init__(
        self, run: Run, originals: SourceImages, *, device: str = "auto", weights: str | None = None,
        trust_code: bool = False,
    ) -> None:  # fmt: skip
        self.run = run
        self._options: dict[str, Any] = {"device": device, "weights": weights, "trust_code": trust_code}
        self.on_pixels = is_pixels(run)
        self.view = None if self.on_pixels else originals.view(run)

    @property
    def default(self) -> str:
        return "grad-cam" if self.on_pixels else "contribution"

    @property
    def slow(self) -> bool:
        """Whether a contribution costs a forward pass of the head for every token."""
        run = self.run
        return not (self.on_pixels or run.output in ("gap", "mean") or isinstance(run.model, contributions.FAST))

    @cached_property
    def control(self) -> nn.Module:
        """The run's head, of a network on pixels its last linear layer, with shuffled weights."""
        if not self.on_pixels:
            return with_shuffled_weights(self.run.model)
        network = copy.deepcopy(self.run.model)
        name = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)][-1]
        parent, _, own = name.rpartition(".")
        setattr(network.get_submodule(parent), own, with_shuffled_weights(network.get_submodule(name)))
        return network

    def logits(self, images: Sequence[SourceImage]) -> np.ndarray:
        """Calibrated, float64 [n, C]: those that ``predict`` gives."""
        if not self.on_pixels:
            return self.run.logits(self.features(images, self.run.output))
        with self._there(self.run.model) as device:
            return self.run.logits(self._pixels(images), device)

    def maps(
        self, kind: str, images: Sequence[SourceImage], classes: np.ndarray, method: str = "replace"
    ) -> list[list[SaliencyMap]]:
        """The maps of every image, of the margins of ``classes`` [n]. Raises BadOption where this run has no such."""
        if kind == "attention":
            return self._attention(images)
        run, make = self.run, {"contribution": self._contributions, "grad-cam": self._grad_cam}[kind]
        multilabel = run.task == "multilabel"
        toward = class_margin_weights(classes, len(run.classes), run.calibration.temperature, multilabel)
        maps, controls = (make(images, toward, model, method) for model in (run.model, self.control))
        return [[replace(one, control=other.values)] for one, other in zip(maps, controls, strict=True)]

    # --- contribution

    def _contributions(
        self, images: Sequence[SourceImage], toward: torch.Tensor, model: nn.Module, method: str
    ) -> list[SaliencyMap]:
        if self.on_pixels:
            if method != "replace":
                raise BadOption("--method gradient is for heads on tokens; a network on pixels has --method replace.")
            return self._occluded(images, toward, model)
        tokens = self._token_map
        x = self.features(images, tokens.source).float().clone()  # outside inference mode
        if self.run.output == "gap":
            contributions.check_gap(self.run, tokens, x, self.features(images, "gap"))
        mean, description = self._mean if method == "replace" else (None, "")
        return contributions.contribution_maps(self.run, tokens, x, toward, method, mean, description, model)

    @cached_property
    def _token_map(self) -> contributions.TokenMap:
        name = contributions.token_source(self.run)  # before a backbone is loaded for it
        source: Any = self._backbone.backbone if self.view is None else self.view.info(name)
        return contributions.token_map(self.run, source.prefix, source.grid)

    @cached_property
    def _mean(self) -> tuple[torch.Tensor, str]:
        return contributions.mean_training_token(self.run, self._token_map, self.view)

    @torch.no_grad()
    def _occluded(self, images: Sequence[SourceImage], toward: torch.Tensor, model: nn.Module) -> list[SaliencyMap]:
        """Of a network on pixels: squares of them replaced by the colour that normalising makes zero."""
        preprocess, values = preprocess_of(self.run), []
        height, width = preprocess.size
        count = SQUARES if min(height, width) >= 8 * SQUARES else 8
        rows, columns = (np.linspace(0, side, count + 1).round().astype(int) for side in (height, width))
        squares = [(slice(*rows[i : i + 2]), slice(*columns[j : j + 2])) for i, j in np.ndindex(count, count)]
        some = max(1, AT_ONCE // (3 * height * width))
        with self._there(model) as device:
            colour = 255 * torch.tensor(preprocess.mean or (0.0, 0.0, 0.0), device=device).view(3, 1, 1)
            pixels = self._pixels(images).float().to(device)
            for image, way in zip(pixels, toward.to(device), strict=True):
                margin = float((model(image[None]) * way).sum())
                changes: list[float] = []
                for start in range(0, len(squares), some):
                    replaced = squares[start : start + some]
                    copies = image.repeat(len(replaced), 1, 1, 1)
                    for one, (down, across) in zip(copies, replaced, strict=True):
                        one[:, down, across] = colour
                    changes += (margin - (model(copies) * way).sum(1).double()).tolist()
                values.append(np.array(changes).reshape(count, count))
        how = "change of the margin when this square is replaced by the mean colour (occlusion)"
        return [SaliencyMap("contribution", how, each, margin_unit(self.run), small="occlusion") for each in values]

    # --- through a network

    def _attention(self, images: Sequence[SourceImage]) -> list[list[SaliencyMap]]:
        if self.on_pixels:
            own: Any = self.run.model
            with self._there(own) as device:
                pixels = own.preprocess.normalised(self._pixels(images).to(device))
                return attention_maps(Transformer.of_run(self.run.head, own), pixels)
        with self._in_float32(images) as (backbone, pixels):
            return attention_maps(Transformer.of_backbone(backbone), pixels)

    def _grad_cam(
        self, images: Sequence[SourceImage], toward: torch.Tensor, model: nn.Module, _: str
    ) -> list[SaliencyMap]:
        check_extra()
        if self.on_pixels:
            network: Any = model
            first, *patches = network.cam_grid or (0,)
            with self._there(network) as device:
                pixels, layer = self._pixels(images).float().to(device), (network.cam_layer, "output")
                return grad_cam_maps(network, layer, pixels, toward, tuple(patches) or None, first)
        from featurecache.outputs import members

        outputs, scale = members(self.run.output), self.run.standardize
        with self._in_float32(images) as (backbone, pixels):
            if scale.mean is not None and scale.std is not None:
                scale = replace(scale, mean=scale.mean.to(pixels.device), std=scale.std.to(pixels.device))
            whole = EndToEnd(backbone, outputs, scale, model.to(pixels.device))
            try:
                layer = layer_of(backbone, outputs)
                return grad_cam_maps(whole, layer, pixels, toward, backbone.grid, len(backbone.prefix))
            finally:
                model.cpu()

    # --- what they are made of

    def features(self, images: Sequence[SourceImage], output: str) -> torch.Tensor:
        """[n, ...] in the storage dtype: stored rows where the view has them, else through the backbone."""
        from featurecache.outputs import members

        where = self._rows if self.view is not None and self.view.has(output) else {}
        rows = [where.get(image.digest) for image in images]
        new = [image for image, row in zip(images, rows, strict=True) if row is None]
        old = np.array([row for row in rows if row is not None], dtype=np.int64)
        stored = list(self.view.tensor(output, old)) if self.view is not None and len(old) else []
        computed: list[torch.Tensor] = []
        if new:
            features, failed = self._backbone.rows([image.data for image in new], *members(output))
            if failed:
                raise BadOption(f"{new[failed[0][0]].name} cannot be read: {failed[0][1]}.")
            computed = list(features)
        return torch.stack([(computed if row is None else stored).pop(0) for row in rows])

    @cached_property
    def _rows(self) -> dict[bytes, int]:
        assert self.view is not None
        return {bytes(digest): row for row, digest in enumerate(self.view.digests)}

    @contextlib.contextmanager
    def _there(self, network: nn.Module) -> Iterator[str]:
        """A network on pixels, on the device that was asked for; back on the CPU afterwards, where a run's is."""
        from featurecache.extraction.forward import pick_device

        device = str(pick_device(self._options["device"]))
        network.to(device)
        try:
            yield device
        finally:
            network.cpu()

    def _pixels(self, images: Sequence[SourceImage]) -> torch.Tensor:
        """uint8 [n,3,h,w] as a network on pixels sees them."""
        return _resized(preprocess_of(self.run), images)

    @cached_property
    def _backbone(self) -> StoreBackbone:
        from featurecache.extraction.canary import backbone_of

        config = self.run.config
        if "request" not in config["provenance"]:
            raise NotInCache(
                f"{config['view']['label']} was imported, and its backbone is not known: there are maps of images "
                "whose tokens it holds, and no others."
            )
        options = {**self._options, "trust_code": self._options["trust_code"] or self.run.trust_code}
        return backbone_of(store_of(self.run), **options)  # type: ignore[arg-type]

    @contextlib.contextmanager
    def _in_float32(self, images: Sequence[SourceImage]) -> Iterator[tuple[Backbone, torch.Tensor]]:
        """The backbone with the store's weights, computing in float32, and float32 [n,3,h,w] on its device."""
        backbone = self._backbone.backbone
        weight = next(backbone.model.parameters())
        dtype, pixels = weight.dtype, _resized(backbone.preprocess, images).to(weight.device)
        backbone.model.float()
        try:
            yield backbone, backbone.preprocess.normalised(pixels)
        finally:
            backbone.model.to(dtype)


def _resized(preprocess: Preprocess, images: Sequence[SourceImage]) -> torch.Tensor:
    return torch.stack([preprocess.resized(torch.from_numpy(image.pixels).permute(2, 0, 1)) for image in images])


@dataclass(frozen=True)
class SourceImage:
    """``data``: encoded bytes or an array; ``pixels``: uint8 [H, W, 3]; ``digest``: 32 hex digits."""

    name: str
    data: EncodedImage
    pixels: np.ndarray
    digest: bytes


def read_source_image(name: str, data: EncodedImage) -> SourceImage:
    """Raises UnreadableImage."""
    from featurecache.images.decoding import decode, digest

    return SourceImage(name, data, decode(data).permute(1, 2, 0).contiguous().numpy(), digest(data).encode())


class SourceImages:
    """Sources and views of runs, each opened once."""

    def __init__(self) -> None:
        self._dataset, self._view = cache(_reopened), cache(_view_as_it_was)

    def find(self, run: Run, name: str, digest: bytes | None = None) -> SourceImage | str:
        """The very image, or why it cannot be had. ``digest``: what it was when it was computed with."""
        dataset, where = self._dataset(json.dumps(run.config["view"].get("source") or {}, sort_keys=True))
        if isinstance(dataset, str):
            return dataset
        if name not in where:
            return "no longer in the source"
        try:
            image = read_source_image(name, dataset.read(where[name]))
        except (FeatureCacheError, OSError) as error:
            return str(error)
        return image if digest in (None, image.digest) else "changed since it was computed with"

    def view(self, run: Run) -> View | None:
        """The view a run was trained on, as it was; None where it is gone or another."""
        view = self._view(run.config["view"]["path"], run.config["view"].get("fingerprint"))
        return view if view is not None and run.is_of_images_in(view) else None


def _reopened(source: str) -> tuple[Any, dict[str, int]]:
    """The dataset of a source, which is given as JSON, and the rows of its ids; or why there is none."""
    import featurecache.sources

    try:
        dataset = featurecache.sources.reopen(json.loads(source))
        return dataset, {name: i for i, name in enumerate(dataset.ids)}
    except (FeatureCacheError, OSError, KeyError, TypeError):
        return "the source is gone", {}


def _view_as_it_was(path: str, fingerprint: str | None) -> View | None:
    from featurecache.store.remote_cache import local_place
    from featurecache.store.write_view import open_view

    with contextlib.suppress(FeatureCacheError, OSError):
        view = open_view(local_place(path))
        return view if view.fingerprint == fingerprint else None
    return None


SIDE = 320  # pixels of the longer side of what is embedded
TINY = 64  # images up to this side are embedded pixel by pixel


def encode_image(pixels: np.ndarray) -> tuple[str, tuple[int, int]]:
    """(data URI, (width, height)) of uint8 [H, W, 3]: small images as they are, others as JPEG of ``SIDE`` pixels."""
    from PIL import Image

    grey = bool((pixels[..., :1] == pixels).all())
    image = Image.fromarray(pixels[..., 0] if grey else pixels)
    kind, options = ("png", {}) if max(image.size) <= TINY else ("jpeg", {"quality": 82})
    if max(image.size) > SIDE:
        scale = SIDE / max(image.size)
        size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
        image = image.resize(size, Image.Resampling.LANCZOS)
    data = io.BytesIO()
    image.save(data, kind, optimize=True, **options)
    return f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}", image.size


def visible_box(spec: dict[str, Any], pixels: np.ndarray) -> tuple[float, float, float, float] | None:
    """What of an image the backbone saw, in parts of its width and height: x, y, width, height (padding: beyond it);
    None where the spec does not say."""
    try:
        fields = {key: value for key, value in spec["preprocess"].items() if key not in READING}
        preprocess = Preprocess.from_dict(fields)
    except (FeatureCacheError, KeyError, TypeError, AttributeError):  # imported, or a backbone with its own way
        return None
    (height, width), resize = pixels.shape[:2], preprocess.resize
    if preprocess.mode == "squash":
        rows, columns = resize
    else:
        pad = preprocess.mode == "pad"
        shortest = resize[0] / min(height, width) if preprocess.mode == "shortest" else 1.0
        factor = min(resize[0] / height, resize[1] / width) if pad else shortest
        rows, columns = height * factor, width * factor
    seen_height, seen_width = preprocess.size[0] / rows, preprocess.size[1] / columns
    return (1 - seen_width) / 2, (1 - seen_height) / 2, seen_width, seen_height
