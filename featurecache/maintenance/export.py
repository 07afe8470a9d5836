"""Export a view as one plain file that needs neither the cache nor this package: HDF5, npz, Parquet, CSV, safetensors.

.h5            as a view, without its index: `ids`, `labels`, `splits`, ..., the attributes, and each output as a
               real dataset [N, ...]
.npz           the same names as arrays; the attributes as one JSON text in `attributes`
.parquet       a row an image: the columns of `View.table` (`id`, `label`, `class`, `split`, ...), and each vector as
               a fixed-size list of float32 (a float16 is exact in it, and every reader knows it)
.csv           the same columns, and a column a number of each vector: `cls.0`, `cls.1`, ...
.safetensors   features and `labels` as tensors; ids, splits, classes, ... as JSON in the metadata

The file is written beside its place in blocks of rows, through `Sink`, and put there when it is whole: a full disk or a
kill leaves the file that was there, or none. Memory is that of one block and of the columns, however large the view.
"""

from __future__ import annotations

import csv
import io
import json
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from featurecache.errors import BadOption, CannotWrite
from featurecache.files.atomic import AtomicFile, check_room, remove_orphans
from featurecache.files.directory import ALIGNMENT
from featurecache.files.hdf5 import Sink
from featurecache.files.names import check_path
from featurecache.files.records import nan_to_none
from featurecache.formatting import byte_bar, cell
from featurecache.outputs import parse_list
from featurecache.store.schema import Layout, ViewColumns
from featurecache.store.view import View
from featurecache.store.write_view import columns_of, write_columns

BLOCK = 16 << 20  # bytes of features in memory at a time
CHUNK = 1 << 19  # bytes of a compressed chunk: of a vector some hundred rows, of tokens one
_HEADER = 100_000_000  # bytes; safetensors reads no longer header
Advance = Callable[[int], Any]  # told how many bytes of features were written


@dataclass(frozen=True)
class Columns:
    """What is exported: a view, what it says of its samples, and the outputs, stored or derived."""

    view: View
    rows: ViewColumns  # with ``versions`` only where augmented copies are exported too
    outputs: dict[str, Layout]

    @property
    def bytes(self) -> int:
        return sum(len(self.view) * layout.row_bytes for layout in self.outputs.values())

    def blocks(self, names: Sequence[str], advance: Advance, step: int = 0) -> Iterator[tuple[int, list[np.ndarray]]]:
        """(first row, rows [b, ...] of each output) in the order of the view; ``advance`` is told of each that was
        written. ``step``: so many rows at a time, by default `BLOCK` bytes."""
        step = step or max(1, BLOCK // sum(self.outputs[name].row_bytes for name in names))
        for start in range(0, len(self.view), step):
            rows = np.arange(start, min(start + step, len(self.view)))
            blocks = [self.view.array(name, rows) for name in names]
            yield start, blocks
            advance(sum(block.nbytes for block in blocks))

    def text(self) -> dict[str, list[str]]:
        """Columns of text, by the names they have in a view."""
        columns = {"ids": self.rows.ids, "splits": self.rows.splits, "groups": self.rows.groups}
        return {name: column.tolist() for name, column in columns.items() if column is not None}

    def view_attributes(self) -> dict[str, Any]:
        """The attributes of the view; without its copies nothing of how they were made."""
        attributes, copies = self.view.attributes, self.rows.versions is not None
        return {key: attributes[key] for key in attributes if key != "augmentation" or copies}

    def attributes(self) -> dict[str, Any]:
        """Those of the view, and of each output what its tokens are, for formats without attributes of arrays."""
        about = {name: {"prefix": layout.prefix, "grid": layout.grid} for name, layout in self.outputs.items()}
        items = self.view_attributes().items()
        plain = {key: value.item() if isinstance(value, np.generic) else value for key, value in items}
        return {**plain, "outputs": json.dumps(about)}


def write_hdf5(sink: Sink, columns: Columns, compress: bool, advance: Advance) -> None:
    # HDF5 1.8 opens it: MATLAB before R2021b has no later one
    with h5py.File(
        sink, "w", libver=("v108", "v108"), alignment_threshold=CHUNK, alignment_interval=ALIGNMENT
    ) as file:  # fmt: skip
        file.attrs.update(columns.view_attributes())
        write_columns(file, columns.rows)
        for name, layout in columns.outputs.items():
            rows = max(1, min(CHUNK // layout.row_bytes, len(columns.view)))
            packed = {"chunks": (rows, *layout.shape), "compression": "gzip", "shuffle": True} if compress else {}
            features = file.create_dataset(name, (len(columns.view), *layout.shape), layout.dtype, **packed)
            features.attrs.update(layout.attributes())
            step = max(1, BLOCK // (rows * layout.row_bytes)) * rows  # whole chunks: each is compressed once
            for start, (block,) in columns.blocks([name], advance, step):
                features[start : start + len(block)] = block


def write_npz(sink: Sink, columns: Columns, compress: bool, advance: Advance) -> None:
    view, versions = columns.view, columns.rows.versions
    arrays = {"labels": view.labels, "digests": view.digests} | ({} if versions is None else {"versions": versions})
    arrays |= {f"meta/{key}": column for key, column in view.meta.items() if column.dtype != object}
    further = {f"meta/{key}": column.tolist() for key, column in view.meta.items() if column.dtype == object}
    text = {**columns.text(), **further, "classes": view.classes}
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED, compresslevel=6) as file:
        for key, values in text.items():
            # As numpy's own unicode, which needs no pickle; 4 bytes a character, so in stretches.
            dtype = np.dtype(f"<U{max(map(len, values), default=0) or 1}")
            step = max(1, BLOCK // dtype.itemsize)
            parts = (np.array(values[start : start + step], dtype) for start in range(0, len(values), step))
            _write_member(file, key, (len(values),), dtype, parts)
        small = {"attributes": np.array(json.dumps(columns.attributes(), ensure_ascii=False)), **arrays}
        for key, array in small.items():
            _write_member(file, key, array.shape, array.dtype, [array])
        for name, layout in columns.outputs.items():
            blocks = (block for _, (block,) in columns.blocks([name], advance))
            _write_member(file, name, (len(view), *layout.shape), np.dtype(layout.dtype), blocks)


def _write_member(
    archive: zipfile.ZipFile, name: str, shape: tuple[int, ...], dtype: np.dtype[Any], blocks: Iterable[np.ndarray]
) -> None:
    entry = zipfile.ZipInfo(f"{name}.npy")  # without a date: the same view gives the same file
    entry.compress_type = archive.compression
    header = {"descr": dtype.str, "fortran_order": False, "shape": shape}  # without h5py's notes on a dtype
    with archive.open(entry, "w", force_zip64=True) as member:
        np.lib.format.write_array_header_1_0(member, header)
        for block in blocks:
            member.write(np.ascontiguousarray(block).data.cast("B") if block.size else b"")


def write_parquet(sink: Sink, columns: Columns, compress: bool, advance: Advance) -> None:
    import pyarrow
    from pyarrow import parquet

    outputs = columns.outputs
    table, widths = pyarrow.table(columns.view.table()), {name: outputs[name].shape[0] for name in outputs}
    fields = [pyarrow.field(name, pyarrow.list_(pyarrow.float32(), width)) for name, width in widths.items()]
    schema = pyarrow.schema([*table.schema, *fields], {"featurecache": json.dumps(columns.attributes())})
    step = max(1, BLOCK // (4 * sum(widths.values())))
    with parquet.ParquetWriter(sink, schema, compression="zstd" if compress else "none") as writer:
        for start, blocks in columns.blocks([*outputs], advance, step):
            part = table.slice(start, step)
            lists = [pyarrow.FixedSizeListArray.from_arrays(b.astype("f4").ravel(), b.shape[1]) for b in blocks]
            writer.write_table(pyarrow.Table.from_arrays([*part.combine_chunks().columns, *lists], schema=schema))


def write_csv(sink: Sink, columns: Columns, compress: bool, advance: Advance) -> None:
    """Numbers in the fewest digits that read back as the same float32."""
    table, names = columns.view.table(), list(columns.outputs)
    widths = {name: columns.outputs[name].shape[0] for name in names}
    header = [*table, *(f"{name}.{k}" for name in names for k in range(widths[name]))]
    step = max(1, BLOCK // (16 * sum(widths.values())))
    for start, blocks in columns.blocks(names, advance, step):
        text = io.StringIO()
        rows = csv.writer(text, lineterminator="\n")
        if not start:
            rows.writerow(header)
        features = np.concatenate([block.astype("f4") for block in blocks], 1).astype("U").tolist()
        cells = zip(*(column[start : start + step].tolist() for column in table.values()), strict=True)
        rows.writerows([*map(cell, left), *right] for left, right in zip(cells, features, strict=True))
        sink.write(text.getvalue().encode())


def write_safetensors(sink: Sink, columns: Columns, compress: bool, advance: Advance) -> None:
    """Eight bytes with the length of the header, the header (JSON), the tensors one after the other."""
    view, versions = columns.view, columns.rows.versions
    small = {"labels": view.labels} | ({} if versions is None else {"versions": versions})
    tensors = {key: (array.dtype, array.shape, array.nbytes) for key, array in small.items()}
    for name, layout in columns.outputs.items():
        tensors[name] = np.dtype(layout.dtype), (len(view), *layout.shape), len(view) * layout.row_bytes
    order = sorted(tensors, key=lambda name: -tensors[name][0].itemsize)  # so that each begins at a multiple of its own
    header: dict[str, Any] = {"__metadata__": _metadata(columns)}
    end = 0
    for name in order:
        dtype, shape, size = tensors[name]
        header[name] = {"dtype": _SAFE[dtype.str], "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header, ensure_ascii=False, allow_nan=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _HEADER:
        raise BadOption(
            f"the ids and columns of {view.label} are too long for the header of a safetensors file; use .h5."
        )
    sink.write(len(text).to_bytes(8, "little") + text)
    for name in order:
        for _, (block,) in [(0, [small[name]])] if name in small else columns.blocks([name], advance):
            sink.write(np.ascontiguousarray(block).data)


def _metadata(columns: Columns) -> dict[str, str]:
    """Texts only, as the format has it: each column as a JSON list; NaN as null."""
    texts = {key: str(value) for key, value in columns.attributes().items()}
    meta = {key: nan_to_none(column.tolist()) for key, column in columns.view.meta.items()}
    lists = {**columns.text(), "digests": [digest.decode() for digest in columns.view.digests.tolist()], "meta": meta}
    return texts | {key: json.dumps(values, ensure_ascii=False, allow_nan=False) for key, values in lists.items()}


_SAFE = {"<f2": "F16", "<f4": "F32", "<i8": "I64", "<i4": "I32"}
FORMATS: dict[str, tuple[str, Callable[[Sink, Columns, bool, Advance], None]]] = {  # by the ending of the file
    ".h5": ("hdf5", write_hdf5),
    ".hdf5": ("hdf5", write_hdf5),
    ".npz": ("npz", write_npz),
    ".parquet": ("parquet", write_parquet),
    ".csv": ("csv", write_csv),
    ".safetensors": ("safetensors", write_safetensors),
}


def _refuse_format(name: str, columns: Columns, compress: bool) -> None:
    """Raises BadOption for what a format cannot hold."""
    if name in ("safetensors", "csv") and compress:
        raise BadOption(f"{name} has no compression; leave --compress out, or export to .h5 or .npz.")
    if name not in ("parquet", "csv"):
        return
    if name == "parquet":
        try:
            import pyarrow  # noqa: F401
        except ImportError as error:
            raise BadOption("Parquet needs pyarrow: pip install 'featurecache[parquet]', or export to .h5.") from error
    title = {"parquet": "Parquet", "csv": "CSV"}[name]
    for output, layout in columns.outputs.items():
        if len(layout.shape) != 1:
            vectors = [key for key, other in columns.view.outputs.items() if len(other.shape) == 1] or ["mean"]
            raise BadOption(
                f"{title} holds vectors, and {output} is {'×'.join(map(str, layout.shape))} an image: "
                f"--outputs {','.join(vectors)}, or export to .h5, .npz or .safetensors."
            )


@dataclass(frozen=True)
class ExportResult:
    """What an export wrote."""

    path: Path
    format: str
    outputs: tuple[str, ...]
    rows: int
    bytes: int


def export_view(
    view: View,
    file: str | Path,
    *,
    outputs: str | Sequence[str] | None = None,
    compress: bool = False,
    overwrite: bool = False,
    progress: bool = False,
) -> ExportResult:
    """Write ``view`` to one file; the format is that of its ending (`FORMATS`). ``outputs``: those to write, also what
    follows from stored tokens (default: all that the view has). Raises BadOption, NotInCache, CannotWrite."""
    check_path(file, "the file to export to")
    path = Path(file).expanduser()
    if path.suffix.lower() not in FORMATS:
        raise BadOption(f'"{path.name}" has no ending that names a format; there are {", ".join(FORMATS)}.')
    kind, write = FORMATS[path.suffix.lower()]
    names = tuple(output.name for output in parse_list(list(view.outputs) if outputs is None else outputs))
    columns = Columns(view, columns_of(view), {name: view.info(name) for name in names})
    _refuse_format(kind, columns, compress)
    _refuse_place(path, overwrite)
    needed = columns.bytes // 2 if compress else columns.bytes
    check_room(path.absolute().parent, needed, "Choose another disk, or fewer --outputs.")
    remove_orphans(path.parent, path.name)
    try:
        with AtomicFile(path) as draft, Sink(draft) as sink:
            with byte_bar(columns.bytes, "export", progress) as bar:

                def advance(size: int) -> None:
                    sink.check()
                    bar.update(size)

                write(sink, columns, compress, advance)
            sink.check()
            size = sink.size
            draft.truncate(size)
            draft.commit()
    except CannotWrite as error:
        why = os.strerror(error.errno) if error.errno else "it cannot be written"
        raise CannotWrite(
            error.errno, f"cannot write {path}: {why}. What was there before is as it was; the view is untouched."
        ) from error
    return ExportResult(path, kind, names, len(view), size)


def _refuse_place(path: Path, overwrite: bool) -> None:
    if (path.parent / "spec.json").exists() or (path.parent.parent / "spec.json").exists():
        raise BadOption(f"{path.parent} belongs to a cache, where this file would be taken for a part of it.")
    if path.is_dir():
        raise BadOption(f"{path} is a folder; name a file in it.")
    if path.exists() and not overwrite:
        raise BadOption(f"{path} exists; --overwrite replaces it.")
