"""A cache made by a stranger: opening, verifying and training from it runs no code and reads nothing outside it.

One case per guard. The files here bear a right user block and were written by none of our runs.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
from plant import build, changed, cycle, digests, elsewhere, external, plant, seal, soft
from test_views import CLS, ORDER, TOKENS, make_spec, make_view

from featurecache.errors import CacheError, DamagedFile, UnsafeFile
from featurecache.files import guard
from featurecache.store import schema
from featurecache.store.shards import Layout, read_shard
from featurecache.store.store import create_store, open_store, stores, unreadable_stores
from featurecache.store.view import View
from featurecache.store.write_view import find_view, open_view

LAYOUT = Layout("tokens", (5, 3), "float16")
LAST = "."  # every refusal is a sentence


def refused(path: Path, words: str, error: type[Exception] = CacheError) -> None:
    """By the process that looks first, and, were it to let the file pass, by our own reader."""
    for known in (False, True):
        if known:
            guard.own([path])
        with pytest.raises(error, match=words) as caught:
            read_shard(path, LAYOUT) if path.parent.name == "tokens" else View(path)
        assert str(caught.value).endswith(LAST), caught.value
        assert len(str(caught.value)) < 500


def all_refused(paths: list[Path], cases: list[str], kind: str) -> None:
    """As `refused`, the other process asked about all of them at once."""
    found = guard.verdicts(paths, kind)
    for path, words in zip(paths, cases, strict=True):
        assert re.search(words, str(found.get(path))), (path, found.get(path))
    guard.own(paths)
    for path, words in zip(paths, cases, strict=True):
        refused(path, words)


# ---------------------------------------------------------------------------------------------- shards


def shard(path: Path, fill=lambda file: None, without=("features",), name="0a") -> Path:  # type: ignore[no-untyped-def]
    def content(file: h5py.File) -> None:
        parts = {
            "features": np.ones((2, 5, 3), "f2"), "digests": digests(2), "checksums": np.zeros(2, "u8"),
            "errors": np.zeros(2, "f4"),
        }  # fmt: skip
        for key, data in parts.items():
            if key not in without:
                file.create_dataset(key, data=data)
        fill(file)

    return plant(path / "tokens" / f"{name}.h5", build(content))


def virtual(file: h5py.File) -> None:
    layout = h5py.VirtualLayout((2, 5, 3), "f2")
    layout[:] = h5py.VirtualSource("../../other.h5", "x", (2, 5, 3), "f2")
    file.create_virtual_dataset("features", layout)


def root_again(file: h5py.File) -> None:
    file["again"] = file["/"]


def two_names(file: h5py.File) -> None:
    file["features"] = file["digests"]


def nested(file: h5py.File) -> None:
    file.create_group("a/b/c")


def named_type(file: h5py.File) -> None:
    file["features"] = np.dtype("f2")


def own_type(file: h5py.File) -> None:
    file["kind"] = np.dtype("f2")
    file.create_dataset("features", (2, 5, 3), file["kind"])
    del file["kind"]


def compressed(file: h5py.File) -> None:
    file.create_dataset("features", data=np.ones((2, 5, 3), "f2"), compression="gzip")


def unknown_filter(file: h5py.File) -> None:
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    creation.set_chunk((2, 5, 3))
    creation.set_filter(32_015, h5py.h5z.FLAG_OPTIONAL)  # zstandard: HDF5 would look for a plugin
    h5py.h5d.create(file.id, b"features", h5py.h5t.IEEE_F16LE, h5py.h5s.create_simple((2, 5, 3)), creation)


def chunked(file: h5py.File) -> None:
    file.create_dataset("features", data=np.ones((2, 5, 3), "f2"), chunks=(1, 5, 3))


def in_the_header(file: h5py.File) -> None:
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    creation.set_layout(h5py.h5d.COMPACT)
    h5py.h5d.create(file.id, b"features", h5py.h5t.IEEE_F16LE, h5py.h5s.create_simple((2, 5, 3)), creation)


def terabyte(file: h5py.File) -> None:
    file.create_dataset("features", (1 << 37, 5, 3), "f2")  # declared; nothing is written


def references(file: h5py.File) -> None:
    data = np.array([file.ref] * 2, h5py.ref_dtype)
    file.create_dataset("features", data=data, dtype=h5py.ref_dtype)


def pickled(file: h5py.File) -> None:
    data = np.array([np.void(b"cos\nsystem\n(S'id'\ntR.")] * 2)
    file.create_dataset("features", data=data)


def lists(file: h5py.File) -> None:
    file.create_dataset("features", (2,), h5py.vlen_dtype(np.dtype("f2")))


def loose_text(file: h5py.File) -> None:
    file.create_dataset("features", data=["a", "b"])


def large_attribute(file: h5py.File) -> None:
    file.create_dataset("features", data=np.ones((2, 5, 3), "f2"))
    file.attrs["plan"] = "x" * 34_000_000


def many_attributes(file: h5py.File) -> None:
    for k in range(100):
        file.attrs[f"a{k}"] = k


def array_attribute(file: h5py.File) -> None:
    file.attrs["a"] = np.zeros(5000)


def reference_attribute(file: h5py.File) -> None:
    file.attrs["a"] = file.ref


SHARDS = {
    external: "keeps its data in another file",
    virtual: "is a virtual dataset",
    soft: "is a link that leads elsewhere",
    elsewhere: "is a link that leads elsewhere",
    cycle: "neither a dataset nor a group|names one object twice",
    root_again: "names one object twice",
    two_names: "names one object twice",
    nested: "neither a dataset nor a group",
    named_type: "neither a dataset nor a group",
    own_type: "other things than numbers and text .a type of its own",
    compressed: "is compressed or filtered",
    unknown_filter: "is compressed or filtered",
    chunked: "is not stored in one piece",
    in_the_header: "is not stored in one piece",
    terabyte: r"declares 4,123,168,604,160 bytes, which its file of [\d,]+ bytes does not hold",
    references: "other things than numbers and text .references",
    pickled: "other things than numbers and text .opaque bytes",
    lists: "other things than numbers and text .lists",
    loose_text: "other things than numbers and text",
    large_attribute: "has an attribute of 34,000,000",
    many_attributes: "has 100 attributes",
    array_attribute: "has an attribute of an unusual number",
    reference_attribute: "has an attribute of references",
}


def test_shards_of_strangers_are_refused_in_a_sentence(tmp_path: Path) -> None:
    paths = [shard(tmp_path, fill, name=f"0a{number}") for number, fill in enumerate(SHARDS)]
    all_refused(paths, list(SHARDS.values()), "shard")


COLUMNS = [
    ({"digests": digests(3)}, "columns do not agree"),
    ({"checksums": np.zeros((2, 2), "u8")}, "columns do not agree"),
    ({"digests": np.array([b"../" * 10] * 2, "S32")}, "not 32 hexadecimal digits"),
    ({"errors": np.zeros(2, "f8")}, "errors has the type float64"),
    ({"features": np.ones((2, 5, 3), ">f2")}, "no features of float16 or float32"),
    ({"features": np.ones((2, 5, 3), "i2")}, "no features of float16 or float32"),
    ({"features": np.ones(2, "f2")}, "columns do not agree"),
]


def test_columns_of_shards_are_what_they_have_to_be(tmp_path: Path) -> None:
    def fill(data):  # type: ignore[no-untyped-def]
        return lambda file: [file.create_dataset(key, data=values) for key, values in data.items()]

    paths = [shard(tmp_path, fill(data), tuple(data), f"0b{k}") for k, (data, _) in enumerate(COLUMNS)]
    all_refused(paths, [words for _, words in COLUMNS], "shard")


def test_a_shard_without_features_is_damaged(tmp_path: Path) -> None:
    refused(shard(tmp_path), "cannot be read as a shard", DamagedFile)


def test_more_objects_than_a_file_of_ours_has(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(schema, "MAX_OBJECTS", 3)
    path = shard(tmp_path, without=())
    with h5py.File(path) as file, pytest.raises(UnsafeFile, match="more than 3 datasets"):
        schema.check_inside(file, path, virtual=False)


def test_a_sound_shard_of_a_stranger_is_read(tmp_path: Path) -> None:
    assert len(read_shard(shard(tmp_path, without=()), LAYOUT).digests) == 2


# ---------------------------------------------------------------------------------------------- views


def put(file: h5py.File, key: str, data, **options) -> None:  # type: ignore[no-untyped-def]
    if key in file:
        del file[key]
    file.create_dataset(key, data=data, **options)


def virtual_from(source: str, inside: str = "features"):  # type: ignore[no-untyped-def]
    def change(file: h5py.File) -> None:
        layout = h5py.VirtualLayout((9, 4), "f2")
        layout[:] = h5py.VirtualSource(source, inside, (9, 4), "f2")
        del file["cls"]
        file.create_virtual_dataset("cls", layout)

    return change


def index_path(path: bytes):  # type: ignore[no-untyped-def]
    def change(file: h5py.File) -> None:
        files = file["index/files"][...]
        files["path"] = path
        file["index/files"][...] = files

    return change


def attribute(key: str, value, of: str = "/"):  # type: ignore[no-untyped-def]
    def change(file: h5py.File) -> None:
        file[of].attrs[key] = value

    return change


def column(key: str, data, **options):  # type: ignore[no-untyped-def]
    return lambda file: put(file, key, data, **options)


def linked(file: h5py.File) -> None:
    file["meta/x"] = h5py.ExternalLink("/etc/passwd", "/")


def terabyte_of_ids(file: h5py.File) -> None:
    del file["labels"]
    file.create_dataset("labels", (1 << 40,), "i8")


VIEWS = [
    ("virtual, absolute", virtual_from("/etc/passwd"), "outside its store"),
    ("virtual, parent", virtual_from("cls/../../../x.h5"), "outside its store"),
    ("virtual, itself", virtual_from(".", "/cls"), "which its index does not name"),
    ("virtual, unnamed shard", virtual_from("cls/ffff.h5"), "which its index does not name"),
    ("index, absolute", index_path(b"/etc/passwd"), "outside its store"),
    ("index, parent", index_path(b"../secret.h5"), "outside its store"),
    ("index, deeper parent", index_path(b"cls/../../../secret.h5"), "outside its store"),
    ("index, control characters", index_path(b"cls/\x1b[2J.h5"), "outside its store"),
    ("external link", linked, "leads elsewhere"),
    ("terabyte", terabyte_of_ids, r"declares 8,796,093,022,208 bytes"),
    ("compressed", column("labels", np.zeros(9, "i8"), compression="gzip"), "compressed or filtered"),
    ("group in a group", lambda file: file.create_group("meta/more"), "neither a dataset nor a group"),
    ("JSON bomb", attribute("classes", "[" * 100_000), "deeper than 64 levels"),
    ("JSON deep", attribute("source", '{"a":' * 80 + "1" + "}" * 80), "deeper than 64 levels"),
    ("large attribute", attribute("failed", json.dumps(["x" * 34_000_000])), "an attribute of 34,000,0"),
    ("classes no list", attribute("classes", '{"a": 1}'), "classes is dict, not list"),
    ("classes no text", attribute("classes", "[1, 2]"), "classes are not different names"),
    ("classes repeated", attribute("classes", '["a", "a"]'), "classes are not different names"),
    ("source no record", attribute("source", "[]"), "source is list, not dict"),
    ("source twice", attribute("source", '{"a": 1, "a": 2}'), "'a' stands twice"),
    ("source NaN", attribute("source", '{"a": NaN}'), "NaN is no number"),
    ("source infinite", attribute("source", '{"a": 1e999}'), "beyond all bounds"),
    ("source huge number", attribute("source", '{"a": 1' + "0" * 4000 + "}"), "more than 64 bits"),
    ("source huger number", attribute("source", '{"a": 1' + "0" * 6000 + "}"), "cannot be read"),
    ("half a character", attribute("source", '{"a": "\\ud800"}'), "half a character"),
    ("failed no pairs", attribute("failed", "[[1, 2]]"), "not one of ids and reasons"),
    ("failed of three", attribute("failed", '[["a", "b", "c"]]'), "not one of ids and reasons"),
    ("a class as number", attribute("classes", 7), "it is int64, not text"),
    ("a task of its own", attribute("task", "evil"), "columns do not agree"),
    ("another format", attribute("format_version", 2), "has format 2"),
    ("labels beyond", column("labels", np.full(9, 2)), "labels do not fit"),
    ("labels below", column("labels", np.full(9, -2)), "labels do not fit"),
    ("labels wide", column("labels", np.zeros((9, 2))), "labels do not fit"),
    ("labels text", column("labels", ["a"] * 9), "no column of numbers"),
    ("splits", column("splits", ["evil"] * 9), "other than train, val and test"),
    ("splits short", column("splits", ["train"] * 8), "columns do not agree"),
    ("digests", column("digests", np.array([b"x" * 32] * 9)), "not 32 hexadecimal"),
    ("meta of text in two dimensions", column("meta/x", [["a"]] * 9), "no column of text"),
    ("index of floats", column("index/cls", np.zeros((9, 2))), "not a view as featurecache writes"),
    ("shape", attribute("shape", "[-4]", "index/cls"), "not the shape of a row"),
    ("shape of a terabyte", attribute("shape", "[1000000, 1000000]", "index/cls"), "not the shape of a row"),
    ("shape of text", attribute("shape", '["4"]', "index/cls"), "not the shape of a row"),
    ("dtype", attribute("dtype", "object", "index/cls"), "storage dtype 'object'"),
    ("grid", attribute("grid", "[2]", "index/tokens"), "which rows are what"),
    ("grid that does not fit", attribute("grid", "[3, 3]", "index/tokens"), "with the shape"),
    ("prefix", attribute("prefix", "[1]", "index/tokens"), "which rows are what"),
]


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:  # type: ignore[no-untyped-def]
    return make_view(tmp_path_factory.mktemp("sound") / "cache", ORDER).path


@pytest.fixture
def view(sound: Path, tmp_path: Path) -> Path:
    """A view in a store of its own, as our runs left it, but unpacked by somebody."""
    shutil.copytree(sound.parents[1], tmp_path / "cache")
    return tmp_path / "cache" / sound.parent.name / sound.name


def test_views_of_strangers_are_refused_in_a_sentence(view: Path) -> None:
    paths = []
    for number, (_, change, _) in enumerate(VIEWS):
        paths.append(Path(shutil.copy(view, view.with_name(f"set{number}.h5"))))
        changed(paths[-1], change)
    all_refused(paths, [words for _, _, words in VIEWS], "view")


def test_an_output_whose_name_leads_elsewhere(view: Path) -> None:
    def change(file: h5py.File) -> None:
        for group in ("index", "checksums"):
            file.move(f"{group}/cls", f"{group}/..")

    refused(changed(view, change), "is not an output")


def test_text_that_many_elements_share_is_not_multiplied(view: Path) -> None:
    """An element of text is 16 bytes that name a place; all may name the same large one."""
    changed(view, lambda file: put(file, "ids", ["x" * 5_000_000] + ["y"] * 8, dtype=h5py.string_dtype()))
    with h5py.File(view) as file:
        start = file["ids"].id.get_offset()
    data = bytearray(view.read_bytes())
    data[start : start + 16 * 9] = data[start : start + 16] * 9
    refused(plant(view, bytes(data)), "declares more text than the file has bytes", UnsafeFile)


def test_shards_that_lead_elsewhere_are_refused_when_the_view_is_opened(view: Path) -> None:
    with h5py.File(view) as file:
        entry = file["index/files"][0]
    victim = view.parent / entry["path"].decode()
    size = victim.stat().st_size

    def chain(file: h5py.File) -> None:
        layout = h5py.VirtualLayout((4, 4), "f2")
        layout[:] = h5py.VirtualSource("/etc/passwd", "x", (4, 4), "f2")
        file.create_virtual_dataset("features", layout)

    data = build(chain)
    plant(victim, data + bytes(size - len(data)))
    with pytest.raises(UnsafeFile, match="is a virtual dataset"):
        View(view)


def test_a_view_that_is_larger_than_memory_should_hold(view: Path) -> None:
    size = schema.MAX_VIEW + 1
    with open(view, "r+b") as file:
        file.truncate(size)  # a hole: it costs the stranger nothing
        file.write(seal(bytes(512))[:30] + f"{'0' * 18} {size}\n".encode().ljust(482, b"\0"))
        line = f"featurecache 1 {'0' * 32} {size}\n".encode()
        file.seek(0)
        file.write(line.ljust(512, b"\0"))
    refused(view, "at most 4,294,967,296 are read", UnsafeFile)


def test_a_result_beyond_the_memory_of_this_machine_is_refused(view: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("featurecache.store.view._memory_bytes", lambda: 50)
    with pytest.raises(CacheError, match=r"9 rows of \[5, 4\] take 720 bytes .* this machine has 50"):
        View(view).tensor("tokens")


def test_a_copied_cache_reads_and_trains_like_the_original(sound: Path, view: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    assert np.array_equal(open_view("set", view.parents[1]).array("tokens"), View(sound).array("tokens"))


# ---------------------------------------------------------------------------------------------- files and folders


def test_pipes_folders_and_devices_are_refused_instead_of_waited_for(view: Path) -> None:
    view.unlink()
    os.mkfifo(view)
    refused(view, "not a plain file", UnsafeFile)
    view.unlink()
    view.mkdir()
    refused(view, "not a plain file", UnsafeFile)


@pytest.mark.parametrize("what", ["view", "shard", "output", "spec.json", "plan.json", "store"])
def test_symbolic_links_are_refused_at_every_level(view: Path, tmp_path: Path, what: str) -> None:
    store = view.parent
    (store / "plan.json").write_text("{}")
    place = {"view": view, "shard": next((store / "cls").glob("*.h5")), "output": store / "cls", "store": store}.get(
        what, store / what
    )
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


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("weights", 5), ("architecture", []), ("preprocess", None), ("image_size", "88"), ("image_size", [8]),
        ("image_size", [8, -8]), ("image_size", [True, 8]), ("precision", "fp64"), ("precision", []), ("dtype", {}),
        ("generation", "0"), ("format", None), ("position_embeddings", 3),
    ],
)  # fmt: skip
def test_a_spec_of_other_types_is_no_spec(view: Path, field: str, value) -> None:  # type: ignore[no-untyped-def]
    record = json.loads(spec_file(view).read_text())
    record["spec"][field] = value
    spec_file(view).write_text(json.dumps(record))
    with pytest.raises(CacheError, match="an extraction spec"):
        open_store(view.parent)


@pytest.mark.parametrize(
    "provenance",
    [
        [], {"request": []}, {"request": {"name": 3}}, {"request": {"name": "a", "trust_code": True}},
        {"request": {"seed": 1}}, {"backbone": {}}, {"versions": []},
    ],
)  # fmt: skip
def test_a_provenance_that_is_none(view: Path, provenance) -> None:  # type: ignore[no-untyped-def]
    record = json.loads(spec_file(view).read_text())
    spec_file(view).write_text(json.dumps({**record, "provenance": provenance}))
    with pytest.raises(CacheError, match="its provenance is not that of a store"):
        open_store(view.parent)


@pytest.mark.parametrize("plan", [{"cpu": 3}, {"cpu": {"batch_size": 10**9, "threads": 1}}, {"cpu": {"batch_size": 1}}])
def test_a_plan_that_would_fill_the_machine(view: Path, plan) -> None:  # type: ignore[no-untyped-def]
    (view.parent / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(CacheError, match="has no batch_size and threads"):
        open_store(view.parent).plan  # noqa: B018


def test_a_pipe_in_place_of_a_record_is_not_waited_for(view: Path) -> None:
    spec_file(view).unlink()
    os.mkfifo(spec_file(view))
    with pytest.raises(UnsafeFile, match="not a plain file"):
        open_store(view.parent)


def test_a_store_of_another_spec_stops_nobody(view: Path) -> None:
    spec_file(view).write_text("[" * 100_000)
    assert create_store(view.parents[1], "tiny", make_spec(dtype="float32"), {}).path.is_dir()


assert CLS and TOKENS


# ---------------------------------------------------------------------------------------------- HDF5 itself


@pytest.mark.parametrize("name", ["segfault", "endless"])
def test_what_ends_or_stops_hdf5_2_0_is_refused_and_we_live_on(view: Path, monkeypatch, name: str) -> None:  # type: ignore[no-untyped-def]
    """Two finds of `test_fuzz`; their hashes are right."""
    monkeypatch.setattr(guard, "SECONDS", 1)
    shutil.copy(Path(__file__).parent / "hostile" / f"{name}.h5", view)
    with pytest.raises(CacheError) as caught:
        View(view)
    if h5py.version.hdf5_version_tuple[:2] == (2, 0):
        assert re.search(r"crashed on it \(signal 11\)|took too long to read it", str(caught.value))
