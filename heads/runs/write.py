"""Write a run folder whole or not at all, one command at a time: beside its place, and renamed when all is there."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from featurecache import __version__
from featurecache.errors import CacheError, CannotWrite, InUse, RunError
from featurecache.files.atomic import remove_orphans
from featurecache.files.names import check_path
from featurecache.files.records import nan_to_none, read_checked_json
from featurecache.formatting import cell, shell_word
from heads.metrics.calibration import Calibration, predict_labels, probabilities
from heads.runs.folder import FORMAT, is_leftover, partial_folder, partial_path, seal_folder, whole_folder, write_record
from heads.runs.records import BACKBONE, CONFIG
from heads.runs.run import Run, load_run
from heads.splits import splits_csv

REQUEST = "request.json"
OF_THE_PAGE = ("controls", "report", "images in the page", "hash ids")  # of a request; no matter to its training


@dataclass(frozen=True)
class RunContents:
    """What a training hands over to be written."""

    config: dict[str, Any]
    metrics: dict[str, Any]
    history: list[dict[str, float]]
    tensors: dict[str, torch.Tensor]
    ids: list[str]
    splits: np.ndarray  # [N] names, of every row of the view
    labels: np.ndarray  # [N] or [N, L], of every row of the view
    predictions: dict[str, tuple[np.ndarray, np.ndarray]]  # split -> rows [n], raw logits [n, C]
    digests: np.ndarray  # S32 [N]
    clusters: np.ndarray  # int64 [N]
    beside: Callable[[Path], Any] | None = None  # writes more into a folder: the backbone of a network that was tuned


@dataclass(frozen=True)
class RunTarget:
    """Where a run will lie. ``replace``: in the place of another; ``request``: all that decides what comes out;
    ``run``: the finished one that is there already and was made by the same request."""

    path: Path
    replace: bool = False
    request: dict[str, Any] = field(default_factory=dict)
    run: Run | None = None

    @property
    def checkpoint(self) -> Path:
        """The file that a training of a network goes on from."""
        return partial_path(self.path).with_suffix(".checkpoint")


def check_out(out: str | Path, record: str, kind: str, allowed: Sequence[str] = ()) -> Path:
    """``--out`` as a folder that is empty, not there, or has a ``record``; raises RunError for any other."""
    check_path(out, "--out")
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise RunError(f"--out {out} is a file; it must be a folder, or a name that is free.")
    others = {path.name for path in folder.iterdir() if not is_leftover(path)} if folder.is_dir() else set()
    if others - {*allowed} and not (folder / record).is_file():
        raise RunError(f"--out {out} holds other files and no {kind}; give a folder that is empty or not there.")
    return folder


@contextmanager
def claim_run(
    out: str | Path | None, view: str, head: str, request: dict[str, Any], overwrite: bool = False
) -> Iterator[RunTarget]:
    """Where a run will lie, before anything is trained and while no other command is at it: ``out``, or of
    runs/<view>-<head>-<n> the first number that is free. An interrupted training of the same ``request`` is taken up.

    Raises RunError where another run or another interrupted training is in the way (unless ``overwrite``), or a folder
    that is no run; InUse; CannotWrite.
    """
    short = head.rpartition(":")[2] if head.startswith("python:") else head
    stem = re.sub(r"[^A-Za-z0-9._-]+", "_", f"{view}-{short}")
    if out is not None:
        check_out(out, CONFIG, "run")
    for path in (Path("runs") / f"{stem}-{n}" for n in count(1)) if out is None else [Path(out).resolve()]:
        if out is None and path.exists():
            continue
        with ExitStack() as stack:
            try:
                partial = stack.enter_context(partial_folder(path, f"a training for {path.name}"))
            except InUse:
                if out is None:
                    continue
                raise
            except CannotWrite as error:
                why = getattr(error.__cause__, "strerror", None) or error
                raise CannotWrite(
                    f"No run can be written in {path.parent.resolve()}: {why}. --out chooses another place."
                ) from error
            target = RunTarget(path, overwrite, request, _run_at(path, request, overwrite))
            remove_orphans(path.parent, target.checkpoint.name)
            other = _interrupted(target, partial / REQUEST)
            if out is None and (path.exists() or other):
                continue
            if other and not overwrite:
                raise RunError(
                    f"A training with other {', '.join(other)} was interrupted on its way to {out}. Its own command "
                    "goes on with it; --overwrite throws it away; another --out keeps it."
                )
            if target.run or other:
                target.checkpoint.unlink(missing_ok=True)
            try:
                write_record(partial / REQUEST, request)
                yield target
            finally:
                if not target.checkpoint.exists():
                    (partial / REQUEST).unlink(missing_ok=True)
            return


def _run_at(path: Path, request: dict[str, Any], overwrite: bool) -> Run | None:
    """The finished run of the same request. Raises RunError for any other."""
    if overwrite or not (path / CONFIG).is_file():
        return None
    try:
        run = load_run(path, trust_code=True)
        run.check()
    except RunError as error:
        raise RunError(f"{error} --overwrite begins anew; another --out keeps what is there.") from error
    made = run.config.get("request", {}) | {"settings": deciding(run.config["settings"])}
    if other := _differences(made, request):
        page = f" featurecache report {shell_word(path)} writes its page anew."
        raise RunError(
            f"--out {path} holds a run already, with other {', '.join(other)}. --overwrite replaces it; another --out "
            f"keeps it.{page if {*other} <= {*OF_THE_PAGE[1:]} else ''}"
        )
    return run


def _interrupted(target: RunTarget, file: Path) -> list[str]:
    """What an interrupted training was asked otherwise; [] where there is none, or the same but for its page."""
    if not target.checkpoint.exists():
        return []
    try:
        before, intact = read_checked_json(file, by_hand=False)
    except CacheError:
        before, intact = {}, False
    if not intact:  # nobody knows what it is of
        target.checkpoint.unlink()
        return []
    return [name for name in _differences(before, target.request) if name not in OF_THE_PAGE]


def deciding(settings: dict[str, Any]) -> dict[str, Any]:
    """Of settings those that decide something of the result."""
    return {key: value for key, value in settings.items() if key not in ("ram", "device")}


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Names of the settings, and of the rest of a request, that are other."""
    old, new = ({**each.get("settings", {}), **each, "settings": None} for each in (old, json.loads(json.dumps(new))))
    return [name.replace("_", " ") for name in new if old.get(name, ...) != new[name]]


def write_run(target: RunTarget, contents: RunContents, draw: Callable[[Run], Any] | None = None) -> Run:
    """Write all files beside, then rename; returns the run as read back. Raises CannotWrite, and leaves nothing.

    ``draw`` adds pictures and the page to the unfinished run, which holds everything else by then.
    """
    request = {"request": {k: v for k, v in target.request.items() if k != "settings"}} if target.request else {}
    config = record_stamp() | contents.config | request
    try:
        with whole_folder(target.path, replace=target.replace) as folder:
            _write_files(folder, contents)
            seal_folder(folder, CONFIG, config)
            if draw is not None:
                draw(replace(load_run(folder, trust_code=True), path=target.path))
                seal_folder(folder, CONFIG, config)
    except OSError as error:
        while isinstance(error.__cause__, OSError):
            error = error.__cause__
        raise CannotWrite(
            error.errno, f"The run could not be written in {target.path.parent.resolve()}: {error.strerror or error}. "
            "Nothing of it is left there; the same command makes it.",
        ) from error  # fmt: skip
    return load_run(target.path, trust_code=True)  # its code, if any, has just run


def _write_files(folder: Path, contents: RunContents) -> None:
    history = list(contents.history[0])
    files = {
        "metrics.json": json_bytes(contents.metrics),
        "metrics.csv": csv_bytes(["model", "split", "class", "metric", "value"], _measures(contents)),
        "history.csv": csv_bytes(history, [[row[key] for key in history] for row in contents.history]),
        "predictions.csv": csv_bytes(*_predictions(contents)),
        "splits.csv": splits_csv(contents.ids, contents.splits).encode(),
        "answers.safetensors": save(_answer_tensors(contents), {"format": "pt"}),
        # One word of metadata only: safetensors writes several in no fixed order, and equal heads shall be equal bytes.
        "head.safetensors": save(contents.tensors, {"format": "pt"}),
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)  # synced with the whole folder
    if contents.beside:
        contents.beside(folder / BACKBONE)


def record_stamp() -> dict[str, Any]:
    """Format, time and versions, which a record of a run begins with."""
    return {
        "format": FORMAT,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {"featurecache": __version__, "torch": torch.__version__, "numpy": np.__version__},
    }


def json_bytes(record: dict[str, Any]) -> bytes:
    text = json.dumps(nan_to_none(record), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    return text.encode("utf-8", "backslashreplace")


def digest_octets(digests: np.ndarray) -> np.ndarray:
    """Digests S32 [n] as they lie in a file: uint8 [n, 16]."""
    return np.frombuffer(bytes.fromhex("".join(d.decode() for d in digests)), np.uint8).reshape(-1, 16)


def _answer_tensors(contents: RunContents) -> dict[str, torch.Tensor]:
    """The content of ``answers.safetensors``: digests of all rows; answers of each split and the rows they are of."""
    columns = {"digests": digest_octets(contents.digests)}
    for split, (rows, raw) in contents.predictions.items():
        own = {"rows": rows, "clusters": contents.clusters[rows], "labels": contents.labels[rows], "logits": raw}
        columns |= {f"{split}.{name}": values for name, values in own.items()}
    return {name: torch.from_numpy(np.array(values)) for name, values in columns.items()}


def csv_bytes(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> bytes:
    """Words are quoted, so that a comma, a quote or a line break stays inside its cell, and none is a formula."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    writer.writerows(map(cell, row) for row in chain([columns], rows))
    return text.getvalue().encode()


def _measures(contents: RunContents) -> list[list[Any]]:
    models = [(contents.config["head"], contents.metrics)] + [(c["name"], c) for c in contents.metrics["controls"]]
    rows: list[list[Any]] = []
    for model, measured in models:
        for split in ("val", "test"):
            own = measured[split] or {}
            for name, table in [("", own), *own.get("per_class", {}).items()]:
                numbers = {key: value for key, value in table.items() if isinstance(value, int | float)}
                rows += [[model, split, name, key, "" if math.isnan(v) else v] for key, v in numbers.items()]
    return rows


def _predictions(contents: RunContents) -> tuple[list[str], Iterator[list[Any]]]:
    config = contents.config
    kind, classes, calibration = config["task"], config["classes"], Calibration.from_dict(config["calibration"])
    positive = None if config["positive"] is None else classes.index(config["positive"])
    columns = ["true class", "predicted class"]
    if kind == "multilabel":
        columns = [f"{word} {name}" for word in ("true", "predicted") for name in classes]

    def rows() -> Iterator[list[Any]]:  # one at a time: all of a large test are ten times what they are as text
        for split, (where, raw) in contents.predictions.items():
            p = probabilities(kind, calibration(raw))
            predicted = predict_labels(kind, p, calibration.thresholds, positive)
            for i, row in enumerate(where.tolist()):
                if kind == "multilabel":
                    truth = ["" if math.isnan(v) else int(v) for v in contents.labels[row].tolist()]
                    cells = [*truth, *(int(v) for v in predicted[i])]
                else:
                    cells = [classes[contents.labels[row]], classes[predicted[i]]]
                yield [contents.ids[row], split, *cells, *p[i].tolist()]

    return ["id", "split", *columns, *(f"p {name}" for name in classes)], rows()
