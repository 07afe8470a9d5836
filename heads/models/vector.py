"""Heads on one vector an image. B batch, D width, C classes, H hidden, N training rows, k neighbours."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

MLP_HIDDEN = 256
Nearest = tuple[torch.Tensor, torch.Tensor]  # cosines, row numbers
FLOOR = 1e-6  # the least share of votes that k-NN gives: a class without any has a logit, and a low one
QUERIES, ROWS = 1024, 16384  # similarities are computed in blocks of 1,024 × 16,384: 64 MB in float32


class Linear(nn.Module):
    """Mindlina 2024, model 1: D·C + C parameters (1,538 for D=768, C=2). State dict, as in her class: ln.weight [C, D],
    ln.bias [C].

    ``dropout`` is on the input. What ``ridge``, ``logreg`` and ``centroid`` solve has this form too."""

    def __init__(self, shape: tuple[int, ...], classes: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        (width,) = shape
        self.dropout = nn.Dropout(dropout)
        self.ln = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """float32 [B, D] -> [B, C]."""
        return self.ln(self.dropout(x))

    def layers(self) -> list[tuple[str, str, str, int]]:
        return [*dropout_layer(self.dropout, self.ln.in_features), linear_layer("ln", self.ln)]


class Mlp(nn.Module):
    """Linear(D, 256), ReLU, Dropout(0.5), Linear(256, C). State dict: fc1.*, fc2.*.

    One hidden layer with dropout: Srivastava et al. 2014, Dropout: A Simple Way to Prevent Neural Networks from
    Overfitting (0.5 for hidden units)."""

    def __init__(self, shape: tuple[int, ...], classes: int, *, dropout: float = 0.5) -> None:
        super().__init__()
        (width,) = shape
        self.fc1 = nn.Linear(width, MLP_HIDDEN)
        self.dropout = nn.Dropout(dropout)
        self.fc2 = nn.Linear(MLP_HIDDEN, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """float32 [B, D] -> [B, C]."""
        return self.fc2(self.dropout(self.fc1(x).relu()))

    def layers(self) -> list[tuple[str, str, str, int]]:
        hidden = self.fc1.out_features
        return [
            linear_layer("fc1", self.fc1),
            ("", "ReLU", f"[{hidden}]", 0),
            *dropout_layer(self.dropout, hidden),
            linear_layer("fc2", self.fc2),
        ]


class KNearest(nn.Module):
    """Weighted k nearest neighbours by cosine: Wu et al. 2018, arXiv:1805.01978; as DINO evaluates, Caron et al. 2021,
    arXiv:2104.14294 (eval_knn.py).

    Of the k training vectors of largest cosine s_i each gives its class exp(s_i / temperature) votes. The logit of a
    class is the log of its share of the votes, at least log 1e-6 (a class that train has not, or none of the k, is
    constantly there). Multi-label: for each label the k nearest of which the label is known, and the log-odds of their
    share of positives. Exact: every training vector is compared, in blocks.

    State dict: vectors float32 [N, D] of length 1, labels int64 [N] (multi-label float32 [N, L], NaN unknown), k and
    temperature. A module made without them is filled by ``load_state_dict``, whatever N is."""

    vectors: torch.Tensor
    labels: torch.Tensor
    k: torch.Tensor
    temperature: torch.Tensor

    def __init__(self, shape: tuple[int, ...], classes: int) -> None:
        super().__init__()
        self.shape, self.classes = shape, classes
        (width,) = shape
        self.register_buffer("vectors", torch.zeros(1, width))
        self.register_buffer("labels", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("k", torch.tensor(1))
        self.register_buffer("temperature", torch.tensor(0.07, dtype=torch.float64))
        self.register_load_state_dict_pre_hook(_take_sizes)

    @classmethod
    def of(cls, vectors: torch.Tensor, labels: torch.Tensor, classes: int, *, k: int, temperature: float) -> KNearest:
        """``vectors`` [N, D] of length 1; several modules may hold the same."""
        model = cls((vectors.shape[1],), classes)
        model.vectors, model.labels = vectors, labels
        model.k, model.temperature = torch.tensor(k), torch.tensor(temperature, dtype=torch.float64)
        return model.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """float32 [B, D] -> [B, C]."""
        if not len(x):
            return x.new_zeros(0, self.classes)
        return torch.cat([self.votes(*self.search(part, int(self.k))) for part in x.float().split(QUERIES)])

    def search(self, x: torch.Tensor, k: int) -> Nearest:
        """The k nearest of x [B, D], largest cosine first: cosines and row numbers [G, B, k].

        G = 1, or L where labels are known for different rows; rows that do not count have a cosine of -inf."""
        x = nn.functional.normalize(x, dim=1)
        best, masks = list[Nearest](), self._masks()
        for start in range(0, len(self.vectors), ROWS):
            cosines = x @ self.vectors[start : start + ROWS].T
            top = [_top(cosines, mask[start : start + ROWS], start, k) for mask in masks]
            best = [_merge_top(*pair, k) for pair in zip(best, top, strict=True)] if best else top
        return torch.stack([s for s, _ in best]), torch.stack([i for _, i in best])

    def votes(self, cosines: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Logits float32 [B, C] by the first k of what `search` gives."""
        k = int(self.k)
        cosines, rows = cosines[..., :k], rows[..., :k]
        weight = (cosines.double() / self.temperature).softmax(2).nan_to_num(0.0)  # NaN: no row counts
        if self.labels.ndim == 1:
            shares = weight.new_zeros(rows.shape[1], self.classes)
            shares.scatter_add_(1, self.labels[rows[0]], weight[0])
            return shares.clamp_min(FLOOR).log().float()
        positive = (self.labels[rows] == 1).double()  # [G, B, k, L]
        if len(rows) == 1:
            share = torch.einsum("bk,bkl->bl", weight[0], positive[0])
        else:
            share = torch.einsum("lbk,lbkl->bl", weight, positive)
        return share.clamp(FLOOR, 1 - FLOOR).logit().float()

    def _masks(self) -> list[torch.Tensor]:
        """bool [N]: the training rows that count, once for all classes or for each label."""
        if self.labels.ndim == 1:
            return [torch.ones(len(self.labels), dtype=torch.bool)]
        label_mask = ~self.labels.isnan()
        return [label_mask[:, 0]] if (label_mask == label_mask[:, :1]).all() else list(label_mask.T)

    def layers(self) -> list[tuple[str, str, str, int]]:
        return [("", "k nearest training vectors", "[k]", 0), ("", "log of their votes", f"[{self.classes}]", 0)]


def _top(cosines: torch.Tensor, mask: torch.Tensor, start: int, k: int) -> Nearest:
    counted = cosines if mask.all() else cosines.masked_fill(~mask, -torch.inf)
    values, rows = counted.topk(min(k, cosines.shape[1]), dim=1)
    return values, rows + start


def _merge_top(a: Nearest, b: Nearest, k: int) -> Nearest:
    values, rows = torch.cat([a[0], b[0]], 1), torch.cat([a[1], b[1]], 1)
    values, order = values.topk(min(k, values.shape[1]), dim=1)
    return values, rows.gather(1, order)


def _take_sizes(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Before loading: as many training vectors as the state dict has, where it is one of `KNearest`."""
    assert isinstance(module, KNearest)
    if problem := _problem(module, {key: state.get(prefix + key) for key in ("vectors", "labels", "k", "temperature")}):
        rest[-1].append(problem)  # the last argument of a hook are the error messages
        return
    module.vectors = torch.empty_like(state[prefix + "vectors"])
    module.labels = torch.empty_like(state[prefix + "labels"])


def _problem(module: KNearest, state: dict[str, torch.Tensor | None]) -> str:
    vectors, labels, k, temperature = state.values()
    if vectors is None or labels is None or k is None or temperature is None:
        return "it needs vectors, labels, k and temperature"
    if vectors.shape[1:] != module.shape or len(vectors) != len(labels) or vectors.dtype != torch.float32:
        shapes = f"vectors {list(vectors.shape)} and labels {list(labels.shape)}"
        return f"{shapes} are not those of {module.shape[0]} numbers"
    if k.numel() != 1 or k.is_floating_point() or not 1 <= int(k) <= len(vectors):
        return f"k is not between 1 and the {len(vectors)} training vectors"
    if temperature.numel() != 1 or not 0 < float(temperature) < float("inf"):
        return "the temperature is not above 0"
    if labels.ndim == 1 and labels.dtype == torch.int64:
        fine = bool(((labels >= 0) & (labels < module.classes)).all())
    else:
        fine = labels.dtype == torch.float32 and labels.shape == (len(vectors), module.classes)
    return "" if fine else f"the labels are not those of {module.classes} classes"


def dropout_layer(dropout: nn.Dropout, width: int) -> list[tuple[str, str, str, int]]:
    return [("", f"Dropout({dropout.p:g})", f"[{width}]", 0)] if dropout.p else []


def linear_layer(name: str, layer: nn.Linear) -> tuple[str, str, str, int]:
    count = sum(p.numel() for p in layer.parameters())
    return (name, f"Linear({layer.in_features}, {layer.out_features})", f"[{layer.out_features}]", count)
