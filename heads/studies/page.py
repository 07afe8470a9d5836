"""The page of a study: the images first, published numbers beside ours, the charts it asks for, then a comparison for
each of its questions, as on the page of a report."""

from __future__ import annotations

import base64
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featurecache.errors import CannotWrite
from heads.evaluation.comparison import compare
from heads.evaluation.families import Family, families_of, fraction_of
from heads.reports.gallery import ImageLoader
from heads.reports.ledger import write_metrics_files
from heads.reports.page import part_context, render_page, render_part
from heads.reports.provenance import origins
from heads.reports.text import subtitle_words
from heads.runs.run import Run, load_run
from heads.studies.figures import FIGURES
from heads.studies.numbers import grey_words, published_rows
from heads.studies.sets import set_context
from heads.studies.spec import STUDIES, Extract, Heads, Look, Network, Part

if TYPE_CHECKING:
    from heads.studies.run import Done

RESAMPLES, QUICK_RESAMPLES = 2000, 200


@dataclass(frozen=True)
class Table:
    """A part as compared. ``steps``: of each family, in their order, the step that made it."""

    part: Part
    families: list[Family]
    steps: list[str]
    record: dict[str, Any]

    @property
    def rows(self) -> list[tuple[str, Family, dict[str, Any]]]:
        return list(zip(self.steps, self.families, self.record["families"], strict=True))

    @property
    def runs(self) -> list[Run]:
        return [run for family in self.families for run in family.runs]


@dataclass(frozen=True)
class StudyReport:
    """What was written: the page, how many images it embeds, the tables and the published rows on it."""

    path: Path
    images: int
    tables: list[Table]
    published: list[dict[str, Any]]


def write_study(done: Done, *, images: bool = True, hash_ids: bool = False) -> StudyReport | None:
    """report.html, and for each part its metrics.csv and metrics.json; None where no step with numbers is finished."""
    from featurecache.files.atomic import write_whole, writing
    from heads.reports.page import hashed

    tables = [table for part in done.study.parts if (table := table_of(done, part))]
    if not tables:
        return None
    published = [row for table in tables for row in published_rows(done, table)]
    page, count = render_study(done, tables, published, ImageLoader(hashed() if hash_ids else str, images))
    try:
        for table in tables:
            with writing(done.folder):
                (done.folder / table.part.name).mkdir(exist_ok=True)
            write_metrics_files(done.folder / table.part.name, table.record)
        write_whole(done.folder / "report.html", page.encode("utf-8", "backslashreplace"))
    except OSError as error:
        why = f"The report could not be written in {done.folder}: {error.strerror}."
        raise CannotWrite(error.errno, why) from error
    return StudyReport(done.folder / "report.html", count, tables, published)


def table_of(done: Done, part: Part) -> Table | None:
    from heads.sweeps.journal import load_sweep

    found: list[tuple[str, Family]] = []
    for step in done.study.steps:
        if step.name in done.made and isinstance(step, Heads | Network) and step.part == part.name:
            made = done.made[step.name]["made"]
            if isinstance(step, Heads):
                families = load_sweep(done.folder / made["sweep"]).families
            else:
                families = families_of([load_run(done.folder / made["run"])])
            found += [(step.name, family) for family in families]
    if not found:
        return None
    steps, families = [step for step, _ in found], [family for _, family in found]
    reference = next((str(f.runs[0].path) for step, f in found if step == part.reference), None)
    resamples = QUICK_RESAMPLES if done.asked.quick else RESAMPLES
    record = compare(families, reference=reference, resamples=resamples).record
    untrained = done.asked.quick or done.asked.random_weights
    return Table(part, families, steps, {**record, "select": part.select, "untrained": untrained})


def render_study(
    done: Done, tables: list[Table], published: list[dict[str, Any]], album: ImageLoader
) -> tuple[str, int]:
    """The page as text, and how many images it embeds."""
    study, asked = done.study, done.asked
    parts, count = [], 0
    for table in tables:
        context, embedded = part_context(table.families, table.record, album, f"{table.part.name}-")
        context["comparing"] = [f for f in context["comparing"] if not (study.figures and f.title == "Learning curves")]
        of = {record["name"]: step for step, _, record in table.rows}
        for row in context["board"]["rows"]:
            row["setting"] = " · ".join(filter(None, [f"step {of[row['family']['name']]}", row["setting"]]))
        count += embedded
        parts.append(
            {"title": table.part.title, "anchor": f"part-{table.part.name}", "page": render_part(context),
             "subtitle": subtitle_words(table.record, table.runs), "warnings": context["warnings"]}
        )  # fmt: skip
    sets = [set_context(done, name, album.images) for name in done.given]
    pictures = _pictures(done) if album.images else []
    seconds = {name: record["seconds"] for name, record in done.made.items()}
    figures = FIGURES[study.figures](tables[0].rows, seconds) if study.figures else []
    count += len(pictures) + sum(len(found) for each in sets for _, found in each["samples"])
    context = {
        "record": tables[0].record, "title": f"{study.name}: {study.title}", "subtitle": STUDIES[study.name][1],
        "source": study.source, "about": study.about, "differs": study.differs, "quick": asked.quick,
        "ran_on": "; ".join(dict.fromkeys(given.said for given in done.given.values())),
        "cautions": cautions(done), "changed": changed(done), "sets": sets, "published": published,
        "other_sources": any(p.source for table in tables for p in table.part.published),
        "greyed": grey_words(done) if any(row["grey"] for row in published) else "",
        "notes": list(dict.fromkeys(t.part.note for t in tables if t.part.note)),
        "figures": figures, "parts": parts, "pictures": pictures, "steps": step_rows(done),
        "commands": [("The study:", command_of(done)), *_step_commands(tables)],
        "origins": origins(sorted((r for t in tables for r in t.runs), key=lambda run: -fraction_of(run))),
        "with_images": album.images,
        "numbers_words": ", ".join(f"{t.part.name}/metrics.csv, {t.part.name}/metrics.json" for t in tables),
    }  # fmt: skip
    return render_page("study.html", context, count), count


def cautions(done: Done) -> list[str]:
    """What a reader must know before the numbers: the study's own, and what these images show."""
    found = list(done.study.cautions)
    for name, given in done.given.items():
        parts = [part for part in done.study.parts if part.images == name]
        if (few := given.few_in_val) and any(part.splits(given.dataset) is None for part in parts):
            what = ", ".join(few[:4]) + (f" and {len(few) - 4} more" if len(few) > 4 else "")
            found.append(
                f"The val split of {given.images.name} has {what}: it cannot choose a model. It was returned to train, "
                "and 15 % of train were drawn anew."
            )
    features = {step.name for step in done.study.steps if isinstance(step, Extract)}
    return [*found, *(f"{name} is not here: {why}." for name, why in done.plan.left_out if name not in features)]


def changed(done: Done) -> list[str]:
    """What was asked for otherwise than the study has it."""
    asked = done.asked
    words = {
        "image_size": f"All networks see {asked.image_size} pixels instead of their own size.",
        "epochs": f"No network and no head was trained for more than {asked.epochs} epochs.",
        "train_per_class": f"Networks that are trained from pixels saw at most {asked.train_per_class} training images "
        "of each class; heads on frozen features saw all.",
    }
    found = [text for name, text in words.items() if getattr(asked, name)]
    if asked.quick:
        stand_in = {step.asked["backbone"] for step in done.plan.steps if "backbone" in step.asked}
        stand_in |= {s.asked["arch"].removeprefix("finetune:") for s in done.plan.steps if "arch" in s.asked}
        found.append(f"Small networks at 32 pixels: {', '.join(sorted(stand_in))}.")
    if asked.random_weights:
        found.append("No pretrained weights: every backbone began from random ones (--random-weights).")
    return found


def step_rows(done: Done) -> list[dict[str, Any]]:
    """Every step of the study that these images have: what it is, how long it took, or why it is not there."""
    from heads.studies.words import what_of

    planned, rows = {step.name: step for step in done.plan.steps}, []
    why = dict(done.plan.left_out)
    for step in done.study.steps:
        if done.study.set_of(step) not in done.given and step.name not in done.made:
            continue
        made = done.made.get(step.name)
        asked = made["asked"] if made else planned[step.name].asked if step.name in planned else None
        left = why.get(step.name) or why.get(getattr(step, "part", "")) or "not run: left out by --only or --skip"
        rows.append(
            {"name": step.name, "what": what_of(asked) if asked else "–", "seconds": made["seconds"] if made else None,
             "state": "done" if made else left}
        )  # fmt: skip
    return rows


def command_of(done: Done) -> str:
    """The command line that makes all this again."""
    asked = done.asked
    words = ["featurecache", "study", done.study.name]
    words += [word for data in asked.data for word in ("--data", data)]
    words += ["--quick"] if asked.quick else ["--random-weights"] if asked.random_weights else []
    words += [word for name, path in asked.weights.items() for word in ("--weights", f"{name}={path}")]
    for name in ("image_size", "epochs", "train_per_class"):
        value = getattr(asked, name)
        words += [f"--{name.replace('_', '-')}", str(value)] if value else []
    return shlex.join([*words, "--out", str(done.folder)])


def _step_commands(tables: list[Table]) -> list[tuple[str, str]]:
    """Sweeps say in their record by which command they can be made alone."""
    from heads.reports.provenance import sweep_command

    found = []
    for table in tables:
        for step, family in zip(table.steps, table.families, strict=True):
            folder = Path(family.runs[0].path).parent.parent
            if command := sweep_command(folder):
                found.append((f"{step}:", command))
    return list(dict.fromkeys(found))


def _pictures(done: Done) -> list[tuple[str, int, int, str]]:
    """(data URI, width, height, words) of the maps that were drawn."""
    import struct

    found = []
    titles = {step.name: done.study.part(step.part).title for step in done.study.steps if isinstance(step, Look)}
    for step, record in done.made.items():
        for name in record["made"].get("pictures", []):
            data = (done.folder / name).read_bytes()
            width, height = struct.unpack(">II", data[16:24])  # of the header of a PNG
            words = f"{titles[step]}, {Path(name).parent.name}"
            found.append((f"data:image/png;base64,{base64.b64encode(data).decode()}", width, height, words))
    return found
