"""The code of a user's own backbone: all that is run of it is in the key, and what runs is what was hashed."""

from __future__ import annotations

import os
import py_compile
import sys

import pytest
import torch
from support.backbone_checks import outputs
from support.user_nets import CNN, PIXELS, both, by_hand, fingerprint, mine, untrained, write

from featurecache.backbones import load_backbone
from featurecache.errors import UnknownBackbone

pytestmark = pytest.mark.usefixtures("here")


def test_the_source_of_the_module_is_in_the_key_and_runs_as_it_is_now():
    by_hand()
    keys, values = [], []
    for text in (CNN, CNN.replace("self.act(self.body(x))", "self.act(9*self.body(x))"), CNN):
        write(text)
        backbone = mine()
        keys.append(fingerprint(backbone))
        values.append(outputs(backbone, PIXELS, "gap")[0])
    assert keys[0] == keys[2] != keys[1] and torch.equal(values[0], values[2]) and not torch.equal(values[0], values[1])


def test_bytecode_that_looks_as_old_as_the_source_is_not_run(here):
    file = here / "nets.py"
    os.utime(file, (1_000_000_000, 1_000_000_000))
    py_compile.compile(str(file))
    write(CNN.replace("stride=2", "stride=1"))  # the same length, and then the same second
    os.utime(file, (1_000_000_000, 1_000_000_000))
    assert untrained().grid == (28, 28)


@pytest.mark.parametrize(
    "how", ["from parts import WIDTH", "import parts; WIDTH = parts.WIDTH", "from deep.er import WIDTH"]
)
def test_the_source_of_what_the_module_imports_is_in_the_key(how, here):
    write(CNN.replace("class Cnn", f"{how}\n\nclass Cnn").replace("12", "WIDTH"))
    (here / "deep").mkdir()
    (here / "deep" / "er.py").write_text("from . import est\nWIDTH = est.WIDTH\n")
    widths, keys = [], set()
    for number in (12, 14):
        for path in ("parts.py", "deep/est.py"):
            (here / path).write_text(f"WIDTH = {number}\n")
        backbone = untrained()
        widths.append(backbone.width)
        keys.add(str(backbone.architecture))
    assert widths == [12, 14] and len(keys) == 2


@pytest.mark.parametrize(
    ("old", "new", "path"),
    [  # an import inside a function; a package that is run before what lies in it
        ("    network = Cnn()", "    from parts import X\n    network = Cnn()", "parts.py"),
        ("class Cnn", "from pack.part import Y\n\nclass Cnn", "pack/__init__.py"),
    ],
)
def test_whatever_is_run_of_the_users_own_is_in_the_key(old, new, path, here):
    (here / "pack").mkdir()
    (here / "pack" / "part.py").write_text("Y = 1\n")
    write(CNN.replace(old, new))
    digests = set()
    for number in (1, 2):
        (here / path).write_text(f"X = {number}\n")
        digests.add(untrained().architecture["imports"][path.partition("/")[0].removesuffix(".py")])
    assert len(digests) == 2


def test_libraries_are_not_hashed():
    assert untrained().architecture["imports"] == {}


def test_the_module_may_be_renamed_and_its_folder_moved(here, tmp_path_factory, monkeypatch):
    _, before = both()
    moved = tmp_path_factory.mktemp("moved")
    (moved / "renamed.py").write_text(CNN)
    (moved / "w.pt").write_bytes((here / "w.pt").read_bytes())
    monkeypatch.chdir(moved)
    assert fingerprint(load_backbone("python:renamed:make", weights="w.pt")) == fingerprint(before)


def test_a_module_of_the_same_name_in_another_folder_is_another(tmp_path_factory, monkeypatch):
    assert untrained().width == 12
    monkeypatch.chdir(tmp_path_factory.mktemp("other"))
    write(CNN.replace("12", "20"))
    assert untrained().width == 20


@pytest.mark.parametrize("what", ['network.keep = "body"', 'network.preprocess["mean"] = [0.1, 0.1, 0.1]'])
def test_what_the_network_says_is_in_the_key_even_where_the_source_is_the_same(what, here):
    runs = '    exec(__import__("pathlib").Path("more.txt").read_text())\n    return network\n'
    write(CNN.replace("    return network\n", runs))
    by_hand()
    keys = set()
    for text in ("", what):
        (here / "more.txt").write_text(text)
        keys.add(fingerprint(mine()))
    assert len(keys) == 2


def test_another_networks_modules_and_the_path_are_left_as_they_were():
    path, finders = list(sys.path), list(sys.meta_path)
    with pytest.raises(UnknownBackbone):
        load_backbone("python:nowhere:make", random_weights=True)
    untrained()
    assert (sys.path, sys.meta_path) == (path, finders)
