"""The memory that features may take: what is free on this machine and in the control groups of this process."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

BESIDE = 400  # bytes of a row: its name, answers and what is drawn of them (0.35 GB of a million, measured)


def memory_for_features(rows: int = 0) -> int:
    """Bytes: six tenths of the memory that is free now, on this machine and in the control groups of this process
    (those of a container, or of a job of SLURM), without what so many ``rows`` will take beside their features."""
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, StopIteration), open("/proc/meminfo", encoding="ascii") as lines:
        free = 1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1])
    return int(0.6 * max(0, min([free, *room_in_groups()]) - BESIDE * rows))


_GROUPS = {"": ("memory.max", "anon"), "memory": ("memory.limit_in_bytes", "total_rss")}  # of cgroup v2, of v1


def room_in_groups(root: Path = Path("/sys/fs/cgroup"), of: Path = Path("/proc/self/cgroup")) -> Iterator[int]:
    """Of each control group with a limit that this process is in, near or far: bytes that are not taken. What the
    system keeps of files counts as free. In a container the path is the host's, and the group is at the root."""
    with contextlib.suppress(OSError):
        for line in of.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            kind = "memory" if "memory" in controllers.split(",") else controllers
            if kind in _GROUPS:
                limit, taken = _GROUPS[kind]
                inner = Path(path.lstrip("/"))
                for group in (root / kind / part for part in (inner, *inner.parents)):
                    with contextlib.suppress(OSError, ValueError, KeyError):
                        most = int((group / limit).read_text())  # "max": none
                        statistics = dict(each.split() for each in (group / "memory.stat").read_text().splitlines())
                        yield most - int(statistics[taken])
