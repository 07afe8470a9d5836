"""Files as a stranger would make them: line, hashes and directory are right, and no run of ours wrote them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import xxhash

from featurecache.files.atomic import AtomicFile
from featurecache.files.directory import ALIGNMENT, TEXTS, USER_BLOCK, UserBlock, open_columns
from featurecache.files.hdf5 import DIRECTORY, WriteTrace, new_hdf5, seal


@dataclass
class Content:
    """What a file of ours says, to be changed."""

    attributes: dict[str, Any] = field(default_factory=dict)
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    about: dict[str, dict[str, Any]] = field(default_factory=dict)  # attributes of columns

    def texts(self, name: str, values: list[str]) -> None:
        encoded = [value.encode() for value in values]
        self.columns[f"{TEXTS}{name}/bytes"] = np.frombuffer(b"".join(encoded), "u1")
        self.columns[f"{TEXTS}{name}/ends"] = np.cumsum([len(value) for value in encoded], dtype="i8")


def content_of(path: Path) -> Content:
    with open_columns(path) as file:
        columns = {name: file.array(name, ndim=None) for name in file.columns}
        return Content(dict(file.attributes), columns, {name: dict(c.attributes) for name, c in file.columns.items()})


def sealed(body: bytes, offset: int, length: int) -> bytes:
    """``body``, all after the user block, with the line that belongs to it."""
    check = xxhash.xxh3_64_hexdigest(body[offset - USER_BLOCK : offset - USER_BLOCK + length])
    block = UserBlock(xxhash.xxh3_128_hexdigest(body), USER_BLOCK + len(body), offset, length, check)
    return block.to_bytes() + body


def laid_out(content: Content, edit: Callable[[dict[str, Any]], Any] = lambda record: None) -> bytes:
    """A file for our reader alone: no HDF5 in it. ``edit`` changes what the directory says."""
    body, columns = bytearray(), {}
    for name, values in content.columns.items():
        body += bytes(-len(body) % ALIGNMENT)
        kind = values.dtype
        columns[name] = {
            "dtype": [[key, kind[key].str] for key in kind.names] if kind.names else kind.str,
            "shape": list(values.shape), "offset": USER_BLOCK + len(body), "attributes": content.about.get(name, {}),
        }  # fmt: skip
        body += values.tobytes()
    record = {"attributes": content.attributes, "columns": columns}
    text = json.dumps(edit(record) or record).encode()
    return sealed(bytes(body) + text, USER_BLOCK + len(body), len(text))


def plant(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.write_bytes(data)
    return path


def changed(path: Path, change: Callable[[Content], Any]) -> Path:
    """The same file after ``change(content)``, as a stranger's."""
    content = content_of(path)
    change(content)
    return plant(path, laid_out(content))


def rewrite(path: Path, change: Callable[[h5py.File], Any]) -> Path:
    """The same HDF5 file after ``change(file)``, its directory written anew."""
    trace = WriteTrace()
    with h5py.File(path) as old, new_hdf5(trace) as new:
        for key, value in old.attrs.items():
            new.attrs[key] = value
        for key in old:
            if key != DIRECTORY:
                old.copy(key, new)
        change(new)
    with AtomicFile(path) as file:
        seal(file, trace)
        file.commit()
    return path


def flip(path: Path, place: int) -> None:
    """Change one bit of a file where it lies."""
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
