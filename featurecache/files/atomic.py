"""Atomic files and folders: whole or not there; written beside, fsynced, renamed; what dead processes left behind.

`AtomicFile` knows bytes only. It writes a temporary file in the same folder, fsyncs it, gives it its final name and
fsyncs the folder. A temporary file is locked while somebody writes it: what can be locked is a dead process's and may
be removed. `open_regular` reads without following links and without waiting at a pipe.
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

import xxhash

from featurecache.errors import CannotWrite, UnsafeFile
from featurecache.formatting import size_text


def check_room(folder: Path, needed: int, way: str) -> None:
    """Raises CannotWrite when the disk of ``folder``, which may not be there yet, cannot take ``needed`` bytes more."""
    folder = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise CannotWrite(28, f"{size_text(needed)} are to be written and {folder} has {size_text(free)} free. {way}")


FileStamp = tuple[int, int, int, int]  # inode, size, mtime, ctime
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)  # a file system without locks: nothing is swept there

_PIECE = 1 << 20  # bytes read at a time for hashing; stays in the cache of a core


def refuse_links(*paths: Path) -> None:
    """Symbolic links could lead out of a store; featurecache makes none inside one."""
    for path in paths:
        if path.is_symlink():
            raise UnsafeFile(f"{path} is a symbolic link; put the file or folder itself there.")


def refuse_special(path: str | os.PathLike[str]) -> None:
    """Raises UnsafeFile for a pipe, a socket or a device: who reads it waits, or never comes to its end."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise UnsafeFile(f"{os.fspath(path)} is a pipe or a device; give a file.")


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


def hash_from(descriptor: int, offset: int = 0) -> str:
    """XXH3-128 of all bytes from ``offset`` on. Read in pieces: a mapping would end the interpreter (SIGBUS) if the
    file were cut meanwhile."""
    digest, piece = xxhash.xxh3_128(), bytearray(_PIECE)
    with memoryview(piece) as view:
        while count := os.preadv(descriptor, [view], offset):
            digest.update(view[:count])
            offset += count
    return digest.hexdigest()


def hash_file(path: Path) -> str:
    """`hash_from` of a whole file. Raises OSError, CacheError for a link or a pipe."""
    with open_regular(path) as file:
        return hash_from(file.fileno())


def file_stamp(path: Path) -> FileStamp | None:
    """What changes when a file is changed or exchanged; None where there is none."""
    try:
        entry = path.lstat()
    except OSError:
        return None
    return entry.st_ino, entry.st_size, entry.st_mtime_ns, entry.st_ctime_ns


class AtomicFile:
    """A file in the making, under a temporary name beside its final one.

    >>> with AtomicFile(path) as file:          # doctest: +SKIP
    ...     file.write(0, data)
    ...     file.commit()
    Left without a commit, or by an error, the temporary file is thrown away.
    """

    def __init__(self, path: Path, *, inside: Path | None = None) -> None:
        """``inside``: a folder that has to be there (a store: one that was removed shall not half come back)."""
        self.path = path
        refuse_special(path)  # which the file would replace
        with writing(path):
            if path.parent != inside:
                path.parent.mkdir(parents=inside is None, exist_ok=True)
            self.temporary, self._descriptor = locked_temporary(path)

    def __enter__(self) -> AtomicFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.discard()

    def fileno(self) -> int:
        return self._descriptor

    def write(self, offset: int, data: bytes | memoryview) -> None:
        rest = memoryview(data).cast("B")
        with writing(self.path):
            while rest:
                written = os.pwrite(self._descriptor, rest, offset)
                rest, offset = rest[written:], offset + written

    def read(self, offset: int, size: int) -> bytes:
        return os.pread(self._descriptor, size, offset)

    def truncate(self, size: int) -> None:
        with writing(self.path):
            os.ftruncate(self._descriptor, size)

    def commit(self, *, replace: bool = True) -> None:
        """Give the file its final name. ``replace=False``: a file that already has the name wins and ours is dropped
        (both hold the same rows)."""
        with writing(self.path):
            os.fsync(self._descriptor)
            if replace or not self._link():
                os.replace(self.temporary, self.path)
            sync_path(self.path.parent)

    def _link(self) -> bool:
        """Give it the name unless a file has it; False on a file system without hard links."""
        try:
            os.link(self.temporary, self.path)  # unlike rename, never over a file that has just been committed
        except FileExistsError:
            pass
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EACCES):
                raise
            return False
        return True

    def discard(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
            with contextlib.suppress(OSError):  # committed (the name is gone), or the folder is
                os.unlink(self.temporary)


def write_whole(path: Path, data: bytes, *, inside: Path | None = None) -> None:
    """Replace ``path`` by a file with exactly ``data`` (JSON, CSV, ...), or leave it as it was."""
    with AtomicFile(path, inside=inside) as file:
        file.write(0, data)
        file.commit()


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
    except CannotWrite:
        raise
    except OSError as error:
        raise cannot_write(error, path) from error


NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_WAYS = {  # of an error of the system, what to do before the same command is given again
    **dict.fromkeys(NO_ROOM, "make room on that disk"),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "make it writable, or choose another folder"),
    **dict.fromkeys((errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG), "choose another place"),
    errno.EFBIG: "raise the limit for the size of files (ulimit -f)",
}


def cannot_write(error: OSError, path: str | os.PathLike[str]) -> CannotWrite:
    """What is true of every write of ours: it leaves what has its name whole."""
    way = _WAYS.get(error.errno or 0, "see to that disk")
    return CannotWrite(
        error.errno,
        f"cannot write {os.fspath(path)}: {error.strerror or error}. What is finished is whole; {way}, then give the "
        "same command again.",
    )


def temporary_path(path: Path) -> Path:
    """A temporary name beside ``path``, of a length that every file system takes."""
    name = hashlib.blake2b(path.name.encode(), digest_size=8).hexdigest()
    return path.with_name(f".{name}.{secrets.token_hex(4)}.tmp")


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A folder in the making beside ``path``, to be renamed; held like a file, and gone afterwards if it was not."""
    temporary, descriptor = locked_temporary(path, folder=True)
    try:
        yield temporary
    finally:
        os.close(descriptor)
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _folder_lock(folder: Path, kind: int) -> Iterator[None]:
    """Shared between the making of a temporary file and its lock, exclusive where others' are looked at: what has no
    lock at that moment is a dead process's."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):  # no locks here: then nothing sweeps either
            fcntl.flock(descriptor, kind)
        yield
    finally:
        os.close(descriptor)


def locked_temporary(path: Path, *, folder: bool = False) -> tuple[Path, int]:
    """A new temporary file, or folder, and its descriptor, locked for as long as it is open: whoever can lock it may
    remove it. (A folder's lock is shared: others are made inside it.)"""
    temporary = temporary_path(path)
    with _folder_lock(path.parent, fcntl.LOCK_SH):
        if folder:
            temporary.mkdir()
        how = os.O_RDONLY | os.O_DIRECTORY if folder else os.O_RDWR | os.O_CREAT | os.O_EXCL
        descriptor = os.open(temporary, how | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if folder else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                os.close(descriptor)
                raise
    return temporary, descriptor


def orphaned_files(folder: Path, of: str = "*") -> Iterator[Path]:
    """Temporary files and folders that no living process holds, each locked while the caller has it in hand.

    ``of``: the final name they were meant to get (default: any)."""
    pattern = ".*.tmp" if of == "*" else f".{temporary_path(Path(of)).name.split('.')[1]}.*.tmp"
    for path in folder.glob(pattern):
        with contextlib.suppress(OSError):  # held, or another process sweeps too, or they are somebody else's
            with _folder_lock(folder, fcntl.LOCK_EX):
                descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    os.close(descriptor)
                    raise
            try:
                yield path
            finally:
                os.close(descriptor)


def remove_orphans(folder: Path, of: str = "*") -> None:
    """Remove `orphaned_files` (a killed run leaves at most a few)."""
    for path in orphaned_files(folder, of):
        with contextlib.suppress(OSError):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
