"""Runner of a study: its steps one after another, each in the journal once it is finished; then its page."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from featurecache import __version__
from featurecache.arithmetic import exact_arithmetic
from featurecache.errors import FeatureCacheError, RunError, StepFailed, Stopped
from featurecache.files.atomic import write_whole
from featurecache.formatting import aligned, duration, number, one_line, show_status
from featurecache.store.write_view import open_view
from heads import api
from heads.explanations.explain import explain
from heads.explanations.methods import Transformer, has_class_token
from heads.metrics.classification import UNTRAINED
from heads.reports.page import ranked
from heads.reports.text import interval
from heads.runs.folder import in_use, read_checked_record, seal_folder, write_record
from heads.runs.run import Run, load_run, name_of
from heads.runs.write import check_out
from heads.settings import measure_name, title
from heads.splits import splits_csv
from heads.studies.images import few_of, open_sets, signature, sources_of
from heads.studies.page import StudyResult, write_study
from heads.studies.plan import (
    PlannedStep,
    StudyOptions,
    call_text,
    check_packages,
    check_weights,
    machine_gflops,
    plan_study,
    read_weights,
    stand_ins,
    wanted_steps,
)
from heads.studies.recipes import load_study
from heads.studies.spec import ExplainStep, Extract, Heads, Network, Step, Study
from heads.studies.tables import StudyTable, overview_of
from heads.sweeps.folder import load_sweep
from heads.sweeps.journal import JournalFile, read_journal

if TYPE_CHECKING:
    from featurecache.sources.base import Dataset

LONG = 8 * 60.0  # minutes; beyond it the ways to a shorter run are said
SHOWN = 12  # heads of a question, in the terminal
RECORD, STEPS = "study.json", "steps.jsonl"
COLUMNS: dict[str, type] = {"step": str, "asked": dict, "made": dict, "seconds": float}
Say = Callable[[str], None]
Row = dict[str, Any]


@exact_arithmetic()
def run_study(
    name: str, *, out: str | Path | None = None, cache: str | Path | None = None, images: bool = True,
    hash_ids: bool = False, dry_run: bool = False, say: Say | None = None, progress: bool = False,
    data: Sequence[str] = (), quick: bool = False, random_weights: bool = False, weights: Sequence[str] = (),
    image_size: int | None = None, epochs: int | None = None, train_per_class: int | None = None,
    only: Sequence[str] = (), skip: Sequence[str] = (), device: str = "auto",
) -> StudyResult:  # fmt: skip
    """Run the study ``name``, as ``featurecache study`` does; ``weights``: ``BACKBONE=PATH`` each.

    Raises UnknownStudy, BadOption, WeightsNotFound (before anything is computed), SourceError, RunError (a folder in
    the way), StepFailed (which step, and why).
    """
    from featurecache.extraction.forward import pick_device

    say = say or (lambda line: None)
    study = load_study(name)
    chosen = StudyOptions(
        tuple(data), quick, random_weights, read_weights(weights, study), image_size, epochs, train_per_class,
        tuple(only), tuple(skip), device,
    )  # fmt: skip
    default = Path("studies") / (f"{name}-quick" if chosen.quick else name)
    folder = check_out(default if out is None else out, RECORD, "study", ("few", "drawn"))
    record = _read_record(folder, study, chosen)
    if record.get("data") and not chosen.data:  # need not be said again
        say(f"data       {', '.join(record['data'])}   (as before)")
        chosen = replace(chosen, data=tuple(record["data"]))
    finished = {row["step"]: row for row in read_journal(folder / STEPS, COLUMNS)[0]}
    sources = sources_of(study, chosen.data)
    sets = set(sources) or {images.name for images in study.images if images.default}
    wanted = [step for step in wanted_steps(study, chosen) if study.set_of(step) in sets]
    missing = [step for step in wanted if step.name not in finished]
    check_packages(missing, chosen.quick)
    if not dry_run:  # which would fetch them
        check_weights(study, chosen, missing)
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch) if dry_run else folder
        opened = open_sets(study, sources, chosen.quick, place, [study.set_of(step) for step in wanted])
        # of what a dry run draws anew the times differ, and nothing else
        marks = {name: signature(each) for name, each in opened.items() if not (dry_run and each.drawn)}
        for name, before in record.get("images", {}).items():
            if marks.get(name, before) != before:
                raise RunError(
                    f"{folder} holds this study of other images: {before.get('source')}, {before.get('images')} "
                    "images, were others then, or have changed. --out NAME begins another."
                )
        if chosen.quick:
            opened = {k: each if each.drawn else few_of(each, place / "few" / k) for k, each in opened.items()}
    planned = plan_study(study, chosen, opened, machine_gflops(pick_device(chosen.device).type))
    result = StudyResult(study, chosen, folder, opened, *planned, finished)
    for line in plan_lines(result):
        say(line)
    if dry_run:
        return result
    with in_use(folder, f"study {study.name}"):
        rows = StudyRunner(result, Path(cache) if cache else None, say, progress).run(record, marks)
        show_status("writing the page", progress)
        written = write_study(replace(result, rows=rows), images=images, hash_ids=hash_ids)
        seal_folder(folder, RECORD, _record_in(folder), (STEPS, "report.html"))
    return written


def _read_record(folder: Path, study: Study, options: StudyOptions) -> dict[str, Any]:
    """What the folder holds: nothing, or this study asked for alike. Raises RunError."""
    if not (folder / RECORD).exists():
        return {}
    record = _record_in(folder)
    before = record["asked"]
    if record["study"] != study.name:
        raise RunError(f"{folder} holds the study {record['study'][:60]}; give another --out.")
    differing = [
        f"{name.replace('_', ' ')} {_value_text(before.get(name))} → {_value_text(value)}"
        for name, value in options.to_dict().items()
        if before.get(name) != value
    ]
    if differing:
        raise RunError(
            f"{folder} holds this study as it was asked otherwise ({'; '.join(differing)}). The same options go on "
            "with it; --out NAME begins another."
        )
    return record


def _record_in(folder: Path) -> dict[str, Any]:
    kinds = {"study": str, "asked": dict, "data": list, "images": dict}
    return read_checked_record(folder / RECORD, "study", kinds)


def _value_text(value: Any) -> str:
    if value is None or value == {}:
        return "not given"
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)


@dataclass
class StudyRunner:
    """Runs the steps of a plan that are not in the journal."""

    plan: StudyResult
    cache: Path | None
    say: Say
    progress: bool

    def run(self, record: dict[str, Any], marks: dict[str, Any]) -> dict[str, Row]:
        """Step -> its row, of all that are finished."""
        study, options, folder = self.plan.study, self.plan.options, self.plan.folder
        journal = JournalFile(folder / STEPS, COLUMNS, key="step")
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        old = record or {"study": study.name, "created": now, "asked": options.to_dict()}
        images = old.get("images", {}) | marks
        new = {"featurecache": __version__, "data": list(options.data), "images": images}
        old.pop("files", None)  # it lists them again when its page is written
        write_record(folder / RECORD, old | new)
        for place, step in enumerate(self.plan.steps, start=1):
            name = step.step.name
            if name not in journal.by_key:
                self.say("")
                self.say(f"step       {name}   ({place} of {len(self.plan.steps)}): {call_text(step.call)}")
                journal.append([self._finish(step, journal.by_key)])
            elif journal.by_key[name]["asked"] != json.loads(json.dumps(step.call)):
                raise RunError(
                    f"{folder / STEPS}: the step {name} was asked otherwise, by another version of featurecache. "
                    "Remove its line and its folder under runs/ to do it again, or give another --out."
                )
        return journal.by_key

    def _finish(self, step: PlannedStep, done: dict[str, Row]) -> Row:
        begin, name = time.perf_counter(), step.step.name
        try:
            made = self._call(step.step, step.call, done)
        except (KeyboardInterrupt, Stopped) as error:
            raise Stopped("stopped. What is finished is safe; the same command goes on where it was.") from error
        except FeatureCacheError as error:
            raise StepFailed(f"step {name}: {error}\n       --skip {name} goes on without it.") from error
        seconds = round(time.perf_counter() - begin, 2)
        return {"step": name, "asked": step.call, "made": made, "seconds": seconds, "featurecache": __version__}

    def _call(self, step: Step, call: dict[str, Any], done: dict[str, Row]) -> dict[str, Any]:
        """The public function that the step is a call of; what it made."""
        study, folder = self.plan.study, self.plan.folder
        what = ("extract", "ablate", "train_baseline", "explain", "heads", "arch")
        options = {key: value for key, value in call.items() if key not in what}
        if isinstance(step, ExplainStep):
            return self._explain(step, options["images"], done)
        dataset = self.plan.sets[study.set_of(step)].dataset
        if isinstance(step, Extract):
            return self._extract(dataset, step.untrained, options)
        question, out = study.question_of(step), folder / "runs" / step.name
        assert question is not None
        if (names := question.splits(dataset)) is not None:  # the study's own, as a file
            options["splits"] = folder / f"splits-{question.name}.csv"
            if not options["splits"].is_file():
                write_whole(options["splits"], splits_csv(dataset.ids, names).encode())
        finished = {s.question for s in study.steps if s.name in done and isinstance(s, Heads | Network)}
        options["controls"] = step.question not in finished  # beside the first of a question
        options |= {"out": out, "say": self.say, "progress": self.progress}
        if isinstance(step, Heads):
            api.ablate([open_view(done[name]["made"]["view"]) for name in step.features], step.heads, **options)
            return {"sweep": f"runs/{step.name}"}
        if not (out / "config.json").is_file():  # it is there where a kill came between the run and its row
            api.train_baseline(dataset, call["arch"], **options, report=False, device=self.plan.options.device)
        return {"run": f"runs/{step.name}"}

    def _extract(self, dataset: Dataset, untrained: bool, options: dict[str, Any]) -> dict[str, Any]:
        from featurecache.extraction import plan

        prepared = plan.prepare(
            dataset, name=f"{dataset.name}-untrained" if untrained else dataset.name, remember=True,
            cache=self.cache or (self.plan.folder / "cache" if self.plan.options.quick else None),
            device=self.plan.options.device, progress=self.progress, **options,
        )  # fmt: skip
        result = prepared.run(progress=self.progress)
        label = open_view(result.view).label
        self.say(plan.extraction_summary(result, label))
        return {"view": str(Path(result.view).resolve()), "label": label, "failed": len(result.failed)}

    def _explain(self, step: ExplainStep, count: int, done: dict[str, Row]) -> dict[str, Any]:
        """Grad-CAM of the networks, attention of the ViTs among them and of the frozen one; the same images for all."""
        home, device = self.plan.folder, self.plan.options.device
        runs = [load_run(home / done[name]["made"]["run"]) for name in step.of]
        attentive = [run for run in runs if has_class_token(Transformer.of_run(run.head, run.model))]
        if step.attention:  # the chosen head of the sweep on that view, on the most of train
            families = load_sweep(home / done[step.attention]["made"]["sweep"]).families
            own = [family for family in families if family.view == done[step.backbone]["made"]["label"]]
            if own:
                attentive = [max(own, key=lambda family: family.fraction).runs[0], *attentive]
            else:
                self.say(f"warning    no attention of {done[step.backbone]['made']['label']}: every head on it failed")
        images, files = test_images(runs[0], count), []
        for kind, of in (("grad-cam", runs), ("attention", attentive)):
            folder = Path("runs") / step.name / kind
            maps = explain(of, images, out=home / folder, kinds=kind, device=device, say=self.say).files if of else []
            files += [str(folder / path.name) for path in maps]
        return {"pictures": files}


def test_images(run: Run, count: int) -> list[str]:
    """Ids of images of test: of each class in turn the first of the run's answers."""
    answers = run.answers("test")
    truth = answers.y if answers.y.ndim == 1 else answers.y.argmax(1)
    turn = [np.sum(truth[:i] == c) for i, c in enumerate(truth)]
    return [answers.ids[i] for i in np.lexsort((truth, turn))[:count]]


def plan_lines(result: StudyResult) -> list[str]:
    """The first screen: the question, the images, the steps with about how long each takes, what is left out."""
    study, finished = result.study, result.rows
    lines = [f"study      {study.name}: {study.title}   ({study.source})"]
    for each in result.sets.values():
        what = each.drawn or f"{each.source}, {len(each.dataset):,} images"
        lines.append(f"images     {each.images.name}: {what}")
    if result.options.quick:
        small = stand_ins(study, [call for _, call, _ in result.steps])
        lines.append(f"quick      {small}; untrained, 32 px, few images: it shows the commands, nothing else")
    width = max((len(step.name) for step, _, _ in result.steps), default=0)
    for place, (step, call, minutes) in enumerate(result.steps, start=1):
        about = "" if minutes is None else f"about {duration(60 * minutes)}"
        about = "done" if step.name in finished else about
        lines.append(f"step {place:>2}    {step.name:<{width}}  {call_text(call)}   {about}".rstrip())
    lines += [f"left out   {name}: {why}" for name, why in result.left_out.items()]
    waiting = [minutes or 0 for step, _, minutes in result.steps if step.name not in finished]
    about = f"about {duration(60 * sum(waiting))} on this machine; every step is kept, ^C loses at most an epoch"
    lines.append(f"time       {about if waiting else 'every step is done; what is left is the page'}")
    if sum(waiting) > LONG:
        lines.append("shorter    --only STEP, --epochs N, --train-per-class N or --image-size N, or a GPU")
    return lines


def result_record(result: StudyResult) -> dict[str, Any]:
    """A study as JSON."""
    rows, steps = result.rows, []
    for step, _, minutes in result.steps:
        done = {"done": step.name in rows, "seconds": rows.get(step.name, {}).get("seconds")}
        steps.append({"step": step.name, "minutes": minutes, **done})
    record = {"study": result.study.name, "folder": str(result.folder), "steps": steps}
    record |= {"left_out": list(result.left_out.items())}
    tables = {table.question.name: table.record for table in result.tables}
    report = {"report": str(result.page), "images": result.images, "published": result.published, "parts": tables}
    report["overview"] = overview_of(result.tables, result.published)
    return record | report if result.page else record


def result_lines(result: StudyResult) -> str:
    """A study for a terminal."""
    if not result.page:
        return f"{len(result.steps):,} steps, of which {len(result.rows):,} are done"
    lines = [line for table in result.tables for line in [*_table_lines(table), ""]]
    lines += [*_published_lines(result.published), ""] if result.published else []
    lines += [UNTRAINED] if result.options.untrained else []
    return "\n".join([*lines, f"report     {result.page}   embeds {result.images:,} images"])


def _table_lines(table: StudyTable) -> list[str]:
    """The controls, then the heads that are best on val; which is which the step says."""
    record, steps = table.record, {id(family): step for step, family, _ in table.rows}
    lead, task = measure_name(record["select"]), record["task"]
    over = [f"val {title(lead, task)}", f"test {title(lead, task)}", "s to train"]
    rows = [[one_line(table.question.title), "step", *over]]
    for control in record["controls"]:
        rows.append([control["name"], "", *(number((control[s] or {}).get(lead)) for s in ("val", "test")), ""])
    pairs = [pair for pair in ranked(table.families, record) if pair[1]["fraction"] == 1]
    for family, own in pairs[:SHOWN]:
        values = [number(own["val"].get(lead)), interval(own["test"].get(lead))]
        where = "" if family.from_pixels else f" of {family.view.partition('/')[0]}"
        name = one_line(name_of(family.head, family.output) + where)
        spent = "–" if own["train_seconds"] is None else f"{own['train_seconds']:,.1f}"
        rows.append([name, steps[id(family)], *values, spent])
    left = len(pairs) - SHOWN
    return [*aligned(rows, right=2), *([f"and {left} more, in the report"] if left > 0 else [])]


def _published_lines(published: Sequence[dict[str, Any]]) -> list[str]:
    columns = {"what": "published", "part": "question", "measure": "number", "ours": "our head"}
    if len({row["part"] for row in published}) == 1:
        del columns["part"]
    rows = [[*columns.values(), "published", "ours"]]
    for row in published:
        rows.append([*(one_line(row[key]) for key in columns), row["published_words"], row["here_words"]])
    grey = ["Beside a trial, random weights, or fewer epochs or images a published number does not compare."]
    return [*aligned(rows, right=len(columns)), *(grey if any(row["grey"] for row in published) else [])]
