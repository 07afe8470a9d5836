"""Page of a study: its images, published numbers beside ours, charts of its own, then a comparison for each of its
questions, as on the page of a report."""

from __future__ import annotations

import base64
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from featurecache.errors import CannotWrite, UnreadableImage
from featurecache.files.atomic import write_whole
from featurecache.formatting import shell_words
from featurecache.store.write_view import open_view
from heads.api import families_in
from heads.evaluation.comparison import compare
from heads.models.common import FINETUNE
from heads.reports.drawing import Figure, Plot, short, style_of
from heads.reports.gallery import ImageLoader
from heads.reports.ledger import write_report_files
from heads.reports.page import hashed, part_context, render_page, render_part
from heads.reports.provenance import origins, sweep_commands
from heads.reports.side_by_side import learning_figure, overlaid_curves
from heads.reports.text import subtitle_words
from heads.runs.run import Run, name_of
from heads.settings import METRICS, flag, measure_name, title
from heads.studies.images import set_context
from heads.studies.plan import NUMBERS, PlannedStep, StudyOptions, call_text, stand_ins
from heads.studies.spec import ExplainStep, Extract, Heads, Network, OpenedSet, PublishedNumber, Question, Study
from heads.studies.tables import Rows, StudyTable, overview_of

RESAMPLES, QUICK_RESAMPLES = 2000, 200
TOP = 3  # heads in the chart of the best
OTHERS = {  # published beside measures: what each is called, and its format
    "parameters": ("parameters", ",.0f"), "train_seconds": ("seconds to train", ",.0f"),
    "ms_per_image": ("ms an image, with loading", ",.3f"),
}  # fmt: skip


@dataclass(frozen=True)
class StudyResult:
    """A study as it lies in its folder. ``steps``, ``left_out``: as planned; ``rows``: step -> its row of the journal,
    of those that are finished; ``page``: None where it was only planned, or no step with numbers is finished;
    ``images``: that the page embeds."""

    study: Study
    options: StudyOptions
    folder: Path
    sets: dict[str, OpenedSet]
    steps: Sequence[PlannedStep]
    left_out: dict[str, str]
    rows: dict[str, dict[str, Any]]
    page: Path | None = None
    images: int = 0
    tables: Sequence[StudyTable] = ()
    published: Sequence[dict[str, Any]] = ()


def write_study(result: StudyResult, *, images: bool = True, hash_ids: bool = False) -> StudyResult:
    """report.html, and for each question its metrics.csv and metrics.json; none where no step with numbers is finished.
    The result with what was written."""
    tables = [table for question in result.study.questions if (table := _table(result, question))]
    if not tables:
        return result
    published = [_published_row(result, table, each) for table in tables for each in table.question.published]
    result = replace(result, tables=tables, published=published)
    text, count = render_study(result, ImageLoader(hashed() if hash_ids else str, images))
    page = result.folder / "report.html"
    try:
        for table in tables:
            (result.folder / table.question.name).mkdir(exist_ok=True)
            write_report_files(result.folder / table.question.name, None, table.record)
        write_whole(page, text.encode("utf-8", "backslashreplace"))
    except OSError as error:
        why = f"The report could not be written in {result.folder}: {error.strerror}."
        raise CannotWrite(error.errno, why) from error
    return replace(result, page=page, images=count)


def _table(result: StudyResult, question: Question) -> StudyTable | None:
    made = [
        (step.name, family)
        for step in result.study.steps
        if step.name in result.rows and isinstance(step, Heads | Network) and step.question == question.name
        for path in result.rows[step.name]["made"].values()
        for family in families_in(result.folder / path)
    ]
    if not made:
        return None
    reference = next((str(family.runs[0].path) for step, family in made if step == question.reference), None)
    resamples = QUICK_RESAMPLES if result.options.quick else RESAMPLES
    families = [family for _, family in made]
    record = compare(families, reference=reference, resamples=resamples, select=question.select).record
    rows = [(*pair, own) for pair, own in zip(made, record["families"], strict=True)]
    return StudyTable(question, rows, {**record, "untrained": result.options.untrained})


def render_study(result: StudyResult, album: ImageLoader) -> tuple[str, int]:
    """The page as text, and how many images it embeds."""
    study, tables, count = result.study, result.tables, 0
    parts: list[dict[str, Any]] = []
    for table in tables:
        name = table.question.name
        part, embedded = part_context(table.families, table.record, album, f"{name}-", _marks(table, result.published))
        part["comparing"] = [f for f in part["comparing"] if not (study.figures and f.title == "Learning curves")]
        part["how"] = not parts  # once on a page
        of = {record["name"]: step for step, _, record in table.rows}
        for detail in part["details"]:
            detail.setting = " · ".join(filter(None, [f"step {of[detail.family['name']]}", detail.setting]))
        count += embedded
        parts.append(
            {"title": table.question.title, "anchor": f"part-{name}", "page": render_part(part),
             "subtitle": subtitle_words(table.record, table.runs), "warnings": part["warnings"],
             "answer": table.record["answer"]}
        )  # fmt: skip
    sets = [set_context(each, _digests(result, each), album.images) for each in result.sets.values()]
    pictures = list(_maps(result)) if album.images else []
    seconds = {name: row["seconds"] for name, row in result.rows.items()}
    count += len(pictures) + sum(len(images) for each in sets for _, images in each["samples"])
    reasons = [reason for table in tables for each in table.question.published for reason in grey_reasons(result, each)]
    context = {
        "record": tables[0].record, "title": f"{study.name}: {study.title}", "subtitle": study.question,
        "source": study.source, "about": study.about, "differs": study.differs, "quick": result.options.quick,
        "ran_on": "; ".join(dict.fromkeys(each.drawn for each in result.sets.values())),
        "cautions": cautions(result), "changed": _changed(result), "sets": sets, "published": result.published,
        "other_sources": any(each.source for table in tables for each in table.question.published),
        "greyed": " or ".join(dict.fromkeys(reasons)),
        "notes": list(dict.fromkeys(t.question.note for t in tables if t.question.note)),
        "figures": FIGURES[study.figures](tables[0].rows, seconds) if study.figures else [], "parts": parts,
        "overview": overview_of(tables, result.published), "pictures": pictures,
        "steps": _step_rows(result), "commands": _commands(result),
        "origins": origins([run for table in tables for run in table.runs]), "with_images": album.images,
        "numbers_words": ", ".join(f"{t.question.name}/metrics.{kind}" for t in tables for kind in ("csv", "json")),
    }  # fmt: skip
    return render_page("study.html", context, count), count


def cautions(result: StudyResult) -> list[str]:
    """What a reader must know before the numbers: the study's own, and what these images show."""
    study, sentences = result.study, list(result.study.cautions)
    for name, opened in result.sets.items():
        protocol = any(each.images == name and each.splits(opened.dataset) is None for each in study.questions)
        if protocol and (few := opened.few_in_val):
            what = ", ".join(few[:4]) + (f" and {len(few) - 4} more" if len(few) > 4 else "")
            sentences.append(
                f"The val split of {name} has {what}: it cannot choose a model. It was returned to train, "
                "and 15 % of train were drawn anew."
            )
    features = {step.name for step in study.steps if isinstance(step, Extract)}
    left = [f"{name} is not here: {why}." for name, why in result.left_out.items() if name not in features]
    return [*sentences, *left]


def _changed(result: StudyResult) -> list[str]:
    """What was asked for otherwise than the study has it."""
    options = result.options
    small = stand_ins(result.study, [call for _, call, _ in result.steps])
    sentences = {
        f"All networks see {options.image_size} pixels instead of their own size.": options.image_size,
        f"No network and no head was trained for more than {options.epochs} epochs.": options.epochs,
        f"Networks that are trained from pixels saw at most {options.train_per_class} training images of each class; "
        "heads on frozen features saw all.": options.train_per_class,
        f"Small networks at 32 pixels, none of them pretrained: {small}.": options.quick,
        "No pretrained weights: every backbone began from random ones (--random-weights).": options.random_weights,
    }
    return [sentence for sentence, applies in sentences.items() if applies]


def _step_rows(result: StudyResult) -> list[dict[str, Any]]:
    """Every step of the study that these images have: what it is, how long it took, or why it is not there."""
    calls = {step.name: call for step, call, _ in result.steps}
    calls |= {name: row["asked"] for name, row in result.rows.items()}
    rows = []
    for step in result.study.steps:
        name, row = step.name, result.rows.get(step.name)
        if result.study.set_of(step) in result.sets or row:
            left = result.left_out.get(name) or result.left_out.get(getattr(step, "question", ""))
            state = "done" if row else left or "not run: left out by --only or --skip"
            what = call_text(calls[name]) if name in calls else "–"
            rows.append({"name": name, "what": what, "seconds": row and row["seconds"], "state": state})
    return rows


def _commands(result: StudyResult) -> list[tuple[str, str]]:
    """The command line that makes all this again, and those by which its sweeps can be made alone."""
    options = result.options
    words = ["featurecache", "study", result.study.name, *(w for data in options.data for w in ("--data", data))]
    words += ["--quick"] if options.quick else ["--random-weights"] if options.random_weights else []
    words += [word for name, path in options.weights.items() for word in ("--weights", f"{name}={path}")]
    words += [word for name in NUMBERS if (n := getattr(options, name)) for word in (flag(name), str(n))]
    commands = {shell_words([*words, "--out", str(result.folder)]): "The study:"}
    for step, family, _ in (row for table in result.tables for row in table.rows):
        for command in sweep_commands(Path(family.runs[0].path).parent.parent):
            commands.setdefault(command, f"{step}:")
    return [(step, command) for command, step in commands.items()]


def _maps(result: StudyResult) -> Iterator[tuple[str, int, int, str]]:
    """(data URI, width, height, words) of the maps that were drawn."""
    for step in result.study.steps:
        question = result.study.question_of(step)
        made = result.rows[step.name]["made"] if isinstance(step, ExplainStep) and step.name in result.rows else {}
        for name in made.get("pictures", []):
            data = (result.folder / name).read_bytes()
            width, height = struct.unpack(">II", data[16:24])  # of the header of a PNG
            uri = f"data:image/png;base64,{base64.b64encode(data).decode()}"
            yield uri, width, height, f"{question and question.title}, {Path(name).parent.name}"


def _digests(result: StudyResult, opened: OpenedSet) -> np.ndarray:
    """S32 [N]: of every image of the set, from the features of it where there are some, else read once more."""
    from featurecache.images.decoding import digest

    steps = [step for step in result.study.steps if isinstance(step, Extract) and step.images == opened.images.name]
    views = [open_view(result.rows[step.name]["made"]["view"]) for step in steps if step.name in result.rows][:1]
    cached = {i: d for view in views for i, d in zip(view.ids, view.digests.tolist(), strict=True)}
    digests = np.zeros(len(opened.dataset), "S32")
    for row, identity in enumerate(opened.dataset.ids):
        with suppress(UnreadableImage):
            digests[row] = cached.get(identity) or digest(opened.dataset.read(row)).encode()
    return digests


# --- published numbers beside ours


def _marks(table: StudyTable, published: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Of a family's name what was published of it on test, by the measure that orders the table."""
    lead = title(measure_name(table.record["select"]), table.record["task"])
    marks: dict[str, list[dict[str, Any]]] = {}
    for row in published:
        if (row["part"], row["measure"]) == (table.question.title, lead) and row["here"] is not None:
            words = f"{row['what']}: {row['published_words']}"
            marks.setdefault(row["ours"], []).append({"value": row["published"], "words": words, "grey": row["grey"]})
    return marks


def _published_row(result: StudyResult, table: StudyTable, published: PublishedNumber) -> dict[str, Any]:
    measure, record = published.measure, _matching_family(table, published) or {}
    name, _ = OTHERS.get(measure) or (title(measure, table.record["task"]), "")
    ours = record.get("test", {}).get(measure) or {}
    if measure in OTHERS:
        ours = {"value": record.get("loaded_ms" if measure == "ms_per_image" else measure)}
    elif published.split == "val":
        ours, name = {"value": record.get("val", {}).get(measure)}, f"{name} on val"
    ends = [format_published(measure, end) for key in ("low", "high") if (end := ours.get(key)) is not None]
    absent = f"not run: {published.ours}" if published.ours else "none: this study trains none like it"
    return {
        "what": published.what, "part": table.question.title, "measure": name,
        "published": published.value, "published_words": format_published(measure, published.value),
        "here": ours.get("value"), "here_words": format_published(measure, ours.get("value")),
        "range": f"[{', '.join(ends)}]" if len(ends) == 2 else None, "ours": record.get("name", absent),
        "remark": "; ".join(filter(None, [published.remark, published.source])),
        "grey": bool(grey_reasons(result, published)),
    }  # fmt: skip


def _matching_family(table: StudyTable, published: PublishedNumber) -> dict[str, Any] | None:
    """The record of the family that a number stands beside: of its step the best on val, on all of train."""
    rows = [
        record
        for step, family, record in table.rows
        if step == published.ours and family.fraction == 1
        and published.head in ("", name_of(family.head, family.output))
    ]  # fmt: skip
    lead = measure_name(table.record["select"])
    sign = -1 if METRICS[lead].higher else 1
    return min(rows, key=lambda record: sign * (record["val"].get(lead) or 0.0), default=None)


def format_published(measure: str, value: float | None) -> str:
    """Shares as the studies write them, in percent; areas as they are."""
    if value is None or measure == "accuracy":
        return "–" if value is None else f"{100 * value:.2f} %"
    return format(value, OTHERS[measure][1] if measure in OTHERS else ".3f")


def grey_reasons(result: StudyResult, published: PublishedNumber) -> list[str]:
    """Why what stands here is no answer to a number, if it is none: what our head was."""
    options = result.options
    step = next((step for step in result.study.steps if step.name == published.ours), None)
    trained = step is not None and published.measure != "parameters"
    network = isinstance(step, Network)
    pretrained = not isinstance(step, Network) or step.arch.startswith(FINETUNE)
    reasons = {
        "a trial": options.quick,
        "begun from random weights": trained and pretrained and options.random_weights,
        "trained for fewer epochs than the study has": trained and options.epochs,
        "trained on fewer images than the study has": trained and network and options.train_per_class,
    }
    return [reason for reason, applies in reasons.items() if applies]


# --- charts that a study asks for


def pneumonia_figures(rows: Rows, seconds: dict[str, float]) -> list[Figure]:
    """The best three with their cost, loss with and without augmentation, accuracy against time by optimiser, accuracy
    against the share of the training images. ``seconds``: of every step, for the features that a head needs first."""
    runs = {step: family.runs[0] for step, family, _ in rows}
    figures = [_top_figure([row for row in rows if row[1].fraction == 1], seconds)]
    plain, augmented = runs.get("resnet50-tuned"), runs.get("resnet50-augmented")
    if plain and augmented:
        both = {"without augmentation": plain, "with": augmented}
        figures.append(overlaid_curves(both, "Loss, with and without augmentation", "loss", "loss", y=(0.0, None)))
    tuned = {"AdamW": plain, "Adam": runs.get("resnet50-adam"), "SGD": runs.get("resnet50-sgd")}
    if len(named := {name: run for name, run in tuned.items() if run}) > 1:
        figures.append(_time_figure(named))
    series: dict[str, list[dict[str, Any]]] = {}
    for _, family, record in (row for row in rows if row[0] == "fractions"):
        name = f"{family.head} on {family.output} of {family.view}"
        series.setdefault(name, []).append({"fraction": family.fraction, **record["test"]["accuracy"]})
    if series:
        whole = [family.runs[0] for step, family, _ in rows if step == "fractions" and family.fraction == 1]
        total = whole[0].config["splits"]["images"]["train"] if whole else None
        figure = learning_figure(list(series.items()), "accuracy", "accuracy", total)
        figures.append(replace(figure, title="Accuracy against the share of the training images"))
    return figures


def _top_figure(rows: Rows, seconds: dict[str, float]) -> Figure:
    """The ``TOP`` best by val accuracy, each with the seconds its training took."""
    measured = [row for row in rows if row[2]["val"].get("accuracy") is not None]
    best = sorted(measured, key=lambda row: -row[2]["val"]["accuracy"])[:TOP]
    plot = Plot("seconds to train", "val accuracy", least=0.02, top=1.0)
    names = []
    for number, (step, _, record) in enumerate(best):
        time, value = record["train_seconds"] or 0.0, record["val"]["accuracy"]
        plot.dot(time, value, style_of(number), f"{record['name']}: {value:.3f} after {time:.0f} s", radius=6)
        names.append(f"{short(record['name'], 60)} ({step}): {value:.3f}, {time:,.1f} s")
    before = sum(spent for name, spent in seconds.items() if name.endswith("-features"))
    frozen = any(not family.from_pixels for _, family, _ in best)
    more = f" Frozen heads need their features first: {before:,.0f} s for all of them together." if frozen else ""
    return Figure("The best three on val", plot, f"Chosen on val.{more}", _keys(names))


def _time_figure(runs: dict[str, Run]) -> Figure:
    """Val accuracy against seconds of training, at the end of each epoch."""
    longest = max(sum(row["seconds"] for row in run.history) for run in runs.values())
    plot = Plot("seconds of training", "val accuracy", x=(0.0, 1.05 * longest), least=0.02, top=1.0)
    for number, (name, run) in enumerate(runs.items()):
        times = accumulate(row["seconds"] for row in run.history)
        points = [(x, row["val_accuracy"]) for x, row in zip(times, run.history, strict=True)]
        plot.line(points, style_of(number))
        for x, y in points:
            plot.dot(x, y, style_of(number), f"{name}: {y:.3f} after {x:.0f} s", radius=2.4)
    caption = "A mark is the end of an epoch; each with its own usual learning rate."
    return Figure("Accuracy against time, by optimiser", plot, caption, _keys(runs))


def _keys(names: Iterable[str]) -> tuple[tuple[str, str], ...]:
    return tuple((style_of(number), name) for number, name in enumerate(names))


FIGURES: dict[str, Callable[[Rows, dict[str, float]], list[Figure]]] = {"pneumonia": pneumonia_figures}
