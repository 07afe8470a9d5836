"""Delimited text, CSV and TSV, as people save it: byte order marks, a ``sep=`` line of Excel, semicolons, tabs, gzip.

Every table that is read back goes through ``read_delimited``: lists of images, labels for features, a ``splits.csv``
that somebody has opened in Excel and saved again. What gzip or zip has packed is told by its content.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import re
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from featurecache.errors import BadOption

if TYPE_CHECKING:
    import pandas

from featurecache.files.atomic import refuse_special

SIGNS = ",;\t|"
# A byte order mark -> the encoding it stands for; Excel's "Unicode text" is UTF-16.
_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
_MOST = 1 << 31  # bytes of a packed table


def read_delimited(file: str | Path, *, strict: bool = False) -> list[tuple[int, list[str]]]:
    """The rows that are not empty, each with the number of its (last) line, the header first. The sign between cells is
    the one a line ``sep=`` in front names, a tab in a ``.tsv``, else the one that the header has most often outside
    quotes. Raises OSError, UnicodeError, csv.Error and, for a pipe, UnsafeFile."""
    refuse_special(file)
    with open(file, "rb") as opened:
        binary = _unpacked(opened)
        start = binary.read(4)
        binary.seek(0)
        encoding = next((name for mark, name in _MARKS.items() if start.startswith(mark)), "utf-8")
        lines = io.TextIOWrapper(binary, encoding, newline="")
        header = lines.readline()
        named = re.fullmatch(r'"?sep=(.)"?\s*', header)
        if not named:
            lines.seek(0)
        plain, tabs = re.sub(r'"[^"]*"', "", header), ".tsv" in Path(file).suffixes[-2:]
        sign = named[1] if named else "\t" if tabs else max(SIGNS, key=plain.count)
        reader = csv.reader(lines, delimiter=sign, strict=strict)
        return [(reader.line_num + (named is not None), row) for row in reader if row]


def _unpacked(file: IO[bytes]) -> IO[bytes]:
    """The file from its beginning, unpacked where it is a gzip file or a zip of one member. Raises OSError."""
    start = file.read(4)
    file.seek(0)
    try:
        if start.startswith(b"\x1f\x8b"):
            return _whole(gzip.GzipFile(fileobj=file))
        if start == b"PK\3\4":
            with zipfile.ZipFile(file) as archive:
                names = [name for name in archive.namelist() if not name.startswith("__MACOSX/")]
                if len(names) != 1:
                    raise OSError(f"a zip of {len(names):,} files; expected one table in it, so unpack it")
                return _whole(archive.open(names[0]))
    except (EOFError, zlib.error, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise OSError(f"packed, and damaged: {error}") from error
    return file


def _whole(packed: IO[bytes] | gzip.GzipFile) -> IO[bytes]:
    content = packed.read(_MOST + 1)
    if len(content) > _MOST:
        raise OSError(f"more than {_MOST:,} bytes when unpacked; unpack it")
    return io.BytesIO(content)


def data_frame(columns: Mapping[str, Any]) -> pandas.DataFrame:
    """Columns [N] by name as a pandas DataFrame. Raises BadOption without pandas, which nothing else here needs."""
    try:
        import pandas
    except ImportError as error:
        raise BadOption("a DataFrame needs pandas: pip install 'featurecache[pandas]'.") from error
    return pandas.DataFrame(columns)
