"""The reader of views: columns as numpy, features as tensors gathered from mapped shards."""

from __future__ import annotations

import ctypes
import glob
import io
import json
import math
import shlex
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import h5py
import numpy as np
import torch

from featurecache import outputs as _outputs
from featurecache.errors import CacheError, NotInCache, UnsafeFile
from featurecache.files import ALIGNMENT, FORMAT, USER_BLOCK, check_inside, read_checked, refuse_links
from featurecache.shards import TORCH_DTYPE, map_rows
from featurecache.stores import cache_folder, open_store

TASKS = ("binary", "multiclass", "ordinal", "multilabel", "unlabelled")


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
            except CacheError:
                raise
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
            relative = PurePosixPath(entry["path"].decode())
            if relative.is_absolute() or ".." in relative.parts or len(relative.parts) != 2:
                raise UnsafeFile(f"{self.path} refers to {relative}, outside its store.")
        for number in range(len(self._files)):
            path, size = self._file(number)
            refuse_links(path.parent, path)
            found = path.stat().st_size if path.is_file() else None
            if found != size:
                what = "is missing" if found is None else f"has {found:,} bytes, not {size:,}"
                way = "Run" if found is None else "Delete it and run"
                raise CacheError(
                    f"{path}, which the view {self.label} needs, {what}. "
                    f"{way} the extraction again: that computes what is not there."
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
        """``store/view`` as people type it: the backbone's name, or the folder's where two stores have such a view."""
        kin = self.store.name.rpartition("-")[0] or self.store.name
        twins = list(self.store.parent.glob(f"{glob.escape(kin)}-*/{glob.escape(self.name)}.h5"))
        return f"{self.store.name if len(twins) > 1 else kin}/{self.name}"

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
        """The command line that adds ``output`` to this view: the same backbone, settings, images and cache."""
        asked, spec, source = self.provenance.get("request", {}), self.spec, self.source
        options: list[tuple[str, Any]] = [("--backbone", asked.get("name", self.provenance.get("backbone")))]
        options += [("--random-weights", "")] if asked.get("random_weights") else []
        options += [("--seed", asked["seed"])] if asked.get("seed") else []
        options += [("--weights", asked["weights"])] if asked.get("weights") else []
        options += [("--image-size", asked["image_size"])] if asked.get("image_size") else []
        options += [("--fit", asked["fit"])] if asked.get("fit", "model") != "model" else []
        options += [("--precision", spec["precision"])] if spec["precision"] != "fp32" else []
        options += [("--dtype", spec["dtype"])] if spec["dtype"] != "float16" else []
        options += [("--data", source.get("data", "DATA"))]
        options += [("--column", f"{role}={column}") for role, column in (source.get("columns") or {}).items()]
        options += [("--task", source["task"])] if source.get("task") else []
        options += [("--outputs", output), ("--name", self.name)]
        if self.store.parent.resolve() != cache_folder().resolve():
            options.append(("--cache", self.store.parent))
        words = [str(word) for option in options for word in option if word != ""]
        return f"featurecache extract {shlex.join(words)}"

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
        """Rows of a *stored* output, [n, ...], in the order asked; ``out`` is filled when given."""
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
        span = (
            max((rows.data_ptr() + rows.numel() * rows.itemsize for rows in self._shards.values()), default=0) - first
        )
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
    return _Stored(OutputInfo(tuple(json.loads(attrs["shape"])), dtype, prefix, grid), entry[...])
