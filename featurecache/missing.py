"""What of the wanted outputs a store does not have, and how much of it goes into a shard."""

from __future__ import annotations

import numpy as np

from featurecache.outputs import Output
from featurecache.shards import Layout
from featurecache.stores import Store

SHARD_BYTES, SHARD_ROWS = 256 << 20, 16_384
MOST_BYTES, MOST_SHARDS = 4 << 30, 500  # a shard grows up to MOST_BYTES so that an output has at most about MOST_SHARDS
SHARD_SECONDS = 120.0  # on a slow machine: what a kill may cost


def difference(
    wanted: tuple[Output, ...], layouts: dict[str, Layout], store: Store | None, digests: np.ndarray
) -> tuple[list[tuple[np.ndarray, tuple[Output, ...]]], list[tuple[np.ndarray, tuple[Output, ...]]]]:
    """Images grouped by what is missing of them: (needs the backbone, follows from stored tokens)."""
    assert len(layouts) < 63
    there = {output.name: _found(store, layouts[output.name], digests) for output in wanted}
    for output in wanted:  # tokens that nothing is to be derived from are not even looked for: they may be damaged
        if output.derived and output.source not in there and not there[output.name].all():
            there[output.source] = _found(store, layouts[output.source], digests)
    forward, derived = [], []
    pattern = sum((found.astype(np.int64) << k for k, found in enumerate(there.values())), np.zeros(len(digests), int))
    for number in np.unique(pattern).tolist():
        rows = np.flatnonzero(pattern == number)
        stored = {name for k, name in enumerate(there) if number >> k & 1}
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


def shard_rows(rows: int, row_bytes: int, rate: float | None = None, batch: int = 1) -> int:
    """Rows of a shard: up to 256 MiB or 16,384; more where there would be over 500; at most two minutes of work."""
    length = max(1, min(SHARD_ROWS, SHARD_BYTES // row_bytes))
    length = max(length, min(-(-rows // MOST_SHARDS), MOST_BYTES // row_bytes))
    if rate is not None:
        length = min(length, int(rate * SHARD_SECONDS))
    return max(batch, length // batch * batch)
