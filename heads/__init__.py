"""Train, compare and use small heads on the features of a view.

>>> import heads
>>> run = heads.train_head("digits", "linear")                    # doctest: +SKIP
>>> heads.load_run("runs/digits-linear-1").metrics["test"]        # doctest: +SKIP
>>> heads.predict(run, ["new.png"])                               # doctest: +SKIP

``predict`` is the function; its module is ``heads.prediction``, since importing a module ``heads.predict``
would put the module in the function's place.
"""

from __future__ import annotations

import importlib
from typing import Any

# Attribute -> module that defines it; imported when first used, so that ``import heads`` costs nothing.
_LAZY = {
    "train_head": "heads.train",
    "train_baseline": "heads.networks.baseline_runs",
    "load_run": "heads.runs",
    "list_runs": "heads.runs",
    "Run": "heads.runs",
    "predict": "heads.prediction",
    "explain": "heads.explanations.explaining",
    "ablate": "heads.sweeps.sweep",
    "list_sweeps": "heads.sweeps.sweep",
    "load_sweep": "heads.sweeps.sweep",
    "report": "heads.reports.page",
    "compare": "heads.comparison",
    "families_of": "heads.comparison",
    "evaluate_run": "heads.external",
    "run_study": "heads.studies.run",
    "STUDIES": "heads.studies",
    "HEADS": "heads.architectures",
}
__all__ = [*_LAZY]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'heads' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
