"""Several processes in one store: each comes to its end or says who is there; readers see old or new, never between."""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.builders import CLS, TOKENS, add_shard, add_view, features, make_store, make_view
from support.fault_home import Home, Scenario
from support.fault_home import home as make_home
from support.forks import Answer
from support.pictures import save_picture

from featurecache.errors import ViewReplaced
from featurecache.maintenance import verify as verification
from featurecache.maintenance.collect import compact, remove_view
from featurecache.store.view import View
from featurecache.store.write_view import open_view

SEED = int(os.environ.get("FEATURECACHE_FAULT_SEED", "0"))


@pytest.fixture(scope="module")
def home() -> Home:
    return make_home()


@contextlib.contextmanager
def held(home: Home, scenario: Scenario, cache: Path, at: int) -> Iterator[list[Answer]]:
    """The operation stopped before one of its steps; it goes on at the end, and its answer is in the list then."""
    beside, answers = cache.parent / f"{cache.name}-held", list[Answer]()
    number = home.forks.start(
        scenario.job, fault={"at": at, "do": "pause", "beside": str(beside)}, **scenario.on(cache)
    )
    end = time.monotonic() + 60
    while not beside.exists() and time.monotonic() < end:
        time.sleep(0.005)
    assert beside.exists()
    try:
        yield answers
    finally:
        beside.unlink()
        answers.append(home.forks.wait(number))


def is_of_a_shard(scenario: Scenario, step: int) -> bool:
    """Not of the view, which two extractions write one after the other."""
    return scenario.events[step][1].count("/") == 2


def steps_inside(scenario: Scenario, count: int) -> list[int]:
    """Steps at shards and after: before, a file of the store may be held for which others wait their turn."""
    marks = [n for n, (_, place, _) in enumerate(scenario.events) if "/.shared-" in place or "/.exclusive-" in place]
    begun = next(n for n in range(len(scenario.events)) if is_of_a_shard(scenario, n))
    inside = [n for n in range(begun + 1, marks[-1]) if scenario.job != "extract" or is_of_a_shard(scenario, n)]
    return sorted(random.Random(SEED).sample(inside, min(count, len(inside))))


def is_in_use(answer: Answer, what: str) -> bool:
    said = str(answer.error or answer.value)
    return f"is in use: {what} by process" in said and "Try again when it has finished" in said


def test_two_extractions_from_nothing(tmp_path: Path, home: Home) -> None:
    scenario = home.scenario("new")
    answers = home.forks.all("extract", [scenario.on(tmp_path / "cache"), scenario.on(tmp_path / "cache")])
    assert [answer.error for answer in answers] == [None, None]
    assert home.forks.done("state", cache=tmp_path / "cache") == scenario.end
    assert home.forks.done("leftovers", cache=tmp_path / "cache") == []


@pytest.mark.parametrize("other", [{"outputs": "cls,mean"}, {"outputs": "cls", "copies": 1, "augment": "flip"}])
def test_a_view_has_the_outputs_and_copies_of_two_extractions_at_once(tmp_path: Path, home: Home, other) -> None:  # type: ignore[no-untyped-def]
    scenario, cache = home.scenario("new"), tmp_path / "cache"
    looked = replace(scenario, arguments={**scenario.arguments, "outputs": "tokens"})
    begun = next(n for n in range(len(scenario.events)) if is_of_a_shard(scenario, n))
    with held(home, looked, cache, begun + 1) as answers:
        home.forks.done("extract", cache=cache, **{**scenario.arguments, **other})
        before = open_view("set", cache, copies=True)
    assert answers[0].error is None, answers
    view = open_view("set", cache, copies=True)
    assert view.outputs.keys() == {"tokens", *other["outputs"].split(",")}
    assert view.ids.tolist() == before.ids.tolist() and view.augmented == before.augmented
    rows = home.forks.done("read", cache=cache)["set"]
    for name in ("cls", "tokens"):
        assert {sample: row[name] for sample, row in rows.items()} == {
            s: row[name] for s, row in home.rows["set"].items()
        }
    assert verification.verify(cache).damages == ()


def test_another_data_set_that_takes_the_name_meanwhile_is_not_replaced(tmp_path: Path, home: Home) -> None:
    scenario, cache = home.scenario("new"), tmp_path / "cache"
    for k in range(5):
        save_picture(tmp_path / "other" / ("ill", "well")[k % 2] / f"{k}.png", 100 + k)
    with held(home, scenario, cache, steps_inside(scenario, 1)[0]) as answers:
        home.forks.done("extract", cache=cache, **{**scenario.arguments, "data": tmp_path / "other"})
    assert "it is another dataset. Give this one a name with --name" in str(answers[0].error)
    assert len(open_view("set", cache)) == 5


def test_an_extraction_goes_on_while_another_sweeps_what_it_has_not_locked_yet(tmp_path: Path, home: Home) -> None:
    scenario, stop = home.scenario("new"), tmp_path / "stop"
    number = home.forks.start("sweep_again_and_again", cache=tmp_path / "cache", stop=stop)
    answer = home.forks.run("extract", pause=0.05, **scenario.on(tmp_path / "cache"))
    stop.touch()
    assert answer.error is None and home.forks.wait(number).value > 10
    assert home.forks.done("state", cache=tmp_path / "cache") == scenario.end
    assert home.forks.done("leftovers", cache=tmp_path / "cache") == []


@pytest.mark.parametrize("name", ["new", "grow"])
@pytest.mark.parametrize("count", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_beside_an_extraction_others_read_verify_extract_and_remove_nothing(tmp_path, home, name, count):
    scenario = home.scenario(name)
    for step in steps_inside(scenario, count):
        cache = tmp_path / str(step)
        with held(home, scenario, cache, step) as answers:
            state = home.forks.done("state", cache=cache)
            assert state["views"] in scenario.states and state["damaged"] == [], (step, state)
            for job in ("mend", "gc_said"):
                assert is_in_use(home.forks.run(job, cache=cache), "extract"), (step, job)
            if state["views"]:
                assert is_in_use(home.forks.run("compact", cache=cache, name="set"), "extract"), step
            home.forks.done("extract", cache=cache, **scenario.arguments)
        assert answers[0].error is None and answers[0].code == 0, (step, answers)
        assert home.forks.done("state", cache=cache) == scenario.end, step
        assert home.forks.done("leftovers", cache=cache) == [], step


@pytest.mark.parametrize(("name", "what"), [("mend", "repair"), ("gc", "gc"), ("compact", "compact set")])
@pytest.mark.parametrize("count", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_beside_one_that_removes_files_others_read_and_verify(tmp_path, home, name, what, count):
    scenario = home.scenario(name)
    for step in steps_inside(scenario, count):
        cache = tmp_path / str(step)
        with held(home, scenario, cache, step) as answers:
            refused = home.forks.run("extract", cache=cache, **home.grow)
            damaged = scenario.damaged and "DamagedFile" in str(refused.error)
            assert is_in_use(refused, what) or damaged, (step, refused)
            state = home.forks.done("state", cache=cache)
            for rows in state["views"].values():
                assert rows == scenario.result["set"] or "Error" in rows or "DamagedFile" in rows, (step, rows)
            assert scenario.damaged or state["damaged"] == [], (step, state["damaged"])
        assert answers[0].error is None and answers[0].code == 0, (step, answers)
        assert home.forks.done("state", cache=cache) == scenario.end, step


def looked_at_while_others_write(home: Home, folder: Path, job: str, rounds: int) -> Any:
    """What another process sees that reads (or verifies) all the time; the view changes with every step."""
    cache, stop = folder / "cache", folder / "stop"
    home.forks.done("copy", start=home.cache, cache=cache)
    number = home.forks.start(job, cache=cache, stop=stop)
    for _ in range(rounds):
        home.forks.done("extract", cache=cache, **home.grow)
        home.forks.done("compact", cache=cache, name="set")
        home.forks.done("extract", cache=cache, **home.extract, outputs="cls,tokens,mean")
        home.forks.done("gc", cache=cache)
    stop.touch()
    answer = home.forks.wait(number)
    assert answer.code == 0 and answer.error is None, answer
    return answer.value


@pytest.mark.parametrize("rounds", [1, pytest.param(6, marks=pytest.mark.slow)])
def test_a_reader_sees_the_old_view_or_the_new_one(tmp_path: Path, home: Home, rounds: int) -> None:
    seen = looked_at_while_others_write(home, tmp_path, "read_again_and_again", rounds)
    for state in seen:
        assert isinstance(state["set"], dict), state
        rows = {"set": {name: {k: v for k, v in row.items() if k != "mean"} for name, row in state["set"].items()}}
        assert state == home.grown_rows or rows == home.rows, state
    assert len(seen) > 1


@pytest.mark.parametrize("rounds", [1, pytest.param(6, marks=pytest.mark.slow)])
def test_verify_calls_nothing_damaged_that_others_replace(tmp_path: Path, home: Home, rounds: int) -> None:
    assert looked_at_while_others_write(home, tmp_path, "verify_again_and_again", rounds) == []


# ---------------------------------------------------------------------------------------------- one guard each


def between(monkeypatch, name: str, action) -> None:  # type: ignore[no-untyped-def]
    """``action`` once, when `verify` comes to this step."""
    real, done = getattr(verification, name), []

    def wrapped(*arguments: Any) -> Any:
        if not done:
            done.append(1)
            action()
        return real(*arguments)

    monkeypatch.setattr(verification, name, wrapped)


def appears(cache: Path) -> None:
    """A view, and more rows and their shard in another."""
    store = make_store(cache)
    add_shard(store, [7, 8], CLS)
    add_view(store, "set", [5, 1, 0, 2, 4, 7, 8], [CLS])
    add_view(store, "new", [7, 8], [CLS])


def is_replaced(cache: Path) -> None:
    compact("set", cache)
    remove_view("other", cache)


@pytest.mark.parametrize("change", [appears, is_replaced])
@pytest.mark.parametrize("step", ["_hashed", "_view", "referenced_shards", "_shard"])
def test_views_and_shards_appear_or_are_replaced_while_verify_looks(tmp_path: Path, monkeypatch, step, change) -> None:  # type: ignore[no-untyped-def]
    view = make_view(tmp_path, [5, 1, 0, 2, 4], per_shard=2, layouts=(CLS, TOKENS))
    add_view(make_store(tmp_path), "other", [0, 1], [CLS])
    between(monkeypatch, step, lambda: change(tmp_path))
    assert verification.verify(tmp_path).damages == ()
    assert len(View(view.path)) == (7 if change is appears else 5)


def test_a_view_that_is_open_follows_its_rows_to_other_shards(tmp_path: Path) -> None:
    make_view(tmp_path, [5, 1, 0, 2, 4], per_shard=2, layouts=(CLS, TOKENS))
    view = open_view("set", tmp_path)
    before = view.array("cls")  # mapped, so it outlives its file; the tokens are not
    compact("set", tmp_path)
    assert (view.array("cls") == before).all()
    assert (view.array("tokens") == features([5, 1, 0, 2, 4], TOKENS)).all()


def test_a_view_that_is_open_does_not_follow_to_other_images(tmp_path: Path) -> None:
    make_view(tmp_path, [0, 1, 2], per_shard=2, layouts=(CLS,))
    view = open_view("set", tmp_path)
    now = add_view(make_store(tmp_path), "set", [2, 2, 2], [CLS])
    for path in set(view.files["path"].tolist()) - set(now.files["path"].tolist()):
        (view.store / path.decode()).unlink()
    with pytest.raises(ViewReplaced, match=r"other images or features while it was open here.*open it again"):
        view.array("cls")


def test_a_view_is_replaced_while_it_is_opened(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    made = make_view(tmp_path, [0, 1, 2, 3], per_shard=2, layouts=(CLS,))
    real, done = View._check_files, []

    def meanwhile(view: View) -> None:
        if not done:
            done.append(1)
            now = add_view(make_store(tmp_path), "set", [3, 2], [CLS])
            for path in set(made.files["path"].tolist()) - set(now.files["path"].tolist()):
                (made.store / path.decode()).unlink()
        real(view)

    monkeypatch.setattr(View, "_check_files", meanwhile)
    view = open_view("set", tmp_path)
    assert (view.array("cls") == features([3, 2], CLS)).all() and len(view.ids) == 2
