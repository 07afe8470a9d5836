"""Keeping patients' names out of a cache: ids and groups as keyed hashes.

An id is the path of a file below its folder, a group a patient; both may be names. A plain hash would hide neither:
whoever has a list of names, or of numbers of patients, hashes them all and compares. So the hash is keyed (BLAKE2b-128)
with a secret that lies outside the cache: 32 random bytes in the user's configuration folder, or
``$FEATURECACHE_SECRET``, for which a long random text is expected, since a short one can be tried too. With the same
secret the same id has the same hash, so that images are found again and groups stay together across data sets; without
it nobody can tell who is who, and that includes you: keep a copy.

What remains in a cache: the path of the folder or table with the images, class names, further columns of a table unless
their cells hold what is hashed, the order of the images (mostly that of their names), and the features themselves.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from featurecache.errors import BadOption, CannotWrite, SourceError
from featurecache.files.atomic import AtomicFile
from featurecache.formatting import abbreviated
from featurecache.sources.base import Dataset
from featurecache.sources.dicom_frames import PLAIN_PATIENTS

VARIABLE = "FEATURECACHE_SECRET"
_ID, _GROUP, _CHECK = b"featurecache id", b"featurecache grp", b"featurecache chk"  # BLAKE2b: up to 16 bytes
_SHORTEST = 3  # characters of a name looked for inside a cell: shorter ones are in everything


def secret_file() -> Path:
    try:
        return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "featurecache" / "secret"
    except RuntimeError as error:
        raise BadOption(
            f"--hash-ids needs a secret and this user has no home to keep it: {VARIABLE}=LONG_RANDOM_TEXT."
        ) from error


@dataclass(frozen=True, repr=False)
class Secret:
    """The key of this user's hashes. ``file``: where it is yet to be written, None where it is kept already."""

    value: bytes
    file: Path | None = None

    @property
    def check(self) -> str:
        """8 hex kept beside the hashes: tells another secret, and nothing of this one."""
        return _hash(self.value, _CHECK, "")[:8]

    def keep(self) -> None:
        """Write a new one to its place, readable by this user only. Raises CannotWrite, BadOption."""
        if self.file is None:
            return
        try:
            self.file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with AtomicFile(self.file) as file:
                os.fchmod(file.fileno(), 0o600)
                file.write(0, self.value.hex().encode() + b"\n")
                file.commit(replace=False)  # one that is there already stays
        except OSError as error:
            why = f"cannot keep the secret of --hash-ids in {self.file}: {os.strerror(error.errno or 0)}. "
            raise CannotWrite(error.errno, f"{why}Choose one yourself: {VARIABLE}=LONG_RANDOM_TEXT.") from error
        if load_secret().value != self.value:
            raise BadOption(f"another process has just made the secret {self.file}: run the command again.")


def load_secret(cache: Path | None = None) -> Secret:
    """This user's secret, a new one where there is none; `Secret.keep` writes it. Raises BadOption."""
    if given := os.environ.get(VARIABLE):
        return Secret(hashlib.blake2b(given.encode(errors="surrogateescape"), digest_size=32).digest())
    path = secret_file()
    if cache is not None and path.resolve().is_relative_to(cache.resolve()):
        raise BadOption(f"{path} lies in the cache {cache}, where everybody who reads it finds the secret too.")
    try:
        status, text = path.stat(), path.read_text("ascii")
    except FileNotFoundError:
        return Secret(secrets.token_bytes(32), path)
    except (OSError, ValueError) as error:
        raise BadOption(f"the secret of --hash-ids, {path}, cannot be read: {error}.") from error
    if not re.fullmatch(r"[0-9a-f]{64}\n?", text):
        raise BadOption(f"{path} is not a secret of featurecache (64 hex digits). Bring the one you had, or remove it.")
    if status.st_mode & 0o077:
        raise BadOption(f"the secret {path} can be read by others; close it: chmod 600 {path}")
    return Secret(bytes.fromhex(text.strip()))


def secret_of(source: Any) -> Secret:
    """The secret that the hashes of a view's ``source`` were made with. Raises SourceError where it is another."""
    secret = load_secret()
    if secret.file is not None or secret.check != source.get("secret"):
        what = "is not here" if secret.file is not None else "is another one"
        bring = f"Bring the file {secret_file()} of whoever extracted it, or set {VARIABLE}"
        raise SourceError(f"the ids of this view were hashed with a secret that {what}. {bring}.")
    return secret


def pseudonymise(dataset: Dataset, secret: Secret, *, ids: bool, groups: bool) -> Dataset:
    """``dataset`` with its ids, or its groups, or both as 32 hex; its images are read as before."""
    ids, groups = ids and not dataset.source.get("hash_ids"), groups and not dataset.source.get("hash_groups")
    if not (ids or groups):
        return dataset
    names = {name: hash_id(secret, name) for name in dataset.ids} if ids else {}
    meta, changed = _hidden_columns(dataset, secret, ids, groups)
    notes = [note for note in dataset.notes if not groups or note != PLAIN_PATIENTS]
    notes += [f"Further columns hold what is hashed and are hashed too: {abbreviated(changed)}."] if changed else []
    if groups and not ids and _tells(_own_groups(dataset), dataset.ids, False):
        notes.append("The ids still name the groups: --hash-ids hides them too.")
    flags = {key: True for key, yes in {"hash_ids": ids, "hash_groups": groups}.items() if yes}
    hidden = dataset.groups
    if hidden is not None:  # an image without a group is one of its own, under its id: that one is hashed with the ids
        hidden = [_hash(secret.value, _GROUP, name) if groups else names.get(name, name) for name in hidden]
    return replace(
        dataset,
        ids=[names.get(name, name) for name in dataset.ids],
        groups=hidden,
        meta=meta,
        source={**dataset.source, **flags, "secret": secret.check},
        notes=tuple(notes),
    )


def hash_id(secret: Secret, name: str) -> str:
    """What ``name`` is called where ids are hashed: 32 hex."""
    return _hash(secret.value, _ID, name)


def _hash(secret: bytes, purpose: bytes, name: str) -> str:
    return hashlib.blake2b(name.encode(), digest_size=16, key=secret, person=purpose).hexdigest()


def _hidden_columns(dataset: Dataset, secret: Secret, ids: bool, groups: bool) -> tuple[dict[str, Any], list[str]]:
    """Further columns; one that holds in a cell what is hashed of its row is hashed whole, and its name returned."""
    meta, changed = dict(dataset.meta), []
    for key, column in dataset.meta.items():
        cells = _cells(column)
        numbers = isinstance(column, np.ndarray)
        in_ids = ids and _tells(dataset.ids, cells, numbers, paths=True)
        if in_ids or (groups and _tells(_own_groups(dataset), cells, numbers)):
            meta[key] = [_hash(secret.value, _GROUP, cell) if cell else "" for cell in cells]
            changed.append(key)
    return meta, changed


def _own_groups(dataset: Dataset) -> list[str]:
    """Groups, empty where an image has none and so bears its own id there."""
    own = set(dataset.ids)
    return ["" if group in own else group for group in dataset.groups or [""] * len(dataset)]


def _cells(column: list[str] | np.ndarray) -> list[str]:
    """A column as text; whole numbers without a point."""
    if not isinstance(column, np.ndarray):
        return column
    numbers = [int(value) if isinstance(value, float) and value.is_integer() else value for value in column.tolist()]
    return ["" if value != value else str(value) for value in numbers]


def _tells(names: list[str], cells: list[str], numbers: bool, paths: bool = False) -> bool:
    """Whether cells give away the names of their rows: by holding one whatever its case, or, of paths, by being a part.
    Numbers do when half of them are the name: a pulse of 120 is sometimes the number of the patient, too."""
    rows = [(name, cell) for name, cell in zip(names, cells, strict=True) if name and cell]
    if numbers:
        return 2 * sum(cell in _parts(name, paths) for name, cell in rows) >= len(rows) > 0
    for name, cell in rows:
        parts, text = _parts(name.casefold(), paths), cell.casefold()
        if text in parts or (len(parts[-1]) >= _SHORTEST and parts[-1] in text):
            return True
    return False


def _parts(name: str, path: bool) -> tuple[str, ...]:
    """Of a path its folders, its file name, and that without ending."""
    if not path:
        return (name,)
    parts = PurePosixPath(name).parts or (name,)
    return (*parts, PurePosixPath(name).stem)


def plain_reason(reason: str) -> str:
    """Why an image could not be read, without the words a text file in its place begins with."""
    return re.sub(r'\(starts with ".*"\)', "(it is text)", reason)
