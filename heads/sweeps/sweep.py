"""Many heads on the features of one or several views: trained together where they can be, chosen on val, kept as runs.

    <sweep>/
      sweep.json        what was asked, and which images, labels and splits it is about
      rows.jsonl        a line for every finished head (`heads.sweeps.rows`)
      heads/<name>/     run folders: of each family the chosen setting, one for every seed, repeat and fold
      search.db         with --search optuna: its trials
      report.html …     written by the command

A killed sweep continues where it was; one that is asked for more computes only what is new. Another sweep, of other
images or with another protocol, is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featurecache.errors import BadOption, ProtocolError, RunError
from heads.choice import choose, family_of, rank
from heads.data import memory_for_features
from heads.networks.baseline_runs import check_network
from heads.pixels import open_pixels
from heads.runs import Run, load_run
from heads.settings import OF_BASELINES, Settings, is_baseline
from heads.sweeps.asked import Asked
from heads.sweeps.folder import (
    RECORD,
    Row,
    check_frame,
    in_use,
    key_in,
    read_sweep,
    slug,
    sweep_folder,
    write_record,
)
from heads.sweeps.plan import has_option, make_plan
from heads.sweeps.rows import ROWS, read_rows
from heads.sweeps.run import Runner, Say, say_plan

if TYPE_CHECKING:
    from heads.families import Family
    from heads.pixels import AnyView


@dataclass(frozen=True)
class Sweep:
    """A sweep folder as it is. ``families``: those whose chosen heads are all there; ``unfinished``: the others."""

    path: Path
    record: dict[str, Any]
    rows: list[Row]
    families: list[Family]
    unfinished: list[str]

    @property
    def best(self) -> Run:
        """A run of the family that is best on val."""

        def place(family: Family) -> tuple[float, float]:
            return rank([{"val": run.metrics["val"]} for run in family.runs], self.record["select"])

        return min(self.families, key=place).runs[0]


def list_sweeps(folder: str | Path = "runs") -> list[Sweep]:
    """The sweeps in a folder, by name; anything else in it is passed over."""
    found = []
    for path in sorted(Path(folder).glob("*/sweep.json")):
        try:
            found.append(load_sweep(path.parent))
        except RunError:  # of another version; load_sweep on it says what is wrong
            continue
    return found


def ablate(
    features: AnyView | str | Path | Sequence[AnyView | str | Path] | None,
    heads: str | Sequence[str],
    *,
    data: Any = None,
    cache: str | Path | None = None,
    out: str | Path | None = None,
    controls: bool | None = None,
    dry_run: bool = False,
    say: Say | None = None,
    progress: bool = False,
    **options: Any,
) -> Sweep | None:
    """Train ``heads`` with every setting of ``options`` (`Asked.of`, and those of ``train_head``) and choose on val.

    Several ``features`` are several backbones on the same images. Networks from pixels among the ``heads`` are trained
    on the images of the first of these; where there are no others, on ``data``. ``out``: a new folder, or that of
    the same sweep, which goes on; None: ``runs/ablate-<view>-<n>``, the first that is either. ``dry_run``: say the
    plan, train and write nothing, return None. Raises BadOption, NotInCache, ProtocolError and RunError before anything
    is trained.
    """
    say = say or (lambda line: None)
    asked = Asked.of(heads, **{**options, "device": _device(heads, options.get("device"))})
    if asked.search:
        from heads.sweeps.search import check_installed

        check_installed()
    views = _opened(features, cache, asked, data, progress)
    ram = memory_for_features() / 1e9 if asked.base.ram is None else asked.base.ram
    plan = make_plan(views, asked, ram)
    if asked.search:
        from heads.sweeps.search import check_search

        check_search(plan)
    folder = sweep_folder(out, plan)
    record = read_sweep(folder) if (folder / RECORD).exists() else None
    if record:
        check_frame(folder, record, plan)
        names = record["views"]
        plan.entries = [
            replace(e, view=names.get(plan.matched.views[e.number].fingerprint, e.view)) for e in plan.entries
        ]
        plan.ram = record["ram"] if asked.base.ram is None else ram
    if dry_run:
        say_plan(plan, folder, read_rows(folder)[0], say, whole=True)
        return None
    with in_use(folder):
        write_record(folder, record, plan)
        Runner(plan, folder, controls, say, progress).run()
    found = load_sweep(folder)
    if not found.families:
        raise ProtocolError(f"No setting of any head worked on every draw; {folder / ROWS} says why of each.")
    return found


def _opened(features: Any, cache: str | Path | None, asked: Asked, data: Any, progress: bool) -> list[AnyView]:
    """The views of features, and the images for networks that are trained from pixels."""
    from featurecache.views import open_view

    baselines = [head for head in asked.heads if is_baseline(head)]
    if data is not None and (features is not None or len(baselines) < len(asked.heads)):
        others = [head for head in asked.heads if head not in baselines]
        why = f"{', '.join(others)} is trained on features" if others else "both are given"
        raise BadOption(f"--data gives images to networks from pixels alone; {why}. --features names a view of both.")
    given = [features] if features is None or isinstance(features, str | Path) or hasattr(features, "ids") else features
    views: list[AnyView] = []
    if data is None:
        views += [open_view(each, cache) if each is None or isinstance(each, str | Path) else each for each in given]
    if not baselines:
        return views
    base = asked.base
    for name in baselines:
        own = [option for option in OF_BASELINES if not has_option(name, option)]
        check_network(replace(base, **{option: getattr(Settings(""), option) for option in own}, head=name))
    images: list[AnyView] = []
    images += open_pixels(
        views[0] if data is None else data, baselines, base.image_size, weights=base.weights, progress=progress
    )
    return images if len(baselines) == len(asked.heads) else [*views, *images]


def _device(heads: str | Sequence[str], asked: str | None) -> str | None:
    """Where networks from pixels are trained; heads on features are on the CPU."""
    names = heads.split(",") if isinstance(heads, str) else heads
    if not any(is_baseline(name.strip()) for name in names):
        return None if asked in (None, "auto") else asked
    from featurecache.forward import pick_device

    return pick_device(asked or "auto").type


def load_sweep(path: str | Path) -> Sweep:
    """Open a sweep folder; raises RunError where it is none."""
    from heads.families import Family

    path = Path(path)
    if not (path / RECORD).is_file():
        raise RunError(f"{path} is no sweep: it has no {RECORD}. featurecache ablate makes one.")
    record, (rows, _) = read_sweep(path), read_rows(path)
    families: dict[tuple[str, str, str, float], list[Row]] = {}
    for row in rows:
        families.setdefault(family_of(row), []).append(row)
    found, unfinished = [], []
    for family, own in families.items():
        choice = choose(own, record["select"])
        folders = [path / "heads" / slug(row) for row in choice.rows] if choice else []
        if not choice or any(key_in(f) != row["key"] for f, row in zip(folders, choice.rows, strict=True)):
            unfinished.append(" ".join(map(str, family[:3])))
            continue
        runs = tuple(load_run(folder) for folder in folders)
        found.append(Family(*family, runs, tuple(own)))
    return Sweep(path, record, rows, found, unfinished)
