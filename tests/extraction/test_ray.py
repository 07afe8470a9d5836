"""Actors of a real Ray cluster on this machine: the same bytes, and what is lost with a worker, a node, the driver."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.object_storage import Server, copied, machine
from support.pictures import image_folder
from support.worker_nets import (
    BACKBONE,
    CountingWorker,
    computed_by,
    kill_a_worker,
    meanwhile,
    passes_by,
    shard_bytes,
    wait_until,
    write_slow_net,
)

import featurecache
from featurecache.errors import BadOption
from featurecache.extraction import ray_actors
from featurecache.extraction.pipeline import ShardPlan
from featurecache.maintenance.verify import verify
from featurecache.store import store

TESTS = Path(__file__).parents[1]
pytest.importorskip("ray", reason="Ray is not installed: pip install ray")


@contextmanager
def own_sigterm() -> Iterator[None]:
    """Ray's nodes leave a handler behind that ends the process."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A cluster of one node with two cores, and this process as its driver."""
    import ray
    from ray.cluster_utils import Cluster

    # of its processes: modules of the tests, no report to Ray's makers
    with own_sigterm(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS), str(TESTS.parent)]))
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "object_store_memory": 100 << 20})
        ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
        yield cluster
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In each actor, and shards of two images."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(store, "SHARD_ROWS", 2)
    with own_sigterm():
        yield
    torch.set_num_threads(before)


@pytest.mark.integration
def test_two_actors_write_the_bytes_of_one_process_though_one_is_killed(cluster: Any, here: Path) -> None:
    write_slow_net(0)
    data = image_folder(here / "data", 14)
    (data / "ill" / "004.png").write_bytes(b"no image")
    one = featurecache.extract(data, cache="one", **BACKBONE)
    write_slow_net(0.3)
    with meanwhile(lambda: len(computed_by()) == 2 and len(shard_bytes("two")) > 1, kill_a_worker):
        two = featurecache.extract(data, cache="two", engine="ray", **BACKBONE)
    assert len(computed_by()) in (2, 3)  # that in the place of the killed one may have found nothing left to do
    assert shard_bytes("two") == shard_bytes("one") and len(shard_bytes("one")) == 7
    assert (two.images, two.failed) == (13, one.failed) and len(one.failed) == 1
    assert torch.equal(featurecache.open_view(two.view).tensor("gap"), featurecache.open_view(one.view).tensor("gap"))


@contextmanager
def driver(
    cluster: Any, *options: str, rows: int = 2, cache: str = "c", data: str = "data"
) -> Iterator[subprocess.Popen[bytes]]:
    """The command in a process of its own, in shards of ``rows`` images; what it prints is in the file ``said``."""
    code = f"from featurecache.store import store; store.SHARD_ROWS = {rows}; import cli; cli.main()"
    words = ["--backbone", BACKBONE["backbone"], "--random-weights", "--outputs", "gap", "--batch-size", "2"]
    command = [sys.executable, "-c", code, "extract", "--data", data, *words, "--cache", cache, "--engine", "ray"]
    environment = {**os.environ, "PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1"}
    with open("said", "w") as said:
        running = subprocess.Popen(
            [*command, "--address", cluster.address, *options], env=environment, stdout=said, stderr=said
        )
    try:
        yield running
    finally:
        running.kill()
        running.wait()


@pytest.mark.slow
def test_a_killed_driver_is_started_again_and_its_shards_are_kept(cluster: Any, here: Path) -> None:
    write_slow_net(0.3)
    image_folder(here / "data", 24)
    with driver(cluster):
        wait_until(lambda: len(shard_bytes("c")) > 1)
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in computed_by()))
    committed = shard_bytes("c")
    assert 1 < len(committed) < 12
    with driver(cluster) as running:
        assert running.wait() == 0, Path("said").read_text()
    assert f"{24 - 2 * len(committed)} computed in" in Path("said").read_text()
    assert committed.items() <= shard_bytes("c").items() and list(Path("c").rglob("*.tmp")) == []


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 1)])
def test_stopped_actors_commit_what_they_have_computed(cluster: Any, here: Path, number: int, code: int) -> None:
    """In the midst of a call of four batches."""
    write_slow_net(0.3)
    image_folder(here / "data", 64)
    with driver(cluster, rows=8) as running:
        wait_until(lambda: shard_bytes("c"))
        before = passes_by(running.pid)
        wait_until(lambda: sum(passes_by(running.pid)[each] >= before[each] + 3 for each in before) == 2)
        committed = 8 * len(shard_bytes("c"))
        running.send_signal(number)
        assert running.wait(timeout=60) == code
    (last,) = [line for line in Path("said").read_text().splitlines() if line.startswith("stopped. ")]
    assert int(last.split()[1]) > committed and list(Path("c").rglob("*.tmp")) == []


@pytest.mark.slow
def test_a_node_that_joins_computes_too_and_one_that_leaves_ends_nothing(cluster: Any, here: Path) -> None:
    write_slow_net(1.0)
    image_folder(here / "data", 120)
    with driver(cluster, "--actors", "3", "--forward", "library") as running:
        wait_until(lambda: len(computed_by() - {running.pid}) == 2)
        node = cluster.add_node(num_cpus=1)
        wait_until(lambda: len(computed_by() - {running.pid}) == 3)
        cluster.remove_node(node, allow_graceful=False)
        Path("seconds").write_text("0")
        assert running.wait() == 0, Path("said").read_text()
    assert "120 images, 120 computed in" in Path("said").read_text()
    assert len(featurecache.open_view("data", "c").tensor("gap")) == 120


@pytest.mark.slow
@pytest.mark.parametrize("data", ["data", "s3://bucket/pictures", "s3://bucket/list.csv", "s3://bucket/set.tar"])
def test_nodes_with_mirrors_of_their_own_fill_a_cache_in_object_storage(here: Path, server: Server, data: str) -> None:
    """The actors see another state folder than the driver, as on another machine."""
    from ray.cluster_utils import Cluster

    write_slow_net(0)
    one = featurecache.extract(image_folder(here / "data", 14), cache="one", **BACKBONE)
    names = [str(path.relative_to("data")) for path in sorted(Path("data").rglob("*.png"))]
    with tarfile.open("set.tar", "w") as tar:
        for name in names:
            server.write(f"pictures/{name}", Path("data", name).read_bytes())
            tar.add(Path("data", name), name)
    server.write("list.csv", "\n".join(["path", *(f"pictures/{name}" for name in names)]).encode())
    server.write("set.tar", Path("set.tar").read_bytes())
    with machine("node"), pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS), str(TESTS.parent)]))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "object_store_memory": 100 << 20})
        mirrors = Path(os.environ["FEATURECACHE_STATE"]) / "remote"
    try:
        with driver(nodes, "--name", "data", cache=server.address, data=data) as running:
            assert running.wait() == 0, Path("said").read_text()
    finally:
        nodes.shutdown()
    assert "14 computed in" in Path("said").read_text() and len(list(mirrors.glob("*/main/*/gap/*.h5"))) == 7
    if data != "data":  # what the actors read, and nothing else, lies in the mirror of their machine
        fetched = [path for path in mirrors.rglob("*") if path.suffix in (".png", ".tar") and path.stat().st_mtime_ns]
        assert len(fetched) == (1 if data.endswith(".tar") else 14)
    assert verify(copied(server, here / "copy")).damages == ()
    there = featurecache.open_view("data", server.address)
    assert torch.equal(there.tensor("gap"), featurecache.open_view(one.view).tensor("gap"))


@pytest.mark.slow
def test_10_000_shards_go_through_actors(cluster: Any, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_actors, "ShardWorker", CountingWorker)
    monkeypatch.setattr(ray_actors.WorkerSetup, "of", lambda *words: str(here))
    job: Any = SimpleNamespace(
        digests=np.array([f"{k:032x}" for k in range(10_000)], "S32"), images_per_s=None, failures={}, written=[],
        compute=SimpleNamespace(batch_size=1, device=torch.device("cpu")), threads=1, fail_fast=False,
        timings=SimpleNamespace(add=lambda other: None), store=SimpleNamespace(path=here),
    )  # fmt: skip
    done: list[int] = []
    units = [ShardPlan(np.array([k]), ()) for k in range(10_000)]
    ray_actors.RayEngine().run(job, units, done.append)
    assert sum(done) == len(done) == 10_000
    counted = [int(line) for file in here.glob("rows-*") for line in file.read_text().split()]
    assert sorted(counted) == list(range(10_000)) and len(list(here.glob("rows-*"))) == 2


def test_a_cluster_that_is_not_there_is_said(cluster: Any) -> None:
    import ray

    with pytest.raises(BadOption, match=r"no node of the cluster has 64 CPU for an actor"):
        ray_actors._room({"CPU": 64.0, "GPU": 0.0})
    wait_until(lambda: ray_actors._room({"CPU": 1.0, "GPU": 0.0}) == 2)  # a node of another test may leave late
    assert ray.is_initialized()
