"""Verify runs, sweeps, studies, reports and maps, and folders of them: is every file what was written?

Every record is compared with its own hash, what it lists with theirs, the rows of a journal with their checksums. What
no record lists is the user's, and passed over.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from featurecache.errors import RunError
from featurecache.maintenance.verify import Damage, VerifyReport
from heads.runs.folder import check_listed, read_checked_record
from heads.runs.records import CONFIG, METRICS_FILE
from heads.sweeps.journal import RECORD, read_journal

OWN = {RECORD: "sweep", "study.json": "study"}  # no other program's names
SHARED = {CONFIG: "run", METRICS_FILE: "report", "explain.json": "explanation"}
ANSWERS = "answers.safetensors"  # which only runs hold


def verify_runs(folders: Iterable[Path]) -> VerifyReport:
    """Check every file of ours in ``folders`` and below them."""
    start, files, damages = time.perf_counter(), dict[Path, int](), list[Damage]()
    for path in (record for folder in folders for record in records_below(folder)):
        try:
            record = read_checked_record(path, OWN.get(path.name, SHARED.get(path.name, "evaluation")), {})
        except RunError as error:
            damages.append(Damage(path, str(error)))
            record = {}
        for file in (path, *(path.parent / name for name in record.get("files", {}))):
            if file != path:
                try:
                    check_listed(path, record, [file.relative_to(path.parent).as_posix()])
                except RunError as error:
                    damages.append(Damage(file, str(error)))
            files[file] = file.stat().st_size if file.is_file() else 0
    for journal in sorted({path for file in files for path in file.parent.glob("*.jsonl")}):
        try:
            read_journal(journal, {})
        except RunError as error:
            damages.append(Damage(journal, str(error)))
    unlike = {damage.path: damage for damage in damages}
    return VerifyReport(len(files), sum(files.values()), time.perf_counter() - start, tuple(unlike.values()))


def records_below(folder: Path) -> Iterator[Path]:
    """The records of a folder and of those below it; neither hidden ones, nor those that belong to a run."""
    for place, below, names in os.walk(folder):
        here = Path(place)
        below[:] = sorted(name for name in below if not name.startswith("."))
        if ANSWERS in names or (CONFIG in names and _is_ours(here / CONFIG)):
            below[:] = [name for name in below if name in ("external", "explain")]
            yield here / CONFIG
            continue
        external = here.name == "external" and (here.parent / ANSWERS).exists()
        for name in sorted(names):
            ours = name in OWN or ((name in SHARED or (external and name.endswith(".json"))) and _is_ours(here / name))
            if ours and name != CONFIG:
                yield here / name


def _is_ours(path: Path) -> bool:
    """Whether it may be a record: it has one of the two keys that only these have, one of which a flip may have hit."""
    data = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
    return b'"check": "' in data or b'"files": {' in data
