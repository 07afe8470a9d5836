"""Report page: one HTML file that shows a run, a sweep or several runs side by side and asks no network for anything.

Every number comes from the ``record`` of a `heads.evaluation.comparison.Comparison` (``family``: one of its
``"families"``); curves, confusion matrix and gallery from the runs themselves. Text comes in escaped (Jinja2
autoescape); the page's own policy forbids it any request and any script or style but its own two, which it names by
their hashes.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from jinja2 import ChainableUndefined, Environment, FileSystemLoader
from markupsafe import Markup

from featurecache import __version__
from featurecache.errors import CannotWrite
from heads.evaluation.comparison import Comparison
from heads.evaluation.costs import cost_columns, devices_words
from heads.evaluation.families import Family
from heads.evaluation.selection import selection_key
from heads.metrics.classification import UNTRAINED
from heads.reports import figures, side_by_side, text
from heads.reports.drawing import NUMBERED, Figure, plain, ticks
from heads.reports.gallery import Gallery, ImageLoader
from heads.reports.ledger import write_report_files
from heads.reports.provenance import commands_of, origins, setting_words, train_command
from heads.runs.run import Run
from heads.settings import measure_name
from heads.splits import dropped_sentence

TEMPLATES = Path(__file__).parent / "templates"
DETAILED = 3  # families with charts and images; of the others every number
SETTINGS = 400  # rows of the table of all settings
BAR = (2.0, 98.0)  # the inside of a row's interval, in per cent of its width


@dataclass
class FamilyDetail:
    """One family in full, or, when there are many, its numbers only."""

    family: dict[str, Any]
    anchor: str
    rank: int
    setting: str
    command: str
    per_class: list[dict[str, Any]]
    figures: list[Figure] = field(default_factory=list)
    confused: list[dict[str, Any]] = field(default_factory=list)
    gallery: Gallery | None = None
    elsewhere: str = ""  # the curves that stand side by side with those of others


@dataclass(frozen=True)
class WrittenReport:
    """``path``: the page; ``images``: how many images it embeds; ``left_out``: sentences on families of sweeps that are
    not finished or damaged."""

    path: Path
    images: int
    left_out: tuple[str, ...] = ()


def write_report(
    folder: str | Path, families: Sequence[Family], comparison: Comparison, *, images: bool = True,
    hash_ids: bool = False, paths: Sequence[str] = (), place: Path | None = None,
) -> WrittenReport:  # fmt: skip
    """report.html, metrics.csv and metrics.json into ``folder``, which is there. Raises CannotWrite.

    ``place``: where they are written, of a folder that is still in the making.

    ``images`` False embeds none. ``hash_ids`` writes ids as keyed hashes (`featurecache.sources.pseudonyms`).
    ``paths``: the folders to name in the command that makes the page again; by default ``folder`` or the runs.
    """
    folder = Path(folder)
    place = place or folder
    loader = ImageLoader(hashed() if hash_ids else str, images)
    page, count = render(folder, families, comparison.record, loader, paths)
    try:
        run = next((r for f in families for r in f.runs if r.folder.resolve() == place.resolve()), None)
        write_report_files(place, page.encode("utf-8", "backslashreplace"), comparison.record, run)
    except OSError as error:
        raise CannotWrite(error.errno, f"The report could not be written in {folder}: {error.strerror}.") from error
    return WrittenReport(folder / "report.html", count)


def hashed() -> Callable[[str], str]:
    from featurecache.sources.pseudonyms import hash_id, load_secret

    secret = load_secret()
    secret.keep()
    return lambda name: hash_id(secret, name)


def render(
    folder: Path, families: Sequence[Family], record: dict[str, Any], loader: ImageLoader, paths: Sequence[str] = ()
) -> tuple[str, int]:
    """The page as text, and how many images it embeds."""
    runs = [run for family in families for run in family.runs]
    part, count = part_context(families, record, loader)
    context = part | {
        "title": text.title_words(record, runs), "subtitle": text.subtitle_words(record, runs),
        "commands": commands_of(folder, paths, families, record, loader.images, loader.shown is not str),
        "origins": origins(runs), "numbers_words": "metrics.csv, metrics.json",
    }  # fmt: skip
    return render_page("report.html", context, count), count


def part_context(
    families: Sequence[Family], record: dict[str, Any], loader: ImageLoader, prefix: str = "",
    published: Mapping[str, Sequence[dict[str, Any]]] = MappingProxyType({}),
) -> tuple[dict[str, Any], int]:  # fmt: skip
    """What ``part.html`` shows of one comparison, and how many images that embeds. ``prefix``: of its anchors, where
    several stand on one page. ``published``: by a family's name "value" of the leading measure, "words", "grey"."""
    pairs = ranked(families, record)
    overlaid = side_by_side.overlaid_kinds(pairs, record["task"])
    details = [
        detail_of(rank, numbers, family.runs, loader if rank <= DETAILED else None, prefix, overlaid)
        for rank, (family, numbers) in enumerate(pairs, start=1)
    ]
    runs = [run for family in families for run in family.runs]
    settings = record.get("rows") or []  # best on val first within the order of the record
    best = {numbers["name"]: i for i, (_, numbers) in enumerate(pairs[: side_by_side.OVERLAID])}
    tables = {column: [r for r in rows if r["family"] in best] for column, rows in (record.get("by") or {}).items()}
    for table in tables.values():  # for each value of the column the best families on val, in their order
        table.sort(key=lambda r: (r["value"], best[r["family"]]))
    context = {
        "record": record, "p": prefix, "warnings": all_warnings(record, runs),
        "chosen_words": text.chosen_words(record["task"], runs), "by": list(tables.items()),
        "board": leaderboard(record, [numbers for _, numbers in pairs], prefix, published),
        "comparing": side_by_side.comparing_figures(pairs, measure_name(record["select"]), record["task"]),
        "by_measures": text.shown_measures(record), "details": details, "shown_in_full": DETAILED,
        "settings": settings[:SETTINGS] if len(settings) > len(pairs) else [],
        "settings_left": max(0, len(settings) - SETTINGS), "with_images": loader.images, "how": True,
    }  # fmt: skip
    return context, sum(detail.gallery.images for detail in details if detail.gallery)


def render_part(context: dict[str, Any]) -> Markup:
    """A comparison as a piece of a page."""
    return Markup(_environment(context["record"]["task"]).get_template("part.html").render(context))


def render_page(template: str, context: dict[str, Any], count: int) -> str:
    """A whole page, with what all pages have: style, script, policy, when and with what it was made."""
    css, js = (Markup((TEMPLATES / name).read_text("utf-8")) for name in ("report.css", "report.js"))
    own = {
        "version": __version__, "css": css, "js": js, "policy": content_security_policy(css, js),
        "untrained_words": UNTRAINED, "made": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "embedded": count,
    }  # fmt: skip
    return _with_distinct_ids(_environment(context["record"]["task"]).get_template(template).render(own | context))


def _with_distinct_ids(page: str) -> str:
    """A figure that stands twice on a page has other ids the second time: they are made of what it shows."""
    seen: Counter[str] = Counter()

    def renamed(figure: re.Match[str]) -> str:
        first = re.search(r'id="([0-9a-f]{6})', figure[0])
        if first is None:
            return figure[0]
        seen[first[1]] += 1
        times = "" if seen[first[1]] == 1 else f"-{seen[first[1]]}-"
        return re.sub(rf'((?:id="|href="#){first[1]})', rf"\1{times}", figure[0])

    return re.sub(r'<svg [^>]*class="chart".*?</svg>', renamed, page, flags=re.DOTALL)


def content_security_policy(css: str, js: str) -> str:
    """No request, no script and no style but the page's own; images only those embedded."""
    style, script = (base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in (css, js))
    own = f"style-src 'sha256-{style}'; script-src 'sha256-{script}'"
    return f"default-src 'none'; img-src data:; {own}; base-uri 'none'; form-action 'none'"


@functools.cache  # with the compiled templates
def _environment(task: str) -> Environment:
    loader, undefined = FileSystemLoader(TEMPLATES), ChainableUndefined
    environment = Environment(loader=loader, undefined=undefined, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(text.filters_for(task))
    return environment


def ranked(families: Sequence[Any], record: dict[str, Any]) -> list[tuple[Any, dict[str, Any]]]:
    """(Family, its record), best on val first, ties by val NLL."""
    pairs = zip(families, record["families"], strict=True)
    return sorted(pairs, key=lambda pair: selection_key([pair[1]], record["select"]))


def leaderboard(
    record: dict[str, Any], families: list[dict[str, Any]], prefix: str = "",
    published: Mapping[str, Sequence[dict[str, Any]]] = MappingProxyType({}),
) -> dict[str, Any]:  # fmt: skip
    """Rows with their intervals, all on one scale; ``axis`` stands over them. ``prefix``: of their anchors."""
    lead = measure_name(record["select"])
    tests = [(family["test"] or {}).get(lead) or {} for family in families]
    controls = [{"value": (control["test"] or {}).get(lead)} for control in record["controls"]]
    marks = [published.get(family["name"], ()) for family in families]
    best = tests[0].get("value") if len(tests) + len(controls) > 1 else None
    axis, strips = _interval_strips([*tests, *controls], best, figures.top_of(lead), marks)
    rows = [
        {"family": family, "strip": strip, "anchor": f"{prefix}f{i + 1}"}
        for i, (family, strip) in enumerate(zip(families, strips, strict=False))
    ]
    return {
        "rows": rows, "controls": list(zip(record["controls"], strips[len(rows) :], strict=True)), "axis": axis,
        "measures": text.shown_measures(record), "lead": lead, "published": any(marks),
        "spreads": text.shown_spreads(families, lead, record["task"]),
        "costs": cost_columns(families), "device": devices_words(families),
        "greyed": any(one["grey"] for each in marks for one in each),
        "fractions": len({f["fraction"] for f in families}) > 1,
        "differences": any(f.get("difference") for f in families),
    }  # fmt: skip


def _interval_strips(
    tests: Sequence[dict[str, Any]], mark: float | None, top: float | None,
    published: Sequence[Sequence[dict[str, Any]]],
) -> tuple[list[tuple[float, str]], list[dict[str, Any]]]:  # fmt: skip
    """Where the ticks of a column of intervals stand, and each row's low, value, high, ``mark`` and ``published``, on
    one scale, in per cent of its width. It begins where the intervals do: a control may be ``below`` it."""
    alone = all(test.get("low") is None for test in tests)
    scaled = [test for test in tests if alone or test.get("low") is not None]
    values = [v for t in scaled for v in (t.get("value"), t.get("low"), t.get("high")) if v is not None]
    values = [*values, *(one["value"] for each in published for one in each)] or [0.0, 1.0]
    low, high = min(values), max([*values, *(t["value"] for t in tests if t.get("value") is not None)])
    room = 0.06 * (high - low) or 0.05 * abs(high) or 0.5
    low, high = low - room, high + room if top is None else min(high + room, top)

    def at(value: float) -> float:
        return round(BAR[0] + (value - low) / (high - low) * (BAR[1] - BAR[0]), 2)

    ends = [{"low": t.get("low"), "value": t.get("value"), "high": t.get("high"), "mark": mark} for t in tests]
    strips: list[dict[str, Any]] = [{key: None if v is None else at(v) for key, v in each.items()} for each in ends]
    for strip in strips:
        strip["below"] = strip["value"] is not None and strip["value"] < 0
    for strip, each in zip(strips, published, strict=False):
        strip["published"] = [one | {"at": at(one["value"])} for one in each]
    return [(at(v), plain(v)) for v in ticks(low, high, 6)], strips


def detail_of(
    rank: int, family: dict[str, Any], runs: Sequence[Run], loader: ImageLoader | None, prefix: str = "",
    overlaid: Set[str] = frozenset(),
) -> FamilyDetail:  # fmt: skip
    """``loader`` None: numbers only, no figures and no images. ``overlaid``: kinds of curves that stand elsewhere."""
    setting, command = setting_words(family["setting"]), train_command(runs[0])
    detail = FamilyDetail(family, f"{prefix}f{rank}", rank, setting, command, per_class(family, runs))
    if loader is None:
        return detail
    predictions, run = figures.page_predictions(runs), runs[0]
    measured = {measure: test["value"] for measure, test in (family["test"] or {}).items()}
    external = [(part.get("calibration"), part["view"]) for part in family.get("external") or []]
    detail.figures = [figures.counts_figure(predictions)]
    kinds = [kind for kind in ("roc", "pr") if kind not in overlaid]
    detail.figures += [figures.curve_figure(kind, predictions, measured) for kind in kinds]
    calibrations = [(family.get("calibration"), ""), *external]
    detail.figures += [figures.reliability_figure(each, where) for each, where in calibrations if each]
    stepped = "training" in overlaid and figures.is_stepped(run)
    detail.figures += figures.training_figures(runs, overlaid=stepped)
    curves = ["ROC"] * ("roc" in overlaid) + ["loss and criterion by epoch"] * stepped
    detail.elsewhere = ", ".join(curves)
    if run.task != "multilabel" and len(run.classes) > NUMBERED:
        detail.confused = figures.most_confused(predictions)
    first: dict[Any, tuple[Run, Any]] = {}  # of each fold the first run: no image twice, all by a head that exists
    for pair in predictions:
        first.setdefault((pair[0].config["splits"].get("fold") or [0])[0], pair)
    detail.gallery = loader.gallery(list(first.values()))
    return detail


def per_class(family: dict[str, Any], runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Of every class or label: its name, how many images of test (mean over folds), its measures with intervals."""
    rows = []
    for name in runs[0].classes:
        tables = [(run.metrics["test"].get("per_class") or {}).get(name) or {} for run in runs]
        counts = {key: float(np.mean([t[key] for t in tables])) for key in text.COUNTS if all(key in t for t in tables)}
        rows.append({"class": name, "counts": counts, "test": (family.get("per_class") or {}).get(name) or {}})
    return rows


def all_warnings(record: dict[str, Any], runs: Sequence[Run]) -> list[str]:
    """What a reader must know before the numbers: leaks first, each sentence once."""
    warnings = [*text.leak_warnings(runs), *record["warnings"], *(w for f in record["families"] for w in f["warnings"])]
    for run in runs:
        if any((run.config["splits"].get("dropped") or {}).values()):
            warnings.append(f"{dropped_sentence(run.config['splits']['dropped'])}.")
        warnings += [w for w in run.config.get("warnings") or [] if "stand" not in w or " in both " not in w]
    return [text.sentence(warning, record) for warning in dict.fromkeys(warnings)]
