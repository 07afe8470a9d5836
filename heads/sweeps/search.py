"""``--search optuna``: settings proposed by a tree-structured Parzen estimator (Bergstra et al. 2011), not by a grid.

A study for each family; what it makes best is the criterion on val, averaged over seeds and draws. Trials come in
batches, whose heads are trained together. A batch is a line of a journal before it is trained, its results are those of
the rows of the sweep, and what it is proposed from is nothing but the trials before it (the sampler of trial n has the
seed n): a search that was killed goes on exactly as it would have.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featurecache.errors import BadOption
from featurecache.files.records import canonical_json
from heads.runs.run import hash_of
from heads.settings import METRICS, measure_name
from heads.sweeps.grid import DIGITS, Range
from heads.sweeps.journal import SEARCH, JournalFile
from heads.sweeps.plan import PlannedFamily, SweepPlan, has_option

if TYPE_CHECKING:
    from optuna import Study

BATCH = 8  # trials whose heads are trained together; proposed without each other's results
COLUMNS: dict[str, type] = {"key": str, "proposed": list}  # a study with the first trial of a batch, its settings
OWN = ("dropout", "augment")  # options that not every head has
Values = dict[str, Any]
Train = Callable[[Sequence[Values]], Sequence[float]]  # settings -> criterion of each; NaN: a head of it failed


def check_installed() -> None:
    """Raises BadOption where the extra is not."""
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise BadOption("--search optuna needs a package: pip install 'featurecache[optuna]'.") from error


def check_search(plan: SweepPlan) -> None:
    """Raises BadOption where a head has nothing to choose."""
    for family in plan.families:
        if not family.solved and not _space(family, plan.spec.grid):
            raise BadOption(f"--search has nothing to choose for {family.head}; give a range, such as --lr 1e-4..1e-2.")


def search(plan: SweepPlan, family: PlannedFamily, folder: Path, train: Train) -> None:
    """Run the trials of a family. Of those before, ``train`` is asked too, which knows them by the rows of the sweep.
    Raises RunError where the journal of batches is damaged."""
    import optuna

    spec, space, select = plan.spec, _space(family, plan.spec.grid), plan.spec.base.select
    assert spec.trials is not None and space
    fixed = {name: values[0] for name, values in spec.grid.items() if name not in space and isinstance(values, tuple)}
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    highest = METRICS[measure_name(select)].higher
    study = optuna.create_study(direction="maximize" if highest else "minimize")
    batches, name, start = JournalFile(folder / SEARCH, COLUMNS), _study_name(plan, family, space), 0
    while start < spec.trials:
        key = f"{name} {start}"
        if key not in batches.by_key:
            proposed = _proposed(study, space, start, min(BATCH, spec.trials - start))
            batches.append([{"key": key, "proposed": proposed}])
        proposed = batches.by_key[key]["proposed"]
        for values, result in zip(proposed, train([fixed | values for values in proposed]), strict=True):
            _tell(study, space, values, result)
        start += len(proposed)


def _study_name(plan: SweepPlan, family: PlannedFamily, space: dict[str, Any]) -> str:
    """Another one where anything but the number of trials is other."""
    shared = {k: value for k, value in plan.spec.to_dict().items() if k not in ("heads", "outputs", "trials")}
    shared |= {"fractions": None, "space": {name: repr(values) for name, values in space.items()}, "grid": None}
    return f"{family} {hash_of(canonical_json(shared))}"


def _space(family: PlannedFamily, grid: dict[str, Any]) -> dict[str, Any]:
    """What is searched: the options with several values, of those that mean something to the head."""
    several = {name: values for name, values in grid.items() if isinstance(values, Range) or len(values) > 1}
    return {name: values for name, values in several.items() if name not in OWN or has_option(family.head, name)}


def _distributions(space: dict[str, Any]) -> dict[str, Any]:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    def of(values: Any) -> Any:
        if not isinstance(values, Range):
            return CategoricalDistribution(values)
        if isinstance(values.low, int):
            low, high, step = int(values.low), int(values.high), int(values.step or 1)
            return IntDistribution(low, high, log=values.step is None, step=step)
        return FloatDistribution(values.low, values.high, log=values.step is None, step=values.step)

    return {name: of(values) for name, values in space.items()}


def _proposed(study: Study, space: dict[str, Any], done: int, count: int) -> list[Values]:
    """Asked of a copy, so that the study never holds a trial without its result."""
    import optuna

    copy = optuna.create_study(direction=study.direction)
    copy.add_trials(study.get_trials(deepcopy=False))
    proposed = []
    for number in range(done, done + count):
        copy.sampler = optuna.samplers.TPESampler(seed=number, constant_liar=True)
        trial = copy.ask(_distributions(space))
        proposed.append({name: _rounded(value, space[name]) for name, value in trial.params.items()})
    return proposed


def _rounded(value: Any, values: Any) -> Any:
    """A number of a range as people would type it."""
    within = isinstance(values, Range) and not isinstance(value, int)
    return min(max(float(f"{value:.{DIGITS}g}"), values.low), values.high) if within else value


def _tell(study: Study, space: dict[str, Any], values: Values, value: float) -> None:
    """``value`` NaN: a head of it failed, which the sampler takes for worse than all others."""
    from optuna.trial import TrialState, create_trial

    result: dict[str, Any] = {"state": TrialState.PRUNED} if math.isnan(value) else {"value": value}
    study.add_trial(create_trial(params=values, distributions=_distributions(space), **result))
