"""The disk of the fault tests is memory, where there is room: they sync thousands of files, and a disk that others use
too may take minutes for one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.fault_home import scratch_folder


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    folder = scratch_folder()
    yield folder
    shutil.rmtree(folder, ignore_errors=True)
