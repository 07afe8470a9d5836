"""A cache made by a stranger: opening, verifying and training from it runs no code and reads nothing outside it.

One case per guard. The files here bear a right line and right hashes, and were written by none of our runs.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import xxhash
from support.builders import ORDER, digests, make_view
from support.plant import Content, changed, laid_out, plant, sealed

from featurecache.errors import CacheError, DamagedFile, UnsafeFile
from featurecache.files.directory import USER_BLOCK, UserBlock
from featurecache.store.schema import MAX_VIEW
from featurecache.store.shards import Layout, read_shard
from featurecache.store.store import open_store, stores, unreadable_stores
from featurecache.store.view import View
from featurecache.store.write_view import find_view

LAYOUT = Layout("tokens", (5, 3), "float16")


def refused(path: Path, words: str, error: type[Exception] = CacheError) -> None:
    with pytest.raises(error, match=words) as caught:
        read_shard(path, LAYOUT) if path.parent.name == "tokens" else View(path)
    assert str(caught.value).endswith("."), caught.value  # every refusal is a sentence
    assert len(str(caught.value)) < 500


# ---------------------------------------------------------------------------------------------- directories


def shard(**columns: np.ndarray | None) -> Content:
    whole = {
        "features": np.ones((2, 5, 3), "f2"), "digests": digests(range(2)), "checksums": np.zeros(2, "u8"),
        "errors": np.zeros(2, "f4"), **columns,
    }  # fmt: skip
    return Content({}, {key: values for key, values in whole.items() if values is not None})


def test_a_sound_shard_of_a_stranger_is_read(tmp_path: Path) -> None:
    assert len(read_shard(plant(tmp_path / "tokens" / "0a.h5", laid_out(shard())), LAYOUT).digests) == 2


def entry(**change):  # type: ignore[no-untyped-def]
    return lambda record: record["columns"]["features"].update(change)


def place(name: str, offset: int):  # type: ignore[no-untyped-def]
    return lambda record: record["columns"][name].update(offset=offset)


DIRECTORIES = [
    (lambda record: [1], "does not list attributes and columns"),
    (lambda record: record.update(more=1), "does not list attributes and columns"),
    (lambda record: record.update(columns=[]), "does not list attributes and columns"),
    (lambda record: record["columns"].update(features=7), "other fields than"),
    (entry(more=1), "other fields than"),
    *((entry(dtype=dtype), "other things than numbers and text") for dtype in (
        "|O", "<f2,<f2", "|V30", ">f2", "<f16", "|S0", [], [["a", "|O"]], [["a", "<f2"], ["a", "<f2"]],
        [["a", "<f2", [5]]],
    )),
    (entry(dtype=[["a", [["b", "<f2"]]]]), "no type of a field"),
    *((entry(shape=shape), "is not its shape") for shape in (
        [2, -5, 3], [True, 5, 3], [2.0, 5, 3], [], 30, [1, 1, 1, 1],
    )),
    (entry(shape=[1 << 40, 1 << 40, 0]), "more than a file can hold"),
    (entry(shape=[1 << 37, 5, 3]), "each inside it"),
    *((entry(offset=offset), "each inside it") for offset in (-64, 0, 64 << 40)),
    *((entry(offset=offset), "does not begin at a multiple of 64") for offset in (513, "512", None)),
    *((entry(attributes=record), "attributes other than text and numbers") for record in ([], {"prefix": ["cls"]})),
    (lambda record: record.update(attributes={"a": None}), "attributes other than text and numbers"),
    (place("digests", 512), "one behind the other"),  # over the features
    (lambda record: record["columns"].pop("features"), "has no column features"),
]  # fmt: skip


@pytest.mark.parametrize(("edit", "words"), DIRECTORIES)
def test_a_directory_of_other_things_is_refused(tmp_path: Path, edit, words: str) -> None:  # type: ignore[no-untyped-def]
    file = laid_out(shard(), lambda record: [1] if edit(record) == [1] else record)
    refused(plant(tmp_path / "tokens" / "0a.h5", file), words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"[" * 100_000, "deeper than 64 levels"),
        (b'{"attributes":{},"attributes":{},"columns":{}}', "'attributes' stands twice"),
        (b'{"attributes":{"a":NaN},"columns":{}}', "NaN is no number"),
        (b'{"attributes":{"a":1e999},"columns":{}}', "beyond all bounds"),
        (b'{"attributes":{"a":1' + b"0" * 4000 + b'},"columns":{}}', "more than 64 bits"),
        (b'{"attributes":{"a":"\\ud800"},"columns":{}}', "half a character"),
        (b"\xff", "cannot be read"),
        (b"", "cannot be read"),
    ],
)
def test_a_directory_that_is_no_json_of_ours_is_refused(tmp_path: Path, text: bytes, words: str) -> None:
    refused(plant(tmp_path / "tokens" / "0a.h5", sealed(text, USER_BLOCK, len(text))), words)


@pytest.mark.parametrize(("offset", "length"), [(0, 10), (513, 1 << 40), (1 << 50, 10), (512, (64 << 20) + 1)])
def test_a_line_that_points_outside_its_file_or_to_gigabytes_is_refused(tmp_path, offset, length):
    block = UserBlock("0" * 32, 1 << 30, offset, length, "0" * 16)
    path = plant(tmp_path / "tokens" / "0a.h5", block.to_bytes())
    os.truncate(path, 1 << 30)  # a hole
    refused(path, "damaged in its first 512", DamagedFile)


SHARDS = [
    ({"digests": digests(range(3))}, "columns do not agree"),
    ({"checksums": np.zeros((2, 2), "u8")}, "expected 1 dimensions"),
    ({"digests": np.array([b"../" * 10] * 2, "S32")}, "not 32 hexadecimal digits"),
    ({"errors": np.zeros(2, "f8")}, "errors has the type float64"),
    ({"features": np.ones((2, 5, 3), "i2")}, "no features of float16 or float32"),
    ({"features": np.ones(2, "f2")}, "columns do not agree"),
    ({"features": np.ones((2, 5, 4), "f2")}, r"expected float16 \(5, 3\)"),
    ({"checksums": None}, "has no column checksums"),
]


@pytest.mark.parametrize(("columns", "words"), SHARDS)
def test_columns_of_shards_are_what_they_have_to_be(tmp_path: Path, columns, words: str) -> None:  # type: ignore[no-untyped-def]
    refused(plant(tmp_path / "tokens" / "0a.h5", laid_out(shard(**columns))), words)


# ---------------------------------------------------------------------------------------------- views


def index_path(path: bytes):  # type: ignore[no-untyped-def]
    return lambda content: content.columns["index/files"].__setitem__("path", path)


def attribute(key: str, value, of: str = ""):  # type: ignore[no-untyped-def]
    return lambda content: (content.about[of] if of else content.attributes).__setitem__(key, value)


def column(key: str, values: np.ndarray):  # type: ignore[no-untyped-def]
    return lambda content: content.columns.__setitem__(key, np.asarray(values))


def texts(key: str, values: list[str]):  # type: ignore[no-untyped-def]
    return lambda content: content.texts(key, values)


def ends(values: list[int], of: str = "splits"):  # type: ignore[no-untyped-def]
    return column(f"index/text/{of}/ends", np.array(values, "i8"))


def renamed(content: Content) -> None:
    for group in ("index", "checksums", "errors"):
        content.columns[f"{group}/.."] = content.columns.pop(f"{group}/cls")
    content.about["index/.."] = content.about.pop("index/cls")


VIEWS = [
    ("index, absolute", index_path(b"/etc/passwd"), "outside its store"),
    ("index, parent", index_path(b"../secret.h5"), "outside its store"),
    ("index, deeper parent", index_path(b"cls/../../../secret.h5"), "outside its store"),
    ("index, control characters", index_path(b"cls/\x1b[2J.h5"), "outside its store"),
    ("JSON bomb", attribute("classes", "[" * 100_000), "deeper than 64 levels"),
    ("JSON deep", attribute("source", '{"a":' * 80 + "1" + "}" * 80), "deeper than 64 levels"),
    ("classes no list", attribute("classes", '{"a": 1}'), "classes is dict, not list"),
    ("classes no text", attribute("classes", "[1, 2]"), "classes are not different names"),
    ("classes repeated", attribute("classes", '["a", "a"]'), "classes are not different names"),
    ("source no record", attribute("source", "[]"), "source is list, not dict"),
    ("source twice", attribute("source", '{"a": 1, "a": 2}'), "'a' stands twice"),
    ("failed no pairs", attribute("failed", "[[1, 2]]"), "not one of ids and reasons"),
    ("failed of three", attribute("failed", '[["a", "b", "c"]]'), "not one of ids and reasons"),
    ("a class as number", attribute("classes", 7), "it is int, not text"),
    ("a task of its own", attribute("task", "evil"), "columns do not agree"),
    ("another format", attribute("format_version", 1), "has format 1"),
    ("no spec", lambda content: content.attributes.pop("task"), "not a view as featurecache writes"),
    ("labels beyond", column("labels", np.full(9, 2)), "labels do not fit"),
    ("labels below", column("labels", np.full(9, -2)), "labels do not fit"),
    ("labels wide", column("labels", np.zeros((9, 2))), "labels do not fit"),
    ("labels text", column("labels", np.array([b"a"] * 9)), "labels do not fit"),
    ("splits", texts("splits", ["evil"] * 9), "other than train, val and test"),
    ("splits short", texts("splits", ["train"] * 8), "columns do not agree"),
    ("text beyond", ends([10**9] * 9), "do not lie where it says"),
    ("text before", ends([-1, *[38] * 8]), "do not lie where it says"),
    ("text backwards", ends([8, 4, 8, 12, 16, 20, 24, 28, 38]), "do not lie where it says"),
    ("text in a character", ends([1, *[82] * 8], "ids"), "do not lie|ends within a character"),
    ("text of loose bytes", column("index/text/splits/bytes", np.full(38, 0xFF, "u1")), "do not lie|no column of text"),
    ("text of two sides", column("index/text/splits/ends", np.zeros((9, 1), "i8")), "expected 1 dimensions"),
    ("digests", column("digests", np.array([b"x" * 32] * 9)), "not 32 hexadecimal"),
    ("meta in two dimensions", column("meta/x", np.zeros((9, 1))), "expected 1 dimensions"),
    ("meta of bytes", column("meta/x", np.array([b"a"] * 9)), "other things than numbers and text"),
    ("meta of half truths", column("meta/x", np.full(9, 2, "u1").view(bool)), "other things than true and false"),
    ("index of floats", column("index/cls", np.zeros((9, 2))), "index/cls has the type float64"),
    ("index of three", column("index/cls", np.zeros((9, 3), "i8")), "has no index"),
    ("shape", attribute("shape", "[-4]", "index/cls"), "not the shape of a row"),
    ("shape of a terabyte", attribute("shape", "[1000000, 1000000]", "index/cls"), "not the shape of a row"),
    ("shape of text", attribute("shape", '["4"]', "index/cls"), "not the shape of a row"),
    ("dtype", attribute("dtype", "object", "index/cls"), "storage dtype 'object'"),
    ("grid", attribute("grid", "[2]", "index/tokens"), "which rows are what"),
    ("grid that does not fit", attribute("grid", "[3, 3]", "index/tokens"), "with the shape"),
    ("prefix", attribute("prefix", "[1]", "index/tokens"), "which rows are what"),
    ("an output that leads elsewhere", renamed, "is not an output"),
]


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:  # type: ignore[no-untyped-def]
    return make_view(tmp_path_factory.mktemp("sound") / "cache", ORDER).path


@pytest.fixture
def view(sound: Path, tmp_path: Path) -> Path:
    """A view in a store of its own, as our runs left it, but unpacked by somebody."""
    shutil.copytree(sound.parents[1], tmp_path / "cache")
    return tmp_path / "cache" / sound.parent.name / sound.name


@pytest.mark.integration
def test_views_of_strangers_are_refused_in_a_sentence(view: Path) -> None:
    whole = view.read_bytes()
    for _, change, words in VIEWS:
        refused(changed(plant(view, whole), change), words)
    assert len(View(changed(plant(view, whole), lambda content: None))) == 9


def test_a_view_that_is_larger_than_memory_should_hold(view: Path) -> None:
    size = MAX_VIEW + (1 << 20)
    text = b'{"attributes":{},"columns":{}}'
    line = UserBlock("0" * 32, size, USER_BLOCK, len(text), xxhash.xxh3_64_hexdigest(text)).to_bytes()
    view.write_bytes(line + text)
    os.truncate(view, size)  # a hole: it costs the stranger nothing
    refused(view, "at most 4,294,967,296 are read", UnsafeFile)


def test_a_result_beyond_the_memory_of_this_machine_is_refused(view: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("os.sysconf", {"SC_PHYS_PAGES": 10, "SC_PAGE_SIZE": 5}.__getitem__)
    with pytest.raises(CacheError, match=r"9 rows of \[5, 4\] take 360 bytes .* this machine has 50"):
        View(view).tensor("tokens")


# ---------------------------------------------------------------------------------------------- files and folders


def test_pipes_and_folders_are_refused_instead_of_waited_for(view: Path) -> None:
    for make in (os.mkfifo, os.mkdir):
        view.unlink()
        make(view)
        refused(view, "not a plain file", UnsafeFile)
    spec_file(view).unlink()
    os.mkfifo(spec_file(view))
    with pytest.raises(UnsafeFile, match="not a plain file"):
        open_store(view.parent)


@pytest.mark.parametrize("what", ["view", "shard", "output", "spec.json", "plan.json", "store"])
def test_symbolic_links_are_refused_at_every_level(view: Path, tmp_path: Path, what: str) -> None:
    store = view.parent
    (store / "plan.json").write_text("{}")
    places = {"view": view, "shard": next((store / "cls").glob("*.h5")), "output": store / "cls", "store": store}
    place = places.get(what, store / what)
    place.rename(tmp_path / "elsewhere")
    place.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnsafeFile, match="symbolic link"):
        View(view)
        open_store(store).plan  # noqa: B018
    assert find_view("set", tmp_path / "cache") if what not in ("spec.json", "store") else True


def test_an_output_folder_that_leads_elsewhere_is_neither_listed_nor_swept(view: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / ".0123456789abcdef.01234567.tmp").touch()
    (view.parent / "gap").symlink_to(outside)
    store = open_store(view.parent)
    store.sweep()
    assert len(list(outside.iterdir())) == 1
    with pytest.raises(UnsafeFile, match="symbolic link"):
        store.shard_paths("gap")


def spec_file(view: Path) -> Path:
    return view.parent / "spec.json"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000, "deeper than 64 levels"),
        ('{"a":' * 70 + "1" + "}" * 70, "deeper than 64 levels"),
        ('{"spec": NaN}', "NaN is no number"),
        ('{"spec": 1, "spec": 2}', "'spec' stands twice"),
        ("[]", "holds list, not a record"),
        ("{}", "it has no spec"),
        ('{"spec": []}', "an extraction spec has the fields"),
        ('{"a": "' + "x" * (1 << 24) + '"}', "a record has at most 16,777,216"),
        ("\xff", "cannot be read"),
    ],
)
def test_records_of_stores_are_bounded(view: Path, text: str, words: str) -> None:
    spec_file(view).write_bytes(text.encode("latin-1"))
    with pytest.raises(CacheError, match=words):
        open_store(view.parent)
    assert list(stores(view.parents[1])) == []
    assert len(list(unreadable_stores(view.parents[1]))) == 1


SPECS = [
    ("weights", 5), ("architecture", []), ("preprocess", None), ("image_size", "88"), ("image_size", [8]),
    ("image_size", [8, -8]), ("image_size", [True, 8]), ("precision", "fp64"), ("precision", []), ("dtype", {}),
    ("generation", "0"), ("format", None), ("position_embeddings", 3),
]  # fmt: skip
PROVENANCES = [
    [], {"request": []}, {"request": {"name": 3}}, {"request": {"name": "a", "trust_code": True}},
    {"request": {"seed": 1}}, {"backbone": {}}, {"versions": []},
]  # fmt: skip


@pytest.mark.parametrize(
    ("key", "change", "words"),
    [("spec", {field: value}, "an extraction spec") for field, value in SPECS]
    + [("provenance", record, "its provenance is not that of a store") for record in PROVENANCES],
)
def test_a_spec_or_a_provenance_of_other_types_is_none(view: Path, key: str, change, words: str) -> None:  # type: ignore[no-untyped-def]
    record = json.loads(spec_file(view).read_text())
    record[key] = {**record["spec"], **change} if key == "spec" else change
    spec_file(view).write_text(json.dumps(record))
    with pytest.raises(CacheError, match=words):
        open_store(view.parent)


@pytest.mark.parametrize("plan", [{"cpu": 3}, {"cpu": {"batch_size": 10**9, "threads": 1}}, {"cpu": {"batch_size": 1}}])
def test_a_plan_that_would_fill_the_machine(view: Path, plan) -> None:  # type: ignore[no-untyped-def]
    (view.parent / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(CacheError, match="has no batch_size and threads"):
        open_store(view.parent).plan  # noqa: B018
