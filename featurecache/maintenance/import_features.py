"""Import of features made elsewhere: a view of unknown origin, and called so wherever it is shown.

The store is that of the content. Its spec says "unknown" for all that decides a feature, and in place of the weights
stands a digest of the rows: the same file imported twice is one store, whatever it was called. A sample's digest is
that of its features, `decoding.digest` of the array (of several outputs one after the other, by name), so that copies
are still found. The file is read in blocks: once to look at every value, then to store each output.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from featurecache import __version__
from featurecache.errors import BadOption, CacheError, Reading, SeveralReadings, SourceError
from featurecache.files.atomic import check_room
from featurecache.files.locks import shared_lock
from featurecache.files.names import is_file_name
from featurecache.formatting import byte_bar, shell_word
from featurecache.maintenance.feature_files import BLOCK, ArrayInfo, FeatureFile, open_feature_file
from featurecache.maintenance.row_annotations import (
    ARRAY_ROLES,
    RowAnnotations,
    annotate_rows,
    array_named,
    describe_arrays,
    is_export,
)
from featurecache.outputs import parse
from featurecache.sources.base import safe_name
from featurecache.sources.label_cells import LabelOptions
from featurecache.store.remote_cache import push, push_shards
from featurecache.store.schema import DIGEST, ViewColumns, text_array
from featurecache.store.shards import Layout, ShardWriter, notes_for, shard_name
from featurecache.store.spec import UNKNOWN, ExtractionSpec
from featurecache.store.store import Store, cache_folder, create_store, rows_per_shard, stores
from featurecache.store.write_view import view_attributes, write_view

MOST_ROWS = 1 << 26  # ids and labels are in memory; an archive of kilobytes can declare any number


@dataclass(frozen=True)
class ImportResult:
    """What an import made."""

    view: Path
    outputs: dict[str, tuple[int, ...]]  # name -> shape of a row
    rows: int
    duplicates: int  # rows that are the same as another
    task: str
    classes: list[str]
    new_rows: int  # stored by this import
    notes: tuple[str, ...]  # what a user should hear, each one sentence


@dataclass(frozen=True)
class _Source:
    """The features of a file, as they will be stored."""

    file: FeatureFile
    arrays: dict[str, ArrayInfo]  # by output, sorted
    layouts: dict[str, Layout]
    rows: int

    @property
    def bytes(self) -> int:
        return sum(layout.row_bytes for layout in self.layouts.values()) * self.rows


def import_view(
    file: str | Path,
    name: str,
    *,
    labels: str | None = None,
    features_key: str | None = None,
    ids_key: str | None = None,
    splits_key: str | None = None,
    groups_key: str | None = None,
    columns: dict[str, str] | None = None,
    classes: Sequence[str] | None = None,
    task: str | None = None,
    order: Sequence[str] | None = None,
    uncertain: str | None = None,
    letter_case: str | None = None,
    output: str | None = None,
    prefix: Sequence[str] | None = None,
    grid: tuple[int, int] | None = None,
    cache: str | Path | None = None,
    progress: bool = False,
) -> ImportResult:
    """Make a view ``name`` of the features in ``file``. ``labels``: a file, or the name of an array in ``file``; the
    keys name arrays too, an empty one says that there is none. ``columns``: those of a table of labels, ``uncertain``
    what -1 is in them, ``letter_case`` (ignore, keep) whether classes that differ in it alone are one; ``order``: the
    classes from the lowest to the highest. ``output``: what to call the features (default: `vector` for [N,D], `tokens`
    for [N,T,D]). ``prefix`` and ``grid``: which of the tokens are what, T = len(prefix) + h·w. Raises SourceError,
    BadOption, UnsafeFile, CannotWrite."""
    if safe_name(name) != name or not is_file_name(name, ".h5"):
        raise BadOption(f'"{name[:60]}" cannot be the name of a view; "{safe_name(name)}" can.')
    opened = open_feature_file(Path(file).expanduser())
    source = _source(opened, features_key, output, prefix, grid)
    keys = {"labels": labels, "ids": ids_key, "splits": splits_key, "groups": groups_key}
    features = [array.name for array in source.arrays.values()]
    how = LabelOptions(task, uncertain, letter_case)
    rows = annotate_rows(opened, features, source.rows, keys, columns, classes, how, order)
    folder = cache_folder(cache)
    with byte_bar(source.bytes, "look", progress) as bar:
        digests = np.concatenate([each for _, each, _ in _blocks(source, bar)])
    spec = _spec(source, digests)
    _refuse_twin(folder, name, spec)
    when = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    provenance = {"backbone": "imported", "origin": "imported", "file": str(opened.path.absolute()), "when": when}
    claims = {"claims": opened.attributes["fingerprint"][:64]} if is_export(opened) else {}
    store = create_store(folder, "imported", spec, {**provenance, **claims, "versions": {"featurecache": __version__}})
    with shared_lock(store.path, f"the import of {opened.path.name}"):
        new = _store_missing(store, source, digests, progress)
        about = {"order": order and list(order), "uncertain": rows.uncertain, "understood": "; ".join(rows.remarks)}
        about = {"kind": "import", "data": provenance["file"]} | {key: value for key, value in about.items() if value}
        attributes = view_attributes(store, rows.classes, rows.task, about)
        groups = None if rows.groups is None else text_array(rows.groups)
        view_rows = ViewColumns(text_array(rows.ids), rows.labels, text_array(rows.splits), digests, groups, rows.meta)
        push_shards(store.path)
        located = {layout: store.locate(layout, digests) for layout in source.layouts.values()}
        path = write_view(store, name, view_rows, attributes, located)
        if not push(store.path):
            raise CacheError(f"another machine has just written the view {name} there. Give the same command again.")
    duplicates = len(digests) - len(np.unique(digests))
    outputs = {key: layout.shape for key, layout in source.layouts.items()}
    return ImportResult(
        path, outputs, source.rows, duplicates, rows.task, rows.classes, new, tuple(_notes(source, rows))
    )


def _source(
    file: FeatureFile, key: str | None, output: str | None, prefix: Sequence[str] | None, grid: tuple[int, int] | None
) -> _Source:
    if key is None and is_export(file):
        arrays = {name: array for name, array in sorted(file.arrays.items()) if array.is_features and _is_output(name)}
        if arrays and (output or prefix is not None or grid):
            raise BadOption(f"{file.path.name} says what its features are; leave --output, --prefix, --grid out.")
    else:
        array = _features(file, key)
        arrays = {_output_name(array, output): array}
    lengths = {array.shape[0] for array in arrays.values()}
    if len(lengths) != 1 or any(0 in array.shape for array in arrays.values()):
        raise SourceError(f"{file.path.name} has no rows of features, or not as many of each: {describe_arrays(file)}.")
    (rows,) = lengths
    if rows > MOST_ROWS:
        raise SourceError(f"{file.path.name} has {rows:,} rows; a view has at most {MOST_ROWS:,}.")
    dtype = "float16" if all(array.dtype.itemsize == 2 for array in arrays.values()) else "float32"
    layouts = {}
    for name, array in arrays.items():
        own = file.token_layouts.get(array.name) if prefix is None and grid is None else None
        layouts[name] = _layout(name, array.shape[1:], dtype, *(own or (prefix, grid)))
    return _Source(file, arrays, layouts, rows)


def _is_output(name: str) -> bool:
    try:
        return parse(name).name == name
    except (KeyError, ValueError):
        return False


def _features(file: FeatureFile, key: str | None) -> ArrayInfo:
    """The array of this key, else the only one that can be features."""
    if key is not None:
        array = array_named(file, key, "--features-key")
        if not array.is_features:
            raise SourceError(
                f"{key} of {file.path.name} is {list(array.shape)} {array.dtype}; features are float16, float32 or "
                "float64, [N,D] or [N,T,D]."
            )
        return array
    others = {name for role, names in ARRAY_ROLES.items() if role != "features" for name in names}
    candidates = [a for a in file.arrays.values() if a.is_features and a.name.lower() not in others]
    by_name = [array for array in candidates if array.name.lower() in ARRAY_ROLES["features"]]
    for arrays in (candidates, by_name):
        if len(arrays) == 1:
            return arrays[0]
    there = describe_arrays(file)
    if not candidates:
        raise SourceError(f"{file.path.name} has no features, [N,D] or [N,T,D] of floats; it holds {there}.")
    raise SeveralReadings(
        f"{file.path.name} holds {there}. Which are the features? --features-key {shell_word(candidates[0].name)}",
        [Reading(f"the features are {array.name}", {"features_key": array.name}) for array in candidates],
    )


def _output_name(array: ArrayInfo, requested: str | None) -> str:
    kind, axes = ("vector", "N,D") if len(array.shape) == 2 else ("tokens", "N,T,D")
    name = kind if requested is None else parse(requested).name
    if name.startswith("tokens") != (kind == "tokens"):
        kind = "a vector" if kind == "vector" else kind
        raise BadOption(f"--output {name} does not fit features [{axes}]: they are {kind}.")
    return name


def _layout(
    name: str, shape: tuple[int, ...], dtype: str, prefix: Sequence[str] | None, grid: tuple[int, int] | None
) -> Layout:
    if prefix is None and grid is None:
        return Layout(name, shape, dtype)
    if len(shape) != 2 or len(parse(name).size) == 1:
        raise BadOption(f"--prefix and --grid are for tokens [N,T,D], not for {name} {list(shape)}.")
    prefix = tuple(prefix or ())
    rest = shape[0] - len(prefix)
    if grid is None or grid[0] * grid[1] != rest:
        tokens = f"{len(prefix)} + {grid[0]}·{grid[1]}" if grid else "--prefix alone"
        raise BadOption(f"{tokens} does not say what {shape[0]} tokens are; --grid HxW has to cover {rest} of them.")
    return Layout(name, shape, dtype, prefix, grid)


def _blocks(source: _Source, bar: tqdm) -> Iterator[tuple[int, np.ndarray, dict[str, np.ndarray]]]:
    """(first row, digests [b], rows [b, ...] by output), all of one block; every value was looked at."""
    step = max(1, BLOCK // sum(max(a.row_bytes, source.layouts[k].row_bytes) for k, a in source.arrays.items()))
    start = 0
    for parts in zip(*(array.read(step) for array in source.arrays.values()), strict=True):
        blocks = {key: _stored(source, key, part, start) for key, part in zip(source.arrays, parts, strict=True)}
        yield start, np.array([_digest(rows) for rows in zip(*blocks.values(), strict=True)], DIGEST), blocks
        start += len(parts[0])
        bar.update(sum(block.nbytes for block in blocks.values()))
    if start != source.rows:
        raise SourceError(f"{source.file.path.name} ends after {start:,} of {source.rows:,} rows.")


def _stored(source: _Source, key: str, part: np.ndarray, start: int) -> np.ndarray:
    """A block in the dtype that is stored. Raises SourceError at the first value that is not finite in it."""
    with np.errstate(over="ignore"):
        block = np.ascontiguousarray(part.astype(np.dtype(source.layouts[key].dtype).newbyteorder("<")))
    fine = np.isfinite(block.reshape(len(block), -1)).all(1)
    if not fine.all():
        row = int(np.argmin(fine))
        why = "does not fit float32" if np.isfinite(part[row]).all() else "is not finite (NaN or infinity)"
        name = source.arrays[key].name
        raise SourceError(f"row {start + row:,} of {name} in {source.file.path.name} has a value that {why}.")
    return block


def _digest(rows: Iterable[np.ndarray]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for row in rows:
        digest.update(f"{row.dtype.str} {list(row.shape)} ".encode())
        digest.update(row.data)
    return digest.hexdigest().encode()


def _spec(source: _Source, digests: np.ndarray) -> ExtractionSpec:
    layouts = list(source.layouts.values())
    places = {layout.output: layout.attributes() for layout in layouts if layout.grid is not None}
    architecture = {"origin": UNKNOWN, **({"tokens": places} if places else {})}
    weights = {"features_blake2b": shard_name(digests)}
    return ExtractionSpec(architecture, weights, {"origin": UNKNOWN}, (0, 0), UNKNOWN, UNKNOWN, layouts[0].dtype)


def _refuse_twin(folder: Path, name: str, spec: ExtractionSpec) -> None:
    for store in stores(folder):
        if store.spec.imported and store.fingerprint != spec.fingerprint and (store.path / f"{name}.h5").exists():
            raise BadOption(
                f"{store.path.name}/{name} was imported from {store.provenance.get('file')}, with other features. "
                f"Choose another --name, or remove it first: featurecache rm {shell_word(f'{store.path.name}/{name}')}"
            )


def _store_missing(store: Store, source: _Source, digests: np.ndarray, progress: bool) -> int:
    """Write the rows that the store has not; how many of any output."""
    store.sweep()
    first = np.sort(np.unique(digests, return_index=True)[1])
    todo = {key: first[~store.locate(layout, digests[first]).mask] for key, layout in source.layouts.items()}
    needed = sum(len(rows) * source.layouts[key].row_bytes for key, rows in todo.items())
    check_room(store.path, needed, "Choose another disk with --cache.")
    for key, rows in todo.items():
        if len(rows):
            with byte_bar(source.bytes, f"store {key}", progress) as bar:
                _store_rows(store, source, key, digests, rows, bar)
    return max(len(rows) for rows in todo.values())


def _store_rows(store: Store, source: _Source, key: str, digests: np.ndarray, todo: np.ndarray, bar: tqdm) -> None:
    """Rows ``todo`` (ascending) of one output, in shards of the usual size."""
    layout, notes = source.layouts[key], notes_for(store.fingerprint, UNKNOWN, {})
    length = rows_per_shard(len(todo), layout.row_bytes)
    writer: ShardWriter | None = None
    done = 0
    try:
        for start, now, blocks in _blocks(source, bar):
            stop = start + len(now)
            if (now != digests[start:stop]).any():
                raise SourceError(f"{source.file.path} changed while it was imported; import it again.")
            while done < len(todo) and todo[done] < stop:
                writer = writer or ShardWriter(store.path, digests[todo[done : done + length]], layout, notes)
                end = min(done - done % length + length, int(np.searchsorted(todo, stop)))
                rows = todo[done:end]
                writer.append(digests[rows].tolist(), blocks[key][rows - start])
                done = end
                if done % length == 0 or done == len(todo):
                    writer.commit()
                    writer = None
    finally:
        if writer is not None:
            writer.close()


def _notes(source: _Source, annotations: RowAnnotations) -> Iterator[str]:
    for key, array in source.arrays.items():
        yield f"{array.name} {list(array.shape)} {array.dtype} is kept as {key}, {source.layouts[key].dtype}."
    yield from (f"{remark}." for remark in annotations.remarks)
    yield from annotations.notes
    if annotations.unused:
        yield f"Left out: {', '.join(annotations.unused)}."
    if annotations.task == "unlabelled":
        yield "There are no labels: --labels FILE or the name of an array in the file brings them."
    for key, layout in source.layouts.items():
        if len(layout.shape) == 2 and layout.grid is None and len(parse(key).size) != 1:
            yield f"Which of the {layout.shape[0]} tokens are patches is not known: --prefix and --grid say it."
