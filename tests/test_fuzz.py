"""Mutants of valid files, sealed anew so that they get past the hash, through our public readers.

Only a refusal of ours or an answer may come out: no other exception, no hang, no dead interpreter. As in daily use a
mutant is looked at by `featurecache.files.child` first; what that lets pass is read in a process like a user's. Of what
makes that process die, or hang, a copy is kept. FEATURECACHE_FUZZ_SECONDS: how long; FEATURECACHE_FUZZ_SEED: another
run.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from fuzzing import MUTANT, guarded, mutate
from hypothesis import HealthCheck, Phase, example, given, seed, settings
from hypothesis import strategies as st
from plant import plant
from test_views import CLS, ORDER, TOKENS, make_view

from featurecache.errors import CacheError, FeatureCacheError
from featurecache.files import guard
from featurecache.files.atomic import read_user_block
from featurecache.store.store import open_store

SECONDS = float(os.environ.get("FEATURECACHE_FUZZ_SECONDS", 12))
SEED = int(os.environ.get("FEATURECACHE_FUZZ_SEED", 0))
BATCH = 50
QUIET = settings(
    deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck), max_examples=2
)


class Reader:
    """`fuzz_reader` in a process of its own, started again when it dies."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self, path: Path) -> str:
        if self._process is None or self._process.poll() is not None:
            root = Path(__file__).parents[1]
            environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}", "MALLOC_PERTURB_": "90"}
            self._process = subprocess.Popen(
                [sys.executable, str(root / "tests" / "fuzz_reader.py")], env=environment, stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, bufsize=0,
            )  # fmt: skip
            assert self._answer(300) == "ready"
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(str(path)).encode() + b"\n")
        return self._answer(60)

    def _answer(self, seconds: float) -> str:
        assert self._process is not None and self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], seconds)[0]:
            self.close()
            return "hangs"
        line = self._process.stdout.readline()
        return json.loads(line) if line else f"dies with {self._process.wait()}"

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def soak(target: Path, kind: str, seconds: float, keep: Path) -> Counter[str]:
    """Mutants of ``target`` in its own place, in batches, until the time is over."""
    original = target.read_bytes()
    parts, reader, outcomes, wrong = guarded(original), Reader(), Counter[str](), list[str]()

    @QUIET
    @given(st.lists(MUTANT, min_size=BATCH, max_size=BATCH))
    def batch(mutants) -> None:  # type: ignore[no-untyped-def]
        files = [target.with_name(f"{number:02x}.h5") for number in range(len(mutants))]
        for file, mutant in zip(files, mutants, strict=True):
            plant(file, mutate(original, parts, mutant))
        refused = guard.verdicts(files, kind)
        for file in files:
            outcome = _sorted_out(refused[file]) if file in refused else reader(file)
            outcomes[outcome] += 1
            if outcome not in ("read", "refused"):
                kept = shutil.copy(file, keep / f"{outcome[:5]}-{sum(outcomes.values())}-{kind}.h5")
                if outcome not in ("crash kept away", "hang kept away"):
                    wrong.append(f"{kept}: {outcome}")
            file.unlink()

    end, number = time.monotonic() + seconds, SEED
    try:
        while time.monotonic() < end:
            seed(number)(batch)()
            assert not wrong
            number += 1
    finally:
        reader.close()
    return outcomes


def _sorted_out(error: CacheError) -> str:
    words = str(error)
    if "crashed on it" in words:
        return "crash kept away"
    return "hang kept away" if "HDF5 took" in words else "refused"


@pytest.mark.parametrize("kind", ["view", "shard"])
@pytest.mark.parametrize("share", [pytest.param(1, id="short"), pytest.param(5, id="long", marks=pytest.mark.slow)])
def test_mutants_are_refused_or_read(tmp_path: Path, kind: str, share: int) -> None:
    view = make_view(tmp_path / "cache", ORDER, layouts=(CLS, TOKENS))
    target = view.path if kind == "view" else next((view.store / "tokens").iterdir())
    keep = Path(os.environ.get("FEATURECACHE_FUZZ_KEEP", tmp_path))
    outcomes = soak(target, kind, share * SECONDS / 2, keep)
    print(f"{kind}: {dict(outcomes)}")
    assert outcomes["refused"] and outcomes["read"]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.binary(max_size=80), st.integers(0, 80))
@example(b"featurecache 1 " + b"0" * 32 + b" 99999999999999999999999999\n", 0)
@example("featurecache ١ ".encode(), 0)
def test_first_lines_are_read_or_refused(tmp_path_factory, data: bytes, at: int) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path_factory.getbasetemp() / "line.h5"
    whole = bytearray(b"featurecache 1 " + b"0" * 32 + b" 600\n".ljust(553, b"\0"))
    whole[at : at + len(data)] = data
    path.write_bytes(whole[:600])
    try:
        assert read_user_block(path)[1] == path.stat().st_size
    except CacheError as error:
        assert str(error)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda each: st.lists(each, max_size=4) | st.dictionaries(st.text(max_size=8), each, max_size=4), max_leaves=8,
)  # fmt: skip


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_records_are_read_or_refused(tmp_path_factory, data) -> None:  # type: ignore[no-untyped-def]
    folder = tmp_path_factory.getbasetemp() / "records"
    if not folder.exists():
        make_view(folder, ORDER, layouts=())
    (source,) = (path for path in folder.iterdir() if path.name.startswith("tiny"))
    record = json.loads((source / "spec.json").read_text())
    del record["check"]  # made by hand
    place = record
    while True:  # somewhere in the record another value
        key = data.draw(st.sampled_from(sorted(place)))
        if not isinstance(place[key], dict) or not place[key] or data.draw(st.booleans()):
            break
        place = place[key]
    place[key] = data.draw(JSON)
    copy = folder / ".copy"
    copy.mkdir(exist_ok=True)
    (copy / "spec.json").write_text(json.dumps(record))
    (copy / "plan.json").write_text(json.dumps({"cpu": data.draw(JSON)}))
    for read in (lambda: open_store(copy), lambda: open_store(copy).plan):
        try:
            read()
        except CacheError as error:
            assert str(error)


READ = ["config.json", "metrics.json", "head.safetensors", "history.csv", "answers.safetensors", "splits.csv"]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_runs_are_read_or_refused(tmp_path_factory, data) -> None:  # type: ignore[no-untyped-def]
    from fake_view import toy_view

    from heads.api import train_head
    from heads.reports.text import final_table, runs_table
    from heads.runs.run import load_run

    folder = tmp_path_factory.getbasetemp() / "run"
    view = toy_view(n=200, splits="given", noise=2)
    if not folder.exists():
        train_head(view, "linear", epochs=1, standardize="zscore", out=folder, report=False)
    name = data.draw(st.sampled_from(READ))
    whole = (folder / name).read_bytes()
    changed = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    if name.endswith(".json") and data.draw(st.booleans()):
        record = json.loads(whole)
        record[data.draw(st.sampled_from(sorted(record)))] = data.draw(JSON)
        changed = bytearray(json.dumps(record).encode())
    (folder / name).write_bytes(changed)
    try:
        run = load_run(folder)
        final_table(run)
        runs_table([run])
        run.logits(view.tensor("cls"))
    except FeatureCacheError as error:
        assert str(error)
    finally:
        (folder / name).write_bytes(whole)
