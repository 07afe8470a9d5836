"""The library as people meet it: names, completion, signatures, types, tables and what a notebook shows."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

import featurecache
import heads
from heads.settings import HeadOptions, NetworkOptions, Settings, SweepOptions, options_for
from heads.sweeps.grid import SweepSpec

ROOT = Path(__file__).parents[1]
PACKAGES = (featurecache, heads)
PROGRAM = """
import featurecache
import heads

view: featurecache.View = featurecache.open_view("chest")
train = view["cls"][view.splits == "train"]
run: heads.Run = heads.train_head(view, "large", epochs=2, lr=1e-3)
sweep = heads.ablate(view, ["linear"], seeds=2, lr="1e-4..1e-2:3")
answers: list[dict[str, object]] = [dict(row) for row in heads.predict(run, ["a.png"], device="cpu")]
heads.train_head(view, "large", epochs="two")
"""


@pytest.mark.integration
@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_public_names_are_completed_and_are_what_type_checkers_see(package) -> None:
    tree = ast.parse(Path(package.__file__).read_text())
    typed = {
        alias.name: node.module
        for block in tree.body if isinstance(block, ast.If)
        for node in block.body if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }  # fmt: skip
    assert typed == package._LAZY and set(dir(package)) == set(package.__all__)
    assert all(getattr(package, name) is not None for name in package.__all__)


@pytest.mark.integration
@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_a_public_function_names_what_it_takes(package) -> None:
    functions = [getattr(package, name) for name in package._LAZY if inspect.isfunction(getattr(package, name))]
    taken = {function.__name__: inspect.signature(function).parameters.values() for function in functions}
    assert functions and [name for name, each in taken.items() if any(p.kind in (2, 4) for p in each)] == []


def test_the_options_of_training_are_those_of_the_table() -> None:
    fields = get_type_hints(Settings)
    apart = {"splits", "classes", "only", "device"}  # parameters of their own
    for options, takers in ((HeadOptions, ("any", "head")), (NetworkOptions, ("any", "network", "finetune"))):
        hints = get_type_hints(options)
        assert set(hints) == set(options_for(*takers)) - apart
        assert hints == {name: fields[name] for name in hints}
    spec = set(inspect.signature(SweepSpec.of).parameters) - {"heads", "options"}
    one = {"output", "seed", "fraction", "fold"}  # of which a sweep has several
    assert set(get_type_hints(SweepOptions)) == (set(fields) - one - {"head"}) | spec
    assert str in get_args(get_type_hints(SweepOptions)["lr"])


@pytest.mark.integration
def test_a_program_of_a_user_is_checked_strictly_and_its_mistake_is_seen(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--follow-imports=silent", "program.py"]
    environment = {"MYPYPATH": str(ROOT), "PATH": "", "HOME": str(tmp_path), "MYPY_CACHE_DIR": str(tmp_path / "c")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    errors = [line for line in done.stdout.splitlines() if line.startswith("program.py")]
    assert len(errors) == 1 and errors[0].startswith("program.py:10") and '"epochs"' in errors[0], done.stdout


@pytest.mark.integration
def test_a_heads_py_and_a_cli_py_of_ones_own_do_not_stand_in_the_way(tmp_path: Path) -> None:
    for name in ("heads", "cli"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('mine')\n")
    run = {"cwd": tmp_path, "capture_output": True, "text": True}
    module: Any = subprocess.run([sys.executable, "-m", "featurecache", "train-head", "--help"], **run)
    assert module.returncode == 0 and "--epochs" in module.stdout, module.stderr
