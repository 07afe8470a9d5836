"""Before anything is computed: the images, the backbone, the cache, and what is missing."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from featurecache import images as _images
from featurecache.backbones import Backbone, load_backbone
from featurecache.engines import ahead
from featurecache.errors import BadOption, SourceError, UnreadableImage
from featurecache.extraction import Extraction, Result, progress_bar
from featurecache.forward import layout_of, pick_device, source_layout, spec_of
from featurecache.outputs import Output, parse, parse_list
from featurecache.reader import View
from featurecache.shards import DIGEST, Layout
from featurecache.sources import Dataset, open_source
from featurecache.spec import ExtractionSpec
from featurecache.stores import Store, cache_folder, find_store, stores


def prepare(
    data: str | Path | Dataset = "digits",
    *,
    backbone: str,
    outputs: str | Sequence[str] | None = None,
    name: str | None = None,
    weights: str | None = None,
    random_weights: bool = False,
    seed: int = 0,
    image_size: int | None = None,
    fit: str = "model",
    precision: str = "auto",
    dtype: str = "float16",
    device: str = "auto",
    batch_size: int | None = None,
    workers: int | None = None,
    on_error: str = "report",
    cache: str | Path | None = None,
    columns: dict[str, str] | None = None,
    task: str | None = None,
    progress: bool = False,
) -> Extraction:
    """Look at the images, the backbone and the cache; nothing is computed or written."""
    _check_options(on_error, batch_size, workers)
    asked = parse_list(outputs) if outputs is not None else None
    dataset = data if isinstance(data, Dataset) else open_source(data, columns=columns, task=task)
    picked = pick_device(device)
    network = load_backbone(
        backbone, weights=weights, random_weights=random_weights, seed=seed, image_size=image_size, fit=fit
    )
    folder = cache_folder(cache)
    name = name or dataset.name
    _check_storable(dataset, name)
    workers = workers or default_workers(picked)
    images, digests, sample_image, unread = _digest_all(dataset, max(workers, 4), progress, on_error)
    spec = spec_of(network, "fp32", dtype)
    spec, reason = _choose_precision(spec, precision, picked, folder, network, digests)
    store = find_store(folder, spec)
    wanted = asked or parse_list([network.vector, "tokens"])
    for output in wanted:
        layout_of(network, output, dtype)  # refuses what the backbone has not
    wanted = _with_kept(wanted, store, name, dataset)
    layouts = {output.name: layout_of(network, output, dtype) for output in wanted}
    layouts |= {o.source: source_layout(network, o, dtype) for o in wanted if o.derived}
    forward, derived = _missing(wanted, layouts, store, digests)
    return Extraction(
        dataset, network, spec, wanted, name, folder, picked, on_error, workers, batch_size, store, images, digests,
        sample_image, unread, layouts, forward, derived, reason,
    )  # fmt: skip


def extract(data: str | Path | Dataset = "digits", *, progress: bool = False, **options: Any) -> Result:
    """Run a backbone once over ``data`` and keep its outputs; see `prepare` for the options.

    >>> result = featurecache.extract("chest/", backbone="vit-in21k", outputs="cls,tokens")       # doctest: +SKIP
    >>> featurecache.open_view(result.view).tensor("cls")                                         # doctest: +SKIP
    """
    return prepare(data, progress=progress, **options).run(progress=progress)


def _choose_precision(
    spec: ExtractionSpec, precision: str, device: torch.device, cache: Path, backbone: Backbone, digests: np.ndarray
) -> tuple[ExtractionSpec, str]:
    """``auto``: that of an existing store of this backbone that holds these images, else the device's own."""
    if precision != "auto":
        return replace(spec, precision=precision), "as asked"
    held = {}
    for store in stores(cache):
        if replace(store.spec, precision="fp32") == spec:
            held[store.spec.precision] = _held(store, backbone, digests)
    if held and max(held.values()) > 0:
        best = max(held, key=lambda key: held[key])
        return replace(spec, precision=best), "as these images are stored already"
    if device.type == "cuda":
        with torch.cuda.device(device):
            if torch.cuda.is_bf16_supported(including_emulation=False):
                return replace(spec, precision="bf16"), "this GPU's own"
    return spec, "exact"


def _held(store: Store, backbone: Backbone, digests: np.ndarray) -> int:
    most = 0
    for folder in store.path.iterdir():
        if folder.is_dir() and any(folder.glob("[0-9a-f]*.h5")):
            layout = layout_of(backbone, parse(folder.name), store.spec.dtype)
            most = max(most, int(store.locate(layout, digests).found.sum()))
    return most


def _with_kept(wanted: tuple[Output, ...], store: Store | None, name: str, dataset: Dataset) -> tuple[Output, ...]:
    """The outputs asked for and those a view of this name has already; refuses to replace another dataset's view."""
    path = store.path / f"{name}.h5" if store else None
    if path is None or not path.exists():
        return wanted
    view = View(path, columns_only=True)
    common = len(set(view.ids) & set(dataset.ids))
    if 2 * common < len(view):
        raise BadOption(
            f"the view {view.label} holds {len(view):,} images of which {common:,} are in "
            f"{dataset.source.get('data')}: it is another dataset. Give this one a name with --name."
        )
    return tuple(dict.fromkeys([*wanted, *(parse(output) for output in view.outputs)]))


def _missing(
    wanted: tuple[Output, ...], layouts: dict[str, Layout], store: Store | None, digests: np.ndarray
) -> tuple[list[tuple[np.ndarray, tuple[Output, ...]]], list[tuple[np.ndarray, tuple[Output, ...]]]]:
    """Images grouped by what is missing of them: (needs the backbone, follows from stored tokens)."""
    there = {key: _found(store, layout, digests) for key, layout in layouts.items()}
    forward, derived = [], []
    key = np.stack([there[name] for name in layouts], 1)
    patterns, group = np.unique(key, axis=0, return_inverse=True)
    for number, pattern in enumerate(patterns):
        rows = np.flatnonzero(group.ravel() == number)
        stored = {name for name, yes in zip(layouts, pattern, strict=True) if yes}
        missing = [output for output in wanted if output.name not in stored]
        follow = tuple(output for output in missing if output.derived and output.source in stored)
        need = tuple(output for output in missing if output not in follow)
        if need:
            forward.append((rows, need))
        if follow:
            derived.append((rows, follow))
    return forward, derived


def _found(store: Store | None, layout: Layout, digests: np.ndarray) -> np.ndarray:
    return store.locate(layout, digests).found if store else np.zeros(len(digests), bool)


def _digest_all(
    dataset: Dataset, workers: int, progress: bool, on_error: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[int, str]]:
    """Read every image once: (first sample of each distinct image, its digest, image of each sample, unread)."""
    digests, unread = np.zeros(len(dataset), DIGEST), {}

    def one(sample: int) -> str | UnreadableImage:
        try:
            return _images.digest(dataset.read(sample))
        except UnreadableImage as error:
            return error

    with ThreadPoolExecutor(workers) as pool, progress_bar(len(dataset), progress, "look") as bar:
        for sample, future in ahead(pool, one, range(len(dataset)), 16 * workers):
            digest = future.result()
            bar.update()
            if isinstance(digest, UnreadableImage):
                if on_error == "fail":
                    raise SourceError(
                        f"{dataset.ids[sample]}: {digest} (--on-error report goes on without it)"
                    ) from digest
                unread[sample] = str(digest)
            else:
                digests[sample] = digest.encode()
    distinct, first, inverse = np.unique(digests, return_index=True, return_inverse=True)
    order = np.argsort(first)  # in the order of the source
    order = order[distinct[order] != b""]
    number = np.full(len(distinct), -1, np.int64)
    number[order] = np.arange(len(order))
    return first[order], distinct[order], number[inverse], unread


def default_workers(device: torch.device) -> int:
    """Decode threads: enough to feed a GPU; on a CPU the forward pass needs the cores."""
    cores = os.cpu_count() or 1
    return min(16, cores) if device.type != "cpu" else max(1, cores // 2)


def _check_options(on_error: str, batch_size: int | None, workers: int | None) -> None:
    if on_error not in ("report", "skip", "fail"):
        raise BadOption(f'--on-error is report, skip or fail, not "{on_error}".')
    for option, value in (("--batch-size", batch_size), ("--workers", workers)):
        if value is not None and value < 1:
            raise BadOption(f"{option} is at least 1, not {value}.")


def _check_storable(dataset: Dataset, name: str) -> None:
    """What would fail only when the view is written, after everything was computed."""
    if not name or name.startswith(".") or "/" in name or "\0" in name or len(f"{name}.h5".encode()) > 255:
        raise BadOption(
            f'"{name[:60]}" cannot be the name of a view: no slash, no dot in front, at most 252 bytes. Choose --name.'
        )
    columns = {"ids": dataset.ids, "groups": dataset.groups or [], **dataset.meta}
    for column, values in columns.items():
        if column in ("", ".") or "\0" in column or any(isinstance(v, str) and "\0" in v for v in values):
            raise SourceError(f'the column "{column}" has a NUL character or no usable name, which HDF5 cannot store.')
    if len({column.replace("/", "∕") for column in dataset.meta}) < len(dataset.meta):
        raise SourceError(f"two of the columns {', '.join(dataset.meta)} would have one name in the view; rename one.")
