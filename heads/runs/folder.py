"""Checked folders: a record that lists the other files by their hashes; folders written beside and renamed; their lock.

Runs, sweeps, studies, reports and maps lie in such folders. The record carries a hash of itself (``check``) and the
XXH3-128 of every file that was written with it (``files``). What else lies there is the user's, and nobody's business.
Nothing in a record depends on where the folder lies: copied or moved it is what it was.

A folder ``x`` in the making is ``.x.partial``: one name, taken up or cleared by the next command with the same --out.
It is locked for as long as the command lives:

    .x.partial/request.json    what is being trained
    .x.partial/new/            the folder to be; renamed when it is whole
    .x.partial/old/            what it replaces, between two renames
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import xxhash

from featurecache.errors import CacheError, CannotWrite, InUse, RunError
from featurecache.files.atomic import (
    hash_file,
    open_regular,
    refuse_links,
    remove_orphans,
    sync_path,
    write_whole,
    writing,
)
from featurecache.files.locks import exclusive_lock
from featurecache.files.records import nan_to_none, read_checked_json, write_checked_json

if TYPE_CHECKING:
    import torch

FORMAT = 1  # of the records of runs, sweeps and studies
MOST = 1 << 32  # bytes of a file that is read whole
_DIGITS = 32  # of a hash
TRIES, PAUSE = 5, 0.2  # of two that begin at one moment one waits; seconds, at most, between tries


def digest_of(data: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(data)


def write_record(path: Path, record: Mapping[str, Any], files: Mapping[str, str] | None = None) -> None:
    """Write the record of a folder, the last of its files. ``files``: name → hash; None: it lists none yet."""
    listed = {} if files is None else {"files": dict(sorted(files.items()))}
    write_whole(path, write_checked_json(nan_to_none({"format": FORMAT, **record, **listed})))


def seal_folder(folder: Path, name: str, record: Mapping[str, Any], files: Iterable[str] = ("**/*",)) -> None:
    """Write the record of a folder that is ready: it lists those of ``files`` (names or patterns) that are in it."""
    paths = {path for pattern in files for path in folder.glob(pattern)} - {folder / name}
    there = [path for path in paths if path.is_file()]
    write_record(folder / name, record, {path.relative_to(folder).as_posix(): hash_file(path) for path in there})


def read_checked_record(path: Path, what: str, kinds: Mapping[str, Any]) -> dict[str, Any]:
    """The record that says what a folder of ours (``what``) holds, by ``kinds`` of its values. Raises RunError."""
    folder = path.parent
    try:
        record, intact = read_checked_json(path, by_hand=False)
    except CacheError as error:
        raise RunError(f"{folder} is damaged: {error}") from error
    if record.get("format") != FORMAT:
        raise RunError(
            f"{folder} has {what} format {str(record.get('format'))[:40]}; this featurecache reads {FORMAT}."
        )
    if not intact:
        raise RunError(f"{folder} is damaged: {path.name} is not the text that was written.")
    wrong = wrong_kinds(record, kinds)
    files = record.get("files", {})
    if not isinstance(files, dict) or not all(
        isinstance(word, str) and _is_below(name) for name, word in files.items()
    ):
        wrong.append("files")
    if wrong:
        raise RunError(f"{folder} is damaged: {path.name} has no proper {' and no '.join(wrong)}.")
    return record


def wrong_kinds(record: Mapping[str, Any], kinds: Mapping[str, Any]) -> list[str]:
    """Keys that are missing, or whose value is of another type."""
    return [key for key, kind in kinds.items() if key not in record or not isinstance(record[key], kind)]


def _is_below(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def read_listed(path: Path, record: Mapping[str, Any], name: str) -> bytes:
    """The bytes of a file that the record at ``path`` lists. Raises RunError where they are others."""
    file = path.parent / name
    try:
        with open_regular(file) as handle:
            if os.fstat(handle.fileno()).st_size > MOST:
                raise CacheError("it is too large")
            data = handle.read()
    except (OSError, CacheError) as error:
        raise RunError(f"{path.parent} is damaged: {file} cannot be read ({error}).") from error
    _check_hash(path, record, name, digest_of(data))
    return data


def check_listed(path: Path, record: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raises RunError where one of the files that the record at ``path`` lists is not what was written."""
    for name in names:
        try:
            found = hash_file(path.parent / name)
        except FileNotFoundError as error:
            raise RunError(f"{path.parent} is damaged: {path.parent / name} is missing.") from error
        except (OSError, CacheError) as error:
            raise RunError(f"{path.parent} is damaged: {path.parent / name} cannot be read ({error}).") from error
        _check_hash(path, record, name, found)


def _check_hash(path: Path, record: Mapping[str, Any], name: str, found: str) -> None:
    if found in record.get("files", {}).get(name, "").split():
        return
    try:  # a report may have replaced it since the record was read
        now, intact = read_checked_json(path, by_hand=False)
    except CacheError:
        now, intact = {}, False
    same = intact and {**now, "files": None} == {**record, "files": None}
    if same and found in now.get("files", {}).get(name, "").split():
        return
    if intact and not same:
        raise RunError(f"{path.parent} holds something else than when it was opened; open it again.")
    raise RunError(
        f"{path.parent} is damaged: {path.parent / name} is not what was written. A whole copy of it, or the command "
        "that made it with --overwrite, brings it back."
    )


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], record: Mapping[str, Any], *, sync: bool) -> None:
    """Tensors and a record in one safetensors file, behind which its hash stands: whole or nothing. ``sync``: it is on
    the disk afterwards; without, a power failure may cost it."""
    from safetensors.torch import save

    contiguous = {name: value.contiguous() for name, value in tensors.items()}
    data = save(contiguous, {"record": json.dumps(record)})
    data += digest_of(data).encode()
    if sync:
        write_whole(path, data)
        return
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path):
        path.parent.mkdir(exist_ok=True)
        temporary.write_bytes(data)
        temporary.replace(path)


def read_whole_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """What `write_tensors` wrote; None where it is not there, or not what was written."""
    from safetensors.torch import load

    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    data, hashed = data[:-_DIGITS], data[-_DIGITS:]
    if digest_of(data).encode() != hashed:
        return None
    size = int.from_bytes(data[:8], "little")
    return load(data), json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["record"])


def replace_listed(path: Path, files: Mapping[str, bytes]) -> None:
    """Replace files that the record at ``path`` lists. While that lasts it lists both hashes: killed at any step, every
    file is one of the two."""
    with in_use(path.parent, "report"):
        record, intact = read_checked_json(path, by_hand=False)
        if not intact:
            raise RunError(f"{path.parent} is damaged: {path.name} is not the text that was written.")
        old, new = record["files"], {name: digest_of(data) for name, data in files.items()}
        both = {name: " ".join(dict.fromkeys([*old.get(name, "").split(), word])) for name, word in new.items()}
        write_record(path, record, old | both)
        for name, data in files.items():
            write_whole(path.parent / name, data)
        write_record(path, record, old | new)


@contextmanager
def in_use(folder: Path, by: str) -> Iterator[None]:
    """Make a folder and keep every other process out; what dead ones left unfinished in it is removed. Raises InUse."""
    with ExitStack() as stack:
        for left in reversed(range(TRIES)):
            try:
                with writing(folder):
                    folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(exclusive_lock(folder, by))
                break
            except (InUse, CannotWrite) as error:
                # removed by who held it: before it was locked, or between mkdir's EEXIST and its look at what is there
                gone = isinstance(error, CannotWrite) and error.errno in (errno.ENOENT, errno.EEXIST)
                if not left or not (gone or isinstance(error, InUse)):
                    raise
                time.sleep(random.uniform(0, PAUSE))
        remove_orphans(folder)
        yield


def is_leftover(path: Path) -> bool:
    """What a command leaves that was killed in its first moment: a mark of its lock, a file half written."""
    return path.name.startswith((".exclusive-", ".shared-")) or (path.name[0] == "." and path.suffix == ".tmp")


def partial_path(path: Path) -> Path:
    """``.x.partial``, of a length that every file system takes."""
    name = path.name
    if len(os.fsencode(name)) > 200:
        name = f"{name[:40]}-{hashlib.blake2b(name.encode(), digest_size=8).hexdigest()}"
    return path.with_name(f".{name}.partial")


def recover_folder(path: Path) -> None:
    """Undo what a killed command left of ``path``: a replacement between its two renames, a folder half written."""
    partial = partial_path(path)
    with writing(path):
        if (partial / "old").exists():
            if path.exists():
                shutil.rmtree(partial / "old")
            else:
                (partial / "old").rename(path)
        shutil.rmtree(partial / "new", ignore_errors=True)


@contextmanager
def partial_folder(path: Path, by: str) -> Iterator[Path]:
    """The locked ``.x.partial`` of ``path``; it goes where nothing is left in it. Raises InUse, CannotWrite."""
    partial = partial_path(path)
    try:
        with in_use(partial, by):
            recover_folder(path)
            yield partial
    finally:
        with suppress(OSError):  # something is left in it, or another command holds it by now
            partial.rmdir()


@contextmanager
def whole_folder(path: Path, *, replace: bool) -> Iterator[Path]:
    """A folder to be filled, which gets the name ``path`` when the block ends. ``replace``: in the place of another.

    Raises RunError where another has the name by then; nothing is left of ours, as after any error.
    """
    partial = partial_path(path)
    recover_folder(path)
    new = partial / "new"
    try:
        new.mkdir(parents=True)
        yield new
        for file in new.rglob("*"):
            sync_path(file)
        sync_path(new)
        there = path.is_dir() and any(path.iterdir())
        if there and not replace:
            raise RunError(f"{path} was finished by another command meanwhile; it stays, and this one is not written.")
        if there:
            refuse_links(path)
            path.rename(partial / "old")
        new.rename(path)
        sync_path(path.parent)
    finally:
        recover_folder(path)
        with suppress(OSError):
            partial.rmdir()
