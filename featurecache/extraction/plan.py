"""Planning an extraction: from options to the images, the backbone, the store, and what is missing of them.

`prepare` reads and compares and computes nothing; `extract` is it and `Extraction.run`. What would fail only after
hours, a name that cannot be stored or another dataset's view of the same name, is refused here.
"""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial, wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch

from featurecache.arithmetic import exact_arithmetic
from featurecache.backbones import check_name, load_backbone
from featurecache.errors import BadOption, CacheError, SourceError, plain_value
from featurecache.extraction.contents import layouts_of, view_contents
from featurecache.extraction.digest_cache import DigestCache
from featurecache.extraction.forward import pick_device, spec_of
from featurecache.extraction.pipeline import Engine, LocalEngine
from featurecache.extraction.processes import processes_for
from featurecache.extraction.ray_actors import ray_for
from featurecache.extraction.run import Extraction, ExtractionResult
from featurecache.extraction.scan import ScanResult, scan
from featurecache.files.names import is_file_name
from featurecache.files.records import ENGINES, WAYS
from featurecache.formatting import (
    columns,
    cost_per_image,
    counted,
    duration,
    first_of,
    images_per_second,
    shell_words,
    timed_part,
)
from featurecache.images.augmentation import augmentation_of
from featurecache.outputs import parse_list
from featurecache.sources import open_source
from featurecache.sources.base import Dataset
from featurecache.sources.pseudonyms import load_secret, pseudonymise
from featurecache.store.shards import Layout, find_by_digest
from featurecache.store.spec import ExtractionSpec
from featurecache.store.store import (
    Store,
    cache_folder,
    cache_words,
    find_store,
    latest_generation,
    missing_outputs,
    stores,
)

P = ParamSpec("P")
T = TypeVar("T")


def _plain(function: Callable[P, T]) -> Callable[P, T]:
    """Its options are Python's own numbers, each of the kind that it says. Raises BadOption."""
    kinds = {name: each.annotation for name, each in inspect.signature(function).parameters.items() if name != "data"}

    @wraps(function)
    def change(*data: P.args, **options: P.kwargs) -> T:
        for name in options.keys() & kinds.keys():
            options[name] = plain_value(f"--{name.replace('_', '-')}", options[name], kinds[name])
        return function(*data, **options)

    return change


@_plain
@exact_arithmetic()
def prepare(
    data: Any = "digits",
    *,
    backbone: str | Path,
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
    forward: str = "auto",
    batch_size: int | None = None,
    workers: int | None = None,
    engine: str = "local",
    actors: int | None = None,
    num_gpus: float | None = None,
    address: str | None = None,
    on_error: str = "report",
    accept_drift: bool = False,
    cache: str | Path | None = None,
    columns: dict[str, str] | None = None,
    task: str | None = None,
    root: str | None = None,
    uncertain: str | None = None,
    letter_case: str | None = None,
    classes_at: int | None = None,
    leave_out: Sequence[str] = (),
    order: Sequence[str] | None = None,
    page: str | None = None,
    bits: int | None = None,
    crop: Sequence[float] | None = None,
    limit: int | None = None,
    limit_seed: int | None = None,
    hash_ids: bool = False,
    hash_groups: bool = False,
    copies: int | None = None,
    augment: str | None = None,
    augment_seed: int = 0,
    remember: bool = False,
    progress: bool = False,
) -> Extraction:
    """Look at the images, the backbone and the cache; nothing is computed or written.

    ``engine``: where `Extraction.run` computes: local, in this process; processes, in ``actors`` ones of this machine,
    by default one for each GPU; ray, in ``actors`` actors with ``num_gpus`` each, on the cluster at ``address``.
    ``forward``: library, onednn, compiled or openvino; auto measures what is fastest, see
    `featurecache.extraction.choose_forward`.
    ``remember``: write the digests of files to the cache while they are read, so that even a look that is killed need
    not be repeated; otherwise `Extraction.run` writes them. ``hash_ids``, ``hash_groups``: see
    `featurecache.sources.pseudonyms`. ``copies``: so many augmented copies of each training image, made by ``augment``
    ("flip,rotate10,shift0.1", the words of `augmentation.OPERATIONS`) and drawn by ``augment_seed``. Where the data
    have no splits every image gets copies: which of them are for training is decided later. None: those that a view of
    this name has; 0: none.
    """
    _check_options(on_error, batch_size, workers, forward, engine)
    augmented = augmentation_of(copies, augment, augment_seed)
    requested = parse_list(outputs) if outputs is not None else None
    check_name(backbone)
    how: dict[str, Any] = {
        "columns": columns, "task": task, "root": root, "uncertain": uncertain, "letter_case": letter_case,
        "classes_at": classes_at, "leave_out": leave_out, "order": order, "page": page, "bits": bits, "crop": crop,
        "limit": limit, "limit_seed": limit_seed,
    }  # fmt: skip
    if not isinstance(data, Dataset):
        with timed_part("source"):
            data = open_source(data, **how)
    elif given := [option for option, value in how.items() if value not in (None, ())]:
        says = "says" if len(given) == 1 else "say"
        raise BadOption(
            f"{' and '.join(given)} {says} how data are read: give them to open_source, which made this Dataset."
        )
    dataset = data
    folder = cache_folder(cache)
    secret = load_secret(folder) if hash_ids or hash_groups else None
    if secret:
        dataset = pseudonymise(dataset, secret, ids=hash_ids, groups=hash_groups)
    picked = pick_device(device)
    where = _engine(engine, picked, actors, num_gpus, address)
    network = load_backbone(
        backbone, weights=weights, random_weights=random_weights, seed=seed, image_size=image_size, fit=fit,
        remembered=True,
    )  # fmt: skip
    name = name or dataset.name
    _check_storable(dataset, name)
    # decode threads: on a CPU too as many as cores; those that are ahead wait (2 for 1: 8 to 20 % on large images)
    workers = workers or min(16, max(1, (os.cpu_count() or 1) // where.share))
    wanted = requested or parse_list([name for name in (network.vector, "tokens") if name not in network.refusals])
    layouts = layouts_of(network, wanted, dtype)  # refuses what the backbone has not, before anything is read
    if secret and remember:
        secret.keep()
    digest_cache, threads, fail = DigestCache(folder, writes=remember), max(workers, 4), on_error == "fail"
    with timed_part("source"):
        result = scan(dataset, digest_cache, secret.value if secret else b"", threads, progress=progress, fail=fail)
    if trouble := result.files.cache.trouble:
        dataset = replace(dataset, notes=(*dataset.notes, trouble))
    _check_bits(dataset, result)
    spec = spec_of(network, "fp32", dtype, dataset.reading)
    spec, reason = choose_precision(spec, precision, picked, folder, layouts, result.digests)
    spec = latest_generation(folder, spec)
    store = find_store(folder, spec)
    look = partial(
        view_contents, name=name, dataset=dataset, scan=result, network=network, dtype=dtype,
        keeps_copies=copies is None,
    )  # fmt: skip
    contents = look(store, wanted, augmented)
    to_compute, derived = missing_outputs(contents.outputs, contents.layouts, store, contents.digests)
    return Extraction(
        dataset, network, spec, name, folder, picked, on_error, workers, batch_size, store, contents, to_compute,
        derived, result, look, reason, accept_drift, secret, forward, where,
    )  # fmt: skip


def _with_parameters(of: Callable[P, Any]) -> Callable[[Callable[..., T]], Callable[P, T]]:
    """A function that takes what another takes, for editors, ``help`` and type checkers."""

    def change(function: Callable[..., T]) -> Callable[P, T]:
        function.__signature__ = inspect.signature(of)  # type: ignore[attr-defined]
        return function

    return change


@_with_parameters(prepare)
@exact_arithmetic()
def extract(*data: Any, **options: Any) -> ExtractionResult:
    """Run a backbone once over ``data`` and keep its outputs; the parameters are those of `prepare`.

    >>> result = featurecache.extract("chest/", backbone="vit-in21k", outputs="cls,tokens")       # doctest: +SKIP
    >>> featurecache.open_view(result.view).tensor("cls")                                         # doctest: +SKIP
    """
    return prepare(*data, **{"remember": True, **options}).run(progress=options.get("progress", False))


def choose_precision(
    spec: ExtractionSpec, precision: str, device: torch.device, cache: Path, layouts: dict[str, Layout],
    digests: np.ndarray,
) -> tuple[ExtractionSpec, str]:  # fmt: skip
    """``auto``: that of an existing store of this backbone that holds these images, else the device's own."""
    if precision != "auto":
        return replace(spec, precision=precision), "as asked"
    same = [store for store in stores(cache) if replace(store.spec, precision="fp32", generation=0) == spec]
    stored = [(_stored_images(store, layouts, digests), store.spec.precision) for store in same]
    most, best = max(stored, key=lambda each: each[0], default=(0, ""))
    if most:
        return replace(spec, precision=best), "as these images are stored already"
    if device.type == "cuda":
        with torch.cuda.device(device):
            if torch.cuda.is_bf16_supported(including_emulation=False):
                return replace(spec, precision="bf16"), "this GPU's own"
    return spec, "exact"


def _stored_images(store: Store, layouts: dict[str, Layout], digests: np.ndarray) -> int:
    """Most images that the store has one output of; a shard that cannot be read holds none (using it says so)."""
    most = 0
    for layout in layouts.values():
        readable = []
        for path in store.shard_paths(layout.output):
            with contextlib.suppress(CacheError):
                readable.append(store.shard(path, layout))
        most = max(most, int(find_by_digest(readable, digests).mask.sum()))
    return most


def _check_options(on_error: str, batch_size: int | None, workers: int | None, forward: str, engine: str) -> None:
    if engine not in ENGINES:
        raise BadOption(f'--engine is {", ".join(ENGINES)}, not "{engine}".')
    if forward not in ("auto", *WAYS):
        raise BadOption(f'--forward is auto, {", ".join(WAYS)}, not "{forward}".')
    if on_error not in ("report", "skip", "fail"):
        raise BadOption(f'--on-error is report, skip or fail, not "{on_error}".')
    for option, value in (("--batch-size", batch_size), ("--workers", workers)):
        if value is not None and value < 1:
            raise BadOption(f"{option} is at least 1, not {value}.")


def _engine(name: str, device: torch.device, actors: int | None, num_gpus: float | None, address: str | None) -> Engine:
    engines = {"--actors": ("processes", "ray"), "--num-gpus": ("ray",), "--address": ("ray",)}
    for (option, known), value in zip(engines.items(), (actors, num_gpus, address), strict=True):
        if value is not None and name not in known:
            raise BadOption(f"{option} is of --engine {' and '.join(known)}, not of {name}.")
        if isinstance(value, int | float) and value <= 0:
            raise BadOption(f"{option} is more than 0, not {value:g}.")
    if name == "ray":
        return ray_for(device.type, address, actors, num_gpus)
    return processes_for(device, actors) if name == "processes" else LocalEngine()


def _check_bits(dataset: Dataset, looks: ScanResult) -> None:
    """``--bits`` of images none of which it is about."""
    readable = [header for header in looks.headers.values() if not isinstance(header, str)]
    if dataset.bits is not None and readable and not any(header.used for header in readable):
        there = f"none of {counted(len(readable), 'image')} looked at is one"
        raise BadOption(f"--bits {dataset.bits} is about 16-bit files, and {there}. Leave it out.")


def _check_storable(dataset: Dataset, name: str) -> None:
    """What would fail only when the view is written, after everything was computed."""
    if not is_file_name(name, ".h5"):
        raise BadOption(
            f'"{name[:60]}" cannot be the name of a view: no slash, no dot or dash in front, at most 252 bytes. Choose '
            "--name."
        )
    columns = {"ids": dataset.ids, "groups": dataset.groups or [], **dataset.meta}
    for column, values in columns.items():
        text = not isinstance(values, np.ndarray) or values.dtype.kind not in "biuf"
        if column in ("", ".") or "\0" in column or (text and any("\0" in str(value) for value in values)):
            raise SourceError(f'the column "{column}" has a NUL character or no usable name, which HDF5 cannot store.')
    if len({column.replace("/", "∕") for column in dataset.meta}) < len(dataset.meta):
        raise SourceError(f"two of the columns {', '.join(dataset.meta)} would have one name in the view; rename one.")


def extraction_summary(result: ExtractionResult, view_label: str) -> str:
    """What an extraction did, as lines for people; unreadable images are named, at most ten."""
    work = "nothing left to compute"
    if result.computed:
        work = f"{result.computed:,} computed in {duration(result.seconds)} ({images_per_second(result.images_per_s)})"
    elif result.derived:
        work = f"{result.derived:,} derived from stored tokens in {duration(result.seconds)}"
    unread = f"; {len(result.failed):,} could not be kept:" if result.failed else ""
    copies = f" and {result.copies:,} augmented copies" if result.copies else ""
    done = f"{counted(result.images, 'image')}{copies}, {work}{unread}"
    named = shell_words([view_label, *cache_words(result.view.parent.parent)])
    failed = first_of(result.failed, f"more; featurecache info {named} lists them")
    spent = [("time", _time_spent(result)), ("cost", cost_per_image(result.cost))] if result.computed else []
    return columns([("done", "\n".join([done, *failed])), *spent, ("view", f"{view_label} in {result.view}")])


_WAITS = {  # stage of the main loop → what it is, and what makes it shorter
    "computing": ("in the network", ""),
    "decoding": ("waiting for decoded images", "more decode threads (--workers) or a faster disk"),
    "writing": ("waiting for the disk", "fewer outputs (--outputs) or a faster disk"),
}


_LONG = 5  # seconds of waiting: less than the opening of files and libraries may take, which nothing helps


def _time_spent(result: ExtractionResult) -> str:
    """Where the main loop's time went, and what would help where it waited."""
    spent = ", ".join(f"{100 * share:.0f} % {_WAITS[stage][0]}" for stage, share in result.shares.items())
    share, stage = max((result.shares[each], each) for each in ("decoding", "writing"))
    return f"{spent}; {_WAITS[stage][1]} would help" if share > 0.2 and share * result.seconds >= _LONG else spent
