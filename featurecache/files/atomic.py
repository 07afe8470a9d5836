"""Whole files or none: temporary beside final, fsync, rename, leftovers of dead processes; opening without
following links.

Files that are whole or not there: the user block, writing beside and replacing, opening with care.

HDF5 never writes to a disk here. h5py builds a file's *frame* in memory (`Frame`); `Draft` writes frame and rows to a
temporary file in the same folder, fsyncs it, gives it its final name and fsyncs the folder. After a full disk HDF5
fails only at close and can take the interpreter down; a failed ``os.pwrite`` is an ordinary error.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import h5py
import xxhash

from featurecache.errors import CannotWrite, DamagedFile, UnsafeFile
from featurecache.files import guard
from featurecache.formatting import size_text


def check_room(folder: Path, needed: int, way: str) -> None:
    """Raises CannotWrite when the disk of ``folder`` cannot take ``needed`` bytes more."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise CannotWrite(28, f"{size_text(needed)} are to be written and {folder} has {size_text(free)} free. {way}")


FORMAT = 1
USER_BLOCK = 512  # bytes; the smallest HDF5 allows
_PIECE = 1 << 20  # bytes read at a time for hashing; stays in the cache of a core
ALIGNMENT = 64  # bytes; a cache line, and a multiple of every itemsize we store
Stamp = tuple[int, int, int, int]  # inode, size, mtime, ctime
_MAGIC = b"featurecache"
AGAIN = "Delete it and run the extraction again: that computes what is not there."


class WriteTrace(io.RawIOBase):
    """What h5py writes of a file, without the regions it never touches (a features dataset of gigabytes).

    A file object for h5py's ``fileobj`` driver: keeps the written extents by offset, in memory.
    """

    def __init__(self) -> None:
        self._extents: dict[int, bytes] = {}
        self._position = 0
        self.size = 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}[whence]
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def write(self, data) -> int:
        self._extents[self._position] = bytes(data)
        self._position += len(data)
        self.size = max(self.size, self._position)
        return len(data)

    def readinto(self, buffer) -> int:
        raise AssertionError("h5py reads nothing back of a file with fixed-size content")

    def truncate(self, size: int | None = None) -> int:
        self.size = self._position if size is None else size
        return self.size

    def extents(self) -> Iterator[tuple[int, bytes]]:
        """(offset, bytes) in the order they were written; later ones lie over earlier ones."""
        return iter(self._extents.items())

    @classmethod
    def of(cls, data: bytes) -> WriteTrace:
        """A whole file that is in memory already."""
        frame = cls()
        frame.write(data)
        return frame


@contextlib.contextmanager
def new_hdf5(buffer: io.RawIOBase | io.BytesIO) -> Iterator[h5py.File]:
    """A file to be filled in memory: a format every HDF5 since 1.10 reads, with room for the user block."""
    with h5py.File(
        buffer, "w", libver=("v110", "v110"), userblock_size=USER_BLOCK,
        alignment_threshold=1, alignment_interval=ALIGNMENT,
    ) as file:  # fmt: skip
        yield file


def user_block(digest: str, length: int) -> bytes:
    """The first 512 bytes: one line that lets a file of ``length`` bytes be checked without HDF5."""
    line = b"%s %d %s %d\n" % (_MAGIC, FORMAT, digest.encode(), length)
    return line.ljust(USER_BLOCK, b"\0")


def refuse_links(*paths: Path) -> None:
    """Symbolic links could lead out of a store; featurecache makes none inside one."""
    for path in paths:
        if path.is_symlink():
            raise UnsafeFile(f"{path} is a symbolic link; put the file or folder itself there.")


def open_regular(path: Path) -> io.BufferedReader:
    """A plain file for reading. Refuses symbolic links, and pipes and devices, at which a reader would wait."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ELOOP:
            refuse_links(path)
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UnsafeFile(f"{path} is not a plain file (a folder, a pipe or a device); remove it.")
    return os.fdopen(descriptor, "rb")


def file_stamp(path: Path) -> Stamp | None:
    """What changes when a file is changed or exchanged; None where there is none."""
    try:
        found = path.lstat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def read_user_block(path: Path) -> tuple[str, int]:
    """(xxh3_128 as hex, length in bytes) that ``path`` was written with; its actual length is checked."""
    with _reading(path) as file:
        return _user_block(path, file)


def read_checked(path: Path, most: int | None = None) -> bytes:
    """All bytes of a small file (a view), refused unless they are the ones it was written with."""
    with _reading(path) as file:
        digest, size = _user_block(path, file)
        if most is not None and size > most:
            raise UnsafeFile(f"{path} has {size:,} bytes; at most {most:,} are read into memory.")
        file.seek(0)
        data = file.read(size)
    if xxhash.xxh3_128_hexdigest(memoryview(data)[USER_BLOCK:]) != digest:
        raise DamagedFile(f"{path} is damaged: its content does not match the hash in its first line. {AGAIN}")
    return data


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[io.BufferedReader]:
    try:
        with open_regular(path) as file:
            yield file
    except FileNotFoundError as error:
        raise DamagedFile(f"{path} is missing.") from error
    except OSError as error:
        raise DamagedFile(f"{path} cannot be read: {error.strerror}.") from error


def _user_block(path: Path, file: io.BufferedReader) -> tuple[str, int]:
    block, size = file.read(USER_BLOCK), os.fstat(file.fileno()).st_size
    words = block.split(b"\n", 1)[0].split(b" ")
    if len(words) != 4 or words[0] != _MAGIC or not words[1].isdigit() or not words[3].isdigit() or len(words[2]) != 32:
        raise DamagedFile(f"{path} is not a file of featurecache, or its beginning is damaged. {AGAIN}")
    if words[1] != b"%d" % FORMAT:
        raise DamagedFile(f"{path} has format {words[1].decode()}; this featurecache reads format {FORMAT}.")
    if words[3] != b"%d" % size:
        raise DamagedFile(f"{path} has {size:,} bytes; it was written with {words[3].decode()}. {AGAIN}")
    if block != user_block(digest := words[2].decode("ascii", "replace"), size):
        raise DamagedFile(f"{path} is damaged in its first {USER_BLOCK} bytes. {AGAIN}")
    return digest, size


def hash_after_block(descriptor: int) -> str:
    """xxh3_128 of all bytes after the user block. Read in pieces: a mapping would end the interpreter (SIGBUS) if the
    file were cut meanwhile."""
    digest, piece, offset = xxhash.xxh3_128(), bytearray(_PIECE), USER_BLOCK
    with memoryview(piece) as view:
        while count := os.preadv(descriptor, [view], offset):
            digest.update(view[:count])
            offset += count
    return digest.hexdigest()


class AtomicFile:
    """A file in the making, under a temporary name beside its final one.

    >>> with Draft(path) as draft:          # doctest: +SKIP
    ...     draft.write(4096, rows)
    ...     draft.commit(frame)
    Left without a commit, or by an error, the temporary file is thrown away.
    """

    def __init__(self, path: Path, *, inside: Path | None = None) -> None:
        """``inside``: a folder that has to be there (a store: one that was removed shall not half come back)."""
        self.path = path
        with writing(path):
            if path.parent != inside:
                path.parent.mkdir(parents=inside is None, exist_ok=True)
            self._temporary, self._descriptor = locked_draft(path)

    def __enter__(self) -> AtomicFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.discard()

    def write(self, offset: int, data: bytes | memoryview) -> None:
        rest = memoryview(data).cast("B")
        with writing(self.path):
            while rest:
                written = os.pwrite(self._descriptor, rest, offset)
                rest, offset = rest[written:], offset + written

    def read(self, offset: int, size: int) -> bytes:
        return os.pread(self._descriptor, size, offset)

    def commit(self, frame: WriteTrace, *, replace: bool = False) -> None:
        """Lay ``frame`` around what was written, seal, and give the file its final name.

        ``replace=False``: a file that already has the name wins and ours is dropped (both hold the same rows).
        """
        for offset, data in frame.extents():
            self.write(offset, data)
        with writing(self.path):
            os.ftruncate(self._descriptor, frame.size)
        self.write(0, user_block(hash_after_block(self._descriptor), frame.size))
        with writing(self.path):
            os.fsync(self._descriptor)
            _give_name(self._temporary, self.path, replace)
            sync_path(self.path.parent)
        self._remember()

    def _remember(self) -> None:
        """So that nobody has to look at the file before HDF5 reads it. Its ctime changes once more when the second
        name goes; a file that was there before is not ours."""
        with contextlib.suppress(OSError):
            os.unlink(self._temporary)
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(self._descriptor), os.lstat(self.path)):
                guard.own([self.path])

    def place(self, size: int | None = None) -> None:
        """Give a file that has no user block its final name, cut to ``size`` bytes, over one that has the name."""
        with writing(self.path):
            if size is not None:
                os.ftruncate(self._descriptor, size)
            os.fsync(self._descriptor)
            os.replace(self._temporary, self.path)
            sync_path(self.path.parent)

    def discard(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
            with contextlib.suppress(OSError):  # committed (the name is gone), or the folder is
                os.unlink(self._temporary)


def write_whole(path: Path, data: bytes, *, inside: Path | None = None) -> None:
    """Replace ``path`` by a file with exactly ``data`` (JSON, CSV, ...), or leave it as it was."""
    with AtomicFile(path, inside=inside) as draft:
        draft.write(0, data)
        draft.place()


def _give_name(temporary: Path, path: Path, replace: bool) -> None:
    if replace:
        os.replace(temporary, path)
        return
    try:
        os.link(temporary, path)  # unlike rename, never over a file that another process has just committed
    except FileExistsError:
        pass
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EACCES):
            raise
        os.replace(temporary, path)  # a file system without hard links


def sync_path(path: Path) -> None:
    """Have a file's bytes, or a folder's names, on the disk before anything else happens."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        why = error.strerror or str(error)
        raise CannotWrite(
            error.errno, f"cannot write {path}: {why}. What was committed is safe; the same command continues."
        ) from error


def draft_path(path: Path) -> Path:
    """A temporary name beside ``path``, of a length that every file system takes."""
    return path.with_name(
        f".{hashlib.blake2b(path.name.encode(), digest_size=8).hexdigest()}.{secrets.token_hex(4)}.tmp"
    )


@contextlib.contextmanager
def draft_folder(path: Path) -> Iterator[Path]:
    """A folder in the making beside ``path``, to be renamed; held like a draft, and gone afterwards if it was not."""
    temporary = draft_path(path)
    temporary.mkdir()
    descriptor = os.open(temporary, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # no locks here: then nothing sweeps either
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield temporary
    finally:
        os.close(descriptor)
        shutil.rmtree(temporary, ignore_errors=True)


def locked_draft(path: Path) -> tuple[Path, int]:
    """A new temporary file and its descriptor, locked for as long as it is open: whoever can lock it may remove it."""
    while True:
        temporary = draft_path(path)
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # swept in the moment between
            os.close(descriptor)
            continue
        except OSError as error:
            if error.errno not in NO_LOCKS:
                os.close(descriptor)
                raise
        return temporary, descriptor


NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)  # a file system without locks: nothing is swept there


def orphaned_files(folder: Path, of: str = "*") -> Iterator[Path]:
    """Temporary files and folders that no living process holds, each locked while the caller has it in hand.

    ``of``: the final name they were meant to get (default: any)."""
    pattern = ".*.tmp" if of == "*" else f".{draft_path(Path(of)).name.split('.')[1]}.*.tmp"
    for path in folder.glob(pattern):
        with contextlib.suppress(OSError):  # held, or another process sweeps too, or they are somebody else's
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                yield path
            finally:
                os.close(descriptor)


def remove_orphans(folder: Path, of: str = "*") -> None:
    """Remove `dead_drafts` (a killed run leaves at most a few)."""
    for path in orphaned_files(folder, of):
        with contextlib.suppress(OSError):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
