"""Backbones of the user's own: a module and a checkpoint that the test writes, against the network run by hand."""

from __future__ import annotations

import os
import py_compile
import sys
from argparse import Namespace
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support.backbone_checks import as_rows, outputs, refuses
from support.pictures import image_folder, picture
from torchvision import transforms

import featurecache
from featurecache.backbones import describe_backbone, load_backbone
from featurecache.backbones.base import Backbone
from featurecache.errors import (
    BadOption,
    OutputRefused,
    PreprocessingRefused,
    UnknownBackbone,
    UnsafeFile,
    WeightsDoNotFit,
    WeightsNotFound,
)
from featurecache.extraction.forward import spec_of
from featurecache.images.decoding import decode

SAYS = '{"image_size": 32, "resize": 40, "interpolation": "bilinear", "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.2]}'
CNN = f"""
import torch
from torch import nn

class Cnn(nn.Module):
    def __init__(self, classes=3):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3))
        self.act = nn.ReLU(inplace=True)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(12, classes)

    def forward(self, x):
        return self.fc(self.drop(self.pool(self.act(self.body(x))).flatten(1)))

def make():
    network = Cnn()
    network.preprocess = {SAYS}
    network.keep = "act"
    return network
"""
VIT = f"""
import torch
from torch import nn

class Vit(nn.Module):
    preprocess = {SAYS}
    keep = "norm"
    prefix = ["cls"]

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 8, stride=8)
        self.cls = nn.Parameter(torch.randn(1, 1, 16))
        self.positions = nn.Parameter(torch.randn(1, 17, 16))
        self.block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.positions
        return self.head(self.norm(self.block(x))[:, 0])
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Iterator[Path]:
    """A folder of the user's with nets.py in it, as the current folder; afterwards its modules are forgotten."""
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    write(CNN)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def write(source: str) -> None:
    Path("nets.py").write_text(source)


@torch.no_grad()
def by_hand(source: str = CNN, make: str = "make", seed: int = 1) -> Any:
    """The network of a module's text with weights drawn wide, made without us; its state dict is in w.pt."""
    space: dict[str, Any] = {}
    exec(source, space)
    torch.manual_seed(seed)
    network = space[make]().eval().requires_grad_(False)
    for tensor in [*network.parameters(), *(b for b in network.buffers() if b.is_floating_point())]:
        tensor += 0.6 * (torch.rand(tensor.shape) - 0.5)
    torch.save(network.state_dict(), "w.pt")
    return network


def mine(make: str = "make", **options: Any) -> Backbone:
    return load_backbone(f"python:nets:{make}", **({"weights": "w.pt"} | options))


def untrained(**options: Any) -> Backbone:
    return load_backbone("python:nets:make", random_weights=True, **options)


def both(source: str = CNN, make: str = "make", **options: Any) -> tuple[Any, Backbone]:
    """(the network by hand, its backbone) of a module's text."""
    write(source)
    return by_hand(source, make), mine(make, **options)


PIXELS = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(7))
same = torch.testing.assert_close


# what comes out


def test_a_cnns_map_and_its_average_are_those_of_the_network_run_by_hand():
    network, backbone = both()
    tokens, gap = outputs(backbone, PIXELS, "tokens", "gap")
    same(tokens, network.body(PIXELS).relu().permute(0, 2, 3, 1).reshape(3, 13 * 13, 12))
    same(network.fc(gap), network(PIXELS))
    assert (backbone.vector, backbone.width, backbone.grid, backbone.channels_last) == ("gap", 12, (13, 13), True)


def test_what_is_kept_is_as_it_was_before_a_relu_in_place_wrote_into_it():
    network, backbone = both(CNN.replace('"act"', '"body"'))
    expected = network.body(PIXELS).mean((2, 3))
    same(outputs(backbone, PIXELS, "gap")[0], expected)
    assert (expected < 0).any()


def test_tokens_of_a_vit_as_a_class_with_its_class_token():
    network, backbone = both(VIT, "Vit")
    same(network.head(outputs(backbone, PIXELS, "tokens")[0][:, 0]), network(PIXELS))
    assert (backbone.prefix, backbone.grid, backbone.vector, backbone.layers) == (("cls",), (4, 4), "cls", 0)
    assert not backbone.channels_last and set(backbone.refusals) == {"pooler", "gap"}


def test_a_network_that_returns_a_vector_gives_it_as_its_pooler_and_needs_no_outputs_named(here):
    network, backbone = both(CNN.replace('network.keep = "act"', "pass"))
    same(outputs(backbone, PIXELS, "pooler")[0], network(PIXELS))
    assert set(backbone.refusals) == {"tokens", "cls", "mean", "gap"} and backbone.vector == "pooler"
    data = image_folder(here / "data", 3)
    assert featurecache.extract(data, backbone="python:nets:make", weights="w.pt", cache="c").outputs == ("pooler",)


def test_each_output_can_come_from_a_submodule_of_its_own():
    network, backbone = both(CNN.replace('"act"', '{"tokens": "body", "gap": "pool"}'))
    tokens, gap = outputs(backbone, PIXELS, "tokens", "gap")
    same(network.fc(gap), network(PIXELS))
    same(tokens, as_rows(network.body(PIXELS)))


def test_a_layer_named_with_the_backbone_is_kept_and_comes_before_the_networks_own_word():
    network, plain = both()
    backbone = mine("make:body.0")
    tokens, gap = outputs(backbone, PIXELS, "tokens", "gap")
    assert (backbone.width, backbone.grid) == (8, (15, 15)) and backbone.architecture != plain.architecture
    same(tokens, as_rows(network.body[0](PIXELS)))
    same(gap, network.body[0](PIXELS).mean((2, 3)))
    assert load_backbone(**backbone.provenance["request"]).width == 8
    refuses(OutputRefused, r'has no submodule "bodi"\. Near: body', "python:nets:make:bodi", weights="w.pt")


def test_it_is_fed_as_torchvisions_transforms_feed_it():
    steps = [transforms.Resize(40), transforms.CenterCrop(32), transforms.ToTensor()]
    real = transforms.Compose([*steps, transforms.Normalize([0.4, 0.5, 0.6], [0.2, 0.3, 0.2])])
    image, preprocess = picture(3, 57, 41), untrained().preprocess
    array = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    assert torch.equal(preprocess.normalised(preprocess.resized(array)[None])[0], real(image))


def test_another_image_size_and_fit_reach_its_preprocessing():
    backbone = untrained(image_size=64, fit="pad")
    assert (backbone.image_size, backbone.preprocess.mode, backbone.grid) == ((64, 64), "pad", (29, 29))


def test_all_fields_of_the_preprocessing_may_be_said():
    full = untrained().preprocess.to_dict()
    write(CNN.replace(SAYS, repr({**full, "kernel": "torchvision"})))
    assert untrained().preprocess.kernel == "torchvision"


def test_a_method_that_happens_to_be_called_so_says_nothing_and_the_factory_may():
    text = CNN.replace("    def forward", "    def preprocess(self, x):\n        return x\n\n    def forward")
    write(text.replace(f"    network.preprocess = {SAYS}\n", "") + f"\nmake.preprocess = {SAYS}\n")
    assert untrained().image_size == (32, 32)


def test_a_network_that_views_its_maps_runs_in_the_usual_memory_format():
    network, backbone = both(CNN.replace("self.body(x)", "self.body(x).view(len(x), -1).view(-1, 12, 13, 13)"))
    assert not backbone.channels_last
    same(outputs(backbone, PIXELS, "gap")[0], network.body(PIXELS).relu().mean((2, 3)))


def test_images_go_through_it_into_a_view_that_computes_the_same_again(here):
    network, backbone = both()
    data = image_folder(here / "data", 6)
    result = featurecache.extract(data, backbone="python:nets:make", weights="w.pt", cache="c", dtype="float32")
    view = featurecache.open_view(result.view)
    assert tuple(view.outputs) == ("gap", "tokens")
    images = [(data / name).read_bytes() for name in view.ids]
    pixels = backbone.preprocess.normalised(backbone.preprocess.resized(decode(images[2]))[None])
    same(view.tensor("gap")[2], network.body(pixels).relu().mean((2, 3))[0], rtol=1e-4, atol=1e-5)
    with pytest.raises(UnsafeFile, match=r"python:nets:make"):
        featurecache.compute(images, like=view, output="gap")
    rows, _ = featurecache.compute(images, like=view, output="gap", trust_code=True)
    assert torch.equal(rows, view.tensor("gap"))


def test_half_precision_is_computed_or_refused_with_what_to_type(here):
    by_hand()
    options = {"backbone": "python:nets:make", "weights": "w.pt", "cache": "c", "precision": "bf16"}
    assert featurecache.extract(image_folder(here / "data", 3), **options).computed == 3
    write(CNN.replace("self.body(x)", "self.body(x + torch.ones(1, 3, 32, 32))"))
    with pytest.raises(BadOption, match=r"does not run in bfloat16 .*use --precision fp32"):
        featurecache.extract(here / "data", **options)


def test_a_grid_that_is_no_square_can_be_said():
    write(VIT.replace('["cls"]', "[]\n    grid = (1, 17)"))
    backbone = load_backbone("python:nets:Vit", random_weights=True)
    assert (backbone.prefix, backbone.grid, backbone.vector) == ((), (1, 17), "mean")


# weights


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"state_dict": state},
        lambda state: {"model": state, "epoch": 3},
        lambda state: {"model_state_dict": state},
        lambda state: {f"module.{key}": value for key, value in state.items()},
        lambda state: {"state_dict": {f"model.backbone.{k}": v for k, v in state.items()} | {"loss.w": torch.ones(2)}},
        lambda state: {"net": state, "optimizer": {"state": {0: {"step": torch.ones(1)}}, "param_groups": []}},
        lambda state: {"model": state, "args": Namespace(lr=0.1, out=Path("runs")), "epoch": 3},
        lambda state: {"state_dict": state, "best": np.float64(0.5), "curve": np.arange(3), "at": datetime(2024, 1, 1)},
    ],
)
def test_a_state_dict_is_read_where_training_scripts_put_it(wrap):
    network, expected = both()
    torch.save(wrap(network.state_dict()), "wrapped.pt")
    backbone = mine(weights="wrapped.pt")
    assert backbone.weights == expected.weights
    assert torch.equal(backbone.model.network.fc.weight, network.fc.weight)


def test_safetensors_and_counters_of_batches_are_the_same_weights():
    network, backbone = both()
    state = {k: v.contiguous() for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
    save_file(state, "w.safetensors")
    assert mine(weights="w.safetensors").weights == backbone.weights


class Evil:
    """Runs ``call`` in whoever unpickles it."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def test_an_object_in_a_file_of_weights_is_never_made():
    network, allowed = by_hand(), set(torch.serialization.get_safe_globals())
    torch.save({"state_dict": network.state_dict(), "args": Evil(eval, ("open('ran', 'w')",))}, "w.pt")
    assert torch.equal(mine().model.network.fc.weight, network.fc.weight)
    assert not Path("ran").exists() and set(torch.serialization.get_safe_globals()) == allowed


@pytest.mark.parametrize(
    ("wrap", "says"),
    [
        (lambda net: {"state_dict": Evil(os.mkdir, ("ran",))}, r"code in files is never run"),
        (lambda net: net.fc, r"holds a torch\.nn\.modules\.linear\.Linear; expected a state dict.*state_dict\(\)"),
        (lambda net: {"student": net.state_dict(), "teacher": net.state_dict()}, r"2 state dicts \(student, t"),
        (lambda net: {"epoch": 3, "args": Namespace(lr=1)}, r"holds no tensors"),
        (lambda net: os.getcwd, r"module posix is blocked"),
        (
            lambda net: {f"{part}.{key}": v for key, v in net.state_dict().items() for part in ("model", "ema")},
            r"2 times, as ema\., model\.",
        ),
    ],
)
def test_files_without_one_state_dict_say_what_they_hold(wrap, says):
    torch.save(wrap(by_hand()), "w.pt")
    refuses(WeightsDoNotFit, says, "python:nets:make", weights="w.pt")
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s.pop("fc.bias"), r"lack 1 tensors: fc.bias"),
        (lambda s: s.update({"fc.weight": torch.zeros(2, 12)}), r"shapes: fc.weight is \[2, 12\], expected \[3, 12\]"),
        (lambda s: s.update({"aux.weight": torch.zeros(2)}), r"1 tensors that it has not: aux.weight.*network.keep"),
        (lambda s: s.clear() or s.update(x=torch.zeros(1)), r"lack 10 tensors: body.0.bias"),
    ],
)
def test_weights_that_are_not_of_the_network_are_refused_with_some_names(change, says):
    state = by_hand().state_dict()
    change(state)
    torch.save(dict(state), "w.pt")
    refuses(WeightsDoNotFit, says, "python:nets:make", weights="w.pt")


def test_without_weights_it_says_how_to_give_them():
    refuses(WeightsNotFound, r"--weights FILE", "python:nets:make")
    assert describe_backbone("python:nets:make")["outputs"]["gap"] == {"shape": [12]}


def test_untrained_weights_follow_the_seed_and_leave_torchs_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, again, other = (untrained(seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.rand(1), expected)
    assert first.weights == again.weights != other.weights and first.weights["random_seed"] == 3


def test_what_a_factory_draws_beside_its_weights_is_always_the_same():
    draws = 'keep = "act"; network.register_buffer("n", torch.rand(2), persistent=False)'
    by_hand()
    write(CNN.replace('keep = "act"', draws))
    torch.manual_seed(1)
    first = mine(seed=1).model.network.n
    torch.manual_seed(2)
    assert torch.equal(first, mine(seed=2).model.network.n)


def test_untrained_weights_that_a_factory_reads_from_a_file_are_in_the_key():
    reads = '    network.load_state_dict(torch.load("w.pt"))\n    return network\n'
    write(CNN.replace("    return network\n", reads))
    keys = set()
    for seed in (1, 2):
        by_hand(seed=seed)
        keys.add(fingerprint(untrained()))
    assert len(keys) == 2


# the key follows the code


def fingerprint(backbone: Backbone) -> str:
    return spec_of(backbone, "fp32", "float16").fingerprint


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
    ("source", "path", "name"),
    [  # an import inside a function; a package that is run before what lies in it
        (CNN.replace("    network = Cnn()", "    from parts import X\n    network = Cnn()"), "parts.py", "parts"),
        (CNN.replace("class Cnn", "from pack.part import Y\n\nclass Cnn"), "pack/__init__.py", "pack"),
    ],
)
def test_whatever_is_run_of_the_users_own_is_in_the_key(source, path, name, here):
    (here / "pack").mkdir()
    (here / "pack" / "part.py").write_text("Y = 1\n")
    write(source)
    digests = set()
    for number in (1, 2):
        (here / path).write_text(f"X = {number}\n")
        digests.add(untrained().architecture["imports"][name])
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


# refusals


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("python:nets", r"not python:<module>:<factory>"),
        ("python:nets:make:x:y", r"not python:<module>:<factory>"),
        ("python:../nets:make", r"not python:<module>:<factory>"),
        ("python:nowhere:make", r"there is no nowhere.py in this folder or in PYTHONPATH"),
        ("python:nets:mak", r"has no function or class mak. Near: make"),
    ],
)
def test_a_name_that_leads_nowhere_is_answered_with_what_there_is(name, says):
    refuses(UnknownBackbone, says, name, random_weights=True)


def test_without_its_preprocessing_it_is_refused_with_the_lines_to_write():
    write(CNN.replace(f"network.preprocess = {SAYS}", "pass"))
    with pytest.raises(PreprocessingRefused) as error:
        untrained()
    first, line, _ = str(error.value).splitlines()
    assert first.startswith("python:nets:make does not say how its images were prepared")
    assert line.strip().startswith('network.preprocess = {"image_size": …, "resize": …, "interpolation": "bilinear"')


BODY = "self.act(self.body(x))"


@pytest.mark.parametrize(
    ("error", "source", "says"),
    [
        (UnknownBackbone, "import nothing_of_that_name", r"cannot be imported \(ModuleNotFoundError: No module"),
        (UnknownBackbone, "1 / 0", r"cannot be imported \(ZeroDivisionError"),
        (UnknownBackbone, "def make(:", r"cannot be imported \(SyntaxError"),
        (UnknownBackbone, "raise SystemExit(2)", r"cannot be imported \(SystemExit: 2\)"),
        (UnknownBackbone, "def make(x): pass", r"make\(\) failed \(TypeError: .*called without arguments"),
        (UnknownBackbone, "def make(): return 3", r"make\(\) returned a int, expected a torch.nn.Module"),
        (PreprocessingRefused, CNN.replace('"std"', '"sd"'), r"\(image_size, interpolation, mean and 2 more\)"),
        (PreprocessingRefused, CNN.replace(SAYS, "0.5"), r"in a way that we cannot read \(a float\)"),
        (PreprocessingRefused, CNN.replace("[0.4, 0.5, 0.6]", "[0.5]"), r"three numbers"),
        (PreprocessingRefused, CNN.replace('"resize": 40', '"resize": "crop"'), r"not usable"),
        (PreprocessingRefused, CNN.replace("bilinear", "smooth"), r'interpolation "smooth"'),
        (OutputRefused, CNN.replace('"act"', '"atc"'), r'no submodule "atc". Near: act'),
        (OutputRefused, CNN.replace('"act"', "5"), r"network.keep is 5; expected the name of a submodule"),
        (OutputRefused, CNN.replace('"act"', '{"cls": "act"}'), r"some of tokens, pooler, gap"),
        (OutputRefused, CNN.replace('"act"', '{"tokens": "fc"}'), r'"fc" gives \[2, 3\], which is no tokens'),
        (OutputRefused, CNN.replace('"act"', '{"tokens": "act", "gap": "fc"}'), r"several widths \(tokens 12, gap 3\)"),
        (OutputRefused, CNN.replace(BODY, f"self.act({BODY})"), r'"act" is run 2 times'),
        (OutputRefused, CNN.replace(BODY, "self.body(x)"), r'"act" is run 0 times'),
        (OutputRefused, CNN.replace("return self", "return 3, self").replace('"act"', '""'), r"Cnn returns a int"),
        (OutputRefused, VIT.replace('prefix = ["cls"]', ""), r'17 tokens(?s:.*)network.prefix = \["cls"\]'),
        (OutputRefused, VIT.replace('["cls"]', "[]"), r"grid of 4×4 are others(?s:.*)network.grid = \(h, w\)"),
        (OutputRefused, CNN.replace("self.act(", "nn.functional.dropout(").replace('"act"', '"pool"'), "dropout or"),
        (OutputRefused, CNN.replace(BODY, "self.act((lambda m: m - m.mean(0))(self.body(x)))"), "beside another image"),
        (
            BadOption,
            CNN.replace('"act"', '"pool"').replace("self.body(x)", "self.body(x.unfold(2, 33, 1))"),
            r"does not take images of 32×32",
        ),
    ],
)
def test_code_that_fails_or_says_too_little_is_refused_with_what_to_write(error, source, says):
    write(source + ("make = Vit" if "class Vit" in source else ""))
    refuses(error, says, "python:nets:make", random_weights=True)


def test_a_vector_that_is_kept_needs_no_other_output():
    write(CNN.replace("return self.fc", "return self.fc.weight.sum() + self.fc").replace('"act"', '"fc"'))
    assert untrained().vector == "pooler"


def test_another_networks_modules_and_the_path_are_left_as_they_were():
    path, finders = list(sys.path), list(sys.meta_path)
    with pytest.raises(UnknownBackbone):
        load_backbone("python:nowhere:make", random_weights=True)
    untrained()
    assert (sys.path, sys.meta_path) == (path, finders)
