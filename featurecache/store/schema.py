"""The schema of shards and views: which columns they have, of which types, and what their values must be.

Of a file that was opened by its directory (`featurecache.files.directory`), so every column lies inside it; here the
columns are compared with each other. Everything may have been written by anybody.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from featurecache.errors import CacheError, UnsafeFile
from featurecache.files.directory import FORMAT, TEXTS, ColumnFile, Texts, open_columns
from featurecache.files.records import parse_json
from featurecache.formatting import join_names
from featurecache.images.augmentation import AugmentedCopies

DIGEST = np.dtype("S32")
FILES = np.dtype([("path", "S255"), ("size", "<i8"), ("offset", "<i8"), ("rows", "<i8"), ("hash", "S32")])
TASKS = ("binary", "multiclass", "ordinal", "multilabel", "unlabelled")
SPLITS = {"train", "val", "test", ""}
MAX_VIEW = 4 << 30  # bytes of a view, whose columns are read into memory
MAX_VALUES = 1 << 30  # numbers in one row; a shard is not larger
_OUTPUT = re.compile(r"[A-Za-z0-9][A-Za-z0-9@._-]*")
_SHARD = re.compile(rb"[A-Za-z0-9][A-Za-z0-9@._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")  # <output>/<name>.h5
_PIECE = 1 << 20  # bytes


def check_digests(digests: np.ndarray, name: Path) -> None:
    letters = np.ascontiguousarray(digests).view(np.uint8)
    for start in range(0, len(letters), _PIECE):  # of a size that a cache holds: three times as fast as all at once
        part = letters[start : start + _PIECE]
        if not ((part - ord("0") < 10) | (part - ord("a") < 6)).all():  # bytes: what is below is far above
            raise CacheError(f"{name}: its digests are not 32 hexadecimal digits.")


@dataclass(frozen=True)
class Layout:
    """What the rows of one output have in common."""

    output: str = field(repr=False)
    shape: tuple[int, ...]  # of a row
    dtype: str  # in which it is stored
    prefix: tuple[str, ...] | None = None  # of token outputs: what the first rows are
    grid: tuple[int, int] | None = None  # of token outputs: the patch grid (h, w)

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def attributes(self) -> dict[str, str]:
        """Of token features: which rows are what."""
        if self.prefix is None or self.grid is None:
            return {}
        return {"prefix": json.dumps(self.prefix), "grid": json.dumps(self.grid)}


@dataclass
class StoredOutput:
    """One output of a view: what it is, where its rows lie, what their bytes hash to."""

    info: Layout
    index: np.ndarray  # [N,2] int64 (file, row)
    checksums: np.ndarray  # [N] uint64, xxh3_64 of the row's bytes
    errors: np.ndarray | None  # [N] float32: relative error of the row's rounding, NaN not measured; None: none rounded

    def first(self, rows: int) -> StoredOutput:
        errors = None if self.errors is None else self.errors[:rows]
        return StoredOutput(self.info, self.index[:rows], self.checksums[:rows], errors)


class _TextColumn:
    """A field that is an array, made of `Texts` when it is first asked for."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None:
            return self
        value = vars(instance)[self._name]
        if isinstance(value, Texts):
            value = vars(instance)[self._name] = value.array()
        return value

    def __set__(self, instance: Any, value: Any) -> None:
        vars(instance)[self._name] = value


@dataclass(eq=False)
class ViewColumns:
    """What a view says of its N samples, in the order of the source; names are numpy arrays of str (dtype object)."""

    ids: np.ndarray
    labels: np.ndarray  # int64 [N], -1 none; several labels: float32 [N,C], NaN unknown
    splits: np.ndarray  # "train", "val", "test", or "" where the data have none
    digests: np.ndarray
    groups: np.ndarray | None = None  # patients; None where not known
    meta: dict[str, Any] = field(default_factory=dict)
    versions: np.ndarray | None = None  # 0 for images, which come first, 1 … for augmented copies; None: no copies

    @property
    def count(self) -> int:
        """N; no str is made for it."""
        return len(vars(self)["_ids"])

    def at(self, rows: np.ndarray | slice) -> dict[str, Any]:
        """The columns by name, each of some ``rows`` only."""
        names = ("ids", "labels", "splits", "digests", "groups", "meta", "versions")
        return {name: column_at(getattr(self, name), rows) for name in names}


ViewColumns.ids = _TextColumn("_ids")  # type: ignore[assignment]  # behind the dataclass, for which it were a default


def text_array(texts: Sequence[str | None]) -> np.ndarray:
    """[N] str of whatever length (dtype object), so that ``view.splits == "train"`` is a mask."""
    return np.array(texts, object)


def column_at(column: Any, rows: np.ndarray | slice) -> Any:
    """Some ``rows`` of a column, an array or a list; of a dict of such; None of None."""
    if isinstance(column, dict):
        return {key: column_at(values, rows) for key, values in column.items()}
    if isinstance(column, list) and not isinstance(rows, slice):
        return [column[row] for row in rows.tolist()]
    return None if column is None else column[rows]


@dataclass(eq=False, kw_only=True)
class ViewContent(ViewColumns):
    """All of a view: what `View` shows, and its index."""

    attributes: dict[str, Any]
    fingerprint: str
    classes: list[str]
    task: str
    source: dict[str, Any]
    failed: list[dict[str, str]]  # {"id", "reason"} of images that are not in it
    files: np.ndarray  # FILES: the shards its rows lie in; the path is relative to the store
    index: dict[str, StoredOutput]
    augmented: AugmentedCopies | None  # how the rows whose version is not 0 were made

    @property
    def plain_rows(self) -> int:
        """The first so many rows are plain images, the others augmented copies of them."""
        return self.count if self.versions is None else int((self.versions == 0).sum())

    def plain(self) -> ViewContent:
        """The same with the columns of plain rows only; ``index`` keeps all."""
        n = self.plain_rows
        return self if n == self.count else replace(self, **self.at(slice(n)))

    def copy_rows(self, path: Path) -> np.ndarray:
        """int64 [N, 1+k] of `View.copies`. A copy belongs to the image whose id it has, and its digest says so too."""
        n, k = self.plain_rows, self.augmented.views if self.augmented else 0
        table = np.repeat(np.arange(n)[:, None], 1 + k, axis=1)
        if self.versions is None or self.augmented is None:
            return table
        first: dict[str, int] = {}
        same = np.array([first.setdefault(name, row) for row, name in enumerate(self.ids[:n])], np.int64)
        of = np.array([first[name] for name in self.ids[n:]], np.int64)
        for copy in range(1, k + 1):
            rows = n + np.flatnonzero(self.versions[n:] == copy)
            expected = self.augmented.augmentation.digests(self.digests[of[rows - n]], copy)
            if (self.digests[rows] != expected).any():
                raise CacheError(f"{path}: its augmented copies are of other images than it says. Extract it again.")
            table[of[rows - n], copy] = rows
        table[:, 1:] = table[same, 1:]  # one image may have several rows of one id
        return table


def read_view(path: Path) -> ViewContent:
    """All of a view, of which every byte is checked first."""
    if not path.name.isprintable():
        raise UnsafeFile(f"{str(path)!a} has a name that a terminal would obey; rename it.")
    with open_columns(path) as file:
        if file.block.size > MAX_VIEW:
            raise UnsafeFile(f"{path} has {file.block.size:,} bytes; at most {MAX_VIEW:,} are read into memory.")
        file.check_bytes()
        try:
            content = _view_content(file)
        except CacheError:
            raise
        except (KeyError, ValueError, TypeError, AttributeError, OverflowError) as error:
            raise CacheError(f"{path} is not a view as featurecache writes them: {error}.") from error
    _check_columns(content, path)
    for entry in content.files["path"].tolist():
        if not _SHARD.fullmatch(entry):
            raise UnsafeFile(f"{path} refers to {entry.decode(errors='backslashreplace')!a}, outside its store.")
    return content


def _view_content(file: ColumnFile) -> ViewContent:
    attributes, name = file.attributes, file.path
    if attributes["format_version"] != FORMAT:
        raise CacheError(f"{name} has format {attributes['format_version']}; this featurecache reads {FORMAT}.")
    failed = _attribute(attributes, "failed", name)
    if not all(isinstance(pair, list) and len(pair) == 2 and _all_text(pair) for pair in failed):
        raise CacheError(f"{name}: its list of failed images is not one of ids and reasons.")
    augmented = None
    if "augmentation" in attributes:
        augmented = AugmentedCopies.from_dict(_attribute(attributes, "augmentation", name, dict))
    return ViewContent(
        attributes=attributes,
        fingerprint=str(attributes["fingerprint"]),
        classes=_attribute(attributes, "classes", name),
        task=str(attributes["task"]),
        source=_attribute(attributes, "source", name, dict),
        failed=[{"id": name, "reason": reason} for name, reason in failed],
        ids=file.texts("ids"),  # type: ignore[arg-type]
        labels=file.array("labels", ndim=None),
        splits=_splits(file),
        groups=file.texts("groups").array() if f"{TEXTS}groups/ends" in file.columns else None,
        digests=file.array("digests", DIGEST),
        versions=file.array("versions", "i4") if "versions" in file.columns else None,
        meta=_meta(file),
        files=file.array("index/files", FILES),
        index={key: _stored(file, key) for key in _below("index/", file) if key != "files"},
        augmented=augmented,
    )


def _splits(file: ColumnFile) -> np.ndarray:
    """object [N], each one of a few words: read without making a million of them."""
    block, stops = file.text_block("splits")
    lengths = np.diff(stops)
    codes = np.full(len(lengths), len(SPLITS))
    for code, word in enumerate(SPLITS):
        rows = np.flatnonzero(lengths == len(word))
        for place, letter in enumerate(word.encode()):
            rows = rows[block[stops[rows] + place] == letter]
        codes[rows] = code
    if (codes == len(SPLITS)).any():
        raise CacheError(f"{file.path}: it has a split other than train, val and test.")
    return np.array([*SPLITS], object)[codes]


def _below(folder: str, file: ColumnFile) -> list[str]:
    """Columns of a group, by their names in it; those of its own groups are not."""
    names = [name.removeprefix(folder) for name in file.columns if name.startswith(folder)]
    return [name for name in names if "/" not in name]


def _meta(file: ColumnFile) -> dict[str, np.ndarray]:
    """Further columns of the source: numbers, or text."""
    texts = [name.split("/")[3] for name in file.columns if re.fullmatch(f"{TEXTS}meta/[^/]+/ends", name)]
    columns = {key: file.array(f"meta/{key}") for key in _below("meta/", file)}
    if not all(column.dtype.kind in "biuf" for column in columns.values()):
        raise CacheError(f"{file.path}: further columns hold other things than numbers and text.")
    columns |= {key: file.texts(f"meta/{key}").array() for key in texts}
    return dict(sorted(columns.items()))


def _attribute(attributes: dict[str, Any], key: str, name: Path, kind: type = list) -> Any:
    value = parse_json(attributes[key], f"{name}: {key}")
    if not isinstance(value, kind):
        raise CacheError(f"{name}: {key} is {type(value).__name__}, not {kind.__name__}.")
    return value


def _all_text(values: list[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def _stored(file: ColumnFile, output: str) -> StoredOutput:
    name, attributes = file.path, file.column(f"index/{output}").attributes
    dtype = str(attributes["dtype"])
    if dtype not in ("float16", "float32"):
        raise CacheError(f"{name}: {output!a} has the storage dtype {dtype!a}.")
    index = file.array(f"index/{output}", "i8", ndim=2)
    if index.shape[1] != 2:
        raise CacheError(f"{name}: {output!a} has no index (file, row).")
    shape = _sides(_attribute(attributes, "shape", name), name)
    info = Layout(output, shape, dtype, *token_layout(attributes, name))
    errors = file.array(f"errors/{output}", "f4") if f"errors/{output}" in file.columns else None
    return StoredOutput(info, index, file.array(f"checksums/{output}", "u8"), errors)


def token_layout(attributes: dict[str, Any], name: Path) -> tuple[tuple[str, ...] | None, tuple[int, int] | None]:
    """(prefix, grid) out of the attributes of token features; (None, None) of others."""
    if "prefix" not in attributes or "grid" not in attributes:
        return None, None
    prefix, grid = _attribute(attributes, "prefix", name), _sides(_attribute(attributes, "grid", name), name)
    if len(grid) != 2 or not _all_text(prefix):
        raise CacheError(f"{name}: prefix and grid do not say which rows are what.")
    return tuple(prefix), (grid[0], grid[1])


def _sides(shape: list[Any], name: Path) -> tuple[int, ...]:
    fine = 1 <= len(shape) <= 2 and all(type(side) is int and side > 0 for side in shape)
    if not fine or math.prod(shape) > MAX_VALUES:
        raise CacheError(f"{name}: {str(shape)[:80]} is not the shape of a row.")
    return tuple(shape)


def _check_columns(view: ViewContent, name: Path) -> None:
    """Columns of one length and of the values that they may have."""
    columns: list[Any] = [view.labels, view.splits, view.digests, view.groups, view.versions, *view.meta.values()]
    columns += [column for s in view.index.values() for column in (s.index, s.checksums, s.errors)]
    if view.task not in TASKS or {len(column) for column in columns if column is not None} != {view.count}:
        raise CacheError(f"{name}: its columns do not agree with each other.")
    if not _all_text(view.classes) or len(set(view.classes)) != len(view.classes):
        raise CacheError(f"{name}: its classes are not different names.")
    check_digests(view.digests, name)
    labels, classes = view.labels, len(view.classes)
    if view.task == "multilabel":
        fit = labels.dtype == np.float32 and labels.ndim == 2 and labels.shape[1] == classes
        fit = fit and bool(((labels == 0) | (labels == 1) | np.isnan(labels)).all())
    else:
        fit = labels.dtype == np.int64 and labels.ndim == 1 and bool(((labels >= -1) & (labels < classes)).all())
    if not fit:
        raise CacheError(f"{name}: its labels do not fit its {classes:,} classes ({view.task}).")
    if not _copies_fit(view):
        raise CacheError(f"{name}: its augmented copies are not those of its images.")
    for output, stored in view.index.items():
        info = stored.info
        rows = info.grid and info.prefix is not None and len(info.prefix) + info.grid[0] * info.grid[1]
        if not _OUTPUT.fullmatch(output) or (rows and info.shape[0] != rows):
            raise CacheError(f"{name}: {output[:80]!a} is not an output with the shape {list(info.shape)}.")


def _copies_fit(view: ViewContent) -> bool:
    """Plain rows first, then copies of some of them; who has such rows says how they were made."""
    if view.versions is None or view.augmented is None:
        return view.versions is None and view.augmented is None
    n = view.plain_rows
    copies, names = view.versions[n:], view.ids
    fine = n > 0 and not view.versions[:n].any() and ((copies > 0) & (copies <= view.augmented.views)).all()
    return bool(fine) and set(names[n:]) <= set(names[:n])


def source_options(source: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The options of a command line that name the images of ``source`` again."""
    options: list[tuple[str, Any]] = [("--data", source.get("data", "DATA"))]
    options += [("--column", f"{role}={column}") for role, column in (source.get("columns") or {}).items()]
    words = {
        f"--{name.replace('_', '-')}": source.get(name)
        for name in ("task", "classes_at", "root", "uncertain", "page", "bits", "limit", "limit_seed")
    }
    words["--crop"] = ",".join(f"{edge:.15g}" for edge in source["crop"]) if source.get("crop") else None
    words["--order"] = join_names(source["order"]) if source.get("order") else None
    return options + [(option, value) for option, value in words.items() if value is not None]
