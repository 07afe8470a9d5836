"""Run a frozen vision backbone once over a set of images and keep what it saw in HDF5.

>>> import featurecache
>>> featurecache.extract("digits", backbone="vit-demo", random_weights=True)       # doctest: +SKIP
>>> view = featurecache.open_view("digits")                                         # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the same names, for editors and type checkers
    from featurecache.backbones import load_backbone as load_backbone
    from featurecache.errors import FeatureCacheError as FeatureCacheError
    from featurecache.extraction.canary import compute as compute
    from featurecache.extraction.plan import extract as extract
    from featurecache.extraction.plan import prepare as prepare
    from featurecache.maintenance.collect import collect as collect
    from featurecache.maintenance.collect import compact as compact
    from featurecache.maintenance.collect import remove_view as remove_view
    from featurecache.maintenance.export import export_view as export_view
    from featurecache.maintenance.import_features import import_view as import_view
    from featurecache.maintenance.merge import merge as merge
    from featurecache.sources import open_source as open_source
    from featurecache.store.view import View as View
    from featurecache.store.write_view import open_view as open_view

__version__ = "0.1.0"

# Attribute -> module that defines it; imported when first used, so that `featurecache --help` loads no torch.
_LAZY = {
    "extract": "featurecache.extraction.plan",
    "prepare": "featurecache.extraction.plan",
    "compute": "featurecache.extraction.canary",
    "open_view": "featurecache.store.write_view",
    "View": "featurecache.store.view",
    "export_view": "featurecache.maintenance.export",
    "import_view": "featurecache.maintenance.import_features",
    "remove_view": "featurecache.maintenance.collect",
    "collect": "featurecache.maintenance.collect",
    "compact": "featurecache.maintenance.collect",
    "merge": "featurecache.maintenance.merge",
    "load_backbone": "featurecache.backbones",
    "open_source": "featurecache.sources",
    "FeatureCacheError": "featurecache.errors",
}
__all__ = [*_LAZY, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'featurecache' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return __all__
