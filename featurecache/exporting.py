"""A view as one plain file that needs neither the cache nor this package: HDF5, npz, Parquet or safetensors.

The file is written beside its place in blocks of rows, through `Sink`, and put there when it is whole: a full disk or a
kill leaves the file that was there, or none. Memory is that of one block and of the columns, however large the view.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featurecache import formats
from featurecache.amounts import byte_bar, size_text
from featurecache.errors import BadOption, CannotWrite
from featurecache.files import Draft, Frame, sweep_drafts
from featurecache.outputs import parse
from featurecache.reader import View


@dataclass(frozen=True)
class Exported:
    """What an export wrote."""

    path: Path
    format: str
    outputs: tuple[str, ...]
    rows: int
    bytes: int


class Sink(Frame):
    """A file object that writes through a `Draft`, for writers that must not meet a failed write.

    libhdf5 can take the interpreter down when a write fails at close, and zipfile complains again for every member.
    So a failed write is remembered and looks like a good one; from then on everything is kept in memory (little: the
    writers call `check` after each block, which raises CannotWrite).
    """

    def __init__(self, draft: Draft) -> None:
        super().__init__()
        self._draft = draft
        self._error: CannotWrite | None = None
        self._held: dict[int, bytes] = {}  # what the disk did not take

    def writable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        if self._error is None:
            try:
                self._draft.write(self._position, view)
            except CannotWrite as error:
                self._error = error
        if self._error is not None:
            self._held[self._position] = bytes(view)
        self._position += len(view)
        self.size = max(self.size, self._position)
        return len(view)

    def readinto(self, buffer: Any) -> int:
        """HDF5 reads its own chunk index back."""
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), self.size - self._position))
        found = bytearray(self._draft.read(self._position, count).ljust(count, b"\0"))
        for offset, data in self._held.items():
            start, stop = max(offset, self._position), min(offset + len(data), self._position + count)
            if start < stop:
                found[start - self._position : stop - self._position] = data[start - offset : stop - offset]
        view[:count] = found
        self._position += count
        return count

    def check(self) -> None:
        """Raises CannotWrite when a write failed."""
        if self._error is not None:
            raise self._error


def export_view(
    view: View,
    file: str | Path,
    *,
    outputs: str | Sequence[str] | None = None,
    compress: bool = False,
    overwrite: bool = False,
    progress: bool = False,
) -> Exported:
    """Write ``view`` to one file; the format is that of its ending (``formats.FORMATS``).

    ``outputs``: those to write, also what follows from stored tokens (default: all that the view has).
    Raises BadOption, NotInCache, CannotWrite.
    """
    path = Path(file).expanduser()
    kind = _format_of(path)
    names = _names(outputs) if outputs is not None else tuple(view.outputs)
    columns = formats.Columns.of(view, names)
    formats.FORMATS[kind].refuse(columns, compress)
    _refuse_place(path, overwrite)
    _check_room(path, columns, compress)
    sweep_drafts(path.parent, path.name)
    try:
        with Draft(path) as draft, Sink(draft) as sink:
            with byte_bar(columns.bytes, "export", progress) as bar:
                formats.FORMATS[kind].write(sink, columns, compress, bar.update)
            sink.check()
            size = sink.size
            draft.place(size)
    except CannotWrite as error:
        why = os.strerror(error.errno) if error.errno else "it cannot be written"
        raise CannotWrite(
            error.errno, f"cannot write {path}: {why}. What was there before is as it was; the view is untouched."
        ) from error
    return Exported(path, kind, names, len(view), size)


def _names(outputs: str | Sequence[str]) -> tuple[str, ...]:
    words = outputs.split(",") if isinstance(outputs, str) else outputs
    names = tuple(dict.fromkeys(parse(word.strip()).name for word in words if word.strip()))
    if not names:
        raise BadOption("--outputs names no output.")
    return names


def _format_of(path: Path) -> str:
    for kind, entry in formats.FORMATS.items():
        if path.suffix.lower() in entry.endings:
            return kind
    known = ", ".join(ending for entry in formats.FORMATS.values() for ending in entry.endings)
    raise BadOption(f'"{path.name}" has no ending that names a format; there are {known}.')


def _refuse_place(path: Path, overwrite: bool) -> None:
    if (path.parent / "spec.json").exists() or (path.parent.parent / "spec.json").exists():
        raise BadOption(f"{path.parent} belongs to a cache, where this file would be taken for a part of it.")
    if path.is_dir():
        raise BadOption(f"{path} is a folder; name a file in it.")
    if path.exists() and not overwrite:
        raise BadOption(f"{path} exists; --overwrite replaces it.")


def _check_room(path: Path, columns: formats.Columns, compress: bool) -> None:
    folder = path.absolute().parent
    while not folder.exists():
        folder = folder.parent
    check_room(folder, columns.bytes // 2 if compress else columns.bytes, "Choose another disk, or fewer --outputs.")


def check_room(folder: Path, needed: int, way: str) -> None:
    """Raises CannotWrite when the disk of ``folder`` cannot take ``needed`` bytes more."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise CannotWrite(28, f"{size_text(needed)} are to be written and {folder} has {size_text(free)} free. {way}")
