"""Run a frozen vision backbone once over a set of images and keep what it saw in HDF5.

>>> import featurecache
>>> featurecache.extract("digits", backbone="vit-demo", random_weights=True)       # doctest: +SKIP
>>> view = featurecache.open_view("digits")                                         # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# Attribute -> module that defines it; imported when first used, so that `featurecache --help` loads no torch.
_LAZY = {
    "extract": "featurecache.planning",
    "prepare": "featurecache.planning",
    "compute": "featurecache.again",
    "open_view": "featurecache.views",
    "View": "featurecache.reader",
    "export_view": "featurecache.exporting",
    "import_view": "featurecache.importing",
    "remove_view": "featurecache.lifecycle",
    "collect": "featurecache.lifecycle",
    "compact": "featurecache.lifecycle",
    "merge": "featurecache.merging",
    "load_backbone": "featurecache.backbones",
    "open_source": "featurecache.sources",
    "FeatureCacheError": "featurecache.errors",
}
__all__ = [*_LAZY, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'featurecache' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
