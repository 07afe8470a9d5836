"""Commands that look at what is there answer at once: they load no torch, and nothing of what only computing needs."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from support.builders import ORDER, make_view
from support.sweeps import sweep, view_of

from featurecache.maintenance.import_features import import_view
from featurecache.store.reference import read_reference, write_reference
from featurecache.store.store import open_store
from heads.api import train_head
from heads.sweeps.folder import load_sweep

HEAVY = ("torch", "torchvision", "transformers", "timm", "scipy", "sklearn", "matplotlib", "pandas", "PIL", "openvino")
CALLS = """
import contextlib, io, json, sys
from cli import main
given = []
for words in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        main(words)
    given.append((out.getvalue(), [name for name in json.loads(sys.argv[2]) if name in sys.modules]))
print(json.dumps(given))
"""


def outputs_of(*commands, heavy=HEAVY):
    """Of commands in one fresh process: what each printed, and which heavy modules are there after it."""
    call = [sys.executable, "-c", CALLS, json.dumps(commands), json.dumps(heavy)]
    return json.loads(subprocess.run(call, capture_output=True, text=True, check=True).stdout)


@pytest.mark.integration
def test_who_looks_at_what_is_there_loads_no_torch(here):
    view = make_view(here / "cache", ORDER, name="chest")
    pixels = np.zeros((4, 3, 2, 2), "u1")
    write_reference(open_store(view.store), {"pixels": pixels, "cls": np.ones((4, 2), "f2")}, {"torch": "2"})
    drawn = view_of()
    run = train_head(drawn, "linear", epochs=2, out="runs/one")
    sweep(drawn, "linear,ridge", "runs/some")
    best = load_sweep("runs/some").best
    commands = [["--help"], ["ls"], ["ls", "--json"], ["info", "chest"], ["verify"], ["verify", "--json"]]
    given = outputs_of(*commands)
    assert [there for _, there in given] == [[]] * len(commands)
    text, record, shown, verified = given[1][0], json.loads(given[2][0]), given[3][0], json.loads(given[5][0])
    assert "chest" in text and "chest" in shown
    assert record["runs"][0] == {"path": "runs/one", "head": "linear", "output": "cls", "metrics": run.metrics}
    assert record["sweeps"] == [{"path": "runs/some", "heads": 2, "families": 2}]
    line = next(line for line in text.splitlines() if line.startswith("runs/some"))
    assert f" {best.head} on vit-toy/toy cls" in line and f"{best.metrics['val']['auroc']:.3f}" in line
    assert verified["damages"] == [] and verified["files"] > 10
    (view.store / "canary.safetensors").write_bytes(b"no tensors")
    ((text, there),) = outputs_of(["verify"])
    assert "canary.safetensors cannot be read" in text and there == []


@pytest.mark.integration
def test_a_head_on_features_that_are_there_loads_nothing_that_it_does_not_use(here):
    labels = np.arange(120) % 2
    np.savez("f.npz", features=np.random.default_rng(0).normal(labels[:, None], 1, (120, 4)).astype("f4"), label=labels)
    import_view("f.npz", "few", features_key="features", labels="label")
    heavy = ("transformers", "timm", "torchvision", "sklearn", "pandas", "openvino", "torch._dynamo")
    heavy += tuple(f"scipy.{part}" for part in ("optimize", "special", "stats", "linalg"))
    words = ["train-head", "--head", "linear", "--epochs", "2", "--out", "runs/one", "--quiet", "--no-controls"]
    ((text, there),) = outputs_of(words, heavy=heavy)
    assert "AUROC" in text and (here / "runs" / "one" / "report.html").exists() and there == []


def test_a_reference_comes_back_as_it_was_written_and_not_when_a_bit_flipped(tmp_path):
    view = make_view(tmp_path, ORDER, name="chest")
    store, path = open_store(view.store), view.store / "canary.safetensors"
    arrays = {"pixels": np.arange(48, dtype="u1").reshape(4, 3, 2, 2), "cls": np.ones((4, 2), "f2")}
    write_reference(store, arrays, {"torch": "2"})
    back, made_by = read_reference(store)
    assert made_by == {"torch": "2"} and back.keys() == arrays.keys()
    assert all((back[name] == arrays[name]).all() and back[name].dtype == arrays[name].dtype for name in arrays)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(Exception, match="does not match its hash"):
        read_reference(store)
