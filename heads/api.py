"""Train_head, train_baseline, ablate, report, families_in: checked arguments in, run or sweep out.

Many heads on the features of one or several views: trained together where they can be, chosen on val, kept as runs.

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

import dataclasses
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featurecache.errors import BadOption, CannotWrite, ProtocolError, RunError
from heads.evaluation.comparison import compare
from heads.evaluation.families import Family, families_of
from heads.models.common import FINETUNE
from heads.pixel_view import PixelView, open_pixels
from heads.reports.figures import save_pictures
from heads.reports.page import WrittenReport, _families, _target, write_report
from heads.runs.run import Run, load_run
from heads.runs.write import run_target, write_run
from heads.settings import OF_BASELINES, Settings, is_network
from heads.sweeps.grid import SweepSpec
from heads.sweeps.journal import (
    RECORD,
    ROWS,
    Sweep,
    check_frame,
    in_use,
    load_sweep,
    read_rows,
    read_sweep,
    sweep_folder,
    write_record,
)
from heads.sweeps.plan import has_option, make_plan
from heads.sweeps.runner import SweepRunner, say_plan
from heads.sweeps.search import check_installed, check_search
from heads.task import Say, memory_for_features
from heads.training.job import describe, prepare
from heads.training.network import Checkpoint, _check_kept, _images, _trained, check_network, settings_of, with_backbone
from heads.training.train import contents_of, controls_beside, train_together

if TYPE_CHECKING:
    from heads.task import FeatureView


def families_in(path: str | Path, trust_code: bool = False) -> list[Family]:
    """The families of a run folder, or the chosen heads of a sweep."""
    if (Path(path) / "sweep.json").is_file():
        families = load_sweep(path).families
        if not families:
            raise RunError(f"No head of the sweep {path} is finished and chosen yet; the same ablate command goes on.")
        return families
    return families_of([load_run(path, trust_code=trust_code)])


def train_baseline(
    data: Any,
    arch: str,
    *,
    splits: str | Path | None = None,
    classes: Sequence[str] | None = None,
    only: Sequence[str] | str | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    controls: bool = False,
    report: bool = True,
    images: bool = True,
    hash_ids: bool = False,
    device: str = "auto",
    say: Say | None = None,
    progress: bool = False,
    **options: Any,
) -> Run:
    """Train ``arch`` (a name of `baselines.BASELINES`, or ``finetune:<backbone>``) on images and write a run.

    ``data``: a source as ``--data`` names it, a dataset, a view (its images) or a `PixelView`. ``options`` are fields
    of `Settings`; those not given are as published. After every epoch the training is kept beside the run to be;
    ``resume`` goes on with it. Raises what `heads.train_head` raises, before anything is trained.
    """
    from featurecache.extraction.pipeline import pick_device

    say = say or (lambda line: None)
    settings = settings_of(arch, splits=splits, classes=classes, only=only, device=pick_device(device).type, **options)
    begun = check_network(settings)
    view = data if isinstance(data, PixelView) else _images(data, settings, progress)
    for failure in view.failed:
        say(f"warning    {failure['id']} could not be read and is left out: {failure['reason']}")
    job = dataclasses.replace(prepare(view, settings), begun=begun)
    target = run_target(out, view.name, arch, overwrite)
    kept = Checkpoint.of(target, job)
    _check_kept(kept, resume, overwrite)
    describe(job, say)
    if kept.there:
        say(f"resumed    after epoch {kept.epoch}")
    fit = _trained(job, settings, say, kept)
    contents = contents_of(job, fit, controls_beside(job, say) if controls else [])
    if arch.startswith(FINETUNE):
        contents = with_backbone(contents, fit.model.cpu())
    run = write_run(target, contents, save_pictures if report else None)
    kept.remove()
    return with_report(run, images, hash_ids) if report else run


def report(
    paths: str | Path | Sequence[str | Path], *, out: str | Path | None = None, reference: str | None = None,
    by: str | None = None, prevalence: float | None = None, show_test: str = "chosen", images: bool = True,
    hash_ids: bool = False, resamples: int = 2000,
) -> WrittenReport:  # fmt: skip
    """The report of run folders and sweep folders, side by side; the options are those of ``featurecache report``.

    ``out``: by default the folder itself where it is one, else ``report-<n>`` beside the first. Raises RunError for
    what is no run and no sweep, BadOption where they do not compare, CannotWrite.
    """
    given = [Path(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
    if not given:
        raise BadOption("report needs a run folder or a sweep folder, such as runs/chest-large-1.")
    families = _families(given)
    folder = _target(given, out)
    comparison = compare(
        families, reference=reference, by=by, prevalence=prevalence, show_test=show_test, resamples=resamples
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CannotWrite(error.errno, f"No report can be written in {folder}: {error.strerror}.") from error
    return write_report(
        folder, families, comparison, images=images, hash_ids=hash_ids, given=[str(path) for path in given]
    )


def train_head(
    view: FeatureView | str | Path,
    head: str,
    *,
    splits: str | Path | None = None,
    classes: Sequence[str] | None = None,
    only: Sequence[str] | str | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    controls: bool | None = None,
    report: bool = True,
    images: bool = True,
    hash_ids: bool = False,
    say: Say | None = None,
    **options: Any,
) -> Run:
    """Train ``head`` on a view and write a run folder; ``options`` are the other fields of `Settings`, which are the
    options of ``featurecache train-head``.

    ``controls``: chance, majority class and logistic regression on pixels beside it; None: where the weights are
    untrained. ``report``: pictures and report.html in the folder, with or without ``images`` of the data in it, ids as
    keyed hashes with ``hash_ids``; ``run.metrics["comparison"]`` then holds the intervals. Raises UnknownHead,
    BadOption, NotInCache (with the command that stores what is missing), ProtocolError (splits that cannot work) and
    RunError (a folder in the way), all before training.
    """
    say = say or (lambda line: None)
    settings = Settings.of(head, splits=splits, classes=classes, only=only, **options)
    job = prepare(view, settings)
    target = run_target(out, job.view.name, head, overwrite)
    describe(job, say)
    (fit,) = train_together(job, [settings], say)
    if isinstance(fit, ProtocolError):
        raise fit
    beside = controls_beside(job, say) if (job.view.untrained if controls is None else controls) else []
    run = write_run(target, contents_of(job, fit, beside), save_pictures if report else None)
    return with_report(run, images, hash_ids) if report else run


def with_report(run: Run, images: bool, hash_ids: bool) -> Run:
    families = families_of([run])
    write_report(run.path, families, compare(families), images=images, hash_ids=hash_ids)
    return load_run(run.path, trust_code=True)


def ablate(
    features: FeatureView | str | Path | Sequence[FeatureView | str | Path] | None,
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
    asked = SweepSpec.of(heads, **{**options, "device": _device(heads, options.get("device"))})
    if asked.search:
        check_installed()
    views = _opened(features, cache, asked, data, progress)
    ram = memory_for_features() / 1e9 if asked.base.ram is None else asked.base.ram
    plan = make_plan(views, asked, ram)
    if asked.search:
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
        SweepRunner(plan, folder, controls, say, progress).run()
    found = load_sweep(folder)
    if not found.families:
        raise ProtocolError(f"No setting of any head worked on every draw; {folder / ROWS} says why of each.")
    return found


def _opened(features: Any, cache: str | Path | None, asked: SweepSpec, data: Any, progress: bool) -> list[FeatureView]:
    """The views of features, and the images for networks that are trained from pixels."""
    from featurecache.store.write_view import open_view

    baselines = [head for head in asked.heads if is_network(head)]
    if data is not None and (features is not None or len(baselines) < len(asked.heads)):
        others = [head for head in asked.heads if head not in baselines]
        why = f"{', '.join(others)} is trained on features" if others else "both are given"
        raise BadOption(f"--data gives images to networks from pixels alone; {why}. --features names a view of both.")
    given = [features] if features is None or isinstance(features, str | Path) or hasattr(features, "ids") else features
    views: list[FeatureView] = []
    if data is None:
        views += [open_view(each, cache) if each is None or isinstance(each, str | Path) else each for each in given]
    if not baselines:
        return views
    base = asked.base
    for name in baselines:
        own = [option for option in OF_BASELINES if not has_option(name, option)]
        check_network(replace(base, **{option: getattr(Settings(""), option) for option in own}, head=name))
    images: list[FeatureView] = []
    images += open_pixels(
        views[0] if data is None else data, baselines, base.image_size, weights=base.weights, progress=progress
    )
    return images if len(baselines) == len(asked.heads) else [*views, *images]


def _device(heads: str | Sequence[str], asked: str | None) -> str | None:
    """Where networks from pixels are trained; heads on features are on the CPU."""
    names = heads.split(",") if isinstance(heads, str) else heads
    if not any(is_network(name.strip()) for name in names):
        return None if asked in (None, "auto") else asked
    from featurecache.extraction.pipeline import pick_device

    return pick_device(asked or "auto").type
