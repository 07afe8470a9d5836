"""The steps of the ``large`` head, with the gradient written out.

Notation: B batch, S chunk of images, T tokens, D width, H = 256 hidden, C classes.

    h_b = relu(W1 x_b + b1) [H, D];  z_b = W2 · h_b + b2 [C];  loss of z and its gradient dz [B, C]
    dW2 = sum_b dz_b h_b;  dh_b = (dz_b W2) where h_b > 0;  dW1 = sum_b dh_b x_bT;  db1 = sum_b,d dh_b

Nearly all of it is the two products with x. What autograd adds are passes over arrays of the size of h for the whole
batch (25 MB for B=32, D=768), in memory; here a thread takes a few images at a time through all of them, so that they
stay in its cache. The sums over images are added up chunk by chunk in their order, whatever the number of threads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from heads.losses import Loss, StackedLoss
from heads.token_heads import Large

CHUNK = 8  # images a thread takes through at once


def worker_threads() -> ThreadPoolExecutor:
    """As many as torch has threads here, each computing on its own."""
    return ThreadPoolExecutor(torch.get_num_threads(), initializer=lambda: torch.set_num_threads(1))


class LargeSteps:
    """Gradients of one `Large` head without dropout; ``pool`` is shared by the heads of a loop."""

    def __init__(self, model: Large, loss: Loss, pool: ThreadPoolExecutor) -> None:
        self.model, self.pool = model, pool
        self.loss = StackedLoss([loss], torch.float32)
        self.hidden = torch.empty(0)  # [B, H, D], kept: fresh memory costs as much as what is done in it
        self.own = threading.local()

    def __call__(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Sets ``grad`` of every parameter for a batch x float32 [B, T, D]; the loss, a scalar tensor."""
        with torch.inference_mode():
            return self._gradients(x, y)

    def _gradients(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        w1, b1, w2, b2 = self.model.fc1.weight, self.model.fc1.bias, self.model.second, self.model.second_bias
        flat = w2.flatten(1)  # [C, H·D]
        if len(self.hidden) < len(x):
            self.hidden = torch.empty(len(x), *w2.shape[1:])
        h, z = self.hidden[: len(x)], torch.empty(len(x), len(w2))
        parts = [slice(start, min(start + CHUNK, len(x))) for start in range(0, len(x), CHUNK)]

        def forward(k: int) -> None:
            hidden = h[parts[k]]
            torch.matmul(w1, x[parts[k]], out=hidden)
            torch.relu_(hidden.add_(b1[:, None]))
            torch.addmm(b2, hidden.flatten(1), flat.T, out=z[parts[k]])

        self._each(forward, len(parts))
        losses, dz = self.loss(z[None], y)
        first, bias = torch.empty(len(parts), *w1.shape), torch.empty(len(parts), len(b1))

        def backward(k: int) -> None:
            hidden = h[parts[k]]
            below = self._buffer(hidden.shape)
            torch.mm(dz[0, parts[k]], flat, out=below.view(len(hidden), -1))
            torch.ops.aten.threshold_backward.grad_input(below, hidden, 0, grad_input=below)
            torch.sum(below, (0, 2), out=bias[k])
            torch.sum(torch.bmm(below, x[parts[k]].transpose(1, 2)), 0, out=first[k])

        self._each(backward, len(parts))
        w1.grad, b1.grad = first.sum(0), bias.sum(0)
        w2.grad, b2.grad = (dz[0].T @ h.flatten(1)).view_as(w2), dz[0].sum(0)
        return losses[0]

    def _buffer(self, shape: torch.Size) -> torch.Tensor:
        """[S, H, D] of this thread."""
        kept = getattr(self.own, "below", None)
        if kept is None or len(kept) < shape[0]:
            kept = self.own.below = torch.empty(shape)
        return kept[: shape[0]]

    def _each(self, work: Callable[[int], None], count: int) -> None:
        def alone(k: int) -> None:
            with torch.inference_mode():  # it is a thread's own
                work(k)

        list(self.pool.map(alone, range(count)))
