"""Names of files and folders: what no file system takes is refused before anything is computed."""

from __future__ import annotations

import os
import re
from pathlib import Path

from featurecache.errors import BadOption

LONGEST = 255  # bytes of a name, on every usual file system
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # devices of Windows, with any ending


def is_file_name(name: str, ending: str = "") -> bool:
    """Whether a file may be called so, here and where it is copied to; a dash in front would be read as an option."""
    fits = len(f"{name}{ending}".encode(errors="surrogateescape")) <= LONGEST
    return fits and bool(name) and name[0] not in ".-" and not set(name) & {"/", "\0"} and not _RESERVED.fullmatch(name)


def check_path(path: str | os.PathLike[str], option: str) -> None:
    """Raises BadOption where a part of the ``path`` that an ``option`` gives cannot be the name of anything."""
    for part in Path(path).expanduser().parts:
        size = len(part.encode(errors="surrogateescape"))
        if "\0" in part:
            raise BadOption(f"{option}: {part[:60]!a} holds a NUL character, which no file's name may. Choose another.")
        if size > LONGEST:
            there = f"{part[:40]}… has {size:,} bytes, and a file's name has at most {LONGEST}"
            raise BadOption(f"{option}: {there}. Choose a shorter one.")
