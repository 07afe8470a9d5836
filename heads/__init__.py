"""Train, compare and use small heads on the features of a view.

>>> import heads
>>> run = heads.train_head("digits", "linear")                    # doctest: +SKIP
>>> heads.load_run("runs/digits-linear-1").metrics["test"]        # doctest: +SKIP
>>> heads.predict(run, ["new.png"])                               # doctest: +SKIP

``predict`` is the function; its module is ``heads.inference``, since importing a module ``heads.predict``
would put the module in the function's place.
"""

from __future__ import annotations

import importlib
from typing import Any

# Attribute -> module that defines it; imported when first used, so that ``import heads`` costs nothing.
_LAZY = {
    "train_head": "heads.api",
    "train_baseline": "heads.api",
    "load_run": "heads.runs.run",
    "list_runs": "heads.runs.run",
    "Run": "heads.runs.run",
    "predict": "heads.api",
    "explain": "heads.explanations.explain",
    "ablate": "heads.api",
    "list_sweeps": "heads.sweeps.journal",
    "load_sweep": "heads.sweeps.journal",
    "report": "heads.api",
    "compare": "heads.evaluation.comparison",
    "families_of": "heads.evaluation.families",
    "evaluate_run": "heads.evaluation.external",
    "run_study": "heads.studies.runner",
    "STUDIES": "heads.studies.recipes",
    "HEADS": "heads.models.catalogue",
}
__all__ = [*_LAZY]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'heads' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
