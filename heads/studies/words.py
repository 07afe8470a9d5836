"""What ``featurecache study`` prints: the steps before it begins; at its end the heads of each question, and published
numbers beside ours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from featurecache.formatting import aligned, duration, number, one_line
from heads.metrics.classification import UNTRAINED, named_by, title
from heads.reports.page import ranked
from heads.reports.text import interval
from heads.runs.run import Run, name_of

if TYPE_CHECKING:
    from heads.studies.images import Given
    from heads.studies.page import Table
    from heads.studies.plan import Asked, Plan
    from heads.studies.run import Done
    from heads.studies.spec import Study

SHOWN = 12  # heads of a question
LONG = 8 * 60.0  # minutes; beyond it the ways to a shorter run are said


def study_lines(done: Done) -> str:
    """For a terminal."""
    if done.report is None:
        return f"{len(done.plan.steps):,} steps, of which {len(done.made):,} are done"
    lines = [line for table in done.report.tables for line in [*table_lines(table), ""]]
    lines += [*published_lines(done.report.published), ""] if done.report.published else []
    lines += [UNTRAINED] if done.asked.quick or done.asked.random_weights else []
    lines.append(f"report     {done.report.path}   embeds {done.report.images:,} images")
    return "\n".join(lines)


def table_lines(table: Table) -> list[str]:
    """The controls, then the heads that are best on val; which is which the step says."""
    record, steps = table.record, {id(family): step for step, family, _ in table.rows}
    lead, task = named_by(record["select"]), record["task"]
    over = [f"val {title(lead, task)}", f"test {title(lead, task)}", "s to train"]
    rows = [[one_line(table.part.title), "step", *over]]
    for control in record["controls"]:
        rows.append([control["name"], "", *(number((control[s] or {}).get(lead)) for s in ("val", "test")), ""])
    pairs = [pair for pair in ranked(table.families, record) if pair[1]["fraction"] == 1]
    for family, found in pairs[:SHOWN]:
        spent = found["train_seconds"]
        values = [number(found["val"].get(lead)), interval(found["test"].get(lead))]
        where = "" if family.from_pixels else f" of {family.view.partition('/')[0]}"
        name = one_line(name_of(family.head, family.output) + where)
        rows.append([name, steps[id(family)], *values, "–" if spent is None else f"{spent:,.1f}"])
    left = len(pairs) - SHOWN
    return [*aligned(rows, right=2), *([f"and {left} more, in the report"] if left > 0 else [])]


def published_lines(published: list[dict[str, Any]]) -> list[str]:
    several = len({row["part"] for row in published}) > 1
    columns = {"what": "published", **({"part": "question"} if several else {}), "measure": "number", "ours": "of"}
    rows = [[*columns.values(), "published", "here"]]
    for row in published:
        rows.append([*(one_line(row[key]) for key in columns), row["published_words"], row["here_words"]])
    grey = any(row["grey"] for row in published)
    said = ["Beside a trial, random weights, or fewer epochs or images a published number does not compare."]
    return [*aligned(rows, right=len(columns)), *(said if grey else [])]


def best_run(table: Table) -> Run:
    """Of the family that is best on val."""
    run: Run = ranked(table.families, table.record)[0][0].runs[0]
    return run


def result_record(done: Done) -> dict[str, Any]:
    """The same as JSON."""
    steps = [
        {"step": s.name, "minutes": s.minutes, "done": s.name in done.made,
         "seconds": done.made[s.name]["seconds"] if s.name in done.made else None}
        for s in done.plan.steps
    ]  # fmt: skip
    record = {"study": done.study.name, "folder": str(done.folder), "steps": steps, "left_out": done.plan.left_out}
    if done.report is None:
        return record
    return record | {
        "report": str(done.report.path),
        "images": done.report.images,
        "published": done.report.published,
        "parts": {table.part.name: table.record for table in done.report.tables},
    }


def plan_lines(
    study: Study, asked: Asked, given: dict[str, Given], plan: Plan, kept: dict[str, dict[str, Any]]
) -> list[str]:
    """The first screen: the question, the images, the steps with about how long each takes, what is left out."""
    lines = [f"study      {study.name}: {study.title}   ({study.source})"]
    for each in given.values():
        what = each.said or f"{each.source}, {len(each.dataset):,} images"
        lines.append(f"images     {each.images.name}: {what}")
    if asked.quick:
        lines.append("quick      small untrained networks, few images, few epochs: it shows the commands, nothing else")
    width = max((len(step.name) for step in plan.steps), default=0)
    for place, step in enumerate(plan.steps, start=1):
        about = "done" if step.name in kept else "" if step.minutes is None else f"about {duration(60 * step.minutes)}"
        lines.append(f"step {place:>2}    {step.name:<{width}}  {what_of(step.asked)}   {about}".rstrip())
    lines += [f"left out   {name}: {why}" for name, why in plan.left_out]
    left = sum(step.minutes or 0 for step in plan.steps if step.name not in kept)
    about = f"about {duration(60 * left)} on this machine; every step is kept, ^C loses at most an epoch"
    waiting = any(step.name not in kept for step in plan.steps)
    lines.append(f"time       {about if waiting else 'every step is done; what is left is the page'}")
    if left > LONG:
        lines.append("shorter    --only STEP, --epochs N, --train-per-class N or --image-size N, or a GPU")
    return lines


def what_of(asked: dict[str, Any]) -> str:
    """A settled step in a few words."""
    size = f" at {asked['image_size']} px" if asked.get("image_size") else ""
    random = ", random weights" if asked.get("random_weights") else ""
    if "extract" in asked:
        return f"{asked['outputs']} of {asked['backbone']}{size}{random}"
    if "ablate" in asked:
        more = "".join(f", {key} {asked[key]}" for key in ("fractions", "search") if key in asked)
        return f"heads {asked['heads']} on {', '.join(asked['ablate'])}{more}"
    if "train_baseline" in asked:
        shown = ("epochs", "train_per_class", "optimizer", "augment", "rlrr")
        said = {key: "" if asked[key] is True else f" {asked[key]}" for key in shown if asked.get(key)}
        more = "".join(f", {key.replace('_', ' ')}{value}" for key, value in said.items())
        return f"{asked['arch']}{size}{more}{random}"
    return f"where {', '.join(asked['explain'])} look"
