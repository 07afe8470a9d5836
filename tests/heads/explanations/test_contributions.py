"""What a head makes of every token: beside brute force, sums, and torchvision's own resize."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from featurecache.errors import BadOption
from featurecache.outputs import function_of, parse
from heads.explanations import contributions
from heads.explanations.contributions import MarginModel, TokenMap, gradient_times_input, replacement_contributions
from heads.explanations.maps import SaliencyMap, class_margin_weights, with_shuffled_weights
from heads.models.catalogue import make_head
from heads.models.common import Input
from heads.models.vector import KNearest
from heads.task import Standardize

P, GRID, WIDTH, CLASSES = 1, (3, 4), 24, 3
TOKENS = P + GRID[0] * GRID[1]


def places_for(output: str) -> TokenMap:
    parsed = parse(output)
    matrix = function_of(parsed, torch.eye(TOKENS)[None], P, GRID)[0] if parsed.is_derived else None
    return TokenMap("tokens", ("cls",), GRID, matrix)


def reader_for(head: str, output: str = "tokens", scale: Standardize | None = None) -> MarginModel:
    where = places_for(output)
    shape = tuple(where.input(torch.zeros(1, TOKENS, WIDTH)).shape[1:])
    layout = parse(output).layout(where.prefix, where.grid) if len(shape) == 2 else None
    given = Input(shape, *(layout or ((), None)))
    model = make_head(head, given, CLASSES, torch.Generator().manual_seed(1)).eval()
    return MarginModel(model, where, scale or Standardize(), torch.tensor([0.3, -0.1, 0.0]))


def toward(*classes: int) -> torch.Tensor:
    return class_margin_weights(np.array(classes), CLASSES, 1.7, False)


def margin_of(z: torch.Tensor, c: int) -> torch.Tensor:
    """[n] of logits [n, C], by hand."""
    return (z[:, c] - (z.sum(1) - z[:, c]) / (CLASSES - 1)) / 1.7


def some_tokens(n: int = 2, tokens: int = TOKENS) -> torch.Tensor:
    return torch.randn(n, tokens, WIDTH, generator=torch.Generator().manual_seed(0))


def zscore() -> Standardize:
    rng = torch.Generator().manual_seed(2)
    return Standardize("zscore", torch.randn(WIDTH, generator=rng), 0.5 + torch.rand(WIDTH, generator=rng))


def resized(x: torch.Tensor, size: int) -> torch.Tensor:
    """The article's own: the [D, T] matrix through torchvision's Resize((D, size))."""
    from torchvision.transforms import Resize

    return Resize((x.shape[2], size), antialias=True)(x.transpose(1, 2)[:, None])[:, 0].transpose(1, 2)


def by_force(model, x, mean, c, output, scale):
    """float64, of kNN float32: the margin of x, and of x with one token after the other replaced."""
    model = model if isinstance(model, KNearest) else model.double()
    copies = torch.cat([x[None], x.repeat(len(x), 1, 1)]).double()
    for t in range(len(x)):
        copies[t + 1, t] = mean[t]
    seen = resized(copies, int(output.split("-")[1])) if "-" in output else copies
    seen = copies[:, P:].mean(1) if output == "mean" else seen
    if scale.kind == "zscore":
        seen = (seen - scale.mean.double()) / scale.std.double()
    if scale.kind == "l2":
        seen = torch.nn.functional.normalize(seen, dim=2)
    margin = margin_of(torch.cat([model(part) for part in seen.split(32)]), c)
    return (margin[0] - margin[1:]).detach().numpy()


@pytest.mark.parametrize(
    "head, output, scale, way",
    [("large", "tokens", Standardize(), "exact change"), ("large", "tokens", zscore(), "exact change"),
     ("large", "tokens-17", Standardize(), "exact change"), ("large", "tokens-17", zscore(), "exact change"),
     ("large", "tokens-17", Standardize("l2"), "occlusion"), ("attention", "tokens", Standardize(), "occlusion"),
     ("conv", "tokens", Standardize(), "occlusion"), ("mlp", "mean", zscore(), "occlusion"),
     ("knn", "mean", Standardize(), "occlusion")],
)  # fmt: skip
def test_a_token_has_the_part_that_brute_force_gives_by_the_rank_one_update_or_by_occlusion(head, output, scale, way):
    """Where lengths of resized tokens are made one, tokens are replaced before the resize."""
    reader = reader_for(head, output, scale)
    if head == "knn":
        reader.model.vectors = torch.nn.functional.normalize(some_tokens(9).mean(1), dim=1)
        reader.model.labels = torch.arange(9) % CLASSES
    x, mean = some_tokens(), some_tokens(5).mean(0)
    parts = replacement_contributions(reader, reader.scaled(x), reader.scaled(mean), toward(2, 0))
    assert way in parts.how
    for i, c in ((0, 2), (1, 0)):
        assert parts.tokens[i] == pytest.approx(by_force(reader.model, x[i], mean, c, output, scale), abs=1e-5)
        reader.model.float()


@pytest.mark.parametrize("head, output", [("mean-linear", "tokens"), ("cls+mean", "tokens"), ("linear", "mean")])
def test_the_parts_of_a_linear_head_add_up_to_its_margin(head, output):
    reader = reader_for(head, output, zscore())
    x, mean, classes = some_tokens(), some_tokens(5).mean(0), (1, 2)
    parts = replacement_contributions(reader, reader.scaled(x), reader.scaled(mean), toward(*classes))
    seen = parts.tokens.sum(1) + parts.beside["mean tokens everywhere"]
    u = (x - reader.scale.mean) / reader.scale.std
    z = reader.model(u[:, P:].mean(1) if output == "mean" else u).detach() + reader.correction
    margin = [float(margin_of(z, c)[i]) for i, c in enumerate(classes)]
    assert parts.adds_up and seen == pytest.approx(margin, abs=1e-5) and parts.margin == pytest.approx(margin, abs=1e-5)


def test_linear_on_a_gap_is_class_activation_mapping():
    """Zhou et al. 2016, eq. 2: M_c(x, y) = Σ_k w_k f_k(x, y), here from the mean and divided by the places."""
    where = TokenMap("tokens", (), GRID, torch.full((12,), 1 / 12))
    model = make_head("linear", (WIDTH,), CLASSES)
    reader = MarginModel(model, where, Standardize(), torch.zeros(CLASSES))
    x, mean = some_tokens(1, 12), some_tokens(5, 12).mean((0, 1)).expand(12, -1)
    parts = replacement_contributions(reader, x, mean, toward(1))
    weight = (toward(1) @ model.ln.weight)[0].detach()
    assert parts.tokens[0] == pytest.approx(((x[0] - mean) @ weight / 12).numpy(), abs=1e-6)


@pytest.mark.parametrize("head", ["linear", "mlp", "mean-linear", "cls+mean", "large", "conv"])
def test_gradient_times_input_and_the_bias_term_add_up_to_the_logit(head):
    output = "mean" if head in ("linear", "mlp") else "tokens"
    reader = reader_for(head, output, zscore())
    u = reader.scaled(some_tokens())
    parts = gradient_times_input(reader, u, toward(0, 2))
    margin = reader.margins(u, toward(0, 2)).detach().numpy()
    assert parts.tokens.sum(1) + sum(parts.beside.values()) == pytest.approx(margin, abs=1e-5)
    assert np.abs(parts.beside["bias term"]).max() > 1e-3


@pytest.mark.parametrize(
    "explain, words",
    [
        (lambda: gradient_times_input(reader_for("attention"), some_tokens(), toward(0, 0)), "adds up to nothing"),
        (lambda: contributions.token_source(run_of("cls")), "no places.*--kind attention"),
        (lambda: contributions.token_source(run_of("pooler")), "no places.*--kind attention"),
        (lambda: contributions.token_map(run_of("tokens"), None, None), "--prefix and --grid"),
    ],
)
def test_what_has_no_parts_or_places_is_refused_with_what_there_is(explain, words):
    with pytest.raises(BadOption, match=words):
        explain()


def test_parts_of_resized_tokens_come_back_through_the_transposed_resize():
    reader = reader_for("large", "tokens-17")
    x = some_tokens(1)
    rows = resized(x, 17).requires_grad_(True)
    (slope,) = torch.autograd.grad(margin_of(reader.model(rows), 1).sum(), rows)
    matrix = resized(torch.eye(TOKENS)[None], 17)[0]  # [17, T]
    expected = (x[0] * (matrix.T @ slope[0])).sum(1).numpy()
    assert gradient_times_input(reader, x, toward(1)).tokens[0] == pytest.approx(expected, abs=1e-5)


def test_a_patch_grid_resized_keeps_the_class_token_to_itself():
    where = places_for("tokens-6x8")
    assert where.matrix.shape == (49, TOKENS)
    assert where.matrix[0].tolist() == [1.0] + [0.0] * 12 and (where.matrix[1:, 0] == 0).all()
    assert where.matrix.sum(1).numpy() == pytest.approx(1.0, abs=1e-6)


def run_of(output: str, task: str = "multiclass"):
    """What the maps read of a run, without a folder."""
    return SimpleNamespace(
        head="large", output=output, task=task, classes=("a", "b", "c"), path="runs/x", standardize=Standardize(),
        model=reader_for("large").model, config={"view": {"label": "vit/x", "shape": [TOKENS, WIDTH]}},
        calibration=SimpleNamespace(correction=(0.0, 0.0, 0.0)),
    )  # fmt: skip


def test_the_class_tokens_part_is_a_number_beside_the_map():
    x, mean = some_tokens(1), torch.zeros(TOKENS, WIDTH)
    run = run_of("tokens")
    options = ("replace", mean, "zeros", run.model)
    (found,) = contributions.contribution_maps(run, places_for("tokens"), x, toward(0), *options)
    head = MarginModel(run.model, places_for("tokens"), Standardize(), torch.zeros(3))
    parts = replacement_contributions(head, x, mean, toward(0))
    assert found.values.shape == GRID and "against zeros" in found.how
    assert found.beside["class token"] == pytest.approx(parts.tokens[0, 0])
    assert found.values.ravel() == pytest.approx(parts.tokens[0, 1:])


def test_a_gap_with_a_norm_behind_it_is_no_sum_of_places():
    run, where = run_of("gap"), TokenMap("tokens", (), GRID, torch.full((12,), 1 / 12))
    x = some_tokens(2, 12)
    contributions.check_gap(run, where, x, x.mean(1).half())
    with pytest.raises(BadOption, match="not the mean of its map"):
        contributions.check_gap(run, where, x, torch.nn.functional.layer_norm(x.mean(1), (WIDTH,)))


def test_without_the_view_only_a_head_that_keeps_its_statistics_has_a_mean_token():
    run = run_of("tokens")
    with pytest.raises(BadOption, match="--method gradient"):
        contributions.mean_training_token(run, places_for("tokens"), None)
    run.standardize = zscore()
    mean, words = contributions.mean_training_token(run, places_for("tokens"), None)
    assert mean.shape == (TOKENS, WIDTH) and (mean == run.standardize.mean).all() and "kept" in words


def test_a_control_has_the_same_numbers_in_another_order():
    model = make_head("large", (TOKENS, WIDTH), CLASSES)
    other = with_shuffled_weights(model)
    for value, shuffled in zip(model.parameters(), other.parameters(), strict=True):
        assert sorted(shuffled.flatten().tolist()) == sorted(value.flatten().tolist())
    assert not torch.equal(other.ln1.weight, model.ln1.weight)
    assert torch.equal(with_shuffled_weights(model).ln1.weight, other.ln1.weight), "always the same order"


def test_how_like_its_control_a_map_is_goes_by_ranks():
    values = np.arange(6.0).reshape(2, 3)
    controls = (values**3, -values, np.zeros((2, 3)))
    likeness = [SaliencyMap("contribution", "", values, "", control=control).likeness for control in controls]
    assert likeness[:2] == pytest.approx([1, -1]) and likeness[2] is None


def test_of_many_labels_the_margin_is_the_logit_itself():
    assert class_margin_weights(np.array([1]), 3, 2.0, True).tolist() == [[0.0, 0.5, 0.0]]
    assert class_margin_weights(np.array([1]), 3, 2.0, False).tolist() == [[-0.25, 0.5, -0.25]]
