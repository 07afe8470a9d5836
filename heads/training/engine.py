"""The engine of training: steps of K heads on the same batches, stacked in one product or one head after another.

Features lie in memory as they are stored; a batch is one ``index_select`` and one conversion to float32, without a
loader and without a gradient of the input. Heads that are trained together differ in nothing that touches the batches:
the order belongs to the data (`batches`). Two ways, the faster for each kind (measured, `benchmarks/heads.py`):

- `StackedTrainer`: the first layers of K ``linear`` or ``mlp`` heads are one matrix, so a step is one large product for
  all of them, with the gradient written out; Adam works on the stack in one call. A head that is one linear layer on a
  fixed vector of the tokens (``mean-linear``, ``cls+mean``) is a ``linear`` head on these.
- `SequentialTrainer`: any other module, one after another on the shared batch. ``large`` heads are bound by their
  products (stacking them takes 1.5 times as long); `LargeSteps` has their gradient written out.

Each head has a generator of its own for initialisation and dropout, so head k is what it is alone.

K heads, B batch, T tokens, D width, H hidden, C classes or labels, n rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim.adam import adam

from featurecache.arithmetic import GAIN, onednn_gain, onednn_products
from featurecache.files.machine_state import read_state, state_key, write_state
from heads.models.common import own_randomness
from heads.models.tokens import FixedVectorLinear, Large
from heads.models.vector import Linear, Mlp
from heads.settings import Settings
from heads.task import Room, SplitData
from heads.training.batches import Augmenter, Loss, StackedLoss
from heads.training.large import LargeSteps

BETAS, EPSILON = (0.9, 0.999), 1e-8  # torch.optim.Adam's
COMPARED = 1 << 20  # logits that wait to be compared with their labels, about
WORTH_DIVIDING = 20_000_000  # multiply-adds: half a millisecond of one core

_OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": partial(torch.optim.SGD, momentum=0.9),
}


class Learner:
    """One head, or one network from pixels, in training: module, loss, optimiser and its own randomness."""

    def __init__(
        self, model: nn.Module, loss: Loss, generator: torch.Generator, settings: Settings,
        steps: LargeSteps | None = None,
    ) -> None:  # fmt: skip
        self.model, self.loss, self.generator = model, loss, generator
        self.bf16, self.clip_norm = settings.precision == "bf16", settings.clip_norm
        self.augment = None if settings.augment is None else Augmenter(settings.augment)
        self.written_out = None
        if steps is not None and isinstance(model, Large):
            self.written_out = partial(steps, model, StackedLoss([loss]))
        groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        everything = settings.decay_all or not settings.weight_decay  # then one group does
        for p in (p for p in model.parameters() if p.requires_grad):
            groups[p.ndim >= 2 or everything].append(p)
        kind = _OPTIMIZERS[settings.optimizer]
        decayed = [{"params": own, "weight_decay": settings.weight_decay * on} for on, own in groups.items() if own]
        self.optimizer = kind(decayed, lr=settings.lr, fused=True)

    def step(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One step on a batch x float32 [B, ...], y [B, ...]; the loss [] and the logits [B, C] before it."""
        loss, logits = self._by_autograd(x, y) if self.written_out is None else self.written_out(y)
        if self.clip_norm is not None:
            with torch.inference_mode():  # in which the gradients that are written out were made
                nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self.optimizer.step()
        return loss, logits

    def _by_autograd(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with own_randomness(self.generator):
            x = x if self.augment is None else self.augment(x)
            with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
                logits = self.model(x)
            loss = self.loss(logits.float() if self.bf16 else logits, y)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        return loss.detach(), logits.detach()


class SequentialTrainer:
    """K heads of any kind, stepped one after another on the shared batch; ``steps``: what they take them by, where
    their gradients are written out."""

    def __init__(self, learners: Sequence[Learner], steps: LargeSteps | None = None) -> None:
        self.learners, self.steps = list(learners), steps
        self.room: Room | None = None if steps is None else steps.room

    def __len__(self) -> int:
        return len(self.learners)

    def set_rates(self, lr: np.ndarray) -> None:
        """The learning rate of each head from here on, float64 [K]."""
        for learner, rate in zip(self.learners, lr.tolist(), strict=True):
            for group in learner.optimizer.param_groups:
                group["lr"] = rate

    def step(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The losses [K] and logits [K, B, C] of the heads before this step."""
        if self.steps is not None:
            self.steps.load(x)
        losses, logits = zip(*(learner.step(x, y) for learner in self.learners), strict=True)
        return torch.stack([loss.cpu() for loss in losses]), torch.stack(logits)

    def logits(self, data: SplitData) -> np.ndarray:
        """float64 [K, n, C], without dropout."""
        return logits_of([learner.model for learner in self.learners], data)

    def state(self, k: int) -> dict[str, torch.Tensor]:
        """A copy of head k's state dict."""
        state = self.learners[k].model.state_dict()
        return {name: value.detach().to("cpu", copy=True) for name, value in state.items()}

    def retain(self, staying: list[int]) -> None:
        self.learners = [self.learners[k] for k in staying]


class StackedTrainer:
    """K heads of ``linear`` or ``mlp`` in stacked parameters.

    ``w``: [K, C, D] and [K, C], or for mlp also those of the second layer. Adam with K learning rates in one call: it
    steps u = w / lr with lr 1, for its step depends on the gradients alone, and w = lr u."""

    def __init__(
        self, models: Sequence[nn.Module], losses: Sequence[Loss], generators: Sequence[torch.Generator],
        settings: Sequence[Settings],
    ) -> None:  # fmt: skip
        parameters = [dict(model.named_parameters()) for model in models]
        self.names = list(parameters[0])
        self.w = [torch.stack([own[name].detach() for own in parameters]) for name in self.names]  # [K, ...] each
        self.mean, self.square = [torch.zeros_like(w) for w in self.w], [torch.zeros_like(w) for w in self.w]
        self.steps = [torch.zeros(()) for _ in self.w]
        self.loss, self.generators = StackedLoss(losses), list(generators)
        self.hidden = isinstance(models[0], Mlp)
        self.dropout = [float(getattr(getattr(m, "dropout", None), "p", 0.0)) for m in models]
        self.decay = torch.tensor([s.weight_decay for s in settings], dtype=torch.float32)
        self.decoupled = torch.tensor([s.optimizer == "adamw" for s in settings])
        self.bf16 = settings[0].precision == "bf16"
        limits = [math.inf if s.clip_norm is None else s.clip_norm for s in settings]
        self.clip_norm = None if all(map(math.isinf, limits)) else torch.tensor(limits, dtype=torch.float32)
        self.lr = torch.tensor([s.lr for s in settings], dtype=torch.float32)
        self._prepare()
        self.u = [w / f for w, f in zip(self.w, self.factor, strict=True)]

    room = None  # for batches: theirs are small

    def __len__(self) -> int:
        return len(self.lr)

    def _prepare(self) -> None:
        """What a step takes of the heads that are there; ``factor`` and ``apart`` follow the numbers in ``lr``."""
        self.factor = [self.lr.view(-1, *[1] * (w.ndim - 1)) for w in self.w]
        coupled, apart = self.decay * ~self.decoupled, self.decay * self.decoupled
        self.coupled = coupled.view(-1, 1, 1) if bool(coupled.any()) else None
        self.apart = apart.view(-1, 1, 1) if bool(apart.any()) else None

    def set_rates(self, lr: np.ndarray) -> None:
        rates = torch.from_numpy(lr).float()
        if not torch.equal(rates, self.lr):
            self.lr.copy_(rates)
            for w, u, f in zip(self.w, self.u, self.factor, strict=True):
                torch.div(w, f, out=u)

    @torch.inference_mode()
    def step(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One step on a batch x float32 [B, D], y [B, ...]; the losses [K] and logits [K, B, C] before it."""
        losses, logits, gradients = self._gradients(x, y)
        if self.clip_norm is not None:  # each head's own length, by the rule of torch's clip_grad_norm_
            length = torch.stack([g.flatten(1).norm(dim=1) for g in gradients]).norm(dim=0)
            shorter = (self.clip_norm / (length + 1e-6)).clamp_max(1.0)
            gradients = [g * shorter.view(-1, *[1] * (g.ndim - 1)) for g in gradients]
        for w, u, g in zip(self.w, self.u, gradients, strict=True):
            if w.ndim == 3 and self.coupled is not None:
                g.addcmul_(w, self.coupled)
            if w.ndim == 3 and self.apart is not None:
                u.mul_(1 - self.apart * self.lr.view(-1, 1, 1))
        adam(
            self.u, gradients, self.mean, self.square, [], self.steps, fused=True, amsgrad=False, beta1=BETAS[0],
            beta2=BETAS[1], lr=1.0, weight_decay=0.0, eps=EPSILON, maximize=False,
        )  # fmt: skip
        for w, u, f in zip(self.w, self.u, self.factor, strict=True):
            torch.mul(u, f, out=w)
        return losses, logits.transpose(1, 2)

    def _gradients(
        self, x: torch.Tensor, y: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:  # fmt: skip
        """Losses [K], logits [K, C, B], and the gradient of every stack."""
        if self.hidden:
            return self._of_mlp(x, y)
        w, b = self.w
        if not any(self.dropout):
            z = self._first(w, b, x)
            losses, dz = self.loss(z, y)
            return losses, z, [self._product(dz.flatten(0, 1), x.T).view_as(w), dz.sum(2)]
        dropped = x * torch.stack([self._mask(k, x.shape) for k in range(len(self))])  # [K, B, D]
        z = torch.baddbmm(b[:, :, None], w, dropped.transpose(1, 2))
        losses, dz = self.loss(z, y)
        return losses, z, [torch.bmm(dz, dropped), dz.sum(2)]

    def _of_mlp(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        w1, b1, w2, b2 = self.w
        hidden = self._first(w1, b1, x).relu_()  # [K, H, B]
        mask = (hidden > 0).to(hidden.dtype)
        if any(self.dropout):
            shape = (len(x), w1.shape[1])
            dropped = torch.stack([self._mask(k, shape).T for k in range(len(self))])
            hidden, mask = hidden.mul_(dropped), mask.mul_(dropped)
        z = torch.baddbmm(b2[:, :, None], w2, hidden)
        losses, dz = self.loss(z, y)
        below = torch.bmm(w2.transpose(1, 2), dz).mul_(mask)  # [K, H, B]
        first = self._product(below.flatten(0, 1), x.T).view_as(w1)
        return losses, z, [first, below.sum(2), torch.bmm(dz, hidden.transpose(1, 2)), dz.sum(2)]

    def _first(self, w: torch.Tensor, b: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """w [K, J, D], b [K, J], x [B, D] -> [K, J, B]; w xT takes half as long as x wT where K·J is small."""
        return self._product(w.flatten(0, 1), x).view(*b.shape, -1).add_(b[:, :, None])

    def _product(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """a [M, I], b [J, I] -> a bT [M, J]."""
        return (a.bfloat16() @ b.bfloat16().T).to(a.dtype) if self.bf16 else a @ b.T

    def _mask(self, k: int, shape: Sequence[int]) -> torch.Tensor:
        """Inverted dropout of head k from its own generator (1 where it has none)."""
        if not (p := self.dropout[k]):
            return torch.ones(tuple(shape))
        return torch.empty(tuple(shape)).bernoulli_(1 - p, generator=self.generators[k]).div_(1 - p)

    @torch.inference_mode()
    def logits(self, data: SplitData) -> np.ndarray:
        """float64 [K, n, C], without dropout."""
        parts = []
        for x in data.chunks():
            z = x @ self.w[0].flatten(0, 1).T
            z = z.view(len(x), len(self), -1).transpose(0, 1) + self.w[1][:, None]
            parts.append(torch.baddbmm(self.w[3][:, None], z.relu(), self.w[2].transpose(1, 2)) if self.hidden else z)
        return torch.cat(parts, 1).double().numpy()

    def state(self, k: int) -> dict[str, torch.Tensor]:
        return {name: w[k].clone() for name, w in zip(self.names, self.w, strict=True)}

    def retain(self, staying: list[int]) -> None:
        for stacks in (self.w, self.u, self.mean, self.square):
            stacks[:] = [stack[staying] for stack in stacks]
        self.lr, self.decay, self.decoupled = self.lr[staying], self.decay[staying], self.decoupled[staying]
        self.clip_norm = None if self.clip_norm is None else self.clip_norm[staying]
        self.generators = [self.generators[k] for k in staying]
        self.dropout = [self.dropout[k] for k in staying]
        self.loss.retain(staying)
        self._prepare()


Trainer = StackedTrainer | SequentialTrainer


def make_trainer(
    models: Sequence[nn.Module], losses: Sequence[Loss], generators: Sequence[torch.Generator],
    settings: Sequence[Settings],
) -> Trainer:  # fmt: skip
    """The faster way to train these heads, which have one architecture and one batch order."""
    if _is_stackable(models[0], settings):
        return StackedTrainer(models, losses, generators, settings)
    plain = [model for model in models if isinstance(model, Large) and not model.dropout.p]
    steps = LargeSteps(plain[0], settings[0].precision) if plain else None
    own = zip(models, losses, generators, settings, strict=True)
    return SequentialTrainer([Learner(*each, steps if each[0] in plain else None) for each in own], steps)


def _is_stackable(model: nn.Module, settings: Sequence[Settings]) -> bool:
    return isinstance(model, Linear | Mlp | FixedVectorLinear) and all(each.optimizer != "sgd" for each in settings)


def work_of_a_step(model: nn.Module, settings: Sequence[Settings], shape: Sequence[int]) -> int:
    """Multiply-adds, roughly, that are done at once in a step of such heads: of all that are stacked, else of one, so
    that a head among others is computed as it is alone."""
    stackable, batch_size = _is_stackable(model, settings), settings[0].batch_size
    if len(shape) == 1 or stackable:
        return (len(settings) if stackable else 1) * batch_size * sum(p.numel() for p in model.parameters())
    return batch_size * math.prod(shape) * 64


def onednn_is_faster() -> bool:
    """As this machine has found once, for heads that are trained later to have the same bits. (Where a product gains
    nothing, fine-tuning takes 1.4 times as long: some of its gradients' products lose.)"""
    key = state_key(torch=torch.__version__)
    if (seen := read_state("products", key)) is None:
        write_state("products", key, seen := {"gain": onednn_gain()})
    return bool(seen["gain"] > GAIN)


@contextmanager
def arithmetic_for(work: float, device: str = "cpu") -> Iterator[str]:
    """Threads and float32 products of a training with so much ``work`` (multiply-adds) in a step. One thread where it
    is too little to be worth dividing: two threads wait for each other longer than a linear head's step takes, and on a
    busy machine a hundred times as long (tried: 1 ms a step became 60 ms). Where it is, products go to oneDNN if they
    are float32's there, and faster. Gives the way of products, as forward passes call it: ``onednn`` or ``library``."""
    before, dividing = torch.get_num_threads(), work >= WORTH_DIVIDING
    onednn = dividing and device == "cpu" and onednn_is_faster()
    with onednn_products() if onednn else nullcontext():
        torch.set_num_threads(before if dividing else 1)
        try:
            yield "onednn" if onednn else "library"
        finally:
            torch.set_num_threads(before)


@torch.no_grad()
def logits_of(models: Sequence[nn.Module], data: SplitData) -> np.ndarray:
    """float64 [K, n, C], without dropout; every chunk of features is read once for all heads."""
    training = [model.training for model in models]
    for model in models:
        model.eval()
    parts = [torch.stack([model(x).cpu().double() for model in models]) for x in data.chunks()]
    for model, was in zip(models, training, strict=True):
        model.train(was)
    return torch.cat(parts, 1).numpy()


def run_epoch(
    heads: Trainer, data: SplitData, order: Sequence[torch.Tensor], on_step: Callable[[int], Any] = lambda step: None
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """One pass over the batches; of each head the mean loss per row and the accuracy on what it was trained with (as
    drawn and augmented, with dropout), both before each step: float64 [K]. ``on_step`` is called before step 0, 1, …"""
    total, counted = torch.zeros(2, len(heads), dtype=torch.float64), 0
    waiting: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []  # to add up each batch costs a tenth of a step
    for step, (x, y) in enumerate(data.batches(order, heads.room)):
        on_step(step)
        losses, logits = heads.step(x, y)
        waiting.append((losses, logits, y))
        if len(waiting) * logits.numel() > COMPARED or step + 1 == len(order):
            of_batches, z, labels = zip(*waiting, strict=True)
            right, known = count_right(torch.cat(z, 1), torch.cat(labels))
            sizes = torch.tensor([len(y) for y in labels], dtype=torch.float64)
            total[0] += sizes @ torch.stack(of_batches).double()
            total[1], counted, waiting = total[1] + right, counted + known, []
    return (total[0] / sum(map(len, order))).numpy(), (total[1] / max(counted, 1)).numpy()


def count_right(logits: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Of logits [K, n, C] how many rows have their class y [n] as the largest, or of y [n, L] how many known labels are
    on their side of 1/2 [K]; and of how many."""
    if y.ndim == 1:
        return (logits.argmax(-1) == y).sum(1).cpu(), len(y)
    label_mask = ~y.isnan()
    return (((logits > 0) == (y == 1)) & label_mask).sum((1, 2)).cpu(), int(label_mask.sum())
