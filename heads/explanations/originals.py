"""Back from a run to the images it is of: read from their source by id, and only the very ones it was computed with."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from featurecache.errors import FeatureCacheError
from heads.runs import Run

if TYPE_CHECKING:
    from featurecache.reader import View


@dataclass(frozen=True)
class Original:
    """``data``: encoded bytes or an array; ``pixels``: uint8 [H, W, 3]; ``digest``: 32 hex digits."""

    name: str
    data: bytes | np.ndarray
    pixels: np.ndarray
    digest: bytes


def original(name: str, data: bytes | np.ndarray) -> Original:
    """Raises UnreadableImage."""
    from featurecache.images import decode, digest

    return Original(name, data, decode(data).permute(1, 2, 0).contiguous().numpy(), digest(data).encode())


class Originals:
    """Sources and views of runs, each opened once."""

    def __init__(self) -> None:
        self._datasets: dict[str, Any] = {}
        self._views: dict[str, Any] = {}

    def find(self, run: Run, name: str, digest: bytes | None = None) -> Original | str:
        """The very image, or why it cannot be had. ``digest``: what it was when it was computed with."""
        dataset, where = self._dataset(run.config["view"].get("source") or {})
        if isinstance(dataset, str):
            return dataset
        if name not in where:
            return "no longer in the source"
        try:
            found = original(name, dataset.read(where[name]))
        except (FeatureCacheError, OSError) as error:
            return str(error)
        return found if digest in (None, found.digest) else "changed since it was computed with"

    def _dataset(self, source: dict[str, Any]) -> tuple[Any, dict[str, int]]:
        import featurecache.sources

        key = json.dumps(source, sort_keys=True)
        if key not in self._datasets:
            try:
                dataset = featurecache.sources.reopen(source)
                self._datasets[key] = dataset, {name: i for i, name in enumerate(dataset.ids)}
            except (FeatureCacheError, OSError, KeyError, TypeError):
                self._datasets[key] = "the source is gone", {}
        return self._datasets[key]

    def view(self, run: Run) -> View | None:
        """The view a run was trained on, as it was; None where it is gone or another."""
        from featurecache.views import open_view

        path = run.config["view"]["path"]
        if path not in self._views:
            try:
                found = open_view(path)
                self._views[path] = found if found.fingerprint == run.config["view"].get("fingerprint") else None
            except (FeatureCacheError, OSError):
                self._views[path] = None
        return self._views[path]
