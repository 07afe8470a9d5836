"""Damaged objects of a cache in object storage, servers that fail, addresses that are refused."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from support.builders import CLS, ORDER, TOKENS, features
from support.command import call
from support.object_storage import BUCKET, BUSY, DENIED, KEY, SECRET, copied, machine
from support.remote_store import feature_file, flipped, key_of, make_remote

import featurecache
from featurecache.errors import BadOption, CacheError, DamagedFile, StorageError, UnsafeFile
from featurecache.files import mirror, storage
from featurecache.files.mirror import Mirror, is_placeholder
from featurecache.maintenance.import_features import import_view
from featurecache.maintenance.verify import verify
from featurecache.store.store import cache_folder, stores


def test_records_of_the_mirror_that_are_damaged_are_made_again(server):
    view = make_remote(server)
    base = mirror.mirror_of(view.path).base
    (base / "objects.json").write_text("{")
    assert np.array_equal(featurecache.open_view("set", server.address)["cls"], features(ORDER, CLS))
    (base / "mirror.json").write_text("{}")
    shutil.rmtree(base)
    assert np.array_equal(featurecache.open_view("set", server.address)["cls"], features(ORDER, CLS))


# -- damage


def test_a_shard_that_is_damaged_there_is_refused_by_its_address(server):
    make_remote(server)
    key = key_of(server, "/cls/")
    server.write(key, flipped(server.objects()[key], 3000))
    with machine("b"):
        view = featurecache.open_view("set", server.address)
        with pytest.raises(DamagedFile, match=f"s3://{BUCKET}/{key} is damaged: its content does not match the hash"):
            view["cls"]
        assert is_placeholder(view.store / "cls" / key.rpartition("/")[2])
        assert np.array_equal(view["tokens"], features(ORDER, TOKENS))
    report = verify(cache_folder(server.address))  # also where a good copy is
    assert [damage.path.name for damage in report.damages] == [key.rpartition("/")[2]]
    assert call("verify", "--cache", server.address).exit_code == 1


def test_verify_reads_what_is_there_and_not_the_copy_of_this_machine(server):
    """A bit that has flipped on the server's disk: the object's version is the one that is here."""
    there = mirror.mirror_of(make_remote(server).path)
    key = key_of(server, "/cls/")
    server.write(key, flipped(server.objects()[key]))
    with there._objects() as objects:
        objects[key.removeprefix("caches/main/")][0] = storage.stat_object(f"s3://{BUCKET}/{key}").version
    (damage,) = verify(cache_folder(server.address)).damages
    assert damage.path.name == key.rpartition("/")[2]


def test_a_shard_that_came_damaged_is_fetched_once_more(server):
    make_remote(server)
    sent: list[str] = []

    def damage(key: str, body: bytes) -> bytes:
        sent.append(key)
        return flipped(body) if "/cls/" in key and sent.count(key) == 1 else body

    with machine("b"):
        server.changed = damage
        assert np.array_equal(featurecache.open_view("set", server.address)["cls"], features(ORDER, CLS))
    assert sum("/cls/" in key for key in sent) == 4  # two shards, twice each


def test_a_view_that_is_damaged_there_is_refused(server):
    make_remote(server)
    key = key_of(server, "/set.h5")
    server.write(key, flipped(server.objects()[key]))
    with machine("b"), pytest.raises(DamagedFile, match=r"set\.h5 is damaged"):
        featurecache.open_view("set", server.address)


def test_a_shard_that_is_cut_or_gone_there(server):
    make_remote(server)
    cut, gone = [key for key in server.objects() if "/cls/" in key][:2]
    with machine("b"):
        view = featurecache.open_view("set", server.address)
        whole = server.objects()[cut]
        server.write(cut, whole[:700])
        with pytest.raises(DamagedFile, match="came with 700 bytes"):
            view["cls"]
        with pytest.raises(CacheError, match="has 700 bytes, not"):
            featurecache.open_view("set", server.address)
    server.write(cut, whole)
    with machine("c"):
        server.remove(gone)
        with pytest.raises(CacheError, match="is missing"):
            featurecache.open_view("set", server.address)


def test_a_shard_that_is_removed_between_listing_and_reading(server):
    make_remote(server)
    with machine("b"):
        view = featurecache.open_view("set", server.address)
        server.remove(key_of(server, "/cls/"))
        with pytest.raises(DamagedFile, match=r"is not there any more\. Run the extraction again"):
            view["cls"]


def test_a_shard_that_was_written_again_there_is_fetched_again(server):
    make_remote(server)
    key = key_of(server, "/cls/")
    whole = server.objects()[key]
    featurecache.open_view("set", server.address)["cls"]
    server.write(key, flipped(whole, 3000))
    with pytest.raises(DamagedFile):
        featurecache.open_view("set", server.address)["cls"]
    server.write(key, whole)
    assert np.array_equal(featurecache.open_view("set", server.address)["cls"], features(ORDER, CLS))


@pytest.mark.parametrize("name", ["../../escape.h5", "tiny-1/../../../escape.h5", "a/./spec.json"])
def test_a_name_that_leads_out_is_refused(server, tmp_path, name):
    server.write(f"caches/main/{name}", b"x")
    with pytest.raises(UnsafeFile, match="which is no path below it"):
        cache_folder(server.address)
    assert not list(Path(os.environ["FEATURECACHE_STATE"]).rglob("escape*"))


def test_strange_objects_are_left_alone(server):
    make_remote(server)
    for name in ("files.sqlite", "tiny-x/.shared-1", "notes.txt", "a/b/c/d.h5", "dir/"):
        server.write(f"caches/main/{name}", b"x")
    server.write("caches/main2/other/spec.json", b"x")  # a neighbour whose name begins alike
    with machine("b"):
        folder = cache_folder(server.address)
        assert sorted(path.name for path in folder.iterdir()) == [next(stores(folder)).path.name]


# -- servers that do not answer, and addresses that are none


def test_a_server_that_is_busy_now_and_then_is_asked_again(server, tmp_path, monkeypatch):
    monkeypatch.setattr("botocore.retryhandler.random.random", lambda: 0.0)  # it waits no time
    import_view(feature_file(tmp_path), "v", cache=server.address)
    asked: list[tuple[str, str]] = []

    def busy_at_first(method: str, key: str):  # type: ignore[no-untyped-def]
        asked.append((method, key))
        return BUSY if asked.count((method, key)) == 1 else None

    server.rule = busy_at_first
    with machine("b"):
        assert np.array_equal(featurecache.open_view("v", server.address)["vector"], np.load(tmp_path / "x.npy"))


def test_a_server_that_stays_busy_is_one_sentence(server, tmp_path, monkeypatch):
    monkeypatch.setattr("botocore.retryhandler.random.random", lambda: 0.0)
    server.rule = lambda method, key: BUSY if method == "PUT" and "/vector/" in key else None
    with pytest.raises(StorageError, match=r"as it should, after all tries of the library .* try again") as caught:
        import_view(feature_file(tmp_path), "v", cache=server.address)
    assert str(caught.value).count("\n") == 0 and "give the same command again" in str(caught.value)
    server.rule = lambda method, key: None
    assert import_view(tmp_path / "x.npy", "v", cache=server.address).new_rows == 0  # it was committed here
    assert verify(copied(server, tmp_path / "copy")).damages == ()


def test_no_server_and_no_bucket_and_no_permission(server, tmp_path, monkeypatch):
    with pytest.raises(StorageError, match="there is no bucket absent for s3://absent/cache"):
        cache_folder("s3://absent/cache")
    with pytest.raises(StorageError, match="there is no bucket absent"):
        import_view(feature_file(tmp_path), "v", cache="s3://absent/cache")
    server.rule = lambda method, key: DENIED
    with pytest.raises(StorageError, match="no permission for s3://bucket/caches/main: PermissionError: Access Denied"):
        cache_folder(server.address)
    server.rule = lambda method, key: DENIED if method == "PUT" else None
    with pytest.raises(StorageError, match=r"no permission for s3://bucket/caches/main/imported-\w+/spec.json"):
        import_view(tmp_path / "x.npy", "v", cache=server.address)
    answer = call("ls", "--cache", "s3://absent/cache")
    assert answer.exit_code == 1 and len(answer.stderr.splitlines()) == 1


def test_a_server_that_is_not_there(server, monkeypatch):
    import s3fs

    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    with pytest.raises(StorageError, match=r"after all tries of the library .* Could not connect"):
        cache_folder(server.address)


def test_without_credentials_it_says_where_they_are_looked_for(server, monkeypatch, tmp_path):
    server.rule = lambda method, key: DENIED
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setattr(storage, "_connected", storage._connected.__wrapped__)
    with pytest.raises(StorageError, match=r"no permission .* Credentials are those that the library finds \("):
        cache_folder(server.address)


def test_credentials_are_written_nowhere(server, tmp_path, monkeypatch):
    import_view(feature_file(tmp_path), "v", cache=server.address)
    with machine("b"):
        featurecache.open_view("v", server.address)["vector"]
    server.rule = lambda method, key: DENIED
    with pytest.raises(StorageError) as caught:
        cache_folder(server.address)
    state = os.environ["FEATURECACHE_STATE"]
    folders = [tmp_path, Path(state), Path(f"{state}-b")]  # another test's may hold the sources of this one
    written = [path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert len(written) > 5
    for secret in (KEY, SECRET):
        assert secret not in str(caught.value)
        assert not any(secret.encode() in data for data in [*written, *server.objects().values()])


@pytest.mark.parametrize("address", ["s3://", "s3://key:secret@bucket/x", "s3://bucket/../x", "gs://"])
def test_what_is_no_address_of_a_folder_is_refused_without_showing_a_secret(address):
    with pytest.raises(BadOption, match=r"expected .*://BUCKET/FOLDER\. Credentials are no part of it") as caught:
        cache_folder(address)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("address", ["https://example.org/cache", "abfs://container/cache"])
def test_another_kind_of_address_is_no_cache(address):
    with pytest.raises(
        BadOption, match=f"the cache is a folder, s3://BUCKET/FOLDER or gs://BUCKET/FOLDER, not {address}"
    ):
        cache_folder(address)


def test_without_the_extra_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    monkeypatch.setattr(storage, "_connected", storage._connected.__wrapped__)
    with pytest.raises(BadOption, match=r'pip install "featurecache\[remote\]"'):
        cache_folder("s3://bucket/cache")


def test_without_a_home_it_says_where_the_state_goes(monkeypatch):
    monkeypatch.setattr(mirror, "state_folder", lambda: None)
    with pytest.raises(BadOption, match=r"set \$FEATURECACHE_STATE"):
        Mirror.of("s3://bucket/cache", "cache")
