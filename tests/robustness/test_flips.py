"""Random damage to files of a cache: found by `verify`, never a wrong number, and `repair` brings every row back.

Damages are made in processes of their own: a dead interpreter or a hang is a failure here, not the end of the tests.
After each the system knows nothing of the change (as decay of the disk would have it), so our readers get the files.
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from support.builders import CLS, add_shard, add_view, digests, features, make_store
from support.fault_home import Home
from support.fault_home import home as make_home
from support.fault_jobs import damaged

from featurecache.maintenance.repair import repair
from featurecache.maintenance.verify import verify
from featurecache.store.shards import ShardWriter, notes_for, shard_name
from featurecache.store.view import View
from featurecache.store.write_view import rewrite_view

SEED = int(os.environ.get("FEATURECACHE_FAULT_SEED", "0"))
Damage = tuple[str, str, int, int]  # file, how, place, more: see `damaged`
IN_ONE_PROCESS = 25


@dataclass(frozen=True)
class ShardFile:
    """Where the rows of a shard lie, as plain h5py has it."""

    offset: int
    row_bytes: int
    digests: list[str]
    named: list[bool]  # whether the view names the row

    def places(self) -> range:
        """Bytes of the rows."""
        return range(self.offset, self.offset + len(self.digests) * self.row_bytes)

    def touched(self, before: bytes, after: bytes) -> int:
        """How many rows that the view names have other bytes now."""
        ends = [self.offset + k * self.row_bytes for k in range(len(self.digests) + 1)]
        pairs = zip(ends[:-1], ends[1:], self.named, strict=True)
        return sum(named and before[a:b] != after[a:b] for a, b, named in pairs)


class Whole:
    """A cache with shards of which a view names all rows, some, and none."""

    def __init__(self, home: Home) -> None:
        self.home, self.forks = home, home.forks
        self.cache = home.folder / "flips"
        self.forks.done("extract", cache=self.cache, copy_of=home.cache, **home.extract, outputs="tokens-9")
        self.forks.done("remove", cache=self.cache, name="set")
        self.forks.done("extract", cache=self.cache, **home.grow)
        (found,) = self.forks.done("flips", start=self.cache, work=home.folder / "flips-rows", changes=[[]], then="")
        self.rows, self.files = found["after"], found["files"]
        self.records = self.forks.done("records", cache=self.cache)
        self.paths = sorted(str(path.relative_to(self.cache)) for path in self.cache.glob("*/**/*") if path.is_file())
        self.bytes = {name: (self.cache / name).read_bytes() for name in self.paths}
        digests = {row["digest"] for row in self.rows["set"].values()}
        self.shards = {name: self._shard(name, digests) for name in self.paths if name.count("/") == 2}

    def _shard(self, name: str, digests: set[str]) -> ShardFile:
        with h5py.File(self.cache / name) as file:
            features, found = file["features"], [digest.decode() for digest in file["digests"]]
            named = [digest in digests and "tokens-9" not in name for digest in found]
            return ShardFile(features.id.get_offset(), int(np.prod(features.shape[1:])) * 2, found, named)

    def view(self) -> str:
        return next(name for name in self.paths if name.count("/") == 1 and name.endswith(".h5"))

    def make(self, folder: Path, damages: list[list[Damage]], then: str, **more: Any) -> list[dict[str, Any]]:
        parts = [damages[start : start + IN_ONE_PROCESS] for start in range(0, len(damages), IN_ONE_PROCESS)]
        common = {"start": self.cache, "then": then, **more}
        jobs = [{**common, "work": folder / str(number), "changes": part} for number, part in enumerate(parts)]
        answers = self.forks.all("flips", jobs)
        for part, answer in zip(parts, answers, strict=True):
            assert answer.code == 0 and answer.error is None, (answer, part)
        return [found for answer in answers for found in answer.value]

    def check_read(self, rows: dict[str, Any], what: object, right: dict[str, Any] | None = None) -> None:
        """Every row is what it was (``right``: what it has to be), or an error of ours."""
        for name, found in rows.items():
            for sample, row in found.items() if isinstance(found, dict) else [("", {"": found})]:
                for output, value in row.items():
                    fine = _is_error(value) or value == (right or self.rows)[name][sample][output]
                    assert fine, (what, sample, output, value)

    def rows_lost(self, name: str, damages: list[Damage]) -> int:
        """Of a shard with these damages: rows that the view names and that have other bytes."""
        data = self.bytes[name]
        for how in (one[1:] for one in damages if one[0] == name):
            data = damaged(data, *how)
        return self.shards[name].touched(self.bytes[name], data)


def _is_error(value: Any) -> bool:
    return isinstance(value, str) and value.split(":")[0] in ("DamagedFile", "CacheError", "UnsafeFile")


@pytest.fixture(scope="module")
def whole() -> Whole:
    return Whole(make_home())


def random_damages(whole: Whole, seed: int, count: int, names: list[str]) -> list[Damage]:
    """Each to one of the files and such that a byte changes; the head of a file is as likely as all of the rest."""
    rng, damages = random.Random(seed), list[Damage]()
    while len(damages) < count:
        name = rng.choice(names)
        size = len(whole.bytes[name])
        place = rng.randrange(min(size, 512)) if rng.random() < 0.3 else rng.randrange(size)
        how = rng.choices(["bit", "ones", "swap", "cut", "grow"], [12, 1, 1, 2, 1])[0]
        more = {"bit": rng.randrange(8)}.get(how, rng.choice([8, 32, 64]))
        if damaged(whole.bytes[name], how, place, more) != whole.bytes[name]:
            damages.append((name, how, place, more))
    return damages


# ---------------------------------------------------------------------------------------------- found, never wrong


@pytest.mark.parametrize(("seed", "count"), [(SEED, 100), pytest.param(SEED + 1, 600, marks=pytest.mark.slow)])
def test_random_damages_are_found_and_harmless(whole: Whole, tmp_path: Path, seed: int, count: int) -> None:
    damages = random_damages(whole, seed, count, whole.paths)
    for one, found in zip(damages, whole.make(tmp_path, [[d] for d in damages], ""), strict=True):
        assert found["verify"] == [one[0]], (one, found["verify"])
        whole.check_read(found["read"], one)
        if one[0] in whole.shards and one[1] in ("bit", "ones", "swap"):
            unreadable = sum(_is_error(value) for row in found["read"]["set"].values() for value in row.values())
            assert unreadable == whole.rows_lost(one[0], [one]), one


@pytest.mark.parametrize(("seed", "count"), [(SEED, 16), pytest.param(SEED + 1, 120, marks=pytest.mark.slow)])
def test_an_extraction_on_top_of_damage(whole: Whole, tmp_path: Path, seed: int, count: int) -> None:
    """An extraction for other outputs and images on damaged shards and views: its view has right rows or none."""
    names = [name for name in whole.paths if name.endswith(".h5")]
    more = {**whole.home.extract, "outputs": "cls,tokens,mean,tokens-9"}
    (clean,) = whole.make(tmp_path / "clean", [[]], "extract", **more)
    damages = random_damages(whole, seed, count, names)
    heads = [one for one in damages if one[0] not in whole.shards or one[2] not in whole.shards[one[0]].places()]
    assert len(heads) > count // 10
    for one, found in zip(damages, whole.make(tmp_path, [[d] for d in damages], "extract", **more), strict=True):
        told = isinstance(found["done"], str)
        whole.check_read(found["after"], one, {} if told and found["after"] != clean["after"] else clean["after"])
        assert not told or _is_error(found["done"]), (one, found["done"])
        assert one[0] in found["left"], one


# ---------------------------------------------------------------------------------------------- repaired


def mended(whole: Whole, folder: Path, damages: list[list[Damage]]) -> None:
    """Each set of damages, repaired: the rows computed again are exactly those that were damaged, the others keep their
    bytes and place, and nothing is wrong with the cache any more."""
    for together, found in zip(damages, whole.make(folder, damages, "mend"), strict=True):
        whole.check_read(found["read"], together)
        assert isinstance(found["done"], dict), (together, found["done"])
        assert found["done"]["left"] == found["left"] == [], (together, found["done"])
        assert found["after"] == whole.rows, together
        assert found["done"]["records"] == whole.records, together
        names = {name for name, *_ in together if name in whole.shards}
        lost = sum(whole.rows_lost(name, together) for name in names)
        assert found["done"]["computed"] == lost, together
        assert found["done"]["kept"] == sum(sum(whole.shards[name].named) for name in names) - lost, together
        for name, digest in whole.files.items():
            if all(whole.shards[name].named) or name not in names:
                assert found["files"].get(name) == digest, (together, name)


def several(whole: Whole, seed: int, count: int) -> list[list[Damage]]:
    """Sets of one to four damages, in any files but the view."""
    rng = random.Random(seed)
    names = [name for name in whole.paths if name != whole.view()]
    pool = random_damages(whole, seed, 4 * count, names)
    sets = [[pool.pop() for _ in range(rng.choice([1, 1, 2, 4]))] for _ in range(count)]
    return [list({one[0]: one for one in together}.values()) for together in sets]  # one for each file


@pytest.mark.parametrize(("seed", "count"), [(SEED, 20), pytest.param(SEED + 1, 150, marks=pytest.mark.slow)])
def test_random_damages_are_repaired(whole: Whole, tmp_path: Path, seed: int, count: int) -> None:
    mended(whole, tmp_path, several(whole, seed, count))


def test_shards_that_are_gone_all_of_them(whole: Whole, tmp_path: Path) -> None:
    named = [name for name, shard in whole.shards.items() if any(shard.named)]
    mended(whole, tmp_path, [[(name, "gone", 0, 0) for name in named]])


def test_every_kind_of_file_at_once(whole: Whole, tmp_path: Path) -> None:
    """What a shard is mended by is damaged too: the plan, the record of the store, the reference of the probes."""
    small = [name for name in whole.paths if name.endswith((".json", ".safetensors"))]
    assert len(small) == 3
    shards = [(name, "bit", shard.offset + 5, 3) for name, shard in whole.shards.items() if "mean" not in name]
    mended(whole, tmp_path, [[*((name, "bit", 30, 0) for name in small), *shards]])


# ---------------------------------------------------------------------------------------------- one guard each


def test_a_damaged_shard_stays_while_a_damaged_view_may_name_it(whole: Whole, tmp_path: Path) -> None:
    """Nobody knows then which of its rows are wanted; the view's own extraction tells, and nothing is computed."""
    name = next(name for name, shard in whole.shards.items() if all(shard.named) and "tokens" in name)
    damages = [(whole.view(), "bit", 900, 0), (name, "bit", whole.shards[name].offset, 0)]
    (found,) = whole.make(tmp_path, [damages], "mend")
    assert found["files"].keys() == whole.files.keys()
    assert found["done"]["computed"] == 0 and len(found["done"]["left"]) == 2
    assert any(name in left and "no view names its rows" in left for left in found["done"]["left"])


def test_digests_that_changed_places_are_not_believed(whole: Whole, tmp_path: Path) -> None:
    """Every row still has the checksum beside it, and the digest is of another image of the cache."""
    name = next(name for name in whole.shards if "/cls/" in name)
    place = whole.bytes[name].index(whole.shards[name].digests[0].encode())
    more = {**whole.home.extract, "outputs": "cls"}
    (found,) = whole.make(tmp_path, [[(name, "swap", place, 32)]], "extract", **more)
    assert f"{name} is damaged: its name is not the hash of its digests" in found["done"]


def test_a_row_keeps_its_bytes_when_another_shard_has_it_with_others(tmp_path: Path) -> None:
    """Two machines may have computed one image with last bits that differ; a view keeps the bytes that it has."""
    store = make_store(tmp_path)
    mine, broken = add_shard(store, [0], CLS), add_shard(store, [2], CLS)
    view = add_view(store, "set", [0, 2], [CLS])
    before = view.array("cls")
    other = next(k for k in range(10, 99) if shard_name(digests([0, k])) < mine.stem)  # it is looked at first
    writer = ShardWriter(store.path, digests([0, other]), CLS, notes_for(store.fingerprint, "cpu", {"threads": 1}))
    writer.append([bytes(d) for d in digests([0, other])], features([0, other], CLS) + np.float16(0.125))
    writer.commit()
    add_shard(store, [2, 5], CLS)
    broken.unlink()
    (done,) = repair(tmp_path)
    assert done.replaced == (broken,) and done.computed == 0
    assert (View(view.path).array("cls") == before).all()


def test_views_that_disagree_about_a_shard_are_found(tmp_path: Path) -> None:
    """As a repair leaves them that was killed after it wrote the first of two views."""
    store = make_store(tmp_path)
    path = add_shard(store, [0, 1], CLS)
    for name in ("a", "b"):
        add_view(store, name, [0, 1], [CLS])
    writer = ShardWriter(store.path, digests([0, 1]), CLS, notes_for(store.fingerprint, "cuda", {"threads": 2}))
    writer.append([bytes(d) for d in digests([0, 1])], features([0, 1], CLS))
    assert writer.commit(replace=True) == path
    located = {CLS: store.locate(CLS, digests([0, 1]))}
    rewrite_view(View(store.path / "a.h5", columns_only=True, copies=True), store, located)
    (damage,) = verify(tmp_path).damages
    assert damage.path == path and "the views' index has another" in damage.what
    repair(tmp_path)
    assert verify(tmp_path).damages == ()
    assert (View(store.path / "b.h5").array("cls") == features([0, 1], CLS)).all()
