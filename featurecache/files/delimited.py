"""Delimited text, CSV and TSV, as people save it: byte order marks, a ``sep=`` line of Excel, semicolons or tabs.

Every table that is read back goes through ``read_delimited``: lists of images, labels for features, a ``splits.csv``
that somebody has opened in Excel and saved again.
"""

from __future__ import annotations

import codecs
import csv
import re
from pathlib import Path

from featurecache.files.atomic import refuse_special

SIGNS = ",;\t|"
# A byte order mark -> the encoding it stands for; Excel's "Unicode text" is UTF-16.
_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


def read_delimited(file: str | Path, *, strict: bool = False) -> list[tuple[int, list[str]]]:
    """The rows that are not empty, each with the number of its (last) line, the header first. The sign between cells is
    the one a line ``sep=`` in front names, a tab in a ``.tsv``, else the one that the header has most often outside
    quotes. Raises OSError, UnicodeError, csv.Error and, for a pipe, UnsafeFile."""
    refuse_special(file)
    with open(file, "rb") as opened:
        start = opened.read(4)
    encoding = next((name for mark, name in _MARKS.items() if start.startswith(mark)), "utf-8")
    with open(file, encoding=encoding, newline="") as lines:
        header, skipped = lines.readline(), 1
        named = re.fullmatch(r'"?sep=(.)"?\s*', header)
        if not named:
            lines.seek(0)
            skipped = 0
        plain = re.sub(r'"[^"]*"', "", header)
        sign = named[1] if named else "\t" if str(file).lower().endswith(".tsv") else max(SIGNS, key=plain.count)
        reader = csv.reader(lines, delimiter=sign, strict=strict)
        return [(reader.line_num + skipped, row) for row in reader if row]
