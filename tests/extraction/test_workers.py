"""Shards computed by other processes: who gets which, what a lost one costs, and the same bytes as from one."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.pictures import image_folder
from support.user_nets import CNN
from support.worker_nets import (
    BACKBONE,
    computed_by,
    kill_a_worker,
    meanwhile,
    passes_by,
    shard_bytes,
    wait_until,
    write_slow_net,
)

import featurecache
from featurecache.errors import (
    BadOption,
    CacheError,
    Drift,
    FeatureCacheError,
    ForwardUnavailable,
    UnreadableImage,
    WorkersLost,
)
from featurecache.extraction import pipeline, plan, workers
from featurecache.extraction.canary import PROBES
from featurecache.extraction.forward import ForwardRunner
from featurecache.extraction.pipeline import ShardPlan
from featurecache.extraction.workers import ShardResult, WorkerLost, calls_of, run_workers
from featurecache.sources import open_source
from featurecache.store import store


def units(*lengths: int) -> list[ShardPlan]:
    ends = np.cumsum(lengths)
    return [ShardPlan(np.arange(end - n, end), ()) for n, end in zip(lengths, ends, strict=True)]


def job(images: int, rate: float | None = None, batch: int = 1) -> Any:
    """As much of a job as dealing out its shards needs."""
    timings = SimpleNamespace(add=lambda other: None)
    digests = np.array([f"{k:032x}" for k in range(images)], "S32")
    compute = SimpleNamespace(batch_size=batch, device=torch.device("cpu"))
    return SimpleNamespace(
        digests=digests, images_per_s=rate, compute=compute, failures={}, written=[], timings=timings, fail_fast=False
    )


class Fake:
    """A worker that notes what it was given; ``lost``: calls over which it dies."""

    busy, most = 0, 0  # calls at once, of all workers

    def __init__(self, lost: int = 0, starts: bool = True, answer: FeatureCacheError | None = None) -> None:
        self.lost, self.starts, self.answer = lost, starts, answer
        self.calls, self.started, self.closed = list[list[ShardPlan]](), 0, False

    def start(self) -> Any:
        self.started += 1
        if not self.starts:
            while not self.closed:
                time.sleep(0.001)
            raise WorkerLost("closed")
        return ShardResult()

    def compute(self, given: list[ShardPlan]) -> Any:
        Fake.busy += 1
        Fake.most = max(Fake.most, Fake.busy)
        Fake.busy -= 1
        if self.lost:
            self.lost -= 1
            raise WorkerLost("killed")
        self.calls.append(given)
        return self.answer or ShardResult(timings=object(), images=sum(len(unit.rows) for unit in given))  # type: ignore[arg-type]

    def stop(self) -> None:
        self.stopped = True

    def close(self) -> None:
        self.closed = True


class Busy(Fake):
    """A worker whose call ends ``takes`` seconds after it was stopped."""

    def __init__(self, takes: float) -> None:
        super().__init__()
        self.takes, self.stopped = takes, False

    def compute(self, given: list[ShardPlan]) -> Any:
        while not (self.stopped or self.closed):
            time.sleep(0.001)
        end = time.monotonic() + self.takes
        while not self.closed and time.monotonic() < end:
            time.sleep(0.001)
        return super().compute(given)


def rows_of(*fakes: Fake) -> list[int]:
    return sorted(row for fake in fakes for call in fake.calls for unit in call for row in unit.rows.tolist())


def test_10_000_shards_are_dealt_out_a_few_at_a_time() -> None:
    fakes, done = [Fake() for _ in range(4)], list[int]()
    run_workers(job(10_000), units(*[1] * 10_000), done.append, fakes)
    assert rows_of(*fakes) == list(range(10_000)) and sum(done) == 10_000
    assert Fake.most <= 4 and all(fake.closed for fake in fakes)


def test_a_gpu_is_left_to_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    given, worker, freed = job(9), Fake(), list[int]()
    given.compute.device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append(worker.started))
    run_workers(given, units(*[1] * 9), str, [worker])
    assert freed == [0] and worker.started == 1


def test_a_call_is_half_a_minute_of_work_and_no_long_shard_holds_up_the_end() -> None:
    assert [len(call) for call in calls_of(units(*[100] * 5000), 1000.0, 10, 2)] == [300] * 16 + [200]
    short = calls_of(units(1000), None, 8, 2)
    assert [len(unit.rows) for call in short for unit in call] == [120] * 8 + [40]  # whole batches
    assert [len(call) for call in calls_of(units(50, 50), 1000.0, 8, 2)] == [1, 1]


def test_what_a_lost_worker_had_goes_to_one_that_is_free() -> None:
    fakes = [Fake(lost=2), Fake()]
    run_workers(job(40), units(*[1] * 40), str, fakes)
    assert rows_of(*fakes) == list(range(40)) and fakes[0].started >= 2


def test_a_worker_that_is_not_there_yet_keeps_nobody_waiting() -> None:
    there, coming = Fake(), Fake(starts=False)
    run_workers(job(10), units(*[1] * 10), str, [coming, there])
    assert rows_of(there) == list(range(10)) and coming.closed


def test_images_that_end_every_worker_are_named() -> None:
    with pytest.raises(WorkersLost, match=r"3 workers ended over the same 2 images \(killed\).*0000 to 0{31}1\."):
        run_workers(job(2, batch=2), units(2), str, [Fake(lost=9), Fake(lost=9)])


@contextmanager
def interrupts(*after: float) -> Iterator[None]:
    """Ctrl-C for this process, so many seconds after each other."""

    def send() -> None:
        for seconds in after:
            time.sleep(seconds)
            os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=send)
    thread.start()
    yield
    thread.join()


@pytest.mark.parametrize(
    ("takes", "most", "interrupted", "done"), [(0.1, 1.0, [0.2], 1), (9.0, 0.2, [0.2], 0), (9.0, 20.0, [0.2, 0.2], 0)]
)
def test_interrupted_workers_have_a_while_to_finish_and_a_second_one_ends_them(
    takes: float, most: float, interrupted: list[float], done: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the two calls in flight one is whole in time, unless the time is short or somebody has none."""
    monkeypatch.setattr(workers, "FINISH_SECONDS", most)
    fakes, advanced, start = [Busy(takes), Busy(9.0)], list[int](), time.monotonic()
    with pytest.raises(KeyboardInterrupt), interrupts(*interrupted):
        run_workers(job(9), units(*[1] * 9), advanced.append, fakes)
    assert len(advanced) == done and time.monotonic() - start < 5
    assert all(fake.stopped and fake.closed for fake in fakes)


def test_what_a_worker_finds_wrong_ends_the_run() -> None:
    fakes = [Fake(answer=Drift("on node7: other features")), Fake(starts=False)]
    with pytest.raises(Drift, match="node7"):
        run_workers(job(9), units(*[1] * 9), str, fakes)
    assert all(fake.closed for fake in fakes)


def test_under_fail_an_unreadable_image_ends_the_run() -> None:
    given, worker = job(9), Fake()
    given.fail_fast = True
    worker.compute = lambda units: ShardResult({3: "cut"}, timings=object())  # type: ignore
    with pytest.raises(UnreadableImage, match="cut"):
        run_workers(given, units(*[1] * 9), str, [worker])
    assert given.failures == {3: "cut"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"engine": "cluster"}, "local, processes, ray"),
        ({"actors": 2}, "--actors is of --engine processes and ray, not of local"),
        ({"engine": "processes", "address": "x"}, "--address is of --engine ray"),
        ({"engine": "processes"}, "--actors N says how many"),
        ({"engine": "processes", "actors": 0}, "more than 0"),
        ({"engine": "ray", "num_gpus": 0.5}, "the device here is cpu"),
    ],
)
def test_options_of_another_engine_are_refused(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(BadOption, match=words):
        featurecache.prepare("digits", backbone="vit-demo", device="cpu", cache=tmp_path, **options)


def test_without_ray_it_is_said_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BadOption, match=r"featurecache\[ray\]"):
        featurecache.prepare("digits", backbone="vit-demo", engine="ray", cache=tmp_path)


@pytest.mark.integration
def test_processes_share_the_cores_of_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.get_num_threads", lambda: 8)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    options = {"backbone": "vit-demo", "random_weights": True, "limit": 4, "cache": tmp_path}
    prepared = featurecache.prepare("digits", engine="processes", actors=3, **options)
    assert (prepared.plan["threads"], prepared.workers) == (2, 2)


def test_sources_that_hold_locks_and_open_files_go_to_other_processes(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    images = np.random.default_rng(0).integers(0, 256, (4, 9, 9), np.uint8)
    np.savez_compressed(tmp_path / "set.npz", train_images=images, train_labels=np.arange(4) % 2)
    data = [path.read_bytes() for path in sorted(image_folder(tmp_path / "d", 4).rglob("*.png"))]
    parquet.write_table(pyarrow.table({"image": data, "label": ["a", "b"] * 2}), tmp_path / "set.parquet")
    for name in ("set.npz", "set.parquet", "d"):
        source = open_source(tmp_path / name)
        source.read(0)
        carried = pickle.dumps(source.images)
        assert len(carried) < 2000, "no pixels"
        assert [np.array_equal(pickle.loads(carried).read(k), source.images.read(k)) for k in range(4)] == [True] * 4


def started(*words: str, rows: int, alone: bool = False) -> subprocess.Popen[str]:
    """The command in a process of its own, in shards of so many ``rows``; ``alone``: with a group of its own."""
    small = f"from featurecache.store import store; store.SHARD_ROWS = {rows}"
    command = [sys.executable, "-c", f"{small}\nimport cli\nif __name__ == '__main__': cli.main()"]
    net = "--backbone", BACKBONE["backbone"], "--random-weights", "--outputs", "gap", "--batch-size", "2"
    command += ["extract", "--data", "data", *net, "--cache", "c", "--forward", "library", *words]
    environment = {**os.environ, "PYTHONPATH": str(Path(featurecache.__file__).parents[1])}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=alone)


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "SHARD_ROWS", 2)


@pytest.mark.integration
@pytest.mark.usefixtures("small_shards")
def test_two_processes_write_the_bytes_of_one_though_one_is_killed(here: Path) -> None:
    """And what cannot be read is known, with copies in it; nothing is left running."""
    write_slow_net(0)
    data = image_folder(here / "data", 14)
    (data / "ill" / "004.png").write_bytes(b"no image")
    options = {**BACKBONE, "copies": 1, "augment": "flip"}
    one = featurecache.extract(data, cache="one", **options)
    write_slow_net(0.3)
    with meanwhile(lambda: len(computed_by()) == 2 and len(shard_bytes("two")) > 2, kill_a_worker):
        two = featurecache.extract(data, cache="two", engine="processes", actors=2, **options)
    assert len(computed_by()) in (2, 3)  # that in the place of the killed one may have found nothing left to do
    assert shard_bytes("two") == shard_bytes("one") and len(shard_bytes("one")) == 14
    assert (two.images, two.computed, two.failed) == (13, two.computed, one.failed) and len(one.failed) == 1
    assert torch.equal(featurecache.open_view(two.view).tensor("gap"), featurecache.open_view(one.view).tensor("gap"))
    assert not any(Path(f"/proc/{pid}").exists() for pid in computed_by())


@pytest.mark.slow
@pytest.mark.usefixtures("small_shards")
def test_a_killed_parent_leaves_no_process_and_is_continued(here: Path) -> None:
    write_slow_net(0.3)
    image_folder(here / "data", 16)
    running = started("--engine", "processes", "--actors", "2", rows=2)
    wait_until(lambda: len(shard_bytes("c")) > 1)
    running.send_signal(signal.SIGKILL)
    running.communicate()
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in computed_by()), 30)
    committed = shard_bytes("c")
    assert 1 < len(committed) < 8
    result = featurecache.extract("data", cache="c", **BACKBONE)
    assert result.computed == 16 - 2 * len(committed)
    assert committed.items() <= shard_bytes("c").items() and list(Path("c").rglob("*.tmp")) == []


@pytest.mark.integration
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 1)])
def test_stopped_processes_commit_what_they_have_computed(here: Path, number: int, code: int) -> None:
    """In the midst of a call of four batches."""
    write_slow_net(0.3)
    image_folder(here / "data", 64)
    running = started("--engine", "processes", "--actors", "2", rows=8)
    wait_until(lambda: shard_bytes("c"))
    before = passes_by(running.pid)
    wait_until(lambda: sum(passes_by(running.pid)[each] >= before[each] + 3 for each in before) == 2)
    committed = 8 * len(shard_bytes("c"))
    running.send_signal(number)
    _, said = running.communicate(timeout=60)
    last = said.splitlines()[-1]
    assert running.returncode == code and last.startswith("stopped. "), said
    assert int(last.split()[1]) > committed and "the same command continues" in last
    assert not any(Path(f"/proc/{pid}").exists() for pid in computed_by()) and list(Path("c").rglob("*.tmp")) == []
    Path("seconds").write_text("0")
    result = featurecache.extract("data", cache="c", forward="library", **BACKBONE)
    assert result.computed == 64 - int(last.split()[1])


def workers_of(pid: int) -> list[str]:
    """Processes that it started and that are python by now, be it before their imports."""
    there = list[str]()
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
            there += [folder.name] * (parent == str(pid) and b"spawn_main" in (folder / "cmdline").read_bytes())
    return there


@pytest.mark.integration
def test_an_interrupt_while_processes_start_is_said_by_their_parent_alone(here: Path) -> None:
    """Ctrl-C goes to all of them, as a terminal sends it."""
    write_slow_net(0.3)
    image_folder(here / "data", 16)
    running = started("--engine", "processes", "--actors", "2", rows=2, alone=True)
    wait_until(lambda: len(workers_of(running.pid)) == 2)
    time.sleep(0.1)  # python itself is there; they import
    os.killpg(running.pid, signal.SIGINT)
    _, said = running.communicate(timeout=60)
    assert running.returncode == 1 and said.splitlines()[-1].startswith("stopped. 0 images are safe"), said
    assert "Traceback" not in said and not passes_by(running.pid)


FULL = """
        import os
        from pathlib import Path
        if len(x) == 4 and os.getpid() != int(Path("driver").read_text()):
            with open(f"full-{os.getpid()}", "a") as log:
                log.write("x")
            if Path(f"full-{os.getpid()}").stat().st_size > int(Path("passes").read_text()):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
"""


@pytest.mark.integration
@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize(("passes", "committed"), [(0, 0), (3, 2)])
def test_a_worker_whose_device_is_full_says_what_to_type(here: Path, passes: int, committed: int) -> None:
    """While it compares the probe images, and behind two shards."""
    Path("nets.py").write_text(CNN.replace("    def forward(self, x):\n", f"    def forward(self, x):{FULL}"))
    Path("driver").write_text(str(os.getpid()))
    Path("passes").write_text(str(passes))
    words = r"on .+: cpu has not the memory for batches of 4, in which this store computes.*--actors takes fewer\."
    with pytest.raises(ForwardUnavailable, match=words):
        featurecache.extract(
            image_folder(here / "data", 16), cache="c", engine="processes", actors=1, **{**BACKBONE, "batch_size": 4}
        )
    assert len(shard_bytes("c")) == committed


@pytest.mark.usefixtures("small_shards")
def test_a_device_that_is_full_halfway_costs_nothing(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_slow_net(0)
    given, call = list[int](), ForwardRunner.__call__

    def full(*words: Any, **options: Any) -> Any:
        given.append(1)
        if len(given) == 5:
            raise RuntimeError("MPS backend out of memory")
        return call(*words, **options)

    monkeypatch.setattr(ForwardRunner, "__call__", full)
    monkeypatch.setattr(pipeline, "push_shards", lambda store, paths: time.sleep(0.5))  # the writer is behind
    prepared = plan.prepare(image_folder(here / "data", 16), cache="c", forward="library", **BACKBONE)
    with pytest.raises(ForwardUnavailable, match=r"cpu has not the memory for batches of 2.*--device cpu"):
        prepared.run()
    probes = -(-len(PROBES) // 2)
    assert len(shard_bytes("c")) == 4 - probes


@pytest.mark.integration
def test_a_worker_whose_backbone_is_another_writes_nothing(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_slow_net(0)
    prepared = plan.prepare(image_folder(here / "data", 4), cache="c", engine="processes", actors=1, **BACKBONE)
    of = workers.WorkerSetup.of
    setup: list[workers.WorkerSetup] = []
    monkeypatch.setattr(workers.WorkerSetup, "of", lambda *words: setup.append(of(*words)) or setup[0])
    prepared.run()
    assert isinstance(workers.ShardWorker(bool).start(setup[0]), ShardResult)
    write_slow_net(0)
    with open("nets.py", "a") as module:
        module.write("# edited\n")
    answer = workers.ShardWorker(bool).start(setup[0])
    assert isinstance(answer, FeatureCacheError) and "is not the backbone" in str(answer)
    os.rename("c", "moved")
    answer = workers.ShardWorker(bool).start(setup[0])
    assert isinstance(answer, CacheError) and "a file system that all machines mount" in str(answer)


def test_what_a_worker_has_committed_is_not_computed_again(tmp_path: Path) -> None:
    digests = np.array([f"{k:032x}" for k in range(4)], "S32")
    (tmp_path / "cls").mkdir()
    (tmp_path / "cls" / f"{workers.shard_name(digests[:2])}.h5").touch()
    worker: Any = workers.ShardWorker(bool)
    assert worker.compute([]) is None  # not started yet
    worker._setup = SimpleNamespace(digests=digests, store=SimpleNamespace(folder=lambda output: tmp_path / output))
    cls = SimpleNamespace(name="cls")
    assert worker._is_committed(ShardPlan(np.arange(2), (cls,)))  # type: ignore[arg-type]
    assert not worker._is_committed(ShardPlan(np.arange(2), (cls, SimpleNamespace(name="tokens"))))  # type: ignore[arg-type]
    assert not worker._is_committed(ShardPlan(np.arange(2, 4), (cls,)))  # type: ignore[arg-type]
