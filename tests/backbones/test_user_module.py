"""Backbones of the user's own: a module and a checkpoint that the test writes, against the network run by hand."""

from __future__ import annotations

import os
from argparse import Namespace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from support.backbone_checks import as_rows, fed, outputs, refuses
from support.pictures import image_folder, picture
from support.user_nets import CNN, PIXELS, SAYS, VIT, both, by_hand, fingerprint, mine, untrained, write
from torchvision import transforms

import featurecache
from featurecache.backbones import describe_backbone, load_backbone
from featurecache.errors import (
    BadOption,
    OutputRefused,
    PreprocessingRefused,
    UnknownBackbone,
    UnsafeFile,
    WeightsDoNotFit,
    WeightsNotFound,
)
from featurecache.extraction import choose_forward, forward

pytestmark = pytest.mark.usefixtures("here")
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


@pytest.mark.integration  # asks the system for the name of its processor
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
    image = picture(3, 57, 41)
    assert torch.equal(fed(untrained(), image)[0], real(image))


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


@pytest.mark.integration  # asks the system for the name of its processor
def test_images_go_through_it_into_a_view_that_computes_the_same_again(here):
    network, backbone = both()
    data = image_folder(here / "data", 6)
    result = featurecache.extract(data, backbone="python:nets:make", weights="w.pt", cache="c", dtype="float32")
    view = featurecache.open_view(result.view)
    assert tuple(view.outputs) == ("gap", "tokens")
    images = [(data / name).read_bytes() for name in view.ids]
    pixels = fed(backbone, Image.open(data / view.ids[2]))
    same(view.tensor("gap")[2], network.body(pixels).relu().mean((2, 3))[0], rtol=1e-4, atol=1e-5)
    with pytest.raises(UnsafeFile, match=r"python:nets:make"):
        featurecache.compute(images, like=view, output="gap")
    rows, _ = featurecache.compute(images, like=view, output="gap", trust_code=True)
    assert torch.equal(rows, view.tensor("gap"))


@pytest.mark.integration  # asks the system for the name of its processor
def test_half_precision_is_computed_or_refused_with_what_to_type(here):
    by_hand()
    options = {"backbone": "python:nets:make", "weights": "w.pt", "cache": "c", "precision": "bf16"}
    assert featurecache.extract(image_folder(here / "data", 3), **options).computed == 3
    write(CNN.replace("self.body(x)", "self.body(x + torch.ones(1, 3, 32, 32))"))
    with pytest.raises(BadOption, match=r"does not run in bfloat16 .*use --precision fp32"):
        featurecache.extract(here / "data", **options)


@pytest.mark.integration
@pytest.mark.parametrize(("way", "precision"), [("auto", "fp32"), ("openvino", "bf16")])
def test_measuring_other_ways_leaves_the_network_as_it_is(here, monkeypatch, way, precision):
    by_hand()
    for module in (choose_forward, forward):
        monkeypatch.setattr(module, "onednn_gain", lambda: 2.0)
    monkeypatch.setitem(choose_forward.LONG, "cpu", 0.0)
    monkeypatch.setattr(choose_forward, "PROBED", 0)
    options = {"backbone": "python:nets:make", "weights": "w.pt", "dtype": "float32"}
    images, most = image_folder(here / "data", 6), 1e-5 if precision == "fp32" else 3e-2
    exact = featurecache.open_view(featurecache.extract(images, **options, cache="a", forward="library").view)
    run = featurecache.extract(images, **options, cache="b", forward=way, precision=precision)
    rows, expected = (view.tensor("gap") for view in (featurecache.open_view(run.view), exact))
    assert (rows - expected).norm() / expected.norm() < most


def test_a_grid_that_is_no_square_can_be_said():
    write(VIT.replace('["cls"]', "[]\n    grid = (1, 17)"))
    backbone = load_backbone("python:nets:Vit", random_weights=True)
    assert (backbone.prefix, backbone.grid, backbone.vector) == ((), (1, 17), "mean")


# weights


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"model_state_dict": state},
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
        (lambda net: {"epoch": 3, "args": Namespace(lr=1)}, r"holds no tensors"),
        (lambda net: os.getcwd, r"module posix is blocked"),
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
        (UnknownBackbone, "import nothing_there", r"cannot be imported \(nets.py, line 1: ModuleNotFoundError: No mod"),
        (UnknownBackbone, "1 / 0", r"cannot be imported \(nets.py, line 1: ZeroDivisionError"),
        (UnknownBackbone, "def make(:", r"cannot be imported \(SyntaxError"),
        (UnknownBackbone, "raise SystemExit(2)", r"cannot be imported \(nets.py, line 1: SystemExit: 2\)"),
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
        (
            OutputRefused,
            CNN.replace("flatten(1)))", "flatten(1))).sum(1)").replace('"act"', '""'),
            r"\[2\] for two images",
        ),
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
