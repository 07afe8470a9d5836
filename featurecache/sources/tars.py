"""What lies in tar files, by offset: samples of a WebDataset found by their headers, and read in place.

Nothing is ever extracted, so no name can lead anywhere. The headers are tarfile's to understand; what they claim is
checked against the file, and a tar that ends without its end mark, or goes on behind it, is refused: what is behind
that place would be missing.
"""

from __future__ import annotations

import io
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from featurecache.dataset import Files, named_failures, opened
from featurecache.errors import SourceError, UnreadableImage
from featurecache.sources.folders import EXTENSIONS, refuse_undecodable

TEXTS = ("cls", "json", "txt")
LONGEST = 1 << 20  # bytes of a text, and of a header with a long name
_TAIL = 1 << 24  # bytes behind the end of a tar that are looked at
_BLOCK = tarfile.BLOCKSIZE
_COMPRESSED = (b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\xfd7zX", b"BZh")


@dataclass(frozen=True)
class Members(Files):
    """Images in tars: ``ids`` are ``<tar>:<key>``; of each its tar, offset and size in bytes."""

    tars: list[str] = field(repr=False)  # relative to ``root``
    stamps: list[tuple[int, int]] = field(repr=False)  # size and time of change of each tar, as it was indexed
    tar: np.ndarray = field(repr=False)  # int32 [N]
    offset: np.ndarray = field(repr=False)  # int64 [N]
    size: np.ndarray = field(repr=False)  # int64 [N]
    archived: ClassVar[bool] = True

    def path(self, row: int) -> str:
        return os.path.join(self.root, self.tars[self.tar[row]])

    def read(self, row: int) -> bytes:
        number = int(self.tar[row])
        with opened(self.path(row)) as (descriptor, status):
            if (status.st_size, status.st_mtime_ns) != self.stamps[number]:
                raise UnreadableImage(f"{self.tars[number]} has changed since it was opened; run the command again")
            with named_failures(self.path(row)):
                return read_at(descriptor, int(self.offset[row]), int(self.size[row]))


@dataclass
class Sample:
    id: str
    tar: int
    files: dict[str, tuple[int, int]] = field(default_factory=dict)  # what stands behind the dot → offset, size


@dataclass
class Found:
    """What the walk through the tars has come by."""

    samples: list[Sample] = field(default_factory=list)
    stamps: list[tuple[int, int]] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)  # by kind


class _Headers(io.FileIO):
    """A tar whose headers are read and nothing larger: a name may declare gigabytes."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= LONGEST:
            raise tarfile.ReadError(f"a header of {size or 0:,} bytes")
        return super().read(size) or b""


def walk(root: str, tar: str, number: int, found: Found) -> None:
    """Add the samples of a tar to ``found``."""
    path = os.path.join(root, tar)
    refuse_undecodable(root, tar)
    samples: dict[str, Sample] = {}
    try:
        with opened(path) as (descriptor, status):
            found.stamps.append((status.st_size, status.st_mtime_ns))
            with _Headers(os.dup(descriptor), "rb") as file:
                for member in _members(file, path, status.st_size):
                    _add(samples, member, tar, number, found)
    except SourceError:
        raise
    except UnreadableImage as error:
        raise SourceError(f"{path} cannot be opened: {error}.") from error
    except (tarfile.TarError, OSError, ValueError, EOFError, OverflowError, RecursionError) as error:
        raise SourceError(f"{path} cannot be read as a tar ({error}).") from error
    found.samples += samples.values()


def _members(file: _Headers, path: str, size: int) -> Iterator[tarfile.TarInfo]:
    """The entries of a tar up to its end, which has to be one."""
    front = file.read(_BLOCK)
    if front.startswith(_COMPRESSED):
        raise SourceError(f"{path} is compressed, and images are read in place: unpack it to a .tar first (gunzip).")
    file.seek(0)
    with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as archive:
        before = -1
        while (member := archive.next()) is not None:
            if archive.offset <= before or member.offset_data + max(member.size, 0) > size or member.size < 0:
                raise SourceError(f"{path} is cut off or damaged: {member.name!r} goes beyond its {size:,} bytes.")
            before = archive.offset
            yield member
            archive.members.clear()  # type: ignore[attr-defined]
        end = int(archive.offset)
    file.seek(end)
    if len(block := file.read(_BLOCK)) < _BLOCK:
        raise SourceError(f"{path} is cut off: it has no end mark after {end:,} bytes. Get it again.")
    for _ in range(_TAIL // _BLOCK):
        if block.strip(b"\0"):
            raise SourceError(
                f"{path} goes on behind byte {end:,} with what is no entry of this tar (damaged, or one tar behind "
                "another). Get it again, or give each as a file of its own."
            )
        if not (block := file.read(_BLOCK)):
            return


def _add(samples: dict[str, Sample], member: tarfile.TarInfo, tar: str, number: int, found: Found) -> None:
    name = re.sub(r"^(\./)+", "", member.name)
    last = name.rsplit("/", 1)[-1]
    if member.isdir() or last.startswith(".") or name.startswith("__MACOSX/"):
        return
    if not member.isreg() or member.issparse():
        found.ignored["links or devices"] += 1
        return
    key, dot, kind = last.partition(".")
    if not dot or not kind:
        found.ignored["no extension"] += 1
        return
    kind, key = kind.lower(), name[: len(name) - len(last)] + key
    if not (kind in TEXTS or names_image(kind)):
        found.ignored[f".{kind}"] += 1
        return
    if key not in samples:
        refuse_undecodable(tar, key)
        samples[key] = Sample(f"{tar}:{key}", number)
    if kind in samples[key].files:
        raise SourceError(f"{tar} holds {key}.{kind} twice; expected a key for each sample.")
    samples[key].files[kind] = member.offset_data, member.size


def names_image(kind: str) -> bool:
    return f".{kind.rsplit('.', 1)[-1]}" in EXTENSIONS


def read_at(descriptor: int, offset: int, size: int) -> bytes:
    parts, end = [], offset + size
    while offset < end:
        part = os.pread(descriptor, min(end - offset, 1 << 30), offset)
        if not part:
            raise UnreadableImage("its tar ends before it does")
        parts.append(part)
        offset += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)
