"""Public functions of heads: train a head or a network, sweep over many, report. Checked arguments in, runs out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featurecache.arithmetic import exact_arithmetic
from featurecache.errors import BadOption, CannotWrite, ProtocolError, RunError, Stopped, nearest
from featurecache.files.names import check_path
from featurecache.formatting import abbreviated, clear_status, show_status, timed_part
from featurecache.store.write_view import open_view
from heads.evaluation.comparison import compare
from heads.evaluation.controls import measure_controls
from heads.evaluation.families import Family, families_of, is_same_head, plain_names
from heads.inference import predict_images
from heads.memory import memory_for_features
from heads.models.catalogue import is_baseline, own_settings
from heads.models.common import FINETUNE
from heads.pixel_view import PixelView, open_dataset, open_pixels
from heads.reports.figures import save_pictures
from heads.reports.page import WrittenReport, write_report
from heads.runs.folder import in_use
from heads.runs.run import Run, load_run
from heads.runs.write import OF_THE_PAGE, claim_run, write_run
from heads.settings import HeadOptions, NetworkOptions, Settings, SweepOptions, takes
from heads.splits import read_splits
from heads.sweeps.folder import Sweep, load_sweep, open_sweep, write_sweep
from heads.sweeps.grid import SweepSpec
from heads.sweeps.journal import RECORD, ROWS, read_journal
from heads.sweeps.plan import FROM_PIXELS, SweepPlan, has_option, plan_sweep
from heads.sweeps.runner import SweepRunner, say_plan
from heads.sweeps.search import check_installed, check_search
from heads.task import FeatureView, Say, task_of
from heads.training import network
from heads.training.job import describe_training, prepare_training, request_of
from heads.training.loop import Checkpoint
from heads.training.train import run_contents, train_together

if TYPE_CHECKING:
    from typing_extensions import Unpack


@takes(HeadOptions)
@exact_arithmetic()
def train_head(
    view: FeatureView | str | Path | None, head: str, *, splits: str | Path | None = None,
    classes: Sequence[str] | None = None, only: Sequence[str] | str | None = None, out: str | Path | None = None,
    overwrite: bool = False, controls: bool | None = None, report: bool = True, images: bool = True,
    hash_ids: bool = False, say: Say | None = None, progress: bool = False, **options: Unpack[HeadOptions],
) -> Run:  # fmt: skip
    """Train a head on the features of a view and write a run folder. ``options``: the other fields of
    `heads.settings.Settings`, which are the options of ``featurecache train-head``.

    ``controls``: chance, majority class and logistic regression on pixels beside it; None: where the weights are
    untrained. ``report``: report.html in the folder, with or without ``images`` of the data in it, ids as keyed hashes
    with ``hash_ids``; ``run.metrics["comparison"]`` then holds the intervals. ``out`` that holds the run of this very
    call: that run. Raises UnknownHead, BadOption, NotInCache
    (with the command that stores what is missing), ProtocolError (splits that cannot work) and RunError (a folder in
    the way), all before training.
    """
    say = say or (lambda line: None)
    given = {name: value for name, value in options.items() if value is not None}
    settings = Settings.of(head, splits=splits, classes=classes, only=only, **own_settings(head) | given)
    job = prepare_training(view, settings)
    controls = job.view.untrained if controls is None else controls
    request = request_of(job) | _page_request(controls, report, images, hash_ids)
    with claim_run(out, job.view.name, head, request, overwrite) as target:
        if target.run:
            return _finished(target.run, say)
        describe_training(job, say)
        try:
            with timed_part("training"):
                (fit,) = train_together(job, [settings], say, progress=progress)
        except KeyboardInterrupt as error:
            raise Stopped("stopped. A head is trained in one go: the same command begins again.") from error
        if isinstance(fit, ProtocolError):
            raise fit
        with timed_part("controls"):
            beside = measure_controls(job.view, job.task, job.splits, say, progress) if controls else []
        contents = run_contents(job, fit, beside)
        return write_run(target, contents, partial(_draw_page, images, hash_ids, progress) if report else None)


@takes(NetworkOptions)
@exact_arithmetic()
def train_baseline(
    data: Any, arch: str, *, splits: str | Path | None = None, classes: Sequence[str] | None = None,
    only: Sequence[str] | str | None = None, out: str | Path | None = None, overwrite: bool = False,
    controls: bool = False, report: bool = True, images: bool = True, hash_ids: bool = False, device: str = "auto",
    say: Say | None = None, progress: bool = False, **options: Unpack[NetworkOptions],
) -> Run:  # fmt: skip
    """Train a network from pixels and write a run folder. ``arch``: a name of `heads.models.catalogue.BASELINES`, or
    ``finetune:<backbone>``.

    ``data``: a source as ``--data`` names it, a dataset or what opens one, a view (its images) or a `PixelView`.
    ``options`` are fields of `Settings`; without them they are as published. A checkpoint is written after every epoch:
    the same call goes on where it was interrupted. Raises what `train_head` raises, before anything is trained.
    """
    from featurecache.extraction.forward import pick_device

    say = say or (lambda line: None)
    device = pick_device(device).type
    settings = network.settings_of(arch, splits=splits, classes=classes, only=only, device=device, **options)
    pretrained = network.check_network(settings)
    view: PixelView = data
    if not isinstance(data, PixelView):
        (view,) = _open_images(data, [arch], settings, progress, say)
    job = dataclasses.replace(prepare_training(view, settings), pretrained=pretrained)
    request = request_of(job) | _page_request(controls, report, images, hash_ids)
    with claim_run(out, view.name, arch, request, overwrite) as target:
        if target.run:
            return _finished(target.run, say)
        describe_training(job, say)
        checkpoint = Checkpoint(target.checkpoint)
        fit = network.train_network(job, settings, say, checkpoint, progress)
        beside = measure_controls(job.view, job.task, job.splits, say, progress) if controls else []
        contents = run_contents(job, fit, beside)
        if arch.startswith(FINETUNE):
            contents = network.with_backbone(contents, fit.model.cpu())
        run = write_run(target, contents, partial(_draw_page, images, hash_ids, progress) if report else None)
        checkpoint.remove()
        return run


def _page_request(controls: bool, report: bool, images: bool, hash_ids: bool) -> dict[str, bool]:
    return dict(zip(OF_THE_PAGE, (controls, report, images, hash_ids), strict=True))


def _finished(run: Run, say: Say) -> Run:
    say(f"finished   {run.path} is this very run already; --overwrite trains it again")
    return run


@timed_part("page")
def _draw_page(images: bool, hash_ids: bool, progress: bool, run: Run) -> None:
    """The pictures and the page of a run that is being written, with the intervals in its metrics."""
    show_status("writing the page", progress)
    save_pictures(run)
    families = families_of([run])
    write_report(run.path, families, compare(families), images=images, hash_ids=hash_ids, place=run.folder)
    clear_status()


@exact_arithmetic()
def predict(
    run: Run | str | Path, images: Any, *, columns: dict[str, str] | None = None, device: str = "auto",
    weights: str | None = None, trust_code: bool = False, say: Say | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """A record for each new image, a path, folder, table, encoded bytes, array or PIL image: its class, probability and
    those of all classes; see `heads.inference.predict_images`. Of a sweep's folder the run that it chose answers."""
    opened = run if isinstance(run, Run) else open_run(run, trust_code=trust_code)
    return predict_images(opened, images, columns=columns, device=device, weights=weights, say=say)


def open_run(path: str | Path, *, trust_code: bool = False, say: Say | None = None) -> Run:
    """A run folder; of a sweep's folder the run that it chose, the best on val; ``say`` hears what is not finished of
    it. Raises RunError, also where a head that it might have chosen is damaged."""
    if not (Path(path) / RECORD).is_file():
        return load_run(path, trust_code=trust_code)
    sweep = _chosen_heads(path)
    for name, why in sweep.unfinished.items():
        if say:
            say(f"warning    {name}: {why}")
    return load_run(sweep.best.path, trust_code=trust_code)


def _chosen_heads(path: str | Path, damaged: bool = False) -> Sweep:
    """A sweep of which some head is chosen; ``damaged``: others may be, though the choice among all might be another.
    Raises RunError."""
    sweep = load_sweep(path)
    if sweep.damaged and not damaged:
        name, why = next(iter(sweep.damaged.items()))
        raise RunError(f"{name} of the sweep {sweep.path}: {why} In a sweep the same ablate command does, too.")
    if not sweep.families:
        raise RunError(f"No head of the sweep {path} is chosen: {_reasons(sweep)}.")
    return sweep


def _reasons(sweep: Sweep) -> str:
    reasons = [f"{name}: {why}" for name, why in (sweep.unfinished | sweep.damaged).items()]
    return abbreviated(reasons or ["none is trained yet"], 4)


@takes(SweepOptions)
@exact_arithmetic()
def ablate(
    features: FeatureView | str | Path | Sequence[FeatureView | str | Path] | None, heads: str | Sequence[str], *,
    data: Any = None, cache: str | Path | None = None, out: str | Path | None = None, controls: bool | None = None,
    reference: str | None = None, dry_run: bool = False, say: Say | None = None, progress: bool = False,
    **options: Unpack[SweepOptions],
) -> Sweep | None:  # fmt: skip
    """Train ``heads`` with every setting of ``options`` (`SweepSpec.of`, and those of `train_head`), choose on val.

    Several ``features`` are several backbones on the same images. Networks from pixels among the ``heads`` are trained
    on the images of the first of these; where there are no others, on ``data``. ``out``: a new folder, or that of
    the same sweep, which goes on; None: ``runs/ablate-<view>-<n>``, the first that is either. ``reference``: the one a
    report will compare with; refused now where nothing will be called so. ``dry_run``: say the plan, train and write
    nothing, return None. Raises BadOption, NotInCache, ProtocolError and RunError before anything is trained.
    """
    say, heads = say or (lambda line: None), heads if isinstance(heads, str) else list(heads)
    settings: dict[str, Any] = {**options, "device": _device(heads, options.get("device"))}
    spec = SweepSpec.of(heads, **settings)
    if spec.search:
        check_installed()
    views = _open_views(features, cache, spec, data, progress, say)
    ram = memory_for_features(max(map(len, views))) / 1e9 if spec.base.ram is None else spec.base.ram
    plan = plan_sweep(views, spec, ram)
    if spec.search:
        check_search(plan)
    folder = open_sweep(out, plan)
    _check_reference(reference, plan)
    if dry_run:
        say_plan(plan, folder, read_journal(folder / ROWS)[0], say, whole=True)
        return None
    with in_use(folder, "ablate"):
        write_sweep(folder, plan)
        SweepRunner(plan, folder, controls, say, progress).run()
    sweep = load_sweep(folder)
    if not sweep.families:
        raise ProtocolError(f"No head of {folder} is chosen: {_reasons(sweep)}. {folder / ROWS} has a line of each.")
    return sweep


def _check_reference(reference: str | None, plan: SweepPlan) -> None:
    """Before hours of training: as the report will call a family; a folder may be that of a run."""
    names = plain_names(plan.families)
    if reference is not None and reference not in names and not Path(reference).is_dir():
        raise BadOption(
            f"--reference {reference} is none of what will be compared: {', '.join(names)}.{nearest(reference, names)}"
        )


def _open_views(
    features: Any, cache: str | Path | None, spec: SweepSpec, data: Any, progress: bool, say: Say
) -> list[FeatureView]:
    """The views of features, and the images for networks that are trained from pixels."""
    baselines = [head for head in spec.heads if is_baseline(head)]
    others = [head for head in spec.heads if head not in baselines]
    if data is not None and (features is not None or others):
        why = f"{', '.join(others)} is trained on features" if others else "both are given"
        raise BadOption(f"--data gives images to networks from pixels alone; {why}. --features names a view of both.")
    named = [features] if features is None or isinstance(features, str | Path) or hasattr(features, "ids") else features
    views: list[FeatureView] = []
    if data is None and not named:
        raise BadOption("there are no features to compare heads on: name a view, or several.")
    if data is None:
        views += [open_view(each, cache) if each is None or isinstance(each, str | Path) else each for each in named]
    if not baselines:
        return views
    base, plain = spec.base, Settings("")
    for name in baselines:
        own = {option: getattr(plain, option) for option in FROM_PIXELS if not has_option(name, option)}
        network.check_network(dataclasses.replace(base, **own, head=name))
    first = views[0] if data is None else data
    images = _open_images(first, baselines, base, progress, say)
    return [*(views if others else ()), *images]


def _open_images(data: Any, baselines: Sequence[str], settings: Settings, progress: bool, say: Say) -> list[PixelView]:
    """The images of ``data`` for networks, with what a user should hear of them; classes and splits that the settings
    name are looked for before one is read."""
    from featurecache.sources.summary import notes_of

    dataset: Any = open_dataset(data)  # which names classes as a view does
    task_of(dataset, classes=settings.classes, only=settings.only, positive=settings.positive)
    if settings.splits:
        read_splits(settings.splits, [], [])
    for note in notes_of(dataset):
        say(f"warning    {note}")
    views = open_pixels(dataset, baselines, settings.image_size, weights=settings.weights, progress=progress)
    for failure in views[0].failed:
        say(f"warning    {failure['id']} could not be read and is left out: {failure['reason']}")
    return views


def _device(heads: str | Sequence[str], device: str | None) -> str | None:
    """Where networks from pixels are trained; heads on features are on the CPU."""
    names = heads.split(",") if isinstance(heads, str) else heads
    if not any(is_baseline(name.strip()) for name in names):
        return None if device in (None, "auto") else device
    from featurecache.extraction.forward import pick_device

    return pick_device(device or "auto").type


@exact_arithmetic()
def report(
    paths: Run | str | Path | Sequence[Run | str | Path], *, out: str | Path | None = None,
    reference: str | None = None, by: str | None = None, prevalence: float | None = None, show_test: str = "chosen",
    images: bool = True, hash_ids: bool = False, resamples: int = 2000,
) -> WrittenReport:  # fmt: skip
    """The report of runs or run folders and sweep folders, side by side; the options: those of ``featurecache report``.

    ``out``: by default the folder itself where it is one, else ``report-<n>`` beside the first. Raises RunError for
    what is no run and no sweep, BadOption where they do not compare, CannotWrite.
    """
    named = [paths] if isinstance(paths, Run | str | Path) else paths
    folders = [each.path if isinstance(each, Run) else Path(each) for each in named]
    if not folders:
        raise BadOption("report needs a run folder or a sweep folder, such as runs/chest-large-1.")
    left_out: list[str] = []
    families = families_in(*folders, left_out=left_out)
    folder = _report_folder(folders, out)
    comparison = compare(
        families, reference=reference, by=by, prevalence=prevalence, show_test=show_test, resamples=resamples
    )
    comparison.record["warnings"] += left_out
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CannotWrite(error.errno, f"No report can be written in {folder}: {error.strerror}.") from error
    written = write_report(
        folder, families, comparison, images=images, hash_ids=hash_ids, paths=list(map(str, folders))
    )
    return dataclasses.replace(written, left_out=tuple(left_out))


def families_in(*paths: str | Path, trust_code: bool = False, left_out: list[str] | None = None) -> list[Family]:
    """The families of run folders and sweep folders: those of sweeps as they chose them, then the runs, grouped.

    ``left_out``: takes a sentence for each family of a sweep that is not finished or damaged, and for each run that is
    a head of a sweep; without it a damaged one raises RunError, and no run is looked for.
    """
    families, runs = list[Family](), list[Run]()
    for path in paths:
        if not (Path(path) / RECORD).is_file():
            runs.append(load_run(path, trust_code=trust_code))
            continue
        sweep = _chosen_heads(path, damaged=left_out is not None)
        if left_out is not None:
            left_out += [f"left out: {name}: {why}" for name, why in (sweep.unfinished | sweep.damaged).items()]
        families += sweep.families
    if left_out is not None:
        for family in families:
            inside = [run for run in runs if any(is_same_head(run, each) for each in family.runs)]
            sweep_of = family.runs[0].path.parents[1]
            left_out += [f"left out: {run.path} is one of the heads of {sweep_of}" for run in inside]
            runs = [run for run in runs if run not in inside]
    return [*families, *families_of(runs)]


def _report_folder(folders: Sequence[Path], out: str | Path | None) -> Path:
    """Where the page goes; a folder that holds other things than a report, or another run, is refused."""
    if out is None:
        parent = folders[0].resolve().parent
        numbered = (parent / f"report-{number}" for number in count(1))
        return folders[0] if len(folders) == 1 else next(folder for folder in numbered if not folder.exists())
    check_path(out, "--out")
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise BadOption(f"--out {out} is a file; it must be a folder, or a name that is free.")
    own = len(folders) == 1 and folder.is_dir() and folder.resolve() == folders[0].resolve()
    others = [] if own or not folder.is_dir() else sorted(path.name for path in folder.iterdir())
    if set(others) - {"report.html", "metrics.csv", "metrics.json"}:
        raise BadOption(
            f"--out {out} holds other files ({abbreviated(others, 3)}); give an empty folder or a name that is free."
        )
    return folder
