"""Views: one dataset seen through one store. Written for plain h5py, read by our own reader.

At the root of ``<store>/<view>.h5``: `ids` [N], `labels` [N] int64 (−1 none; multi-label [N,L] float32, NaN unknown),
`splits` [N], `groups` [N] where known, `digests` [N], `meta/*` [N], and one virtual dataset per output over the
shards. `index/files` and `index/<output>` [N,2] say where each row lies; our reader maps the shards by them and never
reads a feature through HDF5.
"""

from __future__ import annotations

import ctypes
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import h5py
import numpy as np
import torch

from featurecache import outputs as _outputs
from featurecache.errors import AmbiguousName, CacheError, NotInCache, UnsafeFile, nearest
from featurecache.files import ALIGNMENT, FORMAT, USER_BLOCK, Draft, Frame, check_inside, new_hdf5, read_checked
from featurecache.shards import DIGEST, TORCH_DTYPE, Layout, Located, map_rows
from featurecache.stores import Store, cache_folder, open_store, stores

MAX_MAPPINGS = 100_000  # virtual mappings of one dataset; 25 kB of memory each in HDF5
_TEXT = h5py.string_dtype("utf-8")
_FILES = np.dtype([("path", "S255"), ("size", "i8"), ("offset", "i8"), ("rows", "i8"), ("hash", "S32")])
TASKS = ("binary", "multiclass", "ordinal", "multilabel", "unlabelled")


@dataclass(frozen=True)
class Rows:
    """What a view says of its samples, in the order of the source."""

    ids: list[str]
    labels: np.ndarray
    splits: list[str]
    digests: np.ndarray
    groups: list[str] | None = None
    meta: dict[str, Any] = field(default_factory=dict)


def write_view(store: Store, name: str, rows: Rows, attributes: dict[str, str], located: dict[Layout, Located]) -> Path:
    """Write ``<store>/<name>.h5`` beside and put it in its place.

    ``located``: for each output where every row lies. Attributes are stored as they are (JSON where structured).
    """
    buffer = io.BytesIO()
    with new_hdf5(buffer) as file:
        for key, value in attributes.items():
            file.attrs[key] = value
        _write_columns(file, rows)
        index = file.create_group("index")
        files: list[tuple[Any, ...]] = []
        for layout, places in located.items():
            assert places.found.all()
            _write_output(file, index, store, layout, places, files)
        index.create_dataset("files", data=np.array(files, _FILES))
    path = store.path / f"{name}.h5"
    with Draft(path) as draft:
        draft.commit(Frame.of(buffer.getvalue()), replace=True)
    return path


def _write_columns(file: h5py.File, rows: Rows) -> None:
    file.create_dataset("ids", data=rows.ids, dtype=_TEXT)
    file.create_dataset("labels", data=rows.labels)
    file.create_dataset("splits", data=rows.splits, dtype=_TEXT)
    file.create_dataset("digests", data=rows.digests, dtype=DIGEST)
    if rows.groups is not None:
        file.create_dataset("groups", data=rows.groups, dtype=_TEXT)
    meta = file.create_group("meta")
    for key, column in rows.meta.items():
        values = np.asarray(column)
        if values.dtype.kind in "biuf":
            meta.create_dataset(key.replace("/", "∕"), data=values)  # a slash would make a group
        else:
            meta.create_dataset(key.replace("/", "∕"), data=[str(value) for value in column], dtype=_TEXT)


def _write_output(
    file: h5py.File, index: h5py.Group, store: Store, layout: Layout, places: Located, files: list[tuple[Any, ...]]
) -> None:
    used = np.unique(places.file)
    number = np.full(len(places.shards), -1, np.int64)
    for k in used:
        shard = places.shards[k]
        number[k] = len(files)
        path = shard.path.relative_to(store.path).as_posix()
        files.append((path.encode(), shard.size, shard.offset, len(shard.digests), shard.hash))
    entry = index.create_dataset(layout.output, data=np.stack([number[places.file], places.row], 1))
    starts = _runs(places)
    virtual = len(starts) <= MAX_MAPPINGS
    if virtual:
        target = _write_virtual(file, layout, places, starts, store)
        for key, value in layout.attributes().items():
            target.attrs[key] = value
    entry.attrs["shape"] = json.dumps(list(layout.row_shape))
    entry.attrs["dtype"] = layout.dtype
    entry.attrs["virtual"] = virtual
    if not virtual:
        entry.attrs["note"] = (
            f"{layout.output} lies in {len(starts):,} pieces, too many for a virtual dataset; featurecache.open_view reads it."
        )
    for key, value in layout.attributes().items():
        entry.attrs[key] = value


def _runs(places: Located) -> np.ndarray:
    """Starts of the stretches of rows that follow each other in one shard."""
    step = (np.diff(places.file) != 0) | (np.diff(places.row) != 1)
    return np.concatenate([[0], np.flatnonzero(step) + 1]) if len(places.file) else np.zeros(0, np.int64)


def _write_virtual(file: h5py.File, layout: Layout, places: Located, starts: np.ndarray, store: Store) -> h5py.Dataset:
    virtual = h5py.VirtualLayout((len(places.file), *layout.row_shape), layout.dtype)
    stops = np.append(starts[1:], len(places.file))
    sources = {
        k: h5py.VirtualSource(
            places.shards[k].path.relative_to(store.path).as_posix(), "features",
            (len(places.shards[k].digests), *layout.row_shape), layout.dtype,
        )
        for k in np.unique(places.file)
    }  # fmt: skip
    for start, stop in zip(starts, stops, strict=True):
        first = places.row[start]
        virtual[start:stop] = sources[places.file[start]][first : first + stop - start]
    return file.create_virtual_dataset(layout.output, virtual, fillvalue=np.nan)  # a lost shard must not read as zeros


@dataclass(frozen=True)
class OutputInfo:
    """Of one output of a view: shape of a row, storage dtype, and of token outputs which rows are what."""

    shape: tuple[int, ...]
    dtype: str
    prefix: tuple[str, ...] | None
    grid: tuple[int, int] | None


@dataclass
class _Stored:
    info: OutputInfo
    index: np.ndarray  # [N,2] int64 (file, row)


class View:
    """A dataset's features, opened for reading. Holds no open file; may be pickled and survives a fork.

    >>> view = featurecache.open_view("vit-in21k/chest")            # doctest: +SKIP
    >>> view.tensor("cls", rows=view.splits_are("train"))           # doctest: +SKIP
    """

    def __init__(self, path: Path, *, columns_only: bool = False) -> None:
        """``columns_only``: ids, labels, names of outputs; the shards may be missing and are not looked at."""
        self.path = path
        self.name = path.stem
        self.store = path.parent
        store = open_store(self.store)
        self.spec: dict[str, Any] = store.spec.to_dict()
        self.provenance = store.provenance
        self.untrained = store.spec.untrained
        with h5py.File(io.BytesIO(read_checked(path)), "r") as file:
            check_inside(file, path, virtual=True)
            try:
                self._read(file)
            except (KeyError, ValueError, TypeError, OSError) as error:
                raise CacheError(f"{path} is not a view as featurecache writes them: {error}.") from error
        if self.fingerprint != store.fingerprint:
            raise CacheError(
                f"{path} belongs to the store {self.fingerprint}, but lies in that of {store.fingerprint}."
            )
        self._maps: dict[str, _Mapped] = {}
        self._checked = False
        if not columns_only:
            self._check()

    def _read(self, file: h5py.File) -> None:
        attrs = file.attrs
        if attrs["format_version"] != FORMAT:
            raise CacheError(f"{self.path} has format {attrs['format_version']}; this featurecache reads {FORMAT}.")
        self.fingerprint = str(attrs["fingerprint"])
        self.classes: list[str] = json.loads(attrs["classes"])
        self.task = str(attrs["task"])
        self.source: dict[str, Any] = json.loads(attrs["source"])
        self.failed: list[dict[str, str]] = [{"id": i, "reason": r} for i, r in json.loads(attrs["failed"])]
        self.ids: list[str] = file["ids"].asstr()[...].tolist()
        self.labels: np.ndarray = file["labels"][...]
        self.splits: list[str] = file["splits"].asstr()[...].tolist()
        self.groups: list[str] | None = file["groups"].asstr()[...].tolist() if "groups" in file else None
        self.digests: np.ndarray = file["digests"][...]
        self.versions: np.ndarray | None = file["versions"][...] if "versions" in file else None
        self.meta = {key: _column(column) for key, column in file["meta"].items()}
        self._files = file["index/files"][...]
        self._stored = {key: _read_output(entry) for key, entry in file["index"].items() if key != "files"}
        if self.task not in TASKS or not all(len(s.index) == len(self.ids) for s in self._stored.values()):
            raise CacheError(f"{self.path}: its columns do not agree with each other.")

    def _check(self) -> None:
        if not self._checked:
            self._check_files()
            self._check_index()
            self._checked = True

    def _check_files(self) -> None:
        for entry in self._files:
            path = PurePosixPath(entry["path"].decode())
            if path.is_absolute() or ".." in path.parts or len(path.parts) != 2:
                raise UnsafeFile(f"{self.path} refers to {path}, outside its store.")
        for number in range(len(self._files)):
            path, size = self._file(number)
            found = path.stat().st_size if path.is_file() else None
            if found != size:
                what = "is missing" if found is None else f"has {found:,} bytes, not {size:,}"
                raise CacheError(
                    f"{path}, which the view {self.label} needs, {what}. Run its extraction again: it computes what is not there."
                )

    def _check_index(self) -> None:
        """Every row lies inside its file: the gather trusts these numbers with addresses."""
        files = self._files
        for name, stored in self._stored.items():
            file, row = stored.index[:, 0], stored.index[:, 1]
            shape, itemsize = stored.info.shape, np.dtype(stored.info.dtype).itemsize
            fine = all(0 < side < 1 << 32 for side in shape) and ((0 <= file) & (file < len(files))).all()
            if fine and len(file):
                row_bytes = math.prod(shape) * itemsize
                last = [int(o) + int(n) * row_bytes for o, n in zip(files["offset"], files["rows"], strict=True)]
                inside = np.array([end <= size for end, size in zip(last, files["size"].tolist(), strict=True)])
                placed = (files["offset"] >= USER_BLOCK) & (files["offset"] % ALIGNMENT == 0) & (files["rows"] > 0)
                fine = ((0 <= row) & (row < files["rows"][file])).all() and (inside & placed)[np.unique(file)].all()
            if not fine:
                raise UnsafeFile(f"{self.path}: its index of {name} points outside the shards.")

    def _file(self, number: int) -> tuple[Path, int]:
        entry = self._files[number]
        return self.store / entry["path"].decode(), int(entry["size"])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        kept = ", ".join(f"{name} {list(info.shape)}" for name, info in self.outputs.items())
        return f"<View {self.label}: {len(self):,} × ({kept})>"

    @property
    def label(self) -> str:
        """``store/view`` as people type it."""
        return f"{self.provenance.get('backbone', self.store.name)}/{self.name}"

    @property
    def outputs(self) -> dict[str, OutputInfo]:
        return {name: stored.info for name, stored in self._stored.items()}

    def split(self, name: str) -> np.ndarray:
        """Rows of a split ("train", "val", "test", ""), in order."""
        return np.flatnonzero(np.array(self.splits) == name)

    def has(self, output: str) -> bool:
        """Stored here, or a function of tokens stored here."""
        return output in self._stored or _outputs.parse(output).source in self._stored

    def info(self, output: str) -> OutputInfo:
        """Raises NotInCache when it is neither stored nor derivable, with the command that stores it."""
        if output in self._stored:
            return self._stored[output].info
        parsed, tokens = self._derivation(output)
        assert tokens.prefix is not None and tokens.grid is not None
        prefix, grid = parsed.layout(tokens.prefix, tokens.grid) or (None, None)
        shape = parsed.row_shape((tokens.shape[0], tokens.shape[1]), len(tokens.prefix))
        return OutputInfo(shape, tokens.dtype, prefix, grid)

    def _derivation(self, output: str) -> tuple[_outputs.Output, OutputInfo]:
        parsed = _outputs.parse(output)
        if parsed.source not in self._stored:
            command = self.extract_command(parsed.name if not parsed.derived or parsed.size == () else parsed.source)
            raise NotInCache(f"{self.label} holds {', '.join(self._stored)}, not {output}. Store it with: {command}")
        tokens = self._stored[parsed.source].info
        if parsed.base == "cls" and "cls" not in (tokens.prefix or ()):
            raise NotInCache(f"{self.label} has no class token: its tokens begin with {list(tokens.prefix or ())}.")
        return parsed, tokens

    def extract_command(self, output: str) -> str:
        """The command line that adds ``output`` to this view."""
        request = self.provenance.get("request", {})
        words = ["featurecache extract --backbone", str(request.get("name", self.provenance.get("backbone")))]
        if request.get("random_weights"):
            words.append("--random-weights")
        words += ["--weights", str(request["weights"])] if request.get("weights") else []
        words += ["--data", str(self.source.get("data", "DATA")), "--outputs", output, "--name", self.name]
        return " ".join(words)

    def tensor(self, output: str, rows: Any = None) -> torch.Tensor:
        """Rows of an output in memory, [n, ...] in the storage dtype, in the order asked; all rows by default."""
        picked = self._rows(rows)
        if output in self._stored:
            return self.take(output, picked)
        parsed, tokens = self._derivation(output)
        assert tokens.prefix is not None and tokens.grid is not None
        result = torch.empty((len(picked), *self.info(output).shape), dtype=TORCH_DTYPE[tokens.dtype])
        for start in range(0, len(picked), 256):
            stretch = self.take(parsed.source, picked[start : start + 256])
            result[start : start + 256] = _outputs.derive(parsed, stretch, len(tokens.prefix), tokens.grid)
        return result

    def array(self, output: str, rows: Any = None) -> np.ndarray:
        """`tensor` as numpy, float16 or float32."""
        return self.tensor(output, rows).numpy()

    def take(self, output: str, rows: Any, out: torch.Tensor | None = None) -> torch.Tensor:
        """Rows of a *stored* output, [n, ...], in the order asked, at the speed of memory; ``out`` is filled when given."""
        stored = self._stored[output]
        self._check()
        if output not in self._maps:
            self._maps[output] = _Mapped(self, stored)
        return self._maps[output].take(stored.index[self._rows(rows)], out)

    def _map(self, number: int, info: OutputInfo) -> torch.Tensor:
        path, size = self._file(number)
        entry = self._files[number]
        return map_rows(path, size, int(entry["offset"]), int(entry["rows"]), info.shape, info.dtype)

    def _rows(self, rows: Any) -> np.ndarray:
        if rows is None:
            return np.arange(len(self))
        picked = np.asarray(rows)
        picked = np.flatnonzero(picked) if picked.dtype == bool else picked.astype(np.int64, copy=False)
        if len(picked) and not (0 <= picked.min() and picked.max() < len(self)):
            raise IndexError(f"{self.label} has rows 0 to {len(self) - 1}; asked for {picked.min()} to {picked.max()}.")
        return picked


class _Mapped:
    """All shards of one output as one tensor, whose rows begin wherever the mapped files lie in memory.

    A gather over many shards would be one index_select for each, and a second copy to put the rows in order. Instead
    the address range from the first mapping to the last is taken as one buffer, [M, ...] with overlapping rows a
    common divisor of all row addresses apart; one parallel index_select then reads any rows of any shards in the
    order asked. Of the range only rows of shards are ever touched.
    """

    def __init__(self, view: View, stored: _Stored) -> None:
        self._info = stored.info
        used = np.unique(stored.index[:, 0])
        self._shards = {int(number): view._map(int(number), stored.info) for number in used}  # keeps them mapped
        self._bytes = int(np.prod(stored.info.shape)) * np.dtype(stored.info.dtype).itemsize
        self._unit = math.gcd(ALIGNMENT, self._bytes)
        starts = {number: rows.data_ptr() for number, rows in self._shards.items()}
        first = min(starts.values(), default=0)
        self._start = np.zeros(max(starts, default=0) + 1, np.int64)  # by file, in units
        for number, address in starts.items():
            assert (address - first) % self._unit == 0
            self._start[number] = (address - first) // self._unit
        span = max((rows.data_ptr() + rows.numel() * rows.itemsize for rows in self._shards.values()), default=0) - first
        self._buffer = self._over(first, span)

    def _over(self, first: int, span: int) -> torch.Tensor:
        dtype, shape = TORCH_DTYPE[self._info.dtype], self._info.shape
        if not span:
            return torch.empty((0, *shape), dtype=dtype)
        memory = torch.frombuffer((ctypes.c_byte * span).from_address(first), dtype=dtype)
        inner = torch.empty(shape, dtype=dtype, device="meta").stride()
        count = (span - self._bytes) // self._unit + 1
        return memory.as_strided((count, *shape), (self._unit // dtype.itemsize, *inner))

    def take(self, places: np.ndarray, out: torch.Tensor | None) -> torch.Tensor:
        """places [n,2] (file, row) → [n, ...]."""
        index = torch.from_numpy(self._start[places[:, 0]] + places[:, 1] * (self._bytes // self._unit))
        if out is None:
            out = torch.empty((len(places), *self._info.shape), dtype=self._buffer.dtype)
        assert out.shape == (len(places), *self._info.shape) and out.dtype == self._buffer.dtype
        return torch.index_select(self._buffer, 0, index, out=out) if len(places) else out


def _column(column: h5py.Dataset) -> np.ndarray:
    return column.asstr()[...].astype(object) if h5py.check_string_dtype(column.dtype) else column[...]


def _read_output(entry: h5py.Dataset) -> _Stored:
    attrs = entry.attrs
    prefix = tuple(json.loads(attrs["prefix"])) if "prefix" in attrs else None
    grid = tuple(json.loads(attrs["grid"])) if "grid" in attrs else None
    dtype = str(attrs["dtype"])
    if dtype not in TORCH_DTYPE:
        raise ValueError(f"storage dtype {dtype}")
    return _Stored(OutputInfo(tuple(json.loads(attrs["shape"])), dtype, prefix, grid), entry[...])  # type: ignore[arg-type]


def open_view(name: str | Path | None = None, cache: str | Path | None = None) -> View:
    """Open a view by path, ``store/view``, or name; without a name the one of the last extraction that finished.

    A store may be named by its folder or by its backbone. Raises NotInCache, AmbiguousName.
    """
    return View(find_view(name, cache))


def find_view(name: str | Path | None = None, cache: str | Path | None = None) -> Path:
    if name is not None and Path(name).suffix == ".h5" and Path(name).is_file():
        return Path(name)
    folder = cache_folder(cache)
    found = [(store, path) for store in stores(folder) for path in store.views()]
    if not found:
        raise NotInCache(
            f"there is no view in {folder}. Make one with: featurecache extract --backbone NAME --data FOLDER"
        )
    if name is None:
        return max(found, key=lambda item: item[1].stat().st_mtime_ns)[1]
    store_word, _, view_word = str(name).rpartition("/")
    hits = [(s, p) for s, p in found if p.stem == view_word and _is_called(s, store_word)]
    if len(hits) == 1:
        return hits[0][1]
    if not hits:
        known = [f"{s.provenance.get('backbone', s.path.name)}/{p.stem}" for s, p in found]
        near = nearest(str(name), [*known, *(p.stem for _, p in found)])
        raise NotInCache(f'there is no view "{name}" in {folder}.{near} There are {_some(known)}.')
    labels = [f"{s.path.name}/{p.stem}" for s, p in hits]
    raise AmbiguousName(f'"{name}" is in {len(hits)} stores: {_some(labels)}. Say which with --features STORE/VIEW.')


def _is_called(store: Store, word: str) -> bool:
    return not word or word in (store.path.name, store.provenance.get("backbone"), store.path.name.rpartition("-")[0])


def _some(words: Sequence[str], most: int = 8) -> str:
    return ", ".join(words[:most]) + (f" and {len(words) - most} more" if len(words) > most else "")
