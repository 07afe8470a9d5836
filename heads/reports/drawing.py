"""Drawing by matplotlib: two axes or a matrix of counts, as SVG of a page and as PNG of a folder.

All is drawn in one palette, the page's by daylight. In the SVG its colours become variables of the page's style sheet,
so that dark screens and paper are the style sheet's business, and text stays text in the page's font. Without pyplot:
no window, no global state. matplotlib is imported when the first figure is drawn, since training loads none. Lengths
are units of the SVG, about a CSS pixel.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from markupsafe import Markup, escape

SERIES = ("#0072b2", "#d55e00", "#009e73", "#b5559a", "#c08a00", "#3aa0dd", "#5b4bb5", "#7a5230")  # told apart
GREY, INK, FAINT, GRID, HEAT, PAPER = "#9aa1a8", "#1c2024", "#5d656d", "#e9ebed", "#0b5a8f", "#ffffff"
COLOURS = {f"s{i}": colour for i, colour in enumerate(SERIES)} | {
    "grey": GREY, "ink": INK, "faint": FAINT, "grid": GRID, "heat": HEAT, "paper": PAPER
}  # fmt: skip
VARIABLES = {colour: f"var(--{name})" for name, colour in COLOURS.items()}  # of report.css
DASHES = {"guide": (0, (1.2, 2.5)), "mark": (0, (4, 3))}

WIDTH, HEIGHT, SQUARE = 360.0, 270.0, 340.0
LETTER = 7.2  # width of a letter of a name in the widest of the usual fonts (DejaVu Sans, 10.5)
STEPS = (1, 2, 2.5, 5, 10)
NUMBERED = 14  # rows of a matrix up to which every cell has its number
NAMED = 60  # rows up to which each has its name
SHADES = 10


def ticks(low: float, high: float, wanted: int) -> list[float]:
    """Round numbers within low … high."""
    from matplotlib.ticker import MaxNLocator

    room = 1e-9 * (high - low)
    return [float(v) for v in MaxNLocator(wanted, steps=STEPS).tick_values(low, high) if low - room <= v <= high + room]


def plain(value: float, position: Any = None) -> str:
    """A tick, wherever it stands: 0.25, 12, 4,000, 1e-05."""
    if 0 < abs(value) < 1e-3 or abs(value) >= 1e6:
        return re.sub(r"e([+-])0*", lambda sign: "e" + sign[1].strip("+"), f"{value:.0e}")
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value + 0.0:.6g}"


def short(name: str, longest: int = 26) -> str:
    return distinct([name], longest)[0]


def distinct(names: Iterable[str], longest: int = 26) -> list[str]:
    """Short names, no two alike: cut at the end, else in the middle, else at the front, else with their number."""
    choices = []
    for number, name in enumerate(names, 1):
        text = "".join(c if c.isprintable() else "·" for c in name)
        fronts = (longest - 1, longest // 2, 0) if len(text) > longest else ()
        cuts = [f"{text[:front]}…{text[len(text) - (longest - 1 - front) :]}" for front in fronts] or [text]
        choices.append([*cuts, f"{text[: longest - 1 - len(str(number))]}…{number}"])
    count = Counter(cut for cuts in choices for cut in set(cuts))
    return [next((cut for cut in cuts if count[cut] == 1), cuts[-1]) for cuts in choices]


def style_of(number: int) -> str:
    return f"s{number}" if number < len(SERIES) else "grey"


@contextmanager
def _settings() -> Iterator[None]:
    from matplotlib import rc_context

    settings = {"svg.fonttype": "none", "svg.hashsalt": "featurecache", "text.parse_math": False}
    with rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # boxes in a PNG; a page has fonts
        yield


class Plot:
    """Two axes and what is drawn between them. A style is a key of `COLOURS` or `DASHES`; ``hint``: what a mark says
    when pointed at. Ranges that are not given follow from what is drawn: ``y`` at least ``least`` wide, up to ``top``.
    """

    def __init__(
        self, xlabel: str, ylabel: str, *, x: tuple[float, float] | None = None,
        y: tuple[float | None, float | None] = (None, None), least: float = 0.0, top: float | None = None,
        xlog: bool = False, xwhole: bool = False, xticks: Sequence[float] | None = None,
        xformat: Callable[[float, Any], str] = plain, height: float = HEIGHT,
    ) -> None:  # fmt: skip
        from matplotlib.ticker import MaxNLocator, NullLocator

        self._empty(WIDTH, height)
        self._labels, self._y, self._least, self._top = (xlabel, ylabel), y, least, top
        self._xlog, self._xticks = xlog, xticks
        self.axes.margins(0.06)
        self.axes.set_xscale("log" if xlog else "linear")
        if x:
            self.axes.set_xlim(x)
        self.axes.grid(color=GRID, linewidth=1)
        for axis, text, whole in ((self.axes.xaxis, xformat, xwhole), (self.axes.yaxis, plain, False)):
            axis.set_major_locator(MaxNLocator(5, steps=STEPS, integer=whole))
            axis.set_minor_locator(NullLocator())
            axis.set_major_formatter(text)

    def _empty(self, width: float, height: float) -> None:
        from matplotlib.figure import Figure as Canvas

        self.hints: list[str] = []
        self.figure = Canvas(figsize=(width / 72, height / 72), dpi=72)
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.patch.set_visible(False)
        self.axes.set_axisbelow(True)
        self.axes.spines[["left", "top", "right"]].set_visible(False)
        self.axes.spines["bottom"].set(color=FAINT, linewidth=1)
        self.axes.tick_params(left=False, bottom=False, labelsize=10.5, labelcolor=FAINT, pad=4)

    def finish(self) -> None:
        """Ranges, ticks, margins and labels, which follow from what was drawn; once, before it is written."""
        low, high = self.axes.get_ylim()
        room = max(0.0, self._least - (high - low)) / 2
        low, high = low - room, high + room if self._top is None else min(high + room, self._top)
        self.axes.set_ylim(*(end if fixed is None else fixed for end, fixed in zip((low, high), self._y, strict=True)))
        if self._xlog:
            start, end = self.axes.dataLim.intervalx
            room = max((end / start) ** 0.08, 1.25)  # small differences of seconds shall look small
            self.axes.set_xlim(start / room, end * room)
        if self._xticks is not None:
            self.axes.set_xticks(self._xticks)
        elif self._xlog:
            from matplotlib.ticker import LogLocator

            start, end = map(math.log10, self.axes.get_xlim())
            subs = (1,) if math.floor(end) > math.ceil(start) else (1, 2, 5)
            self.axes.xaxis.set_major_locator(LogLocator(subs=subs, numticks=7))
        self._place(max(50.0, 32 + 6 * max(len(plain(v)) for v in self.axes.get_yticks())), 20.0, 12.0, 42.0)

    def _place(self, left: float, right: float, top: float, bottom: float) -> None:
        """The axes within margins, and what they are called outside of them."""
        width, height = self.figure.get_size_inches() * 72
        self.axes.set_position((left / width, bottom / height, 1 - (left + right) / width, 1 - (top + bottom) / height))
        same: dict[str, Any] = {"fontsize": 11, "color": FAINT, "ha": "center"}
        self.figure.text((left + width - right) / 2 / width, 6 / height, self._labels[0], **same)
        same |= {"rotation": 90, "rotation_mode": "anchor"}
        self.figure.text(12 / width, (bottom + height - top) / 2 / height, self._labels[1], **same)

    def line(self, points: Iterable[tuple[float, float]], style: str = "s0", *, thin: bool = False) -> None:
        options: dict[str, Any] = {"linewidth": 0.8, "alpha": 0.45} if thin else {"linewidth": 1.8}
        if style in DASHES:
            options = {"linewidth": 1, "linestyle": DASHES[style]}
        self.axes.plot(*zip(*points, strict=True), color=COLOURS.get(style, FAINT), clip_on=False, **options)

    def dot(
        self, x: float, y: float, style: str = "s0", hint: str = "", *, radius: float = 3.2, ring: bool = False
    ) -> None:
        options = {"mfc": "none", "mew": 2} if ring else {"mew": 0}
        gid = f"hint-{len(self.hints)}" if hint else None
        self.hints += [hint] if hint else []
        self.axes.plot([x], [y], "o", color=COLOURS[style], ms=2 * radius, clip_on=False, gid=gid, **options)

    def bar(self, x: float, low: float | None, high: float | None, style: str = "s0", *, faint: bool = False) -> None:
        """An interval, upright, where there is one."""
        if low is not None and high is not None:
            options: dict[str, Any] = {"linewidth": 1.2, "alpha": 0.4} if faint else {"linewidth": 2, "alpha": 0.75}
            self.axes.plot([x, x], [low, high], COLOURS[style], solid_capstyle="round", clip_on=False, **options)

    def words(self, x: float, y: float, text: str, *, below: bool = False) -> None:
        """Small text above or below a point."""
        place, side = (0, -3 if below else 3), "top" if below else "bottom"
        same: dict[str, Any] = {"ha": "center", "fontsize": 8, "color": FAINT, "textcoords": "offset points"}
        self.axes.annotate(text, (x, y), place, va=side, annotation_clip=False, **same)


class Matrix(Plot):
    """Cells [R, K] shaded by ``share`` and, where there are few, with their ``counts``; names of rows and columns."""

    def __init__(
        self, counts: np.ndarray, share: np.ndarray, rows: Sequence[str], columns: Sequence[str], xlabel: str,
        ylabel: str, cell: tuple[float, float],
    ) -> None:  # fmt: skip
        (height, width), (across, down), named = counts.shape, cell, len(rows) <= NAMED
        rows, columns = (rows, columns) if named else ((), ())
        turned = named and 5.8 * max(len(line) for name in columns for line in name.split("\n")) > across - 2
        left = 26 + LETTER * max(map(len, rows), default=0)
        below = 30 + 5.8 * max(map(len, columns)) if turned else 46.0 if xlabel == "" else 38.0 if named else 26.0
        whole = max(left + across * width + 8, 330.0)
        self._empty(whole, 8 + down * height + below)
        self._labels, self._margins = (xlabel, ylabel), (left, whole - left - across * width, 8.0, below)
        self.axes.set(xlim=(0, width), ylim=(height, 0))
        letters: dict[str, Any] = {"parse_math": False, "fontsize": 10.5 if down >= 11 else 7}
        self.axes.set_yticks(np.arange(len(rows)) + 0.5, rows, **letters)
        letters |= {"rotation": 60, "ha": "right", "va": "center", "rotation_mode": "anchor"} if turned else {}
        self.axes.set_xticks(np.arange(len(columns)) + 0.5, columns, **letters)
        self._shades(share, down)
        if height <= NUMBERED or width <= 4:
            self._numbers(counts, share, 9 if counts.max() >= 1000 or down < 26 else 10.5)

    def finish(self) -> None:
        self._place(*self._margins)

    def _shades(self, share: np.ndarray, down: float) -> None:
        """One line through all cells of a shade, as thick as a row is high: 200 classes are no 40,000 elements."""
        level = np.ceil(share * SHADES - 1e-9).astype(int)
        for step in np.unique(level[level > 0]):
            i, j = np.nonzero(level == step)
            xs = np.stack([j, j + 1, np.full(len(j), np.nan)], axis=1).ravel()
            options: dict[str, Any] = {"alpha": step / SHADES, "linewidth": down, "solid_capstyle": "butt"}
            self.axes.plot(xs, np.repeat(i + 0.5, 3), HEAT, clip_on=False, **options)

    def _numbers(self, counts: np.ndarray, share: np.ndarray, size: float) -> None:
        from matplotlib.text import Text

        same: dict[str, Any] = {"ha": "center", "va": "center_baseline", "transform": self.axes.transData}
        for (i, j), count in np.ndenumerate(counts):
            number = f"{count:,.0f}" if count == round(count) else f"{count:,.1f}"
            colour, alpha = (PAPER, 1) if share[i, j] > 0.55 else (INK, 1) if count else (FAINT, 0.6)
            # not by axes.text: clipping each takes as long as drawing it
            self.figure.add_artist(Text(j + 0.5, i + 0.5, number, fontsize=size, color=colour, alpha=alpha, **same))


@dataclass(frozen=True)
class Figure:
    """A drawing with its title, one sentence that says how to read it, and what its colours mean: (style, words)."""

    title: str
    plot: Plot
    caption: str = ""
    keys: tuple[tuple[str, str], ...] = ()

    def svg(self) -> Markup:
        """An element of a page."""
        text = io.StringIO()
        with _settings():
            self.plot.finish()
            self.plot.figure.patch.set_visible(False)
            self.plot.figure.savefig(text, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Type", "Format")))
        return _page_svg(text.getvalue(), self.title, self.plot.hints)

    def pixels(self, note: str) -> np.ndarray:
        """float [h, w, 4] with title, ``note`` and legend."""
        from matplotlib.image import imread
        from matplotlib.lines import Line2D
        from matplotlib.transforms import Bbox

        figure, data, below = self.plot.figure, io.BytesIO(), 0.0
        with _settings():
            self.plot.finish()
            figure.text(0, 1 + 12 / (figure.get_figheight() * 72), short(self.title, 60), fontsize=11, color=INK)
            figure.text(0, 1, note, fontsize=8, color=FAINT)
            if self.keys:
                styles, names = zip(*self.keys, strict=True)
                lines = [
                    Line2D([], [], color=COLOURS.get(key, SERIES[1]), ls=DASHES.get(key, "-"), lw=1.8) for key in styles
                ]
                columns, below = 1 if max(map(len, names)) > 24 else 2, 12.0
                below += 14 * math.ceil(len(names) / columns)
                place: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "ncols": columns}
                figure.legend(lines, names, frameon=False, fontsize=9, labelcolor=INK, **place)
            width, height = figure.get_size_inches() * 72
            # "tight" would draw the figure once more, to measure it
            extent = Bbox.from_extents(*np.array([-6, -below - 6, width + 6, height + 30]) / 72)
            how: dict[str, Any] = {"dpi": 140, "bbox_inches": extent, "facecolor": PAPER}
            figure.savefig(data, format="png", pil_kwargs={"compress_level": 0}, **how)  # of a file that nobody keeps
        data.seek(0)
        return imread(data)


def save_png(path: Path, figures: Sequence[Figure], note: str = "") -> None:
    """Figures side by side in one file."""
    from matplotlib.image import imsave

    images = [figure.pixels(note) for figure in figures]
    height = max(map(len, images))
    padded = [np.pad(p, ((0, height - len(p)), (0, 24), (0, 0)), constant_values=1.0) for p in images]
    imsave(path, np.concatenate(padded, axis=1))


_TAG = re.compile(r"\s*<(/?)([\w:]+)([^>]*)>\s*")
_ATTRIBUTE = re.compile(r'([\w:-]+)="([^"]*)"')
_NUMBER = re.compile(r"-?\d+\.\d+")


def _page_svg(text: str, title: str, hints: Sequence[str]) -> Markup:
    """matplotlib's SVG without what a page does not need: groups, own styles and fonts, six decimals. Style attributes,
    which the page's policy forbids, become attributes of the element."""
    text = re.sub(r"<(style|clipPath).*?</\1>|<!--.*?-->", "", text[text.index("<svg") :], flags=re.DOTALL)
    prefix = xxhash.xxh3_64_hexdigest(text.encode())[:6]
    closing: list[str] = []

    def clean(match: re.Match[str]) -> str:
        close, name, rest = match.groups()
        if close:
            return closing.pop()
        attributes = dict(_ATTRIBUTE.findall(rest))
        hint = re.fullmatch(r"hint-(\d+)", attributes.get("id", ""))
        beginnings = {
            "svg": f'<svg viewBox="{attributes.get("viewBox")}" role="img" aria-label="{escape(title)}" class="chart"',
            "g": f"<g><title>{escape(hints[int(hint[1])])}</title" if hint else "",
            "defs": "<defs",
        }
        begin = beginnings[name] if name in beginnings else f"<{name}{_attributes(attributes, prefix)}"
        if rest.endswith("/"):
            return f"{begin}/>"
        closing.append(f"</{name}>" if begin else "")
        return f"{begin}>" if begin else ""

    return Markup(_TAG.sub(clean, text).replace("<defs></defs>", ""))


def _attributes(original: dict[str, str], prefix: str) -> str:
    style = dict(part.strip().split(": ", 1) for part in original.pop("style", "").split(";") if part.strip())
    attributes = {key: VARIABLES.get(value, value.removesuffix("px")) for key, value in style.items()}
    attributes.pop("font-family", None)
    for key, value in original.items():
        if key == "id":
            attributes["id"] = prefix + value
        elif key == "xlink:href":
            attributes["href"] = f"#{prefix}{value[1:]}"
        elif key == "d":  # a line from a point to a point needs no letter; circles are small and keep two decimals
            path = " ".join(value.split())
            line = path.replace(" L ", " ").replace("M ", "M")
            attributes["d"] = _rounded(path, 2) if "C" in path else _rounded(line)
        elif key != "clip-path" and not value.startswith("rotate(-0 "):
            attributes[key] = _rounded(value)
    return "".join(f' {key}="{value}"' for key, value in attributes.items())


def _rounded(text: str, digits: int = 1) -> str:
    return _NUMBER.sub(lambda number: f"{float(number[0]):.{digits}f}".rstrip("0").rstrip("."), text)
