"""Object storage through fsspec: addresses (s3://, gs://), listing, downloads, uploads under a condition, their errors.

Credentials, servers and tries are those of fsspec's library (s3fs, gcsfs), as everybody sets them up; nothing of them
is seen or kept here. What a library raises becomes one sentence. An upload has a condition, that no object has the name
(If-None-Match) or that it is still the version that was seen (If-Match), and an object appears whole or not at all.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from featurecache.errors import BadOption, CacheError, StorageError, UnsafeFile, first_line
from featurecache.files.atomic import NO_ROOM, cannot_write

SERVER = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_PROFILE", "STORAGE_EMULATOR_HOST")  # of the same address
_PACKAGES = {"s3": "s3fs", "gs": "gcsfs"}  # what fsspec needs
_CONFLICTS = {"PreconditionFailed", "412", "ConditionalRequestConflict", "409"}


class StoredObject(NamedTuple):
    size: int  # bytes
    version: str  # its ETag, or generation
    changed: float  # seconds since 1970

    @classmethod
    def of(cls, entry: dict[str, Any]) -> StoredObject:
        """As s3fs and gcsfs list it."""
        changed = entry["LastModified"] if "LastModified" in entry else entry["mtime"]
        return cls(int(entry["size"]), str(entry.get("generation") or entry["ETag"]), changed.timestamp())


class Conflict(Exception):
    """Somebody else wrote first."""


def is_address(text: object) -> bool:
    """s3://…, gs://… or file://…, also as pathlib spells them, with one slash."""
    return isinstance(text, str | os.PathLike) and re.match(r"(s3|gs|file):/", os.fspath(text)) is not None


def local_path(address: str | os.PathLike[str]) -> Path | None:
    """What file:// names on this machine; None of another address."""
    match = re.fullmatch(r"file:(?://(?:localhost)?(?=/))?(/.*)", os.fspath(address), re.DOTALL)
    return Path(match[1]) if match else None


def canonical(address: str | os.PathLike[str]) -> str:
    """``s3://bucket/folder``. Raises BadOption for what is no such address."""
    text = os.fspath(address)
    scheme, _, rest = text.partition(":")
    parts = [part for part in rest.split("/") if part]
    if not parts or "@" in parts[0] or ":" in parts[0] or {".", ".."} & set(parts) or not text.isprintable():
        shown = re.sub(r"//[^/]*@", "//…@", text) if text.isprintable() else ascii(text)
        raise BadOption(
            f"{shown} is no address of a folder; expected {scheme}://BUCKET/FOLDER. Credentials are no part of it: "
            "the library finds them as it always does (environment, configuration, role)."
        )
    return f"{scheme}://{'/'.join(parts)}"


def file_system(address: str) -> Any:
    """That of fsspec, one for all threads: its own cache has one for each, with connections of its own."""
    scheme = address.partition(":")[0]
    return _connected(scheme, os.getpid(), *(os.environ.get(name) for name in SERVER))


@functools.cache
def _connected(scheme: str, *_: Any) -> Any:
    try:
        import fsspec

        return fsspec.filesystem(scheme, use_listings_cache=False, skip_instance_cache=True)
    except ImportError as error:
        extra = 'pip install "featurecache[remote]"' if scheme == "s3" else f"pip install {_PACKAGES[scheme]}"
        raise BadOption(f"{_PACKAGES[scheme]} is needed for {scheme}://…: {extra}.") from error


@contextlib.contextmanager
def _asking(address: str) -> Iterator[None]:
    """Whatever a library raises inside, as one sentence. Raises StorageError, Conflict, FileNotFoundError."""
    try:
        yield
    except (StorageError, CacheError, BadOption):
        raise
    except Exception as error:
        response = getattr(error.__cause__, "response", None) or {}
        code = str(response.get("Error", {}).get("Code", getattr(error, "code", "")))
        if code in _CONFLICTS or isinstance(error, FileExistsError):
            raise Conflict from error
        if isinstance(error, OSError) and error.errno in NO_ROOM:  # here
            raise cannot_write(error, address) from error
        if code in ("NoSuchBucket", "InvalidBucketName") or type(error).__name__ == "ParamValidationError":
            raise StorageError(
                f"there is no bucket {address.split('/')[2]} for {address}: {first_line(error)}."
            ) from error
        if isinstance(error, FileNotFoundError):
            raise
        if isinstance(error, PermissionError) or "Credentials" in type(error).__name__:
            raise StorageError(
                f"no permission for {address}: {first_line(error)}. Credentials are those that the library finds "
                "($AWS_ACCESS_KEY_ID, $AWS_PROFILE, a role, …); they must allow listing and reading, and writing for "
                "what adds to it."
            ) from error
        raise StorageError(
            f"{address} does not answer as it should, after all tries of the library ($AWS_MAX_ATTEMPTS, by default 5):"
            f" {first_line(error)}. What is finished is safe; give the same command again."
        ) from error


def list_objects(address: str) -> dict[str, StoredObject]:
    """Every object below the address, by name; "" where it is one itself. Raises StorageError, UnsafeFile."""
    try:
        with _asking(address):
            entries = file_system(address).find(address, detail=True)
    except FileNotFoundError:
        entries = {}
    root = address.partition("://")[2]
    if list(entries) == [root]:
        return {"": StoredObject.of(entries[root])}
    listed = dict[str, StoredObject]()
    for key, entry in entries.items():
        if key.startswith(f"{root}/") and not key.endswith("/"):  # an empty object that stands for a folder
            name = key.removeprefix(f"{root}/")
            if {"", ".", ".."} & set(name.split("/")) or "\0" in name:
                raise UnsafeFile(f"{address} holds an object called {name[:80]!a}, which is no path below it.")
            listed[name] = StoredObject.of(entry)
    return listed


def stat_object(place: str) -> StoredObject | None:
    with contextlib.suppress(FileNotFoundError), _asking(place):
        return StoredObject.of(file_system(place).info(place))
    return None


def read_range(place: str, start: int, end: int) -> bytes:
    """Some bytes of an object. Raises FileNotFoundError, StorageError, as `download` does."""
    with _asking(place):
        data: bytes = file_system(place).cat_file(place, start=start, end=end)
        return data


def download(place: str, file: Path) -> None:
    """The bytes of an object into a file that is there, once more where they came with another checksum than S3 has."""
    for last in (False, True):
        try:
            with _asking(place):
                return file_system(place).get_file(place, str(file), max_concurrency=1)  # more hold it in memory
        except StorageError as error:
            if last or "Checksum" not in type(error.__cause__).__name__:
                raise


def upload_record(place: str, data: bytes, version: str) -> str:
    """Write an object, in one request, in the place of a ``version`` or of none; the version that it has then. Raises
    Conflict, FileNotFoundError where there is none of that version any more, StorageError."""
    files, (scheme, _, path) = file_system(place), place.partition("://")
    with _asking(place):
        if scheme == "gs":  # gcsfs itself knows no condition but that nothing is there
            bucket, _, key = path.partition("/")
            target = files.base.replace("/storage/", "/upload/storage/") + f"b/{bucket}/o"
            words = {"uploadType": "media", "name": key, "ifGenerationMatch": version or "0"}
            return str(files.call("POST", target, **words, data=data, json_out=True)["generation"])
        condition = {"IfMatch": version} if version else {"mode": "create"}
        return str(files.pipe_file(place, data, chunksize=4 << 30, **condition)["ETag"])


def upload_file(file: Path, place: str) -> None:
    """Upload a file, a large one in parts, unless there is an object of this name. Raises StorageError."""
    with contextlib.suppress(Conflict), _asking(place):
        file_system(place).put_file(str(file), place, mode="create", max_concurrency=4)
