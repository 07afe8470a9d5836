"""What the child processes of the fault tests do: one operation each, arguments and answers as JSON."""

from __future__ import annotations

import contextlib
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers
import xxhash

import featurecache
from featurecache.errors import FeatureCacheError, NotInCache
from featurecache.extraction import run
from featurecache.extraction.canary import read_canary
from featurecache.maintenance import collect, repair
from featurecache.maintenance import merge as merging
from featurecache.maintenance import verify as verification
from featurecache.store import store
from featurecache.store.store import stores
from featurecache.store.view import View
from support.checkpoints import save_vit
from support.pictures import image_folder

transformers.utils.logging.disable_progress_bar()

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
    data: str, backbone: str, cache: str, outputs: str = "cls,tokens", rows: int = 4, room: bool = False, **more: Any
) -> dict[str, int]:
    """In shards of ``rows`` images. ``room``: without asking first how much the disk has left."""
    store.SHARD_ROWS = rows
    if room:
        run.Extraction.check_disk = lambda self: None  # type: ignore[method-assign]
    options = {"backbone": backbone, "cache": cache, "outputs": outputs, "name": "set", "batch_size": 4, **more}
    result = featurecache.extract(data, **options)
    return {"computed": result.computed, "derived": result.derived, "images": result.images}


def mend(cache: str, drop: bool = False) -> dict[str, Any]:
    found = repair.repair(Path(cache), drop=drop)
    return {
        "computed": sum(each.computed for each in found),
        "kept": sum(each.kept for each in found),
        "gone": [list(pair) for each in found for pair in each.gone],
        "left": [str(damage) for each in found for damage in each.left],
        "replaced": sorted(str(path) for each in found for path in each.replaced),
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


def contents(view: View) -> Rows:
    rows: Rows = {
        sample: {"label": str(label), "split": split, "digest": digest.decode()}
        for sample, label, split, digest in zip(view.ids, view.labels, view.splits, view.digests, strict=True)
    }
    for output in view.outputs:
        for sample, row in zip(view.ids, view.array(output), strict=True):
            rows[sample][output] = f"{row.dtype} {row.shape} {xxhash.xxh3_128_hexdigest(row.tobytes())}"
    return rows


def of_views(cache: str, what: Callable[[View], Any]) -> dict[str, Any]:
    """View → what it gives, or the error that opening or reading it gives."""
    found: dict[str, Any] = {}
    for place in stores(Path(cache)):
        for path in place.views():
            try:
                found[path.stem] = what(View(path))
            except FeatureCacheError as error:
                found[path.stem] = f"{type(error).__name__}: {error}"
    return found


def read(cache: str) -> dict[str, Rows | str]:
    """All rows of all views, or the error that one gives."""
    return of_views(cache, contents)


def read_again_and_again(cache: str, stop: str) -> list[dict[str, Rows | str]]:
    """Until the file ``stop`` is there: each state that was seen, once."""
    seen: list[dict[str, Rows | str]] = []
    while not Path(stop).exists():
        if (state := read(cache)) not in seen:
            seen.append(state)
    return seen


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
    value = globals()[job](cache=cache, **arguments)
    now = committed(cache)
    lost = [name for name, found in shards.items() if now.get(name) != found]
    return {"before": before, "value": value, "after": state(cache), "changed": lost, "left": leftovers(cache)}


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


def warm(home: str) -> None:
    """Have everything imported that the jobs import."""
    make(home, 4)
    extract(f"{home}/data", f"{home}/vit", f"{home}/cache", "cls,tokens,mean")
    next(Path(f"{home}/cache").glob("*/tokens/*.h5")).unlink()
    mend(f"{home}/cache")
    compact(f"{home}/cache", "set")
    state(f"{home}/cache")
