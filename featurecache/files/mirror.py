"""Mirror of an address in object storage: a folder in this machine's state, on which everything works as on any other.

    remote/<key>/mirror.json     the address and what it is for (one key for each pair, and each server)
                 objects.json    name → [version, hash]: which version (ETag) of an object the file here is of
                 <name>/…        the files, under their names below the address

`Mirror.pull` makes it agree with the address: some files are fetched, of all others there is a *placeholder*, of the
right size, without the bytes, and with a time of modification that no file of ours has (1970). `fetch` has the bytes of
one; whoever reads bytes calls it first. `Mirror.put` uploads what was made here under the condition that nobody else
wrote there since. Killed anywhere, the next `pull` goes on with what it finds.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import secrets
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import xxhash

from featurecache.errors import BadOption, CacheError, DamagedFile, StorageError
from featurecache.files import storage
from featurecache.files.atomic import (
    AtomicFile,
    check_room,
    hash_file,
    locked_temporary,
    open_regular,
    remove_orphans,
    sync_path,
    write_whole,
    writing,
)
from featurecache.files.directory import USER_BLOCK, open_columns, user_block_of
from featurecache.files.machine_state import state_folder, state_key
from featurecache.files.records import read_checked_json, write_checked_json
from featurecache.formatting import STANDS_FOR, byte_bar

_AT_ONCE = 16  # files that are fetched at the same time

Objects = dict[str, list[str]]


@dataclass(frozen=True)
class Mirror:
    """What is on this machine of an address."""

    address: str
    base: Path
    purpose: str  # cache: its .h5 files are ours, and are checked; data

    @classmethod
    def of(cls, address: str | os.PathLike[str], purpose: str) -> Mirror:
        """Nothing is asked of the network."""
        address, state = storage.canonical(address), state_folder()
        if state is None:
            raise BadOption(f"{address} needs a folder on this machine, and there is no home: set $FEATURECACHE_STATE.")
        key = state_key(address=address, purpose=purpose, server=[os.environ.get(name) for name in storage.SERVER])
        mirror = cls(address, state / "remote" / key[:16], purpose)
        if not (mirror.base / "mirror.json").exists():
            with writing(mirror.base):
                mirror.base.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_whole(mirror.base / "mirror.json", write_checked_json({"address": address, "purpose": purpose}))
        STANDS_FOR[str(mirror.folder)] = address
        return mirror

    @property
    def folder(self) -> Path:
        return self.base / self.address.rpartition("/")[2]

    def _remote(self, name: str) -> str:
        return f"{self.address}/{name}" if name else self.address

    def _path(self, name: str) -> Path:
        return self.folder / name if name else self.folder

    def name_of(self, path: Path) -> str:
        name = path.relative_to(self.folder).as_posix()
        return "" if name == "." else name

    # -- what is there

    def pull(self, now: Callable[[str], object], wanted: Callable[[str], object] = lambda name: True) -> int:
        """Make the folder agree with the address; how many objects are there. Files that were made here and not
        uploaded yet stay. ``now``: names that are fetched at once; ``wanted``: others are not looked at."""
        with self._objects() as objects:
            remove_orphans(self.base)
            listed = {name: entry for name, entry in storage.list_objects(self.address).items() if wanted(name)}
            for name in [name for name in objects if name not in listed and wanted(name)]:
                self._remove(self._path(name))
                del objects[name]
            due = []
            for name, there in listed.items():
                path = self._path(name)
                current = objects.get(name, [""])[0] == there.version and os.path.lexists(path)
                if now(name):
                    due += [name] if not current or is_placeholder(path) else []
                elif not current:
                    if name in objects or not self._has_same_bytes(name, there.size):
                        self._place(path, there.size)
                    objects[name] = [there.version, ""]
            self._fetch_all(due, listed, objects)
        return len(listed)

    def pull_once(self, run: str) -> None:
        """`pull`, of which nothing is fetched now, for all processes of a ``run`` on this machine."""
        with _locked(self.base / "listing"):
            listed = self.base / "listed"
            if not listed.is_file() or listed.read_text() != run:
                self.pull(lambda name: False)
                write_whole(listed, run.encode())

    def _remove(self, path: Path) -> None:
        """A file, and the folders that have no other: an empty one would be an empty class."""
        with writing(path):
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                for folder in path.relative_to(self.folder).parents[:-1]:
                    (self.folder / folder).rmdir()

    def _fetch_all(self, names: list[str], listed: dict[str, storage.StoredObject], objects: Objects) -> None:
        """Files as they are there; one that is damaged is looked at again by the next pull, and by whoever reads it."""
        for name, problem in self._download_all({name: listed[name].size for name in names}, as_it_is=True):
            path, there = self._path(name), listed[name]
            os.utime(path, (there.changed, there.changed))  # by which the newest view is known
            objects[name] = ["" if problem else there.version, hash_file(path) if self.purpose == "cache" else ""]

    def _download_all(self, sizes: dict[str, int], as_it_is: bool = False) -> Iterator[tuple[str, str]]:
        """The names, in their order, as their bytes have come, and what is wrong with them."""
        total = sum(sizes.values())
        check_room(self.base, total, "$FEATURECACHE_STATE names a folder on another disk.")
        with ThreadPoolExecutor(_AT_ONCE) as pool, byte_bar(total, "fetch", total > 1 << 24) as bar:
            try:
                download = functools.partial(self._download, as_it_is=as_it_is)
                for name, problem in zip(sizes, pool.map(download, sizes, sizes.values()), strict=True):
                    yield name, problem
                    bar.update(sizes[name])
            finally:
                pool.shutdown(cancel_futures=True)

    def _place(self, path: Path, size: int) -> None:
        """A placeholder, in the place of what is there."""
        temporary = self.base / f".{secrets.token_hex(8)}.tmp"
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            try:
                os.ftruncate(descriptor, size)
                os.utime(descriptor, ns=(0, 0))
            finally:
                os.close(descriptor)
            os.replace(temporary, path)

    def _has_same_bytes(self, name: str, size: int) -> bool:
        """Whether a file of ours that was made here is the object: the first line holds the hash of the rest."""
        try:
            with open_regular(self._path(name)) as file:
                same, line = os.fstat(file.fileno()).st_size == size, file.read(USER_BLOCK)
        except (OSError, CacheError):
            return False
        return same and line == storage.read_range(self._remote(name), 0, USER_BLOCK)

    # -- its bytes

    def fetch(self, paths: Iterable[Path]) -> None:
        """The bytes of files. Raises FileNotFoundError (of data), DamagedFile, StorageError."""
        try:
            deque(self._download_all({self.name_of(path): path.lstat().st_size for path in paths}), maxlen=0)
        except FileNotFoundError as error:
            if self.purpose == "cache":
                raise DamagedFile(f"{error}. Run the extraction again: that computes what is not there.") from error
            raise

    def _download(self, name: str, size: int, as_it_is: bool) -> str:
        """Beside, then in its place; a file of ours whose hash is another is fetched once more, then refused, or taken
        ``as_it_is``: what is wrong with it."""
        path, problem = self._path(name), ""
        for last in (False, True):
            with writing(path):
                temporary, descriptor = locked_temporary(self.base / "fetched")
            try:
                storage.download(self._remote(name), temporary)
                if not (problem := self._problem(temporary, path, size)) or (as_it_is and last):
                    with writing(path):
                        os.fsync(descriptor)
                        path.parent.mkdir(parents=True, exist_ok=True)
                        os.replace(temporary, path)
                        sync_path(path.parent)
                    return problem
            except FileNotFoundError as error:
                raise FileNotFoundError(f"{self._remote(name)} is not there any more") from error
            finally:
                os.close(descriptor)
                temporary.unlink(missing_ok=True)
        raise DamagedFile(f"{self._remote(name)} {problem}. Delete it there and run the extraction again.")

    def _problem(self, file: Path, path: Path, size: int) -> str:
        if (actual := file.stat().st_size) != size:
            return f"came with {actual:,} bytes, where its listing says {size:,}"
        if self.purpose == "cache" and path.suffix == ".h5":
            try:
                with open_columns(file) as opened:
                    opened.check_bytes()
            except CacheError:
                return "is damaged: its content does not match the hash in its first line"
        return ""

    def fetch_head(self, path: Path) -> None:
        """All columns of a shard but its features, into its placeholder, by three ranges. HDF5 cannot open that: what
        is not there would read as zeros."""
        remote, size = self._remote(self.name_of(path)), path.lstat().st_size
        try:
            line = storage.read_range(remote, 0, USER_BLOCK)
            block = user_block_of(path, line, size)
            with AtomicFile(path) as draft:
                draft.truncate(size)
                draft.write(0, line)
                draft.write(block.offset, storage.read_range(remote, block.offset, block.offset + block.length))
                with open_columns(draft.temporary) as file:
                    others = [column for key, column in file.columns.items() if key != "features"]
                    end = file.column("features").offset
                start = min(column.offset for column in others)
                if all(column.end <= end for column in others):
                    draft.write(start, storage.read_range(remote, start, end))
                os.utime(draft.fileno(), ns=(0, 0))
                draft.commit()
        except (FileNotFoundError, ValueError) as error:
            raise DamagedFile(f"{remote} cannot be read: {error}.") from error

    # -- what is made here

    def version(self, name: str) -> str:
        """Which version of an object the file here is of, or was made from; empty for none."""
        return self._read().get(name, [""])[0]

    def put(self, name: str, made_from: str | None = None) -> bool:
        """Upload a small file, unless it is there as it is here. False: another machine's was first; it is here now.
        ``made_from``: the version that was read to make it, which another process's `pull` may have replaced since."""
        path = self._path(name)
        with self._objects() as objects:
            version, known = objects.get(name, ["", ""])
            data = path.read_bytes()
            if known == (made := xxhash.xxh3_128_hexdigest(data)):
                return True
            with contextlib.suppress(storage.Conflict, FileNotFoundError):
                if made_from not in (None, version):
                    raise storage.Conflict
                objects[name] = [storage.upload_record(self._remote(name), data, version), made]
                return True
            if (there := storage.stat_object(self._remote(name))) is None:  # it was removed there meanwhile
                objects.pop(name, None)
                return False
            self._fetch_all([name], {name: there}, objects)
            return objects[name][1] == made  # ours: an answer was lost, and it was sent again

    def put_new(self, name: str) -> None:
        """Upload a file of ours that never changes. Where one of its name is there, that one stays, here too."""
        storage.upload_file(self._path(name), self._remote(name))
        if (there := storage.stat_object(self._remote(name))) is None:
            raise StorageError(f"{self._remote(name)} was removed as soon as it was written.")
        with self._objects() as objects:
            if not self._has_same_bytes(name, there.size):
                self._place(self._path(name), there.size)
            objects[name] = [there.version, ""]

    def unsent(self, names: Iterable[str]) -> list[str]:
        """Of files those that were made here and are not there."""
        objects = self._read()
        return [name for name in names if name not in objects]

    def check_conditions(self, name: str) -> None:
        """Raises StorageError where a server takes an object over one that is there: two machines would lose views."""
        try:
            storage.upload_record(self._remote(name), self._path(name).read_bytes(), "")
        except storage.Conflict:
            return
        raise StorageError(
            f"the server of {self.address} does not keep conditions of uploads (If-None-Match), by which two machines "
            "do not overwrite each other; use a newer server, or a folder."
        )

    # -- which versions they are of

    @contextlib.contextmanager
    def _objects(self) -> Iterator[Objects]:
        """`objects.json`, to be changed; other processes of this machine wait. Also after an error it says what is."""
        with _locked(self.base / "lock"):
            objects = self._read()
            before = json.dumps(objects)
            try:
                yield objects
            finally:
                if (after := json.dumps(objects)) != before:
                    write_whole(self.base / "objects.json", after.encode())

    def _read(self) -> Objects:
        try:
            objects = json.loads((self.base / "objects.json").read_text())
        except (OSError, ValueError):
            return {}
        return objects if isinstance(objects, dict) else {}


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with writing(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def is_placeholder(path: str | os.PathLike[str]) -> bool:
    """Whether the bytes of a file may be elsewhere: a mirror's, that is; elsewhere the time says nothing."""
    try:
        return os.lstat(path).st_mtime_ns == 0
    except (OSError, ValueError):
        return False


def mirror_of(path: str | os.PathLike[str]) -> Mirror | None:
    """The mirror that a file or folder lies in."""
    state = state_folder()
    if state is None:
        return None
    for base in (state / "remote", (state / "remote").resolve()):
        with contextlib.suppress(ValueError, CacheError):
            inner = Path(os.path.abspath(path)).relative_to(base.absolute())
            if inner.parts:
                record, intact = read_checked_json(base / inner.parts[0] / "mirror.json")
                if intact:
                    mirror = Mirror(record["address"], base.absolute() / inner.parts[0], record["purpose"])
                    STANDS_FOR[str(mirror.folder)] = mirror.address
                    return mirror
    return None


def fetch(paths: Iterable[str | os.PathLike[str]], *, again: bool = False) -> None:
    """Have the bytes of files of one folder here that are placeholders (``again``: of all of a mirror, as they are
    there now). Nothing happens to other files. Raises FileNotFoundError, DamagedFile, StorageError."""
    due = [Path(os.path.abspath(path)) for path in paths if again or is_placeholder(path)]
    if due and (mirror := mirror_of(due[0])):
        mirror.fetch(due)


def fetch_heads(paths: Iterable[Path]) -> None:
    """Of shards of one folder that are placeholders all columns but the features. Raises DamagedFile, StorageError."""
    due = [path for path in paths if is_placeholder(path) and not _has_head(path)]
    if due and (mirror := mirror_of(due[0])):
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            deque(pool.map(mirror.fetch_head, due), maxlen=0)


def _has_head(path: Path) -> bool:
    with open_regular(path) as file:
        return file.read(1) != b"\0"


def place_of(path: str | os.PathLike[str]) -> str:
    """Where a file lies, for a record: its address, or its path on this machine."""
    resolved = str(Path(path).resolve())
    mirror = mirror_of(resolved)
    inside = mirror is not None and Path(resolved).is_relative_to(mirror.folder)
    return mirror.address + resolved.removeprefix(str(mirror.folder)) if mirror and inside else resolved


def refuse_address(place: str | os.PathLike[str], what: str) -> None:
    """Raises BadOption for an address, or a folder of a mirror: ``what`` takes files away, and nobody can be kept out
    there meanwhile."""
    mirror = None if storage.is_address(place) else mirror_of(place)
    address = mirror.address if mirror else os.fspath(place)
    if storage.is_address(address) and storage.local_path(address) is None:
        raise BadOption(
            f"{what} takes files away, and others cannot be locked out of {storage.canonical(address)} meanwhile: copy "
            f"it to a folder (aws s3 sync, gcloud storage rsync), {what} there with --cache DIR, and copy it back with "
            "--delete while nobody adds to it."
        )
