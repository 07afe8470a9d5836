"""The journal of a folder that is gone on in: torn rows are cut off, damaged ones refused, sets whole or not there."""

from __future__ import annotations

import pytest

from featurecache.errors import RunError
from heads.sweeps.journal import JournalFile, _checked_line

COLUMNS = {"step": str, "seconds": float}


def journal(path):
    return JournalFile(path, COLUMNS, key="step")


def test_rows_come_back_in_order_and_by_key(tmp_path):
    more = {"step": "b", "seconds": 1.0, "value": float("nan")}
    journal(tmp_path / "j").append([{"step": "a", "seconds": 1.0}, more])
    journal(tmp_path / "j").append([{"step": "c", "seconds": 2.0}])
    again = journal(tmp_path / "j")
    assert [*again.by_key] == [row["step"] for row in again.rows] == ["a", "b", "c"]
    assert again.by_key["b"]["value"] is None and [row["step"] for row in again.together_with("b")] == ["a", "b"]


def test_what_a_kill_tore_is_as_if_it_had_never_been_written(tmp_path):
    rows = [{"step": name, "seconds": 1.0} for name in "abcd"]
    journal(tmp_path / "j").append(rows[:2])
    journal(tmp_path / "j").append(rows[2:])
    whole = (tmp_path / "j").read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    for cut in range(len(whole)):
        (tmp_path / "j").write_bytes(whole[:cut])
        assert len(journal(tmp_path / "j").rows) == (0 if cut < ends[1] else 2)
        assert (tmp_path / "j").stat().st_size == (0 if cut < ends[1] else ends[1])


@pytest.mark.parametrize("line", ['{"step": 1}', '{"step": "x", "seconds": 1.0, "together": [1, 1]}', "[]", "{"])
def test_a_line_between_others_that_is_no_row_is_named(tmp_path, line):
    journal(tmp_path / "j").append([{"step": "a", "seconds": 1.0}])
    text = (tmp_path / "j").read_text()
    (tmp_path / "j").write_bytes(text.encode() + _checked_line(line.encode()) + b"\n" + text.encode())
    with pytest.raises(RunError, match="line 2 is not what was written"):
        journal(tmp_path / "j")
