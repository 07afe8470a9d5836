"""Text for people: sizes, durations, shapes, aligned columns, "a, b, … (12)", progress bars, escaping of foreign text.

Foreign text is made harmless for a terminal, and for the spreadsheet that opens a CSV file of ours.

A CSV cell that begins with = + - @ (or their full-width forms), a tab or a line break gets an apostrophe in front,
which spreadsheets take for "this is text". One that is a plain number does not. `text_of` takes it off again; for any
text ``text_of(cell(text)) == text``, also for text that begins with apostrophes itself.
"""

from __future__ import annotations

import contextlib
import csv
import html
import io
import math
import os
import platform
import re
import shlex
import sys
import textwrap
import threading
import time
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextvars import ContextVar
from functools import cache, partial
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm


def milliseconds(value: float) -> str:
    """Three digits: 123, 12.3, 0.0123."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def images_per_second(rate: float) -> str:
    return f"{rate:,.0f} images/s" if rate >= 100 else f"{rate:.3g} images/s"


_FORMULA = re.compile(r"'*[=+\-@\t\r\n＝＋－＠]")
_NUMBER = re.compile(r"'*[+-]?\d+(\.\d+)?([eE][+-]?\d+)?")


def number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def signed(value: float) -> str:
    """+0.012, -0.012; what rounds to zero has no sign."""
    text = f"{value:+.3f}"
    return text[1:] if float(text) == 0 else text


def exact_number(value: float) -> str:
    """The shortest text that reads back as this very number, as a command has to: 0.001, 1e-05, 12, 1234567."""
    return text if float(text := f"{value:g}") == value else str(value).removesuffix(".0")


def counted(n: int, noun: str) -> str:
    """``1 image``, ``2,000 images``."""
    return f"{n:,} {noun}{'s' * (n != 1)}"


def size_text(size: float) -> str:
    """Bytes for people, decimal: 2.8 MB, 0.54 GB."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale or (unit == "GB" and size >= 5e8):
            return f"{size / scale:.3g} {unit}"
    return f"{int(size)} B"


@contextlib.contextmanager
def timed_part(name: str) -> Iterator[None]:
    """Adds what the block takes to the ``PARTS`` of the command that runs, without those inside it."""
    parts = PARTS.get()
    if parts is None:
        yield
        return
    start, before = time.perf_counter(), sum(parts.values())
    try:
        yield
    finally:
        inside = sum(parts.values()) - before
        parts[name] = parts.get(name, 0.0) + time.perf_counter() - start - inside


def parts_line(parts: Mapping[str, float], whole: float) -> str:
    """``imports 1.20 s, backbone 0.02 s, other 0.10 s; 1.32 s in all``."""
    taken = {**parts, "other": whole - sum(parts.values())}
    return ", ".join(f"{name} {seconds:.2f} s" for name, seconds in taken.items()) + f"; {whole:.2f} s in all"


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def shape_text(name: str, shape: tuple[int, ...]) -> str:
    return f"{name} [{'×'.join(map(str, shape))}]"


def columns(rows: Iterable[tuple[str, str]]) -> str:
    """``word       text`` lines; continuation lines of a text are indented like it."""
    return "\n".join(f"{word:<11}" + ("\n" + " " * 11).join(text.splitlines()) for word, text in rows)


def aligned(
    rows: Sequence[Sequence[str]], right: int | Sequence[int] = 1, indent: int = 0, margin: int = 0
) -> list[str]:
    """Lines of columns padded to their widest cell; ``right``: the columns, or all from one on, that end at the same
    place instead of beginning there. The first row is the header, if there is one. ``margin``: of what will stand
    before each line. Where a command writes to a terminal that is too narrow (``TABLE_WIDTH``) the header folds, then
    the texts of the widest column do, or else columns go below the others, each time beside the first."""
    count = max(map(len, rows), default=0)
    ends = set(range(right, count) if isinstance(right, int) else right)
    room = (TABLE_WIDTH.get() or math.inf) - margin - indent
    if _total(_widths(rows)) > room:
        rows = _narrowed(rows, ends, room)
    widths = _widths(rows)
    parts, used = [[0]], math.inf if _total(widths) > room else -math.inf
    for i in range(1, count):
        if used + 2 + widths[i] > room:
            parts, used = [*parts, [0]] if len(parts[-1]) > 1 else parts, widths[0]
        parts[-1].append(i)
        used += 2 + widths[i]
    pads = [f"{'>' if i in ends else '<'}{width}" for i, width in enumerate(widths)]
    tables = [["  ".join(format(row[i], pads[i]) for i in part).rstrip() for row in rows] for part in parts]
    if len(tables) > 1:  # a blank line between them, and none of a header that is folded elsewhere
        tables = [[*[""] * bool(number), *filter(None, table)] for number, table in enumerate(tables)]
    return [" " * indent + line if line else line for table in tables for line in table]


_LEAST, _SHORT = 24, 8  # characters, at least, of a column whose texts or whose header fold
WHOLE_WORDS: Any = {"break_long_words": False, "break_on_hyphens": False}
TABLE_WIDTH: ContextVar[int | None] = ContextVar("columns of the terminal that tables are for", default=None)
PARTS: ContextVar[dict[str, float] | None] = ContextVar("seconds of the parts of a command", default=None)


def _widths(rows: Sequence[Sequence[str]]) -> list[int]:
    return [max(map(len, column)) for column in zip(*rows, strict=True)]


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + 2 * (len(widths) - 1)


def _narrowed(rows: Sequence[Sequence[str]], ends: Set[int], room: float) -> list[Sequence[str]]:
    """Rows with the words of their header and of the widest column of text on several lines, where that is enough."""
    header, body = rows[0], _widths(rows[1:]) if len(rows) > 1 else []
    if body:
        words = [max(map(len, cell.split()), default=0) for cell in header]
        narrow = {i: max(body[i], words[i], _SHORT) for i in ends}
        rows = [*_folded(header, narrow, below=True), *rows[1:]]
    widths = _widths(rows)
    excess = _total(widths) - room
    texts = [i for i in range(len(widths)) if i not in ends]
    prose = max(texts, key=lambda i: widths[i], default=0)
    longest = max(len(word) for row in rows for word in row[prose].split() or [""])
    if excess <= 0 or widths[prose] - excess < max(_LEAST, longest):
        return list(rows)
    return [folded for row in rows for folded in _folded(row, {prose: int(widths[prose] - excess)})]


def _folded(row: Sequence[str], widths: Mapping[int, int], below: bool = False) -> list[Sequence[str]]:
    """A row with the texts of some columns on as many lines as they need, from the first line on or to the last."""
    cells = [textwrap.wrap(cell, widths.get(i, len(cell) + 1), **WHOLE_WORDS) or [""] for i, cell in enumerate(row)]
    count = max(map(len, cells))
    empty = [[""] * (count - len(lines)) for lines in cells]
    return list(zip(*(e + lines if below else lines + e for lines, e in zip(cells, empty, strict=True)), strict=True))


def terminal_width(stream: IO[str]) -> int | None:
    """Columns of the terminal that a stream goes to, $COLUMNS where that is set; None: it goes to no terminal."""
    if not stream.isatty():
        return None
    width = 0  # what a terminal of a container or of `script` says that was never told its size
    with contextlib.suppress(OSError, ValueError):  # a terminal that does not say, a $COLUMNS that is no number
        width = int(os.environ.get("COLUMNS") or 0) or os.get_terminal_size(stream.fileno()).columns
    return width if width > 0 else 80


_COMMAND = re.compile(r"(?:^|: | {2})((?:featurecache|hf|curl) -?[a-zA-Z-]+ .+)$")
_QUANTITY = re.compile(r"(\d) (?=(?:[a-zA-Z]{1,3}|%)(?!\w))")
_LABEL = re.compile(r"error: |(?=.{10} \S)(?:[a-z-]+(?: [a-z\d]+)?  +|[a-z]{10} )")


def fold(text: str, width: int | None) -> str:
    """Lines of at most so many characters, broken between words; what goes on begins below the text of its line, of
    which a label (``view       …``) is no part. A command that ends a line goes on behind a backslash, so that it can
    still be pasted; one with quotes stays as it is."""
    return text if width is None else "\n".join(part for line in text.split("\n") for part in _fold_line(line, width))


def _fold_line(line: str, width: int) -> list[str]:
    command = _COMMAND.search(line)
    if len(line) <= width or (command and set(line) & set("'\"")):
        return [line]
    label = _LABEL.match(line)
    hanging = " " * (len(label[0]) if label else len(line) - len(line.lstrip()))
    if command is None:
        whole = _QUANTITY.sub("\\1\0", line)  # a number and its unit are one word
        lines = textwrap.wrap(whole, width, subsequent_indent=hanging, **WHOLE_WORDS)
        return [each.replace("\0", " ") for each in lines] or [line]
    first, *options = re.split(" (?=--)", line)
    lines = [first]
    for option in options:
        if len(lines[-1]) + len(option) + 3 <= width:
            lines[-1] += f" {option}"
        else:
            lines[-1] += " \\"
            lines.append(" " * (command.start(1) + 2) + option)
    return lines


def html_table(title: str, rows: Sequence[Sequence[str]]) -> str:
    """Rows, the header first, as notebooks show a table; all text is escaped."""
    header, *others = [[html.escape(cell) for cell in row] for row in rows]
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in others)
    head = "".join(f"<th>{cell}</th>" for cell in header)
    return f"<p>{html.escape(title)}</p><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def first_of(rows: Sequence[Sequence[str]], more: str = "more") -> list[str]:
    """The first ten rows of foreign names as indented columns, and how many ``more`` there are."""
    lines = aligned(one_line(rows[:10]), right=2, indent=2)
    return [*lines, f"  … and {len(rows) - 10:,} {more}"] if len(rows) > 10 else lines


def join_names(names: Sequence[str]) -> str:
    """Names as an option takes several, ``a,b``; one with a comma or a quote in it stands in quotes, as in a CSV."""
    line = io.StringIO()
    csv.writer(line).writerow(names)  # whose line end, "\r\n", is what else it quotes
    return line.getvalue().removesuffix("\r\n")


def names_in(text: str) -> list[str]:
    """The names of `join_names` again; spaces around them do not count."""
    with contextlib.suppress(csv.Error):  # a line break outside quotes: no list
        return [name.strip() for name in next(csv.reader([text], skipinitialspace=True), [])]
    return [text]


def abbreviated(words: Iterable[Any], most: int = 5) -> str:
    """``a, b, c`` or ``a, b, c, … (12 in all)``; a set by name."""
    words = sorted(words) if isinstance(words, Set) else list(words)
    shown = ", ".join(str(word) for word in words[:most])
    return shown if len(words) <= most else f"{shown}, … ({len(words):,} in all)"


def harmless(text: str) -> str:
    """Text for a terminal: what would move its cursor, colour it or turn its direction is shown as an escape.

    Line breaks and tabs stay; a name that might bring its own goes through `one_line` where it is put into a line.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        c if c in "\n\t" or is_harmless(c) else c.encode("unicode_escape", "backslashreplace").decode() for c in text
    )


def is_harmless(character: str) -> bool:
    """What is seen as it is: also spaces of other widths, and the joiners that some scripts need to be spelt."""
    return character.isprintable() or unicodedata.category(character) == "Zs" or character in "\u200c\u200d"


def one_line(value: Any) -> Any:
    """Every text in a record without line breaks, tabs and what `harmless` takes out: names cannot make lines."""
    if isinstance(value, str):
        return harmless(value).replace("\n", "\\n").replace("\t", "\\t")
    if isinstance(value, dict):
        return {one_line(key): one_line(part) for key, part in value.items()}
    return [one_line(part) for part in value] if isinstance(value, list | tuple) else value


STANDS_FOR: dict[str, str] = {}  # folder on this machine → the address of which it is a mirror


def with_addresses(text: str) -> str:
    """``text`` with addresses in the place of the folders that stand for them here."""
    for folder, address in STANDS_FOR.items():
        text = text.replace(folder, address)
    return text


def shell_word(word: Any) -> str:
    """A word of a command as a shell reads it back, whatever it holds; a terminal obeys nothing of it."""
    text = str(word)
    if all(map(is_harmless, text)):
        return shlex.quote(text)
    hexadecimal = "".join(
        c if is_harmless(c) and c not in "\\'" else "".join(f"\\x{byte:02x}" for byte in os.fsencode(c)) for c in text
    )
    return f"$'{hexadecimal}'"


def shell_words(words: Iterable[Any]) -> str:
    """A command, or the options of one, to be typed or pasted."""
    return " ".join(map(shell_word, words))


def _would_run(text: str) -> bool:
    return _FORMULA.match(text) is not None and _NUMBER.fullmatch(text) is None


def cell(value: Any) -> Any:
    """``value`` as it is written into a CSV; only text changes."""
    return "'" + value if isinstance(value, str) and _would_run(value) else value


def text_of(written: str) -> str:
    """The text that was written as ``written``; what somebody else wrote without an apostrophe stays as it is."""
    return written[1:] if written.startswith("'") and _would_run(written) else written


_STATUS: list[str] = []  # what stands on stderr's last line and has no end


def show_status(text: str, progress: bool) -> None:
    """A word on stderr, at a terminal, while something takes its time that has no steps. What comes next, a bar or what
    calls `clear_status`, takes its place."""
    if progress and sys.stderr.isatty():
        clear_status()
        _STATUS.append(f"{text} ...")
        print(*_STATUS, end="", file=sys.stderr, flush=True)


def clear_status() -> None:
    for text in _STATUS:
        print(f"\r{' ' * len(text)}\r", end="", file=sys.stderr, flush=True)
    _STATUS.clear()


def progress_bar(total: int, progress: bool, what: str = "extract") -> tqdm:
    """A progress bar over images, on stderr; none where that is no terminal."""
    style = "{n:,}/{total:,}  {rate_fmt}  eta {remaining}{postfix}"
    return _bar(total, what, progress, style, unit=" img", smoothing=0.1)


class _Bar(tqdm):
    """With a lock of this process alone: tqdm's own is shared with every process forked after the first bar, and one
    that is killed while it holds it would stop all others for good."""


_Bar.set_lock(threading.RLock())


def _bar(total: float, what: str, progress: bool, style: str, **options: Any) -> tqdm:
    """What a narrow terminal cuts is the end, behind the eta."""
    clear_status()
    style = "{desc} {percentage:3.0f} % {bar} " + style
    hidden = None if progress else True
    return _Bar(total=total, desc=what, disable=hidden, leave=False, dynamic_ncols=True, bar_format=style, **options)


# The same over bytes; over batches and over pairs of rows, none where they are done in two seconds; over work of
# several kinds, in seconds that were estimated: its eta is by the mean pace so far.
byte_bar = partial(_bar, style="{n_fmt}/{total_fmt}  {rate_fmt}  eta {remaining}", unit="B", unit_scale=True)
batch_bar = partial(_bar, style="{n:,}/{total:,} batches  eta {remaining}", delay=2)
pair_bar = partial(_bar, style="{n_fmt}/{total_fmt} pairs  eta {remaining}", unit_scale=True, delay=2)
work_bar = partial(_bar, style="eta {remaining}{postfix}", smoothing=0)


def cost_per_image(cost: dict[str, Any] | None) -> str:
    """One line for people: ``12.3 ms/image forward (AMD EPYC, 2 threads, fp32), 0.81 ms loading``."""
    if cost is None:
        return "not measured"
    threads = "" if cost["threads"] is None else f", {cost['threads']} thread{'s' if cost['threads'] != 1 else ''}"
    loading = "loading not measured" if cost["loading_ms"] is None else f"{milliseconds(cost['loading_ms'])} ms loading"
    made = f"{cost['device']}{threads}, {cost['precision']}"
    busy = "; other work had the cores, so extract measures it again" if cost["busy"] else ""
    return f"{milliseconds(cost['forward_ms'])} ms/image forward ({made}), {loading}{busy}"


@cache
def device_title(device: Any) -> str:
    """What a person calls it: the name of the GPU, or of the processor."""
    import torch

    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")  # of Linux; other systems tell `platform`
    text = cpuinfo.read_text(encoding="utf-8", errors="replace") if cpuinfo.exists() else ""
    match = re.search(r"^model name[ \t]*:[ \t]*(\S.*)", text, re.MULTILINE)
    name = " ".join(match[1].split()) if match else platform.processor() or platform.machine() or "CPU"
    return name if device.type == "cpu" else f"{name} ({device.type})"
