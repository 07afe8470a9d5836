"""Killed, out of disk, refused by the disk: nothing committed is lost, nothing wrong is read, the command completes.

Every event is a call that changes the cache; `support/failpoints.py` counts them and makes the fault at one of them.

Every fourth step is the slow tier's; all, in a quarter of an hour: FEATURECACHE_FAULT_STRIDE=1 python -m pytest -m ""
tests/robustness/test_faults.py, with FEATURECACHE_FAULT_SEED for others, FEATURECACHE_FAULT_SECONDS=60 for more.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
from support.fault_home import Home, all_is_well_after, disturbed
from support.fault_home import home as make_home
from support.forks import Answer

SEED = int(os.environ.get("FEATURECACHE_FAULT_SEED", "0"))
STRIDE = int(os.environ.get("FEATURECACHE_FAULT_STRIDE", "4"))  # between steps in the slow tier
SECONDS = float(os.environ.get("FEATURECACHE_FAULT_SECONDS", "5"))  # of kills at random times
OPERATIONS = ("new", "grow", "mend", "gc", "compact", "merge", "remove")
WRITES = ("pwrite", "write", "ftruncate", "open", "mkdir", "link", "rename", "replace")
MEMORY = ("sqlite BEGIN", "sqlite CREATE", "sqlite INSERT", "sqlite DELETE", "sqlite COMMIT")


@pytest.fixture(scope="module")
def home() -> Home:
    return make_home()


def one_sentence(answer: Answer) -> bool:
    """It came to its end, or said why not; no traceback, no dead interpreter."""
    assert answer.code == 0, answer
    return answer.error is not None


# ---------------------------------------------------------------------------------------------- killed


def killed_at(home: Home, name: str, folder: Path, points: list[int], do: str = "kill") -> None:
    scenario = home.scenario(name)
    answers = disturbed(home.forks, scenario, folder, [{"fault": {"at": k, "do": do}} for k in points])
    late = [k for k, answer in zip(points, answers, strict=True) if not answer.killed]
    assert len(late) <= len(points) // 10, late  # threads: a run may have an event or two less
    all_is_well_after(home.forks, scenario, folder, range(len(points)))


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("many", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_killed_at_one_step_of_each_kind_or_at_many(tmp_path: Path, home: Home, name: str, many: bool) -> None:
    scenario, most = home.scenario(name), 12 if name in ("new", "mend") else 5
    steps = range(SEED % STRIDE, len(scenario.events), STRIDE) if many else scenario.one_of_each_kind(SEED, most)
    killed_at(home, name, tmp_path, list(steps))


def test_killed_in_the_middle_of_a_write(tmp_path: Path, home: Home) -> None:
    scenario = home.scenario("new")
    writes = [n for kind, numbers in scenario.kinds().items() if "write" in kind for n in numbers]
    killed_at(home, "new", tmp_path, sorted(random.Random(SEED).sample(writes, 6)), do="torn")


@pytest.mark.parametrize("seconds", [SECONDS, pytest.param(8 * SECONDS, marks=pytest.mark.slow)])
def test_killed_at_random_times(tmp_path: Path, home: Home, seconds: float) -> None:
    rng, end, count = random.Random(SEED), time.monotonic() + seconds, 0
    while time.monotonic() < end:
        scenario = home.scenario(rng.choice(OPERATIONS))
        moments = [{"after": rng.uniform(0, 1.2 * scenario.seconds)} for _ in range(4)]
        disturbed(home.forks, scenario, tmp_path / str(count), moments)
        all_is_well_after(home.forks, scenario, tmp_path / str(count), range(len(moments)))
        shutil.rmtree(tmp_path / str(count))
        count += 1
    assert count


def test_a_file_is_on_the_disk_before_it_has_its_name(home: Home) -> None:
    """What a power cut needs beyond a kill: bytes are synced before the name is given, then the folder."""
    checked = 0
    for name in OPERATIONS:
        unsynced: set[str] = set()
        unnamed: dict[str, str] = {}
        for call, place, source in home.scenario(name).events:
            if call in ("pwrite", "write", "ftruncate"):
                unsynced.add(place)
            elif call == "fsync":
                unsynced.discard(place)
                unnamed = {path: folder for path, folder in unnamed.items() if folder != place}
            elif call in ("link", "rename", "replace") and "/." not in f"/{place}":
                assert source not in unsynced, (name, place)
                unnamed[place] = os.path.dirname(place) or "."
                checked += 1
            elif call == "unlink" and place.endswith((".h5", ".json")):
                assert not [path for path in unnamed if path.endswith(".h5")], (name, place, unnamed)
        assert unnamed == {}, (name, unnamed)
    assert checked > 20


# ---------------------------------------------------------------------------------------------- a disk that fails


def points_of(home: Home, name: str, calls: tuple[str, ...], most: int) -> list[int]:
    """Places of the calls among those calls only, at most so many, one of each kind before a second."""
    scenario, rng = home.scenario(name), random.Random(SEED)
    numbers = [n for n, (call, *_) in enumerate(scenario.events) if call in calls]
    kinds = [rng.sample(found, len(found)) for kind, found in scenario.kinds().items() if kind.startswith(calls)]
    order = [k[depth] for depth in range(len(numbers)) for k in kinds if depth < len(k) and k[depth] in numbers]
    return sorted(numbers.index(n) for n in order[:most])


def failing(home: Home, folder: Path, name: str, calls: tuple[str, ...], do: str, most: int, on: bool) -> list[Answer]:
    """The operation with an error at each of these points; then all is well."""
    scenario = home.scenario(name)
    points = points_of(home, name, calls, most)
    room = {"room": True} if name in ("new", "grow") else {}
    faults = [{"fault": {"at": k, "do": do, "calls": calls, "on": on}, **room} for k in points]
    answers = disturbed(home.forks, scenario, folder, faults)
    for answer in answers:
        one_sentence(answer)
    all_is_well_after(home.forks, scenario, folder, range(len(points)))
    return answers


@pytest.mark.parametrize("name", ["new", "grow", "mend", "compact", "merge"])
def test_a_disk_that_is_full_from_one_moment_on(tmp_path: Path, home: Home, name: str) -> None:
    answers = failing(home, tmp_path, name, WRITES, "ENOSPC", 8 if name == "new" else 4, on=True)
    told = [answer.error for answer in answers if answer.error]
    assert len(told) >= len(answers) - 1
    assert all("No space left on device" in error for error in told), told


@pytest.mark.slow
@pytest.mark.parametrize("name", ["new", "grow", "mend", "gc", "compact", "merge"])
def test_a_disk_that_is_full_from_any_write_on(tmp_path: Path, home: Home, name: str) -> None:
    failing(home, tmp_path, name, WRITES, "ENOSPC", 160 // STRIDE if name == "new" else 20, on=True)


@pytest.mark.parametrize("call", ["pwrite", "fsync", "link", "replace", "rename", "ftruncate"])
def test_a_call_that_fails_once(tmp_path: Path, home: Home, call: str) -> None:
    answers = failing(home, tmp_path, "grow" if call == "replace" else "new", (call,), "EIO", 4, on=False)
    assert [answer.error for answer in answers if not answer.error or "Input/output error" not in answer.error] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grow", "mend", "gc", "compact", "merge"])
def test_any_call_that_fails_once(tmp_path: Path, home: Home, name: str) -> None:
    failing(home, tmp_path, name, (*WRITES, "fsync", "unlink", "rmdir", *MEMORY), "EIO", 24, on=False)


def test_what_could_not_be_synced_is_thrown_away(tmp_path: Path, home: Home) -> None:
    """After a failed fsync the bytes may be gone from memory though a second one succeeds."""
    (answer,) = failing(home, tmp_path, "new", ("fsync",), "EIO", 1, on=False)
    assert answer.error and answer.error.startswith("CannotWrite: cannot ")
    assert answer.events[-1][0] == "fsync"


@pytest.mark.parametrize(("calls", "error", "most"), [(("link",), "EPERM", 2), (MEMORY, "ENOSPC", 3)])
def test_without_hard_links_or_a_memory_of_digests_it_works(tmp_path, home, calls, error, most):
    assert [
        answer.error for answer in failing(home, tmp_path, "new", calls, error, most, on=True) if answer.error
    ] == []


def test_writes_that_write_less_than_asked(tmp_path: Path, home: Home) -> None:
    scenario = home.scenario("new")
    fault = {"at": 0, "do": "short", "on": True, "calls": ("pwrite",)}
    (answer,) = disturbed(home.forks, scenario, tmp_path, [{"fault": fault}])
    assert answer.error is None
    assert home.forks.done("state", cache=tmp_path / "0") == scenario.end


@pytest.mark.parametrize("most", [0, 100, 3000, 7000, 16_000, 17_000])
def test_no_file_may_grow_beyond_a_limit(tmp_path: Path, home: Home, most: int) -> None:
    scenario = home.scenario("new")
    answer = home.forks.run("with_file_limit", job="extract", most=most, cache=tmp_path / "0", **scenario.arguments)
    told = "File too large. What is finished is whole; raise the limit for the size of files (ulimit -f)"
    assert one_sentence(answer) and told in str(answer.error)
    all_is_well_after(home.forks, scenario, tmp_path, [0])


@pytest.mark.parametrize("what", ["tokens", "store", "cache"])
def test_a_folder_is_removed_underneath(tmp_path: Path, home: Home, what: str) -> None:
    scenario = home.scenario("new")
    of_tokens = [n for n, (_, place, _) in enumerate(scenario.events) if "/tokens/" in place]
    begun = max(n for n in of_tokens if scenario.events[n][0] == "open")
    chosen = [begun - 1, begun, random.Random(SEED).choice(of_tokens), of_tokens[-1], of_tokens[-1] + 2]
    for number, point in enumerate(chosen):
        cache = tmp_path / str(number)
        store = scenario.events[point][1].split("/")[0]
        folder = {"tokens": cache / store / "tokens", "store": cache / store, "cache": cache}[what]
        fault = {"at": point, "do": "remove", "what": str(folder)}
        one_sentence(home.forks.run("extract", fault=fault, **scenario.on(cache)))
        assert [path.parent.name for path in cache.glob("*/*.h5") if not (path.parent / "spec.json").exists()] == []
        assert len(list(cache.glob("*/cls"))) == len(list(cache.glob("*/spec.json"))), "rows that belong to no store"
    all_is_well_after(home.forks, replace(scenario, damaged=True), tmp_path, range(len(chosen)))


# ---------------------------------------------------------------------------------------------- a small disk


@pytest.mark.parametrize("sizes", [[16, 60, 72], pytest.param([*range(8, 80, 4)], marks=pytest.mark.slow)])
def test_a_disk_that_is_really_full(mounted: Path, home: Home, sizes: list[int]) -> None:
    """The extraction on a disk of each of these sizes (kB), then on one that is large enough."""

    def resize(size: str) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size}", str(mounted)], check=True)

    scenario = home.scenario("new")
    for size in sizes:
        resize(f"{size}k")
        answer = home.forks.run("extract", cache=mounted / "0", room=True, **scenario.arguments)
        assert one_sentence(answer) and "No space left on device" in str(answer.error), (size, answer)
        resize("8m")
        all_is_well_after(home.forks, scenario, mounted, [0])
        shutil.rmtree(mounted / "0")
