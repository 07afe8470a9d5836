"""Saliency maps of an image: kinds, values with a shuffled control, and their drawing as PNG overlays.

There are three kinds, and they answer different questions:

    contribution   what a head makes of every place: how far the margin of a class changes when the place is replaced by
                   the mean of training. From tokens and head alone; of a network on pixels by squares of pixels.
    attention      where the backbone looks; the same for every head and class. Of a network on pixels: where it looks.
    grad-cam       which places of a late layer raise the margin, through backbone and head, by their gradients
                   (Selvaraju et al. 2017, arXiv:1610.02391).

The margin of class c is (z_c − mean of the other z) / temperature, of the calibrated logits z: with two classes the
log-odds; of multi-label z_c / temperature. The control of a map is the same map of the same head with the numbers of
every weight tensor shuffled: a map that looks like its control says nothing about what was learned (Adebayo et al.
2018, arXiv:1810.03292).

A contribution is orange for and blue against, attention green, Grad-CAM magenta. Opacity is the size, the strongest of
a map and its control nearly opaque; nothing is smoothed. Drawn without pyplot; matplotlib is imported here only.
"""

from __future__ import annotations

import copy
import io
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from heads.models.vector import KNearest
from heads.runs.run import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

AGAINST = (0, 114, 230)
COLOURS = {"contribution": (230, 97, 0), "attention": (0, 158, 96), "grad-cam": (214, 0, 108)}
STRONGEST = 185  # opacity of the largest value, of 255
SIDE, HEAD, BAR, GAP = 2.6, 0.95, 0.95, 0.2  # inches: a picture, what stands over it, beside, between
LINE, LETTER = 0.14, 0.058  # inches of the small print below: a line of it, a letter
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Panel:
    """The maps of one run over an image, one below the other; each with its control if it has one. ``box``: what of the
    image the network saw, x, y, width, height in parts of it. ``why``: the reason in the maps' place. ``from_pixels``:
    whether the run is of a network that was trained from them."""

    title: str
    box: Box | None = None
    maps: Sequence[SaliencyMap] = ()
    why: str = ""
    from_pixels: bool = False


def rgba(values: np.ndarray, kind: str, largest: float | None = None) -> np.ndarray:
    """uint8 [..., 4] of values [...]; ``largest``: the one that is strongest, by default of these."""
    largest = float(np.abs(values).max()) if largest is None else largest
    share = np.abs(values) / largest if largest > 0 else np.zeros_like(values)
    colour = np.where((values >= 0)[..., None], COLOURS[kind], AGAINST)
    pixels: np.ndarray = np.concatenate([colour, (STRONGEST * share)[..., None]], -1).round().astype(np.uint8)
    return pixels


def small_overlay(values: np.ndarray, kind: str, largest: float) -> bytes:
    """A PNG of [h, w] transparent pixels; ``largest``: the value that is strongest."""
    from PIL import Image

    encoded = io.BytesIO()
    Image.fromarray(rgba(values, kind, largest), "RGBA").save(encoded, "PNG", optimize=True)
    return encoded.getvalue()


def draw_maps(pixels: np.ndarray, kind: str, panels: Sequence[Panel], untrained: bool = False) -> bytes:
    """A PNG: the image, uint8 [H, W, 3], and for every run its maps over it, controls below."""
    from matplotlib.figure import Figure

    rows = max([sum(2 if m.control is not None else 1 for m in p.maps) for p in panels] + [1])
    width = SIDE * min(2.0, max(0.6, pixels.shape[1] / pixels.shape[0]))
    across = width + GAP + len(panels) * (width + BAR) + GAP
    meaning = " · ".join(dict.fromkeys(KINDS[kind][panel.from_pixels] for panel in panels))
    foot = textwrap.wrap(f"{kind}: {meaning}", int((across - 2 * GAP) / LETTER))
    foot += ["untrained backbone: shows the tool, nothing else"] * untrained
    size = (across, rows * (SIDE + HEAD) + LINE * len(foot) + 0.16)
    figure = Figure(figsize=size)
    sheet = _Sheet(figure, size, width, pixels)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # boxes in a title must not end it
        sheet.draw_image(sheet.axes(0, 0), None)
        for column, panel in enumerate(panels, start=1):
            sheet.draw_panel(column, panel)
        figure.text(GAP / size[0], 0.1 / size[1], "\n".join(foot), fontsize=8, color="#606060")
        encoded = io.BytesIO()
        figure.savefig(encoded, format="png", dpi=110)
    return encoded.getvalue()


@dataclass(frozen=True)
class _Sheet:
    """Axes in inches. (matplotlib's own layout engine takes two thirds of the time of such a picture.)"""

    figure: Figure
    size: tuple[float, float]
    width: float  # of a picture
    pixels: np.ndarray  # uint8 [H, W, 3]

    def axes(self, row: int, column: int, bar: bool = False) -> Axes:
        left = GAP + (column * (self.width + BAR) - (BAR - GAP if column else 0))
        bottom, (across, up) = self.size[1] - (row + 1) * (SIDE + HEAD), self.size
        if bar:
            left, bottom, width, height = left + self.width + 0.08, bottom + 0.1 * SIDE, 0.12, 0.8 * SIDE
        else:
            width, height = self.width, SIDE
        return self.figure.add_axes((left / across, bottom / up, width / across, height / up))

    def draw_panel(self, column: int, panel: Panel) -> None:
        if not panel.maps:
            axes = self.axes(0, column)
            axes.set_axis_off()
            axes.set_title(_text(panel.title), fontsize=8)
            axes.text(0.5, 0.5, _wrapped(panel.why, 34), ha="center", va="center", fontsize=7, transform=axes.transAxes)
            return
        rows = count()
        for each in panel.maps:
            title = _text(panel.title) + f"\n{each.small}" if each is panel.maps[0] else each.small
            if text := extra_values_text(each):
                title += "\n" + _wrapped(text, 44)
            self.draw_map(next(rows), column, each.values, each, title, panel.box)
            if each.control is not None:
                like = "" if each.likeness is None else f"\nrank correlation with the map {each.likeness:+.2f}"
                weights = "shuffled weights of its last layer" if panel.from_pixels else "shuffled head weights"
                title = f"control: {weights}{like}".replace("-", "−")
                self.draw_map(next(rows), column, each.control, each, title, panel.box)

    def draw_map(
        self, row: int, column: int, values: np.ndarray, each: SaliencyMap, title: str, box: Box | None
    ) -> None:
        axes, bar, largest = self.axes(row, column), self.axes(row, column, bar=True), each.largest
        self.draw_image(axes, box)
        axes.set_title(title if values.any() else f"{title}\nzero everywhere", fontsize=8)
        x, y, w, h = self.in_pixels(box)
        axes.imshow(rgba(values, each.kind, largest), interpolation="nearest", extent=(x, x + w, y + h, y), zorder=2)
        self.limit(axes)
        if not largest:
            bar.set_axis_off()
            return
        low = -largest if each.signed else 0.0
        ramp = rgba(np.linspace(low, largest, 101)[:, None], each.kind, largest)
        bar.imshow(ramp, origin="lower", aspect="auto", extent=(0, 1, low, largest))
        bar.set_xticks([])
        bar.set_yticks([low, (low + largest) / 2, largest])
        bar.set_yticklabels([f"{v:.2g}".replace("-", "−") for v in bar.get_yticks()])
        bar.yaxis.tick_right()
        bar.tick_params(labelsize=7, length=2)
        bar.set_title(each.unit.replace(" × ", " ×\n"), fontsize=7, loc="left")

    def draw_image(self, axes: Axes, box: Box | None) -> None:
        """The image, whatever of the map lies beyond it (padding), with ``box`` dashed."""
        from matplotlib.patches import Rectangle

        height, width = self.pixels.shape[:2]
        interpolation = "nearest" if max(height, width) < 128 else None
        axes.imshow(self.pixels, extent=(0, width, height, 0), interpolation=interpolation)
        if box is not None and box != (0, 0, 1, 1):
            x, y, w, h = self.in_pixels(box)
            frame = Rectangle((x, y), w, h, fill=False, edgecolor="white", linewidth=0.8, linestyle="--", zorder=3)
            axes.add_patch(frame)
        axes.set_axis_off()
        self.limit(axes)

    def limit(self, axes: Axes) -> None:
        axes.set_xlim(0, self.pixels.shape[1])
        axes.set_ylim(self.pixels.shape[0], 0)

    def in_pixels(self, box: Box | None) -> Box:
        height, width = self.pixels.shape[:2]
        x, y, w, h = box or (0, 0, 1, 1)
        return x * width, y * height, w * width, h * height


def extra_values_text(each: SaliencyMap) -> str:
    """The numbers beside a map: ``class token +0.31, mean tokens everywhere −0.52``."""
    sign = "+" if each.signed else ""
    return ", ".join(f"{name} {part:{sign}.2f}" for name, part in each.beside.items()).replace("-", "−")


def _text(words: str, longest: int = 56) -> str:
    """As matplotlib shall show it: no mathematics, no control characters, no line that runs into what is beside it."""
    lines = ("".join(c if c.isprintable() else "·" for c in line) for line in words.split("\n"))
    shown = (line if len(line) <= longest else line[: longest - 1] + "…" for line in lines)
    return "\n".join(shown).replace("$", r"\$")


def _wrapped(words: str, width: int) -> str:
    return textwrap.fill(_text(words, 400), width)


KINDS: dict[str, tuple[str, str]] = {  # kind -> what it shows of a head on a backbone, of a network from pixels
    "contribution": ("what the head makes of every place", "what the network makes of every place"),
    "attention": (
        "where the backbone looks; the same for every head and class",
        "where the trained network looks; the same for every class",
    ),
    "grad-cam": (
        "places of a late layer that raise the margin, through backbone and head",
        "places of a late layer that raise the margin, through the network",
    ),
}


@dataclass(frozen=True)
class SaliencyMap:
    """Of one image. ``values``: float64 [h, w] over what the network saw. ``beside``: numbers that have no place."""

    kind: str
    how: str
    values: np.ndarray
    unit: str
    signed: bool = True
    beside: dict[str, float] = field(default_factory=dict)
    margin: float | None = None
    adds_up: bool = False  # values and ``beside`` together are the margin
    control: np.ndarray | None = None  # float64 [h, w]
    small: str = ""  # ``how`` in a few words

    @property
    def peak(self) -> tuple[int, int] | None:
        """(row, column), from 0, of the largest value; None where no value is above 0."""
        if self.values.max() <= 0:
            return None
        row, column = np.unravel_index(int(self.values.argmax()), self.values.shape)
        return int(row), int(column)

    @property
    def largest(self) -> float:
        """The largest size in the map and its control, which have one scale."""
        return max(float(np.abs(one).max()) for one in (self.values, self.control) if one is not None)

    @property
    def likeness(self) -> float | None:
        """Spearman's rank correlation of the map and its control; None where one of them is the same everywhere."""
        if self.control is None or min(np.ptp(self.values), np.ptp(self.control)) == 0:
            return None
        from scipy.stats import spearmanr

        return float(spearmanr(self.values.ravel(), self.control.ravel()).statistic)


def with_shuffled_weights(model: nn.Module) -> nn.Module:
    """A copy of a head in which the numbers of every parameter stand in another order; of k-NN the labels."""
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    tensors = [other.labels] if isinstance(other, KNearest) else list(other.parameters())
    with torch.no_grad():
        for tensor in tensors:
            flat = tensor.detach().reshape(-1)
            order = torch.randperm(len(flat), generator=generator).to(flat.device)
            tensor.copy_(flat[order].view_as(tensor))
    return other


def margin_unit(run: Run) -> str:
    return "log-odds" if run.task != "multilabel" and len(run.classes) == 2 else "margin"


def class_margin_weights(classes: np.ndarray, count: int, temperature: float, multilabel: bool) -> torch.Tensor:
    """float32 [n, C]: logits times it are the margins of ``classes`` [n]."""
    rows = torch.zeros(len(classes), count)
    if not multilabel:
        rows += -1 / (count - 1)
    rows[torch.arange(len(classes)), torch.from_numpy(classes)] = 1.0
    return rows / temperature
