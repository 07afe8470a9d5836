"""Output names, and outputs derived from tokens against torchvision and hand-worked numbers."""

from __future__ import annotations

import pytest
import torch
from torchvision import transforms

from featurecache.errors import OutputRefused, UnknownOutput
from featurecache.outputs import blocks, derive, parse, parse_list

TOKENS = torch.randn(3, 197, 24, generator=torch.Generator().manual_seed(0))


def one(name: str, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    return derive(parse(name), tokens, 1, (14, 14))


@pytest.mark.parametrize("size", [257, 100, 197, 1, 300])
def test_tokens_n_is_the_articles_resize_of_the_transposed_matrix(size: int):
    expected = torch.stack([transforms.Resize((24, size))(x.T[None])[0].T for x in TOKENS])
    torch.testing.assert_close(one(f"tokens-{size}"), expected, rtol=0, atol=2e-6)


def test_row_one_of_tokens_257_is_35_percent_class_token():
    tokens = torch.zeros(1, 197, 1)
    tokens[0, 0] = 1.0  # only the class token
    assert one("tokens-257", tokens)[0, 1].item() == pytest.approx(1 - (1.5 * 197 / 257 - 0.5), abs=1e-6)


@pytest.mark.parametrize(("height", "width"), [(16, 16), (7, 7), (20, 9), (14, 14)])
def test_tokens_hxw_resizes_the_patch_grid_and_keeps_the_prefix(height: int, width: int):
    grid = TOKENS[:, 1:].transpose(1, 2).unflatten(2, (14, 14))
    resized = torch.nn.functional.interpolate(grid, (height, width), mode="bilinear", antialias=True)
    found = one(f"tokens-{height}x{width}")
    assert torch.equal(found[:, 0], TOKENS[:, 0])
    torch.testing.assert_close(found[:, 1:], resized.flatten(2).transpose(1, 2), rtol=0, atol=2e-6)


def test_mean_leaves_every_prefix_token_out():
    tokens = TOKENS[:, :5].clone()
    tokens[:, :3] = 1e4  # class token and two registers
    torch.testing.assert_close(derive(parse("mean"), tokens, 3, (1, 2)), (tokens[:, 3] + tokens[:, 4]) / 2)


@pytest.mark.parametrize("name", ["cls", "mean", "tokens-257", "tokens-100", "tokens-16x16", "tokens-5x5"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_derived_bytes_depend_neither_on_batch_nor_threads(name: str, dtype: torch.dtype):
    tokens, before = TOKENS.to(dtype), torch.get_num_threads()
    together = one(name, tokens)
    torch.set_num_threads(1)
    alone = torch.cat([one(name, tokens[i : i + 1]) for i in range(3)])
    torch.set_num_threads(before)
    assert together.dtype == dtype
    assert torch.equal(together, alone)


def test_layers_are_counted_from_the_end_and_minus_one_is_the_output_itself():
    assert parse("tokens@-1") == parse("tokens")
    assert parse("cls@-2").source == "tokens@-2"
    assert blocks("last3") == ("-3", "-2", "")
    assert parse("tokens@last4").row_shape((197, 768), 1) == (197, 768)


@pytest.mark.parametrize(("name", "near"), [("token", "tokens"), ("cls_token", "cls"), ("poolr", "pooler")])
def test_unknown_output_names_the_nearest(name: str, near: str):
    with pytest.raises(UnknownOutput, match=f"Near: .*{near}"):
        parse(name)


def test_a_path_given_as_output_asks_for_out():
    with pytest.raises(UnknownOutput, match="Did you mean --out"):
        parse("runs/first")


@pytest.mark.parametrize("name", ["pooler@-2", "gap@last4", "cls@-0"])
def test_layers_of_a_pooled_vector_do_not_exist(name: str):
    with pytest.raises(OutputRefused, match="does not exist"):
        parse(name)


@pytest.mark.parametrize("name", ["tokens-0", "tokens-99999", "tokens-300x300", ""])
def test_absurd_sizes_and_empty_lists_are_refused(name: str):
    with pytest.raises(UnknownOutput):
        parse_list(name)


def test_a_list_keeps_its_order_and_each_once():
    assert [o.name for o in parse_list("tokens, cls,tokens@-1")] == ["tokens", "cls"]
