"""What lies in a cache: its files, the rows of a store, whether all of it is whole; and a kill at a certain step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
import pytest

import featurecache
from featurecache.maintenance.verify import verify
from featurecache.store.shards import Shard, ShardWriter, find_by_key, notes_for, read_shard, row_keys
from featurecache.store.store import Store
from featurecache.store.view import View
from featurecache.store.write_view import columns_of, write_view
from support.builders import CLS, TOKENS, digests, features

LAYOUTS = {"cls": CLS, "tokens": TOKENS}


class Killed(BaseException):
    """Stands for a kill: nothing of ours catches it."""


def files(cache: Path) -> dict[str, bytes]:
    return {str(path.relative_to(cache)): path.read_bytes() for path in sorted(cache.rglob("*")) if path.is_file()}


def shards(store: Path | Store, output: str) -> list[Path]:
    return sorted((store.path if isinstance(store, Store) else store).glob(f"{output}/*.h5"))


def rows_in(store: Store, output: str) -> list[int]:
    """Images whose rows lie in the shards, sorted, with repeats; each row is whole, and its rounding error its own."""
    images: list[int] = []
    for path in shards(store, output):
        shard = read_shard(path, LAYOUTS[output])
        numbers = [int(digest, 16) for digest in shard.digests.tolist()]
        with h5py.File(path) as file:
            assert np.array_equal(file["features"][...], features(numbers, LAYOUTS[output]))
        assert np.allclose(shard.errors, np.array(numbers) / 1000)
        assert shard.notes["fingerprint"] == store.fingerprint
        images += numbers
    return sorted(images)


def is_whole(cache: Path, **orders: Sequence[int]) -> None:
    """Nothing is damaged, no draft lies about, and each view has the rows of its images."""
    assert verify(cache).damages == () and list(cache.rglob("*.tmp")) == []
    for name, order in orders.items():
        view = featurecache.open_view(name, cache)
        assert view.digests.tolist() == digests(order).tolist()
        for output in view.outputs:
            assert np.array_equal(view.array(output), features(order, LAYOUTS[output]))


def add_shifted(store: Store, numbers: Sequence[int], shift: float) -> Shard:
    """A shard of cls with other values than the images have elsewhere."""
    writer = ShardWriter(store.path, digests(numbers), CLS, notes_for(store.fingerprint, "cpu", {"threads": 1}))
    writer.append(digests(numbers).tolist(), features(numbers, CLS) + np.float16(shift))
    return read_shard(writer.commit() or store.path, CLS)


def view_on(view: View, store: Store, name: str, shard: Shard) -> None:
    """The same view under another name, on the rows that its images have in ``shard``."""
    checksum = dict(zip(shard.digests.tolist(), shard.checksums.tolist(), strict=True))
    sums = np.array([checksum[digest] for digest in view.digests.tolist()], "u8")
    places = find_by_key([shard], row_keys(view.digests, sums))
    write_view(store, name, columns_of(view), view.attributes, {CLS: places})


@contextmanager
def killed_at(owner: object, name: str, count: int) -> Iterator[None]:
    """Instead of the call of this number a kill; without so many calls none."""
    real, calls = getattr(owner, name), []

    def guarded(*words, **options):  # type: ignore[no-untyped-def]
        calls.append(words)
        if len(calls) == count:
            raise Killed
        return real(*words, **options)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(owner, name, guarded)
        yield
