"""The heads against the article's own classes, and what is said of wrong names and outputs."""

from __future__ import annotations

import math
import sys
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from featurecache.errors import BadOption, UnknownHead
from heads.models.catalogue import HEADS, describe_head, head_info, heads_table, load_head, make_head
from heads.models.common import Input, count_parameters, layers_of, own_randomness
from heads.reports.text import HEADS_HEADER, head_table, heads_lines, heads_rows


def article_small(classes):
    """The article's model 1, on the class token."""
    return nn.Sequential(OrderedDict(ln=nn.Linear(768, classes)))


def article_large(classes, tokens=197, width=768):
    """The article's model 2 (tokens=197) and 3 (257), on the transposed hidden state [768, tokens]."""
    ln1, ln2 = nn.Linear(tokens, 256), nn.Linear(width * 256, classes)
    return nn.Sequential(OrderedDict(ln1=ln1, relu=nn.ReLU(), flatten=nn.Flatten(), ln2=ln2))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("name", "shape", "theirs", "parameters"),
    [
        ("linear", (768,), article_small(2), 1_538),
        ("large", (197, 768), article_large(2), 443_906),
        ("large", (257, 768), article_large(2, 257), 459_266),
    ],
)
def test_the_articles_classes_load_our_state_dict_and_give_our_logits(name, shape, theirs, parameters):
    ours = make_head(name, shape, 2, generator())
    assert count_parameters(ours) == sum(p.numel() for p in theirs.parameters()) == parameters
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(3, *shape, generator=generator(1))
    torch.testing.assert_close(ours(x), theirs(x.transpose(1, 2) if len(shape) == 2 else x))
    other = make_head(name, shape, 2, generator(2))
    other.load_state_dict(theirs.state_dict())  # and back, under her names
    torch.testing.assert_close(other(x), ours(x))


def test_large_starts_from_the_weights_that_the_articles_class_draws():
    torch.manual_seed(3)
    theirs = article_large(4, tokens=6, width=10)
    ours = make_head("large", (6, 10), 4, generator(3))
    assert list(ours.state_dict()) == ["ln1.weight", "ln1.bias", "ln2.weight", "ln2.bias"]  # a sequential's order
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))


def test_a_state_dict_of_another_shape_is_refused():
    with pytest.raises(RuntimeError, match="ln"):
        make_head("large", (6, 10), 4).load_state_dict(make_head("large", (6, 11), 4).state_dict())


@pytest.mark.parametrize("name", HEADS)
def test_every_head_maps_its_shape_to_logits_and_its_layers_add_up(name):
    given, before = input_of(name), torch.get_rng_state()
    for more in [{}, {"gated": True}] if name == "attention" else [{}]:
        model = make_head(name, given, 3, generator(), **more)
        assert torch.equal(before, torch.get_rng_state()), "torch's own generator is left as it was"
        assert model(torch.ones(2, *given.shape)).shape == (2, 3)
        assert sum(parameters for *_, parameters in layers_of(model)) == count_parameters(model)
    described = describe_head(name, given, 3)
    assert described["parameters"] == sum(layer["parameters"] for layer in described["layers"])
    assert len(head_table(described).splitlines()) == len(described["layers"]) + 4 and described["reference"]


TOKENS = Input((5, 7), ("cls",), (2, 2))


def input_of(name):
    return Input((7,)) if HEADS[name].takes == "vector" else TOKENS


def test_the_table_of_heads_gives_parameters_at_a_vit_b16():
    counts = {record["head"]: record["parameters"] for record in heads_table()}
    assert counts["linear"] == counts["mean-linear"] == counts["ridge"] == 1_538
    assert (counts["large"], counts["mlp"], counts["cls+mean"]) == (443_906, 197_378, 2 * 1536 + 2)
    assert counts["attention"] == 768 + 2 * 768**2 + 1_538  # AIM's: the query, keys, values, the linear layer
    assert counts["conv"] == (768 * 128 + 128) + (9 * 128**2 + 128) + (128 * 2 + 2)
    rows = heads_rows(heads_table())
    assert [row[0] for row in rows] == list(HEADS) and {len(row) for row in rows} == {len(HEADS_HEADER)}
    assert "1,181,954" in heads_lines(heads_table()) and "none: it keeps train" in heads_lines(heads_table())
    gated = make_head("attention", Input((197, 768)), 2, gated=True)
    assert count_parameters(gated) == 2 * (768 * 128 + 128) + 128 + 1_538


REGISTERS = Input((8, 3), ("reg0", "cls"), (2, 3))  # the class token is not always first


@pytest.mark.parametrize(
    ("name", "vector"),
    [("mean-linear", lambda x: x[:, 2:].mean(1)), ("cls+mean", lambda x: torch.cat([x[:, 1], x[:, 2:].mean(1)], 1))],
)
def test_heads_on_the_mean_of_the_patches_are_linear_on_it(name, vector):
    x = torch.randn(6, 8, 3)
    ours, linear = make_head(name, REGISTERS, 4), make_head("linear", (vector(x).shape[1],), 4)
    linear.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(x), linear(vector(x)))


def test_attention_has_the_numbers_and_gradients_of_keys_and_values_of_every_token():
    ours = make_head("attention", Input((11, 128)), 3, generator())
    ours.query.data.mul_(100)  # so that it looks somewhere
    naive = make_head("attention", Input((11, 128)), 3)
    naive.load_state_dict(ours.state_dict())
    x, y = torch.randn(5, 11, 128), torch.tensor([0, 1, 2, 0, 1])
    keys, values = (part(x).unflatten(2, (2, 64)).transpose(1, 2) for part in (naive.key, naive.value))  # [B, K, T, d]
    weights = (naive.query[None, :, None] @ keys.transpose(2, 3) / 8).softmax(3)  # 8: the root of 64
    pooled = (weights @ values).flatten(1)
    torch.testing.assert_close(ours.attention(x), weights[:, :, 0])
    logits = ours(x)
    torch.testing.assert_close(logits, naive.fc(pooled))
    for z in (logits, naive.fc(pooled)):
        nn.functional.cross_entropy(z, y).backward()
    for (name, a), b in zip(ours.named_parameters(), naive.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(("width", "heads"), [(768, 12), (384, 6), (96, 1), (7, 1), (200, 2), (1280, 20)])
def test_attention_heads_divide_the_width(width, heads):
    assert make_head("attention", Input((5, width)), 2).heads == heads


def test_gated_attention_is_the_papers_formula():
    ours = make_head("attention", Input((6, 4)), 2, generator(1), gated=True)
    x = torch.randn(3, 6, 4)
    ours.requires_grad_(False)
    v, u = ours.gate.weight.chunk(2)
    c, d = ours.gate.bias.chunk(2)
    for image, z, weights in zip(x, ours(x), ours.attention(x), strict=True):
        score = [ours.score.weight[0] @ ((v @ t + c).tanh() * (u @ t + d).sigmoid()) for t in image]
        share = [math.exp(s) / sum(math.exp(r) for r in score) for s in score]
        torch.testing.assert_close(weights, torch.tensor([share]))
        bag = sum(a * t for a, t in zip(share, image, strict=True))
        torch.testing.assert_close(z, ours.fc.weight @ bag + ours.fc.bias)


def test_conv_is_a_convolution_over_the_grid_of_patches():
    ours = make_head("conv", Input((7, 4), ("cls",), (2, 3)), 2, generator())
    x = torch.randn(5, 7, 4)
    image = x[:, 1:].transpose(1, 2).reshape(5, 4, 2, 3)  # channels, rows, columns
    hidden = nn.functional.conv2d(image, ours.reduce.weight[:, :, None, None], ours.reduce.bias).relu()
    hidden = nn.functional.conv2d(hidden, ours.conv.weight, ours.conv.bias, padding=1).relu()
    torch.testing.assert_close(ours(x), ours.fc(hidden.mean((2, 3))))


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("conv", (257, 8), "no grid .*tokens or tokens-16x16"),
        ("conv", Input((257, 8), ("cls",)), "no grid .*tokens or tokens-16x16"),
        ("mean-linear", (257, 8), "which rows of this output they are is not known"),
        ("cls+mean", (257, 8), "which rows of this output they are is not known"),
        ("cls+mean", Input((49, 8), (), (7, 7)), "needs a class token, .*empty.*mean-linear"),
        ("cls+mean", Input((50, 8), ("reg0",), (7, 7)), "prefix: reg0"),
    ],
)
def test_a_head_that_needs_to_know_which_token_is_what_refuses_an_output_that_does_not_say(name, given, said):
    with pytest.raises(BadOption, match=said):
        make_head(name, given, 2)


def test_a_grid_that_does_not_fit_the_tokens_is_refused():
    with pytest.raises(BadOption, match="197 tokens are not 2 before the patches and a grid of 14×14"):
        Input((197, 768), ("cls", "reg0"), (14, 14))


def test_what_a_head_is_given_comes_from_a_shape_a_record_or_a_view():
    record = {"shape": [5, 7], "prefix": ["cls"], "grid": [2, 2], "output": "tokens"}
    assert Input.of(record) == Input.of(SimpleNamespace(**record)) == Input.of(TOKENS) == TOKENS
    assert Input.of(SimpleNamespace(shape=(257, 7), prefix=None, grid=None)) == Input.of((257, 7)) == Input((257, 7))


@pytest.mark.parametrize("name", [name for name, info in HEADS.items() if not info.solved])
def test_dropout_is_the_heads_own_unless_given_and_drops_in_training_alone(name):
    given = input_of(name)
    assert make_head(name, given, 3).dropout.p == (0.5 if name == "mlp" else 0.0)
    plain, dropping = (make_head(name, given, 3, generator(), dropout=p) for p in (0.0, 0.7))
    x = torch.rand(8, *given.shape) + 1
    before = torch.get_rng_state()
    torch.testing.assert_close(plain.train()(x), plain.eval()(x))
    assert torch.equal(before, torch.get_rng_state())  # nothing is drawn where nothing is dropped
    torch.testing.assert_close(dropping.eval()(x), plain(x))
    with own_randomness(generator(1)):
        assert not torch.allclose(dropping.train()(x), plain(x))
    assert any("Dropout(0.7)" in layer for _, layer, *_ in layers_of(dropping))


def test_dropout_of_linear_is_on_its_input_and_of_large_on_the_hidden_layer():
    """With weights and inputs of one, a dropout of a half makes a multiple of two of every number it meets."""
    linear = make_head("linear", (9,), 2, dropout=0.5).train()
    nn.init.ones_(linear.ln.weight), nn.init.zeros_(linear.ln.bias)
    with own_randomness(generator(3)):
        z = linear(torch.ones(50, 9))
    assert torch.equal(z[:, 0], z[:, 1]) and set(z.flatten().tolist()) <= set(range(0, 19, 2)) and z.std() > 0
    large = make_head("large", (5, 3), 1, dropout=0.5).train()
    for parameter, value in ((large.ln1.weight, 1), (large.ln1.bias, 0), (large.second, 1), (large.second_bias, 0)):
        nn.init.constant_(parameter, value)
    with own_randomness(generator(3)):
        z = large(torch.ones(50, 5, 3))
    assert (z % 10 == 0).all() and z.std() > 0  # hidden numbers of 5, doubled or gone


@pytest.mark.parametrize("name", [name for name, info in HEADS.items() if info.solved])
def test_a_solved_head_refuses_a_dropout_that_would_do_nothing(name):
    with pytest.raises(BadOption, match=f"{name} has no dropout, so --dropout 0.5 would do nothing"):
        make_head(name, (7,), 3, dropout=0.5)
    make_head(name, (7,), 3, dropout=0.0)


@pytest.mark.parametrize(
    ("name", "shape", "options", "said"),
    [
        *(("linear", (7,), {"dropout": value}, "at least 0 and below 1") for value in (1.0, -0.1, float("nan"))),
        ("large", (5, 7), {"gated": True}, "large has no gate; --gated is for attention"),
        ("large", (768,), {}, r"large takes all tokens \[T×D\].* this output is \[768\].*linear, mlp"),
        ("linear", (197, 768), {}, r"linear takes one vector \[D\].*\[197×768\].*large"),
        ("cnn-cifar", (768,), {}, "no head on features: featurecache train-baseline"),
    ],
)
def test_what_does_not_fit_a_head_is_refused_with_a_way_out(name, shape, options, said):
    with pytest.raises(BadOption, match=said):
        make_head(name, shape, 2, **options)


@pytest.mark.parametrize("name", [name for name in HEADS if name != "knn"])
def test_a_head_comes_back_from_its_state_dict_and_one_of_another_size_is_refused(name):
    given = input_of(name)
    model = make_head(name, given, 3, generator(4)).eval()
    again = load_head(name, given, 3, model.state_dict())
    x = torch.randn(2, *given.shape)
    torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)
    with pytest.raises(ValueError, match="numbers, the head"):
        load_head(name, given, 4, model.state_dict())
    renamed = {f"other.{key}": value for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="Missing key"):
        load_head(name, given, 3, renamed)


def test_a_gated_head_comes_back_as_one():
    state = make_head("attention", TOKENS, 3, gated=True).state_dict()
    assert load_head("attention", TOKENS, 3, state, gated=True).attention(torch.ones(1, 5, 7)).shape[1] == 1
    with pytest.raises(ValueError, match="numbers, the head"):
        load_head("attention", TOKENS, 3, state)


@pytest.mark.parametrize("name", [name for name, info in HEADS.items() if not info.solved])
def test_every_stepped_head_trains_in_bf16_and_asks_for_no_gradient_of_the_features(name):
    given = input_of(name)
    model, x = make_head(name, given, 3, generator()), torch.randn(4, *given.shape)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(x)
    nn.functional.cross_entropy(logits.float(), torch.tensor([0, 1, 2, 0])).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters()) and x.grad is None


def test_info_shows_layers_shapes_and_parameters():
    text = head_table(describe_head("large", (197, 768), 2))
    assert all(word in text for word in ("Linear(197, 256)", "[768×256]", "50,688", "393,218", "443,906"))


def test_an_unknown_head_names_the_nearest():
    with pytest.raises(UnknownHead, match=r"no head is called 'linaer'\. Near: linear.*Heads: linear, large"):
        head_info("linaer")


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


KEYWORDS = """
from torch import nn
class Own(nn.Module):
    'Takes what it is given.'
    takes = 'tokens'
    def __init__(self, shape, classes, grid, dropout=0.1):
        super().__init__()
        self.grid, self.p, self.fc = grid, dropout, nn.Linear(shape[1], classes)
class Plain(nn.Linear):
    def __init__(self, shape, classes): super().__init__(shape[-1], classes)
"""


def own_module(tmp_path, monkeypatch, text):
    (tmp_path / "own_heads.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "own_heads", raising=False)


def test_a_head_of_ones_own_is_found_where_one_works(tmp_path, monkeypatch):
    own_module(tmp_path, monkeypatch, KEYWORDS)
    assert make_head("python:own_heads:Plain", (7,), 3)(torch.zeros(2, 7)).shape == (2, 3)
    assert describe_head("python:own_heads:Plain", (7,), 3)["parameters"] == 24
    with pytest.raises(BadOption, match="takes all tokens"):
        make_head("python:own_heads:Own", (7,), 3)


@pytest.mark.parametrize(
    ("name", "said"),
    [("python:nowhere_at_all:Own", "there is no nowhere_at_all.py"),
     ("python:own_heads:Other", "no torch module class"), ("python:own_heads", "is not python:<module>:<class>")],
)  # fmt: skip
def test_a_head_of_ones_own_that_is_not_there_is_said(tmp_path, monkeypatch, name, said):
    own_module(tmp_path, monkeypatch, "Other = 3\n")
    with pytest.raises(UnknownHead, match=said):
        head_info(name)


def test_a_head_of_ones_own_gets_the_keywords_that_its_signature_names(tmp_path, monkeypatch):
    own_module(tmp_path, monkeypatch, KEYWORDS)
    own = make_head("python:own_heads:Own", TOKENS, 3)
    assert (own.grid, own.p) == ((2, 2), 0.1)
    assert make_head("python:own_heads:Own", TOKENS, 3, dropout=0.4).p == 0.4
    with pytest.raises(BadOption, match="Plain has no dropout"):
        make_head("python:own_heads:Plain", TOKENS, 3, dropout=0.4)
    with pytest.raises(BadOption, match="Plain has no gate"):
        make_head("python:own_heads:Plain", TOKENS, 3, gated=True)
    again = load_head("python:own_heads:Plain", TOKENS, 3, make_head("python:own_heads:Plain", TOKENS, 3).state_dict())
    assert again.out_features == 3
