"""Somebody's file of features as a view: of unknown origin, and called so wherever it is shown.

The store is that of the content. Its spec says "unknown" for all that decides a feature, and in place of the weights
stands a digest of the rows: the same file imported twice is one store, whatever it was called. A sample's digest is
that of its features, `images.digest` of the array (of several outputs one after the other, by name), so that copies
are still found. The file is read in blocks: once to look at every value, then to store each output.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from featurecache import __version__
from featurecache.errors import BadOption, SourceError
from featurecache.files.atomic import FORMAT, check_room
from featurecache.files.locks import shared_lock
from featurecache.files.records import canonical_json
from featurecache.formatting import byte_bar
from featurecache.maintenance.feature_files import BLOCK, ArrayInfo, FeatureFile, open_foreign
from featurecache.maintenance.row_annotations import (
    KNOWN,
    ImportOptions,
    RowAnnotations,
    annotate_rows,
    array_named,
    describe_arrays,
    is_export,
)
from featurecache.outputs import parse
from featurecache.sources.base import safe_name
from featurecache.store.schema import DIGEST
from featurecache.store.shards import Layout, ShardWriter, notes_for
from featurecache.store.spec import UNKNOWN, ExtractionSpec
from featurecache.store.store import Store, cache_folder, create_store, rows_per_shard, stores
from featurecache.store.write_view import ViewColumns, write_view

MOST_ROWS = 1 << 26  # ids and labels are in memory; an archive of kilobytes can declare any number


@dataclass(frozen=True)
class Imported:
    """What an import made."""

    view: Path
    outputs: dict[str, tuple[int, ...]]  # name -> shape of a row
    rows: int
    copies: int  # rows that are the same as another
    task: str
    classes: list[str]
    new_rows: int  # stored by this import
    notes: tuple[str, ...]  # what a user should hear, each one sentence


@dataclass(frozen=True)
class _Source:
    """The features of a file, as they will be stored."""

    foreign: FeatureFile
    arrays: dict[str, ArrayInfo]  # by output, sorted
    layouts: dict[str, Layout]

    @property
    def rows(self) -> int:
        return next(iter(self.arrays.values())).shape[0]

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
    output: str | None = None,
    prefix: Sequence[str] | None = None,
    grid: tuple[int, int] | None = None,
    cache: str | Path | None = None,
    progress: bool = False,
) -> Imported:
    """Make a view ``name`` of the features in ``file``; the options are explained by `annotating.Asked`.

    ``output``: what to call them (default: `vector` for [N,D], `tokens` for [N,T,D]). ``prefix`` and ``grid``: which of
    the tokens are what, T = len(prefix) + h·w. Raises SourceError, BadOption, UnsafeFile, CannotWrite.
    """
    if safe_name(name) != name:
        raise BadOption(f'"{name[:60]}" cannot be the name of a view; "{safe_name(name)}" can.')
    foreign = open_foreign(Path(file).expanduser())
    source = _source(foreign, features_key, output, prefix, grid)
    asked = ImportOptions(labels, ids_key, splits_key, groups_key, columns, classes, task)
    said = annotate_rows(foreign, [array.name for array in source.arrays.values()], source.rows, asked)
    folder = cache_folder(cache)
    with byte_bar(source.bytes, "look", progress) as bar:
        digests = np.concatenate([each for _, each, _ in _looked(source, bar)])
    spec = _spec(source, digests)
    _refuse_twin(folder, name, spec)
    store = create_store(folder, "imported", spec, _provenance(foreign))
    with shared_lock(store.path, f"the import of {foreign.path.name}"):
        new = _store_missing(store, source, digests, progress)
        path = _write(store, name, source, said, digests)
    copies = len(digests) - len(np.unique(digests))
    outputs = {key: layout.row_shape for key, layout in source.layouts.items()}
    notes = tuple(_notes(source, said))
    return Imported(path, outputs, source.rows, copies, said.task, said.classes, new, notes)


def _source(
    foreign: FeatureFile,
    key: str | None,
    output: str | None,
    prefix: Sequence[str] | None,
    grid: tuple[int, int] | None,
) -> _Source:
    if key is None and is_export(foreign):
        arrays = {
            name: array for name, array in sorted(foreign.arrays.items()) if array.is_features and _is_output(name)
        }
        if arrays and (output or prefix is not None or grid):
            raise BadOption(
                f"{foreign.path.name} says itself what its features are; leave --output, --prefix, --grid out."
            )
    else:
        chosen = _chosen(foreign, key)
        arrays = {_output_name(chosen, output): chosen}
    lengths = {array.shape[0] for array in arrays.values()}
    if len(lengths) != 1 or 0 in lengths or any(0 in array.shape for array in arrays.values()):
        raise SourceError(
            f"{foreign.path.name} has no rows of features, or not as many of each: {describe_arrays(foreign)}."
        )
    if max(lengths) > MOST_ROWS:
        raise SourceError(f"{foreign.path.name} has {max(lengths):,} rows; a view has at most {MOST_ROWS:,}.")
    dtype = "float16" if all(array.dtype.itemsize == 2 for array in arrays.values()) else "float32"
    layouts = {name: _layout(foreign, name, array, dtype, prefix, grid) for name, array in arrays.items()}
    return _Source(foreign, arrays, layouts)


def _is_output(name: str) -> bool:
    try:
        return parse(name).name == name
    except (KeyError, ValueError):
        return False


def _chosen(foreign: FeatureFile, key: str | None) -> ArrayInfo:
    if key is not None:
        array = array_named(foreign, key, "--features-key")
        if not array.is_features:
            raise SourceError(
                f"{key} of {foreign.path.name} is {list(array.shape)} {array.dtype}; features are float16, float32 or "
                "float64, [N,D] or [N,T,D]."
            )
        return array
    others = {name for role, names in KNOWN.items() if role != "features" for name in names}
    found = [a for a in foreign.arrays.values() if a.is_features and a.name.lower() not in others]
    called = [array for array in found if array.name.lower() in KNOWN["features"]]
    if len(found) == 1 or len(called) == 1:
        return found[0] if len(found) == 1 else called[0]
    if not found:
        raise SourceError(
            f"{foreign.path.name} has no features, [N,D] or [N,T,D] of floats; it holds {describe_arrays(foreign)}."
        )
    raise SourceError(
        f"{foreign.path.name} holds {describe_arrays(foreign)}. Which are the features? --features-key {found[0].name}"
    )


def _output_name(array: ArrayInfo, asked: str | None) -> str:
    vector = len(array.shape) == 2
    if asked is None:
        return "vector" if vector else "tokens"
    name = parse(asked).name
    if name.startswith("tokens") == vector:
        kind = "a vector" if vector else "tokens"
        raise BadOption(
            f"--output {name} does not fit features [{','.join('NTD' if not vector else 'ND')}]: they are {kind}."
        )
    return name


def _layout(
    foreign: FeatureFile,
    name: str,
    array: ArrayInfo,
    dtype: str,
    prefix: Sequence[str] | None,
    grid: tuple[int, int] | None,
) -> Layout:
    kept = foreign.places.get(array.name) or {}
    if prefix is None and grid is None and kept.get("grid") and kept.get("prefix") is not None:
        prefix, grid = kept["prefix"], kept["grid"]
    shape = array.shape[1:]
    if prefix is None and grid is None:
        return Layout(name, shape, dtype)
    if len(shape) != 2 or len(parse(name).size) == 1:
        raise BadOption(f"--prefix and --grid are for tokens [N,T,D], not for {name} {list(shape)}.")
    if grid is None or len(prefix or ()) + grid[0] * grid[1] != shape[0]:
        rest = shape[0] - len(prefix or ())
        found = f"{len(prefix or ())} + {grid[0]}·{grid[1]}" if grid else "--prefix alone"
        raise BadOption(f"{found} does not say what {shape[0]} tokens are; --grid HxW has to cover {rest} of them.")
    return Layout(name, shape, dtype, tuple(prefix or ()), grid)


def _looked(source: _Source, bar: tqdm) -> Iterator[tuple[int, np.ndarray, dict[str, np.ndarray]]]:
    """(first row, digests [b], rows [b, ...] by output), all of one block; every value was looked at."""
    step = max(1, BLOCK // sum(max(a.row_bytes, source.layouts[k].row_bytes) for k, a in source.arrays.items()))
    start = 0
    for parts in zip(*(array.read(step) for array in source.arrays.values()), strict=True):
        blocks = {key: _stored(source, key, part, start) for key, part in zip(source.arrays, parts, strict=True)}
        count = len(parts[0])
        yield start, np.array([_digest([b[k] for b in blocks.values()]) for k in range(count)], DIGEST), blocks
        start += count
        bar.update(sum(block.nbytes for block in blocks.values()))
    if start != source.rows:
        raise SourceError(f"{source.foreign.path.name} ends after {start:,} of {source.rows:,} rows.")


def _stored(source: _Source, key: str, part: np.ndarray, start: int) -> np.ndarray:
    """A block in the dtype that is stored. Raises SourceError at the first value that is not finite in it."""
    dtype = np.dtype(source.layouts[key].dtype)
    with np.errstate(over="ignore"):
        block = np.ascontiguousarray(part.astype(dtype.newbyteorder("<")))
    fine = np.isfinite(block.reshape(len(block), -1)).all(1)
    if not fine.all():
        row = int(np.argmin(fine))
        why = "does not fit float32" if np.isfinite(part[row]).all() else "is not finite (NaN or infinity)"
        name = source.arrays[key].name
        raise SourceError(f"row {start + row:,} of {name} in {source.foreign.path.name} has a value that {why}.")
    return block


def _digest(rows: list[np.ndarray]) -> bytes:
    found = hashlib.blake2b(digest_size=16)
    for row in rows:
        found.update(f"{row.dtype.str} {list(row.shape)} ".encode())
        found.update(row.data)
    return found.hexdigest().encode()


def _spec(source: _Source, digests: np.ndarray) -> ExtractionSpec:
    layouts = source.layouts.values()
    places = {layout.output: layout.attributes() for layout in layouts if layout.grid is not None}
    content = hashlib.blake2b(np.ascontiguousarray(digests, DIGEST).tobytes(), digest_size=16).hexdigest()
    architecture = {"origin": UNKNOWN, **({"tokens": places} if places else {})}
    dtype = next(iter(layouts)).dtype
    return ExtractionSpec(
        architecture, {"features_blake2b": content}, {"origin": UNKNOWN}, (0, 0), UNKNOWN, UNKNOWN, dtype
    )  # fmt: skip


def _provenance(foreign: FeatureFile) -> dict[str, Any]:
    when = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    said = {"claims": foreign.attributes["fingerprint"][:64]} if is_export(foreign) else {}
    origin = {"origin": "imported", "file": str(foreign.path.absolute()), "when": when, **said}
    return {"backbone": "imported", **origin, "versions": {"featurecache": __version__}}


def _refuse_twin(folder: Path, name: str, spec: ExtractionSpec) -> None:
    for store in stores(folder):
        if store.spec.imported and store.fingerprint != spec.fingerprint and (store.path / f"{name}.h5").exists():
            raise BadOption(
                f"{store.path.name}/{name} was imported from {store.provenance.get('file')}, with other features. "
                f"Choose another --name, or remove it first: featurecache rm {store.path.name}/{name}"
            )


def _store_missing(store: Store, source: _Source, digests: np.ndarray, progress: bool) -> int:
    """Write the rows that the store has not; how many of any output."""
    store.sweep()
    _, first = np.unique(digests, return_index=True)
    first = np.sort(first)
    todo = {key: first[~store.locate(layout, digests[first]).found] for key, layout in source.layouts.items()}
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
        for start, found, blocks in _looked(source, bar):
            stop = start + len(found)
            if (found != digests[start:stop]).any():
                raise SourceError(f"{source.foreign.path} changed while it was imported; import it again.")
            while done < len(todo) and todo[done] < stop:
                writer = writer or ShardWriter(store.path, digests[todo[done : done + length]], layout, notes)
                end = min(done - done % length + length, int(np.searchsorted(todo, stop)))
                rows = todo[done:end]
                writer.append([bytes(digest) for digest in digests[rows]], blocks[key][rows - start])
                done = end
                if done % length == 0 or done == len(todo):
                    writer.commit()
                    writer = None
    finally:
        if writer is not None:
            writer.discard()


def _write(store: Store, name: str, source: _Source, said: RowAnnotations, digests: np.ndarray) -> Path:
    attributes: dict[str, Any] = {
        "classes": json.dumps(said.classes, ensure_ascii=False),
        "task": said.task,
        "spec": canonical_json(store.spec.to_dict()),
        "fingerprint": store.fingerprint,
        "provenance": canonical_json(store.provenance),
        "format_version": FORMAT,
        "source": canonical_json({"kind": "import", "data": str(source.foreign.path.absolute())}),
        "failed": "[]",
    }
    rows = ViewColumns(said.ids, said.labels, said.splits, digests, said.groups, said.meta)
    located = {layout: store.locate(layout, digests) for layout in source.layouts.values()}
    return write_view(store, name, rows, attributes, located)


def _notes(source: _Source, said: RowAnnotations) -> Iterator[str]:
    for key, array in source.arrays.items():
        yield f"{array.name} {list(array.shape)} {array.dtype} is kept as {key}, {source.layouts[key].dtype}."
    if said.unused:
        yield f"Left out: {', '.join(said.unused)}."
    if said.task == "unlabelled":
        yield "There are no labels: --labels FILE or the name of an array in the file brings them."
    for key, layout in source.layouts.items():
        if len(layout.row_shape) == 2 and layout.grid is None and len(parse(key).size) != 1:
            yield f"Which of the {layout.row_shape[0]} tokens are patches is not known: --prefix and --grid say it."
