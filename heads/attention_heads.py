"""Heads that attend to tokens: a weighted mean of them, by weights that are learned.

B batch, T tokens, D width, C classes, H hidden, K attention heads. All tokens are attended to, prefix tokens too.
"""

from __future__ import annotations

import torch
from torch import nn

from heads.vector_heads import dropout_layer, linear_layer

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
    numbers and gradients. State dict: query [K, d], key.weight [D, D], value.weight [D, D], fc.*.
    """

    def __init__(self, shape: tuple[int, ...], classes: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        width = shape[1]
        self.heads = attention_heads(width)
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
    gate.weight [2H, D], gate.bias [2H] (V above U), score.weight [1, H] (its bias would cancel), fc.*.
    """

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


def attention_heads(width: int) -> int:
    """D/64; where that does not divide D, the next smaller number that does."""
    return max(k for k in range(1, max(1, width // HEAD_WIDTH) + 1) if width % k == 0)
