"""Extractions into object storage: two machines at once, killed at each upload, the whole way to a trained head."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from support.caches import Killed
from support.checkpoints import save_vit
from support.command import call
from support.forks import Forks
from support.object_storage import DENIED, Answer, Server, copied, killed_at_upload, machine
from support.pictures import image_folder
from support.worker_nets import wait_until

import featurecache
from featurecache.errors import CacheError, Stopped, StorageError
from featurecache.extraction import plan, run
from featurecache.extraction.forward import ForwardRunner
from featurecache.maintenance.verify import verify
from featurecache.store import store as store_module
from featurecache.store.store import Store, cache_folder, stores
from featurecache.store.view import View

IMAGES = 10


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    save_vit(folder / "vit", hidden_size=32, num_hidden_layers=1)
    image_folder(folder / "data", IMAGES)
    return folder


def extract(home: Path, cache: str | Path, outputs: str = "cls", **more):  # type: ignore[no-untyped-def]
    options = {"backbone": home / "vit", "cache": cache, "outputs": outputs, "name": "set", **more}
    return plan.extract(home / "data", **options)


def only_store(cache: Path) -> Store:
    (store,) = stores(cache)
    return store


def meanwhile(monkeypatch: pytest.MonkeyPatch, name: str, work) -> None:  # type: ignore[no-untyped-def]
    """``work`` is done by another machine just before a function of `run` is called for the first time."""
    real, done = getattr(run, name), []

    def after(*words, **options):  # type: ignore[no-untyped-def]
        if not done:
            done.append(True)
            with machine("other"):
                work()
        return real(*words, **options)

    monkeypatch.setattr(run, name, after)


@pytest.mark.parametrize("when", ["create_store", "push", "write_view_of"])
def test_two_machines_at_once_finish_and_the_view_has_the_outputs_of_both(server, home, tmp_path, monkeypatch, when):
    others: list[int] = []
    more = {} if when == "write_view_of" else {"batch_size": 3}  # then the plan is there
    meanwhile(monkeypatch, when, lambda: others.append(extract(home, server.address, "tokens", **more).computed))
    mine = extract(home, server.address, "cls")
    assert set(mine.outputs) == {"cls", "tokens"} and others == [IMAGES]
    assert mine.computed == (IMAGES if when == "write_view_of" else 0)  # what follows from their tokens is derived
    cache = copied(server, tmp_path / "copy")
    view = featurecache.open_view("set", cache)
    assert set(view.outputs) == {"cls", "tokens"} and verify(cache).damages == ()
    alone = featurecache.open_view(extract(home, tmp_path / "alone", "cls,tokens", batch_size=3).view)
    for output in ("cls", "tokens"):
        assert np.allclose(view[output], alone[output], rtol=1e-2, atol=1e-3)
    store, layout = only_store(cache), view.info("cls")
    batch = store.plan["cpu"]["batch_size"]  # type: ignore[index]
    notes = [json.loads(shard.notes["plan"]) for shard in store.shards(layout)]
    assert {note["batch_size"] for note in notes} == {batch}
    assert (batch == 3) == bool(more)


def test_the_same_images_on_two_machines_are_rows_of_the_first(server, home, tmp_path, monkeypatch):
    meanwhile(monkeypatch, "write_view_of", lambda: extract(home, server.address, "cls"))
    extract(home, server.address, "cls")
    cache = copied(server, tmp_path / "copy")
    assert verify(cache).damages == () and len(list(cache.glob("*/cls/*.h5"))) == 1


def test_killed_before_or_behind_any_upload_the_same_command_goes_on(server, home, tmp_path):
    whole = extract(home, tmp_path / "alone", batch_size=4)
    for where in ("before", "behind"):
        step, killed = 0, True
        while killed:
            step, killed = step + 1, False
            server.empty()
            with machine(f"{where}{step}"):
                try:
                    with killed_at_upload(step, where):
                        extract(home, server.address, batch_size=4)
                except Killed:
                    killed = True
                cache = copied(server, tmp_path / "copy")
                seen = [View(path) for store in stores(cache) for path in store.views()] if cache.exists() else []
                assert not cache.exists() or verify(cache).damages == (), (where, step)
                assert all(np.array_equal(view["cls"], View(whole.view)["cls"]) for view in seen)
                again = extract(home, server.address, batch_size=4)
                assert again.computed in (0, IMAGES)
            cache = copied(server, tmp_path / "copy")
            assert np.array_equal(featurecache.open_view("set", cache)["cls"], View(whole.view)["cls"])
            assert verify(cache).damages == () and len(list(cache.glob("*/cls/*.h5"))) == 1
        assert step > 5


def test_a_server_that_takes_no_view_ever_ends_it(server, home, monkeypatch):
    monkeypatch.setattr(run, "ROUNDS", 2)
    never = ("412 Precondition Failed", "PreconditionFailed", "")
    server.rule = lambda method, key: never if method == "PUT" and key.endswith("set.h5") else None
    with pytest.raises(CacheError, match="others were quicker 2 times with what this run writes"):
        extract(home, server.address)


def test_what_could_not_be_uploaded_is_not_computed_again(server, home, tmp_path):
    server.rule = lambda method, key: DENIED if method == "PUT" and "/cls/" in key else None
    with pytest.raises(StorageError, match="no permission for s3://bucket/caches/main/vit-"):
        extract(home, server.address)
    server.rule = lambda method, key: None
    assert extract(home, server.address).computed == 0
    assert verify(copied(server, tmp_path / "copy")).damages == ()


def test_a_shard_is_there_as_soon_as_it_is_committed(server, home, tmp_path, monkeypatch):
    """A run that is stopped uploads no more."""
    call_, passes = ForwardRunner.__call__, []

    def stopped(*words, **options):  # type: ignore[no-untyped-def]
        passes.append(1)
        if len(passes) == 6:  # behind the probe images and some of the ten
            wait_until(lambda: any("/cls/" in key for key in server.objects()), 20)
            raise KeyboardInterrupt
        return call_(*words, **options)

    monkeypatch.setattr(store_module, "SHARD_ROWS", 2)
    monkeypatch.setattr(ForwardRunner, "__call__", stopped)
    with pytest.raises(Stopped):
        extract(home, server.address, batch_size=2)
    committed = {path.name: path.read_bytes() for path in cache_folder(server.address).glob("*/cls/*.h5")}
    assert committed == {key.rpartition("/")[2]: data for key, data in server.objects().items() if "/cls/" in key}
    assert 0 < len(committed) < IMAGES // 2


def test_a_shard_that_was_removed_there_is_computed_again(server, home):
    extract(home, server.address)
    server.remove(next(key for key in server.objects() if "/cls/" in key))
    assert extract(home, server.address).computed == IMAGES
    with machine("other"):
        assert featurecache.open_view("set", server.address)["cls"].shape == (IMAGES, 32)


def test_from_images_there_to_a_head(server, home, tmp_path, monkeypatch):
    for path in (home / "data").rglob("*.png"):
        server.write(f"chest/{path.relative_to(home / 'data')}", path.read_bytes())
    monkeypatch.chdir(tmp_path)
    options = ("--data", "s3://bucket/chest", "--cache", server.address)
    made = call("extract", "--backbone", home / "vit", "--outputs", "cls", *options)
    assert made.exit_code == 0, made.stderr
    assert f"view       vit/chest in {server.address}/vit-" in made.stdout
    assert f"--cache {server.address}" in made.stderr
    with machine("other"):
        why = call("why", "--backbone", home / "vit", "--outputs", "cls", *options)
        assert why.exit_code == 0, why.stderr
        shown = call("info", "chest", "--cache", server.address, "--json")
        assert json.loads(shown.stdout)["source"]["data"] == "s3://bucket/chest"
        words = ("--head", "linear", "--epochs", 2, "--features", "chest", "--cache", server.address)
        trained = call("train-head", *words, "--quiet")
        assert trained.exit_code == 0, trained.stderr
        assert call("leaks", "chest", "--cache", server.address).exit_code == 0
        for images, count in (("s3://bucket/chest/ill/000.png", 1), ("s3://bucket/chest", IMAGES)):
            answer = call("predict", "--run", "runs/chest-linear-1", images, "--json")
            assert answer.exit_code == 0, answer.stderr
            names = [each["image"] for each in json.loads(answer.stdout)["predictions"]]
            assert len(names) == count and names[0] == "s3://bucket/chest/ill/000.png"
    config = Path("runs/chest-linear-1/config.json").read_text()
    assert json.loads(config)["view"]["path"].startswith(f"{server.address}/vit-")
    assert os.environ["FEATURECACHE_STATE"] not in config
    with machine("third"):  # which has seen nothing of the cache
        answer = call("predict", "--run", "runs/chest-linear-1", "s3://bucket/chest/ill/000.png")
        assert answer.exit_code == 0, answer.stderr
        state = Path(os.environ["FEATURECACHE_STATE"])
        assert [path.name for path in state.rglob("canary.safetensors")] == ["canary.safetensors"]  # it was compared
    with machine("fourth"):
        words = ("runs/chest-linear-1", "--features", "chest", "--cache", server.address)
        answer = call("evaluate", "--run", *words)
        assert answer.exit_code == 0 and "was trained on is gone" not in answer.output, answer.stderr


@pytest.fixture
def forks(server: Server):  # type: ignore[no-untyped-def]
    forks = Forks()
    yield forks
    forks.close()


def test_processes_that_are_killed_and_two_at_once(server, home, tmp_path, forks):
    """SIGKILL, by the server, when an upload begins or has been carried out; then two processes at the same time."""
    words = {"address": server.address, "data": str(home / "data"), "backbone": str(home / "vit")}
    child: list[int] = []
    for kind, attribute in (("/cls/", "lost"), ("set.h5", "rule"), ("set.h5", "lost")):

        def kill(method: str, key: str, kind: str = kind) -> Answer | None:
            if method != "PUT" or kind not in key:
                return None
            os.kill(child[-1], signal.SIGKILL)
            return DENIED  # what has come of it is not stored

        setattr(server, attribute, kill)
        state = str(tmp_path / "state")
        child.append(forks.start("extract_into_storage", state=state, cache=str(tmp_path), **words, outputs="cls"))
        assert forks.wait(child[-1]).killed, (kind, attribute)
        server.reset()
        cache = copied(server, tmp_path / "copy")
        assert verify(cache).damages == (), (kind, attribute)
    running = [
        forks.start(
            "extract_into_storage", state=str(tmp_path / outputs), cache=str(tmp_path), **words, outputs=outputs
        )
        for outputs in ("cls,mean", "tokens")
    ]
    assert [forks.wait(number).error for number in running] == [None, None]
    cache = copied(server, tmp_path / "copy")
    assert set(featurecache.open_view("set", cache).outputs) == {"cls", "mean", "tokens"}
    assert verify(cache).damages == ()
