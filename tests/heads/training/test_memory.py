"""How much memory features may take: that of the machine, and of the control groups a process is in."""

from __future__ import annotations

from pathlib import Path

import pytest

from heads import memory


def group(folder: Path, limit: str, most: str, statistics: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / limit).write_text(f"{most}\n")
    (folder / "memory.stat").write_text(statistics)


def test_a_job_of_a_cluster_has_the_memory_of_its_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Version 2: the step has none of its own, the job has 2 GB, of which 0.5 GB are taken by other than files."""
    (tmp_path / "self").write_text("0::/slurm/job7/step0\n")
    group(tmp_path / "slurm/job7/step0", "memory.max", "max", "anon 1\n")
    group(tmp_path / "slurm/job7", "memory.max", "2000000000", "anon 500000000\nfile 1400000000\n")
    assert list(memory.room_in_groups(tmp_path, tmp_path / "self")) == [1_500_000_000]
    monkeypatch.setattr(memory, "room_in_groups", lambda: [1000])
    assert memory.memory_for_features() == 600 and memory.memory_for_features(rows=2) == 120  # names and answers
    monkeypatch.setattr(memory, "room_in_groups", lambda: [-5])
    assert memory.memory_for_features() == 0


def test_a_container_of_version_1_has_its_limit_at_the_root(tmp_path: Path) -> None:
    """The path is one of the host, which the container does not see."""
    (tmp_path / "self").write_text("5:cpu,cpuacct:/docker/4ac\n4:memory:/docker/4ac\n0::/\n")
    group(tmp_path / "memory", "memory.limit_in_bytes", "1000", "rss 1\ntotal_rss 300\n")
    assert list(memory.room_in_groups(tmp_path, tmp_path / "self")) == [700]


def test_without_groups_there_is_no_limit(tmp_path: Path) -> None:
    assert list(memory.room_in_groups(tmp_path, tmp_path / "none")) == []
    (tmp_path / "self").write_text("0::/\n")
    assert list(memory.room_in_groups(tmp_path, tmp_path / "self")) == []
