"""Charts as small pieces of SVG inside a page: no picture files, no script, colours from the page's own style sheet.

Everything that is text comes in through markupsafe and is escaped. Lengths are in units of the drawing, about a CSS
pixel. Colours are classes (``s0`` … ``s7``, ``grey``), so that light, dark and paper are the style sheet's business.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup, escape

WIDTH, HEIGHT = 360.0, 270.0
LEFT, RIGHT, TOP, BOTTOM = 50.0, 16.0, 12.0, 42.0
SERIES = 8  # colours that are told apart; a ninth series is drawn grey

Point = tuple[float, float]


def tag(name: str, *inside: object, **attributes: object) -> Markup:
    """An element; ``class_`` and ``font_size`` become ``class`` and ``font-size``, what is None is left out."""
    given = ((k.rstrip("_").replace("_", "-"), v) for k, v in attributes.items() if v is not None)
    words = "".join(f' {key}="{_value(value)}"' for key, value in given)
    return Markup(f"<{name}{words}>{Markup('').join(escape(part) for part in inside)}</{name}>")


def _value(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(escape(value))


@dataclass(frozen=True)
class Scale:
    """Data ``low`` … ``high`` onto ``start`` … ``end`` of the drawing; ``log``: in powers of ten."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        share = (value - low) / (high - low) if high > low else 0.5
        return self.start + min(max(share, -0.05), 1.05) * (self.end - self.start)

    def ticks(self, wanted: int = 5) -> list[float]:
        return _decades(self.low, self.high) if self.log else _rounds(self.low, self.high, wanted)


def _rounds(low: float, high: float, wanted: int) -> list[float]:
    """Multiples of 1, 2, 2.5 or 5 times a power of ten within low … high."""
    if not high > low:
        return [low]
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * k for k in (1, 2, 2.5, 5, 10) if power * k >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _decades(low: float, high: float) -> list[float]:
    """Powers of ten; where fewer than two lie in the range, 1, 2 and 5 times them."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [10.0**p for p in powers if low * 0.999 <= 10.0**p <= high * 1.001]
    if len(found) < 2:
        found = [k * 10.0**p for p in powers for k in (1, 2, 5) if low * 0.999 <= k * 10.0**p <= high * 1.001]
    return found[:: max(1, math.ceil(len(found) / 6))] or [low]


def around(
    values: Iterable[float], least: float = 0.0, bounds: tuple[float, float] | None = None
) -> tuple[float, float]:
    """A range that shows all values with a margin, at least ``least`` wide, within ``bounds``."""
    found = [v for v in values if math.isfinite(v)] or [0.0, 1.0]
    low, high = min(found), max(found)
    margin = max(0.06 * (high - low), (least - (high - low)) / 2, 1e-9 if high > low else 0.05 * abs(high) or 0.5)
    low, high = low - margin, high + margin
    return (max(low, bounds[0]), min(high, bounds[1])) if bounds else (low, high)


def around_log(values: Iterable[float]) -> tuple[float, float]:
    found = [v for v in values if v > 0 and math.isfinite(v)] or [1.0]
    low, high = min(found), max(found)
    room = max((high / low) ** 0.08, 1.25)
    return low / room, high * room


def line(points: Iterable[Point], style: str = "s0", extra: str = "") -> Markup:
    """A line through drawing coordinates; points closer than half a unit to the last one are dropped."""
    kept: list[Point] = []
    points = list(points)
    for i, (x, y) in enumerate(points):
        if not kept or i == len(points) - 1 or math.hypot(x - kept[-1][0], y - kept[-1][1]) >= 0.5:
            kept.append((x, y))
    if not kept:
        return Markup("")
    words = "L".join(f"{x:.1f} {y:.1f}" for x, y in kept)
    return tag("path", d=f"M{words}", class_=f"line {style} {extra}".strip())


def dot(x: float, y: float, style: str = "s0", title: str = "", radius: float = 3.2, extra: str = "") -> Markup:
    said = [tag("title", title)] if title else []
    return tag("circle", *said, cx=x, cy=y, r=radius, class_=f"dot {style} {extra}".strip())


def stroke(x1: float, y1: float, x2: float, y2: float, style: str) -> Markup:
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=style)


def text(x: float, y: float, words: object, anchor: str = "middle", style: str | None = None, **more: object) -> Markup:
    return tag("text", words, x=x, y=y, text_anchor=anchor, class_=style, **more)


def plain(value: float) -> str:
    """A tick: 0.25, 12, 4,000, 1e-05."""
    if value == 0:
        return "0"
    if abs(value) < 1e-3 or abs(value) >= 1e6:
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.6g}"


@dataclass(frozen=True)
class Figure:
    """A chart with its title, one sentence that says how to read it, and what its colours mean."""

    title: str
    svg: Markup
    caption: str = ""
    keys: tuple[tuple[str, str], ...] = ()  # (style, words)


@dataclass
class Plot:
    """Two axes and what is drawn between them."""

    x: tuple[float, float]
    y: tuple[float, float]
    xlabel: str
    ylabel: str
    xlog: bool = False
    xticks: Sequence[float] | None = None
    xformat: Callable[[float], str] = plain
    yformat: Callable[[float], str] = plain
    width: float = WIDTH
    height: float = HEIGHT
    marks: list[Markup] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.sy = Scale(*self.y, self.height - BOTTOM, TOP)
        longest = max(len(self.yformat(v)) for v in self.sy.ticks())
        self.sx = Scale(*self.x, max(LEFT, 32 + 6 * longest), self.width - RIGHT, self.xlog)

    def at(self, x: float, y: float) -> Point:
        return self.sx(x), self.sy(y)

    def line(self, points: Iterable[Point], style: str = "s0", extra: str = "") -> None:
        self.marks.append(line([self.at(x, y) for x, y in points], style, extra))

    def dot(self, x: float, y: float, style: str = "s0", title: str = "", radius: float = 3.2, extra: str = "") -> None:
        self.marks.append(dot(*self.at(x, y), style, title, radius, extra))

    def band(self, points: Iterable[tuple[float, float, float]], style: str) -> None:
        """The area between two lines: x, low, high."""
        found = list(points)
        edge = [self.at(x, low) for x, low, _ in found] + [self.at(x, high) for x, _, high in reversed(found)]
        words = "L".join(f"{x:.1f} {y:.1f}" for x, y in edge)
        self.marks.append(tag("path", d=f"M{words}z", class_=f"band {style}"))

    def bar(self, x: float, low: float, high: float, style: str = "s0") -> None:
        """An interval, upright."""
        across, (bottom, top) = self.sx(x), (self.sy(low), self.sy(high))
        self.marks.append(tag("path", d=f"M{across:.1f} {bottom:.1f}V{top:.1f}", class_=f"bar {style}"))

    def svg(self, title: str) -> Markup:
        """The drawing; ``title`` is what a screen reader says of it."""
        parts = [*self._grid(), *self.marks, *self._labels()]
        box = f"0 0 {self.width:g} {self.height:g}"
        return tag("svg", *parts, viewBox=box, role="img", aria_label=title, class_="chart")

    def _grid(self) -> list[Markup]:
        left, right, bottom, top = self.sx.start, self.sx.end, self.sy.start, self.sy.end
        parts = [stroke(left, self.sy(v), right, self.sy(v), "grid") for v in self.sy.ticks()]
        parts += [stroke(self.sx(v), bottom, self.sx(v), top, "grid") for v in self._xticks()]
        return [*parts, stroke(left, bottom, right, bottom, "axis")]

    def _xticks(self) -> Sequence[float]:
        return self.sx.ticks() if self.xticks is None else self.xticks

    def _labels(self) -> list[Markup]:
        left, right, bottom, top = self.sx.start, self.sx.end, self.sy.start, self.sy.end
        parts = [text(left - 6, self.sy(v) + 3.5, self.yformat(v), "end", "tick") for v in self.sy.ticks()]
        for value in self._xticks():
            words = self.xformat(value)
            inside = min(self.sx(value), self.width - 3.2 * len(words))  # half of its width; the drawing ends there
            parts.append(text(inside, bottom + 14, words, "middle", "tick"))
        middle = (top + bottom) / 2
        turned = f"rotate(-90 12 {middle:g})"
        parts.append(text((left + right) / 2, self.height - 6, self.xlabel, "middle", "label"))
        return [*parts, text(12.0, middle, self.ylabel, "middle", "label", transform=turned)]


def style_of(number: int) -> str:
    return f"s{number}" if number < SERIES else "grey"


def interval(value: float | None, low: float | None, high: float | None, scale: Scale, mark: float | None) -> Markup:
    """One row of a table: its interval on the scale that all rows share; ``mark``: a line to compare with."""
    parts = [stroke(scale(v), 0, scale(v), 20, "grid") for v in scale.ticks(4)]
    if mark is not None:
        parts.append(stroke(scale(mark), 0, scale(mark), 20, "mark"))
    if low is not None and high is not None:
        parts.append(stroke(scale(low), 10, scale(high), 10, "bar s0"))
    if value is not None:
        parts.append(dot(scale(value), 10.0, "s0"))
    return tag("svg", *parts, viewBox=f"0 0 {scale.start + scale.end:g} 20", class_="interval", aria_hidden="true")


def interval_axis(scale: Scale) -> Markup:
    """The numbers over a column of intervals."""
    parts = [text(scale(v), 9, plain(v), "middle", "tick") for v in scale.ticks(4)]
    return tag("svg", *parts, viewBox=f"0 0 {scale.start + scale.end:g} 12", class_="interval", aria_hidden="true")
