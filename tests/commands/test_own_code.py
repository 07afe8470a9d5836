"""Heads and backbones of one's own that raise: a sentence with their file, line and error, and code 2; ours is ours."""

from __future__ import annotations

import numpy as np
import pytest
from support.command import call
from support.pictures import image_folder
from support.user_nets import CNN

from featurecache.maintenance.import_features import import_view

pytestmark = pytest.mark.integration
HEAD = """from torch import nn
class Own(nn.Module):
    def __init__(self, shape, classes):
        super().__init__()
        self.fc = nn.Linear(shape[0], classes)
        {made}
    def forward(self, x):
        {forward}
        return self.fc(x)
"""


@pytest.fixture
def features(here):
    rows = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
    np.savez("set.npz", features=rows, labels=np.arange(60) % 2)
    import_view("set.npz", "set", cache="cache")


def training(head: str = "Own", *words: object):
    return call("train-head", "--head", f"python:mine:{head}", "--features", "set", "--output", "vector", *words)


@pytest.mark.parametrize(
    ("made", "forward", "said"),
    [
        (
            "self.n = shape[1]",
            "",
            r"Own(shape, classes) failed (mine.py, line 6: IndexError: tuple index out of range)",
        ),
        ("", "raise ValueError('not so\\nat all')", "error: mine.py, line 8: ValueError: not so (--debug shows"),
        ("", "x = x @ x", "error: mine.py, line 8: RuntimeError: mat1 and mat2"),
        ("", "return x", "python:mine:Own gives [2, 4] for two images; expected logits [2, 2]"),
        ("", "return 3", "gives a int for two images"),
    ],
)
def test_a_head_that_raises_is_said_with_its_file_and_line_before_training(here, features, made, forward, said):
    (here / "mine.py").write_text(HEAD.format(made=made or "pass", forward=forward or "pass"))
    result = training()
    assert result.exit_code == 2 and said in result.stderr and "mistake" not in result.stderr, result.stderr
    assert not (here / "runs").exists()
    assert training("Onw").stderr.endswith("no torch module class called Onw. Near: Own.\n")


def test_with_debug_the_traceback_is_shown(here, features):
    (here / "mine.py").write_text(HEAD.format(made="pass", forward="raise ValueError('not so')"))
    assert isinstance(training("Own", "--debug").exception, ValueError)  # of which Python shows the way


@pytest.mark.parametrize(
    ("text", "said"),
    [("import nowhere_at_all", "mine.py, line 1: ModuleNotFoundError"), ("class Own(:", "SyntaxError")],
)
def test_a_module_that_cannot_be_imported_says_where(here, features, text, said):
    (here / "mine.py").write_text(text)
    result = training()
    assert result.exit_code == 2 and said in result.stderr, result.stderr


def test_a_head_that_raises_in_training_alone_is_said_too(here, features):
    (here / "mine.py").write_text(HEAD.format(made="pass", forward="assert not self.training, 'only now'"))
    result = training()
    assert result.exit_code == 2 and "error: mine.py, line 8: AssertionError: only now" in result.stderr, result.stderr


@pytest.mark.parametrize(
    ("network", "said"),
    [
        (CNN.replace("def make():", "def make():\n    raise OSError('gone')"), "make() failed (nets.py, line"),
        (CNN.replace("def forward(self, x):", "def forward(self, x):\n        x.nothing"), "pixels: nets.py, line"),
    ],
)
def test_a_backbone_that_raises_is_said_with_its_file_and_line(here, network, said):
    assert network != CNN
    (here / "nets.py").write_text(network)
    data = image_folder(here / "d", 4)
    result = call("extract", "--backbone", "python:nets:make", "--random-weights", "--data", data)
    assert result.exit_code == 2 and said in result.stderr and "mistake" not in result.stderr, result.stderr
    assert not (here / "cache").exists()


def test_a_sweep_of_own_heads_has_a_page_which_runs_none_of_them(here):
    (here / "mine.py").write_text(HEAD.format(made="pass", forward="pass"))
    extract = ("extract", "--backbone", "vit-demo", "--random-weights", "--data", image_folder(here / "data", 20))
    assert call(*extract, "--outputs", "cls").exit_code == 0
    result = call("ablate", "--heads", "python:mine:Own", "--outputs", "cls", "--epochs", 2, "--out", "s")
    assert result.exit_code == 0, result.stderr
    assert "is code of its own" in (here / "s" / "report.html").read_text()
