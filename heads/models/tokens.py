"""Heads on all tokens of an image: mean, class token + mean, convolution, Mindlina's large, (gated) attention.

Tokens stay as they are stored, [B, T, D]; nothing is transposed. Heads that attend take a weighted mean of all tokens,
prefix tokens too, by weights that are learned.

B batch, T tokens, P of them prefix tokens (class, registers), h·w = T - P patches, D width, C classes, H hidden,
K attention heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from featurecache.errors import BadOption
from heads.models.vector import dropout_layer, linear_layer

ARTICLE_HIDDEN = 256  # Linear(197, 256) in O. Mindlina's model 2
CONV_HIDDEN = 128
Grid = tuple[int, int] | None


class Large(nn.Module):
    """Mindlina 2024, model 2: on the transposed tokens [D, T] Linear(T, 256), ReLU, Flatten, Linear(D·256, C).

    State dict, as in her classes: ln1.weight [256, T], ln1.bias [256], ln2.weight [C, D·256] (column d·256 + h),
    ln2.bias [C]. Classes with other names (an nn.Sequential's ``0.weight``, ``0.bias``, ``3.weight``, ``3.bias``) have
    the same four tensors in the same order. ``dropout`` is on the hidden layer.

    Inside, tokens stay as they are stored, [T, D]: W1 @ x gives [H, D] for every image by one baddbmm, and the second
    weight is kept as [C, H, D] so that nothing is transposed in training (1.22 against 1.52 s an epoch in bf16, 3.27
    against 3.73 in float32, for 3,000 x 197 x 768). Adam works element by element, so the order changes no result."""

    def __init__(self, shape: tuple[int, ...], classes: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        tokens, width = shape
        self.ln1, second = nn.Linear(tokens, ARTICLE_HIDDEN), nn.Linear(width * ARTICLE_HIDDEN, classes)
        self.dropout = nn.Dropout(dropout)
        inside = second.weight.detach().view(classes, width, ARTICLE_HIDDEN).transpose(1, 2).contiguous()
        self.second = nn.Parameter(inside)  # [C, H, D]
        self.second_bias = nn.Parameter(second.bias.detach())  # [C]
        self.register_state_dict_post_hook(_to_article)
        self.register_load_state_dict_pre_hook(_from_article)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """float32 [B, T, D] -> [B, C]."""
        weight = self.ln1.weight.expand(len(x), -1, -1)
        hidden = torch.baddbmm(self.ln1.bias[:, None], weight, x).relu_()  # [B, H, D]
        return nn.functional.linear(self.dropout(hidden).flatten(1), self.second.flatten(1), self.second_bias)

    def layers(self) -> list[tuple[str, str, str, int]]:
        classes, hidden, width = self.second.shape
        tokens = self.ln1.in_features
        return [
            ("", "transpose", f"[{width}×{tokens}]", 0),
            ("ln1", f"Linear({tokens}, {hidden})", f"[{width}×{hidden}]", tokens * hidden + hidden),
            ("", "ReLU, Flatten", f"[{width * hidden}]", 0),
            *dropout_layer(self.dropout, width * hidden),
            ("ln2", f"Linear({width * hidden}, {classes})", f"[{classes}]", width * hidden * classes + classes),
        ]


def _to_article(module: nn.Module, state: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    second = state.pop(prefix + "second")  # [C, H, D]
    state[prefix + "ln2.weight"] = second.transpose(1, 2).reshape(len(second), -1)
    state[prefix + "ln2.bias"] = state.pop(prefix + "second_bias")


def _from_article(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    assert isinstance(module, Large)
    classes, hidden, width = module.second.shape
    weight = state.get(prefix + "ln2.weight")
    if weight is not None and weight.shape == (classes, width * hidden):  # any other shape is named by torch itself
        state[prefix + "second"] = weight.view(classes, width, hidden).transpose(1, 2)
        del state[prefix + "ln2.weight"]
    if prefix + "ln2.bias" in state:
        state[prefix + "second_bias"] = state.pop(prefix + "ln2.bias")


class FixedVectorLinear(nn.Module):
    """One linear layer on a vector that is computed from the tokens and that no training changes. State dict: ln.*"""

    name, what, with_cls = "", "", False

    def __init__(
        self, shape: tuple[int, ...], classes: int, *, prefix: tuple[str, ...] = (), grid: Grid = None,
        dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        if grid is None:
            raise BadOption(
                f"{self.name} averages the patch tokens, and which rows of this output they are is not known "
                "(tokens-257 mixes them): --output tokens or tokens-16x16 says it."
            )
        if self.with_cls and "cls" not in prefix:
            raise BadOption(
                f"{self.name} needs a class token, and these tokens have none "
                f"(prefix: {', '.join(prefix) or 'empty'}). mean-linear does without."
            )
        self.prefix = prefix
        self.dropout = nn.Dropout(dropout)
        self.ln = nn.Linear((1 + self.with_cls) * shape[1], classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """float32 [B, T, D] -> [B, C]."""
        return self.ln(self.dropout(self.vectors(x)))

    def vectors(self, x: torch.Tensor) -> torch.Tensor:
        """What the layer sees: float32 [B, T, D] -> [B, D], with the class token [B, 2D]."""
        mean = x[:, len(self.prefix) :].mean(1)
        return torch.cat([x[:, self.prefix.index("cls")], mean], dim=1) if self.with_cls else mean

    def layers(self) -> list[tuple[str, str, str, int]]:
        width = self.ln.in_features
        return [("", self.what, f"[{width}]", 0), *dropout_layer(self.dropout, width), linear_layer("ln", self.ln)]


class MeanLinear(FixedVectorLinear):
    """The mean of the patch tokens, without any prefix token, into one linear layer.

    Global average pooling: Lin et al. 2014, Network In Network, arXiv:1312.4400. The same function as ``linear`` on the
    output ``mean`` (up to the rounding of what is stored), which reads T times less; this one is for views that hold
    tokens alone. State dict: ln.*."""

    name, what = "mean-linear", "mean of the patches"


class ClsMean(FixedVectorLinear):
    """The class token and the mean of the patch tokens, concatenated, into one linear layer.

    DINOv2's linear evaluation offers its probes both: Oquab et al. 2023, arXiv:2304.07193. State dict: ln.* with the
    class token's D columns first."""

    name, what, with_cls = "cls+mean", "class token, mean of the patches", True


class Conv(nn.Module):
    """A small convolution over the patch grid: Linear(D, 128) on each patch, ReLU, 3×3 convolution, ReLU, mean over the
    grid, Linear(128, C). Prefix tokens are left out.

    The first two layers of ResNet's bottleneck (He et al. 2016, arXiv:1512.03385, figure 5), so that the convolution is
    narrow; then global average pooling (Lin et al. 2014, arXiv:1312.4400). Tokens [B, h·w, 128] are an image of 128
    channels in channels-last order as they lie. State dict: reduce.*, conv.*, fc.*."""

    def __init__(
        self, shape: tuple[int, ...], classes: int, *, prefix: tuple[str, ...] = (), grid: Grid = None,
        dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        if grid is None:
            raise BadOption(
                "conv needs to know which token lies where, and this output has no grid (tokens-257 mixes its rows): "
                "--output tokens or tokens-16x16 has one."
            )
        self.first, self.grid = len(prefix), grid
        self.reduce = nn.Linear(shape[1], CONV_HIDDEN)
        self.conv = nn.Conv2d(CONV_HIDDEN, CONV_HIDDEN, 3, padding=1)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(CONV_HIDDEN, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """float32 [B, T, D] -> [B, C]."""
        hidden = self.reduce(x).relu()[:, self.first :]  # of all tokens: a slice of x itself would be copied
        image = hidden.unflatten(1, self.grid).permute(0, 3, 1, 2)  # [B, H, h, w], channels last
        return self.fc(self.dropout(self.conv(image).relu().mean((2, 3))))

    def layers(self) -> list[tuple[str, str, str, int]]:
        width, (h, w), hidden = self.reduce.in_features, self.grid, CONV_HIDDEN
        return [
            ("reduce", f"Linear({width}, {hidden}), ReLU", f"[{h}×{w}×{hidden}]", width * hidden + hidden),
            ("conv", "Conv2d 3×3, ReLU", f"[{h}×{w}×{hidden}]", 9 * hidden * hidden + hidden),
            ("", "mean over the grid", f"[{hidden}]", 0),
            *dropout_layer(self.dropout, hidden),
            linear_layer("fc", self.fc),
        ]


HEAD_WIDTH = 64  # of an attention head, as in ViT-S, -B, -L: 12 heads for D=768
GATE_HIDDEN = 128  # as in the authors' code


class Attention(nn.Module):
    """The attentive probe: one learned query attends over all tokens in K heads, then one linear layer.

    The form is AIM's: El-Nouby et al. 2024, arXiv:2401.08541 (keys and values without bias, K = D/64 heads, no output
    projection, the query drawn from N(0, 0.02²)). Attentive probing comes from CAE (Chen et al. 2022,
    arXiv:2202.03026); V-JEPA's probe (Bardes et al. 2024, arXiv:2404.08471) adds a transformer block. AIM normalises
    each channel of the tokens by a batch norm without parameters: here ``--standardize zscore``, this head's default,
    does it with the statistics of all of train.

    With q_k, W_k, V_k the query, key and value weights of head k, [d], [d, D], [d, D]:
        score_kt = q_k · W_k x_t / sqrt(d) = (W_kᵀ q_k) · x_t / sqrt(d)
        head_k   = sum_t softmax_t(score)_kt V_k x_t = V_k (sum_t softmax_t(score)_kt x_t).
    So keys and values of the single tokens are never computed: T·K·D products an image instead of T·D·D, the same
    numbers and gradients. State dict: query [K, d], key.weight [D, D], value.weight [D, D], fc.*."""

    def __init__(self, shape: tuple[int, ...], classes: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        width = shape[1]
        most = max(1, width // HEAD_WIDTH)
        self.heads = max(k for k in range(1, most + 1) if width % k == 0)  # D/64, or the next smaller that divides D
        self.query = nn.Parameter(torch.empty(self.heads, width // self.heads))
        if not self.query.is_meta:  # there torch would import sympy first, for seconds
            nn.init.normal_(self.query, std=0.02)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(width, classes)

    def attention(self, x: torch.Tensor) -> torch.Tensor:
        """How much each head looks at each token: float32 [B, T, D] -> [B, K, T], sums over T are 1."""
        heads, inner = self.query.shape
        directions = torch.einsum("kdi,kd->ki", self.key.weight.unflatten(0, (heads, inner)), self.query)  # [K, D]
        return nn.functional.linear(x, directions * inner**-0.5).softmax(1).transpose(1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """float32 [B, T, D] -> [B, C]."""
        pooled = torch.bmm(self.attention(x), x)  # [B, K, D]
        value = self.value.weight.unflatten(0, self.query.shape)  # [K, d, D]
        heads = torch.einsum("bki,kdi->bkd", pooled, value)
        return self.fc(self.dropout(heads.flatten(1)))

    def layers(self) -> list[tuple[str, str, str, int]]:
        width, heads = self.fc.in_features, self.heads
        return [
            ("query, key", f"attention over tokens, {heads} heads", f"[{heads}×T]", width + width * width),
            ("value", f"Linear({width}, {width})", f"[{width}]", width * width),
            *dropout_layer(self.dropout, width),
            linear_layer("fc", self.fc),
        ]


class GatedAttention(nn.Module):
    """Gated attention MIL: Ilse et al. 2018, Attention-based Deep Multiple Instance Learning, arXiv:1802.04712, eq. 9.

    a_t = softmax_t(w · (tanh(V x_t) * sigmoid(U x_t))), z = sum_t a_t x_t, Linear(D, C); H = 128. State dict:
    gate.weight [2H, D], gate.bias [2H] (V above U), score.weight [1, H] (its bias would cancel), fc.*."""

    def __init__(self, shape: tuple[int, ...], classes: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        width = shape[1]
        self.gate = nn.Linear(width, 2 * GATE_HIDDEN)
        self.score = nn.Linear(GATE_HIDDEN, 1, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(width, classes)

    def attention(self, x: torch.Tensor) -> torch.Tensor:
        """How much it looks at each token: float32 [B, T, D] -> [B, 1, T], sums over T are 1."""
        what, gate = self.gate(x).chunk(2, dim=2)
        return self.score(what.tanh() * gate.sigmoid()).softmax(1).transpose(1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """float32 [B, T, D] -> [B, C]."""
        return self.fc(self.dropout(torch.bmm(self.attention(x), x).squeeze(1)))

    def layers(self) -> list[tuple[str, str, str, int]]:
        width, hidden = self.fc.in_features, self.gate.out_features
        return [
            ("gate", f"Linear({width}, {hidden})", f"[T×{hidden}]", width * hidden + hidden),
            ("score", f"tanh × sigmoid, Linear({hidden // 2}, 1)", "[T]", hidden // 2),
            ("", "softmax over tokens, weighted sum", f"[{width}]", 0),
            *dropout_layer(self.dropout, width),
            linear_layer("fc", self.fc),
        ]


def attention(
    shape: tuple[int, ...], classes: int, *, dropout: float = 0.0, gated: bool = False
) -> Attention | GatedAttention:
    return (GatedAttention if gated else Attention)(shape, classes, dropout=dropout)
