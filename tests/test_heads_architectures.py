"""The heads against the article's own classes, and what is said of wrong names and outputs."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from featurecache.errors import BadOption, UnknownHead
from heads.architectures import HEADS, count_parameters, describe_head, head_info, make_head, own_randomness
from heads.tables import head_table


class Small(nn.Module):
    """The article's model 1, on the class token."""

    def __init__(self, classes):
        super().__init__()
        self.fc = nn.Linear(768, classes)

    def forward(self, x):
        return self.fc(x)


class ArticleLarge(nn.Module):
    """The article's model 2 (tokens=197) and 3 (257), on the transposed hidden state [768, tokens]."""

    def __init__(self, classes, tokens=197, width=768):
        super().__init__()
        self.fc1 = nn.Linear(tokens, 256)
        self.relu = nn.ReLU()
        self.flatten = nn.Flatten()
        self.fc2 = nn.Linear(width * 256, classes)

    def forward(self, x):
        return self.fc2(self.flatten(self.relu(self.fc1(x))))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("name", "shape", "theirs", "parameters"),
    [
        ("linear", (768,), Small(2), 1_538),
        ("large", (197, 768), ArticleLarge(2), 443_906),
        ("large", (257, 768), ArticleLarge(2, 257), 459_266),
    ],
)
def test_the_articles_classes_load_our_state_dict_and_give_our_logits(name, shape, theirs, parameters):
    ours = make_head(name, shape, 2, generator())
    assert count_parameters(ours) == sum(p.numel() for p in theirs.parameters()) == parameters
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(3, *shape, generator=generator(1))
    torch.testing.assert_close(ours(x), theirs(x.transpose(1, 2) if len(shape) == 2 else x))


def test_ours_loads_the_articles_state_dict_and_a_sequential_in_order():
    theirs = nn.Sequential(nn.Linear(5, 256), nn.ReLU(), nn.Flatten(), nn.Linear(7 * 256, 3))
    ours = make_head("large", (5, 7), 3, generator())
    assert list(ours.state_dict()) == ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]
    ours.load_state_dict(dict(zip(ours.state_dict(), theirs.state_dict().values(), strict=True)))
    x = torch.randn(4, 5, 7)
    torch.testing.assert_close(ours(x), theirs(x.transpose(1, 2)))


def test_large_starts_from_the_weights_that_the_articles_class_draws():
    torch.manual_seed(3)
    theirs = ArticleLarge(4, tokens=6, width=10)
    ours = make_head("large", (6, 10), 4, generator(3))
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))


def test_large_has_the_articles_gradients():
    ours, theirs = make_head("large", (6, 10), 4, generator()), ArticleLarge(4, tokens=6, width=10)
    theirs.load_state_dict(ours.state_dict())
    x, y = torch.randn(8, 6, 10), torch.randint(0, 4, (8,))
    for model, given in ((ours, x), (theirs, x.transpose(1, 2))):
        nn.functional.cross_entropy(model(given), y).backward()
    torch.testing.assert_close(ours.fc1.weight.grad, theirs.fc1.weight.grad)
    torch.testing.assert_close(ours.second.grad.transpose(1, 2).reshape(4, -1), theirs.fc2.weight.grad)


def test_a_state_dict_of_another_shape_is_refused():
    with pytest.raises(RuntimeError, match="fc"):
        make_head("large", (6, 10), 4).load_state_dict(make_head("large", (6, 11), 4).state_dict())


@pytest.mark.parametrize("name", HEADS)
def test_every_head_maps_its_shape_to_logits_and_its_layers_add_up(name):
    shape = (7,) if HEADS[name].takes == "vector" else (5, 7)
    model = make_head(name, shape, 3)
    assert model(torch.zeros(2, *shape)).shape == (2, 3)
    described = describe_head(name, shape, 3)
    assert sum(layer["parameters"] for layer in described["layers"]) == described["parameters"]
    assert described["parameters"] == count_parameters(model)


def test_info_shows_layers_shapes_and_parameters():
    text = head_table(describe_head("large", (197, 768), 2))
    assert all(word in text for word in ("Linear(197, 256)", "[768×256]", "50,688", "393,218", "443,906"))


def test_an_unknown_head_names_the_nearest():
    with pytest.raises(UnknownHead, match=r"no head is called 'linaer'\. Near: linear.*Heads: linear, large"):
        head_info("linaer")


def test_a_head_and_an_output_that_do_not_fit_are_refused_with_a_way_out():
    with pytest.raises(BadOption, match=r"large takes all tokens \[T×D\].* this output is \[768\].*linear, mlp"):
        make_head("large", (768,), 2)
    with pytest.raises(BadOption, match=r"linear takes one vector \[D\].*\[197×768\].*large"):
        make_head("linear", (197, 768), 2)


def test_the_global_generator_is_left_as_it_was():
    before = torch.get_rng_state()
    make_head("mlp", (7,), 3, generator())
    assert torch.equal(before, torch.get_rng_state())


def test_a_heads_randomness_goes_on_where_it_stopped_whatever_happens_outside():
    def two(between):
        own = generator(5)
        with own_randomness(own):
            first = torch.rand(2)
        between()
        with own_randomness(own):
            return torch.cat([first, torch.rand(2)])

    torch.testing.assert_close(two(lambda: None), two(lambda: torch.rand(99)))
    torch.manual_seed(5)
    torch.testing.assert_close(two(lambda: None), torch.rand(4))


def own_module(tmp_path, monkeypatch, text):
    (tmp_path / "own_heads.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "own_heads", raising=False)


def test_a_head_of_ones_own_is_found_where_one_works(tmp_path, monkeypatch):
    text = "from torch import nn\nclass Own(nn.Linear):\n    'My head.'\n    takes = 'vector'\n"
    own_module(
        tmp_path, monkeypatch, text + "    def __init__(self, shape, classes): super().__init__(*shape, classes)\n"
    )
    assert make_head("python:own_heads:Own", (7,), 3)(torch.zeros(2, 7)).shape == (2, 3)
    assert describe_head("python:own_heads:Own", (7,), 3)["parameters"] == 24
    with pytest.raises(BadOption, match="takes one vector"):
        make_head("python:own_heads:Own", (5, 7), 3)


@pytest.mark.parametrize(
    ("name", "said"),
    [("python:nowhere_at_all:Own", "cannot be imported"), ("python:own_heads:Other", "no torch module class"),
     ("python:own_heads", "is not python:<module>:<class>")],
)  # fmt: skip
def test_a_head_of_ones_own_that_is_not_there_is_said(tmp_path, monkeypatch, name, said):
    own_module(tmp_path, monkeypatch, "Other = 3\n")
    with pytest.raises(UnknownHead, match=said):
        head_info(name)
