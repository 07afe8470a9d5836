"""report.html: one file that shows a run, a sweep or several runs side by side, and asks no network for anything.

Made from a `heads.comparison.Comparison` and the runs it was made of. Text comes in escaped (Jinja2 autoescape); the
page's own policy forbids it any request and any script or style but its own two, which it names by their hashes.
"""

from __future__ import annotations

import base64
import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import ChainableUndefined, Environment, FileSystemLoader
from markupsafe import Markup

from featurecache import __version__
from featurecache.dataset import few
from featurecache.errors import BadOption, CannotWrite, RunError
from heads.reports.gallery import Album
from heads.reports.ledger import write_ledger
from heads.reports.origin import commands_of, origins
from heads.reports.sections import (
    DETAILED,
    Detail,
    all_warnings,
    by_tables,
    comparing_figures,
    detail_of,
    leaderboard,
    ranked,
    settings_rows,
    shown_measures,
)
from heads.reports.wording import chosen_words, filters_for, images_words, subtitle_words, title_words, unit_words
from heads.runs import Run, load_run
from heads.tables import UNTRAINED

if TYPE_CHECKING:
    from heads.comparison import Comparison, Family

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Written:
    """``path``: the page; ``images``: how many images it embeds."""

    path: Path
    images: int


def write_report(
    folder: str | Path, families: Sequence[Family], comparison: Comparison, *, images: bool = True,
    hash_ids: bool = False, given: Sequence[str] = (),
) -> Written:  # fmt: skip
    """report.html, metrics.csv and metrics.json into ``folder``, which is there. Raises CannotWrite.

    ``images`` False embeds none. ``hash_ids`` writes ids as keyed hashes (`featurecache.privacy`). ``given``: the
    folders to name in the command that makes the page again; by default ``folder`` or the runs.
    """
    from featurecache.files import write_whole

    folder = Path(folder)
    album = Album(hashed() if hash_ids else str, images)
    page, count = render(folder, families, comparison.record, album, given)
    try:
        write_whole(folder / "report.html", page.encode("utf-8", "backslashreplace"))
        write_ledger(folder, comparison.record)
    except OSError as error:
        raise CannotWrite(error.errno, f"The report could not be written in {folder}: {error.strerror}.") from error
    return Written(folder / "report.html", count)


def report(
    paths: str | Path | Sequence[str | Path], *, out: str | Path | None = None, reference: str | None = None,
    by: str | None = None, prevalence: float | None = None, show_test: str = "chosen", images: bool = True,
    hash_ids: bool = False, resamples: int = 2000,
) -> Written:  # fmt: skip
    """The report of run folders and sweep folders, side by side; the options are those of ``featurecache report``.

    ``out``: by default the folder itself where it is one, else ``report-<n>`` beside the first. Raises RunError for
    what is no run and no sweep, BadOption where they do not compare, CannotWrite.
    """
    from heads.comparison import compare

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


def _families(given: Sequence[Path]) -> list[Family]:
    """Those of sweeps as they chose them, then the plain runs, grouped."""
    from heads.comparison import families_of

    families: list[Family] = []
    runs: list[Run] = []
    for path in given:
        if (path / "sweep.json").is_file():
            from heads.sweeps.sweep import load_sweep

            found = load_sweep(path).families
            if not found:
                raise RunError(
                    f"{path} is a sweep without a finished family yet: the command that began it continues it."
                )
            families += found
        else:
            runs.append(load_run(path))
    return [*families, *(families_of(runs) if runs else [])]


def _target(given: Sequence[Path], out: str | Path | None) -> Path:
    """Where the page goes; a folder that holds other things than a report, or another run, is refused."""
    if out is None:
        if len(given) == 1:
            return given[0]
        number = 1
        while (folder := given[0].resolve().parent / f"report-{number}").exists():
            number += 1
        return folder
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise BadOption(f"--out {out} is a file; it must be a folder, or a name that is free.")
    mine = len(given) == 1 and folder.is_dir() and folder.resolve() == given[0].resolve()
    others = [] if mine or not folder.is_dir() else sorted(path.name for path in folder.iterdir())
    if others and set(others) - {"report.html", "metrics.csv", "metrics.json"}:
        raise BadOption(
            f"--out {out} holds other files ({few(others, 3)}); give an empty folder or a name that is free."
        )
    return folder


def hashed() -> Callable[[str], str]:
    from featurecache.privacy import hashed_id, load_secret

    secret = load_secret()
    secret.keep()
    return lambda name: hashed_id(secret, name)


def render(
    folder: Path, families: Sequence[Family], record: dict[str, Any], album: Album, given: Sequence[str] = ()
) -> tuple[str, int]:
    """The page as text, and how many images it embeds. ``given``: what `report` was asked for."""
    runs = [run for family in families for run in family.runs]
    part, count = part_context(families, record, album)
    context = part | {
        "title": title_words(record, runs), "subtitle": subtitle_words(record, runs),
        "commands": commands_of(folder, given, families, record, album.images, album.shown is not str),
        "origins": origins(runs), "numbers_words": "metrics.csv, metrics.json",
    }  # fmt: skip
    return render_page("report.html", context, count), count


def part_context(
    families: Sequence[Family], record: dict[str, Any], album: Album, prefix: str = ""
) -> tuple[dict[str, Any], int]:
    """What ``part.html`` shows of one comparison, and how many images that embeds. ``prefix``: of its anchors, where
    several stand on one page."""
    pairs = ranked(families, record)
    details: list[Detail] = []
    for rank, (family, numbers) in enumerate(pairs, start=1):
        details.append(detail_of(rank, numbers, family.runs, album if rank <= DETAILED else None, prefix))
    runs = [run for family in families for run in family.runs]
    settings, left = settings_rows(record)
    context = {
        "record": record, "p": prefix, "warnings": all_warnings(record, runs), "unit_words": unit_words(record),
        "chosen_words": chosen_words(record["task"], runs),
        "board": leaderboard(record, [numbers for _, numbers in pairs], prefix),
        "comparing": comparing_figures(pairs, record),
        "by": by_tables(record, pairs), "by_measures": shown_measures(record),
        "details": details[:DETAILED], "rest": details[DETAILED:], "settings_left": left,
        "settings": settings if len(settings) > len(pairs) else [], "with_images": album.images,
    }  # fmt: skip
    return context, sum(detail.gallery.images for detail in details if detail.gallery)


def render_part(context: dict[str, Any]) -> Markup:
    """A comparison as a piece of a page."""
    return Markup(_environment(context["record"]["task"]).get_template("part.html").render(context))


def render_page(template: str, context: dict[str, Any], count: int) -> str:
    """A whole page, with what all pages have: style, script, policy, when and with what it was made."""
    css, js = (_own(name) for name in ("report.css", "report.js"))
    own = {
        "version": __version__, "css": css, "js": js, "policy": policy(css, js), "untrained_words": UNTRAINED,
        "made": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "images_words": images_words(count, context["with_images"]),
    }  # fmt: skip
    return _environment(context["record"]["task"]).get_template(template).render(own | context)


def _own(name: str) -> Markup:
    return Markup((TEMPLATES / name).read_text("utf-8"))


def policy(css: str, js: str) -> str:
    """No request, no script and no style but the page's own; images only those embedded."""
    style, script = (base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in (css, js))
    return (
        f"default-src 'none'; img-src data:; style-src 'sha256-{style}'; script-src 'sha256-{script}'; "
        "base-uri 'none'; form-action 'none'"
    )


@functools.cache  # with the compiled templates
def _environment(task: str) -> Environment:
    found = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=ChainableUndefined,
    )  # fmt: skip
    found.filters.update(filters_for(task))
    return found
