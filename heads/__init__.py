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
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the same names, for editors and type checkers
    from heads.api import ablate as ablate
    from heads.api import predict as predict
    from heads.api import report as report
    from heads.api import train_baseline as train_baseline
    from heads.api import train_head as train_head
    from heads.evaluation.comparison import compare as compare
    from heads.evaluation.external import evaluate_run as evaluate_run
    from heads.evaluation.families import families_of as families_of
    from heads.explanations.explain import explain as explain
    from heads.models.catalogue import HEADS as HEADS
    from heads.runs.run import Run as Run
    from heads.runs.run import list_runs as list_runs
    from heads.runs.run import load_run as load_run
    from heads.studies.recipes import STUDIES as STUDIES
    from heads.studies.runner import run_study as run_study
    from heads.sweeps.folder import list_sweeps as list_sweeps
    from heads.sweeps.folder import load_sweep as load_sweep

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
    "list_sweeps": "heads.sweeps.folder",
    "load_sweep": "heads.sweeps.folder",
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


def __dir__() -> list[str]:
    return __all__
