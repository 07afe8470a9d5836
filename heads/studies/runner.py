"""Runner of a study: its steps one after another, each in the journal once it is finished; then its page."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from featurecache import __version__
from featurecache.errors import FeatureCacheError, RunError, StepFailed, Stopped
from featurecache.files.atomic import write_whole
from featurecache.formatting import aligned, duration, number, one_line
from featurecache.store.write_view import open_view
from heads import api
from heads.explanations.explain import explain
from heads.explanations.methods import Transformer, has_class_token
from heads.metrics.classification import UNTRAINED, measure_name, title
from heads.reports.page import ranked
from heads.reports.text import interval
from heads.runs.run import Run, load_run, name_of, read_json
from heads.runs.write import check_out
from heads.splits import splits_csv
from heads.studies.images import names_of_sets, open_sets, signature, trials
from heads.studies.page import StudyTable, write_study
from heads.studies.plan import (
    PlannedStep,
    StudyOptions,
    StudyPlan,
    StudyResult,
    call_text,
    check_packages,
    check_weights,
    machine_gflops,
    plan_study,
    wanted_steps,
)
from heads.studies.recipes import load_study
from heads.studies.spec import ExplainStep, Extract, Heads, Network, OpenedSet, Study
from heads.sweeps.journal import JournalFile, in_use, load_sweep, read_journal, write_json

FORMAT = 1
LONG = 8 * 60.0  # minutes; beyond it the ways to a shorter run are said
SHOWN = 12  # heads of a question, in the terminal
RECORD, STEPS = "study.json", "steps.jsonl"
COLUMNS: dict[str, type] = {"step": str, "asked": dict, "made": dict, "seconds": float}
Say = Callable[[str], None]
Row = dict[str, Any]


def run_study(
    name: str, *, out: str | Path | None = None, cache: str | Path | None = None, images: bool = True,
    hash_ids: bool = False, dry_run: bool = False, say: Say | None = None, progress: bool = False, **options: Any,
) -> StudyResult:  # fmt: skip
    """Run the study ``name``; ``options`` are those of `StudyOptions`, as ``featurecache study`` has them.

    Raises UnknownStudy, BadOption, WeightsNotFound (before anything is computed), SourceError, RunError (a folder in
    the way), StepFailed (which step, and why).
    """
    from featurecache.extraction.forward import pick_device

    say = say or (lambda line: None)
    study = load_study(name)
    chosen = StudyOptions.of(study, **options)
    folder = check_out(
        Path("studies") / (f"{name}-quick" if chosen.quick else name) if out is None else out, RECORD, "study",
        ("few", "drawn"),
    )  # fmt: skip
    record = _read_record(folder, study, chosen)
    if record.get("data") and not chosen.data:  # need not be said again
        say(f"data       {', '.join(record['data'])}   (as before)")
        chosen = replace(chosen, data=tuple(record["data"]))
    finished = {row["step"] for row in read_journal(folder / STEPS, COLUMNS)[0]}
    sets = names_of_sets(study, chosen.data)
    wanted = [step for step in wanted_steps(study, chosen) if study.set_of(step) in sets]
    missing = [step for step in wanted if step.name not in finished]
    check_packages(missing, chosen.quick)
    if not dry_run:  # which would fetch them
        check_weights(study, chosen, missing)
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch) if dry_run else folder
        opened = open_sets(study, chosen.data, chosen.quick, place, [study.set_of(step) for step in wanted])
        marks = {name: signature(each) for name, each in opened.items()}
        _check_images(folder, record, marks)
        opened = trials(opened, place) if chosen.quick else opened
    plan = plan_study(study, chosen, opened, machine_gflops(pick_device(chosen.device).type))
    for line in plan_lines(study, chosen, opened, plan, finished):
        say(line)
    runner = StudyRunner(study, chosen, folder, opened, Path(cache) if cache else None, say, progress)
    if dry_run:
        return StudyResult(study, chosen, folder, opened, plan, {name: {} for name in finished})
    rows = runner.run(plan, record, marks)
    return write_study(StudyResult(study, chosen, folder, opened, plan, rows), images=images, hash_ids=hash_ids)


def _read_record(folder: Path, study: Study, options: StudyOptions) -> dict[str, Any]:
    """What the folder holds: nothing, or this study asked for alike. Raises RunError."""
    if not (folder / RECORD).exists():
        return {}
    record = read_json(folder / RECORD)
    if record.get("format") != FORMAT or not isinstance(record.get("asked"), dict):
        raise RunError(f"{folder / RECORD} is not what featurecache {__version__} writes; give another --out.")
    if record.get("study") != study.name:
        raise RunError(f"{folder} holds the study {str(record.get('study'))[:60]}; give another --out.")
    differing = [
        f"{name.replace('_', ' ')} {_value_text(record['asked'].get(name))} → {_value_text(value)}"
        for name, value in options.to_dict().items()
        if record["asked"].get(name) != value
    ]
    if differing:
        raise RunError(
            f"{folder} holds this study as it was asked otherwise ({'; '.join(differing)}). The same options go on "
            "with it; --out NAME begins another."
        )
    return record


def _value_text(value: Any) -> str:
    if value is None or value == {}:
        return "not given"
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)


def _check_images(folder: Path, record: dict[str, Any], marks: dict[str, dict[str, Any]]) -> None:
    for name, before in record.get("images", {}).items():
        if marks.get(name, before) != before:
            raise RunError(
                f"{folder} holds this study of other images: {before.get('source')}, {before.get('images')} images, "
                "were others then, or have changed. --out NAME begins another."
            )


@dataclass
class StudyRunner:
    """Runs the steps of a plan that are not in the journal."""

    study: Study
    options: StudyOptions
    folder: Path
    sets: dict[str, OpenedSet]
    cache: Path | None
    say: Say
    progress: bool

    def run(self, plan: StudyPlan, record: dict[str, Any], marks: dict[str, Any]) -> dict[str, Row]:
        """Step -> its row, of all that are finished."""
        with in_use(self.folder, f"study {self.study.name}", "runs"):
            journal = JournalFile(self.folder / STEPS, COLUMNS, key="step")
            self._write_record(record, marks)
            for number, step in enumerate(plan.steps, start=1):
                if row := journal.by_key.get(step.name):
                    self._check_same(step, row)
                    continue
                self.say("")
                self.say(f"step       {step.name}   ({number} of {len(plan.steps)}): {call_text(step.call)}")
                journal.append([self._finish(step, journal.by_key)])
        return journal.by_key

    def _write_record(self, record: dict[str, Any], marks: dict[str, Any]) -> None:
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        first: dict[str, Any] = {
            "format": FORMAT,
            "study": self.study.name,
            "created": now,
            "asked": self.options.to_dict(),
        }
        old = record or first
        images = old.get("images", {}) | marks
        new = {"featurecache": __version__, "data": list(self.options.data), "images": images}
        write_json(self.folder / RECORD, old | new)

    def _check_same(self, step: PlannedStep, row: Row) -> None:
        if row["asked"] != json.loads(json.dumps(step.call)):
            raise RunError(
                f"{self.folder / STEPS}: the step {step.name} was asked otherwise, by another version of featurecache. "
                "Remove its line and its folder under runs/ to do it again, or give another --out."
            )

    def _finish(self, step: PlannedStep, done: dict[str, Row]) -> Row:
        begin = time.perf_counter()
        try:
            made = self._call(step, done)
        except (KeyboardInterrupt, Stopped) as error:
            raise Stopped("stopped. What is finished is safe; the same command goes on where it was.") from error
        except FeatureCacheError as error:
            raise StepFailed(f"step {step.name}: {error}\n       --skip {step.name} goes on without it.") from error
        seconds = round(time.perf_counter() - begin, 2)
        return {"step": step.name, "asked": step.call, "made": made, "seconds": seconds, "featurecache": __version__}

    def _call(self, step: PlannedStep, done: dict[str, Row]) -> dict[str, Any]:
        """The public function that the step is a call of; what it made."""
        names = ("extract", "ablate", "train_baseline", "explain", "heads", "arch")
        options = {key: value for key, value in step.call.items() if key not in names}
        if isinstance(step.step, Extract):
            return self._extract(step.step, options)
        if isinstance(step.step, ExplainStep):
            return self._explain(step.step, options["images"], done)
        out = self.folder / "runs" / step.name
        options |= {"out": out, "say": self.say, "progress": self.progress, **self._splits(step.step)}
        finished = {s.question for s in self.study.steps if s.name in done and isinstance(s, Heads | Network)}
        options["controls"] = step.step.question not in finished  # beside the first of a question
        if isinstance(step.step, Heads):
            api.ablate([open_view(done[n]["made"]["view"]) for n in step.call["ablate"]], step.call["heads"], **options)
            return {"sweep": f"runs/{step.name}"}
        if not (out / "config.json").is_file():  # it is there where a kill came between the run and its row
            begun = any((self.folder / "runs").glob(f".{step.name}-{'[0-9a-f]' * 12}.checkpoint"))
            options |= {"resume": begun, "report": False, "device": self.options.device}
            api.train_baseline(self._set(step.step).dataset, step.call["arch"], **options)
        return {"run": f"runs/{step.name}"}

    def _set(self, step: Extract | Heads | Network) -> OpenedSet:
        return self.sets[self.study.set_of(step)]

    def _extract(self, step: Extract, options: dict[str, Any]) -> dict[str, Any]:
        from featurecache.extraction import plan

        dataset = self._set(step).dataset
        name = f"{dataset.name}-untrained" if step.untrained else dataset.name
        cache = self.cache or (self.folder / "cache" if self.options.quick else None)
        prepared = plan.prepare(
            dataset, name=name, cache=cache, device=self.options.device, remember=True, progress=self.progress,
            **options,
        )  # fmt: skip
        result = prepared.run(progress=self.progress)
        label = open_view(result.view).label
        self.say(plan.extraction_summary(result, label))
        return {"view": str(Path(result.view).resolve()), "label": label, "failed": len(result.failed)}

    def _explain(self, step: ExplainStep, count: int, done: dict[str, Row]) -> dict[str, Any]:
        """Grad-CAM of the networks, attention of the ViTs among them and of the frozen one; the same images for all."""
        runs = [load_run(self.folder / done[name]["made"]["run"]) for name in step.of]
        attentive = [run for run in runs if has_class_token(Transformer.of_run(run.head, run.model))]
        if step.attention:  # the chosen head of the sweep on that view, on the most of train
            families = load_sweep(self.folder / done[step.attention]["made"]["sweep"]).families
            own = [family for family in families if family.view == done[step.backbone]["made"]["label"]]
            attentive = [max(own, key=lambda family: family.fraction).runs[0], *attentive]
        images, files = test_images(runs[0], count), []
        for kind, of in (("grad-cam", runs), ("attention", attentive)):
            folder = Path("runs") / step.name / kind
            if of:
                maps = explain(
                    of, images, out=self.folder / folder, kinds=kind, device=self.options.device, say=self.say
                )
                files += [str(folder / path.name) for path in maps.files]
        return {"pictures": files}

    def _splits(self, step: Heads | Network) -> dict[str, Any]:
        """The study's own splits as a file, where it has some."""
        question, dataset = self.study.question_of(step), self._set(step).dataset
        assert question is not None
        names, path = question.splits(dataset), self.folder / f"splits-{question.name}.csv"
        if names is None:
            return {}
        if not path.is_file():
            write_whole(path, splits_csv(dataset.ids, names).encode())
        return {"splits": path}


def test_images(run: Run, count: int) -> list[str]:
    """Ids of images of test: of each class in turn the first of the run's answers."""
    answers = run.answers("test")
    truth = answers.y if answers.y.ndim == 1 else answers.y.argmax(1)
    queues = [[i for i, y in zip(answers.ids, truth.tolist(), strict=True) if y == c] for c in range(len(run.classes))]
    turns = max(map(len, queues), default=0)
    return [queue[k] for k in range(turns) for queue in queues if k < len(queue)][:count]


def plan_lines(
    study: Study, options: StudyOptions, sets: dict[str, OpenedSet], plan: StudyPlan, finished: Container[str]
) -> list[str]:
    """The first screen: the question, the images, the steps with about how long each takes, what is left out."""
    lines = [f"study      {study.name}: {study.title}   ({study.source})"]
    for each in sets.values():
        what = each.drawn or f"{each.source}, {len(each.dataset):,} images"
        lines.append(f"images     {each.images.name}: {what}")
    if options.quick:
        lines.append("quick      small untrained networks, few images, few epochs: it shows the commands, nothing else")
    width = max((len(step.name) for step in plan.steps), default=0)
    waiting = [step for step in plan.steps if step.name not in finished]
    for place, step in enumerate(plan.steps, start=1):
        about = "" if step.minutes is None else f"about {duration(60 * step.minutes)}"
        about = about if step in waiting else "done"
        lines.append(f"step {place:>2}    {step.name:<{width}}  {call_text(step.call)}   {about}".rstrip())
    lines += [f"left out   {name}: {why}" for name, why in plan.left_out]
    left = sum(step.minutes or 0 for step in waiting)
    about = f"about {duration(60 * left)} on this machine; every step is kept, ^C loses at most an epoch"
    lines.append(f"time       {about if waiting else 'every step is done; what is left is the page'}")
    if left > LONG:
        lines.append("shorter    --only STEP, --epochs N, --train-per-class N or --image-size N, or a GPU")
    return lines


def result_record(result: StudyResult) -> dict[str, Any]:
    """A study as JSON."""
    rows, tables = result.rows, {table.question.name: table.record for table in result.tables}
    done = [(step, step.name in rows, rows.get(step.name, {}).get("seconds")) for step in result.plan.steps]
    keys = ("step", "minutes", "done", "seconds")
    steps = [dict(zip(keys, (step.name, step.minutes, *state), strict=True)) for step, *state in done]
    record = {"study": result.study.name, "folder": str(result.folder), "steps": steps}
    record |= {"left_out": result.plan.left_out}
    report = {"report": str(result.page), "images": result.images, "published": result.published, "parts": tables}
    return record | report if result.page else record


def result_lines(result: StudyResult) -> str:
    """A study for a terminal."""
    if not result.page:
        return f"{len(result.plan.steps):,} steps, of which {len(result.rows):,} are done"
    lines = [line for table in result.tables for line in [*_table_lines(table), ""]]
    lines += [*_published_lines(result.published), ""] if result.published else []
    lines += [UNTRAINED] if result.options.quick or result.options.random_weights else []
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
    several = len({row["part"] for row in published}) > 1
    columns = {
        "what": "published",
        **({"part": "question"} if several else {}),
        "measure": "number",
        "ours": "our head",
    }
    rows = [[*columns.values(), "published", "ours"]]
    for row in published:
        rows.append([*(one_line(row[key]) for key in columns), row["published_words"], row["here_words"]])
    grey = ["Beside a trial, random weights, or fewer epochs or images a published number does not compare."]
    return [*aligned(rows, right=len(columns)), *(grey if any(row["grey"] for row in published) else [])]
