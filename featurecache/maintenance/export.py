"""Export a view as one plain file that needs neither the cache nor this package: HDF5, npz, Parquet or safetensors.

.h5            as a view, without its index: `ids`, `labels`, `splits`, ..., the attributes, and each output as a
               real dataset [N, ...]
.npz           the same names as arrays; the attributes as one JSON text in `attributes`
.parquet       a row an image: `id`, `label`, `class`, `split`, `group`, `digest`, further columns, and each vector
               as a fixed-size list of float32 (a float16 is exact in it, and every reader knows it)
.safetensors   features and `labels` as tensors; ids, splits, classes, ... as JSON in the metadata

The file is written beside its place in blocks of rows, through `Sink`, and put there when it is whole: a full disk or a
kill leaves the file that was there, or none. Memory is that of one block and of the columns, however large the view.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from featurecache.errors import BadOption, CannotWrite
from featurecache.files.atomic import AtomicFile, check_room, remove_orphans
from featurecache.files.directory import ALIGNMENT
from featurecache.files.hdf5 import Sink
from featurecache.formatting import byte_bar
from featurecache.outputs import parse
from featurecache.store.schema import Layout
from featurecache.store.view import View
from featurecache.store.write_view import columns_of, write_columns

BLOCK = 16 << 20  # bytes of features in memory at a time
CHUNK = 1 << 19  # bytes of a compressed chunk: of a vector some hundred rows, of tokens one
_HEADER = 100_000_000  # bytes; safetensors reads no longer header


@dataclass(frozen=True)
class Columns:
    """What is exported: a view and the names of the outputs, stored or derived."""

    view: View
    outputs: dict[str, Layout]

    @property
    def bytes(self) -> int:
        return sum(len(self.view) * info.row_bytes for info in self.outputs.values())

    def blocks(self, name: str, step: int | None = None) -> Iterator[tuple[int, np.ndarray]]:
        """(first row, rows [b, ...]) in the order of the view."""
        size = step or max(1, BLOCK // self.outputs[name].row_bytes)
        for start in range(0, len(self.view), size):
            yield start, self.view.array(name, np.arange(start, min(start + size, len(self.view))))

    def text(self) -> dict[str, list[str]]:
        """Columns of text, by the names they have in a view."""
        view = self.view
        groups = {} if view.groups is None else {"groups": view.groups}
        return {"ids": view.ids, "splits": view.splits, **groups}

    @property
    def versions(self) -> np.ndarray | None:
        """Only where augmented copies are exported too."""
        return self.view.versions if self.view.with_copies else None

    def view_attributes(self) -> dict[str, Any]:
        """The attributes of the view; without its copies nothing of how they were made."""
        found = self.view.attributes
        return {key: found[key] for key in found if key != "augmentation" or self.versions is not None}

    def attributes(self) -> dict[str, Any]:
        """Those of the view, and of each output what its tokens are, for formats without attributes of arrays."""
        about = {name: {"prefix": info.prefix, "grid": info.grid} for name, info in self.outputs.items()}
        found = self.view_attributes()
        plain = {key: value.item() if isinstance(value, np.generic) else value for key, value in found.items()}
        return {**plain, "outputs": json.dumps(about)}


Advance = Callable[[int], Any]  # told how many bytes of features were written


def write_hdf5(sink: Sink, columns: Columns, compress: bool, advance: Advance) -> None:
    with h5py.File(
        sink, "w", libver=("v110", "v110"), alignment_threshold=CHUNK, alignment_interval=ALIGNMENT
    ) as file:  # fmt: skip
        for key, value in columns.view_attributes().items():
            file.attrs[key] = value
        write_columns(file, columns_of(columns.view))
        for name, info in columns.outputs.items():
            rows = max(1, min(CHUNK // info.row_bytes, len(columns.view)))
            packed = {"chunks": (rows, *info.shape), "compression": "gzip", "shuffle": True} if compress else {}
            features = file.create_dataset(name, (len(columns.view), *info.shape), info.dtype, **packed)
            for key in ("prefix", "grid"):
                if (found := getattr(info, key)) is not None:
                    features.attrs[key] = json.dumps(list(found))
            step = max(1, BLOCK // (rows * info.row_bytes)) * rows  # whole chunks: each is compressed once
            for start, block in columns.blocks(name, step):
                features[start : start + len(block)] = block
                sink.check()
                advance(block.nbytes)


def write_npz(sink: Sink, columns: Columns, compress: bool, advance: Advance) -> None:
    view = columns.view
    how = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    small: dict[str, np.ndarray] = {"labels": view.labels, "digests": view.digests}
    if columns.versions is not None:
        small["versions"] = columns.versions
    text = columns.text()
    for key, column in view.meta.items():
        if column.dtype == object:
            text[f"meta/{key}"] = column.tolist()
        else:
            small[f"meta/{key}"] = column
    text["classes"] = view.classes
    with zipfile.ZipFile(sink, "w", how, compresslevel=6) as archive:
        for key, values in text.items():
            _write_text(archive, key, values)
        _write_member(archive, "attributes", (), np.dtype(f"<U{len(_json(columns))}"), iter([np.array(_json(columns))]))
        for key, array in small.items():
            _write_member(archive, key, array.shape, array.dtype, iter([array]))
        for name, info in columns.outputs.items():
            blocks = _counted(columns.blocks(name), sink, advance)
            _write_member(archive, name, (len(view), *info.shape), np.dtype(info.dtype), blocks)


def _json(columns: Columns) -> str:
    return json.dumps(columns.attributes(), ensure_ascii=False)


def _counted(blocks: Iterator[tuple[int, np.ndarray]], sink: Sink, advance: Advance) -> Iterator[np.ndarray]:
    for _, block in blocks:
        yield block
        sink.check()
        advance(block.nbytes)


def _write_text(archive: zipfile.ZipFile, name: str, values: list[str]) -> None:
    """As numpy's own unicode, which needs no pickle; 4 bytes a character, so in stretches."""
    dtype = np.dtype(f"<U{max(map(len, values), default=0) or 1}")
    step = max(1, BLOCK // dtype.itemsize)
    parts = (np.array(values[start : start + step], dtype) for start in range(0, len(values), step))
    _write_member(archive, name, (len(values),), dtype, parts)


def _write_member(
    archive: zipfile.ZipFile, name: str, shape: tuple[int, ...], dtype: np.dtype[Any], blocks: Iterator[np.ndarray]
) -> None:
    entry = zipfile.ZipInfo(f"{name}.npy")  # without a date: the same view gives the same file
    entry.compress_type = archive.compression
    described = dtype.str  # without the notes that h5py hangs on a dtype
    with archive.open(entry, "w", force_zip64=True) as member:
        np.lib.format.write_array_header_1_0(member, {"descr": described, "fortran_order": False, "shape": shape})
        for block in blocks:
            member.write(np.ascontiguousarray(block).data.cast("B") if block.size else b"")


def write_parquet(sink: Sink, columns: Columns, compress: bool, advance: Advance) -> None:
    import pyarrow
    from pyarrow import parquet

    view, outputs = columns.view, columns.outputs
    table = pyarrow.table(_table_columns(columns))
    fields = [pyarrow.field(name, pyarrow.list_(pyarrow.float32(), info.shape[0])) for name, info in outputs.items()]
    schema = pyarrow.schema([*table.schema, *fields], {"featurecache": json.dumps(columns.attributes())})
    step = max(1, BLOCK // sum(4 * info.shape[0] for info in outputs.values()))
    with parquet.ParquetWriter(sink, schema, compression="zstd" if compress else "none") as writer:
        for start in range(0, len(view), step):
            part = table.slice(start, step)
            blocks = [view.array(name, np.arange(start, start + len(part))) for name in outputs]
            lists = [pyarrow.FixedSizeListArray.from_arrays(b.astype("f4").ravel(), b.shape[1]) for b in blocks]
            writer.write_table(pyarrow.Table.from_arrays([*part.combine_chunks().columns, *lists], schema=schema))
            sink.check()
            advance(sum(block.nbytes for block in blocks))


def _table_columns(columns: Columns) -> dict[str, Any]:
    """Of each image one value a column; a further column whose name is taken is called ``meta.NAME``."""
    import pyarrow

    view = columns.view
    found: dict[str, Any] = {"id": view.ids}
    if view.task == "multilabel":
        flat = np.ascontiguousarray(view.labels, np.float32).ravel()
        found["label"] = pyarrow.FixedSizeListArray.from_arrays(flat, view.labels.shape[1])
    else:
        found["label"] = view.labels
        found["class"] = pyarrow.array([view.classes[k] if k >= 0 else None for k in view.labels], pyarrow.string())
    found |= {"split": view.splits, "digest": [digest.decode() for digest in view.digests.tolist()]}
    if view.groups is not None:
        found["group"] = view.groups
    if columns.versions is not None:
        found["version"] = columns.versions
    taken = {*found, "class", "group", "version", *columns.outputs}
    for key, column in view.meta.items():
        found[f"meta.{key}" if key in taken else key] = column.tolist() if column.dtype == object else column
    return found


def write_safetensors(sink: Sink, columns: Columns, compress: bool, advance: Advance) -> None:
    """Eight bytes with the length of the header, the header (JSON), the tensors one after the other."""
    view = columns.view
    small = {"labels": view.labels} | ({} if columns.versions is None else {"versions": columns.versions})
    tensors = {key: (array.dtype, array.shape, array.nbytes) for key, array in small.items()}
    for name, info in columns.outputs.items():
        tensors[name] = np.dtype(info.dtype), (len(view), *info.shape), len(view) * info.row_bytes
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
        parts = iter([small[name]]) if name in small else _counted(columns.blocks(name), sink, advance)
        for part in parts:
            sink.write(np.ascontiguousarray(part).data)


_SAFE = {"<f2": "F16", "<f4": "F32", "<i8": "I64", "<i4": "I32"}


def _metadata(columns: Columns) -> dict[str, str]:
    """Texts only, as the format has it: each column as a JSON list; NaN as null."""
    view = columns.view
    further = {key: _json_values(column) for key, column in view.meta.items()}
    found = {key: str(value) for key, value in columns.attributes().items()}
    lists = {**columns.text(), "digests": [digest.decode() for digest in view.digests.tolist()], "meta": further}
    return found | {key: json.dumps(values, ensure_ascii=False, allow_nan=False) for key, values in lists.items()}


def _json_values(column: np.ndarray) -> list[Any]:
    values: list[Any] = column.tolist()
    if column.dtype.kind == "f":
        return [value if np.isfinite(value) else None for value in values]
    return values


def refuse_nothing(columns: Columns, compress: bool) -> None:
    """Takes every view, compressed or not."""


def refuse_in_parquet(columns: Columns, compress: bool) -> None:
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise BadOption("Parquet needs pyarrow: pip install 'featurecache[parquet]', or export to .h5.") from error
    for name, info in columns.outputs.items():
        if len(info.shape) != 1:
            vectors = [key for key, other in columns.view.outputs.items() if len(other.shape) == 1] or ["mean"]
            raise BadOption(
                f"Parquet holds vectors, and {name} is {'×'.join(map(str, info.shape))} an image: "
                f"--outputs {','.join(vectors)}, or export to .h5, .npz or .safetensors."
            )


def refuse_in_safetensors(columns: Columns, compress: bool) -> None:
    if compress:
        raise BadOption("safetensors has no compression; leave --compress out, or export to .h5 or .npz.")


@dataclass(frozen=True)
class Format:
    """``refuse`` raises BadOption for what the format cannot hold; ``write`` fills the sink."""

    endings: tuple[str, ...]
    refuse: Callable[[Columns, bool], None]
    write: Callable[[Sink, Columns, bool, Advance], None]


FORMATS: dict[str, Format] = {
    "hdf5": Format((".h5", ".hdf5"), refuse_nothing, write_hdf5),
    "npz": Format((".npz",), refuse_nothing, write_npz),
    "parquet": Format((".parquet",), refuse_in_parquet, write_parquet),
    "safetensors": Format((".safetensors",), refuse_in_safetensors, write_safetensors),
}


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
    path = Path(file).expanduser()
    kind = _format_of(path)
    words = outputs.split(",") if isinstance(outputs, str) else list(view.outputs) if outputs is None else outputs
    names = tuple(dict.fromkeys(parse(word.strip()).name for word in words if word.strip()))
    if not names:
        raise BadOption("--outputs names no output.")
    columns = Columns(view, {name: view.info(name) for name in names})
    FORMATS[kind].refuse(columns, compress)
    _refuse_place(path, overwrite)
    folder = next(place for place in path.absolute().parents if place.exists())
    check_room(folder, columns.bytes // 2 if compress else columns.bytes, "Choose another disk, or fewer --outputs.")
    remove_orphans(path.parent, path.name)
    try:
        with AtomicFile(path) as draft, Sink(draft) as sink:
            with byte_bar(columns.bytes, "export", progress) as bar:
                FORMATS[kind].write(sink, columns, compress, bar.update)
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


def _format_of(path: Path) -> str:
    for kind, entry in FORMATS.items():
        if path.suffix.lower() in entry.endings:
            return kind
    known = ", ".join(ending for entry in FORMATS.values() for ending in entry.endings)
    raise BadOption(f'"{path.name}" has no ending that names a format; there are {known}.')


def _refuse_place(path: Path, overwrite: bool) -> None:
    if (path.parent / "spec.json").exists() or (path.parent.parent / "spec.json").exists():
        raise BadOption(f"{path.parent} belongs to a cache, where this file would be taken for a part of it.")
    if path.is_dir():
        raise BadOption(f"{path} is a folder; name a file in it.")
    if path.exists() and not overwrite:
        raise BadOption(f"{path} exists; --overwrite replaces it.")
