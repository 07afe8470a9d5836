"""Text in the CSV files we write, so that no spreadsheet runs it as a formula.

A cell that begins with = + - @ (or their full-width forms), a tab or a line break gets an apostrophe in front, which
spreadsheets take for "this is text". One that is a plain number does not. `text_of` takes it off again; for any text
``text_of(cell(text)) == text``, also for text that begins with apostrophes itself.
"""

from __future__ import annotations

import re
from typing import Any

_FORMULA = re.compile(r"'*[=+\-@\t\r\n＝＋－＠]")
_NUMBER = re.compile(r"'*[+-]?\d+(\.\d+)?([eE][+-]?\d+)?")


def _would_run(text: str) -> bool:
    return _FORMULA.match(text) is not None and _NUMBER.fullmatch(text) is None


def cell(value: Any) -> Any:
    """``value`` as it is written into a CSV; only text changes."""
    return "'" + value if isinstance(value, str) and _would_run(value) else value


def text_of(written: str) -> str:
    """The text that was written as ``written``; what somebody else wrote without an apostrophe stays as it is."""
    return written[1:] if written.startswith("'") and _would_run(written) else written
