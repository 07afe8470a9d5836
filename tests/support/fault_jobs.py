"""What the child processes of the fault tests do: one operation each, arguments and answers as JSON; and damages to
files of a cache, with what verify, the readers, repair and an extraction make of them."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import resource
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import transformers
import xxhash
from sklearn.datasets import load_digits

import featurecache
from featurecache.errors import FeatureCacheError, NotInCache, ViewReplaced
from featurecache.extraction import run
from featurecache.extraction.canary import read_canary
from featurecache.files import atomic
from featurecache.maintenance import collect, repair
from featurecache.maintenance import merge as merging
from featurecache.maintenance import verify as verification
from featurecache.sources.base import Dataset, ImageArrays
from featurecache.store import store
from featurecache.store.store import stores
from featurecache.store.view import View
from heads.api import ablate, train_baseline, train_head
from heads.sweeps.verify import verify_runs
from support.checkpoints import save_vit
from support.fake_view import toy_view
from support.pictures import image_folder

transformers.utils.logging.disable_progress_bar()

RESULTS = ("head.safetensors", "answers.safetensors", "splits.csv", "predictions.csv")  # of a run
Rows = dict[str, dict[str, str]]  # id → output (or "label", "split") → hash of the row's bytes


def make(home: str, images: int) -> None:
    """A backbone and two folders of images: the second has lost one, got two, and one stands elsewhere."""
    folder = Path(home)
    save_vit(folder / "vit", hidden_size=32, num_hidden_layers=1)
    image_folder(folder / "data", images)
    grown = image_folder(folder / "grown", images + 2)
    (grown / "ill" / "002.png").unlink()
    (grown / "ill" / "000.png").rename(grown / "well" / "000.png")
    time.sleep(2.1)  # files that have just changed are not remembered: every run shall take the same steps


def extract(
    data: str, backbone: str, cache: str, outputs: str = "cls,tokens", rows: int = 4, room: bool = False,
    pause: float = 0, **more: Any,
) -> dict[str, int]:  # fmt: skip
    """In shards of ``rows`` images. ``room``: without asking first how much the disk has left. ``pause``: seconds
    between the making of a file and its lock, as on a busy machine."""
    store.SHARD_ROWS = rows
    if pause:
        flock = atomic.fcntl.flock
        atomic.fcntl.flock = lambda *arguments: (time.sleep(pause), flock(*arguments))[1]
    if room:
        run.Extraction.check_disk = lambda self: None  # type: ignore[method-assign]
    options = {"backbone": backbone, "cache": cache, "outputs": outputs, "name": "set", "batch_size": 4, **more}
    result = featurecache.extract(data, **options)
    return {"computed": result.computed, "derived": result.derived, "images": result.images}


def mend(cache: str) -> dict[str, Any]:
    found = repair.repair(Path(cache))
    return {
        "computed": sum(each.computed for each in found),
        "kept": sum(each.kept for each in found),
        "left": [str(damage) for each in found for damage in each.left],
    }


def verify(cache: str) -> list[str]:
    return [str(damage.path) for damage in verification.verify(Path(cache)).damages]


def gc(cache: str) -> int:
    return collect.collect(cache, delete=True).bytes


def gc_said(cache: str) -> list[str]:
    return [str(each.left) for each in collect.collect(cache, delete=True).stores]


def compact(cache: str, name: str) -> int:
    return collect.compact(name, cache).written


def merge(cache: str, other: str) -> bool:
    return all(each.complete for each in merging.merge(other, cache))


def remove(cache: str, name: str) -> None:
    with contextlib.suppress(NotInCache):  # done already
        collect.remove_view(name, cache)


def contents(view: View, one_by_one: bool = False) -> Rows:
    """All rows; ``one_by_one``: each by itself, in place of one that cannot be read its error."""
    rows: Rows = {
        sample: {"label": str(label), "split": split, "digest": digest.decode()}
        for sample, label, split, digest in zip(view.ids, view.labels, view.splits, view.digests, strict=True)
    }
    for output in view.outputs:
        cells: list[str] = []
        for part in [[number] for number in range(len(view))] if one_by_one else [None]:
            try:
                read = view.array(output, part)
                cells += [f"{row.dtype} {row.shape} {xxhash.xxh3_128_hexdigest(row.tobytes())}" for row in read]
            except FeatureCacheError as error:
                if not one_by_one:
                    raise
                cells.append(f"{type(error).__name__}: {error}")
        for sample, cell in zip(view.ids, cells, strict=True):
            rows[sample][output] = cell
    return rows


def read(cache: str, one_by_one: bool = False) -> dict[str, Rows | str]:
    """View → its `contents`, or the error that opening or reading it gives."""
    found: dict[str, Rows | str] = {}
    for place in stores(Path(cache)):
        for path in place.views():
            while path.stem not in found:
                try:
                    found[path.stem] = contents(View(path), one_by_one)
                except ViewReplaced:  # says: open it again
                    continue
                except FeatureCacheError as error:
                    found[path.stem] = f"{type(error).__name__}: {error}"
    return found


def read_again_and_again(cache: str, stop: str) -> list[dict[str, Rows | str]]:
    """Until the file ``stop`` is there: each state that was seen, once."""
    seen: list[dict[str, Rows | str]] = []
    while not Path(stop).exists():
        if (state := read(cache)) not in seen:
            seen.append(state)
    return seen


def sweep_again_and_again(cache: str, stop: str) -> int:
    """What every extraction begins with; how often."""
    for count in itertools.count():
        time.sleep(0.01)
        for place in stores(Path(cache)):
            place.sweep()
        if Path(stop).exists():
            return count
    return 0


def verify_again_and_again(cache: str, stop: str) -> list[str]:
    found: set[str] = set()
    while not Path(stop).exists():
        found.update(str(damage) for damage in verification.verify(Path(cache)).damages)
    return sorted(found)


def with_file_limit(job: str, most: int, **arguments: Any) -> Any:
    """No file may grow beyond ``most`` bytes: the write gives EFBIG."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
    try:
        return globals()[job](**arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def after(job: str, cache: str, **arguments: Any) -> dict[str, Any]:
    """What a fault left, then the same operation once more, and what there is then."""
    before = state(cache)
    shards = committed(cache)
    globals()[job](cache=cache, **arguments)
    now = committed(cache)
    lost = [name for name, found in shards.items() if now.get(name) != found]
    return {"before": before, "after": state(cache), "changed": lost, "left": leftovers(cache)}


def state(cache: str) -> dict[str, Any]:
    damaged = verify(cache)
    return {"views": read(cache), "damaged": damaged, "records": [] if damaged else records(cache)}


def records(cache: str) -> list[Any]:
    """Of each store the plan without what an image cost, and what was made of the probe images."""
    found = []
    for place in stores(Path(cache)):
        kept = read_canary(place)
        tokens = kept and xxhash.xxh3_64_hexdigest(kept.rows["tokens"].numpy().tobytes())
        plan = {device: {**how, "cost": None} for device, how in (place.plan or {}).items()}
        found.append([place.fingerprint, plan, tokens])
    return found


def committed(cache: str) -> dict[str, str]:
    return {str(path): xxhash.xxh3_128_hexdigest(path.read_bytes()) for path in Path(cache).glob("*/*/*.h5")}


def leftovers(cache: str) -> list[str]:
    """Temporary files, marks, journals: what lies in a cache only while somebody works there."""
    found = Path(cache).rglob("*")
    return [str(path) for path in found if path.name.startswith(".") or path.suffix == ".sqlite-journal"]


def copy(start: str, cache: str) -> None:
    shutil.copytree(start, cache, dirs_exist_ok=True)


def damaged(whole: bytes, how: str, place: int, more: int) -> bytes:
    """``bit`` number ``more`` of the byte there; ``cut`` there; ``grow`` by so many zeros; ``ones`` in so many bytes;
    ``swap`` so many bytes with the next ones; ``gone``: nothing is left."""
    head, here, after = whole[:place], whole[place : place + more], whole[place + more : place + 2 * more]
    ways = {
        "gone": lambda: b"",
        "bit": lambda: head + bytes([whole[place] ^ 1 << more]) + whole[place + 1 :],
        "cut": lambda: head,
        "grow": lambda: whole + bytes(more),
        "ones": lambda: head + b"\xff" * len(here) + whole[place + more :],
        "swap": lambda: head + after + here + whole[place + 2 * more :],
    }
    return ways[how]()


def flips(
    start: str, work: str, changes: list[list[tuple[str, str, int, int]]], then: str, **extraction: Any
) -> list[dict[str, Any]]:
    """Each of the ``changes`` (damages made together) in a fresh copy of the cache ``start``: what `verify` names and
    what can be read; then ``mend`` or ``extract``, and the same again. As decay of the disk would have it: nothing that
    the system knows of a file has changed."""
    results = []
    for number, together in enumerate(changes):
        cache = f"{work}/{number}"
        copy(start, cache)
        for name, how, place, more in together:
            path = Path(cache) / name
            data = damaged(path.read_bytes(), how, place, more)
            path.unlink() if how == "gone" else path.write_bytes(data)
        seen = {"verify": verify(cache), "read": read(cache, True), "done": _done(then, cache, extraction)}
        if then or not together:
            seen |= {"after": read(cache, True), "left": verify(cache), "files": committed(cache)}
        results.append(json.loads(json.dumps(seen).replace(f"{cache}/", "")))  # paths as they are below the cache
    return results


def _done(then: str, cache: str, extraction: dict[str, Any]) -> Any:
    try:
        if then == "mend":
            return {**mend(cache), "records": records(cache)}
        return extract(cache=cache, **extraction) if then == "extract" else None
    except FeatureCacheError as error:
        return f"{type(error).__name__}: {error}"


def warm(home: str) -> None:
    """Have everything imported that the jobs import."""
    make(home, 4)
    extract(f"{home}/data", f"{home}/vit", f"{home}/cache", "cls,tokens,mean")
    next(Path(f"{home}/cache").glob("*/tokens/*.h5")).unlink()
    mend(f"{home}/cache")
    compact(f"{home}/cache", "set")
    state(f"{home}/cache")


def extract_into_storage(state: str, cache: str, address: str, **more: Any) -> dict[str, int]:
    """On a machine with this state folder; ``cache`` is what is watched, and not used."""
    os.environ["FEATURECACHE_STATE"] = state
    return extract(cache=address, **more)


# runs and sweeps: trained in a folder, and what lies there afterwards


def train_run(cache: str, **options: Any) -> str:
    view = toy_view(n=100, splits="given", noise=2)
    run = train_head(view, "linear", out=Path(cache, "run"), **{"epochs": 1, "report": False, **options})
    return run.config["created"]


def train_network(cache: str) -> None:
    found = load_digits()
    rows = np.flatnonzero(found.target < 2)[:40]
    data = Dataset(
        name="digits", source={"kind": "digits", "data": "digits"}, ids=[f"digits:{row}" for row in rows],
        labels=found.target[rows].astype(np.int64), splits=[""] * len(rows), groups=None, meta={}, classes=["0", "1"],
        task="binary", images=ImageArrays([np.rint(found.images[rows] * (255 / 16)).astype(np.uint8)]),
    )  # fmt: skip
    options = {"epochs": 2, "image_size": 8, "batch_size": 16, "augment": "none", "device": "cpu", "select": "loss"}
    train_baseline(data, "cnn-cifar", out=Path(cache, "run"), report=False, **options)


def train_sweep(cache: str) -> None:
    view = toy_view(n=100, splits="given", noise=2)
    ablate(view, "linear,ridge", out=Path(cache, "sweep"), epochs=1, lr="1e-3,1e-2", batch_size=32)


def look_at_runs(cache: str) -> dict[str, Any]:
    """Every file there, hidden ones too; the hashes of those that equal trainings have alike; what verify says."""
    files = sorted(path for path in Path(cache).rglob("*") if path.is_file())
    results = {
        str(f.relative_to(cache)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files if f.name in RESULTS
    }
    damages = [str(damage) for damage in verify_runs([Path(cache)]).damages]
    return {"files": [str(path.relative_to(cache)) for path in files], "results": results, "damages": damages}
