"""Views: one dataset seen through one store. Written for plain h5py, read by our own reader.

At the root of ``<store>/<view>.h5``: `ids` [N], `labels` [N] int64 (−1 none; multi-label [N,L] float32, NaN unknown),
`splits` [N], `groups` [N] where known, `digests` [N], `meta/*` [N], and one virtual dataset per output over the
shards. Where augmented copies are in it `versions` [N] says which: 0 for the images, which come first, 1 … for copies,
which carry the id of their image. `index/files` and `index/<output>` [N,2] say where each row lies,
`checksums/<output>` [N] what its bytes hash to (xxh3_64), `errors/<output>` [N] what rounding to float16 did to it;
`index/text/*` holds the texts once more, for readers without HDF5. Our reader maps the shards and never reads a feature
through HDF5.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from featurecache.errors import AmbiguousName, NotInCache, UnknownView, nearest
from featurecache.files.atomic import AtomicFile
from featurecache.files.directory import FORMAT
from featurecache.files.hdf5 import WriteTrace, new_hdf5, seal, write_texts
from featurecache.files.records import canonical_json
from featurecache.files.storage import is_address
from featurecache.formatting import abbreviated
from featurecache.store.schema import DIGEST, FILES, ViewColumns, text_array
from featurecache.store.shards import Layout, RowLocations
from featurecache.store.store import Store, cache_folder, stores
from featurecache.store.view import View

if TYPE_CHECKING:  # it is loaded by whoever writes
    import h5py

MAX_MAPPINGS = 100_000  # virtual mappings of one dataset; 25 kB of memory each in HDF5


def view_attributes(
    store: Store, classes: Sequence[str], task: str, source: Mapping[str, Any], failed: Sequence[tuple[str, str]] = ()
) -> dict[str, Any]:
    """The attributes of a view of ``store``. ``failed``: (id, reason) of what is not in it."""
    return {
        "classes": json.dumps(classes, ensure_ascii=False),
        "task": task,
        "spec": canonical_json(store.spec.to_dict()),
        "fingerprint": store.fingerprint,
        "provenance": canonical_json(store.provenance),
        "format_version": FORMAT,
        "source": canonical_json(source),
        "failed": json.dumps(failed, ensure_ascii=False),
    }


def write_view(
    store: Store, name: str, rows: ViewColumns, attributes: dict[str, Any], located: dict[Layout, RowLocations]
) -> Path:
    """Write ``<store>/<name>.h5`` beside and put it in its place.

    ``located``: for each output where every row lies. ``attributes``: `view_attributes`, stored as they are.
    """
    assert (rows.versions is None) == ("augmentation" not in attributes), "who has copies says how they were made"
    assert rows.labels.ndim == 1 or rows.labels.shape[1] == len(json.loads(attributes["classes"])), rows.labels.shape
    trace = WriteTrace()
    with new_hdf5(trace) as file:
        file.attrs.update(attributes)
        for key, texts in write_columns(file, rows).items():
            write_texts(file, key, texts)
        index, sums, errors = (file.require_group(name) for name in ("index", "checksums", "errors"))
        files: list[tuple[Any, ...]] = []
        for layout, places in located.items():
            assert places.mask.all()
            _write_output(file, store, layout, places, files)
            sums.create_dataset(layout.output, data=places.checksums, dtype="u8")
            if layout.dtype == "float16":
                errors.create_dataset(layout.output, data=places.errors, dtype="f4")
        index.create_dataset("files", data=np.array(files, FILES))
    path = store.path / f"{name}.h5"
    with AtomicFile(path, inside=store.path) as draft:
        seal(draft, trace)
        draft.commit()
    return path


def rewrite_view(
    view: View, store: Store, located: Mapping[Layout, RowLocations], *, name: str = "",
    lost: Mapping[bytes, str] | None = None,
) -> Path:  # fmt: skip
    """The same view on other rows: as ``located`` [N] has them of each output, all in shards of ``store``.

    It keeps its time (it is no newer than it was) and, unless another is given, its name. Rows whose digest is in
    ``lost`` leave the view and are listed in its ``failed`` with the reason given there. ``view`` is open with its
    copies. Raises NotInCache where another row lies nowhere.
    """
    (rows, reasons), stat = _without(view, lost or {}), view.path.stat()
    places = {layout: everywhere[rows] for layout, everywhere in located.items()}
    for layout, each in places.items():
        if not each.mask.all():
            raise NotInCache(f"{int((~each.mask).sum()):,} rows of {layout.output} of {view.label} lie in no shard.")
    failed = json.dumps([*([f["id"], f["reason"]] for f in view.failed), *reasons], ensure_ascii=False)
    attributes = {**view.attributes, **({"failed": failed} if reasons else {})}
    path = write_view(store, name or view.name, columns_of(view, rows), attributes, places)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    return path


def _without(view: View, lost: Mapping[bytes, str]) -> tuple[np.ndarray, list[list[str]]]:
    """(rows of a view that stay, [id, reason] of the others). Without its image no copy stays."""
    versions = [0] * len(view) if view.versions is None else view.versions.tolist()
    digests = view.digests.tolist()
    leaving = [row for row, digest in enumerate(digests) if digest in lost]
    gone = {view.ids[row] for row in leaving if not versions[row]}
    reasons = []
    for row in leaving:
        name, version, reason = view.ids[row], versions[row], lost[digests[row]]
        if not version or name not in gone:
            reasons.append([name, copy_failed(version, reason) if version else reason])
    stays = [digest not in lost and name not in gone for name, digest in zip(view.ids, digests, strict=True)]
    return np.flatnonzero(stays), reasons


def copy_failed(version: int, reason: str) -> str:
    """Why a copy is missing of an image that is there."""
    return f"its augmented copy {version}: {reason}"


def columns_of(view: View, rows: np.ndarray | None = None) -> ViewColumns:
    """What a view says of its samples, or of some ``rows`` of them; of copies only if it was opened with them."""
    columns = view.at(np.arange(len(view)) if rows is None else rows)
    return ViewColumns(**columns if view.with_copies else {**columns, "versions": None})


def write_columns(file: h5py.File, rows: ViewColumns) -> dict[str, np.ndarray]:
    """What every reader of HDF5 sees of the samples; the columns of text are returned by name."""
    import h5py

    texts = {"ids": rows.ids, "splits": rows.splits}
    if rows.groups is not None:
        texts["groups"] = rows.groups
    file.create_dataset("labels", data=rows.labels)
    file.create_dataset("digests", data=rows.digests, dtype=DIGEST)
    if rows.versions is not None:
        file.create_dataset("versions", data=rows.versions, dtype="i4")
    meta = file.create_group("meta")
    for key, column in rows.meta.items():
        values, name = np.asarray(column), key.replace("/", "∕")  # a slash would make a group
        if values.dtype.kind in "biuf":
            meta.create_dataset(name, data=values.astype(values.dtype.newbyteorder("<"), copy=False))
        else:
            texts[f"meta/{name}"] = text_array([str(value) for value in column])
    for name, column in texts.items():
        file.create_dataset(name, data=column, dtype=h5py.string_dtype("utf-8"))
    return texts


def _write_output(
    file: h5py.File, store: Store, layout: Layout, places: RowLocations, files: list[tuple[Any, ...]]
) -> None:
    """The index of an output and, where it is of few pieces, its virtual dataset; its shards are added to ``files``."""
    import h5py

    used, number = np.unique(places.file, return_inverse=True)
    entry = file.create_dataset(f"index/{layout.output}", data=np.stack([len(files) + number, places.row], 1))
    sources = {}
    for k in used:
        shard = places.shards[k]
        path, shape = shard.path.relative_to(store.path).as_posix(), (len(shard.digests), *layout.shape)
        files.append((path.encode(), shard.size, shard.offset, len(shard.digests), shard.hash))
        sources[k] = h5py.VirtualSource(path, "features", shape, layout.dtype)
    breaks = (np.diff(places.file) != 0) | (np.diff(places.row) != 1)  # between rows that do not follow each other
    starts = np.flatnonzero(np.append(True, breaks)[: len(places.file)])
    entry.attrs.update(shape=json.dumps(layout.shape), dtype=layout.dtype, virtual=len(starts) <= MAX_MAPPINGS)
    if len(starts) <= MAX_MAPPINGS:
        virtual = h5py.VirtualLayout((len(places.file), *layout.shape), layout.dtype)
        for start, stop in zip(starts, [*starts[1:], len(places.file)], strict=True):
            first = places.row[start]
            virtual[start:stop] = sources[places.file[start]][first : first + stop - start]
        target = file.create_virtual_dataset(layout.output, virtual, fillvalue=np.nan)  # a lost shard is not zeros
        target.attrs.update(layout.attributes())
    else:
        entry.attrs["note"] = (
            f"{layout.output} lies in {len(starts):,} pieces, too many for a virtual dataset; "
            "featurecache.open_view reads it."
        )
    entry.attrs.update(layout.attributes())


def open_view(name: str | Path | None = None, cache: str | Path | None = None, *, copies: bool = False) -> View:
    """Open a view by path, ``store/view``, or name; without a name the one of the last extraction that finished.

    A store may be named by its folder or by its backbone. ``copies``: see `View`. Raises NotInCache, AmbiguousName.
    """
    return View(find_view(name, cache), copies=copies)


def find_view(name: str | Path | None = None, cache: str | Path | None = None) -> Path:
    if name is not None and is_address(name):
        cache, store_word, view_word = str(name).removesuffix(".h5").rsplit("/", 2)
        name = f"{store_word}/{view_word}"
    if name is not None and Path(name).suffix == ".h5" and Path(name).is_file():
        return Path(name)
    if name is not None and "/" in str(name) and Path(f"{name}.h5").is_file():
        return Path(f"{name}.h5")
    folder = cache_folder(cache)
    views = [(store, path) for store in stores(folder) for path in store.views()]
    if not views:
        raise NotInCache(
            f"there is no view in {folder}. Make one with: featurecache extract --backbone NAME --data FOLDER"
        )
    if name is None:
        return max(views, key=lambda item: item[1].lstat().st_mtime_ns)[1]
    store_word, _, view_word = str(name).rpartition("/")
    hits = []
    for store, path in views:
        folder_name = store.path.name
        called = ("", folder_name, store.provenance.get("backbone"), folder_name.rpartition("-")[0])
        if path.stem == view_word and store_word in called:
            hits.append((store, path))
    if len(hits) > 1:
        labels = abbreviated([f"{s.path.name}/{p.stem}" for s, p in hits], 8)
        raise AmbiguousName(f'"{name}" is in {len(hits)} stores: {labels}. Say which with --features STORE/VIEW.')
    if not hits:
        names = [f"{s.provenance.get('backbone', s.path.name)}/{p.stem}" for s, p in views]
        near = nearest(str(name), [*names, *(p.stem for _, p in views)])
        raise UnknownView(f'there is no view "{name}" in {folder}.{near} There are {abbreviated(names, 8)}.')
    return hits[0][1]
