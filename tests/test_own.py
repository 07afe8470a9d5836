"""Backbones of the user's own: a module and a checkpoint that the test writes, against the network run by hand."""

from __future__ import annotations

import os
import py_compile
import sys
from argparse import Namespace
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import image_folder, picture
from safetensors.torch import save_file
from torchvision import transforms

import featurecache
from featurecache.backbones import describe, load_backbone
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
from featurecache.extraction.pipeline import spec_of
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


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A folder of the user's with nets.py in it, as the current folder; afterwards its modules are forgotten."""
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    (tmp_path / "nets.py").write_text(CNN)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def trained(source: str, make: str = "make", seed: int = 1):  # type: ignore[no-untyped-def]
    """The network of a module's text, made by hand, with weights drawn wide; and its state dict."""
    space: dict = {}
    exec(source, space)
    torch.manual_seed(seed)
    network = space[make]().eval()
    with torch.no_grad():
        for tensor in [*network.parameters(), *(b for b in network.buffers() if b.is_floating_point())]:
            tensor += 0.6 * (torch.rand(tensor.shape) - 0.5)
    return network


def saved(source: str = CNN, make: str = "make", path: str = "w.pt", seed: int = 1) -> torch.nn.Module:
    network = trained(source, make, seed)
    torch.save(network.state_dict(), path)
    return network


def mine(**options) -> Backbone:  # type: ignore[no-untyped-def]
    return load_backbone("python:nets:make", **({"weights": "w.pt"} | options))


# what comes out


def test_a_cnns_map_and_its_average_are_those_of_the_network_run_by_hand(here):
    network, backbone, pixels = saved(), mine(), torch.rand(5, 3, 32, 32)
    with torch.no_grad():
        found = backbone.forward(pixels, {"tokens", "gap"})
        expected = network.body(pixels).relu()
        through = network.fc(found["gap"])
        logits = network(pixels)
    torch.testing.assert_close(found["tokens"], expected.permute(0, 2, 3, 1).reshape(5, 13 * 13, 12))
    torch.testing.assert_close(through, logits)
    assert (backbone.vector, backbone.width, backbone.grid, backbone.channels_last) == ("gap", 12, (13, 13), True)


def test_what_is_kept_is_as_it_was_before_a_relu_in_place_wrote_into_it(here):
    (here / "nets.py").write_text(CNN.replace('"act"', '"body"'))
    network, pixels = saved(), torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        found, expected = mine().forward(pixels, {"gap"})["gap"], network.body(pixels).mean((2, 3))
    torch.testing.assert_close(found, expected)
    assert (expected < 0).any()


def test_tokens_of_a_vit_as_a_class_with_its_class_token(here):
    (here / "nets.py").write_text(VIT)
    network, pixels = saved(VIT, "Vit"), torch.rand(3, 3, 32, 32)
    backbone = load_backbone("python:nets:Vit", weights="w.pt")
    with torch.no_grad():
        tokens, logits = backbone.forward(pixels, {"tokens"})["tokens"], network(pixels)
        torch.testing.assert_close(network.head(tokens[:, 0]), logits)
    assert (backbone.prefix, backbone.grid, backbone.vector, backbone.layers) == (("cls",), (4, 4), "cls", 0)
    assert not backbone.channels_last and set(backbone.refused) == {"pooler", "gap"}


def test_a_network_that_returns_a_vector_gives_it_as_its_pooler(here):
    (here / "nets.py").write_text(CNN.replace('network.keep = "act"', "pass"))
    network, pixels = saved(), torch.rand(2, 3, 32, 32)
    backbone = mine()
    with torch.no_grad():
        torch.testing.assert_close(backbone.forward(pixels, {"pooler"})["pooler"], network(pixels))
    assert set(backbone.refused) == {"tokens", "cls", "mean", "gap"} and backbone.vector == "pooler"


def test_each_output_can_come_from_a_submodule_of_its_own(here):
    (here / "nets.py").write_text(CNN.replace('"act"', '{"tokens": "body", "gap": "pool"}'))
    network, pixels = saved(), torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        found = mine().forward(pixels, {"tokens", "gap"})
        torch.testing.assert_close(network.fc(found["gap"]), network(pixels))
        torch.testing.assert_close(found["tokens"], network.body(pixels).flatten(2).transpose(1, 2))


def test_it_is_fed_as_torchvisions_transforms_feed_it(here):
    saved()
    steps = [transforms.Resize(40), transforms.CenterCrop(32), transforms.ToTensor()]
    real = transforms.Compose([*steps, transforms.Normalize([0.4, 0.5, 0.6], [0.2, 0.3, 0.2])])
    image, preprocess = picture(3, 57, 41), mine().preprocess
    array = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    assert torch.equal(preprocess.normalised(preprocess.resized(array)[None])[0], real(image))


def test_another_image_size_and_fit_reach_its_preprocessing(here):
    saved()
    backbone = mine(image_size=64, fit="pad")
    assert (backbone.image_size, backbone.preprocess.mode, backbone.grid) == ((64, 64), "pad", (29, 29))


def test_all_fields_of_the_preprocessing_may_be_said(here):
    saved()
    full = mine().preprocess.to_dict()
    (here / "nets.py").write_text(CNN.replace(SAYS, repr({**full, "kernel": "torchvision"})))
    assert mine().preprocess.kernel == "torchvision"


def test_a_method_that_happens_to_be_called_so_says_nothing_and_the_factory_may(here):
    text = CNN.replace("    def forward", "    def preprocess(self, x):\n        return x\n\n    def forward")
    text = text.replace(f"    network.preprocess = {SAYS}\n", "") + f"\nmake.preprocess = {SAYS}\n"
    (here / "nets.py").write_text(text)
    assert load_backbone("python:nets:make", random_weights=True).image_size == (32, 32)


def test_a_network_that_views_its_maps_runs_in_the_usual_memory_format(here):
    (here / "nets.py").write_text(CNN.replace("self.body(x)", "self.body(x).view(len(x), -1).view(-1, 12, 13, 13)"))
    network, pixels = saved(), torch.rand(2, 3, 32, 32)
    backbone = mine()
    assert not backbone.channels_last
    with torch.no_grad():
        torch.testing.assert_close(backbone.forward(pixels, {"gap"})["gap"], network.body(pixels).relu().mean((2, 3)))


def test_images_go_through_it_into_a_view_that_computes_the_same_again(here):
    network = saved()
    data = image_folder(here / "data", 6)
    result = featurecache.extract(data, backbone="python:nets:make", weights="w.pt", cache="c", dtype="float32")
    view = featurecache.open_view(result.view)
    assert tuple(view.outputs) == ("gap", "tokens")
    backbone = mine()
    image = backbone.preprocess.resized(decode((data / view.ids[2]).read_bytes()))
    with torch.no_grad():
        expected = network.body(backbone.preprocess.normalised(image[None])).relu().mean((2, 3))[0]
    torch.testing.assert_close(view.tensor("gap")[2], expected, rtol=1e-4, atol=1e-5)
    images = [(data / name).read_bytes() for name in view.ids]
    with pytest.raises(UnsafeFile, match=r"python:nets:make"):
        featurecache.compute(images, like=view, output="gap")
    rows, _ = featurecache.compute(images, like=view, output="gap", trust_code=True)
    assert torch.equal(rows, view.tensor("gap"))


def test_a_network_with_only_a_vector_needs_no_outputs_named(here):
    (here / "nets.py").write_text(CNN.replace('network.keep = "act"', "pass"))
    saved()
    result = featurecache.extract(
        image_folder(here / "data", 3), backbone="python:nets:make", weights="w.pt", cache=here / "c"
    )
    assert result.outputs == ("pooler",)


def test_half_precision_is_computed_or_refused_with_what_to_type(here):
    saved()
    options = {"backbone": "python:nets:make", "weights": "w.pt", "cache": "c", "precision": "bf16"}
    assert featurecache.extract(image_folder(here / "data", 3), **options).computed == 3
    (here / "nets.py").write_text(CNN.replace("self.body(x)", "self.body(x + torch.ones(1, 3, 32, 32))"))
    with pytest.raises(BadOption, match=r"does not run in bfloat16 .*use --precision fp32"):
        featurecache.extract(here / "data", **options)


def test_a_layer_named_with_the_backbone_is_kept_and_comes_before_the_networks_own_word(here):
    network, pixels = saved(), torch.rand(2, 3, 32, 32)
    backbone = load_backbone("python:nets:make:body.0", weights="w.pt")
    with torch.no_grad():
        found, expected = backbone.forward(pixels, {"tokens", "gap"}), network.body[0](pixels)
    assert (backbone.width, backbone.grid) == (8, (15, 15)) and backbone.architecture != mine().architecture
    torch.testing.assert_close(found["tokens"], expected.flatten(2).transpose(1, 2))
    torch.testing.assert_close(found["gap"], expected.mean((2, 3)))
    assert load_backbone(**backbone.provenance["request"]).width == 8
    with pytest.raises(OutputRefused, match=r'has no submodule "bodi"\. Near: body'):
        load_backbone("python:nets:make:bodi", weights="w.pt")


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
def test_a_state_dict_is_found_where_training_scripts_put_it(wrap, here):
    network = saved()
    expected = mine()
    torch.save(wrap(network.state_dict()), "wrapped.pt")
    found = mine(weights="wrapped.pt")
    assert found.weights == expected.weights
    assert torch.equal(found.model.network.fc.weight, network.fc.weight)


def test_safetensors_and_counters_of_batches_are_the_same_weights(here):
    network = saved()
    state = {k: v.contiguous() for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
    save_file(state, "w.safetensors")
    assert mine(weights="w.safetensors").weights == mine().weights


def test_code_in_a_file_of_weights_is_not_run(here):
    class Evil:
        def __reduce__(self):  # type: ignore[no-untyped-def]
            return os.mkdir, ("ran",)

    torch.save({"state_dict": Evil()}, "w.pt")
    with pytest.raises(WeightsDoNotFit, match=r"code in files is never run"):
        mine()
    assert not Path("ran").exists()


def test_an_object_in_a_file_of_weights_is_never_made(here):
    class Evil:
        def __reduce__(self):  # type: ignore[no-untyped-def]
            return eval, ("open('ran', 'w')",)

    network, allowed = saved(), set(torch.serialization.get_safe_globals())
    torch.save({"state_dict": network.state_dict(), "args": Evil()}, "w.pt")
    assert torch.equal(mine().model.network.fc.weight, network.fc.weight)
    assert not Path("ran").exists() and set(torch.serialization.get_safe_globals()) == allowed


@pytest.mark.parametrize(
    ("wrap", "says"),
    [
        (
            lambda network: network.fc,
            r"holds a torch\.nn\.modules\.linear\.Linear; expected a state dict.*state_dict\(\)",
        ),
        (
            lambda network: {"student": network.state_dict(), "teacher": network.state_dict()},
            r"2 state dicts \(student, t",
        ),
        (lambda network: {"epoch": 3, "args": Namespace(lr=1)}, r"holds no tensors"),
        (lambda network: os.getcwd, r"module posix is blocked"),
    ],
)
def test_files_without_one_state_dict_say_what_they_hold(wrap, says, here):
    torch.save(wrap(saved()), "w.pt")
    with pytest.raises(WeightsDoNotFit, match=says):
        mine()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s.pop("fc.bias"), r"lack 1 tensors: fc.bias"),
        (
            lambda s: s.update({"fc.weight": torch.zeros(2, 12)}),
            r"other shapes: fc.weight is \[2, 12\], expected \[3, 12\]",
        ),
        (
            lambda s: s.update({"aux.weight": torch.zeros(2)}),
            r"hold 1 tensors that it has not: aux.weight.*network.keep",
        ),
        (lambda s: s.clear() or s.update(x=torch.zeros(1)), r"lack 10 tensors: body.0.bias"),
    ],
)
def test_weights_that_are_not_of_the_network_are_refused_with_some_names(change, says, here):
    state = saved().state_dict()
    change(state)
    torch.save(dict(state), "w.pt")
    with pytest.raises(WeightsDoNotFit, match=says):
        mine()


def test_a_file_with_the_network_twice_is_not_guessed_at(here):
    state = saved().state_dict()
    torch.save({f"{part}.{key}": value for key, value in state.items() for part in ("model", "ema")}, "w.pt")
    with pytest.raises(WeightsDoNotFit, match=r"2 times, as ema\., model\."):
        mine()


def test_without_weights_it_says_how_to_give_them(here):
    with pytest.raises(WeightsNotFound, match=r"--weights FILE"):
        load_backbone("python:nets:make")
    assert describe("python:nets:make")["outputs"]["gap"] == {"shape": [12]}


def test_untrained_weights_follow_the_seed_and_leave_torchs_generator_alone(here):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, again, other = (load_backbone("python:nets:make", random_weights=True, seed=s) for s in (3, 3, 4))
    assert torch.equal(torch.rand(1), expected)
    assert first.weights == again.weights != other.weights and first.weights["random_seed"] == 3


def test_what_a_factory_draws_beside_its_weights_is_always_the_same(here):
    (here / "nets.py").write_text(
        CNN.replace('keep = "act"', 'keep = "act"; network.register_buffer("n", torch.rand(2), persistent=False)')
    )
    saved()
    torch.manual_seed(1)
    first = mine(seed=1).model.network.n
    torch.manual_seed(2)
    assert torch.equal(first, mine(seed=2).model.network.n)


def test_untrained_weights_that_a_factory_reads_from_a_file_are_in_the_key(here):
    (here / "nets.py").write_text(
        CNN.replace("    return network\n", '    network.load_state_dict(torch.load("w.pt"))\n    return network\n')
    )
    keys = set()
    for seed in (1, 2):
        saved(seed=seed)
        keys.add(spec_of(load_backbone("python:nets:make", random_weights=True), "fp32", "float16").fingerprint)
    assert len(keys) == 2


# the key follows the code


def fingerprint(**options) -> str:  # type: ignore[no-untyped-def]
    return spec_of(mine(**options), "fp32", "float16").fingerprint


def test_the_source_of_the_module_is_in_the_key_and_runs_as_it_is_now(here):
    saved()
    before = fingerprint(), mine().forward(torch.ones(1, 3, 32, 32), {"gap"})["gap"]
    (here / "nets.py").write_text(CNN.replace("self.act(self.body(x))", "self.act(9*self.body(x))"))
    after = fingerprint(), mine().forward(torch.ones(1, 3, 32, 32), {"gap"})["gap"]
    assert before[0] != after[0] and not torch.equal(before[1], after[1])
    (here / "nets.py").write_text(CNN)
    assert fingerprint() == before[0]


def test_bytecode_that_looks_as_old_as_the_source_is_not_run(here):
    saved()
    file = here / "nets.py"
    text = CNN.replace("stride=2", "stride=1")
    file.write_text(CNN)
    os.utime(file, (1_000_000_000, 1_000_000_000))
    py_compile.compile(str(file))
    file.write_text(text)  # the same length, and then the same second
    os.utime(file, (1_000_000_000, 1_000_000_000))
    assert mine().grid == (28, 28)


@pytest.mark.parametrize(
    "how", ["from parts import WIDTH", "import parts; WIDTH = parts.WIDTH", "from deep.er import WIDTH"]
)
def test_the_source_of_what_the_module_imports_is_in_the_key(how, here):
    (here / "nets.py").write_text(CNN.replace("class Cnn", f"{how}\n\nclass Cnn").replace("12", "WIDTH"))
    (here / "deep").mkdir()
    (here / "deep" / "er.py").write_text("from . import est\nWIDTH = est.WIDTH\n")
    widths, keys = [], set()
    for number in (12, 14):
        (here / "parts.py").write_text(f"WIDTH = {number}\n")
        (here / "deep" / "est.py").write_text(f"WIDTH = {number}\n")
        backbone = load_backbone("python:nets:make", random_weights=True)
        widths.append(backbone.width)
        keys.add(str(backbone.architecture))
    assert widths == [12, 14] and len(keys) == 2


def test_an_import_inside_a_function_counts_too(here):
    (here / "nets.py").write_text(
        CNN.replace("    network = Cnn()", "    from parts import SCALE\n    network = Cnn()")
    )
    keys = set()
    for number in (1, 2):
        (here / "parts.py").write_text(f"SCALE = {number}\n")
        keys.add(str(load_backbone("python:nets:make", random_weights=True).architecture["imports"]))
    assert len(keys) == 2


def test_the_packages_of_what_is_imported_are_run_and_so_are_in_the_key(here):
    (here / "nets.py").write_text(CNN.replace("class Cnn", "from pack.part import X\n\nclass Cnn"))
    (here / "pack").mkdir()
    (here / "pack" / "part.py").write_text("X = 1\n")
    keys = set()
    for number in (1, 2):
        (here / "pack" / "__init__.py").write_text(f"NUMBER = {number}\n")
        keys.add(load_backbone("python:nets:make", random_weights=True).architecture["imports"]["pack"])
    assert len(keys) == 2


def test_libraries_are_not_hashed(here):
    saved()
    assert mine().architecture["imports"] == {}


def test_the_module_may_be_renamed_and_its_folder_moved(here, tmp_path_factory, monkeypatch):
    saved()
    before = fingerprint()
    moved = tmp_path_factory.mktemp("moved")
    (moved / "renamed.py").write_text(CNN)
    (moved / "w.pt").write_bytes((here / "w.pt").read_bytes())
    monkeypatch.chdir(moved)
    backbone = load_backbone("python:renamed:make", weights="w.pt")
    assert spec_of(backbone, "fp32", "float16").fingerprint == before


def test_a_module_of_the_same_name_in_another_folder_is_another(here, tmp_path_factory, monkeypatch):
    saved()
    mine()
    other = tmp_path_factory.mktemp("other")
    (other / "nets.py").write_text(CNN.replace("12", "20"))
    monkeypatch.chdir(other)
    assert load_backbone("python:nets:make", random_weights=True).width == 20


@pytest.mark.parametrize("what", ['network.keep = "body"', 'network.preprocess["mean"] = [0.1, 0.1, 0.1]'])
def test_what_the_network_says_is_in_the_key_even_where_the_source_is_the_same(what, here):
    (here / "nets.py").write_text(
        CNN.replace(
            "    return network\n", '    exec(__import__("pathlib").Path("more.txt").read_text())\n    return network\n'
        )
    )
    saved(CNN)
    (here / "more.txt").write_text("")
    before = fingerprint()
    (here / "more.txt").write_text(what)
    assert fingerprint() != before


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
def test_a_name_that_leads_nowhere_is_answered_with_what_there_is(name, says, here):
    with pytest.raises(UnknownBackbone, match=says):
        load_backbone(name, random_weights=True)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("import nothing_of_that_name", r"cannot be imported \(ModuleNotFoundError: No module"),
        ("1 / 0", r"cannot be imported \(ZeroDivisionError"),
        ("def make(:", r"cannot be imported \(SyntaxError"),
        ("raise SystemExit(2)", r"cannot be imported \(SystemExit: 2\)"),
        ("def make(x): pass", r"make\(\) failed \(TypeError: .*called without arguments"),
        ("def make(): return 3", r"make\(\) returned a int, expected a torch.nn.Module"),
    ],
)
def test_code_that_fails_is_reported_in_one_sentence(source, says, here):
    (here / "nets.py").write_text(source)
    with pytest.raises(UnknownBackbone, match=says):
        load_backbone("python:nets:make", random_weights=True)


def test_without_its_preprocessing_it_is_refused_with_the_lines_to_write(here):
    (here / "nets.py").write_text(CNN.replace(f"network.preprocess = {SAYS}", "pass"))
    with pytest.raises(PreprocessingRefused) as error:
        load_backbone("python:nets:make", random_weights=True)
    first, line, _ = str(error.value).splitlines()
    assert first.startswith("python:nets:make does not say how its images were prepared")
    assert line.strip().startswith('network.preprocess = {"image_size": …, "resize": …, "interpolation": "bilinear"')


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (('"std"', '"sd"'), r"in a way that we cannot read \(image_size, interpolation, mean and 2 more\)"),
        ((SAYS, "0.5"), r"in a way that we cannot read \(a float\)"),
        (("[0.4, 0.5, 0.6]", "[0.5]"), r"three numbers"),
        (('"resize": 40', '"resize": "crop"'), r"not usable"),
        (("bilinear", "smooth"), r'interpolation "smooth"'),
    ],
)
def test_preprocessing_that_says_nothing_usable_is_refused(change, says, here):
    (here / "nets.py").write_text(CNN.replace(*change))
    with pytest.raises(PreprocessingRefused, match=says):
        load_backbone("python:nets:make", random_weights=True)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (CNN.replace('"act"', '"atc"'), r'no submodule "atc". Near: act'),
        (CNN.replace('"act"', "5"), r"network.keep is 5; expected the name of a submodule"),
        (CNN.replace('"act"', '{"cls": "act"}'), r"some of tokens, pooler, gap"),
        (CNN.replace('"act"', '{"tokens": "fc"}'), r'"fc" gives \[2, 3\], which is no tokens'),
        (CNN.replace('"act"', '{"tokens": "act", "gap": "fc"}'), r"several widths \(tokens 12, gap 3\)"),
        (CNN.replace("self.act(self.body(x))", "self.act(self.act(self.body(x)))"), r'"act" is run 2 times'),
        (CNN.replace("self.act(self.body(x))", "self.body(x)"), r'"act" is run 0 times'),
        (
            CNN.replace("return self.fc", "return 3, self.fc").replace('"act"', '""'),
            r"Cnn returns a int, expected a tensor",
        ),
        (VIT.replace('prefix = ["cls"]', "") + "make = Vit", r'17 tokens(?s:.*)network.prefix = \["cls"\]'),
        (VIT.replace('["cls"]', "[]") + "make = Vit", r"grid of 4×4 are others(?s:.*)network.grid = \(h, w\)"),
        (CNN.replace("return self.fc", "return self.fc.weight.sum() + self.fc").replace('"act"', '"fc"'), None),
        (
            CNN.replace("self.act(", "nn.functional.dropout(").replace('"act"', '"pool"'),
            r"beside another image.*dropout",
        ),
        (
            CNN.replace("self.act(self.body(x))", "self.act((lambda m: m - m.mean(0))(self.body(x)))"),
            r"beside another image",
        ),
        (
            CNN.replace('"act"', '"pool"').replace("self.body(x)", "self.body(x.unfold(2, 33, 1))"),
            r"does not take images of 32×32",
        ),
    ],
)
def test_what_cannot_be_kept_is_refused_with_what_to_write(source, says, here):
    (here / "nets.py").write_text(source)
    if says is None:
        assert load_backbone("python:nets:make", random_weights=True).vector == "pooler"
        return
    with pytest.raises((OutputRefused, BadOption), match=says):
        load_backbone("python:nets:make", random_weights=True)


def test_a_grid_that_is_no_square_can_be_said(here):
    (here / "nets.py").write_text(VIT.replace('["cls"]', "[]\n    grid = (1, 17)"))
    backbone = load_backbone("python:nets:Vit", random_weights=True)
    assert (backbone.prefix, backbone.grid, backbone.vector) == ((), (1, 17), "mean")


def test_another_networks_modules_and_the_path_are_left_as_they_were(here):
    path, finders = list(sys.path), list(sys.meta_path)
    with pytest.raises(UnknownBackbone):
        load_backbone("python:nowhere:make", random_weights=True)
    load_backbone("python:nets:make", random_weights=True)
    assert (sys.path, sys.meta_path) == (path, finders)
