"""Amounts for people: bytes, seconds, shapes, aligned lines, and the progress bars that count them."""

from __future__ import annotations

from collections.abc import Iterable

from tqdm import tqdm


def size_text(size: float) -> str:
    """Bytes for people, decimal: 2.8 MB, 0.54 GB."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale or (unit == "GB" and size >= 5e8):
            return f"{size / scale:.3g} {unit}"
    return f"{int(size)} B"


def columns(rows: Iterable[tuple[str, str]], indent: int = 11) -> str:
    """``word       text`` lines; continuation lines of a text are indented like it."""
    lines = []
    for word, text in rows:
        first, *rest = text.splitlines() or [""]
        lines += [f"{word:<{indent}}{first}", *(" " * indent + line for line in rest)]
    return "\n".join(lines)


def shape_text(name: str, shape: tuple[int, ...]) -> str:
    return f"{name} [{'×'.join(map(str, shape))}]"


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def progress_bar(total: int, progress: bool, what: str = "extract") -> tqdm:
    style = "{desc} {percentage:3.0f} % {bar} {n:,}/{total:,}  {rate_fmt}{postfix}  eta {remaining}"
    return tqdm(
        total=total, desc=what, disable=None if progress else True, unit=" img", bar_format=style, leave=False,
        smoothing=0.1, dynamic_ncols=True,
    )  # fmt: skip


def byte_bar(total: int, what: str, progress: bool) -> tqdm:
    """A progress bar over bytes, on stderr; none where that is no terminal."""
    style = "{desc} {percentage:3.0f} % {bar} {n_fmt}/{total_fmt}  {rate_fmt}  eta {remaining}"
    return tqdm(
        total=total, desc=what, disable=None if progress else True, unit="B", unit_scale=True, bar_format=style,
        leave=False, dynamic_ncols=True,
    )  # fmt: skip
